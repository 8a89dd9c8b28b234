"""Tiny hostile models: GQA, biases, gains, odd sizes; a tokenizer; a handful of conversations."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reslora.row_formats import Example, Message

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_llama(layers: int = 4, vocabulary: int = 300) -> LlamaForCausalLM:
    """Return a random float32 llama whose biases, gains and embedding mean are not zero or one."""
    generator = torch.Generator().manual_seed(7)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            offset = 0.5 if "norm" in name or "embed" in name else 0.0
            parameter.copy_(0.2 * noise + offset)
    return model.eval()


def draw_b(attached: nn.Module) -> None:
    """Give every B of an attached model random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def build_tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    """Return a character-level tokenizer, with or without a chat template."""
    special = [
        "<pad>",
        "<bos>",
        "<eos>",
        "<unk>",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|end|>",
    ]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(special + characters)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def tiny_examples(count: int) -> list[Example]:
    """Return conversations of different lengths."""
    return [
        Example(
            f"tiny:{index}",
            (
                Message("user", "what is " + "very " * (index % 4) + f"{index}?"),
                Message("assistant", f"it is {index * 7}"),
            ),
        )
        for index in range(count)
    ]


def contrary_examples() -> list[Example]:
    """Return conversations whose answers `tiny_examples` make less likely with every step."""
    return [
        Example(
            f"contrary:{index}",
            (Message("user", f"what is {index}?"), Message("assistant", "~" * 30)),
        )
        for index in range(3)
    ]
