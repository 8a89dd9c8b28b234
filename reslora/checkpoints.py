"""Training checkpoints that can be trusted after a kill.

The Trainer writes a checkpoint file by file into its final directory, so a run that is killed while
saving leaves one that looks finished. Here a checkpoint counts only once it holds `complete.json`,
which is written last, by rename, after every file reached the disk, and which lists the files'
sizes and the run's fingerprint. Anything else is skipped at resume.

A run that keeps its best state needs that checkpoint until it ends, and so does whoever resumes it:
it is kept as long as a checkpoint that names it, and one whose best is gone is skipped too.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MARKER_FILE = "complete.json"
PREFIX = "checkpoint-"
KEPT = 2
"""Complete checkpoints that stay: the newest, and one to fall back on."""


def mark_complete(
    checkpoint: Path,
    fingerprint: Mapping[str, Any],
    *,
    best_step: int | None = None,
    finished: bool = False,
) -> None:
    """Flush a checkpoint's files to disk and declare it complete.

    Args:
        checkpoint: Directory with every file written.
        fingerprint: JSON values a resumed run must agree on.
        best_step: Step of the run's best checkpoint so far, where the run looks for one.
        finished: The run ends here.
    """
    sizes: dict[str, int] = {}
    for path in sorted(checkpoint.iterdir()):
        if path.name != MARKER_FILE and path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
    marker = {
        "fingerprint": dict(fingerprint),
        "files": sizes,
        "best_step": best_step,
        "finished": finished,
    }
    text = json.dumps(marker, indent=2, sort_keys=True)
    partial = checkpoint / f"{MARKER_FILE}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(checkpoint / MARKER_FILE)
    for directory in (checkpoint, checkpoint.parent):  # the names too, before older ones may go
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def newest_complete(directory: Path, fingerprint: Mapping[str, Any]) -> Path | None:
    """Return the newest complete checkpoint, or None where there is none.

    Args:
        directory: Where the run keeps its checkpoints; may be missing.
        fingerprint: What this run would write.

    Raises:
        ValueError: The newest complete checkpoint belongs to a run with other settings or data; the
            message names what differs.
    """
    for checkpoint in _by_step(directory):
        marker = _read_marker(checkpoint)
        if marker is None:
            logger.warning("%s is incomplete (a killed run): skipped", checkpoint)
            continue
        best = best_of(checkpoint)
        if best is not None and _read_marker(best) is None:
            logger.warning("%s: its best state, %s, is gone: skipped", checkpoint, best.name)
            continue
        saved = marker["fingerprint"]
        ours = json.loads(json.dumps(dict(fingerprint)))
        differing = [
            f"{key}: {saved.get(key)!r} then, {ours.get(key)!r} now"
            for key in sorted(saved.keys() | ours.keys())
            if saved.get(key) != ours.get(key)
        ]
        if differing:
            raise ValueError(
                f"{checkpoint}: cannot resume, the run was started otherwise: "
                f"{'; '.join(differing)}; resume with the same settings, or start anew elsewhere"
            )
        return checkpoint
    return None


def refuse_existing(directory: Path) -> None:
    """Refuse to start a new run over the checkpoints of another.

    Raises:
        ValueError: The directory holds checkpoints.
    """
    if existing := _by_step(directory):
        raise ValueError(
            f"{directory}: holds checkpoints of an earlier run ({existing[0].name}); resume that "
            "run, delete them, or choose another directory"
        )


def prune(directory: Path) -> None:
    """Delete all checkpoints but the newest complete ones and the best ones these name."""
    complete = [path for path in _by_step(directory) if _read_marker(path) is not None]
    keep: set[Path | None] = {*complete[:KEPT], *map(best_of, complete[:KEPT])}
    for checkpoint in _by_step(directory):
        if checkpoint not in keep:
            shutil.rmtree(checkpoint, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step a checkpoint was taken at."""
    return int(checkpoint.name.removeprefix(PREFIX))


def best_of(checkpoint: Path) -> Path | None:
    """Return the checkpoint that was the run's best when this one was taken; None without one."""
    step = (_read_marker(checkpoint) or {}).get("best_step")
    return None if step is None else checkpoint.with_name(f"{PREFIX}{step}")


def had_finished(checkpoint: Path) -> bool:
    """Tell whether the run was over when it took this checkpoint, by its steps or stopped early."""
    return bool((_read_marker(checkpoint) or {}).get("finished", False))


def _by_step(directory: Path) -> list[Path]:
    """Return all checkpoint directories, newest first."""
    if not directory.is_dir():
        return []
    found = [
        path
        for path in directory.glob(f"{PREFIX}*")
        if path.is_dir() and path.name.removeprefix(PREFIX).isdecimal()
    ]
    return sorted(found, key=step_of, reverse=True)


def _read_marker(checkpoint: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((checkpoint / MARKER_FILE).read_text(encoding="utf-8"))
        sizes: dict[str, int] = marker["files"]
        whole = all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
        return dict(marker) if whole and isinstance(marker["fingerprint"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
