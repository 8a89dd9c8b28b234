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
the bits of the cache, stand in the manifest's details.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from deploy.architecture import decoder_names
from deploy.artifact import ArtifactKind, read_manifest, verify_files
from deploy.errors import ArtifactError
from deploy.module_layout import empty_decoder, to_our_layout
from deploy.rotation_file import load_rotation
from rolora.decoder import BlockNames, DecoderNames
from rolora.kv_attention import CODEC_NAME, attention_fqn, install_codecs
from rolora.kv_cache import FLOAT_KV_BITS, CacheCodec, check_kv_bits, stored_parts
from rolora.layer_plan import LayerPlan
from rolora.linear import InputQuantizedLinear, QuantizedEmbedding, QuantizedLinear
from rolora.online import install_online_rotations
from rolora.packing import pack_int4, unpack_int4
from rolora.rotation import RotationPlan
from rolora.scheme import UNQUANTIZED_BITS, ActivationSpec, Granularity, WeightSpec

WEIGHTS_NAME = "model.safetensors"


@dataclass(frozen=True)
class StoredLinear:
    """One linear of a checkpoint: its sizes, and its format if it is quantized."""

    fqn: str
    in_features: int
    out_features: int
    has_bias: bool
    weight: WeightSpec
    """How the weight is stored; 16 bits is float with a quantized input, 32 all float."""
    activation: ActivationSpec | None
    """How the input is quantized; None for a float linear."""

    @property
    def needs_blocks(self) -> bool:
        """Whether no integer product computes it, only MatMulNBits: groups, or a float input."""
        spec = self.activation
        return spec is not None and (spec.is_float or spec.granularity is Granularity.GROUP)


class Checkpoint:
    """Reads a checkpoint directory without loading it.

    Args:
        directory: A directory that `merge-rotate-quantize` wrote.
        verify: Compare every file with the manifest's sha256 first.

    Raises:
        StageOrderError: The directory is not such a checkpoint.
        ArtifactError: A file is missing or damaged.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory, ArtifactKind.CHECKPOINT)
        if verify:
            verify_files(directory)
        self.config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True)
        self.names: DecoderNames = decoder_names(self.config)
        self._formats = _formats_from_details(self.manifest.details, directory)
        self.kv_bits = _kv_bits_from_details(self.manifest.details, directory)
        self._files = ExitStack()
        try:
            self._tensors = self._files.enter_context(
                safe_open(directory / WEIGHTS_NAME, framework="np")
            )
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{directory / WEIGHTS_NAME}: {error}; write the checkpoint again"
            ) from error
        self._keys = frozenset(self._tensors.keys())
        self.rotation: RotationPlan | None = load_rotation(directory, self.manifest)

    def close(self) -> None:
        """Release the mapped weights."""
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has(self, key: str) -> bool:
        """Return whether a tensor is stored."""
        return key in self._keys

    def keys(self) -> frozenset[str]:
        """Return the names of all stored tensors."""
        return self._keys

    def array(self, key: str) -> np.ndarray:
        """Read one tensor as stored.

        Raises:
            ArtifactError: There is no such tensor.
        """
        self._require(key)
        array: np.ndarray = self._tensors.get_tensor(key)
        return array

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the stored shape of a tensor without reading it.

        Raises:
            ArtifactError: There is no such tensor.
        """
        self._require(key)
        return tuple(self._tensors.get_slice(key).get_shape())

    def _require(self, key: str) -> None:
        if key not in self._keys:
            raise ArtifactError(
                f"{self.directory / WEIGHTS_NAME}: tensor {key!r} is missing; write the "
                f"checkpoint again"
            )

    def linear(self, fqn: str) -> StoredLinear:
        """Describe one linear."""
        plan = self._formats.get(fqn)
        weight = WeightSpec(32) if plan is None else plan.weight
        rows, columns = self.shape(f"{fqn}.weight")
        return StoredLinear(
            fqn=fqn,
            in_features=columns * 2 if weight.bits == 4 else columns,
            out_features=rows,
            has_bias=self.has(f"{fqn}.bias"),
            weight=weight,
            activation=None if plan is None else plan.activation,
        )

    @property
    def embedding_spec(self) -> WeightSpec | None:
        """How the embedding is stored; None is float."""
        key = f"{self.names.embedding}.weight"
        if not self.has(f"{key}_scale"):
            return None
        bits = 8 if self.shape(key)[1] == self.names.hidden_size else 4
        scales = self.shape(f"{key}_scale")
        return WeightSpec(bits, None if len(scales) == 1 else self.names.hidden_size // scales[1])

    def quantized_embedding(self, spec: WeightSpec) -> QuantizedEmbedding:
        """Read the embedding's integers and scales, which `spec` describes."""
        key = f"{self.names.embedding}.weight"
        stored = self._tensor(key)
        table = unpack_int4(stored) if spec.bits == 4 else stored
        return QuantizedEmbedding(table, self._tensor(f"{key}_scale"), spec)

    def integers(self, linear: StoredLinear) -> np.ndarray:
        """Read the integers of a quantized linear, int8 [out, in], unpacked."""
        stored = self.array(f"{linear.fqn}.weight")
        if linear.weight.bits != 4:
            return stored
        return unpack_int4(torch.from_numpy(stored)).numpy()

    def online_factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the float32 factors (left, right) of R4, or None without it."""
        if self.rotation is None or self.rotation.r4 is None:
            return None
        return self.rotation.r4.left.float().numpy(), self.rotation.r4.right.float().numpy()

    def online_r1(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Return signs [l * r] and factors of an R1 that acts at run time, float32; else None."""
        plan = self.rotation
        if plan is None or plan.r1 is None or plan.rotates_stream(self.names):
            return None
        r1, signs = plan.r1, plan.r1.signs
        signs = torch.ones(r1.size) if signs is None else signs.float()
        return signs.numpy(), r1.left.float().numpy(), r1.right.float().numpy()

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
            key = f"{attention_fqn(block)}.{CODEC_NAME}.{name}"
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
                f"{self.directory / WEIGHTS_NAME}: {attention_fqn(block)}: {error}; write the "
                f"checkpoint again"
            ) from error

    def load_model(self) -> PreTrainedModel:
        """Rebuild the torch model: integer modules, online rotations, quantized KV cache."""
        model = empty_decoder(self.config)
        to_our_layout(model)
        for fqn in (*self.names.linears(), self.names.head):
            linear = self.linear(fqn)
            if linear.activation is not None:
                model.set_submodule(fqn, self._quantized_linear(linear))
        if self.embedding_spec is not None:
            model.set_submodule(self.names.embedding, self.quantized_embedding(self.embedding_spec))
        remaining = {
            name: self._tensor(name)
            for name, parameter in model.named_parameters()
            if parameter.device.type == "meta"
        }
        model.load_state_dict(remaining, strict=False, assign=True)
        restore_buffers(model, self.config)
        if self.rotation is not None:
            install_online_rotations(model, self.rotation, self.names)
        if self.kv_bits != FLOAT_KV_BITS or self.r3 is not None:
            install_codecs(model, self.names, map(self._codec, self.names.blocks))
        model.eval()
        return model

    def _tensor(self, key: str) -> Tensor:
        return torch.from_numpy(self.array(key))

    def _quantized_linear(self, linear: StoredLinear) -> QuantizedLinear | InputQuantizedLinear:
        assert linear.activation is not None
        fqn = linear.fqn
        static = linear.activation.granularity is Granularity.TENSOR
        input_scale = self._tensor(f"{fqn}.input_scale") if static else None
        bias = self._tensor(f"{fqn}.bias") if linear.has_bias else None
        if linear.weight.bits == UNQUANTIZED_BITS:
            weight = self._tensor(f"{fqn}.weight")
            return InputQuantizedLinear(weight, bias, linear.activation, input_scale)
        return QuantizedLinear(
            torch.from_numpy(self.integers(linear)),
            self._tensor(f"{fqn}.weight_scale"),
            bias,
            linear.weight,
            linear.activation,
            input_scale,
        )


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


def write_model(directory: Path, model: nn.Module) -> None:
    """Write a (quantized) decoder that is in memory as `model.safetensors`.

    Args:
        directory: An artifact that is being written.
        model: With an untied head.
    """
    tensors = stored_tensors(model, [""])
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


def formats_to_details(plans: list[LayerPlan]) -> dict[str, Any]:
    """Return the format of each quantized linear as plain data for the manifest."""
    return {
        plan.fqn: {
            "weight_bits": plan.weight.bits,
            "weight_group_size": plan.weight.group_size,
            "activation_bits": plan.activation.bits,
            "activation_granularity": str(plan.activation.granularity),
            "activation_clip_ratio": plan.activation.clip_ratio,
            "activation_group_size": plan.activation.group_size,
            "activation_symmetric": plan.activation.symmetric,
        }
        for plan in plans
    }


def _formats_from_details(details: Mapping[str, Any], where: Path) -> dict[str, LayerPlan]:
    """Read what `formats_to_details` wrote, also before it knew of the last two fields."""
    formats = {}
    for fqn, raw in details.get("linears", {}).items():
        try:
            weight = WeightSpec(raw["weight_bits"], raw["weight_group_size"])
            granularity = Granularity(raw["activation_granularity"])
            group_size = weight.group_size if granularity is Granularity.GROUP else None
            activation = ActivationSpec(
                raw["activation_bits"],
                granularity,
                raw["activation_clip_ratio"],
                raw.get("activation_group_size", group_size),
                symmetric=raw.get("activation_symmetric", True),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise ArtifactError(
                f"{where}: the manifest's format of {fqn} is unreadable: {error!r}"
            ) from error
        formats[fqn] = LayerPlan(fqn, weight, activation, fqn)
    return formats


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
