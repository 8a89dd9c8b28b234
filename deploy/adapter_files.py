"""Adapters beside an exported base: one `.onnx_adapter` file each, fed to the graph by name.

ONNX Runtime's own format: tensors under the names of the graph's optional inputs. It is what
`onnxruntime.LoraAdapter` and `onnxruntime_genai.Adapters` load.

This module needs numpy and onnxruntime only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from deploy.errors import ArtifactError, ConfigError, UnsupportedModelError

SUFFIX = ".onnx_adapter"
FORMAT_LIMIT_BYTES = 2**31 - 1
"""What a flatbuffer, which such a file is, can hold."""


def write_adapter_file(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write tensors in ONNX Runtime's adapter format.

    Args:
        path: Ends in `SUFFIX`.
        arrays: By the names of graph inputs.

    Raises:
        UnsupportedModelError: They are more than the format holds.
    """
    size = sum(array.nbytes for array in arrays.values())
    if size >= FORMAT_LIMIT_BYTES:
        raise UnsupportedModelError(
            f"adapter {path.stem}: its factors take {size:,} bytes, ONNX Runtime's adapter files "
            f"hold less than {FORMAT_LIMIT_BYTES:,}; give it a lower rank with rolora merge --to "
            f"adapter --rank"
        )
    written = ort.AdapterFormat()
    written.set_adapter_version(1)
    written.set_model_version(1)
    written.set_parameters(
        {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in sorted(arrays.items())}
    )
    written.export_adapter(str(path))


def find_adapter(directory: Path, name: str) -> Path:
    """Return the file of one of an export's adapters.

    Raises:
        ConfigError: The export has none of that name; the message names those it has.
    """
    known = {path.stem: path for path in directory.glob(f"*{SUFFIX}")}
    if name not in known:
        has = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise ConfigError(
            f"{directory}: has no adapter {name!r}, {has}; adapters come into an export by rolora "
            f"export --keep-adapter"
        )
    return known[name]


def read_adapter_file(path: Path) -> dict[str, ort.OrtValue]:
    """Read the tensors of an adapter, by the names of graph inputs.

    Returns:
        Views of the file's memory, which lives as long as one of them does.

    Raises:
        ArtifactError: The file is damaged.
    """
    try:
        parameters: dict[str, ort.OrtValue] = ort.AdapterFormat.read_adapter(
            str(path)
        ).get_parameters()
    except Exception as error:
        raise ArtifactError(f"{path}: ONNX Runtime cannot load it: {error}") from error
    return parameters
