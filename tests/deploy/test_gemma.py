"""Gemma: norms with an offset and behind the linears, a scaled embedding, capped scores."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from deploy.architecture import decoder_names
from deploy.checkpoint import Checkpoint
from deploy.conventions import conventions
from deploy.errors import UnsupportedModelError
from deploy.loading import load_model
from deploy.merge import Destination, MergeSettings, merge
from deploy.module_layout import ScaledEmbedding, save_in_own_layout, to_our_layout
from deploy.quantized_training import build_aware_model
from rolora.block_stream import BlockStream
from rolora.fold import fold_norm_gains, norm_gain, untie_head
from rolora.fuse import fuse_rotations
from rolora.kv_attention import use_codecs
from rolora.linear import QuantizedLinear
from rolora.online import install_online_rotations
from rolora.rotation import DEFAULT_ROTATIONS, RotationKind, RotationName, RotationPlan
from tests.conftest import build_tiny_model
from tests.deploy.tiny_artifacts import (
    finetune_settings,
    make_adapter,
    make_checkpoint,
    make_export,
    save_model,
)

IDS = torch.arange(30, 70)[None]
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 30.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 40} | CAPS,
    "gemma3_text": {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(family: str, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", family, tied=True, **FAMILIES[family])


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(IDS).logits
    return logits


def own_model(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_our_layout_computes_the_same_and_leaves_as_it_came(source: Path, tmp_path: Path) -> None:
    loaded = load_model(source)
    names = decoder_names(loaded.model.config)
    assert isinstance(loaded.model.get_input_embeddings(), ScaledEmbedding)
    table = loaded.model.get_parameter(f"{names.embedding}.weight")
    assert loaded.model.get_parameter(f"{names.head}.weight") is table
    assert loaded.model.get_input_embeddings().weight is table
    assert distance(logits_of(loaded.model), logits_of(own_model(source))) < 1e-6
    save_in_own_layout(loaded.model, tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_embedding_scale_is_rounded_as_transformers_rounds_it() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = build_tiny_model("gemma2").to(dtype)
        expected = model.get_input_embeddings()(IDS)
        to_our_layout(model)
        assert torch.equal(model.get_input_embeddings()(IDS), expected)


@pytest.mark.parametrize("kind", [RotationKind.HADAMARD, RotationKind.ORTHOGONAL])
def test_rotations_change_no_logit_and_a_gain_without_its_offset_does(
    family: str, kind: RotationKind
) -> None:
    model = build_tiny_model(family, tied=True, num_hidden_layers=2, **FAMILIES[family])
    to_our_layout(model)
    expected = logits_of(model)
    names = decoder_names(model.config)
    plan = RotationPlan.draw(names, DEFAULT_ROTATIONS, kind, 3)
    untie_head(model, names)
    fold_norm_gains(model, names)
    assert bool((norm_gain(model, names, names.blocks[0].mlp_norm) == 1).all())
    post = names.blocks[0].mlp_post_norm
    assert post is not None
    assert not bool((norm_gain(model, names, post) == 1).all())
    embedding = model.get_parameter(f"{names.embedding}.weight").clone()
    counts = fuse_rotations(model, names, plan)
    assert counts[RotationName.R1] == 2 * 5 + 1  # q, k, v, gate, up and the head: what reads
    assert torch.equal(model.get_parameter(f"{names.embedding}.weight"), embedding)
    unrotated = logits_of(model)
    install_online_rotations(model, plan, names)
    assert distance(logits_of(model), expected) < 1e-5
    assert distance(unrotated, expected) > 1e-2  # the control: half a rotation
    with torch.no_grad():
        model.get_parameter(f"{names.blocks[0].mlp_norm}.weight").fill_(1.0)
    assert distance(logits_of(model), expected) > 1e-2  # the control: a gain of 2


@pytest.mark.parametrize(
    ("scheme", "rotate", "options"),
    [
        ("W8A8", None, {}),
        ("W4A8", "none", {"weights": "rtn"}),
        ("W4A4", "r1", {"weights": "rtn", "kind": RotationKind.ORTHOGONAL}),
        ("FP32", "r2,r3,r4", {"kv_bits": 8}),
    ],
)
def test_every_scheme_is_exported_and_keeps_parity(
    source: Path, tmp_path: Path, scheme: str, rotate: str | None, options: dict[str, Any]
) -> None:
    checkpoint = make_checkpoint(source, tmp_path / "c", scheme, rotate=rotate, **options)
    report = make_export(checkpoint, tmp_path / "onnx").to_dict()
    assert report["operators"]["Gelu"] == 2
    if scheme == "W8A8":
        with Checkpoint(checkpoint) as opened:
            assert distance(logits_of(opened.load_model()), logits_of(own_model(source))) < 0.1


@pytest.mark.parametrize("method", ["lora", "reslora", "rolora"])
def test_an_adapter_is_trained_and_merged(source: Path, tmp_path: Path, method: str) -> None:
    adapter = make_adapter(source, tmp_path / "adapter", method)
    for to in Destination:
        merge(MergeSettings(str(source), adapter, to), tmp_path / f"out-{to}")
    merged = logits_of(own_model(tmp_path / "out-model"))
    assert distance(merged, logits_of(own_model(source))) > 1e-2
    plain = PeftModel.from_pretrained(own_model(source), tmp_path / "out-adapter")
    assert distance(logits_of(plain), merged) < 1e-5
    checkpoint = make_checkpoint(source, tmp_path / "c", "FP32", adapter=adapter)
    with Checkpoint(checkpoint) as opened:
        assert distance(logits_of(opened.load_model()), merged) < 1e-4


def test_capped_scores_are_those_of_transformers_in_the_attention_of_a_quantized_cache() -> None:
    model = build_tiny_model("gemma2", **FAMILIES["gemma2"])
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, :7] = 0
    inputs = {"input_ids": IDS.expand(2, -1), "attention_mask": mask}
    with torch.no_grad():
        expected = model(**inputs).logits
        ours = copy.deepcopy(model)
        use_codecs(ours)
        found = ours(**inputs).logits
        model.set_attn_implementation("eager")
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        uncapped = model(**inputs).logits
    for row, start in ((0, 0), (1, 7)):
        assert distance(found[row, start:], expected[row, start:]) < 1e-5
        assert distance(uncapped[row, start:], expected[row, start:]) > 1e-3


WINDOWS = FAMILIES | {
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
}


@pytest.mark.parametrize("model_type", WINDOWS)
def test_calibration_walks_with_the_mask_and_rotary_embedding_of_each_layer(
    model_type: str,
) -> None:
    model = build_tiny_model(model_type, num_hidden_layers=2, **WINDOWS[model_type])
    to_our_layout(model)
    names = decoder_names(model.config)
    seen: list[Tensor] = []
    model.get_submodule(names.final_norm).register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        model(input_ids=IDS)
    stream = BlockStream(model, names, [{"input_ids": IDS}])
    alike = copy.deepcopy(stream)  # the control: all layers as the first
    first = next(iter(alike._arguments.values()))
    alike._arguments = dict.fromkeys(alike._arguments, first)
    for each in (stream, alike):
        for block in names.blocks:
            each.advance(block)
    assert torch.equal(stream.states[0], seen[0])
    assert distance(alike.states[0], seen[0]) > 1e-3


def test_training_in_the_rounding_refuses_capped_logits(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "gemma2", **FAMILIES["gemma2"])
    start = make_checkpoint(source, tmp_path / "c", "W8A8", rotate="none", weights="rtn")
    settings = finetune_settings(source, tmp_path / "rows.jsonl", "lora")
    with Checkpoint(start) as checkpoint:
        with pytest.raises(UnsupportedModelError, match="final_logit_softcapping"):
            build_aware_model(load_model(source), checkpoint, settings.adapter, [], seed=0)
        assert conventions(checkpoint.config).logit_cap == 30.0


def test_training_in_the_rounding_rotates_what_the_head_reads(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "gemma3_text", **FAMILIES["gemma3_text"])
    start = make_checkpoint(source, tmp_path / "c", "W8A8", weights="rtn")
    settings = finetune_settings(source, tmp_path / "rows.jsonl", "lora")
    with Checkpoint(start) as checkpoint, torch.no_grad():
        targets = list(checkpoint.names.linears())
        expected = logits_of(checkpoint.load_model())
        aware = build_aware_model(load_model(source), checkpoint, settings.adapter, targets, seed=0)
        assert isinstance(aware.head, QuantizedLinear)
        weight = aware.head.dequantized_weight()
        found = aware.peft_model(input_ids=IDS).logits @ weight.t()
        # Float sums and integer sums differ in the last place: one tie further on may fall
        # otherwise, and later tokens read that one.
        assert distance(found[:, :16], expected[:, :16]) < 1e-5
        assert distance(found, expected) < 0.05
        head = aware.peft_model.get_base_model().get_submodule(checkpoint.names.head)
        head._forward_pre_hooks.clear()
        assert distance(aware.peft_model(input_ids=IDS).logits @ weight.t(), expected) > 0.1


def test_gemma2_without_a_cap_is_converted_too(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "gemma2", attn_logit_softcapping=None)
    checkpoint = make_checkpoint(model, tmp_path / "checkpoint", "W8A8", weights="rtn")
    make_export(checkpoint, tmp_path / "onnx")  # with its parity check
