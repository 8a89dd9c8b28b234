"""Checkpoints and exports of tiny encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import deploy.encoder_export
from deploy.checkpoint_settings import CheckpointSettings, RotationChoice, choose_recipe
from deploy.encoder_export import export_encoder
from deploy.encoder_parity import check_encoder_parity
from deploy.quantize_encoder import quantize_encoder
from deploy.session import GRAPH_NAME
from deploy.targets import Target
from reslora.merge import MergeMethod
from rolora.overrides import Override
from rolora.scheme import FLOAT_BITS

NOT_ROTATED = RotationChoice(frozenset())


def encoder_settings(
    model: Path | str,
    scheme: str,
    *,
    adapter: Path | None = None,
    merge: MergeMethod | None = MergeMethod.EXACT,
    calibration: str | None = None,
    overrides: tuple[Override, ...] = (),
    **recipe: Any,
) -> CheckpointSettings:
    """Return settings of the stage, with the defaults that the command line has for encoders."""
    return CheckpointSettings(
        model=str(model),
        adapter=adapter,
        merge=merge,
        rotation=NOT_ROTATED,
        recipe=choose_recipe(scheme, **{"weights": "rtn", "head_bits": FLOAT_BITS} | recipe),
        calibration=calibration,
        overrides=overrides,
    )


def make_encoder_checkpoint(model: Path | str, output: Path, scheme: str, **options: Any) -> Path:
    """Run merge-rotate-quantize."""
    quantize_encoder(encoder_settings(model, scheme, **options), output)
    return output


def make_encoder_export(
    model: Path | str, output: Path, scheme: str, target: Target = Target.CPU, **options: Any
) -> Path:
    """Run merge-rotate-quantize and export."""
    checkpoint = make_encoder_checkpoint(
        model, output.with_name(f"{output.name}-checkpoint"), scheme, **options
    )
    export_encoder(checkpoint, output, target)
    return output


def put_fault_in_encoder_export(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[onnx.ModelProto], None]
) -> None:
    """Let every export change its graph just before it is compared with the checkpoint."""

    def check_with_fault(checkpoint: Any, directory: Path, *others: Any) -> Any:
        graph = onnx.load(directory / GRAPH_NAME, load_external_data=False)
        fault(graph)
        (directory / GRAPH_NAME).write_bytes(graph.SerializeToString())
        return check_encoder_parity(checkpoint, directory, *others)

    monkeypatch.setattr(deploy.encoder_export, "check_encoder_parity", check_with_fault)
