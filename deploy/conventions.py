"""What a decoder computes between its linears, read off its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from deploy.errors import UnsupportedModelError
from deploy.families import LONGROPE, Activation, WindowRule, family_of


@dataclass(frozen=True)
class LayerAttention:
    """What sets the attention of one layer apart."""

    window: int | None
    """How many tokens a token attends to, itself included; None is all."""
    rope: str | None
    """Layer type by which the config names its rotary embedding; None where all have one."""


@dataclass(frozen=True)
class Conventions:
    """What a decoder computes between its linears."""

    activation: Activation
    layers: tuple[LayerAttention, ...]
    attention_scale: float
    """Factor of the attention scores."""
    attention_cap: float | None
    """c of c tanh(score / c), in front of the mask; None caps nothing."""
    logit_cap: float | None
    """The same for logits."""
    embedding_scale: float | None
    """Factor of the embedding, float32; None is 1, and no product."""

    torch_attention: str
    """The attention of transformers that computes it: sdpa knows no cap, nor has Gemma 2 it."""


def conventions(config: PreTrainedConfig) -> Conventions:
    """Read off a config what its decoder computes.

    Raises:
        UnsupportedModelError: As `sliding_window_per_layer`, or another family.
    """
    family = family_of(config.model_type)
    scale_field = family.attention_scale_field
    score_cap = config.attn_logit_softcapping if family.caps_scores else None
    return Conventions(
        activation=family.activation,
        layers=tuple(
            LayerAttention(window, kind if family.rope_by_layer_type else None)
            for window, kind in zip(
                sliding_window_per_layer(config),
                getattr(config, "layer_types", None) or [None] * config.num_hidden_layers,
                strict=True,
            )
        ),
        attention_scale=float(getattr(config, scale_field) if scale_field else head_dim(config))
        ** -0.5,
        attention_cap=score_cap,
        logit_cap=config.final_logit_softcapping if family.caps_logits else None,
        embedding_scale=config.hidden_size**0.5 if family.scales_embedding else None,
        torch_attention="eager" if family.eager_only or score_cap is not None else "sdpa",
    )


def context_length(config: PreTrainedConfig) -> int:
    """Return for how many positions one table of the rotary embedding holds.

    That is the model's context, but with `longrope` only the original window: beyond it, all
    positions have other frequencies, and keys in a cache would have to be rotated anew.
    """
    context: int = config.max_position_embeddings
    for rope in rope_parameters(config).values():
        if rope.get("rope_type") == LONGROPE:
            context = min(context, rope["original_max_position_embeddings"])
    return context


def rope_parameters(config: PreTrainedConfig) -> dict[str | None, Mapping[str, Any]]:
    """Return the parameters of each rotary embedding, by `LayerAttention.rope`."""
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    if family_of(config.model_type).rope_by_layer_type:
        return dict(parameters)
    return {None: parameters}


def rotary_size(config: PreTrainedConfig) -> int:
    """Return how many entries of each head the rotary embedding turns."""
    parts = {rope.get("partial_rotary_factor", 1.0) for rope in rope_parameters(config).values()}
    return int(head_dim(config) * max(parts))


def sliding_window_per_layer(config: PreTrainedConfig) -> list[int | None]:
    """Return for each layer how many tokens it attends to, itself included; None is all.

    Raises:
        UnsupportedModelError: a layer type that is neither full nor sliding attention, or a family
            with one window for every layer whose config names layer types too.
    """
    family = family_of(config.model_type)
    window: int | None = getattr(config, "sliding_window", None)
    layer_types: Sequence[str] | None = getattr(config, "layer_types", None)
    count = config.num_hidden_layers
    if family.window is WindowRule.NONE or window is None:
        return [None] * count
    if family.window is WindowRule.EVERY_LAYER:
        if layer_types is not None and set(layer_types) != {"sliding_attention"}:
            raise UnsupportedModelError(
                f"model type {config.model_type!r} with layer_types {sorted(set(layer_types))}: "
                "this family has one window for every layer"
            )
        return [window] * count
    windows = {"full_attention": None, "sliding_attention": window}
    unknown = sorted(set(layer_types or ()) - windows.keys())
    if layer_types is None or unknown or len(layer_types) != count:
        raise UnsupportedModelError(
            f"model type {config.model_type!r}: layer_types must name {count} layers of "
            f"{' or '.join(windows)}, got {layer_types}"
        )
    return [windows[kind] for kind in layer_types]


def head_dim(config: PreTrainedConfig) -> int:
    """Return the size of a head."""
    size: int | None = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads
