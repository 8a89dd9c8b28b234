"""Sentence embeddings of exported encoders, against the float model: cosine, size and speed.

    python benchmarks/encoders/embeddings.py --model minilm-l6 EXPORT [EXPORT ...]

Embeddings are means of the last hidden states over a sentence's tokens. Speed is that of one thread
for random tokens without padding; the runs of all models take turns, and the median counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy.artifact import verify_files
from deploy.encoder_loading import load_encoder
from deploy.encoder_session import OnnxEncoder
from deploy.session import HIDDEN_NAME

SENTENCES = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a white horse on an enclosed ground.",
    "Two women are playing the violin.",
    "A cheetah is running behind its prey.",
    "How do I reset my password if I no longer have access to my email?",
    "The stock market fell sharply after the central bank raised interest rates by half a point.",
    "Quantum computers use qubits, which can be in a superposition of states.",
    "Bake the bread at 220 degrees for thirty minutes, then let it cool on a rack.",
    "Where is the nearest railway station?",
    "Paris is the capital of France, and Berlin that of Germany.",
)
SHAPES = ((1, 16), (1, 128), (16, 64))
"""Texts and tokens of each."""
RUNS = 15

Batch = dict[str, np.ndarray]
Run = Callable[[Batch], np.ndarray]


def unit_embeddings(run: Run, batch: Batch) -> np.ndarray:
    """Return a vector of length 1 for each text, float64 [B, D]."""
    mask = batch["attention_mask"][..., None].astype(np.float64)
    means = (run(batch) * mask).sum(axis=1) / mask.sum(axis=1)
    units: np.ndarray = means / np.linalg.norm(means, axis=1, keepdims=True)
    return units


def milliseconds(runs: dict[str, Run], shape: tuple[int, int]) -> dict[str, float]:
    """Return the median time of each model for random tokens of a shape."""
    ids = np.random.default_rng(0).integers(1000, 20000, shape)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(RUNS + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run(batch)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(statistics.median(each), 2) for name, each in times.items()}


def main() -> None:
    """Compare all exports and print the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("exports", type=Path, nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded, _ = load_encoder(arguments.model)

    def in_torch(batch: Batch) -> np.ndarray:
        with torch.inference_mode():
            output = loaded.model(**{key: torch.from_numpy(each) for key, each in batch.items()})
        hidden: np.ndarray = output.last_hidden_state.numpy()
        return hidden

    encoded: Any = loaded.tokenizer(list(SENTENCES), padding=True, return_tensors="np")
    sentences = dict(encoded)
    reference = unit_embeddings(in_torch, sentences)
    runs: dict[str, Run] = {"torch": in_torch}
    report: dict[str, dict[str, Any]] = {"torch": {}}
    for directory in arguments.exports:
        files = verify_files(directory).files
        encoder = OnnxEncoder(directory, threads=1)
        runs[directory.name] = lambda batch, encoder=encoder: encoder.run(batch)[HIDDEN_NAME]  # type: ignore[misc]
        found = unit_embeddings(runs[directory.name], sentences)
        cosines = (found * reference).sum(axis=1)
        report[directory.name] = {
            "cosine_least": float(cosines.min()),
            "cosine_mean": float(cosines.mean()),
            "similarity_error_most": float(np.abs(found @ found.T - reference @ reference.T).max()),
            "graph_bytes": sum(
                record.bytes for name, record in files.items() if name.startswith("model.onnx")
            ),
        }
    for shape in SHAPES:
        for name, each in milliseconds(runs, shape).items():
            report[name][f"ms_{shape[0]}x{shape[1]}"] = each
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
