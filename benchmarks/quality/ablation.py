"""What each step of W4A4 contributes, and how much hangs on the rotation's seed.

    python benchmarks/quality/ablation.py measure --text WIKI_VALID --calibration WIKI_TRAIN
    python benchmarks/quality/ablation.py table

From weights and inputs rounded as they are, each step adds one thing: R1, R2, R4, clipped inputs,
channel scales, GPTQ. Inputs have a scale a token throughout. Checkpoints of the demo model are
measured in torch, with the integers of an export, on windows of 1,024 tokens, against the float32
model. A cell in --output is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deploy.artifact import library_versions
from deploy.checkpoint_settings import CheckpointSettings, choose_recipe, parse_rotation
from deploy.evaluation import EvaluationSettings, run_evaluation
from deploy.merge_rotate_quantize import merge_rotate_quantize
from deploy.model_location import DEMO_MODEL
from reslora.merge import MergeMethod
from rolora.equalization import Equalized
from rolora.rotation import RotationKind

FLOAT = "float"


@dataclass(frozen=True)
class Step:
    """One row of the table; all that it does not name is as in the row before it."""

    name: str
    rotate: str
    weights: str
    clip: float
    equalize: Equalized = Equalized.NONE


STEPS = (
    Step("rounded as it is", "none", "rtn", 1.0),
    Step("+ R1", "r1", "rtn", 1.0),
    Step("+ R2", "r1,r2", "rtn", 1.0),
    Step("+ R4", "r1,r2,r4", "rtn", 1.0),
    Step("+ inputs clipped at 0.7", "r1,r2,r4", "rtn", 0.7),
    Step("+ channel scales, R1 at run time", "r1,r2,r4", "rtn", 0.7, equalize=Equalized.ALL),
    Step("+ GPTQ", "r1,r2,r4", "gptq", 0.7, equalize=Equalized.ALL),
)


def measure(arguments: argparse.Namespace) -> None:
    """Measure every cell that is missing, and write the file after each."""
    found: dict[str, Any] = {}
    if arguments.output.is_file():
        found = json.loads(arguments.output.read_text(encoding="utf-8"))["ppl"]
    if FLOAT not in found:
        found[FLOAT] = perplexity(DEMO_MODEL, arguments)
    for seed in arguments.seeds:
        for step in STEPS:
            key = f"{step.name}, seed {seed}"
            if key in found or (step.rotate == "none" and seed != arguments.seeds[0]):
                continue
            found[key] = run(step, seed, arguments)
            summary = {
                "model": DEMO_MODEL,
                "scheme": arguments.scheme,
                "windows": arguments.windows,
                "versions": library_versions(),
                "ppl": found,
            }
            arguments.output.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
            say(f"{key}: {found[key] / found[FLOAT]:.3f}")


def run(step: Step, seed: int, arguments: argparse.Namespace) -> float:
    """Quantize with a step's settings and return the perplexity."""
    rotation = parse_rotation(step.rotate, RotationKind.HADAMARD, seed)
    recipe = choose_recipe(
        arguments.scheme,
        weights=step.weights,
        activation_clip=step.clip,
        static=False,
    )
    settings = CheckpointSettings(
        DEMO_MODEL,
        None,
        MergeMethod.EXACT,
        rotation,
        recipe,
        arguments.calibration,
        equalize=step.equalize,
    )
    checkpoint = arguments.work / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    merge_rotate_quantize(settings, checkpoint)
    return perplexity(str(checkpoint), arguments)


def perplexity(model: str, arguments: argparse.Namespace) -> float:
    """Return the perplexity of a model on the text."""
    settings = EvaluationSettings(model, data=arguments.text, windows=arguments.windows)
    return float(run_evaluation(settings)["results"]["ppl"])


def table(arguments: argparse.Namespace) -> None:
    """Print the ratio to float of each step: mean, deviation and range over the seeds."""
    found = json.loads(arguments.output.read_text(encoding="utf-8"))["ppl"]
    rows = Table("step", "perplexity ratio", "least", "greatest", "seeds")
    for step in STEPS:
        ratios = [
            value / found[FLOAT]
            for key, value in found.items()
            if key.rpartition(", seed ")[0] == step.name
        ]
        if ratios:
            spread = f" ± {statistics.stdev(ratios):.3g}" if len(ratios) > 1 else ""
            rows.add_row(
                step.name,
                f"{statistics.mean(ratios):.4g}{spread}",
                f"{min(ratios):.4g}",
                f"{max(ratios):.4g}",
                str(len(ratios)),
            )
    Console().print(rows)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("measure", "table"))
    parser.add_argument("--text", help="WikiText-2 raw validation text")
    parser.add_argument("--calibration", help="calibration text, none of it from --text")
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("artifacts/ablation"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/quality/ablation.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"measure": measure, "table": table}[arguments.step](arguments)


if __name__ == "__main__":
    main()
