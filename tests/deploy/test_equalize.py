"""Channel scales through the stages: checkpoint, export, adapters, and where they are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from deploy.artifact import read_manifest
from deploy.calibration_text import calibration_batches
from deploy.checkpoint import Checkpoint
from deploy.compressed_export import export_compressed
from deploy.errors import ConfigError, ParityError, UnsupportedModelError
from deploy.finetune import Method, finetune
from deploy.loading import load_local_tokenizer, load_model
from deploy.merge import Destination, MergeSettings, merge
from rolora.kronecker import Rotation
from rolora.linear import QuantizedLinear
from tests.conftest import MODEL_TYPES
from tests.deploy.tiny_artifacts import (
    finetune_settings,
    make_adapter,
    make_checkpoint,
    make_export,
    save_model,
    write_rows,
)

IDS = torch.arange(30, 70)[None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("equalize") / "tiny")


@pytest.fixture(scope="module")
def scaled(model: Path) -> Path:
    return make_checkpoint(model, model.parent / "scaled", "FP32", equalize="all")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("equalize", ["inner", "all"])
@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "gemma2"])
def test_a_float_checkpoint_with_scales_computes_what_the_model_does(
    model_type: str, equalize: str, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", model_type)
    expected = logits(load_model(model).model)
    directory = make_checkpoint(model, tmp_path / "out", "FP32", equalize=equalize)
    with Checkpoint(directory) as checkpoint:
        assert checkpoint.rotation is not None
        in_stream = equalize == "inner" and not model_type.startswith("gemma")
        assert (checkpoint.online_r1 is None) is in_stream
        assert checkpoint.rotation.equalization is not None
        found = logits(checkpoint.load_model())
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert read_manifest(directory).details["rotation"]["equalized"] == equalize


@pytest.mark.parametrize(
    ("scheme", "options", "expected"),
    [
        ("FP32", {}, None),
        ("W4A4", {}, "all"),
        ("W4A4", {"equalize": "none"}, None),
        ("W4A4", {"equalize": "inner"}, "inner"),
        ("W4A4", {"rotate": "r2,r4"}, "inner"),
        ("W8A8", {}, "inner"),
        ("W4A8", {}, None),
        ("W8A16", {}, None),
        ("W8A8", {"equalize": "all"}, "all"),
        ("W8A8", {"rotate": "r1,r2"}, None),
    ],
)
def test_which_inputs_have_scales_depends_on_bits_and_rotations(
    scheme: str, options: dict[str, Any], expected: str | None, model: Path, tmp_path: Path
) -> None:
    directory = make_checkpoint(model, tmp_path / "out", scheme, weights="rtn", **options)
    assert read_manifest(directory).details["rotation"].get("equalized") == expected


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "phi3", "gemma2"])
@pytest.mark.parametrize("scheme", ["W4A4", "W8A8"])
def test_an_export_rotates_behind_its_norms(model_type: str, scheme: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", model_type)
    directory = make_checkpoint(model, tmp_path / "out", scheme, equalize="all", weights="rtn")
    make_export(directory, tmp_path / "onnx")  # with its parity check
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    names = [node.name for node in graph.node]
    assert sum("/R1/left/MatMul" in name for name in names) == 2 * 2 + 1
    assert not any("signs" in name for name in names)


def test_signs_that_the_gains_lack_are_noticed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_checkpoint(model, tmp_path / "out", "W8A8", equalize="all", weights="rtn")
    online_r1 = Checkpoint.online_r1.fget

    def without_signs(self: Checkpoint) -> Rotation:
        return replace(online_r1(self), signs=None)

    monkeypatch.setattr(Checkpoint, "online_r1", property(without_signs))
    with pytest.raises(ParityError, match="departs from the torch reference"):
        make_export(directory, tmp_path / "onnx")


def test_an_adapter_trained_between_scales_leaves_them_again(
    model: Path, scaled: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    settings = finetune_settings(model, data, "rolora", learning_rate=5e-2, max_steps=6)
    adapter = tmp_path / "adapter"
    finetune(replace(settings, rotation=scaled, targets="all"), adapter)
    merged = tmp_path / "merged"
    merge(MergeSettings(str(model), adapter, Destination.MODEL), merged)
    inside = make_checkpoint(model, tmp_path / "inside", "FP32", adapter=adapter)
    with Checkpoint(inside) as checkpoint:
        expected = logits(checkpoint.load_model())
    found, plain = logits(load_model(merged).model), logits(load_model(model).model)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    assert float((plain - expected).abs().max() / expected.abs().max()) > 1e-2
    again = make_checkpoint(model, tmp_path / "again", "W4A4", adapter=adapter, weights="rtn")
    rotations = [read_manifest(path).details["rotation"]["digest"] for path in (scaled, again)]
    assert rotations[0] == rotations[1]


def test_scales_are_refused_where_there_can_be_none(
    model: Path, scaled: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--equalize all needs a rotation"):
        make_checkpoint(model, tmp_path / "a", "W4A4", rotate="none", equalize="all")
    adapter = make_adapter(model, tmp_path / "adapter", "rolora")
    with pytest.raises(
        ConfigError, match="--equalize all: the rotation is that of another artifact"
    ):
        make_checkpoint(model, tmp_path / "b", "W4A4", adapter=adapter, equalize="all")
    assert (
        "equalized"
        not in read_manifest(
            make_checkpoint(model, tmp_path / "c", "W4A4", adapter=adapter, weights="rtn")
        ).details["rotation"]
    )
    data = write_rows(tmp_path / "rows.jsonl")
    settings = finetune_settings(model, data, "reslora")
    shortcut = replace(settings, method=Method.ROLORA, rotation=scaled)
    with pytest.raises(ConfigError, match="scales differ between the layers"):
        finetune(shortcut, tmp_path / "d")
    eight = make_checkpoint(model, tmp_path / "e", "W8A8", equalize="all", weights="rtn")
    with pytest.raises(UnsupportedModelError, match=r"R1 acts at run time.*--equalize inner"):
        export_compressed(eight, tmp_path / "f")
    assert not any((tmp_path / name).exists() for name in "abdf")


def test_scales_make_the_rounding_of_unequal_channels_cheaper(model: Path, tmp_path: Path) -> None:
    loud = load_model(model)
    for layer in loud.model.model.layers:
        with torch.no_grad():  # changes nothing, but to what is rounded
            layer.mlp.up_proj.weight[::5] *= 30.0
            layer.mlp.down_proj.weight[:, ::5] /= 30.0
    loud.model.save_pretrained(tmp_path / "loud")
    loud.tokenizer.save_pretrained(tmp_path / "loud")
    expected = logits(loud.model)
    errors = {}
    for equalize in ("none", "inner", "all"):
        directory = make_checkpoint(
            tmp_path / "loud", tmp_path / equalize, "W4A4", equalize=equalize, weights="rtn"
        )
        with Checkpoint(directory) as checkpoint:
            quantized = checkpoint.load_model()
        assert isinstance(quantized.model.layers[0].self_attn.q_proj, QuantizedLinear)
        errors[equalize] = float((logits(quantized) - expected).square().mean())
    assert errors["all"] < 0.8 * errors["none"]
    assert errors["inner"] < 0.9 * errors["none"]


def test_the_head_is_rounded_on_the_input_that_it_has(model: Path, tmp_path: Path) -> None:
    scaled = make_checkpoint(model, tmp_path / "float", "FP32", equalize="all")
    directory = make_checkpoint(model, tmp_path / "out", "W4A4")
    with Checkpoint(scaled) as floats, Checkpoint(directory) as checkpoint:
        head = checkpoint.names.head
        weight = floats.load_model().get_parameter(f"{head}.weight").detach()
        quantized = checkpoint.load_model()
        tokenizer = load_local_tokenizer(directory)
        seen: list[torch.Tensor] = []
        quantized.get_submodule(head).register_forward_pre_hook(
            lambda _module, inputs: seen.append(inputs[0])
        )
        for batch in calibration_batches(tokenizer, None, windows=1, tokens=64):
            with torch.no_grad():
                quantized(**batch)
        linear = quantized.get_submodule(head)
        assert isinstance(linear, QuantizedLinear)
        change = linear.dequantized_weight() - weight
        rounding = read_manifest(directory).details["rounding"][head]
    x = torch.cat([each.reshape(-1, each.shape[-1]) for each in seen])
    error = float((x @ change.t()).square().sum() / (x @ weight.t()).square().sum())
    assert rounding["output_error"] == pytest.approx(error, rel=1e-2)
    assert rounding["output_error"] <= rounding["nearest_output_error"]
