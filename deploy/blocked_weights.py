"""The weight layout of MatMulNBits, and its nodes for kernels that want plain signed integers.

A linear's rows are cut into blocks of input columns, bytes [N, blocks, block * bits / 8], unsigned
with zero point 2^(bits - 1), of two nibbles the lower first. The last block is filled with zero
points where the block does not divide K.

Read as signed integers of the same width, those bytes are the weights with the top bit flipped. So
an integer graph may declare the very same bytes of the file as INT8 or INT4 and flip that bit back;
ONNX Runtime folds these nodes into a constant when it loads the graph:

    (Cast to INT8) -> BitwiseXor(., -2^(bits - 1)) -> (Slice) -> Transpose: int8 [K, N]

Weights without groups have one scale per row, which is repeated for each block in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploy.checkpoint_reader import AnyCheckpoint, StoredLinear, slabs
from deploy.graph_builder import GraphBuilder

BLOCK_SIZES = (128, 64, 32, 16)
"""Preferred first; for all of them ONNX Runtime has a kernel with 8-bit activations."""
FILLED_BLOCK_SIZE = 32
"""For sizes that none of them divides: little filling, at nearly the speed of 128."""


@dataclass(frozen=True)
class BlockedLayout:
    """Sizes of the weights of linears that share an input, one below the other."""

    bits: int
    """4 or 8."""
    rows: int
    columns: int
    block_size: int
    scales_per_row: int
    """1, or the number of the weight's groups, which then are the blocks."""

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.columns // self.block_size)

    @property
    def zero_point(self) -> int:
        """What stands for 0."""
        return 1 << (self.bits - 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape in bytes."""
        return self.rows, self.blocks, self.block_size * self.bits // 8


def blocked_layout(linears: list[StoredLinear]) -> BlockedLayout:
    """Return the layout of linears with the same input and format."""
    first = linears[0]
    columns, group = first.in_features, first.weight.group_size
    dividing = (size for size in BLOCK_SIZES if columns % size == 0)
    input_group = None if first.activation is None else first.activation.group_size
    block = group or input_group or next(dividing, FILLED_BLOCK_SIZE)
    return BlockedLayout(
        bits=4 if first.weight.bits == 4 else 8,
        rows=sum(linear.out_features for linear in linears),
        columns=columns,
        block_size=block,
        scales_per_row=1 if group is None else columns // group,
    )


def pack_blocks(
    checkpoint: AnyCheckpoint, linears: list[StoredLinear], layout: BlockedLayout
) -> np.ndarray:
    """Read the integers of linears and lay them out, uint8 of the layout's shape."""
    width = layout.blocks * layout.block_size
    filled = width != layout.columns
    packed = np.empty((layout.rows, width * layout.bits // 8), np.uint8)
    row = 0
    for linear in linears:
        for some in slabs(linear.out_features, layout.columns):
            place = packed[row + some.start : row + some.stop]
            if layout.bits == 4 and not filled:  # the checkpoint's own bytes
                place[:] = checkpoint.part(f"{linear.fqn}.weight", some)
                continue
            shifted = checkpoint.integer_rows(linear, some).view(np.uint8)
            shifted = shifted + np.uint8(layout.zero_point)
            if filled:
                missing = ((0, 0), (0, width - layout.columns))
                shifted = np.pad(shifted, missing, constant_values=layout.zero_point)
            place[:] = shifted if layout.bits == 8 else shifted[:, 0::2] | (shifted[:, 1::2] << 4)
        row += linear.out_features
    return packed.reshape(layout.shape)


def unpack_blocks(stored: np.ndarray, layout: BlockedLayout) -> np.ndarray:
    """Return the integers, int8 [rows, columns], of bytes in the layout."""
    flat = stored.reshape(layout.rows, -1).view(np.uint8)
    if layout.bits == 4:
        flat = np.stack((flat & 0x0F, flat >> 4), axis=-1).reshape(layout.rows, -1)
    return (flat - np.uint8(layout.zero_point)).view(np.int8)[:, : layout.columns]


def integer_weight(
    graph: GraphBuilder,
    checkpoint: AnyCheckpoint,
    linears: list[StoredLinear],
    layout: BlockedLayout,
    name: str,
    *,
    shifted: bool = False,
) -> ir.Value:
    """Add the weight as int8 [K, N], or shifted to uint8, unpacked when the graph is loaded.

    Args:
        graph: Receives the nodes.
        checkpoint: Holds the integers.
        linears: Linears with the same input and format.
        layout: Of their weights.
        name: Prefix of names.
        shifted: Leave bytes as they are stored: uint8 with zero point 128.
    """
    width = layout.blocks * layout.block_size
    shape = (layout.rows, width)

    def read_nibbles() -> ir.TensorProtocol:
        packed = pack_blocks(checkpoint, linears, layout)
        return ir.PackedTensor(packed.reshape(-1), ir.DataType.INT4, shape=ir.Shape(shape))

    def read_bytes() -> ir.TensorProtocol:
        packed = pack_blocks(checkpoint, linears, layout)
        return ir.tensor((packed if shifted else packed.view(np.int8)).reshape(shape))

    if layout.bits == 4:
        weight = graph.lazy_weight(f"{name}.weight", ir.DataType.INT4, shape, read_nibbles)
        weight = graph.value("Cast", [weight], f"{name}/Cast", to=ir.DataType.INT8)
    else:
        dtype = ir.DataType.UINT8 if shifted else ir.DataType.INT8
        weight = graph.lazy_weight(f"{name}.weight", dtype, shape, read_bytes)
    if not shifted:
        top_bit = graph.constant(np.int8(-layout.zero_point))
        weight = graph.value("BitwiseXor", [weight, top_bit], f"{name}/BitwiseXor")
    if width != layout.columns:
        start, end, axis = (
            graph.constant(np.array([number], np.int64)) for number in (0, layout.columns, 1)
        )
        weight = graph.value("Slice", [weight, start, end, axis], f"{name}/Slice")
    return graph.value("Transpose", [weight], f"{name}/Transpose", perm=[1, 0])


def block_scales(
    graph: GraphBuilder, scales: np.ndarray, layout: BlockedLayout, name: str
) -> ir.Value:
    """Add the scales as float32 [N, blocks]; a row's only scale is repeated at load.

    Args:
        graph: Receives the nodes.
        scales: float32 [N] or [N, blocks].
        layout: Of the weight.
        name: Prefix of names.
    """
    stored = np.ascontiguousarray(scales.reshape(layout.rows, layout.scales_per_row))
    value = graph.weight(f"{name}.weight_scale", ir.tensor(stored))
    if layout.scales_per_row == layout.blocks:
        return value
    shape = graph.constant(np.array([layout.rows, layout.blocks], np.int64))
    return graph.value("Expand", [value, shape], f"{name}/Expand")
