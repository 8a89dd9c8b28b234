"""Spend a budget of bits on the weights and inputs that rounding harms most.

A budget is an average: of a weight's bits over all weights of the blocks, of an input's over all
multiplications. Units are weights, one a linear, and inputs, one for all linears that share it.
Starting from the scheme, a unit at a time is raised to 8 bits, in the order of harm spared
(`rolora.sensitivity`) per bit of budget; what no longer fits is passed over. The outcome is a list
of overrides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from rolora.blocks import BlockStack
from rolora.calibration import RangeObserver
from rolora.layer_plan import plan_layers
from rolora.overrides import Override, overridden
from rolora.scheme import UNQUANTIZED_BITS, QuantizationRecipe
from rolora.sensitivity import Part, Sensitivity, measure_sensitivities

RAISED_BITS = 8


@dataclass(frozen=True)
class Budget:
    """Most bits on average; None leaves the scheme's."""

    weight_bits: float | None
    activation_bits: float | None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `W4.5`, `A5` or `W4.5A5`.

        Raises:
            ValueError: The text has another form, or an average out of range.
        """
        number = r"([0-9]{1,2}(?:\.[0-9]{1,6})?)"
        match = re.fullmatch(rf"(?:[wW]{number})?(?:[aA]{number})?", text.strip())
        if match is None or not match[0]:
            raise ValueError(
                f"mixed precision {text!r}: expected average bits such as W4.5, A5 or W4.5A5"
            )
        averages = [None if bits is None else float(bits) for bits in match.groups()]
        for bits in averages:
            if bits is not None and not 4.0 <= bits <= RAISED_BITS:
                raise ValueError(
                    f"mixed precision {text!r}: expected averages of 4 to {RAISED_BITS} bits, got "
                    f"{bits:g}"
                )
        return cls(*averages)

    def __str__(self) -> str:
        weight = "" if self.weight_bits is None else f"W{self.weight_bits:.8g}"
        return weight + ("" if self.activation_bits is None else f"A{self.activation_bits:.8g}")

    def of(self, part: Part) -> float | None:
        """Return the average for weights or for inputs."""
        return self.weight_bits if part is Part.WEIGHT else self.activation_bits


def spend(
    units: Sequence[Sensitivity], average: float, fixed: Iterable[tuple[int, int]] = ()
) -> list[Sensitivity]:
    """Choose what to raise to 8 bits.

    Args:
        units: All weights, or all inputs, that may be raised.
        average: Most bits on average.
        fixed: Bits and multiplications of those that may not.

    Returns:
        The units to raise, in the order in which they were chosen.

    Raises:
        ValueError: The average is below what there is without raising anything.
    """
    sizes = [(unit.bits, unit.multiplications) for unit in units] + list(fixed)
    total = sum(count for _, count in sizes)
    used = sum(bits * count for bits, count in sizes)
    left = round(average * total) - used
    if left < 0:
        raise ValueError(
            f"mixed precision: the scheme and its overrides have {used / total:.4g} bits on "
            f"average before any is raised; expected a budget of at least that, got {average:g}"
        )
    chosen = []
    for unit in sorted(units, key=_spared_per_bit, reverse=True):
        cost = (RAISED_BITS - unit.bits) * unit.multiplications
        if _spared_per_bit(unit) > 0.0 and cost <= left:
            chosen.append(unit)
            left -= cost
    return chosen


def _spared_per_bit(unit: Sensitivity) -> float:
    cost = (RAISED_BITS - unit.bits) * unit.multiplications
    return (unit.harm - unit.raised_harm) / cost


def mix_precision(
    model: nn.Module,
    names: BlockStack,
    recipe: QuantizationRecipe,
    overrides: Sequence[Override],
    budget: Budget,
    batches: Iterable[Mapping[str, Tensor]],
    observers: Mapping[str, RangeObserver],
) -> tuple[list[Override], list[Sensitivity]]:
    """Choose the weights and inputs of the blocks that get 8 bits.

    Args:
        model: The float model, online rotations in force.
        names: Its parts.
        recipe: Bits to start from.
        overrides: The user's; what they set stays, and counts in the averages.
        budget: Average bits.
        batches: `{"input_ids": int64 [B, T]}`.
        observers: Of the inputs with a static scale.

    Returns:
        Overrides to add to the user's, and all that was measured.

    Raises:
        ValueError: The scheme leaves in float what is to be mixed, the budget is below it, or there
            is no calibration text.
    """
    parts = frozenset(part for part in Part if budget.of(part) is not None)
    for part, bits in (
        (Part.WEIGHT, recipe.scheme.weight_bits),
        (Part.INPUT, recipe.scheme.activation_bits),
    ):
        if part in parts and bits == UNQUANTIZED_BITS:
            raise ValueError(
                f"mixed precision {budget}: {recipe.scheme} leaves each {part} in float; start "
                f"from a scheme of 4 or 6 bits"
            )
    exceptions = overridden(names, overrides)
    set_weights = {f for f, found in exceptions.items() if any(o.weight_bits for o in found)}
    plans = {plan.fqn: plan for plan in plan_layers(names, recipe, overrides)}
    raised = {
        plan.fqn: plan
        for plan in plan_layers(names, recipe, [Override(("*",), RAISED_BITS, RAISED_BITS)])
    }
    blocks = [plans[fqn] for fqn in names.linears() if fqn in plans]
    set_inputs = {
        plan.observed
        for plan in blocks
        if any(o.activation_bits for o in exceptions.get(plan.fqn, ()))
    }
    open_pairs = [(plan, raised[plan.fqn]) for plan in blocks]
    measured = measure_sensitivities(
        model,
        names.embedding,
        open_pairs,
        parts,
        batches,
        observers,
        clip_search=recipe.clip_search,
    )
    chosen: list[Override] = []
    for part in sorted(parts):
        frozen = set_weights if part is Part.WEIGHT else set_inputs
        units = [unit for unit in measured if unit.part is part and unit.fqn not in frozen]
        open_fqns = {unit.fqn for unit in units}
        fixed = []
        for plan in blocks:
            closed = plan.fqn if part is Part.WEIGHT else plan.observed
            if closed not in open_fqns:
                bits = plan.weight.bits if part is Part.WEIGHT else plan.activation.bits
                fixed.append((bits, _elements(model, plan.fqn)))
        for unit in spend(units, budget.of(part) or 0.0, fixed):
            if part is Part.WEIGHT:
                chosen.append(Override((unit.fqn,), RAISED_BITS, None))
            else:
                sharing = tuple(plan.fqn for plan in blocks if plan.observed == unit.fqn)
                chosen.append(Override(sharing, None, RAISED_BITS))
    return chosen, measured


def _elements(model: nn.Module, fqn: str) -> int:
    weight = model.get_submodule(fqn).weight
    assert isinstance(weight, Tensor)
    return weight.numel()
