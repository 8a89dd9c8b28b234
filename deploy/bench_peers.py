"""Other programs' forms of a model, to measure beside an export: built once, kept in a directory.

    genai-int4, genai-int8, genai-fp32   built by the model builder of onnxruntime-genai
    genai:DIRECTORY                      what that builder wrote
    llama.cpp:Q8_0, llama.cpp:Q4_0       MODEL.Q8_0.gguf in the directory of peers; this package
                                         writes no GGUF files, benchmarks/cpu/write_gguf.py does
    llama.cpp:FILE.gguf                  any GGUF file
    torch                                the float model in transformers

All but the last run decoders only. The builder and transformers read a directory of float weights,
so a model that comes as a GGUF file is written as one first. What is kept lies under the digest of
the model's files and, for what the builder wrote, the version of the builder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from deploy.artifact import EXPORTS, ArtifactKind, Manifest, is_artifact, read_manifest
from deploy.errors import ArtifactError, ConfigError
from deploy.model_location import locate_model
from deploy.session import GENAI_CONFIG_NAME
from deploy.staging import staged_directory

PRECISIONS = ("int4", "int8", "fp32")
"""What the builder of onnxruntime-genai makes for processors."""
GENAI, LLAMA, TORCH = "genai", "llama.cpp", "torch"
CONFIG_NAME = "config.json"
KINDS = (
    f"{', '.join(f'{GENAI}-{precision}' for precision in PRECISIONS)}, {GENAI}:DIRECTORY, "
    f"{LLAMA}:TYPE such as {LLAMA}:Q8_0, {LLAMA}:FILE.gguf, or {TORCH}"
)


class Runtime(StrEnum):
    """What runs a peer."""

    ONNX = "onnxruntime"
    LLAMA = "llama.cpp"
    TORCH = "torch"


@dataclass(frozen=True)
class Subject:
    """One model that is measured."""

    name: str
    runtime: Runtime
    path: Path
    """An export, a directory with `genai_config.json` or with float weights, or a GGUF file."""

    @property
    def model_bytes(self) -> int:
        """Size of graphs and weights, of a GGUF file with its tokenizer."""
        from deploy.weight_files import find_weight_files

        files: Iterable[Path] = [self.path]
        if self.runtime is Runtime.ONNX:
            files = self.path.glob("*.onnx*")
        elif self.runtime is Runtime.TORCH:
            files = find_weight_files(self.path)
        return sum(path.stat().st_size for path in files)


@dataclass(frozen=True)
class PeerSettings:
    """Which peers, and from what they come."""

    names: tuple[str, ...]
    model: str | None = None
    """The float model of the peers that are built; None is the one the export came from."""
    cache: Path | None = None
    """Keeps what is built; None is `default_cache`."""
    llama_python: str | None = None
    """A Python that has llama-cpp-python."""


def parse_peers(text: str) -> tuple[str, ...]:
    """Split a list of peers.

    Raises:
        ConfigError: An unknown one, one twice, or none.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    built = {TORCH, *(f"{GENAI}-{precision}" for precision in PRECISIONS)}
    faults = [
        f"{name!r} is none of {KINDS}"
        for name in names
        if name not in built
        and not any(name.startswith(f"{kind}:") and name != f"{kind}:" for kind in (GENAI, LLAMA))
    ]
    if len(set(names)) < len(names):
        faults.append("a peer is named twice")
    if faults or not names:
        raise ConfigError.from_faults(f"--against {text!r}", faults or [f"expected {KINDS}"])
    return names


def default_cache() -> Path:
    """Return where peers are kept unless the user says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rolora" / "peers"


def prepare_peers(
    export: Path, settings: PeerSettings, progress: Callable[[str], None] = lambda step: None
) -> list[Subject]:
    """Find or build every peer.

    Args:
        export: What the peers are measured beside.
        settings: Which ones.
        progress: Called with a line for each step.

    Raises:
        ConfigError: A peer is not there, or needs a model that was not named and cannot be found;
            or the export is that of an encoder, which the peer cannot run.
        ArtifactError: The builder fails.
    """
    is_encoder = read_manifest(export, *EXPORTS).kind is ArtifactKind.ENCODER
    if is_encoder and (others := [name for name in settings.names if name != TORCH]):
        raise ConfigError(
            f"--against {','.join(others)}: {export} holds an encoder, and these run decoders "
            f"only; expected {TORCH}"
        )
    cache = settings.cache or default_cache()
    source = _Source(export, settings.model, cache, progress)
    subjects = []
    for name in settings.names:
        kind, _, place = name.partition(":")
        if kind == LLAMA:
            subjects.append(Subject(name, Runtime.LLAMA, _gguf_file(place, source)))
        elif kind == TORCH:
            subjects.append(Subject(name, Runtime.TORCH, source.float_directory()))
        elif place:
            subjects.append(Subject(name, Runtime.ONNX, _genai_directory(Path(place))))
        else:
            precision = kind.removeprefix(f"{GENAI}-")
            subjects.append(Subject(name, Runtime.ONNX, source.build(precision)))
    return subjects


def _genai_directory(directory: Path) -> Path:
    if not (directory / GENAI_CONFIG_NAME).is_file():
        raise ConfigError(
            f"--against {GENAI}:{directory}: expected a directory with {GENAI_CONFIG_NAME}, as the "
            f"model builder of onnxruntime-genai writes it"
        )
    return directory


def _gguf_file(place: str, source: _Source) -> Path:
    """Return a file that is named by its path, or by its type in the directory of peers."""
    if place.endswith(".gguf"):
        path, advice = Path(place), "give a file that exists"
    else:
        path = source.directory() / f"{place}.gguf"
        advice = (
            f"write it (python benchmarks/cpu/write_gguf.py --type {place} --output {path}), or "
            f"give the path of a file that ends in .gguf"
        )
    if not path.is_file():
        raise ConfigError(f"--against {LLAMA}:{place}: no file {path}; {advice}")
    return path


class _Source:
    """The float model that peers are built from, looked for when the first one needs it."""

    def __init__(
        self, export: Path, model: str | None, cache: Path, progress: Callable[[str], None]
    ) -> None:
        self._export, self._model, self._cache = export, model, cache
        self._progress = progress
        self._directory: Path | None = None

    def directory(self) -> Path:
        """Return the directory of this model's peers, which may not exist yet."""
        if self._directory is None:
            if self._model is None:
                self._model = recorded_model(self._export)
            self._progress("reading the peers' model")
            name, digest = model_identity(self._model)
            self._directory = self._cache / f"{name.replace('/', '--')}-{digest[:12]}"
        return self._directory

    def build(self, precision: str) -> Path:
        """Return what the builder makes of the model, from an earlier call if it can be."""
        version = metadata.version("onnxruntime-genai")
        output = self.directory() / f"{GENAI}-{version}-{precision}"
        if output.is_dir():
            return _genai_directory(output)
        weights = self.float_directory()
        self._progress(f"building {GENAI}-{precision}")
        with staged_directory(output) as partial, TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
            command += ["-i", str(weights), "-o", str(partial), "-p", precision, "-e", "cpu"]
            command += ["-c", scratch, "--extra_options", "prune_lm_head=true"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not (partial / GENAI_CONFIG_NAME).is_file():
                raise ArtifactError(
                    f"{' '.join(command)}: ended with {done.returncode}: {_last_line(done.stderr)}"
                )
        return output

    def float_directory(self) -> Path:
        """Return the model as a directory of float weights."""
        directory = self.directory()
        assert self._model is not None
        located = locate_model(self._model)
        if not located.is_gguf:
            return located.path
        output = directory / "float32"
        if not output.is_dir():
            from deploy.loading import load_model, quiet_transformers, save_tokenizer

            self._progress("writing the peers' model in float32")
            loaded = load_model(self._model)
            with staged_directory(output) as partial:
                with quiet_transformers():
                    loaded.model.save_pretrained(partial)
                save_tokenizer(loaded, partial)
        return output


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


def model_identity(reference: str) -> tuple[str, str]:
    """Return a model's name and the digest that stages record of it.

    Raises:
        ConfigError: It is not there, or has no weights.
        ArtifactError: A weight file is missing or damaged.
    """
    from deploy.weight_files import digest_files, find_weight_files

    located = locate_model(reference)
    if located.is_gguf:
        return located.name, digest_files([located.path])
    files: Sequence[Path] = find_weight_files(located.path)
    return located.name, digest_files([*files, located.path / CONFIG_NAME])


def recorded_model(export: Path) -> str:
    """Return the model that an export came from, as its maker named it, if it is still there.

    An export names it. One of an older version names only its checkpoint, which is looked for
    beside it.

    Raises:
        ConfigError: It is not recorded, or what is there now is another model.
    """
    manifest = read_manifest(export, *EXPORTS)
    model, digest = manifest.details.get("model"), manifest.details.get("model_digest")
    checkpoint = None if model else _checkpoint_beside(export, manifest.parents["checkpoint"])
    if checkpoint is not None:
        model, digest = checkpoint.config.get("model"), checkpoint.parents.get("model")
    if not isinstance(model, str):
        raise ConfigError(
            f"{export}: does not say which model it came from, and its checkpoint is not beside "
            f"it; name the model with --peer-model"
        )
    try:
        found = model_identity(model)[1]
    except (ConfigError, ArtifactError) as error:
        raise ConfigError(
            f"{export}: came from the model {model}, which is not there now ({error}); name it "
            f"with --peer-model"
        ) from error
    if found != digest:
        raise ConfigError(
            f"{export}: came from the model {model}, but what is there now is another (digest "
            f"{found[:12]}, expected {str(digest)[:12]}); name the model with --peer-model"
        )
    return model


def _checkpoint_beside(export: Path, digest: str) -> Manifest | None:
    for directory in sorted(export.resolve().parent.iterdir()):
        if directory.is_dir() and is_artifact(directory):
            manifest = read_manifest(directory)
            if manifest.digest == digest:
                return manifest
    return None
