from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from reslora.labelled_rows import (
    LabelledExample,
    LabelScheme,
    find_labels,
    parse_labelled,
    read_labelled_rows,
)


def examples(*labels: Any) -> list[LabelledExample]:
    return [LabelledExample(f"rows:{i}", ("text",), label) for i, label in enumerate(labels, 1)]


@pytest.mark.parametrize(
    ("row", "texts", "label"),
    [
        ({"text": "a", "label": 1}, ("a",), 1),
        ({"id": "x", "sentence": "a", "label": "no"}, ("a",), "no"),
        ({"sentence1": "a", "sentence2": "b", "label": 0, "idx": 4}, ("a", "b"), 0),
        ({"sentence1": "a", "sentence2": "b", "score": 2.5}, ("a", "b"), 2.5),
        ({"premise": "a", "hypothesis": "b", "label": 2}, ("a", "b"), 2),
        ({"question": "a", "sentence": "b", "label": 1}, ("a", "b"), 1),
        ({"text": "a", "label": 3, "score": 0.5}, ("a",), 3),
    ],
)
def test_every_form_is_read(row: Any, texts: tuple[str, ...], label: Any) -> None:
    found = parse_labelled(row, "here:1")
    assert (found.texts, found.label, type(found.label)) == (texts, label, type(label))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([], "expected a JSON object, got list"),
        ({}, "it has no keys"),
        ({"text": "a"}, "no classification row, it has text; expected label or score"),
        ({"label": 1, "sentence1": "a"}, "it has label, sentence1"),
        ({"text": "a", "label": None}, "no classification row"),
        ({"text": 5, "label": 1}, "text must be a string, got int"),
        ({"text": " ", "label": 1}, "text is empty"),
        ({"text": "\ud800", "label": 1}, "not valid Unicode"),
        ({"text": "a", "label": True}, "label must be .* got bool"),
        ({"text": "a", "label": [1]}, "label must be .* got list"),
        ({"text": "a", "label": -1}, "label is -1; .* hidden labels"),
        ({"text": "a", "label": float("nan")}, "label is nan, expected a finite number"),
        ({"text": "a", "label": ""}, "label is empty"),
        ({"text": "a", "label": "\udfff"}, "not valid Unicode"),
    ],
)
def test_bad_rows_are_named(row: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^here:7: .*{said}"):
        parse_labelled(row, "here:7")


def test_files_are_read_with_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    lines = [json.dumps({"sentence": "good", "label": 1}), "", '{"sentence": "x"}']
    path.write_bytes(gzip.compress("\n".join(lines[:2]).encode()))
    assert read_labelled_rows(str(path)) == [LabelledExample(f"{path}:1", ("good",), 1)]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(ValueError, match=r"rows.jsonl.gz:3: no classification row"):
        read_labelled_rows(str(path))


def test_sources_that_hold_no_labels_are_refused(tmp_path: Path) -> None:
    text, empty = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("words\n")
    empty.write_text("\n")
    with pytest.raises(ValueError, match=r"unknown file type; expected one of .jsonl, .jsonl.gz$"):
        read_labelled_rows(str(text))
    with pytest.raises(ValueError, match="holds no rows"):
        read_labelled_rows(str(empty))
    with pytest.raises(ValueError, match="no such file"):
        read_labelled_rows(str(tmp_path / "absent.jsonl"))


@pytest.mark.parametrize(
    ("labels", "names", "targets"),
    [
        ((1, 0, 1), ("0", "1"), [1, 0, 1]),
        ((10, 9, 2), ("2", "9", "10"), [2, 1, 0]),
        (("no", "yes", "no"), ("no", "yes"), [0, 1, 0]),
        (("1", "0"), ("0", "1"), [1, 0]),
        ((1, 2.5), (), [1.0, 2.5]),
        ((3.0, 3.0), (), [3.0, 3.0]),
    ],
)
def test_labels_become_classes_or_numbers(
    labels: tuple[Any, ...], names: tuple[str, ...], targets: list[float]
) -> None:
    rows = examples(*labels)
    scheme = find_labels(rows)
    assert (scheme.names, scheme.is_regression) == (names, not names)
    assert [scheme.target(row) for row in rows] == targets
    assert scheme.outputs == max(1, len(names))


def test_integers_count_classes_that_are_named_by_words() -> None:
    words = LabelScheme(("negative", "positive"))
    assert [words.target(row) for row in examples(1, "negative")] == [1, 0]
    with pytest.raises(ValueError, match=r"rows:1: label is 2, expected one of negative, positive"):
        words.target(examples(2)[0])
    with pytest.raises(ValueError, match=r"rows:1: label is 0, expected one of 1, 2"):
        LabelScheme(("1", "2")).target(examples(0)[0])  # not the first class by accident
    with pytest.raises(ValueError, match="label is 'x', expected a number"):
        LabelScheme(()).target(examples("x")[0])


def test_labels_that_cannot_be_learned_are_refused() -> None:
    with pytest.raises(ValueError, match="rows:1: label is the number 1, but a string at rows:2"):
        find_labels(examples(1, "yes"))
    with pytest.raises(ValueError, match="rows:1: every row of the training set has the label 4"):
        find_labels(examples(4, 4))
