from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from deploy.artifact import read_manifest
from deploy.classify import evaluate_on_rows, open_classifier
from deploy.encoder_loading import load_classifier
from deploy.errors import ArtifactError, ConfigError, StageOrderError, UnsupportedModelError
from deploy.finetune import FinetuneSettings, Method, finetune
from deploy.merge import Destination, MergeSettings, merge
from reslora.config import AdapterConfig, Structure
from reslora.merge import MergeMethod
from tests.deploy.tiny_artifacts import finetune_settings, save_model, write_rows
from tests.deploy.tiny_classifiers import (
    ROWS,
    classifier_settings,
    make_classifier_adapter,
    save_encoder,
    write_labelled,
)
from tests.deploy.tiny_encoder_artifacts import make_encoder_export


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("classify") / "bert")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_labelled(tmp_path / "rows.jsonl")


def merge_classifier(
    model: Path,
    adapter: Path,
    output: Path,
    method: MergeMethod | None = MergeMethod.EXACT,
    calibration: Path | None = None,
    to: Destination = Destination.MODEL,
) -> Any:
    source = None if calibration is None else str(calibration)
    settings = MergeSettings(str(model), adapter, to, method, calibration=source)
    return merge(settings, output).to_dict()["merge"]


@pytest.mark.parametrize("structure", [None, *Structure])
def test_merging_keeps_what_was_trained(
    structure: Structure | None, model: Path, rows: Path, tmp_path: Path
) -> None:
    adapter = make_classifier_adapter(model, tmp_path / "adapter", structure)
    before = evaluate_on_rows(str(model), adapter, str(rows))["results"]
    assert before.keys() == {"accuracy", "mcc", "f1", "n", "loss"}
    assert before["n"] == len(ROWS)
    report = merge_classifier(model, adapter, tmp_path / "merged", None)
    after = evaluate_on_rows(str(tmp_path / "merged"), None, str(rows))["results"]
    exact = structure in (None, Structure.BLOCK)
    assert ("kl_mean" in report) != exact
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5 if exact else 0.1)
    assert after["accuracy"] == pytest.approx(before["accuracy"], abs=0.0 if exact else 0.1)
    untrained = load_classifier(model, load_classifier(tmp_path / "merged").labels)
    assert untrained.head_is_new


def test_the_merged_directory_needs_nothing_of_ours(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    adapter = make_classifier_adapter(model, tmp_path / "adapter", Structure.BLOCK)
    merge_classifier(model, adapter, tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    batch = tokenizer("good so so", return_tensors="pt")
    opened = open_classifier(str(model), adapter)
    with torch.no_grad():
        torch.testing.assert_close(
            plain(**batch).logits, opened.model(**batch).logits, rtol=1e-4, atol=1e-5
        )
    assert plain.config.id2label == {0: "0", 1: "1"}
    with pytest.raises(ConfigError, match="exists already"):
        merge_classifier(model, adapter, tmp_path / "merged", calibration=rows)


def test_a_plain_adapter_keeps_head_and_labels(model: Path, rows: Path, tmp_path: Path) -> None:
    adapter = make_classifier_adapter(model, tmp_path / "adapter", Structure.INPUT)
    merge_classifier(model, adapter, tmp_path / "merged", None)
    merge_classifier(model, adapter, tmp_path / "plain", None, to=Destination.ADAPTER)
    merged = evaluate_on_rows(str(tmp_path / "merged"), None, str(rows))["results"]
    plain = evaluate_on_rows(str(model), tmp_path / "plain", str(rows))["results"]
    assert plain == pytest.approx(merged, rel=1e-5)
    written = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", ["classifier"])


def test_figures_are_those_of_the_definition(model: Path, rows: Path, tmp_path: Path) -> None:
    adapter = make_classifier_adapter(model, tmp_path / "adapter", Structure.INPUT)
    opened = open_classifier(str(model), adapter)
    losses, hits = [], 0
    for row in ROWS:
        batch: Any = opened.tokenizer(row["sentence"], return_tensors="pt")
        with torch.no_grad():
            logits = opened.model(**batch).logits[0].double()
        losses.append(float(-logits.log_softmax(dim=-1)[row["label"]]))
        hits += int(logits.argmax()) == row["label"]
    results = evaluate_on_rows(str(model), adapter, str(rows))["results"]
    assert results["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)
    assert results["accuracy"] == hits / len(ROWS)


def test_words_and_numbers_as_labels(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [row | {"label": ("neg", "pos")[row["label"]]} for row in ROWS]
    data = write_labelled(tmp_path / "words.jsonl", words)
    report = finetune(classifier_settings(model, data), tmp_path / "words")
    assert report is not None
    assert report.manifest.details["labels"] == ["neg", "pos"]
    results = evaluate_on_rows(str(model), tmp_path / "words", str(data))["results"]
    assert "taken as places" not in caplog.text
    numbered = write_labelled(tmp_path / "numbered.jsonl")
    assert evaluate_on_rows(str(model), tmp_path / "words", str(numbered))["results"] == results
    assert "numbered.jsonl:1: integer labels are taken as places in 0 neg, 1 pos" in caplog.text
    validated = replace(classifier_settings(model, data), validation=str(numbered))
    with pytest.raises(ConfigError, match=r"numbered.jsonl:1: label is \d, but .* like 'neg'"):
        finetune(validated, tmp_path / "mixed")
    odd = write_labelled(tmp_path / "odd.jsonl", [{"sentence": "x", "label": "other"}])
    with pytest.raises(ConfigError, match=r"odd.jsonl:1: label is 'other', expected one of neg"):
        evaluate_on_rows(str(model), tmp_path / "words", str(odd))


def test_a_regression_from_rows_to_merge(model: Path, tmp_path: Path) -> None:
    pairs = [
        {"sentence1": row["sentence"], "sentence2": "so", "score": row["label"] * 2.5}
        for row in ROWS
    ]
    data = write_labelled(tmp_path / "pairs.jsonl", pairs)
    settings = classifier_settings(model, data, max_steps=60)
    report = finetune(settings, tmp_path / "out")
    assert report is not None
    assert report.to_dict()["training"]["eval_metrics"][0][1].keys() == {"pearson", "spearman"}
    before = evaluate_on_rows(str(model), tmp_path / "out", str(data))
    assert before["labels"] == []
    assert before["results"].keys() == {"pearson", "spearman", "n", "loss"}
    assert before["results"]["pearson"] > 0.5
    merged = merge_classifier(model, tmp_path / "out", tmp_path / "merged", None)
    assert merged["top1_agreement"] is None
    after = evaluate_on_rows(str(tmp_path / "merged"), None, str(data))["results"]
    assert after["pearson"] == pytest.approx(before["results"]["pearson"], abs=0.05)


def test_finetune_is_reproducible_and_stores_its_task(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    settings = classifier_settings(model, rows)
    for name in ("a", "b"):
        finetune(settings, tmp_path / name)
    manifest = read_manifest(tmp_path / "a")
    assert manifest.digest == read_manifest(tmp_path / "b").digest
    assert manifest.config["task"] == "classification"
    assert manifest.details["labels"] == ["0", "1"]
    metrics: Any = manifest.details["training"]
    assert metrics["eval_metrics"][-1][1].keys() == {"accuracy", "mcc", "f1"}
    finetune(replace(settings, training=replace(settings.training, seed=1)), tmp_path / "c")
    assert read_manifest(tmp_path / "c").files != manifest.files


def test_wrong_tasks_are_told_what_to_do(model: Path, rows: Path, tmp_path: Path) -> None:
    language = write_rows(tmp_path / "language.jsonl")
    decoder = save_model(tmp_path / "llama")
    with pytest.raises(UnsupportedModelError, match=r"is an encoder.*--task classification"):
        finetune(finetune_settings(model, language, "lora"), tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match=r"'llama' is a decoder.*bert, roberta"):
        finetune(classifier_settings(decoder, rows), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"language.jsonl:1: no classification row"):
        finetune(classifier_settings(model, language), tmp_path / "out")
    with pytest.raises(ConfigError, match="max_tokens is 512, but bert reads at most 80"):
        finetune(classifier_settings(model, rows, max_tokens=512), tmp_path / "out")
    with pytest.raises(ConfigError, match="--packing"):
        finetune(classifier_settings(model, rows, packing=True), tmp_path / "out")
    with pytest.raises(ConfigError, match="--method rolora rotates decoders only"):
        FinetuneSettings(
            "m", "d", Method.ROLORA, AdapterConfig(), task=classifier_settings(model, rows).task
        )


def test_adapters_of_other_tasks_and_models_are_refused(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    decoder = save_model(tmp_path / "llama")
    data = write_rows(tmp_path / "language.jsonl")
    finetune(finetune_settings(decoder, data, "lora"), tmp_path / "language")
    with pytest.raises(ConfigError, match="was not trained for classification"):
        evaluate_on_rows(str(decoder), tmp_path / "language", str(rows))
    adapter = make_classifier_adapter(model, tmp_path / "adapter")
    other = save_encoder(tmp_path / "other", layers=3)
    with pytest.raises(ArtifactError, match="give the model it was trained on"):
        evaluate_on_rows(str(other), adapter, str(rows))
    with pytest.raises(ConfigError, match="without a classification head"):
        evaluate_on_rows(str(model), None, str(rows))


def test_calibration_rows_are_those_of_training_or_asked_for(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    adapter = make_classifier_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(ConfigError, match=r"adapter.jsonl is not there or has changed.*calibrat"):
        merge_classifier(model, adapter, tmp_path / "merged", MergeMethod.LEAST_SQUARES)
    with pytest.raises(ConfigError, match="cannot merge structure input"):
        merge_classifier(model, adapter, tmp_path / "merged", MergeMethod.EXACT)
    assert not (tmp_path / "merged").exists()
    report = merge_classifier(model, adapter, tmp_path / "merged", MergeMethod.LEAST_SQUARES, rows)
    assert report["method"] == "least-squares"
    assert report["kl_mean"] < 0.1


def test_quantized_and_exported_classifiers_are_measured_alike(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    adapter = make_classifier_adapter(model, tmp_path / "adapter", Structure.BLOCK)
    before = evaluate_on_rows(str(model), adapter, str(rows))["results"]
    export = make_encoder_export(model, tmp_path / "onnx", "W8A8", adapter=adapter)
    checkpoint = tmp_path / "onnx-checkpoint"
    quantized = evaluate_on_rows(str(checkpoint), None, str(rows))
    exported = evaluate_on_rows(str(export), None, str(rows), threads=1)
    assert quantized["labels"] == exported["labels"] == ["0", "1"]
    for found in (quantized["results"], exported["results"]):
        assert found["accuracy"] == before["accuracy"]
        assert found["loss"] == pytest.approx(before["loss"], abs=0.05)
        assert found["loss"] != before["loss"]
    assert exported["results"]["loss"] == pytest.approx(quantized["results"]["loss"], abs=0.02)
    with pytest.raises(StageOrderError, match="expected a model, got an artifact of kind"):
        evaluate_on_rows(str(export), adapter, str(rows))
    (export / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"model.onnx: expected"):
        evaluate_on_rows(str(export), None, str(rows))


def test_an_exported_regression_keeps_its_numbers(model: Path, tmp_path: Path) -> None:
    pairs = [
        {"sentence1": row["sentence"], "sentence2": "so", "score": row["label"] * 2.5}
        for row in ROWS
    ]
    data = write_labelled(tmp_path / "pairs.jsonl", pairs)
    finetune(classifier_settings(model, data), tmp_path / "adapter")
    export = make_encoder_export(
        model, tmp_path / "onnx", "W8A8", adapter=tmp_path / "adapter", merge=None, weights="gptq"
    )
    before = evaluate_on_rows(str(model), tmp_path / "adapter", str(data))["results"]
    after = evaluate_on_rows(str(export), None, str(data))
    assert after["labels"] == []
    assert after["results"]["loss"] == pytest.approx(before["loss"], rel=0.3)


def test_encoders_without_a_head_tell_no_classes_apart(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    export = make_encoder_export(model, tmp_path / "onnx", "W8A8")
    for directory in (export, tmp_path / "onnx-checkpoint"):
        with pytest.raises(ConfigError, match="without a classification head"):
            evaluate_on_rows(str(directory), None, str(rows))
