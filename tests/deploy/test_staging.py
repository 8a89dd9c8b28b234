"""Real processes, signals and a real full disk: what is left behind is the point."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deploy.errors import ArtifactError, ConfigError
from deploy.staging import require_free_space, require_writable, staged_directory

WRITER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
from pathlib import Path
from deploy.staging import staged_directory
with staged_directory(Path(sys.argv[1])) as directory:
    (directory / "half").write_bytes(b"x" * 1000)
    print("writing", flush=True)
    if sys.argv[2] == "hang":
        time.sleep(60)
print("done", flush=True)
"""
ROOT = Path(__file__).parents[2]


def start_writer(output: Path, what: str = "hang") -> subprocess.Popen[str]:
    """Start a process that is in the middle of writing when this returns."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(output), what],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def finish(process: subprocess.Popen[str]) -> int:
    with process:
        return process.wait(timeout=30)


def test_the_output_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with staged_directory(output) as directory:
        (directory / "file").write_text("1")
        assert not output.exists()
        assert directory.parent == output.parent
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert (output / "file").read_text() == "1"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_leaves_nothing_not_even_new_parents(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def fail_midway() -> None:
        with staged_directory(tmp_path / "a" / "b" / "out") as directory:
            (directory / "file").write_text("1")
            raise error

    with pytest.raises(error):
        fail_midway()
    assert list(tmp_path.iterdir()) == []


def test_files_are_on_the_disk_before_their_name_is_and_that_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, before, after = tmp_path / "out", set[Path](), set[Path]()

    def record(descriptor: int) -> None:
        seen = after if output.exists() else before
        seen.add(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", record)
    with staged_directory(output) as directory:
        (directory / "inner").mkdir()
        (directory / "inner" / "file").write_text("1")
    assert before == {directory, directory / "inner", directory / "inner" / "file"}
    assert after == {tmp_path}


def test_an_existing_output_is_refused_and_untouched(tmp_path: Path) -> None:
    for name in ("directory", "file", "link"):
        output = tmp_path / name
        if name == "directory":
            output.mkdir()
        elif name == "file":
            output.write_text("mine")
        else:
            output.symlink_to(tmp_path / "nowhere")
        with pytest.raises(ConfigError, match=f"{name}: exists already"), staged_directory(output):
            pytest.fail("entered")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file", "link"]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match="exists already"), staged_directory(output):
        output.mkdir()
    assert list(output.iterdir()) == []
    assert list(tmp_path.iterdir()) == [output]


def test_a_place_where_nothing_can_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="cannot make"),
        staged_directory(tmp_path / "file" / "out"),
    ):
        pytest.fail("entered")


def test_a_place_is_tried_before_long_work_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "out").mkdir()
    for name in ("new", "a/b/new", "out"):  # whether the output may be there is not asked
        require_writable(tmp_path / name)
    for name in ("file/new", "file/a/new"):
        with pytest.raises(ConfigError, match=r"output .*new: cannot make"):
            require_writable(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot make"):
        require_writable(Path("/proc/new"))
    assert {path.name for path in tmp_path.iterdir()} == {"file", "out"}


def test_sigterm_and_sighup_clean_up_and_tell_the_shell(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # not as nohup leaves it
        process = start_writer(tmp_path / "out")
        process.send_signal(number)
        assert finish(process) == 128 + number
        assert list(tmp_path.iterdir()) == []


def test_ctrl_c_cleans_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    process = start_writer(tmp_path / "out")
    process.send_signal(signal.SIGINT)
    assert finish(process) == -signal.SIGINT
    assert list(tmp_path.iterdir()) == []
    assert "KeyboardInterrupt" in capfd.readouterr().err


def test_the_next_run_removes_what_kill_9_left_and_only_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed, alive = start_writer(tmp_path / "out"), start_writer(tmp_path / "out")
    neighbour = start_writer(tmp_path / "out[1]")
    killed.kill()
    finish(killed)
    assert len(list(tmp_path.iterdir())) == 3
    try:
        with staged_directory(tmp_path / "out") as directory:
            (directory / "file").write_text("1")
        left = {path.name for path in tmp_path.iterdir()}
    finally:
        for process in (alive, neighbour):
            process.kill()
            finish(process)
    assert left == {"out", f".out.partial-{alive.pid}", f".out[1].partial-{neighbour.pid}"}
    assert f".out.partial-{killed.pid}" in caplog.text


def test_a_name_with_brackets_is_cleaned_too(tmp_path: Path) -> None:
    killed = start_writer(tmp_path / "out[1]*")
    killed.kill()
    finish(killed)
    assert finish(start_writer(tmp_path / "out[1]*", "finish")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out[1]*"]


def test_a_stale_directory_of_our_own_process_id_is_no_obstacle(tmp_path: Path) -> None:
    """In a container every run may have the same process id."""
    (tmp_path / f".out.partial-{os.getpid()}").mkdir()
    with staged_directory(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_writers_of_one_output_do_not_mix(tmp_path: Path) -> None:
    slow = start_writer(tmp_path / "out")
    assert finish(start_writer(tmp_path / "out", "finish")) == 0
    assert (tmp_path / "out" / "half").stat().st_size == 1000
    slow.send_signal(signal.SIGTERM)
    finish(slow)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_signal_handlers_are_as_before(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "out"):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with staged_directory(tmp_path / "out2"):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_too_little_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(
            ArtifactError, match=r"1,000,000,000,000,000,000 bytes are needed, [\d,]+ bytes"
        ),
        staged_directory(tmp_path / "a" / "out", needed_bytes=10**18),
    ):
        pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []
    require_free_space(tmp_path / "out", needed_bytes=1)


def test_a_disk_that_fills_up_is_named_and_left_clean(small_disk: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"the disk is full: [\d,]+ bytes are free"),
        staged_directory(small_disk / "out") as directory,
    ):
        (directory / "file").write_bytes(b"1" * 2**21)
    assert list(small_disk.iterdir()) == []


def test_a_quota_that_is_used_up_is_a_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"the disk is full: [\d,]+ bytes are free"),
        staged_directory(tmp_path / "out"),
    ):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_under_safetensors_is_named_and_left_clean(small_disk: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="the disk is full"),
        staged_directory(small_disk / "out") as directory,
    ):
        save_file({"weight": torch.ones(2**20)}, directory / "model.safetensors")
    assert list(small_disk.iterdir()) == []
