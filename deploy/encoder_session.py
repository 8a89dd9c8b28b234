"""An exported encoder in plain ONNX Runtime: a batch of texts at a time.

This module needs numpy and onnxruntime only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deploy.errors import ConfigError
from deploy.session import GRAPH_NAME, PORTABLE_OPTIONS, open_session

LOGITS_NAME = "logits"
"""Output of a classifier, float32 [B, labels]. The other, `deploy.session.HIDDEN_NAME`, is float32
[B, S, D] and means nothing at padding."""


class OnnxEncoder:
    """Runs one exported directory.

    Args:
        directory: Holds the graph and its data.
        threads: Threads per operator; None leaves the choice to ONNX Runtime.

    Raises:
        ArtifactError: A file is missing or ONNX Runtime cannot load the graph.
    """

    def __init__(self, directory: Path, *, threads: int | None = None) -> None:
        path = directory / GRAPH_NAME
        entries = PORTABLE_OPTIONS if _is_portable(path) else {}
        self._session = open_session(path, threads=threads, entries=entries)
        self._inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(value.name for value in self._session.get_outputs())
        """`LOGITS_NAME` of a classifier, and `deploy.session.HIDDEN_NAME`."""

    def run(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a batch of texts.

        Args:
            batch: `input_ids`, int64 [B, S]; and, of that shape too, `attention_mask` (default: no
                padding) and `token_type_ids` (default 0, and left out where the model has none).

        Returns:
            An array for each output.

        Raises:
            ConfigError: ONNX Runtime refuses the batch: texts are too long, or ids are none of the
                vocabulary's.
        """
        ids = np.ascontiguousarray(batch["input_ids"], dtype=np.int64)
        defaults = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        given = {"input_ids": ids} | {
            name: np.ascontiguousarray(batch.get(name, default), dtype=np.int64)
            for name, default in defaults.items()
        }
        try:
            found = self._session.run(
                list(self.outputs), {name: given[name] for name in self._inputs}
            )
        except Exception as error:  # onnxruntime's own classes share no other base
            raise ConfigError(
                f"a batch of shape {list(ids.shape)}: ONNX Runtime refuses it ({error}); its texts "
                f"may be longer than the model reads, or its ids not those of the model's tokenizer"
            ) from error
        return dict(zip(self.outputs, found, strict=True))


def _is_portable(path: Path) -> bool:
    """Return whether a graph has standard operators alone: it would name their domain else."""
    return path.is_file() and b"com.microsoft" not in path.read_bytes()
