"""The export stage's other half: checkpoint -> compressed-tensors directory, for other programs.

    model.safetensors       integers and scales in that library's layout; the rest in float32
    config.json             `quantization_config`: formats and online rotations
    README.md               what it is, who reads it, what a reader must do
    tokenizer.json, ...     copied from the checkpoint
    rolora_manifest.json    where it came from, and the check

The library packs each weight and is made to unpack it again, exactly. Then the directory is loaded
as its readers load it, and must compute what the checkpoint does (`deploy.compressed_check`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme
from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deploy.artifact import (
    ArtifactKind,
    Manifest,
    finished_artifact,
    library_versions,
    new_artifact,
    write_manifest,
)
from deploy.checkpoint import Checkpoint
from deploy.checkpoint_reader import WEIGHTS_NAME
from deploy.compressed_card import CARD_NAME, model_card
from deploy.compressed_check import check_reader
from deploy.compressed_reader import TRANSFORM_NAME, TRANSFORM_WEIGHT
from deploy.compressed_scheme import compressed_scheme, describe_group
from deploy.errors import ParityError, UnsupportedModelError
from deploy.export import ExportFormat, copy_companions
from deploy.families import FAMILIES, family_of
from deploy.memory import peak_memory_bytes
from deploy.parity import parity_tokens
from deploy.weight_files import CONFIG_NAME
from rolora.affine import dequantize
from rolora.kronecker import Rotation
from rolora.linear import dequantized_weight
from rolora.rotation import RotationName
from rolora.rotation_table import applications
from rolora.scheme import Granularity

_LIBRARY = "compressed-tensors"
_PACKED_PARTS = ("weight", "weight_scale", "input_scale")
"""Tensors of a quantized linear that are written anew."""


@dataclass(frozen=True)
class CompressedReport:
    """What the stage did."""

    output: Path
    manifest: Manifest
    peak_memory_bytes: int

    @property
    def needs_transform(self) -> bool:
        """Whether a reader that ignores `transform_config` computes nonsense."""
        return bool(self.manifest.details["online_rotation"])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "output": str(self.output),
            "digest": self.manifest.digest,
            "groups": self.manifest.details["groups"],
            "online_rotation": self.manifest.details["online_rotation"],
            "reader": self.manifest.checks["reader"],
            "file_bytes": sum(record.bytes for record in self.manifest.files.values()),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def export_compressed(
    checkpoint_directory: Path,
    output: Path,
    progress: Callable[[str], None] = lambda step: None,
) -> CompressedReport:
    """Export a checkpoint for transformers and vLLM, and check what transformers computes.

    Args:
        checkpoint_directory: From `merge-rotate-quantize`.
        output: The directory to make.
        progress: Called with a line for each step.

    Raises:
        ConfigError: The output exists, or the format has no words for the checkpoint's.
        StageOrderError: The directory is no checkpoint.
        ArtifactError: A file is missing or damaged, or the disk is full.
        UnsupportedModelError: The library cannot build R4 of this size, or the family has other
            modules there.
        ParityError: A reader would not compute what the checkpoint does; nothing is left behind.
    """
    with Checkpoint(checkpoint_directory) as checkpoint:
        _require_our_layout(checkpoint)
        parents = {"checkpoint": checkpoint.manifest.digest}
        config: dict[str, Any] = {"format": str(ExportFormat.COMPRESSED_TENSORS)}
        versions = library_versions() | {_LIBRARY: metadata.version(_LIBRARY)}
        wanted = Manifest(ArtifactKind.COMPRESSED, parents, config, versions)
        if done := finished_artifact(output, wanted, progress):
            return CompressedReport(output, done, peak_memory_bytes())
        scheme = compressed_scheme(checkpoint)
        transform = _transform_config(checkpoint)
        groups = {
            name: describe_group(group) + ": " + ", ".join(group.targets)
            for name, group in scheme.config.config_groups.items()
            if isinstance(group, QuantizationScheme)
        }
        with new_artifact(output, needed_bytes=_needed_bytes(checkpoint)) as directory:
            copy_companions(checkpoint, directory)
            progress("packing weights")
            tensors = _other_tensors(checkpoint, set(scheme.by_linear))
            for fqn, group in scheme.by_linear.items():
                tensors |= _pack_linear(checkpoint, fqn, group)
            save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
            del tensors
            _name_architecture(checkpoint, directory)
            ModelCompressor(scheme.config, transform).update_config(str(directory))
            progress("loading it as transformers does")
            check = check_reader(checkpoint, directory, parity_tokens(checkpoint))
            card = model_card(checkpoint.manifest, groups, transform is not None)
            (directory / CARD_NAME).write_text(card, encoding="utf-8")
            manifest = write_manifest(
                directory,
                replace(
                    wanted,
                    checks={"exact_weights": len(scheme.by_linear), "reader": asdict(check)},
                    details={
                        "scheme": checkpoint.manifest.details.get("scheme"),
                        "groups": groups,
                        "online_rotation": transform is not None,
                    },
                ),
            )
    return CompressedReport(output, manifest, peak_memory_bytes())


def _require_our_layout(checkpoint: Checkpoint) -> None:
    """Refuse a family whose readers expect other modules than a checkpoint has.

    Raises:
        UnsupportedModelError: It is one.
    """
    model_type = checkpoint.config.model_type
    if family_of(model_type).has_own_layout:
        others = ", ".join(name for name, each in FAMILIES.items() if not each.has_own_layout)
        raise UnsupportedModelError(
            f"{checkpoint.directory}: readers of compressed-tensors have other modules for model "
            f"type {model_type!r} than this checkpoint; supported are {others}. rolora export "
            f"--format onnx takes it"
        )


def _name_architecture(checkpoint: Checkpoint, directory: Path) -> None:
    """Name the model's class in config.json: vLLM needs it, a model from a GGUF file lacks it."""
    path = directory / CONFIG_NAME
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not config.get("architectures"):
        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[checkpoint.config.model_type]]
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _transform_config(checkpoint: Checkpoint) -> TransformConfig | None:
    """Return R4 in the library's words, or None where no rotation is online.

    Only the online half is named: the offline half is in the weights already, and a reader that
    applied it would do so twice.

    Raises:
        UnsupportedModelError: The library has no Hadamard matrix of this size, or R1 is online.
    """
    plan = checkpoint.rotation
    if plan is not None and plan.r1 is not None and not plan.rotates_stream(checkpoint.names):
        raise UnsupportedModelError(
            f"{checkpoint.directory}: its channels are scaled and R1 acts at run time, in a form "
            f"that compressed-tensors has no words for; make the checkpoint again with rolora "
            f"merge-rotate-quantize --equalize inner"
        )
    if plan is None or plan.r4 is None:
        return None
    try:
        random_hadamard_matrix(plan.r4.size, torch.float32, torch.device("meta"))
    except ValueError as error:
        raise UnsupportedModelError(
            f"{checkpoint.directory}: compressed-tensors builds no Hadamard matrix of R4's size "
            f"{plan.r4.size} ({error}); make the checkpoint again with rolora "
            f"merge-rotate-quantize --rotate r1,r2"
        ) from error
    width = checkpoint.names.intermediate_size
    r4 = (each for each in applications(plan, checkpoint.names) if each.rotation is RotationName.R4)
    part = next(r4).fqn.rpartition(".")[2]
    return TransformConfig(
        config_groups={
            TRANSFORM_NAME: TransformScheme(
                type="random-hadamard",
                head_dim=None if plan.r4.size == width else plan.r4.size,
                apply=[TransformArgs(targets=[f"re:.*\\.{part}$"], location="input")],
                precision=torch.float32,
            )
        }
    )


def _transform_weight(rotation: Rotation) -> Tensor:
    """Return sqrt(n) R, float32 [n, n]: readers divide by sqrt(n), so Hadamard entries are +-1."""
    return rotation.dense().mul(float(rotation.size) ** 0.5).float()


def _other_tensors(checkpoint: Checkpoint, quantized: set[str]) -> dict[str, Tensor]:
    """Return what is stored in float: norms, biases, embedding, linears left alone, and R4."""
    packed = {f"{fqn}.{part}" for fqn in quantized for part in _PACKED_PARTS}
    embedding = checkpoint.names.embedding
    table, scale = f"{embedding}.weight", f"{embedding}.weight_scale"
    tensors = {
        key: torch.from_numpy(checkpoint.array(key))
        for key in sorted(checkpoint.keys() - packed - {scale})
    }
    spec = checkpoint.embedding_spec
    if spec is not None:
        rounded = checkpoint.quantized_embedding(spec)
        tensors[table] = dequantized_weight(rounded.weight, rounded.weight_scale, spec)
    plan = checkpoint.rotation
    if plan is not None and plan.r4 is not None:
        first = checkpoint.names.blocks[0].down
        tensors[f"{first}{TRANSFORM_WEIGHT}"] = _transform_weight(plan.r4)
    return tensors


def _pack_linear(checkpoint: Checkpoint, fqn: str, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """Let the library pack one weight, and unpack it again to see that it is ours.

    Raises:
        ParityError: It is not.
    """
    linear = checkpoint.linear(fqn)
    scale = torch.from_numpy(checkpoint.array(f"{fqn}.weight_scale"))
    scale = scale.reshape(linear.out_features, -1)
    grouped = torch.from_numpy(checkpoint.integers(linear)).unflatten(1, (scale.shape[1], -1))
    weight = dequantize(grouped, scale[:, :, None]).flatten(1)
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
    packed = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    if not torch.equal(compressor.decompress(packed, scheme)["weight"], weight):
        raise ParityError(
            f"{fqn}: compressed-tensors unpacks another weight than it was given; nothing was "
            f"written. This is a fault of the export: please report it"
        )
    assert linear.activation is not None
    if linear.activation.granularity is Granularity.TENSOR:
        packed["input_scale"] = torch.from_numpy(checkpoint.array(f"{fqn}.input_scale")).reshape(1)
    return {f"{fqn}.{name}": tensor.contiguous() for name, tensor in packed.items()}


def _needed_bytes(checkpoint: Checkpoint) -> int:
    """Return about how much will be written."""
    stored = (checkpoint.directory / WEIGHTS_NAME).stat().st_size
    rows, columns = checkpoint.shape(f"{checkpoint.names.embedding}.weight")
    plan = checkpoint.rotation
    rotation = 0 if plan is None or plan.r4 is None else 4 * plan.r4.size**2
    return stored + 3 * rows * columns + rotation
