from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.artifact import (
    MANIFEST_NAME,
    ArtifactKind,
    FileRecord,
    Manifest,
    finished_artifact,
    hash_file,
    is_artifact,
    library_versions,
    new_artifact,
    read_manifest,
    verify_files,
    write_manifest,
)
from deploy.errors import ArtifactError, ConfigError, StageOrderError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=3)
TEXTS = st.dictionaries(st.text(), st.text(), max_size=3)
FILES = st.dictionaries(
    st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8})?", fullmatch=True),
    st.builds(FileRecord, st.integers(min_value=0), st.from_regex(r"[0-9a-f]{64}", fullmatch=True)),
    max_size=3,
)
MANIFESTS = st.builds(
    Manifest,
    kind=st.sampled_from(ArtifactKind),
    parents=TEXTS,
    config=OBJECTS,
    versions=TEXTS,
    checks=OBJECTS,
    details=OBJECTS,
    files=FILES,
)


def make_artifact(output: Path, **fields: Any) -> Manifest:
    with new_artifact(output) as directory:
        (directory / "sub").mkdir()
        (directory / "weights.bin").write_bytes(bytes(range(256)))
        (directory / "sub" / "notes.txt").write_text("hello")
        return write_manifest(directory, Manifest(ArtifactKind.CHECKPOINT, **fields))


@given(MANIFESTS)
def test_manifest_survives_the_round_trip_through_text(manifest: Manifest) -> None:
    again = Manifest.from_text(manifest.to_text(), "here")
    assert again == manifest
    assert again.digest == manifest.digest
    assert again.to_text() == manifest.to_text()


def test_digest_depends_on_content_and_not_on_order() -> None:
    one = Manifest(ArtifactKind.ONNX, config={"a": 1, "b": 2})
    other_order = Manifest(ArtifactKind.ONNX, config={"b": 2, "a": 1})
    assert one.digest == other_order.digest
    for changed in (
        replace(one, kind=ArtifactKind.ADAPTER),
        replace(one, config={"a": 1, "b": 3}),
        replace(one, parents={"model": "0"}),
        replace(one, files={"x": FileRecord(1, "0")}),
    ):
        assert changed.digest != one.digest


def test_equal_content_has_equal_bytes_in_two_places(tmp_path: Path) -> None:
    first = make_artifact(tmp_path / "a", config={"rank": 4})
    second = make_artifact(tmp_path / "b", config={"rank": 4})
    assert first == second
    assert (tmp_path / "a" / MANIFEST_NAME).read_bytes() == (
        tmp_path / "b" / MANIFEST_NAME
    ).read_bytes()


def test_a_number_that_json_has_not_is_refused_on_writing() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Manifest(ArtifactKind.ONNX, checks={"error": float("nan")}).to_text()


def valid_json() -> dict[str, Any]:
    manifest = Manifest(ArtifactKind.ONNX, files={"x": FileRecord(1, "0" * 64)})
    value: dict[str, Any] = json.loads(manifest.to_text())
    return value


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"extra": 1}, "unknown field 'extra'"),
        ({"schema": 2}, "schema 2, but this rolora reads schema 1"),
        ({"schema": True}, "schema True"),
        ({"kind": "pickle"}, "kind 'pickle' is none of adapter, checkpoint, onnx"),
        ({"kind": ["onnx"]}, "is none of"),
        ({"config": []}, "field 'config' must be an object, got list"),
        ({"parents": {"model": 1}}, "parents.model must be text"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}, "does not lie in the artifact"),
        ({"files": {"a/../../b": {"bytes": 1, "sha256": ""}}}, "does not lie in the artifact"),
        ({"files": {"x": {"bytes": True, "sha256": ""}}}, "must hold bytes and sha256"),
        ({"files": {"x": {"bytes": 1}}}, "must hold bytes and sha256"),
        ({"files": {"x": 1}}, "must hold bytes and sha256"),
    ],
)
def test_what_this_version_would_not_write_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(named)) as caught:
        Manifest.from_text(json.dumps(valid_json() | change), "dir/manifest")
    assert str(caught.value).startswith("dir/manifest: ")


def test_a_missing_field_is_named() -> None:
    value = valid_json()
    del value["checks"]
    with pytest.raises(ArtifactError, match="missing field 'checks'"):
        Manifest.from_text(json.dumps(value), "here")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"schema": 1, "schema": 1}', '{"schema": NaN}', "[" * 100_000]
)
def test_text_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="here"):
        Manifest.from_text(text, "here")


def test_an_artifact_verifies_and_lists_every_file(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    written = make_artifact(output, versions=library_versions())
    assert is_artifact(output)
    assert verify_files(output) == written == read_manifest(output, ArtifactKind.CHECKPOINT)
    assert written.files.keys() == {"weights.bin", "sub/notes.txt"}
    assert written.files["weights.bin"].bytes == 256
    assert "torch" in written.versions


def test_truncation_names_file_expected_and_found(tmp_path: Path) -> None:
    make_artifact(tmp_path / "out")
    path = tmp_path / "out" / "weights.bin"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=re.escape(f"{path}: expected 256 bytes, found 100")):
        verify_files(tmp_path / "out")


def test_one_flipped_bit_names_file_expected_and_found(tmp_path: Path) -> None:
    written = make_artifact(tmp_path / "out")
    path = tmp_path / "out" / "weights.bin"
    content = bytearray(path.read_bytes())
    content[17] ^= 1
    path.write_bytes(content)
    expected = written.files["weights.bin"].sha256
    with pytest.raises(
        ArtifactError, match=f"{path}: expected sha256 {expected}, found [0-9a-f]{{64}}"
    ):
        verify_files(tmp_path / "out")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    make_artifact(tmp_path / "out")
    (tmp_path / "out" / "sub" / "notes.txt").unlink()
    with pytest.raises(ArtifactError, match=r"notes\.txt: missing"):
        verify_files(tmp_path / "out")


def test_the_wrong_kind_says_which_command_makes_and_takes_what(tmp_path: Path) -> None:
    make_artifact(tmp_path / "out")
    with pytest.raises(
        StageOrderError, match=r"kind onnx.*rolora export.*got kind checkpoint"
    ) as caught:
        read_manifest(tmp_path / "out", ArtifactKind.ONNX)
    assert caught.value.exit_code == 3


def test_a_directory_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(StageOrderError, match="make one with rolora merge-rotate-quantize"):
        read_manifest(tmp_path, ArtifactKind.CHECKPOINT)
    with pytest.raises(ConfigError, match="no such directory"):
        read_manifest(tmp_path / "absent")
    (tmp_path / MANIFEST_NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_manifest(tmp_path)


def test_a_finished_output_is_recognized_only_with_the_same_parents_and_config(
    tmp_path: Path,
) -> None:
    output, parents, config = tmp_path / "out", {"model": "0"}, {"rotate": ("r1", "r2")}
    wanted = Manifest(ArtifactKind.CHECKPOINT, parents, config)
    lines: list[str] = []
    assert finished_artifact(output, wanted, lines.append) is None
    written = make_artifact(output, parents=parents, config=config)
    found = finished_artifact(output, wanted, lines.append)
    assert lines == [f"{output} is finished already"]
    assert found is not None
    assert found.digest == written.digest
    for other in (
        {"kind": ArtifactKind.ONNX},
        {"parents": {"model": "1"}},
        {"config": {"rotate": ("r1",)}},
    ):
        with pytest.raises(ConfigError, match="exists already and was made from other inputs"):
            finished_artifact(output, replace(wanted, **other), lines.append)
    (output / "weights.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"weights\.bin: expected 256 bytes, found 0"):
        finished_artifact(output, wanted, lines.append)
    assert len(lines) == 1, "a damaged output is not called finished"


def test_an_output_made_with_other_versions_says_so(tmp_path: Path) -> None:
    made = {"torch": "1.0", "onnx": "1.0", "peft": "0.1"}
    write = Manifest(ArtifactKind.CHECKPOINT, versions=made)
    with new_artifact(tmp_path / "out") as directory:
        write_manifest(directory, write)
    lines: list[str] = []
    wanted = replace(write, versions={"torch": "2.0", "onnx": "1.0", "rolora": "0.2"})
    assert finished_artifact(tmp_path / "out", wanted, lines.append) is not None
    (line,) = lines
    assert "finished already, made with peft 0.1 (here none), rolora none (here 0.2), " in line
    assert "torch 1.0 (here 2.0); to make it anew, remove it" in line


def test_what_is_no_artifact_is_never_taken_for_a_finished_output(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("mine", "file"):
        with pytest.raises(ConfigError, match=f"{name}: exists already"):
            finished_artifact(tmp_path / name, Manifest(ArtifactKind.ONNX), print)


def test_a_stage_that_forgets_the_manifest_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=MANIFEST_NAME),
        new_artifact(tmp_path / "out") as directory,
    ):
        (directory / "weights.bin").write_bytes(b"1")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_system_does_not_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"{tmp_path}: cannot be read \(Is a directory\)"):
        hash_file(tmp_path)
