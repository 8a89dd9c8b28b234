from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rolora.activation import quantize_activation, rounded_activation
from rolora.affine import activation_range
from rolora.linear import InputQuantizedLinear, QuantizedLinear
from rolora.scheme import FLOAT_INPUT, UNQUANTIZED_BITS, ActivationSpec, Granularity, WeightSpec

TOKEN, TENSOR, GROUP = Granularity.TOKEN, Granularity.TENSOR, Granularity.GROUP
EPS = torch.finfo(torch.float32).eps


def draw(rows: int = 9, columns: int = 32, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + shift


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from((4, 6, 8)),
    st.sampled_from((TOKEN, GROUP)),
    st.floats(-30.0, 30.0),
    st.integers(0, 2**16),
)
def test_with_a_zero_point_no_value_is_off_by_more_than_half_a_step(
    bits: int, granularity: Granularity, shift: float, seed: int
) -> None:
    x = draw(shift=shift, seed=seed)
    x[0] = 0.0
    group = 8 if granularity is GROUP else None
    found = quantize_activation(
        x, ActivationSpec(bits, granularity, group_size=group, symmetric=False), None
    )
    low, high = activation_range(bits)
    assert found.zero_point is not None
    assert int(found.zero_point.min()) >= low
    assert int(found.zero_point.max()) <= high
    wide = found.scale.expand(len(x), -1, -1).reshape(len(x), -1) if group else found.scale
    step = wide.repeat_interleave(x.shape[1] // wide.shape[1], dim=1)
    # z itself is rounded, which moves the ends of the range by up to half a step.
    assert ((found.dequantize() - x).abs() <= step * (1.0 + 300 * EPS)).all()
    inside = (found.q > low) & (found.q < high)
    assert ((found.dequantize() - x).abs()[inside] <= step[inside] * (0.5 + 300 * EPS)).all()
    assert torch.equal(found.dequantize()[0], x[0])


def test_zero_points_halve_the_step_of_values_of_one_sign() -> None:
    x = draw().abs()
    symmetric, asymmetric = (
        quantize_activation(x, ActivationSpec(4, TOKEN, symmetric=same), None)
        for same in (True, False)
    )
    assert torch.allclose(asymmetric.scale * 15, symmetric.scale * 7)
    change = [(found.dequantize() - x).square().mean() for found in (symmetric, asymmetric)]
    assert change[1] < 0.4 * change[0]


def linear(activation: ActivationSpec, **options: Any) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(5)
    q = torch.randint(-8, 8, (6, 32), generator=generator, dtype=torch.int8)
    groups = options.get("weight_group")
    scale = torch.rand((6, 32 // groups) if groups else 6, generator=generator) + 0.01
    static = torch.tensor(0.05) if activation.granularity is TENSOR else None
    bias = torch.arange(6.0)
    return QuantizedLinear(q, scale, bias, WeightSpec(4, groups), activation, static)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(
    "granularity", [(TOKEN, None, True), (TOKEN, None, False), (GROUP, 8, True), (GROUP, 8, False)]
)
def test_the_product_is_that_of_the_dequantized_input_and_weight(
    bits: int, granularity: tuple[Granularity, int | None, bool]
) -> None:
    kind, group, symmetric = granularity
    module = linear(ActivationSpec(bits, kind, 0.9, group, symmetric=symmetric))
    x = draw(shift=1.5)
    found = module.quantize_input(x)
    expected = found.dequantize().double() @ module.dequantized_weight().double().t()
    expected = expected + module.bias
    assert torch.allclose(module(x).double(), expected, rtol=1e-5, atol=1e-4)
    # The control: without its zero point the product is far off.
    if not symmetric:
        assert found.zero_point is not None
        shifted = (
            found.dequantize()
            + (found.zero_point * found.scale)
            .expand(len(x), -1, -1)
            .repeat_interleave(8, dim=-1)
            .reshape(x.shape)
            if group
            else found.q * found.scale
        )
        wrong = shifted.double() @ module.dequantized_weight().double().t() + module.bias
        assert not torch.allclose(wrong, expected, rtol=1e-1)


def test_groups_keep_an_outlier_to_itself() -> None:
    x = draw()
    x[:, 3] = 100.0
    errors = []
    for spec in (ActivationSpec(4, TOKEN), ActivationSpec(4, GROUP, group_size=8)):
        errors.append((rounded_activation(x, spec, None) - x)[:, 8:].square().mean())
    assert errors[1] < 0.05 * errors[0]


def test_a_float_input_meets_the_weight_as_it_is() -> None:
    x = draw()
    for group in (None, 8):
        module = linear(FLOAT_INPUT, weight_group=group)
        expected = torch.nn.functional.linear(x, module.dequantized_weight(), module.bias)
        assert torch.equal(module(x[None])[0], expected)
    assert rounded_activation(x, FLOAT_INPUT, None) is x
    assert "input=float" in repr(module)


@pytest.mark.parametrize(
    "activation", [ActivationSpec(4, TENSOR), ActivationSpec(6, TOKEN, symmetric=False)]
)
def test_a_float_weight_meets_a_rounded_input(activation: ActivationSpec) -> None:
    weight, x = draw(6, seed=2), draw()
    static = torch.tensor(0.2) if activation.granularity is TENSOR else None
    module = InputQuantizedLinear(weight, None, activation, static)
    expected = rounded_activation(x, activation, static) @ weight.t()
    assert torch.equal(module(x), expected)
    assert not torch.allclose(module(x), x @ weight.t(), rtol=1e-3)
    assert module.weight_spec.bits == UNQUANTIZED_BITS
    with pytest.raises(ValueError, match="input scale"):
        InputQuantizedLinear(
            weight, None, activation, None if static is not None else torch.tensor(1.0)
        )
