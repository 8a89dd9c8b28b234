"""Tiny hostile fixtures: GQA, biases, gains, odd sizes, a tokenizer with a chat template."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return build_llama()


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(chat=True)


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(chat=False)


@pytest.fixture
def targets(llama: LlamaForCausalLM) -> list[str]:
    """Attention projections and the MLP's last linear of every layer."""
    endings = ("q_proj", "v_proj", "down_proj")
    return [name for name, _ in llama.named_modules() if name.endswith(endings)]
