"""An exported decoder that also gives out what flows between its layers.

The graphs are changed in memory only: values inside become outputs besides. Of every block the
contributions of attention and MLP to the residual stream, which the norms read; of every linear, or
of those that share one product, the float input, the integers it is quantized to, and the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from deploy.errors import ArtifactError
from deploy.linear_ops import packed_name
from deploy.session import OnnxDecoder
from rolora.blocks import readers_by_linear
from rolora.decoder import BlockNames, DecoderNames

EMBEDDING, ATTENTION, MLP = "embedding", "attention", "mlp"
HEAD = "head"
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where ONNX Runtime finds the weights of a graph that it is given as bytes."""
PRODUCTS = ("MatMulIntegerToFloat", "zero/Sub", "Mul", "MatMulNBits", "MatMul", "Add")
"""Nodes of a linear; the last one present gives its output."""


@dataclass(frozen=True)
class LinearProbe:
    """Where a product of one or more linears stands in a graph."""

    layer: str
    """Number of the block, or `HEAD`."""
    fqns: tuple[str, ...]
    """Its linears, their outputs side by side."""
    source: str
    """Value: the float input."""
    integers: str | None
    """Value: that input as uint8, 128 above the integers; None where the kernel quantizes."""
    output: str


@dataclass(frozen=True)
class Probes:
    """Values of one graph that are of interest."""

    streams: dict[str, str]
    """`embedding`, `N.attention` and `N.mlp`, to the values that add up to the stream."""
    linears: tuple[LinearProbe, ...]

    def values(self) -> list[str]:
        """Return the names of all values, each once."""
        found = dict.fromkeys(self.streams.values())
        for linear in self.linears:
            found |= dict.fromkeys((linear.source, linear.output))
            if linear.integers is not None:
                found[linear.integers] = None
        return list(found)


def find_probes(graph: onnx.GraphProto, names: DecoderNames) -> Probes:
    """Find what to give out, by the names that `DecoderGraph` gives to nodes.

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
            name = fqns[0] if len(fqns) == 1 else packed_name(block)
            linears.append(_linear(nodes, str(layer), fqns, name, readers[fqns[0]][0]))
    linears.append(_linear(nodes, HEAD, (names.head,), names.head, names.head))
    return Probes(streams, tuple(linears))


def _products(nodes: dict[str, onnx.NodeProto], block: BlockNames) -> Iterator[tuple[str, ...]]:
    """Yield the linears of a block, those in one product together."""
    packed = packed_name(block)
    if any(f"{packed}/{product}" in nodes for product in PRODUCTS):
        yield block.query, block.key, block.value
    else:
        yield from ((block.query,), (block.key,), (block.value,))
    yield from ((fqn,) for fqn in (block.output, block.gate, block.up, block.down))


def _linear(
    nodes: dict[str, onnx.NodeProto], layer: str, fqns: tuple[str, ...], name: str, reader: str
) -> LinearProbe:
    """Find a product by its name; `reader` is the first of the linears that share its input."""
    own = [nodes[f"{name}/{product}"] for product in PRODUCTS if f"{name}/{product}" in nodes]
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
    return LinearProbe(layer, fqns, source, integers, own[-1].output[0])


def _required(nodes: dict[str, onnx.NodeProto], name: str) -> onnx.NodeProto:
    if name not in nodes:
        raise _missing(name)
    return nodes[name]


def _missing(name: str) -> ArtifactError:
    return ArtifactError(
        f"the graph has no node {name}, by which its layers are told apart; export again"
    )


class ProbedDecoder(OnnxDecoder):
    """Runs an exported directory and keeps what the probes of its graphs give out.

    Args:
        directory: What `rolora export` wrote.
        names: Parts of its decoder.

    Raises:
        ArtifactError: A file is missing, ONNX Runtime cannot load a graph, or it lacks a node.
    """

    def __init__(self, directory: Path, names: DecoderNames) -> None:
        self._names = names
        self.probes: dict[int, Probes] = {}
        """By the identity of a session."""
        self.found: list[tuple[Probes, dict[str, np.ndarray]]] = []
        """For each run its graph's probes, and the values, float32 or uint8 [1, T, ...]."""
        super().__init__(directory)

    def _open(self, name: str) -> ort.InferenceSession:
        """Load one graph with more outputs."""
        path = self._directory / name
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(WEIGHTS_FOLDER, str(self._directory.resolve()))
        try:
            model = onnx.load(path, load_external_data=False)
            probes = find_probes(model.graph, self._names)
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
        self.probes[id(session)] = probes
        return session

    def _run(
        self, session: ort.InferenceSession, ids: np.ndarray, mask: np.ndarray, output: str
    ) -> np.ndarray:
        """Run a graph as its base does, and keep what it gives out besides."""
        probes = self.probes[id(session)]
        wanted = probes.values()
        binding = session.io_binding()
        self._bind(binding, ids, mask)
        for name in [*wanted, *([] if output in wanted else [output])]:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        values = binding.get_outputs()[len(self._cache) :]
        found = {
            name: value.numpy() for name, value in zip([*wanted, output], values, strict=False)
        }
        self.found.append((probes, found))
        result: np.ndarray = found[output]
        return result
