"""The encoder in standard ONNX operators alone, for any runtime that reads opset 21.

Attention is softmax(q k^T / sqrt(d) + bias) v with -1e4 at padding, GELU and LayerNormalization are
ONNX's own, linears as in `qdq_ops`. Embeddings, norms and the head are `EncoderGraph`'s.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploy.encoder_checkpoint import EncoderCheckpoint
from deploy.encoder_graph import GELU, RELU, EncoderGraph
from deploy.input_ops import QuantizedInput
from deploy.kernels import GraphForm
from deploy.portable_graph import FORBIDDEN
from deploy.qdq_ops import RoundedInputs, dequantized_linear
from rolora.encoder import EncoderBlockNames


class PortableEncoderGraph(EncoderGraph):
    """Assembles the portable graph of one checkpoint; see `EncoderGraph`."""

    def __init__(self, checkpoint: EncoderCheckpoint, form: GraphForm) -> None:
        super().__init__(checkpoint, form)
        self._inputs = RoundedInputs(self._graph, checkpoint)

    def _padding(self, mask: ir.Value) -> ir.Value:
        """Return what is added to scores, float32 [B, 1, 1, S]."""
        graph = self._graph
        is_text = graph.value("Cast", [mask], "mask/Cast", to=ir.DataType.BOOL)
        values = [graph.constant(np.float32(value)) for value in (0.0, FORBIDDEN)]
        bias = graph.value("Where", [is_text, *values], "mask/Where")
        axes = graph.constant(np.array([1, 2], np.int64))
        return graph.value("Unsqueeze", [bias, axes], "mask/Unsqueeze")

    def _attend(
        self, block: EncoderBlockNames, heads: tuple[ir.Value, ...], padding: ir.Value
    ) -> ir.Value:
        graph, names, prefix = self._graph, self._names, block.attention
        size = names.hidden_size // names.num_heads
        split = graph.constant(np.array([0, 0, names.num_heads, size], np.int64))
        turns = {"query": [0, 2, 1, 3], "key": [0, 2, 3, 1], "value": [0, 2, 1, 3]}
        by_head = []
        for fqn, x, (part, turn) in zip(
            (block.query, block.key, block.value), heads, turns.items(), strict=True
        ):
            x = graph.value("Add", [x, self._bias([fqn])], f"{fqn}/Add")
            x = graph.value("Reshape", [x, split], f"{prefix}/{part}/Reshape")
            by_head.append(graph.value("Transpose", [x], f"{prefix}/{part}/Transpose", perm=turn))
        query, key, value = by_head
        query = graph.value(
            "Mul", [query, graph.constant(np.float32(size**-0.5))], f"{prefix}/scale/Mul"
        )
        scores = graph.value("MatMul", [query, key], f"{prefix}/scores/MatMul")
        scores = graph.value("Add", [scores, padding], f"{prefix}/scores/Add")
        weights = graph.value("Softmax", [scores], f"{prefix}/Softmax", axis=-1)
        mixed = graph.value("MatMul", [weights, value], f"{prefix}/values/MatMul")
        mixed = graph.value("Transpose", [mixed], f"{prefix}/mixed/Transpose", perm=[0, 2, 1, 3])
        joined = graph.constant(np.array([0, 0, names.hidden_size], np.int64))
        return graph.value("Reshape", [mixed, joined], f"{prefix}/mixed/Reshape")

    def _activated(self, fqn: str, x: ir.Value) -> ir.Value:
        graph, activation = self._graph, self._config.hidden_act
        biased = graph.value("Add", [x, self._bias([fqn])], f"{fqn}/Add")
        if activation in RELU:
            return graph.value("Relu", [biased], f"{fqn}/Relu")
        approximate = "none" if activation in GELU else "tanh"
        return graph.value("Gelu", [biased], f"{fqn}/Gelu", approximate=approximate)

    def _quantized(self, fqn: str, x: ir.Value) -> QuantizedInput | None:
        """Quantize nothing ahead: `_linear` rounds the input, once for all its readers."""
        return None

    def _linear(
        self, fqns: list[str], x: ir.Value, quantized: QuantizedInput | None, name: str
    ) -> ir.Value:
        linears = [self._checkpoint.linear(fqn) for fqn in fqns]
        if linears[0].activation is None:
            return super()._linear(fqns, x, quantized, name)
        x = self._inputs.rounded(fqns[0], x)
        return dequantized_linear(self._graph, x, self._checkpoint, linears, name, add_bias=False)
