from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest

from deploy.errors import ConfigError
from deploy.text_quality import (
    Task,
    Windows,
    cut_windows,
    evaluate_model,
)
from tests.conftest import build_tiny_tokenizer

BOTH = frozenset(Task)


@dataclass(frozen=True)
class TableModel:
    """Predicts by the current token only, from a table of logits [V, V]."""

    table: np.ndarray
    name: str = "table"

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return self.table[ids].astype(np.float32)


def random_table(seed: int, size: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(size, size)).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


WINDOWS = Windows((np.array([0, 1, 2, 3, 4, 1]), np.array([4, 4, 0, 2, 1, 3])))


def test_figures_equal_their_definitions() -> None:
    p, q = random_table(0), random_table(1)
    results = evaluate_model(TableModel(q), TableModel(p), WINDOWS, BOTH)
    nll, reference_nll, kl, agree = [], [], [], []
    for ids in WINDOWS.ids:
        for now, following in itertools.pairwise(ids):
            log_p, log_q = log_softmax(p[now]), log_softmax(q[now])
            nll.append(-log_q[following])
            reference_nll.append(-log_p[following])
            kl.append((np.exp(log_p) * (log_p - log_q)).sum())
            agree.append(log_p.argmax() == log_q.argmax())
    expected = {
        "ppl": math.exp(np.mean(nll)),
        "reference_ppl": math.exp(np.mean(reference_nll)),
        "ppl_ratio": math.exp(np.mean(nll) - np.mean(reference_nll)),
        "kl_mean": np.mean(kl),
        "top1_agreement": np.mean(agree),
    }
    assert results == pytest.approx(expected, rel=1e-5)


def test_a_model_is_at_no_distance_from_itself() -> None:
    model = TableModel(random_table(0))
    results = evaluate_model(model, model, WINDOWS, BOTH)
    assert results["ppl_ratio"] == 1.0
    assert results["kl_mean"] == pytest.approx(0.0, abs=1e-7)
    assert results["top1_agreement"] == 1.0


def test_only_what_is_asked_for_is_reported() -> None:
    model = TableModel(random_table(0))
    done: list[int] = []
    results = evaluate_model(model, None, WINDOWS, frozenset({Task.PPL}), done.append)
    assert set(results) == {"ppl"}
    assert done == [1, 2]
    assert set(evaluate_model(model, model, WINDOWS, frozenset({Task.KL}))) == {
        "kl_mean",
        "top1_agreement",
    }


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    table = np.full((5, 5), -1e5)
    table[:, 0] = 1e5
    windows = Windows((np.array([1, 2, 3, 4]),))
    results = evaluate_model(TableModel(table), None, windows, frozenset({Task.PPL}))
    assert results["ppl"] == math.inf


def test_impossible_comparisons_are_refused() -> None:
    model = TableModel(random_table(0))
    with pytest.raises(ConfigError, match="give --reference"):
        evaluate_model(model, None, WINDOWS, BOTH)
    other = TableModel(random_table(0, size=6), "wide")
    with pytest.raises(ConfigError, match="reference wide has a vocabulary of 6, model table of 5"):
        evaluate_model(model, other, WINDOWS, BOTH)


def test_windows_are_spaced_evenly_from_the_first_to_the_last_token() -> None:
    tokenizer = build_tiny_tokenizer()
    text = "".join(chr(97 + i % 26) for i in range(101))
    ids = np.array(tokenizer(text)["input_ids"])
    windows = cut_windows(tokenizer, text, 3, 11).ids
    for window, start in zip(windows, (0, 45, 90), strict=True):
        np.testing.assert_array_equal(window, ids[start : start + 11])
        assert window.dtype == np.int64
    assert [len(window) for window in cut_windows(tokenizer, text, 1, 101).ids] == [101]


def test_a_tokenizer_that_begins_texts_begins_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Beginning:
        bos_token_id = 1

        def __call__(self, text: str, *, add_special_tokens: bool = True, **_: object) -> object:
            return {"input_ids": [1] * add_special_tokens + [ord(char) for char in text]}

    windows = cut_windows(Beginning(), "abcdefgh", 2, 4).ids  # type: ignore[arg-type]
    assert [list(window) for window in windows] == [[1, 98, 99, 100], [1, 102, 103, 104]]


@pytest.mark.parametrize(
    ("count", "tokens", "said"),
    [
        (0, 8, "at least 1 window of 2 tokens, got 0 of 8"),
        (2, 1, "got 2 of 1"),
        (1, 12, "the text has 11 tokens, a window needs 12"),
    ],
)
def test_windows_that_cannot_be_cut_are_refused(count: int, tokens: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cut_windows(build_tiny_tokenizer(), "hello world", count, tokens)
