from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.adapter_artifact import open_adapter
from deploy.architecture import decoder_names
from deploy.artifact import read_manifest, verify_files
from deploy.checkpoint import WEIGHTS_NAME, Checkpoint
from deploy.checkpoint_settings import RotationChoice, choose_recipe, parse_rotation
from deploy.errors import ArtifactError, ConfigError, StageOrderError, UnsupportedModelError
from deploy.loading import load_model
from deploy.merge_rotate_quantize import choose_rotation
from rolora.rotation import DEFAULT_ROTATIONS, RotationKind, RotationName
from rolora.scheme import WeightMethod
from tests.deploy.tiny_artifacts import make_adapter, make_checkpoint, save_model

HADAMARD, ORTHOGONAL = RotationKind.HADAMARD, RotationKind.ORTHOGONAL
ALL = DEFAULT_ROTATIONS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("mrq") / "tiny", tied=True)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(model, base / name, name) for name in ("reslora", "rolora")}


def logits(directory: Path) -> torch.Tensor:
    with Checkpoint(directory) as checkpoint, torch.inference_mode():
        return checkpoint.load_model()(input_ids=torch.arange(30, 70)[None]).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("text", "kind", "seed", "expected"),
    [
        (None, HADAMARD, 0, None),
        (None, HADAMARD, 3, RotationChoice(ALL, HADAMARD, 3)),
        (None, ORTHOGONAL, 0, RotationChoice(ALL, ORTHOGONAL, 0)),
        ("none", HADAMARD, 0, RotationChoice(frozenset())),
        (" R1, r4 ", HADAMARD, 0, RotationChoice(frozenset({RotationName.R1, RotationName.R4}))),
    ],
)
def test_the_choice_of_rotations_is_parsed(
    text: str | None, kind: RotationKind, seed: int, expected: RotationChoice | None
) -> None:
    assert parse_rotation(text, kind, seed) == expected


@pytest.mark.parametrize("text", ["r5", "r1,none", "", " , "])
def test_an_unknown_rotation_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a list of r1, r2, r3, r4, or none"):
        parse_rotation(text, HADAMARD, 0)


def test_the_recipe_fills_in_what_was_left_open() -> None:
    four, eight = choose_recipe("w4a4"), choose_recipe("W8A8")
    assert four is not None
    assert eight is not None
    assert four.run_time_input(4).clip_ratio == 0.7
    assert eight.run_time_input(8).clip_ratio == 1.0
    for rotated, scaled, static, share in (
        (True, False, True, 0.5),
        (True, True, False, 0.25),
        (False, False, False, 0.5),
    ):
        recipe = four.in_basis(rotated=rotated, scaled=scaled)
        assert (recipe.static_after_norm, recipe.aim_share) == (static, share)
    asked = choose_recipe("W8A8", static=True, activation_clip=0.5, weights="rtn")
    assert asked is not None
    assert asked.in_basis(rotated=False, scaled=True).static_after_norm is True
    assert asked.activation_clip == 0.5
    assert asked.weights is WeightMethod.RTN
    assert choose_recipe(" fp32") is None


def test_defaults_follow_the_basis_that_the_model_is_in(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    scaled = make_checkpoint(model, tmp_path / "scaled", "FP32", equalize="all")
    adapter = make_adapter(model, tmp_path / "adapter", "rolora")

    def made(name: str, scheme: str, **options: Any) -> tuple[bool, float]:
        directory = make_checkpoint(model, tmp_path / name, scheme, weights="rtn", **options)
        recipe = read_manifest(directory).config["recipe"]
        return recipe["static_after_norm"], recipe["aim_share"]

    assert made("own", "W4A4") == (False, 0.25)
    assert made("unscaled", "W4A4", equalize="none") == (True, 0.5)
    assert made("in its basis", "W4A4", adapter=adapter) == (True, 0.5)
    assert made("without R1", "W4A4", rotate="r2,r4") == (False, 0.5)
    assert made("given", "W8A8", stored_rotation=scaled) == (False, 0.25)


@pytest.mark.parametrize(
    ("scheme", "options", "said"),
    [
        ("W3A8", {}, "unsupported bit width"),
        ("int8", {}, "expected W<bits>A<bits>"),
        ("W4A8", {"group_size": 20}, "group size: expected one of"),
        ("W4A4", {"group_size": 16}, "use A8"),
        ("W8A8", {"activation_clip": 0.0}, "clip ratio"),
        ("W8A8", {"head_bits": 2}, "head bits"),
        ("W8A8", {"weights": "magic"}, "magic"),
    ],
)
def test_impossible_recipes_are_refused(scheme: str, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose_recipe(scheme, **options)


def test_merging_then_rotating_changes_nothing(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter = adapters["reslora"]
    merged = make_checkpoint(model, tmp_path / "a", "FP32", rotate="none", adapter=adapter)
    rotated = make_checkpoint(model, tmp_path / "b", "FP32", adapter=adapter)
    untouched = make_checkpoint(model, tmp_path / "c", "FP32", rotate="none")
    assert distance(logits(rotated), logits(merged)) < 1e-5
    assert distance(logits(untouched), logits(merged)) > 1e-3


def test_an_adapter_of_a_rotated_basis_is_merged_in_that_basis(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    stored = open_adapter(adapters["rolora"])
    assert stored.rotation is not None
    output = make_checkpoint(model, tmp_path / "a", "FP32", adapter=adapters["rolora"])
    with Checkpoint(output) as checkpoint:
        assert checkpoint.rotation is not None
        assert checkpoint.rotation.digest == stored.rotation.digest
        merged = checkpoint.load_model()
        names = checkpoint.names
    plain = make_checkpoint(model, tmp_path / "b", "FP32")  # the same rotation, nothing merged
    with Checkpoint(plain) as checkpoint:
        base = checkpoint.load_model()
    a, b = stored.adapter.factors[names.blocks[1].query]
    scaling = stored.adapter.config.scaling
    query = names.blocks[1].query
    change = merged.get_submodule(query).weight - base.get_submodule(query).weight
    torch.testing.assert_close(change, scaling * b @ a, rtol=0, atol=1e-5)
    assert float(change.detach().abs().max()) > 1e-3
    repeated = make_checkpoint(
        model, tmp_path / "c", "FP32", rotate="r1,r2,r4", adapter=adapters["rolora"]
    )
    torch.testing.assert_close(logits(repeated), logits(output), rtol=0, atol=0)


@pytest.mark.parametrize("rotate", ["none", "r1,r2", "r4"])
def test_an_adapter_in_another_basis_than_asked_for_is_refused(
    model: Path, adapters: dict[str, Path], tmp_path: Path, rotate: str
) -> None:
    with pytest.raises(ConfigError, match=r"trained in the basis of R1,R2,R4 \(hadamard, seed 0"):
        make_checkpoint(model, tmp_path / "out", "FP32", rotate=rotate, adapter=adapters["rolora"])
    assert list(tmp_path.iterdir()) == []


def test_another_kind_or_seed_is_another_basis(model: Path, adapters: dict[str, Path]) -> None:
    names = decoder_names(load_model(model).model.config)
    adapter = open_adapter(adapters["rolora"])
    for choice in (RotationChoice(ALL, ORTHOGONAL, 0), RotationChoice(ALL, HADAMARD, 1)):
        with pytest.raises(ConfigError, match="can be merged only there"):
            choose_rotation(names, choice, adapter)
    assert choose_rotation(names, RotationChoice(ALL), adapter) is adapter.rotation
    assert choose_rotation(names, RotationChoice(frozenset()), None) is None


def test_an_adapters_basis_can_be_given_r3(model: Path, adapters: dict[str, Path]) -> None:
    names = decoder_names(load_model(model).model.config)
    own = open_adapter(adapters["rolora"]).rotation
    assert own is not None
    for choice, kv_bits in ((None, 4), (RotationChoice(ALL | {RotationName.R3}), 16)):
        plan = choose_rotation(names, choice, open_adapter(adapters["rolora"]), kv_bits=kv_bits)
        assert plan is not None
        assert plan.names == own.names | {RotationName.R3}
        content = plan.to_tensors()
        assert all(torch.equal(content[key], tensor) for key, tensor in own.to_tensors().items())


def test_an_adapter_of_another_model_is_refused(adapters: dict[str, Path], tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(ArtifactError, match=r"was trained on .*give the model it was trained on"):
        make_checkpoint(other, tmp_path / "out", "FP32", adapter=adapters["reslora"])
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_weights_that_are_no_numbers_are_refused(model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][2, 3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=f"tensor {name} holds NaN"):
        make_checkpoint(broken, tmp_path / "out", "W8A8")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_size_without_a_hadamard_matrix_names_the_way_out(tmp_path: Path) -> None:
    odd = save_model(tmp_path / "odd", intermediate_size=46)
    with pytest.raises(UnsupportedModelError, match=r"R4 over intermediate_size = 46.*orthogonal"):
        make_checkpoint(odd, tmp_path / "out", "FP32")
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]
    make_checkpoint(odd, tmp_path / "out", "FP32", rotate="r1,r2")


def test_a_group_size_that_does_not_divide_names_the_layer(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"down_proj: group size 32 does not divide the 48"):
        make_checkpoint(model, tmp_path / "out", "W4A8", group_size=32, weights="rtn")
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_no_model(model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    output = make_checkpoint(model, tmp_path / "a", "FP32")
    with pytest.raises(StageOrderError, match="expected a model, got an artifact of kind check"):
        make_checkpoint(output, tmp_path / "b", "FP32")
    with pytest.raises(StageOrderError, match="expected an artifact of kind adapter"):
        make_checkpoint(model, tmp_path / "b", "FP32", adapter=output)


def test_the_manifest_tells_the_whole_story_and_equal_runs_are_equal(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        make_checkpoint(model, tmp_path / name, "W8A8", adapter=adapters["reslora"])
    manifest = verify_files(tmp_path / "a")
    assert manifest.digest == read_manifest(tmp_path / "b").digest
    assert manifest.parents == load_model(model).parents() | {
        "adapter": read_manifest(adapters["reslora"]).digest,
    }
    details: Any = manifest.details
    assert details["scheme"] == "W8A8"
    assert len(details["rounding"]) == len(details["linears"]) == 15
    for entry in details["rounding"].values():
        assert 0 < entry["relative_error"] < 0.05  # what GPTQ aims at lies beside the weight
        assert 0 < entry["output_error"] <= entry["nearest_output_error"] < 1e-3
    assert details["merge"] is not None
    assert sorted(details["rotation"]["rotations"]) == ["R1", "R2", "R4"]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_a_finished_checkpoint_is_kept_and_another_is_never_overwritten(
    model: Path, tmp_path: Path
) -> None:
    make_checkpoint(model, tmp_path / "out", "FP32")
    written = (tmp_path / "out" / WEIGHTS_NAME).stat().st_mtime_ns
    make_checkpoint(model, tmp_path / "out", "FP32")
    with pytest.raises(ConfigError, match="exists already and was made from other inputs"):
        make_checkpoint(model, tmp_path / "out", "FP32", rotate="none")
    assert (tmp_path / "out" / WEIGHTS_NAME).stat().st_mtime_ns == written


def test_quality_falls_with_the_bits_and_stays_close_at_eight(model: Path, tmp_path: Path) -> None:
    exact = logits(make_checkpoint(model, tmp_path / "fp", "FP32"))
    errors = [
        distance(logits(make_checkpoint(model, tmp_path / scheme, scheme)), exact)
        for scheme in ("W8A8", "W6A6", "W4A4")
    ]
    assert errors[0] < 0.05
    assert errors[0] < errors[1] < errors[2]
