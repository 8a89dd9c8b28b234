"""Every scheme and exception through checkpoint and export, on tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from deploy.artifact import MANIFEST_NAME
from deploy.checkpoint import Checkpoint
from deploy.checkpoint_settings import (
    CheckpointSettings,
    choose_recipe,
    parse_activation_clip,
    parse_static,
)
from deploy.errors import ConfigError, UnsupportedModelError
from deploy.export import DATA_NAME
from deploy.kernels import Kernel
from deploy.session import GRAPH_NAME, HEAD_NAME, PROMPT_NAME, TOKEN_NAME
from reslora.merge import MergeMethod
from rolora.linear import InputQuantizedLinear, QuantizedLinear
from rolora.mixed_precision import Budget
from rolora.overrides import Override
from tests.deploy.tiny_artifacts import make_checkpoint, make_export, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("schemes") / "model"
    return save_model(directory, "qwen2", hidden_size=64, intermediate_size=96)


def quantize(model: Path, output: Path, scheme: str, *texts: str, **options: Any) -> Path:
    overrides = tuple(Override.parse(text) for text in texts)
    return make_checkpoint(
        model, output, scheme, overrides=overrides, **{"weights": "rtn"} | options
    )


@pytest.mark.parametrize(
    ("scheme", "texts", "options"),
    [
        ("W4A4", ["down=A8", "v=W8", "layers.0.*=W8A8"], {}),
        ("W8A8", ["o=W4A4", "gate=W4", "k=W6"], {"static": False}),
        ("W4A4", ["o,down=A8"], {"asymmetric": True}),
        ("W8A8", [], {"asymmetric": True, "static": False}),
        ("W4A4", [], {"activation_clip": "auto", "static": "auto"}),
        ("W4A16", [], {}),
        ("W4A16", ["v=W16", "o=W8A8"], {"group_size": 32}),
        ("W6A16", ["down=A6"], {}),
        ("W8A8", [], {"activation_group_size": 32}),
        ("W16A16", ["q,k,v=W8A8", "head=W8A8"], {}),
        ("W8A8", ["head=A16", "down=W16A16"], {}),
        ("W4A8", [], {"embedding_bits": 4, "head_bits": 4}),
        ("W8A8", [], {"embedding_bits": 4, "weights": "gptq"}),
    ],
)
def test_the_graph_computes_what_the_checkpoint_does(
    model: Path, tmp_path: Path, scheme: str, texts: list[str], options: dict[str, Any]
) -> None:
    checkpoint = quantize(model, tmp_path / "checkpoint", scheme, *texts, **options)
    report = make_export(checkpoint, tmp_path / "onnx")
    parity = report.to_dict()["parity"]
    assert parity["prefill_error"] <= parity["bound"]
    with Checkpoint(checkpoint) as opened:
        stored = [opened.linear(fqn) for fqn in opened.names.linears()]
    assert parity["exact_weights"] >= sum(one.activation is not None for one in stored)


@pytest.mark.parametrize(
    ("scheme", "texts", "options", "graphs"),
    [
        ("W8A8", ["head=A16"], {}, {GRAPH_NAME, HEAD_NAME}),
        ("W4A8", ["down=W8", "v=W8"], {}, {TOKEN_NAME, PROMPT_NAME, HEAD_NAME}),
        ("W8A8", [], {"asymmetric": True, "static": False}, {GRAPH_NAME, HEAD_NAME}),
        ("W8A8", [], {"head_bits": 4}, {GRAPH_NAME, HEAD_NAME}),
        ("W4A8", [], {"activation_group_size": 32}, {GRAPH_NAME, HEAD_NAME}),
    ],
)
def test_exceptions_leave_the_choice_of_graphs_alone(
    model: Path,
    tmp_path: Path,
    scheme: str,
    texts: list[str],
    options: dict[str, Any],
    graphs: set[str],
) -> None:
    checkpoint = quantize(model, tmp_path / "checkpoint", scheme, *texts, **options)
    make_export(checkpoint, tmp_path / "onnx", Kernel.AUTO)
    assert {path.name for path in (tmp_path / "onnx").glob("*.onnx")} == graphs
    assert (tmp_path / "onnx" / DATA_NAME).is_file()


def test_float_inputs_are_multiplied_in_float(model: Path, tmp_path: Path) -> None:
    for kernel in (Kernel.INTEGER, Kernel.NBITS):
        checkpoint = quantize(model, tmp_path / f"{kernel}", "W4A16", "down=A8")
        make_export(checkpoint, tmp_path / f"{kernel}-onnx", kernel)
        graph = onnx.load(tmp_path / f"{kernel}-onnx" / GRAPH_NAME, load_external_data=False).graph
        levels = {
            node.name: attribute.i
            for node in graph.node
            for attribute in node.attribute
            if attribute.name == "accuracy_level"
        }
        # Block sizes of kernels with 8-bit inputs are for level 4 alone.
        eight = {name for name in levels if "down_proj" in name}
        assert {levels[name] for name in eight} == ({4} if kernel is Kernel.NBITS else set())
        assert {levels[name] for name in levels.keys() - eight} == {1}


@pytest.mark.parametrize(
    ("scheme", "texts", "options", "said"),
    [
        ("W16A8", [], {}, "a float weight with an input of 8 bits per tensor"),
        ("W4A4", ["down=W16A8"], {}, "down_proj has a float weight with an input of 8 bits"),
        ("W4A4", [], {"activation_group_size": 32}, "an input of 4 bits per group"),
        (
            "W8A8",
            [],
            {"activation_group_size": 32, "asymmetric": True},
            "an input of 8 bits per group, asymmetric",
        ),
    ],
)
def test_what_torch_alone_computes_is_not_exported(
    model: Path, tmp_path: Path, scheme: str, texts: list[str], options: Any, said: str
) -> None:
    checkpoint = quantize(model, tmp_path / "checkpoint", scheme, *texts, **options)
    with Checkpoint(checkpoint) as opened, torch.inference_mode():
        rebuilt = opened.load_model()
        assert rebuilt(torch.arange(9)[None]).logits.isfinite().all()
        names = opened.names
    kinds = {type(rebuilt.get_submodule(fqn)) for fqn in names.linears()}
    assert kinds <= {QuantizedLinear, InputQuantizedLinear}
    with pytest.raises(UnsupportedModelError, match=f"{said}.*what exports: weights of 4, 6 or 8"):
        make_export(checkpoint, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_manifest_from_before_zero_points_still_loads(model: Path, tmp_path: Path) -> None:
    for name, options in (("plain", {}), ("grouped", {"group_size": 32})):
        checkpoint = quantize(model, tmp_path / name, "W4A8", **options)
        old = shutil.copytree(checkpoint, tmp_path / f"{name}-old")
        manifest = json.loads((old / MANIFEST_NAME).read_text(encoding="utf-8"))
        for raw in manifest["details"]["linears"].values():
            del raw["activation_group_size"], raw["activation_symmetric"]
        (old / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")
        with Checkpoint(checkpoint) as new, Checkpoint(old, verify=False) as opened:
            for fqn in (*new.names.linears(), new.names.head):
                assert opened.linear(fqn) == new.linear(fqn)


def test_the_manifest_says_what_was_chosen_and_why(model: Path, tmp_path: Path) -> None:
    output = quantize(
        model, tmp_path / "checkpoint", "W4A4", budget=Budget.parse("W5A6"), activation_clip="auto"
    )
    with Checkpoint(output) as checkpoint:
        choices: Any = checkpoint.manifest.details["choices"]
        linears = [checkpoint.linear(fqn) for fqn in checkpoint.names.linears()]
    sizes = [one.in_features * one.out_features for one in linears]
    for bits, most in (
        ([one.weight.bits for one in linears], 5),
        ([one.activation.bits for one in linears if one.activation], 6),
    ):
        assert set(bits) == {4, 8}
        assert sum(b * size for b, size in zip(bits, sizes, strict=True)) <= most * sum(sizes)
    raised = [Override.parse(text) for text in choices["mixed_precision"]["raised"]]
    named = {fqn for override in raised if override.weight_bits for fqn in override.patterns}
    assert named == {one.fqn for one in linears if one.weight.bits == 8}
    assert len(choices["mixed_precision"]["sensitivities"]) == 14 + 8
    for study in choices["inputs"].values():
        errors = study["errors"]
        assert errors[f"clip {study['clip_ratio']:g}"] == min(errors.values())


@pytest.mark.parametrize(
    ("scheme", "options", "said"),
    [
        ("FP32", {"overrides": (Override(("down",), None, 8),)}, "FP32 quantizes nothing"),
        ("FP32", {"budget": Budget(5.0, None)}, "FP32 quantizes nothing"),
        ("W16A16", {}, "use FP32, or name"),
    ],
)
def test_settings_that_quantize_nothing_are_refused(scheme: str, options: Any, said: str) -> None:
    recipe = choose_recipe(scheme)
    with pytest.raises(ConfigError, match=said):
        CheckpointSettings("model", None, MergeMethod.EXACT, None, recipe, None, **options)


def test_an_override_that_cannot_be_followed_is_the_users_fault(
    model: Path, tmp_path: Path
) -> None:
    for text, said in (("nothing=A8", "matches no linear"), ("v=A8", "read the same input")):
        with pytest.raises(ConfigError, match=said):
            quantize(model, tmp_path / "out", "W4A4", text)
    with pytest.raises(ConfigError, match="leaves each input in float"):
        quantize(model, tmp_path / "out", "W4A16", budget=Budget.parse("A5"))
    assert not (tmp_path / "out").exists()


def test_choices_are_read_from_their_words() -> None:
    assert [parse_activation_clip(text) for text in (None, "auto", "0.9")] == [None, "auto", 0.9]
    assert [parse_static(text) for text in (None, "yes", "no", "auto")] == [
        None,
        True,
        False,
        "auto",
    ]
    with pytest.raises(ConfigError, match="expected auto or a number"):
        parse_activation_clip("best")
    with pytest.raises(ConfigError, match="expected one of yes, no, auto"):
        parse_static("maybe")
