"""Perplexity of exported models in ONNX Runtime, against the float32 model, on WikiText-2.

    python benchmarks/quality/wikitext.py --text wiki.valid.raw.txt --calibration wiki.train.txt.gz
    --work artifacts/quality

Raw validation text, 12 windows of 1024 tokens, evenly spaced. The reference is the float32 model in
torch. Calibration never sees the validation text.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deploy.artifact import library_versions
from deploy.checkpoint_settings import CheckpointSettings, choose_recipe, parse_rotation
from deploy.export import Target, export_onnx
from deploy.language_model import open_language_model
from deploy.merge_rotate_quantize import merge_rotate_quantize
from deploy.model_location import DEMO_MODEL
from deploy.text_data import read_text
from deploy.text_quality import Task, cut_windows, evaluate_model
from reslora.merge import MergeMethod
from rolora.equalization import Equalized
from rolora.mixed_precision import Budget
from rolora.overrides import Override
from rolora.rotation import RotationKind


@dataclass(frozen=True)
class Case:
    """One way to quantize."""

    name: str
    scheme: str
    rotate: str = "r1,r2,r4"
    weights: str = "rtn"
    group_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Of `choose_recipe`, beyond the above."""
    overrides: tuple[str, ...] = ()
    budget: str | None = None
    equalize: Equalized | None = None
    export: bool = True
    """False: the checkpoint is measured in torch."""


CASES = (
    Case("fp32-rotated", "FP32"),
    Case("w8a8-gptq", "W8A8", weights="gptq"),
    Case("w4a8-gptq", "W4A8", weights="gptq"),
    Case("w4a4-gptq", "W4A4", weights="gptq"),
    Case("w8a8-plain-gptq", "W8A8", rotate="none", weights="gptq"),
    Case("w4a4-plain-gptq", "W4A4", rotate="none", weights="gptq"),
    Case("w8a8-rtn", "W8A8", equalize=Equalized.NONE),
    Case("w4a8-rtn", "W4A8"),
    Case("w4a8-rtn-g32", "W4A8", group_size=32),
    Case("w4a8-gptq-g32", "W4A8", weights="gptq", group_size=32),
    Case("w4a4-rtn", "W4A4"),
    Case("w6a6-gptq", "W6A6", weights="gptq"),
    Case("w4a4-clip", "W4A4", weights="gptq", options={"activation_clip": "auto"}),
    Case("w4a4-asymmetric", "W4A4", weights="gptq", options={"asymmetric": True}),
    Case("w4a4-down8", "W4A4", weights="gptq", overrides=("down=A8",)),
    Case("w4a4-o-down8", "W4A4", weights="gptq", overrides=("o,down=A8",)),
    Case("w4a4-mixed", "W4A4", weights="gptq", budget="A5.5"),
    Case(
        "w4a4-chosen",
        "W4A4",
        weights="gptq",
        options={"activation_clip": "auto", "static": "auto"},
    ),
    Case(
        "w4a4-groups",
        "W4A4",
        weights="gptq",
        options={"activation_group_size": 64},
        export=False,
    ),
    Case("w4a16-gptq-g32", "W4A16", weights="gptq", group_size=32),
    Case("w6a6-dynamic", "W6A6", weights="gptq", options={"static": False}),
    Case(
        "w6a6-chosen",
        "W6A6",
        weights="gptq",
        options={"activation_clip": "auto", "static": "auto"},
    ),
    Case("w4a4-unscaled", "W4A4", weights="gptq", equalize=Equalized.NONE),
    Case("w4a4-rtn-unscaled", "W4A4", equalize=Equalized.NONE),
    Case("w6a6-unscaled", "W6A6", weights="gptq", equalize=Equalized.NONE),
    Case("w8a8-unscaled", "W8A8", weights="gptq", equalize=Equalized.NONE),
    Case("w4a8-unscaled", "W4A8", weights="gptq", equalize=Equalized.NONE),
    Case("w8a8-scaled", "W8A8", weights="gptq", equalize=Equalized.ALL),
    Case("w4a8-scaled", "W4A8", weights="gptq", equalize=Equalized.ALL),
    Case(
        "w4a8-tables-scaled",
        "W4A8",
        weights="gptq",
        options={"embedding_bits": 4, "head_bits": 4},
        equalize=Equalized.ALL,
    ),
    Case("w8a8-dynamic", "W8A8", weights="gptq", options={"static": False}),
    Case("w8a8-head16", "W8A8", weights="gptq", overrides=("head=A16",)),
)


def run_case(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantize, export, and measure one case."""
    checkpoint, export = (
        arguments.work / case.name / "checkpoint",
        arguments.work / case.name / "onnx",
    )
    rotation = parse_rotation(case.rotate, RotationKind.HADAMARD, arguments.seed)
    recipe = choose_recipe(
        case.scheme,
        weights=case.weights,
        group_size=case.group_size,
        **case.options,
    )
    settings = CheckpointSettings(
        DEMO_MODEL,
        None,
        MergeMethod.EXACT,
        rotation,
        recipe,
        arguments.calibration,
        calibration_windows=arguments.windows,
        overrides=tuple(map(Override.parse, case.overrides)),
        budget=None if case.budget is None else Budget.parse(case.budget),
        equalize=case.equalize,
    )
    started = time.perf_counter()
    merge_rotate_quantize(settings, checkpoint)
    seconds = time.perf_counter() - started
    exported: dict[str, Any] = {"file_bytes": None, "parity": None}
    if case.export:
        exported = export_onnx(checkpoint, export, Target.CPU).to_dict()
    reference = open_language_model(DEMO_MODEL)
    opened = open_language_model(
        str(export if case.export else checkpoint), threads=arguments.threads
    )
    windows = cut_windows(opened.tokenizer, read_text(arguments.text), 12, 1024)
    results = evaluate_model(opened.model, reference.model, windows, frozenset(Task))
    return {
        "case": case.__dict__,
        "quantize_s": seconds,
        "file_bytes": exported["file_bytes"],
        "parity": exported["parity"],
        "results": results,
    }


def main() -> None:
    """Run the chosen cases and write the JSON after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, help="WikiText-2 raw validation text")
    parser.add_argument(
        "--calibration", required=True, help="calibration text, none of it from --text"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("artifacts/quality"), help="keeps the models"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/quality/wikitext.json"))
    parser.add_argument("--cases", default="", help="names, comma-separated; default all")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 512 tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the rotation")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = [
        case for case in CASES if not arguments.cases or case.name in arguments.cases.split(",")
    ]
    found = {}
    if arguments.output.is_file():
        found = json.loads(arguments.output.read_text(encoding="utf-8"))["cases"]
    for case in chosen:
        found[case.name] = run_case(case, arguments)
        summary = {"model": DEMO_MODEL, "versions": library_versions(), "cases": found}
        arguments.output.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        sys.stdout.write(f"{case.name}: {found[case.name]['results']}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
