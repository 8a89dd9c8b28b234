from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rolora.activation import rounded_activation
from rolora.activation_choice import CLIP_RATIOS, STATIC_TOLERANCE, InputStudy
from rolora.calibrated_plan import calibrate_plan
from rolora.overrides import Override
from rolora.quantization_walk import quantize_model
from rolora.scheme import ActivationSpec, Granularity, QuantizationRecipe, Scheme

MakeDecoder = Callable[..., Any]
TENSOR, TOKEN = Granularity.TENSOR, Granularity.TOKEN
BATCHES: list[Mapping[str, Tensor]] = [
    {"input_ids": (torch.arange(26) * step % 53).reshape(2, 13)} for step in (3, 7, 11)
]


def recipe(scheme: str, **options: Any) -> QuantizationRecipe:
    return QuantizationRecipe(Scheme.parse(scheme), **options)


@pytest.fixture
def decoder(make_decoder: MakeDecoder) -> Any:
    decoder = make_decoder("llama")
    decoder.model.float()
    return decoder


@pytest.mark.parametrize(("bits", "least"), [(4, 0.05), (8, 0.0)])
def test_the_chosen_clip_has_the_least_output_error_of_all(
    decoder: Any, bits: int, least: float
) -> None:
    block = decoder.names.blocks[1]
    seen: list[Tensor] = []
    handle = decoder.model.get_submodule(block.gate).register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
    )
    with torch.no_grad():
        for batch in BATCHES:
            decoder.model(**batch)
    handle.remove()
    x = torch.cat(seen)
    weight = torch.cat(
        [decoder.model.get_submodule(fqn).weight.detach() for fqn in (block.gate, block.up)]
    )
    given = recipe(f"W8A{bits}", activation_clip="auto", static_after_norm=False)
    planned = calibrate_plan(decoder.model, decoder.names, given, BATCHES)
    study = next(study for study in planned.studies if study.observed == block.gate)
    for spec, error in zip(study.candidates, study.errors, strict=True):
        change = (rounded_activation(x, spec, None) - x) @ weight.t()
        expected = change.square().sum() / (x @ weight.t()).square().sum()
        assert error == pytest.approx(float(expected), rel=1e-3)
    assert [spec.clip_ratio for spec in study.candidates] == list(CLIP_RATIOS)
    best = study.errors[CLIP_RATIOS.index(study.choice.clip_ratio)]
    assert best == min(study.errors)
    assert best <= (1.0 - least) * study.errors[0]
    specs = {plan.fqn: plan.activation for plan in planned.plans}
    assert specs[block.gate] == specs[block.up] == study.choice
    assert len(planned.studies) == 4 * len(decoder.names.blocks) + 1


def test_a_static_scale_stays_unless_it_costs_more_than_stated() -> None:
    static, token = ActivationSpec(8, TENSOR), ActivationSpec(8, TOKEN)
    limit = 1.0 + STATIC_TOLERANCE
    for error, expected in ((0.5, static), (limit, static), (1.001 * limit, token)):
        assert InputStudy("x", (static, token), (error, 1.0)).choice == expected
    narrow = ActivationSpec(8, TOKEN, 0.9)
    study = InputStudy("x", (static, token, narrow), (1.0, 1.0, 0.8))
    assert study.choice == narrow


def test_inputs_with_rare_outliers_get_run_time_scales(decoder: Any) -> None:
    names = decoder.names
    given = recipe("W8A8", static_after_norm="auto")
    before = calibrate_plan(decoder.model, names, given, BATCHES)
    norm = decoder.model.get_submodule(names.blocks[1].mlp_norm)

    def stretch(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 0] *= 40.0
        return output

    norm.register_forward_hook(stretch)
    after = calibrate_plan(decoder.model, names, given, BATCHES)
    gate = names.blocks[1].gate
    assert {plan.activation.granularity for plan in after.plans if plan.observed == gate} == {TOKEN}
    down = names.blocks[1].down
    assert down not in {study.observed for study in before.studies}
    assert len(before.studies) == 2 * len(names.blocks) + 1


def test_what_was_planned_is_what_is_built(decoder: Any) -> None:
    names = decoder.names
    given = recipe("W4A4", activation_clip="auto", static_after_norm="auto")
    planned = calibrate_plan(decoder.model, names, given, BATCHES, [Override.parse("o,down=A8")])
    quantize_model(decoder.model, names, given, BATCHES, planned=planned)
    for plan in planned.plans:
        module = decoder.model.get_submodule(plan.fqn)
        assert (module.weight_spec, module.activation) == (plan.weight, plan.activation)
        assert (module.input_scale is None) == (plan.activation.granularity is TOKEN)
    assert decoder.logits().isfinite().all()


def test_nothing_is_studied_where_nothing_is_open(decoder: Any) -> None:
    planned = calibrate_plan(
        decoder.model, decoder.names, recipe("W4A4", static_after_norm=False), []
    )
    assert (planned.studies, planned.observers, planned.raised) == ([], {}, [])


def test_a_choice_needs_calibration_text(decoder: Any) -> None:
    given = recipe("W4A4", activation_clip="auto", static_after_norm=False)
    query = decoder.names.blocks[0].query
    with pytest.raises(ValueError, match=f"^{query}: no calibration input reached it"):
        calibrate_plan(decoder.model, decoder.names, given, [])
