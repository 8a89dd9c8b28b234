"""From labelled rows to batches of an encoder: tokens, truncation, padding, metrics.

A pair of texts is one row, joined as the tokenizer joins pairs and cut where it is longer. Padding
is on the right and masked, so that it takes part neither in attention nor in what is observed for a
merge.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction, PreTrainedTokenizerBase

from reslora.labelled_rows import LabelledExample, LabelScheme
from reslora.metrics import label_metrics, metric_names
from reslora.rows import split_validation
from reslora.settings import TrainSettings
from reslora.training_data import TrainingData

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledTokens:
    """One row, tokenized."""

    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...] | None
    """Which text a token is of; None where the tokenizer does not say."""
    target: int | float
    """Class index, or the number of a regression."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)


def classification_data(
    examples: Sequence[LabelledExample],
    validation: Sequence[LabelledExample] | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainSettings,
    labels: LabelScheme,
) -> TrainingData:
    """Return the data of a sequence classifier.

    Args:
        examples: Training examples.
        validation: Validation examples; None splits `settings.validation_fraction` off `examples`.
        tokenizer: The model's tokenizer.
        settings: The run's settings.
        labels: What the labels mean, from `find_labels`.

    Raises:
        ValueError: As `encode_labelled`.
    """
    if validation is None:
        examples, validation = split_validation(
            examples, settings.validation_fraction, settings.seed
        )
    train = encode_labelled(examples, tokenizer, settings.max_tokens, labels)
    held_out = encode_labelled(validation, tokenizer, settings.max_tokens, labels)
    held_out.sort(key=len)
    return TrainingData(
        train,
        [len(row) for row in train],
        held_out,
        partial(collate_labelled, pad_id=pad_id_of(tokenizer)),
        partial(_measure, labels=labels),
        metric_names(labels),
    )


def encode_labelled(
    examples: Sequence[LabelledExample],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    labels: LabelScheme,
) -> list[LabelledTokens]:
    """Tokenize examples.

    Args:
        examples: Texts or pairs. What is too long loses its end; of a pair, the longer text does.
        tokenizer: The model's tokenizer.
        max_tokens: Longest row, marks included.
        labels: What the labels mean.

    Returns:
        A row for each example, in their order; how many were cut is logged.

    Raises:
        ValueError: A label is of no class; the message names file and line.
    """
    _warn_of_places(examples, labels)
    rows = []
    cut = 0
    for example in examples:
        encoded: Mapping[str, Any] = tokenizer(
            *example.texts, truncation="longest_first", max_length=max_tokens, verbose=False
        )
        ids = tuple(map(int, encoded["input_ids"]))
        kinds = encoded.get("token_type_ids")
        cut += len(ids) == max_tokens
        rows.append(
            LabelledTokens(
                ids, None if kinds is None else tuple(map(int, kinds)), labels.target(example)
            )
        )
    if cut:
        logger.info("%d of %d rows fill the %d tokens of a row", cut, len(rows), max_tokens)
    return rows


def _warn_of_places(examples: Sequence[LabelledExample], labels: LabelScheme) -> None:
    """Say which class an integer is taken for where classes are words: their order is a guess."""
    by_place = [row for row in examples if not isinstance(row.label, str)]
    by_place = [row for row in by_place if str(row.label) not in labels.names]
    if by_place and not labels.is_regression:
        logger.warning(
            "%s: integer labels are taken as places in %s; write words if their order is another",
            by_place[0].origin,
            ", ".join(f"{place} {name}" for place, name in enumerate(labels.names[:10])),
        )


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the padding token.

    Raises:
        ValueError: The tokenizer has none.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no padding token, which batches of texts need")
    return int(tokenizer.pad_token_id)


def collate_labelled(rows: Sequence[LabelledTokens], pad_id: int) -> dict[str, Any]:
    """Build one batch.

    Args:
        rows: The batch's rows.
        pad_id: Id to pad with.

    Returns:
        `input_ids`, `attention_mask` and, where the rows have them, `token_type_ids` (int64 [rows,
        longest]), and `labels` [rows], int64 for classes and float32 for a regression.
    """
    batch = {
        "input_ids": _padded([row.input_ids for row in rows], pad_id),
        "attention_mask": _padded([(1,) * len(row) for row in rows], 0),
        "labels": torch.tensor([row.target for row in rows]),
    }
    kinds = [row.token_type_ids for row in rows if row.token_type_ids is not None]
    if kinds:
        batch["token_type_ids"] = _padded(kinds, 0)
    return batch


def _padded(rows: Sequence[tuple[int, ...]], value: int) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def _measure(prediction: EvalPrediction, labels: LabelScheme) -> dict[str, float]:
    logits, targets = prediction.predictions, prediction.label_ids
    if not isinstance(logits, np.ndarray) or not isinstance(targets, np.ndarray):
        raise TypeError("expected one array of logits and one of labels")
    return label_metrics(logits, targets, labels)
