r"""LoRA before, after, without rotation, and through the rounding, at equal training, over seeds.

    python benchmarks/rolora/compare.py train   --train TRAIN --calibration TEXT --seeds 0 1 2
    python benchmarks/rolora/compare.py measure --calibration TEXT --test TEST --text WIKI \
        --choices DIR
    python benchmarks/rolora/compare.py table

Four ways to the same demo model, fine-tuned on instructions (RoLoRA, arXiv:2407.08044):

    plain   LoRA, merged, quantized without rotation
    lbr     LoRA before rotation: the same adapter, merged, then rotated and quantized
    lar     LoRA after rotation: trained on the rotated model (RoLoRA)
    aware   LoRA inside the rounding of a rotated W4A4 checkpoint with channel scales, learning from
            the data's tokens

Each of the first three is quantized to W4A4 with round-to-nearest and with GPTQ, and to W8A8; and
measured in float (`plain` and `lbr` are one model there). Figures: mean loss of a completion token
on TEST (the task), perplexity on TEXT, and zero-shot accuracy on the questions in DIR. A finished
adapter in --work is not trained again, nor a cell in --output measured again. All cells are
exported, and measured in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deploy.artifact import library_versions
from deploy.checkpoint_settings import (
    CheckpointSettings,
    RotationChoice,
    choose_recipe,
    parse_rotation,
)
from deploy.evaluation import EvaluationSettings, parse_tasks, run_evaluation
from deploy.export import Target, export_onnx
from deploy.finetune import FinetuneSettings, Method, finetune
from deploy.merge_rotate_quantize import merge_rotate_quantize
from deploy.model_location import DEMO_MODEL
from deploy.pack import PackSettings, pack
from deploy.quantized_training import LearnFrom
from reslora.config import AdapterConfig
from reslora.merge import MergeMethod
from reslora.settings import Precision, TrainSettings
from rolora.equalization import Equalized
from rolora.rotation import RotationKind

ADAPTER = AdapterConfig(16, 16.0)
"""Rank and alpha of the paper; `q` and `v` carry the adapters, for `aware` all linears do."""

SCHEMES = {
    "float": ("FP32", "rtn"),
    "W4A4-rtn": ("W4A4", "rtn"),
    "W4A4-gptq": ("W4A4", "gptq"),
    "W8A8": ("W8A8", "rtn"),
}
ORDERS = {
    "plain": ("W4A4-rtn", "W4A4-gptq", "W8A8"),
    "lbr": tuple(SCHEMES),
    "lar": tuple(SCHEMES),
    "aware": ("W4A4-gptq",),
}
"""What each order is measured in."""
TASKS = ("arc_easy", "piqa")


def training(arguments: argparse.Namespace, seed: int, rate: float) -> TrainSettings:
    """Return the settings of a run; all but the rate are shared."""
    return TrainSettings(
        max_steps=arguments.steps,
        batch_size=8,
        gradient_accumulation=1,
        learning_rate=rate,
        max_tokens=256,
        precision=Precision.BFLOAT16,
        eval_every=0,
        save_every=10_000,
        seed=seed,
    )


def adapter_of(arguments: argparse.Namespace, order: str, seed: int) -> Path:
    """Return where an adapter lies; `plain` and `lbr` share theirs."""
    kind = "lora" if order in ("plain", "lbr") else order
    return Path(arguments.work) / f"{kind}-{seed}"


def train(arguments: argparse.Namespace) -> None:
    """Train what is missing."""
    start = Path(arguments.work) / "start"
    for seed in arguments.seeds:
        for order in arguments.orders:
            if order == "plain":  # has the adapter of `lbr`
                continue
            output = adapter_of(arguments, order, seed)
            if output.is_dir():
                continue
            aware = order == "aware"
            if aware and not start.is_dir():
                quantize(arguments, None, "aware", "W4A4-gptq", start)
            settings = FinetuneSettings(
                model=DEMO_MODEL,
                data=arguments.train,
                method=Method.LORA if order == "lbr" else Method.ROLORA,
                adapter=ADAPTER,
                targets="all" if aware else "q,v",
                training=training(
                    arguments, seed, arguments.aware_rate if aware else arguments.rate
                ),
                start=start if aware else None,
                learn_from=LearnFrom.LABELS,
            )
            finetune(settings, output)
            say(f"trained {output}")


def quantize(
    arguments: argparse.Namespace, adapter: Path | None, order: str, scheme: str, output: Path
) -> None:
    """Merge, rotate and quantize."""
    bits, weights = SCHEMES[scheme]
    rotation: RotationChoice | None = None  # the adapter's own, or a fresh one
    if order == "plain":
        rotation = parse_rotation("none", RotationKind.HADAMARD, 0)
    settings = CheckpointSettings(
        DEMO_MODEL,
        adapter,
        MergeMethod.EXACT,
        rotation,
        choose_recipe(bits, weights=weights),
        arguments.calibration,
        equalize=Equalized.ALL if order == "aware" else Equalized.NONE,
    )
    merge_rotate_quantize(settings, output)


def measure(arguments: argparse.Namespace) -> None:
    """Measure what is missing, and write the file after each cell."""
    output = Path(arguments.output)
    found: dict[str, Any] = {}
    if output.is_file():
        found = json.loads(output.read_text(encoding="utf-8"))["cells"]
    checkpoint, export = (Path(arguments.work) / name for name in ("checkpoint", "export"))
    for seed in arguments.seeds:
        for order in arguments.orders:
            for scheme in ORDERS[order]:
                key = f"{order}/{scheme}/{seed}"
                adapter = adapter_of(arguments, order, seed)
                if key in found or not adapter.is_dir():
                    continue
                for directory in (checkpoint, export):
                    shutil.rmtree(directory, ignore_errors=True)
                if order == "aware":
                    pack(PackSettings(DEMO_MODEL, adapter), checkpoint)
                else:
                    quantize(arguments, adapter, order, scheme, checkpoint)
                export_onnx(checkpoint, export, Target.CPU)
                found[key] = figures(arguments, str(export))
                report = {
                    "model": DEMO_MODEL,
                    "steps": arguments.steps,
                    "rate": arguments.rate,
                    "aware_rate": arguments.aware_rate,
                    "versions": library_versions(),
                    "cells": found,
                }
                partial = output.with_suffix(".partial")
                partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
                partial.replace(output)
                say(f"{key}: {found[key]}")


def figures(arguments: argparse.Namespace, model: str) -> dict[str, float]:
    """Measure one export."""

    def results(tasks: str, **options: Any) -> dict[str, Any]:
        settings = EvaluationSettings(
            model=model, tasks=parse_tasks(tasks), threads=arguments.threads, **options
        )
        found: dict[str, Any] = run_evaluation(settings)["results"]
        return found

    found = {
        "loss": results("completion-ppl", data=arguments.test, limit=arguments.rows)[
            "completion_nll"
        ],
        "ppl": results("ppl", data=arguments.text)["ppl"],
    }
    chosen = results(",".join(TASKS), data=arguments.choices, limit=arguments.questions)
    found["accuracy"] = statistics.mean(chosen[task]["acc"] for task in TASKS)
    return found


def table(arguments: argparse.Namespace) -> None:
    """Print mean and deviation over the seeds."""
    cells = json.loads(Path(arguments.output).read_text(encoding="utf-8"))["cells"]
    shown = Table("order", "scheme", "seeds", "task loss", "perplexity", "accuracy")
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for key, cell in cells.items():
        order, scheme, _ = key.split("/")
        groups.setdefault((order, scheme), []).append(cell)
    for (order, scheme), members in groups.items():
        row = [order, scheme, str(len(members))]
        for name, digits in (("loss", 3), ("ppl", 2), ("accuracy", 3)):
            values = [member[name] for member in members]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        shown.add_row(*row)
    Console().print(shown)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run one of the three steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("train", "measure", "table"))
    parser.add_argument("--train", help="instruction rows to learn from")
    parser.add_argument("--test", help="instruction rows, none of them from --train")
    parser.add_argument("--calibration", help="text, none of it from --text")
    parser.add_argument("--text", help="text for perplexity")
    parser.add_argument("--choices", help="directory of multiple choice questions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--orders", nargs="+", default=list(ORDERS), choices=ORDERS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--aware-rate", type=float, default=4e-4, help="where all linears learn")
    parser.add_argument("--rows", type=int, default=64, help="of --test")
    parser.add_argument("--questions", type=int, default=200, help="of each task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", default="artifacts/rolora-compare", help="keeps the adapters")
    parser.add_argument("--output", default="benchmarks/rolora/compare.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"train": train, "measure": measure, "table": table}[arguments.step](arguments)


if __name__ == "__main__":
    main()
