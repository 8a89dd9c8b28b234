"""Exports whose key-value cache holds integers of 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from deploy.checkpoint import Checkpoint
from deploy.errors import ParityError, UnsupportedModelError
from deploy.kernels import Kernel
from deploy.run import Sampling, TextGenerator
from deploy.session import OnnxDecoder
from tests.deploy.tiny_artifacts import (
    attention_nodes,
    make_checkpoint,
    make_export,
    put_fault_in_export,
    save_model,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
WITH_R3 = "r1,r2,r3,r4"
IDS = np.arange(24, dtype=np.int64) * 5 % 60


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def checkpoint(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("kv") / "kv8"
    return make_checkpoint(models["llama"], output, "FP32", rotate=WITH_R3, kv_bits=8)


@pytest.fixture(scope="module")
def export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("kv") / "onnx"
    make_export(checkpoint, output)
    return output


def cache_types(export: Path, file: str = "model.onnx") -> set[str]:
    session = ort.InferenceSession(str(export / file), providers=["CPUExecutionProvider"])
    values = [*session.get_inputs(), *session.get_outputs()]
    return {value.type for value in values if value.name.startswith(("past", "present"))}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rotate", [WITH_R3, None])
def test_an_eight_bit_cache_keeps_parity(
    models: dict[str, Path], tmp_path: Path, family: str, rotate: str | None
) -> None:
    source = make_checkpoint(models[family], tmp_path / "c", "FP32", rotate=rotate, kv_bits=8)
    report = make_export(source, tmp_path / "onnx").to_dict()
    assert cache_types(tmp_path / "onnx") == {"tensor(int8)"}
    assert report["operators"].get("RotaryEmbedding", 0) == (0 if rotate is None else 2)
    assert report["parity"]["top1_agreement"] > 0.9


def test_r3_stands_behind_a_rotary_embedding_of_part_of_each_head(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = save_model(tmp_path / "m", "phi3", hidden_size=128, head_dim=32, rope_parameters=rope)
    source = make_checkpoint(model, tmp_path / "c", "FP32", rotate=WITH_R3, kv_bits=8)
    report = make_export(source, tmp_path / "onnx").to_dict()
    assert report["operators"]["RotaryEmbedding"] == 2
    assert report["parity"]["top1_agreement"] > 0.9


def test_every_graph_of_an_integer_export_shares_the_cache(
    models: dict[str, Path], tmp_path: Path
) -> None:
    source = make_checkpoint(models["qwen3"], tmp_path / "c", "W4A8", weights="rtn", kv_bits=8)
    make_export(source, tmp_path / "onnx", Kernel.AUTO)
    for file in ("prompt.onnx", "token.onnx"):
        assert cache_types(tmp_path / "onnx", file) == {"tensor(int8)"}


def test_a_float_cache_leaves_r3_out_of_the_graph(models: dict[str, Path], tmp_path: Path) -> None:
    source = make_checkpoint(models["llama"], tmp_path / "c", "FP32", rotate=WITH_R3)
    report = make_export(source, tmp_path / "onnx").to_dict()
    assert "RotaryEmbedding" not in report["operators"]
    assert cache_types(tmp_path / "onnx") == {"tensor(float)"}


def test_padded_prompts_of_a_batch_go_on_at_their_own_positions(
    checkpoint: Path, export: Path
) -> None:
    lengths, steps = np.array([12, 5]), IDS[12:15]
    prompt = np.stack([IDS[:12], IDS[:12]])
    with OnnxDecoder(export) as decoder:
        decoder.start(capacity=16, batch=2)
        found = [decoder.append(prompt, lengths, last_only=True)]
        found += [decoder.append(np.full((2, 1), token)) for token in steps]
    with Checkpoint(checkpoint) as opened:
        model = opened.load_model()
    for row, length in enumerate(lengths):
        ids = torch.from_numpy(np.concatenate([IDS[:length], steps]))[None]
        with torch.inference_mode():
            expected = model(input_ids=ids).logits[0, length - 1 :].numpy()
        logits = np.concatenate([step[row] for step in found])
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)


def test_a_prompt_in_two_parts_is_the_prompt(export: Path) -> None:
    with OnnxDecoder(export) as decoder:
        whole = decoder.logits(IDS)
        decoder.start(capacity=len(IDS))
        parts = [decoder.append(IDS[None, :10])[0], decoder.append(IDS[None, 10:])[0]]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=1e-3)


def test_stock_genai_holds_the_integer_cache(export: Path) -> None:
    prompt, count = IDS[1:20], 12
    tokens: list[int] = []
    with OnnxDecoder(export) as decoder:
        decoder.start(capacity=len(prompt) + count)
        logits = decoder.append(prompt[None])
        while len(tokens) < count:
            tokens.append(int(logits[0, -1].argmax()))
            logits = decoder.append(np.array([tokens[-1:]]))
    generated = TextGenerator(export).generate(prompt.tolist(), Sampling(max_new_tokens=count))
    assert list(generated) == tokens
    assert len(set(tokens)) > 3


def test_four_bits_are_refused_with_what_can_be_exported(
    models: dict[str, Path], tmp_path: Path
) -> None:
    source = make_checkpoint(models["llama"], tmp_path / "c", "FP32", kv_bits=4)
    with pytest.raises(UnsupportedModelError, match=r"4 bits has a scale a token.*--kv-bits 8 or"):
        make_export(source, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def initializer(graph: onnx.ModelProto, ending: str) -> onnx.TensorProto:
    return next(one for one in graph.graph.initializer if one.name.endswith(ending))


def wrong_scale(graph: onnx.ModelProto) -> None:
    tensor = initializer(graph, "kv_cache.key_scale")
    array = onnx.numpy_helper.to_array(tensor) * np.float32(1.5)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def swapped_scales(graph: onnx.ModelProto) -> None:
    for node in attention_nodes(graph.graph):
        node.input[12], node.input[13] = node.input[13], node.input[12]


def unrotated(graph: onnx.ModelProto) -> None:
    node = next(one for one in graph.graph.node if one.name.endswith("R3/MatMul"))
    tensor = next(one for one in graph.graph.initializer if one.name == node.input[1])
    identity = np.eye(tensor.dims[0], dtype=np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(identity, tensor.name))


@pytest.mark.parametrize("fault", [wrong_scale, swapped_scales, unrotated])
def test_a_wrong_cache_fails_parity(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[onnx.ModelProto], None],
) -> None:
    put_fault_in_export(monkeypatch, "model.onnx", fault)
    with pytest.raises(ParityError, match="departs from the torch reference"):
        make_export(checkpoint, tmp_path / "onnx")
