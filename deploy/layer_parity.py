"""Where an exported graph and the torch reference part: layer by layer, linear by linear.

The same tokens run through both, as one prompt and then token by token over the cache. Two views,
since each sees what the other cannot:

    linears    Each product of the graph against the checkpoint's own linear on the very input that
               the graph gave it, so nothing adds up over the layers. A single wrong weight shows.
               Rows whose integers fell differently, at a boundary, are left out; they must be few.
    streams    What attention and MLP of each block add to the residual stream, against the torch
               model's own run. Differences add up, and one integer step spreads, so the bound is
               that of `parity`: twice what a perturbation of 1e-5 of the embeddings does there. A
               fault in attention or a norm shows.

Errors of the linears are those of the worst output channel, ||ort - torch||_2 over the tokens, in
the norm of that channel or the mean norm, whichever is greater. MatMulNBits quantizes activations
itself, so its products are held against the linear with a float input, within twice what the
scheme's own rounding does to it, and the streams likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deploy.artifact import ArtifactKind, read_manifest
from deploy.checkpoint import Checkpoint
from deploy.errors import ArtifactError, ConfigError
from deploy.layer_report import LayerReport, PartParity
from deploy.parity import (
    CHANCE,
    DECODE_STEPS,
    FLOOR_FACTOR,
    LEAST_BOUND,
    float_activation_logits,
    parity_tokens,
    torch_logits,
)
from deploy.probed_decoder import ATTENTION, EMBEDDING, HEAD, MLP, LinearProbe, ProbedDecoder
from deploy.stream_capture import STREAM, Values, capture, noise_floors, relative_size, with_streams
from deploy.targets import Target
from rolora.linear import QuantizedLinear

ZERO_POINT = 128
PREFILL, DECODE = "prefill", "decode"


def report_on_export(directory: Path, checkpoint_directory: Path) -> LayerReport:
    """Compare a finished export with its checkpoint; damaged weights are read as they are.

    Args:
        directory: What `rolora export` wrote.
        checkpoint_directory: What it was exported from.

    Raises:
        StageOrderError: A directory is of another stage.
        ConfigError: The export is that of another checkpoint, or for another target.
        ArtifactError: ONNX Runtime cannot load it, or the checkpoint is damaged.
    """
    manifest = read_manifest(directory, ArtifactKind.ONNX)
    target = str(manifest.details.get("target", Target.CPU))
    if target != Target.CPU:
        raise ConfigError(
            f"{directory}: was exported with --target {target}; layers are compared in graphs of "
            f"--target {Target.CPU}, which hold the same integers: export that one from the same "
            f"checkpoint"
        )
    with Checkpoint(checkpoint_directory) as checkpoint:
        own, expected = checkpoint.manifest.digest, str(manifest.parents.get("checkpoint"))
        if own != expected:
            raise ConfigError(
                f"{directory}: was not exported from {checkpoint_directory} (digest {own[:12]}, "
                f"expected {expected[:12]}); name its own with --checkpoint"
            )
        return compare_layers(checkpoint, directory, parity_tokens(checkpoint))


def compare_layers(checkpoint: Checkpoint, directory: Path, ids: np.ndarray) -> LayerReport:
    """Compare the graphs in a directory with a checkpoint, layer by layer.

    Args:
        checkpoint: What is exported.
        directory: The graphs, their weights and `genai_config.json`.
        ids: int64 [T] tokens to run; the last DECODE_STEPS of them one by one.

    Raises:
        ArtifactError: ONNX Runtime cannot load a graph, or a graph lacks a node.
    """
    prompt = max(1, len(ids) - DECODE_STEPS)
    model = checkpoint.load_model()
    names = checkpoint.names
    with capture(model, checkpoint, integers=True) as expected:
        torch_logits(model, ids)
    floors = noise_floors(model, checkpoint, ids, expected)
    with ProbedDecoder(directory, names) as decoder:
        decoder.start(capacity=len(ids))
        decoder.append(ids[None, :prompt], last_only=True)
        for position in range(prompt, len(ids)):
            decoder.append(ids[None, position : position + 1])
        runs = decoder.found
    in_prompt, held = 0, 0
    for _, values in runs:  # a long prompt goes through the graph in pieces
        if held < prompt:
            in_prompt += 1
            held += values[runs[0][0].streams[EMBEDDING]].shape[1]
    parts: list[PartParity] = []
    float_run: Values | None = None
    mlp = {fqn for block in names.blocks for fqn in (block.gate, block.up, block.down)}
    for phase, own, rows in (
        (PREFILL, runs[:in_prompt], slice(0, prompt)),
        (DECODE, runs[in_prompt:], slice(prompt, len(ids))),
    ):
        if not own:
            continue
        probes = own[0][0]
        found = {
            name: np.concatenate([values[name][0] for _, values in own]) for name in probes.values()
        }
        by_nbits = any(_by_nbits(model, linear) for linear in probes.linears)
        if by_nbits and float_run is None:
            with capture(model, checkpoint) as float_run:
                float_activation_logits(model, ids)
        rows_of = {key: value[rows] for key, value in expected.items()}
        linears = [_compare_linear(model, phase, linear, found) for linear in probes.linears]
        streams = _compare_streams(
            phase,
            with_streams({key: found[name] for key, name in probes.streams.items()}),
            rows_of,
            None
            if float_run is None or not by_nbits
            else {key: value[rows] for key, value in float_run.items()},
            floors,
        )
        parts += _in_order(linears, _count_integers(streams, probes.linears, mlp, found, rows_of))
    return LayerReport(tuple(parts))


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
    """Compare the contributions to the stream, and the stream after each block."""
    parts = []
    for key, value in _ordered(found):
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


def _ordered(found: Values) -> Iterator[tuple[str, np.ndarray]]:
    yield EMBEDDING, found[EMBEDDING]
    for layer in range(sum(key.endswith(STREAM) for key in found)):
        for part in (ATTENTION, MLP, STREAM):
            yield f"{layer}.{part}", found[f"{layer}.{part}"]


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


def _by_nbits(model: PreTrainedModel, probe: LinearProbe) -> bool:
    """Return whether the kernel quantizes the input itself."""
    return probe.integers is None and isinstance(
        model.get_submodule(probe.fqns[0]), QuantizedLinear
    )


def _compare_linear(
    model: PreTrainedModel, phase: str, probe: LinearProbe, found: Values
) -> PartParity:
    """Compare one product with the checkpoint's linears on the same input."""
    modules = [model.get_submodule(fqn) for fqn in probe.fqns]
    x = torch.from_numpy(found[probe.source])
    value = found[probe.output]
    with torch.inference_mode():
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
    names = [fqn.rpartition(".")[2] for fqn in probe.fqns]
    return PartParity(
        probe.layer,
        phase,
        ", ".join(names),
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
