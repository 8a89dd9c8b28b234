from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from deploy.artifact import ArtifactKind, hash_file, read_manifest, verify_files
from deploy.encoder_checkpoint import EncoderCheckpoint
from deploy.encoder_export import export_encoder
from deploy.encoder_loading import load_encoder
from deploy.encoder_parity import parity_batch
from deploy.encoder_session import OnnxEncoder
from deploy.errors import ConfigError, ParityError, StageOrderError, UnsupportedModelError
from deploy.export import DATA_NAME, export_onnx
from deploy.kernels import Kernel
from deploy.language_model import open_language_model
from deploy.run import TextGenerator
from deploy.session import GRAPH_NAME
from deploy.targets import Target
from rolora.overrides import Override
from tests.deploy.tiny_artifacts import make_checkpoint, save_model
from tests.deploy.tiny_classifiers import save_encoder
from tests.deploy.tiny_encoder_artifacts import (
    make_encoder_checkpoint,
    make_encoder_export,
    put_fault_in_encoder_export,
)
from tests.reslora.tiny_encoder import ENCODERS, encoder_batches

FLOAT_ERROR = 2e-5
"""Float32 rounding over two blocks, of values near one."""


def padded_batches(seed: int, *, types: int) -> list[dict[str, torch.Tensor]]:
    """Return batches whose padding is on the right, on the left, and in the middle."""
    right, other = encoder_batches(seed)
    left = {key: tensor.flip(1) for key, tensor in other.items()}
    middle = {key: tensor.roll(3, 1) for key, tensor in other.items()}
    generator = torch.Generator().manual_seed(seed)
    batches = [right, left, middle]
    for batch in batches:
        shape = batch["input_ids"].shape
        batch["token_type_ids"] = torch.randint(0, types, shape, generator=generator)
    return batches


def torch_outputs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.inference_mode():
        found: Any = model(**batch)
    if "logits" in found:
        return np.asarray(found.logits)
    return np.asarray(found.last_hidden_state[batch["attention_mask"].bool()])


def onnx_outputs(encoder: OnnxEncoder, batch: dict[str, torch.Tensor]) -> np.ndarray:
    found = encoder.run({key: tensor.numpy() for key, tensor in batch.items()})
    if "logits" in found:
        return found["logits"]
    return found["last_hidden_state"][batch["attention_mask"].numpy().astype(bool)]


@pytest.mark.parametrize("target", [Target.CPU, Target.QDQ])
@pytest.mark.parametrize("with_head", [False, True], ids=["bare", "head"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {}),
        ("bert", {"type_vocab_size": 1, "hidden_act": "relu"}),
        ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
        ("roberta", {"pad_token_id": 1, "type_vocab_size": 1}),
        ("roberta", {}),
    ],
    ids=str,
)
def test_a_float_graph_computes_what_the_model_does(
    kind: str, options: dict[str, Any], with_head: bool, target: Target, tmp_path: Path
) -> None:
    model = save_encoder(tmp_path / kind, kind, with_head=with_head, **options)
    export = make_encoder_export(model, tmp_path / "onnx", "FP32", target=target)
    encoder, (loaded, labels) = OnnxEncoder(export, threads=1), load_encoder(model)
    assert (labels is not None) == with_head
    for batch in padded_batches(3, types=options.get("type_vocab_size", 2)):
        expected, found = torch_outputs(loaded.model, batch), onnx_outputs(encoder, batch)
        np.testing.assert_allclose(found, expected, atol=FLOAT_ERROR, rtol=FLOAT_ERROR)


SCHEMES: list[tuple[str, dict[str, Any]]] = [
    ("W8A8", {"weights": "gptq"}),
    ("W4A8", {}),
    ("W6A6", {"asymmetric": True}),
    ("W4A4", {"static": "all"}),
    ("W8A8", {"static": "yes", "embedding_bits": 4}),
    ("W4A8", {"group_size": 16, "embedding_bits": 32}),
    ("W4A16", {}),
    ("W4A8", {"overrides": (Override.parse("v=W8"), Override.parse("down=A16"))}),
]


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(("scheme", "options"), SCHEMES, ids=str)
def test_every_scheme_keeps_its_integers(
    kind: str, scheme: str, options: dict[str, Any], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    model = save_encoder(tmp_path / kind, kind, with_head=True, **sizes)
    options = dict(options)
    if options.get("static") == "yes":
        options["static"] = True
    export = make_encoder_export(model, tmp_path / "onnx", scheme, **options)
    parity: Any = read_manifest(export).checks["parity"]
    assert parity["exact_weights"] == 12
    assert parity["head_error"] < 1e-5
    assert parity["hidden_error"] <= parity["bound"] < 1.0
    operators: Any = read_manifest(export).details["operators"]
    assert operators["MultiHeadAttention"] == 2
    blocks = {"W4A16": 8, "W8A8": 0}.get(scheme, 0)
    if "group_size" in options:
        blocks = 8
    assert operators.get("MatMulNBits", 0) == (2 if "overrides" in options else blocks)


@pytest.mark.parametrize("target", [Target.CPU, Target.CPU_AVX2, Target.CPU_ARM64])
def test_every_target_has_the_same_integers(target: Target, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert", with_head=True)
    checkpoint = make_encoder_checkpoint(model, tmp_path / "checkpoint", "W8A8", static="all")
    export_encoder(checkpoint, tmp_path / "reference")
    report = export_encoder(checkpoint, tmp_path / "onnx", target)
    assert report.to_dict()["verified_on"]["target"] == target
    batch = padded_batches(4, types=2)[0]
    found = onnx_outputs(OnnxEncoder(tmp_path / "onnx"), batch)
    expected = onnx_outputs(OnnxEncoder(tmp_path / "reference"), batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


PORTABLE: list[tuple[str, dict[str, Any]]] = [
    ("W8A8", {"static": "all"}),
    ("W4A8", {"static": "all", "group_size": 16}),
    ("W4A16", {"embedding_bits": 32}),
    ("W4A8", {"static": "all", "overrides": (Override.parse("v=W8"),)}),
]


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(("scheme", "options"), PORTABLE, ids=str)
def test_a_portable_graph_is_made_of_standard_operators(
    kind: str, scheme: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = save_encoder(
        tmp_path / kind, kind, with_head=True, hidden_size=32, intermediate_size=48
    )
    made = make_encoder_export(model, tmp_path / "onnx", scheme, target=Target.QDQ, **options)
    graph = onnx.load(made / GRAPH_NAME)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 21)]
    onnx.checker.check_model(graph, full_check=True)
    parity = read_manifest(made).checks["parity"]
    assert parity["exact_weights"] == 2 * 6
    assert parity["hidden_error"] <= parity["bound"] < 0.2
    operators = [node.op_type for node in graph.graph.node]
    inputs = {"W4A16": 0}.get(scheme, 2 * 4)  # q, k and v, o, up, down: read one input each
    assert operators.count("QuantizeLinear") == inputs


def test_a_portable_encoder_needs_constant_scales(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert", hidden_size=32, intermediate_size=48)
    with pytest.raises(UnsupportedModelError, match=r"--target qdq needs .*--static all"):
        make_encoder_export(model, tmp_path / "a", "W8A8", target=Target.QDQ)
    with pytest.raises(UnsupportedModelError, match="quantize with --embedding-bits 8"):
        make_encoder_export(
            model, tmp_path / "b", "W8A8", target=Target.QDQ, static="all", embedding_bits=4
        )
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_padding_and_neighbours_change_nothing(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert", with_head=True)
    encoder = OnnxEncoder(make_encoder_export(model, tmp_path / "onnx", "W8A8"))
    batch = padded_batches(5, types=2)[0]
    together = onnx_outputs(encoder, batch)
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        alone = {key: tensor[row : row + 1, :length] for key, tensor in batch.items()}
        np.testing.assert_allclose(
            onnx_outputs(encoder, alone)[0], together[row], rtol=1e-4, atol=1e-4
        )
    unmasked = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
    moved = np.abs(onnx_outputs(encoder, unmasked) - together).max(axis=1)
    padded = batch["attention_mask"].sum(dim=1).numpy() < batch["attention_mask"].shape[1]
    assert (moved[padded] > 1e-3).all()


def test_equal_inputs_give_equal_files_and_the_manifest_says_what_they_are(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert", with_head=True)
    checkpoint = make_encoder_checkpoint(model, tmp_path / "checkpoint", "W4A8")
    reports = [export_encoder(checkpoint, tmp_path / name) for name in ("a", "b")]
    assert reports[0].manifest.digest == reports[1].manifest.digest
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files >= {GRAPH_NAME, DATA_NAME, "tokenizer.json", "config.json"}
    assert "model.safetensors" not in files
    for name in files:
        assert hash_file(tmp_path / "a" / name) == hash_file(tmp_path / "b" / name), name
    manifest = verify_files(tmp_path / "a")
    assert manifest.kind is ArtifactKind.ENCODER
    assert manifest.parents == {"checkpoint": read_manifest(checkpoint).digest}
    assert manifest.details["labels"] == ["LABEL_0", "LABEL_1"]
    assert manifest.details["context_length"] == 80
    operators: Any = manifest.details["operators"]
    assert operators["MatMulIntegerToFloat"] == 2 * 4, "qkv, o, up, down"
    assert operators["Add"] == 1, "token types; biases are inside of other nodes"
    graph = onnx.load(tmp_path / "a" / GRAPH_NAME, load_external_data=False).graph
    names = ["input_ids", "attention_mask", "token_type_ids"]
    assert [value.name for value in graph.input] == names
    assert [value.name for value in graph.output] == ["logits", "last_hidden_state"]
    again = export_encoder(checkpoint, tmp_path / "a")
    assert again.manifest == reports[0].manifest
    with pytest.raises(ConfigError, match="exists already and was made from other"):
        export_encoder(checkpoint, tmp_path / "a", Target.CPU_AVX2)


def test_models_without_token_types_take_none(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "roberta", "roberta", type_vocab_size=1)
    export = make_encoder_export(model, tmp_path / "onnx", "W8A8")
    graph = onnx.load(export / GRAPH_NAME, load_external_data=False).graph
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in graph.output] == ["last_hidden_state"]
    assert read_manifest(export).details.get("labels") is None


def test_parity_runs_padded_texts_of_both_types(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert")
    checkpoint = make_encoder_checkpoint(model, tmp_path / "checkpoint", "FP32")
    with EncoderCheckpoint(checkpoint) as opened:
        batch = parity_batch(opened)
        assert batch["input_ids"].max() < opened.config.vocab_size
        assert batch["input_ids"].shape[1] <= opened.token_limit
    lengths = batch["attention_mask"].sum(axis=1)
    assert len(lengths) == 8
    assert len(set(lengths)) > 1
    assert set(batch["token_type_ids"][batch["attention_mask"] == 1]) == {0, 1}


def change(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[..., None]:
    """Return a fault: an initializer that lies in the graph file is changed."""

    def fault(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor)), name))
                return
        raise AssertionError(f"no initializer {name}")

    return fault


def without_mask(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "MultiHeadAttention":
            del node.input[4:]


def with_attribute(operator: str, name: str, value: float | int) -> Callable[..., None]:
    def fault(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == operator:
                kept = [attribute for attribute in node.attribute if attribute.name != name]
                del node.attribute[:]
                node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return fault


def swapped_sum(model: onnx.ModelProto) -> None:
    """Drop the residual in front of one norm."""
    node = next(node for node in model.graph.node if "layer.1.output.LayerNorm/Sum" in node.name)
    node.input[0] = node.input[1]


LAYER = "bert.encoder.layer.1"
FAULTS: dict[str, Callable[..., None]] = {
    "bias": change(f"{LAYER}.attention.output.dense.bias", lambda a: np.where(a > 0.2, a * 1.1, a)),
    "norm gain": change(f"{LAYER}.output.LayerNorm.weight", lambda a: a * 1.01),
    "epsilon": with_attribute("LayerNormalization", "epsilon", 1e-2),
    "mask": without_mask,
    "scale of scores": with_attribute("MultiHeadAttention", "scale", 0.3),
    "heads": with_attribute("MultiHeadAttention", "num_heads", 2),
    "residual": swapped_sum,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_graph_is_found_and_nothing_written(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_encoder(tmp_path / "bert", with_head=True)
    put_fault_in_encoder_export(monkeypatch, FAULTS[fault])
    with pytest.raises(ParityError, match="last hidden states"):
        make_encoder_export(model, tmp_path / "onnx", "FP32")
    assert not (tmp_path / "onnx").exists()


def test_a_fault_of_the_head_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_encoder(tmp_path / "bert", with_head=True)
    put_fault_in_encoder_export(monkeypatch, change("classifier.bias", lambda a: a + 1e-3))
    with pytest.raises(ParityError, match="classification head departs"):
        make_encoder_export(model, tmp_path / "onnx", "W8A8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{LAYER}.attention.self.qkv.weight_scale", "scales are not the checkpoint's"),
        (f"{LAYER}.output.dense.weight", "integers are not the checkpoint's"),
        ("bert.embeddings.word_embeddings.weight", "embedding is not the checkpoint's"),
        ("bert.embeddings.word_embeddings.weight_scale", "embedding is not the checkpoint's"),
    ],
)
def test_a_changed_integer_or_scale_is_found(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_encoder(tmp_path / "bert", with_head=True)

    def edit(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed.reshape(-1)[7] += changed.dtype.type(1)
        return changed

    def inline(model: onnx.ModelProto) -> None:
        directory = next(tmp_path.glob(".onnx*"))
        onnx.load_external_data_for_model(model, str(directory))
        change(name, edit)(model)

    put_fault_in_encoder_export(monkeypatch, inline)
    with pytest.raises(ParityError, match=message):
        make_encoder_export(model, tmp_path / "onnx", "W8A8")
    assert not (tmp_path / "onnx").exists()


def test_targets_kernels_and_activations_that_encoders_lack_are_refused(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert")
    checkpoint = make_encoder_checkpoint(model, tmp_path / "checkpoint", "W8A8")
    for target, kernel in (
        (Target.CUDA, Kernel.AUTO),
        (Target.CPU, Kernel.NBITS),
    ):
        with pytest.raises(ConfigError, match="an encoder is one graph of integer products"):
            export_encoder(checkpoint, tmp_path / "onnx", target, kernel)
    float_weights = make_encoder_checkpoint(
        model, tmp_path / "w16", "W16A8", overrides=(Override.parse("q,k,v=W8"),)
    )
    with pytest.raises(UnsupportedModelError, match=r"attention.output.dense has a float weight"):
        export_encoder(float_weights, tmp_path / "onnx")
    silu = save_encoder(tmp_path / "silu", hidden_act="silu")
    with pytest.raises(UnsupportedModelError, match="hidden_act is 'silu'; an encoder is exported"):
        make_encoder_export(silu, tmp_path / "onnx", "W8A8")
    assert not (tmp_path / "onnx").exists()


def test_what_is_for_decoders_says_so(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert")
    export = make_encoder_export(model, tmp_path / "onnx", "W8A8")
    checkpoint = tmp_path / "onnx-checkpoint"
    with pytest.raises(StageOrderError, match="got kind onnx-encoder, which is for"):
        TextGenerator(export)
    with pytest.raises(StageOrderError, match="an encoder predicts no next token"):
        open_language_model(str(export))
    with pytest.raises(UnsupportedModelError, match="'bert' is an encoder"):
        open_language_model(str(checkpoint))
    with pytest.raises(UnsupportedModelError, match="'bert' is an encoder"):
        export_onnx(checkpoint, tmp_path / "other", Target.CPU)
    decoder = make_checkpoint(save_model(tmp_path / "llama"), tmp_path / "decoder", "FP32")
    with pytest.raises(UnsupportedModelError, match="'llama' is a decoder"):
        export_encoder(decoder, tmp_path / "other")
