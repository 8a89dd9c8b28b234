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

How errors are measured, `part_parity` says.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deploy.artifact import ArtifactKind, Manifest, read_manifest
from deploy.checkpoint import Checkpoint
from deploy.checkpoint_reader import AnyCheckpoint
from deploy.errors import ConfigError
from deploy.graph_probes import EMBEDDING
from deploy.layer_report import LayerReport, PartParity
from deploy.parity import float_activation_logits, parity_tokens, prompt_length, torch_logits
from deploy.part_parity import Reference, compare_parts, reads_floats
from deploy.probed_decoder import ProbedDecoder
from deploy.stream_capture import capture, decoder_places, noise_floors, with_streams
from deploy.targets import Target

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
    with Checkpoint(checkpoint_directory) as checkpoint:
        require_comparable(directory, manifest, checkpoint)
        return compare_layers(checkpoint, directory, parity_tokens(checkpoint))


def require_comparable(directory: Path, manifest: Manifest, checkpoint: AnyCheckpoint) -> None:
    """Refuse an export whose layers cannot be held against a checkpoint's.

    Raises:
        ConfigError: It is that of another checkpoint, or for another target.
    """
    target = str(manifest.details.get("target", Target.CPU))
    if target != Target.CPU:
        raise ConfigError(
            f"{directory}: was exported with --target {target}; layers are compared in graphs of "
            f"--target {Target.CPU}, which hold the same integers: export that one from the same "
            f"checkpoint"
        )
    own, expected = checkpoint.manifest.digest, str(manifest.parents.get("checkpoint"))
    if own != expected:
        raise ConfigError(
            f"{directory}: was not exported from {checkpoint.directory} (digest {own[:12]}, "
            f"expected {expected[:12]}); name its own with --checkpoint"
        )


def compare_layers(checkpoint: Checkpoint, directory: Path, ids: np.ndarray) -> LayerReport:
    """Compare the graphs in a directory with a checkpoint, layer by layer.

    Args:
        checkpoint: What is exported.
        directory: The graphs, their weights and `genai_config.json`.
        ids: int64 [T] tokens to run; those behind `prompt_length` of them one by one.

    Raises:
        ArtifactError: ONNX Runtime cannot load a graph, or a graph lacks a node.
    """
    prompt = prompt_length(len(ids))
    model = checkpoint.load_model(on_call=True)
    places = decoder_places(checkpoint.names)
    with capture(model, places, integers=True) as expected:
        torch_logits(model, ids)
    floors = noise_floors(model, places, lambda: torch_logits(model, ids), expected)
    with ProbedDecoder(directory, checkpoint.names) as decoder:
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
    float_run = None
    if any(reads_floats(model, linear) for probes, _ in runs for linear in probes.linears):
        with capture(model, places) as float_run:
            float_activation_logits(model, ids)
    parts: list[PartParity] = []
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
        in_phase = Reference(
            model,
            checkpoint,
            {key: value[rows] for key, value in expected.items()},
            None if float_run is None else {key: value[rows] for key, value in float_run.items()},
            floors,
        )
        streams = with_streams({key: found[name] for key, name in probes.streams.items()})
        parts += compare_parts(in_phase, phase, probes.linears, found, streams)
    return LayerReport(tuple(parts))
