"""One graph's linears, and what flows between its blocks, beside the torch reference: part by part.

Errors of the linears are those of the worst output channel, ||ort - torch||_2 over the tokens, in
the norm of that channel or the mean norm, whichever is greater. MatMulNBits quantizes activations
itself, so its products are held against the linear with a float input, within twice what the
scheme's own rounding does to it, and the streams likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploy.checkpoint_reader import AnyCheckpoint
from deploy.errors import ArtifactError
from deploy.graph_probes import ATTENTION, EMBEDDING, HEAD, MLP, LinearProbe
from deploy.layer_report import PartParity
from deploy.parity import CHANCE, FLOOR_FACTOR, LEAST_BOUND
from deploy.stream_capture import Values, relative_size
from rolora.linear import QuantizedLinear

ZERO_POINT = 128


@dataclass(frozen=True)
class Reference:
    """What the torch model gave for the tokens that the graph ran."""

    model: nn.Module
    checkpoint: AnyCheckpoint
    """What the model is of."""
    expected: Values
    """From `capture`, with integers."""
    float_run: Values | None
    """The same with float activations; None unless a kernel of the graph quantizes itself."""
    floors: Mapping[str, float]


def compare_parts(
    reference: Reference,
    phase: str,
    linears: Sequence[LinearProbe],
    found: Values,
    streams: Values,
) -> list[PartParity]:
    """Compare one graph in one phase, in the order of its data.

    Args:
        reference: Of the same tokens.
        phase: Named in the report.
        linears: The products of the graph.
        found: Every value of their probes, [T, ...].
        streams: What flows between the blocks, in order, under the keys of `capture`.

    Raises:
        ArtifactError: The graph quantizes what the checkpoint does not.
    """
    by_nbits = any(reads_floats(reference.model, linear) for linear in linears)
    products = []
    for linear in linears:
        with reference.checkpoint.weights_held(reference.model, linear.fqns):
            products.append(_compare_linear(reference.model, phase, linear, found))
    between = _compare_streams(
        phase,
        streams,
        reference.expected,
        reference.float_run if by_nbits else None,
        reference.floors,
    )
    blocks = reference.checkpoint.names.blocks
    mlp = {fqn for block in blocks for group in block.shared_inputs()[2:] for fqn in group}
    counted = _count_integers(between, linears, mlp, found, reference.expected)
    return list(_in_order(products, counted))


def _in_order(linears: list[PartParity], streams: list[PartParity]) -> Iterator[PartParity]:
    """Yield the parts of each layer together: first its linears, then its streams."""
    for layer in dict.fromkeys([*(part.layer for part in streams), HEAD]):
        yield from (part for part in linears if part.layer == layer)
        yield from (part for part in streams if part.layer == layer)


def _compare_streams(
    phase: str,
    found: Values,
    expected: Values,
    float_run: Values | None,
    floors: Mapping[str, float],
) -> list[PartParity]:
    """Compare what flows between the blocks."""
    parts = []
    for key, value in found.items():
        layer, _, part = key.rpartition(".")
        bound = max(FLOOR_FACTOR * floors[key], LEAST_BOUND)
        reference = expected[key]
        if float_run is not None:
            reference = float_run[key]
            bound = max(CHANCE * relative_size(expected[key], reference), bound)
        parts.append(
            PartParity(
                layer or EMBEDDING,
                phase,
                part,
                float(np.abs(value - reference).max()),
                relative_size(value, reference),
                bound,
            )
        )
    return parts


def _count_integers(
    streams: list[PartParity],
    linears: Sequence[LinearProbe],
    mlp: Set[str],
    found: Values,
    expected: Values,
) -> list[PartParity]:
    """Add how many integers of the linears' inputs differ between the two runs."""
    counts: dict[tuple[str, str], list[int]] = {}
    for probe in linears:
        if probe.integers is None or probe.fqns[0] not in expected:
            continue
        part = MLP if probe.fqns[0] in mlp else ATTENTION
        own = found[probe.integers].astype(np.int16) - ZERO_POINT
        differ = own != expected[probe.fqns[0]]
        total = counts.setdefault((probe.layer, part), [0, 0])
        total[0] += int(differ.sum())
        total[1] += differ.size
    return [
        replace(part, integer_mismatches=count[0], integers=count[1])
        if (count := counts.get((part.layer, part.part)))
        else part
        for part in streams
    ]


def reads_floats(model: nn.Module, probe: LinearProbe) -> bool:
    """Return whether the kernel quantizes the input itself."""
    return probe.integers is None and isinstance(
        model.get_submodule(probe.fqns[0]), QuantizedLinear
    )


def _compare_linear(model: nn.Module, phase: str, probe: LinearProbe, found: Values) -> PartParity:
    """Compare one product with the checkpoint's linears on the same input."""
    modules = [model.get_submodule(fqn) for fqn in probe.fqns]
    with torch.inference_mode(), nullcontext() if probe.has_bias else _without_bias(modules):
        return _compare_product(modules, phase, probe, found)


def _compare_product(
    modules: Sequence[nn.Module], phase: str, probe: LinearProbe, found: Values
) -> PartParity:
    """Compare one product with linears that have what it has of their biases."""
    x = torch.from_numpy(found[probe.source])
    value = found[probe.output]
    # `forward`, since a call would rotate the input again.
    own = np.concatenate([module.forward(x).numpy() for module in modules], axis=1)
    integers = mismatches = 0
    bound, reference = LEAST_BOUND, own
    if probe.integers is not None:
        first = modules[0]
        if not isinstance(first, QuantizedLinear):
            raise ArtifactError(
                f"{probe.fqns[0]}: the graph quantizes its input and the checkpoint does not; "
                f"export again"
            )
        differ = found[probe.integers].astype(np.int16) - ZERO_POINT != (
            first.quantize_input(x).q.numpy()
        )
        integers, mismatches = differ.size, int(differ.sum())
        same = ~differ.any(axis=1)
        value, reference = value[same], own[same]
    elif all(isinstance(module, QuantizedLinear) for module in modules):
        reference = np.concatenate([_float_product(module, x) for module in modules], axis=1)
        bound = max(FLOOR_FACTOR * _worst_channel(own, reference), LEAST_BOUND)
    return PartParity(
        probe.layer,
        phase,
        probe.part,
        float(np.abs(value - reference).max(initial=0.0)),
        _worst_channel(value, reference),
        bound,
        integers,
        mismatches,
        is_linear=True,
    )


def _float_product(module: nn.Module, x: Tensor) -> np.ndarray:
    assert isinstance(module, QuantizedLinear)
    result: np.ndarray = nn.functional.linear(x, module.dequantized_weight(), module.bias).numpy()
    return result


def _worst_channel(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the greatest error of an output channel; see the module's docstring."""
    if not len(expected):
        return 0.0
    sizes = np.linalg.norm(expected.astype(np.float64), axis=0)
    errors = np.linalg.norm(found.astype(np.float64) - expected, axis=0)
    return float((errors / np.maximum(sizes, max(sizes.mean(), 1e-30))).max())


@contextmanager
def _without_bias(modules: Sequence[Any]) -> Iterator[None]:
    """Take the biases of linears away inside the block."""
    biases = [module.bias for module in modules]
    try:
        for module in modules:
            module.bias = None
        yield
    finally:
        for module, bias in zip(modules, biases, strict=True):
            module.bias = bias
