"""Quantize a decoder in place: every block linear, the embedding and the head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rolora.calibration import observe_inputs
from rolora.decoder import DecoderNames
from rolora.linear import QuantizedEmbedding, QuantizedLinear
from rolora.rtn import quantize_weight
from rolora.scheme import FLOAT_BITS, ActivationSpec, Granularity, QuantizationRecipe, WeightSpec


@dataclass(frozen=True)
class LayerPlan:
    """How one linear is quantized, and which module's input calibrates it."""

    fqn: str
    weight: WeightSpec
    activation: ActivationSpec
    observed: str
    """FQN of the linear that stands for the shared input (query for query, key and value)."""


@dataclass(frozen=True)
class LayerError:
    """What rounding did to one weight."""

    fqn: str
    relative_error: float
    """Frobenius norm of the weight's change over the weight's norm."""


def plan_layers(names: DecoderNames, recipe: QuantizationRecipe) -> list[LayerPlan]:
    """List every linear that the recipe quantizes, in depth order, the head last."""
    weight = recipe.block_weight()
    after_norm = recipe.block_input(after_norm=True)
    elsewhere = recipe.block_input(after_norm=False)
    plans: list[LayerPlan] = []
    for block in names.blocks:
        plans += [LayerPlan(fqn, weight, after_norm, block.query) for fqn in (block.query, block.key, block.value)]
        plans.append(LayerPlan(block.output, weight, elsewhere, block.output))
        plans += [LayerPlan(fqn, weight, after_norm, block.gate) for fqn in (block.gate, block.up)]
        plans.append(LayerPlan(block.down, weight, elsewhere, block.down))
    if recipe.head_bits != FLOAT_BITS:
        plans.append(LayerPlan(names.head, WeightSpec(recipe.head_bits), recipe.head_input(), names.head))
    return plans


def quantize_decoder(
    model: nn.Module,
    names: DecoderNames,
    recipe: QuantizationRecipe,
    calibration: Iterable[Mapping[str, Tensor]],
    progress: Callable[[str], None] = lambda fqn: None,
) -> list[LayerError]:
    """Replace the linears, the embedding and the head by integer modules.

    Args:
        model: A float32 decoder with an untied head; norms may or may not be folded. Online rotations are pre-hooks
            on the linears and stay in force.
        names: Its parts.
        recipe: Bit widths and granularities.
        calibration: Forward-pass batches; read only if an input is quantized per tensor.
        progress: Called with the FQN of each finished layer.

    Returns:
        The rounding error of each layer.

    Raises:
        ValueError: A weight is not finite, a group size does not fit (the message names the layer), or the
            calibration is empty although the recipe needs it.
    """
    plans = plan_layers(names, recipe)
    static = {plan.observed for plan in plans if plan.activation.granularity is Granularity.TENSOR}
    observers = observe_inputs(model, sorted(static), calibration) if static else {}
    errors: list[LayerError] = []
    for plan in plans:
        linear = model.get_submodule(plan.fqn)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{plan.fqn}: expected a float nn.Linear, got {type(linear).__name__}")
        input_scale = None
        if plan.observed in observers and plan.activation.granularity is Granularity.TENSOR:
            input_scale = torch.tensor(observers[plan.observed].scale(plan.activation.bits))
        try:
            q, scale = quantize_weight(linear.weight.detach(), plan.weight, clip_search=recipe.clip_search)
        except ValueError as error:
            raise ValueError(f"{plan.fqn}: {error}") from error
        bias = None if linear.bias is None else linear.bias.detach().float()
        quantized = QuantizedLinear(q, scale, bias, plan.weight, plan.activation, input_scale)
        errors.append(LayerError(plan.fqn, _relative_error(linear.weight.detach(), quantized)))
        _replace(model, plan.fqn, quantized)
        progress(plan.fqn)
    if recipe.embedding_bits != FLOAT_BITS:
        table = model.get_submodule(names.embedding).weight
        assert isinstance(table, Tensor)
        q, scale = quantize_weight(table.detach(), WeightSpec(recipe.embedding_bits), clip_search=recipe.clip_search)
        _replace(model, names.embedding, QuantizedEmbedding(q, scale))
        progress(names.embedding)
    return errors


def _relative_error(weight: Tensor, quantized: QuantizedLinear) -> float:
    """Return ||W' - W|| / ||W||, in row chunks so that no second float copy of a large head exists."""
    difference = total = 0.0
    rows = max(1, (1 << 22) // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        spec = quantized.weight_spec
        piece = QuantizedLinear(
            quantized.weight[part],
            quantized.weight_scale[part],
            None,
            spec,
            ActivationSpec(8, Granularity.TOKEN),
        ).dequantized_weight()
        difference += float((piece - weight[part].float()).square().sum())
        total += float(weight[part].float().square().sum())
    return float((difference / total) ** 0.5) if total else 0.0


def _replace(model: nn.Module, fqn: str, module: nn.Module) -> None:
    """Put a module in the place of another, keeping the pre-hooks of the old one (online rotations)."""
    parent, _, child = fqn.rpartition(".")
    old = model.get_submodule(fqn)
    for hook in old._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook)  # type: ignore[arg-type]
    setattr(model.get_submodule(parent), child, module)
