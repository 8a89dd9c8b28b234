"""What a training run learns from: rows, their sizes, and how they become batches.

The training loop knows no task. A task is a function that makes `TrainingData` of examples; this
one makes it for causal language models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import EvalPrediction, PreTrainedTokenizerBase

from reslora.batches import Row, TokenSequence, collate_rows, encode_examples, pack_sequences
from reslora.row_formats import Example
from reslora.rows import split_validation
from reslora.settings import TrainSettings


@dataclass(frozen=True)
class TrainingData:
    """Rows of one run. Equal rows have equal `repr`, by which resumed runs know their data."""

    train: Sequence[Any]
    train_lengths: Sequence[int]
    """Tokens of each training row."""
    validation: Sequence[Any]
    """In the order in which they are evaluated; empty where nothing is held out."""
    collate: Callable[[Sequence[Any]], dict[str, Any]]
    """Makes a batch for the model's forward pass, `labels` included, of some rows."""
    measure: Callable[[EvalPrediction], dict[str, float]] | None = None
    """Metrics of the predictions for `validation`; None where the loss is all there is."""
    metrics: tuple[str, ...] = ()
    """Names of what `measure` returns, the task's main one first."""

    def digest(self) -> str:
        """Return the sha256 over the training rows."""
        return _digest(self.train)

    def validation_digest(self) -> str:
        """Return the sha256 over the validation rows."""
        return _digest(self.validation)


def language_data(
    examples: Sequence[Example],
    validation: Sequence[Example] | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainSettings,
) -> TrainingData:
    """Return the data of a causal language model: the next token of every completion.

    Args:
        examples: Training examples.
        validation: Validation examples; None splits `settings.validation_fraction` off `examples`.
        tokenizer: The model's tokenizer.
        settings: The run's settings.

    Raises:
        ValueError: As `encode_examples`.
    """
    if validation is None:
        examples, validation = split_validation(
            examples, settings.validation_fraction, settings.seed
        )
    train = _rows(encode_examples(examples, tokenizer, settings.max_tokens), settings)
    held_out: list[Row] = []
    if validation:
        held_out = _rows(encode_examples(validation, tokenizer, settings.max_tokens), settings)
        held_out.sort(key=_row_length)
    # Padding is masked, so any id does; the tokenizer's own may be one the model does not know.
    collate = partial(collate_rows, pad_id=0)
    return TrainingData(train, [_row_length(row) for row in train], held_out, collate)


def _digest(rows: Sequence[Any]) -> str:
    data = hashlib.sha256()
    for row in rows:
        data.update(repr(row).encode())
    return data.hexdigest()


def _rows(sequences: Sequence[TokenSequence], settings: TrainSettings) -> list[Row]:
    if settings.packing:
        return pack_sequences(sequences, settings.max_tokens)
    return [(sequence,) for sequence in sequences]


def _row_length(row: Row) -> int:
    return sum(map(len, row))
