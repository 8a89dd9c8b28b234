"""Log-probabilities of given tokens, in batches of like length.

    log p(t_first .. t_last | t_0 .. t_first-1),  token by token

Sequences are padded on the right, which a causal model does not see. Those that differ in nothing
but their last token, such as the choices A to D of a question, share one row of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deploy.language_model import AnsweringModel

BATCH_TOKENS = 1024
"""Positions of a batch, padding included: their logits are held at once."""


@dataclass(frozen=True)
class ScoredTokens:
    """A sequence, and where the tokens to score begin."""

    ids: tuple[int, ...]
    first: int
    """At least 1: the first token of all has nothing to be predicted from."""


@dataclass(frozen=True)
class TokenScores:
    """How a model predicts the tokens `first` on."""

    log_probabilities: np.ndarray
    """float64 [n]."""
    greedy: bool
    """Each token is the model's most probable one."""


def score_tokens(
    model: AnsweringModel,
    sequences: Sequence[ScoredTokens],
    progress: Callable[[int], None] = lambda done: None,
) -> list[TokenScores]:
    """Score tokens of sequences that fit the model's context.

    Args:
        model: Any model.
        sequences: What is scored.
        progress: Called with the number of finished sequences.

    Returns:
        Scores in the order of `sequences`.

    Raises:
        ValueError: A sequence has nothing to score.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, sequence in enumerate(sequences):
        if not 1 <= sequence.first < len(sequence.ids):
            raise ValueError(
                f"sequence {index}: expected tokens to score after its first, got them from "
                f"{sequence.first} of {len(sequence.ids)}"
            )
        sharing.setdefault(sequence.ids[:-1], []).append(index)
    scores: dict[int, TokenScores] = {}
    for batch in batches_by_length(sharing, BATCH_TOKENS):
        members = [sharing[row] for row in batch]
        start = min(sequences[index].first for row in members for index in row) - 1
        ids = np.zeros((len(batch), len(batch[0])), np.int64)
        for place, row in enumerate(batch):
            ids[place, : len(row)] = row
        logits = torch.from_numpy(model.batch_logits(ids, start))
        for place, indices in enumerate(members):
            for index in indices:
                scores[index] = _score(logits[place], sequences[index], start)
        progress(len(scores))
    return [scores[index] for index in range(len(sequences))]


def batches_by_length(
    rows: Iterable[tuple[int, ...]], tokens: int, most_rows: int | None = None
) -> Iterator[list[tuple[int, ...]]]:
    """Group rows, longest first, so that no batch has more positions than asked for.

    Args:
        rows: Token ids.
        tokens: Greatest number of positions of a batch, padding included; a longer row is alone.
        most_rows: Greatest number of rows.
    """
    batch: list[tuple[int, ...]] = []
    for row in sorted(rows, key=len, reverse=True):
        full = batch and ((len(batch) + 1) * len(batch[0]) > tokens or len(batch) == most_rows)
        if full:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _score(logits: torch.Tensor, sequence: ScoredTokens, start: int) -> TokenScores:
    """Read off one sequence from the logits [T - start, vocab_size] of its row."""
    rows = logits[sequence.first - 1 - start : len(sequence.ids) - 1 - start]
    targets = torch.tensor(sequence.ids[sequence.first :])
    log_p = torch.log_softmax(rows.double(), dim=-1).gather(1, targets[:, None])[:, 0]
    return TokenScores(log_p.numpy(), bool((rows.argmax(dim=-1) == targets).all()))
