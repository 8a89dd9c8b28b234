"""A learned rotation as an artifact: made once, checked, and taken by the other stages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deploy.learn_rotation
from deploy.adapter_artifact import open_adapter
from deploy.artifact import ArtifactKind, read_manifest, verify_files
from deploy.checkpoint import Checkpoint
from deploy.checkpoint_settings import CheckpointSettings, RotationChoice, choose_recipe
from deploy.errors import ArtifactError, ConfigError, StageOrderError, UnsupportedModelError
from deploy.finetune import FinetuneSettings, Method
from deploy.language_model import open_language_model
from deploy.learn_rotation import LearnRotationSettings, learn_rotation_artifact
from deploy.loading import load_model
from deploy.merge_rotate_quantize import merge_rotate_quantize
from deploy.rotation_file import ROTATION_NAME
from deploy.stored_rotation import open_rotation
from reslora.config import AdapterConfig, Structure
from reslora.merge import MergeMethod
from rolora.learned import LearningSettings
from rolora.rotation import DEFAULT_ROTATIONS, RotationKind
from tests.deploy.tiny_artifacts import (
    finetune_settings,
    make_adapter,
    make_checkpoint,
    save_model,
    write_adapter,
    write_rows,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("learn") / "tiny", tied=True)


def settings_of(model: Path, *, best_of: int = 1, **learning: Any) -> LearnRotationSettings:
    recipe = choose_recipe("W4A4")
    assert recipe is not None
    return LearnRotationSettings(
        model=str(model),
        recipe=recipe,
        learning=LearningSettings(**{"steps": 3} | learning),
        best_of=best_of,
        tokens=16,
        held_out=2,
    )


def learn(model: Path, output: Path, **options: Any) -> Path:
    learn_rotation_artifact(settings_of(model, **options), output)
    return output


@pytest.fixture(scope="module")
def rotation(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn(model, tmp_path_factory.mktemp("rotations") / "own", best_of=2)


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn(model, tmp_path_factory.mktemp("rotations") / "shared", one_r2=True)


def checkpoint(model: Path, output: Path, stored: Path | None, **options: Any) -> Path:
    defaults: dict[str, Any] = {
        "adapter": None,
        "merge": MergeMethod.EXACT,
        "rotation": None,
        "recipe": None,
        "calibration": None,
    }
    merge_rotate_quantize(
        CheckpointSettings(model=str(model), stored_rotation=stored, **defaults | options), output
    )
    return output


def logits(directory: Path) -> torch.Tensor:
    with Checkpoint(directory) as opened, torch.inference_mode():
        return opened.load_model()(input_ids=torch.arange(30, 70)[None]).logits


def test_the_manifest_tells_how_it_was_learned(model: Path, rotation: Path) -> None:
    manifest = verify_files(rotation)
    details: Any = manifest.details
    assert manifest.kind is ArtifactKind.ROTATION
    assert manifest.parents == load_model(model).parents()
    assert details["scheme"] == "W4A4"
    learning = details["learning"]
    assert len(learning["losses"]) == learning["steps"] == 3
    draws = learning["draws"]
    assert set(draws) == {"0", "1"}
    best = min(draws, key=draws.__getitem__)
    assert learning["held_out_before"] == pytest.approx(draws[best])
    assert details["rotation"]["kind"] == "learned"
    assert details["rotation"]["seed"] == int(best)
    assert open_rotation(rotation).plan.names == DEFAULT_ROTATIONS


def test_a_place_that_cannot_be_written_is_refused_before_learning(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy.learn_rotation, "learn_rotation", None)  # must not be called
    with pytest.raises(ConfigError, match=r"output /proc/out: cannot make"):
        learn_rotation_artifact(settings_of(model), Path("/proc/out"))


def test_another_text_in_the_same_file_is_another_run(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five. " * 40, encoding="utf-8")
    settings = dataclasses.replace(settings_of(model), calibration=str(text))
    for _ in range(2):
        learn_rotation_artifact(settings, tmp_path / "out")
    text.write_text("other words entirely, and more of them. " * 40, encoding="utf-8")
    with pytest.raises(ConfigError, match="exists already"):
        learn_rotation_artifact(settings, tmp_path / "out")


def test_equal_runs_are_equal_and_a_finished_one_is_kept(
    model: Path, rotation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = learn(model, tmp_path / "again", best_of=2)
    assert read_manifest(again).digest == read_manifest(rotation).digest
    other = learn(model, tmp_path / "other", best_of=2, learning_rate=0.1)
    assert open_rotation(other).plan.digest != open_rotation(rotation).plan.digest
    monkeypatch.setattr(deploy.learn_rotation, "learn_rotation", None)
    learn(model, again, best_of=2)
    with pytest.raises(ConfigError, match="exists already and was made from other inputs"):
        learn(model, again)


def test_no_steps_only_choose_a_draw(model: Path, tmp_path: Path) -> None:
    details: Any = read_manifest(learn(model, tmp_path / "best", best_of=3, steps=0)).details
    draws = details["learning"]["draws"]
    assert len(set(draws.values())) == 3
    assert details["rotation"]["seed"] == int(min(draws, key=draws.__getitem__))


def test_progress_names_steps_and_draws(model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    bar: list[tuple[int, int]] = []
    learn_rotation_artifact(
        settings_of(model, best_of=2),
        tmp_path / "out",
        said.append,
        lambda done, total: bar.append((done, total)),
    )
    assert bar == [(1, 3), (2, 3), (3, 3)]
    assert sum(line.startswith("draw ") for line in said) == 2
    assert said[-1].startswith("learning, loss ")


def test_a_checkpoint_takes_the_rotation_and_stays_the_same_function(
    model: Path, rotation: Path, tmp_path: Path
) -> None:
    plain = logits(make_checkpoint(model, tmp_path / "plain", "FP32", rotate="none"))
    rotated = checkpoint(model, tmp_path / "rotated", rotation)
    error = float((logits(rotated) - plain).norm() / plain.norm())
    assert error < 1e-5
    assert open_rotation(rotated).plan.digest == open_rotation(rotation).plan.digest
    assert read_manifest(rotated).parents["rotation"] == read_manifest(rotation).digest
    with Checkpoint(rotated) as opened:
        assert opened.rotation is not None
        assert opened.rotation.kind is RotationKind.LEARNED
    # A checkpoint hands its rotation on, too.
    again = checkpoint(model, tmp_path / "again", rotated)
    assert torch.equal(logits(again), logits(rotated))


def test_quality_in_it_falls_with_the_bits(model: Path, rotation: Path, tmp_path: Path) -> None:
    exact = logits(checkpoint(model, tmp_path / "float", rotation))
    errors = []
    for scheme in ("W8A8", "W4A4"):
        short = {"calibration_windows": 1, "calibration_tokens": 64}
        recipe = choose_recipe(scheme, weights="rtn")
        output = checkpoint(model, tmp_path / scheme, rotation, recipe=recipe, **short)
        errors.append(float((logits(output) - exact).norm() / exact.norm()))
    # Half a step of 1/127 of the largest value is one percent of a typical one; two blocks of four
    # roundings, and as many of weights, add up as a root sum to 4 %, and static scales clip.
    assert errors[0] < 0.1 < errors[1]


@pytest.mark.parametrize("structure", [None, Structure.BLOCK])
def test_an_adapter_is_trained_and_merged_in_it(
    model: Path, rotation: Path, shared: Path, tmp_path: Path, structure: Structure | None
) -> None:
    chosen = rotation if structure is None else shared
    settings = dataclasses.replace(
        finetune_settings(model, write_rows(tmp_path / "rows.jsonl"), Method.ROLORA),
        adapter=AdapterConfig(rank=2, alpha=2.0, structure=structure),
        rotation=chosen,
    )
    adapter = write_adapter(settings, tmp_path / "adapter")
    stored = open_adapter(adapter)
    assert stored.rotation is not None
    assert stored.rotation.digest == open_rotation(chosen).plan.digest
    assert stored.manifest.parents["rotation"] == read_manifest(chosen).digest
    alone = checkpoint(model, tmp_path / "alone", None, adapter=adapter)
    both = checkpoint(model, tmp_path / "both", chosen, adapter=adapter)
    assert torch.equal(logits(alone), logits(both))
    other = shared if chosen is rotation else rotation
    with pytest.raises(ConfigError, match=r"can be merged only there; --rotation .*leave it out"):
        checkpoint(model, tmp_path / "other", other, adapter=adapter)


def test_a_shortcut_needs_one_r2(model: Path, rotation: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(
        finetune_settings(model, write_rows(tmp_path / "rows.jsonl"), Method.ROLORA),
        adapter=AdapterConfig(rank=2, alpha=2.0, structure=Structure.BLOCK),
        rotation=rotation,
    )
    with pytest.raises(ConfigError, match="learn it with --shared-r2"):
        write_adapter(settings, tmp_path / "adapter")


def test_contradicting_options_are_refused(model: Path, rotation: Path, tmp_path: Path) -> None:
    def tune(method: Method, **options: Any) -> FinetuneSettings:
        config = AdapterConfig(rank=2, alpha=2.0, structure=None)
        return FinetuneSettings(str(model), "x", method, config, rotation=rotation, **options)

    with pytest.raises(ConfigError, match="use --method rolora"):
        tune(Method.LORA)
    for options in ({"rotation_seed": 1}, {"rotation_kind": RotationKind.ORTHOGONAL}):
        with pytest.raises(ConfigError, match="leave --rotation-kind and --rotation-seed out"):
            tune(Method.ROLORA, **options)
    choice = RotationChoice(DEFAULT_ROTATIONS)
    with pytest.raises(ConfigError, match="is a whole rotation; leave --rotate"):
        checkpoint(model, tmp_path / "out", rotation, rotation=choice)
    assert list(tmp_path.iterdir()) == []


def test_what_holds_no_rotation_or_one_of_another_model_is_refused(
    model: Path, rotation: Path, tmp_path: Path
) -> None:
    unrotated = make_checkpoint(model, tmp_path / "plain", "FP32", rotate="none")
    with pytest.raises(ConfigError, match="got an unrotated checkpoint"):
        open_rotation(unrotated)
    with pytest.raises(StageOrderError, match="make one with rolora learn-rotation or"):
        open_rotation(model)
    adapter = make_adapter(model, tmp_path / "lora", "lora")
    with pytest.raises(ConfigError, match="got an unrotated adapter"):
        open_rotation(adapter)
    deeper = save_model(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"--rotation .*: R2, number of layers: expected 3"):
        checkpoint(deeper, tmp_path / "out", rotation)
    with pytest.raises(StageOrderError, match="a rotation is no model; give it to"):
        open_language_model(str(rotation))
    with pytest.raises(StageOrderError, match="expected a model, got an artifact of kind rotation"):
        make_checkpoint(rotation, tmp_path / "out", "FP32")


def test_a_damaged_rotation_is_refused(model: Path, tmp_path: Path) -> None:
    damaged = learn(model, tmp_path / "r", steps=0)
    path = damaged / ROTATION_NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="expected sha256"):
        open_rotation(damaged)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"best_of": 0}, "--best-of: expected at least 1, got 0"),
        ({"tokens": 1}, "--window-tokens: expected at least 2"),
        ({"held_out": 0}, "--held-out: expected at least 1"),
        ({"learning": LearningSettings(steps=-1)}, "--steps: expected at least 0"),
        ({"learning": LearningSettings(learning_rate=float("nan"))}, "--learning-rate: expected"),
    ],
)
def test_impossible_settings_are_refused(model: Path, changes: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(settings_of(model), **changes)


def test_too_little_text_is_refused(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("x" * 40)
    short = dataclasses.replace(settings_of(model), calibration=str(text))
    with pytest.raises(ConfigError, match=r"at least 3 windows of 16 tokens, .* got 2; give more"):
        learn_rotation_artifact(short, tmp_path / "out")
    only_a_draw = dataclasses.replace(short, learning=LearningSettings(steps=0))
    learn_rotation_artifact(only_a_draw, tmp_path / "out")


def test_a_size_without_a_hadamard_matrix_is_refused(tmp_path: Path) -> None:
    odd = save_model(tmp_path / "odd", intermediate_size=46)
    with pytest.raises(UnsupportedModelError, match="R4 over intermediate_size = 46"):
        learn(odd, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_settings_are_plain_data(model: Path) -> None:
    config = settings_of(model).to_config()
    assert json.loads(json.dumps(config)) == config


def test_capped_logits_are_refused_and_an_r1_at_run_time_is_learned(tmp_path: Path) -> None:
    capped = save_model(tmp_path / "gemma2", "gemma2")
    with pytest.raises(UnsupportedModelError, match="final_logit_softcapping"):
        learn(capped, tmp_path / "refused")
    other = save_model(tmp_path / "gemma3", "gemma3_text", tied=True)
    learned = learn(other, tmp_path / "rotation")
    quantized = checkpoint(other, tmp_path / "c", learned)
    with Checkpoint(quantized) as opened:
        assert opened.online_r1 is not None
    with torch.inference_mode():
        expected = load_model(other).model(input_ids=torch.arange(30, 70)[None]).logits
    assert float((logits(quantized) - expected).norm() / expected.norm()) < 1e-5
