"""Finished parts on disk: what a new process finds, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.errors import ArtifactError, ConfigError
from deploy.part_store import (
    RECORD_NAME,
    PartStore,
    discard_parts,
    open_parts,
    progress_directory,
)

KEY = {"settings": {"scheme": "W8A8", "group": None}, "versions": {"torch": "1"}}


class _PowerCut(BaseException):
    """Ends a block as nothing that is caught would."""


@contextmanager
def interrupted(output: Path, key: Any = KEY, *, resume: bool = True) -> Iterator[PartStore]:
    try:
        with open_parts(output, key, resume=resume) as store:
            yield store
            raise _PowerCut
    except _PowerCut:
        pass


def add(store: PartStore, count: int) -> None:
    for _ in range(count):
        i = len(store.parts)
        tensors, states = {f"t{i}": torch.full((3,), i)}, {"s": torch.full((2,), float(i))}
        store.add(f"part-{i}", tensors, states, {"errors": [i, 0.1]})


def test_a_new_process_finds_parts_facts_and_the_newest_states(tmp_path: Path) -> None:
    with interrupted(tmp_path / "out") as store:
        add(store, 3)
    names = sorted(path.name for path in progress_directory(tmp_path / "out").iterdir())
    assert names == [
        *(f"part-{i}.safetensors" for i in range(3)),
        RECORD_NAME,
        "states-0003.safetensors",
    ]
    with open_parts(tmp_path / "out", KEY, resume=True) as store:
        assert [part.name for part in store.parts] == ["part-0", "part-1", "part-2"]
        assert store.parts[1].facts == {"errors": [1, 0.1]}
        assert torch.equal(store.states()["s"], torch.full((2,), 2.0))
        add(store, 1)
        assert torch.equal(store.states()["s"], torch.full((2,), 3.0))
        store.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_record_names_only_what_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    rename, unlink = Path.rename, Path.unlink

    def record_sync(descriptor: int) -> None:
        steps.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")

    def record_rename(path: Path, target: Path) -> Path:
        steps.append(f"name {target.name}")
        return rename(path, target)

    def record_unlink(path: Path, missing_ok: bool = False) -> None:
        steps.append(f"remove {path.name}")
        unlink(path, missing_ok)

    with open_parts(tmp_path / "out", KEY, resume=True) as store:
        add(store, 1)
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", record_sync)
            patch.setattr(Path, "rename", record_rename)
            patch.setattr(Path, "unlink", record_unlink)
            add(store, 1)
        store.remove()
    assert steps == [
        "sync part-1.new",
        "name part-1.safetensors",
        "sync states-0002.new",
        "name states-0002.safetensors",
        f"sync {RECORD_NAME}.new",
        f"name {RECORD_NAME}",
        "sync out.quantizing",
        "remove states-0001.safetensors",
    ]


def test_parts_without_states_are_parts_too(tmp_path: Path) -> None:
    with interrupted(tmp_path / "out") as store:
        add(store, 2)
        store.add("last", {"t": torch.ones(1)}, {}, {})
    with open_parts(tmp_path / "out", KEY, resume=True) as store:
        assert (len(store.parts), store.states()) == (3, {})


def test_nothing_stays_of_a_run_that_did_next_to_nothing(tmp_path: Path) -> None:
    with interrupted(tmp_path / "out") as store:
        add(store, 1)
    assert list(tmp_path.iterdir()) == []


def test_other_settings_are_refused_with_the_difference_and_begin_anew_on_demand(
    tmp_path: Path,
) -> None:
    with interrupted(tmp_path / "out") as store:
        add(store, 2)
    other = KEY | {"settings": {"scheme": "W4A8", "group": None}}
    said = (
        r"2 finished parts of another run \(settings.scheme: 'W8A8' then, 'W4A8' now\).*--no-resume"
    )
    with pytest.raises(ConfigError, match=said), open_parts(tmp_path / "out", other, resume=True):
        pytest.fail("entered")
    with open_parts(tmp_path / "out", KEY, resume=True) as store:
        assert len(store.parts) == 2, "the refusal left them"
    with open_parts(tmp_path / "out", other, resume=False) as store:
        assert store.parts == []
        assert list(store.directory.iterdir()) == []


def test_a_first_part_of_other_settings_is_in_nobodys_way(tmp_path: Path) -> None:
    with open_parts(tmp_path / "out", KEY, resume=True) as store:
        add(store, 1)  # and the process ends as kill -9 ends it: nothing is removed
    with open_parts(tmp_path / "out", KEY | {"more": 1}, resume=True) as store:
        assert store.parts == []


@pytest.mark.parametrize("name", ["part-1.safetensors", "states-0002.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named_and_can_be_left_behind(tmp_path: Path, name: str, damage: str) -> None:
    with interrupted(tmp_path / "out") as store:
        add(store, 2)
    path = progress_directory(tmp_path / "out") / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + (b"" if damage == "cut" else bytes([content[-1] ^ 1])))
    with (
        pytest.raises(ArtifactError, match=rf"{name}: .*--no-resume"),
        open_parts(tmp_path / "out", KEY, resume=True),
    ):
        pytest.fail("entered")
    with open_parts(tmp_path / "out", KEY, resume=False) as store:
        assert store.parts == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}', '{"key": 1, "parts": 3}'])
def test_an_unreadable_record_is_named(tmp_path: Path, text: str) -> None:
    with interrupted(tmp_path / "out") as store:
        add(store, 2)
    (progress_directory(tmp_path / "out") / RECORD_NAME).write_text(text)
    with (
        pytest.raises(ArtifactError, match=rf"{RECORD_NAME}: unreadable.*--no-resume"),
        open_parts(tmp_path / "out", KEY, resume=True),
    ):
        pytest.fail("entered")


def test_files_that_are_not_ours_are_never_removed(tmp_path: Path) -> None:
    directory = progress_directory(tmp_path / "out")
    directory.mkdir()
    (directory / "thesis.txt").write_text("years")
    for resume in (True, False):
        with (
            pytest.raises(ConfigError, match=r"holds thesis\.txt, which no run left there"),
            open_parts(tmp_path / "out", KEY, resume=resume),
        ):
            pytest.fail("entered")
    discard_parts(tmp_path / "out")
    assert (directory / "thesis.txt").read_text() == "years"


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    progress_directory(tmp_path / "out").write_text("mine")
    with (
        pytest.raises(ConfigError, match="expected a directory, or none"),
        open_parts(tmp_path / "out", KEY, resume=True),
    ):
        pytest.fail("entered")


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with open_parts(tmp_path / "out", KEY, resume=True) as store:
        add(store, 2)
        with (
            pytest.raises(ConfigError, match="another process is working there"),
            open_parts(tmp_path / "out", KEY, resume=True),
        ):
            pytest.fail("entered")
        assert len(json.loads((store.directory / RECORD_NAME).read_text())["parts"]) == 2


def test_a_part_that_could_not_be_written_leaves_the_others_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with interrupted(tmp_path / "out") as store:
        add(store, 2)
        monkeypatch.setattr("deploy.part_store.save_file", half)
        with pytest.raises(OSError, match="No space left"):
            add(store, 1)
    monkeypatch.undo()
    assert not list(progress_directory(tmp_path / "out").glob("*.new"))
    with open_parts(tmp_path / "out", KEY, resume=True) as store:
        assert len(store.parts) == 2
        assert torch.equal(store.states()["s"], torch.ones(2))
