"""The export stage: checkpoint -> ONNX directory for ONNX Runtime and onnxruntime-genai.

    prompt.onnx, token.onnx        a graph for prompts, and one for single tokens; or model.onnx
    head.onnx                      the prompt graph's head alone: logits of every position
    model.onnx.data                the weights of all graphs, once
    genai_config.json              what onnxruntime-genai reads
    tokenizer.json, ...            copied from the checkpoint
    rolora_manifest.json           where it came from, and the parity that was measured

The directory appears only after the graphs have been run and compared with the torch reference.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from deploy.artifact import (
    MANIFEST_NAME,
    ArtifactKind,
    Manifest,
    finished_artifact,
    library_versions,
    new_artifact,
    write_manifest,
)
from deploy.calibration_text import sample_text
from deploy.checkpoint import WEIGHTS_NAME, Checkpoint
from deploy.conventions import context_length
from deploy.decoder_graph import DecoderGraph
from deploy.genai_config import genai_config
from deploy.graph_builder import stored_initializers
from deploy.kernels import GraphForm, Kernel, graph_forms
from deploy.language_model import load_tokenizer
from deploy.memory import peak_memory_bytes
from deploy.parity import DECODE_STEPS, PROMPT_TOKENS, check_parity
from deploy.rotation_file import ROTATION_NAME
from deploy.session import GENAI_CONFIG_NAME, GRAPH_NAME

DATA_NAME = f"{GRAPH_NAME}.data"
_NOT_COPIED = {WEIGHTS_NAME, ROTATION_NAME, MANIFEST_NAME}


class ExportFormat(StrEnum):
    """File formats of an export."""

    ONNX = "onnx"
    COMPRESSED_TENSORS = "compressed-tensors"


class Target(StrEnum):
    """Where the graph will run; integer kernels differ between processors."""

    CPU = "cpu"


@dataclass(frozen=True)
class ExportReport:
    """What the stage did."""

    output: Path
    manifest: Manifest
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "output": str(self.output),
            "digest": self.manifest.digest,
            "parity": self.manifest.checks["parity"],
            "operators": self.manifest.details["operators"],
            "file_bytes": sum(record.bytes for record in self.manifest.files.values()),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def export_onnx(
    checkpoint_directory: Path,
    output: Path,
    target: Target,
    kernel: Kernel = Kernel.AUTO,
    progress: Callable[[str], None] = lambda step: None,
) -> ExportReport:
    """Export a checkpoint and check the result.

    Args:
        checkpoint_directory: From `merge-rotate-quantize`.
        output: The directory to make.
        target: Processor whose kernels the graph addresses.
        kernel: Kernels of the quantized linears.
        progress: Called with a line for each step.

    Raises:
        ConfigError: The output exists.
        StageOrderError: The directory is no checkpoint.
        ArtifactError: A file is missing or damaged, or the disk is full.
        UnsupportedModelError: ONNX Runtime cannot run the model's head size, or the kernel not its
            scheme.
        ParityError: The graph does not compute what the checkpoint does; nothing is left behind.
    """
    with Checkpoint(checkpoint_directory) as checkpoint:
        parents = {"checkpoint": checkpoint.manifest.digest}
        config: dict[str, Any] = {
            "format": str(ExportFormat.ONNX),
            "target": str(target),
            "kernel": str(kernel),
        }
        if done := finished_artifact(output, ArtifactKind.ONNX, parents, config):
            progress(f"{output} is finished already")
            return ExportReport(output, done, peak_memory_bytes())
        needed = (checkpoint_directory / WEIGHTS_NAME).stat().st_size
        with new_artifact(output, needed_bytes=needed) as directory:
            forms = graph_forms(checkpoint, kernel)
            context, whole = (
                context_length(checkpoint.config),
                checkpoint.config.max_position_embeddings,
            )
            if context < whole:
                progress(
                    f"the context is {context} tokens instead of {whole}: beyond that longrope "
                    f"turns all positions otherwise, and keys in a cache cannot follow"
                )
            operators = write_graphs(checkpoint, forms, directory, progress)
            genai = genai_config(checkpoint.config, checkpoint.names, checkpoint_directory, forms)
            (directory / GENAI_CONFIG_NAME).write_text(
                json.dumps(genai, indent=2) + "\n", encoding="utf-8"
            )
            for path in sorted(checkpoint_directory.iterdir()):
                if path.is_file() and path.name not in _NOT_COPIED:
                    shutil.copyfile(path, directory / path.name)
            progress("checking parity with the torch reference")
            parity = check_parity(checkpoint, directory, parity_tokens(checkpoint), forms)
            manifest = write_manifest(
                directory,
                Manifest(
                    ArtifactKind.ONNX,
                    parents=parents,
                    config=config,
                    versions=library_versions(),
                    checks={"parity": parity.to_dict()},
                    details={
                        "scheme": checkpoint.manifest.details.get("scheme"),
                        "operators": operators,
                        "context_length": context,
                    },
                ),
            )
    return ExportReport(output, manifest, peak_memory_bytes())


def write_graphs(
    checkpoint: Checkpoint,
    forms: Sequence[GraphForm],
    directory: Path,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, int]:
    """Write the graphs and, once, the weights that they share.

    Args:
        checkpoint: What is exported; its weights are read while they are written.
        forms: The graphs; the first one brings the weights.
        directory: Receives the files.
        progress: Called with a line for each step.

    Returns:
        How often each operator occurs, over all graphs.
    """
    stored: dict[str, ir.ExternalTensor] = {}
    operators: dict[str, int] = {}
    for form in forms:
        progress(f"writing {form.file}")
        graph = DecoderGraph(checkpoint, form, stored)
        model = graph.build_head() if form.head_only else graph.build()
        ir.save(
            model,
            directory / form.file,
            external_data=None if stored else DATA_NAME,
            size_threshold_bytes=1024,
            max_workers=1,
        )
        for operator, count in count_operators(model).items():
            operators[operator] = operators.get(operator, 0) + count
        stored = stored or stored_initializers(ir.load(directory / form.file))
    return _most_frequent_first(operators)


def parity_tokens(checkpoint: Checkpoint) -> np.ndarray:
    """Return the tokens that parity is measured on: the start of our evaluation sample, int64."""
    tokenizer = load_tokenizer(checkpoint.directory)
    ids = tokenizer(sample_text("evaluation.txt"), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    count = min(PROMPT_TOKENS + DECODE_STEPS, context_length(checkpoint.config))
    vocabulary: int = checkpoint.config.vocab_size
    return np.asarray(ids[:count], dtype=np.int64) % vocabulary


def count_operators(model: ir.Model) -> dict[str, int]:
    """Return how often each operator occurs in the graph, the most frequent first."""
    counts: dict[str, int] = {}
    for node in model.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return _most_frequent_first(counts)


def _most_frequent_first(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
