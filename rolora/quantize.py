"""Quantize a decoder in place: every block linear, the embedding and the head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rolora.block_stream import BlockStream
from rolora.calibrated_plan import CalibratedPlan, calibrate_plan
from rolora.calibration import RangeObserver
from rolora.decoder import DecoderNames
from rolora.gptq import quantize_weight_gptq
from rolora.layer_plan import LayerPlan
from rolora.linear import InputQuantizedLinear, QuantizedEmbedding, QuantizedLinear
from rolora.rtn import quantize_weight
from rolora.scheme import (
    FLOAT_BITS,
    UNQUANTIZED_BITS,
    Granularity,
    QuantizationRecipe,
    WeightMethod,
    WeightSpec,
)


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


def quantize_decoder(
    model: nn.Module,
    names: DecoderNames,
    recipe: QuantizationRecipe,
    calibration: Iterable[Mapping[str, Tensor]],
    progress: Callable[[str], None] = lambda fqn: None,
    planned: CalibratedPlan | None = None,
) -> list[LayerError]:
    """Replace the linears, the embedding and the head by integer modules.

    Args:
        model: A float32 decoder with an untied head; norms may or may not be folded. Online
            rotations are pre-hooks on the linears and stay in force.
        names: Its parts.
        recipe: Bit widths and granularities.
        calibration: Forward-pass batches; used if an input is quantized per tensor, and by GPTQ.
        progress: Called with the FQN of each finished linear.
        planned: How each linear is quantized; default is `calibrate_plan` of the recipe alone.

    Returns:
        The rounding error of each layer.

    Raises:
        ValueError: A weight is not finite, a group size does not fit (the message names the layer),
            or the calibration is empty although the recipe needs it.
    """
    batches = list(calibration)
    planned = planned or calibrate_plan(model, names, recipe, batches)
    observers = planned.observers
    if recipe.embedding_bits != FLOAT_BITS:
        table = model.get_submodule(names.embedding).weight
        assert isinstance(table, Tensor)
        try:
            q, scale = quantize_weight(
                table.detach(), WeightSpec(recipe.embedding_bits), clip_search=recipe.clip_search
            )
        except ValueError as error:
            raise ValueError(f"{names.embedding}: {error}") from error
        _replace(model, names.embedding, QuantizedEmbedding(q, scale))
    use_gptq = recipe.weights is WeightMethod.GPTQ
    stream = BlockStream(model, names, batches) if use_gptq else None
    by_fqn = {plan.fqn: plan for plan in planned.plans}
    errors: list[LayerError] = []
    for block in names.blocks:
        for readers in block.shared_inputs():
            present = [fqn for fqn in readers if fqn in by_fqn]
            hessian = stream.hessian(block, readers[0]) if stream and present else None
            for fqn in present:
                errors.append(_quantize_linear(model, by_fqn[fqn], recipe, hessian, observers))
                progress(fqn)
        if stream is not None:
            stream.advance(block)
    if names.head in by_fqn:
        errors.append(_quantize_linear(model, by_fqn[names.head], recipe, None, observers))
        progress(names.head)
    return errors


def _quantize_linear(
    model: nn.Module,
    plan: LayerPlan,
    recipe: QuantizationRecipe,
    hessian: Tensor | None,
    observers: Mapping[str, RangeObserver],
) -> LayerError:
    """Replace one linear; with a Hessian its weight is rounded by GPTQ."""
    linear = model.get_submodule(plan.fqn)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{plan.fqn}: expected a float nn.Linear, got {type(linear).__name__}")
    input_scale = None
    weight = linear.weight.detach()
    output_error = nearest_error = None
    try:
        if plan.activation.granularity is Granularity.TENSOR:
            input_scale = torch.tensor(observers[plan.observed].scale(plan.activation.bits))
        bias = None if linear.bias is None else linear.bias.detach().float()
        if plan.weight.bits == UNQUANTIZED_BITS:
            kept = InputQuantizedLinear(weight.float(), bias, plan.activation, input_scale)
            _replace(model, plan.fqn, kept)
            return LayerError(plan.fqn, 0.0)
        if hessian is None:
            q, scale = quantize_weight(weight, plan.weight, clip_search=recipe.clip_search)
        else:
            result = quantize_weight_gptq(
                weight, hessian, plan.weight, clip_search=recipe.clip_search
            )
            q, scale, output_error, nearest_error = (
                result.q,
                result.scale,
                result.error,
                result.rtn_error,
            )
    except ValueError as error:
        raise ValueError(f"{plan.fqn}: {error}") from error
    quantized = QuantizedLinear(q, scale, bias, plan.weight, plan.activation, input_scale)
    _replace(model, plan.fqn, quantized)
    return LayerError(plan.fqn, _relative_error(weight, quantized), output_error, nearest_error)


def _relative_error(weight: Tensor, quantized: QuantizedLinear) -> float:
    """Return ||W' - W|| / ||W||, in row chunks: a head may be large."""
    difference = total = 0.0
    rows = max(1, (1 << 20) // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        piece = QuantizedLinear(
            quantized.weight[part],
            quantized.weight_scale[part],
            None,
            quantized.weight_spec,
            quantized.activation,
            quantized.input_scale,
        ).dequantized_weight()
        difference += float((piece - weight[part].float()).square().sum())
        total += float(weight[part].float().square().sum())
    return float((difference / total) ** 0.5) if total else 0.0


def _replace(model: nn.Module, fqn: str, module: nn.Module) -> None:
    """Put a module in the place of another and keep its pre-hooks (online rotations)."""
    old = model.get_submodule(fqn)
    for hook in old._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook)
    model.set_submodule(fqn, module)
