"""Perplexity after quantization-aware training, in ONNX Runtime, against the float32 model.

    python benchmarks/quality/aware.py train   --calibration WIKI_TRAIN --rows ROWS.jsonl
    python benchmarks/quality/aware.py measure --text WIKI_VALID

Every case is a chain: quantize with GPTQ, then train an adapter inside the rounding and pack it,
once or more; the last checkpoint is exported and measured as `wikitext.py` does. The rows come from
`training_rows.py`, none of them from --text; some rounds take the first --later of them alone.
Training learns from the float model's predictions. A round costs 6 to 8 seconds a step on one core;
a killed one goes on with its newest training checkpoint, and finished ones are not redone.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from deploy.artifact import library_versions, read_manifest
from deploy.checkpoint_settings import CheckpointSettings, choose_recipe
from deploy.export import Target, export_onnx
from deploy.finetune import FinetuneSettings, Method, finetune
from deploy.language_model import open_language_model
from deploy.merge_rotate_quantize import merge_rotate_quantize
from deploy.model_location import DEMO_MODEL
from deploy.pack import PackSettings, pack
from deploy.text_data import read_text
from deploy.text_quality import Task, cut_windows, evaluate_model
from reslora.config import AdapterConfig
from reslora.merge import MergeMethod
from reslora.settings import Keep, Precision, TrainSettings
from rolora.equalization import Equalized
from rolora.kv_cache import FLOAT_KV_BITS


@dataclass(frozen=True)
class Round:
    """One training inside the rounding."""

    steps: int
    rate: float
    rank: int
    later: bool = False
    """Learns from the first --later rows alone."""
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """A scheme and what is trained in it."""

    scheme: str
    rounds: tuple[Round, ...]
    equalize: Equalized | None = None
    """Channel scales; None where the scheme has them by default."""
    table_bits: int | None = None
    """Of the one table for embedding and head; None where there are two, of 8 bits."""
    kv_bits: int = FLOAT_KV_BITS
    """Of the key-value cache, which is calibrated at the start and not trained in."""
    rotation_block: int | None = None
    """Channels that rotations at run time mix; None for all."""
    static: Literal["all"] | None = None
    """Of `--static`: calibrated scales for every input; None is the scheme's default."""


CASES = {
    "w4a4": Case("W4A4", (Round(120, 5e-4, 64),)),
    "w4a8": Case("W4A8", (Round(220, 4e-4, 32),)),
    "w4a8-scaled": Case("W4A8", (Round(220, 4e-4, 32),), equalize=Equalized.ALL),
    "w4a8-shared": Case(
        "W4A8",
        (Round(120, 5e-4, 32),),
        equalize=Equalized.ALL,
        table_bits=8,
        kv_bits=8,
        rotation_block=64,
    ),
    "w4a8-shared-4": Case(
        "W4A8",
        (Round(120, 5e-4, 32),),
        equalize=Equalized.ALL,
        table_bits=4,
        kv_bits=8,
        rotation_block=64,
    ),
    "w6a6": Case("W6A6", (Round(120, 3e-4, 32, later=True, seed=1),)),
    "w8a8": Case("W8A8", (Round(60, 1e-4, 16, later=True, seed=1),), equalize=Equalized.NONE),
    "w8a8-kv8": Case(
        "W8A8",
        (Round(60, 1e-4, 16, later=True, seed=1),),
        kv_bits=8,
        rotation_block=64,
    ),
    "w8a8-kv8-static": Case(
        "W8A8",
        (Round(120, 2e-4, 32, seed=1),),
        kv_bits=8,
        rotation_block=64,
        static="all",
    ),
}
"""A step is two packed rows of 512 tokens."""


def train(arguments: argparse.Namespace) -> None:
    """Make every checkpoint of the chosen cases, and export each."""
    later = arguments.work / "later.jsonl"
    arguments.work.mkdir(parents=True, exist_ok=True)
    with arguments.rows.open(encoding="utf-8") as rows:
        later.write_text("".join(islice(rows, arguments.later)), encoding="utf-8")
    for name in arguments.cases:
        case = CASES[name]
        place = arguments.work / name
        start = place / "start"
        settings = CheckpointSettings(
            DEMO_MODEL,
            None,
            MergeMethod.EXACT,
            None,
            choose_recipe(
                case.scheme,
                shared_table=case.table_bits is not None,
                embedding_bits=case.table_bits or 8,
                head_bits=case.table_bits or 8,
                static=case.static,
            ),
            arguments.calibration,
            equalize=case.equalize,
            kv_bits=case.kv_bits,
            rotation_block=case.rotation_block,
        )
        merge_rotate_quantize(settings, start)
        export_onnx(start, place / "onnx-0", Target.CPU)
        for number, each in enumerate(case.rounds, start=1):
            data = str(later if each.later else arguments.rows)
            start = run_round(place, number, each, start, data)
            export_onnx(start, place / f"onnx-{number}", Target.CPU)


def run_round(place: Path, number: int, settings: Round, start: Path, data: str) -> Path:
    """Train and pack; returns the checkpoint."""
    adapter, packed = place / f"adapter-{number}", place / f"packed-{number}"
    finetune(
        FinetuneSettings(
            model=DEMO_MODEL,
            data=data,
            method=Method.ROLORA,
            adapter=AdapterConfig(settings.rank, float(settings.rank)),
            targets="all",
            start=start,
            training=TrainSettings(
                max_steps=settings.steps,
                batch_size=2,
                gradient_accumulation=1,
                learning_rate=settings.rate,
                weight_decay=0.0,
                packing=True,
                keep=Keep.LAST,
                precision=Precision.BFLOAT16,
                eval_every=0,
                save_every=50,
                seed=settings.seed,
            ),
        ),
        adapter,
        resume=True,
        progress=say,
    )
    pack(PackSettings(DEMO_MODEL, adapter), packed, say)
    return packed


def measure(arguments: argparse.Namespace) -> None:
    """Measure every export that is there, and write the file after each."""
    found: dict[str, Any] = {}
    if arguments.output.is_file():
        found = json.loads(arguments.output.read_text(encoding="utf-8"))["cases"]
    reference = open_language_model(DEMO_MODEL)
    for name in arguments.cases:
        case = CASES[name]
        for number in range(len(case.rounds) + 1):
            export = arguments.work / name / f"onnx-{number}"
            key = f"{name}-{number}"
            if key in found or not export.is_dir():
                continue
            opened = open_language_model(str(export), threads=arguments.threads)
            windows = cut_windows(opened.tokenizer, read_text(arguments.text), 12, 1024)
            details: Any = read_manifest(export).details
            found[key] = {
                "scheme": case.scheme,
                "rounds": [asdict(each) for each in case.rounds[:number]],
                "parity": details.get("parity"),
                "results": evaluate_model(opened.model, reference.model, windows, frozenset(Task)),
            }
            summary = {"model": DEMO_MODEL, "versions": library_versions(), "cases": found}
            arguments.output.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
            say(f"{key}: {found[key]['results']}")


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("train", "measure"))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--calibration", help="calibration text, none of it from --text")
    parser.add_argument("--rows", type=Path, help="JSONL of texts to train on")
    parser.add_argument("--later", type=int, default=59, help="rows of later rounds: the articles")
    parser.add_argument("--text", help="WikiText-2 raw validation text")
    parser.add_argument("--work", type=Path, default=Path("artifacts/aware"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/quality/aware.json"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"train": train, "measure": measure}[arguments.step](arguments)


if __name__ == "__main__":
    main()
