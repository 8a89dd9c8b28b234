"""Shortcuts in a rotated basis: which mean something, and how merged changes leave it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deploy.adapter_basis import draw_adapter_basis, to_original_basis, to_rotated_basis
from deploy.architecture import decoder_names
from deploy.module_layout import to_our_layout
from reslora.adapter import Adapter
from reslora.attach import attach_adapters
from reslora.config import AdapterConfig, Structure
from reslora.merge import MergeMethod, merge_adapter
from rolora.fold import fold_norm_gains, norm_gains, untie_head
from rolora.fuse import fuse_rotations, unrotate_factors
from rolora.kv_attention import use_codecs
from rolora.online import install_online_rotations
from rolora.rotation import RotationKind, RotationName, RotationPlan
from tests.conftest import build_tiny_model
from tests.rolora.conftest import DoubleNorm

IDS = torch.arange(20, 44)[None]
ALL = frozenset(RotationName)


def double_model(model_type: str = "llama", *, tied: bool = False) -> Any:
    """Return a tiny model that computes in float64 throughout; transformers' norms do not."""
    model = build_tiny_model(model_type, tied=tied).double()
    to_our_layout(model)
    if model.config._attn_implementation == "eager":  # its softmax is of float32
        use_codecs(model)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            eps = model.config.rms_norm_eps
            norm = DoubleNorm(module.weight.shape[0], eps, decoder_names(model.config).norm_offset)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def random_factors(model: Any, fqns: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for fqn in fqns:
        out, size = model.get_submodule(fqn).weight.shape
        factors[fqn] = (
            torch.randn(2, size, generator=generator, dtype=torch.float64) * size**-0.5,
            torch.randn(out, 2, generator=generator, dtype=torch.float64) * 0.3,
        )
    return factors


def attached_logits(model: Any, config: AdapterConfig, factors: Any, plan: Any = None) -> Tensor:
    attached: Any = attach_adapters(model, config, list(factors))
    with torch.no_grad():
        for fqn, (a, b) in factors.items():
            layer = attached.get_base_model().get_submodule(fqn)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
        if plan is not None:
            install_online_rotations(attached, plan, decoder_names(model.config))
        logits: Tensor = attached.eval()(IDS).logits
    return logits


def difference(structure: Structure, part: str, *, one_r2: bool) -> float:
    """Return how far a rotated adapted model is from the folded one with the factors it means."""
    model = double_model()
    names = decoder_names(model.config)
    untie_head(model, names)
    fold_norm_gains(model, names)
    rotated = copy.deepcopy(model)
    plan = RotationPlan.draw(names, ALL, RotationKind.ORTHOGONAL, 3, one_r2=one_r2)
    fuse_rotations(rotated, names, plan)
    fqns = [getattr(block, part) for block in names.blocks]
    factors = random_factors(model, fqns)
    meant = {fqn: unrotate_factors(a, b, fqn, plan, names) for fqn, (a, b) in factors.items()}
    config = AdapterConfig(rank=2, alpha=4, structure=structure)
    expected = attached_logits(model, config, meant)
    got = attached_logits(rotated, config, factors, plan)
    return float((got - expected).norm() / expected.norm())


PARTS = ("query", "key", "value", "output", "gate", "up", "down")
MIXED = {
    (Structure.BLOCK, "value"),
    (Structure.BLOCK, "output"),
    (Structure.INPUT, "output"),
}
"""What an R2 for each layer breaks, by the table in deploy/adapter_basis.py."""


@pytest.mark.parametrize("structure", list(Structure))
def test_with_one_r2_every_shortcut_means_the_same_in_every_basis(structure: Structure) -> None:
    for part in PARTS:
        assert difference(structure, part, one_r2=True) < 1e-10, part


@pytest.mark.parametrize("structure", list(Structure))
def test_an_r2_for_each_layer_mixes_bases_where_the_table_says_so(structure: Structure) -> None:
    for part in PARTS:
        mixed = difference(structure, part, one_r2=False)
        assert mixed > 1e-3 if (structure, part) in MIXED else mixed < 1e-10, (part, mixed)


@pytest.mark.parametrize("kind", list(RotationKind))
def test_a_shortcut_gets_one_r2_and_plain_lora_keeps_its_own(kind: RotationKind) -> None:
    names = decoder_names(build_tiny_model("llama").config)
    entry = "R2.signs" if kind is RotationKind.HADAMARD else "R2.matrix"

    def r2(config: AdapterConfig) -> Tensor:
        return draw_adapter_basis(names, config, kind, 0).content[entry]

    plain, linked = r2(AdapterConfig()), r2(AdapterConfig(structure=Structure.BLOCK))
    assert torch.equal(plain, RotationPlan.draw(names, ALL, kind, 0).content[entry])
    assert torch.equal(linked, linked[:1].expand_as(linked))
    assert not torch.equal(plain[0], plain[1])
    assert torch.equal(r2(AdapterConfig(structure=Structure.BLOCK, depth=0)), plain)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_adapter_leaves_its_basis_exactly(any_model_type: str, tied: bool) -> None:
    original = double_model(any_model_type, tied=tied)
    names = decoder_names(original.config)
    plan = RotationPlan.draw(names, ALL, RotationKind.HADAMARD, 5)
    rotated = copy.deepcopy(original)
    untie_head(rotated, names)
    fold_norm_gains(rotated, names)
    fuse_rotations(rotated, names, plan)
    factors = random_factors(original, list(names.linears()))
    adapter = Adapter(AdapterConfig(rank=2, alpha=3, rslora=True), factors)
    merge_adapter(rotated, adapter, MergeMethod.EXACT)
    install_online_rotations(rotated, plan, names)
    back = to_original_basis(adapter, plan, names, original)
    assert {fqn: a.shape for fqn, (a, _) in back.factors.items()} == {
        fqn: a.shape for fqn, (a, _) in factors.items()
    }
    merged, unfolded, wrong = (copy.deepcopy(original) for _ in range(3))
    merge_adapter(merged, back, MergeMethod.EXACT)
    # negative controls: the rotation alone, without the gains; and no conversion at all
    no_gains = {f: unrotate_factors(a, b, f, plan, names) for f, (a, b) in factors.items()}
    merge_adapter(unfolded, replace(adapter, factors=no_gains), MergeMethod.EXACT)
    merge_adapter(wrong, adapter, MergeMethod.EXACT)
    with torch.no_grad():
        expected = rotated(IDS).logits
        errors = [
            float((model(IDS).logits - expected).norm() / expected.norm())
            for model in (merged, unfolded, wrong)
        ]
    assert errors[0] < 1e-10
    assert min(errors[1:]) > 1e-2


def test_an_adapter_comes_back_from_a_rotated_basis_as_it_went_in(any_model_type: str) -> None:
    model = double_model(any_model_type)
    names = decoder_names(model.config)
    plan = RotationPlan.draw(names, ALL, RotationKind.ORTHOGONAL, 5)
    factors = random_factors(model, list(names.linears()))
    adapter = Adapter(AdapterConfig(rank=2), factors)
    rotated = to_rotated_basis(adapter, plan, names, norm_gains(model, names))
    back = to_original_basis(rotated, plan, names, model)
    for fqn, pair in factors.items():
        for found, moved, expected in zip(
            back.factors[fqn], rotated.factors[fqn], pair, strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
            assert moved.dtype == torch.float64
        assert not torch.allclose(rotated.factors[fqn][0], pair[0], atol=1e-3), fqn
    without_gains = to_rotated_basis(adapter, plan, names, {})
    block = names.blocks[1]
    assert not torch.allclose(without_gains.factors[block.up][0], rotated.factors[block.up][0])
    linked = Adapter(AdapterConfig(rank=2, structure=Structure.BLOCK), factors)
    with pytest.raises(ValueError, match="merge it first"):
        to_rotated_basis(linked, plan, names, {})


def test_what_cannot_leave_its_basis_is_refused(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    names = decoder_names(model.config)
    plan = RotationPlan.draw(names, ALL, RotationKind.HADAMARD, 0)
    block = names.blocks[1]
    factors = random_factors(model, [block.query, block.output])
    adapter = Adapter(AdapterConfig(rank=2), factors)
    with torch.no_grad():
        model.get_parameter(f"{block.attention_norm}.weight")[:2] = 0
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj: .* gain of 0 in 2 channels"):
        to_original_basis(adapter, plan, names, model)
    only_output = replace(adapter, factors={block.output: factors[block.output]})
    to_original_basis(only_output, plan, names, model)  # reads no norm
    factors[block.output][1].fill_(1e30)
    with pytest.raises(ValueError, match=r"o_proj: factors are not finite in torch.float16"):
        to_original_basis(only_output, plan, names, model, torch.float16)
    linked = Adapter(AdapterConfig(rank=2, structure=Structure.INPUT), factors)
    with pytest.raises(ValueError, match="merge it first"):
        to_original_basis(linked, plan, names, model)
