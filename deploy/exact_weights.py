"""Are the quantized weights of an ONNX file the checkpoint's, number by number?

Whichever layout a kernel wants, it is undone here: blocks, nibbles, columns in place of rows, bytes
shifted to unsigned ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from deploy.blocked_weights import blocked_layout, unpack_blocks
from deploy.checkpoint_reader import AnyCheckpoint, StoredLinear
from deploy.errors import ParityError
from deploy.kernels import ONE_INTEGER_GRAPH, GraphForm, Kernel
from deploy.linear_ops import WEIGHT_SHIFT, packed_name


def check_exact_weights(
    checkpoint: AnyCheckpoint,
    directory: Path,
    forms: Sequence[GraphForm] = (ONE_INTEGER_GRAPH,),
) -> int:
    """Compare every quantized weight in every graph with the checkpoint, number by number.

    Returns:
        The number of linears compared in a whole graph.

    Raises:
        ParityError: An integer or a scale differs, or a linear is missing from a graph.
    """
    names = checkpoint.names
    heads = () if names.head is None else (names.head,)
    counts = [
        _check_graph(
            checkpoint, directory, form, heads if form.head_only else (*names.linears(), *heads)
        )
        for form in forms
    ]
    return max(counts)


def _check_graph(
    checkpoint: AnyCheckpoint, directory: Path, form: GraphForm, fqns_held: Sequence[str]
) -> int:
    """Compare one graph, which must hold the quantized ones of the linears named."""
    initializers = ir.load(directory / form.file).graph.initializers
    packed = [
        (packed_name(block), (block.query, block.key, block.value))
        for block in checkpoint.names.blocks
    ]
    alone = [(fqn, (fqn,)) for fqn in fqns_held]
    compared = 0
    for name, fqns in [*packed, *alone]:
        linears = [checkpoint.linear(fqn) for fqn in fqns]
        key = f"{name}.weight"
        if linears[0].activation is None:
            continue
        if key in initializers:
            found = _stored_integers(_content(initializers[key]), linears, form)
        elif checkpoint.shares_table and fqns == (checkpoint.names.head,):
            table = f"{checkpoint.names.embedding}.weight"
            found = _content(initializers[table]).numpy()
            if linears[0].weight.bits == 4:
                found = unpack_blocks(found, blocked_layout(linears))
                key = table  # its scales are shared too
        else:
            continue
        expected = np.concatenate([checkpoint.integers(linear) for linear in linears])
        if not np.array_equal(found, expected):
            raise ParityError(f"{form.file}: {key}: the exported integers are not the checkpoint's")
        scales = _content(initializers[f"{key}_scale"]).numpy()
        if form.kernel is Kernel.QDQ:
            scales = scales.T
        expected = np.concatenate([checkpoint.array(f"{fqn}.weight_scale") for fqn in fqns])
        if not np.array_equal(scales.reshape(-1), expected.reshape(-1)):
            raise ParityError(
                f"{form.file}: {key}_scale: the exported scales are not the checkpoint's"
            )
        compared += len(linears)
    quantized = sum(checkpoint.linear(fqn).activation is not None for fqn, _ in alone)
    if not form.head_only:
        _check_embedding(checkpoint, form, initializers)
    if compared != quantized:
        raise ParityError(f"{form.file} holds {compared} of {quantized} quantized linears")
    return compared


def _check_embedding(
    checkpoint: AnyCheckpoint, form: GraphForm, initializers: Mapping[str, ir.Value]
) -> None:
    """Compare a quantized table, byte by byte and scale by scale."""
    if checkpoint.embedding_spec is None:
        return
    for key in (
        f"{checkpoint.names.embedding}.weight",
        f"{checkpoint.names.embedding}.weight_scale",
    ):
        expected = checkpoint.array(key)
        if key not in initializers or not np.array_equal(
            _content(initializers[key]).numpy().reshape(-1), expected.reshape(-1)
        ):
            raise ParityError(f"{form.file}: {key}: the exported embedding is not the checkpoint's")


def _content(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _stored_integers(
    tensor: ir.TensorProtocol, linears: list[StoredLinear], form: GraphForm
) -> np.ndarray:
    """Return the integers of an initializer as int8 [out, in], whichever kernel's layout it has."""
    by_nbits = linears[0].needs_blocks or form.takes_nbits(linears[0])
    if form.kernel is Kernel.QDQ or not (form.blocked or by_nbits):
        columns = tensor.numpy()
        if columns.dtype == np.uint8:
            columns = (columns ^ np.uint8(WEIGHT_SHIFT)).view(np.int8)
        return columns.astype(np.int8).T
    return unpack_blocks(np.frombuffer(tensor.tobytes(), np.uint8), blocked_layout(linears))
