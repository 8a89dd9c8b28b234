"""The plan of a decoder's quantization with everything filled in that calibration text decides.

    recipe + overrides -> plan -> ranges of static inputs -> bits by budget -> clip, static or not

Each step is left out where nothing depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rolora.activation_choice import InputStudy, choose_activations, needs_choice
from rolora.blocks import BlockStack
from rolora.calibration import RangeObserver, observe_inputs
from rolora.layer_plan import LayerPlan, plan_layers
from rolora.mixed_precision import Budget, mix_precision
from rolora.overrides import Override
from rolora.scheme import AUTO, ActivationSpec, Granularity, QuantizationRecipe
from rolora.sensitivity import Sensitivity


@dataclass(frozen=True)
class CalibratedPlan:
    """How each linear is quantized, the static ranges, and why."""

    plans: list[LayerPlan]
    observers: Mapping[str, RangeObserver]
    """Ranges of the inputs that may have a static scale, by the FQN that stands for them; those
    that are not here are observed when their block's turn comes."""
    raised: list[Override] = field(default_factory=list)
    """What the budget of bits was spent on."""
    sensitivities: list[Sensitivity] = field(default_factory=list)
    studies: list[InputStudy] = field(default_factory=list)

    def to_details(self) -> dict[str, Any]:
        """Return what was measured and chosen as plain data for the manifest."""
        return {
            "mixed_precision": {
                "raised": [str(override) for override in self.raised],
                "sensitivities": {
                    f"{unit.fqn}:{unit.part}": [unit.harm, unit.raised_harm]
                    for unit in self.sensitivities
                },
            },
            "inputs": {
                study.observed: {
                    "chosen": str(study.choice),
                    "clip_ratio": study.choice.clip_ratio,
                    "errors": dict(zip(map(_label, study.candidates), study.errors, strict=True)),
                }
                for study in self.studies
            },
        }


def _label(spec: ActivationSpec) -> str:
    static = spec.granularity is Granularity.TENSOR
    return "static" if static else f"clip {spec.clip_ratio:g}"


def needs_whole_model(recipe: QuantizationRecipe, budget: Budget | None = None) -> bool:
    """Return whether a plan is chosen on the running float model, and not known from the recipe.

    Static ranges alone can be observed block by block, so they do not need it.
    """
    return budget is not None or AUTO in (recipe.activation_clip, recipe.static_after_norm)


def calibrate_plan(
    model: nn.Module,
    names: BlockStack,
    recipe: QuantizationRecipe,
    batches: Iterable[Mapping[str, Tensor]],
    overrides: Sequence[Override] = (),
    budget: Budget | None = None,
) -> CalibratedPlan:
    """Plan a model's quantization on calibration text.

    Args:
        model: The float model, online rotations in force.
        names: Its parts.
        recipe: Bit widths and granularities.
        batches: Forward-pass batches, iterated once for each step that needs them.
        overrides: Bits of single linears.
        budget: Average bits to reach by raising the most sensitive ones of a decoder.

    Raises:
        ValueError: An override or the budget cannot be followed, or there is no calibration text
            for a step that needs it.
    """
    batches = list(batches)
    plans = plan_layers(names, recipe, overrides)
    static = {plan.observed for plan in plans if plan.activation.granularity is Granularity.TENSOR}
    observers = observe_inputs(model, sorted(static), batches) if static else {}
    raised: list[Override] = []
    sensitivities: list[Sensitivity] = []
    if budget is not None:
        raised, sensitivities = mix_precision(
            model, names, recipe, overrides, budget, batches, observers
        )
        plans = plan_layers(names, recipe, [*overrides, *raised])
    studies: list[InputStudy] = []
    if needs_choice(plans, recipe):
        plans, studies = choose_activations(model, plans, recipe, batches, observers)
    return CalibratedPlan(plans, observers, raised, sensitivities, studies)
