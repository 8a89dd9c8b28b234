"""What it takes to quantize a model that is larger than the memory it may use, through a kill.

    python benchmarks/scale/make_model.py --shape llama-2-7b --output 7b
    python benchmarks/scale/stream.py --model 7b --kill-after 10 --output out --report 7b.json

Runs the stage in a process of its own, sends it SIGKILL when so many parts are stored, runs it
again and reports the time of each block and the peak memory of both processes: `VmHWM`, which
counts mapped pages of files too, and the largest anonymous share that was seen (pages that cannot
be dropped). With --compare the stage runs once more without a kill, to another output, and tells
whether the files are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from deploy.artifact import library_versions, read_manifest
from deploy.checkpoint_reader import WEIGHTS_NAME
from deploy.checkpoint_settings import CheckpointSettings, choose_recipe
from deploy.merge_rotate_quantize import merge_rotate_quantize
from deploy.part_store import RECORD_NAME, progress_directory
from reslora.merge import MergeMethod


def run_stage(arguments: argparse.Namespace, output: Path) -> None:
    """Run the stage in this process and print its report."""
    settings = CheckpointSettings(
        model=str(arguments.model),
        adapter=None,
        merge=MergeMethod.EXACT,
        rotation=None,
        recipe=choose_recipe(arguments.scheme, weights=arguments.weights),
        calibration=None,
        calibration_windows=arguments.windows,
        calibration_tokens=arguments.tokens,
    )
    print(json.dumps(merge_rotate_quantize(settings, output).to_dict()))


class StageProcess:
    """The stage in a process of its own, watched."""

    def __init__(self, arguments: argparse.Namespace, output: Path) -> None:
        self._output = output
        self._started = time.monotonic()
        self.peak = 0
        """VmHWM, bytes."""
        self.anonymous = 0
        """Largest RssAnon seen, bytes; looked at ten times a second."""
        options = [*sys.argv[1:], "--child", str(output)]
        command = [sys.executable, __file__, *options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def watch(self, kill_after: int | None) -> dict[str, Any] | None:
        """Wait until it ends, or kill it when so many parts are stored; returns its report."""
        while self._process.poll() is None:
            self._look()
            if kill_after is not None and self._stored() >= kill_after:
                self._process.send_signal(signal.SIGKILL)
                self._process.wait()
                return None
            time.sleep(0.1)
        if self._process.returncode:
            raise SystemExit(self._process.returncode)
        assert self._process.stdout is not None
        report: dict[str, Any] = json.loads(self._process.stdout.read())
        return report

    def figures(self) -> dict[str, Any]:
        """Return time and memory."""
        return {
            "seconds": round(time.monotonic() - self._started, 1),
            "peak_rss_gb": round(self.peak / 1e9, 2),
            "peak_anonymous_gb": round(self.anonymous / 1e9, 2),
        }

    def _stored(self) -> int:
        record = progress_directory(self._output) / RECORD_NAME
        return len(json.loads(record.read_text())["parts"]) if record.is_file() else 0

    def _look(self) -> None:
        try:
            text = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        if "VmHWM" in lines:
            self.peak = max(self.peak, int(lines["VmHWM"].split()[0]) * 1024)
            self.anonymous = max(self.anonymous, int(lines["RssAnon"].split()[0]) * 1024)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--scheme", default="W4A8")
    parser.add_argument("--weights", default="rtn")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--kill-after", type=int, help="Parts; None runs through.")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        run_stage(arguments, arguments.child)
        return
    found: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "model_bytes": sum(path.stat().st_size for path in arguments.model.glob("*.safetensors")),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": library_versions(),
    }
    if arguments.kill_after is not None:
        process = StageProcess(arguments, arguments.output)
        if process.watch(arguments.kill_after) is not None:
            raise SystemExit("it finished before it could be killed")
        assert not arguments.output.exists()
        found["killed"] = process.figures()
    process = StageProcess(arguments, arguments.output)
    report = process.watch(None)
    assert report is not None
    found["finished"] = process.figures()
    found["report"] = report
    found["weights_bytes"] = read_manifest(arguments.output).files[WEIGHTS_NAME].bytes
    found["weights_sha256"] = read_manifest(arguments.output).files[WEIGHTS_NAME].sha256
    if arguments.compare:
        other = arguments.output.with_name(f"{arguments.output.name}-uninterrupted")
        process = StageProcess(arguments, other)
        process.watch(None)
        found["uninterrupted"] = process.figures()
        found["uninterrupted"]["weights_sha256"] = read_manifest(other).files[WEIGHTS_NAME].sha256
        found["equal"] = read_manifest(other).digest == read_manifest(arguments.output).digest
        shutil.rmtree(other)
    arguments.report.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
