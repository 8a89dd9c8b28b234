"""Measure a model's equalization: a pass of the float model over calibration text, part by part."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from deploy.adapter_artifact import StoredAdapter
from deploy.checkpoint_settings import CheckpointSettings
from deploy.decoder_source import decoder_parts, open_decoder
from deploy.errors import ConfigError
from deploy.memory import release_free_memory
from rolora.equalization import Equalization
from rolora.equalization_walk import EqualizationWalk


def measure_equalization(
    settings: CheckpointSettings,
    adapter: StoredAdapter | None,
    batches: list[dict[str, Tensor]],
    progress: Callable[[str], None] = lambda step: None,
) -> Equalization:
    """Return the scales of a model with its adapter merged.

    The model is opened by itself, so that whoever asks keeps theirs untouched.

    Args:
        settings: Which model and merge.
        adapter: To be merged, of the model's own basis.
        batches: Calibration text, at least one.
        progress: Called with a line for each step.

    Raises:
        ConfigError: Inputs or weights are not finite on the calibration text.
        As `open_decoder`.
    """
    source = open_decoder(settings.model, adapter, settings.merge)
    names = source.names
    source.begin(None, lambda: batches, progress)
    progress("measuring how loud each channel is")
    try:
        walk = EqualizationWalk(source.loaded.model, names, batches)
        embedding, *blocks, head = decoder_parts(names)
        walk.begin(source.rows(embedding))
        for part, block in zip(blocks, names.blocks, strict=True):
            source.load(part)
            walk.measure(block)
            source.release(part)
            release_free_memory()
        walk.measure_head(source.rows(head))
        return walk.result()
    except ValueError as error:
        raise ConfigError(f"{settings.model}: cannot be equalized: {error}") from error
