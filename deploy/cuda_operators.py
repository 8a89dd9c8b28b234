"""Operators that ONNX Runtime's CUDA provider has kernels for, as far as our graphs need them.

From the table "Operators implemented by CUDAExecutionProvider" in docs/OperatorKernels.md of
microsoft/onnxruntime at 001d12d2623fd411ce0f83d05abb5e82304a3389; types are those of the operator's
first input at opset 21. A node without such a kernel would run on the CPU, with a copy of its
inputs and outputs at every token. Nodes that depend on constants alone do not count: ONNX Runtime
folds them when it loads the graph. Shape arithmetic does, though ONNX Runtime may place it on the
CPU itself.
"""

from __future__ import annotations

import onnx_ir as ir

from deploy.errors import UnsupportedModelError
from deploy.graph_builder import MICROSOFT

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_INT8, _INT32, _INT64 = ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64
_FLOATS = frozenset({_FLOAT, _HALF})
_NUMBERS = frozenset({_FLOAT, _HALF, _INT32, _INT64})
_ALL = frozenset({_FLOAT, _HALF, _INT8, _INT32, _INT64})

CUDA_KERNELS: dict[tuple[str, str], frozenset[ir.DataType]] = {
    ("", "Abs"): _ALL,
    ("", "Add"): _ALL,
    ("", "Cast"): _ALL,
    ("", "Clip"): frozenset({_FLOAT, _HALF, _INT8, _INT64}),
    ("", "Div"): _ALL,
    ("", "Gather"): _ALL,
    ("", "GatherND"): frozenset({_FLOAT, _HALF, _INT64}),
    ("", "MatMul"): _FLOATS,
    ("", "MatMulInteger"): frozenset({_INT8}),
    ("", "Max"): _NUMBERS,
    ("", "Min"): _NUMBERS,
    ("", "Mul"): _ALL,
    ("", "QuantizeLinear"): _FLOATS,
    ("", "ReduceMax"): _NUMBERS,
    ("", "ReduceMin"): _ALL,
    ("", "ReduceSum"): _NUMBERS,
    ("", "Reshape"): _ALL,
    ("", "Round"): _FLOATS,
    ("", "Shape"): _ALL,
    ("", "SimplifiedLayerNormalization"): _FLOATS,
    ("", "Sub"): _ALL,
    ("", "Unsqueeze"): _ALL,
    (MICROSOFT, "GroupQueryAttention"): frozenset({_HALF}),
    (MICROSOFT, "QuickGelu"): _FLOATS,
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): _FLOATS,
}


def require_cuda_kernels(model: ir.Model, where: str) -> None:
    """Refuse a graph with a node that the CUDA provider has no kernel for.

    Args:
        model: With typed inputs and initializers.
        where: What the message starts with.

    Raises:
        UnsupportedModelError: Such a node, or one whose types are not known.
    """
    types: dict[ir.Value, ir.DataType | None] = {value: value.dtype for value in model.graph.inputs}
    constant = set(model.graph.initializers.values())
    types |= {value: value.dtype for value in constant}
    faults: dict[str, str] = {}
    for node in model.graph:
        given = [value for value in node.inputs if value is not None]
        dtype = types.get(given[0]) if given else None
        if all(value in constant for value in given):
            constant.update(node.outputs)
        elif dtype not in CUDA_KERNELS.get((node.domain, node.op_type), ()):
            faults.setdefault(f"{node.op_type} of {dtype}", str(node.name))
        types |= dict.fromkeys(node.outputs, _output_type(node, types))
    if faults:
        listed = ", ".join(f"{what} ({name})" for what, name in faults.items())
        raise UnsupportedModelError(
            f"{where}: ONNX Runtime has no CUDA kernel for {listed}; these nodes would run on the "
            f"CPU. Export with --target cpu, or quantize with another scheme, such as W8A8"
        )


def _output_type(node: ir.Node, types: dict[ir.Value, ir.DataType | None]) -> ir.DataType | None:
    """Return the element type of a node's outputs: that of its first input, with exceptions."""
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type == "Shape":
        return _INT64
    if node.op_type == "MatMulInteger":
        return _INT32
    deciding = node.inputs[2 if node.op_type == "QuantizeLinear" else 0]
    return None if deciding is None else types.get(deciding)
