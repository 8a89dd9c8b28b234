"""What an adapter is, as plain data: rank, scale, dropout and the shortcut between its blocks.

Which linears carry it is not part of this: the caller names them, because only it knows the
architecture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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


@dataclass(frozen=True)
class AdapterConfig:
    """Hyperparameters of a LoRA (arXiv:2106.09685) or ResLoRA (arXiv:2402.18039) adapter.

    Raises:
        ValueError: On values that describe no adapter; all faults are listed in one message.
    """

    rank: int = 8
    """Inner size r of A [r, in] and B [out, r]."""
    alpha: float = 16.0
    """The branch is scaled by alpha / rank."""
    dropout: float = 0.0
    """Probability that an input feature of the LoRA branch is dropped while training."""
    structure: Structure | None = None
    """Shortcut structure; None is plain LoRA."""
    depth: int = ALL_PREVIOUS
    """How many previous blocks a shortcut reaches back; -1 all of them, 0 is plain LoRA.

    The paper's `pre_num`. Ignored where `structure` is None; an input shortcut reaches one layer
    back whatever the depth, unless it is 0.
    """

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
        if faults:
            raise ValueError("adapter configuration: " + "; ".join(faults))

    @property
    def scaling(self) -> float:
        """Factor alpha / rank in front of B A."""
        return self.alpha / self.rank

    @property
    def reach(self) -> int:
        """Previous blocks a block uses: 0 for plain LoRA, -1 for all of its chain."""
        if self.structure is None:
            return 0
        if self.structure is Structure.INPUT:
            return min(1, abs(self.depth))
        return self.depth
