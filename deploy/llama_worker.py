"""A process that holds one GGUF file in llama.cpp and measures it when asked.

    PYTHON deploy/llama_worker.py FILE SETTINGS

PYTHON needs llama-cpp-python and nothing of this package, which does not depend on it. What comes
in and goes out is what `bench_worker` says. llama.cpp keeps its own defaults but for the threads
and the room for the tokens: a float16 KV cache, and prompts in pieces of 512 tokens.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any


class LlamaDecoder:
    """Runs one GGUF file through the C interface, as a batch of sequences of one length.

    Args:
        path: The file.
        settings: `BenchSettings` as a mapping.

    Raises:
        SystemExit: llama.cpp cannot load it.
    """

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        import llama_cpp

        self._api = llama_cpp
        self.prompt, self.new = settings["prompt_tokens"], settings["new_tokens"]
        self.sequences = settings["batch"]
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not model:
            sys.exit(f"{path}: llama.cpp cannot load it")
        room = llama_cpp.llama_context_default_params()
        room.n_seq_max = self.sequences
        room.n_ctx = self.sequences * (self.prompt + self.new)
        room.n_batch = self.sequences * self.prompt
        if settings["threads"] is not None:
            room.n_threads = room.n_threads_batch = settings["threads"]
        self._context = llama_cpp.llama_init_from_model(model, room)
        if not self._context:
            sys.exit(f"{path}: llama.cpp cannot make room for {room.n_ctx} tokens")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(room.n_batch, 0, 1)

    def run(self) -> dict[str, float]:
        """Time one prompt and its continuation, from an empty cache."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        self._fill(0, self.prompt)  # thousands of tokens, which Python is slow to write
        started = time.perf_counter()
        self._decode()
        prefilled = time.perf_counter()
        for position in range(self.prompt, self.prompt + self.new):
            self._fill(position, 1)
            self._decode()
        ended = time.perf_counter()
        return {"prefill_s": prefilled - started, "decode_s": ended - prefilled}

    def _fill(self, start: int, count: int) -> None:
        """Write the next tokens of each sequence; the logits of each last one are asked for."""
        batch, index = self._batch, 0
        for sequence in range(self.sequences):
            for position in range(start, start + count):
                batch.token[index] = (7919 * (position + 1) + 31 * sequence) % self._vocabulary
                batch.pos[index] = position
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = position == start + count - 1
                index += 1
        batch.n_tokens = index

    def _decode(self) -> None:
        """Run the tokens that were written."""
        code = self._api.llama_decode(self._context, self._batch)
        if code:
            sys.exit(f"llama.cpp failed on {self._batch.n_tokens} tokens with code {code}")
        self._api.llama_synchronize(self._context)


def peak_bytes() -> int:
    """Return the largest resident set of this process; see `deploy.memory`."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:  # noqa: PTH123
            return next(int(line.split()[1]) * 1024 for line in status if line[:6] == "VmHWM:")
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Load the file and answer requests until there are no more."""
    sys.path.pop(0)  # the directory of this file, whose modules are not for others
    started = time.perf_counter()
    try:
        decoder = LlamaDecoder(sys.argv[1], json.loads(sys.argv[2]))
    except ImportError as error:
        sys.exit(f"{sys.executable} has no llama-cpp-python ({error})")
    print(json.dumps({"load_s": time.perf_counter() - started}), flush=True)  # noqa: T201
    for _ in sys.stdin:
        answer = decoder.run() | {"peak_rss_bytes": peak_bytes()}
        print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
