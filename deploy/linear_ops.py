"""The nodes of one linear: integer, block-quantized, or float.

INTEGER (per-token or static scales), all products exact in int32:

    static   QuantizeLinear(x, s, 128) -> MatMulIntegerToFloat(q, W, s, s_w, 128, bias)
    token    Abs, ReduceMax, Mul, Max -> s;  Div(x, s) -> QuantizeLinear(., 1, 128) ->
    MatMulIntegerToFloat -> Mul(., s)

Activations are uint8 with zero point 128: on x64 the kernel for unsigned times signed is 10 to 50
times faster than signed times signed. Below 8 bits a Clip on the bytes keeps the range. Weights of
4 bits are INT4 initializers behind a Cast, which ONNX Runtime folds when it loads the model: the
file has 4 bits, the kernel 8. A graph that shares its file with a graph of MatMulNBits reads that
layout (blocked_weights).

NBITS: MatMulNBits at accuracy level 4, which quantizes each block of input columns to int8 itself.
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
    zero_point = graph.constant(np.uint8(ZERO_POINT))
    if spec.granularity is Granularity.TENSOR:
        assert input_scale is not None
        scale = graph.constant(np.float32(input_scale))
        token_scale = None
        scaled = x
    else:
        magnitude = graph.value("Abs", [x], f"{name}/Abs")
        largest = graph.value(
            "ReduceMax",
            [magnitude, graph.constant(np.array([-1], np.int64))],
            f"{name}/ReduceMax",
            keepdims=1,
        )
        factor = graph.constant(np.float32(spec.clip_ratio / quant_max))
        raw = graph.value("Mul", [largest, factor], f"{name}/Mul")
        token_scale = graph.value(
            "Max", [raw, graph.constant(np.float32(SMALLEST_SCALE))], f"{name}/Max"
        )
        scaled = graph.value("Div", [x, token_scale], f"{name}/Div")
        scale = graph.constant(np.float32(1.0))
    q = graph.value("QuantizeLinear", [scaled, scale, zero_point], f"{name}/QuantizeLinear")
    if spec.bits < 8:
        low, high = (
            graph.constant(np.uint8(ZERO_POINT + bound)) for bound in (quant_min, quant_max)
        )
        q = graph.value("Clip", [q, low, high], f"{name}/Clip")
    return QuantizedInput(q, scale, token_scale)


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
        linears: One or more linears with the same bits and group size, or without groups.
        name: Prefix of node names.

    Returns:
        float32 [B, S, sum of out_features].
    """
    layout = blocked_layout(linears)

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
        accuracy_level=4,
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
