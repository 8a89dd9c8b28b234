"""Fixtures of the adapter tests."""

from __future__ import annotations

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.reslora.tiny import build_llama, build_tokenizer


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
