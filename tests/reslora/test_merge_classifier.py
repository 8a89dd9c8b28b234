from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reslora.adapter import load_adapter, save_adapter
from reslora.attach import attach_adapters
from reslora.config import AdapterConfig, Structure
from reslora.merge import MergeMethod, merge_adapter
from reslora.merge_divergence import merge_divergences
from reslora.shortcut_statistics import collect_statistics
from tests.reslora.tiny_encoder import ENCODERS, build_encoder, encoder_batches, encoder_targets

METHODS = [method for method in MergeMethod if method is not MergeMethod.EXACT]


def predictions(model: torch.nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in batches])


def trained(structure: Structure, model_type: str = "bert", labels: int = 3, shift: float = 0.3):
    model = build_encoder(model_type, labels=labels).double()
    plain = copy.deepcopy(model)
    config = AdapterConfig(rank=3, structure=structure)
    attached = attach_adapters(model, config, encoder_targets(model), head="classifier")
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.add_(shift * torch.randn_like(parameter))
    return plain, attached.eval(), config


@pytest.mark.parametrize("structure", [Structure.INPUT, Structure.MIDDLE])
@pytest.mark.parametrize("model_type", ENCODERS)
def test_the_figures_are_those_of_the_merged_classifier(
    tmp_path: Path, structure: Structure, model_type: str
) -> None:
    plain, attached, config = trained(structure, model_type)
    save_adapter(attached, config, tmp_path)
    adapter = load_adapter(tmp_path)
    held_out = encoder_batches(2)
    statistics = collect_statistics(attached, encoder_batches(1))
    found = merge_divergences(attached, adapter, METHODS, held_out, statistics)
    log_p = predictions(attached, held_out).log_softmax(dim=-1)
    for method, figures in found.items():
        merged = copy.deepcopy(plain)
        merge_adapter(merged, adapter, method, statistics)
        log_q = predictions(merged, held_out).log_softmax(dim=-1)
        kl = float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())
        agreements = (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).double().mean()
        assert figures.kl_mean == pytest.approx(kl, rel=1e-8)
        assert figures.kl_mean > 1e-9
        assert figures.top1_agreement == pytest.approx(float(agreements))
    assert found[MergeMethod.LEAST_SQUARES].kl_mean < found[MergeMethod.DROP].kl_mean


def test_a_regression_is_measured_by_its_squared_difference(tmp_path: Path) -> None:
    plain, attached, config = trained(Structure.INPUT, labels=1)
    save_adapter(attached, config, tmp_path)
    adapter, held_out = load_adapter(tmp_path), encoder_batches(2)
    found = merge_divergences(attached, adapter, [MergeMethod.DROP], held_out)[MergeMethod.DROP]
    merge_adapter(plain, adapter, MergeMethod.DROP)
    difference = predictions(plain, held_out) - predictions(attached, held_out)
    assert found.kl_mean == pytest.approx(float(difference.square().mean()) / 2, rel=1e-8)
    assert found.kl_mean > 1e-9
    assert found.top1_agreement is None


def test_padding_takes_no_part_in_the_statistics() -> None:
    _, attached, _ = trained(Structure.INPUT)
    batches = encoder_batches(1)
    other = copy.deepcopy(batches)
    for batch in other:  # what lies under the mask is arbitrary
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])
    first, second = (collect_statistics(attached, each) for each in (batches, other))
    assert first.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    unmasked = collect_statistics(attached, [{"input_ids": b["input_ids"]} for b in batches])
    for fqn, layer in first.layers.items():
        same = second.layers[fqn]
        assert layer.mean_norm == pytest.approx(same.mean_norm, rel=1e-9)
        torch.testing.assert_close(layer.cross_moment, same.cross_moment)
        assert abs(unmasked.layers[fqn].mean_norm - layer.mean_norm) > 1e-3
