"""A linear as QuantizeLinear, DequantizeLinear and a float product: the QDQ form of ONNX.

    x -> QuantizeLinear(s, int8 0) -> DequantizeLinear -> MatMul <- DequantizeLinear <- W, s_w

Every value between the two sides of the product is a multiple of s * s_w, so a runtime may multiply
the integers instead, exactly, which is what this form asks it for. Weights are INT8 or INT4
initializers [K, N] with a scale a column, or a scale a block of rows and column; where an input
stays in float, only the weight has its DequantizeLinear.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploy.checkpoint_reader import AnyCheckpoint, StoredLinear
from deploy.graph_builder import GraphBuilder
from deploy.linear_ops import concatenated_bias, stored_columns


def round_input(graph: GraphBuilder, x: ir.Value, scale: np.ndarray, name: str) -> ir.Value:
    """Add the nodes that round an input to the multiples of its scale.

    Args:
        graph: Receives the nodes.
        x: float32 [B, S, K].
        scale: The calibrated scale, float32 scalar.
        name: Prefix of node names.

    Returns:
        float32 [B, S, K].
    """
    step, zero = graph.constant(np.float32(scale)), graph.constant(np.int8(0))
    q = graph.value("QuantizeLinear", [x, step, zero], f"{name}/QuantizeLinear")
    return graph.value("DequantizeLinear", [q, step, zero], f"{name}/DequantizeLinear")


class RoundedInputs:
    """Rounds inputs; linears that read the same one with the same scale share the nodes.

    Args:
        graph: Receives the nodes.
        checkpoint: Holds the scales.
    """

    def __init__(self, graph: GraphBuilder, checkpoint: AnyCheckpoint) -> None:
        self._graph, self._checkpoint = graph, checkpoint
        self._found: dict[tuple[str | None, float], ir.Value] = {}

    def rounded(self, fqn: str, x: ir.Value) -> ir.Value:
        """Return the input of a linear, rounded where the checkpoint has a scale for it."""
        spec = self._checkpoint.linear(fqn).activation
        if spec is None or spec.is_float:
            return x
        scale = self._checkpoint.array(f"{fqn}.input_scale")
        key = (x.name, float(scale))
        if key not in self._found:
            self._found[key] = round_input(self._graph, x, scale, f"{fqn}/input")
        return self._found[key]


def dequantized_linear(
    graph: GraphBuilder,
    x: ir.Value,
    checkpoint: AnyCheckpoint,
    linears: list[StoredLinear],
    name: str,
    *,
    add_bias: bool = True,
) -> ir.Value:
    """Add one product for linears that read the same input, their outputs side by side.

    Args:
        graph: Receives the nodes.
        x: float32 [B, S, K], rounded already where the scheme does.
        checkpoint: Holds the integers.
        linears: One or more linears with the same bits and groups.
        name: Prefix of node names.
        add_bias: Whether the bias belongs to it; else a node behind it adds that.

    Returns:
        float32 [B, S, sum of out_features].
    """
    spec = linears[0].weight
    weight = stored_columns(graph, checkpoint, linears, name)
    parts = [checkpoint.array(f"{linear.fqn}.weight_scale") for linear in linears]
    scales = np.ascontiguousarray(np.concatenate(parts).T)
    zeros = None
    if spec.bits != 4:
        # ONNX Runtime turns bytes unsigned where that is faster or exact. It takes zero points that
        # are left out for scalars then, and fails on those that two nodes share.
        zero = ir.tensor(np.zeros(scales.shape, np.int8))
        zeros = graph.weight(f"{name}.weight_zero_point", zero)
    weight = graph.value(
        "DequantizeLinear",
        [weight, graph.weight(f"{name}.weight_scale", ir.tensor(scales)), zeros],
        f"{name}/DequantizeLinear",
        axis=1 if spec.group_size is None else 0,
        block_size=spec.group_size or 0,
    )
    y = graph.value("MatMul", [x, weight], f"{name}/MatMul")
    bias = concatenated_bias(checkpoint, linears) if add_bias else None
    if bias is None:
        return y
    return graph.value("Add", [y, graph.weight(f"{name}.bias", ir.tensor(bias))], f"{name}/Add")
