"""What can be merged: a decoder or a classifier, with what is theirs alone.

A decoder may carry an adapter that was trained in a rotated basis; it is observed there, and its
merge is taken back to the basis of the base model's files. Shortcuts are observed on running text.

A classifier has a head that was trained with the adapter, and labels that config.json will name.
Shortcuts are observed on labelled rows of the task, by default those the adapter was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deploy.adapter_artifact import StoredAdapter
from deploy.adapter_basis import to_original_basis
from deploy.architecture import decoder_names
from deploy.calibration_text import calibration_for
from deploy.classify import load_for_adapter
from deploy.encoder_calibration import labelled_batches, training_data
from deploy.encoder_loading import save_classifier
from deploy.loading import LoadedModel, load_model, quiet_transformers, save_tokenizer
from deploy.memory import release_free_memory
from deploy.module_layout import adapter_in_own_layout, save_in_own_layout
from deploy.rotate import rotate_model
from deploy.shortcut_merge import ChosenMerge, choose_merge, is_exact
from reslora.adapter import Adapter
from reslora.merge import MergeMethod
from reslora.peft_export import to_peft_adapter


class MergeSource(Protocol):
    """A base model, loaded, that an adapter can be merged into."""

    @property
    def loaded(self) -> LoadedModel:
        """The model in its own basis, unmerged."""

    @property
    def details(self) -> Mapping[str, Any]:
        """What the manifest of a written adapter must say of it."""

    def plain_merge(
        self, stored: StoredAdapter, method: MergeMethod | None
    ) -> tuple[Adapter, ChosenMerge]:
        """Return a merge as a plain LoRA adapter for the model's own basis, float64.

        Raises:
            ConfigError: There is nothing usable to observe shortcuts on.
            ValueError: The merge does not fit the adapter, or cannot leave its basis.
        """

    def calibration(self, stored: StoredAdapter) -> list[dict[str, Tensor]]:
        """Return forward-pass batches on which an adapter's shortcuts are observed.

        Raises:
            ConfigError: There is nothing usable.
        """

    def exported(self, plain: Adapter) -> Adapter:
        """Return a plain adapter for the linears that other programs see."""

    def save(self, directory: Path) -> None:
        """Write model and tokenizer as an ordinary Hugging Face directory."""


class DecoderSource:
    """A causal language model.

    Args:
        reference: As `load_model` takes it.
        calibration: Source of text; None is our own sample.
        windows: Windows of text to observe.
        tokens: Tokens of each.

    Raises:
        ConfigError, StageOrderError, ArtifactError, UnsupportedModelError: As `load_model`.
    """

    details: Mapping[str, Any] = {}

    def __init__(self, reference: str, calibration: str | None, windows: int, tokens: int) -> None:
        self._reference = reference
        self._calibration, self._windows, self._tokens = calibration, windows, tokens
        self.loaded = load_model(reference)

    def plain_merge(
        self, stored: StoredAdapter, method: MergeMethod | None
    ) -> tuple[Adapter, ChosenMerge]:
        """See `MergeSource`."""
        names = decoder_names(self.loaded.model.config)
        rotated = stored.rotation is not None and not is_exact(stored, method)
        if rotated and stored.rotation is not None:
            with torch.no_grad():
                rotate_model(self.loaded, names, stored.rotation)
        chosen = choose_merge(
            self.loaded.model, names, stored, method, lambda: self.calibration(stored)
        )
        if rotated:  # the weights as they came are needed: loading again beats keeping a copy
            self._load_again()
        return merged_plain_adapter(self.loaded.model, stored, chosen), chosen

    def exported(self, plain: Adapter) -> Adapter:
        """See `MergeSource`."""
        return adapter_in_own_layout(plain, self.loaded.model.config)

    def save(self, directory: Path) -> None:
        """See `MergeSource`."""
        with quiet_transformers():
            save_in_own_layout(self.loaded.model, directory)
        save_tokenizer(self.loaded, directory)

    def calibration(self, stored: StoredAdapter) -> list[dict[str, Tensor]]:
        """See `MergeSource`."""
        return calibration_for(
            self.loaded, self._calibration, windows=self._windows, tokens=self._tokens
        )

    def _load_again(self) -> None:
        digest = self.loaded.digest
        del self.loaded
        release_free_memory()
        self.loaded = load_model(self._reference)
        if self.loaded.digest != digest:
            raise ValueError(f"{self._reference} changed while it was being merged")


class ClassifierSource:
    """An encoder with a classification head.

    Args:
        reference: As `load_classifier` takes it.
        stored: The adapter, whose labels the model gets.
        calibration: Source of labelled rows; None is the adapter's own training data.

    Raises:
        ConfigError, StageOrderError, ArtifactError, UnsupportedModelError: As `load_for_adapter`.
    """

    def __init__(self, reference: str, stored: StoredAdapter, calibration: str | None) -> None:
        self._calibration = calibration
        self.opened = load_for_adapter(reference, stored)
        self.loaded = self.opened.loaded
        self.details = {"labels": list(self.opened.labels.names)}

    def plain_merge(
        self, stored: StoredAdapter, method: MergeMethod | None
    ) -> tuple[Adapter, ChosenMerge]:
        """See `MergeSource`."""
        chosen = choose_merge(
            self.loaded.model, None, stored, method, lambda: self.calibration(stored)
        )
        return merged_plain_adapter(self.loaded.model, stored, chosen), chosen

    def exported(self, plain: Adapter) -> Adapter:
        """See `MergeSource`; its linears are those of the files."""
        return plain

    def save(self, directory: Path) -> None:
        """See `MergeSource`."""
        save_classifier(self.loaded, directory)

    def calibration(self, stored: StoredAdapter) -> list[dict[str, Tensor]]:
        """See `MergeSource`; without labels, in the order of the data set."""
        return labelled_batches(self.opened, self._calibration or training_data(stored))


def merged_plain_adapter(
    model: PreTrainedModel, stored: StoredAdapter, chosen: ChosenMerge
) -> Adapter:
    """Return a merge as a plain LoRA adapter, float64, in the model's own basis.

    Args:
        model: The base model as it came, not folded or rotated; read for its norm gains.
        stored: The adapter.
        chosen: From `choose_merge`, observed in the adapter's basis.

    Invariant: merged into `model`, it computes what the merge in the adapter's basis computes.

    Raises:
        ValueError: The merge does not fit the adapter, or cannot be taken back to that basis.
    """
    plain = to_peft_adapter(stored.adapter, chosen.method, chosen.statistics, dtype=torch.float64)
    if stored.rotation is None:
        return plain
    return to_original_basis(plain, stored.rotation, decoder_names(model.config), model)
