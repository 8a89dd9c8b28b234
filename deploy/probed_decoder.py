"""An exported decoder that also gives out what flows between its layers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort

from deploy.graph_probes import Probes, find_decoder_probes, open_probed
from deploy.session import OnnxDecoder, feed
from rolora.decoder import DecoderNames


class ProbedDecoder(OnnxDecoder):
    """Runs an exported directory and keeps what the probes of its graphs give out.

    Args:
        directory: What `rolora export` wrote.
        names: Parts of its decoder.

    Raises:
        ArtifactError: A file is missing, ONNX Runtime cannot load a graph, or it lacks a node.
    """

    def __init__(self, directory: Path, names: DecoderNames) -> None:
        self._names = names
        self.probes: dict[int, Probes] = {}
        """By the identity of a session."""
        self.found: list[tuple[Probes, dict[str, np.ndarray]]] = []
        """For each run its graph's probes, and the values, float32 or uint8 [1, T, ...]."""
        super().__init__(directory)

    def _open(self, name: str) -> ort.InferenceSession:
        """Load one graph with more outputs."""
        session, probes = open_probed(
            self._directory / name, partial(find_decoder_probes, names=self._names)
        )
        self.probes[id(session)] = probes
        return session

    def _run(
        self, session: ort.InferenceSession, ids: np.ndarray, mask: np.ndarray, output: str
    ) -> np.ndarray:
        """Run a graph as its base does, and keep what it gives out besides."""
        probes = self.probes[id(session)]
        wanted = probes.values()
        binding = self._bind(session)
        feed(binding, ids, mask)
        for name in [*wanted, *([] if output in wanted else [output])]:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        values = binding.get_outputs()[len(self._cache) :]
        found = {
            name: value.numpy() for name, value in zip([*wanted, output], values, strict=False)
        }
        self.found.append((probes, found))
        result: np.ndarray = found[output]
        return result
