"""Greedy generation: stock onnxruntime-genai on an export, against torch on the checkpoint.

    python benchmarks/quality/greedy.py --checkpoint DIR --export DIR

64 tokens on 5 prompts, both sides on the same integers. Where the two first choose different
tokens, the torch reference tells how close the choice was: the gap between its logits of the two,
in units of the spread (root mean square, centred) of its logits there. Parity bounds the root mean
square error of one logit in these units; a difference of two logits then errs by sqrt(2) as much. A
gap below that is within what float32 rounding does to this model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deploy.artifact import read_manifest
from deploy.checkpoint import Checkpoint
from deploy.run import Sampling, TextGenerator

PROMPTS = (
    "What is the capital of France?",
    "Explain why the sky is blue.",
    "Write a short poem about the sea.",
    "List three uses of copper.",
    "A train leaves at nine and arrives at noon. How long is the journey?",
)
TOKENS = 64


def torch_tokens(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """Return the greedy continuation of a prompt, over the cache, without stopping early."""
    generate: Any = model.generate
    output = generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=count, repetition_penalty=1.0
    )
    return [int(token) for token in output[0, len(ids) :]]


def relative_gap(model: PreTrainedModel, ids: list[int], chosen: int, other: int) -> float:
    """Return how much torch prefers its token over the other, relative to the logits' spread."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
    return float(
        (logits[chosen] - logits[other]).abs() / (logits - logits.mean()).square().mean().sqrt()
    )


def compare(model: PreTrainedModel, generator: TextGenerator, prompt: str) -> dict[str, Any]:
    """Generate with both and find the first difference."""
    ids = generator.encode(generator.chat_prompt([{"role": "user", "content": prompt}]))
    found = list(generator.generate(ids, Sampling(max_new_tokens=TOKENS)))
    expected = torch_tokens(model, ids, TOKENS)[: max(1, len(found))]
    step = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    result: dict[str, Any] = {"prompt": prompt, "tokens": len(found), "first_difference": step}
    if step is not None:
        result["relative_gap"] = relative_gap(
            model, ids + expected[:step], expected[step], found[step]
        )
    return result


def main() -> None:
    """Compare all prompts and print the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--export", type=Path, required=True)
    arguments = parser.parse_args()
    generator = TextGenerator(arguments.export)
    with Checkpoint(arguments.checkpoint) as checkpoint:
        model = checkpoint.load_model()
    parity: Any = read_manifest(arguments.export).checks["parity"]
    bound = math.sqrt(2.0) * parity["bound"]
    prompts = [compare(model, generator, prompt) for prompt in PROMPTS]
    explained = all(result.get("relative_gap", 0.0) < bound for result in prompts)
    result = {"bound": bound, "all_explained": explained, "prompts": prompts}
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
