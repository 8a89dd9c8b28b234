"""What a measurement of speed is, and its report.

A run of a decoder starts from an empty cache and has two phases: one prompt, then tokens one by
one, of one sequence or of several together. A run of an encoder is one pass over a batch of texts.
Everything else follows from the seconds of the phases: rates and times are medians over the runs,
with the least and the greatest beside them; what each run took is reported too.

This module needs numpy only.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from deploy.errors import ConfigError

PREFILL, DECODE, ENCODE = "prefill", "decode", "encode"
BenchRun: TypeAlias = Mapping[str, float]
"""Seconds of each phase of a run."""


@dataclass(frozen=True)
class Figure:
    """A number that every run gives: how much of something a second, or the seconds themselves."""

    key: str
    """Its name in JSON."""
    label: str
    unit: str
    column: str
    """Its heading in a table of models."""
    phase: str
    amount: int | None = None
    """What a run gets through in the phase; None where the figure is its seconds."""

    def of(self, seconds: float) -> float:
        """Return the figure of a phase that took some seconds."""
        return seconds if self.amount is None else self.amount / seconds

    def text(self, value: float) -> str:
        """Return a value with as many digits as it deserves."""
        return f"{value:.{3 if self.amount is None else 0 if value >= 100 else 1}f}"


@dataclass(frozen=True)
class BenchSettings:
    """What is measured."""

    prompt_tokens: int = 512
    """Tokens of each prompt, or of each text of an encoder."""
    new_tokens: int | None = 128
    """Tokens decoded after the prompt; None for an encoder, which decodes none."""
    runs: int = 5
    threads: int | None = None
    batch: int = 1
    """Sequences that are prompted and go on together, or texts."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A count is below 1.
        """
        counts = (self.prompt_tokens, self.new_tokens, self.runs, self.threads, self.batch)
        if min(count for count in counts if count is not None) < 1:
            raise ConfigError(f"bench: every count must be at least 1, got {asdict(self)}")

    @property
    def figures(self) -> tuple[Figure, ...]:
        """What is reported of each run."""
        read = self.batch * self.prompt_tokens
        if self.new_tokens is None:
            return (
                Figure("tokens_per_s", "speed", "tokens/s", "tokens/s", ENCODE, read),
                Figure("texts_per_s", "texts", "texts/s", "texts/s", ENCODE, self.batch),
                Figure("batch_latency_s", "latency of a batch", "s", "batch s", ENCODE),
            )
        new = self.batch * self.new_tokens
        return (
            Figure("prefill_tokens_per_s", "prefill", "tokens/s", "prefill/s", PREFILL, read),
            Figure("decode_tokens_per_s", "decode", "tokens/s", "decode/s", DECODE, new),
            Figure("time_to_first_token_s", "time to first token", "s", "first s", PREFILL),
        )

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of a run, in their order."""
        return tuple(dict.fromkeys(figure.phase for figure in self.figures))

    def random_tokens(self, vocab_size: int) -> np.ndarray:
        """Return the tokens of a run, int64 [batch, prompt and new]: random, always the same."""
        count = self.prompt_tokens + (self.new_tokens or 0)
        return np.random.default_rng(0).integers(0, vocab_size, (self.batch, count))


def fix_threads(settings: BenchSettings) -> BenchSettings:
    """Return settings whose threads, if none are given, are the processors at hand."""
    if settings.threads is not None:
        return settings
    usable = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if usable else os.cpu_count() or 1
    return replace(settings, threads=count)


@dataclass(frozen=True)
class BenchReport:
    """Medians over the runs."""

    model: str
    settings: BenchSettings
    load_s: float
    runs: tuple[BenchRun, ...]
    peak_rss_bytes: int
    file_bytes: int

    @property
    def medians(self) -> dict[str, float]:
        """Median of each figure of the settings."""
        return {
            figure.key: figure.of(statistics.median(run[figure.phase] for run in self.runs))
            for figure in self.settings.figures
        }

    @property
    def spread(self) -> dict[str, tuple[float, float]]:
        """Least and greatest of each figure."""
        values = {
            figure.key: [figure.of(run[figure.phase]) for run in self.runs]
            for figure in self.settings.figures
        }
        return {key: (min(found), max(found)) for key, found in values.items()}

    def rows(self) -> list[tuple[str, str]]:
        """Return the figures as (name, text) rows."""
        medians, spread = self.medians, self.spread
        rows = []
        for figure in self.settings.figures:
            text = f"{figure.text(medians[figure.key])} {figure.unit}"
            least, greatest = map(figure.text, spread[figure.key])
            rows.append((figure.label, f"{text}, runs {least} to {greatest}"))
        return [
            *rows,
            ("load", f"{self.load_s:.2f} s"),
            ("peak memory", f"{self.peak_rss_bytes / 1e6:.1f} MB"),
            ("files", f"{self.file_bytes / 1e6:.1f} MB"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "model": self.model,
            **self.medians,
            "load_s": self.load_s,
            "peak_rss_bytes": self.peak_rss_bytes,
            "file_bytes": self.file_bytes,
            "spread": self.spread,
            "settings": asdict(self.settings),
            "runs": [{f"{phase}_s": s for phase, s in run.items()} for run in self.runs],
        }
