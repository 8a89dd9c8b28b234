"""The nodes of one linear: integer, block-quantized, or float.

INTEGER (per-token or static scales), all products exact in int32:

    static   QuantizeLinear(x, s, 128) -> MatMulIntegerToFloat(q, W, s, s_w, 128, bias)
    token    Abs, ReduceMax, Mul, Max -> s;  Div(x, s) -> QuantizeLinear(., 1, 128) ->
    MatMulIntegerToFloat -> Mul(., s)
    with zero points z, whose part in the product is taken off again
             ReduceMin, ReduceMax ... -> s, z;  QuantizeLinear(x / s + z, 1, 128) ->
    MatMulIntegerToFloat -> Mul(. - z * (s_w * sum_k W), s)

Activations are uint8 with zero point 128: on x64 the kernel for unsigned times signed is 10 to 50
times faster than signed times signed. Below 8 bits a Clip on the bytes keeps the range. Weights of
4 bits are INT4 initializers behind a Cast, which ONNX Runtime folds when it loads the model: the
file has 4 bits, the kernel 8. A graph that shares its file with a graph of MatMulNBits reads that
layout (blocked_weights).

NBITS: MatMulNBits at accuracy level 4, which quantizes each block of input columns to int8 itself,
or at level 1, in float32, where the scheme leaves the input in float.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploy.blocked_weights import block_scales, blocked_layout, pack_blocks, signed_weight
from deploy.checkpoint import Checkpoint, StoredLinear
from deploy.graph_builder import MICROSOFT, GraphBuilder
from rolora.affine import SMALLEST_SCALE, activation_range
from rolora.scheme import ActivationSpec, Granularity

ZERO_POINT = 128


@dataclass(frozen=True)
class QuantizedInput:
    """An activation in bytes, ready for every linear that reads it."""

    q: ir.Value
    """uint8 [B, S, K] with zero point 128."""
    static_scale: ir.Value
    """float32 scalar: the calibrated scale, or 1 where the scale is per token."""
    token_scale: ir.Value | None
    """float32 [B, S, 1], or None where the scale is static."""
    zero_point: ir.Value | None = None
    """float32 [B, S, 1], integers that `q` exceeds 128 by for a 0; None if symmetric."""


def quantize_input(
    graph: GraphBuilder,
    x: ir.Value,
    spec: ActivationSpec,
    input_scale: np.ndarray | None,
    name: str,
) -> QuantizedInput:
    """Add the nodes that quantize an input once for all its readers.

    Args:
        graph: Receives the nodes.
        x: float32 [B, S, K].
        spec: TENSOR or TOKEN granularity.
        input_scale: The calibrated scale, float32 scalar; only for TENSOR.
        name: Prefix of node names.
    """
    quant_min, quant_max = activation_range(spec.bits)
    byte_zero = graph.constant(np.uint8(ZERO_POINT))
    token_scale = zero_point = None
    scaled = x
    if spec.granularity is Granularity.TENSOR:
        assert input_scale is not None
        scale = graph.constant(np.float32(input_scale))
    elif spec.symmetric:
        magnitude = graph.value("Abs", [x], f"{name}/Abs")
        largest = _over_columns(graph, "ReduceMax", magnitude, name)
        token_scale = _scale_of_range(graph, largest, spec.clip_ratio / quant_max, name)
        scaled = graph.value("Div", [x, token_scale], f"{name}/Div")
    else:
        token_scale, zero_point = _scale_and_zero_point(graph, x, spec, name)
        ratio = graph.value("Div", [x, token_scale], f"{name}/Div")
        scaled = graph.value("Add", [ratio, zero_point], f"{name}/Add")
    if token_scale is not None:
        scale = graph.constant(np.float32(1.0))
    q = graph.value("QuantizeLinear", [scaled, scale, byte_zero], f"{name}/QuantizeLinear")
    if spec.bits < 8:
        low, high = (
            graph.constant(np.uint8(ZERO_POINT + bound)) for bound in (quant_min, quant_max)
        )
        q = graph.value("Clip", [q, low, high], f"{name}/Clip")
    return QuantizedInput(q, scale, token_scale, zero_point)


def _over_columns(graph: GraphBuilder, operator: str, x: ir.Value, name: str) -> ir.Value:
    """Add a reduction over the last axis, float32 [B, S, 1]."""
    axes = graph.constant(np.array([-1], np.int64))
    return graph.value(operator, [x, axes], f"{name}/{operator}", keepdims=1)


def _scale_of_range(graph: GraphBuilder, size: ir.Value, factor: float, name: str) -> ir.Value:
    """Add the scale of a range, never 0."""
    raw = graph.value("Mul", [size, graph.constant(np.float32(factor))], f"{name}/Mul")
    return graph.value("Max", [raw, graph.constant(np.float32(SMALLEST_SCALE))], f"{name}/Max")


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
    scale = _scale_of_range(graph, size, spec.clip_ratio / (2**spec.bits - 1), name)
    clip = graph.constant(np.float32(spec.clip_ratio))
    clipped = graph.value("Mul", [low, clip], f"{name}/clip/Mul")
    steps = graph.value("Div", [clipped, scale], f"{name}/zero/Div")
    quant_min = graph.constant(np.float32(activation_range(spec.bits)[0]))
    shifted = graph.value("Sub", [quant_min, steps], f"{name}/zero/Sub")
    return scale, graph.value("Round", [shifted], f"{name}/zero/Round")


def integer_linear(
    graph: GraphBuilder,
    x: QuantizedInput,
    checkpoint: Checkpoint,
    linears: list[StoredLinear],
    name: str,
    *,
    blocked: bool = False,
) -> ir.Value:
    """Add one integer product for linears that read the same input, their outputs side by side.

    Args:
        graph: Receives the nodes.
        x: The shared input.
        checkpoint: Holds the integers.
        linears: One or more per-channel linears with the same bits, packed along the output axis.
        name: Prefix of node names.
        blocked: Store the weight as MatMulNBits does, for a graph of that kernel beside this one.

    Returns:
        float32 [B, S, sum of out_features].
    """
    if blocked:
        weight = signed_weight(graph, checkpoint, linears, blocked_layout(linears), name)
    else:
        weight = _column_weight(graph, checkpoint, linears, name)
    scales = np.concatenate([checkpoint.array(f"{linear.fqn}.weight_scale") for linear in linears])
    bias = _concatenated_bias(checkpoint, linears)
    bias_value = None if bias is None else graph.weight(f"{name}.bias", ir.tensor(bias))
    inputs = [
        x.q,
        weight,
        x.static_scale,
        graph.weight(f"{name}.weight_scale", ir.tensor(scales)),
        graph.constant(np.uint8(ZERO_POINT)),
        None,
        bias_value if x.token_scale is None else None,
    ]
    while inputs[-1] is None:
        inputs.pop()
    y = graph.value(
        "MatMulIntegerToFloat", inputs, f"{name}/MatMulIntegerToFloat", domain=MICROSOFT
    )
    if x.zero_point is not None:
        sums = [checkpoint.integers(linear).sum(axis=1, dtype=np.int32) for linear in linears]
        column = graph.weight(
            f"{name}.column_sum", ir.tensor(np.concatenate(sums).astype(np.float32) * scales)
        )
        offset = graph.value("Mul", [x.zero_point, column], f"{name}/zero/Mul")
        y = graph.value("Sub", [y, offset], f"{name}/zero/Sub")
    if x.token_scale is not None:
        y = graph.value("Mul", [y, x.token_scale], f"{name}/Mul")
        if bias_value is not None:
            y = graph.value("Add", [y, bias_value], f"{name}/Add")
    return y


def _column_weight(
    graph: GraphBuilder, checkpoint: Checkpoint, linears: list[StoredLinear], name: str
) -> ir.Value:
    """Add the weight as int8 [K, N], stored in that shape with 4 or 8 bits."""
    shape = (linears[0].in_features, sum(linear.out_features for linear in linears))
    four_bits = linears[0].weight.bits == 4

    def read() -> ir.TensorProtocol:
        weight = np.concatenate([checkpoint.integers(linear) for linear in linears]).T
        if not four_bits:
            return ir.tensor(np.ascontiguousarray(weight))
        return ir.PackedTensor(
            _pack_nibbles(weight), ir.DataType.INT4, shape=ir.Shape(weight.shape)
        )

    dtype = ir.DataType.INT4 if four_bits else ir.DataType.INT8
    weight = graph.lazy_weight(f"{name}.weight", dtype, shape, read)
    if four_bits:
        weight = graph.value("Cast", [weight], f"{name}/Cast", to=ir.DataType.INT8)
    return weight


def nbits_linear(
    graph: GraphBuilder,
    x: ir.Value,
    checkpoint: Checkpoint,
    linears: list[StoredLinear],
    name: str,
) -> ir.Value:
    """Add one MatMulNBits for linears that read the same input; weights of 4 or 8 bits.

    Args:
        graph: Receives the nodes.
        x: float32 [B, S, K].
        checkpoint: Holds the integers.
        linears: One or more linears with the same bits and group size, or without groups; inputs
            quantized to 8 bits or in float.
        name: Prefix of node names.

    Returns:
        float32 [B, S, sum of out_features].
    """
    layout = blocked_layout(linears)
    spec = linears[0].activation
    in_float = spec is not None and spec.is_float

    def read() -> ir.TensorProtocol:
        return ir.tensor(pack_blocks(checkpoint, linears, layout))

    scales = np.concatenate([checkpoint.array(f"{linear.fqn}.weight_scale") for linear in linears])
    y = graph.value(
        "MatMulNBits",
        [
            x,
            graph.lazy_weight(f"{name}.weight", ir.DataType.UINT8, layout.shape, read),
            block_scales(graph, scales, layout, name),
        ],
        f"{name}/MatMulNBits",
        domain=MICROSOFT,
        K=layout.columns,
        N=layout.rows,
        bits=layout.bits,
        block_size=layout.block_size,
        accuracy_level=1 if in_float else 4,
    )
    return _add_bias(graph, y, checkpoint, linears, name)


def float_linear(
    graph: GraphBuilder, x: ir.Value, checkpoint: Checkpoint, linears: list[StoredLinear], name: str
) -> ir.Value:
    """Add one float32 MatMul for linears that read the same input."""

    def read() -> ir.TensorProtocol:
        weight = np.concatenate([checkpoint.array(f"{linear.fqn}.weight") for linear in linears])
        return ir.tensor(np.ascontiguousarray(weight.T))

    shape = (linears[0].in_features, sum(linear.out_features for linear in linears))
    weight = graph.lazy_weight(f"{name}.weight", ir.DataType.FLOAT, shape, read)
    y = graph.value("MatMul", [x, weight], f"{name}/MatMul")
    return _add_bias(graph, y, checkpoint, linears, name)


def _add_bias(
    graph: GraphBuilder, y: ir.Value, checkpoint: Checkpoint, linears: list[StoredLinear], name: str
) -> ir.Value:
    bias = _concatenated_bias(checkpoint, linears)
    if bias is None:
        return y
    return graph.value("Add", [y, graph.weight(f"{name}.bias", ir.tensor(bias))], f"{name}/Add")


def _concatenated_bias(checkpoint: Checkpoint, linears: list[StoredLinear]) -> np.ndarray | None:
    """Return the biases side by side, zeros where a linear has none; None if all have none."""
    if not any(linear.has_bias for linear in linears):
        return None
    return np.concatenate(
        [
            checkpoint.array(f"{linear.fqn}.bias")
            if linear.has_bias
            else np.zeros(linear.out_features, dtype=np.float32)
            for linear in linears
        ]
    )


def _pack_nibbles(values: np.ndarray) -> np.ndarray:
    """Pack int8 of -8..7 as ONNX INT4: row-major, the first of two in the low nibble."""
    nibbles = values.reshape(-1).astype(np.uint8) & 0x0F
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    packed: np.ndarray = nibbles[0::2] | (nibbles[1::2] << 4)
    return packed
