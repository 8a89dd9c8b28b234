"""Encoder families: which module plays which part. The only place that spells their names.

BERT and RoBERTa share their blocks: attention, then an MLP of two linears, each followed by a norm.
They differ in how positions are counted and in what pretraining leaves in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from deploy.architecture import ALL_TARGETS
from deploy.errors import ConfigError, UnsupportedModelError
from deploy.families import ENCODER_TYPES, FAMILIES
from rolora.encoder import EncoderBlockNames, EncoderNames


@dataclass(frozen=True)
class EncoderFamily:
    """What sets one family of encoders apart; all have the blocks of BERT."""

    counts_from_padding: bool
    """Whether the first position is the one after `pad_token_id`, not 0."""
    other_heads: tuple[str, ...]
    """Starts of tensor names of pretraining heads, which a classifier leaves out."""
    head_linears: tuple[str, str]
    """Linears of a classifier behind its last states, the first from the base model's place."""


ENCODER_FAMILIES: Mapping[str, EncoderFamily] = {
    "bert": EncoderFamily(
        counts_from_padding=False,
        other_heads=("cls.",),
        head_linears=("bert.pooler.dense", "classifier"),
    ),
    "roberta": EncoderFamily(
        counts_from_padding=True,
        other_heads=("lm_head.", "pooler.", "roberta.pooler."),
        head_linears=("classifier.dense", "classifier.out_proj"),
    ),
}
"""By `model_type` of config.json."""

ENCODER_HEAD = "classifier"
"""Module that turns an encoder's last states into logits of classes."""

ENCODER_TARGETS: Mapping[str, str] = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
"""Name of a target on the command line, to its place in an encoder's block."""

ENCODER_TARGET_ALIASES: Mapping[str, str] = {"query": "q", "key": "k", "value": "v"}
"""The papers' names of some targets."""


def encoder_family_of(model_type: str, where: str = "model") -> EncoderFamily:
    """Return the family of an encoder's `model_type`.

    Args:
        model_type: as in config.json.
        where: model named in the message.

    Raises:
        UnsupportedModelError: not one of `ENCODER_FAMILIES`.
    """
    if model_type not in ENCODER_FAMILIES:
        kind = f"model type {model_type!r} is "
        kind += "a decoder" if model_type in FAMILIES else "not supported"
        raise UnsupportedModelError(
            f"{where}: {kind}; --task classification takes the encoders "
            f"{', '.join(ENCODER_TYPES)}; leave it out to train a decoder on language"
        )
    return ENCODER_FAMILIES[model_type]


def check_encoder(config: PreTrainedConfig) -> None:
    """Refuse what transformers would drop in silence or use as another kind of model.

    Raises:
        UnsupportedModelError: another family, or a feature that we do not handle.
    """
    encoder_family_of(config.model_type)
    faults = []
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        faults.append(f"position_embedding_type is {positions!r}, expected 'absolute'")
    for option in ("is_decoder", "add_cross_attention"):
        if getattr(config, option, False):
            faults.append(f"{option} is true, expected an encoder")
    if faults:
        raise UnsupportedModelError(f"model type {config.model_type!r}: {'; '.join(faults)}")


def encoder_token_limit(config: PreTrainedConfig) -> int:
    """Return how many tokens an encoder reads at most."""
    limit: int = config.max_position_embeddings
    if encoder_family_of(config.model_type).counts_from_padding:
        limit -= config.pad_token_id + 1
    return limit


def encoder_names(config: PreTrainedConfig, *, with_head: bool) -> EncoderNames:
    """Name the parts of an encoder.

    Args:
        config: of a supported encoder.
        with_head: whether it is one for sequence classification; else the bare model, without
            pooler.

    Raises:
        UnsupportedModelError: as `check_encoder`.
    """
    check_encoder(config)
    prefix = f"{config.model_type}." if with_head else ""
    return EncoderNames(
        embedding=f"{prefix}embeddings.word_embeddings",
        positions=f"{prefix}embeddings.position_embeddings",
        token_types=f"{prefix}embeddings.token_type_embeddings",
        embedding_norm=f"{prefix}embeddings.LayerNorm",
        stack=f"{prefix}encoder",
        blocks=tuple(
            _block_names(f"{prefix}encoder.layer.{index}")
            for index in range(config.num_hidden_layers)
        ),
        head_linears=encoder_family_of(config.model_type).head_linears if with_head else None,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
    )


def _block_names(block: str) -> EncoderBlockNames:
    linears = {target: f"{block}.{place}" for target, place in ENCODER_TARGETS.items()}
    return EncoderBlockNames(
        fqn=block,
        query=linears["q"],
        key=linears["k"],
        value=linears["v"],
        output=linears["o"],
        attention_norm=f"{block}.attention.output.LayerNorm",
        up=linears["up"],
        down=linears["down"],
        mlp_norm=f"{block}.output.LayerNorm",
    )


def encoder_targets(config: PreTrainedConfig, targets: str) -> list[str]:
    """Turn `q,v`, `query,value` or `all` into the FQNs of an encoder's linears, in depth order.

    Args:
        config: transformers config of an encoder for sequence classification.
        targets: comma-separated keys of `ENCODER_TARGETS` or `ENCODER_TARGET_ALIASES`, or `all`.

    Raises:
        ConfigError: an unknown target, or none. `output` and `dense` are unknown, since both the
            attention and the MLP end in an `output.dense`.
    """
    encoder_family_of(config.model_type)
    chosen = [target.strip() for target in targets.split(",") if target.strip()]
    chosen = [ENCODER_TARGET_ALIASES.get(target, target) for target in chosen]
    unknown = [target for target in chosen if target not in {*ENCODER_TARGETS, ALL_TARGETS}]
    if unknown or not chosen:
        known = ", ".join([*ENCODER_TARGETS, *ENCODER_TARGET_ALIASES])
        raise ConfigError(
            f"--targets {targets!r}: expected {known} or {ALL_TARGETS} for an encoder, separated "
            f"by commas, where o is the last linear of the attention and down that of the MLP; got "
            f"{', '.join(unknown) or 'none'}"
        )
    parts = [
        place
        for target, place in ENCODER_TARGETS.items()
        if target in chosen or ALL_TARGETS in chosen
    ]
    return [
        f"{config.model_type}.encoder.layer.{index}.{place}"
        for index in range(config.num_hidden_layers)
        for place in parts
    ]
