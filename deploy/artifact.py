"""Artifacts on disk: a directory that is complete or absent, and the manifest that describes it.

The manifest (`rolora_manifest.json`) records where the artifact came from, with which
configuration, and the size and sha256 of each file. Its own sha256 is the artifact's digest, which
children name as their parent. It holds no times, so equal content has equal digests.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeAlias

from deploy.errors import ArtifactError, ConfigError, StageOrderError
from deploy.staging import staged_directory

MANIFEST_NAME = "rolora_manifest.json"
SCHEMA_VERSION = 1
RECORDED_LIBRARIES = ("rolora", "torch", "transformers", "peft", "onnx", "onnxruntime")

JsonValue: TypeAlias = (
    "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
)


class ArtifactKind(StrEnum):
    """What a directory holds."""

    ADAPTER = "adapter"
    CHECKPOINT = "checkpoint"
    ONNX = "onnx"
    ENCODER = "onnx-encoder"
    MODEL = "model"
    ROTATION = "rotation"
    COMPRESSED = "compressed-tensors"


EXPORTS = (ArtifactKind.ONNX, ArtifactKind.ENCODER)
"""What `rolora export --format onnx` makes."""

MADE_BY = {
    ArtifactKind.ADAPTER: "rolora finetune or rolora merge --to adapter",
    ArtifactKind.CHECKPOINT: "rolora merge-rotate-quantize",
    ArtifactKind.ONNX: "rolora export",
    ArtifactKind.ENCODER: "rolora export of an encoder",
    ArtifactKind.MODEL: "rolora merge --to model",
    ArtifactKind.ROTATION: "rolora learn-rotation",
    ArtifactKind.COMPRESSED: "rolora export --format compressed-tensors",
}
TAKEN_BY = {
    ArtifactKind.ADAPTER: "rolora merge, merge-rotate-quantize or evaluate --adapter",
    ArtifactKind.CHECKPOINT: "rolora export --checkpoint, or rolora evaluate --model",
    ArtifactKind.ONNX: "rolora run, evaluate, bench or parity --model",
    ArtifactKind.ENCODER: "rolora evaluate --tasks classification, bench or parity --model",
    ArtifactKind.MODEL: "rolora finetune, merge, merge-rotate-quantize or evaluate --model",
    ArtifactKind.ROTATION: "rolora merge-rotate-quantize or finetune --rotation",
    ArtifactKind.COMPRESSED: "rolora evaluate --model, transformers or vLLM",
}


@dataclass(frozen=True)
class FileRecord:
    """What a file held when its artifact was finished."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything a later stage may ask about an artifact without opening its tensors."""

    kind: ArtifactKind
    parents: Mapping[str, str] = field(default_factory=dict)
    """Role (`model`, `adapter`, `checkpoint`) to digest of what this was made from."""
    config: Mapping[str, JsonValue] = field(default_factory=dict)
    """The resolved configuration of the stage that wrote it."""
    versions: Mapping[str, str] = field(default_factory=dict)
    checks: Mapping[str, JsonValue] = field(default_factory=dict)
    """Check that passed, to what it measured and its bound."""
    details: Mapping[str, JsonValue] = field(default_factory=dict)
    """Facts of this kind of artifact, such as the quantization scheme and its rotation."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    """Relative POSIX path to what it held; filled in by `write_manifest`."""

    @property
    def digest(self) -> str:
        """The sha256 of the canonical JSON: sorted keys, no white space, ASCII."""
        text = json.dumps(
            self._to_json_object(), sort_keys=True, separators=(",", ":"), allow_nan=False
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def to_text(self) -> str:
        """Return the manifest as indented JSON, the same text for the same content.

        Raises:
            TypeError: a value has no JSON form.
            ValueError: a number is NaN or infinite.
        """
        return json.dumps(self._to_json_object(), sort_keys=True, indent=2, allow_nan=False) + "\n"

    def _to_json_object(self) -> dict[str, Any]:
        return {"schema": SCHEMA_VERSION} | asdict(self)

    @classmethod
    def from_text(cls, text: str, where: str) -> Manifest:
        """Read a manifest, refusing whatever this version would not have written.

        Args:
            text: JSON.
            where: path named in messages.

        Raises:
            ArtifactError: not JSON, another schema, an unknown, missing or ill-typed field.
        """
        try:
            raw = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(
                f"{where}: not a readable manifest ({error}); make the artifact again"
            ) from error
        if not isinstance(raw, dict):
            raise ArtifactError(f"{where}: expected a JSON object, got {type(raw).__name__}")
        schema = raw.pop("schema", None)
        if schema != SCHEMA_VERSION or isinstance(schema, bool):
            raise ArtifactError(
                f"{where}: schema {schema!r}, but this rolora reads schema {SCHEMA_VERSION}; "
                "make the artifact again or use the rolora that wrote it"
            )
        known = {item.name for item in fields(cls)}
        faults = [f"unknown field {name!r}" for name in sorted(raw.keys() - known)]
        faults += [f"missing field {name!r}" for name in sorted(known - raw.keys())]
        for name in sorted(known & raw.keys() - {"kind"}):
            if not isinstance(raw[name], dict):
                faults.append(f"field {name!r} must be an object, got {type(raw[name]).__name__}")
        if faults:
            raise ArtifactError(f"{where}: {'; '.join(faults)}; make the artifact again")
        if raw["kind"] not in list(ArtifactKind):
            raise ArtifactError(
                f"{where}: kind {raw['kind']!r} is none of {', '.join(ArtifactKind)}; "
                "make the artifact again"
            )
        for name in ("parents", "versions"):
            for key, value in raw[name].items():
                if not isinstance(value, str):
                    raise ArtifactError(f"{where}: {name}.{key} must be text, got {value!r}")
        raw["kind"] = ArtifactKind(raw["kind"])
        raw["files"] = {
            name: _read_record(name, value, where) for name, value in raw["files"].items()
        }
        return cls(**raw)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"a key occurs twice among {[key for key, _ in pairs]}")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _read_record(name: str, value: Any, where: str) -> FileRecord:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ArtifactError(f"{where}: files holds {name!r}, which does not lie in the artifact")
    well_typed = (
        isinstance(value, dict)
        and value.keys() == {"bytes", "sha256"}
        and type(value["bytes"]) is int
        and isinstance(value["sha256"], str)
    )
    if not well_typed:
        raise ArtifactError(f"{where}: files[{name!r}] must hold bytes and sha256, got {value!r}")
    return FileRecord(value["bytes"], value["sha256"])


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that decide what an artifact holds."""
    versions = {}
    for name in RECORDED_LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hash_file(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits.

    Raises:
        ArtifactError: The system does not let it be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error


def hash_sources(sources: Mapping[str, str | None]) -> dict[str, str]:
    """Return the digests of the sources that are files, by role; a hub data set has none."""
    return {
        role: hash_file(Path(source))
        for role, source in sources.items()
        if source and Path(source).is_file()
    }


def is_artifact(directory: Path) -> bool:
    """Tell whether a directory is one of ours."""
    return (directory / MANIFEST_NAME).is_file()


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, with a record of every file now in the directory.

    Args:
        directory: what `new_artifact` yielded, all other files written.
        manifest: its `files` is replaced.

    Returns:
        The manifest as written, with its final digest.
    """
    files = {
        path.relative_to(directory).as_posix(): FileRecord(path.stat().st_size, hash_file(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST_NAME
    }
    complete = replace(manifest, files=files)
    (directory / MANIFEST_NAME).write_text(complete.to_text(), encoding="utf-8")
    return complete


def read_manifest(directory: Path, *kinds: ArtifactKind) -> Manifest:
    """Read an artifact's manifest. File contents are not checked; `verify_files` does that.

    Args:
        directory: the artifact.
        kinds: those the caller takes; none means any.

    Raises:
        ConfigError: no such directory.
        StageOrderError: not an artifact, or one of another kind.
        ArtifactError: the manifest cannot be read.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    path = directory / MANIFEST_NAME
    makers = " or ".join(MADE_BY[kind] for kind in kinds or ArtifactKind)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StageOrderError(
            f"{directory}: has no {MANIFEST_NAME}, so it is no rolora artifact; "
            f"make one with {makers}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error
    manifest = Manifest.from_text(text, str(path))
    if kinds and manifest.kind not in kinds:
        raise StageOrderError(
            f"{directory}: expected an artifact of kind {' or '.join(kinds)} (made by {makers}), "
            f"got kind {manifest.kind}, which is for {TAKEN_BY[manifest.kind]}"
        )
    return manifest


def verify_files(directory: Path) -> Manifest:
    """Check every file of an artifact against its manifest, sizes first.

    Raises:
        ArtifactError: a file is missing, truncated or changed.
        ConfigError: no such directory.
        StageOrderError: the directory is no artifact.
    """
    manifest = read_manifest(directory)
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise ArtifactError(
                f"{path}: missing; the manifest lists it with {expected.bytes} bytes"
            )
        size = path.stat().st_size
        if size != expected.bytes:
            raise ArtifactError(
                f"{path}: expected {expected.bytes} bytes, found {size}; "
                "copy or make the artifact again"
            )
    for name, expected in manifest.files.items():
        found = hash_file(directory / name)
        if found != expected.sha256:
            raise ArtifactError(
                f"{directory / name}: expected sha256 {expected.sha256}, found {found}; "
                "copy or make the artifact again"
            )
    return manifest


def finished_artifact(
    output: Path, wanted: Manifest, progress: Callable[[str], None]
) -> Manifest | None:
    """Return the manifest of an output that this very stage has made already, or None.

    Args:
        output: where the stage would write.
        wanted: kind, parents and resolved configuration of what it would make, and the versions
            it would make it with.
        progress: told that the output is finished, and if so that other versions made it.

    Raises:
        ConfigError: `output` exists and is anything else.
        ArtifactError: it was this stage's, but a file is missing or damaged.
    """
    if not os.path.lexists(output):
        return None
    if output.is_dir() and is_artifact(output):
        manifest = read_manifest(output)
        expected = (wanted.kind, wanted.parents, json.loads(json.dumps(wanted.config)))
        if (manifest.kind, manifest.parents, manifest.config) == expected:
            verified = verify_files(output)
            progress(f"{output} is finished already{_other_versions(verified, wanted)}")
            return verified
    raise ConfigError(
        f"output {output}: exists already and was made from other inputs or settings; name another "
        "directory or remove it first"
    )


def _other_versions(made: Manifest, wanted: Manifest) -> str:
    differing = [
        f"{name} {made.versions.get(name, 'none')} (here {wanted.versions.get(name, 'none')})"
        for name in sorted(made.versions.keys() | wanted.versions.keys())
        if made.versions.get(name) != wanted.versions.get(name)
    ]
    if not differing:
        return ""
    return f", made with {', '.join(differing)}; to make it anew, remove it or name another output"


@contextmanager
def new_artifact(output: Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """Yield a hidden directory that becomes `output`; the block must call `write_manifest`.

    Args:
        output: final path; must not exist.
        needed_bytes: expected size; the block is not entered when the disk has less free.

    Raises:
        ConfigError: `output` exists, or no directory can be made there.
        ArtifactError: the disk is, or became, too full.
        RuntimeError: the block wrote no manifest, which is a bug of the stage.
    """
    with staged_directory(output, needed_bytes) as directory:
        yield directory
        if not is_artifact(directory):
            raise RuntimeError(f"no {MANIFEST_NAME} was written for {output}")
