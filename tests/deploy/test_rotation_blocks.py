"""Rotations of blocks of channels through the stages, and where they are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from typer.testing import CliRunner

from cli import app
from deploy.artifact import read_manifest
from deploy.checkpoint import Checkpoint
from deploy.errors import ConfigError
from deploy.kernels import Kernel
from deploy.loading import load_model
from tests.conftest import MODEL_TYPES
from tests.deploy.tiny_artifacts import (
    finetune_settings,
    make_checkpoint,
    make_export,
    save_model,
    write_adapter,
    write_rows,
)

IDS = torch.arange(30, 70)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("blocks") / "tiny", tied=True)


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "gemma2"])
@pytest.mark.parametrize("equalize", ["none", "inner", "all"])
def test_a_float_checkpoint_on_blocks_computes_what_the_model_does(
    model_type: str, equalize: str, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", model_type)
    expected = logits(load_model(model).model)
    directory = make_checkpoint(
        model, tmp_path / "out", "FP32", equalize=equalize, rotation_block=8
    )
    with Checkpoint(directory) as checkpoint:
        assert checkpoint.r4 is not None
        assert checkpoint.r4.size == 8
        at_run_time = equalize == "all" or model_type.startswith("gemma")
        assert (checkpoint.online_r1 is not None) is at_run_time
        found = logits(checkpoint.load_model())
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("kernel", [Kernel.INTEGER, Kernel.NBITS])
@pytest.mark.parametrize("scheme", ["W8A8", "W4A4"])
def test_an_export_has_one_product_for_a_rotation(
    model: Path, scheme: str, kernel: Kernel, tmp_path: Path
) -> None:
    if kernel is Kernel.NBITS and scheme == "W4A4":
        pytest.skip("that kernel has inputs of 8 bits")
    directory = make_checkpoint(
        model, tmp_path / "out", scheme, equalize="all", rotation_block=8, weights="rtn"
    )
    make_export(directory, tmp_path / "onnx", kernel)  # with its parity check
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    names = [node.name for node in graph.node if node.op_type == "MatMul"]
    assert sum(name.endswith("/R1/right/MatMul") for name in names) == 2 * 2 + 1
    assert sum(name.endswith("/R4/right/MatMul") for name in names) == 2
    assert not any("/left/" in name for name in names)


def test_one_table_is_looked_up_through_blocks(model: Path, tmp_path: Path) -> None:
    directory = make_checkpoint(
        model, tmp_path / "out", "W4A8", shared_table=True, rotation_block=8, weights="rtn"
    )
    make_export(directory, tmp_path / "onnx", Kernel.AUTO)  # with its parity check
    graph = onnx.load(tmp_path / "onnx" / "prompt.onnx", load_external_data=False).graph
    assert sum(node.name.startswith("embedding/R1/") for node in graph.node) == 3


def test_an_adapter_can_be_trained_between_blocks(model: Path, tmp_path: Path) -> None:
    directory = make_checkpoint(
        model, tmp_path / "rotation", "FP32", equalize="all", rotation_block=8
    )
    data = write_rows(tmp_path / "rows.jsonl")
    settings = replace(finetune_settings(model, data, "rolora"), rotation=directory)
    adapter = write_adapter(settings, tmp_path / "adapter")
    again = make_checkpoint(model, tmp_path / "again", "W8A8", adapter=adapter, weights="rtn")
    digests = [read_manifest(path).details["rotation"]["digest"] for path in (directory, again)]
    assert digests[0] == digests[1]
    with pytest.raises(ConfigError, match="--rotation-block 8: the rotation is that of another"):
        make_checkpoint(model, tmp_path / "b", "W8A8", adapter=adapter, rotation_block=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotate": "none"}, "--rotation-block 8: no rotation acts at run time"),
        ({"rotate": "r1,r2"}, "--rotation-block 8: no rotation acts at run time"),
        ({"rotation_block": 7}, "--rotation-block: R4 in blocks: .* divides the .* got 7"),
        (
            {"rotation_block": 24, "equalize": "all"},
            "--rotation-block: R1 in blocks: .* divides the 32 channels, got 24",
        ),
        (
            {
                "rotation_block": 16,
                "rotate": "r1,r2",
                "equalize": "all",
                "model": {"hidden_size": 36},
            },
            "--rotation-block: R1 in blocks: .* divides the 36 channels, got 16",
        ),
        (
            {
                "rotation_block": 6,
                "rotate": "r1,r2",
                "equalize": "all",
                "model": {"hidden_size": 36},
            },
            "--rotation-block: .*no construction reaches order 6",
        ),
    ],
)
def test_blocks_that_nothing_can_act_on_are_refused(
    model: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    options = dict(options)
    if sizes := options.pop("model", None):
        model = save_model(tmp_path / "other", **sizes)
    with pytest.raises(ConfigError, match=message):
        make_checkpoint(model, tmp_path / "out", "W8A8", **{"rotation_block": 8, **options})
    assert not (tmp_path / "out").exists()


def test_the_command_line_takes_the_size(model: Path, tmp_path: Path) -> None:
    arguments = ["merge-rotate-quantize", "--model", str(model), "--scheme", "W8A8"]
    arguments += ["--rotation-block", "8", "--output", str(tmp_path / "o"), "--dry-run"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["rotation_block"] == 8
