"""Attention with whole scores and with blocks of them: one result, two ways of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import deploy.attention_inputs
from deploy.attention_forms import SINK
from deploy.errors import ParityError
from deploy.kernels import Kernel
from deploy.operator_trace import read_runs
from deploy.session import GRAPH_NAME, PROMPT_NAME, TOKEN_NAME, OnnxDecoder
from deploy.targets import Target
from tests.deploy.tiny_artifacts import (
    attention_nodes,
    make_checkpoint,
    make_export,
    put_fault_in_export,
    save_model,
)

IDS = np.arange(60, dtype=np.int64) * 5 % 60
MODEL = {"max_position_embeddings": 512}
BOUND = "WHOLE_SCORES_BYTES"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "m", "llama", **MODEL)


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(model, tmp_path_factory.mktemp("checkpoint") / "c", "FP32")


@pytest.fixture(scope="module")
def rounded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rounded") / "c"
    return make_checkpoint(model, output, "W8A8", weights="rtn", kv_bits=8)


def forms(decoder_runs: Path, layer: int = 0) -> list[str]:
    """Return the form that attention of a layer had in each run of a record."""
    name = f"model.layers.{layer}.self_attn/GroupQueryAttention/"
    return [
        node.name.removeprefix(name)
        for run in read_runs(decoder_runs)
        for node in run.nodes
        if node.name.startswith(name)
    ]


def logits(export: Path) -> list[np.ndarray]:
    """Run prompts, padded ones too, their continuation by many tokens, and single tokens."""
    found = []
    with OnnxDecoder(export, threads=1) as decoder:
        decoder.start(capacity=60)
        found += [decoder.append(IDS[None, :40]), decoder.append(IDS[None, 40:58])]
        found += [decoder.append(IDS[None, 58:59]), decoder.append(IDS[None, 59:])]
        decoder.start(capacity=32, batch=2)
        rows, lengths = np.stack([IDS[:24], IDS[24:48]]), np.array([24, 9])
        found.append(decoder.append(rows, lengths, last_only=True))
        found.append(decoder.append(np.full((2, 1), 7)))
    return found


def weigh_sinks(graph: onnx.ModelProto) -> None:
    """Let the sinks be 0, which takes a share of every softmax."""
    inputs = [node.input for node in attention_nodes(graph.graph)]
    sinks = {names[SINK] for names in inputs if len(names) > SINK} - {""}
    (tensor,) = (one for one in graph.graph.initializer if one.name in sinks)
    tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))


def test_both_forms_give_the_same(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_export(checkpoint, tmp_path / "whole")
    monkeypatch.setattr(deploy.attention_inputs, BOUND, 0)
    make_export(checkpoint, tmp_path / "tiled")
    whole, tiled = logits(tmp_path / "whole"), logits(tmp_path / "tiled")
    for one, other in zip(whole, tiled, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
    assert any((one != other).any() for one, other in zip(whole, tiled, strict=True))


def test_a_sink_that_weighs_something_changes_the_result(checkpoint: Path, tmp_path: Path) -> None:
    make_export(checkpoint, tmp_path / "onnx")
    before = logits(tmp_path / "onnx")
    path = tmp_path / "onnx" / GRAPH_NAME
    graph = onnx.load(path, load_external_data=False)
    weigh_sinks(graph)
    path.write_bytes(graph.SerializeToString())
    for one, other in zip(before, logits(tmp_path / "onnx"), strict=True):
        assert np.abs(one - other).max() > 1e-2


def test_scores_are_whole_up_to_their_bound(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, float_bytes = 4, 4
    monkeypatch.setattr(deploy.attention_inputs, BOUND, 400 * heads * float_bytes)
    make_export(checkpoint, tmp_path / "onnx")
    expected = []
    with OnnxDecoder(tmp_path / "onnx", threads=1, profiles=tmp_path) as decoder:
        # Scores have a column for each of the buffer's, whether it holds a token or not.
        for batch, capacity, tokens, form in (
            (1, 20, [20], ["whole"]),
            (1, 21, [20, 1], ["tiled", "whole"]),
            (2, 14, [14], ["whole"]),
            (2, 15, [14, 1], ["tiled", "whole"]),
            (1, 40, [10, 10], ["whole", "whole"]),
            (1, 41, [10, 9], ["tiled", "whole"]),
        ):
            decoder.start(capacity=capacity, batch=batch)
            for count in tokens:
                decoder.append(np.tile(IDS[:count], (batch, 1)))
            expected += form
        record, _ = decoder.end_profiling()
    assert forms(record) == forms(record, layer=1) == expected


@pytest.mark.parametrize(("capacity", "prompt", "form"), [(512, 20, "whole"), (22, 21, "tiled")])
def test_prompts_over_an_integer_cache_count_the_tokens_alone(
    rounded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capacity: int,
    prompt: int,
    form: str,
) -> None:
    monkeypatch.setattr(deploy.attention_inputs, BOUND, 20 * 20 * 4 * 4)
    make_export(rounded, tmp_path / "onnx", Kernel.AUTO)
    with OnnxDecoder(tmp_path / "onnx", threads=1, profiles=tmp_path) as decoder:
        decoder.start(capacity=capacity)
        decoder.append(IDS[None, :prompt], last_only=True)
        decoder.append(IDS[None, :1])
        record, _ = decoder.end_profiling()
    assert forms(record) == [form]


def rotary_forgotten(node: onnx.NodeProto) -> None:
    next(item for item in node.attribute if item.name == "do_rotary").i = 0


def key_for_value(node: onnx.NodeProto) -> None:
    node.input[4] = node.input[3]


def with_a_sink(node: onnx.NodeProto) -> None:
    node.input.extend([""] * (SINK - len(node.input)) + [node.input[7]])


@pytest.mark.parametrize("fault", [rotary_forgotten, key_for_value, with_a_sink])
def test_a_fault_in_the_form_that_parity_does_not_run_is_found(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[onnx.NodeProto], None],
) -> None:
    def spoil(graph: onnx.ModelProto) -> None:
        fault(next(node for node in attention_nodes(graph.graph) if node.name.endswith("tiled")))

    put_fault_in_export(monkeypatch, GRAPH_NAME, spoil)
    with pytest.raises(ParityError, match=r"two forms of .*layers.0.* differ in more than"):
        make_export(checkpoint, tmp_path / "onnx")


@pytest.mark.parametrize("name", [PROMPT_NAME, TOKEN_NAME])
def test_a_sink_that_weighs_something_is_refused(
    rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    put_fault_in_export(monkeypatch, name, weigh_sinks)
    with pytest.raises(ParityError, match=rf"{name}: the sinks of .*layers.0.* weigh something"):
        make_export(rounded, tmp_path / "onnx", Kernel.AUTO)


def test_a_graph_of_single_tokens_needs_no_branch(rounded: Path, tmp_path: Path) -> None:
    make_export(rounded, tmp_path / "onnx", Kernel.AUTO)
    graphs = {
        name: onnx.load(tmp_path / "onnx" / name, load_external_data=False).graph
        for name in (PROMPT_NAME, TOKEN_NAME)
    }
    assert [sum(n.op_type == "If" for n in graph.node) for graph in graphs.values()] == [2, 0]
    tokens = attention_nodes(graphs[TOKEN_NAME])
    assert len(tokens) == 2
    assert len({node.input[SINK] for node in tokens} - {""}) == 1
    sinks = [len(node.input) > SINK for node in attention_nodes(graphs[PROMPT_NAME])]
    assert sinks == [True, False] * 2


@pytest.mark.parametrize("bytes_of_scores", [0, 1 << 30])
def test_both_forms_read_an_integer_cache(
    rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_of_scores: int
) -> None:
    monkeypatch.setattr(deploy.attention_inputs, BOUND, bytes_of_scores)
    for kernel in (Kernel.AUTO, Kernel.INTEGER):  # float32 and integers multiplied in prompts
        parity = make_export(rounded, tmp_path / kernel, kernel).manifest.checks["parity"]
        assert max(parity["prefill_error"], parity["decode_error"]) <= parity["bound"]


@pytest.mark.parametrize(("family", "target"), [("gemma2", Target.CPU), ("llama", Target.CUDA)])
def test_capped_scores_and_cuda_are_left_to_the_runtime(
    family: str, target: Target, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "m", family)
    make_checkpoint(source, tmp_path / "c", "W8A8", weights="rtn")
    make_export(tmp_path / "c", tmp_path / "onnx", Kernel.AUTO, target)
    graph = onnx.load(tmp_path / "onnx" / GRAPH_NAME, load_external_data=False).graph
    assert [len(node.input) <= SINK for node in attention_nodes(graph)] == [True, True]
    assert not any(node.op_type == "If" for node in graph.node)
