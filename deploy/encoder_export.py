"""The export stage for encoders: checkpoint -> ONNX directory for ONNX Runtime.

    model.onnx              one graph: whole texts to hidden states, and to logits of a classifier
    model.onnx.data         its weights
    tokenizer.json, ...     copied from the checkpoint
    rolora_manifest.json    where it came from, and the parity that was measured

The directory appears only after the graph has been run and compared with the torch reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from deploy.artifact import (
    ArtifactKind,
    Manifest,
    finished_artifact,
    library_versions,
    new_artifact,
    write_manifest,
)
from deploy.checkpoint_reader import WEIGHTS_NAME
from deploy.encoder_checkpoint import LABELS, EncoderCheckpoint
from deploy.encoder_graph import EncoderGraph
from deploy.encoder_layer_parity import compare_encoder_layers
from deploy.encoder_parity import check_encoder_parity, parity_batch
from deploy.errors import ParityError
from deploy.export import (
    ExportReport,
    copy_companions,
    count_domains,
    count_operators,
    first_departure,
    onnx_config,
    onnx_details,
    save_graph,
)
from deploy.kernels import Kernel, encoder_form
from deploy.memory import peak_memory_bytes
from deploy.portable_encoder import PortableEncoderGraph
from deploy.session import GRAPH_NAME
from deploy.targets import Target
from deploy.verification import saturation_hint, verify_on


def export_encoder(
    checkpoint_directory: Path,
    output: Path,
    target: Target = Target.CPU,
    kernel: Kernel = Kernel.AUTO,
    progress: Callable[[str], None] = lambda step: None,
) -> ExportReport:
    """Export a checkpoint and check the result.

    Args:
        checkpoint_directory: From `quantize_encoder`.
        output: The directory to make.
        target: Processor whose kernels the graph addresses.
        kernel: Kernels of the quantized linears.
        progress: Called with a line for each step.

    Raises:
        ConfigError: The output exists, or an encoder does not have the target or kernel.
        StageOrderError: The directory is no checkpoint.
        ArtifactError: A file is missing or damaged, or the disk is full.
        UnsupportedModelError: ONNX Runtime has no kernel for the scheme, or no node for the
            activation.
        ParityError: The graph does not compute what the checkpoint does; nothing is left behind.
    """
    with EncoderCheckpoint(checkpoint_directory) as checkpoint:
        form = encoder_form(checkpoint, kernel, target)
        parents = {"checkpoint": checkpoint.manifest.digest}
        config = onnx_config(target, kernel)
        wanted = Manifest(ArtifactKind.ENCODER, parents, config, library_versions())
        if done := finished_artifact(output, wanted, progress):
            return ExportReport(output, done, peak_memory_bytes())
        needed = (checkpoint_directory / WEIGHTS_NAME).stat().st_size
        with new_artifact(output, needed_bytes=needed) as directory:
            progress(f"writing {GRAPH_NAME}")
            builder = PortableEncoderGraph if form.kernel is Kernel.QDQ else EncoderGraph
            model = builder(checkpoint, form).build()
            save_graph(model, directory / GRAPH_NAME)
            copy_companions(checkpoint, directory)
            progress("checking parity with the torch reference")
            verification = verify_on(target)
            batch = parity_batch(checkpoint)
            try:
                parity = check_encoder_parity(checkpoint, directory, batch, form)
            except ParityError as error:
                if hint := saturation_hint(target, verification):
                    raise ParityError(f"{error}{hint}") from error
                if target is not Target.CPU:
                    raise
                progress("looking for the layer that departs")
                compare = partial(compare_encoder_layers, checkpoint, directory, batch)
                raise ParityError(f"{error}; {first_departure(compare)}") from error
            counts = count_operators(model), count_domains(model)
            details = onnx_details(checkpoint.manifest, [form], *counts, checkpoint.token_limit)
            if checkpoint.labels is not None:
                details[LABELS] = list(checkpoint.labels.names)
            checks = {"parity": parity.to_dict(), "verified_on": verification.to_dict()}
            manifest = write_manifest(directory, replace(wanted, checks=checks, details=details))
    return ExportReport(output, manifest, peak_memory_bytes())
