"""The rotation that an artifact depends on, saved beside it and checked when it is read."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deploy.artifact import JsonValue, Manifest
from deploy.errors import ArtifactError
from rolora.rotation import RotationPlan

ROTATION_NAME = "rotation.safetensors"
_DETAIL = "rotation"


def save_rotation(directory: Path, plan: RotationPlan | None) -> dict[str, JsonValue]:
    """Write what was drawn; return the manifest details that describe it, if any."""
    if plan is None:
        return {}
    save_file(plan.to_tensors(), directory / ROTATION_NAME)
    return {_DETAIL: plan.to_metadata()}


def load_rotation(directory: Path, manifest: Manifest) -> RotationPlan | None:
    """Read the rotation that a manifest describes, or None where it describes none.

    Raises:
        ArtifactError: The file is missing, damaged, or not the rotation of the manifest.
    """
    metadata = manifest.details.get(_DETAIL)
    if metadata is None:
        return None
    path = directory / ROTATION_NAME
    try:
        if not isinstance(metadata, dict):
            raise ValueError(f"expected an object, got {type(metadata).__name__}")
        return RotationPlan.from_saved(metadata, load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(
            f"{path}: not the rotation of this artifact ({error}); make the artifact again"
        ) from error
