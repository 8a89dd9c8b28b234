"""What every test shares: one thread, no network, a seed, and tiny models as a user has them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

torch.set_num_threads(1)

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text")
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer without merges: one token a byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny_model(model_type: str, *, tied: bool = False, **options: Any) -> PreTrainedModel:
    """Return a random float32 decoder: grouped heads, gains off one, an embedding off zero."""
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": len(SPECIAL_TOKENS) + 256,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "tie_word_embeddings": tied,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | options,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(len(model_type))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.3 + 0.4 * noise)
            elif "embed" in name:
                parameter.copy_(0.2 + noise)
            else:
                parameter.copy_(
                    noise * (0.5 if parameter.dim() == 1 else parameter.shape[1] ** -0.5)
                )
    return model


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=MODEL_TYPES)
def any_model_type(request: pytest.FixtureRequest) -> str:
    """Each supported model type in turn."""
    return str(request.param)


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`build_tiny_model`: (model_type, *, tied=False, **config options) -> model."""
    return build_tiny_model


@pytest.fixture
def save_tiny_model(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny model and its tokenizer: (model_type, *, dtype, shard_bytes, ...) -> path."""

    def save(
        model_type: str = "llama",
        *,
        dtype: torch.dtype = torch.float32,
        shard_bytes: int | None = None,
        **options: Any,
    ) -> Path:
        directory = tmp_path / f"tiny-{model_type}"
        model = build_tiny_model(model_type, **options).to(dtype)
        model.save_pretrained(directory, max_shard_size=shard_bytes or "5GB")
        build_tiny_tokenizer().save_pretrained(directory)
        return directory

    return save


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, check=False, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
