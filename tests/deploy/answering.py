"""A model that answers by rule, through the same door as real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class TableModel:
    """Predicts by the current token only, from a table of logits [V, V]."""

    table: np.ndarray
    answers: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    """What `generate` says to a prompt; other prompts get the table's tokens."""
    name: str = "table"
    context_length: int = 4096
    end_ids: frozenset[int] = frozenset({2})
    batches: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes of the batches it saw."""

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return self.table[ids].astype(np.float32)

    def batch_logits(self, ids: np.ndarray, first: int) -> np.ndarray:
        self.batches.append(ids.shape)
        return self.table[ids[:, first:]].astype(np.float32)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: frozenset[int]
    ) -> list[list[int]]:
        self.batches.append((len(prompts), max(map(len, prompts))))
        return [self._answer(tuple(prompt), max_new_tokens, end_ids) for prompt in prompts]

    def _answer(
        self, prompt: tuple[int, ...], max_new_tokens: int, end_ids: frozenset[int]
    ) -> list[int]:
        if prompt in self.answers:
            return self.answers[prompt][:max_new_tokens]
        answer: list[int] = []
        token = prompt[-1]
        while len(answer) < max_new_tokens:
            token = int(self.table[token].argmax())
            if token in end_ids:
                break
            answer.append(token)
        return answer


def random_table(seed: int = 0, size: int = 262) -> np.ndarray:
    """Return logits [size, size]."""
    return np.random.default_rng(seed).normal(size=(size, size)).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities over the last axis, float64."""
    logits = logits.astype(np.float64)
    result: np.ndarray = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return result
