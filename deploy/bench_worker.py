"""A process that holds one exported directory and measures it when asked.

    python -m deploy.bench_worker DIRECTORY SETTINGS

SETTINGS is `BenchSettings` as JSON. One line of JSON goes out for the loaded model, then one for
each line that comes in: a run's seconds and the peak memory so far. The end of the input ends it.
A process of its own, so that memory and loading are the model's alone; `llama_worker` speaks the
same for llama.cpp.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from deploy.bench import BenchSettings, measure_run
from deploy.errors import RoloraError
from deploy.memory import peak_memory_bytes
from deploy.session import OnnxDecoder


def serve(directory: Path, settings: BenchSettings, requests: TextIO, answers: TextIO) -> None:
    """Load a directory and answer requests until there are no more.

    Args:
        directory: What `rolora export` or onnxruntime-genai's model builder wrote.
        settings: What a run is.
        requests: A line a run.
        answers: Receives a line of JSON for the loaded model and for each run.

    Raises:
        ArtifactError: ONNX Runtime cannot load it.
        ConfigError: The tokens do not fit the model's context.
    """
    started = time.perf_counter()
    with OnnxDecoder(directory, threads=settings.threads) as decoder:
        _answer(answers, {"load_s": time.perf_counter() - started})
        for _ in requests:
            run = measure_run(decoder, settings)
            _answer(answers, asdict(run) | {"peak_rss_bytes": peak_memory_bytes()})


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


if __name__ == "__main__":
    try:
        serve(Path(sys.argv[1]), BenchSettings(**json.loads(sys.argv[2])), sys.stdin, sys.stdout)
    except RoloraError as error:
        sys.exit(str(error))
