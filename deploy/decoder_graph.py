"""The decoder as an ONNX graph, as small as ONNX Runtime GenAI's own builder makes it.

    input_ids -> embedding -> blocks -> final norm -> head -> logits

Per block: skip-norm, packed q/k/v, GroupQueryAttention with the rotary embedding inside, output
projection, skip-norm, gate and up, SiLU (QuickGelu with alpha 1) or GELU, the online rotation R4
where the checkpoint has one, down; in some families a norm behind output projection and down. An
input is quantized once for all the linears that read it. Behind a product whose linears an adapter
changes at run time stands a branch that reads the float input (`adapter_ops`).
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np
import onnx_ir as ir

from deploy.adapter_ops import adapter_branch
from deploy.architecture import QueryKeyNorms, qk_norms
from deploy.attention_inputs import AttentionInputs, Scores, attention_inputs, last_hidden
from deploy.attention_ops import attention_node, cache_dtype, has_rotary_nodes
from deploy.checkpoint import Checkpoint
from deploy.checkpoint_ops import CheckpointOps
from deploy.conventions import LayerAttention, conventions, rotary_size
from deploy.errors import UnsupportedModelError
from deploy.families import Activation
from deploy.graph_builder import MICROSOFT, GraphBuilder, graph_value, name_output
from deploy.input_ops import QuantizedInput
from deploy.kernels import ONE_INTEGER_GRAPH, GraphForm
from deploy.linear_ops import packed_name
from deploy.session import HIDDEN_NAME, TOKEN_NAME
from deploy.targets import Target
from rolora.decoder import BlockNames
from rolora.fold import norms_and_readers
from rolora.kronecker import Rotation

HEAD_DIM_MULTIPLE = 16
"""What GroupQueryAttention demands of the head size, and of the part of it that it rotates."""


class DecoderGraph:
    """Assembles the graph of one checkpoint.

    Args:
        checkpoint: A rotated or unrotated, quantized or float checkpoint.
        form: Which kernels and outputs the graph has.
        stored: Weights that the first graph of an export has written.
        adapted: FQNs of linears that an adapter may change at run time.

    Raises:
        UnsupportedModelError: ONNX Runtime's attention cannot run the model's head size, or store
            its KV cache.
    """

    head_dim_multiple = HEAD_DIM_MULTIPLE

    def __init__(
        self,
        checkpoint: Checkpoint,
        form: GraphForm = ONE_INTEGER_GRAPH,
        stored: Mapping[str, ir.ExternalTensor] | None = None,
        adapted: Container[str] = (),
    ) -> None:
        rotated, head_dim = rotary_size(checkpoint.config), checkpoint.names.head_dim
        if rotated % self.head_dim_multiple or head_dim % self.head_dim_multiple:
            raise UnsupportedModelError(
                f"{checkpoint.directory}: its rotary embedding turns {rotated} of the {head_dim} "
                f"entries of a head; the rotary attention of ONNX Runtime needs a multiple of "
                f"{self.head_dim_multiple} for either"
            )
        self.dtype = ir.DataType.FLOAT16 if form.half else ir.DataType.FLOAT
        self.cache_dtype = cache_dtype(checkpoint, self.dtype)
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.names = checkpoint.names
        self.computed = conventions(checkpoint.config)
        self.form = form
        self._adapted = adapted
        self._products = linear_products(checkpoint)
        self.graph = GraphBuilder("decoder", stored)
        self._ops = CheckpointOps(self.graph, checkpoint, form)
        self._stream_norms = {norm for norm, _ in norms_and_readers(checkpoint.names)}

    def build(self) -> ir.Model:
        """Return the model with lazy weights; saving it reads them from the checkpoint."""
        names, graph = self.names, self.graph
        input_ids = graph_value("input_ids", ir.DataType.INT64, ("batch_size", "sequence_length"))
        mask = graph_value(
            "attention_mask", ir.DataType.INT64, ("batch_size", "total_sequence_length")
        )
        inputs, outputs = [input_ids, mask], []
        caches = self._caches()
        self._prepare_attention(input_ids, mask, caches[0][0])
        stream, delta = self._embed(input_ids), None
        head_norms = qk_norms(self.config) or (None,) * len(names.blocks)
        cache_shape = self._cache_shape("total_sequence_length")
        for layer, (block, past) in enumerate(zip(names.blocks, caches, strict=True)):
            inputs += past
            normed, stream = self._norm(block.attention_norm, stream, delta)
            delta, present = self._attention(
                block, head_norms[layer], normed, past, self.computed.layers[layer]
            )
            for part, value in zip(("key", "value"), present, strict=True):
                outputs.append(
                    name_output(value, f"present.{layer}.{part}", self.cache_dtype, cache_shape)
                )
            delta = self._post_norm(block.attention_post_norm, delta)
            normed, stream = self._norm(block.mlp_norm, stream, delta)
            delta = self._post_norm(block.mlp_post_norm, self._mlp(block, normed))
        normed, _ = self._norm(names.final_norm, stream, delta)
        if not self.form.last_logits:
            return graph.build(inputs, [self._head(normed, "sequence_length"), *outputs])
        logits = self._head(last_hidden(graph, normed, input_ids, self._shared), 1)
        hidden = name_output(normed, HIDDEN_NAME, self.dtype, self._hidden_shape)
        return graph.build(inputs, [logits, *outputs, hidden])

    def build_head(self) -> ir.Model:
        """Return the head by itself: hidden states of any positions to their logits."""
        hidden = graph_value(HIDDEN_NAME, self.dtype, self._hidden_shape)
        return self.graph.build([hidden], [self._head(hidden, "sequence_length")])

    def _caches(self) -> list[list[ir.Value]]:
        """Return the inputs that hold past keys and values, by layer."""
        shape = self._cache_shape("past_sequence_length")
        return [
            [
                graph_value(f"past_key_values.{layer}.{part}", self.cache_dtype, shape)
                for part in ("key", "value")
            ]
            for layer in range(len(self.names.blocks))
        ]

    def _cache_shape(self, columns: str) -> tuple[str, int, str, int]:
        return "batch_size", self.names.num_key_value_heads, columns, self.names.head_dim

    def _prepare_attention(self, input_ids: ir.Value, mask: ir.Value, past_keys: ir.Value) -> None:
        """Add what all attention layers share."""
        rotates = has_rotary_nodes(self.checkpoint, in_float=self.form.float_attention)
        self._shared: AttentionInputs = attention_inputs(
            self.graph,
            mask,
            self.config,
            input_ids,
            self.dtype,
            past=None if self.form.float_attention else past_keys,
            positions=rotates,
            scores=self._scores,
        )

    @property
    def _scores(self) -> Scores:
        """How attention computes scores; with a cap ONNX Runtime holds them whole by itself."""
        if self.form.target is Target.CUDA or self.computed.attention_cap is not None:
            return Scores.TILED
        return Scores.WHOLE if self.form.file == TOKEN_NAME else Scores.WHOLE_IF_FEW

    @property
    def _hidden_shape(self) -> tuple[str, str, int]:
        return "batch_size", "sequence_length", self.names.hidden_size

    def _head(self, hidden: ir.Value, positions: int | str) -> ir.Value:
        """Add the head and name its output."""
        fqn = self.names.head
        hidden = self._rotate_stream(hidden, fqn)
        logits = self._linear([fqn], hidden, self._quantized(fqn, hidden), fqn, half=False)
        if self.form.half and self.checkpoint.linear(fqn).activation is None:
            logits = self.graph.value("Cast", [logits], f"{fqn}/Cast", to=ir.DataType.FLOAT)
        if (cap := self.computed.logit_cap) is not None:
            logits = self._capped(logits, cap, fqn)
        wide = ("batch_size", positions, self.config.vocab_size)
        return name_output(logits, "logits", ir.DataType.FLOAT, wide)

    def _capped(self, x: ir.Value, cap: float, name: str) -> ir.Value:
        """Add c tanh(x / c), float32."""
        factor = self.graph.constant(np.float32(cap))
        x = self.graph.value("Div", [x, factor], f"{name}/cap/Div")
        x = self.graph.value("Tanh", [x], f"{name}/cap/Tanh")
        return self.graph.value("Mul", [x, factor], f"{name}/cap/Mul")

    def _embed(self, input_ids: ir.Value) -> ir.Value:
        """Look the tokens up, and scale all rows where a family does."""
        rows = self._unrotated(self._ops.look_up(input_ids))
        if (factor := self.computed.embedding_scale) is None:
            return rows
        whole = self.graph.constant(np.asarray(factor, self.dtype.numpy()))
        return self.graph.value("Mul", [rows, whole], "embedding/all/Mul")

    def _unrotated(self, rows: ir.Value) -> ir.Value:
        """Undo the R1 that a table of embedding and head is stored in."""
        r1, width = self.checkpoint.table_rotation, self.names.hidden_size
        if r1 is None:
            return rows
        rows = self._rotate_online(rows, Rotation(r1.left.T, r1.right.T), width, "embedding/R1")
        if r1.signs is None:
            return rows
        signs = self.graph.constant(r1.signs.numpy().astype(self.dtype.numpy()))
        return self.graph.value("Mul", [rows, signs], "embedding/R1/Mul")

    def _norm(
        self, fqn: str, stream: ir.Value, delta: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Add `delta` to the residual stream and normalize it; returns (normed, stream)."""
        gain = self._gain(fqn)
        epsilon = float(self.config.rms_norm_eps)
        if delta is None:
            normed = self.graph.value(
                "SimplifiedLayerNormalization",
                [stream, gain],
                f"{fqn}/SimplifiedLayerNormalization",
                axis=-1,
                epsilon=epsilon,
                stash_type=1,
            )
            return normed, stream
        outputs: tuple[str | None, ...] = (
            ("",) if fqn == self.names.final_norm else ("", None, None, "_stream")
        )
        results = self.graph.node(
            "SkipSimplifiedLayerNormalization",
            [stream, delta, gain],
            f"{fqn}/SkipSimplifiedLayerNormalization",
            domain=MICROSOFT,
            outputs=outputs,
            epsilon=epsilon,
        )
        return results[0], results[-1]

    def _post_norm(self, fqn: str | None, delta: ir.Value) -> ir.Value:
        """Normalize what is added to the residual stream, where a family does."""
        return delta if fqn is None else self._norm(fqn, delta, None)[0]

    def _attention(
        self,
        block: BlockNames,
        norms: QueryKeyNorms | None,
        normed: ir.Value,
        past: list[ir.Value],
        layer: LayerAttention,
    ) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        """Add self-attention; returns its output and (present key, present value)."""
        names = self.names
        normed = self._rotate_stream(normed, block.output.rpartition(".")[0])
        quantized = self._quantized(block.query, normed)
        heads: list[ir.Value | None]
        packed_qkv = packed_name(block)
        if packed_qkv not in self._products:
            query = self._linear([block.query], normed, quantized, block.query)
            key = self._linear([block.key], normed, quantized, block.key)
            value = self._linear([block.value], normed, quantized, block.value)
            if norms is not None:
                query = self._head_norm(norms.query, query, names.num_heads)
                key = self._head_norm(norms.key, key, names.num_key_value_heads)
            heads = [query, key, value]
        else:
            readers = [block.query, block.key, block.value]
            packed = self._linear(readers, normed, quantized, packed_qkv)
            heads = [packed, None, None]
        attended, present_key, present_value = self._attend(block, heads, past, layer)
        quantized = self._quantized(block.output, attended)
        return self._linear([block.output], attended, quantized, block.output), (
            present_key,
            present_value,
        )

    def _gain(self, fqn: str) -> ir.Value:
        """Add the gain of a norm, with the signs of the R1 that acts behind it."""
        gain = self.checkpoint.array(f"{fqn}.weight")
        whole = (gain + np.asarray(self.names.norm_offset, gain.dtype)).astype(self.dtype.numpy())
        r1 = self.checkpoint.online_r1
        if r1 is not None and r1.signs is not None and fqn in self._stream_norms:
            whole = whole * r1.signs.numpy().astype(whole.dtype)
        return self.graph.weight(f"{fqn}.weight", ir.tensor(whole))

    def _attend(
        self,
        block: BlockNames,
        heads: list[ir.Value | None],
        past: list[ir.Value],
        layer: LayerAttention,
    ) -> tuple[ir.Value, ...]:
        """Add attention itself; `attention_node` says what goes in and comes out."""
        return attention_node(
            self.graph,
            self.checkpoint,
            block,
            heads,
            past,
            self._shared,
            layer,
            in_float=self.form.float_attention,
        )

    def _head_norm(self, fqn: str, x: ir.Value, heads: int) -> ir.Value:
        """Normalize each head of [B, S, heads * head_dim] (qwen3)."""
        graph, head_dim = self.graph, self.names.head_dim
        split = graph.constant(np.array([0, 0, heads, head_dim], np.int64))
        joined = graph.constant(np.array([0, 0, heads * head_dim], np.int64))
        by_head = graph.value("Reshape", [x, split], f"{fqn}/split/Reshape")
        normed, _ = self._norm(fqn, by_head, None)
        return graph.value("Reshape", [normed, joined], f"{fqn}/join/Reshape")

    def _mlp(self, block: BlockNames, normed: ir.Value) -> ir.Value:
        """Add the gated MLP; returns its contribution to the stream."""
        graph = self.graph
        prefix = block.down.rpartition(".")[0]
        normed = self._rotate_stream(normed, prefix)
        quantized = self._quantized(block.gate, normed)
        gate = self._linear([block.gate], normed, quantized, block.gate)
        up = self._linear([block.up], normed, quantized, block.up)
        hidden = graph.value("Mul", [self._activated(gate, prefix), up], f"{prefix}/Mul")
        hidden = self._rotate_online(
            hidden, self.checkpoint.r4, self.names.intermediate_size, f"{prefix}/R4"
        )
        return self._linear([block.down], hidden, self._quantized(block.down, hidden), block.down)

    def _activated(self, gate: ir.Value, prefix: str) -> ir.Value:
        """Add the MLP's activation."""
        if self.computed.activation is Activation.SILU:
            return self._silu(gate, prefix)
        return self.graph.value("Gelu", [gate], f"{prefix}/Gelu", approximate="tanh")

    def _silu(self, x: ir.Value, prefix: str) -> ir.Value:
        """Add x * sigmoid(x)."""
        return self.graph.value(
            "QuickGelu", [x], f"{prefix}/QuickGelu", domain=MICROSOFT, alpha=1.0
        )

    def _rotate_stream(self, normed: ir.Value, prefix: str) -> ir.Value:
        """Apply R1 to what linears read of the residual stream, where it is not in the stream.

        Its signs are in the gain of the norm.
        """
        r1 = self.checkpoint.online_r1
        return self._rotate_online(normed, r1, self.names.hidden_size, f"{prefix}/R1")

    def _rotate_online(
        self, hidden: ir.Value, rotation: Rotation | None, width: int, name: str
    ) -> ir.Value:
        """Apply left (x) right of a rotation, without its signs, to each block of `width`."""
        if rotation is None:
            return hidden
        graph = self.graph
        left, right = (
            graph.constant(np.ascontiguousarray(factor.numpy().astype(self.dtype.numpy())))
            for factor in (rotation.left.T, rotation.right)
        )
        columns = rotation.right.shape[0]
        split = graph.constant(np.array([0, 0, width // columns, columns], np.int64))
        joined = graph.constant(np.array([0, 0, width], np.int64))
        x = graph.value("Reshape", [hidden, split], f"{name}/split/Reshape")
        x = graph.value("MatMul", [x, right], f"{name}/right/MatMul")
        if rotation.left.shape[0] > 1:
            x = graph.value("MatMul", [left, x], f"{name}/left/MatMul")
        return graph.value("Reshape", [x, joined], f"{name}/join/Reshape")

    def _quantized(self, fqn: str, x: ir.Value) -> QuantizedInput | None:
        """See `CheckpointOps.quantized`."""
        return self._ops.quantized(fqn, x)

    def _linear(
        self,
        fqns: list[str],
        x: ir.Value,
        quantized: QuantizedInput | None,
        name: str,
        *,
        half: bool = True,
    ) -> ir.Value:
        """Add the product of linears that read one input, and what an adapter adds to it."""
        y = self._product(fqns, x, quantized, name, half=half)
        if not any(fqn in self._adapted for fqn in fqns):
            return y
        return adapter_branch(self.graph, x, y, [self.checkpoint.linear(fqn) for fqn in fqns], name)

    def _product(
        self,
        fqns: list[str],
        x: ir.Value,
        quantized: QuantizedInput | None,
        name: str,
        *,
        half: bool,
    ) -> ir.Value:
        """See `CheckpointOps.linear`."""
        return self._ops.linear(fqns, x, quantized, name, half=half)


def linear_products(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Return the products of the blocks, by name in the graph: their linears, outputs side by side.

    Query, key and value are one product where they have one format and no norm stands behind them.
    """
    products: dict[str, tuple[str, ...]] = {}
    norms = bool(qk_norms(checkpoint.config))
    for block in checkpoint.names.blocks:
        readers = (block.query, block.key, block.value)
        formats = [(linear.weight, linear.activation) for linear in map(checkpoint.linear, readers)]
        if norms or formats.count(formats[0]) < len(formats):
            products |= {fqn: (fqn,) for fqn in readers}
        else:
            products[packed_name(block)] = readers
        alone = (block.output, block.gate, block.up, block.down)
        products |= {fqn: (fqn,) for fqn in alone}
    return products
