"""Where the time of an export goes, by operator, and how far that is from what the machine allows.

ONNX Runtime records each operator's time. Prompts and single tokens are kept apart, also where one
graph takes both; a first repetition warms up and is not counted. Recording costs time itself, so
the distance to the limits is that of the runs measured without it:

    decode    bytes of all weights and of the cache that a token reads / bytes read per second
    prefill   multiply-adds of the products with weights / integer products per second

Attention's own products are not among the latter: their number grows with the prompt, and they are
in float.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.bench_report import BenchReport, BenchSettings
from deploy.machine_limits import MachineLimits, measure_limits
from deploy.operator_trace import (
    NodeEvent,
    bits_by_node,
    multiply_adds,
    read_runs,
    split_phases,
    weight_bytes,
)
from deploy.session import OnnxDecoder

MOST_STEPS = 32
"""Tokens decoded in a repetition; each has a thousand events."""
PROFILE_COLUMNS = ("operator", "nodes", "us a run", "share")


@dataclass(frozen=True)
class OperatorTime:
    """One type of operator."""

    operator: str
    nodes: float
    """How many of them run for one prompt, or one token."""
    microseconds: float
    """All of them together, median."""
    share: float


@dataclass(frozen=True)
class PhaseProfile:
    """Prompts, or single tokens of every sequence."""

    operators: tuple[OperatorTime, ...]
    """The longest first."""
    between_microseconds: float
    """What a run takes beyond its operators, median."""
    multiply_adds: int
    """Of products with weights, for one prompt or one token of every sequence."""
    weight_bytes: int
    """What one pass over the weights reads, as the kernels hold them."""
    limit_s: float
    """What the machine would need at least."""
    measured_s: float
    """What it took, without recording, median."""

    @property
    def share_of_limit(self) -> float:
        """Part of the limit that was reached: 1 at most, unless a cache holds the model."""
        return self.limit_s / self.measured_s

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row of texts for each operator, under `PROFILE_COLUMNS`."""
        rows = [
            (op.operator, f"{op.nodes:g}", f"{op.microseconds:.0f}", f"{op.share:.1%}")
            for op in self.operators
        ]
        return [*rows, ("between operators", "", f"{self.between_microseconds:.0f}", "")]


@dataclass(frozen=True)
class Profile:
    """Both phases, and the limits they are held against."""

    model: str
    settings: BenchSettings
    limits: MachineLimits
    cache_bytes: int
    """What a token of every sequence reads of the cache, in the middle of decoding."""
    prefill: PhaseProfile
    decode: PhaseProfile

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as plain data."""
        shares = {
            name: {"share_of_limit": phase.share_of_limit}
            for name, phase in (("prefill", self.prefill), ("decode", self.decode))
        }
        whole = asdict(self)
        return whole | {name: whole[name] | share for name, share in shares.items()}

    def rows(self) -> list[tuple[str, str]]:
        """Return the distance to the limits as (name, text) rows."""
        prefill, decode, limits = self.prefill, self.decode, self.limits
        read = decode.weight_bytes + self.cache_bytes
        return [
            ("reads at most", f"{limits.read_bytes_per_s / 1e9:.1f} GB/s"),
            ("multiplies at most", f"{limits.products_per_s / 1e9:.0f} G multiply-adds/s of bytes"),
            (
                "decode",
                f"{read / 1e6:.1f} MB a token: {decode.limit_s * 1e3:.2f} ms at least, "
                f"{decode.measured_s * 1e3:.2f} ms measured, {decode.share_of_limit:.0%}",
            ),
            (
                "prefill",
                f"{prefill.multiply_adds / 1e9:.1f} G multiply-adds: {prefill.limit_s * 1e3:.0f} "
                f"ms at least, {prefill.measured_s * 1e3:.0f} ms measured, "
                f"{prefill.share_of_limit:.0%}",
            ),
        ]


def profile_onnx(
    directory: Path,
    report: BenchReport,
    progress: Callable[[str], None] = lambda step: None,
) -> Profile:
    """Record an exported directory, and measure the machine's limits.

    Args:
        directory: What `rolora export` wrote.
        report: Of the same directory, with its threads set: what is held against the limits.
        progress: Called with a line for each step.

    Raises:
        ConfigError: The tokens do not fit the model's context.
        ArtifactError: ONNX Runtime cannot load it, or its record is not as expected.
    """
    settings = report.settings
    new_tokens = settings.new_tokens
    assert settings.threads is not None
    assert new_tokens is not None
    progress("measuring the machine's limits")
    limits = measure_limits(settings.threads)
    progress("recording")
    steps = min(new_tokens, MOST_STEPS)
    with (
        tempfile.TemporaryDirectory() as scratch,
        OnnxDecoder(directory, threads=settings.threads, profiles=Path(scratch)) as decoder,
    ):
        for _ in range(settings.runs + 1):
            _repeat(decoder, settings, steps)
        files = decoder.end_profiling()
        runs = {file: read_runs(file) for file in set(files)}
        of_prompts, of_tokens = (runs[file] for file in files)
        prompts, tokens = split_phases(of_prompts, of_tokens, settings.runs, steps)
        bits = [bits_by_node(file) for file in decoder.graph_files]
        middle = settings.prompt_tokens + (new_tokens + 1) // 2
        cache_bytes = settings.batch * middle * decoder.cache_bytes_per_token
    products = sum(multiply_adds(run) for run in prompts[0])
    prefill = _phase(
        [[node for run in prompt for node in run.nodes] for prompt in prompts],
        [sum(run.microseconds for run in prompt) for prompt in prompts],
        products,
        weight_bytes(prompts[0][0], bits[0]),
        products / limits.products_per_s,
        report.medians["time_to_first_token_s"],
    )
    token = tokens[0]
    read = weight_bytes(token, bits[1])
    decode = _phase(
        [run.nodes for run in tokens],
        [run.microseconds for run in tokens],
        multiply_adds(token),
        read,
        (read + cache_bytes) / limits.read_bytes_per_s,
        settings.batch / report.medians["decode_tokens_per_s"],
    )
    return Profile(str(directory), settings, limits, cache_bytes, prefill, decode)


def _repeat(decoder: OnnxDecoder, settings: BenchSettings, steps: int) -> None:
    count = settings.prompt_tokens + steps
    ids = np.random.default_rng(0).integers(0, decoder.vocab_size, (settings.batch, count))
    decoder.start(capacity=count, batch=settings.batch)
    decoder.append(ids[:, : settings.prompt_tokens], last_only=True)
    for position in range(settings.prompt_tokens, count):
        decoder.append(ids[:, position : position + 1])


def _phase(
    samples: Sequence[Iterable[NodeEvent]],
    whole: Sequence[float],
    products: int,
    read: int,
    limit_s: float,
    measured_s: float,
) -> PhaseProfile:
    """Sum every sample by operator, and take medians over the samples."""
    sums: list[dict[str, float]] = []
    counts: dict[str, int] = {}
    for sample in samples:
        sums.append({})
        for node in sample:
            sums[-1][node.operator] = sums[-1].get(node.operator, 0.0) + node.microseconds
            counts[node.operator] = counts.get(node.operator, 0) + 1
    medians = {
        operator: statistics.median(sample.get(operator, 0.0) for sample in sums)
        for operator in counts
    }
    total = sum(medians.values()) or 1.0
    operators = [
        OperatorTime(operator, counts[operator] / len(samples), median, median / total)
        for operator, median in sorted(medians.items(), key=lambda item: -item[1])
    ]
    between = [run - sum(sample.values()) for run, sample in zip(whole, sums, strict=True)]
    return PhaseProfile(
        tuple(operators), statistics.median(between), products, read, limit_s, measured_s
    )
