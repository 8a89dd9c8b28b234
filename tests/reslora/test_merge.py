from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from reslora.adapter import Adapter, load_adapter, save_adapter
from reslora.attach import attach_adapters
from reslora.config import AdapterConfig, Structure
from reslora.merge import MergeMethod, delta_weights, merge_adapter

DOUBLE_EPS = torch.finfo(torch.float64).eps


def trained(
    model: LlamaForCausalLM, targets: list[str], config: AdapterConfig, directory: Path
) -> tuple[PeftModel, Adapter]:
    attached = attach_adapters(model, config, targets)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_adapter(attached, config, directory)
    return attached, load_adapter(directory)


def captured(model: Any, fqns: list[str], ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each named linear, wrapped or not."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for fqn in fqns:

        def keep(_: Any, inputs: tuple[Tensor, ...], output: Tensor, fqn: str = fqn) -> None:
            seen[fqn] = (inputs[0].detach(), output.detach())

        handles.append(model.get_submodule(fqn).register_forward_hook(keep))
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


def test_a_change_is_reported_relative_to_the_weight_before(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    merged = copy.deepcopy(llama)
    _, adapter = trained(llama, targets, AdapterConfig(rank=3), tmp_path)
    before = {fqn: merged.get_submodule(fqn).weight.detach().clone() for fqn in targets}
    for layer in merge_adapter(merged, adapter, MergeMethod.EXACT).layers:
        weight = before[layer.fqn]
        change = float((merged.get_submodule(layer.fqn).weight.detach() - weight).norm())
        assert layer.delta_norm == pytest.approx(change, rel=1e-4)
        assert layer.relative_change == pytest.approx(change / float(weight.norm()), rel=1e-4)


@pytest.mark.parametrize("depth", [-1, 0, 2])
def test_merged_layers_compute_what_the_adapted_layers_computed(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path, depth: int
) -> None:
    llama = llama.double()
    merged = copy.deepcopy(llama)
    config = AdapterConfig(rank=3, alpha=7, structure=Structure.BLOCK, depth=depth)
    _, adapter = trained(llama, targets, config, tmp_path)
    adapted = captured(llama, targets, torch.arange(11)[None])
    merge_adapter(merged, adapter, MergeMethod.EXACT)
    smallest_margin = float("inf")
    for chain_last in targets[-3:]:
        x, expected = adapted[chain_last]
        linear = merged.get_submodule(chain_last)
        result = linear(x).detach()
        # fan-in x window x rank additions, each rounding at the size of the summands
        magnitude = float((x.abs() @ linear.weight.detach().abs().T).max()) + float(
            expected.abs().max()
        )
        bound = 4 * DOUBLE_EPS * (x.shape[-1] + 3 * 4) * magnitude
        torch.testing.assert_close(result, expected, rtol=0, atol=bound)
        # negative control: without the farthest block of the window
        window = 4 if depth < 0 else depth + 1
        kind = chain_last.split(".3.")[1]
        a, b = adapter.factors[f"model.layers.{4 - window}.{kind}"]
        wrong = result - config.scaling * (x @ a.T @ b.T)
        smallest_margin = min(smallest_margin, float((wrong - expected).abs().max()) / bound)
    assert smallest_margin > 1e6


def test_whole_model_agrees_after_the_merge(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    merged = copy.deepcopy(llama)
    config = AdapterConfig(rank=3, alpha=0.5, structure=Structure.BLOCK)
    attached, adapter = trained(llama, targets, config, tmp_path)
    ids = torch.arange(11)[None]
    before = merged(ids).logits
    report = merge_adapter(merged, adapter, MergeMethod.EXACT)
    expected = attached(ids).logits
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert float((before - expected).detach().abs().max()) > 1e-2
    blocks = {layer.fqn: layer.blocks for layer in report.layers}
    assert [blocks[f"model.layers.{i}.self_attn.q_proj"] for i in range(4)] == [1, 2, 3, 4]
    assert json.loads(json.dumps(report.to_dict()))["method"] == "exact"


def test_deltas_are_float64_and_rank_of_the_window(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    config = AdapterConfig(rank=2, structure=Structure.BLOCK, depth=1)
    _, adapter = trained(llama, targets, config, tmp_path)
    deltas = dict(delta_weights(adapter, MergeMethod.EXACT))
    assert deltas.keys() == set(targets)
    assert all(delta.dtype == torch.float64 for delta in deltas.values())
    ranks = [int(torch.linalg.matrix_rank(deltas[name])) for name in targets if "down" in name]
    assert ranks == [2, 4, 4, 4]


def test_low_precision_weights_are_rounded_once(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    merged = copy.deepcopy(llama).bfloat16()
    _, adapter = trained(llama, targets, AdapterConfig(rank=3), tmp_path)
    deltas = dict(delta_weights(adapter, MergeMethod.EXACT))
    before = merged.get_submodule(targets[0]).weight.detach().double()
    merge_adapter(merged, adapter, MergeMethod.EXACT)
    expected = (before + deltas[targets[0]]).bfloat16()
    assert torch.equal(merged.get_submodule(targets[0]).weight, expected)


def test_another_model_is_refused_and_left_alone(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    other = copy.deepcopy(llama)
    other.model.layers[3].mlp.down_proj = torch.nn.Linear(41, 24)
    before = copy.deepcopy(other.state_dict())
    _, adapter = trained(llama, targets, AdapterConfig(rank=3), tmp_path)
    match = r"layers.3.mlp.down_proj: .* \[24, 40\], .* \[24, 41\]; .* trained for another model"
    with pytest.raises(ValueError, match=match):
        merge_adapter(other, adapter, MergeMethod.EXACT)
    shallow = copy.deepcopy(other)
    del shallow.model.layers[3]
    with pytest.raises(ValueError, match=r"no such module; .* trained for another model"):
        merge_adapter(shallow, adapter, MergeMethod.EXACT)
    assert all(torch.equal(other.state_dict()[key], before[key]) for key in before)


def test_overflow_in_the_last_layer_leaves_the_first_alone(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    merged = copy.deepcopy(llama).half()
    before = copy.deepcopy(merged.state_dict())
    _, adapter = trained(llama, targets, AdapterConfig(rank=3), tmp_path)
    adapter.factors[targets[-1]][1].fill_(60000.0)
    with pytest.raises(ValueError, match=r"layers.3.mlp.down_proj: merged weight has NaN or inf"):
        merge_adapter(merged, adapter, MergeMethod.EXACT)
    assert all(torch.equal(merged.state_dict()[key], before[key]) for key in before)


def test_a_shared_weight_is_refused(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    merged = copy.deepcopy(llama)
    _, adapter = trained(llama, targets, AdapterConfig(rank=3), tmp_path)
    layers = merged.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    with pytest.raises(ValueError, match=r"shared with .*layers.1.self_attn.q_proj.weight"):
        merge_adapter(merged, adapter, MergeMethod.EXACT)


def test_exact_cannot_merge_an_input_shortcut() -> None:
    factors = {"l.0.q": (torch.ones(2, 4), torch.ones(4, 2))}
    adapter = Adapter(AdapterConfig(rank=2, structure=Structure.INPUT), factors)
    with pytest.raises(ValueError, match="'exact' cannot merge structure input"):
        delta_weights(adapter, MergeMethod.EXACT)


@pytest.mark.parametrize("structure", [None, Structure.BLOCK])
def test_merging_some_layers_at_a_time_is_merging_all(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path, structure: Structure | None
) -> None:
    whole, parted = copy.deepcopy(llama), copy.deepcopy(llama)
    config = AdapterConfig(rank=3, alpha=7, structure=structure)
    _, adapter = trained(llama, targets, config, tmp_path)
    before = {fqn: parted.get_submodule(fqn).weight.clone() for fqn in targets}
    expected = merge_adapter(whole, adapter, MergeMethod.EXACT)
    first, others = targets[:1], targets[1:]
    layers = merge_adapter(parted, adapter, MergeMethod.EXACT, only=first).layers
    assert [layer.fqn for layer in layers] == first
    assert all(torch.equal(parted.get_submodule(fqn).weight, before[fqn]) for fqn in others)
    layers += merge_adapter(parted, adapter, MergeMethod.EXACT, only=others).layers
    assert set(layers) == set(expected.layers)
    for fqn in targets:
        assert torch.equal(parted.get_submodule(fqn).weight, whole.get_submodule(fqn).weight)


def test_a_merge_that_looks_at_all_layers_is_not_done_in_parts(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    config = AdapterConfig(rank=3, alpha=7, structure=Structure.INPUT)
    bare = copy.deepcopy(llama)
    _, adapter = trained(llama, targets, config, tmp_path)
    for method in (MergeMethod.LEAST_SQUARES, MergeMethod.WEIGHT_NORM):
        with pytest.raises(ValueError, match="looks at all layers together"):
            merge_adapter(bare, adapter, method, only=targets)
