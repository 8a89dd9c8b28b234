from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deploy.encoder_layer_parity import EncoderExportReport, report_on_encoder
from deploy.errors import ArtifactError, ConfigError, ParityError, StageOrderError
from deploy.layer_report import COLUMNS
from deploy.session import GRAPH_NAME
from tests.deploy.test_encoder_export import FAULTS, LAYER, change
from tests.deploy.tiny_classifiers import save_encoder
from tests.deploy.tiny_encoder_artifacts import make_encoder_export, put_fault_in_encoder_export

EXPORTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fp32": ("FP32", {}, {}),
    "w8a8": ("W8A8", {}, {}),
    "w8a8 roberta": ("W8A8", {"kind": "roberta"}, {"asymmetric": True}),
    "w6a6 static relu": ("W6A6", {"hidden_act": "relu"}, {"static": "all"}),
    "w4a16": ("W4A16", {}, {}),
    "w4a8 groups": ("W4A8", {}, {"group_size": 16}),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Export and checkpoint of each scheme."""
    base, result = tmp_path_factory.mktemp("layers"), {}
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    for name, (scheme, options, recipe) in EXPORTS.items():
        model = save_encoder(base / f"{name} model", with_head=True, **{**sizes, **options})
        export = make_encoder_export(model, base / name, scheme, **recipe)
        result[name] = export, base / f"{name}-checkpoint"
    return result


def changed_copy(export: Path, copy: Path, fault: Any) -> Path:
    """Copy an export with a fault in its graph, all weights inside the graph file."""
    copy.mkdir()
    for path in export.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    model = onnx.load(copy / GRAPH_NAME)
    fault(model)
    (copy / GRAPH_NAME).write_bytes(model.SerializeToString())
    return copy


def one_number(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed.reshape(-1)[7] = changed.reshape(-1)[7] * array.dtype.type(2) + array.dtype.type(1)
    return changed


@pytest.mark.parametrize("name", EXPORTS)
def test_a_sound_export_departs_nowhere(name: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    report = report_on_encoder(*pairs[name])
    report.require_within_bounds()
    assert (report.weights_fault, report.layers.first) == (None, None)
    assert report.graph.exact_weights == (0 if name == "fp32" else 12)
    assert len(report.layers.parts) == 1 + 2 * (2 + 4)
    counted = sum(part.integers for part in report.layers.parts)
    assert bool(counted) == name.startswith(("w8a8", "w6a6"))
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["graph"]["head_error"] < plain["graph"]["head_bound"]
    assert [part["phase"] for part in plain["parts"]] == ["encode"] * len(plain["parts"])
    rows = report.rows(every=True)
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert [row[:3] for row in rows[-2:]] == [
        ("graph", "encode", "last hidden states"),
        ("head", "encode", "logits"),
    ]


@pytest.mark.parametrize(
    ("number", "part", "said"),
    [
        ("attention.self.qkv.weight_scale", "attention.self.query", "scales are not"),
        ("output.dense.weight_scale", "output.dense", "scales are not"),
        ("output.dense.weight", "output.dense", "integers are not"),
        ("intermediate.dense.weight_scale", "intermediate.dense", "scales are not"),
    ],
)
def test_a_changed_number_is_named_and_so_is_its_linear(
    number: str, part: str, said: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    export, checkpoint = pairs["w8a8"]
    fault = change(f"{LAYER}.{number}", one_number)
    report = report_on_encoder(changed_copy(export, tmp_path / "copy", fault), checkpoint)
    assert report.weights_fault is not None
    assert f"{LAYER}.{number}: the exported {said} the checkpoint's" in report.weights_fault
    first = report.layers.first
    assert first is not None
    assert (first.layer, first.part.partition(", ")[0]) == ("1", part)
    faulty = {(p.layer, p.part) for p in report.layers.parts if p.beyond and p.is_linear}
    assert faulty == {("1", first.part)}
    with pytest.raises(ParityError, match=rf"{number}.*first to depart is layer 1, {part}"):
        report.require_within_bounds()


def first_of(report: EncoderExportReport) -> tuple[str, str]:
    assert report.weights_fault is None
    assert report.layers.first is not None
    return report.layers.first.layer, report.layers.first.part


@pytest.mark.parametrize(
    ("fault", "layer", "part"),
    [
        ("bias", "1", "attention"),
        ("norm gain", "1", "mlp"),
        ("epsilon", "embedding", "embedding"),
        ("mask", "0", "attention"),
        ("residual", "1", "mlp"),
    ],
)
def test_faults_outside_the_weights_are_named_too(
    fault: str, layer: str, part: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    export, checkpoint = pairs["fp32"]
    copy = changed_copy(export, tmp_path / "copy", FAULTS[fault])
    assert first_of(report_on_encoder(copy, checkpoint)) == (layer, part)


def test_a_fault_of_the_head_alone_is_named(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    export, checkpoint = pairs["w8a8"]
    fault = change("classifier.bias", lambda array: array + 1e-2)
    report = report_on_encoder(changed_copy(export, tmp_path / "copy", fault), checkpoint)
    assert report.layers.first is None
    assert report.rows()[-1][-1] == "beyond"
    with pytest.raises(ParityError, match="classification head departs"):
        report.require_within_bounds()


def test_an_export_that_fails_names_its_first_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_fault_in_encoder_export(monkeypatch, FAULTS["residual"])
    model = save_encoder(tmp_path / "bert", with_head=True)
    with pytest.raises(ParityError, match=r"states .*; the first to depart is layer 1, mlp"):
        make_encoder_export(model, tmp_path / "onnx", "FP32")


def test_an_export_of_another_checkpoint_and_a_graph_that_is_none_are_refused(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    export, checkpoint = pairs["w8a8"]
    with pytest.raises(ConfigError, match="was not exported from"):
        report_on_encoder(export, pairs["w4a16"][1])
    with pytest.raises(StageOrderError, match="expected an artifact of kind onnx-encoder"):
        report_on_encoder(checkpoint, checkpoint)

    def rename(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.name = node.name.replace("layer.1.output.LayerNorm", "elsewhere")

    copy = changed_copy(export, tmp_path / "copy", rename)
    with pytest.raises(ArtifactError, match=r"no node .*layer.1.output.LayerNorm/LayerNorm"):
        report_on_encoder(copy, checkpoint)
