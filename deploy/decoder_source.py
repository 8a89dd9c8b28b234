"""Where the walk through a decoder gets its float parts: merged, rotated, one at a time.

    StreamedDecoder   reads a part from disk when its turn comes, then merges and rotates it
    ResidentDecoder   has the whole model in memory, merged and rotated beforehand

Both give the same numbers. The second is for what needs the whole model at once: a merge that is an
approximation, because it is measured on the running model; bits, clips and static scales that are
chosen on it; and a GGUF file, which transformers dequantizes as a whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deploy.adapter_artifact import StoredAdapter
from deploy.architecture import decoder_names
from deploy.errors import ArtifactError
from deploy.loading import LoadedModel, load_model
from deploy.model_location import locate_model
from deploy.rotate import rotate_model
from deploy.shortcut_merge import is_exact, merge_stored_adapter, require_method
from deploy.weight_stream import WeightReader, open_weight_stream, set_weight
from reslora.chains import find_chains
from reslora.merge import MergedLayer, MergeMethod, MergeReport, matching_weights, merge_adapter
from rolora.decoder import DecoderNames
from rolora.fold import untie_head
from rolora.online import install_online_rotations
from rolora.quantization_walk import rows_in_memory
from rolora.rotation import RotationPlan


@dataclass(frozen=True)
class Part:
    """What is worked on at a time: the embedding, a block, or the final norm with the head."""

    name: str
    modules: tuple[str, ...]
    """FQNs that hold all its tensors."""
    weights: tuple[str, ...]
    """FQNs of the modules in it that rotation and merge rewrite."""


def decoder_parts(names: DecoderNames) -> list[Part]:
    """Return the parts of a decoder in the order in which data meets them."""
    blocks = [
        Part(f"block-{i:04}", (block.fqn,), block.linears()) for i, block in enumerate(names.blocks)
    ]
    return [
        Part("embedding", (names.embedding,), (names.embedding,)),
        *blocks,
        Part("head", (names.final_norm, names.head), (names.head,)),
    ]


class DecoderSource(ABC):
    """A model whose parts are asked for in order.

    Args:
        loaded: The model; its weights may be on the meta device.
        names: Its parts.
        adapter: To be merged, if any.
    """

    def __init__(
        self, loaded: LoadedModel, names: DecoderNames, adapter: StoredAdapter | None
    ) -> None:
        self.loaded = loaded
        self.names = names
        self.adapter = adapter
        self.whole_because: str | None = None
        """Why the whole model is in memory; None where only its parts are."""

    @abstractmethod
    def begin(
        self,
        plan: RotationPlan | None,
        calibration: Callable[[], list[dict[str, Tensor]]],
        progress: Callable[[str], None],
    ) -> None:
        """Make ready for the first part; again, in front of a rotation, if it was without one.

        Args:
            plan: The rotation, of the adapter if that has one; online rotations are installed.
            calibration: Gives batches to a merge by approximation.
            progress: Called with a line for each step.

        Raises:
            ArtifactError: Adapter or rotation do not fit the weights.
            ConfigError: The merge method does not fit the adapter.
        """

    @abstractmethod
    def load(self, part: Part) -> list[dict[str, Any]]:
        """Put the final float weights of a part into the model's modules.

        Returns:
            What the merge did to each of its layers, as plain data.
        """

    @abstractmethod
    def rows(self, part: Part) -> Iterator[Tensor]:
        """Yield the final rows of the embedding or the head, float32 [n, hidden_size] at a time.

        The part need not be loaded; for the head the final norm is in memory from the first on.
        """

    @abstractmethod
    def merge_report(self, layers: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the report of the merge, from what `load` returned for all parts."""

    def release(self, part: Part) -> None:
        """Give back the memory of a part that is stored."""
        for fqn in part.modules:
            self.loaded.model.get_submodule(fqn).to("meta")


class ResidentDecoder(DecoderSource):
    """The whole model in memory."""

    _report: dict[str, Any] | None = None

    def __init__(
        self,
        loaded: LoadedModel,
        names: DecoderNames,
        adapter: StoredAdapter | None,
        method: MergeMethod | None,
        because: str,
    ) -> None:
        super().__init__(loaded, names, adapter)
        self._method = method
        self.whole_because = because

    def begin(
        self,
        plan: RotationPlan | None,
        calibration: Callable[[], list[dict[str, Tensor]]],
        progress: Callable[[str], None],
    ) -> None:
        """Merge and rotate all of it."""
        loaded, names, adapter = self.loaded, self.names, self.adapter
        rotate_first = adapter is not None and adapter.rotation is not None
        with torch.no_grad():
            if rotate_first and plan is not None:
                progress("rotating into the adapter's basis")
                rotate_model(loaded, names, plan)
            if adapter is not None and self._report is None:
                progress(f"merging {adapter.directory}")
                with _merge_faults(adapter):
                    self._report = merge_stored_adapter(
                        loaded.model, names, adapter, self._method, calibration
                    )
            if plan is None:
                untie_head(loaded.model, names)
            elif not rotate_first:
                progress(f"rotating with {', '.join(sorted(plan.names))}")
                rotate_model(loaded, names, plan)
            if plan is not None:
                install_online_rotations(loaded.model, plan, names)

    def load(self, part: Part) -> list[dict[str, Any]]:
        """Do nothing: it is there."""
        return []

    def rows(self, part: Part) -> Iterator[Tensor]:
        """Yield slices of the weight."""
        return rows_in_memory(self.loaded.model, part.weights[0])

    def merge_report(self, layers: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the report of the one merge."""
        return self._report


class StreamedDecoder(DecoderSource):
    """Parts that are read from disk in their turn."""

    _plan: RotationPlan | None = None

    def __init__(
        self,
        loaded: LoadedModel,
        names: DecoderNames,
        adapter: StoredAdapter | None,
        reader: WeightReader,
    ) -> None:
        super().__init__(loaded, names, adapter)
        self._reader = reader

    def begin(
        self,
        plan: RotationPlan | None,
        calibration: Callable[[], list[dict[str, Tensor]]],
        progress: Callable[[str], None],
    ) -> None:
        """Check that the adapter fits; the work comes with the parts."""
        self._plan = plan
        untie_head(self.loaded.model, self.names)
        if plan is not None:
            install_online_rotations(self.loaded.model, plan, self.names)
        if self.adapter is not None:
            with _merge_faults(self.adapter):
                matching_weights(self.loaded.model, self.adapter.adapter)

    def load(self, part: Part) -> list[dict[str, Any]]:
        """Read, merge and rotate a part."""
        for fqn in part.modules:
            self._read(fqn)
        return self._rewrite(part)

    def rows(self, part: Part) -> Iterator[Tensor]:
        """Read and rotate a chunk of rows at a time, each in the place of the whole matrix."""
        fqn, model = part.weights[0], self.loaded.model
        whole = model.get_parameter(f"{fqn}.weight")
        if whole.device.type != "meta":
            yield from rows_in_memory(model, fqn)
            return
        try:
            for chunk in self._reader.rows(f"{fqn}.weight"):
                # The gain of the final norm too, which folding sets to 1 every time.
                for other in set(part.modules) - {fqn}:
                    self._read(other)
                set_weight(model, f"{fqn}.weight", chunk)
                self._rewrite(part)
                yield model.get_parameter(f"{fqn}.weight").detach()
        finally:
            set_weight(model, f"{fqn}.weight", whole)

    def merge_report(self, layers: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Join what the merges of the parts did."""
        if self.adapter is None:
            return None
        stored = self.adapter.adapter
        by_fqn = {layer["fqn"]: MergedLayer(**layer) for layer in layers}
        order = [fqn for chain in find_chains(stored.shapes()) for fqn in chain.fqns]
        joined = tuple(by_fqn[fqn] for fqn in order)
        return MergeReport(MergeMethod.EXACT, stored.config.structure, joined).to_dict()

    def _read(self, fqn: str) -> None:
        module = self.loaded.model.get_submodule(fqn)
        for name, _ in list(module.named_parameters()):
            set_weight(self.loaded.model, f"{fqn}.{name}", self._reader.read(f"{fqn}.{name}"))

    def _rewrite(self, part: Part) -> list[dict[str, Any]]:
        """Merge and rotate, in the order of the adapter's basis."""
        rotate_first = self.adapter is not None and self.adapter.rotation is not None
        with torch.no_grad():
            if rotate_first:
                self._rotate(part)
            merged = self._merge(part)
            if not rotate_first:
                self._rotate(part)
        return merged

    def _rotate(self, part: Part) -> None:
        if self._plan is not None:
            rotate_model(self.loaded, self.names, self._plan, part.weights)

    def _merge(self, part: Part) -> list[dict[str, Any]]:
        if self.adapter is None:
            return []
        with _merge_faults(self.adapter):
            report = merge_adapter(
                self.loaded.model, self.adapter.adapter, MergeMethod.EXACT, only=part.weights
            )
        return list(report.to_dict()["layers"])


def open_decoder(
    reference: str,
    adapter: StoredAdapter | None,
    method: MergeMethod | None,
    needs_whole: str | None = None,
) -> DecoderSource:
    """Open a model in the way that its files, the merge and what comes behind it allow.

    Args:
        reference: See `deploy.loading.load_model`.
        adapter: To be merged, if any.
        method: How; None is the nearest.
        needs_whole: Why the whole model must be in memory; None if nothing behind the merge asks
            for it.

    Raises:
        As `load_model`.
        ConfigError: The merge method does not fit the adapter.
    """
    if adapter is not None:
        require_method(adapter, method)
        if not is_exact(adapter, method):
            needs_whole = "the merge is an approximation, measured on the running model"
    if needs_whole is None:
        opened = open_weight_stream(locate_model(reference))
        if opened is None:
            needs_whole = "transformers has to read or rename the tensors of its files"
        else:
            loaded, reader = opened
            names = decoder_names(loaded.model.config)
            if adapter is None or set(adapter.adapter.shapes()) <= set(names.linears()):
                return StreamedDecoder(loaded, names, adapter, reader)
            # What an adapter changes elsewhere is no part's; the whole model takes or refuses it.
            needs_whole = "the adapter changes more than the linears of the blocks"
    loaded = load_model(reference)
    return ResidentDecoder(loaded, decoder_names(loaded.model.config), adapter, method, needs_whole)


@contextmanager
def _merge_faults(adapter: StoredAdapter) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ArtifactError(f"{adapter.directory}: cannot be merged: {error}") from error
