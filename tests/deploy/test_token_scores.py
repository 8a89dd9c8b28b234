from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.language_model import TorchLanguageModel
from deploy.token_scores import ScoredTokens, batches_by_length, score_tokens
from tests.conftest import build_tiny_model
from tests.deploy.answering import TableModel, log_softmax, random_table


def test_scores_are_those_of_a_sequence_run_alone_whatever_stands_beside_it() -> None:
    model = TorchLanguageModel("tiny", build_tiny_model("qwen3"))
    generator = np.random.default_rng(0)
    sequences = [
        ScoredTokens(tuple(map(int, generator.integers(3, 262, length))), first)
        for length, first in ((40, 3), (9, 8), (17, 1), (40, 39), (2, 1))
    ]
    seen: list[int] = []
    for sequence, scores in zip(
        sequences, score_tokens(model, sequences, seen.append), strict=True
    ):
        ids = np.array(sequence.ids)
        log_p = log_softmax(model.logits(ids))[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(
            scores.log_probabilities, log_p[sequence.first - 1 :], rtol=1e-4, atol=1e-4
        )
    assert seen[-1] == 5


def test_a_token_is_greedy_only_if_it_is_the_most_probable() -> None:
    table = random_table()
    best = int(table[7].argmax())
    right, wrong = ScoredTokens((7, best), 1), ScoredTokens((7, best + 1), 1)
    found = score_tokens(TableModel(table), [right, wrong])
    assert [scores.greedy for scores in found] == [True, False]


def test_choices_of_one_token_share_a_row() -> None:
    model = TableModel(random_table())
    found = score_tokens(model, [ScoredTokens((5, 6, 7, last), 3) for last in (10, 11, 12, 13)])
    assert model.batches == [(1, 3)]
    expected = log_softmax(model.table[7])[10:14]
    np.testing.assert_allclose([scores.log_probabilities[0] for scores in found], expected)


@pytest.mark.parametrize(("ids", "first"), [((5, 6), 0), ((5, 6), 2), ((5,), 1)])
def test_nothing_to_score_is_refused(ids: tuple[int, ...], first: int) -> None:
    with pytest.raises(ValueError, match="sequence 0: expected tokens to score after its first"):
        score_tokens(TableModel(random_table()), [ScoredTokens(ids, first)])


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 60), st.none() | st.integers(1, 5))
def test_batches_hold_every_row_once_and_keep_their_bounds(
    lengths: list[int], tokens: int, most_rows: int | None
) -> None:
    rows = [(index,) * length for index, length in enumerate(lengths)]
    batches = list(batches_by_length(rows, tokens, most_rows))
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= tokens
        assert most_rows is None or len(batch) <= most_rows
