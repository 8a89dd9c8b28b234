"""What an encoder is observed on: labelled rows of its task, or texts.

A row is calibrated on as the encoder reads it: with the marks of its tokenizer, a pair as a pair.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deploy.adapter_artifact import StoredAdapter
from deploy.artifact import hash_file
from deploy.calibration_text import sample_text
from deploy.classify import BATCH_ROWS
from deploy.encoder_loading import LoadedClassifier
from deploy.errors import ConfigError
from deploy.loading import LoadedModel
from deploy.text_data import read_text
from reslora.classification import collate_labelled, encode_labelled, pad_id_of
from reslora.labelled_rows import read_labelled_rows

CALIBRATION_ROWS = 1024
"""Labelled rows that a merge observes, evenly spaced over the data set."""
CALIBRATION_TEXTS = 256
"""Rows or texts that quantization observes, evenly spaced."""


def labelled_batches(opened: LoadedClassifier, source: str) -> list[dict[str, Tensor]]:
    """Return padded batches of labelled rows, without labels, in the order of the data set.

    Raises:
        ConfigError: There is nothing usable.
    """
    tokenizer = opened.loaded.tokenizer
    try:
        examples = read_labelled_rows(source)
        step = max(1, len(examples) // CALIBRATION_ROWS)
        chosen = examples[::step][:CALIBRATION_ROWS]
        rows = encode_labelled(chosen, tokenizer, opened.token_limit, opened.labels)
        pad_id = pad_id_of(tokenizer)
    except ValueError as error:
        raise ConfigError(f"calibration: {error}") from error
    size = max(1, min(BATCH_ROWS, len(rows) // 4))
    batches = [
        collate_labelled(rows[start : start + size], pad_id) for start in range(0, len(rows), size)
    ]
    return [{key: each for key, each in batch.items() if key != "labels"} for batch in batches]


def single_rows(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return at most `CALIBRATION_TEXTS` rows of padded batches, evenly spaced, a batch each.

    Padding is left out: a quantizer must not fit weights and scales to it.
    """
    rows = []
    for batch in batches:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        for index, length in enumerate(lengths):
            row = slice(index, index + 1)
            rows.append({key: tensor[row, :length] for key, tensor in batch.items()})
    step = max(1, len(rows) // CALIBRATION_TEXTS)
    return rows[::step][:CALIBRATION_TEXTS]


def text_batches(
    loaded: LoadedModel, source: str | None, *, token_limit: int
) -> list[dict[str, Tensor]]:
    """Return lines of text, a batch each: at most `CALIBRATION_TEXTS`, evenly spaced.

    Args:
        loaded: The encoder.
        source: A JSONL(.gz) or text(.gz) file or a hub id; None is our own sample.
        token_limit: Longest text; the end of a longer one is left out.

    Raises:
        ConfigError: The text cannot be read.
    """
    text = sample_text("calibration.txt") if source is None else read_text(source)
    lines = [line for line in text.splitlines() if line.strip()]
    step = max(1, len(lines) // CALIBRATION_TEXTS)
    batches = []
    for line in lines[::step][:CALIBRATION_TEXTS]:
        encoded = loaded.tokenizer(line, truncation=True, max_length=token_limit, verbose=False)
        names = [name for name in loaded.tokenizer.model_input_names if name in encoded]
        batches.append({name: torch.tensor([encoded[name]]) for name in names})
    return batches


def training_data(stored: StoredAdapter) -> str:
    """Return the rows that a classification adapter was trained on.

    Raises:
        ConfigError: They are not there or have changed.
    """
    source = str(stored.manifest.config.get("data"))
    expected = stored.manifest.parents.get("data")
    if expected is None:  # a hub id
        return source
    path = Path(source)
    if not path.is_file() or hash_file(path) != expected:
        raise ConfigError(
            f"{stored.directory}: must be observed on rows of the task, and the training data "
            f"{source} is not there or has changed; give --calibration"
        )
    return source
