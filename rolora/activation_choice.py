"""Clip ratio and static or run-time scales, chosen for each input by what the linears make of it.

A candidate's error is that of the outputs of all linears that read the input,

    E = sum over tokens of ||(x' - x) W^T||^2,        W = their float weights, one below the other,

on some tokens of every calibration batch. The least error wins among clip ratios. A static scale
saves the run-time maximum, so it is kept unless its error exceeds the best per-token one's by more
than `STATIC_TOLERANCE`. Range search by output error is common (SmoothQuant's and AWQ's code, for
two); choosing static or per-token by it is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rolora.activation import rounded_activation
from rolora.calibration import RangeObserver
from rolora.layer_plan import LayerPlan
from rolora.scheme import AUTO, ActivationSpec, Granularity, QuantizationRecipe

CLIP_RATIOS = tuple(round(1.0 - 0.05 * step, 2) for step in range(11))
"""1 to 0.5; the least first would win ties, so the widest stands first."""
STATIC_TOLERANCE = 0.05
"""A static scale may cost this much more squared output error than the best per-token one."""
TOKENS_PER_BATCH = 32


@dataclass(frozen=True)
class InputStudy:
    """What each candidate did to the outputs behind one input."""

    observed: str
    candidates: tuple[ActivationSpec, ...]
    errors: tuple[float, ...]
    """Squared output error of each candidate, relative to the squared output."""

    @property
    def choice(self) -> ActivationSpec:
        """The candidate to use."""
        best = min(range(len(self.errors)), key=self.errors.__getitem__)
        for spec, error in zip(self.candidates, self.errors, strict=True):
            is_static = spec.granularity is Granularity.TENSOR
            if is_static and error <= (1.0 + STATIC_TOLERANCE) * self.errors[best]:
                return spec
        return self.candidates[best]


def needs_choice(plans: Sequence[LayerPlan], recipe: QuantizationRecipe) -> bool:
    """Return whether any input's format is to be chosen on calibration text."""
    return any(len(candidates(plan.activation, recipe)) > 1 for plan in plans)


def candidates(spec: ActivationSpec, recipe: QuantizationRecipe) -> tuple[ActivationSpec, ...]:
    """Return the formats to choose from for an input that is planned as `spec`."""
    if spec.is_float or recipe.group_size is not None:
        return (spec,)
    static = spec.granularity is Granularity.TENSOR
    if static and recipe.static_after_norm != AUTO:
        return (spec,)
    run_time = recipe.run_time_input(spec.bits) if static else spec
    ratios = CLIP_RATIOS if recipe.activation_clip == AUTO else (run_time.clip_ratio,)
    searched = tuple(replace(run_time, clip_ratio=ratio) for ratio in ratios)
    return (spec, *searched) if static else searched


def choose_activations(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    recipe: QuantizationRecipe,
    batches: Iterable[Mapping[str, Tensor]],
    observers: Mapping[str, RangeObserver],
) -> tuple[list[LayerPlan], list[InputStudy]]:
    """Replace what is planned by what serves the calibration text best.

    Args:
        model: The float model, online rotations in force.
        plans: From `plan_layers`.
        recipe: Says what is open.
        batches: Keyword arguments of the forward pass.
        observers: Of the inputs that are planned with a static scale.

    Returns:
        Plans, and a study of each input for which there was a choice. Linears that share an input
        get the same format.

    Raises:
        ValueError: No calibration input reached a linear.
    """
    readers: dict[str, list[LayerPlan]] = {}
    for plan in plans:
        readers.setdefault(plan.observed, []).append(plan)
    meters = {
        observed: _Meter(model, sharing, candidates(sharing[0].activation, recipe), observers)
        for observed, sharing in readers.items()
        if len(candidates(sharing[0].activation, recipe)) > 1
    }
    handles = [
        model.get_submodule(observed).register_forward_pre_hook(meter)
        for observed, meter in meters.items()
    ]
    try:
        with torch.inference_mode():
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    studies = {observed: meter.study(observed) for observed, meter in meters.items()}
    chosen = [
        replace(plan, activation=studies[plan.observed].choice)
        if plan.observed in studies
        else plan
        for plan in plans
    ]
    return chosen, list(studies.values())


class _Meter:
    """Pre-hook that adds up the output errors of the candidates for one input."""

    def __init__(
        self,
        model: nn.Module,
        readers: Sequence[LayerPlan],
        tried: tuple[ActivationSpec, ...],
        observers: Mapping[str, RangeObserver],
    ) -> None:
        self._weights = [model.get_submodule(plan.fqn).weight for plan in readers]
        self._candidates = tried
        self._scales = [
            torch.tensor(observers[readers[0].observed].scale(spec.bits))
            if spec.granularity is Granularity.TENSOR
            else None
            for spec in tried
        ]
        self._errors = [0.0] * len(tried)
        self._energy = 0.0
        self._tokens = 0

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        x = x[:: max(1, len(x) // TOKENS_PER_BATCH)][:TOKENS_PER_BATCH]
        self._tokens += len(x)
        self._energy += self._squared_output(x)
        for i, (spec, scale) in enumerate(zip(self._candidates, self._scales, strict=True)):
            self._errors[i] += self._squared_output(rounded_activation(x, spec, scale) - x)

    def _squared_output(self, x: Tensor) -> float:
        return sum(
            float((x @ weight.float().t()).square().sum(dtype=torch.float64))
            for weight in self._weights
            if isinstance(weight, Tensor)
        )

    def study(self, observed: str) -> InputStudy:
        """Return what was measured."""
        if not self._tokens:
            raise ValueError(
                f"{observed}: no calibration input reached it; give calibration text of at least "
                f"one token"
            )
        energy = self._energy or 1.0  # outputs of zeros have no error either
        errors = [error / energy for error in self._errors]
        return InputStudy(observed, self._candidates, tuple(errors))
