"""What an adapter is, as plain data: rank, scale, start, dropout, and the shortcut of its blocks.

Which linears carry it is not part of this: the caller names them, because only it knows the
architecture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

ALL_PREVIOUS = -1
"""Value of `AdapterConfig.depth` that links a block to every previous block of its chain."""


class Structure(StrEnum):
    """Where the shortcut between neighbouring LoRA blocks runs, ResLoRA (arXiv:2402.18039) §3."""

    BLOCK = "block"
    """The current input passes through previous blocks too (paper: bs). Merges exactly."""
    INPUT = "input"
    """The block also sees the previous module's input (paper: is)."""
    MIDDLE = "middle"
    """Previous rank-sized intermediates are added before B (paper: ms)."""


class Initialization(StrEnum):
    """How A and B begin; with each of these the branch is zero and the base weight untouched.

    Initializations that take part of the base weight into the adapter (PiSSA, OLoRA, CorDA, LoftQ,
    LoRA-GA) are not offered: the adapter would be a change of another base than the user's.
    """

    DEFAULT = "default"
    """A is Kaiming uniform, B is zero, as in LoRA's reference code."""
    GAUSSIAN = "gaussian"
    """A is normal with standard deviation 1 / rank, B is zero."""
    ORTHOGONAL = "orthogonal"
    """Neither is zero, but the rows of A lie where B does not look: B_n A_n = 0 up to rounding.

    Structure `middle` feeds A_{n-k} into B_n, whose product is not zero: not offered there.
    """


INITIALIZATION_NAMES = ", ".join(Initialization)


@dataclass(frozen=True)
class AdapterConfig:
    """Hyperparameters of a LoRA (arXiv:2106.09685) or ResLoRA (arXiv:2402.18039) adapter.

    Raises:
        ValueError: On values that describe no adapter; all faults are listed in one message.
    """

    rank: int = 8
    """Inner size r of A [r, in] and B [out, r]."""
    alpha: float = 16.0
    """The branch is scaled by alpha / rank, or alpha / sqrt(rank) with `rslora`."""
    dropout: float = 0.0
    """Probability that an input feature of the LoRA branch is dropped while training."""
    structure: Structure | None = None
    """Shortcut structure; None is plain LoRA."""
    depth: int = ALL_PREVIOUS
    """How many previous blocks a shortcut reaches back; -1 all of them, 0 is plain LoRA.

    The paper's `pre_num`. Always -1 where `structure` is None, whatever was given, for no file
    of a plain LoRA keeps it; an input shortcut reaches one layer back unless the depth is 0.
    """
    rslora: bool = False
    """Scale by alpha / sqrt(rank): rank-stabilized LoRA (arXiv:2312.03732)."""
    initialization: Initialization = field(default=Initialization.DEFAULT, compare=False)
    """How training begins. No part of what a trained adapter means, so it is not compared."""

    def __post_init__(self) -> None:
        """Collect every fault before refusing."""
        faults = []
        if self.rank < 1:
            faults.append(f"rank must be at least 1, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            faults.append(f"alpha must be a positive number, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            faults.append(f"dropout must be in [0, 1), got {self.dropout}")
        if self.depth < ALL_PREVIOUS:
            faults.append(f"depth must be -1 (all previous blocks) or at least 0, got {self.depth}")
        if self.initialization is Initialization.ORTHOGONAL:
            if self.rank % 2:
                faults.append(f"initialization orthogonal needs an even rank, got {self.rank}")
            if self.structure is Structure.MIDDLE and self.depth != 0:
                faults.append(
                    "initialization orthogonal does not begin at zero with structure middle, whose "
                    "B_n sees A_{n-k}; use default or gaussian"
                )
        if faults:
            raise ValueError("adapter configuration: " + "; ".join(faults))
        if self.structure is None:
            object.__setattr__(self, "depth", ALL_PREVIOUS)

    @property
    def scaling(self) -> float:
        """Factor in front of B A: alpha / rank, or alpha / sqrt(rank) with `rslora`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def reach(self) -> int:
        """Previous blocks a block uses: 0 for plain LoRA, -1 for all of its chain."""
        if self.structure is None:
            return 0
        if self.structure is Structure.INPUT:
            return min(1, abs(self.depth))
        return self.depth

    def with_rank(self, rank: int) -> AdapterConfig:
        """Return plain LoRA of another rank and the same `scaling`."""
        growth = rank / self.rank
        alpha = self.alpha * (math.sqrt(growth) if self.rslora else growth)
        return AdapterConfig(rank, alpha, self.dropout, rslora=self.rslora)


def parse_initialization(text: str) -> Initialization:
    """Read the name of an initialization.

    Raises:
        ValueError: It is none that begins at zero and leaves the base weight alone.
    """
    if text in set(Initialization):
        return Initialization(text)
    raise ValueError(
        f"initialization {text!r}: supported are {INITIALIZATION_NAMES}. Others of PEFT either "
        "change the base weight (pissa, olora, corda, loftq, lora_ga), so that the adapter fits no "
        "model but the one of that run, or need a pass over data (eva) or training rules (mica) "
        "that are not here"
    )
