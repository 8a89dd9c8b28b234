"""The shortcut's arithmetic, in float64 on the layers themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from reslora.attach import attach_adapters
from reslora.config import AdapterConfig, Structure
from reslora.layers import BlockShortcutLinear
from tests.reslora.ladder import DOUBLE_EPS, RANK, attached_ladder


def layer_of(model: Any, index: int, kind: str) -> BlockShortcutLinear:
    layer = model.get_base_model().blocks[index][kind]
    assert isinstance(layer, BlockShortcutLinear)
    return layer


def paper_sum(model: Any, index: int, kind: str, depth: int, scaling: float) -> Tensor:
    """The paper's formula, term by term."""
    first = max(0, index - depth)
    layers = [layer_of(model, k, kind) for k in range(first, index + 1)]
    terms = [la.lora_B["default"].weight @ la.lora_A["default"].weight for la in layers]
    return scaling * torch.stack(terms).sum(0).detach()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_forward_is_the_papers_sum(depth: int) -> None:
    config = AdapterConfig(rank=RANK, alpha=5, structure=Structure.BLOCK, depth=depth)
    model, _ = attached_ladder(config)
    x = torch.randn(7, 11, dtype=torch.float64)
    layer = layer_of(model, 4, "up")
    delta = paper_sum(model, 4, "up", depth, config.scaling)
    expected = layer.get_base_layer()(x) + x @ delta.T
    magnitude = float((x.abs() @ delta.abs().T).max())
    bound = 4 * DOUBLE_EPS * 11 * RANK * (depth + 1) * magnitude
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=bound)
    # negative control: one term fewer is far outside the bound
    short = layer.get_base_layer()(x) + x @ paper_sum(model, 4, "up", depth - 1, config.scaling).T
    assert float((layer(x) - short).detach().abs().max()) > 1e6 * bound


def test_depth_zero_is_lora_to_the_bit() -> None:
    plain, _ = attached_ladder(AdapterConfig(rank=RANK))
    zero, _ = attached_ladder(AdapterConfig(rank=RANK, structure=Structure.BLOCK, depth=0))
    deep, _ = attached_ladder(AdapterConfig(rank=RANK, structure=Structure.BLOCK, depth=1))
    zero.load_state_dict(plain.state_dict())
    deep.load_state_dict(plain.state_dict())
    x = torch.randn(7, 11, dtype=torch.float64)
    assert torch.equal(zero(x), plain(x))
    assert not torch.equal(deep(x), plain(x))


def test_gradient_reaches_the_previous_block_past_its_own_layer() -> None:
    def gradient(depth: int) -> Tensor | None:
        config = AdapterConfig(rank=RANK, structure=Structure.BLOCK, depth=depth)
        model, _ = attached_ladder(config)
        x = torch.randn(7, 11, dtype=torch.float64)
        layer_of(model, 3, "up")(x).square().sum().backward()  # this layer alone
        grad: Tensor | None = layer_of(model, 2, "up").lora_A["default"].weight.grad
        return grad

    reached = gradient(1)
    assert reached is not None
    assert float(reached.abs().min()) > 0
    assert gradient(0) is None


def test_disabled_adapter_is_the_base_layer() -> None:
    model, original = attached_ladder(AdapterConfig(rank=RANK, structure=Structure.BLOCK))
    x = torch.randn(7, 11, dtype=torch.float64)
    with model.disable_adapter():
        assert torch.equal(model(x), original(x))
    assert not torch.equal(model(x), original(x))


def test_pefts_own_merge_and_unmerge_know_the_window() -> None:
    model, original = attached_ladder(AdapterConfig(rank=RANK, structure=Structure.BLOCK))
    x = torch.randn(7, 11, dtype=torch.float64)
    expected = model(x)
    layer = layer_of(model, 4, "up")
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    torch.testing.assert_close(
        layer.get_base_layer().weight, original.blocks[4]["up"].weight, rtol=1e-10, atol=1e-10
    )


def test_state_dict_has_each_block_once() -> None:
    model, _ = attached_ladder(AdapterConfig(rank=RANK, structure=Structure.BLOCK))
    keys = [key for key in model.state_dict() if "lora_" in key]
    assert len(keys) == 2 * 10
    tensors = [p.data_ptr() for n, p in model.named_parameters() if "lora_" in n]
    assert len(set(tensors)) == len(keys)


def test_a_copied_model_is_linked_to_its_own_layers() -> None:
    model, _ = attached_ladder(AdapterConfig(rank=RANK, structure=Structure.BLOCK))
    twin = copy.deepcopy(model)
    x = torch.randn(7, 11, dtype=torch.float64)
    before = model(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(x), before)


def test_checkpointed_activations_keep_the_shortcut_gradient(
    llama: LlamaForCausalLM, targets: list[str]
) -> None:
    model = attach_adapters(llama, AdapterConfig(rank=RANK, structure=Structure.BLOCK), targets)
    ids = torch.arange(9)[None]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.train()
    expected = gradients()
    llama.activation_checkpointing_enable({"use_reentrant": False})
    recomputed = gradients()
    assert expected.keys() == recomputed.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-7)
