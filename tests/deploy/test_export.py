from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import onnx
import pytest

import deploy.checkpoint_reader
from deploy.artifact import hash_file, read_manifest, verify_files
from deploy.checkpoint import Checkpoint
from deploy.checkpoint_reader import WEIGHTS_NAME
from deploy.errors import ArtifactError, ConfigError, StageOrderError
from deploy.export import DATA_NAME, write_graphs
from deploy.kernels import Kernel, graph_forms
from deploy.parity import parity_tokens
from deploy.session import GENAI_CONFIG_NAME, GRAPH_NAME
from tests.deploy.tiny_artifacts import make_checkpoint, make_export, save_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("export")
    model = save_model(base / "model", "llama", hidden_size=64, intermediate_size=96)
    return make_checkpoint(model, base / "w4a4", "W4A4", weights="rtn")


def test_weights_lie_beside_the_graph_and_equal_inputs_give_equal_files(
    checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        make_export(checkpoint, tmp_path / name)
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files >= {GRAPH_NAME, DATA_NAME, GENAI_CONFIG_NAME, "tokenizer.json", "config.json"}
    assert not files & {WEIGHTS_NAME, "rotation.safetensors"}
    for name in files:
        assert hash_file(tmp_path / "a" / name) == hash_file(tmp_path / "b" / name), name
    graph = onnx.load(tmp_path / "a" / GRAPH_NAME, load_external_data=False)
    outside = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    weights = [f"{tensor}.weight" for tensor in ("model.embed_tokens", "lm_head")]
    weights += [f"model.layers.1.{part}.weight" for part in ("self_attn.qkv", "mlp.down_proj")]
    for weight in weights:
        assert outside[weight]["location"] == DATA_NAME, weight
    down = int(outside["model.layers.1.mlp.down_proj.weight"]["length"])
    assert down == 64 * 96 / 2, "four bits a weight"
    inside = [t for t in graph.graph.initializer if t.name not in outside]
    assert max(len(tensor.raw_data) for tensor in inside) <= 1024


def test_named_chat_templates_travel_with_the_tokenizer(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    named = Path("additional_chat_templates") / "tool_use.jinja"
    (model / named).parent.mkdir()
    (model / named).write_text("{{ messages }}", encoding="utf-8")
    checkpoint = make_checkpoint(model, tmp_path / "checkpoint", "W8A8", weights="rtn")
    make_export(checkpoint, tmp_path / "onnx")
    assert (tmp_path / "onnx" / named).read_text(encoding="utf-8") == "{{ messages }}"
    assert named.as_posix() in read_manifest(tmp_path / "onnx").files


def test_what_else_lies_in_the_checkpoint_is_not_copied(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, source)
    make_export(source, source / "onnx")
    (source / "onnx" / "deep" / "er").mkdir(parents=True)
    (source / "onnx" / "deep" / "er" / "notes.txt").write_text("mine")
    make_export(source, tmp_path / "again")
    for export in (source / "onnx", tmp_path / "again"):
        listed = set(read_manifest(export).files)
        assert listed == set(read_manifest(tmp_path / "again").files)
        assert not any("/" in name or "partial" in name for name in listed)


def test_inputs_and_outputs_have_the_names_that_genai_expects(
    checkpoint: Path, tmp_path: Path
) -> None:
    make_export(checkpoint, tmp_path / "onnx")
    graph = onnx.load(tmp_path / "onnx" / GRAPH_NAME, load_external_data=False).graph
    layers = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [value.name for value in graph.input] == [
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{layer}" for layer in layers),
    ]
    assert [value.name for value in graph.output] == [
        "logits",
        *(f"present.{layer}" for layer in layers),
    ]
    genai = json.loads((tmp_path / "onnx" / GENAI_CONFIG_NAME).read_text())
    assert genai["model"]["decoder"]["num_hidden_layers"] == 2


def test_the_manifest_says_what_was_exported_and_how_well(checkpoint: Path, tmp_path: Path) -> None:
    report = make_export(checkpoint, tmp_path / "onnx")
    manifest = verify_files(tmp_path / "onnx")
    assert manifest.parents == {"checkpoint": read_manifest(checkpoint).digest}
    assert manifest.details["scheme"] == "W4A4"
    operators = report.to_dict()["operators"]
    assert operators["MatMulIntegerToFloat"] == 2 * 5 + 1, "qkv, o, gate, up, down; the head"
    assert operators["Clip"] == 2 * 4, "below 8 bits; the head has 8"
    assert list(operators.values()) == sorted(operators.values(), reverse=True)
    assert report.to_dict()["file_bytes"] == sum(
        path.stat().st_size
        for path in (tmp_path / "onnx").iterdir()
        if path.name != "rolora_manifest.json"
    )
    assert report.peak_memory_bytes > 1e7


@pytest.mark.parametrize("bits", [8, 4])
def test_writing_holds_one_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    """What Python allocates, which is all of numpy's; ONNX Runtime does not run here."""
    rows, hidden = 640_000 // bits, 64
    model = save_model(tmp_path / "model", vocab_size=rows, hidden_size=hidden)
    source = make_checkpoint(
        model,
        tmp_path / "checkpoint",
        f"W{bits}A8",
        weights="rtn",
        head_bits=bits,
        embedding_bits=bits,
        equalize="none",
    )
    largest = rows * hidden * bits // 8
    monkeypatch.setattr(deploy.checkpoint_reader, "SLAB", 100_000)
    with Checkpoint(source) as opened:
        forms = graph_forms(opened, Kernel.AUTO)
        (tmp_path / "onnx").mkdir()
        tracemalloc.start()
        write_graphs(opened, forms, tmp_path / "onnx")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    graphs = 2 * 2**20  # with the scales in them
    assert peak < 1.3 * largest + graphs, f"{peak / 1e6:.1f} MB for {largest / 1e6:.1f}"


def test_a_finished_export_is_kept_and_another_is_never_overwritten(
    checkpoint: Path, tmp_path: Path
) -> None:
    first = make_export(checkpoint, tmp_path / "onnx")
    graph = tmp_path / "onnx" / GRAPH_NAME
    written = graph.stat().st_mtime_ns
    assert make_export(checkpoint, tmp_path / "onnx").manifest == first.manifest
    assert graph.stat().st_mtime_ns == written
    other = shutil.copytree(checkpoint, tmp_path / "other")
    manifest = json.loads((other / "rolora_manifest.json").read_text())
    manifest["config"]["calibration"] = "another"
    (other / "rolora_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="exists already and was made from other inputs"):
        make_export(other, tmp_path / "onnx")
    assert graph.stat().st_mtime_ns == written
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"model.onnx: expected"):
        make_export(checkpoint, tmp_path / "onnx")


def test_only_checkpoints_are_exported(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(StageOrderError, match="make one with rolora merge-rotate-quantize"):
        make_export(checkpoint.parent / "model", tmp_path / "onnx")
    make_export(checkpoint, tmp_path / "onnx")
    with pytest.raises(StageOrderError, match="expected an artifact of kind checkpoint"):
        make_export(tmp_path / "onnx", tmp_path / "again")


def test_a_disk_without_room_is_refused_at_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ArtifactError, match=r"disk is full: .* needed, 100 bytes are"):
        make_export(checkpoint, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_parity_tokens_fit_the_model(checkpoint: Path) -> None:
    with Checkpoint(checkpoint) as opened:
        ids = parity_tokens(opened)
        assert len(ids) == 128
        assert 0 <= ids.min() <= ids.max() < opened.config.vocab_size
        opened.config.max_position_embeddings = 20
        opened.config.vocab_size = 50
        short = parity_tokens(opened)
    assert len(short) == 20
    assert short.max() < 50
