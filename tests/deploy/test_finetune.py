from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import deploy.finetune
from deploy.adapter_artifact import open_adapter
from deploy.architecture import decoder_names
from deploy.artifact import hash_file, read_manifest, verify_files
from deploy.errors import ArtifactError, ConfigError, UnsupportedModelError
from deploy.finetune import SUMMARY_FILE, FinetuneSettings, Method, finetune
from deploy.loading import load_model
from deploy.training_basis import BASIS_FILE
from reslora.config import AdapterConfig, Structure
from reslora.train_report import OF_THIS_PROCESS
from rolora.rotation import DEFAULT_ROTATIONS, RotationKind, RotationPlan
from tests.deploy.tiny_artifacts import finetune_settings, save_model, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("finetune") / "tiny")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    return write_rows(directory / "rows.jsonl")


@pytest.mark.parametrize("method", list(Method))
def test_each_method_writes_an_adapter_of_its_kind(
    method: Method, model: Path, data: Path, tmp_path: Path
) -> None:
    settings = finetune_settings(model, data, method)
    lines: list[str] = []
    report = finetune(settings, tmp_path / "out", progress=lines.append)
    assert report is not None
    manifest = verify_files(tmp_path / "out")
    assert manifest.digest == report.manifest.digest
    assert manifest.parents == load_model(model).parents() | {"data": hash_file(data)}
    assert report.to_dict()["training"]["steps"] == 2
    assert "training on 6 examples" in lines
    stored = open_adapter(tmp_path / "out")
    stored.require_base(manifest.parents["model"], "tiny")
    names = decoder_names(load_model(model).model.config)
    assert set(stored.adapter.factors) == set(names.linears())
    assert any(bool(b.any()) for _, b in stored.adapter.factors.values()), "nothing was learned"
    assert stored.adapter.config.structure == (
        Structure.BLOCK if method is Method.RESLORA else None
    )
    if method is Method.ROLORA:
        drawn = RotationPlan.draw(names, DEFAULT_ROTATIONS, RotationKind.HADAMARD, 0)
        assert stored.rotation is not None
        assert stored.rotation.digest == drawn.digest
    else:
        assert stored.rotation is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def test_a_finished_adapter_is_kept_and_another_is_never_overwritten(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = finetune_settings(model, data, "lora")
    first = finetune(settings, tmp_path / "out")
    monkeypatch.setattr(deploy.finetune, "train_adapter", None)  # must not be called
    again = finetune(settings, tmp_path / "out")
    assert first is not None
    assert again is not None
    assert again.manifest.digest == first.manifest.digest
    with pytest.raises(ConfigError, match="exists already"):
        finetune(replace(settings, targets="q"), tmp_path / "out")
    data.write_text('{"text": "other rows"}\n{"text": "and more"}\n')
    with pytest.raises(ConfigError, match="exists already"):
        finetune(settings, tmp_path / "out")
    assert read_manifest(tmp_path / "out").digest == first.manifest.digest


def test_equal_runs_give_equal_adapters(model: Path, data: Path, tmp_path: Path) -> None:
    settings = finetune_settings(model, data, "reslora", seed=4)
    for name in ("a", "b"):
        finetune(settings, tmp_path / name)
    assert read_manifest(tmp_path / "a").digest == read_manifest(tmp_path / "b").digest
    finetune(finetune_settings(model, data, "reslora", seed=5), tmp_path / "c")
    weights = [hash_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b", "c")]
    assert weights[0] == weights[1] != weights[2]


def test_a_summary_stands_beside_the_adapter_and_is_no_part_of_it(
    model: Path, data: Path, tmp_path: Path
) -> None:
    settings = finetune_settings(model, data, "reslora")
    report = finetune(settings, tmp_path / "out")
    assert report is not None
    summary = json.loads((tmp_path / "out" / SUMMARY_FILE).read_text())
    assert summary["adapter_digest"] == report.manifest.digest
    assert summary["settings"] == json.loads(json.dumps(settings.to_config()))
    assert [step for step, _ in summary["loss"]] == [1, 2]
    assert summary["kept_step"] in (1, 2)
    assert summary["seconds"] > 0
    assert summary["tokens_per_s"] == pytest.approx(summary["tokens"] / summary["seconds"])
    assert summary["peak_rss_bytes"] > 1e8
    assert summary["trainable_parameters"] > 0
    assert SUMMARY_FILE not in report.manifest.files
    training = report.manifest.details["training"]
    assert isinstance(training, dict)
    assert not training.keys() & set(OF_THIS_PROCESS)
    assert training.keys() < summary.keys()
    verify_files(tmp_path / "out")


def test_a_resumed_run_gives_the_same_artifact(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = finetune_settings(model, data, "reslora", max_steps=4, save_every=2)
    whole = finetune(settings, tmp_path / "whole")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(deploy.finetune, "save_adapter", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings, tmp_path / "out")
    shutil.rmtree(tmp_path / "out.training" / "checkpoint-4")
    resumed = finetune(settings, tmp_path / "out", resume=True)
    assert whole is not None
    assert resumed is not None
    assert resumed.to_dict()["training"]["resumed_from_step"] == 2
    assert resumed.manifest.digest == whole.manifest.digest


@pytest.mark.parametrize("noted", ["", "[1]", "{"])
def test_a_damaged_note_of_what_checkpoints_belong_to_is_named(
    noted: str, model: Path, data: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "out.training" / BASIS_FILE
    marker.parent.mkdir()
    marker.write_text(noted)
    settings = finetune_settings(model, data, "lora")
    with pytest.raises(ArtifactError, match=rf"{BASIS_FILE}: expected what its checkpoints were"):
        finetune(settings, tmp_path / "out", resume=True)
    assert marker.read_text() == noted


def test_a_place_that_cannot_be_written_is_refused_before_training(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy.finetune, "train_adapter", None)  # must not be called
    settings = finetune_settings(model, data, "lora")
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(ConfigError, match=r"output .*out: cannot make"):
            finetune(settings, output)
    with pytest.raises(ConfigError, match="cannot make"):
        finetune(settings, tmp_path / "out", tensorboard=tmp_path / "file" / "curves")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file"]


def test_a_disk_that_fills_up_while_training_is_named(
    model: Path, data: Path, small_disk: Path
) -> None:
    settings = finetune_settings(model, data, "lora", save_every=1)
    wide = replace(settings, adapter=AdapterConfig(rank=256), targets="all")
    with pytest.raises(ArtifactError, match=r"output .*out.training: the disk is full"):
        finetune(wide, small_disk / "out")
    assert not (small_disk / "out").exists()


def test_checkpoints_belong_to_one_model_and_one_rotation(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    settings = finetune_settings(model, data, "rolora")
    with monkeypatch.context() as patch:
        patch.setattr(deploy.finetune, "save_adapter", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings, tmp_path / "out")
    other = save_model(tmp_path / "other", rms_norm_eps=1e-3)
    strangers = {
        r"rotation_seed: 0 then, 1 now": replace(settings, rotation_seed=1),
        r"rotation_kind: hadamard then, None now": replace(settings, method=Method.LORA),
        r"model: \w+ then, \w+ now": replace(settings, model=str(other)),
    }
    for said, stranger in strangers.items():
        # a new run is refused too, and takes nothing over for the one that is told to resume
        with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
            finetune(stranger, tmp_path / "out")
        with pytest.raises(ConfigError, match=f"made with other weights: {said}"):
            finetune(stranger, tmp_path / "out", resume=True)
    resumed = finetune(settings, tmp_path / "out", resume=True)
    assert resumed is not None
    assert resumed.to_dict()["training"]["resumed_from_step"] == 2


def test_curves_are_written_for_tensorboard(model: Path, data: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = finetune_settings(model, data, "lora")
    report = finetune(settings, tmp_path / "out", tensorboard=tmp_path / "curves")
    assert report is not None
    written = events.EventAccumulator(str(tmp_path / "curves"))
    written.Reload()
    losses = [(event.step, event.value) for event in written.Scalars("train/loss")]
    expected = report.to_dict()["training"]["loss"]
    assert [step for step, _ in losses] == [step for step, _ in expected]
    assert [v for _, v in losses] == pytest.approx([v for _, v in expected], rel=1e-6)
    assert "eval/loss" in written.Tags()["scalars"]


def test_tensorboard_that_is_not_installed_is_named(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reslora.train.importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'rolora\[tensorboard\]'"):
        finetune(
            finetune_settings(model, data, "lora"), tmp_path / "out", tensorboard=tmp_path / "c"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no rows"),
        ("\n\n", "holds no rows"),
        ('{"text": "a"}\n{"text": \n', r"rows.jsonl:2: not valid JSON"),
        ('{"text": "a"}\n{"words": "b"}\n', r"rows.jsonl:2: "),
        ('{"text": "a", "label": 1}\n', r"rows.jsonl:1: "),
        ("[1]\n", r"rows.jsonl:1: expected a JSON object"),
    ],
)
def test_bad_rows_name_file_and_line_before_anything_is_loaded(
    content: str, said: str, data: Path, tmp_path: Path
) -> None:
    data.write_text(content)
    with pytest.raises(ConfigError, match=said):
        finetune(finetune_settings(tmp_path / "absent model", data, "lora"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_loss_that_is_no_number_leaves_no_adapter(
    model: Path, data: Path, tmp_path: Path
) -> None:
    settings = finetune_settings(model, data, "lora", learning_rate=1e30, max_steps=6)
    with pytest.raises(ConfigError, match=r"training: .*(loss|gradient)"):
        finetune(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_unknown_targets_and_validation_rows_are_refused(
    model: Path, data: Path, tmp_path: Path
) -> None:
    settings = finetune_settings(model, data, "lora")
    with pytest.raises(ConfigError, match="--targets 'q,x'"):
        finetune(replace(settings, targets="q,x"), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"absent.jsonl: no such file"):
        finetune(replace(settings, validation=str(tmp_path / "absent.jsonl")), tmp_path / "out")


def test_a_rotation_that_does_not_exist_is_refused(data: Path, tmp_path: Path) -> None:
    odd = save_model(tmp_path / "odd", intermediate_size=46)
    with pytest.raises(UnsupportedModelError, match="46"):
        finetune(finetune_settings(odd, data, "rolora"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "odd"]


def test_method_and_structure_must_agree() -> None:
    def settings(method: Method, structure: Structure | None) -> FinetuneSettings:
        return FinetuneSettings("m", "d", method, AdapterConfig(structure=structure))

    with pytest.raises(ConfigError, match="--method reslora needs --structure block"):
        settings(Method.RESLORA, None)
    with pytest.raises(ConfigError, match="--method lora has no shortcuts"):
        settings(Method.LORA, Structure.BLOCK)


@pytest.mark.parametrize("structure", [Structure.INPUT, Structure.MIDDLE])
def test_every_structure_is_trained_and_stored(
    structure: Structure, model: Path, data: Path, tmp_path: Path
) -> None:
    settings = finetune_settings(model, data, "reslora")
    settings = replace(settings, adapter=replace(settings.adapter, structure=structure))
    finetune(settings, tmp_path / "out")
    assert open_adapter(tmp_path / "out").adapter.config.structure is structure


def test_only_the_first_process_writes(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any, **__: Any) -> Any:
        monkeypatch.setenv("RANK", "1")

    monkeypatch.setattr(deploy.finetune, "train_adapter", train)
    assert finetune(finetune_settings(model, data, "lora"), tmp_path / "out") is None
    assert {path.name for path in tmp_path.iterdir()} <= {"data", "out.training"}
