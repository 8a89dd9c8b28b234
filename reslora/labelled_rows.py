"""Rows of classification data: a text or a pair of texts, and a label.

    text / label                    also sentence / label
    sentence1 / sentence2 / label   also premise / hypothesis, question1 / question2, text1 / text2
    question / sentence / label

A row is recognized by its keys; `score` may stand for `label`. Labels that are strings or integers
name classes; a data set with a fractional label is a regression, as STS-B is. A bad row raises with
file and line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reslora.row_formats import refuse_unencodable
from reslora.rows import decoded_rows

TEXT_KEYS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
LABEL_KEYS = ("label", "score")

Label = str | int | float


@dataclass(frozen=True)
class LabelledExample:
    """One row."""

    origin: str
    """Where it was read, `file:line`; errors found later name it."""
    texts: tuple[str, ...]
    """One text, or a pair."""
    label: Label


@dataclass(frozen=True)
class LabelScheme:
    """What labels mean to a model: one of some classes, or a number."""

    names: tuple[str, ...]
    """Of the classes, in the order of the logits; none for a regression."""

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number."""
        return not self.names

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return len(self.names) or 1

    def target(self, example: LabelledExample) -> int | float:
        """Return the class index or the number that a model learns from an example.

        An integer that is no name counts classes whose names are words: 1 is the second of
        `negative`, `positive`.

        Raises:
            ValueError: The label is of no class, or no number; the message names file and line.
        """
        label = example.label
        if self.is_regression:
            if isinstance(label, str):
                raise ValueError(f"{example.origin}: label is {label!r}, expected a number")
            return float(label)
        if str(label) in self.names:
            return self.names.index(str(label))
        are_words = not any(name.isdecimal() for name in self.names)
        if isinstance(label, int) and are_words and 0 <= label < len(self.names):
            return label
        known = ", ".join(self.names[:10]) + (", ..." if len(self.names) > 10 else "")
        raise ValueError(f"{example.origin}: label is {label!r}, expected one of {known}")


def read_labelled_rows(source: str, *, split: str = "train") -> list[LabelledExample]:
    """Read all rows of a classification data set.

    Args:
        source: Path of a JSONL file (gzip or not), or a hub data set id.
        split: Split of a hub data set; ignored for files.

    Returns:
        At least one example, in file order.

    Raises:
        ValueError: The source is missing, empty, damaged or of unknown type, or a row is malformed.
    """
    examples = [parse_labelled(row, origin) for origin, row in decoded_rows(source, split=split)]
    if not examples:
        raise ValueError(f"{source}: holds no rows; give at least one example")
    return examples


def parse_labelled(row: object, origin: str) -> LabelledExample:
    """Turn one decoded row into an example.

    Args:
        row: The decoded JSON value.
        origin: `file:line`, put before every error.

    Raises:
        ValueError: The row has no text or no label, or one that is no text or label.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{origin}: expected a JSON object, got {type(row).__name__}")
    keys = next((keys for keys in TEXT_KEYS if all(row.get(key) is not None for key in keys)), None)
    label_key = next((key for key in LABEL_KEYS if row.get(key) is not None), None)
    if keys is None or label_key is None:
        found = ", ".join(sorted(map(str, row))) or "no keys"
        known = "; ".join("+".join(keys) for keys in TEXT_KEYS)
        raise ValueError(
            f"{origin}: no classification row, it has {found}; expected {' or '.join(LABEL_KEYS)} "
            f"with one of {known}"
        )
    texts = tuple(_text(row[key], key, origin) for key in keys)
    return LabelledExample(origin, texts, _label(row[label_key], label_key, origin))


def find_labels(examples: Sequence[LabelledExample]) -> LabelScheme:
    """Return what the labels of a training set mean.

    Args:
        examples: Training examples.

    Returns:
        Classes in ascending order, or a regression where a label has a fraction or is written with
        one.

    Raises:
        ValueError: Strings and numbers are mixed, or all examples have one class.
    """
    words = [example for example in examples if isinstance(example.label, str)]
    numbers = [example for example in examples if not isinstance(example.label, str)]
    if words and numbers:
        raise ValueError(
            f"{numbers[0].origin}: label is the number {numbers[0].label!r}, but a string at "
            f"{words[0].origin}; write all labels as strings or all as numbers"
        )
    if any(isinstance(example.label, float) for example in numbers):
        return LabelScheme(())
    classes = {example.label for example in examples}
    if len(classes) < 2:
        raise ValueError(
            f"{examples[0].origin}: every row of the training set has the label "
            f"{examples[0].label!r}; there is nothing to tell apart"
        )
    if words:
        return LabelScheme(tuple(sorted(map(str, classes))))
    return LabelScheme(tuple(str(label) for label in sorted(map(int, classes))))


def require_same_kind(
    examples: Sequence[LabelledExample], training: Sequence[LabelledExample]
) -> None:
    """Check that validation labels are written as the training labels are.

    Classes of words are put in alphabetical order, which integers need not count by: MNLI's 0 is
    `entailment`, the second of its words.

    Raises:
        ValueError: One side has strings, the other numbers; the message names file and line.
    """
    are_words = isinstance(training[0].label, str)
    for example in examples:
        if isinstance(example.label, str) != are_words:
            raise ValueError(
                f"{example.origin}: label is {example.label!r}, but the training rows have labels "
                f"like {training[0].label!r}; write both as strings or both as numbers"
            )


def _text(value: object, key: str, origin: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{origin}: {key} must be a string, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{origin}: {key} is empty; fill it or delete the row")
    refuse_unencodable(value, origin)
    return value


def _label(value: object, key: str, origin: str) -> Label:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(
            f"{origin}: {key} must be a string, an integer or a number, got {type(value).__name__}"
        )
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{origin}: {key} is empty; fill it or delete the row")
        refuse_unencodable(value, origin)
    elif not math.isfinite(value):
        raise ValueError(f"{origin}: {key} is {value}, expected a finite number")
    elif isinstance(value, int) and value < 0:
        raise ValueError(
            f"{origin}: {key} is {value}; classes count from 0, and -1 marks hidden labels in test "
            "splits: use rows with labels"
        )
    return value
