"""A quantized checkpoint: how it is written, read lazily, and rebuilt as a torch model.

The directory holds `config.json` (with an untied head), the tokenizer, `model.safetensors`, the
rotation if there is one, and the manifest. Tensors keep the model's own names; a quantized linear
adds its scales:

    <fqn>.weight        int8 [out, in], or uint8 [out, in / 2] for 4 bits (rolora.packing)
    <fqn>.weight_scale  float32 [out] or [out, groups]; the embedding's rows are its outputs
    <fqn>.input_scale   float32 scalar, where the input has a static scale
    <fqn>.bias          float32 [out], where the linear has one

An attention module with a quantized KV cache adds `kv_cache.<part>`, float32 [kv_heads, 1,
head_dim], for the parts that `rolora.kv_cache.stored_parts` names. The format of each linear, and
the bits of the cache, stand in the manifest's details. Where these have `shared_table`, the
embedding's integers and scales are the head's too, whose own are not stored.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from deploy.architecture import decoder_names
from deploy.checkpoint_reader import WEIGHTS_NAME, CheckpointReader
from deploy.errors import ArtifactError
from deploy.module_layout import empty_decoder, to_our_layout
from deploy.rotation_file import load_rotation
from deploy.staging import require_free_space
from rolora.decoder import BlockNames, DecoderNames
from rolora.kronecker import Rotation
from rolora.kv_attention import CODEC_NAME, install_codecs
from rolora.kv_cache import FLOAT_KV_BITS, CacheCodec, check_kv_bits, stored_parts
from rolora.linear import QuantizedEmbedding, QuantizedLinear
from rolora.online import install_online_rotations
from rolora.packing import pack_int4
from rolora.rotation import RotationPlan


class Checkpoint(CheckpointReader[DecoderNames]):
    """Reads the checkpoint of a decoder without loading it.

    Args:
        directory: A directory that `merge-rotate-quantize` wrote.
        verify: Compare every file with the manifest's sha256 first.

    Raises:
        StageOrderError: The directory is not such a checkpoint.
        ArtifactError: A file is missing or damaged.
        UnsupportedModelError: It is that of an encoder.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        super().__init__(directory, lambda config, _: decoder_names(config), verify=verify)
        self.kv_bits = _kv_bits_from_details(self.manifest.details, directory)
        self.rotation: RotationPlan | None = load_rotation(directory, self.manifest)
        if self.shares_table:
            own, stored = table_keys(self.names.head), table_keys(self.names.embedding)
            self.share(dict(zip(own, stored, strict=True)))

    @property
    def r4(self) -> Rotation | None:
        """R4, which acts at run time, or None without it."""
        return None if self.rotation is None else self.rotation.r4

    @property
    def shares_table(self) -> bool:
        """Whether the head's integers are those of the embedding, stored once."""
        return bool(self.manifest.details.get("shared_table"))

    @property
    def table_rotation(self) -> Rotation | None:
        """R1, if the embedding's rows are stored rotated by it: as the head reads them."""
        return self.rotation.r1 if self.shares_table and self.rotation is not None else None

    @property
    def online_r1(self) -> Rotation | None:
        """R1 where it acts at run time, else None."""
        plan = self.rotation
        return None if plan is None or plan.rotates_stream(self.names) else plan.r1

    @property
    def r3(self) -> np.ndarray | None:
        """R3 as a float32 matrix [head_dim, head_dim], or None without one."""
        if self.rotation is None or self.rotation.r3 is None:
            return None
        return self.rotation.r3.dense().float().numpy()

    def cache_parts(self, block: BlockNames) -> dict[str, np.ndarray]:
        """Read what calibration found for a block's KV cache; nothing if it is float.

        Returns:
            By the names of `rolora.kv_cache.stored_parts`, float32 [kv_heads, 1, head_dim] each.

        Raises:
            ArtifactError: A tensor is missing, or of a shape that the model's cache has not.
        """
        parts = {}
        expected = (self.names.num_key_value_heads, 1, self.names.head_dim)
        for name in stored_parts(self.kv_bits):
            key = f"{block.attention}.{CODEC_NAME}.{name}"
            if self.shape(key) != expected:
                raise ArtifactError(
                    f"{self.directory / WEIGHTS_NAME}: {key}: expected shape {expected}, got "
                    f"{self.shape(key)}; write the checkpoint again"
                )
            parts[name] = self.array(key)
        return parts

    def _codec(self, block: BlockNames) -> CacheCodec:
        """Rebuild what acts on queries, keys and values of a block."""
        rotation = None if self.r3 is None else torch.from_numpy(self.r3)
        parts = {name: torch.from_numpy(part) for name, part in self.cache_parts(block).items()}
        try:
            return CacheCodec(rotation, self.kv_bits, **parts)
        except ValueError as error:
            raise ArtifactError(
                f"{self.directory / WEIGHTS_NAME}: {block.attention}: {error}; write the "
                f"checkpoint again"
            ) from error

    def load_model(self, *, on_call: bool = False) -> PreTrainedModel:
        """Rebuild the torch model: integer modules, online rotations, quantized KV cache.

        Args:
            on_call: Quantized linears have their weights in memory only while they are called; the
                checkpoint must stay open.
        """
        model = empty_decoder(self.config)
        to_our_layout(model)
        restore_buffers(model, self.config)
        self.put_integers(model, (*self.names.linears(), self.names.head), on_call=on_call)
        remaining = {
            name: self._tensor(name)
            for name, parameter in model.named_parameters()
            if parameter.device.type == "meta"
        }
        model.load_state_dict(remaining, strict=False, assign=True)
        if self.rotation is not None:
            install_online_rotations(model, self.rotation, self.names)
        if self.kv_bits != FLOAT_KV_BITS or self.r3 is not None:
            install_codecs(model, self.names, map(self._codec, self.names.blocks))
        model.eval()
        return model


def table_keys(fqn: str) -> tuple[str, str]:
    """Return under which names the integers of a table or linear, and their scales, are stored."""
    return f"{fqn}.weight", f"{fqn}.weight_scale"


def stored_tensors(model: nn.Module, fqns: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of some modules as a checkpoint stores them, 4-bit weights packed.

    Args:
        model: Of which these modules are quantized, or float with an untied head.
        fqns: The modules; "" is the model.
    """
    tensors: dict[str, Tensor] = {}
    for fqn in fqns:
        part = model.get_submodule(fqn)
        packed = {
            f"{name}.weight".lstrip(".")
            for name, module in part.named_modules()
            if isinstance(module, QuantizedLinear | QuantizedEmbedding)
            and module.weight_spec.bits == 4
        }
        for name, tensor in part.state_dict().items():
            whole = pack_int4(tensor) if name in packed else tensor.detach().contiguous()
            tensors[f"{fqn}.{name}".lstrip(".")] = whole
    return tensors


def write_model(directory: Path, model: nn.Module, left_out: Container[str] = ()) -> None:
    """Write a (quantized) decoder that is in memory as `model.safetensors`.

    Args:
        directory: An artifact that is being written.
        model: With an untied head.
        left_out: Tensors that others stand for.

    Raises:
        ArtifactError: The disk has no room for it.
    """
    require_free_space(directory, weights_bytes(model))
    tensors = stored_tensors(model, [""])
    tensors = {key: tensor for key, tensor in tensors.items() if key not in left_out}
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})


def weights_bytes(model: nn.Module) -> int:
    """Return about how many bytes `write_model` will write (4-bit weights counted unpacked)."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def write_weights(directory: Path, parts: Iterable[Path]) -> None:
    """Join safetensors files into `model.safetensors`.

    Their tensors stay on disk, mapped, while they are copied.

    Args:
        directory: An artifact that is being written.
        parts: Files of `stored_tensors` that make up a decoder.
    """
    tensors: dict[str, Tensor] = {}
    with ExitStack() as files:
        for path in parts:
            file = files.enter_context(safe_open(path, framework="pt"))
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})


def _kv_bits_from_details(details: Mapping[str, Any], where: Path) -> int:
    """Read the bits of the KV cache; a checkpoint that does not name them has a float one."""
    bits = details.get("kv_bits", FLOAT_KV_BITS)
    try:
        check_kv_bits(bits)
    except ValueError as error:
        raise ArtifactError(f"{where}: the manifest's kv_bits are unreadable: {error}") from error
    return int(bits)


def restore_buffers(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Compute the buffers that no checkpoint stores (rotary frequencies) anew."""
    for name, module in list(model.named_modules()):
        on_meta = any(buffer.device.type == "meta" for buffer in module.buffers(recurse=False))
        if on_meta:
            model.set_submodule(name, type(module)(config=config))
