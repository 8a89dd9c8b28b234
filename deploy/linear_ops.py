"""The nodes of one linear: integer, block-quantized, or float.

INTEGER (per-token or static scales, deploy/input_ops.py), all products exact in int32:

    static   MatMulIntegerToFloat(q, W, s, s_w, zero, zero_w, bias)
    token    MatMulIntegerToFloat(q, W, 1, s_w, zero, zero_w) -> Mul(., s)
    with zero points z of the tokens, whose part in the product is taken off again
             MatMulIntegerToFloat -> Mul(. - z * (s_w * sum_k W), s)
    CUDA     MatMulInteger(q, W) -> Cast -> Mul(., s_w * s) in place of MatMulIntegerToFloat

Signs and zero points are the target's (deploy/targets.py): the wrong ones are 10 to 50 times slower
on x64, or not there at all. Weights of 4 bits are INT4 initializers behind a Cast, which ONNX
Runtime folds when it loads the model: the file has 4 bits, the kernel 8. A graph that shares its
file with a graph of MatMulNBits reads that layout (blocked_weights).

NBITS: MatMulNBits at accuracy level 4, which quantizes each block of input columns to int8 itself,
or at level 1, in float32, where the scheme leaves the input in float.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploy.blocked_weights import block_scales, blocked_layout, integer_weight, pack_blocks
from deploy.checkpoint_reader import ALL, AnyCheckpoint, StoredLinear, slabs
from deploy.graph_builder import MICROSOFT, GraphBuilder
from deploy.input_ops import QuantizedInput
from rolora.blocks import Block

WEIGHT_SHIFT = 128
"""Zero point of weights that are stored unsigned."""


def integer_linear(
    graph: GraphBuilder,
    x: QuantizedInput,
    checkpoint: AnyCheckpoint,
    linears: list[StoredLinear],
    name: str,
    *,
    blocked: bool = False,
    half: bool = False,
    add_bias: bool = True,
    table: ir.Value | None = None,
) -> ir.Value:
    """Add one integer product for linears that read the same input, their outputs side by side.

    Args:
        graph: Receives the nodes.
        x: The shared input.
        checkpoint: Holds the integers.
        linears: One or more per-channel linears with the same bits, packed along the output axis.
        name: Prefix of node names.
        blocked: Store the weight as MatMulNBits does, for a graph of that kernel beside this one.
        half: Return float16.
        add_bias: Whether the bias belongs to it; else a node behind it adds that.
        table: int8 [N, K], the only linear's weight, which stands in the graph already.

    Returns:
        float32 (or float16) [B, S, sum of out_features].
    """
    shifted = x.numbers.shifts(linears[0].weight.bits)
    if table is not None:
        weight = _transposed(graph, table, name, shifted=shifted)
    elif blocked:
        layout = blocked_layout(linears)
        weight = integer_weight(graph, checkpoint, linears, layout, name, shifted=shifted)
    else:
        weight = _column_weight(graph, checkpoint, linears, name, shifted=shifted)
    scales = np.concatenate([checkpoint.array(f"{linear.fqn}.weight_scale") for linear in linears])
    bias = concatenated_bias(checkpoint, linears) if add_bias else None
    bias_value = None if bias is None else graph.weight(f"{name}.bias", ir.tensor(bias))
    scale = graph.weight(f"{name}.weight_scale", ir.tensor(scales))
    if x.numbers.fused:
        inline_bias = bias_value if x.token_scale is None else None
        y = _fused_product(graph, x, weight, scale, inline_bias, name, shifted=shifted)
    else:
        inline_bias = None
        y = graph.value("MatMulInteger", [x.q, weight], f"{name}/MatMulInteger")
        y = graph.value("Cast", [y], f"{name}/product/Cast", to=ir.DataType.FLOAT)
        scale = graph.value("Mul", [scale, x.static_scale], f"{name}/scale/Mul")
        y = graph.value("Mul", [y, scale], f"{name}/channel/Mul")
    if x.zero_point is not None:
        sums = [checkpoint.integers(linear).sum(axis=1, dtype=np.int32) for linear in linears]
        column = graph.weight(
            f"{name}.column_sum", ir.tensor(np.concatenate(sums).astype(np.float32) * scales)
        )
        offset = graph.value("Mul", [x.zero_point, column], f"{name}/zero/Mul")
        y = graph.value("Sub", [y, offset], f"{name}/zero/Sub")
    if x.token_scale is not None:
        y = graph.value("Mul", [y, x.token_scale], f"{name}/Mul")
    if bias_value is not None and inline_bias is None:
        y = graph.value("Add", [y, bias_value], f"{name}/Add")
    if half:
        y = graph.value("Cast", [y], f"{name}/half/Cast", to=ir.DataType.FLOAT16)
    return y


def _fused_product(
    graph: GraphBuilder,
    x: QuantizedInput,
    weight: ir.Value,
    scale: ir.Value,
    bias: ir.Value | None,
    name: str,
    *,
    shifted: bool,
) -> ir.Value:
    """Add a MatMulIntegerToFloat."""
    inputs = [
        x.q,
        weight,
        x.static_scale,
        scale,
        graph.constant(x.numbers.byte(0)),
        graph.constant(np.uint8(WEIGHT_SHIFT)) if shifted else None,
        bias,
    ]
    while inputs[-1] is None:
        inputs.pop()
    return graph.value(
        "MatMulIntegerToFloat", inputs, f"{name}/MatMulIntegerToFloat", domain=MICROSOFT
    )


def _transposed(graph: GraphBuilder, table: ir.Value, name: str, *, shifted: bool) -> ir.Value:
    """Turn int8 [N, K] to int8 (or shifted to uint8) [K, N], when the graph is loaded."""
    if shifted:
        wide = graph.value("Cast", [table], f"{name}/wide/Cast", to=ir.DataType.INT32)
        shift = graph.constant(np.int32(WEIGHT_SHIFT))
        wide = graph.value("Add", [wide, shift], f"{name}/shift/Add")
        table = graph.value("Cast", [wide], f"{name}/shift/Cast", to=ir.DataType.UINT8)
    return graph.value("Transpose", [table], f"{name}/Transpose", perm=[1, 0])


def _column_weight(
    graph: GraphBuilder,
    checkpoint: AnyCheckpoint,
    linears: list[StoredLinear],
    name: str,
    *,
    shifted: bool,
) -> ir.Value:
    """Add the weight as int8 (or shifted to uint8) [K, N], stored in that shape."""
    weight = stored_columns(graph, checkpoint, linears, name, shifted=shifted)
    if linears[0].weight.bits == 4:
        weight = graph.value("Cast", [weight], f"{name}/Cast", to=ir.DataType.INT8)
    return weight


def stored_columns(
    graph: GraphBuilder,
    checkpoint: AnyCheckpoint,
    linears: list[StoredLinear],
    name: str,
    *,
    shifted: bool = False,
) -> ir.Value:
    """Add the integers of linears side by side as an initializer [K, N].

    Args:
        graph: Receives the initializer.
        checkpoint: Holds the integers.
        linears: Linears with the same input and bits.
        name: Prefix of its name.
        shifted: Store bytes as uint8 with zero point 128.

    Returns:
        INT4 for weights of 4 bits, else INT8 or UINT8.
    """
    shape = (linears[0].in_features, sum(linear.out_features for linear in linears))
    four_bits = linears[0].weight.bits == 4

    def read() -> ir.TensorProtocol:
        columns, rows = shape
        stored = np.empty(columns * rows // 2 if four_bits else columns * rows, np.uint8)
        for some in slabs(columns, rows):
            parts = [checkpoint.integer_columns(linear, some) for linear in linears]
            slab = np.concatenate(parts).T
            if four_bits:
                stored[some.start * rows // 2 : some.stop * rows // 2] = _pack_nibbles(slab)
            else:
                flipped = slab.view(np.uint8) ^ np.uint8(WEIGHT_SHIFT if shifted else 0)
                stored.reshape(shape)[some] = flipped
        if four_bits:
            return ir.PackedTensor(stored, ir.DataType.INT4, shape=ir.Shape(shape))
        return ir.tensor(stored.view(np.uint8 if shifted else np.int8).reshape(shape))

    wide = ir.DataType.UINT8 if shifted else ir.DataType.INT8
    return graph.lazy_weight(f"{name}.weight", ir.DataType.INT4 if four_bits else wide, shape, read)


def nbits_linear(
    graph: GraphBuilder,
    x: ir.Value,
    checkpoint: AnyCheckpoint,
    linears: list[StoredLinear],
    name: str,
    *,
    add_bias: bool = True,
    table: tuple[ir.Value, ir.Value] | None = None,
) -> ir.Value:
    """Add one MatMulNBits for linears that read the same input; weights of 4 or 8 bits.

    Args:
        graph: Receives the nodes.
        x: float32 [B, S, K].
        checkpoint: Holds the integers.
        linears: One or more linears with the same bits and group size, or without groups; inputs
            quantized to 8 bits or in float.
        name: Prefix of node names.
        add_bias: See `integer_linear`.
        table: Bytes [N, K / 2] and scales [N, groups] of the only linear's 4-bit weight, which
            stand in the graph already.

    Returns:
        float32 [B, S, sum of out_features].
    """
    layout = blocked_layout(linears)
    spec = linears[0].activation
    in_float = spec is not None and spec.is_float

    def read() -> ir.TensorProtocol:
        return ir.tensor(pack_blocks(checkpoint, linears, layout))

    if table is not None:
        stored, scale = table
        shape = graph.constant(np.array(layout.shape, np.int64))
        weight = graph.value("Reshape", [stored, shape], f"{name}/Reshape")
    else:
        arrays = [checkpoint.array(f"{linear.fqn}.weight_scale") for linear in linears]
        scale = block_scales(graph, np.concatenate(arrays), layout, name)
        weight = graph.lazy_weight(f"{name}.weight", ir.DataType.UINT8, layout.shape, read)
    y = graph.value(
        "MatMulNBits",
        [x, weight, scale],
        f"{name}/MatMulNBits",
        domain=MICROSOFT,
        K=layout.columns,
        N=layout.rows,
        bits=layout.bits,
        block_size=layout.block_size,
        accuracy_level=1 if in_float else 4,
    )
    return _add_bias(graph, y, checkpoint, linears, name) if add_bias else y


def float_linear(
    graph: GraphBuilder,
    x: ir.Value,
    checkpoint: AnyCheckpoint,
    linears: list[StoredLinear],
    name: str,
    dtype: ir.DataType = ir.DataType.FLOAT,
    *,
    add_bias: bool = True,
) -> ir.Value:
    """Add one MatMul in float32, or in float16, for linears that read the same input."""

    def read() -> ir.TensorProtocol:
        stored = np.empty(shape, dtype.numpy())
        for some in slabs(*shape):
            parts = [checkpoint.part(f"{linear.fqn}.weight", ALL, some) for linear in linears]
            stored[some] = np.concatenate(parts).T
        return ir.tensor(stored)

    shape = (linears[0].in_features, sum(linear.out_features for linear in linears))
    weight = graph.lazy_weight(f"{name}.weight", dtype, shape, read)
    y = graph.value("MatMul", [x, weight], f"{name}/MatMul")
    return _add_bias(graph, y, checkpoint, linears, name, dtype) if add_bias else y


def _add_bias(
    graph: GraphBuilder,
    y: ir.Value,
    checkpoint: AnyCheckpoint,
    linears: list[StoredLinear],
    name: str,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Value:
    bias = concatenated_bias(checkpoint, linears)
    if bias is None:
        return y
    bias = bias.astype(dtype.numpy())
    return graph.value("Add", [y, graph.weight(f"{name}.bias", ir.tensor(bias))], f"{name}/Add")


def concatenated_bias(checkpoint: AnyCheckpoint, linears: list[StoredLinear]) -> np.ndarray | None:
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


def packed_name(block: Block) -> str:
    """Return the name under which query, key and value stand in a graph as one product."""
    return f"{block.attention}.qkv"


def _pack_nibbles(values: np.ndarray) -> np.ndarray:
    """Pack int8 of -8..7, an even number, as ONNX INT4: row-major, the first in the low nibble."""
    nibbles = values.reshape(-1).view(np.uint8) & 0x0F
    packed: np.ndarray = nibbles[0::2] | (nibbles[1::2] << 4)
    return packed
