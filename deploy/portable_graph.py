"""The decoder in standard ONNX operators alone, for any runtime that reads opset 21.

What ONNX Runtime has fused operators for stands here in the parts that TensorRT, OpenVINO, QNN and
the compilers of other runtimes recognize: RMSNorm as Pow, ReduceMean, Add, Sqrt, Div, Mul; SiLU as
Sigmoid and Mul; caps as Div, Tanh, Mul; attention as below; linears as in `qdq_ops`. The cache
grows by Concat, so past and present are different tensors, and padding may stand on either side of
a prompt:

    positions   cumulative sum of the mask - 1, of the new tokens
    allowed     columns that are no later than the row's, in the mask, and inside the window
    per layer   q, k rotated by halves; k, v appended to the past; softmax(q k^T / sqrt(d) + bias) v

Query heads that share a key head are rows of one product, so no key or value is repeated.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np
import onnx_ir as ir

from deploy.attention_inputs import rotary_tables
from deploy.checkpoint import Checkpoint
from deploy.conventions import LayerAttention, rotary_size
from deploy.decoder_graph import DecoderGraph
from deploy.graph_builder import GraphBuilder
from deploy.input_ops import QuantizedInput
from deploy.kernels import GraphForm
from deploy.qdq_ops import RoundedInputs, dequantized_linear
from rolora.decoder import BlockNames

FORBIDDEN = -1e4
"""Added to the scores of columns that a token must not see; fits float16."""


class PortableGraph(DecoderGraph):
    """Assembles the portable graph of one checkpoint; see `DecoderGraph`."""

    head_dim_multiple = 2

    def __init__(
        self,
        checkpoint: Checkpoint,
        form: GraphForm,
        stored: Mapping[str, ir.ExternalTensor] | None = None,
        adapted: Container[str] = (),
    ) -> None:
        super().__init__(checkpoint, form, stored, adapted)
        self._inputs = RoundedInputs(self.graph, checkpoint)
        self._bias: dict[int | None, ir.Value] = {}

    def _prepare_attention(self, input_ids: ir.Value, mask: ir.Value, past_keys: ir.Value) -> None:
        """Add positions, the rotary embedding's factors and the mask of each window size."""
        graph = self.graph
        one, zero = graph.constant(np.int64(1)), graph.constant(np.int64(0))
        count = _length(graph, input_ids, "tokens")
        total = _length(graph, mask, "columns")
        ordinal = graph.value("CumSum", [mask, one], "positions/CumSum")
        self._column_positions = graph.value("Sub", [ordinal, one], "positions/Sub")
        past = graph.value("Sub", [total, count], "past/Sub")
        columns = graph.value("Range", [zero, total, one], "columns/Range")
        start, end = (
            graph.value("Unsqueeze", [value, _axes(graph, 0)], f"{name}/Unsqueeze")
            for name, value in (("past", past), ("total", total))
        )
        rows = graph.value("Slice", [columns, start, end], "rows/Slice")
        positions = graph.value(
            "Slice", [self._column_positions, start, end, _axes(graph, 1)], "positions/Slice"
        )
        # Padding on the left has no position.
        self._row_positions = graph.value("Max", [positions, zero], "positions/Max")
        rows = graph.value("Unsqueeze", [rows, _axes(graph, 1)], "rows/Unsqueeze")
        causal = graph.value("LessOrEqual", [columns, rows], "causal/LessOrEqual")
        real = graph.value("Cast", [mask], "mask/Cast", to=ir.DataType.BOOL)
        real = graph.value("Unsqueeze", [real, _axes(graph, 1)], "mask/Unsqueeze")
        self._allowed = graph.value("And", [causal, real], "mask/And")
        self._factors = {
            kind: self._rotary_factors(kind)
            for kind in dict.fromkeys(layer.rope for layer in self.computed.layers)
        }

    def _rotary_factors(self, kind: str | None) -> list[ir.Value]:
        """Look up cos and sin of the new tokens, float32 [B, 1, S, rotary size / 2]."""
        graph = self.graph
        prefix = "" if kind is None else f"{kind}."
        factors = []
        for part, table in zip(("cos", "sin"), rotary_tables(self.config, kind), strict=True):
            stored = graph.weight(f"{prefix}{part}_cache", ir.tensor(table))
            found = graph.value("Gather", [stored, self._row_positions], f"{prefix}{part}/Gather")
            factors.append(
                graph.value("Unsqueeze", [found, _axes(graph, 1)], f"{prefix}{part}/Unsqueeze")
            )
        return factors

    def _mask_bias(self, window: int | None) -> ir.Value:
        """Return what is added to scores, float32 [B, 1, 1, S, T]; layers alike share it."""
        if window in self._bias:
            return self._bias[window]
        graph, allowed = self.graph, self._allowed
        name = "bias" if window is None else f"bias/{window}"
        if window is not None:
            rows = graph.value(
                "Unsqueeze", [self._row_positions, _axes(graph, 2)], f"{name}/rows/Unsqueeze"
            )
            columns = graph.value(
                "Unsqueeze", [self._column_positions, _axes(graph, 1)], f"{name}/columns/Unsqueeze"
            )
            distance = graph.value("Sub", [rows, columns], f"{name}/Sub")
            inside = graph.value(
                "Less", [distance, graph.constant(np.int64(window))], f"{name}/Less"
            )
            allowed = graph.value("And", [allowed, inside], f"{name}/And")
        values = [graph.constant(np.float32(value)) for value in (0.0, FORBIDDEN)]
        bias = graph.value("Where", [allowed, *values], f"{name}/Where")
        self._bias[window] = graph.value(
            "Unsqueeze", [bias, _axes(graph, 1, 2)], f"{name}/Unsqueeze"
        )
        return self._bias[window]

    def _norm(
        self, fqn: str, stream: ir.Value, delta: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        graph = self.graph
        if delta is not None:
            stream = graph.value("Add", [stream, delta], f"{fqn}/residual/Add")
        two, epsilon = (
            graph.constant(np.float32(value)) for value in (2.0, self.config.rms_norm_eps)
        )
        square = graph.value("Pow", [stream, two], f"{fqn}/Pow")
        mean = graph.value("ReduceMean", [square, _axes(graph, -1)], f"{fqn}/ReduceMean")
        mean = graph.value("Add", [mean, epsilon], f"{fqn}/Add")
        rms = graph.value("Sqrt", [mean], f"{fqn}/Sqrt")
        normed = graph.value("Div", [stream, rms], f"{fqn}/Div")
        return graph.value("Mul", [normed, self._gain(fqn)], f"{fqn}/Mul"), stream

    def _silu(self, x: ir.Value, prefix: str) -> ir.Value:
        gate = self.graph.value("Sigmoid", [x], f"{prefix}/Sigmoid")
        return self.graph.value("Mul", [x, gate], f"{prefix}/silu/Mul")

    def _attend(
        self,
        block: BlockNames,
        heads: list[ir.Value | None],
        past: list[ir.Value],
        layer: LayerAttention,
    ) -> tuple[ir.Value, ...]:
        graph, names = self.graph, self.names
        prefix = block.output.rpartition(".")[0]
        shared, size = names.num_key_value_heads, names.head_dim
        queries, group = names.num_heads, names.num_heads // names.num_key_value_heads
        packed = heads[0]
        if heads[1] is not None:
            packed = graph.value("Concat", heads, f"{prefix}/qkv/Concat", axis=-1)
        split = graph.constant(np.array([0, 0, queries + 2 * shared, size], np.int64))
        by_head = graph.value("Reshape", [packed, split], f"{prefix}/heads/Reshape")
        by_head = graph.value(
            "Transpose", [by_head], f"{prefix}/heads/Transpose", perm=[0, 2, 1, 3]
        )
        counts = graph.constant(np.array([queries + shared, shared], np.int64))
        both, value = graph.node(
            "Split", [by_head, counts], f"{prefix}/v/Split", outputs=("_qk", "_v"), axis=1
        )
        counts = graph.constant(np.array([queries, shared], np.int64))
        query, key = graph.node(
            "Split",
            [self._rotate(both, prefix, layer.rope), counts],
            f"{prefix}/qk/Split",
            outputs=("_q", "_k"),
            axis=1,
        )
        key, value = (
            graph.value("Concat", [before, now], f"{prefix}/{part}/Concat", axis=2)
            for part, before, now in (("key", past[0], key), ("value", past[1], value))
        )

        def reshape(x: ir.Value, shape: list[int], name: str) -> ir.Value:
            sizes = graph.constant(np.array(shape, np.int64))
            return graph.value("Reshape", [x, sizes], f"{prefix}/{name}/Reshape")

        scale = graph.constant(np.float32(self.computed.attention_scale))
        query = graph.value("Mul", [query, scale], f"{prefix}/q/Mul")
        # Rows are (head of the group, token); ONNX shapes infer the tokens, 0 keeps the batch.
        query = reshape(query, [0, shared, -1, size], "q")
        turned = graph.value("Transpose", [key], f"{prefix}/key/Transpose", perm=[0, 1, 3, 2])
        scores = graph.value("MatMul", [query, turned], f"{prefix}/scores/MatMul")
        total = graph.value("Shape", [turned], f"{prefix}/total/Shape", start=3, end=4)
        fixed = graph.constant(np.array([0, shared, group, -1], np.int64))
        wide = graph.value("Concat", [fixed, total], f"{prefix}/scores/Concat", axis=0)
        scores = graph.value("Reshape", [scores, wide], f"{prefix}/scores/Reshape")
        if (cap := self.computed.attention_cap) is not None:
            scores = self._capped(scores, cap, f"{prefix}/scores")
        bias = self._mask_bias(layer.window)
        scores = graph.value("Add", [scores, bias], f"{prefix}/scores/Add")
        weights = graph.value("Softmax", [scores], f"{prefix}/Softmax", axis=-1)
        fixed = graph.constant(np.array([0, shared, -1], np.int64))
        flat = graph.value("Concat", [fixed, total], f"{prefix}/weights/Concat", axis=0)
        weights = graph.value("Reshape", [weights, flat], f"{prefix}/weights/Reshape")
        mixed = graph.value("MatMul", [weights, value], f"{prefix}/values/MatMul")
        mixed = reshape(mixed, [0, queries, -1, size], "mixed")
        mixed = graph.value("Transpose", [mixed], f"{prefix}/mixed/Transpose", perm=[0, 2, 1, 3])
        return reshape(mixed, [0, 0, queries * size], "attended"), key, value

    def _rotate(self, x: ir.Value, prefix: str, kind: str | None) -> ir.Value:
        """Apply the rotary embedding to heads [B, heads, S, head_dim], or to the part it turns."""
        turned, whole = rotary_size(self.config), self.names.head_dim
        if turned == whole:
            return self._rotate_halves(x, prefix, kind)
        graph, name = self.graph, f"{prefix}/rotary/part"
        sizes = graph.constant(np.array([turned, whole - turned], np.int64))
        part, rest = graph.node(
            "Split", [x, sizes], f"{name}/Split", outputs=("_part", "_rest"), axis=-1
        )
        part = self._rotate_halves(part, prefix, kind)
        return graph.value("Concat", [part, rest], f"{name}/Concat", axis=-1)

    def _rotate_halves(self, x: ir.Value, prefix: str, kind: str | None) -> ir.Value:
        graph, name = self.graph, f"{prefix}/rotary"
        cos, sin = self._factors[kind]
        halves = graph.constant(np.array([rotary_size(self.config) // 2] * 2, np.int64))
        low, high = graph.node(
            "Split", [x, halves], f"{name}/Split", outputs=("_low", "_high"), axis=-1
        )

        def mul(a: ir.Value, b: ir.Value, part: str) -> ir.Value:
            return graph.value("Mul", [a, b], f"{name}/{part}/Mul")

        left = graph.value(
            "Sub", [mul(low, cos, "low_cos"), mul(high, sin, "high_sin")], f"{name}/Sub"
        )
        right = graph.value(
            "Add", [mul(high, cos, "high_cos"), mul(low, sin, "low_sin")], f"{name}/Add"
        )
        return graph.value("Concat", [left, right], f"{name}/Concat", axis=-1)

    def _quantized(self, fqn: str, x: ir.Value) -> QuantizedInput | None:
        """Quantize nothing ahead: `_product` rounds the input, once for all its readers."""
        return None

    def _product(
        self,
        fqns: list[str],
        x: ir.Value,
        quantized: QuantizedInput | None,
        name: str,
        *,
        half: bool,
    ) -> ir.Value:
        linears = [self.checkpoint.linear(fqn) for fqn in fqns]
        if linears[0].activation is None:
            return super()._product(fqns, x, quantized, name, half=half)
        x = self._inputs.rounded(fqns[0], x)
        return dequantized_linear(self.graph, x, self.checkpoint, linears, name)


def _axes(graph: GraphBuilder, *axes: int) -> ir.Value:
    """Return axes as the operators take them, int64 [n]."""
    return graph.constant(np.array(axes, np.int64))


def _length(graph: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """Add the second dimension of a matrix, int64 scalar."""
    shape = graph.value("Shape", [x], f"{name}/Shape", start=1, end=2)
    return graph.value("Squeeze", [shape], f"{name}/Squeeze")
