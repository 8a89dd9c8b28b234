from __future__ import annotations

import math

import numpy as np
import pytest

from deploy.completion_loss import completion_loss
from deploy.errors import ConfigError
from deploy.language_model import TorchLanguageModel
from reslora.batches import IGNORED, collate_rows, encode_examples
from reslora.row_formats import Example, parse_row
from tests.conftest import build_tiny_model, build_tiny_tokenizer
from tests.deploy.answering import TableModel, log_softmax, random_table


def examples(*rows: dict[str, object]) -> list[Example]:
    parsed = [parse_row(row, f"rows:{line}") for line, row in enumerate(rows, start=1)]
    return [example for example in parsed if example is not None]


TURNS = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "bb"},
    {"role": "user", "content": "c?"},
    {"role": "assistant", "content": "ddd"},
]
ROWS = examples({"prompt": "say it", "completion": "it"}, {"messages": TURNS}, {"text": "free"})


def test_only_learned_tokens_count() -> None:
    tokenizer, model = build_tiny_tokenizer(), TableModel(random_table())
    expected = []
    for sequence in encode_examples(ROWS, tokenizer, 512):
        for now, following in enumerate(sequence.labels[1:]):
            if following != IGNORED:
                expected.append(-log_softmax(model.table[sequence.input_ids[now]])[following])
    result = completion_loss(model, tokenizer, ROWS)
    assert result["n_tokens"] == len(expected) == 3 + 3 + 4 + 4
    assert result["completion_nll"] == pytest.approx(np.mean(expected))
    assert result["completion_ppl"] == pytest.approx(math.exp(np.mean(expected)))


def test_it_is_the_loss_that_training_sees() -> None:
    tokenizer, tiny = build_tiny_tokenizer(), build_tiny_model("llama")
    sequences = encode_examples(ROWS, tokenizer, 128)
    batch = collate_rows([(sequence,) for sequence in sequences], pad_id=0)
    expected = tiny(**batch).loss.item()
    result = completion_loss(TorchLanguageModel("tiny", tiny), tokenizer, ROWS)
    assert result["completion_nll"] == pytest.approx(expected, rel=1e-5)


def test_hopeless_models_and_empty_data_are_told() -> None:
    table = np.full((262, 262), -1e5)
    table[:, 0] = 1e5
    result = completion_loss(TableModel(table), build_tiny_tokenizer(), ROWS)
    assert result["completion_ppl"] == math.inf
    with pytest.raises(ConfigError, match="no example has a token to learn"):
        completion_loss(TableModel(table), build_tiny_tokenizer(), [])
