from __future__ import annotations

import gzip
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from deploy.errors import ConfigError
from deploy.exact_match import exact_match, read_number_examples
from reslora.batches import IGNORED, encode_examples
from tests.conftest import build_tiny_tokenizer
from tests.deploy.answering import TableModel, random_table


def write(path: Path, rows: list[Any]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def test_the_reference_number_is_final_or_what_the_answer_comes_to(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "answer": "1 + 2\n#### 3"},
        {"question": "b", "final": 5.0},
        {"question": "c", "answer": "about 6", "final": "7"},
        {"prompt": "d", "completion": "the answer is 1,000"},
        {"messages": [{"role": "user", "content": "e"}, {"role": "assistant", "content": "9"}]},
    ]
    source = write(tmp_path / "rows.jsonl.gz", rows)
    found = [item.expected for item in read_number_examples(source)]
    assert found == [Decimal(number) for number in (3, 5, 7, 1000, 9)]
    assert len(read_number_examples(source, 2)) == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "a", "answer": "none"}, "the answer is 'none', expected a number in it"),
        ({"question": "a", "final": "none"}, "final is 'none', expected a number in it"),
        ({"text": "7"}, "plain text asks nothing"),
        ({"final": 3}, "unknown row format"),
        ([1], "expected a JSON object, got list"),
    ],
)
def test_rows_without_question_or_number_are_named(tmp_path: Path, row: object, said: str) -> None:
    source = write(tmp_path / "rows.jsonl", [{"question": "a", "final": 1}, row])
    with pytest.raises(ConfigError, match=f"rows.jsonl:2: .*{said}"):
        read_number_examples(source)


def test_sources_that_hold_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no rows"):
        read_number_examples(write(tmp_path / "rows.jsonl", []))
    with pytest.raises(ConfigError, match="no such file"):
        read_number_examples(str(tmp_path / "absent.jsonl"))
    (tmp_path / "rows.txt").write_text("7")
    with pytest.raises(ConfigError, match=r"unknown file type; expected one of \.jsonl"):
        read_number_examples(str(tmp_path / "rows.txt"))


def test_answers_are_asked_for_with_the_prompt_of_training_and_counted(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    written = {"one?": "It is $7.00.", "a longer one?": "The answer is 8", "last?": "no idea"}
    rows = [{"question": question, "answer": "#### 7"} for question in written]
    examples = read_number_examples(write(tmp_path / "rows.jsonl", [*rows, rows[0]]))
    model = TableModel(random_table())
    for item, text in zip(examples, written.values(), strict=False):
        trained = encode_examples([item.example], tokenizer, 512)[0]
        prompt = trained.input_ids[: sum(label == IGNORED for label in trained.labels)]
        model.answers[prompt] = tokenizer(text)["input_ids"]
    seen: list[int] = []
    result = exact_match(model, tokenizer, examples, max_new_tokens=64, progress=seen.append)
    assert [answer.text for answer in result.answers] == [*written.values(), "It is $7.00."]
    assert [answer.is_right for answer in result.answers] == [True, False, False, True]
    assert result.to_dict() == {"acc": 0.5, "stderr": math.sqrt(0.25 / 3), "n": 4}
    assert model.batches[0][0] == 3  # equal prompts are asked once
    assert seen == [4]


def test_a_prompt_that_is_too_long_loses_its_head(tmp_path: Path) -> None:
    examples = read_number_examples(
        write(tmp_path / "rows.jsonl", [{"question": "x" * 200, "final": 1}])
    )
    model = TableModel(random_table(), context_length=64)
    result = exact_match(model, build_tiny_tokenizer(), examples, max_new_tokens=14)
    assert model.batches == [(1, 50)]
    assert result.to_dict()["stderr"] is None


@pytest.mark.parametrize("count", [0, 64, 100])
def test_an_answer_that_leaves_no_room_is_refused(tmp_path: Path, count: int) -> None:
    examples = read_number_examples(write(tmp_path / "rows.jsonl", [{"question": "x", "final": 1}]))
    model = TableModel(random_table(), context_length=64)
    with pytest.raises(ConfigError, match=f"--max-new-tokens {count}: expected at least 1"):
        exact_match(model, build_tiny_tokenizer(), examples, max_new_tokens=count)
