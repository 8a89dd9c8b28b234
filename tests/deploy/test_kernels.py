from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from deploy.artifact import hash_file, verify_files
from deploy.bench import bench_onnx
from deploy.bench_report import BenchSettings
from deploy.checkpoint import Checkpoint
from deploy.errors import ArtifactError, ParityError, UnsupportedModelError
from deploy.exact_weights import check_exact_weights
from deploy.export import DATA_NAME
from deploy.genai_config import PROMPT_CHUNK
from deploy.kernels import Kernel, graph_forms
from deploy.language_model import open_language_model
from deploy.parity import relative_error
from deploy.run import Sampling, TextGenerator
from deploy.session import (
    GENAI_CONFIG_NAME,
    GRAPH_NAME,
    HEAD_NAME,
    HIDDEN_NAME,
    PROMPT_NAME,
    SEQUENCES_FOR_PROMPT_GRAPH,
    TOKEN_NAME,
    OnnxDecoder,
)
from tests.deploy.tiny_artifacts import (
    make_checkpoint,
    make_export,
    put_fault_in_export,
    save_model,
)

IDS = np.arange(30, 94)
HEAD_KEYS = ("lm_head.weight_scale",)
PHASES = {
    "W8A8": {GRAPH_NAME, HEAD_NAME},
    "W4A8": {PROMPT_NAME, TOKEN_NAME, HEAD_NAME},
}
"""The graphs of `auto`."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with biases, and an inner size that no block divides."""
    base = tmp_path_factory.mktemp("checkpoints")
    model = save_model(base / "model", "qwen2", hidden_size=64, intermediate_size=104)
    return {
        name: make_checkpoint(model, base / name, name, weights="rtn")
        for name in ("W8A8", "W4A8", "W4A4")
    } | {"FP32": make_checkpoint(model, base / "FP32", "FP32")}


@pytest.fixture(scope="module")
def exports(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("exports")
    for name in ("W8A8", "W4A8"):
        make_export(checkpoints[name], base / name, Kernel.AUTO)
        make_export(checkpoints[name], base / f"{name}-integer", Kernel.INTEGER)
    return {path.name: path for path in base.iterdir()}


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8"])
def test_the_graphs_share_one_file_of_weights(
    scheme: str, checkpoints: dict[str, Path], exports: dict[str, Path], tmp_path: Path
) -> None:
    files = {path.name for path in exports[scheme].iterdir()}
    assert {name for name in files if ".onnx" in name} == PHASES[scheme] | {DATA_NAME}
    verify_files(exports[scheme])
    places = {}
    for name in sorted(PHASES[scheme]):
        graph = onnx.load(exports[scheme] / name, load_external_data=False).graph
        for tensor in graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries and not tensor.name.startswith("constant_"):
                assert entries["location"] == DATA_NAME
                place = entries["offset"], entries["length"]
                assert places.setdefault(tensor.name, place) == place
        assert (exports[scheme] / name).stat().st_size < 100_000
    assert "model.layers.1.self_attn.qkv.weight" in places
    make_export(checkpoints[scheme], tmp_path / "again", Kernel.AUTO)
    for name in files:
        assert hash_file(tmp_path / "again" / name) == hash_file(exports[scheme] / name), name


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8"])
def test_the_prompt_graph_computes_what_the_one_integer_graph_does(
    scheme: str, exports: dict[str, Path]
) -> None:
    with (
        OnnxDecoder(exports[scheme], threads=1) as phased,
        OnnxDecoder(exports[f"{scheme}-integer"], threads=1) as whole,
    ):
        expected = whole.logits(IDS)
        np.testing.assert_array_equal(phased.logits(IDS), expected)
        for decoder in (phased, whole):
            decoder.start(capacity=len(IDS))
            last = decoder.append(IDS[None], last_only=True)
            assert last.shape == (1, 1, 262)
            np.testing.assert_allclose(last[0, 0], expected[-1], rtol=0, atol=1e-5)


def test_single_tokens_run_on_the_token_graph_over_the_same_cache(exports: dict[str, Path]) -> None:
    with OnnxDecoder(exports["W4A8"], threads=1) as decoder:
        whole = decoder.logits(IDS)
        decoder.start(capacity=64)
        parts = [decoder.append(IDS[None, :40])[0]]
        parts += [decoder.append(IDS[None, i : i + 1])[0] for i in range(40, 60)]
        parts.append(decoder.append(IDS[None, 60:])[0])  # several tokens over a cache
    found = np.concatenate(parts)
    np.testing.assert_allclose(found[:40], whole[:40], rtol=0, atol=1e-5)
    assert 1e-6 < relative_error(found[40:60], whole[40:60]) < 0.05, "another kernel, one model"
    assert relative_error(found[60:], whole[60:]) < 0.05
    swapped = np.concatenate([whole[41:61], whole[40:41]])
    assert relative_error(swapped[:20], whole[40:60]) > 0.3, "the bound tells positions apart"


@pytest.mark.parametrize(
    ("batch", "integer"),
    [(SEQUENCES_FOR_PROMPT_GRAPH - 1, False), (SEQUENCES_FOR_PROMPT_GRAPH, True)],
)
def test_many_sequences_go_on_in_integers(
    batch: int, integer: bool, exports: dict[str, Path]
) -> None:
    rows = np.stack([np.roll(IDS, row)[:20] for row in range(batch)])
    steps = []
    for name in ("W4A8", "W4A8-integer"):
        with OnnxDecoder(exports[name], threads=1) as decoder:
            decoder.start(capacity=20, batch=batch)
            decoder.append(rows[:, :12], last_only=True)
            steps.append([decoder.append(rows[:, i : i + 1]) for i in range(12, 20)])
    phased, whole = (np.concatenate(each)[:, 0] for each in steps)
    assert phased.shape == (8 * batch, 262)
    assert relative_error(phased, whole) < (1e-5 if integer else 0.05)
    assert integer or relative_error(phased, whole) > 1e-4, "the token graph is another kernel"


@pytest.mark.parametrize(("scheme", "name"), [("W8A8", GRAPH_NAME), ("W4A8", PROMPT_NAME)])
def test_the_last_token_of_a_padded_prompt_is_found(
    scheme: str, name: str, exports: dict[str, Path]
) -> None:
    session = ort.InferenceSession(str(exports[scheme] / name))
    cache = {
        node.name: np.zeros((2, node.shape[1], 0, node.shape[3]), np.float32)
        for node in session.get_inputs()
        if node.name.startswith("past")
    }
    ids = np.stack([IDS[:8], np.concatenate([IDS[:5], np.zeros(3, np.int64)])])
    mask = np.array([[1] * 8, [1] * 5 + [0] * 3])
    both = session.run(["logits"], {"input_ids": ids, "attention_mask": mask} | cache)[0]
    with OnnxDecoder(exports[scheme], threads=1) as decoder:
        for row, length in ((0, 8), (1, 5)):
            expected = decoder.logits(IDS[:length])[-1]
            np.testing.assert_allclose(both[row, 0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8"])
def test_genai_generates_what_the_plain_session_does(scheme: str, exports: dict[str, Path]) -> None:
    prompt = [int(token) for token in IDS[:20]]
    found = list(TextGenerator(exports[scheme]).generate(prompt, Sampling(max_new_tokens=16)))
    expected = []
    with OnnxDecoder(exports[scheme]) as decoder:
        decoder.start(capacity=40)
        logits = decoder.append(np.array([prompt]), last_only=True)
        for _ in found:
            expected.append(int(logits[0, -1].argmax()))
            logits = decoder.append(np.array([[expected[-1]]]))
    assert len(found) > 3
    assert found == expected
    one = TextGenerator(exports[scheme]).generate(prompt[:1], Sampling(max_new_tokens=2))
    assert len(list(one)) >= 1, "a prompt of one token runs on the token graph"


def test_bench_evaluate_and_the_example_take_a_directory_with_phases(
    exports: dict[str, Path],
) -> None:
    settings = BenchSettings(prompt_tokens=8, new_tokens=4, runs=1, threads=1)
    assert bench_onnx(exports["W4A8"], settings).medians["decode_tokens_per_s"] > 0
    opened = open_language_model(str(exports["W4A8"]), threads=1)
    assert opened.model.logits(IDS).shape == (64, 262)
    script = Path(__file__).parents[2] / "examples" / "generate.py"
    command = [sys.executable, str(script), str(exports["W4A8"]), "hello"]
    result = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.strip()


@pytest.mark.parametrize(
    ("name", "kernel", "files"),
    [
        ("FP32", Kernel.AUTO, [GRAPH_NAME]),
        ("W8A8", Kernel.INTEGER, [GRAPH_NAME]),
        ("W8A8", Kernel.NBITS, [GRAPH_NAME]),
        ("W8A8", Kernel.AUTO, [GRAPH_NAME, HEAD_NAME]),
        ("W4A4", Kernel.AUTO, [GRAPH_NAME, HEAD_NAME]),
        ("W4A8", Kernel.AUTO, [TOKEN_NAME, PROMPT_NAME, HEAD_NAME]),
    ],
)
def test_a_scheme_gets_the_graphs_that_help_it(
    name: str, kernel: Kernel, files: list[str], checkpoints: dict[str, Path]
) -> None:
    with Checkpoint(checkpoints[name]) as checkpoint:
        forms = graph_forms(checkpoint, kernel)
    assert [form.file for form in forms] == files
    assert (forms[0].kernel is Kernel.NBITS) == (
        kernel is Kernel.NBITS or forms[0].file == TOKEN_NAME
    )


def test_the_token_graph_keeps_the_integer_head(exports: dict[str, Path]) -> None:
    graph = onnx.load(exports["W4A8"] / TOKEN_NAME, load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("MatMulNBits") == 2 * 5, "qkv, o, gate, up, down"
    assert operators.count("MatMulIntegerToFloat") == 1, "the head, whose weights have 8 bits"


def test_a_long_prompt_goes_through_in_chunks(
    exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with OnnxDecoder(exports["W8A8"], threads=1) as decoder:
        assert decoder._chunk == PROMPT_CHUNK
        decoder._chunk = 24  # the tiny model reads no prompt that is longer than a real chunk
        lengths: list[int] = []
        run = decoder._run

        def count(session: ort.InferenceSession, ids: np.ndarray, *rest: Any) -> np.ndarray:
            lengths.append(ids.shape[1])
            return run(session, ids, *rest)

        monkeypatch.setattr(decoder, "_run", count)
        every = decoder.logits(IDS)
        assert lengths == [21, 21, 22]
        decoder.start(capacity=64)
        last = decoder.append(IDS[None], last_only=True)
    with OnnxDecoder(exports["W8A8-integer"], threads=1) as decoder:
        expected = decoder.logits(IDS)
    np.testing.assert_allclose(every, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(last[0, 0], expected[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheme", ["W4A4", "FP32"])
def test_nbits_refuses_schemes_that_it_would_not_keep(
    scheme: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    message = f"--kernel nbits quantizes activations to 8 bits, the scheme is {scheme}"
    with pytest.raises(UnsupportedModelError, match=message):
        make_export(checkpoints[scheme], tmp_path / "onnx", Kernel.NBITS)
    assert list(tmp_path.iterdir()) == []


def test_nbits_is_one_graph_of_matmulnbits(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    report = make_export(checkpoints["W8A8"], tmp_path / "onnx", Kernel.NBITS).to_dict()
    assert report["operators"]["MatMulNBits"] == 2 * 5 + 1, "qkv, o, gate, up, down; the head"
    assert "MatMulIntegerToFloat" not in report["operators"]
    parity = report["parity"]
    assert parity["float_activation_error"] <= parity["float_activation_bound"]


def wrong_epsilon(graph: onnx.ModelProto) -> None:
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 0.3


def forget_the_rotation(graph: onnx.ModelProto) -> None:
    for node in graph.graph.node:
        if node.name.endswith("/R4/right/MatMul"):
            node.op_type = "Identity"
            del node.input[1]


@pytest.mark.parametrize("file", [TOKEN_NAME, PROMPT_NAME])
@pytest.mark.parametrize("fault", [wrong_epsilon, forget_the_rotation])
def test_a_fault_in_either_graph_ends_the_export(
    file: str,
    fault: Callable[[onnx.ModelProto], None],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_fault_in_export(monkeypatch, file, fault)
    with pytest.raises(ParityError, match="departs from the torch reference"):
        make_export(checkpoints["W4A8"], tmp_path / "onnx", Kernel.AUTO)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["model.layers.0.mlp.down_proj.weight", "lm_head.weight_scale"])
@pytest.mark.parametrize("scheme", ["W8A8", "W4A8"])
def test_a_changed_number_is_found_in_every_graph(
    scheme: str, key: str, checkpoints: dict[str, Path], exports: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(exports[scheme], tmp_path / "copy")
    owner = GRAPH_NAME if scheme == "W8A8" else TOKEN_NAME
    graph = onnx.load(copy / owner, load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name == key)
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    data = bytearray((copy / DATA_NAME).read_bytes())
    data[offset] ^= 0x10
    (copy / DATA_NAME).write_bytes(data)
    with Checkpoint(checkpoints[scheme]) as checkpoint:
        forms = graph_forms(checkpoint, Kernel.AUTO)
        assert check_exact_weights(checkpoint, exports[scheme], forms) == 15
        for form in forms:
            if form.head_only and key not in HEAD_KEYS:
                continue
            with pytest.raises(ParityError, match=rf"{form.file}: {key}.*not the checkpoint's"):
                check_exact_weights(checkpoint, copy, [form])


def test_a_missing_phase_is_named(exports: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(exports["W4A8"], tmp_path / "copy")
    genai = json.loads((copy / GENAI_CONFIG_NAME).read_text())["model"]
    assert genai["type"] == "decoder-pipeline"
    (copy / HEAD_NAME).unlink()
    with OnnxDecoder(copy) as decoder:
        decoder.start(capacity=8)
        decoder.append(IDS[None, :8], last_only=True)
        with pytest.raises(ArtifactError, match=r"head.onnx: ONNX Runtime cannot load it"):
            decoder.logits(IDS[:8])
    (copy / TOKEN_NAME).unlink()
    with pytest.raises(ArtifactError, match=r"token.onnx: ONNX Runtime cannot load it"):
        OnnxDecoder(copy)


def test_a_graph_of_others_that_gives_the_last_logits_alone_runs(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    """As onnxruntime-genai's builder prunes its heads: nothing in the graph says so."""
    shutil.copytree(exports["W8A8"], tmp_path / "pruned")
    path = tmp_path / "pruned" / GRAPH_NAME
    model = onnx.load(path, load_external_data=False)
    kept = [value for value in model.graph.output if value.name != HIDDEN_NAME]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, path)
    found = []
    for directory in (exports["W8A8"], tmp_path / "pruned"):
        with OnnxDecoder(directory, threads=1) as decoder:
            decoder.start(capacity=40)
            steps = [decoder.append(IDS[None, :20], last_only=True)]
            steps += [decoder.append(IDS[None, i : i + 1]) for i in range(20, 24)]
            found.append(np.concatenate(steps))
    assert found[0].shape == (5, 1, 262)
    np.testing.assert_array_equal(*found)
