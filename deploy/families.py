"""The parts and conventions of each decoder family, as data.

All families are decoders of blocks with RMSNorm, rotary attention and a gated MLP. A `Family` says
in what one of them departs from the others; `deploy.architecture` reads a config by it, and nothing
else asks for a model type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from deploy.errors import UnsupportedModelError


class WindowRule(StrEnum):
    """Which layers of a family attend through a sliding window."""

    NONE = "none"
    EVERY_LAYER = "every layer"
    LAYER_TYPES = "layer types"


class Activation(StrEnum):
    """What the gate of an MLP goes through."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"
    """GELU by its approximation with tanh."""


ACTIVATION_NAMES: Mapping[str, Activation] = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}
"""By the names that configs have for them."""

LONGROPE = "longrope"
"""Rotary embedding with one set of frequencies for texts within the original window, and another
for longer ones."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn", LONGROPE)
"""Rotary embeddings whose frequencies do not depend on the length of the text, up to a window."""


@dataclass(frozen=True)
class Family:
    """What sets one model family apart from the common layout."""

    window: WindowRule = WindowRule.NONE
    has_qk_norms: bool = False
    """Whether queries and keys are normalized, head by head."""
    activation: Activation = Activation.SILU
    activation_field: str = "hidden_act"
    """Field of the config that names it."""
    joins_projections: bool = False
    """Whether query, key and value are one matrix in its files, and gate and up another."""
    rotates_part: bool = False
    """Whether a config may leave part of each head without rotary embedding."""
    rope_by_layer_type: bool = False
    """Whether windowed and full attention have rotary embeddings of their own."""
    norm_offset: float = 0.0
    """What is added to the weight of an RMSNorm to give its gain."""
    has_post_norms: bool = False
    """Whether what attention and MLP add to the residual stream is normalized, too."""
    scales_embedding: bool = False
    """Whether the embedding is multiplied by the square root of its width."""
    attention_scale_field: str | None = None
    """Field of the config whose inverse square root scales attention scores; None: head size."""
    caps_logits: bool = False
    """Whether a config may cap logits by a tanh."""
    caps_scores: bool = False
    """Whether it may cap attention scores likewise; transformers ignores a cap of others."""
    eager_only: bool = False
    """Whether transformers has no sdpa for it, capped or not."""
    reads_gguf: bool = True
    """Whether transformers reads all of its config out of a GGUF file."""

    @property
    def has_own_layout(self) -> bool:
        """Whether its modules are others than ours (`deploy.module_layout`)."""
        return self.joins_projections or self.scales_embedding


_GEMMA = Family(
    window=WindowRule.LAYER_TYPES,
    activation=Activation.GELU_TANH,
    activation_field="hidden_activation",
    norm_offset=1.0,
    has_post_norms=True,
    scales_embedding=True,
    attention_scale_field="query_pre_attn_scalar",
    caps_logits=True,
    reads_gguf=False,
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(window=WindowRule.EVERY_LAYER),
    "qwen2": Family(window=WindowRule.LAYER_TYPES),
    "qwen3": Family(window=WindowRule.LAYER_TYPES, has_qk_norms=True),
    "phi3": Family(
        window=WindowRule.EVERY_LAYER,
        joins_projections=True,
        rotates_part=True,
        reads_gguf=False,
    ),
    "gemma2": replace(_GEMMA, caps_scores=True, eager_only=True),
    "gemma3_text": replace(_GEMMA, has_qk_norms=True, rope_by_layer_type=True),
}
"""By `model_type` of config.json."""

ENCODER_TYPES = ("bert", "roberta")
"""Model types of encoders, whose LayerNorms no rotation passes."""


def family_of(model_type: str, where: str = "model") -> Family:
    """Return the family of a `model_type`.

    Args:
        model_type: as in config.json.
        where: model named in the message.

    Raises:
        UnsupportedModelError: not one of `FAMILIES`.
    """
    if model_type in ENCODER_TYPES:
        raise UnsupportedModelError(
            f"{where}: model type {model_type!r} is an encoder: add --task classification to "
            "rolora finetune, --tasks classification to rolora evaluate; merge-rotate-quantize and "
            "export --format onnx take it as it is; here the decoders "
            f"{', '.join(FAMILIES)} are supported"
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{where}: model type {model_type!r} is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
