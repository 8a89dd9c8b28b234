"""The middle stage: model (+ adapter) -> merged, rotated, quantized checkpoint.

    load -> [rotate in the adapter's basis] -> merge -> [rotate] -> quantize -> write

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
from deploy.calibration_text import calibration_batches
from deploy.checkpoint import formats_to_details, weights_bytes, write_weights
from deploy.errors import ArtifactError, ConfigError, UnsupportedModelError
from deploy.loading import LoadedModel, load_model, save_tokenizer
from deploy.memory import peak_memory_bytes, release_free_memory
from deploy.rotate import rotate_model
from deploy.rotation_file import save_rotation
from deploy.shortcut_merge import AUTO, merge_stored_adapter
from deploy.staging import require_free_space
from reslora.merge import MergeMethod
from rolora.decoder import DecoderNames
from rolora.fold import untie_head
from rolora.online import install_online_rotations
from rolora.quantize import LayerError, plan_layers, quantize_decoder
from rolora.rotation import RotationKind, RotationName, RotationPlan
from rolora.scheme import QuantizationRecipe, Scheme, WeightMethod

FLOAT_SCHEME = "FP32"
"""Scheme of a checkpoint that is merged and rotated, but not quantized."""


@dataclass(frozen=True)
class RotationChoice:
    """Which rotations to draw for a model whose adapter brings none."""

    names: frozenset[RotationName]
    kind: RotationKind = RotationKind.HADAMARD
    seed: int = 0


def parse_rotation(text: str | None, kind: RotationKind, seed: int) -> RotationChoice | None:
    """Read `r1,r2,r4` or `none`; None if text, kind and seed were all left at their defaults.

    Raises:
        ConfigError: A name is unknown.
    """
    if text is None:
        if (kind, seed) == (RotationKind.HADAMARD, 0):
            return None
        return RotationChoice(frozenset(RotationName), kind, seed)
    words = [word.strip().upper() for word in text.split(",") if word.strip()]
    if words == ["NONE"]:
        return RotationChoice(frozenset(), kind, seed)
    unknown = [word for word in words if word not in set(RotationName)]
    if unknown or not words:
        raise ConfigError(
            f"--rotate {text!r}: expected a list of r1, r2, r4, or none; got "
            f"{', '.join(unknown) or text}"
        )
    return RotationChoice(frozenset(RotationName(word) for word in words), kind, seed)


def choose_recipe(
    scheme: str,
    *,
    rotation: RotationChoice | None,
    weights: str = WeightMethod.GPTQ,
    group_size: int | None = None,
    clip_search: bool = True,
    activation_clip: float | None = None,
    static: bool | None = None,
    embedding_bits: int = 8,
    head_bits: int = 8,
) -> QuantizationRecipe | None:
    """Fill in what the user left open; None for FP32.

    Args:
        scheme: `W8A8`, `W4A4` ... or `FP32`.
        rotation: The user's choice; static scales pay where R1 spreads the outliers.
        weights: `rtn` or `gptq`.
        group_size: Of the block weights.
        clip_search: Search the clipping point of weight scales.
        activation_clip: Of per-token scales; None is 1, or 0.9 for activations below 6 bits.
        static: Calibrated scales after norms; None is yes if R1 is used.
        embedding_bits: 8 or 32.
        head_bits: 8 or 32.

    Raises:
        ValueError: The scheme is unknown or a value is out of range.
    """
    if scheme.strip().upper() == FLOAT_SCHEME:
        return None
    parsed = Scheme.parse(scheme)
    rotated = rotation is None or RotationName.R1 in rotation.names
    default_clip = 0.9 if parsed.activation_bits < 6 else 1.0
    return QuantizationRecipe(
        parsed,
        weights=WeightMethod(weights),
        group_size=group_size,
        clip_search=clip_search,
        activation_clip=default_clip if activation_clip is None else activation_clip,
        static_after_norm=rotated if static is None else static,
        embedding_bits=embedding_bits,
        head_bits=head_bits,
    )


@dataclass(frozen=True)
class CheckpointSettings:
    """Resolved settings of the stage."""

    model: str
    adapter: Path | None
    merge: MergeMethod | None
    """None: exact where that is possible, else the nearest to the unmerged model."""
    rotation: RotationChoice | None
    """None: the adapter's own rotation, or R1, R2 and R4 where it has none."""
    recipe: QuantizationRecipe | None
    """None leaves the weights in float32."""
    calibration: str | None
    calibration_windows: int = 16
    calibration_tokens: int = 512

    def to_config(self) -> dict[str, Any]:
        """Return the settings as plain data for the manifest."""
        recipe = (
            None
            if self.recipe is None
            else asdict(self.recipe) | {"scheme": str(self.recipe.scheme)}
        )
        choice = self.rotation
        return {
            "model": self.model,
            "adapter": None if self.adapter is None else str(self.adapter),
            "merge": str(self.merge or AUTO),
            "rotate": None if choice is None else sorted(choice.names),
            "rotation_kind": None if choice is None else str(choice.kind),
            "rotation_seed": None if choice is None else choice.seed,
            "recipe": recipe,
            "calibration": self.calibration,
            "calibration_windows": self.calibration_windows,
            "calibration_tokens": self.calibration_tokens,
        }


@dataclass(frozen=True)
class CheckpointReport:
    """What the stage did."""

    output: Path
    manifest: Manifest
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        rounding: Any = self.manifest.details["rounding"]
        merge: Any = self.manifest.details["merge"] or {}
        model_wide = ("method", "kl_mean", "top1_agreement", "candidates")
        return {
            "output": str(self.output),
            "digest": self.manifest.digest,
            "scheme": self.manifest.details["scheme"],
            "merge": {key: merge[key] for key in model_wide if key in merge} or None,
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
    if done := finished_artifact(output, ArtifactKind.CHECKPOINT, parents, settings.to_config()):
        progress(f"{output} is finished already")
        return CheckpointReport(output, done, peak_memory_bytes())
    names = decoder_names(loaded.model.config)
    plan = choose_rotation(names, settings.rotation, adapter)
    with new_artifact(output) as directory:
        with torch.no_grad():
            merge_report = _merge_and_rotate(loaded, names, plan, adapter, settings, progress)
        progress("quantizing")
        errors = _quantize(loaded, names, settings, layer_progress)
        progress("writing the checkpoint")
        details: dict[str, Any] = {
            "scheme": FLOAT_SCHEME if settings.recipe is None else str(settings.recipe.scheme),
            "linears": {}
            if settings.recipe is None
            else formats_to_details(plan_layers(names, settings.recipe)),
            "rounding": {error.fqn: asdict(error) for error in errors},
            "merge": merge_report,
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
    names: DecoderNames, choice: RotationChoice | None, adapter: StoredAdapter | None
) -> RotationPlan | None:
    """Return the rotation to fuse: the adapter's own, or a fresh draw.

    Args:
        names: The model's parts.
        choice: What the user asked for; None is the default.
        adapter: The adapter to merge, if any.

    Raises:
        ConfigError: The user asked for another rotation than the adapter was trained in.
        UnsupportedModelError: A size has no Hadamard matrix.
    """
    own = None if adapter is None else adapter.rotation
    if own is not None:
        if choice is not None and (choice.names, choice.kind, choice.seed) != (
            own.names,
            own.kind,
            own.seed,
        ):
            asked = ",".join(sorted(choice.names)) or "none"
            raise ConfigError(
                f"the adapter was trained in the basis of {','.join(sorted(own.names))} "
                f"({own.kind}, seed {own.seed}, "
                f"digest {own.digest[:12]}) and can be merged only there; asked for {asked} "
                f"({choice.kind}, seed "
                f"{choice.seed}). Leave --rotate, --rotation-kind and --rotation-seed out"
            )
        return own
    wanted = choice or RotationChoice(frozenset(RotationName))
    if not wanted.names:
        return None
    try:
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
    return calibration_batches(
        loaded.tokenizer,
        settings.calibration,
        windows=settings.calibration_windows,
        tokens=min(settings.calibration_tokens, loaded.model.config.max_position_embeddings),
    )


def _quantize(
    loaded: LoadedModel,
    names: DecoderNames,
    settings: CheckpointSettings,
    layer_progress: Callable[[int, int], None],
) -> list[LayerError]:
    if settings.recipe is None:
        return []
    total = len(plan_layers(names, settings.recipe))
    done = itertools.count(1)

    def count(_fqn: str) -> None:
        release_free_memory()
        layer_progress(next(done), total)

    batches = _calibration(loaded, settings)
    try:
        return quantize_decoder(loaded.model, names, settings.recipe, batches, count)
    except ValueError as error:
        raise ConfigError(f"{loaded.name}: cannot be quantized: {error}") from error
