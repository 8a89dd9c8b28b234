"""The middle stage for encoders: model (+ adapter) -> merged, quantized checkpoint.

What decoders get (`merge_rotate_quantize`), but for what LayerNorms, a missing KV cache and small
models make pointless: nothing is rotated, and the whole model is in memory at once.

Quantized are the six linears of every block and the token embeddings. The other embeddings, which
are small, and pooler and classifier, which read one token of a text and decide its label, stay in
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

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
from deploy.checkpoint import write_model
from deploy.checkpoint_report import CheckpointReport, quantization_details
from deploy.checkpoint_settings import CheckpointSettings
from deploy.classify import load_for_adapter
from deploy.encoder_architecture import encoder_names, encoder_token_limit
from deploy.encoder_calibration import (
    labelled_batches,
    single_rows,
    text_batches,
    training_data,
)
from deploy.encoder_checkpoint import LABELS
from deploy.encoder_loading import LoadedClassifier, load_encoder
from deploy.errors import ArtifactError, ConfigError
from deploy.loading import LoadedModel, save_tokenizer
from deploy.memory import peak_memory_bytes
from deploy.shortcut_merge import merge_stored_adapter
from reslora.labelled_rows import LabelScheme
from rolora.calibrated_plan import CalibratedPlan, calibrate_plan, needs_whole_model
from rolora.encoder import EncoderNames
from rolora.equalization import Equalized
from rolora.kv_cache import FLOAT_KV_BITS
from rolora.layer_plan import plan_layers
from rolora.quantization_walk import quantize_model
from rolora.quantize import LayerError
from rolora.scheme import FLOAT_BITS, Granularity, WeightMethod


def quantize_encoder(
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
        ConfigError: The output exists, an option is for decoders only, or there is nothing usable
            to calibrate on.
        ArtifactError: A file is damaged, or the adapter belongs to another model.
        UnsupportedModelError: The model is of another family.
    """
    _refuse_decoder_options(settings)
    if settings.recipe is not None:
        recipe = settings.recipe.in_basis(rotated=False, scaled=False)
        settings = replace(settings, recipe=recipe)
    progress(f"loading {settings.model}")
    stored = None if settings.adapter is None else open_adapter(settings.adapter)
    opened = _Opened(settings, stored)
    loaded = opened.loaded
    parents = loaded.parents() | hash_sources({"calibration": settings.calibration})
    if stored is not None:
        parents["adapter"] = stored.manifest_digest
    wanted = Manifest(ArtifactKind.CHECKPOINT, parents, settings.to_config(), library_versions())
    if done := finished_artifact(output, wanted, progress):
        return CheckpointReport(output, done, peak_memory_bytes())
    with new_artifact(output) as directory:
        merged = None
        if stored is not None:
            progress(f"merging {stored.directory}")
            merged = opened.merge(stored)
        progress("quantizing")
        planned, errors = opened.quantize(layer_progress)
        progress("writing the checkpoint")
        loaded.model.config.architectures = [type(loaded.model).__name__]
        loaded.model.config.save_pretrained(directory)
        save_tokenizer(loaded, directory)
        write_model(directory, loaded.model)
        rounding = [asdict(error) for error in errors]
        details = quantization_details(settings.recipe, planned, rounding, merged)
        if opened.labels is not None:
            details[LABELS] = list(opened.labels.names)
        manifest = write_manifest(directory, replace(wanted, details=details))
    return CheckpointReport(output, manifest, peak_memory_bytes())


def _refuse_decoder_options(settings: CheckpointSettings) -> None:
    """Refuse what an encoder has no place for.

    Raises:
        ConfigError: There is such an option; the message names all.
    """
    faults = []
    rotated = settings.rotation is not None and settings.rotation.names
    if rotated or settings.stored_rotation is not None:
        faults.append(
            "an encoder is not rotated: R1 passes RMSNorms, not its LayerNorms; leave --rotate, "
            "--rotation-kind, --rotation-seed and --rotation out, or give --rotate none"
        )
    if settings.rotation_block is not None:
        faults.append("no rotation has blocks there; leave --rotation-block out")
    if settings.equalize not in (None, Equalized.NONE):
        faults.append(
            "channel scales need a rotation behind them; leave --equalize out, or give none"
        )
    if settings.kv_bits != FLOAT_KV_BITS:
        faults.append("an encoder has no KV cache; leave --kv-bits out")
    if settings.budget is not None:
        faults.append(
            "--mixed-precision is chosen on the loss of the next token, which an encoder does not "
            "predict; use --override"
        )
    if settings.shares_table:
        faults.append("an encoder has no head over its vocabulary; leave --share-table out")
    if settings.recipe is not None and settings.recipe.head_bits != FLOAT_BITS:
        faults.append(
            f"pooler and classifier stay in float; leave --head-bits out, or give {FLOAT_BITS}"
        )
    if faults:
        raise ConfigError.from_faults(f"model {settings.model}", faults)


class _Opened:
    """An encoder at work in the stage.

    Args:
        settings: Of the stage.
        stored: An adapter to be merged, which brings a head and its labels.
    """

    loaded: LoadedModel
    labels: LabelScheme | None

    def __init__(self, settings: CheckpointSettings, stored: StoredAdapter | None) -> None:
        self._settings = settings
        if stored is None:
            self.loaded, self.labels = load_encoder(settings.model)
        else:
            classifier = load_for_adapter(settings.model, stored)
            self.loaded, self.labels = classifier.loaded, classifier.labels
        self.names: EncoderNames = encoder_names(
            self.loaded.model.config, with_head=self.labels is not None
        )
        self._stored = stored

    def merge(self, stored: StoredAdapter) -> dict[str, Any]:
        """Merge an adapter and return the report."""
        try:
            return merge_stored_adapter(
                self.loaded.model, None, stored, self._settings.merge, self._labelled
            )
        except ValueError as error:
            raise ArtifactError(f"{stored.directory}: cannot be merged: {error}") from error

    def quantize(
        self, layer_progress: Callable[[int, int], None]
    ) -> tuple[CalibratedPlan, list[LayerError]]:
        """Quantize the model in place; return the plan and the error of each linear."""
        recipe, overrides = self._settings.recipe, self._settings.overrides
        if recipe is None:
            return CalibratedPlan([], {}), []
        model, names = self.loaded.model, self.names
        done = count(1)
        try:
            plans = plan_layers(names, recipe, overrides)
            observed = recipe.weights is WeightMethod.GPTQ or any(
                plan.activation.granularity is Granularity.TENSOR for plan in plans
            )
            batches = self._calibration() if observed or needs_whole_model(recipe) else []
            planned = CalibratedPlan(plans, {})
            if needs_whole_model(recipe):
                planned = calibrate_plan(model, names, recipe, batches, overrides)
            errors = quantize_model(
                model,
                names,
                recipe,
                batches,
                lambda _fqn: layer_progress(next(done), len(plans)),
                planned,
            )
        except ValueError as error:
            raise ConfigError(f"{self.loaded.name}: cannot be quantized: {error}") from error
        return planned, errors

    def _calibration(self) -> list[dict[str, Tensor]]:
        """Return rows of the task where there are any, else texts."""
        source, has_rows = self._settings.calibration, self._stored is not None
        if has_rows or (source is not None and self.labels is not None):
            return single_rows(self._labelled())
        limit = encoder_token_limit(self.loaded.model.config)
        return text_batches(
            self.loaded, source, token_limit=min(limit, self._settings.calibration_tokens)
        )

    def _labelled(self) -> list[dict[str, Tensor]]:
        assert self.labels is not None
        source = self._settings.calibration
        if source is None:
            assert self._stored is not None
            source = training_data(self._stored)
        return labelled_batches(LoadedClassifier(self.loaded, self.labels, False), source)
