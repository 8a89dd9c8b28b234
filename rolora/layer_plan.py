"""Which linears are quantized, and how each: the recipe and its exceptions spelled out.

Linears that read one input share its integers, so their inputs are quantized alike. A linear whose
weight and input both stay in float has no plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rolora.blocks import BlockStack
from rolora.naming import naming
from rolora.overrides import Override, overridden
from rolora.scheme import (
    FLOAT_BITS,
    UNQUANTIZED_BITS,
    ActivationSpec,
    QuantizationRecipe,
    Scheme,
    WeightSpec,
)


@dataclass(frozen=True)
class LayerPlan:
    """How one linear is quantized, and which module's input calibrates it."""

    fqn: str
    weight: WeightSpec
    """16 bits is float."""
    activation: ActivationSpec
    observed: str
    """FQN of the linear that stands for the shared input (query for query, key and value)."""


def plan_layers(
    names: BlockStack, recipe: QuantizationRecipe, overrides: Sequence[Override] = ()
) -> list[LayerPlan]:
    """List every linear that the recipe quantizes, in depth order, the head (if any) last.

    Args:
        names: The model's parts.
        recipe: Bit widths and granularities.
        overrides: Exceptions for single linears.

    Raises:
        ValueError: An override matches nothing or does not go with the recipe's groups, linears
            that share an input would quantize it differently, groups do not divide an input, or a
            linear of 4-bit weights, of which two make a byte, has an odd number of inputs.
    """
    _require_whole_groups(names, recipe)
    exceptions = overridden(names, overrides)
    plans: list[LayerPlan] = []
    widths = _input_widths(names)
    for block in names.blocks:
        for position, readers in enumerate(block.shared_inputs()):
            shared = []
            for fqn in readers:
                scheme = _scheme(recipe.scheme, exceptions.get(fqn, ()))
                with naming(fqn):
                    recipe.require_groups_fit(scheme)
                spec = recipe.block_input(
                    after_norm=position in (0, 2), bits=scheme.activation_bits
                )
                weight = recipe.block_weight(scheme.weight_bits)
                _require_pairs(fqn, weight, widths[position])
                shared.append(LayerPlan(fqn, weight, spec, readers[0]))
            _require_one_input(shared)
            plans += shared
    head = names.head
    if head is not None and (recipe.head_bits != FLOAT_BITS or head in exceptions):
        plans.append(_plan_head(head, recipe, names.hidden_size, exceptions.get(head, ())))
        _require_pairs(head, plans[-1].weight, names.hidden_size)
    return [plan for plan in plans if not _stays_float(plan)]


def _scheme(scheme: Scheme, exceptions: Sequence[Override]) -> Scheme:
    for exception in exceptions:
        scheme = exception.apply(scheme)
    return scheme


def _plan_head(
    fqn: str, recipe: QuantizationRecipe, columns: int, exceptions: Sequence[Override]
) -> LayerPlan:
    weight = recipe.head_weight(columns)
    float_head = UNQUANTIZED_BITS in (weight.bits, recipe.scheme.activation_bits)
    scheme = _scheme(Scheme(weight.bits, UNQUANTIZED_BITS if float_head else 8), exceptions)
    if scheme.weight_bits != weight.bits:
        if recipe.shared_table:
            raise ValueError(
                f"{fqn}: shares the embedding's table of {weight.bits} bits and cannot have other "
                f"bits; leave its override out"
            )
        weight = WeightSpec(scheme.weight_bits)
    if weight.group_size is not None and scheme.activation_bits not in (8, UNQUANTIZED_BITS):
        raise ValueError(
            f"{fqn}: shares the embedding's table of 4 bits, whose kernel has inputs of 8 bits or "
            f"in float, not of {scheme.activation_bits}; leave its override out"
        )
    return LayerPlan(fqn, weight, recipe.head_input(weight, scheme.activation_bits), fqn)


def _stays_float(plan: LayerPlan) -> bool:
    return plan.weight.bits == UNQUANTIZED_BITS and plan.activation.is_float


def _require_one_input(plans: Sequence[LayerPlan]) -> None:
    """Refuse different bits for one input."""
    first, *others = plans
    for other in others:
        if other.activation != first.activation:
            raise ValueError(
                f"{other.fqn} and {first.fqn} read the same input, which cannot have "
                f"{other.activation.bits} bits for one and {first.activation.bits} for the other; "
                f"override the activations of {', '.join(plan.fqn for plan in plans)} alike"
            )


def _input_widths(names: BlockStack) -> tuple[int, ...]:
    """Return the number of channels of each of a block's shared inputs."""
    attention = names.num_heads * names.head_dim
    return names.hidden_size, attention, names.hidden_size, names.intermediate_size


def _require_pairs(fqn: str, weight: WeightSpec, columns: int) -> None:
    """Refuse 4-bit weights, of which two make a byte, in rows of an odd number."""
    if weight.bits == 4 and columns % 2:
        raise ValueError(
            f"{fqn}: has {columns} input columns, and 4-bit weights are for an even number; give "
            f"it others (--override {fqn}=W8)"
        )


def _require_whole_groups(names: BlockStack, recipe: QuantizationRecipe) -> None:
    """Refuse groups of inputs that do not divide an input."""
    size = recipe.activation_group_size
    if size is None:
        return
    inputs = names.blocks[0].shared_inputs()
    for (fqn, *_), columns in zip(inputs, _input_widths(names), strict=True):
        if columns % size:
            raise ValueError(
                f"{fqn}: activation group size {size} does not divide the {columns} input columns; "
                f"use a divisor or no group size"
            )
