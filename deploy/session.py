"""An exported decoder in plain ONNX Runtime: whole windows, or step by step over a cache.

Past and present of a layer are one buffer, bound as input and as output, as ONNX Runtime GenAI does
it: the attention operator then appends in place instead of copying the cache at every token.

This module needs numpy and onnxruntime only.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

import numpy as np
import onnxruntime as ort

from deploy.errors import ArtifactError, ConfigError

GRAPH_NAME = "model.onnx"
GENAI_CONFIG_NAME = "genai_config.json"


class OnnxDecoder:
    """Runs one exported directory.

    Args:
        directory: Holds `model.onnx`, its data, and `genai_config.json`.
        threads: Threads per operator; None leaves the choice to ONNX Runtime.

    Raises:
        ArtifactError: A file is missing or ONNX Runtime cannot load the graph.
    """

    def __init__(self, directory: Path, *, threads: int | None = None) -> None:
        try:
            self._genai = json.loads((directory / GENAI_CONFIG_NAME).read_text(encoding="utf-8"))[
                "model"
            ]
            decoder = self._genai["decoder"]
            self._layers = int(decoder["num_hidden_layers"])
            self._kv_heads = int(decoder["num_key_value_heads"])
            self._head_size = int(decoder["head_size"])
            self.context_length = int(self._genai["context_length"])
            self.vocab_size = int(self._genai["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{directory / GENAI_CONFIG_NAME}: not readable as a decoder's configuration "
                f"({error!r}); export again"
            ) from error
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(
                str(directory / GRAPH_NAME), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ArtifactError(
                f"{directory / GRAPH_NAME}: ONNX Runtime cannot load it: {error}"
            ) from error
        self._cache: dict[str, ort.OrtValue] = {}
        self._capacity = self._batch = self._length = 0

    def __enter__(self) -> OnnxDecoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the cache."""
        self._cache.clear()

    def start(self, capacity: int, batch: int = 1) -> None:
        """Empty the cache and make room for a number of tokens.

        Args:
            capacity: Greatest number of tokens, prompt and new ones together.
            batch: Number of sequences.

        Raises:
            ConfigError: The capacity exceeds the context length of the model.
        """
        if capacity > self.context_length:
            raise ConfigError(
                f"{capacity} tokens do not fit the context length of {self.context_length}; use a "
                f"shorter text"
            )
        if (capacity, batch) != (self._capacity, self._batch):
            shape = (batch, self._kv_heads, capacity, self._head_size)
            self._cache = {
                f"{layer}.{part}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                for layer in range(self._layers)
                for part in ("key", "value")
            }
            self._capacity, self._batch = capacity, batch
        self._length = 0

    def append(self, ids: np.ndarray) -> np.ndarray:
        """Run the next tokens of each sequence.

        Args:
            ids: int64 [B, T], B as given to `start`.

        Returns:
            Logits, float32 [B, T, vocab_size].

        Raises:
            ConfigError: The cache has no room for them, or several sequences would go on by more
                than a token each, which ONNX Runtime cannot do.
        """
        batch, count = ids.shape
        if batch != self._batch or self._length + count > self._capacity:
            raise ConfigError(
                f"cache: room for {self._batch} sequences of {self._capacity} tokens, "
                f"asked for {batch} of {self._length + count}"
            )
        if self._length and batch > 1 and count > 1:
            raise ConfigError(
                f"{batch} sequences can go on by one token at a time, asked for {count}"
            )
        self._length += count
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, dtype=np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((batch, self._length), np.int64))
        for name, buffer in self._cache.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        logits: np.ndarray = binding.get_outputs()[-1].numpy()
        return logits

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Run one sequence from the start.

        Args:
            ids: int64 [T].

        Returns:
            Logits, float32 [T, vocab_size].
        """
        self.start(capacity=len(ids))
        result: np.ndarray = self.append(ids[None, :])[0]
        return result
