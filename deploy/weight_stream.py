"""A model whose weights stay on disk until a part of it is worked on.

The torch modules lie on the meta device, without memory. `WeightReader` reads a tensor when it is
wanted, out of one file or out of shards, and holds no file open in between, so that pages that were
mapped are given back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from deploy.architecture import decoder_names
from deploy.checkpoint import restore_buffers
from deploy.errors import ArtifactError
from deploy.loading import (
    LoadedModel,
    call_loader,
    check_model_directory,
    load_local_tokenizer,
    quiet_transformers,
    refuse_departures,
)
from deploy.model_location import LocatedModel
from deploy.module_layout import empty_decoder, own_places, to_our_layout
from deploy.weight_files import digest_model
from rolora.fold import chunk_rows

_IGNORED = re.compile(r"rotary_emb\.inv_freq")
"""Buffers that old files hold and transformers computes."""

GENERATION_NAME = "generation_config.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and its shape."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it."""
    first_row: int = 0
    """Where it begins in a tensor of the file that holds the rows of others too."""

    @property
    def rows(self) -> slice:
        """Its rows in the tensor of the file."""
        return slice(self.first_row, self.first_row + self.shape[0])


class WeightReader:
    """Reads the tensors of a model one at a time, as float32.

    Args:
        tensors: By the model's own names.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self._tensors.keys()

    def read(self, name: str) -> Tensor:
        """Return one tensor, float32."""
        stored = self._tensors[name]
        with safe_open(stored.path, framework="pt") as file:
            tensor: Tensor = file.get_slice(stored.key)[stored.rows].to(torch.float32, copy=True)
        return tensor

    def rows(self, name: str) -> Iterator[Tensor]:
        """Yield the rows of a matrix in order, float32 [n, columns], `chunk_rows` at a time."""
        stored = self._tensors[name]
        step = chunk_rows(stored.shape[1])
        with safe_open(stored.path, framework="pt") as file:
            table = file.get_slice(stored.key)
            rows = stored.rows
            for start in range(rows.start, rows.stop, step):
                chunk = table[start : min(start + step, rows.stop)]
                yield chunk.to(torch.float32, copy=True)

    def refuse_non_finite(self, where: str) -> None:
        """Refuse NaN and infinite weights, before any work is spent on a model that has them.

        Raises:
            ArtifactError: A tensor holds one.
        """
        for name, stored in self._tensors.items():
            parts = self.rows(name) if len(stored.shape) == 2 else [self.read(name)]
            if not all(torch.isfinite(part.sum(dtype=torch.float64)) for part in parts):
                raise ArtifactError(
                    f"{where}: tensor {name} holds NaN or infinite values in torch.float32; "
                    "use another copy of the model"
                )


def open_weight_stream(located: LocatedModel) -> tuple[LoadedModel, WeightReader] | None:
    """Open a model without its weights; None where transformers has to find them.

    That is a GGUF file, or a directory whose tensors have other names than the model's
    (transformers knows some such), which `load_model` loads as a whole.

    Args:
        located: The model.

    Returns:
        The model on the meta device but for its buffers, and what reads its tensors.

    Raises:
        As `load_model`.
    """
    if located.is_gguf:
        return None
    directory = located.path
    files = check_model_directory(directory)
    where = str(directory)
    with quiet_transformers():
        config = call_loader(where, AutoConfig.from_pretrained, directory)
        names = decoder_names(config)
        config.dtype = torch.float32
        model = empty_decoder(config, torch.float32)
        if (directory / "generation_config.json").is_file():
            model.generation_config = call_loader(
                where, GenerationConfig.from_pretrained, directory
            )
    stored = _stored_tensors(files)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    places = own_places(config)
    own_embedding, _ = places.get(names.embedding, (names.embedding, None))
    embedding, head = f"{own_embedding}.weight", f"{names.head}.weight"
    tied = model.get_parameter(head) is model.get_parameter(embedding)
    if embedding not in stored or (tied and head in stored):
        return None
    if any(tensor.dtype not in _FLOATS for tensor in stored.values()):
        return None
    if tied:
        stored[head] = stored[embedding]
    refuse_departures(where, _departures(expected, stored))
    to_our_layout(model)
    reader = WeightReader(_in_our_layout(stored, places))
    reader.refuse_non_finite(where)
    restore_buffers(model, config)
    tokenizer = load_local_tokenizer(directory)
    digests = digest_model(directory, files)
    return LoadedModel(model.eval(), tokenizer, located.name, *digests), reader


def set_weight(model: nn.Module, name: str, weight: Tensor) -> None:
    """Put a tensor in the place of a parameter of any device and number of rows."""
    fqn, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(weight, requires_grad=False)
    model.get_submodule(fqn).register_parameter(leaf, parameter)


def _stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                if not _IGNORED.search(key):
                    view = file.get_slice(key)
                    shape = tuple(view.get_shape())
                    found[key] = StoredTensor(path, key, shape, view.get_dtype())
    return found


def _in_our_layout(
    stored: Mapping[str, StoredTensor], places: Mapping[str, tuple[str, slice]]
) -> dict[str, StoredTensor]:
    """Put the parts of joined tensors in the place of those."""
    tensors = dict(stored)
    for fqn, (own, rows) in places.items():
        for leaf in ("weight", "bias"):
            if joined := stored.get(f"{own}.{leaf}"):
                tensors.pop(f"{own}.{leaf}", None)
                shape = (rows.stop - rows.start, *joined.shape[1:])
                tensors[f"{fqn}.{leaf}"] = replace(joined, shape=shape, first_row=rows.start)
    return tensors


def _departures(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]
) -> dict[str, Any]:
    """Return what `refuse_departures` takes: how the files differ from the model."""
    return {
        "missing_keys": expected.keys() - stored.keys(),
        "unexpected_keys": stored.keys() - expected.keys(),
        "mismatched_keys": [
            (name, stored[name].shape, shape)
            for name, shape in expected.items()
            if name in stored and stored[name].shape != shape
        ],
    }
