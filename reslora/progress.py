"""What a person sees while training runs: a bar with loss, tokens per second and time left.

It goes to stderr, stdout stays free for results. Where stderr is no terminal, a log line every few
seconds says the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0


class TrainingProgress(TrainerCallback):
    """Shows a training run's progress on the main process."""

    def __init__(self, tokens_until_step: Sequence[int], console: Console | None = None) -> None:
        """Prepare the bar; nothing is shown before training begins.

        Args:
            tokens_until_step: Tokens seen by all processes after step i (index 0 is 0).
            console: Where to draw; stderr if None.
        """
        self._tokens = tokens_until_step
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=len(tokens_until_step) - 1, loss="-", rate="-")
        self._loss = "-"
        self._first_step = 0
        self._started = 0.0
        self._logged = 0.0

    def close(self) -> None:
        """Take the bar off the screen, however training ended."""
        self._bar.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and, on a terminal, the bar."""
        self._first_step = state.global_step
        self._started = self._logged = time.monotonic()
        if state.is_world_process_zero and self._console.is_terminal:
            self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar."""
        if not state.is_world_process_zero:
            return
        now = time.monotonic()
        tokens = self._tokens[state.global_step] - self._tokens[self._first_step]
        rate = f"{tokens / max(now - self._started, 1e-9):.0f}"
        self._bar.update(self._task, completed=state.global_step, loss=self._loss, rate=rate)
        if not self._console.is_terminal and now - self._logged >= LOG_SECONDS:
            self._logged = now
            done = state.global_step - self._first_step
            left = (now - self._started) / done * (state.max_steps - state.global_step)
            logger.info(
                "step %d of %d, loss %s, %s tokens/s, %.0f s left",
                state.global_step,
                state.max_steps,
                self._loss,
                rate,
                left,
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the newest loss."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            self._loss = f"{logs['loss']:.3f}"
