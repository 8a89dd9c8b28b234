"""What each merge of an input or middle shortcut changes in the model's predictions.

    python benchmarks/reslora/merges.py --data rows.jsonl.gz --steps 40

Adapters are trained on the demo model, then each is merged by every method, as `--merge auto` does:
statistics from 12 windows of calibration text, mean KL to the unmerged model and top-1 agreement
with it on 4 others. A finished adapter in --work is not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from deploy.adapter_artifact import open_adapter
from deploy.architecture import decoder_names
from deploy.artifact import hash_file, library_versions
from deploy.calibration_text import calibration_batches
from deploy.finetune import FinetuneSettings, Method, finetune
from deploy.loading import DEMO_MODEL, load_model
from deploy.shortcut_merge import merge_stored_adapter
from reslora.config import AdapterConfig, Structure
from reslora.settings import TrainSettings

DEPTH = {Structure.INPUT: 1, Structure.MIDDLE: 4}


def settings_for(structure: Structure, arguments: argparse.Namespace) -> FinetuneSettings:
    """Return the training run of one structure."""
    adapter = AdapterConfig(rank=8, alpha=16, structure=structure, depth=DEPTH[structure])
    training = TrainSettings(
        max_steps=arguments.steps,
        batch_size=8,
        gradient_accumulation=1,
        learning_rate=1e-3,
        max_tokens=192,
        seed=arguments.seed,
    )
    return FinetuneSettings(
        DEMO_MODEL, str(arguments.data), Method.RESLORA, adapter, targets="q,v", training=training
    )


def measure(settings: FinetuneSettings, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and merge; returns the figures of every method."""
    seed, structure = settings.training.seed, settings.adapter.structure
    directory = arguments.work / f"{structure}-{arguments.steps}-steps-seed-{seed}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    finetune(settings, directory)
    loaded = load_model(DEMO_MODEL)
    report = merge_stored_adapter(
        loaded.model,
        decoder_names(loaded.model.config),
        open_adapter(directory),
        None,
        lambda: calibration_batches(
            loaded.tokenizer, arguments.calibration, windows=16, tokens=arguments.window_tokens
        ),
    )
    candidates: dict[str, Any] = report["candidates"]
    return candidates


def machine() -> dict[str, Any]:
    """Describe the processor."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return {"cpu": models[0] if models else None, "cores": os.cpu_count()}


def main() -> None:
    """Train, merge, write the JSON after each structure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="training rows")
    parser.add_argument("--calibration", help="text; default the sample of the package")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("artifacts/reslora"), help="adapters")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/reslora/merges.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    summary: dict[str, Any] = {}
    runs: dict[str, Any] = {}
    for structure in DEPTH:
        settings = settings_for(structure, arguments)
        summary[structure] = measure(settings, arguments)
        runs[structure] = asdict(settings) | {"data": arguments.data.name}
        sys.stdout.write(f"{structure}: {json.dumps(summary[structure], indent=2)}\n")
        sys.stdout.flush()
        written = summary | {
            "machine": machine(),
            "versions": library_versions(),
            "settings": {
                "runs": runs,
                "data_sha256": hash_file(arguments.data),
                "calibration": arguments.calibration,
                "windows": 16,
                "window_tokens": arguments.window_tokens,
            },
        }
        arguments.output.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
