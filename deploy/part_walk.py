"""Work on the parts of a decoder that are not stored yet: quantize, calibrate the cache, store."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from deploy.checkpoint import stored_tensors, table_keys
from deploy.checkpoint_reader import formats_to_details
from deploy.checkpoint_settings import CheckpointSettings
from deploy.decoder_source import DecoderSource, Part, decoder_parts
from deploy.errors import ConfigError
from deploy.memory import release_free_memory
from deploy.part_store import PartStore
from rolora.calibrated_plan import CalibratedPlan
from rolora.kv_attention import CacheWalk
from rolora.kv_cache import FLOAT_KV_BITS
from rolora.packing import unpack_int4
from rolora.quantization_walk import QuantizationWalk
from rolora.quantize import LayerError
from rolora.rotation import RotationPlan


class PartWalk:
    """Takes a decoder's parts in order; each is stored before the next is loaded.

    Args:
        source: Of the float parts, begun.
        settings: What to do with them.
        planned: How each linear is quantized.
        rotation: In force; its R3 rotates the keys of a quantized cache, and its equalization is
            stored with each part, so that a run which goes on works in the same basis.
        batches: Calibration text, if anything needs it.
        store: Of the finished parts; those in it are not worked on again.
        layer_progress: Called with the numbers of quantized layers and of all.
    """

    def __init__(
        self,
        source: DecoderSource,
        settings: CheckpointSettings,
        planned: CalibratedPlan,
        rotation: RotationPlan | None,
        batches: Sequence[dict[str, Tensor]],
        store: PartStore,
        layer_progress: Callable[[int, int], None],
    ) -> None:
        self._source = source
        self._store = store
        self._formats = formats_to_details(planned.plans)
        equalization = None if rotation is None else rotation.equalization
        self._scales = {} if equalization is None else equalization.to_tensors()
        model, names = source.loaded.model, source.names
        done = sum(len(part.facts["rounding"]) for part in store.parts)
        numbers = itertools.count(done + 1)

        def count(_fqn: str) -> None:
            release_free_memory()
            layer_progress(next(numbers), len(planned.plans))

        self._walk: QuantizationWalk | None = None
        self._shares_table = settings.shares_table
        if settings.recipe is not None:
            table_rotation = rotation.r1 if self._shares_table and rotation is not None else None
            self._walk = QuantizationWalk(
                model, names, settings.recipe, batches, count, planned, table_rotation
            )
        self._cache: CacheWalk | None = None
        if settings.kv_bits != FLOAT_KV_BITS:
            r3 = None if rotation is None else rotation.r3
            dense = None if r3 is None else r3.dense().float()
            self._cache = CacheWalk(model, names, settings.kv_bits, dense, batches)

    def run(self) -> None:
        """Do all that is left.

        Raises:
            ConfigError: A part cannot be quantized, or the finished ones were quantized otherwise
                than this run would do it.
        """
        finished = self._store.parts
        remaining = list(enumerate(decoder_parts(self._source.names)))[len(finished) :]
        try:
            if finished:
                self._require_same_formats()
            if finished and remaining:
                states = self._store.states()
                # In this order: attention masks stay those of a model without codecs.
                if self._walk is not None:
                    self._walk.restore(states)
                if self._cache is not None:
                    self._cache.restore(states)
            for index, part in remaining:
                self._do(part, index)
        except ValueError as error:
            name = self._source.loaded.name
            raise ConfigError(f"{name}: cannot be quantized: {error}") from error

    def _require_same_formats(self) -> None:
        """Refuse parts of an interrupted run whose choices on calibration text were others."""
        before = self._store.parts[0].facts["linears"]
        differing = sorted(
            fqn for fqn in {*before, *self._formats} if before.get(fqn) != self._formats.get(fqn)
        )
        if differing:
            raise ConfigError(
                f"{self._store.directory}: holds parts for which {differing[0]} and "
                f"{len(differing) - 1} others were given other bits or scales than this machine "
                f"chooses; go on where they were made, or give --no-resume to begin anew"
            )

    def _do(self, part: Part, index: int) -> None:
        started = time.monotonic()
        source, names, walk = self._source, self._source.names, self._walk
        weight = part.weights[0]
        is_table = weight in (names.embedding, names.head)
        # A table that becomes integers is taken a chunk of rows at a time and never held as floats.
        by_rows = walk is not None and is_table and walk.quantizes(weight)
        merged = [] if by_rows else source.load(part)
        errors: list[LayerError] = []
        if walk is not None:
            if weight == names.embedding:
                walk.quantize_embedding(source.rows(part))
            elif weight == names.head:
                table = self._table() if self._shares_table else None
                errors = walk.quantize_head(source.rows(part), table)
            else:
                errors = walk.quantize_block(names.blocks[index - 1])
        self._calibrate_cache(part, index)
        facts: dict[str, Any] = {"rounding": [asdict(error) for error in errors], "merged": merged}
        if weight == names.embedding:
            facts["linears"] = self._formats
        states = self._scales if weight == names.head else self._scales | self._states()
        tensors = stored_tensors(source.loaded.model, part.modules)
        if self._shares_table:  # it lies in the first part
            for key in table_keys(names.head):
                tensors.pop(key, None)
        seconds = {"seconds": time.monotonic() - started}
        self._store.add(part.name, tensors, states, facts | seconds)
        del tensors
        source.release(part)
        release_free_memory()

    def _table(self) -> tuple[Tensor, Tensor]:
        """Read the embedding's integers, int8 [V, D], and scales back."""
        first = load_file(self._store.path(self._store.parts[0].name))
        integers, scales = (first[key] for key in table_keys(self._source.names.embedding))
        packed = integers.dtype == torch.uint8
        return (unpack_int4(integers) if packed else integers), scales

    def _calibrate_cache(self, part: Part, index: int) -> None:
        """Move on the states that the caches see, behind the quantization of the same part."""
        names = self._source.names
        if self._cache is None or part.weights[0] == names.head:
            return
        try:
            if part.weights[0] == names.embedding:
                self._cache.begin()
            else:
                self._cache.calibrate(names.blocks[index - 1])
        except ValueError as error:
            raise ConfigError(
                f"{self._source.loaded.name}: its KV cache cannot be quantized: {error}"
            ) from error

    def _states(self) -> dict[str, Tensor]:
        states = {} if self._walk is None else self._walk.state()
        return states if self._cache is None else states | self._cache.state()
