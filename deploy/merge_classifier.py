"""Merge a classification adapter: encoder + adapter -> a plain Hugging Face directory.

The head that was trained with the adapter takes the model's place, and config.json names the
labels, so that AutoModelForSequenceClassification and text-classification pipelines need nothing
else.

A shortcut that can only be approximated is observed on labelled rows of the task, by default those
that the adapter was trained on; how far the merged predictions are from the unmerged ones is
measured per text (`reslora.merge_divergence`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from deploy.adapter_artifact import StoredAdapter
from deploy.artifact import hash_file
from deploy.classify import BATCH_ROWS, load_with_adapter
from deploy.encoder_loading import LoadedClassifier, save_classifier
from deploy.errors import ArtifactError, ConfigError
from deploy.shortcut_merge import merge_stored_adapter
from deploy.staging import staged_directory
from reslora.classification import collate_labelled, encode_labelled, pad_id_of
from reslora.labelled_rows import read_labelled_rows
from reslora.merge import MergeMethod

CALIBRATION_ROWS = 1024
"""Rows that are observed, evenly spaced over the data set."""


def merge_classifier(
    model: str,
    adapter: Path,
    output: Path,
    method: MergeMethod | None = MergeMethod.EXACT,
    calibration: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Write a merged classifier.

    Args:
        model: The encoder that the adapter was trained on.
        adapter: What `rolora finetune --task classification` wrote.
        output: The directory to make; complete or absent.
        method: How to merge; None takes the method nearest to the unmerged model.
        calibration: Source of labelled rows; None is the adapter's own training data. Read only
            where the merge is an approximation.
        progress: Called with a line for each step.

    Returns:
        The report of `merge_stored_adapter`; `top1_agreement` is None for a regression.

    Raises:
        ConfigError: The output exists, or calibration rows are missing or cannot be used.
        StageOrderError: A directory holds another kind of artifact.
        ArtifactError: A file is damaged, or adapter, method and model do not fit each other.
        UnsupportedModelError: A decoder, or another family.
    """
    progress(f"loading {model}")
    opened, stored = load_with_adapter(model, adapter)
    with staged_directory(output) as directory:
        progress(f"merging {adapter}")
        report = merge_loaded_classifier(opened, stored, method, calibration)
        progress(f"writing {output}")
        save_classifier(opened.loaded, directory)
    return report


def merge_loaded_classifier(
    opened: LoadedClassifier,
    stored: StoredAdapter,
    method: MergeMethod | None,
    calibration: str | None = None,
) -> dict[str, Any]:
    """Merge into a model that `load_with_adapter` loaded, in place.

    Args:
        opened: The encoder.
        stored: The adapter.
        method: As `merge_classifier`.
        calibration: As `merge_classifier`.

    Raises:
        ConfigError, ArtifactError: As `merge_classifier`.
    """
    try:
        return merge_stored_adapter(
            opened.loaded.model,
            None,
            stored,
            method,
            lambda: _calibration_batches(opened, stored, calibration),
        )
    except ValueError as error:
        raise ArtifactError(f"{stored.directory}: cannot be merged: {error}") from error


def _calibration_batches(
    opened: LoadedClassifier, stored: StoredAdapter, source: str | None
) -> list[dict[str, Tensor]]:
    """Return batches without labels, in the order of the data set."""
    source = source or _training_data(stored)
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
    return [{key: tensor for key, tensor in batch.items() if key != "labels"} for batch in batches]


def _training_data(stored: StoredAdapter) -> str:
    source = str(stored.manifest.config.get("data"))
    expected = stored.manifest.parents.get("data")
    if expected is None:  # a hub id
        return source
    path = Path(source)
    if not path.is_file() or hash_file(path) != expected:
        raise ConfigError(
            f"{stored.directory}: its shortcut must be observed on rows of the task, and the "
            f"training data {source} is not there or has changed; give --calibration"
        )
    return source
