"""Rounding in a basis without rotating weights: the numbers of the rotated model, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rolora.calibration import observe_inputs
from rolora.fold import fold_norm_gains, untie_head
from rolora.fuse import fuse_rotations
from rolora.layer_plan import plan_layers
from rolora.online import install_online_rotations
from rolora.rotated_inputs import Basis, RotatedInputs, fake_quantize_input
from rolora.rotation import DEFAULT_ROTATIONS, RotationKind, RotationName, RotationPlan
from rolora.scheme import ActivationSpec, Granularity, QuantizationRecipe, Scheme

MakeDecoder = Callable[..., Any]
IDS = torch.arange(44).reshape(4, 11) * 17 % 53
STATIC = QuantizationRecipe(Scheme(4, 4), activation_clip=0.9)
DYNAMIC = QuantizationRecipe(Scheme(4, 4), static_after_norm=False)
GROUPS = QuantizationRecipe(Scheme(4, 8), group_size=16)


def draw(decoder: Any, seed: int = 1) -> RotationPlan:
    untie_head(decoder.model, decoder.names)
    fold_norm_gains(decoder.model, decoder.names)
    decoder.model.requires_grad_(False)
    return RotationPlan.draw(decoder.names, DEFAULT_ROTATIONS, RotationKind.LEARNED, seed)


def rounded_logits(decoder: Any, inputs: RotatedInputs) -> Tensor:
    with torch.no_grad(), inputs.observed():
        decoder.model(input_ids=IDS)
    with inputs.rounded():
        logits = decoder.logits()
    assert isinstance(logits, Tensor)
    return logits


def rotated_and_rounded_logits(decoder: Any, plan: RotationPlan, recipe: Any) -> Tensor:
    """Return what the other way gives: rotate the weights, then round what each linear reads."""
    fuse_rotations(decoder.model, decoder.names, plan)
    install_online_rotations(decoder.model, plan, decoder.names)
    layers = plan_layers(decoder.names, recipe)
    static = {p.observed for p in layers if p.activation.granularity is Granularity.TENSOR}
    observers = observe_inputs(decoder.model, sorted(static), [{"input_ids": IDS}])
    for layer in layers:
        scale = None
        if layer.observed in observers:
            scale = observers[layer.observed].scale(layer.activation.bits)
        decoder.model.get_submodule(layer.fqn).register_forward_pre_hook(
            lambda _module, inputs, spec=layer.activation, scale=scale: (
                fake_quantize_input(inputs[0], spec, scale),
            )
        )
    logits = decoder.logits()
    assert isinstance(logits, Tensor)
    return logits


@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_rounding_in_a_basis_is_rounding_a_rotated_model(
    make_decoder: MakeDecoder, model_type: str, recipe: QuantizationRecipe
) -> None:
    decoder = make_decoder(model_type)
    exact = decoder.logits()
    plan = draw(decoder)
    other = draw(decoder, seed=2)
    inputs = RotatedInputs(decoder.model, decoder.names, recipe, Basis.of(plan))
    found = rounded_logits(decoder, inputs)
    inputs.basis = Basis.of(other)
    in_another_basis = rounded_logits(decoder, inputs)
    inputs.remove()
    assert decoder.error_to(exact) < decoder.rounding
    expected = rotated_and_rounded_logits(decoder, plan, recipe)
    # The scales come from histograms, whose bins a last bit can shift; nothing else differs.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(exact.abs().max()))
    assert float((in_another_basis - expected).norm() / expected.norm()) > 0.05
    assert float((exact - expected).norm() / expected.norm()) > 0.05


@pytest.mark.parametrize("sites", ["R1", "R2", "R4"])
def test_each_rotation_matters(make_decoder: MakeDecoder, sites: str) -> None:
    decoder = make_decoder("llama")
    ours, others = Basis.of(draw(decoder)), Basis.of(draw(decoder, seed=2))
    mixed = {
        "R1": Basis(others.r1, ours.r2, ours.r4),
        "R2": Basis(ours.r1, others.r2, ours.r4),
        "R4": Basis(ours.r1, ours.r2, others.r4),
    }[sites]
    inputs = RotatedInputs(decoder.model, decoder.names, DYNAMIC, ours)
    first = rounded_logits(decoder, inputs)
    inputs.basis = mixed
    assert float((rounded_logits(decoder, inputs) - first).norm() / first.norm()) > 0.01


def test_without_rounding_every_basis_is_the_float_model(
    make_decoder: MakeDecoder, model_type: str
) -> None:
    decoder = make_decoder(model_type)
    exact = decoder.logits()
    basis = Basis.of(draw(decoder))
    inputs = RotatedInputs(decoder.model, decoder.names, STATIC, basis, lambda x, *_: x)
    with torch.no_grad(), inputs.observed():
        decoder.model(input_ids=IDS)
    with inputs.rounded():
        assert decoder.error_to(exact) < decoder.rounding
        inputs.basis = Basis(1.01 * basis.r1, basis.r2, basis.r4)
        assert decoder.error_to(exact) > 1e-3
    assert decoder.error_to(exact) < decoder.rounding


def directional(decoder: Any, basis: Basis, inputs: RotatedInputs, step: float = 1e-6) -> Any:
    """Return for R1 and R2 the slope along a direction: by autograd, and by differences."""

    def loss(r1: Tensor, r2: Tensor) -> Tensor:
        inputs.basis = Basis(r1, r2, basis.r4)
        with inputs.rounded():
            logits: Tensor = decoder.model(input_ids=IDS).logits
        return logits.sin().mean()

    generator = torch.Generator().manual_seed(4)
    d1, d2 = (
        torch.randn(m.shape, dtype=torch.float64, generator=generator) for m in (basis.r1, basis.r2)
    )
    leaves = [m.clone().requires_grad_() for m in (basis.r1, basis.r2)]
    g1, g2 = torch.autograd.grad(loss(*leaves), leaves)
    with torch.no_grad():
        ends = [
            [loss(basis.r1 + s * d1, basis.r2), loss(basis.r1, basis.r2 + s * d2)]
            for s in (step, -step)
        ]
    measured = [float(plus - minus) / (2 * step) for plus, minus in zip(*ends, strict=True)]
    return [(float((g1 * d1).sum()), measured[0]), (float((g2 * d2).sum()), measured[1])]


def test_gradients_hold_up_to_differences_with_a_smooth_rounding(
    make_decoder: MakeDecoder, model_type: str
) -> None:
    decoder = make_decoder(model_type)
    basis = Basis.of(draw(decoder))
    # tanh of x by the token's maximum: smooth, no identity, and dependent on the whole token.
    inputs = RotatedInputs(
        decoder.model,
        decoder.names,
        DYNAMIC,
        basis,
        lambda x, *_: x.tanh() * x.square().mean(-1, keepdim=True).sqrt(),
    )
    for found, measured in directional(decoder, basis, inputs):
        assert found == pytest.approx(measured, rel=1e-5, abs=1e-10)
        assert abs(measured) > 1e-5


def test_gradients_of_every_scale_hold_up_to_differences_of_a_rounding_that_never_jumps() -> None:
    # With x a little off the middle of its step no integer changes: all that moves is the scale,
    # and the straight-through part is the part that differences do not see.
    x = torch.tensor([[3.1, -1.4, 0.7, 7.0]], dtype=torch.float64, requires_grad=True)
    spec = ActivationSpec(4, Granularity.TOKEN, 0.9)
    weights = torch.tensor([0.3, -0.8, 0.5, 0.4], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((fake_quantize_input(x, spec, None) * weights).sum(), x)
    step = torch.zeros_like(x)
    step[0, 3] = 1e-6
    with torch.no_grad():
        ends = [(fake_quantize_input(x + s * step, spec, None) * weights).sum() for s in (1, -1)]
    measured = float(ends[0] - ends[1]) / 2e-6
    # The maximum is clipped, so nothing passes straight through it; small entries pass on, minus
    # what their own scale's part takes: d scale = sum g (q - v).
    scale = 7.0 * 0.9 / 7
    v = x.detach()[0] / scale
    q = v.round().clamp(-8, 7)
    expected = float((weights * (q - torch.where(v.round() > 7, 0.0, v))).sum()) * 0.9 / 7
    assert float(gradient[0, 3]) == pytest.approx(expected)
    assert measured == pytest.approx(float((weights * q).sum()) * 0.9 / 7, rel=1e-6)
    torch.testing.assert_close(gradient[0, :3], weights[:3])


def test_the_rounding_lets_gradients_through_to_both(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    basis = Basis.of(draw(decoder))
    r1, r2 = basis.r1.clone().requires_grad_(), basis.r2.clone().requires_grad_()
    inputs = RotatedInputs(decoder.model, decoder.names, DYNAMIC, Basis(r1, r2, basis.r4))
    with inputs.rounded():
        loss = decoder.model(input_ids=IDS).logits.sin().mean()
    for matrices, gradient in zip((r1, r2), torch.autograd.grad(loss, (r1, r2)), strict=True):
        assert bool(gradient.isfinite().all())
        product = gradient @ matrices.detach().mT
        assert float((product - product.mT).norm(dim=(-2, -1)).min()) > 1e-6


@pytest.mark.parametrize(
    ("spec", "scale"),
    [
        (ActivationSpec(4, Granularity.TENSOR), 0.4),
        (ActivationSpec(4, Granularity.TOKEN, 0.9), None),
        (ActivationSpec(8, Granularity.GROUP, group_size=8), None),
    ],
    ids=lambda value: str(getattr(value, "granularity", value)),
)
def test_inputs_are_rounded_as_the_integer_linear_does(
    spec: ActivationSpec, scale: float | None
) -> None:
    from rolora.linear import QuantizedLinear
    from rolora.scheme import WeightSpec

    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(0)) * 2
    weight = WeightSpec(8, spec.group_size)
    linear = QuantizedLinear(
        torch.ones(2, 24, dtype=torch.int8),
        torch.ones(2) if spec.group_size is None else torch.ones(2, 3),
        None,
        weight,
        spec,
        None if scale is None else torch.tensor(scale),
    )
    expected = linear.quantize_input(x).dequantize()
    assert torch.equal(fake_quantize_input(x, spec, scale), expected)
    assert fake_quantize_input(x.bfloat16(), spec, scale).dtype == torch.float32


def test_groups_that_do_not_fit_name_the_place(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    inputs = RotatedInputs(decoder.model, decoder.names, GROUPS, Basis.of(draw(decoder)))
    said = r"layers.0.input_layernorm: group size 16 does not divide the 36 input"
    with inputs.rounded(), pytest.raises(ValueError, match=said):
        decoder.logits()


def test_static_scales_are_observed_first_and_once_for_each_norm(
    make_decoder: MakeDecoder,
) -> None:
    decoder = make_decoder("llama")
    inputs = RotatedInputs(decoder.model, decoder.names, STATIC, Basis.of(draw(decoder)))
    with (
        inputs.rounded(),
        pytest.raises(ValueError, match=r"layers.0.input_layernorm: its scale is"),
    ):
        decoder.logits()
    assert bool(decoder.logits().isfinite().all())  # the failed pass left nothing switched on
    with (
        inputs.observed(),
        pytest.raises(ValueError, match=r"layers.0.input_layernorm: .*NaN or infinite"),
    ):
        decoder.model(inputs_embeds=torch.full((1, 3, 36), torch.nan, dtype=torch.float64))


def test_a_plan_without_one_of_the_three_is_refused(make_decoder: MakeDecoder) -> None:
    names = make_decoder("llama").names
    plan = RotationPlan.draw(names, [RotationName.R1], RotationKind.LEARNED, 0)
    with pytest.raises(ValueError, match="expected R1, R2 and R4 in it, got R1"):
        Basis.of(plan)
