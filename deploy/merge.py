"""The way out: model + adapter -> an ordinary model, or a plain LoRA adapter, for other programs.

    --to model     a Hugging Face directory: the merged weights under the model's own names
    --to adapter   PEFT's files: the merged change of each weight as two factors

Either is in the model's own basis and needs nothing of this package. A merge makes of every layer
two factors (`reslora.merged_factors`); those of a rotated adapter are taken back through rotation
and norm gains (`deploy.adapter_basis`), so the files of the base model fit again. What decoders and
classifiers need apart is `deploy.merge_sources`.

A shortcut that is not merged has no place in either format. Unmerged, an adapter runs attached:
`reslora.attach.attach_adapters` and `reslora.adapter.restore_adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deploy.adapter_artifact import StoredAdapter, open_adapter
from deploy.artifact import (
    ArtifactKind,
    Manifest,
    finished_artifact,
    hash_sources,
    library_versions,
    new_artifact,
    write_manifest,
)
from deploy.classify import is_classifier
from deploy.errors import ArtifactError, ConfigError
from deploy.merge_sources import ClassifierSource, DecoderSource, MergeSource
from deploy.shortcut_merge import AUTO, model_wide_figures
from deploy.staging import require_free_space
from reslora.adapter import Adapter
from reslora.merge import MergeMethod, merge_adapter
from reslora.peft_export import Recompressed, recompress, write_peft_adapter


class Destination(StrEnum):
    """What is made of a merge."""

    MODEL = "model"
    ADAPTER = "adapter"


class FloatType(StrEnum):
    """In which numbers it is written."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type of this name."""
        dtype: torch.dtype = getattr(torch, self.value)
        return dtype


KINDS = {Destination.MODEL: ArtifactKind.MODEL, Destination.ADAPTER: ArtifactKind.ADAPTER}


@dataclass(frozen=True)
class MergeSettings:
    """Resolved settings of the stage."""

    model: str
    adapter: Path | None
    """None, for a model only, writes the model as it is."""
    to: Destination
    merge: MergeMethod | None = MergeMethod.EXACT
    """None: exact where that is possible, else the nearest to the unmerged model."""
    rank: int | None = None
    """Of the written adapter; None is what the merge needs."""
    dtype: FloatType = FloatType.FLOAT32
    calibration: str | None = None
    calibration_windows: int = 16
    calibration_tokens: int = 512

    def __post_init__(self) -> None:
        """Check the options against each other.

        Raises:
            ConfigError: An adapter is missing, or a rank is impossible or asked of a model.
        """
        faults = []
        if self.adapter is None and self.to is Destination.ADAPTER:
            faults.append("--to adapter needs --adapter")
        elif self.adapter is None and (self.merge, self.calibration) != (MergeMethod.EXACT, None):
            faults.append("--merge and --calibration need --adapter; there is none to merge")
        if self.rank is not None and self.to is Destination.MODEL:
            faults.append("--rank is for --to adapter; a model has no rank")
        if self.rank is not None and self.rank < 1:
            faults.append(f"--rank must be at least 1, got {self.rank}")
        if faults:
            raise ConfigError.from_faults("merge", faults)

    def to_config(self) -> dict[str, Any]:
        """Return the settings as plain data for the manifest."""
        return {
            "model": self.model,
            "adapter": None if self.adapter is None else str(self.adapter),
            "to": str(self.to),
            "merge": str(self.merge or AUTO),
            "rank": self.rank,
            "dtype": str(self.dtype),
            "calibration": self.calibration,
            "calibration_windows": self.calibration_windows,
            "calibration_tokens": self.calibration_tokens,
        }


@dataclass(frozen=True)
class MergeStageReport:
    """What the stage did."""

    output: Path
    manifest: Manifest

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        details: Any = self.manifest.details
        return {
            "output": str(self.output),
            "digest": self.manifest.digest,
            "to": details["to"],
            "merge": model_wide_figures(details["merge"]),
            "rank": details.get("rank"),
            "recompression_error": details.get("recompression", {}).get("relative_error"),
            "weights_bytes": sum(
                record.bytes
                for name, record in self.manifest.files.items()
                if name.endswith(".safetensors")
            ),
        }


def merge(
    settings: MergeSettings, output: Path, progress: Callable[[str], None] = lambda step: None
) -> MergeStageReport:
    """Run the stage. The inputs are only read.

    Args:
        settings: What to do.
        output: The directory to make.
        progress: Called with a line for each step.

    Raises:
        ConfigError: The output exists, or options contradict each other.
        ArtifactError: A file is damaged, the adapter belongs to another model, or cannot be merged.
        UnsupportedModelError: The model is of another family.
    """
    progress(f"loading {settings.model}")
    stored = None if settings.adapter is None else open_adapter(settings.adapter)
    source = _open_source(settings, stored)
    parents = source.loaded.parents() | hash_sources({"calibration": settings.calibration})
    if stored is not None:
        stored.require_base(source.loaded.digest, settings.model)
        parents["adapter"] = stored.manifest_digest
    wanted = Manifest(KINDS[settings.to], parents, settings.to_config(), library_versions())
    if done := finished_artifact(output, wanted, progress):
        return MergeStageReport(output, done)
    with new_artifact(output) as directory:
        details: dict[str, Any] = {"to": str(settings.to), "merge": None}
        plain = None
        if stored is not None:
            progress(f"merging {stored.directory}")
            plain, details["merge"] = _merge(source, stored, settings)
        progress(f"writing the {settings.to}")
        if settings.to is Destination.MODEL:
            _write_model(source, settings.dtype.torch_dtype, directory)
        elif plain is not None:
            exported = source.exported(plain)
            details |= _write_adapter(exported, settings, directory) | dict(source.details)
        manifest = write_manifest(directory, replace(wanted, details=details))
    return MergeStageReport(output, manifest)


def _open_source(settings: MergeSettings, stored: StoredAdapter | None) -> MergeSource:
    if stored is not None and is_classifier(stored):
        return ClassifierSource(settings.model, stored, settings.calibration)
    return DecoderSource(
        settings.model,
        settings.calibration,
        settings.calibration_windows,
        settings.calibration_tokens,
    )


def _merge(
    source: MergeSource, stored: StoredAdapter, settings: MergeSettings
) -> tuple[Adapter, dict[str, Any]]:
    """Return the merge as an adapter, and its report; a model that is wanted holds it then."""
    try:
        plain, chosen = source.plain_merge(stored, settings.merge)
        report: dict[str, Any] = {
            "method": str(chosen.method),
            "structure": stored.adapter.config.structure,
        } | chosen.figures
        if settings.to is Destination.MODEL:
            merged = merge_adapter(source.loaded.model, plain, MergeMethod.EXACT).to_dict()
            report["layers"] = [
                {key: value for key, value in layer.items() if key != "blocks"}
                for layer in merged["layers"]
            ]
    except ValueError as error:
        raise ArtifactError(f"{stored.directory}: cannot be merged: {error}") from error
    return plain, report


def _write_model(source: MergeSource, dtype: torch.dtype, directory: Path) -> None:
    model = source.loaded.model
    nn.Module.to(model, dtype=dtype)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ArtifactError(
                f"{source.loaded.name}: {name} is not finite in {dtype}; use float32"
            )
    require_free_space(directory, sum(p.numel() * p.element_size() for p in model.parameters()))
    source.save(directory)


def _write_adapter(plain: Adapter, settings: MergeSettings, directory: Path) -> dict[str, Any]:
    """Write PEFT's files; return rank, size of each change, and what a lower rank cost."""
    details: dict[str, Any] = {"rank": plain.config.rank}
    if settings.rank is not None:
        try:
            smaller = recompress(plain, settings.rank)
        except ValueError as error:
            raise ConfigError(f"--rank {settings.rank}: {error}") from error
        details = {"rank": settings.rank, "recompression": _recompression(plain, smaller)}
        plain = smaller.adapter
    dtype = settings.dtype.torch_dtype
    factors = {fqn: (a.to(dtype), b.to(dtype)) for fqn, (a, b) in plain.factors.items()}
    for fqn, pair in factors.items():
        if not all(bool(torch.isfinite(factor).all()) for factor in pair):
            raise ArtifactError(f"{fqn}: factors are not finite in {dtype}; use float32")
    write_peft_adapter(
        Adapter(plain.config, factors, plain.head), directory, base_model=settings.model
    )
    return details


def _recompression(plain: Adapter, smaller: Recompressed) -> dict[str, Any]:
    """Return the relative Frobenius errors, of each layer and of all of them together."""
    squares, missed = 0.0, 0.0
    for fqn, (a, b) in plain.factors.items():
        square = float(((b.T @ b) * (a @ a.T)).sum())  # ||B A||^2
        squares += square
        missed += smaller.errors[fqn] ** 2 * square
    return {
        "relative_error": math.sqrt(missed / squares) if squares > 0 else 0.0,
        "layers": smaller.errors,
    }
