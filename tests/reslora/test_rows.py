from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reslora.row_formats import Example, Message, parse_row
from reslora.rows import read_rows, split_validation

QUESTION = Message("user", "why?")
ANSWER = Message("assistant", "because")


def write_rows(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [vars(QUESTION), vars(ANSWER)]},
        {"messages": [vars(QUESTION), {"role": "assistant", "content": [{"text": "because"}]}]},
        {"prompt": "why?", "completion": "because"},
        {"prompt": [vars(QUESTION)], "completion": [vars(ANSWER)]},
        {"instruction": "why?", "input": "", "output": "because"},
        {"instruction": "why?", "output": "because", "text": "the same, rendered"},
        {"question": "why?", "answer": "because", "id": 4},
    ],
)
def test_formats_of_one_conversation(row: dict[str, Any]) -> None:
    assert parse_row(row, "f:1") == Example("f:1", (QUESTION, ANSWER))


def test_instruction_with_input_and_choices_and_context() -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    assert parse_row(row, "f:1") == Example(
        "f:1", (Message("user", "add\n\n1 2"), Message("assistant", "3"))
    )
    choice = {"context": "sky", "question": "colour?", "choices": ["red", "blue"], "answer": 1}
    assert parse_row(choice, "f:1") == Example(
        "f:1", (Message("user", "sky\n\ncolour?\n- red\n- blue"), Message("assistant", "blue"))
    )


def test_text_rows() -> None:
    assert parse_row({"text": "abc"}, "f:1") == Example("f:1", text="abc")
    assert parse_row({"text": " \n"}, "f:1") is None
    with pytest.raises(ValueError, match=r"f:1: text with label is classification data"):
        parse_row({"text": "abc", "label": 1}, "f:1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a"], "expected a JSON object, got list"),
        ({}, "unknown row format with no keys"),
        ({"prompt": "a"}, "unknown row format with prompt; expected one of messages; prompt"),
        ({"prompt": "a", "completion": " "}, "completion is empty"),
        ({"prompt": {"a": 1}, "completion": "b"}, "prompt must be a string, got dict"),
        ({"question": "a", "answer": True}, "answer must be a string, got bool"),
        ({"question": "a", "answer": 2, "choices": ["x"]}, "answer is 2, expected an index into 1"),
        ({"messages": []}, "messages must be a non-empty list"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\].role is 'bot'"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content must be a string"),
        ({"messages": [vars(QUESTION)]}, "last message is from 'user'"),
        ({"messages": [vars(ANSWER)]}, "a conversation needs a message before"),
        ({"text": "\ud800"}, "not valid Unicode"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"text": "fine"}, row)
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: {message}"):
        read_rows(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = ("messages", "prompt", "completion", "instruction", "input", "output", "question", "answer")
MORE_KEYS = (*KEYS, "choices", "context", "text", "label")
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "x"]),
            "content": st.text(max_size=5),
        }
    ),
    max_size=4,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(MORE_KEYS), JSON_VALUES | MESSAGES, max_size=5))
def test_any_row_gives_a_usable_example_or_an_error_with_its_place(row: dict[str, Any]) -> None:
    try:
        example = parse_row(row, "data.jsonl:7")
    except ValueError as error:
        assert str(error).startswith("data.jsonl:7: ")  # noqa: PT017
        return
    if example is None:
        assert not row["text"].strip()
    elif example.messages:
        assert len(example.messages) > 1
        assert example.messages[-1].role == "assistant"
        assert example.messages[-1].content.strip()
    else:
        assert example.text.strip()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=9), st.text(min_size=1, max_size=9)).filter(
            lambda pair: all(side.strip() for side in pair)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_what_is_written_is_read(pairs: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
        examples = read_rows(write_rows(Path(directory) / "rows.jsonl", *rows))
    read = [tuple(message.content for message in example.messages) for example in examples]
    assert read == pairs


def test_gzip_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}\n{"text": ""}\n'))
    examples = read_rows(str(path))
    assert [example.text for example in examples] == ["a", "b"]
    assert examples[1].origin == f"{path}:3"


def test_text_file_is_cut_at_line_ends_and_loses_nothing(tmp_path: Path) -> None:
    lines = [f"line {index} of the text\n" for index in range(600)]
    path = tmp_path / "corpus.txt"
    path.write_text("".join(lines), encoding="utf-8")
    examples = read_rows(str(path))
    assert len(examples) == 4
    assert "\n".join(example.text for example in examples) == "".join(lines).strip()
    assert examples[1].origin.rsplit(":", 1)[1] == str(1 + examples[0].text.count("\n") + 1)


def test_damaged_and_missing_sources(tmp_path: Path) -> None:
    def refused(name: str, data: bytes | None, message: str) -> None:
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_rows(str(path))

    refused("no.jsonl", None, r"no.jsonl: no such file")
    refused("empty.jsonl", b"", r"empty.jsonl: holds no rows")
    refused("blank.txt", b"\n \n", r"blank.txt: holds no rows")
    refused("spaces.jsonl", b'{"text": " "}\n', r"spaces.jsonl: holds no rows")
    refused("table.csv", b"a,b\n", r"table.csv: unknown file type; expected one of .jsonl")
    refused("half.jsonl", b'{"text": "a"}\n{"text": \n', r"half.jsonl:2: not valid JSON")
    refused("deep.jsonl", b"[" * 100_000, r"deep.jsonl:1: not valid JSON")
    refused("latin.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n', r"latin.jsonl:2: not UTF-8")
    whole = gzip.compress(json.dumps({"text": "a" * 10_000}).encode())
    refused("cut.jsonl.gz", whole[:-9], r"cut.jsonl.gz: unreadable after line")
    refused("not.jsonl.gz", b"plain", r"not.jsonl.gz: unreadable after line 0")
    with pytest.raises(ValueError, match="is a directory"):
        read_rows(str(tmp_path))


def test_a_failing_hub_data_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ValueError, match=r"someone/data: neither .*ConnectionError: no network"):
        read_rows("someone/data")


def test_hub_rows_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "a"}, {"text": 3}]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    with pytest.raises(ValueError, match=r"someone/data\[test\] row 2: text must be a string"):
        read_rows("someone/data", split="test")


@settings(deadline=None)
@given(st.integers(2, 60), st.floats(0, 0.99), st.integers(0, 3))
def test_validation_split(count: int, fraction: float, seed: int) -> None:
    examples = [Example(str(index), text="x") for index in range(count)]
    train, held_out = split_validation(examples, fraction, seed)
    assert sorted(train + held_out, key=lambda e: int(e.origin)) == examples
    assert train
    assert bool(held_out) == (fraction > 0)
    assert (train, held_out) == split_validation(examples, fraction, seed)
