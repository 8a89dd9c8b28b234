"""What `rolora inspect` shows of an artifact: its manifest, sizes and operators.

The stages show the rows of merging and training with the same words when they end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.artifact import Manifest, read_manifest, verify_files
from deploy.errors import ArtifactError


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
            drawn = f"({rotation['kind']}, seed {rotation['seed']})"
            rows.append(("rotation", f"{names} {drawn}"))
            if scaled := rotation.get("equalized"):
                rows.append(("channel scales", str(scaled)))
        if learning := details.get("learning"):
            rows += learning_rows(learning)
        if linears := details.get("linears"):
            rows.append(("quantized linears", str(len(linears))))
        if details.get("shared_table"):
            rows.append(("embedding and head", "one table"))
        rows += merge_rows(details.get("merge") or {})
        if rank := details.get("rank"):
            rows.append(("rank", str(rank)))
        if lower := details.get("recompression"):
            rows.append(("error of the lower rank", f"{lower['relative_error']:.3g}"))
        if training := details.get("training"):
            rows += training_rows(training)
        if labels := details.get("labels"):
            rows.append(("labels", ", ".join(labels)))
        for name, kept in (details.get("adapters") or {}).items():
            rows.append(
                (
                    f"adapter {name}",
                    f"rank {kept['rank']}, {kept['linears']} linears, trained "
                    f"{kept['trained']}, digest {kept['digest']}",
                )
            )
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
    manifest = verify_files(directory) if verify else read_manifest(directory)
    description = Description(directory, manifest)
    try:
        description.summary()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{directory}: its manifest's details are not as rolora writes them ({error!r}); make "
            f"the artifact again"
        ) from error
    return description


def merge_rows(merge: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return how an adapter was merged and how far that is from the unmerged model.

    Args:
        merge: The merge report of a manifest, or what `model_wide_figures` took from it; may be
            empty.
    """
    if "kl_mean" not in merge:
        return [("merge", str(merge["method"]))] if merge else []
    kl, agreement = merge["kl_mean"], merge["top1_agreement"]
    chosen = f"{merge['method']}, KL to unmerged {kl:.3g}"
    if agreement is not None:
        chosen += f", top-1 agreement {agreement:.1%}"
    tried = [
        f"{name} {found['kl_mean']:.3g}" for name, found in merge.get("candidates", {}).items()
    ]
    return [("merge", chosen)] + [("KL of each method", ", ".join(tried))] * bool(tried)


def learning_rows(learning: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what learning a rotation came to.

    Args:
        learning: Details of a rotation's manifest.
    """
    before, after = learning["held_out_before"], learning["held_out_after"]
    rows = [("held-out loss", f"{before:.4f} before, {after:.4f} after {learning['steps']} steps")]
    draws = [f"seed {seed}: {loss:.4f}" for seed, loss in learning["draws"].items()]
    return rows + [("loss of each draw", ", ".join(draws))] * bool(draws)


def training_rows(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a training run came to.

    Args:
        training: Fields of `reslora.train_report.TrainReport`.
    """
    metrics = training["eval_metrics"][-1][1] if training["eval_metrics"] else {}
    return [
        ("steps", str(training["steps"])),
        ("first and last loss", _first_and_last(training["loss"])),
        ("validation loss", _first_and_last(training["eval_loss"])),
        ("kept state", f"step {training['kept_step']}"),
        *((f"validation {name}", f"{value:.4f}") for name, value in metrics.items()),
        ("trainable parameters", f"{training['trainable_parameters']:,}"),
    ]


def _first_and_last(points: Sequence[Sequence[float]]) -> str:
    return f"{points[0][1]:.4f}, {points[-1][1]:.4f}" if points else "none"
