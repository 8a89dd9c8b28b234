"""One way to ask any model for logits: torch model, quantized checkpoint, or ONNX directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deploy.artifact import ArtifactKind, is_artifact, read_manifest, verify_files
from deploy.checkpoint import Checkpoint
from deploy.errors import ArtifactError, StageOrderError
from deploy.loading import load_model
from deploy.session import OnnxDecoder


class LanguageModel(Protocol):
    """Anything that predicts the next token."""

    @property
    def name(self) -> str:
        """How to call it in a message."""

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return float32 [T, vocab_size] for token ids int64 [T]."""


@dataclass(frozen=True)
class TorchLanguageModel:
    """A transformers model, float or with integer modules."""

    name: str
    model: PreTrainedModel

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return float32 [T, vocab_size] for token ids int64 [T]."""
        with torch.inference_mode():
            logits: np.ndarray = (
                self.model(input_ids=torch.from_numpy(ids)[None]).logits[0].float().numpy()
            )
        return logits


@dataclass(frozen=True)
class OnnxLanguageModel:
    """An exported decoder in ONNX Runtime."""

    name: str
    decoder: OnnxDecoder

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return float32 [T, vocab_size] for token ids int64 [T]."""
        return self.decoder.logits(ids)


@dataclass(frozen=True)
class OpenedModel:
    """A language model with its tokenizer."""

    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase


def open_language_model(reference: str, *, threads: int | None = None) -> OpenedModel:
    """Open whatever a user names.

    Args:
        reference: An exported ONNX directory, a quantized checkpoint, or anything that `load_model`
            takes.
        threads: Threads of ONNX Runtime; None is its own choice.

    Raises:
        StageOrderError: The directory holds an adapter, which is no model by itself.
        ArtifactError: A file is missing or damaged.
        ConfigError: There is no such model.
        UnsupportedModelError: The model is of another family.
    """
    directory = Path(reference)
    if not is_artifact(directory) or read_manifest(directory).kind is ArtifactKind.MODEL:
        loaded = load_model(reference)
        return OpenedModel(TorchLanguageModel(reference, loaded.model.eval()), loaded.tokenizer)
    manifest = read_manifest(directory)
    if manifest.kind is ArtifactKind.CHECKPOINT:
        with Checkpoint(directory) as checkpoint:
            model: LanguageModel = TorchLanguageModel(reference, checkpoint.load_model())
    elif manifest.kind is ArtifactKind.ONNX:
        verify_files(directory)
        model = OnnxLanguageModel(reference, OnnxDecoder(directory, threads=threads))
    else:
        raise StageOrderError(
            f"{directory}: an adapter is no model by itself; merge it first: "
            f"rolora merge-rotate-quantize --model ... --adapter {directory} --scheme ... "
            f"--output ..."
        )
    return OpenedModel(model, load_tokenizer(directory))


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that an artifact carries.

    Raises:
        ArtifactError: It is missing or unreadable.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{directory}: the tokenizer cannot be loaded ({error}); make the artifact again"
        ) from error
    return tokenizer
