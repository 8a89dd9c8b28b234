"""Learning lowers the loss of rounded activations and never changes the float model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import rolora.learned
from rolora.decoder import DecoderNames
from rolora.fold import fold_norm_gains, untie_head
from rolora.fuse import fuse_rotations
from rolora.learned import (
    ActivationLoss,
    LearningReport,
    LearningSettings,
    Objective,
    compare_starts,
    learn_rotation,
)
from rolora.online import install_online_rotations
from rolora.rotation import DEFAULT_ROTATIONS, RotationKind, RotationName, RotationPlan
from rolora.scheme import QuantizationRecipe, Scheme
from rolora.stiefel import cayley_step

MakeDecoder = Callable[..., Any]
RECIPE = QuantizationRecipe(Scheme(4, 4), activation_clip=0.9)
BATCHES = [
    {"input_ids": (torch.arange(24) * stride + stride)[None] % 53} for stride in range(3, 19)
]
HELD_OUT, TEXT = BATCHES[:4], BATCHES[4:]
QUICK = LearningSettings(steps=6, learning_rate=0.5)
PER_TOKEN = dataclasses.replace(RECIPE, static_after_norm=False)


def prepare(make_decoder: MakeDecoder, model_type: str = "llama") -> Any:
    decoder = make_decoder(model_type)
    untie_head(decoder.model, decoder.names)
    fold_norm_gains(decoder.model, decoder.names)
    return decoder


def prepare_outlier(make_decoder: MakeDecoder) -> tuple[Any, RotationPlan]:
    """Return a model with an outlier channel, and a start that leaves it nearly where it is."""
    decoder = make_decoder("llama")
    with torch.no_grad():
        decoder.model.get_parameter(f"{decoder.names.embedding}.weight")[:, 5] += 30.0
    untie_head(decoder.model, decoder.names)
    fold_norm_gains(decoder.model, decoder.names)
    start = start_of(decoder.names)
    content = start.to_tensors()
    noise = torch.randn(36, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r1 = cayley_step(torch.eye(36, dtype=torch.float64), noise, 1e-3)
    return decoder, start.with_matrices(r1, content["R2.matrix"])


def start_of(names: DecoderNames, seed: int = 0, **options: Any) -> RotationPlan:
    return RotationPlan.draw(names, DEFAULT_ROTATIONS, RotationKind.LEARNED, seed, **options)


def learn(
    decoder: Any, settings: LearningSettings = QUICK, **options: Any
) -> tuple[RotationPlan, LearningReport]:
    arguments: dict[str, Any] = {
        "recipe": RECIPE,
        "start": start_of(decoder.names),
        "batches": TEXT,
        "held_out": HELD_OUT,
        "settings": settings,
    }
    return learn_rotation(decoder.model, decoder.names, **arguments | options)


def defect(matrix: Tensor) -> float:
    return float((matrix @ matrix.T - torch.eye(matrix.shape[0], dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("objective", Objective)
def test_the_loss_falls(make_decoder: MakeDecoder, objective: Objective) -> None:
    decoder, start = prepare_outlier(make_decoder)
    settings = dataclasses.replace(QUICK, steps=30, objective=objective)
    seen: list[tuple[int, float]] = []
    plan, report = learn(
        decoder,
        settings,
        start=start,
        recipe=PER_TOKEN,
        progress=lambda step, loss: seen.append((step, loss)),
    )
    exact = 0.0 if objective is Objective.DIVERGENCE else float_loss(decoder)
    assert report.held_out_after - exact < 0.8 * (report.held_out_before - exact)
    assert seen == list(enumerate(report.losses, start=1))
    assert len(seen) == 30
    measured = compare_starts(
        decoder.model, decoder.names, PER_TOKEN, [start, plan], HELD_OUT, settings
    )
    assert measured == [
        pytest.approx(report.held_out_before),
        pytest.approx(report.held_out_after),
    ]


def float_loss(decoder: Any) -> float:
    """Return the cross-entropy of the float model on the text held out."""
    with torch.no_grad():
        losses = [
            functional.cross_entropy(
                decoder.model(**batch).logits[0, :-1], batch["input_ids"][0, 1:]
            )
            for batch in HELD_OUT
        ]
    return float(sum(losses)) / len(losses)


def test_steps_against_the_descent_do_not_lower_the_loss(
    make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = rolora.learned.cayley_step
    monkeypatch.setattr(rolora.learned, "cayley_step", lambda r, g, a: step(r, -g, a))
    decoder, start = prepare_outlier(make_decoder)
    settings = dataclasses.replace(QUICK, steps=30)
    _, report = learn(decoder, settings, start=start, recipe=PER_TOKEN)
    assert report.held_out_after > 0.95 * report.held_out_before


def test_the_rate_falls_linearly_to_nothing(
    make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def record(rotation: Tensor, gradient: Tensor, rate: float) -> Tensor:
        rates.append(rate)
        return cayley_step(rotation, gradient, rate)

    monkeypatch.setattr(rolora.learned, "cayley_step", record)
    learn(prepare(make_decoder), dataclasses.replace(QUICK, steps=4, learning_rate=0.8))
    assert rates == pytest.approx([0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2])  # of R1 and R2


def test_static_scales_are_observed_anew_as_the_basis_moves(
    make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    at: list[int] = []
    observe = ActivationLoss.observe

    def record(loss: ActivationLoss, batches: Sequence[Any]) -> None:
        assert batches is HELD_OUT
        at.append(len(steps))
        observe(loss, batches)

    monkeypatch.setattr(ActivationLoss, "observe", record)
    monkeypatch.setattr(rolora.learned, "_OBSERVE_EVERY", 2)
    learn(prepare(make_decoder), progress=lambda step, _: steps.append(step))
    assert at == [0, 2, 4, 6]


def test_a_learned_rotation_leaves_the_float_model_as_it_was(
    make_decoder: MakeDecoder, model_type: str
) -> None:
    decoder = make_decoder(model_type)
    exact = decoder.logits()
    untie_head(decoder.model, decoder.names)
    fold_norm_gains(decoder.model, decoder.names)
    folded = decoder.weights()
    plan, _ = learn(decoder)
    for key, tensor in decoder.weights().items():
        assert torch.equal(tensor, folded[key])
    assert decoder.error_to(exact) < decoder.rounding
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in decoder.model.modules())
    fuse_rotations(decoder.model, decoder.names, plan)
    assert decoder.error_to(exact) > 1e-3  # R4 has a half at run time
    install_online_rotations(decoder.model, plan, decoder.names)
    assert decoder.error_to(exact) < decoder.rounding


def test_what_is_learned_is_orthogonal_differs_from_the_start_and_keeps_r4(
    make_decoder: MakeDecoder,
) -> None:
    decoder = prepare(make_decoder)
    start = start_of(decoder.names, seed=3)
    plan, _ = learn(decoder, start=start)
    assert (plan.kind, plan.seed) == (RotationKind.LEARNED, 3)
    for name, layer in ((RotationName.R1, 0), *((RotationName.R2, i) for i in range(3))):
        learned, drawn = (p.find(name, layer).dense() for p in (plan, start))
        assert defect(learned) < 1e-12
        assert float((learned - drawn).abs().max()) > 1e-4
    assert torch.equal(
        plan.find(RotationName.R4, 0).dense(), start.find(RotationName.R4, 0).dense()
    )
    r2 = plan.to_tensors()["R2.matrix"]
    assert not torch.equal(r2[0] @ r2[1].T, torch.eye(12, dtype=torch.float64))


def test_equal_arguments_give_equal_plans_and_other_text_another(make_decoder: MakeDecoder) -> None:
    decoder = prepare(make_decoder)
    plans = [learn(decoder, batches=text)[0] for text in (TEXT, TEXT, TEXT[::-1])]
    assert plans[0].digest == plans[1].digest != plans[2].digest


def test_one_r2_stays_one(make_decoder: MakeDecoder) -> None:
    decoder = prepare(make_decoder)
    start = start_of(decoder.names, one_r2=True)
    shared, _ = learn(decoder, dataclasses.replace(QUICK, one_r2=True), start=start)
    r2 = shared.to_tensors()["R2.matrix"]
    assert torch.equal(r2[0], r2[1])
    assert torch.equal(r2[0], r2[2])
    assert not torch.equal(r2[0], start.to_tensors()["R2.matrix"][0])
    apart = learn(decoder, start=start)[0].to_tensors()["R2.matrix"]
    assert not torch.equal(apart[0], apart[1])


def test_no_steps_give_the_start(make_decoder: MakeDecoder) -> None:
    decoder = prepare(make_decoder)
    settings = dataclasses.replace(QUICK, steps=0)
    plan, report = learn(decoder, settings, batches=[])
    assert report.losses == ()
    assert report.held_out_after == pytest.approx(report.held_out_before)
    r1 = plan.find(RotationName.R1, 0).dense()
    torch.testing.assert_close(
        r1, start_of(decoder.names).find(RotationName.R1, 0).dense(), rtol=0, atol=1e-13
    )


def test_draws_are_compared_on_the_same_text(make_decoder: MakeDecoder) -> None:
    decoder = prepare(make_decoder)
    plans = [start_of(decoder.names, seed) for seed in (0, 1, 0)]
    done: list[int] = []
    losses = compare_starts(
        decoder.model,
        decoder.names,
        RECIPE,
        plans,
        HELD_OUT,
        QUICK,
        lambda number, _: done.append(number),
    )
    assert losses[0] == losses[2] != losses[1]
    assert done == [1, 2, 3]


def test_bfloat16_products_come_near_the_same_loss(make_decoder: MakeDecoder) -> None:
    decoder = prepare(make_decoder)
    decoder.model.float()
    reports = [
        learn(decoder, dataclasses.replace(QUICK, steps=2, bfloat16=rough))[1]
        for rough in (False, True)
    ]
    before = [report.held_out_before for report in reports]
    assert before[0] != before[1]
    assert before[0] == pytest.approx(before[1], rel=0.1)


@pytest.mark.parametrize(
    ("batches", "held_out"), [([], HELD_OUT), (TEXT, [])], ids=["no text", "none held out"]
)
def test_no_text_is_refused(
    make_decoder: MakeDecoder, batches: Sequence[Any], held_out: Sequence[Any]
) -> None:
    with pytest.raises(ValueError, match="expected text to learn from and to hold out"):
        learn(prepare(make_decoder), batches=batches, held_out=held_out)


def test_no_plans_to_compare_are_refused(make_decoder: MakeDecoder) -> None:
    decoder = prepare(make_decoder)
    with pytest.raises(ValueError, match="expected plans and text, got none"):
        compare_starts(decoder.model, decoder.names, RECIPE, [], HELD_OUT, QUICK)


def test_a_start_of_another_kind_or_model_is_refused(make_decoder: MakeDecoder) -> None:
    decoder = prepare(make_decoder)
    drawn = RotationPlan.draw(decoder.names, DEFAULT_ROTATIONS, RotationKind.HADAMARD, 0)
    with pytest.raises(ValueError, match="expected one of kind learned, got hadamard"):
        learn(decoder, start=drawn)
    larger = dataclasses.replace(decoder.names, hidden_size=40)
    with pytest.raises(ValueError, match="R1, hidden_size: expected 36"):
        learn(decoder, start=start_of(larger))


def test_a_model_that_is_not_finite_is_named_by_its_step(make_decoder: MakeDecoder) -> None:
    decoder = prepare(make_decoder)
    with torch.no_grad():
        decoder.model.get_parameter(f"{decoder.names.head}.weight")[3, 2] = torch.nan
    with pytest.raises(ValueError, match="step 1: the loss or its gradient is not finite"):
        learn(decoder)
