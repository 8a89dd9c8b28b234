"""LoRA, its residual forms, and every merge of them, over seeds: train, measure, tabulate.

    python benchmarks/reslora/compare.py train   --task gsm8k --train TRAIN --seeds 0 1 2
    python benchmarks/reslora/compare.py measure --task gsm8k --train TRAIN --test TEST

Task `gsm8k` is the demo decoder on question/answer rows, `sst2` the demo encoder on labelled rows.
All runs of a task have the same steps, batches and learning-rate schedule. Each variant takes the
peak rate that has the lowest loss on held-out training rows at the first seed, before any test row
is read. `lora-r20` is the honest control of `block`: LoRA of the rank (m + 1) r that a block
adapter has once it is merged.

Figures on the test rows, of the unmerged adapter and of every merge: the mean loss of a completion
token, or accuracy and loss of a classifier; and the mean KL of each merge to the unmerged model on
calibration rows that it was not fitted to. A finished adapter in --work is not trained again, nor
one in --output measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from deploy.adapter_artifact import StoredAdapter, open_adapter
from deploy.architecture import decoder_names
from deploy.artifact import hash_file, library_versions, read_manifest
from deploy.classify import evaluate_classifier
from deploy.completion_loss import completion_loss
from deploy.finetune import FinetuneSettings, Method, finetune
from deploy.finetune_tasks import TrainingTask
from deploy.language_model import TorchLanguageModel
from deploy.live_adapter import attach_stored
from deploy.merge_sources import ClassifierSource, DecoderSource, MergeSource
from deploy.model_location import DEMO_ENCODER, DEMO_MODEL
from deploy.shortcut_merge import APPROXIMATIONS, choose_merge
from reslora.attach import detach_adapters
from reslora.config import AdapterConfig, Structure
from reslora.labelled_rows import read_labelled_rows
from reslora.merge import MergeMethod, merge_adapter
from reslora.merged_factors import merges_exactly
from reslora.rows import read_rows
from reslora.settings import Precision, TrainSettings

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


class Task(ABC):
    """What is learned, and how it is judged."""

    name: str
    model: str
    training_task: TrainingTask
    steps: int
    batch_size: int
    max_tokens: int
    precision: Precision
    test_rows: int | None
    """First rows of the test file; None takes all."""
    rates: tuple[float, ...]
    """Peak learning rates that are tried at the first seed."""

    @abstractmethod
    def source(self, stored: StoredAdapter, model: str) -> MergeSource:
        """Load the base model."""

    @abstractmethod
    def figures(self, source: MergeSource, model: nn.Module) -> dict[str, Any]:
        """Measure a model on the test rows; `loss` is among the figures."""


class Arithmetic(Task):
    """Worked answers to word problems."""

    name, model, training_task = "gsm8k", DEMO_MODEL, TrainingTask.LANGUAGE
    steps, batch_size, max_tokens, precision = 50, 8, 256, Precision.BFLOAT16
    test_rows, rates = 32, (1e-3, 3e-3, 1e-2)

    def __init__(self, test: Path | None) -> None:
        """Read the test rows."""
        self._examples = [] if test is None else read_rows(str(test))[: self.test_rows]

    def source(self, stored: StoredAdapter, model: str) -> MergeSource:
        """See `Task`."""
        return DecoderSource(model, None, windows=16, tokens=256)

    def figures(self, source: MergeSource, model: nn.Module) -> dict[str, Any]:
        """See `Task`."""
        wrapped = TorchLanguageModel(self.name, model)  # type: ignore[arg-type]  # or PEFT's
        found = completion_loss(wrapped, source.loaded.tokenizer, self._examples)
        return {"loss": found["completion_nll"], "tokens": found["n_tokens"]}


class Sentiment(Task):
    """Positive or negative sentences."""

    name, model, training_task = "sst2", DEMO_ENCODER, TrainingTask.CLASSIFICATION
    steps, batch_size, max_tokens, precision = 150, 32, 64, Precision.FLOAT32
    test_rows, rates = None, (1e-3, 3e-3, 6e-3)

    def __init__(self, test: Path | None) -> None:
        """Read the test rows."""
        self._examples = [] if test is None else read_labelled_rows(str(test))

    def source(self, stored: StoredAdapter, model: str) -> MergeSource:
        """See `Task`."""
        return ClassifierSource(model, stored, None)

    def figures(self, source: MergeSource, model: nn.Module) -> dict[str, Any]:
        """See `Task`."""
        assert isinstance(source, ClassifierSource)
        return dict(
            evaluate_classifier(
                model,
                source.loaded.tokenizer,
                self._examples,
                source.opened.labels,
                max_tokens=source.opened.token_limit,
            )
        )


TASKS: Mapping[str, type[Arithmetic] | type[Sentiment]] = {
    task.name: task for task in (Arithmetic, Sentiment)
}


@dataclass(frozen=True)
class Cell:
    """One training run."""

    variant: str
    learning_rate: float
    seed: int

    def directory(self, work: Path) -> Path:
        """Return where its adapter lies."""
        return work / f"{self.variant}-{self.learning_rate:g}-seed-{self.seed}"

    def settings(self, task: Task, arguments: argparse.Namespace) -> FinetuneSettings:
        """Return the stage's settings."""
        config = VARIANTS[self.variant]
        training = TrainSettings(
            max_steps=arguments.steps or task.steps,
            batch_size=task.batch_size,
            gradient_accumulation=1,
            learning_rate=self.learning_rate,
            warmup_ratio=0.1,
            weight_decay=0.0,
            max_tokens=task.max_tokens,
            precision=task.precision,
            seed=self.seed,
            eval_every=0,
            save_every=100,
            validation_fraction=0.01,
        )
        return FinetuneSettings(
            arguments.model or task.model,
            str(arguments.train),
            Method.LORA if config.structure is None else Method.RESLORA,
            config,
            task=task.training_task,
            targets="q,v",
            training=training,
        )


def train_cell(cell: Cell, task: Task, arguments: argparse.Namespace) -> None:
    """Train it, if that is not done."""
    directory = cell.directory(arguments.work / task.name)
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = directory.with_name(f"{directory.name}.training").is_dir()
    finetune(cell.settings(task, arguments), directory, resume=unfinished)


def held_out_loss(directory: Path) -> float:
    """Return the loss on held-out training rows at the end of a run."""
    training: Any = read_manifest(directory).details["training"]
    return float(training["eval_loss"][-1][1])


def best_rate(variant: str, task: Task, arguments: argparse.Namespace) -> tuple[float, Any]:
    """Return a variant's best peak rate at the first seed, and the held-out loss of each."""
    work = arguments.work / task.name
    losses = {
        rate: held_out_loss(Cell(variant, rate, arguments.seeds[0]).directory(work))
        for rate in task.rates
        if Cell(variant, rate, arguments.seeds[0]).directory(work).is_dir()
    }
    return min(losses, key=lambda rate: losses[rate]), losses


def train(task: Task, arguments: argparse.Namespace) -> None:
    """Train every rate at the first seed, and the best one at the others."""
    for variant in arguments.variants:
        for rate in task.rates:
            train_cell(Cell(variant, rate, arguments.seeds[0]), task, arguments)
        rate, losses = best_rate(variant, task, arguments)
        sys.stdout.write(f"{variant}: {rate:g} of {losses}\n")
        sys.stdout.flush()
        for seed in arguments.seeds[1:]:
            train_cell(Cell(variant, rate, seed), task, arguments)


def measure_cell(directory: Path, task: Task, model: str) -> dict[str, Any]:
    """Return the figures of the unmerged adapter and of each merge."""
    stored = open_adapter(directory)
    adapter = stored.adapter
    source = task.source(stored, model)
    base = source.loaded.model
    names = None if adapter.head_name else decoder_names(base.config)
    attached, _ = attach_stored(base, names, stored)
    found: dict[str, Any] = {UNMERGED: task.figures(source, attached.eval())}
    detach_adapters(attached)
    methods: tuple[MergeMethod, ...] = (MergeMethod.EXACT,)
    observed = None
    if not merges_exactly(adapter):
        methods = APPROXIMATIONS
        chosen = choose_merge(base, names, stored, None, lambda: source.calibration(stored))
        observed = chosen.statistics
        found |= chosen.figures["candidates"]
    for method in methods:
        merged = copy.deepcopy(base)
        merge_adapter(merged, adapter, method, observed)
        found[str(method)] = found.get(str(method), {}) | task.figures(source, merged)
    return found


def measure(task: Task, arguments: argparse.Namespace) -> None:
    """Measure the cells of the best rates; write the JSON after each."""
    everything: dict[str, Any] = {}
    if arguments.output.is_file():
        everything = json.loads(arguments.output.read_text(encoding="utf-8"))
    written = everything.setdefault(task.name, {"held_out_losses": {}, "measured": {}})
    for seed in arguments.seeds:
        for variant in arguments.variants:
            rate, losses = best_rate(variant, task, arguments)
            cell = Cell(variant, rate, seed)
            key = f"{variant}/seed-{seed}"
            if key in written["measured"]:
                continue
            directory = cell.directory(arguments.work / task.name)
            settings = cell.settings(task, arguments)
            written["held_out_losses"][variant] = losses
            written["measured"][key] = {
                "learning_rate": rate,
                "held_out_loss": held_out_loss(directory),
                "merges": measure_cell(directory, task, settings.model),
            }
            sys.stdout.write(f"{key}: {json.dumps(written['measured'][key])}\n")
            sys.stdout.flush()
            written["settings"] = asdict(settings) | {
                "data": arguments.train.name,
                "data_sha256": hash_file(arguments.train),
                "test": arguments.test.name,
                "test_sha256": hash_file(arguments.test),
                "test_rows": task.test_rows,
            }
            written |= {"versions": library_versions(), "cores": os.cpu_count()}
            arguments.output.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    Console(width=110).print(tabulate(written["measured"]))


def tabulate(measured: Mapping[str, Any]) -> Table:
    """Return mean and standard deviation over the seeds of every variant and merge."""
    collected: dict[tuple[str, str], dict[str, list[float]]] = {}
    for key, cell in measured.items():
        for merge, figures in cell["merges"].items():
            row = collected.setdefault((key.partition("/")[0], merge), {})
            for name in ("loss", "accuracy", "kl_mean"):
                if name in figures:
                    row.setdefault(name, []).append(figures[name])
    table = Table("adapter", "merge", "loss", "accuracy", "KL to unmerged", "seeds")
    for (variant, merge), row in collected.items():
        table.add_row(
            variant,
            merge,
            *(
                _spread(row.get(name), form)
                for name, form in (("loss", ".4f"), ("accuracy", ".3f"))
            ),
            f"{statistics.mean(row['kl_mean']):.1e}" if "kl_mean" in row else "",
            str(len(row["loss"])),
        )
    return table


def _spread(values: list[float] | None, form: str) -> str:
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {deviation:{form}}"


def main() -> None:
    """Train the cells, or measure them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--train", type=Path, required=True, help="training rows")
    parser.add_argument("--test", type=Path, help="test rows, for measuring")
    parser.add_argument("--model", help="instead of the demo model")
    parser.add_argument("--steps", type=int, help="instead of the task's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("artifacts/reslora/compare"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/reslora/compare.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "measure" and arguments.test is None:
        parser.error("measure needs --test")
    task = TASKS[arguments.task](arguments.test)
    (train if arguments.what == "train" else measure)(task, arguments)


if __name__ == "__main__":
    main()
