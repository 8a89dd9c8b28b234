from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

import deploy.export
from deploy.checkpoint import Checkpoint
from deploy.checkpoint_reader import WEIGHTS_NAME
from deploy.decoder_graph import DecoderGraph
from deploy.errors import ParityError
from deploy.exact_weights import check_exact_weights
from deploy.kernels import Kernel
from deploy.parity import (
    DECODE_STEPS,
    DRAWS,
    MORE_DRAWS,
    check_parity,
    float_activations,
    noise_floor,
    prompt_length,
    relative_error,
)
from deploy.session import GRAPH_NAME, OnnxDecoder
from rolora.linear import QuantizedLinear
from tests.deploy.tiny_artifacts import (
    attention_nodes,
    make_checkpoint,
    make_export,
    put_fault_in_export,
    save_model,
)

SCHEMES = {
    "W8A8": {},
    "W4A8": {"group_size": 16},
    "W4A4": {},
}
"""The three kernels: bytes, packed blocks, and nibbles behind a Cast."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", "qwen2")


@pytest.fixture(scope="module")
def checkpoints(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("checkpoints")
    return {
        name: make_checkpoint(model, base / name, name, weights="rtn", **recipe)
        for name, recipe in SCHEMES.items()
    }


@pytest.fixture(scope="module")
def float_checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(model, tmp_path_factory.mktemp("float") / "fp32", "FP32")


@pytest.fixture(scope="module")
def exports(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("exports")
    for name, checkpoint in checkpoints.items():
        make_export(checkpoint, base / name)
    return {name: base / name for name in checkpoints}


def edit_stored(checkpoint: Path, copy: Path, key: str, edit: Callable[[np.ndarray], None]) -> Path:
    """Copy a checkpoint with one tensor changed, its manifest unchanged."""
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(copy / WEIGHTS_NAME)
    tensors[key] = tensors[key].copy()
    edit(tensors[key])
    save_file(tensors, copy / WEIGHTS_NAME, metadata={"format": "pt"})
    return copy


def add_one_step(array: np.ndarray) -> None:
    """Change one value by the least possible step, in range."""
    flat = array.reshape(-1)
    if array.dtype == np.float32:
        flat[-1] = np.nextafter(flat[-1], np.float32(1e9))
    else:
        flat[-1] ^= 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_export_holds_the_very_integers_and_scales(
    scheme: str, checkpoints: dict[str, Path], exports: dict[str, Path]
) -> None:
    with Checkpoint(checkpoints[scheme]) as checkpoint:
        assert check_exact_weights(checkpoint, exports[scheme]) == 2 * 7 + 1
        ids = np.arange(20, 84)
        report = check_parity(checkpoint, exports[scheme], ids)
    assert report.exact_weights == 15
    assert max(report.prefill_error, report.decode_error) <= report.bound
    assert report.bound >= 2 * report.noise_floor


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "part", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"]
)
@pytest.mark.parametrize("tensor", ["weight", "weight_scale"])
def test_one_step_in_one_number_of_the_checkpoint_is_seen(
    scheme: str,
    part: str,
    tensor: str,
    checkpoints: dict[str, Path],
    exports: dict[str, Path],
    tmp_path: Path,
) -> None:
    key = f"model.layers.1.{part}.{tensor}"
    other = edit_stored(checkpoints[scheme], tmp_path / "copy", key, add_one_step)
    said = "the exported scales" if tensor == "weight_scale" else "the exported integers"
    with (
        Checkpoint(other, verify=False) as checkpoint,
        pytest.raises(ParityError, match=said) as caught,
    ):
        check_exact_weights(checkpoint, exports[scheme])
    assert caught.value.exit_code == 6


def test_a_linear_that_the_graph_lacks_is_seen(
    checkpoints: dict[str, Path], exports: dict[str, Path], tmp_path: Path
) -> None:
    graph = onnx.load(exports["W8A8"] / GRAPH_NAME)
    for initializer in graph.graph.initializer:
        if initializer.name == "model.layers.0.mlp.up_proj.weight":
            initializer.name = "renamed"
    onnx.save(graph, tmp_path / GRAPH_NAME)
    with (
        Checkpoint(checkpoints["W8A8"]) as checkpoint,
        pytest.raises(ParityError, match="14 of 15 quantized linears"),
    ):
        check_exact_weights(checkpoint, tmp_path)


def drop_online_rotation(graph: onnx.ModelProto) -> None:
    eyes = {
        name: np.eye(len(numpy_helper.to_array(tensor)), dtype=np.float32)
        for tensor in graph.graph.initializer
        for node in graph.graph.node
        for name in node.input
        if "/R4/" in node.name and node.op_type == "MatMul" and name == tensor.name
    }
    assert len(eyes) == 2
    for tensor in graph.graph.initializer:
        if tensor.name in eyes:
            tensor.CopyFrom(numpy_helper.from_array(eyes[tensor.name], tensor.name))


def shift_zero_point(graph: onnx.ModelProto) -> None:
    """Give one quantizer another zero point than the product that reads it."""
    node = next(node for node in graph.graph.node if node.op_type == "QuantizeLinear")
    graph.graph.initializer.append(numpy_helper.from_array(np.uint8(127), "wrong_zero"))
    node.input[2] = "wrong_zero"


def double_one_static_scale(graph: onnx.ModelProto) -> None:
    node = next(node for node in graph.graph.node if node.op_type == "QuantizeLinear")
    graph.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "wrong_scale"))
    node.input[1] = "wrong_scale"


def forget_the_rotary_embedding(graph: onnx.ModelProto) -> None:
    for node in attention_nodes(graph.graph):
        next(item for item in node.attribute if item.name == "do_rotary").i = 0


def forget_a_bias(graph: onnx.ModelProto) -> None:
    bias = next(item for item in graph.graph.initializer if item.name.endswith("qkv.bias"))
    bias.CopyFrom(numpy_helper.from_array(0 * numpy_helper.to_array(bias), bias.name))


def enlarge_epsilon(graph: onnx.ModelProto) -> None:
    for node in graph.graph.node:
        for item in node.attribute:
            if item.name == "epsilon":
                item.f = 1e-3


FAULTS = [
    ("W8A8", drop_online_rotation),
    ("W4A8", drop_online_rotation),
    ("W4A4", drop_online_rotation),
    ("FP32", drop_online_rotation),
    ("W8A8", shift_zero_point),
    ("W4A4", shift_zero_point),
    ("W8A8", double_one_static_scale),
    ("W8A8", forget_the_rotary_embedding),
    ("FP32", forget_the_rotary_embedding),
    ("FP32", forget_a_bias),
    ("FP32", enlarge_epsilon),
]


@pytest.mark.parametrize(("scheme", "fault"), FAULTS)
def test_a_faulty_graph_ends_the_export_with_nothing_on_disk(
    scheme: str,
    fault: Callable[[onnx.ModelProto], None],
    checkpoints: dict[str, Path],
    float_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_fault_in_export(monkeypatch, GRAPH_NAME, fault)
    source = float_checkpoint if scheme == "FP32" else checkpoints[scheme]
    with pytest.raises(ParityError, match="departs from the torch reference"):
        make_export(source, tmp_path / "out" / "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tensor", ["weight", "weight_scale"])
def test_a_number_changed_while_it_is_exported_ends_the_export_with_nothing_on_disk(
    tensor: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = f"model.layers.0.mlp.up_proj.{tensor}"
    other = edit_stored(checkpoints["W8A8"], tmp_path / "copy", key, add_one_step)

    def other_graph(_checkpoint: Checkpoint, *rest: Any) -> DecoderGraph:
        return DecoderGraph(Checkpoint(other, verify=False), *rest)

    monkeypatch.setattr(deploy.export, "DecoderGraph", other_graph)
    with pytest.raises(ParityError, match="not the checkpoint's"):
        make_export(checkpoints["W8A8"], tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_not_a_number_is_out_of_bound(
    float_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy.parity, "relative_error", lambda found, expected: float("nan"))
    with pytest.raises(ParityError, match="nan"):
        make_export(float_checkpoint, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_fault_that_shows_in_the_last_step_alone_is_out_of_bound(
    float_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = OnnxDecoder.append

    def drift(decoder: OnnxDecoder, ids: np.ndarray, **options: Any) -> np.ndarray:
        logits = append(decoder, ids, **options)
        return 1.5 * logits if int(decoder._lengths.max()) == decoder._capacity else logits

    monkeypatch.setattr(OnnxDecoder, "append", drift)
    with pytest.raises(ParityError, match="departs from the torch reference"):
        make_export(float_checkpoint, tmp_path / "onnx")


def test_float_activations_keep_what_an_adapter_adds(checkpoints: dict[str, Path]) -> None:
    with Checkpoint(checkpoints["W8A8"]) as checkpoint:
        model = checkpoint.load_model()
        linear = model.get_submodule(checkpoint.names.blocks[0].output)
    assert isinstance(linear, QuantizedLinear)
    linear.register_forward_hook(lambda _module, _inputs, output: output + 1.0)
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
    with float_activations(model):
        found = linear(x)
    product = torch.nn.functional.linear(x, linear.dequantized_weight(), linear.bias)
    torch.testing.assert_close(found, product + 1.0)


@pytest.mark.parametrize(("noise", "passes"), [(1.0, True), (1e-6, False)])
def test_more_perturbations_are_drawn_before_an_export_is_refused(
    noise: float,
    passes: bool,
    checkpoints: dict[str, Path],
    exports: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[int] = []

    def floor(*arguments: Any) -> float:
        drawn.append(arguments[5])
        return 1e-6 if drawn == [DRAWS] else noise

    monkeypatch.setattr(deploy.parity, "noise_floor", floor)
    with Checkpoint(checkpoints["W8A8"]) as checkpoint:
        check_parity(checkpoint, exports["W8A8"], np.arange(20, 84))
    assert drawn == [DRAWS], "an export that passes costs no more"
    drawn.clear()
    put_fault_in_export(monkeypatch, GRAPH_NAME, enlarge_epsilon)
    with nullcontext() if passes else pytest.raises(ParityError, match="departs"):
        make_export(checkpoints["W8A8"], tmp_path / "onnx", Kernel.INTEGER)
    assert drawn[:2] == [DRAWS, MORE_DRAWS]


@pytest.mark.parametrize("context", [2, 3, 64, 65, 66, 200])
def test_a_short_context_has_a_prompt_of_two_tokens_at_least(context: int) -> None:
    prompt = prompt_length(context)
    assert 2 <= prompt <= context
    assert context - prompt <= DECODE_STEPS


def test_a_short_context_checks_the_graph_of_prompts_too(tmp_path: Path) -> None:
    short = save_model(tmp_path / "model", max_position_embeddings=64)
    source = make_checkpoint(short, tmp_path / "checkpoint", "W4A8", weights="rtn")
    parity = make_export(source, tmp_path / "onnx", Kernel.AUTO).to_dict()["parity"]
    assert parity["prefill_error"] <= parity["bound"]


def test_the_floor_is_the_worst_of_the_perturbations(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    sizes = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(
        deploy.parity, "perturbed_logits", lambda *_: expected * np.float32(1 + next(sizes))
    )
    floor = noise_floor(None, "embedding", np.arange(5), expected, torch.Generator())  # type: ignore[arg-type]
    assert floor == pytest.approx(3.0, rel=1e-5)


def test_the_report_is_in_the_manifest_as_plain_json(exports: dict[str, Path]) -> None:
    text = (exports["W4A8"] / "rolora_manifest.json").read_text()
    parity = json.loads(text)["checks"]["parity"]
    assert parity["exact_weights"] == 15
    assert parity["prefill_error"] <= parity["bound"]


def test_relative_error_ignores_a_shift_per_position_and_nothing_else() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    shifted = logits + np.arange(5, dtype=np.float32)[:, None]
    assert relative_error(shifted, logits) < 1e-6
    centred = logits - logits.mean(axis=1, keepdims=True)
    assert relative_error(1.5 * centred, centred) == pytest.approx(0.5, rel=1e-5)
