from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from deploy.choice_tasks import ChoiceTask, read_questions
from deploy.errors import ConfigError
from deploy.exact_match import exact_match, read_number_examples
from deploy.language_model import open_language_model
from deploy.multiple_choice import multiple_choice
from tests.conftest import build_tiny_tokenizer
from tests.deploy.answering import TableModel, log_softmax, random_table
from tests.deploy.tiny_artifacts import make_checkpoint, make_export, save_model

TWO = {"choices": ["one", "three"], "answer": 1}
WORDED = {
    "arc_easy": ({"question": "Q?"} | TWO, "Question: Q?\nAnswer:", ("one", "three")),
    "piqa": ({"question": "Q?"} | TWO, "Question: Q?\nAnswer:", ("one", "three")),
    "openbookqa": ({"question": "Q"} | TWO, "Q", ("one", "three")),
    "social_i_qa": ({"context": "C.", "question": "Q?"} | TWO, "Q: C. Q?\nA:", ("one", "three")),
    "boolq": (
        {"title": "T", "context": "C.", "question": "q"} | TWO,
        "T -- C.\nQuestion: q?\nAnswer:",
        ("one", "three"),
    ),
    "hellaswag": (
        {"activity_label": "L", "ctx_a": "[header] A [title] b.", "ctx_b": "then IT"} | TWO,
        "L: A. b. Then it",
        ("one", "three"),
    ),
    "winogrande": (
        {"sentence": "He saw _ there."} | TWO,
        "there.",
        ("He saw one", "He saw three"),
    ),
    "mmlu": (
        {"subject": "high_art", "question": " Q? ", "choices": list("wxyz"), "answer": 2},
        "The following are multiple choice questions (with answers) about high art.\n\n"
        "Q?\nA. w\nB. x\nC. y\nD. z\nAnswer:",
        ("A", "B", "C", "D"),
    ),
}


def write(directory: Path, task: str, *rows: object) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / f"{task}.jsonl").write_text(text)
    return directory


@pytest.mark.parametrize("task", sorted(WORDED))
def test_questions_are_put_as_lm_eval_puts_them(tmp_path: Path, task: str) -> None:
    row, text, choices = WORDED[task]
    (question,) = read_questions(write(tmp_path, task, row, row), ChoiceTask(task), 1)
    assert (question.text, question.choices) == (text, choices)
    assert question.answer == row["answer"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "needs a text 'question', got None"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least 2 texts"),
        ({"question": "q", "choices": ["a", " "], "answer": 0}, "at least 2 texts"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "an index into 2 choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "an index into 2 choices"),
        (7, "expected a JSON object"),
    ],
)
def test_rows_that_ask_nothing_are_named(tmp_path: Path, row: object, said: str) -> None:
    with pytest.raises(ConfigError, match=f"arc_easy.jsonl:1: .*{said}"):
        read_questions(write(tmp_path, "arc_easy", row), ChoiceTask.ARC_EASY)
    with pytest.raises(ConfigError, match=r"task piqa needs a file piqa\.dev\.jsonl\.gz"):
        read_questions(tmp_path, ChoiceTask.PIQA)


def test_figures_equal_their_definitions(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model, tokenizer = TableModel(random_table(3)), build_tiny_tokenizer()
    generator = np.random.default_rng(0)
    rows = [
        {
            "question": f"q{i}",
            "choices": ["x" * int(n) + "y" for n in generator.integers(1, 9, 3)],
            "answer": i % 3,
        }
        for i in range(12)
    ]
    questions = read_questions(write(tmp_path, "arc_easy", *rows), ChoiceTask.ARC_EASY)
    right, normed = [], []
    for question in questions:
        sums = []
        for choice in question.choices:
            ids = tokenizer(f":{' '}{choice}")["input_ids"]
            log_p = [log_softmax(model.table[a])[b] for a, b in itertools.pairwise(ids)]
            sums.append(sum(log_p))
        right.append(np.argmax(sums) == question.answer)
        lengths = [len(choice) for choice in question.choices]
        normed.append(np.argmax(np.array(sums) / lengths) == question.answer)
    assert right != normed
    found = multiple_choice(model, tokenizer, ChoiceTask.ARC_EASY, questions)
    assert found["acc"] == pytest.approx(np.mean(right))
    assert found["acc_norm"] == pytest.approx(np.mean(normed))
    assert found["stderr"] == pytest.approx(np.std(right, ddof=1) / 12**0.5)


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'rolora\[eval\]'"):
        multiple_choice(TableModel(random_table()), build_tiny_tokenizer(), ChoiceTask.ARC_EASY, [])


def test_a_float_export_writes_and_chooses_what_torch_does(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    source = save_model(tmp_path / "model")
    make_export(make_checkpoint(source, tmp_path / "checkpoint", "FP32"), tmp_path / "onnx")
    rows = [{"question": "a" * n, "final": n} for n in (1, 5, 17, 30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = read_number_examples(str(tmp_path / "rows.jsonl"))
    row = WORDED["winogrande"][0]
    questions = read_questions(write(tmp_path, "winogrande", row), ChoiceTask.WINOGRANDE)
    texts, choices, raw = [], [], []
    for name in ("model", "checkpoint", "onnx"):
        opened = open_language_model(str(tmp_path / name), threads=1)
        answers = exact_match(opened.model, opened.tokenizer, examples, max_new_tokens=24)
        texts.append([answer.text for answer in answers.answers])
        raw.append(opened.model.generate([[9], [40, 41, 42, 43], [50, 51]], 20, frozenset()))
        choices.append(
            multiple_choice(opened.model, opened.tokenizer, ChoiceTask.WINOGRANDE, questions)
        )
    assert texts[0] == texts[1] == texts[2]
    assert raw[0] == raw[1] == raw[2]
    assert len({tuple(answer) for answer in raw[0]}) == 3
    assert choices[0] == choices[1] == choices[2]
    assert set(choices[0]) == {"acc", "stderr", "n"}
