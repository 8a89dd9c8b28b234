"""Perplexity of a quantized KV cache, against the same checkpoint with a float one, on WikiText-2.

    python benchmarks/quality/kv_cache.py --text wiki.valid.raw.txt --calibration wiki.train.txt.gz
    --work artifacts/kv

Checkpoints in torch, evaluated as `rolora evaluate` does: raw validation text, 12 windows of 1024
tokens. One case has four bits without R3, as a control.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deploy.artifact import library_versions
from deploy.checkpoint_settings import CheckpointSettings, choose_recipe, parse_rotation
from deploy.evaluation import EvaluationSettings, run_evaluation
from deploy.merge_rotate_quantize import merge_rotate_quantize
from deploy.model_location import DEMO_MODEL
from reslora.merge import MergeMethod
from rolora.equalization import Equalized
from rolora.rotation import RotationKind


@dataclass(frozen=True)
class Case:
    """One checkpoint."""

    scheme: str
    kv_bits: int
    rotate: str | None = None
    equalize: Equalized = Equalized.NONE

    @property
    def name(self) -> str:
        """Name in the JSON file."""
        rotation = "" if self.rotate is None else f"-{self.rotate.replace(',', '')}"
        scaled = "" if self.equalize is Equalized.NONE else "-scaled"
        return f"{self.scheme.lower()}-kv{self.kv_bits}{rotation}{scaled}"


CASES = (
    Case("FP32", 16),
    Case("FP32", 8),
    Case("FP32", 8, rotate="r1,r2,r3,r4"),
    Case("FP32", 4),
    Case("FP32", 4, rotate="r1,r2,r4"),
    Case("FP32", 4, equalize=Equalized.ALL),
    Case("W8A8", 16),
    Case("W8A8", 8),
    Case("W8A8", 4),
)


def run_case(case: Case, arguments: argparse.Namespace) -> float:
    """Make the checkpoint and return its perplexity."""
    rotation = parse_rotation(case.rotate, RotationKind.HADAMARD, 0, case.kv_bits)
    settings = CheckpointSettings(
        DEMO_MODEL,
        None,
        MergeMethod.EXACT,
        rotation,
        choose_recipe(case.scheme, weights="rtn"),
        arguments.calibration,
        kv_bits=case.kv_bits,
        equalize=case.equalize,
    )
    checkpoint = arguments.work / case.name
    merge_rotate_quantize(settings, checkpoint)
    summary = run_evaluation(EvaluationSettings(str(checkpoint), data=arguments.text))
    return float(summary["results"]["ppl"])


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
        "--work", type=Path, default=Path("artifacts/kv"), help="keeps the checkpoints"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/quality/kv_cache.json"))
    parser.add_argument("--cases", default="", help="names, comma-separated; default all")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = [
        case for case in CASES if not arguments.cases or case.name in arguments.cases.split(",")
    ]
    found: dict[str, Any] = {}
    if arguments.output.is_file():
        found = json.loads(arguments.output.read_text(encoding="utf-8"))["cases"]
    for case in chosen:
        ppl = run_case(case, arguments)
        found[case.name] = {"case": asdict(case), "ppl": ppl}
        base = found.get(Case(case.scheme, 16).name)
        if base is not None:
            found[case.name]["ratio_to_float_cache"] = ppl / base["ppl"]
        summary = {"model": DEMO_MODEL, "versions": library_versions(), "cases": found}
        arguments.output.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        sys.stdout.write(f"{case.name}: {found[case.name]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
