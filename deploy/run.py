"""Generation from an exported directory with stock onnxruntime-genai.

This module needs onnxruntime-genai only, no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnxruntime_genai as og

from deploy.adapter_files import find_adapter
from deploy.artifact import ArtifactKind, read_manifest
from deploy.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens: expected at least 1, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature < math.inf or not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                f"--temperature must not be negative and --top-p must lie in (0, 1]; got "
                f"{self.temperature}, {self.top_p}"
            )


class TextGenerator:
    """Holds a loaded model and its tokenizer.

    Args:
        directory: What `rolora export` wrote.
        adapter: Name of the adapter that is active; None is the base alone.

    Raises:
        ConfigError: No such directory, or the export has no such adapter.
        StageOrderError: It is no export.
        ArtifactError: onnxruntime-genai cannot load it.
    """

    def __init__(self, directory: Path, adapter: str | None = None) -> None:
        read_manifest(directory, ArtifactKind.ONNX)
        self.directory = directory
        self._adapter = adapter
        file = None if adapter is None else find_adapter(directory, adapter)
        try:
            self._model = og.Model(str(directory))
            self._tokenizer = og.Tokenizer(self._model)
            self._adapters = og.Adapters(self._model)
            if file is not None:
                self._adapters.load(str(file), adapter)
            config = json.loads((directory / "genai_config.json").read_text(encoding="utf-8"))
            self._context_length = int(config["model"]["context_length"])
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise ArtifactError(
                f"{directory}: onnxruntime-genai cannot load it: {error}"
            ) from error

    def chat_prompt(self, messages: list[dict[str, str]]) -> str:
        """Render messages (`role`, `content`) with the model's chat template.

        Raises:
            ConfigError: The model has no usable chat template.
        """
        try:
            prompt: str = self._tokenizer.apply_chat_template(
                json.dumps(messages), add_generation_prompt=True
            )
        except RuntimeError as error:
            raise ConfigError(
                f"{self.directory}: the chat template cannot be used ({error}); leave --chat out "
                f"for plain completion"
            ) from error
        return prompt

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt."""
        return [int(token) for token in self._tokenizer.encode(prompt)]

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Generate and yield the text piece by piece.

        Raises:
            ConfigError: The prompt is empty or leaves no room in the context.
        """
        decoder = self._tokenizer.create_stream()
        for token in self.generate(self.encode(prompt), sampling):
            yield decoder.decode(token)

    def generate(self, prompt_ids: list[int], sampling: Sampling) -> Iterator[int]:
        """Generate and yield token ids until the model ends its answer or the limit is reached.

        Raises:
            ConfigError: The prompt is empty or leaves no room in the context.
        """
        if not prompt_ids:
            raise ConfigError("--prompt: expected some text, got none")
        if len(prompt_ids) >= self._context_length:
            raise ConfigError(
                f"the prompt has {len(prompt_ids)} tokens, the model's context "
                f"{self._context_length}"
            )
        params = og.GeneratorParams(self._model)
        limit = min(len(prompt_ids) + sampling.max_new_tokens, self._context_length)
        options: dict[str, float | int | bool] = {
            "max_length": limit,
            "do_sample": sampling.temperature > 0.0,
        }
        if sampling.temperature > 0.0:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            if sampling.seed is not None:
                options["random_seed"] = sampling.seed
        params.set_search_options(**options)
        generator = og.Generator(self._model, params)
        if self._adapter is not None:
            generator.set_active_adapter(self._adapters, self._adapter)
        generator.append_tokens(prompt_ids)
        while not generator.is_done():
            generator.generate_next_token()
            if generator.is_done() and len(generator.get_sequence(0)) < limit:
                return  # the last token ended the answer and is not part of it
            yield int(generator.get_next_tokens()[0])
