"""What `rolora inspect` shows of an artifact: its manifest, sizes and operators."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.artifact import Manifest, read_manifest, verify_files


@dataclass(frozen=True)
class Description:
    """An artifact at a glance."""

    directory: Path
    manifest: Manifest

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(record.bytes for record in self.manifest.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "directory": str(self.directory),
            "digest": self.manifest.digest,
            "total_bytes": self.total_bytes,
            "manifest": asdict(self.manifest),
        }

    def summary(self) -> list[tuple[str, str]]:
        """Return the facts a person looks for first, as (name, value) rows."""
        manifest = self.manifest
        rows = [
            ("kind", str(manifest.kind)),
            ("digest", manifest.digest),
            ("size", f"{self.total_bytes / 1e6:.1f} MB"),
        ]
        rows += [(f"parent {role}", digest) for role, digest in sorted(manifest.parents.items())]
        rows += [(f"config {key}", str(value)) for key, value in sorted(manifest.config.items())]
        details: dict[str, Any] = dict(manifest.details)
        if scheme := details.get("scheme"):
            rows.append(("scheme", str(scheme)))
        if rotation := details.get("rotation"):
            names = ", ".join(sorted(rotation["rotations"]))
            rows.append(("rotation", f"{names} ({rotation['kind']}, seed {rotation['seed']})"))
        if linears := details.get("linears"):
            rows.append(("quantized linears", str(len(linears))))
        if merge := details.get("merge"):
            rows.append(("merge", str(merge["method"])))
        if training := details.get("training"):
            rows.append(("steps", str(training["steps"])))
            rows.append(("trainable parameters", f"{training['trainable_parameters']:,}"))
        for check, value in sorted(manifest.checks.items()):
            rows.append((f"check {check}", str(value)))
        if operators := details.get("operators"):
            rows.append(
                ("operators", ", ".join(f"{count} {name}" for name, count in operators.items()))
            )
        rows += [
            (f"file {name}", f"{record.bytes:,} bytes")
            for name, record in sorted(manifest.files.items())
        ]
        rows += [
            (f"version {name}", version) for name, version in sorted(manifest.versions.items())
        ]
        return rows


def describe_artifact(directory: Path, *, verify: bool) -> Description:
    """Read an artifact's manifest.

    Args:
        directory: An adapter, checkpoint, export or merged model.
        verify: Compare every file with its sha256 as well.

    Raises:
        ConfigError: No such directory.
        StageOrderError: The directory is no artifact.
        ArtifactError: The manifest, or a verified file, is damaged.
    """
    return Description(directory, verify_files(directory) if verify else read_manifest(directory))
