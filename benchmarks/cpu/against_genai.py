"""Speed of our W8A8 and W4A8 exports against ONNX Runtime GenAI's own exports of the same model.

    python benchmarks/cpu/against_genai.py [--peers genai-int4,llama.cpp:FILE --llama-cpp PYTHON]

The peers (int4 and int8) are built by the model builder that comes with onnxruntime-genai. Each
model has a process of its own, all in the same ONNX Runtime and with the same loop (past and
present share buffers), alternately: one prompt and its continuation on each, then the next round.
All compute the logits of the prompt's last token only (the builder's `prune_lm_head`). Figures are
medians over the rounds; a ratio is the median of the ratios within a round. `rolora bench
--against` measures one export in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deploy.bench_against import Comparison, measure_in_turn
from deploy.bench_peers import PeerSettings, Runtime, Subject, parse_peers, prepare_peers
from deploy.bench_report import BenchSettings
from deploy.checkpoint_settings import CheckpointSettings, choose_recipe
from deploy.export import Target, export_onnx
from deploy.merge_rotate_quantize import merge_rotate_quantize
from deploy.model_location import DEMO_MODEL
from reslora.merge import MergeMethod


def build_ours(work: Path, scheme: str) -> Path:
    """Quantize and export the demo model; returns the export."""
    checkpoint, export = work / scheme / "checkpoint", work / scheme / "onnx"
    recipe = choose_recipe(scheme)
    settings = CheckpointSettings(DEMO_MODEL, None, MergeMethod.EXACT, None, recipe, None)
    merge_rotate_quantize(settings, checkpoint)
    export_onnx(checkpoint, export, Target.CPU)
    return export


def summarize(found: Comparison, ours: list[str]) -> dict[str, Any]:
    """Return medians, spreads and the ratios of each of ours to each model."""
    rates = {
        name: {
            figure.phase: [figure.of(run[figure.phase]) for run in report.runs]
            for figure in found.settings.figures
            if figure.amount is not None
        }
        for name, report in found.reports.items()
    }
    return {
        name: {
            phase: {
                "median_tokens_per_s": statistics.median(values),
                "least_tokens_per_s": min(values),
                "greatest_tokens_per_s": max(values),
                **{
                    f"{mine}_over_this": statistics.median(
                        a / b for a, b in zip(rates[mine][phase], values, strict=True)
                    )
                    for mine in ours
                },
            }
            for phase, values in phases.items()
        }
        | {
            "load_s": found.reports[name].load_s,
            "peak_rss_bytes": found.reports[name].peak_rss_bytes,
        }
        for name, phases in rates.items()
    }


def machine() -> dict[str, Any]:
    """Describe the machine and the libraries."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        cpu = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu
        )
    libraries = ("onnxruntime", "onnxruntime-genai", "torch", "transformers")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in libraries},
    }


def main() -> None:
    """Build, measure, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("artifacts/bench"), help="keeps the models"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/cpu/against_genai.json"))
    parser.add_argument("--schemes", default="W8A8,W4A8")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--peers", default="genai-int4,genai-int8", help="see rolora bench")
    parser.add_argument("--llama-cpp", help="a Python that has llama-cpp-python")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = BenchSettings(512, 128, arguments.rounds, arguments.threads, arguments.batch)
    schemes = arguments.schemes.split(",")
    ours = {scheme.lower(): build_ours(arguments.work, scheme) for scheme in schemes}
    subjects = [Subject(name, Runtime.ONNX, path) for name, path in ours.items()]
    peers = PeerSettings(parse_peers(arguments.peers), DEMO_MODEL, arguments.work / "peers")
    subjects += prepare_peers(subjects[0].path, peers)
    found = measure_in_turn(subjects, settings, arguments.llama_cpp)
    result = {
        "machine": machine(),
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "threads": settings.threads,
        "batch": settings.batch,
        "rounds": settings.runs,
        "file_bytes": {subject.name: subject.model_bytes for subject in subjects},
        "models": summarize(found, list(ours)),
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result["models"], indent=2) + "\n")


if __name__ == "__main__":
    main()
