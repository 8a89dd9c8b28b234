"""The nodes that turn an input into integers, once for all the linears that read it.

    static   QuantizeLinear(x, s, zero)
    token    Abs, ReduceMax, Mul, Max -> s;  Div(x, s) -> QuantizeLinear(., 1, zero)
    with zero points of the tokens
             ReduceMin, ReduceMax ... -> s, z;  QuantizeLinear(x / s + z, 1, zero)

`zero` is what the target's kernels want: uint8 128 or int8 0. Below 8 bits a Clip on the bytes
keeps the range. The constant c = clip / quant_max is a factor of the product's scale, m alone comes
behind it. A token of zeros has m = 0 and 0 / 0 for x / m: its bytes are arbitrary, and their
product times m is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploy.graph_builder import GraphBuilder
from deploy.targets import CPU_FORMAT, IntegerFormat
from rolora.affine import SMALLEST_SCALE, activation_range
from rolora.scheme import ActivationSpec, Granularity


@dataclass(frozen=True)
class QuantizedInput:
    """An activation in bytes, ready for every linear that reads it."""

    q: ir.Value
    """uint8 or int8 [B, S, K], as `numbers` has it."""
    static_scale: ir.Value
    """float32 scalar: the calibrated scale, or the part of a token's scale that is constant."""
    token_scale: ir.Value | None
    """float32 [B, S, 1], the other part of a token's scale, or None where the scale is static."""
    zero_point: ir.Value | None = None
    """float32 [B, S, 1], integers that `q` exceeds its zero by for a 0; None if symmetric."""
    numbers: IntegerFormat = CPU_FORMAT


def quantize_input(
    graph: GraphBuilder,
    x: ir.Value,
    spec: ActivationSpec,
    input_scale: np.ndarray | None,
    name: str,
    numbers: IntegerFormat = CPU_FORMAT,
) -> QuantizedInput:
    """Add the nodes that quantize an input once for all its readers.

    Args:
        graph: Receives the nodes.
        x: float32 [B, S, K], or float16 where `numbers` is half.
        spec: TENSOR or TOKEN granularity.
        input_scale: The calibrated scale, float32 scalar; only for TENSOR.
        name: Prefix of node names.
        numbers: How the target's kernels want integers.
    """
    if numbers.half:
        x = graph.value("Cast", [x], f"{name}/Cast", to=ir.DataType.FLOAT)
    quant_min, quant_max = activation_range(spec.bits)
    byte_zero = graph.constant(numbers.byte(0))
    token_scale = zero_point = None
    scaled, constant = x, np.float32(1.0)
    if spec.granularity is Granularity.TENSOR:
        assert input_scale is not None
        constant = np.float32(input_scale)
    elif spec.symmetric:
        magnitude = graph.value("Abs", [x], f"{name}/Abs")
        token_scale = _over_columns(graph, "ReduceMax", magnitude, name)
        scaled = graph.value("Div", [x, token_scale], f"{name}/Div")
        constant = np.float32(spec.clip_ratio / quant_max)
    else:
        token_scale, zero_point = _scale_and_zero_point(graph, x, spec, name)
        ratio = graph.value("Div", [x, token_scale], f"{name}/Div")
        scaled = graph.value("Add", [ratio, zero_point], f"{name}/Add")
    scale = graph.constant(constant)
    q = graph.value("QuantizeLinear", [scaled, scale, byte_zero], f"{name}/QuantizeLinear")
    if spec.bits < 8:
        low, high = (graph.constant(numbers.byte(bound)) for bound in (quant_min, quant_max))
        q = graph.value("Clip", [q, low, high], f"{name}/Clip")
    return QuantizedInput(q, scale, token_scale, zero_point, numbers)


def _over_columns(graph: GraphBuilder, operator: str, x: ir.Value, name: str) -> ir.Value:
    """Add a reduction over the last axis, float32 [B, S, 1]."""
    axes = graph.constant(np.array([-1], np.int64))
    return graph.value(operator, [x, axes], f"{name}/{operator}", keepdims=1)


def _scale_and_zero_point(
    graph: GraphBuilder, x: ir.Value, spec: ActivationSpec, name: str
) -> tuple[ir.Value, ir.Value]:
    """Add scale and zero point of each token, as `rolora.activation` has them."""
    zero = graph.constant(np.float32(0.0))
    least = _over_columns(graph, "ReduceMin", x, name)
    low = graph.value("Min", [least, zero], f"{name}/low/Min")
    most = _over_columns(graph, "ReduceMax", x, name)
    high = graph.value("Max", [most, zero], f"{name}/high/Max")
    size = graph.value("Sub", [high, low], f"{name}/range/Sub")
    factor = graph.constant(np.float32(spec.clip_ratio / (2**spec.bits - 1)))
    raw = graph.value("Mul", [size, factor], f"{name}/Mul")
    scale = graph.value("Max", [raw, graph.constant(np.float32(SMALLEST_SCALE))], f"{name}/Max")
    clip = graph.constant(np.float32(spec.clip_ratio))
    clipped = graph.value("Mul", [low, clip], f"{name}/clip/Mul")
    steps = graph.value("Div", [clipped, scale], f"{name}/zero/Div")
    quant_min = graph.constant(np.float32(activation_range(spec.bits)[0]))
    shifted = graph.value("Sub", [quant_min, steps], f"{name}/zero/Sub")
    return scale, graph.value("Round", [shifted], f"{name}/zero/Round")
