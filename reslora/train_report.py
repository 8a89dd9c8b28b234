"""What a training run did, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

OF_THIS_PROCESS = (
    "peak_cuda_bytes",
    "peak_rss_bytes",
    "resumed_from_step",
    "seconds",
    "tokens",
    "tokens_per_s",
)
"""Fields of the report that differ between equal runs: the clock, and where a resume began."""


@dataclass(frozen=True)
class TrainReport:
    """What a training run did.

    Invariant: all but `OF_THIS_PROCESS` is equal for equal runs, killed and resumed or not.
    """

    steps: int
    """Optimizer steps of the whole run."""
    planned_steps: int
    """More than `steps` where the run stopped early."""
    kept_step: int
    """Step whose adapter the run ended with: the best validated one, or the last."""
    best_step: int | None
    """Step of the best validation; None where the run did not look for it."""
    resumed_from_step: int
    """Step this process started at; 0 for a run of its own."""
    trainable_parameters: int
    train_rows: int
    """Rows of the training set (packed rows, when packing)."""
    validation_rows: int
    loss: tuple[tuple[int, float], ...]
    """(step, mean loss a learned token) of every step of the run."""
    eval_loss: tuple[tuple[int, float], ...]
    """(step, validation loss); empty without validation rows."""
    eval_metrics: tuple[tuple[int, dict[str, float]], ...]
    """(step, metrics of the task by name); empty for a language model."""
    seconds: float
    """Wall time of this process's training loop, validation and checkpoints included."""
    tokens: int
    """Tokens seen by all processes in that time, padding not counted."""
    tokens_per_s: float
    peak_rss_bytes: int
    """Highest resident memory of this process so far."""
    peak_cuda_bytes: int | None
    """Most memory in tensors of one CUDA device in that time; None on a CPU."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    def parted(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what the run did, and what concerns only this process's share of it."""
        values = self.to_dict()
        return values, {key: values.pop(key) for key in OF_THIS_PROCESS}
