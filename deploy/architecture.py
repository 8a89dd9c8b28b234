"""A decoder read off its config: which module plays which part.

What sets a family apart comes from `deploy.families`; this is the only place that spells module
names. Biases are found on the modules themselves. What a config may ask for beyond that is refused
here, before any weight is read, because a rotation or a graph that ignored it would be silently
wrong.

Encoders, which have blocks of another kind, are in `encoder_architecture`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from deploy.conventions import head_dim, rope_parameters, sliding_window_per_layer
from deploy.errors import ConfigError, UnsupportedModelError
from deploy.families import ACTIVATION_NAMES, ROPE_TYPES, Family, family_of
from rolora.decoder import BlockNames, DecoderNames

TARGET_PARTS: Mapping[str, str] = {
    "q": "query",
    "k": "key",
    "v": "value",
    "o": "output",
    "gate": "gate",
    "up": "up",
    "down": "down",
}
"""Name of a target on the command line, to the field of `BlockNames`."""

ALL_TARGETS = "all"


@dataclass(frozen=True)
class QueryKeyNorms:
    """FQNs of the RMSNorms over each head of the queries and keys of one block."""

    query: str
    key: str


@dataclass(frozen=True)
class JoinedProjection:
    """A linear of a family's own layout that holds the rows of several of ours."""

    fqn: str
    parts: tuple[tuple[str, int], ...]
    """Name, under that FQN, and number of rows of each part, in order."""


def decoder_names(config: PreTrainedConfig) -> DecoderNames:
    """Name the parts of a decoder.

    Args:
        config: transformers config of a `*ForCausalLM`.

    Raises:
        UnsupportedModelError: another family, or a feature that we do not handle.
    """
    family = family_of(config.model_type)
    _refuse_unhandled_features(config, family)
    return DecoderNames(
        embedding="model.embed_tokens.table" if family.scales_embedding else "model.embed_tokens",
        blocks=tuple(
            _block_names(f"model.layers.{i}", family) for i in range(config.num_hidden_layers)
        ),
        final_norm="model.norm",
        head="lm_head",
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        head_dim=head_dim(config),
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        norm_offset=family.norm_offset,
    )


def qk_norms(config: PreTrainedConfig) -> tuple[QueryKeyNorms, ...]:
    """Return the q/k norms of each block, or nothing for a family that has none."""
    if not family_of(config.model_type).has_qk_norms:
        return ()
    return tuple(
        QueryKeyNorms(
            query=f"model.layers.{i}.self_attn.q_norm", key=f"model.layers.{i}.self_attn.k_norm"
        )
        for i in range(config.num_hidden_layers)
    )


def joined_projections(config: PreTrainedConfig) -> list[JoinedProjection]:
    """Return the projections that a family's own layout joins, in depth order; most join none."""
    if not family_of(config.model_type).joins_projections:
        return []
    queries, keys = (
        heads * head_dim(config)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    size = config.intermediate_size
    return [
        joined
        for i in range(config.num_hidden_layers)
        for joined in (
            JoinedProjection(
                f"model.layers.{i}.self_attn.qkv_proj",
                (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)),
            ),
            JoinedProjection(
                f"model.layers.{i}.mlp.gate_up_proj", (("gate_proj", size), ("up_proj", size))
            ),
        )
    ]


def resolve_targets(names: DecoderNames, targets: str) -> list[str]:
    """Turn `q,v` or `all` into the FQNs of the linears meant, in depth order.

    Args:
        names: from `decoder_names`.
        targets: comma-separated keys of `TARGET_PARTS`, or `all`.

    Raises:
        ConfigError: an unknown target, or none.
    """
    chosen = [target.strip() for target in targets.split(",") if target.strip()]
    known = f"{', '.join(TARGET_PARTS)} or {ALL_TARGETS}"
    unknown = [target for target in chosen if target not in {*TARGET_PARTS, ALL_TARGETS}]
    if unknown or not chosen:
        got = ", ".join(unknown) or "none"
        raise ConfigError(
            f"--targets {targets!r}: expected {known}, separated by commas; got {got}"
        )
    if ALL_TARGETS in chosen:
        return list(names.linears())
    parts = {TARGET_PARTS[target] for target in chosen}
    return [
        getattr(block, part)
        for block in names.blocks
        for part in TARGET_PARTS.values()
        if part in parts
    ]


def _block_names(prefix: str, family: Family) -> BlockNames:
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    qkv = f"{attention}.qkv_proj" if family.joins_projections else attention
    gate_up = f"{mlp}.gate_up_proj" if family.joins_projections else mlp
    after_attention = f"{prefix}.post_attention_layernorm"
    return BlockNames(
        attention_norm=f"{prefix}.input_layernorm",
        query=f"{qkv}.q_proj",
        key=f"{qkv}.k_proj",
        value=f"{qkv}.v_proj",
        output=f"{attention}.o_proj",
        mlp_norm=(
            f"{prefix}.pre_feedforward_layernorm" if family.has_post_norms else after_attention
        ),
        gate=f"{gate_up}.gate_proj",
        up=f"{gate_up}.up_proj",
        down=f"{mlp}.down_proj",
        attention_post_norm=after_attention if family.has_post_norms else None,
        mlp_post_norm=f"{prefix}.post_feedforward_layernorm" if family.has_post_norms else None,
    )


def _refuse_unhandled_features(config: PreTrainedConfig, family: Family) -> None:
    faults = []
    activation = getattr(config, family.activation_field)
    if ACTIVATION_NAMES.get(activation) is not family.activation:
        faults.append(f"{family.activation_field} is {activation!r}, expected {family.activation}")
    for rope in rope_parameters(config).values():
        rope_type = rope.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            faults.append(f"rope_type is {rope_type!r}, expected one of {', '.join(ROPE_TYPES)}")
        factor = rope.get("partial_rotary_factor", 1.0)
        if factor != 1.0 and not family.rotates_part:
            faults.append(f"partial_rotary_factor is {factor}, expected 1.0")
    if getattr(config, "use_bidirectional_attention", None):
        faults.append("use_bidirectional_attention is set, expected attention to earlier tokens")
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if experts:
        faults.append(f"a mixture of {experts} experts, expected one dense MLP")
    if config.num_attention_heads % config.num_key_value_heads:
        faults.append(
            f"{config.num_attention_heads} attention heads are no multiple of "
            f"{config.num_key_value_heads} key/value heads"
        )
    if faults:
        raise UnsupportedModelError(f"model type {config.model_type!r}: {'; '.join(faults)}")
    sliding_window_per_layer(config)
