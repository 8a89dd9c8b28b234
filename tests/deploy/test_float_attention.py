"""Prompts that attend in float32 over an 8-bit cache, and single tokens over its integers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from deploy.checkpoint import Checkpoint
from deploy.errors import ParityError
from deploy.graph_builder import OPSET
from deploy.kernels import Kernel
from deploy.layer_parity import compare_layers
from deploy.run import Sampling, TextGenerator
from deploy.session import HEAD_NAME, PROMPT_NAME, TOKEN_NAME, OnnxDecoder
from deploy.targets import Target
from tests.deploy.tiny_artifacts import (
    attention_nodes,
    make_checkpoint,
    make_export,
    put_fault_in_export,
    save_model,
)

IDS = np.arange(24, dtype=np.int64) * 5 % 60
FAMILIES = {
    "llama": {"num_hidden_layers": 3, "max_position_embeddings": 512},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 40, "attn_logit_softcapping": 2.0},
    "phi3": {
        "hidden_size": 128,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    },
}
PARTS = ("key", "value")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(root / family, family, **FAMILIES[family]) for family in FAMILIES}


@pytest.fixture(scope="module")
def checkpoint(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("checkpoint") / "c"
    return make_checkpoint(models["llama"], output, "W8A8", weights="rtn", kv_bits=8)


@pytest.fixture(scope="module")
def exports(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Kernel, Path]:
    base = tmp_path_factory.mktemp("exports")
    for kernel in (Kernel.AUTO, Kernel.INTEGER):
        make_export(checkpoint, base / kernel, kernel)
    return {kernel: base / kernel for kernel in (Kernel.AUTO, Kernel.INTEGER)}


def operators(export: Path, file: str) -> list[str]:
    return [node.op_type for node in onnx.load(export / file, load_external_data=False).graph.node]


def cache_after(
    export: Path,
    prompt: np.ndarray,
    lengths: np.ndarray | None = None,
    chunk: int = 128,
    capacity: int = 40,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Run prompts [B, T] from empty buffers, `chunk` columns at a time: logits, and the buffers."""
    name = PROMPT_NAME if (export / PROMPT_NAME).exists() else "model.onnx"
    session = ort.InferenceSession(str(export / name), providers=["CPUExecutionProvider"])
    batch, count = prompt.shape
    lengths = np.full(batch, count) if lengths is None else lengths
    buffers = {
        value.name.removeprefix("past_key_values."): ort.OrtValue.ortvalue_from_numpy(
            np.zeros((batch, value.shape[1], capacity, value.shape[3]), np.int8)
        )
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    for start in range(0, count, chunk):
        ids = np.ascontiguousarray(prompt[:, start : start + chunk])
        mask = (np.arange(start + ids.shape[1]) < lengths[:, None]).astype(np.int64)
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        for part, buffer in buffers.items():
            binding.bind_ortvalue_input(f"past_key_values.{part}", buffer)
            binding.bind_ortvalue_output(f"present.{part}", buffer)
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
    logits: np.ndarray = binding.get_outputs()[-1].numpy()
    return logits[:, -1], {part: buffer.numpy().copy() for part, buffer in buffers.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("scheme", "rotate"), [("W8A8", None), ("W4A8", "r2,r3,r4"), ("W4A8", "none")]
)
def test_every_family_keeps_parity_in_both_graphs(
    models: dict[str, Path], tmp_path: Path, family: str, scheme: str, rotate: str | None
) -> None:
    source = make_checkpoint(
        models[family],
        tmp_path / "c",
        scheme,
        weights="rtn",
        rotate=rotate,
        kv_bits=8,
    )
    report = make_export(source, tmp_path / "onnx", Kernel.AUTO).to_dict()
    layers = 3 if family == "llama" else 2
    assert report["operators"]["TensorScatter"] == 2 * layers, "only prompts attend in float32"
    assert report["parity"]["top1_agreement"] > 0.9
    for file in (PROMPT_NAME, TOKEN_NAME, HEAD_NAME):
        assert (tmp_path / "onnx" / file).is_file()


def test_only_prompts_need_the_newer_operators(exports: dict[Kernel, Path]) -> None:
    versions = {
        file: next(
            entry.version
            for entry in onnx.load(
                exports[Kernel.AUTO] / file, load_external_data=False
            ).opset_import
            if not entry.domain
        )
        for file in (PROMPT_NAME, TOKEN_NAME, HEAD_NAME)
    }
    assert versions == {PROMPT_NAME: 24, TOKEN_NAME: OPSET, HEAD_NAME: OPSET}
    assert "TensorScatter" in operators(exports[Kernel.AUTO], PROMPT_NAME)
    assert "TensorScatter" not in operators(exports[Kernel.AUTO], TOKEN_NAME)
    assert not (exports[Kernel.INTEGER] / PROMPT_NAME).exists(), "--kernel integer is one graph"


def test_the_cache_gets_the_integers_that_the_operator_would_store(
    exports: dict[Kernel, Path],
) -> None:
    _, found = cache_after(exports[Kernel.AUTO], IDS[None])
    _, expected = cache_after(exports[Kernel.INTEGER], IDS[None])
    for part in PARTS:  # what lies in front of the first attention is the same in both graphs
        np.testing.assert_array_equal(found[f"0.{part}"], expected[f"0.{part}"])
        assert found[f"0.{part}"][:, :, : len(IDS)].any()
        assert not found[f"0.{part}"][:, :, len(IDS) :].any()
    for name, buffer in found.items():
        difference = np.abs(buffer.astype(int) - expected[name])
        assert difference.max() <= 3
        assert (difference > 0).mean() < 0.05, name


@pytest.mark.parametrize("chunk", [1, 5, 8, 23])
def test_a_prompt_in_chunks_attends_to_the_integers_of_those_before(
    chunk: int, exports: dict[Kernel, Path]
) -> None:
    whole, cache = cache_after(exports[Kernel.AUTO], IDS[None])
    logits, chunked = cache_after(exports[Kernel.AUTO], IDS[None], chunk=chunk)
    np.testing.assert_allclose(logits, whole, rtol=0, atol=1e-2)
    for name, buffer in chunked.items():
        assert np.abs(buffer.astype(int) - cache[name]).max() <= 3, name
    late = IDS.copy()
    late[0] += 1
    other, _ = cache_after(exports[Kernel.AUTO], late[None], chunk=chunk)
    assert np.abs(other - whole).max() > 0.1, "the bound tells apart what only the cache says"


def test_padded_prompts_are_those_of_their_own_length(exports: dict[Kernel, Path]) -> None:
    rows, lengths = np.stack([IDS, IDS]), np.array([24, 9])
    with OnnxDecoder(exports[Kernel.AUTO]) as decoder:
        decoder.start(capacity=32, batch=2)
        found = [decoder.append(rows, lengths, last_only=True)]
        found += [decoder.append(np.full((2, 1), token)) for token in (7, 3, 11)]
        for row, length in enumerate(lengths):
            decoder.start(capacity=32)
            expected = [decoder.append(IDS[None, :length], last_only=True)]
            expected += [decoder.append(np.full((1, 1), token)) for token in (7, 3, 11)]
            for step, one in zip(found, expected, strict=True):
                np.testing.assert_allclose(step[row], one[0], rtol=0, atol=1e-2)


@pytest.mark.parametrize("batch", [1, 5])
def test_next_tokens_read_the_integers_however_many_sequences_there_are(
    batch: int, exports: dict[Kernel, Path]
) -> None:
    rows = np.stack([np.roll(IDS, row) for row in range(batch)])
    steps = {}
    for kernel, export in exports.items():
        with OnnxDecoder(export) as decoder:
            decoder.start(capacity=32, batch=batch)
            decoder.append(rows[:, :20], last_only=True)
            steps[kernel] = [decoder.append(rows[:, i : i + 1]) for i in range(20, 24)]
            token = TOKEN_NAME if kernel is Kernel.AUTO else "model.onnx"
            assert decoder.graph_files[1].name == token
    # After prompts that attend in float32 and over integers, some inputs round to a neighbour.
    np.testing.assert_allclose(*map(np.concatenate, steps.values()), rtol=0, atol=5e-2)


def test_stock_genai_shares_the_cache_between_the_graphs(exports: dict[Kernel, Path]) -> None:
    prompt, count = np.resize(IDS[1:], 300), 12  # two chunks
    tokens: list[int] = []
    with OnnxDecoder(exports[Kernel.AUTO]) as decoder:
        decoder.start(capacity=len(prompt) + count)
        logits = decoder.append(prompt[None], last_only=True)
        while len(tokens) < count:
            tokens.append(int(logits[0, -1].argmax()))
            logits = decoder.append(np.array([tokens[-1:]]))
    generator = TextGenerator(exports[Kernel.AUTO])
    assert list(generator.generate(prompt.tolist(), Sampling(max_new_tokens=count))) == tokens
    assert len(set(tokens)) > 2


def test_the_example_runs_over_the_integer_cache(exports: dict[Kernel, Path]) -> None:
    script = Path(__file__).parents[2] / "examples" / "generate.py"
    for export in exports.values():
        command = [sys.executable, str(script), str(export), "hello"]
        result = subprocess.run(command, capture_output=True, check=False, timeout=120)
        assert result.returncode == 0, result.stderr.decode()
        assert result.stdout.strip()


def test_the_layers_of_a_prompt_are_compared_with_torch(
    checkpoint: Path, exports: dict[Kernel, Path]
) -> None:
    with Checkpoint(checkpoint) as opened:
        report = compare_layers(opened, exports[Kernel.AUTO], np.resize(IDS, 60))
    assert report.first is None, report.describe_first()
    assert {part.phase for part in report.parts} == {"prefill", "decode"}
    assert sum(part.integer_mismatches for part in report.parts if part.is_linear) <= 2


@pytest.mark.parametrize("target", [Target.CPU_AVX2, Target.CPU_ARM64])
def test_other_cpus_get_the_same_graphs(checkpoint: Path, tmp_path: Path, target: Target) -> None:
    make_export(checkpoint, tmp_path / "onnx", Kernel.AUTO, target)
    assert operators(tmp_path / "onnx", PROMPT_NAME).count("TensorScatter") == 6


def node(graph: onnx.ModelProto, ending: str) -> onnx.NodeProto:
    return next(one for one in graph.graph.node if one.name.endswith(ending))


def wrong_values(graph: onnx.ModelProto) -> None:
    """Let values be divided by the scale of the keys."""
    node(graph, "value/Div").input[1] = node(graph, "key/Div").input[1]


def unscaled_query(graph: onnx.ModelProto) -> None:
    scaled = node(graph, "query/Mul")
    for attention in attention_nodes(graph.graph):
        if attention.input[0] == scaled.output[0]:
            attention.input[0] = scaled.input[0]


def written_elsewhere(graph: onnx.ModelProto) -> None:
    """Let keys be written where the values belong."""
    key, value = node(graph, "key/TensorScatter"), node(graph, "value/TensorScatter")
    key.input[1], value.input[1] = value.input[1], key.input[1]


@pytest.mark.parametrize("fault", [wrong_values, unscaled_query, written_elsewhere])
def test_a_fault_in_the_prompt_graph_fails_parity(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[onnx.ModelProto], None],
) -> None:
    put_fault_in_export(monkeypatch, PROMPT_NAME, fault)
    with pytest.raises(ParityError, match="departs from the torch reference"):
        make_export(checkpoint, tmp_path / "onnx", Kernel.AUTO)
