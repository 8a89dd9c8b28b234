"""The model card (README.md) of a compressed-tensors export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.artifact import Manifest
from rolora.scheme import FLOAT_BITS

CARD_NAME = "README.md"

TRANSFORM_WARNING = (
    "The input of every down projection must be rotated at run time, as `transform_config` in "
    "config.json says. A program that ignores `transform_config` loads this model without an error "
    "and answers nonsense. transformers 5.23 ignores it."
)

_CARD = """\
---
library_name: transformers
tags:
- compressed-tensors
- rolora
---

# {scheme} checkpoint in compressed-tensors format

Written by rolora {version} from a checkpoint with the digest `{digest}`.

{warning}| group | format | linears |
|---|---|---|
{groups}

Embedding, norms and biases are float32; the embedding {embedding}. {rotation}

## Load it

With `pip install torch transformers compressed-tensors accelerate`, nothing of rolora:

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
{transform}```

transformers unpacks the weights and rounds the inputs in float: the numbers of integer arithmetic,
not its speed. Scales that are taken at run time are the reader's own choice: compressed-tensors
divides the absolute maximum by half the range (127.5 for 8 bits, 7.5 for 4), vLLM's 8-bit kernels,
and rolora, by the greatest integer (127, 7).
"""

_TRANSFORM_CODE = """
# Rotate the inputs of the down projections. Without this the model answers nonsense.
import json
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors import safe_open

config = json.load(open(f"{DIRECTORY}/config.json"))["quantization_config"]
apply_transform_config(model, TransformConfig.model_validate(config["transform_config"]))
with safe_open(f"{DIRECTORY}/model.safetensors", framework="pt") as tensors:
    (key,) = [key for key in tensors.keys() if key.endswith(".R4_input.weight")]
    model.get_parameter(key).data.copy_(tensors.get_tensor(key))  # one matrix for all layers
"""


def model_card(checkpoint: Manifest, groups: Mapping[str, str], online_rotation: bool) -> str:
    """Return the text of the card.

    Args:
        checkpoint: Manifest of what was exported.
        groups: Name of each group to its format and linears.
        online_rotation: Whether readers must apply `transform_config`.
    """
    details: Mapping[str, Any] = checkpoint.details
    rotation = details.get("rotation")
    names = ", ".join(sorted(rotation["rotations"])) if rotation else ""
    recipe: Any = checkpoint.config.get("recipe") or {}
    bits = recipe.get("embedding_bits")
    rows = []
    for name, words in groups.items():
        form, _, linears = words.partition(": ")
        rows.append(f"| {name} | {form} | `{linears}` |")
    return _CARD.format(
        scheme=details.get("scheme"),
        version=checkpoint.versions.get("rolora", ""),
        digest=checkpoint.digest,
        warning=f"> **Warning.** {TRANSFORM_WARNING}\n\n" if online_rotation else "",
        groups="\n".join(rows),
        embedding=f"was rounded to {bits} bits and is written as it was rounded"
        if bits not in (None, FLOAT_BITS)
        else "was not rounded",
        rotation=f"The weights are rotated ({names})."
        + ("" if online_rotation else " That is all in the weights: a reader does nothing for it.")
        if names
        else "The weights are not rotated.",
        transform=_TRANSFORM_CODE if online_rotation else "",
    )
