"""An encoder that tells classes apart, measured on rows.

It is a model with or without its adapter, a quantized checkpoint, or an export in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from deploy.adapter_artifact import StoredAdapter, open_adapter
from deploy.artifact import ArtifactKind, is_artifact, read_manifest, verify_files
from deploy.encoder_checkpoint import EncoderCheckpoint, labels_of
from deploy.encoder_loading import LoadedClassifier, load_classifier
from deploy.encoder_session import LOGITS_NAME, OnnxEncoder
from deploy.errors import ArtifactError, ConfigError
from deploy.language_model import load_tokenizer
from deploy.live_adapter import attach_stored
from reslora.classification import collate_labelled, encode_labelled, pad_id_of
from reslora.labelled_rows import LabelledExample, LabelScheme, read_labelled_rows
from reslora.metrics import label_metrics

BATCH_ROWS = 32
"""Rows in a forward pass; of like length, so that there is little padding."""


@dataclass(frozen=True)
class OpenedClassifier:
    """A classifier that is ready to predict."""

    model: nn.Module
    """Takes a batch of `collate_labelled` without its labels, gives logits [rows, outputs]."""
    tokenizer: PreTrainedTokenizerBase
    labels: LabelScheme
    token_limit: int


class OnnxClassifier(nn.Module):
    """An exported classifier in the place of a torch model.

    Args:
        encoder: Its session.
    """

    def __init__(self, encoder: OnnxEncoder) -> None:
        super().__init__()
        self._encoder = encoder

    def forward(self, **batch: Tensor) -> SequenceClassifierOutput:
        """Return `logits`, float32 [rows, outputs], for what `OnnxEncoder.run` takes."""
        found = self._encoder.run({name: tensor.numpy() for name, tensor in batch.items()})
        return SequenceClassifierOutput(logits=torch.from_numpy(found[LOGITS_NAME]))


def open_classifier(
    model: str, adapter: Path | None = None, *, threads: int | None = None
) -> OpenedClassifier:
    """Open an encoder with an adapter on it, or a model that has a head of its own.

    Args:
        model: Hub id, directory or `minilm-l6`; without an adapter also a quantized checkpoint or
            an export.
        adapter: What `rolora finetune --task classification` wrote; its shortcuts stay alive.
        threads: Threads of ONNX Runtime; None is its own choice.

    Raises:
        ConfigError: No such model or adapter, a model without a head, or an adapter of another
            task.
        StageOrderError: A directory holds another kind of artifact.
        ArtifactError: A file is damaged, or the adapter belongs to another model.
        UnsupportedModelError: A decoder, or another family.
    """
    directory = Path(model)
    if adapter is None and is_artifact(directory):
        kind = read_manifest(directory).kind
        if kind is ArtifactKind.CHECKPOINT:
            return _open_checkpoint(directory)
        if kind is ArtifactKind.ENCODER:
            return _open_export(directory, threads)
    if adapter is None:
        opened = load_classifier(model)
        return _opened(opened, opened.loaded.model)
    stored = open_adapter(adapter)
    opened = load_for_adapter(model, stored)
    try:
        attached, _ = attach_stored(opened.loaded.model, None, stored)
    except ValueError as error:
        raise ArtifactError(f"{adapter}: does not fit {model}: {error}") from error
    return _opened(opened, attached.eval())


def is_classifier(stored: StoredAdapter) -> bool:
    """Return whether an adapter was trained for classification; it knows its labels then."""
    return isinstance(stored.manifest.details.get("labels"), list)


def load_for_adapter(model: str, stored: StoredAdapter) -> LoadedClassifier:
    """Load an encoder with the labels of its adapter, which is not attached.

    Raises:
        ConfigError, StageOrderError, ArtifactError, UnsupportedModelError: As `open_classifier`.
    """
    if not is_classifier(stored):
        raise ConfigError(
            f"{stored.directory}: was not trained for classification; make an adapter with rolora "
            "finetune --task classification"
        )
    labels: Any = stored.manifest.details["labels"]
    opened = load_classifier(model, LabelScheme(tuple(map(str, labels))))
    stored.require_base(opened.loaded.digest, model)
    return opened


def evaluate_on_rows(
    model: str,
    adapter: Path | None,
    data: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure a classifier on labelled rows.

    Args:
        model: As `open_classifier`.
        adapter: As `open_classifier`.
        data: JSONL(.gz) file or hub id with rows of `labelled_rows`.
        progress: Called with the numbers of rows that are done and of all.
        threads: Threads of ONNX Runtime; None is its own choice.

    Returns:
        The JSON shape that `rolora evaluate --tasks classification --json` prints.

    Raises:
        ConfigError, StageOrderError, ArtifactError, UnsupportedModelError: As `open_classifier`;
            ConfigError too where a row cannot be used.
    """
    try:
        examples = read_labelled_rows(data)
        opened = open_classifier(model, adapter, threads=threads)
        results = evaluate_classifier(
            opened.model,
            opened.tokenizer,
            examples,
            opened.labels,
            max_tokens=opened.token_limit,
            progress=progress,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return {
        "model": model,
        "adapter": None if adapter is None else str(adapter),
        "data": data,
        "labels": list(opened.labels.names),
        "results": results,
    }


def evaluate_classifier(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[LabelledExample],
    labels: LabelScheme,
    *,
    max_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Compare a classifier's predictions with labels.

    Args:
        model: See `OpenedClassifier`.
        tokenizer: Its tokenizer.
        examples: Labelled rows.
        labels: What its logits mean.
        max_tokens: Longest row; longer ones are cut.
        progress: Called with the numbers of rows that are done and of all.

    Returns:
        The metrics of `reslora.metrics`, the number of rows `n`, and `loss`: the mean negative log
        likelihood of the labels in nats, or the mean squared error of a regression.

    Raises:
        ValueError: There is no row, a label is of no class, or a logit is not finite.
    """
    rows = encode_labelled(examples, tokenizer, max_tokens, labels)
    rows.sort(key=len)
    pad_id = pad_id_of(tokenizer)
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    model.eval()
    for start in range(0, len(rows), BATCH_ROWS):
        batch = collate_labelled(rows[start : start + BATCH_ROWS], pad_id)
        targets.append(batch.pop("labels"))
        with torch.inference_mode():
            predicted = model(**{key: tensor.to(device) for key, tensor in batch.items()}).logits
        logits.append(predicted.double().cpu())
        progress(min(start + BATCH_ROWS, len(rows)), len(rows))
    found, expected = torch.cat(logits), torch.cat(targets)
    if labels.is_regression:
        loss = nn.functional.mse_loss(found.reshape(-1), expected.double())
    else:
        loss = nn.functional.cross_entropy(found, expected)
    metrics = label_metrics(found.numpy(), expected.numpy(), labels)
    return metrics | {"n": len(rows), "loss": float(loss)}


def _open_checkpoint(directory: Path) -> OpenedClassifier:
    with EncoderCheckpoint(directory) as checkpoint:
        labels = _require_labels(directory, checkpoint.labels)
        tokenizer = load_tokenizer(directory)
        return OpenedClassifier(checkpoint.load_model(), tokenizer, labels, checkpoint.token_limit)


def _open_export(directory: Path, threads: int | None) -> OpenedClassifier:
    manifest = verify_files(directory)
    labels = _require_labels(directory, labels_of(manifest))
    classifier = OnnxClassifier(OnnxEncoder(directory, threads=threads))
    limit: Any = manifest.details["context_length"]
    return OpenedClassifier(classifier, load_tokenizer(directory), labels, int(limit))


def _require_labels(directory: Path, labels: LabelScheme | None) -> LabelScheme:
    if labels is None:
        raise ConfigError(
            f"{directory}: holds an encoder without a classification head, which tells no classes "
            "apart; make it from a model with a head, or with an adapter that was trained for "
            "classification"
        )
    return labels


def _opened(opened: LoadedClassifier, model: nn.Module) -> OpenedClassifier:
    return OpenedClassifier(model, opened.loaded.tokenizer, opened.labels, opened.token_limit)
