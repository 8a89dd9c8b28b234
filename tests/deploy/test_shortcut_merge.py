"""The middle stage on adapters whose shortcut can only be approximated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.adapter_artifact import open_adapter
from deploy.architecture import decoder_names
from deploy.artifact import verify_files
from deploy.calibration_text import calibration_batches
from deploy.checkpoint import Checkpoint
from deploy.errors import ConfigError
from deploy.finetune import Method, finetune
from deploy.loading import load_model
from deploy.rotate import rotate_model
from deploy.shortcut_merge import APPROXIMATIONS
from reslora.adapter import restore_adapter
from reslora.attach import attach_adapters
from reslora.config import Structure
from reslora.merge import MergeMethod
from reslora.merge_divergence import Divergence
from rolora.online import install_online_rotations
from tests.deploy.tiny_artifacts import (
    finetune_settings,
    make_adapter,
    make_checkpoint,
    save_model,
    write_rows,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("shortcut") / "tiny", num_hidden_layers=3)


@pytest.fixture(scope="module", params=[Structure.INPUT, Structure.MIDDLE])
def adapter(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Trained in a rotated basis, with online rotations, which the observation must include."""
    base = tmp_path_factory.mktemp("adapter")
    settings = finetune_settings(model, write_rows(base / "rows.jsonl"), Method.ROLORA)
    settings = replace(settings, adapter=replace(settings.adapter, structure=request.param))
    finetune(settings, base / "adapter")
    return base / "adapter"


def merge_details(checkpoint: Path) -> Any:
    return verify_files(checkpoint).details["merge"]


def test_the_error_of_every_layer_is_reported_and_fitting_beats_dropping(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    mean_errors = {}
    for method in (MergeMethod.LEAST_SQUARES, MergeMethod.WEIGHT_NORM, MergeMethod.DROP):
        checkpoint = make_checkpoint(
            model, tmp_path / method, "FP32", adapter=adapter, merge=method, windows=4
        )
        details = merge_details(checkpoint)
        assert details["method"] == method
        assert len(details["errors"]) == len(details["layers"]) == 3 * 7
        assert details["kl_mean"] > 0
        assert 0 <= details["top1_agreement"] <= 1
        assert "candidates" not in details
        mean_errors[method] = sum(e["branch_error"] for e in details["errors"]) / (3 * 7)
    assert 0 < mean_errors[MergeMethod.LEAST_SQUARES] < mean_errors[MergeMethod.DROP]


def test_the_figure_is_the_divergence_of_the_checkpoint_from_the_attached_model(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    method = MergeMethod.WEIGHT_NORM
    merged = make_checkpoint(
        model, tmp_path / "out", "FP32", adapter=adapter, merge=method, windows=4
    )
    loaded, stored = load_model(str(model)), open_adapter(adapter)
    names = decoder_names(loaded.model.config)
    assert stored.rotation is not None
    rotate_model(loaded, names, stored.rotation)
    attached = attach_adapters(loaded.model, stored.adapter.config, list(stored.adapter.factors))
    restore_adapter(attached, stored.directory)
    held_out = calibration_batches(loaded.tokenizer, None, windows=4, tokens=64)[-1]
    with Checkpoint(merged) as checkpoint, torch.no_grad():
        log_q = checkpoint.load_model()(**held_out).logits.double().log_softmax(dim=-1)
        without_rotation = attached.eval()(**held_out).logits.double().log_softmax(dim=-1)
        install_online_rotations(attached, stored.rotation, names)
        log_p = attached(**held_out).logits.double().log_softmax(dim=-1)

    def divergence(log_p: torch.Tensor) -> float:
        return float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())

    details = merge_details(merged)
    assert details["kl_mean"] == pytest.approx(divergence(log_p), rel=1e-2)
    assert details["kl_mean"] != pytest.approx(divergence(without_rotation), rel=1e-2)
    agreements = log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
    assert details["top1_agreement"] == pytest.approx(float(agreements.double().mean()))


def test_auto_takes_the_method_nearest_to_the_unmerged_model(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(
        model, tmp_path / "auto", "FP32", adapter=adapter, merge=None, windows=4
    )
    details = merge_details(checkpoint)
    figures = {name: found["kl_mean"] for name, found in details["candidates"].items()}
    assert set(figures) == set(APPROXIMATIONS)
    assert details["method"] == min(figures, key=lambda name: figures[name])
    assert details["kl_mean"] == figures[details["method"]] < max(figures.values())
    alone = make_checkpoint(
        *(model, tmp_path / "alone", "FP32"),
        adapter=adapter,
        merge=MergeMethod(details["method"]),
        windows=4,
    )
    for key in ("method", "kl_mean", "top1_agreement", "layers", "errors"):
        assert merge_details(alone)[key] == details[key]


@pytest.mark.parametrize("nearest", [APPROXIMATIONS[0], APPROXIMATIONS[2], APPROXIMATIONS[-1]])
def test_auto_goes_by_the_figures_and_not_by_an_order_of_methods(
    model: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nearest: MergeMethod,
) -> None:
    def measured(
        attached: object, stored: object, methods: tuple[MergeMethod, ...], *_: object
    ) -> dict[MergeMethod, Divergence]:
        # whoever goes by the agreement, or by the greatest KL, mostly takes another method
        return {
            method: Divergence(0.1 + abs(index - methods.index(nearest)), 0.1 * index)
            for index, method in enumerate(methods)
        }

    monkeypatch.setattr("deploy.shortcut_merge.merge_divergences", measured)
    checkpoint = make_checkpoint(
        model, tmp_path / "out", "FP32", adapter=adapter, merge=None, windows=4
    )
    assert merge_details(checkpoint)["method"] == nearest
    assert merge_details(checkpoint)["kl_mean"] == 0.1


@pytest.mark.parametrize("method", ["reslora", "lora"])
def test_auto_is_exact_where_that_is_possible(model: Path, tmp_path: Path, method: str) -> None:
    exact = make_adapter(model, tmp_path / "adapter", method)
    checkpoint = make_checkpoint(model, tmp_path / "out", "FP32", adapter=exact, merge=None)
    details = merge_details(checkpoint)
    assert details["method"] == MergeMethod.EXACT
    assert "kl_mean" not in details


def test_what_cannot_be_merged_says_what_to_do(model: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'exact' cannot merge .* use 'least-squares', or auto"):
        make_checkpoint(model, tmp_path / "out", "FP32", adapter=adapter)
    with pytest.raises(ConfigError, match="needs 2 windows of calibration text, got 1"):
        make_checkpoint(
            model, tmp_path / "out", "FP32", adapter=adapter, merge=MergeMethod.INPUT_NORM
        )
    assert not (tmp_path / "out").exists()
