"""What the fine-tuning stage does differently for each task: rows, model, targets, batches.

language         a decoder learns to continue text (rows of `row_formats`)
classification   an encoder learns labels (rows of `labelled_rows`); its head is trained too
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import partial
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedConfig

from deploy.architecture import decoder_names, resolve_targets
from deploy.encoder_architecture import ENCODER_HEAD, encoder_targets
from deploy.encoder_loading import load_classifier
from deploy.errors import ConfigError
from deploy.known_tokens import require_known_tokens
from deploy.loading import LoadedModel, load_model
from reslora.classification import classification_data
from reslora.labelled_rows import find_labels, read_labelled_rows, require_same_kind
from reslora.rows import read_rows
from reslora.settings import TrainSettings
from reslora.training_data import TrainingData, language_data

logger = logging.getLogger(__name__)

Rows = TypeVar("Rows")


class TrainingTask(StrEnum):
    """What a model learns."""

    LANGUAGE = "language"
    CLASSIFICATION = "classification"


class TaskRows(Protocol):
    """The rows of one run, read and checked, and what they ask of a model."""

    @property
    def count(self) -> int:
        """Rows for training and, where none are given apart, validation."""

    @property
    def head(self) -> str | None:
        """Name of the module that is trained as a whole."""

    @property
    def details(self) -> Mapping[str, Any]:
        """Facts for the adapter's manifest."""

    def load(self, reference: str) -> LoadedModel:
        """Load a model that can learn from these rows."""

    def targets(self, config: PreTrainedConfig, targets: str) -> list[str]:
        """Return the FQNs of the linears that `--targets` means."""

    def data(self, loaded: LoadedModel, settings: TrainSettings) -> TrainingData:
        """Return batches for the loaded model.

        Raises:
            ConfigError: A row has a token that the model does not know.
            ValueError: There is nothing to learn.
        """


def read_task_rows(
    task: TrainingTask, data: str, validation: str | None, training: TrainSettings
) -> TaskRows:
    """Read the rows of a task, before any model is loaded.

    Args:
        task: What is learned.
        data: Source of the training rows.
        validation: Source of the validation rows; None splits them off.
        training: The run's settings.

    Raises:
        ConfigError: A source or a row cannot be used.
    """
    if task is TrainingTask.CLASSIFICATION:
        return _Labelled(data, validation, training)
    return _Language(data, validation)


class _Language:
    head = None
    details: Mapping[str, Any] = {}

    def __init__(self, data: str, validation: str | None) -> None:
        self._examples = _usable(read_rows, data)
        self._validation = None if validation is None else _usable(read_rows, validation)
        self.count = len(self._examples)

    def load(self, reference: str) -> LoadedModel:
        return load_model(reference)

    def targets(self, config: PreTrainedConfig, targets: str) -> list[str]:
        return resolve_targets(decoder_names(config), targets)

    def data(self, loaded: LoadedModel, settings: TrainSettings) -> TrainingData:
        data = language_data(self._examples, self._validation, loaded.tokenizer, settings)
        require_known_tokens(
            (part.input_ids for row in (*data.train, *data.validation) for part in row),
            loaded.model.config.vocab_size,
        )
        return data


class _Labelled:
    head = ENCODER_HEAD

    def __init__(self, data: str, validation: str | None, training: TrainSettings) -> None:
        if training.packing:
            raise ConfigError("--packing: rows of --task classification are not packed; leave it")
        self._examples = _usable(read_labelled_rows, data)
        self._validation = None if validation is None else _usable(read_labelled_rows, validation)
        self._seed = training.seed
        self._limit = 0
        self.labels = _usable(find_labels, self._examples)
        if self._validation is not None:
            _usable(partial(require_same_kind, training=self._examples), self._validation)
        self.count = len(self._examples)

    @property
    def details(self) -> Mapping[str, Any]:
        return {"labels": list(self.labels.names)}

    def load(self, reference: str) -> LoadedModel:
        opened = load_classifier(reference, self.labels, seed=self._seed)
        self.labels = opened.labels
        self._limit = opened.token_limit
        origin = "is new" if opened.head_is_new else "is the model's own"
        logger.info("classes: %s; the head %s", ", ".join(self.labels.names[:10]) or "none", origin)
        return opened.loaded

    def targets(self, config: PreTrainedConfig, targets: str) -> list[str]:
        return encoder_targets(config, targets)

    def data(self, loaded: LoadedModel, settings: TrainSettings) -> TrainingData:
        if settings.max_tokens > self._limit:
            raise ValueError(
                f"max_tokens is {settings.max_tokens}, but {loaded.name} reads at most "
                f"{self._limit}; lower --max-tokens"
            )
        data = classification_data(
            self._examples, self._validation, loaded.tokenizer, settings, self.labels
        )
        require_known_tokens(
            (row.input_ids for row in (*data.train, *data.validation)),
            loaded.model.config.vocab_size,
        )
        return data


def _usable(read: Callable[[Any], Rows], source: Any) -> Rows:
    try:
        return read(source)
    except ValueError as error:
        raise ConfigError(str(error)) from error
