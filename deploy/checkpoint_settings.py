"""What the middle stage is asked to do, with the defaults filled in."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.errors import ConfigError
from deploy.shortcut_merge import AUTO
from reslora.merge import MergeMethod
from rolora.equalization import Equalized
from rolora.kv_cache import FLOAT_KV_BITS, check_kv_bits
from rolora.mixed_precision import Budget
from rolora.overrides import Override
from rolora.rotation import DEFAULT_ROTATIONS, RotationKind, RotationName
from rolora.scheme import (
    ALL,
    FLOAT_BITS,
    UNQUANTIZED_BITS,
    QuantizationRecipe,
    Scheme,
    WeightMethod,
)
from rolora.scheme import AUTO as CHOSEN

FLOAT_SCHEME = "FP32"
"""Scheme of a checkpoint that is merged and rotated, but not quantized."""
EQUALIZED_BITS = 6
"""Most bits of inputs whose channels are scaled by default."""


@dataclass(frozen=True)
class RotationChoice:
    """Which rotations to draw for a model whose adapter brings none."""

    names: frozenset[RotationName]
    kind: RotationKind = RotationKind.HADAMARD
    seed: int = 0


def default_rotations(kv_bits: int) -> frozenset[RotationName]:
    """Return what a model is rotated by by default: with R3 if its KV cache has 4 bits.

    With 8 bits the scales of channels do without: on SmolLM2-135M such a cache moves the perplexity
    by -0.02 %, with R3 by 0.13 %, and R3 costs 7 % of a prompt's speed.
    """
    return DEFAULT_ROTATIONS | ({RotationName.R3} if kv_bits == 4 else set())


def parse_rotation(
    text: str | None, kind: RotationKind, seed: int, kv_bits: int = FLOAT_KV_BITS
) -> RotationChoice | None:
    """Read `r1,r2,r4` or `none`; None if text, kind and seed were all left at their defaults.

    Raises:
        ConfigError: A name is unknown.
    """
    if text is None:
        if (kind, seed) == (RotationKind.HADAMARD, 0):
            return None
        return RotationChoice(default_rotations(kv_bits), kind, seed)
    words = [word.strip().upper() for word in text.split(",") if word.strip()]
    if words == ["NONE"]:
        return RotationChoice(frozenset(), kind, seed)
    unknown = [word for word in words if word not in set(RotationName)]
    if unknown or not words:
        raise ConfigError(
            f"--rotate {text!r}: expected a list of r1, r2, r3, r4, or none; got "
            f"{', '.join(unknown) or text}"
        )
    return RotationChoice(frozenset(RotationName(word) for word in words), kind, seed)


def is_float(scheme: str) -> bool:
    """Return whether a scheme merges and rotates only."""
    return scheme.strip().upper() == FLOAT_SCHEME


def choose_recipe(
    scheme: str,
    *,
    weights: str = WeightMethod.GPTQ,
    group_size: int | None = None,
    clip_search: bool = True,
    activation_clip: float | Literal["auto"] | None = None,
    static: bool | Literal["auto", "all"] | None = None,
    embedding_bits: int = 8,
    head_bits: int = 8,
    asymmetric: bool = False,
    activation_group_size: int | None = None,
    shared_table: bool = False,
) -> QuantizationRecipe | None:
    """Fill in what the user left open; None for FP32.

    Args:
        scheme: `W8A8`, `W4A4` ... or `FP32`.
        weights: `rtn` or `gptq`.
        group_size: Of the block weights.
        clip_search: Search the clipping point of weight scales.
        activation_clip: Of per-token scales; None is that of the bits; `auto`
            is searched for each input.
        static: Calibrated scales after norms; None depends on the basis
            (`QuantizationRecipe.in_basis`); `auto` is chosen for each input; `all` is yes, and for
            the inputs behind no norm too.
        embedding_bits: 4, 8 or 32.
        head_bits: 4, 8 or 32.
        asymmetric: Per-token inputs with zero points.
        activation_group_size: Input columns that share an activation scale.
        shared_table: One table of integers for the embedding and the head of a tied model.

    Raises:
        ValueError: The scheme is unknown or a value is out of range.
    """
    if is_float(scheme):
        given = {
            "--group-size": group_size is not None,
            "--activation-clip": activation_clip is not None,
            "--static": static is not None,
            "--embedding-bits": embedding_bits not in (8, FLOAT_BITS),
            "--head-bits": head_bits not in (8, FLOAT_BITS),
            "--activation-symmetry": asymmetric,
            "--activation-group-size": activation_group_size is not None,
        }
        if unused := [option for option, is_given in given.items() if is_given]:
            raise ValueError(
                f"--scheme {FLOAT_SCHEME} rounds nothing: {', '.join(unused)} would do nothing; "
                f"leave it out, or quantize"
            )
        if shared_table:
            raise ValueError(
                f"--share-table: --scheme {FLOAT_SCHEME} leaves embedding and head in float, which "
                f"rotations tell apart; quantize, or leave --share-table out"
            )
        return None
    return QuantizationRecipe(
        Scheme.parse(scheme),
        weights=WeightMethod(weights),
        group_size=group_size,
        clip_search=clip_search,
        activation_clip=activation_clip,
        static_after_norm=static,
        embedding_bits=embedding_bits,
        head_bits=head_bits,
        asymmetric=asymmetric,
        activation_group_size=activation_group_size,
        shared_table=shared_table,
    )


def default_equalization(
    recipe: QuantizationRecipe | None, rotations: Set[RotationName]
) -> Equalized:
    """Return which inputs have channel scales, in front of freshly drawn rotations.

    Scales pay where a rotation mixes the channels behind them. Those behind the norms put R1 at run
    time, whose cost inputs of 8 bits have no need of; but one table for embedding and head has.
    The inner ones alone gain where inputs are what costs (measured: at W8A8; at W4A8 nothing).
    """
    if recipe is None:
        return Equalized.NONE
    scheme = recipe.scheme
    few_bits = scheme.activation_bits <= EQUALIZED_BITS
    if RotationName.R1 in rotations and (few_bits or recipe.shared_table):
        return Equalized.ALL
    inputs_cost = scheme.activation_bits <= min(8, scheme.weight_bits)
    mixed = rotations >= {RotationName.R2, RotationName.R4}
    return Equalized.INNER if inputs_cost and mixed else Equalized.NONE


def parse_activation_clip(text: str | None) -> float | Literal["auto"] | None:
    """Read `auto` or a number.

    Raises:
        ConfigError: It is neither.
    """
    if text is None:
        return None
    if text.strip().lower() == CHOSEN:
        return CHOSEN
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(
            f"--activation-clip {text!r}: expected {CHOSEN} or a number of 0.1 to 1"
        ) from error


def parse_static(text: str | None) -> bool | Literal["auto", "all"] | None:
    """Read `yes`, `no`, `auto` or `all`.

    Raises:
        ConfigError: It is none of them.
    """
    if text is None:
        return None
    known: dict[str, bool | Literal["auto", "all"]] = {
        "yes": True,
        "no": False,
        CHOSEN: CHOSEN,
        ALL: ALL,
    }
    if text not in known:
        raise ConfigError(f"--static {text!r}: expected one of {', '.join(known)}")
    return known[text]


@dataclass(frozen=True)
class CheckpointSettings:
    """Resolved settings of the stage."""

    model: str
    adapter: Path | None
    merge: MergeMethod | None
    """None: exact where that is possible, else the nearest to the unmerged model."""
    rotation: RotationChoice | None
    """None: the adapter's own rotation, or R1, R2 and R4 where it has none; and R3 if the KV cache
    has 4 bits."""
    recipe: QuantizationRecipe | None
    """None leaves the weights in float32."""
    calibration: str | None
    calibration_windows: int = 16
    calibration_tokens: int = 512
    stored_rotation: Path | None = None
    """Artifact whose rotation is used, in place of `rotation`."""
    overrides: tuple[Override, ...] = ()
    """Bits of single linears."""
    budget: Budget | None = None
    """Average bits to reach by raising the most sensitive weights and inputs."""

    kv_bits: int = FLOAT_KV_BITS
    """Of the KV cache: 8, 4, or 16 for float."""
    equalize: Equalized | None = None
    """Inputs whose channels are scaled in front of the rotations; None depends on the bits
    (`default_equalization`)."""
    rotation_block: int | None = None
    """Channels that rotations at run time mix; None is all of them."""

    def __post_init__(self) -> None:
        """Check what can be checked before a model is loaded.

        Raises:
            ConfigError: Nothing would be quantized, or single linears of an unquantized model, or
                there is a way to merge and no adapter.
            ValueError: The bits of the KV cache are not supported.
        """
        check_kv_bits(self.kv_bits)
        if self.adapter is None and self.merge is not MergeMethod.EXACT:
            raise ConfigError(
                f"--merge {self.merge or AUTO} needs --adapter; there is none to merge"
            )
        float_scheme = Scheme(UNQUANTIZED_BITS, UNQUANTIZED_BITS)
        if self.recipe is None and (self.overrides or self.budget):
            raise ConfigError(
                f"--scheme {FLOAT_SCHEME} quantizes nothing: leave --override and "
                f"--mixed-precision out, or override linears of the scheme {float_scheme}"
            )
        if self.recipe and self.recipe.scheme == float_scheme and not self.overrides:
            raise ConfigError(
                f"--scheme {float_scheme} leaves every block in float: use {FLOAT_SCHEME}, or name "
                f"the linears to quantize with --override"
            )

    @property
    def shares_table(self) -> bool:
        """Whether embedding and head become one table."""
        return self.recipe is not None and self.recipe.shared_table

    def to_config(self) -> dict[str, Any]:
        """Return the settings as plain data for the manifest."""
        recipe = (
            None
            if self.recipe is None
            else asdict(self.recipe) | {"scheme": str(self.recipe.scheme)}
        )
        choice = self.rotation
        return {
            "model": self.model,
            "adapter": None if self.adapter is None else str(self.adapter),
            "merge": str(self.merge or AUTO),
            "rotate": None if choice is None else sorted(choice.names),
            "rotation_kind": None if choice is None else str(choice.kind),
            "rotation_seed": None if choice is None else choice.seed,
            "rotation_block": self.rotation_block,
            "rotation": None if self.stored_rotation is None else str(self.stored_rotation),
            "recipe": recipe,
            "kv_bits": self.kv_bits,
            "equalize": None if self.equalize is None else str(self.equalize),
            "calibration": self.calibration,
            "calibration_windows": self.calibration_windows,
            "calibration_tokens": self.calibration_tokens,
            "overrides": [str(override) for override in self.overrides],
            "mixed_precision": None if self.budget is None else str(self.budget),
        }
