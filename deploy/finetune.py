"""The first stage: model + data -> adapter.

    lora      PEFT's LoRA (arXiv:2106.09685)
    reslora   LoRA with shortcuts between the layers (arXiv:2402.18039)
    rolora    rotate first, train LoRA on the rotated weights, keep the rotation with the adapter
    (arXiv:2407.08044)

What a model learns, language or labels, is `finetune_tasks`.

Under `accelerate launch` every process trains, and the first one writes. Training checkpoints lie
in `<output>.training` until the adapter is written, so that a killed run can go on with `--resume`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from deploy.adapter_basis import draw_adapter_basis, require_adapter_basis
from deploy.architecture import decoder_names
from deploy.artifact import (
    ArtifactKind,
    Manifest,
    finished_artifact,
    hash_sources,
    library_versions,
    new_artifact,
    write_manifest,
)
from deploy.checkpoint import Checkpoint
from deploy.errors import ConfigError, UnsupportedModelError
from deploy.finetune_tasks import TrainingTask, read_task_rows
from deploy.loading import LoadedModel
from deploy.quantized_training import (
    AwareModel,
    LearnFrom,
    build_aware_model,
    make_teacher,
    open_start,
    save_scales,
    training_extension,
)
from deploy.rotate import rotate_model
from deploy.rotation_file import save_rotation
from deploy.staging import full_disk_named, require_writable
from deploy.stored_rotation import StoredRotation, open_rotation
from deploy.training_basis import claim_checkpoints
from reslora.adapter import save_adapter
from reslora.attach import attach_adapters
from reslora.config import AdapterConfig
from reslora.settings import Precision, TrainSettings
from reslora.train import train_adapter
from reslora.train_report import TrainReport
from reslora.training_extension import TrainingExtension
from rolora.decoder import DecoderNames
from rolora.online import install_online_rotations
from rolora.rotation import RotationKind, RotationPlan

SUMMARY_FILE = "training_summary.json"


class Method(StrEnum):
    """What is trained, and in which basis."""

    LORA = "lora"
    RESLORA = "reslora"
    ROLORA = "rolora"


@dataclass(frozen=True)
class FinetuneSettings:
    """Resolved settings of the stage."""

    model: str
    data: str
    method: Method
    adapter: AdapterConfig
    targets: str = "q,v"
    validation: str | None = None
    task: TrainingTask = TrainingTask.LANGUAGE
    training: TrainSettings = field(default_factory=TrainSettings)
    rotation_kind: RotationKind = RotationKind.HADAMARD
    rotation_seed: int = 0
    start: Path | None = None
    """A quantized checkpoint whose rounding training goes through; its rotation is used."""
    learn_from: LearnFrom = LearnFrom.TEACHER
    """With a start only."""
    rotation: Path | None = None
    """Artifact whose rotation method rolora uses, in place of drawing one."""

    def __post_init__(self) -> None:
        """Check method and structure against each other.

        Raises:
            ConfigError: reslora without a structure, lora with one, rolora or a start for an
                encoder, a rotation, its kind or its seed without rolora, a rotation beside the
                kind, seed or start of another, or something to learn from without a start.
        """
        if self.start is not None and self.task is TrainingTask.CLASSIFICATION:
            raise ConfigError(
                "--start trains decoders only: encoders are not quantized; leave it out"
            )
        if self.start is None and self.learn_from is not LearnFrom.TEACHER:
            raise ConfigError(
                f"--learn-from {self.learn_from}: is for training inside a checkpoint's rounding; "
                f"name it with --start, or leave this out"
            )
        drawn = (self.rotation_kind, self.rotation_seed) != (RotationKind.HADAMARD, 0)
        if drawn and self.method is not Method.ROLORA:
            raise ConfigError(
                f"--rotation-kind, --rotation-seed: --method {self.method} trains in the model's "
                f"own basis; use --method rolora, or leave them out"
            )
        if self.rotation is not None:
            if self.method is not Method.ROLORA:
                raise ConfigError(
                    f"--rotation {self.rotation}: --method {self.method} trains in the model's own "
                    f"basis; use --method rolora, or leave it out"
                )
            if self.start is not None:
                raise ConfigError(
                    f"--start {self.start} brings its own rotation; leave --rotation out"
                )
            if drawn:
                raise ConfigError(
                    f"--rotation {self.rotation} is a whole rotation; leave --rotation-kind and "
                    f"--rotation-seed out"
                )
        if self.method is Method.ROLORA and self.task is TrainingTask.CLASSIFICATION:
            raise ConfigError(
                "--method rolora rotates decoders only; --task classification takes reslora or lora"
            )
        if self.method is Method.RESLORA and self.adapter.structure is None:
            raise ConfigError("--method reslora needs --structure block, input or middle")
        if self.method is Method.LORA and self.adapter.structure is not None:
            raise ConfigError(
                f"--structure {self.adapter.structure}: --method lora has no shortcuts; use "
                f"--method reslora"
            )

    def to_config(self) -> dict[str, Any]:
        """Return the settings as plain data for the manifest."""
        paths = {"start": self.start, "rotation": self.rotation}
        plain = {name: None if path is None else str(path) for name, path in paths.items()}
        return asdict(self) | plain


@dataclass(frozen=True)
class FinetuneReport:
    """What the stage did."""

    output: Path
    manifest: Manifest
    clock: Mapping[str, Any]
    """Seconds, speed and peak memory of this process; empty if there was nothing to do."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        training: Any = self.manifest.details["training"]
        return {
            "output": str(self.output),
            "digest": self.manifest.digest,
            "training": {**training, **self.clock},
        }


def finetune(
    settings: FinetuneSettings,
    output: Path,
    *,
    resume: bool = False,
    tensorboard: Path | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> FinetuneReport | None:
    """Run the stage.

    Args:
        settings: What to do.
        output: The adapter directory to make.
        resume: Go on from the newest training checkpoint of an interrupted run.
        tensorboard: Where to write curves for TensorBoard; nowhere if None.
        progress: Called with a line for each step.

    Returns:
        The report; None in all but the first of several processes.

    Raises:
        ConfigError: Data, settings or output cannot be used, or the loss is not finite.
        ArtifactError: A file is damaged or the disk is full.
        UnsupportedModelError: The model is of another family, or a size has no Hadamard matrix.
    """
    rows = read_task_rows(settings.task, settings.data, settings.validation, settings.training)
    progress(f"loading {settings.model}")
    loaded = rows.load(settings.model)
    start = None if settings.start is None else open_start(settings.start, loaded)
    parents = loaded.parents()
    parents |= hash_sources({"data": settings.data, "validation": settings.validation})
    if start is not None:
        parents["start"] = start.manifest.digest
    stored = None if settings.rotation is None else open_rotation(settings.rotation)
    if stored is not None:
        parents["rotation"] = stored.digest
    wanted = Manifest(ArtifactKind.ADAPTER, parents, settings.to_config(), library_versions())
    if done := finished_artifact(output, wanted, progress):
        return FinetuneReport(output, done, {}) if _process_rank() == 0 else None
    if _process_rank() == 0:  # one of several would remove the parents that another has made
        require_writable(output)
        if tensorboard is not None:
            require_writable(tensorboard / "events")
    targets = rows.targets(loaded.model.config, settings.targets)
    checkpoints = output.with_name(f"{output.name}.training")
    try:
        if start is None:
            prepared = _prepare(loaded, settings, targets, rows.head, stored)
        else:
            prepared = _prepare_aware(loaded, settings, targets, start)
        basis = _basis(parents, settings, stored)
        claim_checkpoints(checkpoints, basis, resume=resume, notes=_process_rank() == 0)
        progress(f"training on {rows.count} examples")
        data = rows.data(loaded, settings.training)
        with full_disk_named(checkpoints):
            training = train_adapter(
                prepared.model,
                data,
                settings.training,
                checkpoints,
                resume,
                tensorboard=tensorboard,
                extension=prepared.extension,
            )
    except ValueError as error:
        raise ConfigError(f"training: {error}") from error
    if _process_rank() != 0:
        return None
    summary, clock = training.parted()
    with new_artifact(output) as directory:
        save_adapter(prepared.model, settings.adapter, directory)
        if prepared.aware is not None:
            save_scales(prepared.aware, directory)
        details: dict[str, Any] = {"training": summary, **rows.details}
        details |= save_rotation(directory, prepared.rotation)
        manifest = write_manifest(directory, replace(wanted, details=details))
        _write_summary(directory, settings, training, manifest)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return FinetuneReport(output, manifest, clock)


def _process_rank() -> int:
    """Return this process's number under `accelerate launch` or torchrun, else 0."""
    return int(os.environ.get("RANK", "0"))


def _basis(
    parents: Mapping[str, str], settings: FinetuneSettings, stored: StoredRotation | None
) -> dict[str, Any]:
    """Return what tells the weights that an adapter is trained on from all others."""
    rotated = settings.method is Method.ROLORA
    return {
        "model": parents["model"],
        "start": parents.get("start"),
        "rotation_kind": settings.rotation_kind.value if rotated else None,
        "rotation_seed": settings.rotation_seed if rotated else None,
        "rotation": None if stored is None else stored.plan.digest,
    }


@dataclass(frozen=True)
class _Prepared:
    """A model that is ready for training."""

    model: PeftModel
    rotation: RotationPlan | None
    aware: AwareModel | None = None
    extension: TrainingExtension | None = None


def _prepare(
    loaded: LoadedModel,
    settings: FinetuneSettings,
    targets: list[str],
    head: str | None,
    stored: StoredRotation | None,
) -> _Prepared:
    """Rotate the model if the method does, and attach the adapter."""
    names = None
    plan = None
    if settings.method is Method.ROLORA:
        names = decoder_names(loaded.model.config)
        plan = _choose_rotation(loaded, settings, names, stored)
        rotate_model(loaded, names, plan)
    model = attach_adapters(
        loaded.model, settings.adapter, targets, seed=settings.training.seed, head=head
    )
    if plan is not None and names is not None:
        install_online_rotations(model, plan, names)
    return _Prepared(model, plan)


def _choose_rotation(
    loaded: LoadedModel,
    settings: FinetuneSettings,
    names: DecoderNames,
    stored: StoredRotation | None,
) -> RotationPlan:
    if stored is not None:
        stored.require_sizes(names)
        plan = stored.plan
        try:
            require_adapter_basis(plan, settings.adapter)
        except ValueError as error:
            raise ConfigError(f"--rotation {stored.directory}: {error}") from error
    else:
        try:
            plan = draw_adapter_basis(
                names, settings.adapter, settings.rotation_kind, settings.rotation_seed
            )
        except ValueError as error:
            raise UnsupportedModelError(f"{loaded.name}: {error}") from error
    return plan


def _prepare_aware(
    loaded: LoadedModel, settings: FinetuneSettings, targets: list[str], start: Checkpoint
) -> _Prepared:
    """Set the model up to round as a quantized checkpoint does, and attach the adapter."""
    rotated = start.rotation is not None
    if rotated != (settings.method is Method.ROLORA):
        fitting = "rolora" if rotated else "lora or reslora"
        raise ConfigError(
            f"--start {start.directory}: that checkpoint is {'' if rotated else 'not '}rotated, so "
            f"the method must be {fitting}, got {settings.method}"
        )
    dtype = (
        torch.bfloat16 if settings.training.precision is Precision.BFLOAT16 else loaded.model.dtype
    )
    teacher = None
    if settings.learn_from is LearnFrom.TEACHER:
        teacher = make_teacher(loaded.model, dtype)
    aware = build_aware_model(loaded, start, settings.adapter, targets, seed=settings.training.seed)
    extension = training_extension(aware, teacher, dtype)
    return _Prepared(aware.peft_model, start.rotation, aware, extension)


def _write_summary(
    directory: Path, settings: FinetuneSettings, report: TrainReport, manifest: Manifest
) -> None:
    """Write the run's curves and clock for people and plots.

    It comes after the manifest, which therefore does not list it: the clock would make equal
    adapters differ.
    """
    summary = {
        "adapter_digest": manifest.digest,
        "settings": settings.to_config(),
        **report.to_dict(),
    }
    text = json.dumps(summary, indent=2, sort_keys=True)
    (directory / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")
