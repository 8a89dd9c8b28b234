"""Learn R1 and R2 for the rounding of activations (SpinQuant, arXiv:2405.16406, section 3.2).

The loss is that of the model with float weights and fake-quantized inputs, on calibration text;
R1 and R2 descend on the manifold of orthogonal matrices by Cayley steps whose length falls linearly
to 0. R4, which costs time at every token, stays a Hadamard matrix. Weights are rounded later, by
GPTQ, in the learned basis.

Departures: static scales are observed anew every few steps, since they belong to a basis; the loss
can be the divergence from the float model, which tells more per token than the next token; and the
rate is 0.3 where SpinQuant's is 1.5, for batches of many windows: in ten steps of 256 tokens on
SmolLM2-135M at W4A4, a rate of 1.5 raised the divergence by 3 % and one of 0.15 lowered it by 12 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rolora.decoder import DecoderNames
from rolora.head_loss import Head, cross_entropy, divergence
from rolora.rotated_inputs import Basis, RotatedInputs
from rolora.rotation import RotationPlan
from rolora.rotation_table import applications
from rolora.scheme import QuantizationRecipe
from rolora.stiefel import cayley_step, nearest_orthogonal

Batch = Mapping[str, Tensor]
_OBSERVE_EVERY = 25
"""Steps that share static scales."""


class Objective(StrEnum):
    """What the quantized activations are to keep."""

    DIVERGENCE = "kl"
    """The float model's predictions."""
    CROSS_ENTROPY = "ce"
    """The probability of the text."""


@dataclass(frozen=True)
class LearningSettings:
    """How a rotation is learned."""

    steps: int = 100
    learning_rate: float = 0.3
    """Of the first step; it falls linearly to 0."""
    objective: Objective = Objective.DIVERGENCE
    bfloat16: bool = False
    """Compute products in bfloat16; the rotations are float64 all the same."""
    one_r2: bool = False
    """Learn one R2 for all layers."""


@dataclass(frozen=True)
class LearningReport:
    """What learning came to."""

    losses: tuple[float, ...]
    """Of each step's text, before the step."""
    held_out_before: float
    """Loss of text that is not learned from, with the rotation of the start."""
    held_out_after: float


class ActivationLoss:
    """The loss of a model whose linears read rounded inputs, in a basis that may change.

    Args:
        model: Norms folded, head untied; its parameters must need no gradient.
        names: Its parts.
        recipe: How inputs are quantized.
        basis: The first basis.
        objective: Which loss.
        bfloat16: Whether products are computed in bfloat16.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: DecoderNames,
        recipe: QuantizationRecipe,
        basis: Basis,
        objective: Objective,
        bfloat16: bool,
    ) -> None:
        self._model = model
        self._objective = objective
        self._bfloat16 = bfloat16
        head = model.get_submodule(names.head)
        weight = head.get_parameter("weight").detach()
        self._head = Head(weight.bfloat16() if bfloat16 else weight, getattr(head, "bias", None))
        self.inputs = RotatedInputs(model, names, recipe, basis)

    def observe(self, batches: Sequence[Batch]) -> None:
        """Set the static scales of the present basis."""
        with torch.no_grad(), self.inputs.observed():
            for batch in batches:
                self._hidden(batch)

    def __call__(self, batch: Batch) -> Tensor:
        """Return the mean loss of a token, a scalar.

        Args:
            batch: `{"input_ids": int64 [1, T]}`.
        """
        teacher = None
        if self._objective is Objective.DIVERGENCE:
            with torch.no_grad():
                teacher = self._hidden(batch)[:-1]
        with self.inputs.rounded():
            hidden = self._hidden(batch)[:-1]
        if teacher is not None:
            return divergence(hidden, self._head, teacher, self._head)
        return cross_entropy(hidden, self._head, batch["input_ids"][0, 1:])

    def mean(self, batches: Sequence[Batch]) -> float:
        """Return the mean over batches, without gradients."""
        with torch.no_grad():
            return sum(float(self(batch)) for batch in batches) / len(batches)

    def _hidden(self, batch: Batch) -> Tensor:
        """Return what the head reads, [T, hidden]."""
        device = batch["input_ids"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._bfloat16):
            hidden: Tensor = self._model.base_model(**batch, use_cache=False).last_hidden_state
        return hidden[0]


def learn_rotation(
    model: PreTrainedModel,
    names: DecoderNames,
    recipe: QuantizationRecipe,
    start: RotationPlan,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    settings: LearningSettings,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[RotationPlan, LearningReport]:
    """Learn R1 and R2 from where a plan starts.

    Args:
        model: Norms folded, head untied. Its weights stay, and need no gradient from then on.
        names: Its parts.
        recipe: How inputs are quantized.
        start: Of kind `learned`, with R1, R2 and R4; R4 is kept.
        batches: Text that is learned from, a window a step; begun anew where it ends.
        held_out: Text on which scales are observed and both ends are measured.
        settings: Steps, rate and loss.
        progress: Called with the number of finished steps and the loss before the last of them.

    Returns:
        The learned plan and the losses. On one machine, equal arguments give equal plans.

    Raises:
        ValueError: The plan lacks a rotation or is of another kind or model, there is no text, or
            a loss or gradient is not finite.
    """
    if (settings.steps and not batches) or not held_out:
        raise ValueError("learning a rotation: expected text to learn from and to hold out")
    first = Basis.of(start)
    r1, r2 = first.r1, first.r2[:1] if settings.one_r2 else first.r2
    layers = first.r2.shape[0]
    losses: list[float] = []

    def basis_of(r1: Tensor, r2: Tensor) -> Basis:
        return Basis(r1, r2.expand(layers, -1, -1), first.r4)

    with _activation_loss(model, names, recipe, start, settings) as loss_of:
        wide = loss_of.inputs.basis.r1.dtype
        loss_of.observe(held_out)
        before = loss_of.mean(held_out)
        for step in range(settings.steps):
            leaf1, leaf2 = (m.to(wide, copy=True).requires_grad_() for m in (r1, r2))
            loss_of.inputs.basis = basis_of(leaf1, leaf2)
            if step and step % _OBSERVE_EVERY == 0:
                loss_of.observe(held_out)
            loss = loss_of(batches[step % len(batches)])
            gradients = torch.autograd.grad(loss, (leaf1, leaf2))
            _require_finite(step, loss, *gradients)
            rate = settings.learning_rate * (1 - step / settings.steps)
            r1, r2 = (cayley_step(r, g, rate) for r, g in zip((r1, r2), gradients, strict=True))
            losses.append(float(loss.detach()))
            progress(step + 1, losses[-1])
        r1, r2 = nearest_orthogonal(r1), nearest_orthogonal(r2)
        loss_of.inputs.basis = basis_of(r1.to(wide), r2.to(wide))
        loss_of.observe(held_out)
        after = loss_of.mean(held_out)
    plan = start.with_matrices(r1, r2.repeat(layers // r2.shape[0], 1, 1))
    return plan, LearningReport(tuple(losses), before, after)


def compare_starts(
    model: PreTrainedModel,
    names: DecoderNames,
    recipe: QuantizationRecipe,
    plans: Sequence[RotationPlan],
    batches: Sequence[Batch],
    settings: LearningSettings,
    progress: Callable[[int, float], None] = lambda done, loss: None,
) -> list[float]:
    """Return the loss of each plan on the same text, to choose the best of several draws.

    Args:
        model: As for `learn_rotation`.
        names: Its parts.
        recipe: How inputs are quantized.
        plans: With R1, R2 and R4.
        batches: Text.
        settings: Of these only the loss and its precision.
        progress: Called with the number of measured plans and the last one's loss.

    Raises:
        ValueError: As `learn_rotation`.
    """
    if not plans or not batches:
        raise ValueError("comparing rotations: expected plans and text, got none")
    losses: list[float] = []
    with _activation_loss(model, names, recipe, plans[0], settings) as loss_of:
        wide = loss_of.inputs.basis.r1.dtype
        for plan in plans:
            applications(plan, names)  # refuses a plan of other sizes
            basis = Basis.of(plan)
            loss_of.inputs.basis = Basis(basis.r1.to(wide), basis.r2.to(wide), basis.r4)
            loss_of.observe(batches)
            losses.append(loss_of.mean(batches))
            progress(len(losses), losses[-1])
    return losses


@contextmanager
def _activation_loss(
    model: PreTrainedModel,
    names: DecoderNames,
    recipe: QuantizationRecipe,
    plan: RotationPlan,
    settings: LearningSettings,
) -> Iterator[ActivationLoss]:
    """Hook a model for the time of the block; the first basis has the model's dtype."""
    applications(plan, names)  # refuses a plan of other sizes
    basis, dtype = Basis.of(plan), model.get_parameter(f"{names.head}.weight").dtype
    basis = Basis(basis.r1.to(dtype), basis.r2.to(dtype), basis.r4)
    model.requires_grad_(False)
    loss = ActivationLoss(model, names, recipe, basis, settings.objective, settings.bfloat16)
    try:
        yield loss
    finally:
        loss.inputs.remove()


def _require_finite(step: int, *values: Tensor) -> None:
    if not all(bool(value.isfinite().all()) for value in values):
        raise ValueError(
            f"learning a rotation, step {step + 1}: the loss or its gradient is not finite; check "
            f"the model's weights and lower the learning rate"
        )
