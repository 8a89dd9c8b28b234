"""The middle stage: model (+ adapter) -> merged, rotated, quantized checkpoint.

    load -> [rotate in the adapter's basis] -> merge -> [rotate] -> quantize -> [KV cache] -> write

An adapter that was trained in a rotated basis carries its rotation and is merged in that basis; any
other adapter is merged first and the result is rotated, which in exact arithmetic is the same
function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deploy.adapter_artifact import StoredAdapter, open_adapter
from deploy.architecture import decoder_names
from deploy.artifact import (
    ArtifactKind,
    Manifest,
    finished_artifact,
    library_versions,
    new_artifact,
    write_manifest,
)
from deploy.calibration_text import calibration_for
from deploy.checkpoint import formats_to_details, weights_bytes, write_weights
from deploy.checkpoint_settings import (
    FLOAT_SCHEME,
    CheckpointSettings,
    RotationChoice,
    default_rotations,
)
from deploy.errors import ArtifactError, ConfigError, UnsupportedModelError
from deploy.loading import LoadedModel, load_model, save_tokenizer
from deploy.memory import peak_memory_bytes, release_free_memory
from deploy.rotate import rotate_model
from deploy.rotation_file import save_rotation
from deploy.shortcut_merge import merge_stored_adapter, model_wide_figures
from deploy.staging import require_free_space
from deploy.stored_rotation import StoredRotation, open_rotation
from rolora.calibrated_plan import CalibratedPlan, calibrate_plan
from rolora.decoder import DecoderNames
from rolora.fold import untie_head
from rolora.kv_attention import quantize_kv_cache
from rolora.kv_cache import FLOAT_KV_BITS
from rolora.layer_plan import plan_layers
from rolora.online import install_online_rotations
from rolora.quantize import LayerError, quantize_decoder
from rolora.rotation import RotationName, RotationPlan


@dataclass(frozen=True)
class CheckpointReport:
    """What the stage did."""

    output: Path
    manifest: Manifest
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        rounding: Any = self.manifest.details["rounding"]
        return {
            "output": str(self.output),
            "digest": self.manifest.digest,
            "scheme": self.manifest.details["scheme"],
            "merge": model_wide_figures(self.manifest.details["merge"]),
            "quantized_layers": len(rounding),
            "largest_rounding_error": max(
                rounding.values(), key=lambda layer: layer["relative_error"], default=None
            ),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def merge_rotate_quantize(
    settings: CheckpointSettings,
    output: Path,
    progress: Callable[[str], None] = lambda step: None,
    layer_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CheckpointReport:
    """Run the stage.

    Args:
        settings: What to do.
        output: The checkpoint directory to make.
        progress: Called with a line for each step.
        layer_progress: Called with the numbers of quantized layers and of all.

    Raises:
        ConfigError: The output exists, or options contradict each other or the adapter.
        ArtifactError: A file is damaged, or the adapter belongs to another model.
        UnsupportedModelError: The model is of another family, or a size has no Hadamard matrix.
    """
    progress(f"loading {settings.model}")
    loaded = load_model(settings.model)
    adapter = None if settings.adapter is None else open_adapter(settings.adapter)
    parents = {"model": loaded.digest}
    if adapter is not None:
        adapter.require_base(loaded.digest, settings.model)
        parents["adapter"] = adapter.manifest_digest
    stored = None if settings.stored_rotation is None else open_rotation(settings.stored_rotation)
    if stored is not None:
        parents["rotation"] = stored.digest
    if done := finished_artifact(output, ArtifactKind.CHECKPOINT, parents, settings.to_config()):
        progress(f"{output} is finished already")
        return CheckpointReport(output, done, peak_memory_bytes())
    names = decoder_names(loaded.model.config)
    if settings.recipe is not None:
        try:
            plan_layers(names, settings.recipe, settings.overrides)
        except ValueError as error:
            raise ConfigError(f"{loaded.name}: cannot be quantized: {error}") from error
    plan = choose_rotation(names, settings.rotation, adapter, stored, settings.kv_bits)
    with new_artifact(output) as directory:
        with torch.no_grad():
            merge_report = _merge_and_rotate(loaded, names, plan, adapter, settings, progress)
        progress("calibrating")
        planned, errors = _quantize(loaded, names, settings, progress, layer_progress)
        _quantize_cache(loaded, names, plan, settings, progress)
        progress("writing the checkpoint")
        details: dict[str, Any] = {
            "scheme": FLOAT_SCHEME if settings.recipe is None else str(settings.recipe.scheme),
            "linears": formats_to_details(planned.plans),
            "choices": planned.to_details(),
            "rounding": {error.fqn: asdict(error) for error in errors},
            "merge": merge_report,
            "kv_bits": settings.kv_bits,
        } | save_rotation(directory, plan)
        loaded.model.config.save_pretrained(directory)
        save_tokenizer(loaded, directory)
        require_free_space(directory, weights_bytes(loaded.model))
        write_weights(directory, loaded.model)
        manifest = write_manifest(
            directory,
            Manifest(
                ArtifactKind.CHECKPOINT,
                parents=parents,
                config=settings.to_config(),
                versions=library_versions(),
                details=details,
            ),
        )
    return CheckpointReport(output, manifest, peak_memory_bytes())


def choose_rotation(
    names: DecoderNames,
    choice: RotationChoice | None,
    adapter: StoredAdapter | None,
    stored: StoredRotation | None = None,
    kv_bits: int = FLOAT_KV_BITS,
) -> RotationPlan | None:
    """Return the rotation to fuse: the adapter's own, that of an artifact, or a fresh draw.

    R3 leaves the basis as it is, so an adapter's own rotation can be given one.

    Args:
        names: The model's parts.
        choice: What the user asked for; None is the default.
        adapter: The adapter to merge, if any.
        stored: The rotation of another artifact, if the user gave one.
        kv_bits: Of the KV cache; a quantized one gets R3 unless the user chose otherwise.

    Raises:
        ConfigError: The user asked for another rotation than the adapter was trained in, for two
            rotations at once, or for one of another model.
        UnsupportedModelError: A size has no Hadamard matrix.
    """
    own = None if adapter is None else adapter.rotation
    if stored is not None:
        if choice is not None:
            raise ConfigError(
                f"--rotation {stored.directory} is a whole rotation; leave --rotate, "
                f"--rotation-kind and --rotation-seed out"
            )
        if own is not None and own.digest != stored.plan.digest:
            raise ConfigError(
                f"the adapter was trained in the basis of {','.join(sorted(own.names))} "
                f"({own.kind}, digest {own.digest[:12]}) and can be merged only there; --rotation "
                f"{stored.directory} has another (digest {stored.plan.digest[:12]}): leave it out"
            )
        stored.require_sizes(names)
        own = stored.plan
    wanted = choice or RotationChoice(default_rotations(kv_bits))
    if (
        own is not None
        and choice is not None
        and (choice.names - {RotationName.R3}, choice.kind, choice.seed)
        != (own.names, own.kind, own.seed)
    ):
        asked = ",".join(sorted(choice.names)) or "none"
        raise ConfigError(
            f"the adapter was trained in the basis of {','.join(sorted(own.names))} "
            f"({own.kind}, seed {own.seed}, "
            f"digest {own.digest[:12]}) and can be merged only there; asked for {asked} "
            f"({choice.kind}, seed "
            f"{choice.seed}). Leave --rotate, --rotation-kind and --rotation-seed out"
        )
    if not wanted.names:
        return None
    try:
        if own is not None:
            return own.with_r3(names) if RotationName.R3 in wanted.names else own
        return RotationPlan.draw(names, wanted.names, wanted.kind, wanted.seed)
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from error


def _merge_and_rotate(
    loaded: LoadedModel,
    names: DecoderNames,
    plan: RotationPlan | None,
    adapter: StoredAdapter | None,
    settings: CheckpointSettings,
    progress: Callable[[str], None],
) -> dict[str, Any] | None:
    """Bring adapter and rotation into the weights, in the order of the adapter's basis."""
    rotate_first = adapter is not None and adapter.rotation is not None
    report = None
    if rotate_first and plan is not None:
        progress("rotating into the adapter's basis")
        rotate_model(loaded, names, plan)
    if adapter is not None:
        progress(f"merging {adapter.directory}")
        try:
            report = merge_stored_adapter(
                loaded.model, names, adapter, settings.merge, lambda: _calibration(loaded, settings)
            )
        except ValueError as error:
            raise ArtifactError(f"{adapter.directory}: cannot be merged: {error}") from error
    if plan is None:
        untie_head(loaded.model, names)
    elif not rotate_first:
        progress(f"rotating with {', '.join(sorted(plan.names))}")
        rotate_model(loaded, names, plan)
    if plan is not None:
        install_online_rotations(loaded.model, plan, names)
    return report


def _calibration(loaded: LoadedModel, settings: CheckpointSettings) -> list[dict[str, Tensor]]:
    return calibration_for(
        loaded,
        settings.calibration,
        windows=settings.calibration_windows,
        tokens=settings.calibration_tokens,
    )


def _quantize(
    loaded: LoadedModel,
    names: DecoderNames,
    settings: CheckpointSettings,
    progress: Callable[[str], None],
    layer_progress: Callable[[int, int], None],
) -> tuple[CalibratedPlan, list[LayerError]]:
    """Choose what calibration text decides, then round."""
    if settings.recipe is None:
        return CalibratedPlan([], {}), []
    batches = _calibration(loaded, settings)
    done = itertools.count(1)
    try:
        planned = calibrate_plan(
            loaded.model, names, settings.recipe, batches, settings.overrides, settings.budget
        )
        release_free_memory()
        progress("quantizing")
        total = len(planned.plans)

        def count(_fqn: str) -> None:
            release_free_memory()
            layer_progress(next(done), total)

        errors = quantize_decoder(loaded.model, names, settings.recipe, batches, count, planned)
    except ValueError as error:
        raise ConfigError(f"{loaded.name}: cannot be quantized: {error}") from error
    return planned, errors


def _quantize_cache(
    loaded: LoadedModel,
    names: DecoderNames,
    plan: RotationPlan | None,
    settings: CheckpointSettings,
    progress: Callable[[str], None],
) -> None:
    """Calibrate the KV cache on the model as it is now."""
    if settings.kv_bits == FLOAT_KV_BITS:
        return
    progress(f"calibrating the KV cache of {settings.kv_bits} bits")
    rotation = None if plan is None or plan.r3 is None else plan.r3.dense().float()
    try:
        quantize_kv_cache(
            loaded.model, names, settings.kv_bits, rotation, _calibration(loaded, settings)
        )
    except ValueError as error:
        raise ConfigError(f"{loaded.name}: its KV cache cannot be quantized: {error}") from error
