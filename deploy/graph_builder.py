"""A thin layer over onnx_ir: named nodes, shared constants, weights read when written.

Large initializers are lazy: their bytes come from the checkpoint while the external data file is
written, one tensor at a time, so that an export never holds the model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

OPSET = 21
LATER_OPERATORS = {"TensorScatter": 24}
"""Operators that came after that opset: a graph with one is of the opset that brought it."""
IR_VERSION = 10
MICROSOFT = "com.microsoft"


class GraphBuilder:
    """Collects the nodes and initializers of one graph, in topological order.

    Args:
        name: Name of the graph.
        stored: Initializers that another graph has written; those of the same name refer to the
            bytes in its file.
    """

    def __init__(self, name: str, stored: Mapping[str, ir.ExternalTensor] | None = None) -> None:
        self._name = name
        self._stored = stored or {}
        self._nodes: list[ir.Node] = []
        self._optional_inputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._domains = {""}

    def constant(self, value: np.ndarray | np.generic) -> ir.Value:
        """Return an initializer for a small array; equal arrays share one."""
        array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._initializer(name, ir.tensor(array))
        return self._constants[key]

    def weight(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Add an initializer.

        Raises:
            ValueError: The name is taken, or the bytes stored under it are of another length.
        """
        if name in self._stored:
            tensor = refer_to(self._stored[name], tensor)
        return self._initializer(name, tensor)

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name in self._initializers:
            raise ValueError(f"initializer {name!r} is added twice")
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self._initializers[name] = value
        return value

    def optional_input(
        self, name: str, shape: Sequence[int | str], default: np.ndarray
    ) -> ir.Value:
        """Add a graph input that need not be fed: an initializer of the same name is its default.

        Args:
            name: Of both.
            shape: Of what may be fed; a name stands for a size that is free.
            default: Taken where nothing is fed; of a shape that fits.

        Raises:
            ValueError: The name is taken.
        """
        value = self._initializer(name, ir.tensor(default, name=name))
        value.shape = ir.Shape(shape)
        self._optional_inputs.append(value)
        return value

    def lazy_weight(
        self,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        read: Callable[[], ir.TensorProtocol],
    ) -> ir.Value:
        """Add an initializer whose content is read while the model is saved."""
        return self.weight(name, ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name))

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        outputs: Sequence[str | None] = ("",),
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Add a node with several outputs.

        Args:
            op_type: Operator, as ONNX spells it.
            inputs: Its inputs; None is an absent optional one.
            name: Node name; the values are named after it.
            domain: Operator domain.
            outputs: A suffix per output; None is an absent optional output.
            **attributes: Attributes of the operator.

        Returns:
            A value per output.
        """
        values = [
            ir.Value(name="" if suffix is None else f"{name}/output{suffix}") for suffix in outputs
        ]
        self._domains.add(domain)
        self._nodes.append(
            ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=name)
        )
        return tuple(values)

    def choice(
        self,
        condition: ir.Value,
        op_type: str,
        inputs: tuple[Sequence[ir.Value | None], Sequence[ir.Value | None]],
        name: str,
        *,
        forms: tuple[str, str],
        domain: str = "",
        outputs: Mapping[str, ir.DataType],
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Add an operator that gets other inputs where a condition holds than where it does not.

        Args:
            condition: bool scalar.
            op_type: Operator, as ONNX spells it.
            inputs: Those where it holds, and those where it does not.
            name: Start of the nodes' names; the values are named after it.
            forms: What the operator is called with the first inputs, and with the second.
            domain: Operator domain.
            outputs: A suffix per output, and its type.
            **attributes: Attributes of the operator.

        Returns:
            A value per output.
        """
        branches = []
        for form, given in zip(forms, inputs, strict=True):
            inner = f"{name}/{form}"
            values = [
                ir.Value(name=f"{inner}/output{suffix}", type=ir.TensorType(dtype))
                for suffix, dtype in outputs.items()
            ]
            node = ir.node(op_type, given, attributes, domain=domain, outputs=values, name=inner)
            branches.append(ir.Graph([], values, nodes=[node], name=inner))
        self._domains.add(domain)
        then, otherwise = branches
        return self.node(
            "If",
            [condition],
            name,
            outputs=list(outputs),
            then_branch=then,
            else_branch=otherwise,
        )

    def value(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output and return that output."""
        return self.node(op_type, inputs, name, domain=domain, **attributes)[0]

    def build(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        """Return the model.

        Args:
            inputs: Graph inputs, typed; the optional ones come behind them.
            outputs: Graph outputs, typed and named.
        """
        opset = max(LATER_OPERATORS.get(node.op_type, OPSET) for node in self._nodes)
        graph = ir.Graph(
            [*inputs, *self._optional_inputs],
            outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": opset} | dict.fromkeys(sorted(self._domains - {""}), 1),
            name=self._name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="rolora")


def refer_to(stored: ir.ExternalTensor, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    """Return a tensor with the bytes of a stored one, and dtype and shape of another.

    Raises:
        ValueError: They differ in length.
    """
    if stored.nbytes != tensor.nbytes:
        raise ValueError(
            f"{stored.name}: stored with {stored.nbytes} bytes, expected {tensor.nbytes}"
        )
    return ir.ExternalTensor(
        stored.location,
        stored.offset,
        stored.length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=stored.name,
        base_dir=stored.base_dir,
    )


def stored_initializers(model: ir.Model) -> dict[str, ir.ExternalTensor]:
    """Return the initializers of a loaded model whose bytes lie in its external data file."""
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {
        name: tensor for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor)
    }


def graph_value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """Return a typed graph input."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def name_output(
    value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]
) -> ir.Value:
    """Give a value the name, dtype and shape of a graph output, and return it."""
    value.name = name
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape(shape)
    return value
