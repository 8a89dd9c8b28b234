from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

from rolora.decoder import DecoderNames
from rolora.fold import fold_norm_gains
from rolora.fuse import fuse_rotations
from rolora.kronecker import Rotation, factored_hadamard_rotation, hadamard_rotation, random_signs
from rolora.online import OnlineRotation, install_online_rotations
from rolora.rotation import RotationKind, RotationName, RotationPlan

MakeDecoder = Callable[..., Any]


def draw_rotation(left: int, right: int, seed: int = 0) -> Rotation:
    generator = torch.Generator().manual_seed(seed)
    signs = (random_signs(n, generator) for n in (left, right))
    return factored_hadamard_rotation(*signs)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 2, 12, 36]),
    st.sampled_from([1, 2, 4, 8, 28]),
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(0, 2**40),
)
def test_two_small_products_are_the_dense_one(
    left: int, right: int, leading: list[int], seed: int
) -> None:
    rotation = draw_rotation(left, right, seed)
    x = torch.randn(*leading, left * right, dtype=torch.float64)
    rotated = OnlineRotation(rotation, torch.float64)(x)
    bound = 8 * left * right * torch.finfo(torch.float64).eps * float(x.norm())
    torch.testing.assert_close(rotated, x @ rotation.dense(), rtol=0, atol=bound)


@pytest.mark.parametrize(("left", "right"), [(1, 8), (4, 2), (12, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_channels_are_rotated_alike(left: int, right: int, seed: int) -> None:
    rotation = draw_rotation(left, right, seed)  # a left factor of order 1 may be -1
    x = torch.randn(2, 3, 5 * rotation.size, dtype=torch.float64)
    expected = (x.unflatten(-1, (5, rotation.size)) @ rotation.dense()).flatten(-2)
    found = OnlineRotation(rotation, torch.float64)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.rotate(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_computes_in_float32_and_returns_the_inputs_dtype(dtype: torch.dtype) -> None:
    rotation = draw_rotation(12, 4)
    x = torch.randn(5, 48).to(dtype)
    rotated = OnlineRotation(rotation)(x)
    exact = x.double() @ rotation.dense()
    # float32 sums of 12 + 4 products of values below 4, then one rounding to the dtype.
    float32_error = 2 * 16 * torch.finfo(torch.float32).eps * 4 * 7
    tolerance = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    assert rotated.dtype == dtype
    torch.testing.assert_close(rotated.double(), exact, rtol=tolerance, atol=float32_error)


def test_gradients_flow_through() -> None:
    rotation = draw_rotation(12, 4)
    x = torch.randn(3, 48, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(OnlineRotation(rotation, torch.float64), (x,))


def test_matrices_are_neither_parameters_nor_saved() -> None:
    online = OnlineRotation(draw_rotation(12, 4))
    assert list(online.parameters()) == []
    assert online.state_dict() == {}


def test_signs_in_front_of_the_two_matrices_are_applied() -> None:
    rotation = hadamard_rotation(random_signs(48, torch.Generator().manual_seed(0)))
    x = torch.randn(3, 48, dtype=torch.float64)
    found = OnlineRotation(rotation, torch.float64)(x)
    torch.testing.assert_close(found, x @ rotation.dense())
    without = OnlineRotation(Rotation(rotation.left, rotation.right), torch.float64)(x)
    assert not torch.allclose(found, without)


@pytest.fixture(params=RotationKind)
def plan(request: pytest.FixtureRequest, names: DecoderNames) -> RotationPlan:
    return RotationPlan.draw(names, RotationName, request.param, seed=2)


def test_removing_the_handles_restores_the_model(
    make_decoder: MakeDecoder, plan: RotationPlan
) -> None:
    decoder = make_decoder("llama")
    before = decoder.logits()
    handles = install_online_rotations(decoder.model, plan, decoder.names)
    assert len(handles) == len(decoder.names.blocks)
    assert decoder.error_to(before) > 1e-3
    for handle in handles:
        handle.remove()
    assert torch.equal(decoder.logits(), before)


def test_nothing_is_installed_without_r4(make_decoder: MakeDecoder, names: DecoderNames) -> None:
    decoder = make_decoder("llama")
    kinds = [RotationName.R1, RotationName.R2]
    plan = RotationPlan.draw(names, kinds, RotationKind.HADAMARD, seed=2)
    assert install_online_rotations(decoder.model, plan, names) == []


# peft 0.21 asks transformers 5.23 for a property under its old name.
OLD_NAME_IN_PEFT = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def rotated_with_adapter(make_decoder: MakeDecoder, plan: RotationPlan) -> tuple[Any, Any]:
    decoder = make_decoder("llama")
    fold_norm_gains(decoder.model, decoder.names)
    fuse_rotations(decoder.model, decoder.names, plan)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["down_proj"], init_lora_weights=False)
    return decoder, config


@OLD_NAME_IN_PEFT
def test_base_and_adapter_both_see_the_rotated_input(
    make_decoder: MakeDecoder, plan: RotationPlan
) -> None:
    decoder, config = rotated_with_adapter(make_decoder, plan)
    peft_model = get_peft_model(decoder.model, config).double().eval()
    handles = install_online_rotations(peft_model, plan, decoder.names)
    unmerged = decoder.logits()
    for handle in handles:
        handle.remove()
    peft_model.merge_and_unload()
    install_online_rotations(decoder.model, plan, decoder.names)
    assert decoder.error_to(unmerged) < decoder.rounding


@OLD_NAME_IN_PEFT
def test_a_hook_under_the_adapter_would_be_noticed(
    make_decoder: MakeDecoder, plan: RotationPlan
) -> None:
    decoder, config = rotated_with_adapter(make_decoder, plan)
    install_online_rotations(decoder.model, plan, decoder.names)
    peft_model = get_peft_model(decoder.model, config).double().eval()
    base_alone = decoder.logits()
    with pytest.raises(ValueError, match=r"down_proj: .*already installed.*attach adapters"):
        install_online_rotations(peft_model, plan, decoder.names)
    peft_model.merge_and_unload()
    assert decoder.error_to(base_alone) > 1e-3


def test_a_second_installation_is_refused_and_adds_nothing(
    make_decoder: MakeDecoder, plan: RotationPlan
) -> None:
    decoder = make_decoder("llama")
    install_online_rotations(decoder.model, plan, decoder.names)
    before = decoder.logits()
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj: .*already installed"):
        install_online_rotations(decoder.model, plan, decoder.names)
    assert torch.equal(decoder.logits(), before)


def test_an_input_is_rotated_once_for_all_that_read_it(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    names = replace(
        decoder.names,
        blocks=tuple(
            replace(block, attention_post_norm="there is one") for block in decoder.names.blocks
        ),
    )
    plan = RotationPlan.draw(names, [RotationName.R1], RotationKind.HADAMARD, seed=1)
    install_online_rotations(decoder.model, plan, names)
    calls: list[Tensor] = []
    rotate = OnlineRotation.forward

    def counted(self: OnlineRotation, x: Tensor) -> Tensor:
        calls.append(x)
        return rotate(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineRotation, "forward", counted)
        first = decoder.logits()
        assert len(calls) == 2 * len(names.blocks) + 1  # q, k, v; gate, up; the head
        with torch.enable_grad():  # another graph, and no value of the pass before
            ids = torch.arange(11)[None]
            decoder.model(input_ids=ids).logits.sum().backward()
        assert len(calls) == 2 * (2 * len(names.blocks) + 1)
        block = names.blocks[0]
        linears = [decoder.model.get_submodule(fqn) for fqn in (block.query, block.key)]
        x = torch.randn(3, names.hidden_size, dtype=torch.float64)
        before = len(calls)
        for linear in linears:
            linear(x)  # the third reader does not come
        with torch.no_grad():
            other = linears[0](x.clone())
        assert len(calls) == before + 2
        torch.testing.assert_close(other, linears[0](x).detach())
        first_pass = linears[0](x)
        first_pass.sum().backward()
        with torch.no_grad():
            x += 1.0  # the module comes again: another pass, with other values
        linears[0](x).sum().backward()
        assert not torch.equal(linears[0](x), first_pass)
        again = pickle.loads(pickle.dumps(decoder.model))  # between two readers
        assert torch.equal(again(input_ids=ids).logits, decoder.model(input_ids=ids).logits)
    assert torch.equal(decoder.logits(), first)
