"""An exported decoder in plain ONNX Runtime: whole windows, or step by step over a cache.

Where the directory has a graph for prompts and one for single tokens, each runs on what it is for,
and the first also on the next tokens of many sequences where the cache is in float; both read and
append to one cache. The head over every position of a prompt is loaded when it is first asked for.

Past and present of a layer are one buffer, bound as input and as output, as ONNX Runtime GenAI does
it: the attention operator then appends in place instead of copying the cache at every token. A
portable graph appends by Concat; there every run returns a longer cache, and padding stays in it.

This module needs numpy and onnxruntime only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnxruntime as ort

from deploy.adapter_files import find_adapter, read_adapter_file
from deploy.errors import ArtifactError, ConfigError
from deploy.known_tokens import require_known_tokens
from deploy.lent_arrays import LentArrays
from deploy.memory import release_free_memory

GRAPH_NAME = "model.onnx"
PROMPT_NAME = "prompt.onnx"
TOKEN_NAME = "token.onnx"
HEAD_NAME = "head.onnx"
HIDDEN_NAME = "last_hidden_state"
"""Further output of the prompt graph, and input of the head: the final norm, every position."""
GENAI_CONFIG_NAME = "genai_config.json"
CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
PORTABLE_OPTIONS = {
    "session.qdq_matmulnbits_accuracy_level": "1",
    "session.x64quantprecision": "1",
}
"""What ONNX Runtime needs to compute a portable graph as it stands. Where it makes a MatMulNBits of
DequantizeLinear and MatMul, its default level 4 would round inputs; and x64 without VNNI would
multiply unsigned by signed bytes, which saturates."""
CACHE_DTYPES = {"tensor(int8)": np.int8, "tensor(float16)": np.float16}
"""Of a cache that is not float32."""
SEQUENCES_FOR_PROMPT_GRAPH = 4
"""From so many on, their next tokens run faster on the graph for prompts: integer products gain on
MatMulNBits with every row. SmolLM2-135M at W4A8, 2 threads: 0.80 of the token graph's speed with
one sequence, 0.96 with 3, 1.06 with 4, 1.33 with 16. Not over a cache of 8 bits, all of which the
graph for prompts makes float32: there it has 0.58 of the speed with 16."""


class OnnxDecoder:
    """Runs one exported directory.

    Args:
        directory: Holds the graph or graphs, their data, and `genai_config.json`.
        threads: Threads per operator; None leaves the choice to ONNX Runtime.
        profiles: Directory that receives ONNX Runtime's record of every operator; see
            `end_profiling`.
        provider: Execution provider; None is the one that the export addresses.
        adapter: Name of the adapter that is active; None is the base alone.

    Raises:
        ArtifactError: A file is missing or ONNX Runtime cannot load the graph.
        ConfigError: The installed ONNX Runtime does not have the provider, or the export not the
            adapter.
    """

    def __init__(
        self,
        directory: Path,
        *,
        threads: int | None = None,
        profiles: Path | None = None,
        provider: str | None = None,
        adapter: str | None = None,
    ) -> None:
        try:
            described = json.loads((directory / GENAI_CONFIG_NAME).read_text(encoding="utf-8"))
            model = described["model"]
            decoder = model["decoder"]
            phased = "pipeline" in decoder
            self._chunk = int(described["search"].get("chunk_size") or 0)
            self._layers = int(decoder["num_hidden_layers"])
            self._kv_heads = int(decoder["num_key_value_heads"])
            self._head_size = int(decoder["head_size"])
            self.context_length = int(model["context_length"])
            self.vocab_size = int(model["vocab_size"])
            self._shares_buffer = bool(described["search"].get("past_present_share_buffer", True))
            listed = decoder["session_options"]["provider_options"]
            on_gpu = any("cuda" in options for options in listed)
            ends = model["eos_token_id"]
            self.end_ids = frozenset(map(int, ends if isinstance(ends, list) else [ends]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{directory / GENAI_CONFIG_NAME}: not readable as a decoder's configuration "
                f"({error!r}); export again"
            ) from error
        self._directory, self._threads, self._profiles = directory, threads, profiles
        self._provider = provider or (CUDA_PROVIDER if on_gpu else CPU_PROVIDER)
        if self._provider not in ort.get_available_providers():
            raise ConfigError(
                f"{directory} runs on {self._provider}, which this ONNX Runtime does not have (it "
                f"has {', '.join(ort.get_available_providers())}); install onnxruntime-gpu on a "
                f"machine with an NVIDIA GPU, or export with --target cpu"
            )
        # ONNX Runtime ignores RunOptions.add_active_adapter where inputs are bound.
        self._adapter: dict[str, ort.OrtValue] = (
            {} if adapter is None else read_adapter_file(find_adapter(directory, adapter))
        )
        self._prompt_name = PROMPT_NAME if phased else GRAPH_NAME
        self._prompt = self._open(self._prompt_name)
        self._token = self._open(TOKEN_NAME) if phased else self._prompt
        self._last_logits = HIDDEN_NAME in (node.name for node in self._prompt.get_outputs())
        self._head: ort.InferenceSession | None = None
        types = {value.name: value.type for value in self._prompt.get_inputs()}
        self._cache_dtype = CACHE_DTYPES.get(types.get("past_key_values.0.key", ""), np.float32)
        self._cache: dict[str, ort.OrtValue] = {}
        self._logits = LentArrays()
        self._bindings: dict[tuple[bool, str], ort.IOBinding] = {}
        """By graph (the prompt's or not) and output. Binding anew costs 3 % of SmolLM2's token."""
        self._mask = np.zeros((0, 0), bool)
        self._capacity = self._batch = 0
        self._lengths = np.zeros(0, np.int64)

    def _open(self, name: str) -> ort.InferenceSession:
        """Load one graph of the directory."""
        return open_session(
            self._directory / name,
            threads=self._threads,
            profile=None if self._profiles is None else self._profiles / name,
            provider=self._provider,
            entries={} if self._shares_buffer else PORTABLE_OPTIONS,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def end_profiling(self) -> tuple[Path, Path]:
        """Finish the records: of the prompt graph and of the token graph, one file if they are one.

        Returns:
            Files of JSON, a list of events in the format of Chrome's trace viewer.
        """
        prompt = Path(self._prompt.end_profiling())
        if self._single is self._prompt:
            return prompt, prompt
        return prompt, Path(self._single.end_profiling())

    @property
    def _single(self) -> ort.InferenceSession:
        """The graph that takes the next token of each of the sequences."""
        few = self._batch < SEQUENCES_FOR_PROMPT_GRAPH or self._cache_dtype == np.int8
        return self._token if few else self._prompt

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that the keys and values of one token take, over all layers."""
        size = np.dtype(self._cache_dtype).itemsize
        return 2 * self._layers * self._kv_heads * self._head_size * size

    @property
    def graph_files(self) -> tuple[Path, Path]:
        """The graph that takes prompts and the one that takes single tokens."""
        token = self._prompt_name if self._single is self._prompt else TOKEN_NAME
        return self._directory / self._prompt_name, self._directory / token

    def close(self) -> None:
        """Release the cache, and the memory of logits that nobody holds."""
        self._bindings.clear()
        self._cache.clear()
        self._logits = LentArrays()

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
        is_ready = self._cache and (capacity, batch) == (self._capacity, self._batch)
        if not is_ready or not self._shares_buffer:
            room = capacity if self._shares_buffer else 0
            shape = (batch, self._kv_heads, room, self._head_size)
            device = "cuda" if self._provider == CUDA_PROVIDER else "cpu"
            self._cache = {
                f"{layer}.{part}": ort.OrtValue.ortvalue_from_numpy(
                    np.zeros(shape, self._cache_dtype), device
                )
                for layer in range(self._layers)
                for part in ("key", "value")
            }
            self._bindings.clear()
            self._capacity, self._batch = capacity, batch
        self._lengths = np.zeros(batch, np.int64)
        self._mask = np.zeros((batch, 0), bool)

    def append(
        self, ids: np.ndarray, lengths: np.ndarray | None = None, *, last_only: bool = False
    ) -> np.ndarray:
        """Run the next tokens of each sequence.

        Args:
            ids: int64 [B, T], B as given to `start`.
            lengths: int64 [B], each from 1 to T, for prompts that are padded on the right: how many
                tokens of each are real. What follows goes on after the last real one.
            last_only: Return the logits after the last real token only, which is all that
                generation needs, and quicker where the graph computes no others.

        Returns:
            Logits, float32 [B, T, vocab_size], or [B, 1, vocab_size] with `last_only`.

        Raises:
            ConfigError: There are none, the cache has no room for them, the model does not know one
                of them, or several sequences would go on by more than a token each, which ONNX
                Runtime cannot do.
        """
        batch, count = ids.shape
        held = int(self._lengths.max(initial=0)) if self._shares_buffer else self._mask.shape[1]
        if batch != self._batch or held + count > self._capacity:
            raise ConfigError(
                f"cache: room for {self._batch} sequences of {self._capacity} tokens, "
                f"asked for {batch} of {held + count}"
            )
        if not count:
            raise ConfigError("no tokens to append: each sequence goes on by one at least")
        require_known_tokens([ids], self.vocab_size)
        if held and lengths is not None:
            raise ConfigError("only prompts, the first tokens after a start, can be padded")
        if held and batch > 1 and count > 1:
            raise ConfigError(
                f"{batch} sequences can go on by one token at a time, asked for {count}"
            )
        added = np.full(batch, count, np.int64) if lengths is None else lengths
        if batch == 1 and 0 < self._chunk < count == added[0]:
            parts = -(-count // self._chunk)
            ends = [count * part // parts for part in range(parts + 1)]
            found = [
                self.append(ids[:, start:end], last_only=last_only) for start, end in pairwise(ends)
            ]
            return found[-1] if last_only else np.concatenate(found, axis=1)
        self._lengths = self._lengths + added
        if self._shares_buffer:  # what follows a padded prompt takes the padding's place
            mask = np.arange(held + count) < self._lengths[:, None]
        else:
            real = np.arange(count) < added[:, None]
            self._mask = mask = np.concatenate([self._mask, real], axis=1)
        if count == 1:
            return self._run(self._single, ids, mask, "logits")
        if last_only or not self._last_logits:
            logits = self._run(self._prompt, ids, mask, "logits")
            if last_only and logits.shape[1] > 1:  # a graph may compute no others
                logits = np.take_along_axis(logits, (added - 1)[:, None, None], axis=1)
            return logits
        hidden = self._run(self._prompt, ids, mask, HIDDEN_NAME)
        if self._head is None:
            self._head = self._open(HEAD_NAME)
        every: np.ndarray = self._head.run(["logits"], {HIDDEN_NAME: hidden})[0]
        return every

    def _run(
        self, session: ort.InferenceSession, ids: np.ndarray, mask: np.ndarray, output: str
    ) -> np.ndarray:
        """Run a graph over the cache, which `append` has already counted the tokens to."""
        if not self._shares_buffer:
            return self._run_and_grow(session, ids, mask, output)
        key = session is self._prompt, output
        if key not in self._bindings:
            self._bindings[key] = self._bind(session)
        binding = self._bindings[key]
        feed(binding, ids, mask)
        if ids.shape[1] > 1:  # of a prompt a graph may compute the last logits or all
            binding.bind_output(output, "cpu")
            session.run_with_iobinding(binding)
            result: np.ndarray = binding.get_outputs()[-1].numpy()
            return result
        # A list of all outputs, one for each buffer of the cache, costs more than the logits.
        logits = self._logits.room((len(ids), 1, self.vocab_size))
        binding.bind_ortvalue_output(output, logits)
        session.run_with_iobinding(binding)
        return self._logits.lend(logits)

    def _bind(self, session: ort.InferenceSession) -> ort.IOBinding:
        """Bind the cache as input and output, and the active adapter; the rest differs by run."""
        binding = session.io_binding()
        for name, factor in self._adapter.items():
            binding.bind_ortvalue_input(name, factor)
        for name, buffer in self._cache.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        return binding

    def _run_and_grow(
        self, session: ort.InferenceSession, ids: np.ndarray, mask: np.ndarray, output: str
    ) -> np.ndarray:
        """Run a graph that returns a longer cache, and keep that."""
        tokens = {
            "input_ids": np.ascontiguousarray(ids, dtype=np.int64),
            "attention_mask": mask.astype(np.int64),
        }
        given = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tokens.items()}
        given |= {f"past_key_values.{name}": value for name, value in self._cache.items()}
        given |= self._adapter
        names = list(self._cache)
        wanted = [output, *(f"present.{name}" for name in names)]
        found, *presents = session.run_with_ort_values(wanted, given)
        self._cache = dict(zip(names, presents, strict=True))
        result: np.ndarray = found.numpy()
        return result

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


def feed(binding: ort.IOBinding, ids: np.ndarray, mask: np.ndarray) -> None:
    """Bind the inputs of one run: tokens [B, T] and mask [B, past + T] of any integer type."""
    binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, dtype=np.int64))
    binding.bind_cpu_input("attention_mask", mask.astype(np.int64))


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    profile: Path | None = None,
    provider: str = CPU_PROVIDER,
    entries: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Load a graph, and give back what loading alone took.

    ONNX Runtime unpacks, transposes and packs weights one after the other; of SmolLM2's two graphs
    at W4A8 a third of the memory was free, but still the process's.

    Args:
        path: The file, with its data beside it.
        threads: Threads per operator; None leaves the choice to ONNX Runtime.
        profile: Start of the name of the file that records every operator; None records nothing.
        provider: Execution provider.
        entries: Session options by their keys.

    Raises:
        ArtifactError: A file is missing or ONNX Runtime cannot load the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        session = ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:
        raise ArtifactError(f"{path}: ONNX Runtime cannot load it: {error}") from error
    release_free_memory()
    return session
