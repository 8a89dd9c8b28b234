from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from deploy.architecture import decoder_names
from deploy.artifact import MANIFEST_NAME
from deploy.checkpoint import (
    Checkpoint,
    weights_bytes,
    write_model,
    write_weights,
)
from deploy.checkpoint_reader import WEIGHTS_NAME, formats_to_details, slabs
from deploy.checkpoint_settings import choose_recipe
from deploy.errors import ArtifactError, ConfigError, StageOrderError
from deploy.loading import load_model
from deploy.parity import float_activation_logits, torch_logits
from rolora.layer_plan import plan_layers
from rolora.linear import InputQuantizedLinear, QuantizedEmbedding, QuantizedLinear
from rolora.overrides import Override
from rolora.scheme import Granularity
from tests.deploy.tiny_artifacts import make_checkpoint, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", "qwen2", tied=True)


@pytest.fixture(scope="module")
def four_bits(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        model, tmp_path_factory.mktemp("c") / "w4a4", "W4A4", weights="rtn", static=True
    )


@pytest.fixture(scope="module")
def grouped(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("c") / "w4a8"
    return make_checkpoint(
        model, output, "W4A8", weights="rtn", group_size=16, embedding_bits=32, head_bits=32
    )


def edit_details(source: Path, copy: Path, fqn: str, change: dict[str, Any]) -> Path:
    shutil.copytree(source, copy)
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    record = manifest["details"]["linears"][fqn]
    manifest["details"]["linears"][fqn] = {
        key: value for key, value in (record | change).items() if value != "absent"
    }
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest))
    return copy


def test_four_bit_weights_lie_packed_and_are_read_as_integers(four_bits: Path) -> None:
    fqn = "model.layers.1.mlp.down_proj"
    with Checkpoint(four_bits) as checkpoint:
        linear = checkpoint.linear(fqn)
        assert (linear.out_features, linear.in_features) == (32, 48)
        assert checkpoint.array(f"{fqn}.weight").shape == checkpoint.shape(f"{fqn}.weight")
        assert checkpoint.shape(f"{fqn}.weight") == (32, 24)
        assert checkpoint.array(f"{fqn}.weight").dtype == np.uint8
        integers = checkpoint.integers(linear)
        assert (integers.shape, integers.dtype) == ((32, 48), np.int8)
        assert (integers.min(), integers.max()) >= (-8, 7)
        head = checkpoint.linear("lm_head")
        assert head.weight.bits == 8
        assert checkpoint.integers(head).shape == (262, 32)


def test_the_rebuilt_model_has_the_modules_of_the_manifest(four_bits: Path, grouped: Path) -> None:
    with Checkpoint(four_bits) as checkpoint:
        model = checkpoint.load_model()
    query = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(query, QuantizedLinear)
    assert query.bias is not None
    assert query.activation.granularity is Granularity.TENSOR
    down = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(down, QuantizedLinear)
    assert down.activation.granularity is Granularity.TOKEN
    assert down.activation.clip_ratio == 0.7
    assert len(down._forward_pre_hooks) == 1, "R4"
    assert isinstance(model.get_submodule("model.embed_tokens"), QuantizedEmbedding)
    with Checkpoint(grouped) as checkpoint:
        model = checkpoint.load_model()
        assert not checkpoint.has("model.embed_tokens.weight_scale")
        assert checkpoint.linear("lm_head").activation is None
    assert isinstance(model.get_submodule("lm_head"), torch.nn.Linear)
    gate = model.get_submodule("model.layers.0.mlp.gate_proj")
    assert isinstance(gate, QuantizedLinear)
    assert gate.activation.group_size == gate.weight_spec.group_size == 16


@pytest.mark.parametrize("overrides", [(), ("layers.0.*=W16A8", "o=W16A8")])
def test_weights_read_on_call_give_the_same_logits_and_are_forgotten(
    overrides: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    path = make_checkpoint(
        model,
        tmp_path / "c",
        "W4A8",
        weights="rtn",
        overrides=tuple(map(Override.parse, overrides)),
    )
    ids = np.arange(20, 60)

    def held(module: torch.nn.Module) -> set[str]:
        return {
            name
            for name, part in module.named_modules()
            if isinstance(part, QuantizedLinear | InputQuantizedLinear)
            and part.weight.device.type != "meta"
        }

    with Checkpoint(path) as checkpoint:
        whole, lean = checkpoint.load_model(), checkpoint.load_model(on_call=True)
        assert len(held(whole)) == 15
        assert not held(lean)
        for compute in (torch_logits, float_activation_logits):
            np.testing.assert_array_equal(compute(lean, ids), compute(whole, ids))
            assert not held(lean)
        kinds = {type(lean.get_submodule(fqn)) for fqn in checkpoint.names.linears()}
        assert (InputQuantizedLinear in kinds) == bool(overrides)


def test_weights_read_on_call_can_be_held_for_a_while(four_bits: Path) -> None:
    fqn = "model.layers.0.mlp.gate_proj"
    with Checkpoint(four_bits) as checkpoint:
        whole, lean = checkpoint.load_model(), checkpoint.load_model(on_call=True)
        linear, expected = lean.get_submodule(fqn), whole.get_submodule(fqn).weight
        assert isinstance(linear, QuantizedLinear)
        with checkpoint.weights_held(lean, (fqn, "lm_head")):
            torch.testing.assert_close(linear.weight, expected, rtol=0, atol=0)
        assert linear.weight.is_meta
        with checkpoint.weights_held(whole, (fqn,)):
            pass
        assert whole.get_submodule(fqn).weight is expected


def test_a_weight_is_forgotten_when_its_linear_fails(four_bits: Path) -> None:
    with Checkpoint(four_bits) as checkpoint:
        linear = checkpoint.load_model(on_call=True).get_submodule("lm_head")
        assert isinstance(linear, QuantizedLinear)
        with pytest.raises(RuntimeError):
            linear(torch.zeros(1, 5))
        assert linear.weight.device.type == "meta"


def test_a_float_checkpoint_computes_what_the_model_does(model: Path, tmp_path: Path) -> None:
    ids = torch.arange(20, 60)[None]
    with torch.inference_mode():
        expected = load_model(model).model(input_ids=ids).logits
        for rotate in ("none", "r1,r2,r4"):
            output = make_checkpoint(model, tmp_path / rotate, "FP32", rotate=rotate)
            with Checkpoint(output) as checkpoint:
                assert (checkpoint.r4 is None) == (rotate == "none")
                rebuilt = checkpoint.load_model()
            found = rebuilt(input_ids=ids).logits
            assert float((found - expected).norm() / expected.norm()) < 1e-5
            if rotate != "none":
                for hooked in rebuilt.modules():
                    hooked._forward_pre_hooks.clear()
                without = rebuilt(input_ids=ids).logits
                assert float((without - expected).norm() / expected.norm()) > 1e-3


def test_formats_survive_the_manifest(model: Path, grouped: Path) -> None:
    names = decoder_names(load_model(model).model.config)
    recipe = choose_recipe("W4A8", weights="rtn", group_size=16, embedding_bits=32, head_bits=32)
    assert recipe is not None
    plans = plan_layers(names, recipe)
    with Checkpoint(grouped) as checkpoint:
        assert checkpoint.manifest.details["linears"] == formats_to_details(plans)
        for plan in plans:
            linear = checkpoint.linear(plan.fqn)
            assert (linear.weight, linear.activation) == (plan.weight, plan.activation)


@pytest.mark.parametrize(
    "change",
    [
        {"weight_bits": "absent"},
        {"activation_granularity": "per moon"},
        {"activation_granularity": None},
    ],
)
def test_a_format_that_cannot_be_read_names_the_linear(
    four_bits: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    fqn = "model.layers.0.mlp.up_proj"
    copy = edit_details(four_bits, tmp_path / "copy", fqn, change)
    with pytest.raises(ArtifactError, match=f"format of {fqn} is unreadable"):
        Checkpoint(copy)


def test_changed_bytes_are_refused(four_bits: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(four_bits, tmp_path / "copy")
    content = bytearray((copy / WEIGHTS_NAME).read_bytes())
    content[-1] ^= 1
    (copy / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model.safetensors: expected sha256"):
        Checkpoint(copy)
    (copy / WEIGHTS_NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=r"model.safetensors: .*write the checkpoint again"):
        Checkpoint(copy, verify=False)


def test_a_missing_tensor_is_named(four_bits: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(four_bits, tmp_path / "copy")
    tensors = load_file(copy / WEIGHTS_NAME)
    missing = "model.layers.1.self_attn.o_proj.weight_scale"
    del tensors[missing]
    save_file(tensors, copy / WEIGHTS_NAME)
    with (
        Checkpoint(copy, verify=False) as checkpoint,
        pytest.raises(ArtifactError, match=f"tensor '{missing}' is missing"),
    ):
        checkpoint.load_model()
    with (
        Checkpoint(copy, verify=False) as checkpoint,
        pytest.raises(ArtifactError, match="'nonsense' is missing"),
    ):
        checkpoint.shape("nonsense")


def test_what_is_no_checkpoint_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(StageOrderError, match="merge-rotate-quantize"):
        Checkpoint(model)


def test_joined_parts_are_the_file_that_one_write_gives(four_bits: Path, tmp_path: Path) -> None:
    tensors = load_file(four_bits / WEIGHTS_NAME)
    keys = sorted(tensors)
    for name, some in {"a": keys[::2], "b": keys[1::2]}.items():
        save_file({key: tensors[key] for key in some}, tmp_path / name)
    write_weights(tmp_path, [tmp_path / "b", tmp_path / "a"])
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == (four_bits / WEIGHTS_NAME).read_bytes()
    write_weights(tmp_path, [tmp_path / "a"])
    assert load_file(tmp_path / WEIGHTS_NAME).keys() == set(keys[::2])


def test_expected_size_covers_the_file_that_a_whole_model_gives(
    four_bits: Path, tmp_path: Path
) -> None:
    with Checkpoint(four_bits) as checkpoint:
        model = checkpoint.load_model()
    write_model(tmp_path, model)
    written, before = load_file(tmp_path / WEIGHTS_NAME), load_file(four_bits / WEIGHTS_NAME)
    assert written.keys() == before.keys()
    assert all((written[key] == before[key]).all() for key in before)
    header = 16384
    assert (tmp_path / WEIGHTS_NAME).stat().st_size < weights_bytes(model) + header


@pytest.mark.parametrize(("name", "scheme"), [("four", "W4A8"), ("eight", "W8A8")])
def test_parts_of_integers_are_the_whole(tmp_path: Path, name: str, scheme: str) -> None:
    model = save_model(tmp_path / "model")
    directory = make_checkpoint(model, tmp_path / name, scheme, weights="rtn")
    with Checkpoint(directory) as opened:
        linear = opened.linear(opened.names.blocks[0].down)
        whole = opened.integers(linear)
        pieces = list(slabs(linear.out_features, linear.in_features))
        rows = [opened.integer_rows(linear, some) for some in pieces]
        np.testing.assert_array_equal(np.concatenate(rows), whole)
        for columns in (slice(0, 2), slice(4, linear.in_features)):
            np.testing.assert_array_equal(
                opened.integer_columns(linear, columns), whole[:, columns]
            )
        with pytest.raises(ArtifactError, match="tensor 'none' is missing"):
            opened.part("none", slice(0, 1))


@given(length=st.integers(1, 300), width=st.integers(1, 10**8))
def test_slabs_cover_an_axis_once_and_start_at_even_numbers(length: int, width: int) -> None:
    pieces = list(slabs(length, width))
    assert [row for some in pieces for row in range(some.start, some.stop)] == list(range(length))
    assert all(some.start % 2 == 0 for some in pieces)
