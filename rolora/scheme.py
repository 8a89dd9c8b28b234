"""What is quantized to how many bits, as data.

A scheme name such as ``W4A8`` says: weights of 4 bits, activations (the inputs of the linears) of 8
bits. Both are symmetric. The granularity of the scales is data too, since each integer kernel
dictates its own::

    CHANNEL   one scale an output channel           weights
    TENSOR    one scale, fixed by calibration       inputs that follow a norm (in a rotated model)
    TOKEN     one scale a token, at run time        every other input
    GROUP     one scale a block of input columns    weights with groups, and their inputs (a scale a
                                                    token and block): the kernel quantizes each
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

WEIGHT_BITS = (4, 6, 8)
ACTIVATION_BITS = (4, 6, 8)
GROUP_SIZES = (16, 32, 64, 128, 256)
FLOAT_BITS = 32
"""The bit width that means "leave in float" for the embedding and the head."""


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
            f"A{{{','.join(map(str, ACTIVATION_BITS))}}}, for example W8A8, W4A8, W4A4"
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
    granularity: Granularity
    clip_ratio: float = 1.0
    """The scale covers this part of the absolute maximum (TOKEN only); larger values saturate."""
    group_size: int | None = None


@dataclass(frozen=True)
class QuantizationRecipe:
    """Everything that decides the integers of a checkpoint."""

    scheme: Scheme
    weights: WeightMethod = WeightMethod.RTN
    """Of the blocks; embedding and head are always rounded to nearest."""
    group_size: int | None = None
    """Group size of block weights; None is per output channel."""
    clip_search: bool = True
    """Shrink each weight scale to the one with the least squared error."""
    activation_clip: float = 1.0
    """Clip ratio of per-token scales."""
    static_after_norm: bool = True
    """One calibrated scale for inputs that follow a norm; pays only in a rotated model."""
    embedding_bits: int = 8
    head_bits: int = 8

    def __post_init__(self) -> None:
        """Check the fields against each other.

        Raises:
            ValueError: A value is out of range, or two of them exclude each other.
        """
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size: expected one of {GROUP_SIZES}, got {self.group_size}")
        if self.group_size is not None and self.scheme.activation_bits != 8:
            raise ValueError(
                f"group size {self.group_size} with {self.scheme}: weight groups run in a kernel "
                f"whose activations "
                "have 8 bits; use A8, or leave the group size out"
            )
        if self.group_size is not None and self.scheme.weight_bits == 6:
            raise ValueError(
                "weight groups: expected weights of 4 or 8 bits, got 6; leave the group size out"
            )
        if not 0.1 <= self.activation_clip <= 1.0:
            raise ValueError(
                f"activation clip ratio: expected 0.1 to 1.0, got {self.activation_clip}"
            )
        for part, bits in (("embedding", self.embedding_bits), ("head", self.head_bits)):
            if bits not in (8, FLOAT_BITS):
                raise ValueError(f"{part} bits: expected 8 or {FLOAT_BITS} (float), got {bits}")

    def block_weight(self) -> WeightSpec:
        """Return how the weights inside the blocks are stored."""
        return WeightSpec(self.scheme.weight_bits, self.group_size)

    def block_input(self, *, after_norm: bool) -> ActivationSpec:
        """Return how an input inside a block is quantized.

        Args:
            after_norm: Whether the input is the output of an RMSNorm.
        """
        bits = self.scheme.activation_bits
        if self.group_size is not None:
            return ActivationSpec(bits, Granularity.GROUP, group_size=self.group_size)
        if after_norm and self.static_after_norm:
            return ActivationSpec(bits, Granularity.TENSOR)
        return ActivationSpec(bits, Granularity.TOKEN, self.activation_clip)

    def head_input(self) -> ActivationSpec:
        """Return how the head's input is quantized: always 8 bits, per tensor where calibrated."""
        if self.static_after_norm:
            return ActivationSpec(8, Granularity.TENSOR)
        return ActivationSpec(8, Granularity.TOKEN)
