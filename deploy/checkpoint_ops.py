"""Nodes that read a checkpoint, with the kernels of a graph's form: embedding, inputs, linears."""

from __future__ import annotations

import onnx_ir as ir

from deploy.checkpoint_reader import AnyCheckpoint
from deploy.graph_builder import MICROSOFT, GraphBuilder
from deploy.input_ops import QuantizedInput, quantize_input
from deploy.kernels import GraphForm
from deploy.linear_ops import float_linear, integer_linear, nbits_linear
from rolora.scheme import Granularity


class CheckpointOps:
    """Adds such nodes to one graph.

    Args:
        graph: Receives the nodes.
        checkpoint: Of a decoder or an encoder.
        form: Which kernels the graph has.
    """

    def __init__(self, graph: GraphBuilder, checkpoint: AnyCheckpoint, form: GraphForm) -> None:
        self._graph = graph
        self._checkpoint = checkpoint
        self._form = form
        self._dtype = ir.DataType.FLOAT16 if form.half else ir.DataType.FLOAT
        self._table: ir.Value | None = None
        self._table_scale: ir.Value | None = None

    def table(self) -> ir.Value:
        """Return the embedding's table as it is stored, [V, D], or [V, D / 2] bytes of 4 bits."""
        if self._table is None:
            checkpoint, spec = self._checkpoint, self._checkpoint.embedding_spec
            key = f"{checkpoint.names.embedding}.weight"
            dtypes = {None: self._dtype, 8: ir.DataType.INT8, 4: ir.DataType.UINT8}
            dtype = dtypes[None if spec is None else spec.bits]

            def read() -> ir.TensorProtocol:
                return ir.tensor(checkpoint.array(key).astype(dtype.numpy(), copy=False))

            self._table = self._graph.lazy_weight(key, dtype, checkpoint.shape(key), read)
        return self._table

    def table_scale(self) -> ir.Value:
        """Return the scales of the table's integers, float32 [V, 1] or [V, groups]."""
        if self._table_scale is None:
            key = f"{self._checkpoint.names.embedding}.weight_scale"
            scales = self._checkpoint.array(key)
            self._table_scale = self._graph.weight(key, ir.tensor(scales.reshape(len(scales), -1)))
        return self._table_scale

    def look_up(self, input_ids: ir.Value) -> ir.Value:
        """Look tokens up; int8 rows are scaled after the lookup, groups of 4 bits in it."""
        graph, checkpoint = self._graph, self._checkpoint
        spec, table = checkpoint.embedding_spec, self.table()
        if spec is None:
            return graph.value("Gather", [table, input_ids], "embedding/Gather")
        scale = self.table_scale()
        if spec.bits == 4:
            return graph.value(
                "GatherBlockQuantized",
                [table, input_ids, scale],
                "embedding/GatherBlockQuantized",
                domain=MICROSOFT,
                gather_axis=0,
                quantize_axis=1,
                block_size=spec.group_size,
                bits=4,
            )
        rows = graph.value("Gather", [table, input_ids], "embedding/Gather")
        row_scale = graph.value("Gather", [scale, input_ids], "embedding/scale/Gather")
        as_float = graph.value("Cast", [rows], "embedding/Cast", to=ir.DataType.FLOAT)
        scaled = graph.value("Mul", [as_float, row_scale], "embedding/Mul")
        if not self._form.half:
            return scaled
        return graph.value("Cast", [scaled], "embedding/half/Cast", to=self._dtype)

    def quantized(self, fqn: str, x: ir.Value) -> QuantizedInput | None:
        """Quantize the input of a linear and of those that share it, if its kernel takes bytes."""
        linear = self._checkpoint.linear(fqn)
        if linear.activation is None or linear.needs_blocks or self._form.takes_nbits(linear):
            return None
        static = linear.activation.granularity is Granularity.TENSOR
        scale = self._checkpoint.array(f"{fqn}.input_scale") if static else None
        return quantize_input(
            self._graph, x, linear.activation, scale, f"{fqn}/input", self._form.numbers
        )

    def linear(
        self,
        fqns: list[str],
        x: ir.Value,
        quantized: QuantizedInput | None,
        name: str,
        *,
        half: bool = True,
        bias: bool = True,
    ) -> ir.Value:
        """Add the product of linears that read one input, with the kernel of their format.

        Where the graph is one of float16, so is the result, unless `half` is false and the product
        one of integers. Without `bias` a node behind it adds that.
        """
        linears = [self._checkpoint.linear(fqn) for fqn in fqns]
        shared = self._checkpoint.shares_table and fqns == [self._checkpoint.names.head]
        if quantized is not None:
            return integer_linear(
                self._graph,
                quantized,
                self._checkpoint,
                linears,
                name,
                blocked=self._form.blocked,
                half=half and self._form.half,
                add_bias=bias,
                table=self.table() if shared else None,
            )
        if linears[0].activation is not None:
            in_blocks = shared and linears[0].weight.group_size is not None
            table = (self.table(), self.table_scale()) if in_blocks else None
            return nbits_linear(
                self._graph, x, self._checkpoint, linears, name, add_bias=bias, table=table
            )
        return float_linear(
            self._graph, x, self._checkpoint, linears, name, self._dtype, add_bias=bias
        )
