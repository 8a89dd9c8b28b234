"""How to train: every knob of a fine-tuning run, as plain data with the papers' settings nearby.

ResLoRA (arXiv:2402.18039) trains LLaMA-2-7B with rank 4, alpha 8, dropout 0.1, 128 sequences a
step, learning rate 1e-4, warm-up 6% and weight decay 0.1. The defaults here are for smaller models
and one machine: smaller batches and a somewhat higher rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Scheduler(StrEnum):
    """How the learning rate moves after the warm-up (names as in transformers)."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant_with_warmup"


class Keep(StrEnum):
    """Which state of the adapter a run ends with."""

    BEST = "best"
    """The one that did best on the validation rows; never chosen on test data."""
    LAST = "last"


class Precision(StrEnum):
    """Number format of the products in forward and backward pass; weights stay float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    """Mixed precision (autocast): products in bfloat16, weights, sums and optimizer in float32."""


LOSS = "loss"
"""Name of the validation figure that every task has."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one training run.

    Raises:
        ValueError: On impossible values; all faults are listed in one message.
    """

    max_steps: int | None = None
    """Optimizer steps; None trains `epochs`."""
    epochs: float = 1.0
    """Passes over the data; ignored where `max_steps` is given."""
    batch_size: int = 4
    """Rows a process handles at once (packed rows, when packing)."""
    gradient_accumulation: int = 2
    """Batches summed into one step."""
    learning_rate: float = 2e-4
    warmup_ratio: float = 0.06
    """Share of the steps in which the rate rises."""
    scheduler: Scheduler = Scheduler.COSINE
    weight_decay: float = 0.1
    max_tokens: int = 512
    """Longest sequence, and the size of a packed row."""
    packing: bool = False
    """Several sequences in a row, invisible to each other; else padding, grouped by length."""
    seed: int = 0
    """Order of the data and dropout."""
    keep: Keep | None = None
    """None keeps the best where there is validation data, else the last."""
    best_metric: str = LOSS
    """Validation figure that tells the best: the loss, or one of the task's, of which more is
    better."""
    early_stopping: int | None = None
    """Stop after this many validations in a row without a new best; None trains all steps."""
    precision: Precision = Precision.FLOAT32
    eval_every: int = 100
    """Steps between validations; 0 validates at the end only."""
    save_every: int = 100
    """Steps between checkpoints; there is always one at the end."""
    validation_fraction: float = 0.02
    """Share held out when no validation set is given; 0 trains on everything."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""

    def __post_init__(self) -> None:
        """Collect every fault before refusing."""
        faults = [
            f"{name} must be at least {least}, got {value}"
            for name, value, least in (
                ("max_steps", 1 if self.max_steps is None else self.max_steps, 1),
                ("batch_size", self.batch_size, 1),
                ("gradient_accumulation", self.gradient_accumulation, 1),
                ("max_tokens", self.max_tokens, 8),
                ("early_stopping", 1 if self.early_stopping is None else self.early_stopping, 1),
                ("eval_every", self.eval_every, 0),
                ("save_every", self.save_every, 1),
                ("weight_decay", self.weight_decay, 0),
                ("seed", self.seed, 0),
            )
            if value < least
        ]
        if self.early_stopping is not None and self.eval_every == 0:
            faults.append("early_stopping needs validations on the way: eval_every is 0")
        for name, rate in (("epochs", self.epochs), ("learning_rate", self.learning_rate)):
            if not (math.isfinite(rate) and rate > 0):
                faults.append(f"{name} must be a positive number, got {rate}")
        for name, share in (
            ("warmup_ratio", self.warmup_ratio),
            ("validation_fraction", self.validation_fraction),
        ):
            if not 0.0 <= share < 1.0:
                faults.append(f"{name} must be in [0, 1), got {share}")
        if faults:
            raise ValueError("training settings: " + "; ".join(faults))
