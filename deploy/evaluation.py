"""The evaluate stage: any model, with or without an unmerged adapter, on any tasks.

Three kinds of tasks want three kinds of data. Text (`ppl`, `kl`) is cut into windows, rows
(`exact-match`, `completion-ppl`) come from a file or a hub id, and multiple choice tasks are looked
for in a directory. One `--data` serves them: a file is text and rows, a directory is for multiple
choice, and text tasks then take the sample that ships with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from deploy.calibration_text import sample_text
from deploy.choice_tasks import ChoiceTask, Question, read_questions
from deploy.completion_loss import completion_loss
from deploy.errors import ConfigError
from deploy.exact_match import MAX_NEW_TOKENS, NumberExample, exact_match, read_number_examples
from deploy.language_model import OpenedModel, open_language_model
from deploy.multiple_choice import multiple_choice, require_harness
from deploy.text_data import read_text
from deploy.text_quality import Task, Windows, cut_windows, evaluate_model
from reslora.row_formats import Example
from reslora.rows import read_rows


class RowTask(StrEnum):
    """Tasks on the rows of a data set."""

    EXACT_MATCH = "exact-match"
    COMPLETION_PPL = "completion-ppl"


TASKS: tuple[Task | RowTask | ChoiceTask, ...] = (*Task, *RowTask, *ChoiceTask)


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and on what."""

    model: str
    tasks: tuple[Task | RowTask | ChoiceTask, ...] = (Task.PPL,)
    data: str | None = None
    reference: str | None = None
    adapter: Path | None = None
    """Attached to the model, not merged."""
    windows: int = 12
    window_tokens: int = 1024
    limit: int | None = None
    """Most rows or questions of a task."""
    max_new_tokens: int = MAX_NEW_TOKENS
    threads: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before a model is loaded.

        Raises:
            ConfigError: A number is out of range, kl has no reference, or the data are of a kind
                that a task cannot use.
        """
        for option, number in (("--limit", self.limit), ("--threads", self.threads)):
            if number is not None and number < 1:
                raise ConfigError(f"{option}: expected at least 1, got {number}")
        if Task.KL in self.tasks and self.reference is None:
            raise ConfigError("task kl compares with a reference: give --reference")
        is_directory = self.data is not None and Path(self.data).is_dir()
        got = "none" if self.data is None else self.data
        if is_directory and not any(isinstance(task, ChoiceTask) for task in self.tasks):
            raise ConfigError(
                f"--data {self.data}: is a directory, which is for multiple choice; "
                f"{', '.join(self.tasks)} take a file or a hub id"
            )
        for task in self.tasks:
            if isinstance(task, ChoiceTask) and not is_directory:
                raise ConfigError(
                    f"task {task}: --data must be a directory that holds {task}.jsonl.gz, got {got}"
                )
            if isinstance(task, RowTask) and (self.data is None or is_directory):
                raise ConfigError(
                    f"task {task}: --data must be a JSONL(.gz) file or a hub id, got {got}"
                )


def parse_tasks(text: str) -> tuple[Task | RowTask | ChoiceTask, ...]:
    """Read a comma-separated list of tasks; each comes once, in the order given.

    Raises:
        ConfigError: A task is unknown, or none is given.
    """
    known = {str(task): task for task in TASKS}
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(
            f"--tasks {text!r}: expected a comma-separated list of {', '.join(known)}, or "
            f"classification alone; got {', '.join(unknown) or 'none'}"
        )
    return tuple(known[name] for name in dict.fromkeys(names))


@dataclass(frozen=True)
class _Inputs:
    """What was read before a model was loaded, so that a bad row costs no time."""

    text: str
    numbers: list[NumberExample]
    rows: list[Example]
    questions: dict[ChoiceTask, list[Question]]


def run_evaluation(
    settings: EvaluationSettings, progress: Callable[[str], None] = lambda step: None
) -> dict[str, Any]:
    """Run the stage.

    Args:
        settings: What to do.
        progress: Called with a line for each step.

    Returns:
        `model`, `adapter`, `reference`, and `results`: `ppl` and what a reference adds to it flat,
        each other task under its name. Where a reference is given, `reference_results` has its own
        figures of those tasks. `windows` and `window_tokens` are there for text tasks.

    Raises:
        ConfigError: Data or options cannot be used, or lm-eval is missing.
        StageOrderError: The model is an adapter, or an adapter is given to no plain model.
        ArtifactError: A file is damaged, or the adapter belongs to another model.
        UnsupportedModelError: The model is of another family.
    """
    inputs = _read(settings)
    progress(f"loading {settings.model}")
    opened = open_language_model(settings.model, adapter=settings.adapter, threads=settings.threads)
    compared: OpenedModel | None = None
    if settings.reference is not None:
        progress(f"loading {settings.reference}")
        compared = open_language_model(settings.reference, threads=settings.threads)
    summary: dict[str, Any] = {
        "model": settings.model,
        "adapter": None if settings.adapter is None else str(settings.adapter),
        "reference": settings.reference,
    }
    results: dict[str, Any] = {}
    text_tasks = frozenset(task for task in settings.tasks if isinstance(task, Task))
    if text_tasks:
        cut = cut_windows(opened.tokenizer, inputs.text, settings.windows, settings.window_tokens)
        summary |= _window_counts(cut)
        results |= evaluate_model(
            opened.model,
            None if compared is None else compared.model,
            cut,
            text_tasks,
            lambda done: progress(f"window {done} of {settings.windows}"),
        )
    results |= dict(_answers(opened, settings, inputs, progress))
    summary["results"] = results
    if compared is not None and len(text_tasks) < len(settings.tasks):
        summary["reference_results"] = dict(_answers(compared, settings, inputs, progress))
    return summary


def result_lines(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return name and figures of each result, for a table."""
    lines = []
    for name, value in results.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        said = (f"{key} {_figure(part)}".strip() for key, part in parts)
        lines.append((name, ", ".join(said)))
    return lines


def _figure(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _read(settings: EvaluationSettings) -> _Inputs:
    data, limit = settings.data, settings.limit
    text, numbers, rows = "", [], []
    if any(isinstance(task, Task) for task in settings.tasks):
        has_text = data is not None and not Path(data).is_dir()
        text = read_text(str(data)) if has_text else sample_text("evaluation.txt")
    if data is not None and RowTask.EXACT_MATCH in settings.tasks:
        numbers = read_number_examples(data, limit)
    if data is not None and RowTask.COMPLETION_PPL in settings.tasks:
        try:
            rows = read_rows(data)[:limit]
        except ValueError as error:
            raise ConfigError(str(error)) from error
    choosing = [task for task in settings.tasks if isinstance(task, ChoiceTask)]
    if choosing:
        require_harness()
    questions = {task: read_questions(Path(str(data)), task, limit) for task in choosing}
    return _Inputs(text, numbers, rows, questions)


def _window_counts(cut: Windows) -> dict[str, int]:
    return {"windows": len(cut.ids), "window_tokens": len(cut.ids[0])}


def _answers(
    opened: OpenedModel,
    settings: EvaluationSettings,
    inputs: _Inputs,
    progress: Callable[[str], None],
) -> Iterator[tuple[str, Any]]:
    """Yield name and result of each task that is measured on one model alone."""
    model, tokenizer = opened.model, opened.tokenizer
    for task in settings.tasks:
        if task is RowTask.EXACT_MATCH:
            total = len(inputs.numbers)
            answers = exact_match(
                model,
                tokenizer,
                inputs.numbers,
                max_new_tokens=settings.max_new_tokens,
                progress=_counter(progress, f"{model.name}: answer", total),
            )
            yield "exact_match", answers.to_dict()
        elif task is RowTask.COMPLETION_PPL:
            count = _counter(progress, f"{model.name}: completion", len(inputs.rows))
            yield from completion_loss(model, tokenizer, inputs.rows, count).items()
        elif isinstance(task, ChoiceTask):
            questions = inputs.questions[task]
            total = sum(len(question.choices) for question in questions)
            count = _counter(progress, f"{model.name}: {task}: choice", total)
            yield str(task), multiple_choice(model, tokenizer, task, questions, count)


def _counter(progress: Callable[[str], None], what: str, total: int) -> Callable[[int], None]:
    return lambda done: progress(f"{what} {done} of {total}")
