from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rolora.activation import rounded_activation
from rolora.calibrated_plan import calibrate_plan
from rolora.mixed_precision import RAISED_BITS, Budget, spend
from rolora.overrides import Override
from rolora.scheme import ActivationSpec, Granularity, QuantizationRecipe, Scheme
from rolora.sensitivity import Part, Sensitivity

MakeDecoder = Callable[..., Any]
BATCHES: list[Mapping[str, Tensor]] = [
    {"input_ids": (torch.arange(26) * step % 53).reshape(2, 13)} for step in (3, 7, 11)
]
units = st.builds(
    Sensitivity,
    st.uuids().map(str),
    st.just(Part.WEIGHT),
    st.sampled_from((4, 6)),
    st.floats(0.0, 10.0),
    st.floats(0.0, 1.0),
    st.integers(1, 1000),
)


@pytest.mark.parametrize("text", ["W4.5", "A5", "w4.5a8", " W4A4 ", "A4.000001"])
def test_a_budget_reads_back(text: str) -> None:
    budget = Budget.parse(text)
    assert Budget.parse(str(budget)) == budget
    assert Budget.parse("w4.5A5") == Budget(4.5, 5.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected average bits such as"),
        ("4.5", "expected average bits such as"),
        ("A5W4", "expected average bits such as"),
        ("W4.5 A5", "expected average bits such as"),
        ("Wnan", "expected average bits such as"),
        ("W3.9", "averages of 4 to 8 bits, got 3.9"),
        ("W4A8.1", "averages of 4 to 8 bits, got 8.1"),
    ],
)
def test_what_is_no_budget_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Budget.parse(text)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(units, min_size=1, max_size=20, unique_by=lambda unit: unit.fqn),
    st.lists(st.tuples(st.sampled_from((4, 8)), st.integers(1, 1000)), max_size=4),
    st.floats(4.0, 8.0),
)
def test_a_budget_is_kept_and_nothing_that_fits_is_left(
    given_units: list[Sensitivity], fixed: list[tuple[int, int]], average: float
) -> None:
    total = sum(unit.multiplications for unit in given_units) + sum(n for _, n in fixed)
    start = sum(unit.bits * unit.multiplications for unit in given_units)
    start += sum(bits * n for bits, n in fixed)
    if round(average * total) < start:
        with pytest.raises(ValueError, match="expected a budget of at least that"):
            spend(given_units, average, fixed)
        return
    chosen = spend(given_units, average, fixed)
    used = start + sum((RAISED_BITS - u.bits) * u.multiplications for u in chosen)
    assert used <= round(average * total)
    assert all(unit.harm > unit.raised_harm for unit in chosen)
    for unit in given_units:
        if unit not in chosen and unit.harm > unit.raised_harm:
            cost = (RAISED_BITS - unit.bits) * unit.multiplications
            assert used + cost > round(average * total)


def test_the_most_harmful_per_bit_comes_first() -> None:
    a, b, c = (
        Sensitivity(name, Part.INPUT, 4, harm, 0.0, size)
        for name, harm, size in (("a", 1.0, 100), ("b", 0.5, 10), ("c", 0.1, 100))
    )
    assert spend([a, b, c], 8.0) == [b, a, c]
    assert spend([a, b, c], 6.1) == [b, a]
    assert spend([a, b, c], 4.0) == []


def mix(decoder: Any, budget: str, *texts: str, scheme: str = "W4A4") -> Any:
    recipe = QuantizationRecipe(Scheme.parse(scheme))
    overrides = [Override.parse(text) for text in texts]
    return calibrate_plan(
        decoder.model, decoder.names, recipe, BATCHES, overrides, Budget.parse(budget)
    )


@pytest.fixture
def decoder(make_decoder: MakeDecoder) -> Any:
    decoder = make_decoder("llama")
    decoder.model.float()
    return decoder


def test_harm_is_the_squared_first_order_change_of_the_loss_by_token(decoder: Any) -> None:
    model, names = decoder.model, decoder.names
    harm = {unit.fqn: unit.harm for unit in mix(decoder, "A8").sensitivities}
    assert len(harm) == 4 * len(names.blocks)
    assert all(value > 0.0 for value in harm.values())
    for fqn in (names.blocks[0].down, names.blocks[2].output):
        inputs: list[Tensor] = []
        handle = model.get_submodule(fqn).register_forward_pre_hook(
            lambda _module, given, inputs=inputs: inputs.append(given[0])
        )
        total = tokens = 0.0
        for batch in BATCHES:
            ids = batch["input_ids"]
            logits = model(input_ids=ids).logits[:, :-1]
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
            (gradient,) = torch.autograd.grad(loss, inputs[-1])
            x = inputs[-1].detach().flatten(0, 1)
            change = rounded_activation(x, ActivationSpec(4, Granularity.TOKEN, 0.7), None) - x
            total += float((gradient.flatten(0, 1) * change).sum(dim=1).square().sum()) / 2
            tokens += ids[:, 1:].numel()
        handle.remove()
        assert harm[fqn] == pytest.approx(total / tokens, rel=1e-3)


def test_weights_are_measured_by_what_they_change(decoder: Any) -> None:
    found = mix(decoder, "W8")
    assert {unit.part for unit in found.sensitivities} == {Part.WEIGHT}
    assert len(found.sensitivities) == 7 * len(decoder.names.blocks)
    assert all(0.0 < unit.raised_harm < 0.01 * unit.harm for unit in found.sensitivities)
    blocks = [plan for plan in found.plans if plan.fqn != decoder.names.head]
    assert {plan.weight.bits for plan in blocks} == {8}
    assert {plan.activation.bits for plan in blocks} == {4}


def test_weights_keep_no_gradients_and_hooks_are_removed(decoder: Any) -> None:
    mix(decoder, "W5A5")
    assert all(parameter.grad is None for parameter in decoder.model.parameters())
    assert all(parameter.requires_grad for parameter in decoder.model.parameters())
    for module in decoder.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_what_the_user_set_stays_and_counts(decoder: Any) -> None:
    found = mix(decoder, "W5A6", "down=A8", "q=W4", "layers.1.self_attn.v_proj=W8")
    by_fqn = {plan.fqn: plan for plan in found.plans}
    model = decoder.model
    sizes = {
        fqn: module.weight.numel()
        for fqn, module in model.named_modules()
        if isinstance(module, nn.Linear) and fqn != decoder.names.head
    }
    total = sum(sizes.values())
    assert sum(by_fqn[fqn].weight.bits * size for fqn, size in sizes.items()) <= 5 * total
    assert sum(by_fqn[fqn].activation.bits * size for fqn, size in sizes.items()) <= 6 * total
    for block in decoder.names.blocks:
        assert by_fqn[block.down].activation.bits == 8
        assert by_fqn[block.query].weight.bits == 4
    assert by_fqn[decoder.names.blocks[1].value].weight.bits == 8
    assert found.raised


def test_a_budget_that_cannot_be_followed_is_refused(decoder: Any) -> None:
    with pytest.raises(ValueError, match="6 bits on average before any is raised"):
        mix(decoder, "W5", scheme="W6A6")
    with pytest.raises(ValueError, match="leaves each input in float"):
        mix(decoder, "A5", scheme="W4A16")
    recipe = QuantizationRecipe(Scheme(4, 4), static_after_norm=False)
    with pytest.raises(ValueError, match="calibration text of at least two tokens"):
        calibrate_plan(decoder.model, decoder.names, recipe, [], (), Budget(5.0, None))
