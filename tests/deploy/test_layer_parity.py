from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from deploy.checkpoint import Checkpoint
from deploy.errors import ArtifactError, ConfigError, ParityError
from deploy.families import FAMILIES
from deploy.kernels import Kernel
from deploy.layer_parity import compare_layers, report_on_export
from deploy.layer_report import COLUMNS, LayerReport, PartParity
from tests.deploy.test_parity import (
    double_one_static_scale,
    enlarge_epsilon,
    forget_the_rotary_embedding,
)
from tests.deploy.tiny_artifacts import (
    make_checkpoint,
    make_export,
    put_fault_in_export,
    save_model,
)

IDS = np.arange(20, 100)
"""A prompt of 16 tokens, and 64 one by one."""

EXPORTS = {
    "fp32": ("FP32", Kernel.INTEGER, {}),
    "w8a8": ("W8A8", Kernel.AUTO, {"rotate": "r1,r2,r4"}),
    "w4a8": ("W4A8", Kernel.AUTO, {}),
    "w4a8 nbits": ("W4A8", Kernel.NBITS, {}),
    "w4a8 tables": ("W4A8", Kernel.AUTO, {"embedding_bits": 4, "head_bits": 4}),
    "w4a4": ("W4A4", Kernel.INTEGER, {"asymmetric": True}),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Checkpoint and export of each scheme."""
    base = tmp_path_factory.mktemp("layers")
    model = save_model(base / "model")
    result = {}
    for name, (scheme, kernel, options) in EXPORTS.items():
        weights = {} if scheme == "FP32" else {"weights": "rtn"}
        checkpoint = base / f"{name} checkpoint"
        make_checkpoint(model, checkpoint, scheme, **weights, **options)  # type: ignore[arg-type]
        make_export(checkpoint, base / name, kernel)
        result[name] = checkpoint, base / name
    return result


def damaged_copy(export: Path, copy: Path, initializer: str, graph_file: str) -> Path:
    """Copy an export with the highest bit of one byte of a weight changed."""
    copy.mkdir()
    for path in export.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    model = onnx.load(copy / graph_file, load_external_data=False)
    tensor = next(item for item in model.graph.initializer if item.name == initializer)
    place = {entry.key: entry.value for entry in tensor.external_data}
    if not place:  # too small to lie in the file of weights
        held = bytearray(tensor.raw_data)
        held[37] ^= 0x80
        tensor.raw_data = bytes(held)
        (copy / graph_file).write_bytes(model.SerializeToString())
        return copy
    file = copy / place["location"]
    content = bytearray(file.read_bytes())
    content[int(place["offset"]) + 37] ^= 0x80
    file.write_bytes(content)
    return copy


def changed_copy(export: Path, copy: Path, fault: Callable[[onnx.ModelProto], None]) -> Path:
    copy.mkdir()
    for path in export.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    graph = onnx.load(copy / "model.onnx", load_external_data=False)
    fault(graph)
    (copy / "model.onnx").write_bytes(graph.SerializeToString())
    return copy


def compare(pair: tuple[Path, Path], directory: Path | None = None) -> LayerReport:
    with Checkpoint(pair[0]) as checkpoint:
        return compare_layers(checkpoint, directory or pair[1], IDS)


@pytest.mark.parametrize("name", EXPORTS)
def test_a_sound_export_departs_nowhere(name: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    report = compare(pairs[name])
    assert report.first is None
    assert report.describe_first() == "no layer by itself lies beyond its bound"
    report.require_within_bounds()
    each_phase = 1 + 2 * (3 + 5) + 1
    assert len(report.parts) == 2 * each_phase
    assert {part.phase for part in report.parts} == {"prefill", "decode"}
    counted = sum(part.integers for part in report.parts if part.is_linear)
    assert (counted > 0) == (name in ("w8a8", "w4a8", "w4a8 tables", "w4a4"))
    streams = [part for part in report.parts if part.part == "attention" and part.integers]
    assert bool(streams) == bool(counted)


@pytest.mark.parametrize(
    ("name", "graph", "layer", "linear", "part"),
    [
        ("fp32", "model.onnx", 1, "self_attn.qkv", "q_proj, k_proj, v_proj"),
        ("w8a8", "model.onnx", 1, "mlp.down_proj", "down_proj"),
        ("w8a8", "model.onnx", 0, "self_attn.o_proj", "o_proj"),
        ("w4a8", "token.onnx", 1, "mlp.up_proj", "up_proj"),
        ("w4a8 nbits", "model.onnx", 1, "self_attn.qkv", "q_proj, k_proj, v_proj"),
        ("w4a4", "model.onnx", 1, "mlp.gate_proj", "gate_proj"),
    ],
)
def test_one_wrong_byte_names_its_layer(
    name: str,
    graph: str,
    layer: int,
    linear: str,
    part: str,
    pairs: dict[str, tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    weight = f"model.layers.{layer}.{linear}.weight"
    report = compare(pairs[name], damaged_copy(pairs[name][1], tmp_path / "copy", weight, graph))
    assert report.first is not None
    assert (report.first.layer, report.first.part) == (str(layer), part)
    faulty = {(p.layer, p.part) for p in report.parts if p.beyond and p.is_linear}
    assert faulty == {(str(layer), part)}
    with pytest.raises(ParityError, match=rf"first to depart is layer {layer}, {part}") as caught:
        report.require_within_bounds()
    assert caught.value.exit_code == 6


def test_a_wrong_byte_of_the_head_names_the_head(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    copy = damaged_copy(pairs["w8a8"][1], tmp_path / "copy", "lm_head.weight", "model.onnx")
    report = compare(pairs["w8a8"], copy)
    assert report.first is not None
    assert report.first.layer == "head"
    assert "the first to depart is head, lm_head" in report.describe_first()


@pytest.mark.parametrize(
    ("name", "fault", "layer", "part"),
    [
        ("fp32", forget_the_rotary_embedding, "0", "attention"),
        ("fp32", enlarge_epsilon, "0", "attention"),
        ("w8a8", double_one_static_scale, "0", "q_proj, k_proj, v_proj"),
    ],
)
def test_faults_outside_the_weights_are_named_too(
    name: str,
    fault: Callable[[onnx.ModelProto], None],
    layer: str,
    part: str,
    pairs: dict[str, tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    report = compare(pairs[name], changed_copy(pairs[name][1], tmp_path / "copy", fault))
    assert report.first is not None
    assert (report.first.layer, report.first.part) == (layer, part)


@pytest.mark.parametrize("family", [*FAMILIES])
def test_every_family_is_compared(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(
        save_model(tmp_path / "model", family), tmp_path / "c", "W8A8", weights="rtn"
    )
    make_export(checkpoint, tmp_path / "onnx", Kernel.AUTO)
    assert report_on_export(tmp_path / "onnx", checkpoint).first is None
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    weights = [item.name for item in graph.initializer if item.name.endswith(".weight")]
    weight = next(name for name in weights if "layers.1" in name and ".self_attn." in name)
    copy = damaged_copy(tmp_path / "onnx", tmp_path / "copy", weight, "model.onnx")
    first = report_on_export(copy, checkpoint).first
    assert first is not None
    assert first.layer == "1"


def test_an_export_that_fails_names_its_first_layer(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_fault_in_export(monkeypatch, "model.onnx", forget_the_rotary_embedding)
    with pytest.raises(ParityError, match=r"departs from .* the first to depart is layer 0, att"):
        make_export(pairs["fp32"][0], tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_export_whose_layers_cannot_be_told_apart_still_says_what_failed(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename_too(graph: onnx.ModelProto) -> None:
        forget_the_rotary_embedding(graph)
        for node in graph.graph.node:
            node.name = f"x{node.name}"

    put_fault_in_export(monkeypatch, "model.onnx", rename_too)
    with pytest.raises(ParityError, match=r"departs from .*cannot be compared .*has no node"):
        make_export(pairs["fp32"][0], tmp_path / "onnx")


def test_an_export_of_another_checkpoint_and_a_graph_that_is_none_are_refused(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="was not exported from"):
        report_on_export(pairs["w8a8"][1], pairs["w4a8"][0])

    def lose_a_norm(graph: onnx.ModelProto) -> None:
        for node in graph.graph.node:
            node.name = node.name.replace("layers.1.post_attention", "elsewhere")

    copy = changed_copy(pairs["fp32"][1], tmp_path / "copy", lose_a_norm)
    with pytest.raises(ArtifactError, match=r"no node model.layers.1.post_attention_layernorm"):
        compare(pairs["fp32"], copy)
    (copy / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match="cannot load it"):
        compare(pairs["fp32"], copy)


def part(layer: str, error: float, *, linear: bool = False, **fields: int) -> PartParity:
    return PartParity(layer, "decode", "p", error, error, 1.0, is_linear=linear, **fields)


def test_linears_go_before_streams_and_the_lowest_layer_before_others() -> None:
    assert LayerReport((part("1", 0.5), part("2", 2.0), part("1", 3.0))).first == part("1", 3.0)
    sure = part("4", 2.0, linear=True)
    assert LayerReport((part("1", 3.0), sure, part("head", 9.0, linear=True))).first == sure
    assert LayerReport((part("head", 2.0), part("embedding", 2.0))).first == part("embedding", 2.0)
    assert LayerReport((part("0", 1.0),)).first is None
    assert part("0", float("nan")).beyond
    assert not part("0", 0.0, linear=True, integers=5000, integer_mismatches=5).beyond
    assert part("0", 0.0, linear=True, integers=5000, integer_mismatches=6).beyond
    assert not part("0", 0.0, integers=5000, integer_mismatches=600).beyond  # a stream's may


def test_a_report_is_plain_data_and_rows() -> None:
    report = LayerReport((part("1", 2.0, linear=True), part("2", 0.1, linear=True), part("2", 0.1)))
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["first"]["layer"] == "1"
    assert [item["beyond"] for item in plain["parts"]] == [True, False, False]
    assert [row[0] for row in report.rows()] == ["1", "2"]
    assert len(report.rows(every=True)) == 3
    assert {len(row) for row in report.rows()} == {len(COLUMNS)}
