"""The nodes of a LoRA branch that is fed at run time, and the tensors that are fed to it.

    y + (x A) B        A [in, R] and B [R, out] are graph inputs; without them R = 0, and y + 0 = y

x is the float input of the product, before it is quantized, and scaling is in B. Linears that share
a product share the branch: their A stand side by side, their B along a diagonal. ONNX allows an
input that is an initializer too, which makes it optional, and R is a free size: adapters of any
rank, and such as leave this product alone, fit one graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from torch import Tensor

from deploy.checkpoint import Checkpoint
from deploy.checkpoint_reader import StoredLinear
from deploy.graph_builder import GraphBuilder
from deploy.module_layout import factors_side_by_side

Factors = tuple[Tensor, Tensor]
"""A [rank, in] and B [out, rank], scaling in B."""


def adapter_branch(
    graph: GraphBuilder, x: ir.Value, y: ir.Value, linears: Sequence[StoredLinear], name: str
) -> ir.Value:
    """Add the branch of a product.

    Args:
        graph: Receives nodes and inputs.
        x: The product's input, float32 [B, S, in].
        y: Its result, float32 [B, S, sum of outputs].
        linears: Its linears.
        name: Its name.

    Returns:
        Their sum.
    """
    wide, tall = linears[0].in_features, sum(linear.out_features for linear in linears)
    a_name, b_name = _input_names(name)
    rank = f"{name}.rank"
    a = graph.optional_input(a_name, (wide, rank), np.zeros((wide, 0), np.float32))
    b = graph.optional_input(b_name, (rank, tall), np.zeros((0, tall), np.float32))
    inner = graph.value("MatMul", [x, a], f"{name}/lora_A/MatMul")
    added = graph.value("MatMul", [inner, b], f"{name}/lora_B/MatMul")
    return graph.value("Add", [y, added], f"{name}/lora/Add")


def adapter_arrays(
    factors: Mapping[str, Factors],
    products: Mapping[str, Sequence[str]],
    checkpoint: Checkpoint,
) -> dict[str, np.ndarray]:
    """Return what is fed to the branches, by input name, float32.

    Args:
        factors: By linear, in the basis of the checkpoint.
        products: The linears of each product of the graph.
        checkpoint: For their sizes.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, fqns in products.items():
        pairs = [factors.get(fqn) for fqn in fqns]
        if not any(pairs):
            continue
        rows = [checkpoint.linear(fqn).out_features for fqn in fqns]
        side_by_side = factors_side_by_side(pairs, rows)
        for key, factor in zip(_input_names(name), side_by_side, strict=True):
            arrays[key] = np.ascontiguousarray(factor.T.float().numpy())
    return arrays


def _input_names(name: str) -> tuple[str, str]:
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"
