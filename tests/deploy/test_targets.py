"""Graphs for other processors than x64 with VNNI, and the one of standard operators."""

from __future__ import annotations

import json
import os
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
from onnx import TensorProto, numpy_helper

import deploy.export
from deploy.checkpoint import Checkpoint
from deploy.cuda_operators import CUDA_KERNELS, require_cuda_kernels
from deploy.decoder_graph import DecoderGraph
from deploy.errors import ConfigError, ParityError, UnsupportedModelError
from deploy.kernels import TARGET_KERNELS, Kernel, graph_forms, require_offered
from deploy.layer_parity import report_on_export
from deploy.parity import relative_error
from deploy.run import Sampling, TextGenerator
from deploy.session import GENAI_CONFIG_NAME, GRAPH_NAME, OnnxDecoder
from deploy.targets import Target
from deploy.verification import Verification, verify_on
from tests.deploy.tiny_artifacts import (
    make_checkpoint,
    make_export,
    put_fault_in_export,
    save_model,
)

LINEARS = 2 * 7 + 1
"""Of two blocks, and the head."""
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "W8A8": ("W8A8", {"static": "all"}),
    "W4A8": ("W4A8", {"static": "all", "rotate": "none"}),
    "W4A8 grouped": ("W4A8", {"static": "all", "group_size": 16}),
    "W8A8 grouped": ("W8A8", {"static": "all", "group_size": 16}),
    "W8A16 grouped": ("W8A16", {"group_size": 16}),
    "W4A16": ("W4A16", {"group_size": 16}),
    "scaled": ("W8A8", {"static": "all", "equalize": "all"}),
    "token": ("W8A8", {}),
    "token W4A8": ("W4A8", {}),
    "token W4A4": ("W4A4", {"equalize": "none"}),
    "scaled W4A4": ("W4A4", {}),
    "int8 cache": ("W8A8", {"static": "all", "kv_bits": 8}),
    "4-bit table": ("W8A8", {"static": "all", "embedding_bits": 4}),
}
PORTABLE = ("W8A8", "W4A8", "W4A8 grouped", "W8A16 grouped", "W4A16", "scaled")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases, grouped heads and a window that is shorter than the text."""
    base = tmp_path_factory.mktemp("model")
    options = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    return save_model(base / "tiny", "qwen2", hidden_size=64, intermediate_size=96, **options)


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the checkpoint of a name, made when it is first asked for."""
    base, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(name: str) -> Path:
        if name not in made:
            scheme, recipe = RECIPES[name]
            made[name] = make_checkpoint(model, base / name, scheme, weights="rtn", **recipe)
        return made[name]

    return make


@pytest.fixture(scope="module")
def export(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Target], Path]:
    """Return the export of a checkpoint for a target."""
    base = tmp_path_factory.mktemp("exports")

    def make(name: str, target: Target) -> Path:
        output = base / f"{name}-{target}"
        make_export(checkpoint(name), output, Kernel.AUTO, target)
        return output

    return make


def manifest_of(directory: Path) -> Any:
    return json.loads((directory / "rolora_manifest.json").read_text())


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("name", PORTABLE)
def test_a_portable_graph_is_made_of_standard_operators(
    name: str, export: Callable[[str, Target], Path]
) -> None:
    directory = export(name, Target.QDQ)
    graph = onnx.load(directory / GRAPH_NAME)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 21)]
    onnx.checker.check_model(graph, full_check=True)  # knows no operator but standard ones
    manifest = manifest_of(directory)
    details, parity = manifest["details"], manifest["checks"]["parity"]
    assert details["operator_domains"] == {"ai.onnx": len(graph.graph.node)}
    assert sum(details["operators"].values()) == len(graph.graph.node)
    assert parity["exact_weights"] == LINEARS
    assert max(parity["prefill_error"], parity["decode_error"]) <= parity["bound"]
    kinds = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    wanted = TensorProto.INT4 if name.startswith("W4") else TensorProto.INT8
    assert kinds["model.layers.0.mlp.down_proj.weight"] == wanted
    quantized = details["operators"].get("QuantizeLinear", 0)
    assert quantized == (0 if "A16" in name else 2 * 4 + 1), "qkv, o, gate and up, down; the head"


FLOAT_MODELS = [
    ("llama", {"attention_bias": True, "mlp_bias": True, "tied": True}),
    ("mistral", {"sliding_window": 16}),
    ("qwen3", {}),
    ("phi3", {}),
    ("phi3", {"head_dim": 32, "partial_rotary_factor": 0.5}),
    ("gemma2", {}),
    ("gemma3_text", {}),
]


@pytest.mark.parametrize(
    ("target", "model_type", "options"),
    [
        (target, model_type, options)
        for target in (Target.QDQ, Target.CUDA)
        for model_type, options in FLOAT_MODELS
        if target is Target.QDQ or not model_type.startswith("gemma")
    ],
)
def test_a_float_model_of_each_family_is_computed_to_float_precision(
    target: Target, model_type: str, options: dict[str, Any], tmp_path: Path
) -> None:
    # Nothing is rounded there, so a wrong epsilon, window or rotation cannot hide below a floor.
    checkpoint = make_checkpoint(
        save_model(tmp_path / "model", model_type, **options), tmp_path / "fp32", "FP32"
    )
    report = make_export(checkpoint, tmp_path / "onnx", Kernel.AUTO, target).to_dict()
    assert report["parity"]["bound"] <= 2e-4
    assert report["parity"]["prefill_error"] <= 1e-5
    assert report["parity"]["decode_error"] <= 1e-5


def test_the_checker_refuses_the_graph_of_the_cpu(export: Callable[[str, Target], Path]) -> None:
    graph = onnx.load(export("W8A8", Target.CPU) / GRAPH_NAME)
    with pytest.raises(onnx.checker.ValidationError, match="No Op registered for"):
        onnx.checker.check_model(graph, full_check=True)


def test_a_padded_batch_goes_on_as_its_sequences_alone_do(
    export: Callable[[str, Target], Path],
) -> None:
    rows = np.random.default_rng(0).integers(30, 90, (2, 24))
    lengths = np.array([20, 13])
    with OnnxDecoder(export("W8A8", Target.QDQ), threads=1) as decoder:
        decoder.start(capacity=24, batch=2)
        prompt = decoder.append(rows[:, :20], lengths)
        steps = [decoder.append(rows[:, i : i + 1]) for i in range(20, 24)]
        together = np.concatenate([prompt, *steps], axis=1)
        for row, length in enumerate(lengths):
            ids = np.concatenate([rows[row, :length], rows[row, 20:]])
            alone = decoder.logits(ids)
            found = np.concatenate([together[row, :length], together[row, 20:]])
            assert relative_error(found, alone) < 1e-3
        wrong = decoder.logits(rows[1])  # the control: padding that is taken for text
        assert relative_error(wrong[20:], alone[13:]) > 1e-2


@pytest.mark.parametrize("target", [Target.QDQ, Target.CPU_AVX2])
def test_genai_generates_what_a_plain_session_does(
    target: Target, export: Callable[[str, Target], Path]
) -> None:
    directory, prompt = export("W8A8", target), list(range(40, 52))
    found = list(TextGenerator(directory).generate(prompt, Sampling(max_new_tokens=12)))
    assert found
    with OnnxDecoder(directory, threads=1) as decoder:
        decoder.start(capacity=32)
        logits, expected = decoder.append(np.array([prompt])), []
        for _ in found:
            expected.append(int(logits[0, -1].argmax()))
            logits = decoder.append(np.array([expected[-1:]]))
    assert found == expected


def test_the_example_says_what_it_cannot_run(export: Callable[[str, Target], Path]) -> None:
    script = Path(__file__).parents[2] / "examples" / "generate.py"
    command = [sys.executable, str(script), str(export("W8A8", Target.QDQ)), "hello"]
    result = subprocess.run(command, capture_output=True, check=False, timeout=120, text=True)
    assert result.returncode == 1
    assert result.stderr.endswith(
        "returns its cache as new arrays (--target qdq); use rolora run\n"
    )


def test_padding_on_the_left_is_not_seen(export: Callable[[str, Target], Path]) -> None:
    session = ort.InferenceSession(export("W8A8", Target.QDQ) / GRAPH_NAME)
    ids = np.random.default_rng(1).integers(30, 90, (1, 12))

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        empty = np.zeros((1, 2, 0, 16), np.float32)
        past = {
            value.name: empty for value in session.get_inputs() if value.name.startswith("past")
        }
        return session.run(["logits"], {"input_ids": ids, "attention_mask": mask} | past)[0][0]

    alone = run(ids, np.ones_like(ids))
    padded = np.concatenate([np.full((1, 5), 7), ids], axis=1)
    mask = np.concatenate([np.zeros((1, 5), np.int64), np.ones_like(ids)], axis=1)
    found = run(padded, mask)
    assert np.isfinite(found).all()
    assert relative_error(found[5:], alone) < 1e-3
    assert relative_error(run(padded, np.ones_like(padded))[5:], alone) > 1e-2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("token", r"o_proj has 8-bit weights and an input of 8 bits per token.*--static all"),
        ("token W4A4", r"q_proj .* input of 4 bits per tensor.*--static all"),
        ("int8 cache", r"the checkpoint has 8 bits; quantize with --kv-bits 16"),
        ("W8A8 grouped", r"8-bit weights in groups of 16 .* without --group-size, or with weights"),
    ],
)
def test_what_constant_scales_cannot_say_is_refused(
    name: str, message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        make_export(checkpoint(name), tmp_path / "onnx", Kernel.AUTO, Target.QDQ)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", [Target.QDQ, Target.CUDA])
def test_a_4_bit_embedding_is_for_the_cpu_alone(
    target: Target, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    message = rf"--target {target} cannot look up; quantize with --embedding-bits 8"
    with pytest.raises(UnsupportedModelError, match=message):
        make_export(checkpoint("4-bit table"), tmp_path / "onnx", Kernel.AUTO, target)
    make_export(checkpoint("4-bit table"), tmp_path / "onnx", Kernel.AUTO)


@pytest.mark.parametrize(
    ("model_type", "options"), [model for model in FLOAT_MODELS if model[0] in ("gemma2", "phi3")]
)
def test_rounded_models_of_other_families_are_portable_too(
    model_type: str, options: dict[str, Any], tmp_path: Path
) -> None:
    source = save_model(tmp_path / "model", model_type, **options)
    checkpoint = make_checkpoint(source, tmp_path / "c", "W8A8", weights="rtn", static="all")
    make_export(checkpoint, tmp_path / "onnx", Kernel.AUTO, Target.QDQ)  # with its parity check
    graph = onnx.load(tmp_path / "onnx" / GRAPH_NAME)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 21)]
    onnx.checker.check_model(graph, full_check=True)
    rows = np.random.default_rng(5).integers(5, 250, (2, 24))
    lengths = np.array([20, 13])
    with OnnxDecoder(tmp_path / "onnx", threads=1) as decoder:
        decoder.start(24, 2)
        found = [decoder.append(rows[:, :20], lengths, last_only=True)]
        found += [decoder.append(rows[:, i : i + 1]) for i in range(20, 24)]
        for row, length in enumerate(lengths):
            decoder.start(24)
            alone = [decoder.append(rows[row : row + 1, :length], last_only=True)]
            alone += [decoder.append(rows[row : row + 1, i : i + 1]) for i in range(20, 24)]
            for step, one in zip(found, alone, strict=True):
                np.testing.assert_allclose(step[row], one[0], rtol=0, atol=1e-4)


def test_a_stream_that_exceeds_float16_is_not_for_cuda(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "gemma2")
    gemma = make_checkpoint(source, tmp_path / "c", "W8A8", weights="rtn")
    with pytest.raises(UnsupportedModelError, match=r"float16 .* gemma2's residual stream exceeds"):
        make_export(gemma, tmp_path / "onnx", Kernel.AUTO, Target.CUDA)
    assert not (tmp_path / "onnx").exists()


def test_layers_are_compared_in_graphs_of_the_cpu(
    export: Callable[[str, Target], Path], checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError, match="was exported with --target qdq; layers are compared"):
        report_on_export(export("W8A8", Target.QDQ), checkpoint("W8A8"))


def test_grouped_weights_with_static_inputs_are_for_the_portable_graph_alone(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"groups of 16 .* export it with --target qdq"):
        make_export(checkpoint("W4A8 grouped"), tmp_path / "onnx", Kernel.AUTO)
    with pytest.raises(UnsupportedModelError, match="cpu multiplies; quantize without --static"):
        make_export(checkpoint("W8A8 grouped"), tmp_path / "onnx", Kernel.AUTO)


def change_tensor(name: str) -> Callable[[onnx.ModelProto], None]:
    """Return a fault that swaps the two ends of a small tensor inside the graph."""

    def fault(graph: onnx.ModelProto) -> None:
        tensor = next(t for t in graph.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[0] *= 2
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return fault


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("model.layers.0.self_attn.qkv.weight_scale", "scales are not the checkpoint's"),
        ("model.norm.weight", "departs from the torch reference"),
    ],
)
def test_a_fault_in_a_portable_graph_is_found(
    tensor: str,
    message: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_fault_in_export(monkeypatch, GRAPH_NAME, change_tensor(tensor))
    with pytest.raises(ParityError, match=message):
        make_export(checkpoint("W8A8"), tmp_path / "onnx", Kernel.AUTO, Target.QDQ)


@pytest.mark.parametrize("name", ["token", "token W4A8", "token W4A4", "scaled W4A4"])
@pytest.mark.parametrize("target", [Target.CPU_AVX2, Target.CPU_ARM64])
def test_other_processors_get_the_same_integers_and_results(
    name: str, target: Target, export: Callable[[str, Target], Path]
) -> None:
    directory = export(name, target)
    manifest = manifest_of(directory)
    parity = manifest["checks"]["parity"]
    assert parity["exact_weights"] == LINEARS
    assert parity["prefill_error"] <= parity["bound"]
    assert manifest["details"]["target"] == target
    assert manifest["checks"]["verified_on"] == verify_on(target).to_dict()
    files = sorted(manifest["details"]["kernels"])
    assert files == sorted(path.name for path in directory.glob("*.onnx"))
    zero_points = set()
    for file in files:
        graph = onnx.load(directory / file).graph
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "MatMulIntegerToFloat":
                inputs = [tensors[key] for key in node.input[4:6] if key in tensors]
                zero_points.add(tuple(numpy_helper.to_array(t).item() for t in inputs))
    eight = (128, 128) if target is Target.CPU_AVX2 else (0,)
    expected = {eight}
    if target is Target.CPU_AVX2 and name != "token":
        expected = expected | {(128,)}  # weights of 4 bits cannot saturate; the head has 8
    assert zero_points == expected


def test_weights_of_8_bits_are_unsigned_where_signed_ones_would_saturate(
    checkpoint: Callable[[str], Path], export: Callable[[str, Target], Path]
) -> None:
    key = "model.layers.0.mlp.down_proj"
    with Checkpoint(checkpoint("token")) as opened:
        integers = opened.integers(opened.linear(key)).T
    stored = numpy_helper.to_array(
        initializers(export("token", Target.CPU_AVX2) / GRAPH_NAME)[f"{key}.weight"]
    )
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(stored.astype(int) - 128, integers)
    signed = initializers(export("token", Target.CPU) / GRAPH_NAME)[f"{key}.weight"]
    np.testing.assert_array_equal(numpy_helper.to_array(signed), integers)


def test_saturation_is_named_where_a_graph_for_vnni_fails_without(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_fault_in_export(monkeypatch, GRAPH_NAME, change_tensor("model.norm.weight"))
    for saturates in (False, True):
        here = verify_on(Target.CPU).to_dict() | {"saturates": saturates}
        found = Verification(**here)
        monkeypatch.setattr(deploy.export, "verify_on", lambda _target, found=found: found)
        with pytest.raises(ParityError) as caught:
            make_export(checkpoint("token"), tmp_path / "onnx", Kernel.INTEGER)
        assert ("--target cpu-avx2" in str(caught.value)) == saturates


@pytest.mark.parametrize("name", ["W8A8", "token W4A8", "token W4A4"])
def test_a_cuda_graph_multiplies_int8_and_is_float16_elsewhere(
    name: str, export: Callable[[str, Target], Path]
) -> None:
    directory = export(name, Target.CUDA)
    manifest = manifest_of(directory)
    checks, operators = manifest["checks"], manifest["details"]["operators"]
    assert checks["parity"]["prefill_error"] <= checks["parity"]["bound"]
    assert checks["half_parity"]["prefill_error"] <= checks["half_parity"]["bound"]
    assert checks["half_parity"]["exact_weights"] == LINEARS
    assert operators["MatMulInteger"] == 2 * 5 + 2, "qkv, o, gate, up, down; the head, twice"
    of_constants = {"Range", "Cos", "Sin"}  # the rotary embedding's tables
    assert set(operators) - of_constants <= {name for _, name in CUDA_KERNELS}
    graph = onnx.load(directory / GRAPH_NAME).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert types["past_key_values.0.key"] == TensorProto.FLOAT16
    genai = json.loads((directory / GENAI_CONFIG_NAME).read_text())["model"]
    assert genai["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        assert "no CUDA provider" in checks["verified_on"]["not_run"]
        assert not checks["verified_on"]["on_target"]
        with pytest.raises(ConfigError, match="install onnxruntime-gpu"):
            OnnxDecoder(directory)


def test_a_node_without_a_cuda_kernel_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with Checkpoint(checkpoint("token")) as opened:
        form = graph_forms(opened, Kernel.INTEGER, Target.CUDA)[0]
        model = DecoderGraph(opened, form).build()
        require_cuda_kernels(model, "here")
        with pytest.raises(UnsupportedModelError, match=r"here: .*MatMulIntegerToFloat of UINT8"):
            require_cuda_kernels(DecoderGraph(opened).build(), "here")
    attention = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    attention.domain = ""
    with pytest.raises(UnsupportedModelError, match="GroupQueryAttention of FLOAT16"):
        require_cuda_kernels(model, "here")


def test_formats_that_cuda_has_no_integer_product_for_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match="--target cuda multiplies integers only"):
        make_export(checkpoint("W4A16"), tmp_path / "onnx", Kernel.AUTO, Target.CUDA)


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("kernel", Kernel)
def test_combinations_that_do_not_exist_are_refused_by_name(target: Target, kernel: Kernel) -> None:
    if kernel in TARGET_KERNELS[target]:
        require_offered(target, kernel)
        return
    with pytest.raises(ConfigError, match=f"--target {target} has no --kernel {kernel}") as caught:
        require_offered(target, kernel)
    assert "qdq: auto, qdq" in str(caught.value)
    assert "cuda: auto, integer" in str(caught.value)


def test_a_refused_combination_leaves_nothing_behind(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="has no --kernel nbits"):
        make_export(checkpoint("W8A8"), tmp_path / "onnx", Kernel.NBITS, Target.QDQ)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-user")
def test_an_emulated_haswell_computes_what_vnni_does(
    export: Callable[[str, Target], Path], tmp_path: Path
) -> None:
    exports = {
        str(target): export("W8A8", target) for target in (Target.CPU, Target.CPU_AVX2, Target.QDQ)
    }
    script = f"""
import sys
import numpy as np
from pathlib import Path
from deploy.session import OnnxDecoder
from deploy.verification import cpu_saturates
found = dict(saturates=cpu_saturates())
for name, directory in {[(name, str(path)) for name, path in exports.items()]}:
    with OnnxDecoder(Path(directory), threads=1) as decoder:
        found[name] = decoder.logits(np.arange(30, 62))
np.savez(sys.argv[1], **found)
"""
    results = []
    for number, prefix in enumerate([[], ["qemu-x86_64", "-cpu", "Haswell"]]):
        output = tmp_path / f"{number}.npz"
        command = [*prefix, sys.executable, "-c", script, str(output)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ, cwd=Path.cwd())
        results.append(dict(np.load(output)))
    native, haswell = results
    assert haswell["saturates"]
    errors = {name: relative_error(haswell[name], native[name]) for name in exports}
    assert max(errors[Target.CPU_AVX2], errors[Target.QDQ]) < 1e-3
    if not native["saturates"]:  # the control: what the target is for
        assert errors[Target.CPU] > 1e-2
