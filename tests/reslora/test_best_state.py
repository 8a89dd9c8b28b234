"""Which state a run ends with, and when it ends: early stopping and the best validated adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerFast

from reslora.adapter import adapter_tensors, load_adapter, tensor_key
from reslora.attach import attach_adapters
from reslora.config import AdapterConfig, Structure
from reslora.settings import Keep, TrainSettings
from reslora.train import train_adapter
from reslora.train_report import TrainReport
from reslora.training_data import language_data
from tests.reslora.tiny import build_llama, contrary_examples, tiny_examples

WORSENING = TrainSettings(
    max_steps=10, batch_size=3, max_tokens=48, learning_rate=2e-2, eval_every=2, save_every=4
)
"""With the contrary validation rows, step 2 is the best of all."""
Train = Callable[..., tuple[dict[str, Tensor], TrainReport]]


@pytest.fixture
def train(targets: list[str], chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Train:
    def run(
        settings: TrainSettings, measure: Any = None, *, resume: bool = False, hold_out: bool = True
    ) -> tuple[dict[str, Tensor], TrainReport]:
        config = AdapterConfig(rank=3, structure=Structure.MIDDLE)
        model = attach_adapters(build_llama(), config, targets)
        held_out = contrary_examples() if hold_out else []
        data = language_data(tiny_examples(12), held_out, chat_tokenizer, settings)
        data = replace(data, measure=measure, metrics=("score",) if measure else ())
        report = train_adapter(model, data, settings, tmp_path, resume)
        return adapter_tensors(model), report

    return run


def saved(checkpoint: Path) -> dict[str, Tensor]:
    return {
        tensor_key(fqn, side): tensor
        for fqn, pair in load_adapter(checkpoint).factors.items()
        for side, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


def steps_left(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in directory.iterdir())


def test_the_best_state_is_kept_though_it_is_no_save_step(train: Train, tmp_path: Path) -> None:
    tensors, report = train(WORSENING)
    losses = dict(report.eval_loss)
    assert sorted(losses) == [2, 4, 6, 8, 10]
    assert min(losses, key=lambda step: losses[step]) == 2
    assert (report.best_step, report.kept_step, report.steps) == (2, 2, 10)
    assert steps_left(tmp_path) == [2, 8, 10]
    assert same(tensors, saved(tmp_path / "checkpoint-2"))
    assert not same(tensors, saved(tmp_path / "checkpoint-10"))


def test_the_last_state_is_kept_where_asked_or_where_nothing_tells(
    train: Train, tmp_path: Path
) -> None:
    tensors, report = train(replace(WORSENING, keep=Keep.LAST))
    assert (report.best_step, report.kept_step) == (None, 10)
    assert same(tensors, saved(tmp_path / "checkpoint-10"))
    assert steps_left(tmp_path) == [8, 10]


def test_without_validation_rows_the_last_state_is_kept(train: Train) -> None:
    _, report = train(replace(WORSENING, max_steps=2), hold_out=False)
    assert (report.best_step, report.kept_step, report.eval_loss) == (None, 2, ())


@pytest.mark.parametrize("keep", Keep)
def test_a_run_stops_early_and_stays_stopped(train: Train, tmp_path: Path, keep: Keep) -> None:
    settings = replace(WORSENING, early_stopping=1, keep=keep)
    tensors, report = train(settings)
    kept = 2 if keep is Keep.BEST else 4
    assert (report.steps, report.planned_steps, report.kept_step) == (4, 10, kept)
    assert steps_left(tmp_path) == [2, 4]
    again, second = train(settings, resume=True)
    assert (second.steps, second.resumed_from_step, second.tokens) == (4, 4, 0)
    assert (second.kept_step, second.loss) == (report.kept_step, report.loss)
    assert same(tensors, again)
    assert same(tensors, saved(tmp_path / f"checkpoint-{kept}"))


def test_the_last_step_is_validated_before_it_is_judged(train: Train, tmp_path: Path) -> None:
    _, report = train(replace(WORSENING, eval_every=7, save_every=100))
    assert [step for step, _ in report.eval_loss] == [7, 10]
    losses = dict(report.eval_loss)
    assert report.kept_step == min(losses, key=lambda step: losses[step])
    assert steps_left(tmp_path) == [7, 10]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_figure_of_the_task_can_tell_the_best(train: Train, sign: int) -> None:
    seen: list[int] = []

    def measure(predictions: EvalPrediction) -> dict[str, float]:
        assert predictions.predictions.shape[0] == len(contrary_examples())
        seen.append(len(seen))
        return {"score": float(sign * len(seen))}

    settings = replace(WORSENING, max_steps=4, best_metric="score")
    _, report = train(settings, measure)
    assert report.eval_metrics == ((2, {"score": float(sign)}), (4, {"score": 2.0 * sign}))
    assert report.kept_step == (4 if sign > 0 else 2)


def test_a_figure_that_is_never_a_number_tells_nothing(train: Train) -> None:
    settings = replace(WORSENING, max_steps=2, best_metric="score")
    with pytest.raises(ValueError, match="validation: score was never a number"):
        train(settings, lambda _: {"score": math.nan})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep": Keep.BEST}, "need validation rows, and there are none"),
        ({"early_stopping": 2}, "need validation rows, and there are none"),
        ({"best_metric": "accuracy"}, "best metric 'accuracy': .* gives loss"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    train: Train, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        train(replace(WORSENING, **changes), hold_out="best_metric" in changes)
    assert not list(tmp_path.iterdir())


def test_other_validation_rows_are_another_run(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(replace(WORSENING, max_steps=2))
    monkeypatch.setattr("tests.reslora.test_best_state.contrary_examples", lambda: tiny_examples(3))
    with pytest.raises(ValueError, match="validation_sha256"):
        train(replace(WORSENING, max_steps=2), resume=True)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="early_stopping must be at least 1, got 0"):
        TrainSettings(early_stopping=0)
    with pytest.raises(ValueError, match=r"early_stopping needs validations .* eval_every is 0"):
        TrainSettings(early_stopping=2, eval_every=0)
