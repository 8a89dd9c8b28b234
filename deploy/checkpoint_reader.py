"""Reads the files of a quantized checkpoint lazily, whatever kind of model it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Self, TypeAlias, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from deploy.artifact import ArtifactKind, Manifest, read_manifest, verify_files
from deploy.errors import ArtifactError
from deploy.weights_on_call import held, read_on_call
from rolora.blocks import BlockStack
from rolora.kronecker import Rotation
from rolora.layer_plan import LayerPlan
from rolora.linear import InputQuantizedLinear, QuantizedEmbedding, QuantizedLinear
from rolora.packing import unpack_int4
from rolora.scheme import UNQUANTIZED_BITS, ActivationSpec, Granularity, WeightSpec

WEIGHTS_NAME = "model.safetensors"
ALL = slice(None)
SLAB = 4_000_000
"""Elements of a large matrix that are read at a time."""
Names = TypeVar("Names", bound=BlockStack, covariant=True)


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


class CheckpointReader(Generic[Names]):
    """Reads a checkpoint directory without loading it.

    Args:
        directory: A directory that `merge-rotate-quantize` wrote.
        name_parts: Names the parts of the model, given its config and the manifest.
        verify: Compare every file with the manifest's sha256 first.

    Raises:
        StageOrderError: The directory is not such a checkpoint.
        ArtifactError: A file is missing or damaged.
        UnsupportedModelError: It holds another kind of model.
    """

    def __init__(
        self,
        directory: Path,
        name_parts: Callable[[PretrainedConfig, Manifest], Names],
        *,
        verify: bool = True,
    ) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory, ArtifactKind.CHECKPOINT)
        if verify:
            verify_files(directory)
        self.config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True)
        self.names: Names = name_parts(self.config, self.manifest)
        self._formats = _formats_from_details(self.manifest.details, directory)
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
        self._stored_as: dict[str, str] = {}

    def share(self, stored_as: Mapping[str, str]) -> None:
        """Read tensors under other names than their own, which are not stored."""
        self._stored_as = dict(stored_as)

    def close(self) -> None:
        """Release the mapped weights."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has(self, key: str) -> bool:
        """Return whether a tensor is stored."""
        return self._stored_as.get(key, key) in self._keys

    def keys(self) -> frozenset[str]:
        """Return the names of all stored tensors."""
        return self._keys

    def array(self, key: str) -> np.ndarray:
        """Read one tensor as stored.

        Raises:
            ArtifactError: There is no such tensor.
        """
        array: np.ndarray = self._tensors.get_tensor(self._place(key))
        return array

    def part(self, key: str, rows: slice, columns: slice = ALL) -> np.ndarray:
        """Read a part of a matrix as stored, without the rest of it.

        Raises:
            ArtifactError: There is no such tensor.
        """
        array: np.ndarray = self._tensors.get_slice(self._place(key))[rows, columns]
        return array

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the stored shape of a tensor without reading it.

        Raises:
            ArtifactError: There is no such tensor.
        """
        return tuple(self._tensors.get_slice(self._place(key)).get_shape())

    def _place(self, key: str) -> str:
        place = self._stored_as.get(key, key)
        if place not in self._keys:
            raise ArtifactError(
                f"{self.directory / WEIGHTS_NAME}: tensor {place!r} is missing; write the "
                f"checkpoint again"
            )
        return place

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
        scale = self._tensor(f"{key}_scale")
        return QuantizedEmbedding(table, scale, spec, self.table_rotation)

    @property
    def shares_table(self) -> bool:
        """Whether a head's integers are those of the embedding, stored once."""
        return False

    @property
    def table_rotation(self) -> Rotation | None:
        """What the rows of the embedding are stored rotated by."""
        return None

    def integers(self, linear: StoredLinear) -> np.ndarray:
        """Read the integers of a quantized linear, int8 [out, in], unpacked."""
        return self._unpacked(linear, self.array(f"{linear.fqn}.weight"))

    def integer_rows(self, linear: StoredLinear, rows: slice) -> np.ndarray:
        """Read some rows of `integers`, int8 [rows, in]."""
        return self._unpacked(linear, self.part(f"{linear.fqn}.weight", rows))

    def integer_columns(self, linear: StoredLinear, columns: slice) -> np.ndarray:
        """Read some columns of `integers`, int8 [out, columns]; of 4 bits from even to even."""
        if linear.weight.bits == 4:
            columns = slice(columns.start // 2, -(-columns.stop // 2))
        return self._unpacked(linear, self.part(f"{linear.fqn}.weight", ALL, columns))

    def _unpacked(self, linear: StoredLinear, stored: np.ndarray) -> np.ndarray:
        if linear.weight.bits != 4:
            return stored
        return unpack_int4(torch.from_numpy(stored)).numpy()

    def put_integers(self, model: nn.Module, fqns: Iterable[str], *, on_call: bool = False) -> None:
        """Put integer modules in the place of the embedding and of linears that are quantized.

        Args:
            model: Of the checkpoint's config.
            fqns: Linears, quantized or not.
            on_call: Quantized linears read their weights whenever they are called, while the
                checkpoint is open, and hold none in between.
        """
        for fqn in fqns:
            linear = self.linear(fqn)
            if linear.activation is not None:
                module = self._quantized_linear(linear)
                if on_call:
                    read_on_call(module, partial(self._weight, linear))
                model.set_submodule(fqn, module)
        if self.embedding_spec is not None:
            model.set_submodule(self.names.embedding, self.quantized_embedding(self.embedding_spec))

    @contextmanager
    def weights_held(self, model: nn.Module, fqns: Sequence[str]) -> Iterator[None]:
        """Have the weights of linears in memory inside the block, if they are read on call.

        Args:
            model: From `put_integers`.
            fqns: Of quantized linears; others are left as they are.
        """
        with ExitStack() as blocks:
            for fqn in fqns:
                module = model.get_submodule(fqn)
                if isinstance(module, QuantizedLinear | InputQuantizedLinear):
                    blocks.enter_context(held(module, partial(self._weight, self.linear(fqn))))
            yield

    def _tensor(self, key: str) -> Tensor:
        return torch.from_numpy(self.array(key))

    def _weight(self, linear: StoredLinear) -> Tensor:
        if linear.weight.bits == UNQUANTIZED_BITS:
            return self._tensor(f"{linear.fqn}.weight")
        return torch.from_numpy(self.integers(linear))

    def _quantized_linear(self, linear: StoredLinear) -> QuantizedLinear | InputQuantizedLinear:
        assert linear.activation is not None
        fqn = linear.fqn
        static = linear.activation.granularity is Granularity.TENSOR
        input_scale = self._tensor(f"{fqn}.input_scale") if static else None
        bias = self._tensor(f"{fqn}.bias") if linear.has_bias else None
        weight = self._weight(linear)
        if linear.weight.bits == UNQUANTIZED_BITS:
            return InputQuantizedLinear(weight, bias, linear.activation, input_scale)
        return QuantizedLinear(
            weight,
            self._tensor(f"{fqn}.weight_scale"),
            bias,
            linear.weight,
            linear.activation,
            input_scale,
        )


AnyCheckpoint: TypeAlias = CheckpointReader[BlockStack]
"""Of a decoder or an encoder."""


def slabs(length: int, width: int) -> Iterator[slice]:
    """Cut an axis of a matrix into pieces of about `SLAB` elements that start at even numbers.

    Args:
        length: Of the axis.
        width: Elements in one of it.
    """
    step = max(2, SLAB // max(1, width) // 2 * 2)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


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
    linears = details.get("linears")
    if not isinstance(linears, dict):
        raise ArtifactError(
            f"{where}: the manifest's details must hold `linears`, the format of each, got "
            f"{linears!r}; write the checkpoint again"
        )
    for fqn, raw in linears.items():
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
