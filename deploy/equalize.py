"""Measure a model's equalization: a pass of the float model over calibration text, part by part."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from deploy.checkpoint_settings import CheckpointSettings
from deploy.decoder_source import DecoderSource, decoder_parts
from deploy.errors import ConfigError
from deploy.memory import release_free_memory
from rolora.equalization import Equalization, Equalized, louder_noise
from rolora.equalization_walk import EqualizationWalk


def measure_equalization(
    source: DecoderSource,
    settings: CheckpointSettings,
    inputs: Equalized,
    batches: list[dict[str, Tensor]],
    progress: Callable[[str], None] = lambda step: None,
) -> Equalization:
    """Return the scales of a model with its adapter merged; the source can begin anew behind it.

    Args:
        source: Begun without a rotation.
        settings: What comes behind it.
        inputs: Which have scales.
        batches: Calibration text, at least one.
        progress: Called with a line for each step.

    Raises:
        ConfigError: Inputs or weights are not finite on the calibration text.
    """
    names = source.names
    progress("measuring how loud each channel is")
    try:
        noise = louder_noise(settings.recipe)
        walk = EqualizationWalk(source.loaded.model, names, batches, noise, inputs)
        embedding, *blocks, head = decoder_parts(names)
        walk.begin(source.rows(embedding))
        for part, block in zip(blocks, names.blocks, strict=True):
            source.load(part)
            walk.measure(block)
            if source.whole_because is None:
                source.release(part)
                release_free_memory()
        if inputs is Equalized.ALL:
            (walk.keep_head if settings.shares_table else walk.measure_head)(source.rows(head))
        return walk.result()
    except ValueError as error:
        raise ConfigError(f"{settings.model}: cannot be equalized: {error}") from error
