"""What a shortcut costs while training: time of a step and peak memory, against PEFT's plain LoRA.

    python benchmarks/reslora/cost.py --targets q,v

Time: all adapters sit on copies of the demo model in one process and take training steps in turn,
forward, backward and AdamW, on the same tokens; the figure is the median over the rounds of the
ratio to the LoRA step of the same round. Memory: each adapter trains in a process of its own, with
one copy of the model; the figure is the peak resident memory of the whole process. The baseline is
`peft.get_peft_model` itself, without a line of ours.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from deploy.architecture import decoder_names, resolve_targets
from deploy.artifact import library_versions
from deploy.loading import load_model
from deploy.memory import peak_memory_bytes
from reslora.attach import attach_adapters
from reslora.config import AdapterConfig, Structure

BASELINE = "peft-lora"
SHORTCUTS: dict[str, tuple[Structure, int]] = {
    "input": (Structure.INPUT, 1),
    "block-depth-4": (Structure.BLOCK, 4),
    "middle-depth-4": (Structure.MIDDLE, 4),
    "middle-all": (Structure.MIDDLE, -1),
}
VARIANTS = (BASELINE, *SHORTCUTS)


class TrainingStep:
    """One adapter on one model, and how to take a step."""

    def __init__(self, model: nn.Module, variant: str, targets: list[str], rank: int) -> None:
        """Attach the adapter."""
        if variant == BASELINE:
            peft_config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
            self.model: Any = get_peft_model(model, peft_config)
        else:
            structure, depth = SHORTCUTS[variant]
            config = AdapterConfig(rank, float(rank), structure=structure, depth=depth)
            self.model = attach_adapters(model, config, targets)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def take(self, tokens: Tensor) -> float:
        """Learn tokens [rows, length]; returns seconds."""
        start = time.perf_counter()
        self.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def draw_tokens(vocabulary: int, arguments: argparse.Namespace) -> Tensor:
    """Draw the batch that everybody learns."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (arguments.rows, arguments.tokens), generator=generator)


def time_steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return median step seconds and ratios to the baseline."""
    loaded = load_model(arguments.model)
    targets = resolve_targets(decoder_names(loaded.model.config), arguments.targets)
    tokens = draw_tokens(loaded.model.config.vocab_size, arguments)
    steps = {
        variant: TrainingStep(copy.deepcopy(loaded.model), variant, targets, arguments.rank)
        for variant in VARIANTS
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for round_number in range(arguments.rounds + 1):
        # each round begins with another adapter, so that none always follows the same one
        shift = round_number % len(VARIANTS)
        for variant in VARIANTS[shift:] + VARIANTS[:shift]:
            taken = steps[variant].take(tokens)
            if round_number > 0:
                seconds[variant].append(taken)
    found: dict[str, Any] = {}
    for variant, times in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(times, seconds[BASELINE], strict=True)]
        found[variant] = {
            "step_s": statistics.median(times),
            "step_ratio": statistics.median(ratios),
            "step_ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        }
    return found


def peak_memory(variant: str, arguments: argparse.Namespace) -> int:
    """Return the peak resident bytes of a process that trains one adapter for some steps."""
    command = [sys.executable, __file__, "--model", arguments.model, "--targets", arguments.targets]
    command += ["--rank", str(arguments.rank), "--rows", str(arguments.rows)]
    command += ["--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
    done = subprocess.run([*command, "--only", variant], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def train_alone(variant: str, arguments: argparse.Namespace) -> None:
    """Take three steps and print this process's peak memory."""
    loaded = load_model(arguments.model)
    targets = resolve_targets(decoder_names(loaded.model.config), arguments.targets)
    tokens = draw_tokens(loaded.model.config.vocab_size, arguments)
    step = TrainingStep(loaded.model, variant, targets, arguments.rank)
    for _ in range(3):
        step.take(tokens)
    sys.stdout.write(f"{peak_memory_bytes()}\n")


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--targets", default="q,v")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/reslora/cost.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        train_alone(arguments.only, arguments)
        return
    # first, while this process is small: on Linux a child begins with its parent's peak
    peaks = {variant: peak_memory(variant, arguments) for variant in VARIANTS}
    found = time_steps(arguments)
    for variant, figures in found.items():
        figures["peak_rss_bytes"] = peaks[variant]
        figures["memory_ratio"] = peaks[variant] / peaks[BASELINE]
        sys.stdout.write(f"{variant}: {json.dumps(figures)}\n")
    old = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    settings = {
        name: value for name, value in vars(arguments).items() if name not in ("output", "only")
    }
    old[arguments.targets] = {
        "adapters": found,
        "settings": settings,
        "cores": os.cpu_count(),
        "versions": library_versions(),
    }
    arguments.output.write_text(json.dumps(old, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
