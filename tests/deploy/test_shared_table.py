"""Tied models whose embedding and head stay one table of integers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from deploy.artifact import read_manifest
from deploy.checkpoint import Checkpoint
from deploy.checkpoint_reader import WEIGHTS_NAME
from deploy.checkpoint_settings import choose_recipe
from deploy.compressed_export import export_compressed
from deploy.errors import ConfigError, ParityError, UnsupportedModelError
from deploy.export import DATA_NAME
from deploy.finetune import finetune
from deploy.kernels import Kernel
from deploy.layer_parity import compare_layers
from deploy.pack import PackSettings, pack
from deploy.parity import relative_error
from deploy.session import HEAD_NAME, OnnxDecoder
from deploy.targets import Target
from rolora.overrides import Override
from rolora.scheme import WeightSpec
from tests.deploy.tiny_artifacts import (
    finetune_settings,
    make_adapter,
    make_checkpoint,
    make_export,
    put_fault_in_export,
    save_model,
    write_rows,
)

IDS = np.arange(60, dtype=np.int64) * 5 % 200
TABLE = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def save_tied(directory: Path, model_type: str = "llama", **options: Any) -> Path:
    """Save a tied model whose final norm has gains of both signs, far from 1."""
    save_model(directory, model_type, tied=True, **options)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        gain = model.model.norm.weight
        gain.copy_(torch.linspace(-1.5, 2.5, len(gain)))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tied(tmp_path_factory.mktemp("tied") / "model")


def make_shared(model: Path, output: Path, scheme: str = "W8A8", **options: Any) -> Path:
    return make_checkpoint(
        model, output, scheme, **{"weights": "rtn", "shared_table": True} | options
    )


@pytest.fixture(scope="module")
def shared(model: Path) -> Path:
    return make_shared(model, model.parent / "shared")


def logits(checkpoint: Path) -> np.ndarray:
    with Checkpoint(checkpoint) as opened:
        quantized = opened.load_model()
    with torch.inference_mode():
        found: np.ndarray = quantized(input_ids=torch.from_numpy(IDS)[None]).logits[0].numpy()
    return found


def float_logits(model: Path) -> np.ndarray:
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(model)
        found: np.ndarray = loaded(input_ids=torch.from_numpy(IDS)[None]).logits[0].numpy()
    return found


def test_the_checkpoint_stores_the_table_once(model: Path, shared: Path, tmp_path: Path) -> None:
    stored = load_file(shared / WEIGHTS_NAME)
    assert not stored.keys() & {HEAD, f"{HEAD}_scale"}
    assert stored[TABLE].dtype == np.int8
    assert read_manifest(shared).details["shared_table"] is True
    with Checkpoint(shared) as opened:
        head = opened.linear(opened.names.head)
        np.testing.assert_array_equal(opened.integers(head), stored[TABLE])
        reference = opened.load_model()
    np.testing.assert_array_equal(reference.lm_head.weight.numpy(), stored[TABLE])
    own = make_checkpoint(model, tmp_path / "own", "W8A8", weights="rtn", equalize="all")
    saved = (own / WEIGHTS_NAME).stat().st_size - (shared / WEIGHTS_NAME).stat().st_size
    assert saved > 0.95 * stored[TABLE].nbytes


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("rotate", [None, "none", "r2,r4"])
def test_a_shared_table_is_as_near_to_the_model_as_two(
    tmp_path: Path, model_type: str, rotate: str | None
) -> None:
    rotate = "r1,r2,r4" if rotate is None else rotate
    model = save_tied(tmp_path / "model", model_type)
    expected = float_logits(model)
    scaled = None if rotate == "none" else "all"
    two = make_checkpoint(
        model, tmp_path / "two", "W8A8", weights="rtn", rotate=rotate, equalize=scaled
    )
    one = make_shared(model, tmp_path / "one", rotate=rotate, equalize=scaled)
    apart = relative_error(logits(two), expected)
    assert relative_error(logits(one), expected) < max(2 * apart, 0.02)
    report = make_export(one, tmp_path / "onnx", Kernel.AUTO).to_dict()
    assert report["parity"]["top1_agreement"] > 0.9


FOUR_BITS = {"embedding_bits": 4, "head_bits": 4}


@pytest.mark.parametrize(
    ("scheme", "kernel", "target", "written_once"),
    [
        ("W8A8", Kernel.AUTO, Target.CPU, True),
        ("W8A8", Kernel.INTEGER, Target.CPU, True),
        ("W4A8", Kernel.AUTO, Target.CPU, True),
        ("W4A4", Kernel.AUTO, Target.CPU, True),
        ("W8A8", Kernel.AUTO, Target.CPU_AVX2, True),
        ("W8A8", Kernel.AUTO, Target.CPU_ARM64, True),
        ("W8A8", Kernel.AUTO, Target.CUDA, True),
        ("W4A8", Kernel.NBITS, Target.CPU, False),
        ("W8A8", Kernel.AUTO, Target.QDQ, False),
    ],
)
def test_exports_hold_the_table_once_where_the_kernels_allow(
    model: Path, tmp_path: Path, scheme: str, kernel: Kernel, target: Target, written_once: bool
) -> None:
    static = "all" if target is Target.QDQ else None
    source = make_shared(model, tmp_path / "c", scheme, static=static)
    report = make_export(source, tmp_path / "onnx", kernel, target).to_dict()
    assert report["parity"]["exact_weights"] == 2 * 7 + 1
    places: dict[str, set[tuple[str, str]]] = {}
    for file in (tmp_path / "onnx").glob("*.onnx"):
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries:
                places.setdefault(tensor.name, set()).add((entries["offset"], entries["length"]))
    assert len(places[TABLE]) == 1, "all graphs refer to the same bytes"
    assert (HEAD not in places) is written_once


@pytest.mark.parametrize(
    ("scheme", "kernel", "files"),
    [
        ("W4A8", Kernel.AUTO, 3),
        ("W4A8", Kernel.INTEGER, 1),
        ("W4A8", Kernel.NBITS, 1),
        ("W8A8", Kernel.AUTO, 2),
        ("W4A4", Kernel.AUTO, 2),
        ("W4A16", Kernel.NBITS, 1),
    ],
)
def test_a_table_of_4_bits_is_held_once_by_every_kernel(
    model: Path, tmp_path: Path, scheme: str, kernel: Kernel, files: int
) -> None:
    source = make_shared(model, tmp_path / "c", scheme, **FOUR_BITS)
    with Checkpoint(source) as opened:
        width = opened.names.hidden_size
        head = opened.linear(opened.names.head)
        assert head.weight == opened.embedding_spec == WeightSpec(4, 32)
        assert (opened.shape(TABLE), opened.shape(HEAD)) == ((262, width // 2),) * 2
    report = make_export(source, tmp_path / "onnx", kernel).to_dict()
    assert report["parity"]["exact_weights"] == 2 * 7 + 1
    graphs = list((tmp_path / "onnx").glob("*.onnx"))
    assert len(graphs) == files
    for file in graphs:
        graph = onnx.load(file, load_external_data=False).graph
        names = {tensor.name for tensor in graph.initializer}
        assert {TABLE, f"{TABLE}_scale"} <= names
        assert not names & {HEAD, f"{HEAD}_scale"}
        node = next(one for one in graph.node if one.name == "lm_head/MatMulNBits")
        assert node.input[2] == f"{TABLE}_scale"


def test_a_table_of_4_bits_is_as_near_as_4_bits_are(model: Path, tmp_path: Path) -> None:
    expected = float_logits(model)
    eight = make_shared(model, tmp_path / "8")
    four = make_shared(model, tmp_path / "4", **FOUR_BITS)
    errors = [relative_error(logits(each), expected) for each in (eight, four)]
    assert errors[0] < errors[1] < 0.3, "16 times the step, 32 columns to a scale"
    sizes = [(each / WEIGHTS_NAME).stat().st_size for each in (eight, four)]
    assert sizes[1] < sizes[0]


def test_the_head_alone_reads_the_table_too(shared: Path, tmp_path: Path) -> None:
    make_export(shared, tmp_path / "onnx", Kernel.AUTO)
    graph = onnx.load(tmp_path / "onnx" / HEAD_NAME, load_external_data=False).graph
    table = next(tensor for tensor in graph.initializer if tensor.name == TABLE)
    assert {entry.key: entry.value for entry in table.external_data}["location"] == DATA_NAME
    with OnnxDecoder(tmp_path / "onnx") as decoder:
        assert relative_error(decoder.logits(IDS), logits(shared)) < 0.05
    with Checkpoint(shared) as opened:
        report = compare_layers(opened, tmp_path / "onnx", IDS)
    assert report.first is None, report.describe_first()


def lookup_not_undone(graph: onnx.ModelProto) -> None:
    node = next(one for one in graph.graph.node if one.name == "embedding/R1/Mul")
    rows = next(one for one in graph.graph.node if one.name == "embedding/Mul")
    node.input[0] = rows.output[0]


def other_table(graph: onnx.ModelProto) -> None:
    """Let the head read the table's rows in another order."""
    node = next(one for one in graph.graph.node if one.name == "lm_head/Transpose")
    reversal = onnx.helper.make_node(
        "Slice", [node.input[0], "from", "to", "axis", "step"], ["reversed"], "reversal"
    )
    for name, number in (("from", -1), ("to", -(10**6)), ("axis", 0), ("step", -1)):
        tensor = onnx.numpy_helper.from_array(np.array([number], np.int64), name)
        graph.graph.initializer.append(tensor)
    node.input[0] = "reversed"
    graph.graph.node.insert(0, reversal)


def other_scales(graph: onnx.ModelProto) -> None:
    """Let the head of a 4-bit table read other scales than the lookup."""
    node = next(one for one in graph.graph.node if one.name == "lm_head/MatMulNBits")
    twice = onnx.helper.make_node("Add", [node.input[2]] * 2, ["doubled"], "doubling")
    node.input[2] = "doubled"
    graph.graph.node.insert(0, twice)


def test_other_scales_of_the_head_fail_parity(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_shared(model, tmp_path / "c", **FOUR_BITS)
    put_fault_in_export(monkeypatch, "model.onnx", other_scales)
    with pytest.raises(ParityError, match="departs from the torch reference"):
        make_export(source, tmp_path / "onnx")


@pytest.mark.parametrize("fault", [lookup_not_undone, other_table])
def test_a_table_in_another_basis_or_order_fails_parity(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    put_fault_in_export(monkeypatch, "model.onnx", fault)
    with pytest.raises(ParityError, match="departs from the torch reference"):
        make_export(shared, tmp_path / "onnx")


@pytest.mark.parametrize("options", [{}, FOUR_BITS], ids=["8 bits", "4 bits"])
def test_training_in_the_rounding_keeps_the_table_and_the_cache(
    model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    start = make_shared(model, tmp_path / "start", "W4A8", kv_bits=8, **options)
    settings = finetune_settings(model, write_rows(tmp_path / "rows.jsonl"), "rolora")
    finetune(type(settings)(**vars(settings) | {"start": start}), tmp_path / "adapter")
    pack(PackSettings(str(model), tmp_path / "adapter"), tmp_path / "packed")
    before, after = (load_file(path / WEIGHTS_NAME) for path in (start, tmp_path / "packed"))
    assert set(before) == set(after)
    np.testing.assert_array_equal(before[TABLE], after[TABLE])
    details = read_manifest(tmp_path / "packed").details
    assert (details["shared_table"], details["kv_bits"]) == (True, 8)
    report = make_export(tmp_path / "packed", tmp_path / "onnx", Kernel.AUTO).to_dict()
    assert report["operators"]["TensorScatter"] == 4, "the cache has 8 bits still"


def test_an_untied_model_is_refused(tmp_path: Path) -> None:
    untied = save_model(tmp_path / "untied")
    with pytest.raises(ConfigError, match=r"--share-table: .* has a head of its own"):
        make_shared(untied, tmp_path / "c")


def test_a_head_that_the_files_hold_though_the_config_says_tied_is_refused(
    model: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(model, tmp_path / "own")
    tensors = load_file(own / "model.safetensors")
    save_file(tensors | {HEAD: -tensors[TABLE]}, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"--share-table: .* files hold a head that differs"):
        make_shared(own, tmp_path / "c")


@pytest.mark.parametrize("options", [{"equalize": "none"}, {"rotate": "r2,r4", "equalize": "none"}])
def test_a_gain_in_the_head_is_refused(
    model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="gain of the final norm is folded into the head"):
        make_shared(model, tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def test_a_gain_of_zero_is_refused(tmp_path: Path) -> None:
    directory = save_tied(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.model.norm.weight[3] = 0
    model.save_pretrained(directory)
    with pytest.raises(ConfigError, match=r"model.norm: expected gains other than 0.*channel 3"):
        make_shared(directory, tmp_path / "c")


def test_the_basis_of_an_adapter_is_refused(model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", "rolora")
    with pytest.raises(ConfigError, match="gain of the final norm is folded into the head"):
        make_shared(model, tmp_path / "c", adapter=adapter)
    merged = make_adapter(model, tmp_path / "lora", "lora")
    make_shared(model, tmp_path / "d", adapter=merged)


def test_other_bits_than_those_of_the_table_are_refused(model: Path, tmp_path: Path) -> None:
    for bits in ({"head_bits": 4}, {"embedding_bits": 32}):
        with pytest.raises(ValueError, match="share has 8 bits for both or 4 for both, got"):
            choose_recipe("W8A8", shared_table=True, **bits)
    with pytest.raises(ValueError, match="--scheme FP32 leaves embedding and head in float"):
        choose_recipe("FP32", shared_table=True)
    override = Override.parse("head=W4")
    with pytest.raises(ConfigError, match="cannot have other bits; leave its override out"):
        make_shared(model, tmp_path / "c", overrides=(override,))
    override = Override.parse("head=A4")
    with pytest.raises(ConfigError, match="table of 4 bits, whose kernel has inputs of 8 bits"):
        make_shared(model, tmp_path / "c", overrides=(override,), **FOUR_BITS)
    odd = save_model(tmp_path / "odd", tied=True, hidden_size=40, head_dim=16)
    with pytest.raises(ConfigError, match="a scale for 32, 16 columns, none of which divides 40"):
        make_shared(odd, tmp_path / "c", **FOUR_BITS)


@pytest.mark.parametrize("target", [Target.CUDA, Target.QDQ])
def test_a_table_of_4_bits_is_for_the_cpu(model: Path, tmp_path: Path, target: Target) -> None:
    source = make_shared(model, tmp_path / "c", static="all", **FOUR_BITS)
    with pytest.raises(UnsupportedModelError, match="the embedding has 4 bits, which --target"):
        make_export(source, tmp_path / "onnx", Kernel.AUTO, target)


def test_transformers_has_no_such_table(model: Path, tmp_path: Path) -> None:
    source = make_shared(model, tmp_path / "c", rotate="none")
    with pytest.raises(ConfigError, match=r"share a table of integers.*without --share-table"):
        export_compressed(source, tmp_path / "out")
