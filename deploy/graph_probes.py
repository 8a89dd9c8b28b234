"""Where in an exported graph lies what flows between its layers, and a session that gives it out.

The graphs are changed in memory only: values inside become outputs besides. Of every linear, or of
those that share one product, the float input, the integers it is quantized to, and the output. Of
every block of a decoder the contributions of attention and MLP to the residual stream, which the
norms read. An encoder has no such stream: of its blocks the output of the norm behind attention,
and of the one behind the MLP, which is the block's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort

from deploy.errors import ArtifactError
from deploy.linear_ops import packed_name
from rolora.blocks import Block, readers_by_linear
from rolora.decoder import DecoderNames
from rolora.encoder import EncoderNames

EMBEDDING, ATTENTION, MLP = "embedding", "attention", "mlp"
HEAD = "head"
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where ONNX Runtime finds the weights of a graph that it is given as bytes."""
PRODUCTS = ("MatMulIntegerToFloat", "zero/Sub", "Mul", "MatMulNBits", "MatMul")
"""Nodes of a linear without its bias; the last one present gives its output."""
BIAS = "Add"
"""The node behind them that adds the bias, where it is the linear's."""


@dataclass(frozen=True)
class LinearProbe:
    """Where a product of one or more linears stands in a graph."""

    layer: str
    """Number of the block, or `HEAD`."""
    part: str
    """How a report calls it."""
    fqns: tuple[str, ...]
    """Its linears, their outputs side by side."""
    source: str
    """Value: the float input."""
    integers: str | None
    """Value: that input as uint8, 128 above the integers; None where the kernel quantizes."""
    output: str
    has_bias: bool = True
    """Whether the output has the linears' biases, which in an encoder a node behind it adds."""


@dataclass(frozen=True)
class Probes:
    """Values of one graph that are of interest."""

    streams: dict[str, str]
    """`embedding`, `N.attention` and `N.mlp`, to the values: in a decoder those that add up."""
    linears: tuple[LinearProbe, ...]

    def values(self) -> list[str]:
        """Return the names of all values, each once."""
        found = dict.fromkeys(self.streams.values())
        for linear in self.linears:
            found |= dict.fromkeys((linear.source, linear.output))
            if linear.integers is not None:
                found[linear.integers] = None
        return list(found)


def find_decoder_probes(graph: onnx.GraphProto, names: DecoderNames) -> Probes:
    """Find what a decoder gives out, by the names that `DecoderGraph` gives to nodes.

    Raises:
        ArtifactError: A node is missing: the graph is not one of ours, or of an older version.
    """
    nodes = {node.name: node for node in graph.node}
    first = _required(nodes, f"{names.blocks[0].attention_norm}/SimplifiedLayerNormalization")
    streams = {EMBEDDING: first.input[0]}
    following = [*(block.attention_norm for block in names.blocks[1:]), names.final_norm]
    linears, readers = [], readers_by_linear(names)
    for layer, (block, next_norm) in enumerate(zip(names.blocks, following, strict=True)):
        for part, norm in ((ATTENTION, block.mlp_norm), (MLP, next_norm)):
            node = _required(nodes, f"{norm}/SkipSimplifiedLayerNormalization")
            streams[f"{layer}.{part}"] = node.input[1]
        for fqns in _products(nodes, block):
            name, reader = _product_name(block, fqns), readers[fqns[0]][0]
            part = ", ".join(fqn.rpartition(".")[2] for fqn in fqns)
            linears.append(_linear(nodes, str(layer), part, fqns, name, reader))
    head = names.head
    linears.append(_linear(nodes, HEAD, head.rpartition(".")[2], (head,), head, head))
    return Probes(streams, tuple(linears))


def find_encoder_probes(graph: onnx.GraphProto, names: EncoderNames) -> Probes:
    """Find what an encoder gives out, by the names that `EncoderGraph` gives to nodes.

    Raises:
        ArtifactError: As `find_decoder_probes`.
    """
    nodes = {node.name: node for node in graph.node}
    norms = {EMBEDDING: names.embedding_norm}
    linears, readers = [], readers_by_linear(names)
    for layer, block in enumerate(names.blocks):
        norms |= {f"{layer}.{ATTENTION}": block.attention_norm, f"{layer}.{MLP}": block.mlp_norm}
        for fqns in _products(nodes, block):
            name, reader = _product_name(block, fqns), readers[fqns[0]][0]
            part = ", ".join(fqn.removeprefix(f"{block.fqn}.") for fqn in fqns)
            linears.append(_linear(nodes, str(layer), part, fqns, name, reader, with_bias=False))
    streams = {
        key: _required(nodes, f"{norm}/LayerNormalization").output[0] for key, norm in norms.items()
    }
    return Probes(streams, tuple(linears))


def _products(nodes: dict[str, onnx.NodeProto], block: Block) -> Iterator[tuple[str, ...]]:
    """Yield the linears of a block, those in one product together."""
    packed = packed_name(block)
    if any(f"{packed}/{product}" in nodes for product in PRODUCTS):
        yield block.query, block.key, block.value
    else:
        yield from ((block.query,), (block.key,), (block.value,))
    yield from ((fqn,) for fqn in block.linears()[3:])


def _product_name(block: Block, fqns: tuple[str, ...]) -> str:
    """Return how a product is called."""
    return fqns[0] if len(fqns) == 1 else packed_name(block)


def _linear(
    nodes: dict[str, onnx.NodeProto],
    layer: str,
    part: str,
    fqns: tuple[str, ...],
    name: str,
    reader: str,
    *,
    with_bias: bool = True,
) -> LinearProbe:
    """Find a product by its name; `reader` is the first of the linears that share its input."""
    operators = (*PRODUCTS, BIAS) if with_bias else PRODUCTS
    own = [nodes[f"{name}/{operator}"] for operator in operators if f"{name}/{operator}" in nodes]
    if not own:
        raise _missing(f"{name}/{PRODUCTS[0]}")
    quantizer = nodes.get(f"{reader}/input/QuantizeLinear")
    integers = None
    source = own[0].input[0]
    if own[0].op_type == PRODUCTS[0]:
        if quantizer is None:
            raise _missing(f"{reader}/input/QuantizeLinear")
        source = nodes.get(f"{reader}/input/Div", quantizer).input[0]
        integers = nodes.get(f"{reader}/input/Clip", quantizer).output[0]
    return LinearProbe(layer, part, fqns, source, integers, own[-1].output[0], with_bias)


def _required(nodes: dict[str, onnx.NodeProto], name: str) -> onnx.NodeProto:
    if name not in nodes:
        raise _missing(name)
    return nodes[name]


def _missing(name: str) -> ArtifactError:
    return ArtifactError(
        f"the graph has no node {name}, by which its layers are told apart; export again"
    )


def open_probed(
    path: Path, find: Callable[[onnx.GraphProto], Probes]
) -> tuple[ort.InferenceSession, Probes]:
    """Load a graph with the values that are found in it as further outputs.

    Raises:
        ArtifactError: ONNX Runtime cannot load the graph, or it lacks a node.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent.resolve()))
    try:
        model = onnx.load(path, load_external_data=False)
        probes = find(model.graph)
        taken = {output.name for output in model.graph.output}
        model.graph.output.extend(
            onnx.ValueInfoProto(name=value) for value in probes.values() if value not in taken
        )
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except Exception as error:
        raise ArtifactError(f"{path}: ONNX Runtime cannot load it: {error}") from error
    return session, probes
