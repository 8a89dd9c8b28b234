"""Open a compressed-tensors export as its readers do: through transformers and that library alone.

transformers decompresses the weights on the first forward pass and rounds the inputs of the linears
in float. It ignores `transform_config`, the online rotations; the library itself applies them.
"""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from deploy.errors import ArtifactError
from deploy.weight_files import CONFIG_NAME, SINGLE_NAME, name_some

TRANSFORM_NAME = "R4"
"""Name of the online rotation in `transform_config`, and of its weight."""
TRANSFORM_WEIGHT = f".{TRANSFORM_NAME}_input.weight"


def load_compressed(directory: Path) -> PreTrainedModel:
    """Load an export in float32, online rotations applied.

    Raises:
        ArtifactError: A tensor is missing, or is there without a place in the model.
    """
    # The warnings of transformers are checked below, and no setting turns the progress bars off.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, missing, unexpected = _load_quietly(directory)
    finally:
        logging.set_verbosity(verbosity)
    if missing or unexpected:
        raise ArtifactError(
            f"{directory / SINGLE_NAME}: missing for transformers: {name_some(missing) or 'none'}; "
            f"without a place in the model: {name_some(unexpected) or 'none'}; export again"
        )
    return model


def _load_quietly(directory: Path) -> tuple[PreTrainedModel, set[str], set[str]]:
    """Return the model, and which tensors are missing or have no place in it."""
    with redirect_stderr(io.StringIO()):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        model: PreTrainedModel = loaded[0]
        report: dict[str, set[str]] = loaded[1]
        transforms = _apply_transforms(model, directory)
        model.eval()
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64))  # unpacks the weights
    return model, set(report["missing_keys"]), set(report["unexpected_keys"]) - transforms


def _apply_transforms(model: PreTrainedModel, directory: Path) -> set[str]:
    """Rotate online as `transform_config` says; return the stored tensors that this took."""
    config: dict[str, Any] = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    transform = config["quantization_config"].get("transform_config")
    if not transform:
        return set()
    apply_transform_config(model, TransformConfig.model_validate(transform))
    with safe_open(directory / SINGLE_NAME, framework="pt") as tensors:
        stored = {key for key in tensors.keys() if key.endswith(TRANSFORM_WEIGHT)}  # noqa: SIM118
        if len(stored) != 1:
            raise ArtifactError(
                f"{directory / SINGLE_NAME}: expected one tensor *{TRANSFORM_WEIGHT}, which all "
                f"layers share, found {len(stored)}; export again"
            )
        for key in stored:
            # The library made one parameter for all layers, with random signs.
            model.get_parameter(key).data.copy_(tensors.get_tensor(key))
    return stored
