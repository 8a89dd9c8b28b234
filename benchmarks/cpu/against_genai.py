"""Speed of our W8A8 and W4A8 exports against ONNX Runtime GenAI's own exports of the same model.

    python benchmarks/cpu/against_genai.py

The peers (int4 and int8) are built by the model builder that comes with onnxruntime-genai. All run
in this process, in the same ONNX Runtime, with the same loop (past and present share buffers),
alternately: one prompt and its continuation on each, then the next round. All compute the logits of
the prompt's last token only (the builder's `prune_lm_head`). Figures are medians over the rounds; a
ratio is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deploy.bench import BenchRun, BenchSettings, measure_run
from deploy.checkpoint_settings import CheckpointSettings, choose_recipe
from deploy.export import Target, export_onnx
from deploy.loading import load_model, save_tokenizer
from deploy.merge_rotate_quantize import merge_rotate_quantize
from deploy.model_location import DEMO_MODEL
from deploy.session import OnnxDecoder
from reslora.merge import MergeMethod


def build_ours(work: Path, scheme: str) -> Path:
    """Quantize and export the demo model; returns the export."""
    checkpoint, export = work / scheme / "checkpoint", work / scheme / "onnx"
    recipe = choose_recipe(scheme, rotation=None)
    settings = CheckpointSettings(DEMO_MODEL, None, MergeMethod.EXACT, None, recipe, None)
    merge_rotate_quantize(settings, checkpoint)
    export_onnx(checkpoint, export, Target.CPU)
    return export


def build_peer(work: Path, precision: str) -> Path:
    """Export the demo model with onnxruntime-genai's builder; returns the directory."""
    source, export = work / "float32", work / f"genai-{precision}"
    if not source.is_dir():
        loaded = load_model(DEMO_MODEL)
        loaded.model.save_pretrained(source)
        save_tokenizer(loaded, source)
    if not export.is_dir():
        command = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-i",
            source,
            "-o",
            export,
        ]
        command += ["-p", precision, "-e", "cpu", "-c", work / "cache"]
        command += ["--extra_options", "prune_lm_head=true"]
        log = work / f"genai-{precision}.log"
        with log.open("w", encoding="utf-8") as stream:
            parts = [str(part) for part in command]
            subprocess.run(parts, check=True, stdout=stream, stderr=subprocess.STDOUT)
    return export


def measure(directories: dict[str, Path], settings: BenchSettings) -> dict[str, list[BenchRun]]:
    """Run every model once a round, after one round of warm-up that is not counted."""
    decoders = {
        name: OnnxDecoder(directory, threads=settings.threads)
        for name, directory in directories.items()
    }
    runs: dict[str, list[BenchRun]] = {name: [] for name in decoders}
    for number in range(settings.runs + 1):
        for name, decoder in decoders.items():
            run = measure_run(decoder, settings)
            if number:
                runs[name].append(run)
    return runs


def summarize(
    runs: dict[str, list[BenchRun]], settings: BenchSettings, ours: list[str]
) -> dict[str, Any]:
    """Return medians, spreads and the ratios of each of ours to each model."""
    rates = {
        name: {
            "prefill": [settings.prompt_tokens / run.prefill_s for run in series],
            "decode": [settings.new_tokens / run.decode_s for run in series],
        }
        for name, series in runs.items()
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
        for name, phases in rates.items()
    }


def graph_bytes(directory: Path) -> int:
    """Return the size of the graphs and their weights."""
    return sum(path.stat().st_size for path in directory.glob("*.onnx*"))


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
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = BenchSettings(
        prompt_tokens=512, new_tokens=128, runs=arguments.rounds, threads=arguments.threads
    )
    schemes = arguments.schemes.split(",")
    ours = [scheme.lower() for scheme in schemes]
    directories = {scheme.lower(): build_ours(arguments.work, scheme) for scheme in schemes}
    for precision in ("int4", "int8"):
        directories[f"genai_{precision}"] = build_peer(arguments.work, precision)
    result = {
        "machine": machine(),
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "threads": settings.threads,
        "rounds": settings.runs,
        "file_bytes": {name: graph_bytes(path) for name, path in directories.items()},
        "models": summarize(measure(directories, settings), settings, ours),
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result["models"], indent=2) + "\n")


if __name__ == "__main__":
    main()
