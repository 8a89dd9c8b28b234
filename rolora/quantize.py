"""Quantize one linear of a decoder as its plan says, and measure what rounding did to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rolora.calibration import RangeObserver
from rolora.gptq import Gptq
from rolora.layer_plan import LayerPlan
from rolora.linear import InputQuantizedLinear, QuantizedLinear, dequantized_weight
from rolora.naming import naming
from rolora.rtn import quantize_weight, rows_at_a_time
from rolora.scheme import UNQUANTIZED_BITS, Granularity, QuantizationRecipe, WeightSpec


@dataclass(frozen=True)
class LayerError:
    """What rounding did to one weight."""

    fqn: str
    relative_error: float
    """Frobenius norm of the weight's change over the weight's norm."""
    output_error: float | None = None
    """GPTQ: squared error of the layer's output on calibration inputs, relative to the output."""
    nearest_output_error: float | None = None
    """The same of round-to-nearest; never below `output_error`."""


def quantize_linear(
    model: nn.Module,
    plan: LayerPlan,
    recipe: QuantizationRecipe,
    gptq: Gptq | None,
    observers: Mapping[str, RangeObserver],
) -> LayerError:
    """Replace one linear; given GPTQ of its input it rounds with that, 16 bits it keeps."""
    linear = float_linear(model, plan.fqn)
    input_scale = None
    weight = linear.weight.detach()
    output_error = nearest_error = None
    if plan.activation.granularity is Granularity.TENSOR:
        input_scale = static_scale(plan, observers)
    bias = None if linear.bias is None else linear.bias.detach().float()
    if plan.weight.bits == UNQUANTIZED_BITS:
        kept = InputQuantizedLinear(weight.float(), bias, plan.activation, input_scale)
        replace_module(model, plan.fqn, kept)
        return LayerError(plan.fqn, 0.0)
    with naming(plan.fqn):
        if gptq is None:
            q, scale = quantize_weight(weight, plan.weight, clip_search=recipe.clip_search)
        else:
            result = gptq.round(weight, plan.weight, clip_search=recipe.clip_search)
            q, scale, output_error, nearest_error = (
                result.q,
                result.scale,
                result.error,
                result.rtn_error,
            )
    quantized = QuantizedLinear(q, scale, bias, plan.weight, plan.activation, input_scale)
    replace_module(model, plan.fqn, quantized)
    squares = squared_norms(weight, q, scale, plan.weight)
    return LayerError(plan.fqn, relative_error(squares), output_error, nearest_error)


def float_linear(model: nn.Module, fqn: str) -> nn.Linear:
    """Return a linear that is not quantized yet.

    Raises:
        ValueError: It is, or is no linear.
    """
    linear = model.get_submodule(fqn)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{fqn}: expected a float nn.Linear, got {type(linear).__name__}")
    return linear


def static_scale(plan: LayerPlan, observers: Mapping[str, RangeObserver]) -> Tensor:
    """Return the calibrated scale of a linear's input, float32 scalar.

    Args:
        plan: Of the linear.
        observers: By FQN of the linear that stands for the shared input.

    Raises:
        ValueError: Nothing was observed; the message names the linear.
    """
    with naming(plan.fqn):
        return torch.tensor(observers[plan.observed].scale(plan.activation.bits))


def squared_norms(
    weight: Tensor, q: Tensor, scale: Tensor, spec: WeightSpec
) -> Iterator[tuple[float, float]]:
    """Yield the squared norms of change and weight, by row chunks."""
    step = rows_at_a_time(weight.shape[1])
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        piece = dequantized_weight(q[part], scale[part], spec)
        difference = float((piece - weight[part].float()).square().sum())
        yield difference, float(weight[part].float().square().sum())


def relative_error(squares: Iterable[tuple[float, float]]) -> float:
    """Return ||W' - W|| / ||W||."""
    difference = total = 0.0
    for changed, whole in squares:
        difference += changed
        total += whole
    return float((difference / total) ** 0.5) if total else 0.0


def replace_module(model: nn.Module, fqn: str, module: nn.Module) -> None:
    """Put a module in the place of another and keep its pre-hooks (online rotations)."""
    old = model.get_submodule(fqn)
    for hook in old._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook)
    model.set_submodule(fqn, module)
