"""Speed of an export beside its peers: all measured in turn, round by round, on one machine.

Each model lives in a process of its own, which loads it once and waits between its runs, so that
memory and load time are its own. A round runs every model once, and starts one model further than
the round before; a first round warms up and is not counted. A ratio is the median, over the rounds,
of the ratio within a round: what slows the machine down for a while slows both.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from deploy.bench import read_export
from deploy.bench_peers import PeerSettings, Runtime, Subject, prepare_peers
from deploy.bench_report import BenchReport, BenchRun, BenchSettings, Figure, fix_threads
from deploy.errors import ArtifactError, ConfigError

ROOT = Path(__file__).resolve().parents[1]
"""Where a worker's Python finds this package."""
LLAMA_WORKER = Path(__file__).with_name("llama_worker.py")
WORKERS = {Runtime.ONNX: "deploy.onnx_worker", Runtime.TORCH: "deploy.torch_worker"}
"""Modules that run in this Python."""
LEGEND = (
    "Medians, in brackets least and greatest of the runs. x: how many times as fast as this model "
    "the export is, median of the rounds."
)


@dataclass(frozen=True)
class Ratio:
    """Another model's figure in the export's: above 1 the export is quicker."""

    median: float
    least: float
    greatest: float


@dataclass(frozen=True)
class Comparison:
    """What was measured."""

    ours: str
    settings: BenchSettings
    reports: Mapping[str, BenchReport]
    """By name, the export first."""

    def ratios(self, name: str) -> dict[str, Ratio]:
        """Return how many times faster the export is than a model, in each phase."""
        mine, other = self.reports[self.ours].runs, self.reports[name].runs
        result = {}
        for phase in self.settings.phases:
            found = [b[phase] / a[phase] for a, b in zip(mine, other, strict=True)]
            result[phase] = Ratio(statistics.median(found), min(found), max(found))
        return result

    def columns(self) -> tuple[str, ...]:
        """Return the headings of `rows`."""
        figures = (figure.column for figure in self.settings.figures)
        ratios = (f"{phase} x" for phase in self.settings.phases)
        return ("model", *figures, "load s", "RSS MB", "file MB", *ratios)

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row of texts for each model, under `columns`."""
        return [
            (
                name,
                *(_text(figure, report) for figure in self.settings.figures),
                f"{report.load_s:.2f}",
                f"{report.peak_rss_bytes / 1e6:.0f}",
                f"{report.file_bytes / 1e6:.1f}",
                *(f"{ratio.median:.2f}" for ratio in self.ratios(name).values()),
            )
            for name, report in self.reports.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "ours": self.ours,
            "settings": asdict(self.settings),
            "models": {
                name: {key: value for key, value in report.to_dict().items() if key != "settings"}
                | {
                    "ours_over_this": {
                        phase: asdict(ratio) for phase, ratio in self.ratios(name).items()
                    }
                }
                for name, report in self.reports.items()
            },
        }


def _text(figure: Figure, report: BenchReport) -> str:
    median = figure.text(report.medians[figure.key])
    if figure.amount is None:
        return median
    return f"{median} ({'-'.join(map(figure.text, report.spread[figure.key]))})"


def bench_against(
    export: Path,
    settings: BenchSettings,
    peers: PeerSettings,
    progress: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """Measure an export and its peers in turn.

    Args:
        export: What `rolora export` wrote.
        settings: What to measure; threads that are not given are the processors this process may
            use, for every model.
        peers: What to measure beside it.
        progress: Called with a line for each step.

    Raises:
        ConfigError: A peer is not there, cannot be built or is not for the export's kind of model,
            or the settings are not.
        StageOrderError: The directory is no export.
        ArtifactError: A model cannot be loaded or fails.
    """
    read_export(export, settings)
    settings = fix_threads(settings)
    subjects = [Subject("ours", Runtime.ONNX, export), *prepare_peers(export, peers, progress)]
    if peers.llama_python is None and any(s.runtime is Runtime.LLAMA for s in subjects):
        raise ConfigError(
            "--against llama.cpp: name a Python that has llama-cpp-python with --llama-cpp; in an "
            "environment of its own: python -m venv llama && llama/bin/pip install llama-cpp-python"
        )
    return measure_in_turn(subjects, settings, peers.llama_python, progress)


def measure_in_turn(
    subjects: Sequence[Subject],
    settings: BenchSettings,
    llama_python: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """Measure models in turn; ratios are those of the first one.

    Raises:
        ArtifactError: A model cannot be loaded or fails.
    """
    with ExitStack() as stack:
        workers = []
        for subject in subjects:
            progress(f"loading {subject.name}")
            workers.append(stack.enter_context(Worker(subject, settings, llama_python)))
        runs: dict[str, list[BenchRun]] = {subject.name: [] for subject in subjects}
        for done in range(settings.runs + 1):
            first = done % len(workers)
            for worker in workers[first:] + workers[:first]:
                progress(f"round {done} of {settings.runs}: {worker.subject.name}")
                run = worker.run()
                if done:
                    runs[worker.subject.name].append(run)
        reports = {
            worker.subject.name: BenchReport(
                model=str(worker.subject.path),
                settings=settings,
                load_s=worker.load_s,
                runs=tuple(runs[worker.subject.name]),
                peak_rss_bytes=worker.peak_rss_bytes,
                file_bytes=worker.subject.model_bytes,
            )
            for worker in workers
        }
    return Comparison(subjects[0].name, settings, reports)


class Worker:
    """A process that holds one model.

    Args:
        subject: The model.
        settings: What a run is.
        llama_python: A Python that has llama-cpp-python, for a model of that runtime.

    Raises:
        ArtifactError: The process cannot be started, or cannot load the model.
    """

    def __init__(
        self, subject: Subject, settings: BenchSettings, llama_python: str | None = None
    ) -> None:
        self.subject = subject
        self.peak_rss_bytes = 0
        self._phases = settings.phases
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        }
        if subject.runtime is Runtime.LLAMA:
            command, environment = [str(llama_python), str(LLAMA_WORKER)], dict(os.environ)
        else:
            command = [sys.executable, "-m", WORKERS[subject.runtime]]
        self._errors: TextIO = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [*command, str(subject.path), json.dumps(asdict(settings))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                text=True,
            )
        except OSError as error:
            self._errors.close()
            raise ArtifactError(f"{subject.name}: cannot start {command[0]}: {error}") from error
        try:
            self.load_s = float(self._answer()["load_s"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def run(self) -> BenchRun:
        """Have the model run once.

        Raises:
            ArtifactError: It fails.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        except OSError:
            self._process.wait()  # it has ended, and its message says why
        answer = self._answer()
        self.peak_rss_bytes = int(answer["peak_rss_bytes"])
        return {phase: float(answer[f"{phase}_s"]) for phase in self._phases}

    def _answer(self) -> dict[str, Any]:
        """Read a line of the process."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["no message"]
            raise ArtifactError(
                f"{self.subject.name} ({self.subject.path}): its process gave no figures: "
                f"{said[-1]}"
            ) from None
        return answer
