"""Speed of an exported directory: prompt, decode, first token, memory, size, load time.

Each run starts from an empty cache: one prompt, then tokens one by one, as a caller of plain ONNX
Runtime would do it; or several sequences of one length at once. The figures are medians over the
runs, with the least and the greatest beside them; what each run took is reported too.

This module needs numpy and onnxruntime only.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact import ArtifactKind, read_manifest
from deploy.errors import ConfigError
from deploy.memory import peak_memory_bytes
from deploy.session import OnnxDecoder


@dataclass(frozen=True)
class BenchSettings:
    """What is measured."""

    prompt_tokens: int = 512
    new_tokens: int = 128
    runs: int = 5
    threads: int | None = None
    batch: int = 1
    """Sequences that are prompted and go on together."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A count is below 1.
        """
        threads = 1 if self.threads is None else self.threads
        if min(self.prompt_tokens, self.new_tokens, self.runs, threads, self.batch) < 1:
            raise ConfigError(f"bench: every count must be at least 1, got {asdict(self)}")


def fix_threads(settings: BenchSettings) -> BenchSettings:
    """Return settings whose threads, if none are given, are the processors at hand."""
    if settings.threads is not None:
        return settings
    usable = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if usable else os.cpu_count() or 1
    return replace(settings, threads=count)


@dataclass(frozen=True)
class BenchRun:
    """One run, in seconds."""

    prefill_s: float
    decode_s: float


def prefill_rates(settings: BenchSettings, runs: Sequence[BenchRun]) -> list[float]:
    """Return the prompt tokens per second of each run, over all sequences."""
    return [settings.batch * settings.prompt_tokens / run.prefill_s for run in runs]


def decode_rates(settings: BenchSettings, runs: Sequence[BenchRun]) -> list[float]:
    """Return the new tokens per second of each run, over all sequences."""
    return [settings.batch * settings.new_tokens / run.decode_s for run in runs]


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
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second, median."""
        tokens = self.settings.batch * self.settings.prompt_tokens
        return tokens / self.time_to_first_token_s

    @property
    def decode_tokens_per_s(self) -> float:
        """New tokens per second after the first, median."""
        tokens = self.settings.batch * self.settings.new_tokens
        return tokens / statistics.median(run.decode_s for run in self.runs)

    @property
    def spread(self) -> dict[str, tuple[float, float]]:
        """Least and greatest of each figure that is a median."""
        firsts = [run.prefill_s for run in self.runs]
        prefill = prefill_rates(self.settings, self.runs)
        decode = decode_rates(self.settings, self.runs)
        return {
            "prefill_tokens_per_s": (min(prefill), max(prefill)),
            "decode_tokens_per_s": (min(decode), max(decode)),
            "time_to_first_token_s": (min(firsts), max(firsts)),
        }

    @property
    def time_to_first_token_s(self) -> float:
        """Seconds from the prompt to the first token, median."""
        return statistics.median(run.prefill_s for run in self.runs)

    def rows(self) -> list[tuple[str, str]]:
        """Return the figures as (name, text) rows."""
        prefill, decode = (
            "{:.0f} to {:.0f}".format(*self.spread[f"{phase}_tokens_per_s"])
            for phase in ("prefill", "decode")
        )
        return [
            ("prefill", f"{self.prefill_tokens_per_s:.0f} tokens/s, runs {prefill}"),
            ("decode", f"{self.decode_tokens_per_s:.1f} tokens/s, runs {decode}"),
            ("time to first token", f"{self.time_to_first_token_s:.3f} s"),
            ("load", f"{self.load_s:.2f} s"),
            ("peak memory", f"{self.peak_rss_bytes / 1e6:.1f} MB"),
            ("files", f"{self.file_bytes / 1e6:.1f} MB"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "model": self.model,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "time_to_first_token_s": self.time_to_first_token_s,
            "load_s": self.load_s,
            "peak_rss_bytes": self.peak_rss_bytes,
            "file_bytes": self.file_bytes,
            "spread": self.spread,
            "settings": asdict(self.settings),
            "runs": [asdict(run) for run in self.runs],
        }


def bench_onnx(
    directory: Path, settings: BenchSettings, progress: Callable[[int], None] = lambda done: None
) -> BenchReport:
    """Measure an exported directory; one more run comes first to warm up and is not counted.

    Args:
        directory: What `rolora export` wrote.
        settings: What to measure.
        progress: Called with the number of finished runs.

    Raises:
        ConfigError: The tokens do not fit the model's context.
        StageOrderError: The directory is no export.
        ArtifactError: ONNX Runtime cannot load it.
    """
    manifest = read_manifest(directory, ArtifactKind.ONNX)
    started = time.perf_counter()
    with OnnxDecoder(directory, threads=settings.threads) as decoder:
        load_s = time.perf_counter() - started
        runs = []
        for done in range(settings.runs + 1):
            run = measure_run(decoder, settings)
            if done:
                runs.append(run)
            progress(done)
    return BenchReport(
        model=str(directory),
        settings=settings,
        load_s=load_s,
        runs=tuple(runs),
        peak_rss_bytes=peak_memory_bytes(),
        file_bytes=sum(record.bytes for record in manifest.files.values()),
    )


def measure_run(decoder: OnnxDecoder, settings: BenchSettings) -> BenchRun:
    """Time one prompt and its continuation; tokens are random, seeded, and equal in every run."""
    prompt, count = settings.prompt_tokens, settings.prompt_tokens + settings.new_tokens
    ids = np.random.default_rng(0).integers(0, decoder.vocab_size, (settings.batch, count))
    decoder.start(capacity=count, batch=settings.batch)
    started = time.perf_counter()
    decoder.append(ids[:, :prompt], last_only=True)
    prefilled = time.perf_counter()
    for position in range(prompt, count):
        decoder.append(ids[:, position : position + 1])
    return BenchRun(prefilled - started, time.perf_counter() - prefilled)
