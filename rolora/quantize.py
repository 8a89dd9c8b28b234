"""Quantize a decoder in place: every block linear, the embedding and the head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rolora.block_stream import BlockStream
from rolora.calibration import RangeObserver, observe_inputs
from rolora.decoder import BlockNames, DecoderNames
from rolora.gptq import quantize_weight_gptq
from rolora.linear import QuantizedEmbedding, QuantizedLinear
from rolora.rtn import quantize_weight
from rolora.scheme import (
    FLOAT_BITS,
    ActivationSpec,
    Granularity,
    QuantizationRecipe,
    WeightMethod,
    WeightSpec,
)


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
    output_error: float | None = None
    """GPTQ: squared error of the layer's output on calibration inputs, relative to the output."""
    nearest_output_error: float | None = None
    """The same of round-to-nearest; never below `output_error`."""


def plan_layers(names: DecoderNames, recipe: QuantizationRecipe) -> list[LayerPlan]:
    """List every linear that the recipe quantizes, in depth order, the head last."""
    weight = recipe.block_weight()
    after_norm = recipe.block_input(after_norm=True)
    elsewhere = recipe.block_input(after_norm=False)
    plans: list[LayerPlan] = []
    for block in names.blocks:
        plans += [
            LayerPlan(fqn, weight, after_norm, block.query)
            for fqn in (block.query, block.key, block.value)
        ]
        plans.append(LayerPlan(block.output, weight, elsewhere, block.output))
        plans += [LayerPlan(fqn, weight, after_norm, block.gate) for fqn in (block.gate, block.up)]
        plans.append(LayerPlan(block.down, weight, elsewhere, block.down))
    if recipe.head_bits != FLOAT_BITS:
        plans.append(
            LayerPlan(names.head, WeightSpec(recipe.head_bits), recipe.head_input(), names.head)
        )
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
        model: A float32 decoder with an untied head; norms may or may not be folded. Online
            rotations are pre-hooks on the linears and stay in force.
        names: Its parts.
        recipe: Bit widths and granularities.
        calibration: Forward-pass batches; used if an input is quantized per tensor, and by GPTQ.
        progress: Called with the FQN of each finished linear.

    Returns:
        The rounding error of each layer.

    Raises:
        ValueError: A weight is not finite, a group size does not fit (the message names the layer),
            or the calibration is empty although the recipe needs it.
    """
    batches = list(calibration)
    plans = plan_layers(names, recipe)
    static = {plan.observed for plan in plans if plan.activation.granularity is Granularity.TENSOR}
    observers = observe_inputs(model, sorted(static), batches) if static else {}
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
    by_fqn = {plan.fqn: plan for plan in plans}
    errors: list[LayerError] = []
    for block in names.blocks:
        for readers in _readers_by_input(block):
            hessian = None if stream is None else stream.hessian(block, readers[0])
            for fqn in readers:
                errors.append(_quantize_linear(model, by_fqn[fqn], recipe, hessian, observers))
                progress(fqn)
        if stream is not None:
            stream.advance(block)
    if names.head in by_fqn:
        errors.append(_quantize_linear(model, by_fqn[names.head], recipe, None, observers))
        progress(names.head)
    return errors


def shared_inputs(names: DecoderNames) -> dict[str, str]:
    """Return, for every linear of the blocks, the first one that reads the same input."""
    return {
        fqn: readers[0]
        for block in names.blocks
        for readers in _readers_by_input(block)
        for fqn in readers
    }


def _readers_by_input(block: BlockNames) -> tuple[tuple[str, ...], ...]:
    """Return the linears of a block in data order, those that share an input together."""
    return (
        (block.query, block.key, block.value),
        (block.output,),
        (block.gate, block.up),
        (block.down,),
    )


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
    bias = None if linear.bias is None else linear.bias.detach().float()
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
