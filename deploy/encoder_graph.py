"""The encoder as an ONNX graph of few nodes.

    input_ids, attention_mask (, token_type_ids) -> embeddings -> blocks -> last_hidden_state
                                                             (-> first token -> head -> logits)

Per block: the input quantized once for query, key and value, which are one product; attention; the
output projection; sum and norm; the MLP's two linears with GELU between them; sum and norm. No bias
has a node of its own: MultiHeadAttention, Sum and BiasGelu add it. Padding may stand anywhere in a
text: the mask hides its keys.

Sum and LayerNormalization take a quarter of the time of SkipLayerNormalization, which ONNX Runtime
makes of Add and LayerNormalization, but not of Sum: 0.29 ms instead of 1.03 for 512 x 384 values
(ONNX Runtime 1.32, x64 with AVX-512, 1 thread).

It is built rather than traced from the torch model: a trace has attention, norms and the quantizers
in parts that no fusion of ONNX Runtime puts together again.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploy.checkpoint_ops import CheckpointOps
from deploy.encoder_architecture import encoder_family_of
from deploy.encoder_checkpoint import EncoderCheckpoint
from deploy.encoder_session import LOGITS_NAME
from deploy.errors import UnsupportedModelError
from deploy.graph_builder import MICROSOFT, GraphBuilder, graph_value, name_output
from deploy.input_ops import QuantizedInput
from deploy.kernels import ONE_INTEGER_GRAPH, GraphForm
from deploy.linear_ops import concatenated_bias, packed_name
from deploy.session import HIDDEN_NAME
from rolora.encoder import EncoderBlockNames

GELU = ("gelu",)
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""GELU by its approximation with tanh."""
RELU = ("relu",)
_TEXTS = ("batch_size", "sequence_length")


class EncoderGraph:
    """Assembles the graph of one checkpoint.

    Args:
        checkpoint: Quantized or float, with a classification head or bare.
        form: How integer products are stored.

    Raises:
        UnsupportedModelError: The activation of the MLPs has no node.
    """

    def __init__(self, checkpoint: EncoderCheckpoint, form: GraphForm = ONE_INTEGER_GRAPH) -> None:
        activation = checkpoint.config.hidden_act
        if activation not in (*GELU, *GELU_TANH, *RELU):
            raise UnsupportedModelError(
                f"{checkpoint.directory}: hidden_act is {activation!r}; an encoder is exported "
                f"with {', '.join((*GELU, *GELU_TANH, *RELU))}"
            )
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._names = checkpoint.names
        self._graph = GraphBuilder("encoder")
        self._ops = CheckpointOps(self._graph, checkpoint, form)

    def build(self) -> ir.Model:
        """Return the model with lazy weights; saving it reads them from the checkpoint."""
        graph, names = self._graph, self._names
        input_ids, mask, token_types = (
            graph_value(name, ir.DataType.INT64, _TEXTS)
            for name in ("input_ids", "attention_mask", "token_type_ids")
        )
        tells_types = self._config.type_vocab_size > 1
        hidden = self._embed(input_ids, token_types if tells_types else None)
        padding = self._padding(mask)
        for block in names.blocks:
            hidden = self._block(block, hidden, padding)
        wide = (*_TEXTS, names.hidden_size)
        outputs = [name_output(hidden, HIDDEN_NAME, ir.DataType.FLOAT, wide)]
        if names.head_linears is not None:
            outputs.insert(0, self._head(hidden, *names.head_linears))
        return graph.build([input_ids, mask, *([token_types] if tells_types else [])], outputs)

    def _padding(self, mask: ir.Value) -> ir.Value:
        """Turn the mask, int64 [B, S], to what attention takes."""
        return self._graph.value("Cast", [mask], "mask/Cast", to=ir.DataType.INT32)

    def _embed(self, input_ids: ir.Value, token_types: ir.Value | None) -> ir.Value:
        """Add the sum of the three embeddings, and its norm."""
        graph, names = self._graph, self._names
        rows, fqn = self._ops.look_up(input_ids), names.token_types
        bias = None
        if token_types is None:  # the only row is added like a bias
            row = self._checkpoint.array(f"{fqn}.weight")[0]
            bias = graph.weight(f"{fqn}.weight", ir.tensor(row))
        else:
            types = graph.value("Gather", [self._weight(fqn), token_types], f"{fqn}/Gather")
            rows = graph.value("Add", [rows, types], f"{fqn}/Add")
        return self._norm(names.embedding_norm, rows, self._positions(input_ids), bias)

    def _positions(self, input_ids: ir.Value) -> ir.Value:
        """Add the position embeddings, float32 [B, S, D] or [1, S, D]."""
        graph, fqn = self._graph, self._names.positions
        table = self._weight(fqn)
        if not encoder_family_of(self._config.model_type).counts_from_padding:
            count = graph.value("Shape", [input_ids], f"{fqn}/Shape", start=1, end=2)
            zero = graph.constant(np.array([0], np.int64))
            rows = graph.value("Slice", [table, zero, count, zero], f"{fqn}/Slice")
            return graph.value("Unsqueeze", [rows, zero], f"{fqn}/Unsqueeze")
        pad = graph.constant(np.int64(self._config.pad_token_id))
        is_pad = graph.value("Equal", [input_ids, pad], f"{fqn}/Equal")
        is_text = graph.value("Not", [is_pad], f"{fqn}/Not")
        ones = graph.value("Cast", [is_text], f"{fqn}/Cast", to=ir.DataType.INT64)
        ordinal = graph.value("CumSum", [ones, graph.constant(np.int64(1))], f"{fqn}/CumSum")
        counted = graph.value("Mul", [ordinal, ones], f"{fqn}/Mul")
        places = graph.value("Add", [counted, pad], f"{fqn}/Add")
        return graph.value("Gather", [table, places], f"{fqn}/Gather")

    def _block(self, block: EncoderBlockNames, hidden: ir.Value, padding: ir.Value) -> ir.Value:
        """Add attention and MLP."""
        attended = self._attention(block, hidden, padding)
        projected = self._product([block.output], attended, block.output)
        middle = self._norm(block.attention_norm, hidden, projected, self._bias([block.output]))
        up = self._product([block.up], middle, block.up)
        down = self._product([block.down], self._activated(block.up, up), block.down)
        return self._norm(block.mlp_norm, middle, down, self._bias([block.down]))

    def _attention(self, block: EncoderBlockNames, hidden: ir.Value, padding: ir.Value) -> ir.Value:
        """Add attention without its output projection, float32 [B, S, D]."""
        readers = [block.query, block.key, block.value]
        formats = [self._checkpoint.linear(fqn) for fqn in readers]
        quantized = self._quantized(block.query, hidden)
        if all(
            (each.weight, each.activation) == (formats[0].weight, formats[0].activation)
            for each in formats
        ):
            packed = self._linear(readers, hidden, quantized, packed_name(block))
            heads = self._graph.node(
                "Split",
                [packed],
                f"{block.attention}/Split",
                outputs=("_query", "_key", "_value"),
                axis=-1,
                num_outputs=3,
            )
        else:
            heads = tuple(self._linear([fqn], hidden, quantized, fqn) for fqn in readers)
        return self._attend(block, heads, padding)

    def _attend(
        self, block: EncoderBlockNames, heads: tuple[ir.Value, ...], padding: ir.Value
    ) -> ir.Value:
        """Add attention itself, with the biases of query, key and value."""
        return self._graph.value(
            "MultiHeadAttention",
            [*heads, self._bias([block.query, block.key, block.value]), padding],
            f"{block.attention}/MultiHeadAttention",
            domain=MICROSOFT,
            num_heads=self._names.num_heads,
        )

    def _activated(self, fqn: str, x: ir.Value) -> ir.Value:
        """Add the bias of the MLP's first linear, and its activation."""
        graph, activation, bias = self._graph, self._config.hidden_act, self._bias([fqn])
        if activation in RELU:
            biased = graph.value("Add", [x, bias], f"{fqn}/Add")
            return graph.value("Relu", [biased], f"{fqn}/Relu")
        operator = "BiasGelu" if activation in GELU else "FastGelu"
        return graph.value(operator, [x, bias], f"{fqn}/{operator}", domain=MICROSOFT)

    def _product(self, fqns: list[str], x: ir.Value, name: str) -> ir.Value:
        """Add a linear without its bias."""
        return self._linear(fqns, x, self._quantized(fqns[0], x), name)

    def _quantized(self, fqn: str, x: ir.Value) -> QuantizedInput | None:
        """See `CheckpointOps.quantized`."""
        return self._ops.quantized(fqn, x)

    def _linear(
        self, fqns: list[str], x: ir.Value, quantized: QuantizedInput | None, name: str
    ) -> ir.Value:
        """Add the product of linears that read one input, without their biases."""
        return self._ops.linear(fqns, x, quantized, name, bias=False)

    def _bias(self, fqns: list[str]) -> ir.Value:
        """Add the biases of linears, side by side."""
        linears = [self._checkpoint.linear(fqn) for fqn in fqns]
        bias = concatenated_bias(self._checkpoint, linears)
        assert bias is not None, "every linear of an encoder has one"
        return self._graph.weight(f"{fqns[0]}.bias", ir.tensor(bias))

    def _norm(self, fqn: str, x: ir.Value, skip: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Add the LayerNorm of x + skip + bias."""
        gain, shift = (
            self._graph.weight(f"{fqn}.{part}", ir.tensor(self._checkpoint.array(f"{fqn}.{part}")))
            for part in ("weight", "bias")
        )
        added = self._graph.value("Sum", [x, skip, *([] if bias is None else [bias])], f"{fqn}/Sum")
        return self._graph.value(
            "LayerNormalization",
            [added, gain, shift],
            f"{fqn}/LayerNormalization",
            epsilon=float(self._config.layer_norm_eps),
        )

    def _head(self, hidden: ir.Value, first: str, last: str) -> ir.Value:
        """Add the logits of a classifier, from each text's first token."""
        graph = self._graph
        state = graph.value("Gather", [hidden, graph.constant(np.int64(0))], "head/Gather", axis=1)
        pooled = graph.value("Tanh", [self._gemm(first, state)], f"{first}/Tanh")
        shape = ("batch_size", self._checkpoint.shape(f"{last}.weight")[0])
        return name_output(self._gemm(last, pooled), LOGITS_NAME, ir.DataType.FLOAT, shape)

    def _weight(self, fqn: str) -> ir.Value:
        """Add a float weight or table as it is stored."""
        key = f"{fqn}.weight"
        return self._graph.lazy_weight(
            key,
            ir.DataType.FLOAT,
            self._checkpoint.shape(key),
            lambda: ir.tensor(self._checkpoint.array(key)),
        )

    def _gemm(self, fqn: str, x: ir.Value) -> ir.Value:
        """Add a float linear over rows [B, K]."""
        weight = self._weight(fqn)
        bias = self._graph.weight(f"{fqn}.bias", ir.tensor(self._checkpoint.array(f"{fqn}.bias")))
        return self._graph.value("Gemm", [x, weight, bias], f"{fqn}/Gemm", transB=1)
