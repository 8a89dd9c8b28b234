from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaForCausalLM

from reslora.attach import attach_adapters, attached_config, detach_adapters
from reslora.config import AdapterConfig, Initialization, Structure

BLOCK = AdapterConfig(rank=3, structure=Structure.BLOCK)


@pytest.mark.parametrize(
    "config",
    [AdapterConfig(rank=3), *(AdapterConfig(rank=3, structure=kind) for kind in Structure)],
)
def test_attaching_changes_no_output_and_trains_only_blocks(
    llama: LlamaForCausalLM, targets: list[str], config: AdapterConfig
) -> None:
    ids = torch.arange(9)[None]
    before = llama(ids).logits
    model = attach_adapters(llama, config, targets)
    assert torch.equal(model(ids).logits, before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(targets)
    assert all("lora_" in name for name in trained)
    assert attached_config(model) == config


@pytest.mark.parametrize("structure", [None, *Structure])
@pytest.mark.parametrize("name", list(Initialization))
def test_every_initialization_begins_at_zero(
    llama: LlamaForCausalLM, targets: list[str], structure: Structure | None, name: Initialization
) -> None:
    if (structure, name) == (Structure.MIDDLE, Initialization.ORTHOGONAL):
        return  # refused; the test below shows why
    ids, before = torch.arange(9)[None], llama.double()(torch.arange(9)[None]).logits
    config = AdapterConfig(rank=4, alpha=64, structure=structure, initialization=name)
    model = attach_adapters(llama, config, targets)
    assert attached_config(model).initialization is name
    with torch.no_grad():
        change = (model(ids).logits - before).norm() / before.norm()
    # peft draws in float32
    assert float(change) < (1e-5 if name is Initialization.ORTHOGONAL else 1e-300)
    zero = [not bool(p.any()) for key, p in model.named_parameters() if "lora_B" in key]
    assert all(zero) == (name is not Initialization.ORTHOGONAL)


def test_orthogonal_would_not_begin_at_zero_with_middle_shortcuts(
    llama: LlamaForCausalLM, targets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AdapterConfig(rank=4, alpha=64, structure=Structure.MIDDLE)
    monkeypatch.setattr(
        "reslora.attach.PEFT_INITIALIZATIONS", {Initialization.DEFAULT: "orthogonal"}
    )
    ids, before = torch.arange(9)[None], llama(torch.arange(9)[None]).logits
    model = attach_adapters(llama, config, targets)
    with torch.no_grad():
        assert float((model(ids).logits - before).norm() / before.norm()) > 1e-2


def test_the_default_and_gaussian_starts_differ(
    llama: LlamaForCausalLM, targets: list[str]
) -> None:
    spreads = {}
    for name in (Initialization.DEFAULT, Initialization.GAUSSIAN):
        config = AdapterConfig(rank=8, initialization=name)
        model = attach_adapters(copy.deepcopy(llama), config, targets)
        first = next(p for key, p in model.named_parameters() if "lora_A" in key)
        spreads[name] = float(first.detach().std())
    assert spreads[Initialization.GAUSSIAN] == pytest.approx(1 / 8, rel=0.2)
    assert spreads[Initialization.DEFAULT] == pytest.approx((1 / 24 / 3) ** 0.5, rel=0.2)


def test_exactly_the_targets_are_wrapped(llama: LlamaForCausalLM, targets: list[str]) -> None:
    # more than 20 names make peft look for common endings; it must not find too many
    attach_adapters(llama, BLOCK, targets[:-1])
    wrapped = [name for name, module in llama.named_modules() if isinstance(module, LoraLayer)]
    assert wrapped == targets[:-1]


def test_same_seed_same_start_and_the_global_generator_is_untouched(targets: list[str]) -> None:
    from_seed = []
    for seed in (1, 1, 2):
        model = nn.Module()
        model.config = {}
        model.layers = nn.ModuleList([nn.Linear(4, 4)])
        model.prepare_inputs_for_generation = None
        state = torch.get_rng_state()
        attached = attach_adapters(model, AdapterConfig(rank=2), ["layers.0"], seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        from_seed.append(attached.get_base_model().layers[0].lora_A["default"].weight)
    assert torch.equal(from_seed[0], from_seed[1])
    assert not torch.equal(from_seed[0], from_seed[2])


def test_detaching_restores_the_model(llama: LlamaForCausalLM, targets: list[str]) -> None:
    before = copy.deepcopy(llama.state_dict())
    model = attach_adapters(llama, BLOCK, targets)
    restored = detach_adapters(model)
    after = restored.state_dict()
    assert restored is llama
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    attach_adapters(llama, BLOCK, targets)  # and it can be attached again


def test_a_broken_chain_is_reported(
    llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = llama.model.layers[2].self_attn
    narrow.q_proj = nn.Linear(20, 24)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    with caplog.at_level(logging.WARNING):
        attach_adapters(llama, BLOCK, names)
    assert "model.layers.2.self_attn.q_proj has shape [24, 20]" in caplog.text
    assert llama.model.layers[1].self_attn.q_proj.lora_variant
    assert not narrow.q_proj.lora_variant


def test_bad_targets_are_refused(llama: LlamaForCausalLM, targets: list[str]) -> None:
    with pytest.raises(ValueError, match="no target modules"):
        attach_adapters(llama, BLOCK, [])
    with pytest.raises(ValueError, match=r"layers.9.q: the model has no such module"):
        attach_adapters(llama, BLOCK, ["layers.9.q"])
    with pytest.raises(ValueError, match=r"model.norm: expected nn.Linear, got LlamaRMSNorm"):
        attach_adapters(llama, BLOCK, ["model.norm"])
    attach_adapters(llama, BLOCK, targets)
    with pytest.raises(ValueError, match="already carries adapters"):
        attach_adapters(llama, BLOCK, targets)


def test_hooks_on_wrapped_layers_see_the_input_of_both_branches(
    llama: LlamaForCausalLM, targets: list[str]
) -> None:
    model = attach_adapters(llama, BLOCK, targets)
    layer = llama.model.layers[1].mlp.down_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    x = torch.randn(3, 40)
    expected = layer(2 * x)
    handle = layer.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    assert torch.equal(layer(x), expected)
    handle.remove()
    assert attached_config(model) == BLOCK
