"""How well a model predicts the answers of training rows, and nothing but the answers.

    completion_nll = mean over all learned tokens of -log p(token | all before it)
    completion_ppl = exp(completion_nll)

Template, loss mask and truncation are those of training, with the model's context as the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from deploy.errors import ConfigError
from deploy.language_model import AnsweringModel
from deploy.token_scores import ScoredTokens, score_tokens
from reslora.batches import IGNORED, encode_examples
from reslora.row_formats import Example


def completion_loss(
    model: AnsweringModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Measure a model on the learned tokens of examples.

    Args:
        model: `TorchLanguageModel(name, model)` for a model in memory; or from
            `open_language_model`.
        tokenizer: Its tokenizer.
        examples: From `reslora.rows.read_rows`; of plain text every token but the first counts.
        progress: Called with the number of finished sequences.

    Returns:
        `completion_nll` (nats a token), `completion_ppl`, and `n_tokens`.

    Raises:
        ConfigError: No example has a token to score, or the chat template refuses one.
    """
    try:
        sequences = encode_examples(examples, tokenizer, model.context_length)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    masks = [np.array(sequence.labels) != IGNORED for sequence in sequences]
    firsts = [int(mask.argmax()) for mask in masks]
    scores = score_tokens(
        model,
        [
            ScoredTokens(sequence.input_ids, first)
            for sequence, first in zip(sequences, firsts, strict=True)
        ],
        progress,
    )
    total, count = 0.0, 0
    for score, mask, first in zip(scores, masks, firsts, strict=True):
        total -= float(score.log_probabilities[mask[first:]].sum())
        count += int(mask.sum())
    nll = total / count
    return {
        "completion_nll": nll,
        "completion_ppl": math.exp(nll) if nll < 700.0 else math.inf,
        "n_tokens": count,
    }
