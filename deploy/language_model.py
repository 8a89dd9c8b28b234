"""One way to ask any model for logits: torch model, quantized checkpoint, or ONNX directory.

A torch model may carry an adapter that is not merged, shortcuts and online rotations at work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deploy.adapter_artifact import open_adapter
from deploy.artifact import ArtifactKind, is_artifact, read_manifest, verify_files
from deploy.checkpoint import Checkpoint
from deploy.compressed_reader import load_compressed
from deploy.errors import ArtifactError, StageOrderError
from deploy.known_tokens import require_known_tokens
from deploy.live_adapter import attach_to_loaded
from deploy.loading import load_model
from deploy.session import OnnxDecoder


class LanguageModel(Protocol):
    """Anything that predicts the next token."""

    @property
    def name(self) -> str:
        """How to call it in a message."""

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return float32 [T, vocab_size] for token ids int64 [T]."""


class AnsweringModel(LanguageModel, Protocol):
    """A language model that takes batches and writes answers."""

    @property
    def context_length(self) -> int:
        """Greatest number of tokens, prompt and answer together."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""

    def batch_logits(self, ids: np.ndarray, first: int) -> np.ndarray:
        """Return float32 [B, T - first, vocab_size], positions `first` on, for ids int64 [B, T].

        Rows may be padded on the right with any token: no position sees a later one.
        """

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: frozenset[int]
    ) -> list[list[int]]:
        """Continue each prompt by its most probable tokens.

        Args:
            prompts: Token ids, at least one each.
            max_new_tokens: Most tokens of an answer.
            end_ids: Tokens that end an answer and are no part of it.
        """


@dataclass(frozen=True)
class TorchLanguageModel:
    """A transformers model, float or with integer modules, or one that carries an adapter."""

    name: str
    model: PreTrainedModel | PeftModel

    @property
    def context_length(self) -> int:
        """Greatest number of tokens, prompt and answer together."""
        return int(self.model.config.max_position_embeddings)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer, as the model's configuration has them."""
        generation = self.model.generation_config
        ends = None if generation is None else generation.eos_token_id
        if ends is None:
            ends = self.model.config.eos_token_id
        if ends is None:
            return frozenset()
        return frozenset(map(int, ends if isinstance(ends, list) else [ends]))

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return float32 [T, vocab_size] for token ids int64 [T]."""
        logits: np.ndarray = self.batch_logits(ids[None], 0)[0]
        return logits

    def batch_logits(self, ids: np.ndarray, first: int) -> np.ndarray:
        """Return float32 [B, T - first, vocab_size] for token ids int64 [B, T]."""
        require_known_tokens(ids, self.model.config.vocab_size)
        with torch.inference_mode():
            output = self.model(
                input_ids=torch.from_numpy(ids).to(self.model.device),
                logits_to_keep=ids.shape[1] - first,
                use_cache=False,
            )
            logits: np.ndarray = output.logits.float().cpu().numpy()
        return logits

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: frozenset[int]
    ) -> list[list[int]]:
        """Continue each prompt by its most probable tokens, padded on the left, over a cache."""
        require_known_tokens(prompts, self.model.config.vocab_size)
        longest = max(map(len, prompts))
        pad = min(end_ids, default=0)
        ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # or the model's own would be taken
            # no token has the id vocab_size; with None the model's own would be taken
            eos_token_id=sorted(end_ids) or [self.model.config.vocab_size],
            pad_token_id=pad,
        )
        generate: Any = self.model.generate
        with torch.inference_mode():
            output = generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=settings,
            )
        return [_until(row, end_ids) for row in output[:, longest:].tolist()]


@dataclass(frozen=True)
class OnnxLanguageModel:
    """An exported decoder in ONNX Runtime."""

    name: str
    decoder: OnnxDecoder

    @property
    def context_length(self) -> int:
        """Greatest number of tokens, prompt and answer together."""
        return self.decoder.context_length

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer, as the export's configuration has them."""
        return self.decoder.end_ids

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return float32 [T, vocab_size] for token ids int64 [T]."""
        return self.decoder.logits(ids)

    def batch_logits(self, ids: np.ndarray, first: int) -> np.ndarray:
        """Return float32 [B, T - first, vocab_size] for token ids int64 [B, T]."""
        self.decoder.start(capacity=ids.shape[1], batch=ids.shape[0])
        return self.decoder.append(ids)[:, first:]

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: frozenset[int]
    ) -> list[list[int]]:
        """Continue each prompt by its most probable tokens, padded on the right, over a cache."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        ids = np.full((len(prompts), lengths.max()), min(end_ids, default=0), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        self.decoder.start(int(lengths.max()) + max_new_tokens, len(prompts))
        logits = self.decoder.append(ids, lengths, last_only=True)
        following = logits[:, 0].argmax(axis=-1)
        answers = [following]
        ended = np.isin(following, list(end_ids))
        while len(answers) < max_new_tokens and not ended.all():
            following = self.decoder.append(following[:, None])[:, 0].argmax(axis=-1)
            answers.append(following)
            ended |= np.isin(following, list(end_ids))
        return [_until(row, end_ids) for row in np.stack(answers, axis=1).tolist()]


def _until(answer: list[int], end_ids: frozenset[int]) -> list[int]:
    """Return the tokens before the first one that ends an answer."""
    stop = next((place for place, token in enumerate(answer) if token in end_ids), len(answer))
    return answer[:stop]


@dataclass(frozen=True)
class OpenedModel:
    """A language model with its tokenizer."""

    model: AnsweringModel
    tokenizer: PreTrainedTokenizerBase


def open_language_model(
    reference: str, *, adapter: Path | None = None, threads: int | None = None
) -> OpenedModel:
    """Open whatever a user names.

    Args:
        reference: An exported directory (ONNX, or compressed-tensors as transformers reads it), a
            quantized checkpoint, or anything that `load_model` takes.
        adapter: An adapter that was trained on this model, to be attached and not merged; the model
            must be one that `load_model` takes.
        threads: Threads of ONNX Runtime; None is its own choice.

    Raises:
        StageOrderError: The directory holds an adapter, which is no model by itself, or an adapter
            is to be attached to a checkpoint or an export.
        ArtifactError: A file is missing or damaged, or the adapter belongs to another model.
        ConfigError: There is no such model.
        UnsupportedModelError: The model is of another family.
    """
    directory = Path(reference)
    if adapter is not None:
        stored = open_adapter(adapter)
        loaded = load_model(reference)
        attached = attach_to_loaded(loaded, stored)
        name = f"{reference} with {adapter}"
        return OpenedModel(TorchLanguageModel(name, attached), loaded.tokenizer)
    if not is_artifact(directory) or read_manifest(directory).kind is ArtifactKind.MODEL:
        loaded = load_model(reference)
        return OpenedModel(TorchLanguageModel(reference, loaded.model.eval()), loaded.tokenizer)
    manifest = read_manifest(directory)
    if manifest.kind is ArtifactKind.CHECKPOINT:
        with Checkpoint(directory) as checkpoint:
            model: AnsweringModel = TorchLanguageModel(reference, checkpoint.load_model())
    elif manifest.kind is ArtifactKind.ONNX:
        verify_files(directory)
        model = OnnxLanguageModel(reference, OnnxDecoder(directory, threads=threads))
    elif manifest.kind is ArtifactKind.COMPRESSED:
        verify_files(directory)
        model = TorchLanguageModel(reference, load_compressed(directory))
    elif manifest.kind is ArtifactKind.ROTATION:
        raise StageOrderError(
            f"{directory}: a rotation is no model; give it to rolora merge-rotate-quantize "
            f"--rotation, and evaluate what that writes"
        )
    elif manifest.kind is ArtifactKind.ENCODER:
        raise StageOrderError(
            f"{directory}: an encoder predicts no next token; measure a classifier with rolora "
            f"evaluate --tasks classification"
        )
    else:
        raise StageOrderError(
            f"{directory}: an adapter is no model by itself; evaluate it on its model: --model ... "
            f"--adapter {directory}, or merge it first: rolora merge --model ... --adapter "
            f"{directory} --to model --output ..."
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
