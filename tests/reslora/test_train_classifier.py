from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from reslora import trainer
from reslora.adapter import WEIGHTS_FILE, save_adapter
from reslora.attach import attach_adapters
from reslora.classification import classification_data
from reslora.config import AdapterConfig, Structure
from reslora.labelled_rows import LabelledExample, LabelScheme, find_labels
from reslora.train import TrainReport, TrainSettings, train_adapter
from tests.reslora.tiny_encoder import (
    ENCODERS,
    build_encoder,
    build_encoder_tokenizer,
    encoder_targets,
    labelled_examples,
)

INPUT = AdapterConfig(rank=2, structure=Structure.INPUT, dropout=0.1)
QUICK = TrainSettings(
    max_steps=6, batch_size=3, max_tokens=40, learning_rate=1e-2, save_every=2, eval_every=3
)


def train(
    directory: Path,
    settings: TrainSettings = QUICK,
    *,
    config: AdapterConfig = INPUT,
    resume: bool = False,
    model_type: str = "bert",
    examples: list[LabelledExample] | None = None,
    **options: Any,
) -> tuple[PeftModel, TrainReport]:
    examples = labelled_examples(24) if examples is None else examples
    labels = find_labels(examples)
    model = build_encoder(model_type, labels=labels.outputs, **options)
    attached = attach_adapters(model, config, encoder_targets(model), head="classifier")
    data = classification_data(examples, None, build_encoder_tokenizer(), settings, labels)
    return attached, train_adapter(attached, data, settings, directory, resume)


def stored(model: PeftModel, directory: Path, config: AdapterConfig = INPUT) -> bytes:
    save_adapter(model, config, directory)
    return (directory / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, report = train(tmp_path / "a", model_type=model_type)
    mark = trainer.mark_complete

    def interrupt(checkpoint: Path, fingerprint: Any, **state: Any) -> None:
        if checkpoint.name == "checkpoint-4":
            raise KeyboardInterrupt
        mark(checkpoint, fingerprint, **state)

    monkeypatch.setattr(trainer, "mark_complete", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", model_type=model_type)
    monkeypatch.undo()
    resumed, again = train(tmp_path / "b", model_type=model_type, resume=True)
    assert again.resumed_from_step == 3
    assert stored(resumed, tmp_path / "r") == stored(whole, tmp_path / "w")
    assert (again.loss, again.eval_metrics) == (report.loss, report.eval_metrics)
    other, _ = train(tmp_path / "c", replace(QUICK, seed=1), model_type=model_type)
    assert stored(other, tmp_path / "o") != stored(whole, tmp_path / "w")


@pytest.mark.parametrize(
    "config", [AdapterConfig(rank=2), *(AdapterConfig(2, structure=kind) for kind in Structure)]
)
def test_training_learns_the_task_and_reports_metrics(
    config: AdapterConfig, tmp_path: Path
) -> None:
    settings = replace(
        QUICK, max_steps=40, batch_size=8, learning_rate=2e-2, eval_every=20, save_every=40
    )
    attached, report = train(
        tmp_path,
        replace(settings, validation_fraction=0.25),
        config=config,
        examples=labelled_examples(48),
        hidden_dropout_prob=0.0,
    )
    assert report.loss[-1][1] < 0.5 * report.loss[0][1]
    assert [step for step, _ in report.eval_metrics] == [20, 40]
    assert report.eval_metrics[-1][1].keys() == {"accuracy", "mcc"}
    assert report.eval_metrics[-1][1]["accuracy"] > 0.8
    assert json.loads(json.dumps(report.to_dict()))["eval_metrics"][1][0] == 40
    head = attached.get_base_model().classifier
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    assert torch.equal(head.original_module.weight, build_encoder().classifier.weight)


def test_accumulated_batches_train_as_one(tmp_path: Path) -> None:
    # transformers would add up the mean losses of the parts instead of averaging them
    config = AdapterConfig(rank=2)
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    even = [replace(row, texts=("x" * 9,)) for row in labelled_examples(24)]
    losses = []
    for parts in (1, 2):
        settings = replace(QUICK, batch_size=6 // parts, gradient_accumulation=parts)
        _, report = train(tmp_path / str(parts), settings, config=config, examples=even, **calm)
        losses.append([loss for _, loss in report.loss])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_regression_is_trained_and_correlated(tmp_path: Path) -> None:
    rows = [
        replace(row, label=float(index % 3) + 0.5)
        for index, row in enumerate(labelled_examples(48))
    ]
    assert find_labels(rows) == LabelScheme(())
    settings = replace(
        QUICK, max_steps=40, batch_size=8, learning_rate=2e-2, eval_every=0, save_every=40
    )
    _, report = train(
        tmp_path,
        replace(settings, validation_fraction=0.25),
        examples=rows,
        hidden_dropout_prob=0.0,
    )
    assert report.loss[-1][1] < report.loss[0][1]
    assert report.eval_metrics[-1][1]["pearson"] > 0.7


def test_checkpointed_activations_train_alike(tmp_path: Path) -> None:
    losses = []
    for recompute in (False, True):
        settings = replace(QUICK, gradient_checkpointing=recompute)
        _, report = train(tmp_path / str(recompute), settings)
        losses.append([loss for _, loss in report.loss])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
