"""The checkpoint of an encoder: files as `checkpoint` has them, without rotation and KV cache.

Its config.json names the class that transformers builds, with a classification head or bare, and
the manifest's `labels` what the logits of a head mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from deploy.artifact import Manifest
from deploy.checkpoint_reader import CheckpointReader
from deploy.encoder_architecture import encoder_names, encoder_token_limit
from deploy.errors import ArtifactError
from reslora.labelled_rows import LabelScheme
from rolora.encoder import EncoderNames

LABELS = "labels"
"""Of a manifest's details; only where the model has a head."""


class EncoderCheckpoint(CheckpointReader[EncoderNames]):
    """Reads the checkpoint of an encoder without loading it.

    Args:
        directory: A directory that `merge-rotate-quantize` wrote.
        verify: Compare every file with the manifest's sha256 first.

    Raises:
        StageOrderError: The directory is not such a checkpoint.
        ArtifactError: A file is missing or damaged.
        UnsupportedModelError: It is that of a decoder.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        super().__init__(directory, _names, verify=verify)
        self.labels = labels_of(self.manifest)

    @property
    def token_limit(self) -> int:
        """How many tokens it reads at most."""
        return encoder_token_limit(self.config)

    def load_model(self) -> PreTrainedModel:
        """Rebuild the torch model, with integer modules, in evaluation mode."""
        model = empty_encoder(self.config, with_head=self.labels is not None)
        self.put_integers(model, self.names.linears())
        floats = {name: self._tensor(name) for name, _ in model.named_parameters()}
        model.load_state_dict(floats, strict=False, assign=True)
        model.eval()
        return model


def empty_encoder(config: PreTrainedConfig, *, with_head: bool) -> PreTrainedModel:
    """Return an encoder whose weights are still to come."""
    with torch.random.fork_rng(devices=[]):
        if with_head:
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        else:
            model = AutoModel.from_config(config, add_pooling_layer=False, dtype=torch.float32)
    encoder: PreTrainedModel = model
    return encoder


def labels_of(manifest: Manifest) -> LabelScheme | None:
    """Return what the logits of an encoder's checkpoint or export mean; None without a head.

    Raises:
        ArtifactError: The manifest's labels are unreadable.
    """
    labels: Any = manifest.details.get(LABELS)
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ArtifactError(f"the manifest's {LABELS} must be a list of names, got {labels!r}")
    return LabelScheme(tuple(labels))


def _names(config: PreTrainedConfig, manifest: Manifest) -> EncoderNames:
    return encoder_names(config, with_head=labels_of(manifest) is not None)
