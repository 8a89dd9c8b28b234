"""Tiny models taken through the real stages, small enough for ONNX Runtime's own limits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from peft import PeftModel

import deploy.export
import deploy.finetune
from deploy.checkpoint import Checkpoint
from deploy.checkpoint_settings import CheckpointSettings, choose_recipe, parse_rotation
from deploy.export import ExportReport, Target, export_onnx
from deploy.finetune import FinetuneSettings, Method, finetune
from deploy.kernels import GraphForm, Kernel
from deploy.merge_rotate_quantize import merge_rotate_quantize
from deploy.parity import ParityReport, check_parity
from reslora.config import AdapterConfig, Structure
from reslora.merge import MergeMethod
from reslora.settings import TrainSettings
from reslora.train_report import TrainReport
from reslora.training_data import TrainingData
from rolora.equalization import Equalized
from rolora.mixed_precision import Budget
from rolora.overrides import Override
from rolora.rotation import RotationKind
from tests.conftest import build_tiny_model, build_tiny_tokenizer

HEAD_DIM = 16
"""The least head size of ONNX Runtime's rotary embedding."""


def save_model(directory: Path, model_type: str = "llama", **options: Any) -> Path:
    """Save a tiny model with its tokenizer, as a user has them."""
    model = build_tiny_model(model_type, **{"head_dim": HEAD_DIM, "num_hidden_layers": 2} | options)
    model.save_pretrained(directory)
    build_tiny_tokenizer().save_pretrained(directory)
    return directory


def make_checkpoint(
    model: Path,
    output: Path,
    scheme: str,
    *,
    rotate: str | None = None,
    kind: RotationKind = RotationKind.HADAMARD,
    adapter: Path | None = None,
    merge: MergeMethod | None = MergeMethod.EXACT,
    windows: int = 1,
    overrides: tuple[Override, ...] = (),
    budget: Budget | None = None,
    kv_bits: int = 16,
    equalize: str | None = None,
    stored_rotation: Path | None = None,
    rotation_block: int | None = None,
    calibration: str | None = None,
    **recipe: Any,
) -> Path:
    """Run merge-rotate-quantize with little calibration."""
    rotation = parse_rotation(rotate, kind, 0, kv_bits)
    settings = CheckpointSettings(
        model=str(model),
        adapter=adapter,
        merge=merge,
        rotation=rotation,
        recipe=choose_recipe(scheme, **recipe),
        calibration=calibration,
        calibration_windows=windows,
        calibration_tokens=64,
        overrides=overrides,
        budget=budget,
        kv_bits=kv_bits,
        equalize=None if equalize is None else Equalized(equalize),
        stored_rotation=stored_rotation,
        rotation_block=rotation_block,
    )
    merge_rotate_quantize(settings, output)
    return output


def make_export(
    checkpoint: Path,
    output: Path,
    kernel: Kernel = Kernel.INTEGER,
    target: Target = Target.CPU,
) -> ExportReport:
    """Run export."""
    return export_onnx(checkpoint, output, target, kernel)


ROWS = [
    {"prompt": f"say {word}", "completion": f"{word} it is"}
    for word in ("red", "green", "blue", "black", "white", "grey")
]


def write_rows(path: Path) -> Path:
    """Write a few training rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def finetune_settings(model: Path, data: Path, method: str, **training: Any) -> FinetuneSettings:
    """Return settings of a training run of two quick steps."""
    structure = Structure.BLOCK if method == Method.RESLORA else None
    quick = {
        "max_steps": 2,
        "batch_size": 2,
        "gradient_accumulation": 1,
        "learning_rate": 5e-2,
        "warmup_ratio": 0.0,
        "max_tokens": 48,
    }
    return FinetuneSettings(
        model=str(model),
        data=str(data),
        method=Method(method),
        adapter=AdapterConfig(rank=2, alpha=2.0, structure=structure),
        targets="all",
        training=TrainSettings(**quick | training),
    )


def draw_factors(model: PeftModel, data: TrainingData, *_: Any, **__: Any) -> TrainReport:
    """Take the place of `train_adapter`, which needs seconds: B is drawn, A is as it began."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return TrainReport(
        steps=0,
        planned_steps=0,
        kept_step=0,
        best_step=None,
        resumed_from_step=0,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        train_rows=len(data.train),
        validation_rows=len(data.validation),
        loss=(),
        eval_loss=(),
        eval_metrics=(),
        seconds=0.0,
        tokens=0,
        tokens_per_s=0.0,
        peak_rss_bytes=0,
        peak_cuda_bytes=None,
    )


def write_adapter(settings: FinetuneSettings, output: Path) -> Path:
    """Run finetune, all of it but the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy.finetune, "train_adapter", draw_factors)
        finetune(settings, output)
    return output


def make_adapter(model: Path, output: Path, method: str) -> Path:
    """Run finetune without training on a few rows."""
    data = write_rows(output.with_name(f"{output.name}.jsonl"))
    return write_adapter(finetune_settings(model, data, method), output)


def attention_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the attention of every layer, in all its forms."""
    found = []
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            found.append(node)
        for attribute in node.attribute:
            found += attention_nodes(attribute.g)
    return found


def put_fault_in_export(
    monkeypatch: pytest.MonkeyPatch, file: str, fault: Callable[[onnx.ModelProto], None]
) -> None:
    """Let every export change a graph just before it is compared with the checkpoint."""

    def check_with_fault(
        checkpoint: Checkpoint, directory: Path, ids: np.ndarray, forms: Sequence[GraphForm]
    ) -> ParityReport:
        graph = onnx.load(directory / file, load_external_data=False)
        fault(graph)
        (directory / file).write_bytes(graph.SerializeToString())
        return check_parity(checkpoint, directory, ids, forms)

    monkeypatch.setattr(deploy.export, "check_parity", check_with_fault)
