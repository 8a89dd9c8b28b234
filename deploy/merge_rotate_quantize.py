"""The middle stage: model (+ adapter) -> merged, rotated, quantized checkpoint.

    for the embedding, each block and the head:
        load -> [rotate in adapter basis] -> merge -> [rotate] -> quantize -> [KV cache] -> store

Before that a pass of the float model measures an equalization, where one is asked for
(`rolora.equalization`).

An adapter that was trained in a rotated basis carries its rotation and is merged in that basis; any
other adapter is merged first and the result is rotated, which in exact arithmetic is the same
function.

Stored parts survive the process (`part_store`), and but for them little more than a part is in
memory (`decoder_source`), so the model may be larger than the machine's memory. What is measured or
chosen on the running float model needs the whole of it (`needs_whole_model`, approximate merges);
a line of progress says so and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

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
from deploy.calibration_text import calibration_for
from deploy.checkpoint import write_weights
from deploy.checkpoint_report import CheckpointReport, quantization_details
from deploy.checkpoint_settings import (
    CheckpointSettings,
    RotationChoice,
    default_equalization,
    default_rotations,
)
from deploy.decoder_source import DecoderSource, open_decoder
from deploy.equalize import measure_equalization
from deploy.errors import ConfigError, UnsupportedModelError
from deploy.loading import save_tokenizer
from deploy.memory import peak_memory_bytes, release_free_memory
from deploy.part_store import discard_parts, open_parts
from deploy.part_walk import PartWalk
from deploy.rotation_file import save_rotation
from deploy.staging import require_free_space
from deploy.stored_rotation import StoredRotation, open_rotation
from rolora.calibrated_plan import CalibratedPlan, calibrate_plan, needs_whole_model
from rolora.decoder import DecoderNames
from rolora.equalization import Equalization, Equalized
from rolora.kv_cache import FLOAT_KV_BITS
from rolora.layer_plan import plan_layers
from rolora.rotation import RotationName, RotationPlan


def merge_rotate_quantize(
    settings: CheckpointSettings,
    output: Path,
    progress: Callable[[str], None] = lambda step: None,
    layer_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    resume: bool = True,
) -> CheckpointReport:
    """Run the stage.

    Args:
        settings: What to do.
        output: The checkpoint directory to make.
        progress: Called with a line for each step.
        layer_progress: Called with the numbers of quantized layers and of all.
        resume: Go on behind the parts that a killed run finished; False removes them.

    Raises:
        ConfigError: The output exists, options contradict each other or the adapter, or a killed
            run with other inputs left finished parts.
        ArtifactError: A file is damaged, or the adapter belongs to another model.
        UnsupportedModelError: The model is of another family, or a size has no Hadamard matrix.
    """
    progress(f"loading {settings.model}")
    adapter = None if settings.adapter is None else open_adapter(settings.adapter)
    source = open_decoder(settings.model, adapter, settings.merge, _choices(settings))
    loaded, names = source.loaded, source.names
    parents = loaded.parents() | hash_sources({"calibration": settings.calibration})
    if adapter is not None:
        adapter.require_base(loaded.digest, settings.model)
        parents["adapter"] = adapter.manifest_digest
    stored = None if settings.stored_rotation is None else open_rotation(settings.stored_rotation)
    if stored is not None:
        parents["rotation"] = stored.digest
    plan = choose_rotation(names, settings.rotation, adapter, stored, settings.kv_bits)
    is_fresh = stored is None and (adapter is None or adapter.rotation is None)
    equalized = _equalized(settings, plan, is_fresh)
    scales_norms = equalized is Equalized.ALL
    _require_blocks(settings, plan, names, is_fresh=is_fresh, scales_norms=scales_norms)
    if settings.shares_table:
        _require_one_table(source, adapter, plan, scales_norms=scales_norms)
    if settings.recipe is not None:
        own = None if plan is None else plan.equalization
        scaled = scales_norms or (own is not None and own.inputs is Equalized.ALL)
        rotated = plan is not None and plan.r1 is not None
        recipe = settings.recipe.in_basis(rotated=rotated, scaled=scaled)
        settings = replace(settings, recipe=recipe)
    wanted = Manifest(ArtifactKind.CHECKPOINT, parents, settings.to_config(), library_versions())
    if done := finished_artifact(output, wanted, progress):
        discard_parts(output)
        return CheckpointReport(output, done, peak_memory_bytes())
    if settings.recipe is not None:
        try:
            plan_layers(names, settings.recipe, settings.overrides)
        except ValueError as error:
            raise ConfigError(f"{loaded.name}: cannot be quantized: {error}") from error
    key = {"parents": parents, "settings": wanted.config, "versions": wanted.versions}
    with new_artifact(output) as directory, open_parts(output, key, resume=resume) as store:
        finished = len(store.parts)
        if finished:
            progress(f"going on behind {finished} finished parts")
        if source.whole_because is not None:
            progress(f"working on the whole model in memory: {source.whole_because}")
        equalizes = equalized is not Equalized.NONE
        calibrates = equalizes or settings.recipe is not None or settings.kv_bits != FLOAT_KV_BITS
        batches = _calibration(source, settings) if calibrates else []
        if plan is not None and equalizes:
            # A run that goes on must work in the basis of the parts that are stored.
            scales = Equalization.from_tensors(store.states()) if finished else None
            if scales is None:
                source.begin(None, lambda: batches, progress)
                scales = measure_equalization(source, settings, equalized, batches, progress)
            plan = plan.with_equalization(scales)
        if plan is not None and settings.rotation_block is not None:
            plan = plan.in_blocks(names, settings.rotation_block)
        source.begin(plan, lambda: batches or _calibration(source, settings), progress)
        planned = _plan(source, settings, batches, progress)
        progress("quantizing part by part")
        PartWalk(source, settings, planned, plan, batches, store, layer_progress).run()
        progress("writing the checkpoint")
        facts = [part.facts for part in store.parts]
        rounding = [error for part in facts for error in part["rounding"]]
        merged = source.merge_report([layer for part in facts for layer in part["merged"]])
        details = quantization_details(settings.recipe, planned, rounding, merged)
        details |= {"kv_bits": settings.kv_bits} | save_rotation(directory, plan)
        if settings.shares_table:
            details["shared_table"] = True
        loaded.model.config.save_pretrained(directory)
        save_tokenizer(loaded, directory)
        require_free_space(directory, sum(part.file.bytes for part in store.parts))
        write_weights(directory, [store.path(part.name) for part in store.parts])
        manifest = write_manifest(directory, replace(wanted, details=details))
    store.remove()
    seconds = tuple(part["seconds"] for part in facts[1:-1])
    return CheckpointReport(output, manifest, peak_memory_bytes(), seconds, finished)


def _choices(settings: CheckpointSettings) -> str | None:
    """Say what is chosen on the running float model, None if nothing is."""
    if settings.recipe is None or not needs_whole_model(settings.recipe, settings.budget):
        return None
    return "bits, clips or static scales are chosen on calibration text"


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
        kv_bits: Of the KV cache; one of 4 bits gets R3 unless the user chose otherwise.

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


def _equalized(
    settings: CheckpointSettings, plan: RotationPlan | None, is_fresh: bool
) -> Equalized:
    """Return which inputs are to have scales in front of the rotations.

    Args:
        settings: What the user asked for.
        plan: The rotation.
        is_fresh: It was drawn just now, and is not that of another artifact.

    Raises:
        ConfigError: The user asked for scales where there can be none.
    """
    wanted = settings.equalize
    if wanted is None:
        if plan is None or not is_fresh:
            return Equalized.NONE
        return default_equalization(settings.recipe, plan.names)
    if wanted is Equalized.NONE:
        return wanted
    if plan is None:
        raise ConfigError(
            f"--equalize {wanted} needs a rotation behind the scales: leave --rotate out"
        )
    if not is_fresh:
        raise ConfigError(
            f"--equalize {wanted}: the rotation is that of another artifact, with or without "
            f"scales of its own; leave --equalize out"
        )
    return wanted


def _require_blocks(
    settings: CheckpointSettings,
    plan: RotationPlan | None,
    names: DecoderNames,
    *,
    is_fresh: bool,
    scales_norms: bool,
) -> None:
    """Refuse blocks of channels for rotations that cannot act on them.

    Raises:
        ConfigError: No rotation acts at run time, the rotation is that of another artifact, or the
            size does not fit the model.
    """
    size = settings.rotation_block
    if size is None:
        return
    if plan is not None and not is_fresh:
        raise ConfigError(
            f"--rotation-block {size}: the rotation is that of another artifact, with or without "
            f"blocks of its own; leave --rotation-block out"
        )
    at_run_time = {RotationName.R4}
    if scales_norms or (plan is not None and not plan.rotates_stream(names)):
        at_run_time.add(RotationName.R1)
    at_run_time &= frozenset() if plan is None else plan.names
    if plan is None or not at_run_time:
        raise ConfigError(
            f"--rotation-block {size}: no rotation acts at run time (r4 does, and r1 with "
            f"--equalize all); leave --rotation-block out"
        )
    try:
        for name in sorted(at_run_time):
            plan.require_blocks(name, names, size)
    except ValueError as error:
        raise ConfigError(f"--rotation-block: {error}") from error


def _require_one_table(
    source: DecoderSource,
    adapter: StoredAdapter | None,
    plan: RotationPlan | None,
    *,
    scales_norms: bool,
) -> None:
    """Refuse to store one table for embedding and head where the head would have other numbers.

    Raises:
        ConfigError: The model is not tied, an adapter changes one of the two, or the gain of the
            final norm would be folded into the head.
    """
    name, names, model = source.loaded.name, source.names, source.loaded.model
    table = model.get_parameter(f"{names.embedding}.weight")
    if model.get_parameter(f"{names.head}.weight") is not table:
        raise ConfigError(
            f"--share-table: {name} has a head of its own (tie_word_embeddings is false, or its "
            f"files hold a head that differs from the embedding); leave --share-table out"
        )
    if adapter is not None and (
        changed := {names.embedding, names.head} & set(adapter.adapter.shapes())
    ):
        raise ConfigError(
            f"--share-table: the adapter changes {', '.join(sorted(changed))}, and embedding and "
            f"head are no longer one table; leave --share-table out"
        )
    if plan is not None and not scales_norms:
        raise ConfigError(
            "--share-table: without channel scales behind the norms the gain of the final norm is "
            "folded into the head, whose numbers are then no longer the embedding's; leave "
            "--equalize and --rotation out, keep R1 among --rotate, or give --rotate none"
        )


def _calibration(source: DecoderSource, settings: CheckpointSettings) -> list[dict[str, Tensor]]:
    return calibration_for(
        source.loaded,
        settings.calibration,
        windows=settings.calibration_windows,
        tokens=settings.calibration_tokens,
    )


def _plan(
    source: DecoderSource,
    settings: CheckpointSettings,
    batches: list[dict[str, Tensor]],
    progress: Callable[[str], None],
) -> CalibratedPlan:
    """Plan the linears, on the whole float model where calibration text has to choose."""
    recipe = settings.recipe
    if recipe is None:
        return CalibratedPlan([], {})
    model, names = source.loaded.model, source.names
    try:
        if not needs_whole_model(recipe, settings.budget):
            return CalibratedPlan(plan_layers(names, recipe, settings.overrides), {})
        progress("choosing bits, clips and static scales on calibration text")
        planned = calibrate_plan(model, names, recipe, batches, settings.overrides, settings.budget)
    except ValueError as error:
        raise ConfigError(f"{source.loaded.name}: cannot be quantized: {error}") from error
    release_free_memory()
    return planned
