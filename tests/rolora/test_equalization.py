"""Channel scales: they change nothing, are the best there are, and belong to the basis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rolora.equalization import (
    FIELDS,
    Equalization,
    Equalized,
    Noise,
    equalize_model,
    louder_noise,
    scale_delta,
)
from rolora.equalization_walk import EqualizationWalk
from rolora.fold import fold_norm_gains, norm_gain, untie_head
from rolora.fuse import (
    fuse_rotations,
    rotate_delta,
    rotate_factors,
    unrotate_delta,
    unrotate_factors,
)
from rolora.online import install_online_rotations
from rolora.rotation import (
    DEFAULT_ROTATIONS,
    RotationKind,
    RotationName,
    RotationPlan,
)
from rolora.rotation_table import Side, applications
from rolora.scheme import QuantizationRecipe, Scheme, WeightMethod

MakeDecoder = Callable[..., Any]
NOTICED = 1e-3
IDS = [{"input_ids": torch.arange(22).reshape(2, 11) * 5 % 53}, {"input_ids": torch.tensor([[7]])}]


def random_scales(names: Any, seed: int = 3) -> Equalization:
    generator = torch.Generator().manual_seed(seed)
    layers, hidden = len(names.blocks), names.hidden_size

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).exp()

    return Equalization(
        attention=draw(layers, hidden),
        value=draw(layers, names.num_key_value_heads * names.head_dim),
        mlp=draw(layers, hidden),
        down=draw(layers, names.intermediate_size),
        head=draw(hidden),
    )


def scaled_plan(
    decoder: Any,
    rotations: Any = DEFAULT_ROTATIONS,
    *,
    kind: RotationKind = RotationKind.HADAMARD,
    inputs: Equalized = Equalized.ALL,
) -> RotationPlan:
    scales = random_scales(decoder.names)
    if inputs is Equalized.INNER:
        scales = Equalization(scales.value, scales.down)
    plan = RotationPlan.draw(decoder.names, rotations, kind, seed=1)
    return plan.with_equalization(scales)


def rewrite(decoder: Any, plan: RotationPlan) -> None:
    untie_head(decoder.model, decoder.names)
    fold_norm_gains(decoder.model, decoder.names)
    assert plan.equalization is not None
    equalize_model(decoder.model, decoder.names, plan.equalization)
    fuse_rotations(decoder.model, decoder.names, plan)


@pytest.mark.parametrize("kind", [RotationKind.HADAMARD, RotationKind.ORTHOGONAL])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rotations", [(), (RotationName.R4,), DEFAULT_ROTATIONS], ids=len)
def test_scales_and_rotations_change_nothing(
    make_decoder: MakeDecoder, model_type: str, tied: bool, kind: RotationKind, rotations: Any
) -> None:
    decoder = make_decoder(model_type, tied=tied)
    before, weights = decoder.logits(), decoder.weights()
    plan = scaled_plan(decoder, rotations, kind=kind)
    rewrite(decoder, plan)
    handles = install_online_rotations(decoder.model, plan, decoder.names)
    # Scales are 20 times apart and more: they enlarge the rounding of a weight by their spread.
    assert decoder.error_to(before) < 100 * decoder.rounding
    changed = decoder.weights()
    assert all(
        not torch.equal(changed[f"{fqn}.weight"], weights[f"{fqn}.weight"])
        for fqn in decoder.names.linears()
    )
    for handle in handles:
        handle.remove()
    assert bool(handles) == (decoder.error_to(before) > NOTICED)


def test_inner_scales_leave_r1_in_the_stream_and_change_nothing(
    make_decoder: MakeDecoder, model_type: str
) -> None:
    decoder = make_decoder(model_type)
    before = decoder.logits()
    unscaled = RotationPlan.draw(decoder.names, DEFAULT_ROTATIONS, RotationKind.HADAMARD, seed=1)
    plan = scaled_plan(decoder, inputs=Equalized.INNER)
    assert applications(plan, decoder.names) == applications(unscaled, decoder.names)
    untie_head(decoder.model, decoder.names)
    fold_norm_gains(decoder.model, decoder.names)
    folded = decoder.weights()
    assert plan.equalization is not None
    equalize_model(decoder.model, decoder.names, plan.equalization)
    changed = {
        key for key, weight in decoder.weights().items() if not torch.equal(weight, folded[key])
    }
    block = decoder.names.blocks[0]
    scaled = (block.value, block.output, block.up, block.down)
    assert {key for key in changed if key.startswith(f"{block.fqn}.")} >= {
        f"{fqn}.weight" for fqn in scaled
    }
    assert not {key for key in changed if not key.startswith(scaled) and f"{block.fqn}." in key}
    fuse_rotations(decoder.model, decoder.names, plan)
    install_online_rotations(decoder.model, plan, decoder.names)
    assert decoder.error_to(before) < 100 * decoder.rounding
    weight = decoder.model.get_parameter(f"{block.down}.weight")
    with torch.no_grad():
        weight *= 1.5
    assert decoder.error_to(before) > NOTICED


@pytest.mark.parametrize("name", FIELDS)
def test_scales_that_one_side_lacks_are_noticed(make_decoder: MakeDecoder, name: str) -> None:
    decoder = make_decoder("llama")
    before = decoder.logits()
    plan = scaled_plan(decoder)
    rewrite(decoder, plan)
    install_online_rotations(decoder.model, plan, decoder.names)
    names, block = decoder.names, decoder.names.blocks[0]
    assert plan.equalization is not None
    scales = getattr(plan.equalization, name)
    carrier = {
        "attention": block.attention_norm,
        "value": block.output,
        "mlp": block.mlp_norm,
        "down": block.down,
        "head": names.final_norm,
    }[name]
    weight = decoder.model.get_parameter(f"{carrier}.weight")
    with torch.no_grad():
        if name in ("value", "down"):  # in the columns, behind a rotation
            weight *= 1.5
        else:
            weight /= scales if name == "head" else scales[0]
    assert decoder.error_to(before) > NOTICED


def test_with_scales_r1_leaves_the_residual_stream(make_decoder: MakeDecoder) -> None:
    names = make_decoder("llama").names
    plan = RotationPlan.draw(names, DEFAULT_ROTATIONS, RotationKind.HADAMARD, seed=1)
    in_stream = applications(plan, names)
    at_run_time = applications(plan.with_equalization(random_scales(names)), names)

    def of_r1(table: Any, **facts: Any) -> int:
        return sum(
            entry.rotation is RotationName.R1
            and all(getattr(entry, key) == value for key, value in facts.items())
            for entry in table
        )

    layers = len(names.blocks)
    assert of_r1(in_stream, side=Side.OUTPUT) == 2 * layers + 1
    assert of_r1(at_run_time, side=Side.OUTPUT) == 0
    assert of_r1(in_stream, online=True) == 0
    assert of_r1(at_run_time, online=True) == of_r1(at_run_time, inverse=True) == 5 * layers + 1


positive = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(positive, positive, st.sampled_from(Noise), st.integers(0, 1000))
def test_no_other_scales_make_less_noise(first: Any, second: Any, kind: Noise, seed: int) -> None:
    size = min(len(first), len(second))
    loud, sensitive = (
        torch.tensor(each[:size], dtype=torch.float64) for each in (first, second)
    )  # diagonals of C and M

    def noise(scales: Tensor) -> float:
        inputs = loud * scales.square()
        size = inputs.sum() if kind is Noise.OF_INPUTS else inputs.log().mean().exp()
        return float(size * (sensitive / scales.square()).sum())

    of_columns, of_inputs = kind.value
    best = sensitive.pow(of_columns) / loud.pow(of_inputs)
    generator = torch.Generator().manual_seed(seed)
    other = best * torch.randn(size, generator=generator, dtype=torch.float64).exp()
    assert noise(best) <= noise(other) * (1 + 1e-12)
    if kind is Noise.OF_INPUTS:
        assert noise(best) == pytest.approx(float((loud * sensitive).sqrt().sum()) ** 2)


@pytest.mark.parametrize(
    ("scheme", "weights", "expected"),
    [
        ("W4A8", WeightMethod.GPTQ, Noise.OF_WEIGHTS),
        ("W4A16", WeightMethod.GPTQ, Noise.OF_WEIGHTS),
        ("W4A8", WeightMethod.RTN, Noise.OF_INPUTS),
        ("W4A4", WeightMethod.GPTQ, Noise.OF_INPUTS),
        ("W8A8", WeightMethod.GPTQ, Noise.OF_INPUTS),
        ("W8A4", WeightMethod.GPTQ, Noise.OF_INPUTS),
    ],
)
def test_the_noise_that_costs_more_is_kept_least(
    scheme: str, weights: WeightMethod, expected: Noise
) -> None:
    assert louder_noise(QuantizationRecipe(Scheme.parse(scheme), weights=weights)) is expected


def test_a_float_model_has_the_scales_of_inputs() -> None:
    assert louder_noise(None) is Noise.OF_INPUTS


def measured(decoder: Any, noise: Noise = Noise.OF_INPUTS) -> Equalization:
    untie_head(decoder.model, decoder.names)
    walk = EqualizationWalk(decoder.model, decoder.names, IDS, noise)
    model, names = decoder.model, decoder.names
    walk.begin(model.get_parameter(f"{names.embedding}.weight").detach().split(20))
    for block in names.blocks:
        walk.measure(block)
    walk.measure_head(model.get_parameter(f"{names.head}.weight").detach().split(20))
    return walk.result()


@pytest.mark.parametrize("noise", Noise)
def test_the_walk_measures_what_a_forward_pass_of_the_whole_model_shows(
    make_decoder: MakeDecoder, model_type: str, noise: Noise
) -> None:
    decoder = make_decoder(model_type)
    model, names = decoder.model, decoder.names
    seen: dict[str, Tensor] = {}

    def listen(fqn: str) -> Callable[..., None]:
        def hook(_module: Any, inputs: Any) -> None:
            x = inputs[0].double().reshape(-1, inputs[0].shape[-1])
            seen[fqn] = seen.get(fqn, torch.zeros(())) + x.square().sum(0)

        return hook

    handles = [
        model.get_submodule(fqn).register_forward_pre_hook(listen(fqn))
        for fqn in (*names.linears(), names.head)
    ]
    with torch.no_grad():
        for batch in IDS:
            model(**batch)
    for handle in handles:
        handle.remove()

    def expected(readers: tuple[str, ...], norm: str | None, heads: int = 1) -> Tensor:
        weights = torch.cat([model.get_parameter(f"{fqn}.weight").double() for fqn in readers])
        gain = torch.ones(()) if norm is None else norm_gain(model, names, norm)
        loud, sensitive = seen[readers[0]] / gain**2, weights.square().sum(0) * gain**2
        if heads > 1:
            loud, sensitive = (
                each.reshape(heads, -1, names.head_dim).sum(1).flatten()
                for each in (loud, sensitive)
            )
        of_columns, of_inputs = noise.value
        scales = sensitive.pow(of_columns) / loud.pow(of_inputs)
        return (scales / scales.log().mean().exp()).detach()

    found = measured(decoder, noise)
    found.require_sizes(names)
    for layer, block in enumerate(names.blocks):
        qkv = (block.query, block.key, block.value)
        for got, wanted in (
            (found.attention[layer], expected(qkv, block.attention_norm)),
            (found.value[layer], expected((block.output,), None, names.num_key_value_heads)),
            (found.mlp[layer], expected((block.gate, block.up), block.mlp_norm)),
            (found.down[layer], expected((block.down,), None)),
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        found.head, expected((names.head,), names.final_norm), rtol=1e-5, atol=0
    )


def test_inner_scales_are_measured_as_among_all_of_them(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    walk = EqualizationWalk(decoder.model, decoder.names, IDS, inputs=Equalized.INNER)
    walk.begin(decoder.model.get_parameter(f"{decoder.names.embedding}.weight").split(20))
    for block in decoder.names.blocks:
        walk.measure(block)
    inner, everything = walk.result(), measured(decoder)
    assert inner.inputs is Equalized.INNER
    assert everything.inputs is Equalized.ALL
    assert torch.equal(inner.value, everything.value)
    assert torch.equal(inner.down, everything.down)
    with pytest.raises(ValueError, match="expected inputs to measure, got none"):
        EqualizationWalk(decoder.model, decoder.names, IDS, inputs=Equalized.NONE)


def test_dead_channels_get_scales_within_bounds_and_change_nothing(
    make_decoder: MakeDecoder,
) -> None:
    decoder = make_decoder("llama")
    block = decoder.names.blocks[1]
    with torch.no_grad():
        decoder.model.get_parameter(f"{block.attention_norm}.weight")[3] = 0.0
        decoder.model.get_parameter(f"{block.up}.weight")[5] = 0.0
        decoder.model.get_parameter(f"{block.up}.bias")[5] = 0.0
        decoder.model.get_parameter(f"{block.down}.weight")[:, 7] = 0.0
        decoder.model.get_parameter(f"{block.gate}.weight")[:] = 0.0
        decoder.model.get_parameter(f"{block.gate}.bias")[:] = 0.0
    before = decoder.logits()
    scales = measured(decoder)
    for tensor in scales.to_tensors().values():
        assert float(tensor.max() / tensor.min()) < 1e6
    plan = RotationPlan.draw(decoder.names, DEFAULT_ROTATIONS, RotationKind.HADAMARD, seed=1)
    plan = plan.with_equalization(scales)
    rewrite(decoder, plan)
    install_online_rotations(decoder.model, plan, decoder.names)
    assert decoder.error_to(before) < 1e5 * decoder.rounding < NOTICED


def test_what_counts_as_dead_depends_on_the_other_channels(make_decoder: MakeDecoder) -> None:
    found = []
    for size in (1.0, 1e-4):
        decoder = make_decoder("llama")
        weight = decoder.model.get_parameter(f"{decoder.names.blocks[2].down}.weight")
        with torch.no_grad():
            weight[:, 7] = 0.0
            weight *= size
        found.append(measured(decoder).down[2])
    torch.testing.assert_close(found[0], found[1])


def test_values_that_are_not_finite_are_named(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    block = decoder.names.blocks[1]
    with torch.no_grad():
        decoder.model.get_parameter(f"{block.up}.weight")[2, 2] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj: its weights are not finite"):
        measured(decoder)
    with pytest.raises(ValueError, match="expected calibration text, got none"):
        EqualizationWalk(decoder.model, decoder.names, [])


def test_changes_of_weights_go_into_the_basis_and_back(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    names, plan = decoder.names, scaled_plan(decoder)
    generator = torch.Generator().manual_seed(5)
    for fqn in names.blocks[1].linears():
        rows, columns = decoder.model.get_parameter(f"{fqn}.weight").shape
        a = torch.randn(2, columns, generator=generator, dtype=torch.float64)
        b = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
        there = rotate_delta(b @ a, fqn, plan, names)
        torch.testing.assert_close(unrotate_delta(there, fqn, plan, names), b @ a)
        own_a, own_b = unrotate_factors(a, b, fqn, plan, names)
        torch.testing.assert_close(rotate_delta(own_b @ own_a, fqn, plan, names), b @ a)
        new_a, new_b = rotate_factors(a, b, fqn, plan, names)
        torch.testing.assert_close(new_b @ new_a, there)
        unscaled = replace(plan, equalization=None)
        assert not torch.allclose(rotate_delta(b @ a, fqn, unscaled, names), there)


def test_a_change_is_scaled_as_its_weight_is(make_decoder: MakeDecoder) -> None:
    decoder, other = make_decoder("llama"), make_decoder("llama")
    plan, fqn = scaled_plan(decoder), decoder.names.blocks[0].value
    weight = decoder.model.get_parameter(f"{fqn}.weight")
    untie_head(decoder.model, decoder.names)
    fold_norm_gains(decoder.model, decoder.names)
    untie_head(other.model, other.names)
    fold_norm_gains(other.model, other.names)
    delta = torch.randn(weight.shape, dtype=torch.float64)
    with torch.no_grad():
        weight += delta
    for each in (decoder, other):
        equalize_model(each.model, each.names, plan.equalization)
        fuse_rotations(each.model, each.names, plan)
    expected = other.model.get_parameter(f"{fqn}.weight") + rotate_delta(
        delta, fqn, plan, decoder.names
    )
    torch.testing.assert_close(weight, expected)


def test_scale_delta_knows_both_sides() -> None:
    delta = torch.ones(2, 3)
    before, behind = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 5.0])
    expected = torch.tensor([[3.0, 1.5, 0.75], [5.0, 2.5, 1.25]], dtype=torch.float64)
    assert torch.equal(scale_delta(delta, before, behind), expected)
    assert torch.equal(scale_delta(delta, None, None), delta.double())


# --- as part of a plan


def test_a_plan_is_saved_with_its_scales(make_decoder: MakeDecoder) -> None:
    plan = scaled_plan(make_decoder("llama"))
    metadata, tensors = plan.to_metadata(), plan.to_tensors()
    again = RotationPlan.from_saved(metadata, tensors)
    assert again.digest == plan.digest
    assert again.equalization is not None
    assert plan.equalization is not None
    for name, tensor in plan.equalization.to_tensors().items():
        assert torch.equal(again.equalization.to_tensors()[name], tensor)
    with_r3 = again.with_r3(make_decoder("llama").names)
    assert with_r3.equalization is not None
    assert with_r3.digest != plan.digest
    inner = scaled_plan(make_decoder("llama"), inputs=Equalized.INNER)
    assert inner.to_metadata()["equalized"] == "inner"
    assert metadata["equalized"] == "all"
    assert RotationPlan.from_saved(inner.to_metadata(), inner.to_tensors()).digest == inner.digest
    with pytest.raises(ValueError, match="scales behind all norms, or none"):
        replace(plan.equalization, mlp=None)
    for name in FIELDS:
        key = f"equalization.{name}"
        with pytest.raises(ValueError, match="expected content with the digest"):
            RotationPlan.from_saved(metadata, tensors | {key: tensors[key] * (1 + 1e-12)})
        rest = {other: tensor for other, tensor in tensors.items() if other != key}
        with pytest.raises(ValueError, match=f"expected all scales, got no .*{name}"):
            RotationPlan.from_saved(metadata, rest)
        signed = name == "head"  # it can be the gain of the final norm
        for bad in (0.0, *([] if signed else [-1.0]), float("nan"), float("inf")):
            broken = tensors[key].clone()
            broken.view(-1)[0] = bad
            with pytest.raises(ValueError, match=rf"{name}: expected finite scales .* 0"):
                RotationPlan.from_saved(metadata, tensors | {key: broken})
        for shape in (tensors[key].float(), tensors[key][None]):
            with pytest.raises(ValueError, match=f"{name}: expected float64 of"):
                RotationPlan.from_saved(metadata, tensors | {key: shape})


def test_scales_of_another_model_are_refused(make_decoder: MakeDecoder) -> None:
    plan = scaled_plan(make_decoder("llama"), ())
    names = make_decoder("qwen2").names
    with pytest.raises(ValueError, match=r"equalization.value: expected \(3, 16\) .* got \(3, 24"):
        applications(plan, names)


def test_only_a_drawn_plan_without_scales_takes_some(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    plan, scales = scaled_plan(decoder), random_scales(decoder.names)
    with pytest.raises(ValueError, match="expected none with an equalization"):
        plan.with_equalization(scales)
    learned = RotationPlan.draw(decoder.names, DEFAULT_ROTATIONS, RotationKind.LEARNED, 1)
    with pytest.raises(ValueError, match="expected one that is drawn, got a learned one"):
        learned.with_equalization(scales)
