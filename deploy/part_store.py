"""The finished parts of a checkpoint in the making, which outlive the process that made them.

A large model takes hours. Each part is therefore written to `<output>.quantizing` as soon as it is
done: a safetensors file, the hidden states with which the next part begins, and a record that names
them with their sha256. The record is replaced by one rename when the files are on the disk, so that
after `kill -9` or a power cut it lists exactly what is whole. A run with the same inputs and
settings goes on behind it; any other run refuses the directory, which may hold hours of work.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from deploy.artifact import FileRecord, hash_file
from deploy.errors import ArtifactError, ConfigError
from deploy.staging import flush, try_lock, write_whole

RECORD_NAME = "progress.json"
_OURS = (RECORD_NAME, "*.safetensors", "*.new")

_NOTHING_MUCH = 1
"""Finished parts that nobody misses: the first takes seconds."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredPart:
    """One finished part."""

    name: str
    file: FileRecord
    facts: Mapping[str, Any]
    """Whatever the stage wants to know of it later, as JSON values."""


def progress_directory(output: Path) -> Path:
    """Return where the parts of an output lie until it is finished."""
    output = Path(os.path.abspath(output))  # noqa: PTH100 - as in staging
    return output.with_name(f"{output.name}.quantizing")


class PartStore:
    """The parts of one output, in the order in which they were finished.

    Args:
        directory: Exists, and is locked by this process.
        key: Inputs, settings and versions that decide what the parts hold, as JSON values.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any]) -> None:
        self.directory = directory
        self._key = key
        self.parts: list[StoredPart] = []
        self._states: FileRecord | None = None

    def add(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        facts: Mapping[str, Any],
    ) -> None:
        """Store a part; when this returns it survives whatever happens to the process.

        Args:
            name: Of the part.
            tensors: As the checkpoint will hold them.
            states: With which the next part begins; those of the part before are removed.
            facts: JSON values.
        """
        older = self._states and self._states_path()
        file = self._write(self.path(name), tensors)
        self.parts.append(StoredPart(name, file, facts))
        self._states = self._write(self._states_path(), states) if states else None
        self._write_record()
        if older:
            older.unlink()

    def path(self, name: str) -> Path:
        """Return the file of a part."""
        return self.directory / f"{name}.safetensors"

    def states(self) -> dict[str, Tensor]:
        """Return the states with which the next part begins."""
        return {} if self._states is None else dict(load_file(self._states_path()))

    def remove(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _states_path(self) -> Path:
        return self.directory / f"states-{len(self.parts):04}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
        new = path.with_suffix(".new")
        try:
            save_file(dict(tensors), new)
            flush(new)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        new.rename(path)
        return FileRecord(path.stat().st_size, hash_file(path))

    def _write_record(self) -> None:
        record = {
            "key": self._key,
            "parts": [asdict(part) for part in self.parts],
            "states": None if self._states is None else asdict(self._states),
        }
        write_whole(self.directory / RECORD_NAME, json.dumps(record))

    def read(self) -> None:
        """Take over what an earlier process finished.

        Raises:
            ConfigError: It worked on other inputs or with other settings.
            ArtifactError: The record or a file it names is damaged.
        """
        path = self.directory / RECORD_NAME
        if not path.is_file():
            return
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            key = record["key"]
            parts = [
                StoredPart(part["name"], FileRecord(**part["file"]), part["facts"])
                for part in record["parts"]
            ]
            states = record["states"] and FileRecord(**record["states"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, f"unreadable ({error!r})") from error
        if key != self._key and len(parts) <= _NOTHING_MUCH:
            return
        if key != self._key:
            raise ConfigError(
                f"{self.directory}: holds {len(parts)} finished parts of another run "
                f"({_differences(key, self._key)}); give what that run was given to go on with it, "
                f"name another output, or give --no-resume to remove them and begin anew"
            )
        self.parts, self._states = parts, states
        for part in parts:
            _verify(self.path(part.name), part.file)
        if states is not None:
            _verify(self._states_path(), states)


@contextmanager
def open_parts(output: Path, key: Mapping[str, Any], *, resume: bool) -> Iterator[PartStore]:
    """Yield the parts of an output, those of an earlier run included.

    On leaving with an exception the directory stays if it holds work: more than the first part.

    Args:
        output: What will be made of them.
        key: See `PartStore`.
        resume: Go on with an earlier run; False removes what it left.

    Raises:
        ConfigError: The directory holds another run's parts, other files, or another process works
            there.
        ArtifactError: What the earlier run left is damaged.
    """
    directory = progress_directory(output)
    lock = _lock(directory)
    try:
        _refuse_foreign_files(directory)
        plain_key = json.loads(json.dumps(key))
        if not resume:
            for path in directory.iterdir():
                path.unlink()
        store = PartStore(directory, plain_key)
        store.read()
        try:
            yield store
        except BaseException:
            if len(store.parts) > _NOTHING_MUCH:
                logger.warning(
                    "%s keeps %d finished parts: the same command goes on from there",
                    directory,
                    len(store.parts),
                )
            else:
                store.remove()
            raise
    finally:
        if lock is not None:
            os.close(lock)


def discard_parts(output: Path) -> None:
    """Remove the parts of an output that is finished, if its maker was killed before it could."""
    directory = progress_directory(output)
    if (directory / RECORD_NAME).is_file():
        shutil.rmtree(directory, ignore_errors=True)


def _lock(directory: Path) -> int | None:
    """Make the directory and lock it; None on a file system without locks."""
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{directory}: expected a directory, or none, for the parts that are finished "
            f"({error.strerror}); remove it or name another output"
        ) from error
    try:
        lock = try_lock(directory)
    except OSError:
        return None
    if lock is None:
        raise ConfigError(
            f"{directory}: another process is working there; wait for it or name another output"
        )
    return lock


def _refuse_foreign_files(directory: Path) -> None:
    foreign = [
        path.name
        for path in directory.iterdir()
        if path.is_dir() or not any(path.match(pattern) for pattern in _OURS)
    ]
    if foreign:
        raise ConfigError(
            f"{directory}: holds {', '.join(sorted(foreign)[:3])}, which no run left there; "
            f"move it away or name another output"
        )


def _verify(path: Path, expected: FileRecord) -> None:
    if not path.is_file():
        raise _damaged(path, "missing")
    if path.stat().st_size != expected.bytes or hash_file(path) != expected.sha256:
        raise _damaged(path, "not what was written")


def _damaged(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: {what}; give --no-resume to remove the finished parts and begin anew"
    )


def _differences(found: Any, expected: Any, where: str = "") -> str:
    """Name the entries in which two keys differ, with both values."""
    if isinstance(found, dict) and isinstance(expected, dict):
        inner = [
            _differences(found.get(name), expected.get(name), f"{where}.{name}".lstrip("."))
            for name in sorted({*found, *expected})
            if found.get(name) != expected.get(name)
        ]
        return "; ".join(inner)
    return f"{where}: {found!r} then, {expected!r} now"
