"""Tiny hostile encoders for classification: biases and gains off zero and one, dropout, padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

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
