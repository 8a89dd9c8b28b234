"""LoRA, its residual forms, and every merge of them, over seeds: train, measure, tabulate.

    python benchmarks/reslora/compare.py train   --data train.jsonl.gz --seeds 0 1 2
    python benchmarks/reslora/compare.py measure --data train.jsonl.gz --test test.jsonl.gz

All runs have the same steps, batches and learning-rate schedule. Each variant takes the peak rate
that has the lowest loss on held-out training rows at the first seed, before any test row is read.
`lora-r20` is the honest control of `block`: LoRA of the rank (m + 1) r that a block adapter has
once it is merged.

Figures: mean loss of a completion token (nats) on test rows, of the unmerged adapter and of every
merge; mean KL of each merge to the unmerged model on calibration text it was not fitted to. A
finished adapter in --work is not trained again, nor one in --output measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from deploy.adapter_artifact import open_adapter
from deploy.architecture import decoder_names
from deploy.artifact import hash_file, library_versions, read_manifest
from deploy.calibration_text import calibration_batches
from deploy.finetune import FinetuneSettings, Method, finetune
from deploy.loading import LoadedModel, load_model
from deploy.shortcut_merge import APPROXIMATIONS
from reslora.adapter import Adapter, restore_adapter
from reslora.attach import attach_adapters, detach_adapters
from reslora.batches import collate_rows, encode_examples
from reslora.config import AdapterConfig, Structure
from reslora.merge import MergeMethod, merge_adapter
from reslora.merge_divergence import merge_divergences
from reslora.merged_factors import merges_exactly
from reslora.rows import read_rows
from reslora.settings import Precision, TrainSettings
from reslora.shortcut_statistics import collect_statistics

RANK, DEPTH, SCALING = 4, 4, 2.0
VARIANTS: Mapping[str, AdapterConfig] = {
    "lora": AdapterConfig(RANK, SCALING * RANK),
    "lora-r20": AdapterConfig((DEPTH + 1) * RANK, SCALING * (DEPTH + 1) * RANK),
    "input": AdapterConfig(RANK, SCALING * RANK, structure=Structure.INPUT, depth=DEPTH),
    "block": AdapterConfig(RANK, SCALING * RANK, structure=Structure.BLOCK, depth=DEPTH),
    "middle": AdapterConfig(RANK, SCALING * RANK, structure=Structure.MIDDLE, depth=DEPTH),
}
"""Rank, depth and alpha / rank of the paper's language runs; `q` and `v` carry the adapters."""

UNMERGED = "unmerged"


@dataclass(frozen=True)
class Cell:
    """One training run."""

    variant: str
    learning_rate: float
    seed: int

    def directory(self, work: Path) -> Path:
        """Return where its adapter lies."""
        return work / f"{self.variant}-{self.learning_rate:g}-seed-{self.seed}"

    def settings(self, arguments: argparse.Namespace) -> FinetuneSettings:
        """Return the stage's settings."""
        config = VARIANTS[self.variant]
        training = TrainSettings(
            max_steps=arguments.steps,
            batch_size=8,
            gradient_accumulation=1,
            learning_rate=self.learning_rate,
            warmup_ratio=0.1,
            weight_decay=0.0,
            max_tokens=256,
            precision=Precision.BFLOAT16,
            seed=self.seed,
            eval_every=0,
            save_every=25,
            validation_fraction=0.01,
        )
        method = Method.LORA if config.structure is None else Method.RESLORA
        return FinetuneSettings(
            arguments.model, str(arguments.data), method, config, targets="q,v", training=training
        )


def train_cell(cell: Cell, arguments: argparse.Namespace) -> float:
    """Train it, if that is not done; returns the loss on held-out training rows."""
    directory = cell.directory(arguments.work)
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = directory.with_name(f"{directory.name}.training").is_dir()
    finetune(cell.settings(arguments), directory, resume=unfinished)
    return held_out_loss(directory)


def held_out_loss(directory: Path) -> float:
    """Return the loss on held-out training rows at the end of a run."""
    training: Any = read_manifest(directory).details["training"]
    return float(training["eval_loss"][-1][1])


def best_rates(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the peak rate of each variant that did best at the first seed."""
    found: dict[str, float] = {}
    for variant in arguments.variants:
        cells = [Cell(variant, rate, arguments.seeds[0]) for rate in arguments.rates]
        best = min(cells, key=lambda cell: train_cell(cell, arguments))
        found[variant] = best.learning_rate
    return found


def completion_loss(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean loss of a completion token, in nats."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            tokens = int((batch["labels"][:, 1:] >= 0).sum())
            total += float(model(**batch).loss) * tokens
            count += tokens
    return total / count


def test_batches(loaded: LoadedModel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the first test rows, of like length side by side."""
    examples = read_rows(str(arguments.test))[: arguments.test_rows]
    rows = sorted(encode_examples(examples, loaded.tokenizer, 512), key=len)
    pad_id = int(loaded.tokenizer.pad_token_id or 0)
    return [
        collate_rows([(row,) for row in rows[start : start + 8]], pad_id)
        for start in range(0, len(rows), 8)
    ]


def measure_cell(
    cell: Cell,
    loaded: LoadedModel,
    batches: Sequence[Mapping[str, Any]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Return the figures of the unmerged adapter and of each merge."""
    stored = open_adapter(cell.directory(arguments.work))
    adapter = stored.adapter
    attached = attach_adapters(loaded.model, adapter.config, list(adapter.factors))
    try:
        restore_adapter(attached, stored.directory)
        found: dict[str, Any] = {UNMERGED: {"loss": completion_loss(attached, batches)}}
        statistics_found = None
        methods: tuple[MergeMethod, ...] = (MergeMethod.EXACT,)
        if not merges_exactly(adapter):
            methods = APPROXIMATIONS
            windows = calibration_batches(
                loaded.tokenizer, arguments.calibration, windows=16, tokens=256
            )
            statistics_found = collect_statistics(attached, windows[:12])
            divergences = merge_divergences(
                attached, adapter, methods, windows[12:], statistics_found
            )
            found |= {str(method): asdict(each) for method, each in divergences.items()}
    finally:
        detach_adapters(attached)
    for method in methods:
        merged = merged_model(loaded.model, adapter, method, statistics_found)
        loss = completion_loss(merged, batches)
        found[str(method)] = found.get(str(method), {}) | {"loss": loss}
    return found


def merged_model(
    model: nn.Module, adapter: Adapter, method: MergeMethod, statistics_found: Any
) -> nn.Module:
    """Return a copy of the model with the adapter merged."""
    merged = copy.deepcopy(model)
    merge_adapter(merged, adapter, method, statistics_found)
    return merged


def tabulate(measured: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return mean and standard deviation over the seeds of every variant and merge."""
    table = Table("adapter", "merge", "test loss", "± seeds", "KL to unmerged", "seeds")
    losses: dict[tuple[str, str], list[float]] = {}
    divergences: dict[tuple[str, str], list[float]] = {}
    for key, figures in measured.items():
        variant = key.partition("/")[0]
        for merge, each in figures["merges"].items():
            losses.setdefault((variant, merge), []).append(each["loss"])
            if "kl_mean" in each:
                divergences.setdefault((variant, merge), []).append(each["kl_mean"])
    for (variant, merge), values in losses.items():
        kl = divergences.get((variant, merge))
        table.add_row(
            variant,
            merge,
            f"{statistics.mean(values):.4f}",
            f"{statistics.stdev(values):.4f}" if len(values) > 1 else "",
            "" if kl is None else f"{statistics.mean(kl):.2e}",
            str(len(values)),
        )
    return table


def measure(arguments: argparse.Namespace) -> None:
    """Measure every trained cell of the best rates; write the JSON after each."""
    loaded = load_model(arguments.model)
    decoder_names(loaded.model.config)
    batches = test_batches(loaded, arguments)
    rates = best_rates(arguments)
    written: dict[str, Any] = {"measured": {}}
    if arguments.output.is_file():
        written = json.loads(arguments.output.read_text(encoding="utf-8"))
    measured = written["measured"]
    measured.setdefault("base", {"merges": {UNMERGED: {"loss": None}}})
    if measured["base"]["merges"][UNMERGED]["loss"] is None:
        measured["base"]["merges"][UNMERGED]["loss"] = completion_loss(loaded.model, batches)
    for seed in arguments.seeds:
        for variant in arguments.variants:
            cell = Cell(variant, rates[variant], seed)
            key = f"{variant}/seed-{seed}"
            if key in measured:
                continue
            held_out = train_cell(cell, arguments)
            measured[key] = {
                "learning_rate": cell.learning_rate,
                "held_out_loss": held_out,
                "merges": measure_cell(cell, loaded, batches, arguments),
            }
            sys.stdout.write(f"{key}: {json.dumps(measured[key])}\n")
            sys.stdout.flush()
            written["settings"] = asdict(cell.settings(arguments)) | {
                "data": arguments.data.name,
                "data_sha256": hash_file(arguments.data),
                "test": arguments.test.name,
                "test_sha256": hash_file(arguments.test),
                "test_rows": arguments.test_rows,
                "rates": arguments.rates,
            }
            written |= {"versions": library_versions(), "cores": os.cpu_count()}
            arguments.output.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    Console(width=110).print(tabulate(measured))


def main() -> None:
    """Train the cells, or measure them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True, help="training rows")
    parser.add_argument("--test", type=Path, help="test rows, for measuring")
    parser.add_argument("--test-rows", type=int, default=96)
    parser.add_argument("--calibration", help="text; default the sample of the package")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("artifacts/reslora/compare"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/reslora/compare.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "train":
        rates = best_rates(arguments)
        for seed in arguments.seeds:
            for variant, rate in rates.items():
                train_cell(Cell(variant, rate, seed), arguments)
        return
    if arguments.test is None:
        parser.error("measure needs --test")
    measure(arguments)


if __name__ == "__main__":
    main()
