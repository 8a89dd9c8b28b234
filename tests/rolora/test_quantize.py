from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rolora import rtn
from rolora.calibration import observe_inputs
from rolora.equalization import FIELDS, Equalization
from rolora.fold import fold_norm_gains
from rolora.fuse import fuse_rotations
from rolora.layer_plan import plan_layers
from rolora.linear import QuantizedEmbedding, QuantizedLinear
from rolora.online import install_online_rotations
from rolora.quantization_walk import QuantizationWalk, quantize_model, rows_in_memory
from rolora.rotation import RotationKind, RotationName, RotationPlan
from rolora.rtn import quantize_weight
from rolora.scheme import (
    ActivationSpec,
    Granularity,
    QuantizationRecipe,
    Scheme,
    WeightMethod,
    WeightSpec,
)

MakeDecoder = Callable[..., Any]
BATCHES: list[Mapping[str, Tensor]] = [
    {"input_ids": (torch.arange(26) * step % 53).reshape(2, 13)} for step in (3, 7, 11)
]
W8A8_ERROR = 0.06
"""A step is 1/127 of the largest value, so rounding adds noise of a quarter percent of it, or about
one percent of a typical value; three blocks of four roundings in a row and as many of the weights
add up as a root sum to 5 %."""


@pytest.fixture
def make_float(make_decoder: MakeDecoder) -> MakeDecoder:
    """Make a decoder in float32, as models are when they are quantized."""

    def make(model_type: str = "llama") -> Any:
        decoder = make_decoder(model_type)
        decoder.model.float()
        return decoder

    return make


def recipe(scheme: str = "W8A8", **options: Any) -> QuantizationRecipe:
    return QuantizationRecipe(Scheme.parse(scheme), **options)


def rotate(decoder: Any) -> None:
    plan = RotationPlan.draw(decoder.names, RotationName, RotationKind.ORTHOGONAL, seed=3)
    fold_norm_gains(decoder.model, decoder.names)
    fuse_rotations(decoder.model, decoder.names, plan)
    install_online_rotations(decoder.model, plan, decoder.names)


def test_the_plan_lists_each_linear_once_with_the_head_last(make_float: MakeDecoder) -> None:
    decoder = make_float()
    plans = plan_layers(decoder.names, recipe("W4A8"))
    linears = [fqn for fqn, m in decoder.model.named_modules() if isinstance(m, nn.Linear)]
    assert sorted(plan.fqn for plan in plans) == sorted(linears)
    assert plans[-1].fqn == decoder.names.head
    assert plans[-1].weight == WeightSpec(8)
    block, by_fqn = decoder.names.blocks[1], {plan.fqn: plan for plan in plans}
    for fqn in (block.query, block.key, block.value):
        assert by_fqn[fqn].observed == block.query
        assert by_fqn[fqn].activation == ActivationSpec(8, Granularity.TENSOR)
    assert by_fqn[block.up].observed == block.gate
    for fqn in (block.output, block.down):
        assert by_fqn[fqn].observed == fqn
        assert by_fqn[fqn].activation == ActivationSpec(8, Granularity.TOKEN)
        assert by_fqn[fqn].weight == WeightSpec(4)


@pytest.mark.parametrize("method", WeightMethod)
def test_every_linear_and_the_embedding_are_replaced(
    make_float: MakeDecoder, model_type: str, method: WeightMethod
) -> None:
    decoder = make_float(model_type)
    linears = [fqn for fqn, m in decoder.model.named_modules() if isinstance(m, nn.Linear)]
    finished: list[str] = []
    errors = quantize_model(
        decoder.model, decoder.names, recipe(weights=method), BATCHES, finished.append
    )
    modules = dict(decoder.model.named_modules())
    assert not [fqn for fqn, m in modules.items() if isinstance(m, nn.Linear | nn.Embedding)]
    assert isinstance(modules[decoder.names.embedding], QuantizedEmbedding)
    assert sorted(finished) == sorted(linears)
    assert all(isinstance(modules[fqn], QuantizedLinear) for fqn in linears)
    assert [error.fqn for error in errors] == finished


def test_float_embedding_and_head_stay(make_float: MakeDecoder) -> None:
    decoder = make_float()
    names = decoder.names
    kept = [decoder.model.get_submodule(fqn) for fqn in (names.embedding, names.head)]
    errors = quantize_model(decoder.model, names, recipe(embedding_bits=32, head_bits=32), BATCHES)
    assert kept == [decoder.model.get_submodule(fqn) for fqn in (names.embedding, names.head)]
    assert names.head not in [error.fqn for error in errors]
    assert decoder.logits().isfinite().all()


@pytest.mark.parametrize("static", [False, True])
def test_w8a8_is_close_to_float_and_w4a4_is_not(
    make_float: MakeDecoder, model_type: str, static: bool
) -> None:
    errors = {}
    for scheme in ("W8A8", "W4A4"):
        decoder = make_float(model_type)
        expected = decoder.logits()
        quantize_model(
            decoder.model, decoder.names, recipe(scheme, static_after_norm=static), BATCHES
        )
        errors[scheme] = decoder.error_to(expected)
    # A scale for all tokens is that of the largest: about twice that of a typical one.
    bound = 2 * W8A8_ERROR if static else W8A8_ERROR
    assert 0 < errors["W8A8"] < bound < errors["W4A4"]


def test_rotations_stay_in_force(make_float: MakeDecoder) -> None:
    decoder = make_float()
    expected = decoder.logits()
    rotate(decoder)
    assert decoder.error_to(expected) < 1e-4
    quantize_model(decoder.model, decoder.names, recipe(), BATCHES)
    assert decoder.error_to(expected) < W8A8_ERROR
    # The control: without its pre-hooks a down projection reads the wrong basis.
    decoder.model.get_submodule(decoder.names.blocks[0].down)._forward_pre_hooks.clear()
    assert decoder.error_to(expected) > 2 * W8A8_ERROR


def test_scales_are_those_of_the_observed_inputs(make_float: MakeDecoder) -> None:
    decoder = make_float()
    block = decoder.names.blocks[1]
    observers = observe_inputs(decoder.model, [block.query, block.gate], BATCHES)
    bias = decoder.model.get_submodule(block.value).bias.detach().clone()
    quantize_model(decoder.model, decoder.names, recipe("W8A6"), BATCHES)
    for fqns in ((block.query, block.key, block.value), (block.gate, block.up)):
        for fqn in fqns:
            scale = decoder.model.get_submodule(fqn).input_scale
            assert scale == torch.tensor(observers[fqns[0]].scale(6))
    assert decoder.model.get_submodule(block.down).input_scale is None
    assert torch.equal(decoder.model.get_submodule(block.value).bias, bias)


def test_the_heads_scale_is_that_of_the_input_that_is_rotated_in_front_of_it(
    make_float: MakeDecoder,
) -> None:
    decoder = make_float()
    names = decoder.names
    layers, values = len(names.blocks), names.num_key_value_heads * names.head_dim
    widths = (names.hidden_size, values, names.hidden_size, names.intermediate_size)
    ones = [torch.ones(layers, width, dtype=torch.float64) for width in widths]
    ones.append(torch.ones(names.hidden_size, dtype=torch.float64))
    scales = Equalization(**dict(zip(FIELDS, ones, strict=True)))
    plan = RotationPlan.draw(names, [RotationName.R1], RotationKind.ORTHOGONAL, seed=3)
    plan = plan.with_equalization(scales)  # with which R1 acts at run time
    fold_norm_gains(decoder.model, names)
    (plain,) = observe_inputs(decoder.model, [names.head], BATCHES).values()
    fuse_rotations(decoder.model, names, plan)
    install_online_rotations(decoder.model, plan, names)
    (rotated,) = observe_inputs(decoder.model, [names.head], BATCHES).values()
    quantize_model(decoder.model, names, recipe(), BATCHES)
    found = decoder.model.get_submodule(names.head).input_scale
    assert found == torch.tensor(rotated.scale(8))
    assert found != torch.tensor(plain.scale(8))


def test_gptq_starts_from_the_rounded_embedding(make_float: MakeDecoder) -> None:
    decoder = make_float()
    names = decoder.names
    options = recipe("W4A8", weights=WeightMethod.GPTQ)
    walk = QuantizationWalk(decoder.model, names, options, BATCHES)
    exact = decoder.model.get_submodule(names.embedding)(BATCHES[0]["input_ids"])
    walk.quantize_embedding(rows_in_memory(decoder.model, names.embedding))
    rounded = decoder.model.get_submodule(names.embedding)(BATCHES[0]["input_ids"])
    state = walk.state()
    assert torch.equal(state["float.0"], exact)
    assert torch.equal(state["quantized.0"], rounded)
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("group_size", [None, 16])
def test_errors_measure_the_change_of_the_weight(
    make_decoder: MakeDecoder,
    tiny_model: Callable[..., Any],
    group_size: int | None,
    names_of: Callable[[Any], Any],
) -> None:
    model = tiny_model("llama")  # hidden size 32 and 48 in the MLP: groups of 16 fit
    before = {
        fqn: m.weight.detach().clone()
        for fqn, m in model.named_modules()
        if isinstance(m, nn.Linear)
    }
    errors = quantize_model(
        model, names_of(model.config), recipe("W4A8", group_size=group_size), BATCHES
    )
    assert len(errors) == len(before)
    for error in errors:
        restored = model.get_submodule(error.fqn).dequantized_weight()
        change = (restored - before[error.fqn]).norm() / before[error.fqn].norm()
        assert error.relative_error == pytest.approx(float(change), rel=1e-4)
        assert (error.output_error, error.nearest_output_error) == (None, None)
        low, high = (1e-3, 0.02) if error.fqn == "lm_head" else (0.03, 0.2)
        assert low < error.relative_error < high
    assert model(BATCHES[0]["input_ids"]).logits.isfinite().all()


def test_gptq_lowers_the_error_on_the_calibration_inputs(make_float: MakeDecoder) -> None:
    decoder = make_float()
    rotate(decoder)
    errors = quantize_model(
        decoder.model, decoder.names, recipe("W4A8", weights=WeightMethod.GPTQ), BATCHES
    )
    pairs = [
        (error.output_error, error.nearest_output_error)
        for error in errors
        if error.output_error is not None and error.nearest_output_error is not None
    ]
    assert len(pairs) == len(errors)  # the head too
    assert all(output <= nearest for output, nearest in pairs)
    assert sum(output for output, _ in pairs) < 0.7 * sum(nearest for _, nearest in pairs)


def test_the_head_is_rounded_in_parts_as_in_one(
    make_float: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = []
    for elements in (1 << 20, 128):
        monkeypatch.setattr(rtn, "_CHUNK_ELEMENTS", elements)
        decoder = make_float()
        rotate(decoder)
        options = recipe("W4A8", weights=WeightMethod.GPTQ, head_bits=4)
        errors = quantize_model(decoder.model, decoder.names, options, BATCHES)
        heads.append((decoder.model.get_submodule(decoder.names.head), errors[-1]))
    (whole, whole_error), (parts, parts_error) = heads
    assert torch.equal(whole.weight, parts.weight)
    assert torch.equal(whole.weight_scale, parts.weight_scale)
    assert parts_error.output_error == pytest.approx(whole_error.output_error, rel=1e-5)
    assert parts_error.output_error < 0.7 * parts_error.nearest_output_error
    nearest, _ = quantize_weight(head_weight(make_float), WeightSpec(4), clip_search=True)
    assert not torch.equal(whole.weight, nearest)  # the control: GPTQ moved some


def head_weight(make_float: MakeDecoder) -> torch.Tensor:
    decoder = make_float()
    rotate(decoder)
    return decoder.model.get_parameter(f"{decoder.names.head}.weight")


def test_an_embedding_that_no_group_divides_is_refused(make_float: MakeDecoder) -> None:
    decoder = make_float()  # 36 columns
    options = recipe("W8A8", embedding_bits=4)
    with pytest.raises(ValueError, match="4 bits have a scale for 64, 32, 16 columns"):
        quantize_model(decoder.model, decoder.names, options, BATCHES)
    assert options.embedding_weight(96) == WeightSpec(4, 32)


@pytest.mark.parametrize("method", WeightMethod)
def test_integers_repeat(make_float: MakeDecoder, method: WeightMethod) -> None:
    states = []
    for _ in range(2):
        decoder = make_float("qwen3")
        quantize_model(decoder.model, decoder.names, recipe(weights=method), BATCHES)
        states.append(decoder.weights())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_weight_that_is_not_finite_is_named(make_float: MakeDecoder) -> None:
    block = make_float().names.blocks[2]
    for fqn in (block.down, "lm_head", "model.embed_tokens"):
        decoder = make_float()
        with torch.no_grad():
            decoder.model.get_submodule(fqn).weight[1, 2] = float("nan")
        with pytest.raises(ValueError, match=rf"^{fqn}: weight has NaN"):
            quantize_model(decoder.model, decoder.names, recipe(static_after_norm=False), [])


def test_calibration_that_meets_nan_names_where(make_float: MakeDecoder) -> None:
    decoder = make_float()
    block = decoder.names.blocks[1]
    with torch.no_grad():  # finite weights, but what they compute is not
        decoder.model.get_submodule(block.up).weight.fill_(1e38)
    behind = decoder.names.blocks[2].query
    with pytest.raises(ValueError, match=rf"^{behind}: calibration: an activation is NaN"):
        quantize_model(decoder.model, decoder.names, recipe(), BATCHES)


def test_a_group_size_that_does_not_fit_names_the_layer(make_float: MakeDecoder) -> None:
    decoder = make_float()  # hidden size 36
    with pytest.raises(ValueError, match=rf"^{decoder.names.blocks[0].query}: group size 32 does"):
        quantize_model(decoder.model, decoder.names, recipe(group_size=32), BATCHES)


@pytest.mark.parametrize(
    "options", [{}, {"weights": WeightMethod.GPTQ, "static_after_norm": False}]
)
def test_missing_calibration_is_refused_where_the_recipe_needs_it(
    make_float: MakeDecoder, options: dict[str, Any]
) -> None:
    decoder = make_float()
    query = decoder.names.blocks[0].query
    with pytest.raises(ValueError, match=rf"^{query}: .*at least one token"):
        quantize_model(decoder.model, decoder.names, recipe(**options), [])


def test_quantizing_twice_is_refused(make_float: MakeDecoder) -> None:
    decoder = make_float()
    options = {"embedding_bits": 32, "static_after_norm": False}
    quantize_model(decoder.model, decoder.names, recipe(**options), [])
    with pytest.raises(ValueError, match=r"expected a float nn\.Linear, got QuantizedLinear"):
        quantize_model(decoder.model, decoder.names, recipe(**options), [])


@pytest.mark.parametrize("method", WeightMethod)
def test_a_walk_goes_on_from_its_state(make_float: MakeDecoder, method: WeightMethod) -> None:
    whole, first, second = (make_float("qwen2") for _ in range(3))
    expected = quantize_model(whole.model, whole.names, recipe(weights=method), BATCHES)
    names = first.names
    walk = QuantizationWalk(first.model, names, recipe(weights=method), BATCHES)
    walk.quantize_embedding(rows_in_memory(first.model, names.embedding))
    errors = walk.quantize_block(names.blocks[0])
    state = {key: value.clone() for key, value in walk.state().items()}
    assert len(state) == len(BATCHES) * (2 if method is WeightMethod.GPTQ else 1)
    walk = QuantizationWalk(second.model, names, recipe(weights=method), BATCHES)
    walk.restore(state)
    for block in names.blocks[1:]:
        errors += walk.quantize_block(block)
    errors += walk.quantize_head(rows_in_memory(second.model, names.head))
    assert errors == expected
    behind = names.blocks[2].down
    found, wanted = (one.model.get_submodule(behind).weight for one in (second, whole))
    assert torch.equal(found, wanted)


def test_states_of_another_calibration_are_refused(make_float: MakeDecoder) -> None:
    decoder = make_float()
    walk = QuantizationWalk(decoder.model, decoder.names, recipe(), BATCHES)
    with pytest.raises(ValueError, match=f"expected those of {len(BATCHES)} calibration batches"):
        walk.restore({"float.0": torch.zeros(1, 2, 3)})
    walk.quantize_embedding(rows_in_memory(decoder.model, decoder.names.embedding))
    shorter = {key: state[:, 1:] for key, state in walk.state().items()}
    with pytest.raises(ValueError, match="hidden states: expected those of"):
        walk.restore(shorter)
