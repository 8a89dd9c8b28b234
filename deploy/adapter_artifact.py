"""A trained adapter as an artifact: PEFT files, the basis it was trained in, its model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deploy.artifact import ArtifactKind, Manifest, read_manifest, verify_files
from deploy.errors import ArtifactError, StageOrderError
from deploy.rotation_file import load_rotation
from reslora.adapter import Adapter, load_adapter
from rolora.rotation import RotationPlan


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter that was read back and checked."""

    directory: Path
    manifest: Manifest
    adapter: Adapter
    rotation: RotationPlan | None
    """The basis it was trained in; None is the model's own."""

    @property
    def manifest_digest(self) -> str:
        """Digest that names this adapter as a parent."""
        return self.manifest.digest

    def require_base(self, digest: str, name: str) -> None:
        """Refuse a model that the adapter was not trained on.

        Raises:
            ArtifactError: The digests differ.
        """
        expected = self.manifest.parents.get("model")
        if expected != digest:
            trained_on = self.manifest.config.get("model")
            raise ArtifactError(
                f"{self.directory}: was trained on {trained_on} (digest {str(expected)[:12]}), "
                f"but the model given is "
                f"{name} (digest {digest[:12]}); give the model it was trained on"
            )


def open_adapter(directory: Path) -> StoredAdapter:
    """Read an adapter that `rolora finetune` wrote, to be merged or attached as float weights.

    Raises:
        ConfigError: No such directory.
        StageOrderError: It is no adapter of ours, or was trained in a quantized checkpoint.
        ArtifactError: A file is missing or damaged.
    """
    stored = _open(directory)
    if "start" in stored.manifest.parents:
        raise StageOrderError(
            f"{directory}: was trained in the rounding of a quantized checkpoint and is no change "
            "of the float model; finish it with rolora pack"
        )
    return stored


def open_trained_adapter(directory: Path) -> StoredAdapter:
    """Read an adapter that was trained in a quantized checkpoint.

    Raises:
        ConfigError: No such directory.
        StageOrderError: It is no adapter of ours, or was trained on float weights.
        ArtifactError: A file is missing or damaged.
    """
    stored = _open(directory)
    if "start" not in stored.manifest.parents:
        raise StageOrderError(
            f"{directory}: was trained on float weights; merge and quantize it with rolora "
            "merge-rotate-quantize (pack is for adapters of finetune --start)"
        )
    return stored


def _open(directory: Path) -> StoredAdapter:
    manifest = read_manifest(directory, ArtifactKind.ADAPTER)
    verify_files(directory)
    try:
        adapter = load_adapter(directory)
    except ValueError as error:
        raise ArtifactError(str(error)) from error
    return StoredAdapter(directory, manifest, adapter, load_rotation(directory, manifest))
