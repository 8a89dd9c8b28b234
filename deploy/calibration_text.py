"""Text on which activation ranges are observed: the user's, or a sample of our own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deploy.errors import ConfigError
from deploy.known_tokens import require_known_tokens
from deploy.loading import LoadedModel
from deploy.text_data import read_text
from deploy.text_quality import cut_windows


def sample_text(name: str) -> str:
    """Return a text that ships with the package: `calibration.txt` or `evaluation.txt`."""
    return sample_path(name).read_text(encoding="utf-8")


def sample_path(name: str) -> Path:
    """Return where a sample lies on disk."""
    return Path(str(resources.files("deploy") / "samples" / name))


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase, source: str | None, *, windows: int, tokens: int
) -> list[dict[str, Tensor]]:
    """Cut calibration text into forward-pass batches.

    Args:
        tokenizer: Of the model.
        source: A JSONL(.gz) or text(.gz) file or a hub id; None is our own sample.
        windows: Number of windows.
        tokens: Tokens a window; shortened to the length of the text if that is less.

    Returns:
        `{"input_ids": int64 [1, T]}` per window.

    Raises:
        ConfigError: The text cannot be read or has fewer than 2 tokens.
    """
    text = sample_text("calibration.txt") if source is None else read_text(source)
    available = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if available < 2:
        raise ConfigError(
            f"calibration {source}: expected at least 2 tokens of text, got {available}"
        )
    cut = cut_windows(tokenizer, text, windows, min(tokens, available))
    return [{"input_ids": torch.from_numpy(ids)[None]} for ids in cut.ids]


def calibration_for(
    loaded: LoadedModel, source: str | None, *, windows: int, tokens: int
) -> list[dict[str, Tensor]]:
    """Return `calibration_batches` that are no longer than the model reads.

    Raises:
        ConfigError: As those, or the text has a token that the model does not know.
    """
    limit = loaded.model.config.max_position_embeddings
    batches = calibration_batches(
        loaded.tokenizer, source, windows=windows, tokens=min(tokens, limit)
    )
    require_known_tokens(
        (batch["input_ids"].numpy() for batch in batches), loaded.model.config.vocab_size
    )
    return batches


def disjoint_batches(
    loaded: LoadedModel, source: str | None, *, windows: int, tokens: int
) -> list[dict[str, Tensor]]:
    """Return windows as `calibration_for` does, but no more than fit without overlap.

    Returns:
        At most `windows` batches, evenly spaced over the text; none if it is too short for one.

    Raises:
        ConfigError: The text cannot be read, or has a token that the model does not know.
    """
    tokens = min(tokens, loaded.model.config.max_position_embeddings)
    text = sample_text("calibration.txt") if source is None else read_text(source)
    ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    fitting = min(windows, len(ids) // tokens)
    if not fitting:
        return []
    cut = cut_windows(loaded.tokenizer, text, fitting, tokens)
    require_known_tokens(cut.ids, loaded.model.config.vocab_size)
    return [{"input_ids": torch.from_numpy(window)[None]} for window in cut.ids]
