"""Tiny hostile decoders of each family, in float64.

Hostile: gains of both signs around 1.3, biases, an embedding whose mean is not zero, grouped heads
whose total width is not the hidden size, and an MLP width with no power of two above 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rolora.decoder import BlockNames, DecoderNames

VOCABULARY, HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, TOKENS = 53, 36, 3, 4, 2, 11


@dataclass(frozen=True)
class Family:
    """What distinguishes a model family in these tests."""

    model_type: str
    head_dim: int
    intermediate_size: int
    options: dict[str, Any]


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", 12, 44, {"attention_bias": True, "mlp_bias": True}),
        Family("mistral", 12, 24, {"sliding_window": None}),
        Family("qwen2", 8, 36, {}),
        Family("qwen3", 20, 40, {"attention_bias": True}),
    )
}


@dataclass(frozen=True)
class TinyDecoder:
    """A model with the names of its parts."""

    model: PreTrainedModel
    names: DecoderNames

    def logits(self) -> Tensor:
        """Return logits [4, tokens, vocabulary] of fixed ids, most of the vocabulary among them."""
        ids = torch.arange(4 * TOKENS) * 17 % VOCABULARY
        with torch.no_grad():
            logits = self.model(input_ids=ids.reshape(4, TOKENS)).logits
        assert isinstance(logits, Tensor)
        return logits

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of all parameters and buffers."""
        return {key: value.clone() for key, value in self.model.state_dict().items()}

    def error_to(self, expected: Tensor) -> float:
        """Return the largest difference to expected logits, relative to the largest of these."""
        return float((self.logits() - expected).abs().max() / expected.abs().max())

    @property
    def rounding(self) -> float:
        """Bound of `error_to` for a model that differs by float64 rounding alone.

        A sum of n products is off by at most n eps of its absolute sum. A block chains about eight
        (its linears, and the products that fold and rotate them), none wider than the widest
        dimension; norms keep the relative size of an error, residual sums add the blocks' errors,
        and the head is one block more.
        """
        names = self.names
        attention = names.num_heads * names.head_dim
        widest = max(names.hidden_size, names.intermediate_size, attention)
        return 8 * (len(names.blocks) + 1) * widest * torch.finfo(torch.float64).eps


class DoubleNorm(nn.Module):
    """RMSNorm in the dtype of its input; the one of transformers computes in float32."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        gain = self.weight + self.offset
        return gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def decoder_names(config: PreTrainedConfig) -> DecoderNames:
    """Spell the names of all four families here, so that these tests need nothing but rolora."""

    def block(layer: int) -> BlockNames:
        base = f"model.layers.{layer}"
        return BlockNames(
            attention_norm=f"{base}.input_layernorm",
            query=f"{base}.self_attn.q_proj",
            key=f"{base}.self_attn.k_proj",
            value=f"{base}.self_attn.v_proj",
            output=f"{base}.self_attn.o_proj",
            mlp_norm=f"{base}.post_attention_layernorm",
            gate=f"{base}.mlp.gate_proj",
            up=f"{base}.mlp.up_proj",
            down=f"{base}.mlp.down_proj",
        )

    return DecoderNames(
        embedding="model.embed_tokens",
        blocks=tuple(block(layer) for layer in range(config.num_hidden_layers)),
        final_norm="model.norm",
        head="lm_head",
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        head_dim=config.head_dim,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
    )


def build_config(model_type: str, *, tied: bool = False) -> PreTrainedConfig:
    family = FAMILIES[model_type]
    return AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=family.intermediate_size,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=family.head_dim,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **family.options,
    )


def build_decoder(model_type: str, *, tied: bool = False) -> TinyDecoder:
    config = build_config(model_type, tied=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    for fqn, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = fqn.rpartition(".")
            double = DoubleNorm(module.weight.shape[0], module.variance_epsilon).double()
            setattr(model.get_submodule(parent), child, double)
    generator = torch.Generator().manual_seed(len(model_type))
    with torch.no_grad():
        for fqn, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            if fqn.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(1.3 * torch.where(noise < -1, -1.0, 1.0) + 0.4 * noise)
            elif "embed" in fqn:
                parameter.copy_(0.7 + noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return TinyDecoder(model, decoder_names(config))


@pytest.fixture(params=FAMILIES)
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_decoder() -> Callable[..., TinyDecoder]:
    return build_decoder


@pytest.fixture
def names() -> DecoderNames:
    return decoder_names(build_config("llama"))


@pytest.fixture
def names_of() -> Callable[[PreTrainedConfig], DecoderNames]:
    return decoder_names
