"""ONNX Runtime's record of the operators that ran: its runs, and the work that they are.

A record is a list of events as Chrome's trace viewer has them: one `model_run` for each call of the
graph, and one `NAME_kernel_time` for each operator within, with the shapes of what it read and
wrote. Weights that a kernel has laid out anew when the graph was loaded are not among them.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import onnx_ir as ir

from deploy.errors import ArtifactError

BYTE_PRODUCTS = ("MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul")
FLOAT_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")
BLOCK_PRODUCT = "MatMulNBits"
BRANCHES = ("If",)
"""Their time is that of the operators within, which are recorded too."""


@dataclass(frozen=True)
class NodeEvent:
    """One operator that ran."""

    name: str
    operator: str
    microseconds: float
    inputs: list[dict[str, list[int]]]
    outputs: list[dict[str, list[int]]]


@dataclass(frozen=True)
class GraphRun:
    """One call of a graph."""

    microseconds: float
    nodes: tuple[NodeEvent, ...]


def read_runs(file: Path) -> list[GraphRun]:
    """Read a record of ONNX Runtime as the runs of its graph, in their order.

    Raises:
        ArtifactError: It has no runs, or another form than that of this version.
    """
    try:
        events = json.loads(file.read_text(encoding="utf-8"))
        calls = sorted((e["ts"], e["dur"]) for e in events if e["name"] == "model_run")
        nodes: list[list[NodeEvent]] = [[] for _ in calls]
        starts = [start for start, _ in calls]
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                arguments = event["args"]
                if arguments["op_name"] in BRANCHES:
                    continue
                nodes[bisect_right(starts, event["ts"]) - 1].append(
                    NodeEvent(
                        event["name"].removesuffix("_kernel_time"),
                        arguments["op_name"],
                        float(event["dur"]),
                        arguments["input_type_shape"],
                        arguments["output_type_shape"],
                    )
                )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ArtifactError(
            f"{file}: ONNX Runtime's record is not of the form expected ({error!r}); use the "
            f"version of onnxruntime that this package pins"
        ) from error
    if not calls:
        raise ArtifactError(f"{file}: ONNX Runtime recorded no run; is the disk full?")
    return [
        GraphRun(float(duration), tuple(run))
        for (_, duration), run in zip(calls, nodes, strict=True)
    ]


def split_phases(
    of_prompts: list[GraphRun], of_tokens: list[GraphRun], runs: int, steps: int
) -> tuple[list[list[GraphRun]], list[GraphRun]]:
    """Tell prompts from single tokens, and leave the first repetition out.

    Args:
        of_prompts: Runs of the prompt graph.
        of_tokens: Runs of the token graph; the same list where one graph is both.
        runs: Repetitions that count.
        steps: Tokens decoded in each.

    Returns:
        The runs of each prompt, which may go through the graph in pieces, and those of all tokens.

    Raises:
        ArtifactError: The record lacks runs.
    """
    shared = of_prompts is of_tokens
    own = len(of_prompts) // (runs + 1)
    pieces = own - steps if shared else own
    if pieces < 1 or len(of_prompts) % (runs + 1) or len(of_tokens) < steps * (runs + 1):
        raise ArtifactError(
            f"ONNX Runtime recorded {len(of_prompts)} runs for prompts and {len(of_tokens)} for "
            f"tokens, expected {runs + 1} repetitions of {steps} tokens; record fewer with --runs"
        )
    parts = [of_prompts[a:b] for a, b in pairwise(range(0, len(of_prompts) + 1, own))]
    prompts = [part[:pieces] for part in parts]
    if shared:
        return prompts[1:], [run for part in parts[1:] for run in part[pieces:]]
    return prompts[1:], of_tokens[steps:]


def _sizes(node: NodeEvent) -> tuple[int, int, int]:
    """Return rows, K and N of a product [rows, K] with [K, N]."""
    (columns,) = node.inputs[0].values()
    (result,) = node.outputs[0].values()
    return prod(result[:-1]), columns[-1], result[-1]


def multiply_adds(run: GraphRun) -> int:
    """Return how many multiply-adds the products with weights of a run take."""
    return sum(
        prod(_sizes(node))
        for node in run.nodes
        if node.operator in (*BYTE_PRODUCTS, *FLOAT_PRODUCTS, BLOCK_PRODUCT)
    )


def weight_bytes(run: GraphRun, bits: Mapping[str, tuple[int, int]]) -> int:
    """Return how many bytes of weights and scales a run reads, as its kernels hold them.

    Args:
        run: Of a graph.
        bits: From `bits_by_node`.

    Raises:
        ArtifactError: The graph has no MatMulNBits of the name that was recorded.
    """
    total = 0
    for node in run.nodes:
        if node.operator in BYTE_PRODUCTS:
            _, rows, columns = _sizes(node)
            total += rows * columns + 4 * columns
        elif node.operator in FLOAT_PRODUCTS:
            _, rows, columns = _sizes(node)
            total += 4 * rows * columns
        elif node.operator == BLOCK_PRODUCT:
            if node.name not in bits:
                raise ArtifactError(f"the graph has no MatMulNBits of the name {node.name}")
            _, rows, columns = _sizes(node)
            width, block = bits[node.name]
            total += rows * columns * width // 8 + 4 * columns * -(-rows // block)
    return total


def bits_by_node(file: Path) -> dict[str, tuple[int, int]]:
    """Return bits and block size of every MatMulNBits of a graph, by the node's name."""
    return {
        str(node.name): (node.attributes["bits"].as_int(), node.attributes["block_size"].as_int())
        for node in ir.load(file).graph
        if node.op_type == BLOCK_PRODUCT
    }
