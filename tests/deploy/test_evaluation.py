from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import cli
from deploy.errors import ConfigError
from deploy.evaluation import (
    TASKS,
    EvaluationSettings,
    RowTask,
    parse_tasks,
    result_lines,
    run_evaluation,
)
from deploy.text_quality import Task
from tests.deploy.tiny_artifacts import make_adapter, save_model, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("evaluation")
    make_adapter(save_model(base / "model"), base / "adapter", "reslora")
    write_rows(base / "rows.jsonl")
    (base / "numbers.jsonl").write_text('{"question": "1 + 1?", "final": 2}\n' * 3)
    row = {"question": "Q?", "choices": ["a", "bb"], "answer": 0}
    (base / "piqa.jsonl").write_text((json.dumps(row) + "\n") * 4)
    return base


def test_tasks_are_parsed_once_each_in_order() -> None:
    assert parse_tasks(" kl, exact-match,kl ") == (Task.KL, RowTask.EXACT_MATCH)
    assert len(set(map(str, TASKS))) == len(TASKS)
    for text, named in (("ppl,bleu", "got bleu"), ("", "got none"), (",", "got none")):
        with pytest.raises(
            ConfigError,
            match=f"expected a comma-separated list of .*, or classification alone; {named}",
        ):
            parse_tasks(text)


def test_the_command_line_names_every_task() -> None:
    said = (Path(cli.__file__).parent / "docs" / "commands.md").read_text()
    section = " ".join(said.split("## rolora evaluate")[1].split("## rolora export")[0].split())
    words = re.sub("[\u2502.,;]", " ", section).split()
    assert [task for task in map(str, TASKS) if task not in words] == []


def test_every_kind_of_task_is_measured_with_adapter_and_reference(base: Path) -> None:
    steps: list[str] = []
    common = {"model": str(base / "model"), "reference": str(base / "model"), "windows": 1}
    common |= {"window_tokens": 32, "max_new_tokens": 8, "limit": 2}
    settings = EvaluationSettings(
        tasks=(Task.KL, RowTask.COMPLETION_PPL),
        data=str(base / "rows.jsonl"),
        adapter=base / "adapter",
        **common,  # type: ignore[arg-type]
    )
    found = run_evaluation(settings, steps.append)
    assert found["adapter"] == str(base / "adapter")
    assert found["results"]["kl_mean"] > 1e-6
    assert found["results"]["n_tokens"] == found["reference_results"]["n_tokens"]
    assert found["results"]["completion_nll"] != found["reference_results"]["completion_nll"]
    assert steps[-1].endswith("completion 2 of 2")
    settings = EvaluationSettings(
        tasks=(RowTask.EXACT_MATCH,),
        data=str(base / "numbers.jsonl"),
        **common,  # type: ignore[arg-type]
    )
    found = run_evaluation(settings, steps.append)
    assert found["results"] == found["reference_results"]
    assert found["results"]["exact_match"]["n"] == 2
    assert "windows" not in found
    assert "window 1 of 1" in steps
    assert any(step.endswith("answer 2 of 2") for step in steps)


def test_multiple_choice_comes_from_a_directory_beside_text_of_ours(base: Path) -> None:
    pytest.importorskip("lm_eval")
    settings = EvaluationSettings(
        model=str(base / "model"),
        tasks=parse_tasks("ppl,piqa"),
        data=str(base),
        windows=1,
        window_tokens=32,
        limit=3,
    )
    results = run_evaluation(settings)["results"]
    assert set(results) == {"ppl", "piqa"}
    assert set(results["piqa"]) == {"acc", "acc_norm", "stderr", "n"}
    assert results["piqa"]["n"] == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 0}, "--limit: expected at least 1, got 0"),
        ({"tasks": (Task.KL,)}, "give --reference"),
        ({"tasks": parse_tasks("piqa")}, "--data must be a directory"),
        ({"tasks": parse_tasks("piqa"), "data": "rows.jsonl"}, "got rows.jsonl"),
        ({"tasks": parse_tasks("exact-match")}, "must be a JSONL.* got none"),
        ({"tasks": parse_tasks("completion-ppl,piqa"), "data": "."}, "must be a JSONL"),
        ({"data": "."}, "is a directory, which is for multiple choice; ppl take a file"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(
    options: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        EvaluationSettings(model="absent", **options)  # type: ignore[arg-type]


def test_results_become_lines() -> None:
    results = {"ppl": 2.0, "exact_match": {"acc": 0.5, "stderr": None, "n": 1}}
    assert result_lines(results) == [("ppl", "2"), ("exact_match", "acc 0.5, stderr -, n 1")]
