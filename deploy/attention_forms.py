"""Do both forms of attention in a graph compute the same?

Parity runs texts whose scores are whole. Where they are many the other branch of an `If` runs, so
the two must be one operator with one set of inputs, but for sinks that weigh nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from deploy.attention_inputs import NO_SINK
from deploy.errors import ParityError
from deploy.kernels import GraphForm

SINK = 11
"""Which input of GroupQueryAttention the sinks are."""


def check_attention_forms(directory: Path, forms: Sequence[GraphForm]) -> None:
    """Compare the two forms of attention in every layer of every graph.

    Raises:
        ParityError: They differ in more than their sinks, or a sink weighs something.
    """
    for form in forms:
        path = directory / form.file
        for node in ir.load(path).graph:
            if node.op_type != "If":
                _require_no_weight(node, path)
                continue
            whole, tiled = (_only_node(node, branch) for branch in ("then_branch", "else_branch"))
            if _described(whole) != _described(tiled) or _sink(tiled) is not None:
                raise ParityError(
                    f"{path}: the two forms of {node.name} differ in more than their sinks; "
                    f"export again"
                )
            _require_no_weight(whole, path)


def _only_node(node: ir.Node, branch: str) -> ir.Node:
    (only,) = node.attributes[branch].as_graph()
    return only


def _described(node: ir.Node) -> tuple[object, ...]:
    """Return what a node computes, but for its sinks."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    inputs = {at: value for at, value in enumerate(node.inputs) if value is not None}
    inputs.pop(SINK, None)
    return node.op_type, node.domain, attributes, inputs


def _sink(node: ir.Node) -> ir.Value | None:
    is_attention = node.op_type == "GroupQueryAttention"
    return node.inputs[SINK] if is_attention and len(node.inputs) > SINK else None


def _require_no_weight(node: ir.Node, path: Path) -> None:
    """Refuse sinks that are not the ones which change nothing."""
    if (sink := _sink(node)) is None:
        return
    stored = sink.const_value
    if stored is None or not np.array_equal(stored.numpy(), np.full(stored.shape, NO_SINK)):
        raise ParityError(f"{path}: the sinks of {node.name} weigh something; export again")
