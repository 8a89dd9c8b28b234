"""Multiple choice tasks on local files, worded as lm-eval's own definitions word them.

A row becomes a question, its choices and the index of the right one. For each choice the model is
asked for

    log p(" " + choice | question)                    all tasks but
    log p(rest of the sentence | sentence up to and with the filler)     winogrande

Files are `<task>.dev.jsonl.gz` or `<task>.jsonl(.gz)` with the fields named in `_WORDINGS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from deploy.errors import ConfigError
from reslora.rows import decoded_rows

LETTERS = ("A", "B", "C", "D")
SUFFIXES = (".dev.jsonl.gz", ".jsonl.gz", ".jsonl")


class ChoiceTask(StrEnum):
    """Tasks that are scored by the likelihood of their choices."""

    ARC_EASY = "arc_easy"
    ARC_CHALLENGE = "arc_challenge"
    BOOLQ = "boolq"
    HELLASWAG = "hellaswag"
    OPENBOOKQA = "openbookqa"
    PIQA = "piqa"
    SOCIAL_I_QA = "social_i_qa"
    WINOGRANDE = "winogrande"
    MMLU = "mmlu"


@dataclass(frozen=True)
class Question:
    """What a model is asked."""

    text: str
    """What stands before every choice; for winogrande what stands after."""
    choices: tuple[str, ...]
    answer: int


def read_questions(directory: Path, task: ChoiceTask, limit: int | None = None) -> list[Question]:
    """Read the questions of a task.

    Args:
        directory: Holds the task's file.
        task: Which.
        limit: Read no more than these, the first; None reads all.

    Raises:
        ConfigError: There is no such file, or a row lacks a field or has a wrong one.
    """
    candidates = [directory / f"{task}{suffix}" for suffix in SUFFIXES]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise ConfigError(
            f"--data {directory}: task {task} needs a file "
            f"{', '.join(candidate.name for candidate in candidates)} there"
        )
    questions: list[Question] = []
    try:
        for origin, row in decoded_rows(str(path)):
            if limit is not None and len(questions) == limit:
                break
            questions.append(_question(task, row, origin))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not questions:
        raise ConfigError(f"{path}: holds no rows; give at least one question")
    return questions


def _question(task: ChoiceTask, row: object, origin: str) -> Question:
    if not isinstance(row, Mapping):
        raise ValueError(f"{origin}: expected a JSON object, got {type(row).__name__}")
    needed, wording = _WORDINGS[task]
    if task is ChoiceTask.HELLASWAG and isinstance(row.get("query"), str):
        needed, wording = ("query",), _cleaned_hellaswag
    for key in needed:
        if not isinstance(row.get(key), str):
            raise ValueError(f"{origin}: {task} needs a text {key!r}, got {row.get(key)!r:.80}")
    choices, answer = row.get("choices"), row.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise ValueError(f"{origin}: choices must be a list of at least 2 texts")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(
            f"{origin}: answer is {answer!r}, expected an index into {len(choices)} choices"
        )
    text, worded = wording(row, choices, origin)
    return Question(text, tuple(worded), answer)


Wording = Callable[[Mapping[Any, Any], list[str], str], tuple[str, list[str]]]


def _arc(row: Mapping[Any, Any], choices: list[str], origin: str) -> tuple[str, list[str]]:
    return f"Question: {row['question']}\nAnswer:", choices


def _boolq(row: Mapping[Any, Any], choices: list[str], origin: str) -> tuple[str, list[str]]:
    passage = f"{row['title']} -- {row['context']}"
    return f"{passage}\nQuestion: {row['question']}?\nAnswer:", choices


def _openbookqa(row: Mapping[Any, Any], choices: list[str], origin: str) -> tuple[str, list[str]]:
    return row["question"], choices


def _social_i_qa(row: Mapping[Any, Any], choices: list[str], origin: str) -> tuple[str, list[str]]:
    return f"Q: {row['context']} {row['question']}\nA:", choices


def _hellaswag(row: Mapping[Any, Any], choices: list[str], origin: str) -> tuple[str, list[str]]:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return clean_hellaswag(context), [clean_hellaswag(choice) for choice in choices]


def _cleaned_hellaswag(
    row: Mapping[Any, Any], choices: list[str], origin: str
) -> tuple[str, list[str]]:
    return row["query"], choices


def clean_hellaswag(text: str) -> str:
    """Take WikiHow's brackets out of a text."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _winogrande(row: Mapping[Any, Any], choices: list[str], origin: str) -> tuple[str, list[str]]:
    before, blank, after = row["sentence"].partition("_")
    if not blank or not after.strip():
        raise ValueError(f"{origin}: sentence has no '_' with text after it, to be filled in")
    return after.strip(), [before + choice for choice in choices]


def _mmlu(row: Mapping[Any, Any], choices: list[str], origin: str) -> tuple[str, list[str]]:
    if len(choices) != len(LETTERS):
        raise ValueError(f"{origin}: mmlu has {len(LETTERS)} choices, got {len(choices)}")
    subject = row["subject"].replace("_", " ")
    lines = [
        f"The following are multiple choice questions (with answers) about {subject}.",
        "",
        row["question"].strip(),
        *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)),
        "Answer:",
    ]
    return "\n".join(lines), list(LETTERS)


_WORDINGS: dict[ChoiceTask, tuple[tuple[str, ...], Wording]] = {
    ChoiceTask.ARC_EASY: (("question",), _arc),
    ChoiceTask.ARC_CHALLENGE: (("question",), _arc),
    ChoiceTask.BOOLQ: (("title", "context", "question"), _boolq),
    ChoiceTask.HELLASWAG: (("activity_label", "ctx_a", "ctx_b"), _hellaswag),
    ChoiceTask.OPENBOOKQA: (("question",), _openbookqa),
    ChoiceTask.PIQA: (("question",), _arc),
    ChoiceTask.SOCIAL_I_QA: (("context", "question"), _social_i_qa),
    ChoiceTask.WINOGRANDE: (("sentence",), _winogrande),
    ChoiceTask.MMLU: (("subject", "question"), _mmlu),
}
"""Fields of a row beside `choices` and `answer`, and how it is put."""
