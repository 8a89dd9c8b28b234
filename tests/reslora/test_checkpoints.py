from __future__ import annotations

import logging
from pathlib import Path

import pytest

from reslora.checkpoints import (
    KEPT,
    MARKER_FILE,
    had_finished,
    mark_complete,
    newest_complete,
    prune,
    refuse_existing,
    step_of,
)

RUN = {"seed": 1, "data": "abc"}


def checkpoint(directory: Path, step: int, *, complete: bool = True) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir()
    (path / "weights").write_bytes(b"12345678")
    if complete:
        mark_complete(path, RUN)
    return path


def test_every_file_is_on_the_disk_before_a_checkpoint_is_complete_and_then_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path, 2, complete=False)
    (path / "state").write_text("1")
    synced: list[str] = []

    def record(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        assert target.is_dir() == (path / MARKER_FILE).exists()
        synced.append(target.name)

    monkeypatch.setattr("os.fsync", record)
    mark_complete(path, RUN)
    assert synced == ["state", "weights", f"{MARKER_FILE}.partial", path.name, tmp_path.name]
    assert newest_complete(tmp_path, RUN) == path


def test_newest_is_by_step_not_by_name(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-old").mkdir()
    assert newest_complete(tmp_path, RUN) == newest
    assert step_of(newest) == 10


def test_nothing_there(tmp_path: Path) -> None:
    assert newest_complete(tmp_path / "missing", RUN) is None
    refuse_existing(tmp_path / "missing")


@pytest.mark.parametrize("damage", ["unmarked", "short", "missing", "marker"])
def test_incomplete_checkpoints_are_skipped(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older = checkpoint(tmp_path, 2)
    newer = checkpoint(tmp_path, 4, complete=damage != "unmarked")
    if damage == "short":
        (newer / "weights").write_bytes(b"1234")
    elif damage == "missing":
        (newer / "weights").unlink()
    elif damage == "marker":
        (newer / MARKER_FILE).write_text("[1")
    with caplog.at_level(logging.WARNING):
        assert newest_complete(tmp_path, RUN) == older
    assert "checkpoint-4 is incomplete" in caplog.text


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match=r"otherwise: seed: 1 then, 2 now; resume"):
        newest_complete(tmp_path, {**RUN, "seed": 2})
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run \(checkpoint-2\)"):
        refuse_existing(tmp_path)


def test_pruning_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        checkpoint(tmp_path, step, complete=step != 6)
    prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    assert KEPT == 2


def test_the_best_state_is_kept_as_long_as_it_is_named(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path, step) for step in (2, 4, 6, 8)]
    for path, best in zip(paths, (2, 4, 4, 8), strict=True):
        mark_complete(path, RUN, best_step=best)
    prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    ]


def test_a_checkpoint_whose_best_state_is_gone_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [checkpoint(tmp_path, step) for step in (2, 4, 6)]
    for path, best in zip(paths, (2, 4, 4), strict=True):
        mark_complete(path, RUN, best_step=best, finished=best == 4)
    (paths[1] / "weights").write_bytes(b"1")
    assert newest_complete(tmp_path, RUN) == paths[0]
    assert "checkpoint-6: its best state, checkpoint-4, is gone: skipped" in caplog.text
    assert (had_finished(paths[2]), had_finished(paths[0])) == (True, False)
