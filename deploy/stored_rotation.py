"""A rotation that another artifact holds, to be used again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deploy.artifact import ArtifactKind, read_manifest, verify_files
from deploy.errors import ConfigError
from deploy.rotation_file import load_rotation
from rolora.decoder import DecoderNames
from rolora.rotation import RotationPlan
from rolora.rotation_table import applications


@dataclass(frozen=True)
class StoredRotation:
    """A rotation that was read back and checked."""

    directory: Path
    digest: str
    """Of the artifact that holds it, which is a parent of what is made with it."""
    plan: RotationPlan

    def require_sizes(self, names: DecoderNames) -> None:
        """Refuse a model of other sizes.

        Raises:
            ConfigError: With the first size that differs.
        """
        try:
            applications(self.plan, names)
        except ValueError as error:
            raise ConfigError(f"--rotation {self.directory}: {error}") from error


def open_rotation(directory: Path) -> StoredRotation:
    """Read the rotation of what `rolora learn-rotation`, finetune or merge-rotate-quantize wrote.

    Raises:
        ConfigError: No such directory, or the artifact holds no rotation.
        StageOrderError: It is no artifact that could hold one.
        ArtifactError: A file is missing or damaged.
    """
    manifest = read_manifest(
        directory, ArtifactKind.ROTATION, ArtifactKind.ADAPTER, ArtifactKind.CHECKPOINT
    )
    verify_files(directory)
    plan = load_rotation(directory, manifest)
    if plan is None:
        raise ConfigError(
            f"--rotation {directory}: expected an artifact with a rotation, got an unrotated "
            f"{manifest.kind}; make one with rolora learn-rotation"
        )
    return StoredRotation(directory, manifest.digest, plan)
