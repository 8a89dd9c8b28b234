"""Speed of an exported directory: a decoder's prompt and decode, an encoder's texts, memory, load.

A decoder runs as a caller of plain ONNX Runtime would have it: one prompt into an empty cache, then
tokens one by one; or several sequences of one length at once. An encoder runs a batch of texts of
one length.

This module needs numpy and onnxruntime only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from deploy.artifact import EXPORTS, ArtifactKind, Manifest, read_manifest
from deploy.bench_report import DECODE, ENCODE, PREFILL, BenchReport, BenchRun, BenchSettings
from deploy.encoder_session import OnnxEncoder
from deploy.errors import ArtifactError, ConfigError
from deploy.memory import peak_memory_bytes
from deploy.session import OnnxDecoder

MODEL_CONFIG_NAME = "config.json"


def settings_for(
    directory: Path,
    prompt_tokens: int,
    new_tokens: int | None,
    runs: int,
    threads: int | None,
    batch: int,
) -> BenchSettings:
    """Return what to measure of an exported directory; a decoder has new tokens without asking.

    Args:
        directory: What `rolora export` wrote.
        prompt_tokens: See `BenchSettings`.
        new_tokens: None leaves them to the kind of model.
        runs: See `BenchSettings`.
        threads: See `BenchSettings`.
        batch: See `BenchSettings`.

    Raises:
        ConfigError: Of `BenchSettings` and `read_export`.
        StageOrderError: The directory is no export.
    """
    if new_tokens is None and read_manifest(directory, *EXPORTS).kind is ArtifactKind.ONNX:
        new_tokens = BenchSettings.new_tokens
    settings = BenchSettings(prompt_tokens, new_tokens, runs, threads, batch)
    read_export(directory, settings)
    return settings


def read_export(directory: Path, settings: BenchSettings) -> Manifest:
    """Read the manifest of an export, and refuse settings that are not for its model.

    Raises:
        ConfigError: New tokens of an encoder, or none of a decoder; texts longer than an encoder
            reads.
        StageOrderError: The directory is no export.
    """
    manifest = read_manifest(directory, *EXPORTS)
    if manifest.kind is ArtifactKind.ONNX:
        if settings.new_tokens is None:
            raise ConfigError(f"{directory}: holds a decoder; give --new-tokens to decode")
        return manifest
    if settings.new_tokens is not None:
        raise ConfigError(
            f"{directory}: holds an encoder, which decodes no tokens; leave --new-tokens out"
        )
    limit = manifest.details.get("context_length")
    if isinstance(limit, int) and settings.prompt_tokens > limit:
        raise ConfigError(
            f"{directory}: texts of {settings.prompt_tokens} tokens exceed the model's context "
            f"length of {limit}; lower --prompt-tokens"
        )
    return manifest


def bench_onnx(
    directory: Path, settings: BenchSettings, progress: Callable[[int], None] = lambda done: None
) -> BenchReport:
    """Measure an exported directory; one more run comes first to warm up and is not counted.

    Args:
        directory: What `rolora export` wrote.
        settings: What to measure.
        progress: Called with the number of finished runs.

    Raises:
        ConfigError: The settings are not for the model, or the tokens do not fit its context.
        StageOrderError: The directory is no export.
        ArtifactError: ONNX Runtime cannot load it.
    """
    manifest = read_export(directory, settings)
    started = time.perf_counter()
    with open_export(directory, settings) as run_once:
        load_s = time.perf_counter() - started
        runs = []
        for done in range(settings.runs + 1):
            run = run_once()
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


@contextmanager
def open_export(directory: Path, settings: BenchSettings) -> Iterator[Callable[[], BenchRun]]:
    """Load a directory and give what runs it once.

    Args:
        directory: What `rolora export` or onnxruntime-genai's model builder wrote.
        settings: What a run is; without new tokens the directory holds an encoder.

    Raises:
        ConfigError: A run's tokens do not fit the model's context.
        ArtifactError: ONNX Runtime cannot load it.
    """
    if settings.new_tokens is None:
        encoder = OnnxEncoder(directory, threads=settings.threads)
        yield partial(measure_texts, encoder, _vocab_size(directory), settings)
    else:
        with OnnxDecoder(directory, threads=settings.threads) as decoder:
            yield partial(measure_prompt, decoder, settings)


def measure_prompt(decoder: OnnxDecoder, settings: BenchSettings) -> BenchRun:
    """Time one prompt and its continuation."""
    ids = settings.random_tokens(decoder.vocab_size)
    prompt, count = settings.prompt_tokens, ids.shape[1]
    decoder.start(capacity=count, batch=settings.batch)
    started = time.perf_counter()
    decoder.append(ids[:, :prompt], last_only=True)
    prefilled = time.perf_counter()
    for position in range(prompt, count):
        decoder.append(ids[:, position : position + 1])
    return {PREFILL: prefilled - started, DECODE: time.perf_counter() - prefilled}


def measure_texts(encoder: OnnxEncoder, vocab_size: int, settings: BenchSettings) -> BenchRun:
    """Time one batch of texts."""
    batch = {"input_ids": settings.random_tokens(vocab_size)}
    started = time.perf_counter()
    encoder.run(batch)
    return {ENCODE: time.perf_counter() - started}


def _vocab_size(directory: Path) -> int:
    """Return how many tokens an encoder knows, from its own configuration beside the graph."""
    path = directory / MODEL_CONFIG_NAME
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path}: does not say the size of the vocabulary ({error!r}); export again"
        ) from error
