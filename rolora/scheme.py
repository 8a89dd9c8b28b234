"""What is quantized to how many bits, as data.

A scheme name such as ``W4A8`` says: weights of 4 bits, activations (the inputs of the linears) of 8
bits; 16 leaves the weights or the activations in float. Weights are symmetric, activations
symmetric or, per token or group, asymmetric (with a zero point). The granularity of the scales is
data too, since each integer kernel dictates its own::

    CHANNEL   one scale an output channel           weights
    TENSOR    one scale, fixed by calibration       inputs that follow a norm (in a rotated model);
                                                    all, for runtimes without run-time scales
    TOKEN     one scale a token, at run time        every other input
    GROUP     one scale a block of input columns    weights with groups, and their inputs (a scale a
                                                    token and block): the kernel quantizes each
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

UNQUANTIZED_BITS = 16
"""The bit width of a scheme that means "leave in float"; the numbers are kept as float32."""
WEIGHT_BITS = (4, 6, 8, UNQUANTIZED_BITS)
ACTIVATION_BITS = (4, 6, 8, UNQUANTIZED_BITS)
GROUP_SIZES = (16, 32, 64, 128, 256)
FLOAT_BITS = 32
"""The bit width that means "leave in float" for the embedding and the head."""
TABLE_BITS = (4, 8, FLOAT_BITS)
"""Of the embedding and the head."""
TABLE_GROUP_SIZES = (64, 32, 16)
"""Columns of a 4-bit embedding that share a scale: the first that divides them."""
SHARED_TABLE_GROUP_SIZES = (32, 16)
"""The same where the table is the head's too, which is more sensitive."""
AUTO: Literal["auto"] = "auto"
"""Chosen on calibration text, for each input by itself."""
ALL: Literal["all"] = "all"
"""For every input, not for those after a norm alone."""


class Granularity(StrEnum):
    """Which values share one scale."""

    TENSOR = "tensor"
    TOKEN = "token"
    CHANNEL = "channel"
    GROUP = "group"


class WeightMethod(StrEnum):
    """How block weights are rounded."""

    RTN = "rtn"
    GPTQ = "gptq"


@dataclass(frozen=True)
class Scheme:
    """Bit widths of weights and activations, written ``W<bits>A<bits>``."""

    weight_bits: int
    activation_bits: int

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """Read a scheme name such as ``W8A8``, in any case.

        Raises:
            ValueError: The name is malformed or names an unsupported width; the message lists the
                supported ones.
        """
        match = re.fullmatch(r"[wW]([0-9]{1,3})[aA]([0-9]{1,3})", name.strip())
        supported = (
            f"supported: W{{{','.join(map(str, WEIGHT_BITS))}}}"
            f"A{{{','.join(map(str, ACTIVATION_BITS))}}}, for example W8A8, W4A8, W4A4, W4A16"
        )
        if match is None:
            raise ValueError(f"scheme: expected W<bits>A<bits>, got {name!r}; {supported}")
        weight_bits, activation_bits = int(match[1]), int(match[2])
        if weight_bits not in WEIGHT_BITS or activation_bits not in ACTIVATION_BITS:
            raise ValueError(f"scheme {name!r} has an unsupported bit width; {supported}")
        return cls(weight_bits, activation_bits)

    def __str__(self) -> str:
        return f"W{self.weight_bits}A{self.activation_bits}"


@dataclass(frozen=True)
class WeightSpec:
    """How one weight ``[out, in]`` is stored."""

    bits: int
    group_size: int | None = None
    """Input columns that share a scale; None is one scale per output channel."""

    @property
    def granularity(self) -> Granularity:
        """Whether scales are per output channel or per group of input columns."""
        return Granularity.CHANNEL if self.group_size is None else Granularity.GROUP


@dataclass(frozen=True)
class ActivationSpec:
    """How the input of one linear is quantized."""

    bits: int
    """16 leaves the input in float; the other fields then say nothing."""
    granularity: Granularity
    clip_ratio: float = 1.0
    """The scale covers this part of the range (TOKEN and GROUP); larger values saturate."""
    group_size: int | None = None
    """Input columns that share a scale (GROUP)."""
    symmetric: bool = True
    """False: from the least to the greatest value, with a zero point (TOKEN and GROUP)."""

    @property
    def is_float(self) -> bool:
        """Whether the input is not quantized."""
        return self.bits == UNQUANTIZED_BITS

    def __str__(self) -> str:
        if self.is_float:
            return "float"
        asymmetric = "" if self.symmetric else ", asymmetric"
        return f"{self.bits} bits per {self.granularity}{asymmetric}"


FLOAT_INPUT = ActivationSpec(UNQUANTIZED_BITS, Granularity.TOKEN)
"""The input of a linear whose weight alone is quantized."""


AIM_SHARE, SCALED_AIM_SHARE = 0.5, 0.25
"""Of GPTQ, without and with channel scales; measured in `rolora.gptq`."""


@dataclass(frozen=True)
class QuantizationRecipe:
    """Everything that decides the integers of a checkpoint, but for single linears' overrides."""

    scheme: Scheme
    weights: WeightMethod = WeightMethod.RTN
    """Of the linears; the embedding, which has no input to calibrate on, is rounded to nearest."""
    group_size: int | None = None
    """Group size of block weights; None is per output channel."""
    clip_search: bool = True
    """Shrink each weight scale to the one with the least squared error."""
    activation_clip: float | Literal["auto"] | None = None
    """Clip ratio of per-token scales; None is 0.7 at 4 bits (0.9 in groups), else 1."""
    static_after_norm: bool | Literal["auto", "all"] | None = True
    """One calibrated scale for inputs that follow a norm; None waits for `in_basis`. ALL gives one
    to the inputs of the output and down projections too: a fixed-point graph needs that."""
    embedding_bits: int = 8
    head_bits: int = 8
    asymmetric: bool = False
    """Zero points for per-token (or grouped) inputs; static scales stay symmetric."""
    activation_group_size: int | None = None
    """Input columns that share a scale of an activation, where weights have no groups."""
    shared_table: bool = False
    """Embedding and head of a tied model are one table of integers, rounded to nearest."""
    aim_share: float = AIM_SHARE
    """How far GPTQ moves weights of few bits towards the float model's outputs (`rolora.gptq`)."""

    def __post_init__(self) -> None:
        """Check the fields against each other.

        Raises:
            ValueError: A value is out of range, or two of them exclude each other.
        """
        for what, size in (
            ("group size", self.group_size),
            ("activation group size", self.activation_group_size),
        ):
            if size is not None and size not in GROUP_SIZES:
                raise ValueError(f"{what}: expected one of {GROUP_SIZES}, got {size}")
        self.require_groups_fit(self.scheme)
        if self.group_size is not None and (self.activation_group_size or self.asymmetric):
            raise ValueError(
                f"weights in groups of {self.group_size} run in a kernel that quantizes their "
                f"inputs itself, symmetrically and in the same groups; leave the activation group "
                f"size and asymmetric activations out"
            )
        if self.static_after_norm not in (None, True, False, AUTO, ALL):
            raise ValueError(
                f"static scales: expected True, False, {AUTO} or {ALL}, got "
                f"{self.static_after_norm!r}"
            )
        if self.static_after_norm == ALL and (self.activation_group_size or self.asymmetric):
            raise ValueError(
                f"static scales for {ALL} inputs are one a tensor and symmetric; leave the "
                f"activation group size and asymmetric activations out"
            )
        clip = self.activation_clip
        if isinstance(clip, str) and clip != AUTO:
            raise ValueError(f"activation clip: expected {AUTO} or a number, got {clip!r}")
        if isinstance(clip, float | int) and not 0.1 <= clip <= 1.0:
            raise ValueError(f"activation clip ratio: expected 0.1 to 1.0, got {clip}")
        for part, bits in (("embedding", self.embedding_bits), ("head", self.head_bits)):
            if bits not in TABLE_BITS:
                raise ValueError(f"{part} bits: expected 4, 8 or {FLOAT_BITS} (float), got {bits}")
        tables = (self.embedding_bits, self.head_bits)
        if self.shared_table and tables not in ((8, 8), (4, 4)):
            raise ValueError(
                f"a table that embedding and head share has 8 bits for both or 4 for both, got "
                f"{self.embedding_bits} for the embedding and {self.head_bits} for the head"
            )
        if not 0.0 <= self.aim_share <= 1.0:
            raise ValueError(f"aim share: expected 0 to 1, got {self.aim_share}")

    def in_basis(self, *, rotated: bool, scaled: bool) -> QuantizationRecipe:
        """Fill in what depends on the basis that the model is in.

        Static scales pay where R1 spreads the outliers and leaves all tokens equally loud. With
        channel scales tokens differ; and since the quantized model is nearer to the float one,
        there is less for GPTQ to make up for.

        Args:
            rotated: Whether R1 acts on what linears read of the residual stream.
            scaled: Whether channels are scaled in front of it (`rolora.equalization`).
        """
        static = self.static_after_norm
        return replace(
            self,
            static_after_norm=rotated and not scaled if static is None else static,
            aim_share=SCALED_AIM_SHARE if scaled else self.aim_share,
        )

    def require_groups_fit(self, scheme: Scheme) -> None:
        """Check that linears of a scheme can have the recipe's weight groups.

        Raises:
            ValueError: No kernel has such groups.
        """
        if self.group_size is None:
            return
        if scheme.activation_bits not in (8, UNQUANTIZED_BITS):
            raise ValueError(
                f"group size {self.group_size} with {scheme}: weight groups run in a kernel whose "
                f"activations have 8 bits or stay in float; use A8 or A16, or leave the group size "
                f"out"
            )
        if scheme.weight_bits == 6:
            raise ValueError(
                "weight groups: expected weights of 4 or 8 bits, got 6; leave the group size out"
            )

    def block_weight(self, bits: int | None = None) -> WeightSpec:
        """Return how a weight inside the blocks is stored; `bits` other than the scheme's."""
        wanted = self.scheme.weight_bits if bits is None else bits
        return WeightSpec(wanted, None if wanted == UNQUANTIZED_BITS else self.group_size)

    def block_input(self, *, after_norm: bool, bits: int | None = None) -> ActivationSpec:
        """Return how an input inside a block is quantized.

        What is chosen on calibration text starts as TENSOR, or without clipping.

        Args:
            after_norm: Whether the input is the output of an RMSNorm.
            bits: Other than the scheme's.
        """
        wanted = self.scheme.activation_bits if bits is None else bits
        if wanted == UNQUANTIZED_BITS:
            return FLOAT_INPUT
        if self.static_after_norm == ALL:
            return ActivationSpec(wanted, Granularity.TENSOR)
        if self.group_size is not None:
            return ActivationSpec(wanted, Granularity.GROUP, group_size=self.group_size)
        if self.activation_group_size is None and after_norm and self.static_after_norm:
            return ActivationSpec(wanted, Granularity.TENSOR)
        return self.run_time_input(wanted)

    def run_time_input(self, bits: int) -> ActivationSpec:
        """Return how an input is quantized whose scales are found at run time."""
        clip = self.activation_clip
        if clip is None:
            clip = self._default_clip(bits)
        return ActivationSpec(
            bits,
            Granularity.TOKEN if self.activation_group_size is None else Granularity.GROUP,
            1.0 if clip == AUTO else float(clip),
            self.activation_group_size,
            symmetric=not self.asymmetric,
        )

    def embedding_weight(self, columns: int) -> WeightSpec:
        """Return how the embedding is stored: 8 bits a scale a row, 4 bits a scale a group.

        Raises:
            ValueError: No group divides the columns.
        """
        if self.embedding_bits != 4:
            return WeightSpec(self.embedding_bits)
        sizes = SHARED_TABLE_GROUP_SIZES if self.shared_table else TABLE_GROUP_SIZES
        for size in sizes:
            if columns % size == 0:
                return WeightSpec(4, size)
        raise ValueError(
            f"embedding bits: 4 bits have a scale for {', '.join(map(str, sizes))} columns, none "
            f"of which divides {columns}; use 8"
        )

    def head_weight(self, columns: int) -> WeightSpec:
        """Return how the head is stored: a scale a row, or as the embedding whose table it shares.

        Raises:
            ValueError: See `embedding_weight`.
        """
        if self.shared_table:
            return self.embedding_weight(columns)
        return WeightSpec(UNQUANTIZED_BITS if self.head_bits == FLOAT_BITS else self.head_bits)

    def _default_clip(self, bits: int) -> float:
        """Return what serves rotated inputs: near Gaussian ones, of which few reach the greatest.

        The fewer columns share a scale, the nearer to its greatest value are they all.
        """
        if bits != 4:
            return 1.0
        return 0.7 if self.activation_group_size is None else 0.9

    def head_input(self, weight: WeightSpec, bits: int | None = None) -> ActivationSpec:
        """Return how the head's input is quantized: 8 bits, per tensor where calibrated.

        Where activations stay in float, so does the head's; `bits` overrides both. Weights in
        groups run in a kernel that quantizes its input itself, in the same groups.
        """
        in_float = self.scheme.activation_bits == UNQUANTIZED_BITS
        wanted = bits or (UNQUANTIZED_BITS if in_float else 8)
        if wanted == UNQUANTIZED_BITS:
            return FLOAT_INPUT
        if weight.group_size is not None:
            return ActivationSpec(wanted, Granularity.GROUP, group_size=weight.group_size)
        if self.static_after_norm:
            return ActivationSpec(wanted, Granularity.TENSOR)
        return ActivationSpec(wanted, Granularity.TOKEN)
