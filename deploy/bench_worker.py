"""What a process that holds one model says, when it is asked to measure it.

    python -m deploy.onnx_worker|deploy.torch_worker DIRECTORY SETTINGS

SETTINGS is `BenchSettings` as JSON. One line of JSON goes out for the loaded model, then one for
each line that comes in: a run's seconds and the peak memory so far. The end of the input ends it.
A process of its own, so that memory and loading are the model's alone; `llama_worker` speaks the
same for llama.cpp.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from deploy.bench_report import BenchRun, BenchSettings
from deploy.errors import RoloraError
from deploy.memory import peak_memory_bytes

Opening: TypeAlias = Callable[[Path, BenchSettings], AbstractContextManager[Callable[[], BenchRun]]]
"""Loads a directory on entry and gives what runs it once."""


def serve(opened: Opening, directory: Path, settings: BenchSettings) -> None:
    """Load a directory and answer requests on stdin until there are no more.

    Raises:
        ArtifactError: It cannot be loaded.
        ConfigError: The tokens do not fit the model's context.
    """
    started = time.perf_counter()
    with opened(directory, settings) as run_once:
        _answer(sys.stdout, {"load_s": time.perf_counter() - started})
        for _ in sys.stdin:
            seconds = {f"{phase}_s": s for phase, s in run_once().items()}
            _answer(sys.stdout, seconds | {"peak_rss_bytes": peak_memory_bytes()})


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def main(opened: Opening) -> None:
    """Serve what the command line names."""
    try:
        serve(opened, Path(sys.argv[1]), BenchSettings(**json.loads(sys.argv[2])))
    except RoloraError as error:
        sys.exit(str(error))
