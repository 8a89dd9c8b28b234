"""Where an exported encoder and the torch reference part: as a whole, and layer by layer.

The same padded texts run through both, and positions that are text are compared. Three views: the
file's integers and scales against the checkpoint's; the last hidden states and the head as the
export itself is checked (`encoder_parity`); and the products and blocks as those of a decoder are
(`layer_parity`), where a block gives what its norms give, since an encoder has no residual stream
that only norms read. A product is compared without its bias, which a node behind it adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deploy.artifact import ArtifactKind, read_manifest
from deploy.encoder_checkpoint import EncoderCheckpoint
from deploy.encoder_parity import (
    Batch,
    EncoderParityReport,
    measure_encoder_parity,
    parity_batch,
)
from deploy.errors import ParityError
from deploy.exact_weights import check_exact_weights
from deploy.graph_probes import find_encoder_probes, open_probed
from deploy.layer_parity import require_comparable
from deploy.layer_report import LayerReport
from deploy.parity import float_activations
from deploy.part_parity import Reference, compare_parts, reads_floats
from deploy.session import GRAPH_NAME
from deploy.stream_capture import capture, encoder_places, noise_floors

ENCODE = "encode"


@dataclass(frozen=True)
class EncoderExportReport:
    """All that a finished export was held against."""

    weights_fault: str | None
    """The first number of the file that is not the checkpoint's; None if there is none."""
    graph: EncoderParityReport
    layers: LayerReport

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        whole = {"weights_fault": self.weights_fault, "graph": self.graph.to_dict()}
        return whole | self.layers.to_dict()

    def rows(self, *, every: bool = False) -> list[tuple[str, ...]]:
        """Return the rows of the layers, and of the whole graph after them."""
        rows = self.layers.rows(every=every)
        for layer, part, error, bound in self.graph.errors():
            beyond = "" if error <= bound else "beyond"
            rows.append((layer, ENCODE, part, "", f"{error:.2e}", f"{bound:.2e}", "", beyond))
        return rows

    def require_within_bounds(self) -> None:
        """Refuse an export with a number that is not the checkpoint's, or a part beyond its bound.

        Raises:
            ParityError: It names both, and the first layer that departs.
        """
        faults = [*([self.weights_fault] if self.weights_fault else []), *self.graph.faults()]
        if faults or self.layers.first is not None:
            where = self.layers.describe_first()
            raise ParityError(f"the export departs from torch; {'; '.join([*faults, where])}")


def report_on_encoder(directory: Path, checkpoint_directory: Path) -> EncoderExportReport:
    """Compare a finished export with its checkpoint; damaged weights are read as they are.

    Args:
        directory: What `rolora export` wrote.
        checkpoint_directory: What it was exported from.

    Raises:
        StageOrderError: A directory is of another stage.
        ConfigError: The export is that of another checkpoint, or for another target.
        ArtifactError: ONNX Runtime cannot load it, or the checkpoint is damaged.
    """
    manifest = read_manifest(directory, ArtifactKind.ENCODER)
    with EncoderCheckpoint(checkpoint_directory) as checkpoint:
        require_comparable(directory, manifest, checkpoint)
        exact, fault = 0, None
        try:
            exact = check_exact_weights(checkpoint, directory)
        except ParityError as error:
            fault = str(error)
        batch = parity_batch(checkpoint)
        layers = compare_encoder_layers(checkpoint, directory, batch)
        graph = measure_encoder_parity(checkpoint, directory, batch, exact)
        return EncoderExportReport(fault, graph, layers)


def compare_encoder_layers(
    checkpoint: EncoderCheckpoint, directory: Path, batch: Batch
) -> LayerReport:
    """Compare the graph in a directory with a checkpoint, layer by layer.

    Args:
        checkpoint: What is exported.
        directory: The graph and its weights.
        batch: From `parity_batch`.

    Raises:
        ArtifactError: ONNX Runtime cannot load the graph, or it lacks a node.
    """
    session, probes = open_probed(
        directory / GRAPH_NAME, partial(find_encoder_probes, names=checkpoint.names)
    )
    given = {value.name: batch[value.name] for value in session.get_inputs()}
    values = session.run(probes.values(), given)
    rows = batch["attention_mask"].astype(bool)
    found = {name: value[rows] for name, value in zip(probes.values(), values, strict=True)}
    model, places = checkpoint.load_model(), encoder_places(checkpoint.names)
    run = partial(_run, model, batch)
    with capture(model, places, rows, integers=True) as expected:
        run()
    float_run = None
    if any(reads_floats(model, linear) for linear in probes.linears):
        with float_activations(model), capture(model, places, rows) as float_run:
            run()
    floors = noise_floors(model, places, run, expected, rows)
    reference = Reference(model, checkpoint, expected, float_run, floors)
    streams = {key: found[name] for key, name in probes.streams.items()}
    return LayerReport(tuple(compare_parts(reference, ENCODE, probes.linears, found, streams)))


def _run(model: PreTrainedModel, batch: Batch) -> None:
    with torch.inference_mode():
        model(**{name: torch.from_numpy(array) for name, array in batch.items()})
