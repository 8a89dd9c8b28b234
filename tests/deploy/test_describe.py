from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deploy.artifact import MANIFEST_NAME
from deploy.checkpoint import Checkpoint
from deploy.describe import describe_artifact, merge_rows, training_rows
from deploy.errors import ArtifactError, ConfigError, StageOrderError
from deploy.finetune import SUMMARY_FILE, finetune
from tests.deploy.tiny_artifacts import (
    finetune_settings,
    make_checkpoint,
    make_export,
    save_model,
    write_rows,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("describe")
    model = save_model(base / "model")
    rows = write_rows(base / "rows.jsonl")
    finetune(finetune_settings(model, rows, "reslora"), base / "adapter")  # trained, not drawn
    make_checkpoint(model, base / "checkpoint", "W8A8", weights="rtn")
    make_export(base / "checkpoint", base / "onnx")
    return base


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adapter", {"kind": "adapter", "steps": "2", "config method": "reslora"}),
        (
            "checkpoint",
            {
                "kind": "checkpoint",
                "scheme": "W8A8",
                "rotation": "R1, R2, R4 (hadamard, seed 0)",
                "quantized linears": "15",
            },
        ),
        ("onnx", {"kind": "onnx", "scheme": "W8A8", "config target": "cpu"}),
    ],
)
def test_each_kind_shows_what_a_person_looks_for(
    base: Path, name: str, expected: dict[str, str]
) -> None:
    description = describe_artifact(base / name, verify=True)
    rows = description.summary()
    shown = dict(rows)
    assert len(shown) == len(rows)
    assert expected.items() <= shown.items()
    assert shown["digest"] == description.manifest.digest
    sizes = sum(
        path.stat().st_size
        for path in (base / name).iterdir()
        if path.name not in ("rolora_manifest.json", SUMMARY_FILE)
    )
    assert description.total_bytes == sizes
    assert json.loads(json.dumps(description.to_dict()))["manifest"]["kind"] == name


def test_an_adapter_shows_how_training_went_and_a_merge_how_close_it_is(base: Path) -> None:
    training = {
        "steps": 9,
        "kept_step": 6,
        "trainable_parameters": 1234,
        "loss": [[1, 2.0], [9, 1.0]],
        "eval_loss": [],
        "eval_metrics": [[3, {"f1": 0.1}], [9, {"f1": 0.25}]],
    }
    assert training_rows(training) == [
        ("steps", "9"),
        ("first and last loss", "2.0000, 1.0000"),
        ("validation loss", "none"),
        ("kept state", "step 6"),
        ("validation f1", "0.2500"),
        ("trainable parameters", "1,234"),
    ]
    shown = dict(describe_artifact(base / "adapter", verify=False).summary())
    assert shown["kept state"] == "step 2"
    assert shown["first and last loss"].count(".") == 2
    approximated = {"method": "drop", "kl_mean": 0.5, "top1_agreement": 0.25}
    assert merge_rows(approximated) == [
        ("merge", "drop, KL to unmerged 0.5, top-1 agreement 25.0%")
    ]
    tried = merge_rows(approximated | {"candidates": {"drop": {"kl_mean": 0.5}}})
    assert tried[1:] == [("KL of each method", "drop 0.5")]
    assert merge_rows({"method": "exact"}) == [("merge", "exact")]
    assert merge_rows({}) == []


def test_an_export_shows_its_operators_and_its_parity(base: Path) -> None:
    shown = dict(describe_artifact(base / "onnx", verify=False).summary())
    assert "2 GroupQueryAttention" in shown["operators"]
    assert "prefill_error" in shown["check parity"]
    assert shown["file model.onnx"].endswith(" bytes")


def test_only_verify_reads_the_files(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (base / "adapter").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    describe_artifact(copy, verify=False)
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: expected"):
        describe_artifact(copy, verify=True)


def test_details_that_are_not_ours_are_damage(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base / "checkpoint", copy)
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    manifest["details"]["rotation"] = 3
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="manifest's details are not as rolora writes them"):
        describe_artifact(copy, verify=False)
    manifest["details"] = {}
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="must hold `linears`, the format of each, got None"):
        Checkpoint(copy)


def test_what_is_no_artifact_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        describe_artifact(base / "absent", verify=False)
    with pytest.raises(StageOrderError, match="no rolora artifact"):
        describe_artifact(base / "model", verify=True)
