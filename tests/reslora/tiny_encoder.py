"""Tiny hostile encoders for classification: biases and gains off zero and one, dropout, padding."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from reslora.labelled_rows import LabelledExample

ENCODERS = ("bert", "roberta")


def build_encoder(
    model_type: str = "bert", *, labels: int = 3, layers: int = 3, **options: Any
) -> PreTrainedModel:
    """Return a random float32 encoder with a classification head, in evaluation mode."""
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 300,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 80,
            "type_vocab_size": 2,
            "pad_token_id": 0,
            "num_labels": labels,
            "problem_type": "regression" if labels == 1 else "single_label_classification",
        }
        | options,
    )
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise + (1.0 if "LayerNorm.weight" in name else 0.1))
    return model


def encoder_targets(model: PreTrainedModel) -> list[str]:
    """Return query, value and the MLP's last linear of every layer, square and not."""
    endings = ("self.query", "self.value", "output.dense")
    return [name for name, _ in model.named_modules() if name.endswith(endings)]


def encoder_batches(seed: int, rows: int = 5) -> list[dict[str, Tensor]]:
    """Return two batches with padding on the right, without labels."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for length in (11, 17):
        ids = torch.randint(1, 300, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -4:] = 0
        mask[2, -7:] = 0
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


def build_encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Return a character-level tokenizer that marks and joins texts as BERT's does."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {
        token: index
        for index, token in enumerate([*special, *(chr(code) for code in range(32, 127))])
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=72,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def labelled_examples(count: int) -> list[LabelledExample]:
    """Return texts of different lengths whose first letter tells their class."""
    words = ("good", "bad", "odd")
    return [
        LabelledExample(
            f"tiny:{index}", (f"{words[index % 3]} " + "so " * (index % 5) + f"{index}",), index % 3
        )
        for index in range(count)
    ]
