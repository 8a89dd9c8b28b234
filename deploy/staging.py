"""A directory that appears under its final name only when it is complete.

A stage writes into a hidden sibling of its output. Only when every file is on the disk does one
rename give it its final name, so a crash, a full disk or Ctrl-C never leaves something that looks
finished. The process that writes a hidden directory holds a lock on it. The kernel drops that lock
when the process dies, even by `kill -9`, which is how the next run knows that it may remove what is
left. A process id alone would not do: containers that share a volume have equal ones.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from deploy.errors import ArtifactError, ConfigError

logger = logging.getLogger(__name__)


@contextmanager
def staged_directory(output: Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """Yield a hidden directory that becomes `output` when the block ends without an exception.

    On any exception, Ctrl-C, SIGTERM or SIGHUP the directory is removed. Where several processes
    train together, only one of them may enter.

    Args:
        output: final path; must not exist. Missing parents are made.
        needed_bytes: expected size; the block is not entered when the disk has less free.

    Raises:
        ConfigError: `output` exists, or no directory can be made there.
        ArtifactError: the disk is, or became, too full.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link
    _refuse_existing(output)
    with _signals_as_exit():
        made_parents = _make_parents(output)
        try:
            _remove_stale(output)
            if needed_bytes is not None:
                require_free_space(output, needed_bytes)
            with full_disk_named(output, needed_bytes), _locked_sibling(output) as partial:
                yield partial
                _flush_tree(partial)
                _refuse_existing(output)
                partial.rename(output)
                flush(output.parent)
        finally:
            _remove_empty(made_parents)


def require_writable(output: Path) -> None:
    """Refuse, before long work, a path where no directory can be made. It leaves nothing there.

    Raises:
        ConfigError: The system refuses.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link
    made_parents = _make_parents(output)
    try:
        with _locked_sibling(output):
            pass
    finally:
        _remove_empty(made_parents)


@contextmanager
def full_disk_named(output: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn the many errors of a full disk inside the block into one that says so.

    Args:
        output: What is written; its parent exists.
        needed_bytes: Expected size, for the message.

    Raises:
        ArtifactError: The disk became too full.
    """
    try:
        yield
    except Exception as error:
        if _is_disk_full(error):
            raise ArtifactError(_disk_full_message(output, needed_bytes)) from error
        raise


def _refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise ConfigError(
            f"output {output}: exists already; name another directory or remove it first"
        )


def _make_parents(output: Path) -> list[Path]:
    missing = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output {output}: cannot make {output.parent} ({error.strerror})"
        ) from error
    return missing


def _remove_empty(directories: list[Path]) -> None:
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:  # absent, or someone else has put something there
            return


@contextmanager
def _locked_sibling(output: Path) -> Iterator[Path]:
    partial, lock = _make_partial(output)
    try:
        yield partial
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _make_partial(output: Path) -> tuple[Path, int]:
    for attempt in range(100):
        suffix = f"-{attempt}" if attempt else ""
        partial = output.with_name(f".{output.name}.partial-{os.getpid()}{suffix}")
        try:
            partial.mkdir()
        except FileExistsError:  # the same process id in another container
            continue
        except OSError as error:
            raise ConfigError(
                f"output {output}: cannot make a directory there ({error.strerror})"
            ) from error
        try:
            lock = try_lock(partial)
        except OSError:  # a file system without locks
            return partial, os.open(partial, os.O_RDONLY)
        if lock is not None:
            return partial, lock
    raise ArtifactError(f"output {output}: other processes hold all of .{output.name}.partial-*")


def try_lock(directory: Path) -> int | None:
    """Lock a directory, or return None if another process holds it or has removed it.

    Raises:
        OSError: The file system has no locks.
    """
    descriptor = None
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), directory.stat()):
            locked, descriptor = descriptor, None
            return locked
    except (BlockingIOError, FileNotFoundError):
        pass
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return None


def _remove_stale(output: Path) -> None:
    for path in output.parent.glob(f".{_glob_literal(output.name)}.partial-*"):
        try:
            lock = try_lock(path)
        except OSError:  # a file system without locks: whether its writer lives cannot be known
            continue
        if lock is None:
            continue
        logger.warning("removing %s, left by a process that was killed", path)
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _glob_literal(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _flush_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        if path.is_file() or path.is_dir():
            flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a small file that has its name only when all of it is on the disk."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    flush(new)
    new.rename(path)
    flush(path.parent)


@contextmanager
def _signals_as_exit() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, unless someone else already handles them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [
        item for item in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(item) is signal.SIG_DFL
    ]
    for item in taken:
        signal.signal(item, _exit_on_signal)
    try:
        yield
    finally:
        for item in taken:
            signal.signal(item, signal.SIG_DFL)


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def require_free_space(path: Path, needed_bytes: int) -> None:
    """Refuse to begin a write for which the disk of `path`'s parent has no room.

    Raises:
        ArtifactError: Less than `needed_bytes` is free.
    """
    if shutil.disk_usage(path.parent).free < needed_bytes:
        raise ArtifactError(_disk_full_message(path, needed_bytes))


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):  # writers in Rust and C++ keep only the text
            return True
        error = error.__cause__ or error.__context__
    return False


def _disk_full_message(output: Path, needed_bytes: int | None) -> str:
    free = shutil.disk_usage(output.parent).free
    needed = f"{needed_bytes:,} bytes are needed, " if needed_bytes is not None else ""
    return (
        f"output {output}: the disk is full: {needed}{free:,} bytes are free; "
        "free some or write elsewhere"
    )
