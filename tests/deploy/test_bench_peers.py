from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import deploy.bench_peers
from deploy.artifact import MANIFEST_NAME
from deploy.bench_peers import (
    PeerSettings,
    Runtime,
    default_cache,
    model_identity,
    parse_peers,
    prepare_peers,
    recorded_model,
)
from deploy.errors import ArtifactError, ConfigError, StageOrderError
from tests.deploy.tiny_artifacts import make_checkpoint, make_export, save_model
from tests.deploy.tiny_classifiers import save_encoder
from tests.deploy.tiny_encoder_artifacts import make_encoder_export


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("peers")
    save_model(base / "model")
    make_checkpoint(base / "model", base / "checkpoint", "FP32")
    make_export(base / "checkpoint", base / "onnx")
    return base


def copy_with_details(export: Path, directory: Path, **details: object) -> Path:
    """Write what a peer's search reads of an export: its manifest."""
    raw = json.loads((export / MANIFEST_NAME).read_text())
    for name, value in details.items():
        if value is None:
            del raw["details"][name]
        else:
            raw["details"][name] = value
    directory.mkdir(parents=True)
    (directory / MANIFEST_NAME).write_text(json.dumps(raw))
    return directory


def test_peers_are_split_and_unknown_ones_refused_all_at_once() -> None:
    names = ("genai-int4", "genai:some/where", "llama.cpp:Q8_0", "llama.cpp:/a/b.gguf")
    assert parse_peers(" , ".join(names)) == names
    with pytest.raises(ConfigError) as caught:
        parse_peers("genai-int3,genai:,vllm,genai-int4,genai-int4")
    for said in ("'genai-int3' is none of", "'genai:'", "'vllm'", "named twice", "genai-int8"):
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match="expected genai-int4"):
        parse_peers(" , ")


def test_an_export_names_its_model_and_the_checkpoint_beside_an_older_one_does(
    base: Path, tmp_path: Path
) -> None:
    assert recorded_model(base / "onnx") == str(base / "model")
    old = {"model": None, "model_digest": None}
    beside = copy_with_details(base / "onnx", base / "older", **old)
    assert recorded_model(beside) == str(base / "model")
    alone = copy_with_details(base / "onnx", tmp_path / "alone" / "onnx", **old)
    with pytest.raises(ConfigError, match=r"does not say which model.*--peer-model"):
        recorded_model(alone)
    other = copy_with_details(base / "onnx", tmp_path / "other", model_digest="0" * 64)
    with pytest.raises(ConfigError, match=r"is another \(digest .*expected 000000000000"):
        recorded_model(other)
    gone = copy_with_details(base / "onnx", tmp_path / "gone", model="./absent.gguf")
    with pytest.raises(ConfigError, match=r"is not there now .*--peer-model"):
        recorded_model(gone)
    with pytest.raises(StageOrderError, match="kind onnx"):
        recorded_model(base / "checkpoint")


def test_a_built_peer_is_kept_and_a_failed_one_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def build(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        fails = command[command.index("-p") + 1] == "int8"
        if not fails:
            output = Path(command[command.index("-o") + 1])
            (output / "genai_config.json").write_text("{}")
        return subprocess.CompletedProcess(command, int(fails), "", "Traceback\nno such thing\n")

    monkeypatch.setattr(deploy.bench_peers.subprocess, "run", build)
    settings = PeerSettings(("genai-int4",), None, tmp_path)
    steps: list[str] = []
    (first,) = prepare_peers(base / "onnx", settings, steps.append)
    assert "building genai-int4" in steps
    assert first.runtime is Runtime.ONNX
    assert (first.path / "genai_config.json").is_file()
    assert first.path.parent.name == f"model-{model_identity(str(base / 'model'))[1][:12]}"
    assert commands[0][commands[0].index("-i") + 1] == str(base / "model")
    assert prepare_peers(base / "onnx", settings) == [first]
    assert len(commands) == 1
    with pytest.raises(ArtifactError, match="ended with 1: no such thing"):
        prepare_peers(base / "onnx", PeerSettings(("genai-int8",), None, tmp_path))
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]


def test_given_files_are_taken_and_absent_ones_refused(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.gguf"
    file.write_bytes(b"12345")
    names = (f"llama.cpp:{file}", f"genai:{base / 'onnx'}")
    gguf, genai = prepare_peers(base / "onnx", PeerSettings(names))
    assert (gguf.runtime, gguf.path, gguf.model_bytes) == (Runtime.LLAMA, file, 5)
    held = sum(path.stat().st_size for path in (base / "onnx").glob("model.onnx*"))
    assert (genai.path, genai.model_bytes) == (base / "onnx", held)
    for name, said in (
        (f"llama.cpp:{tmp_path / 'no.gguf'}", "no file"),
        ("llama.cpp:Q8_0", r"Q8_0.gguf; write it \(python benchmarks"),
        (f"genai:{base / 'model'}", "expected a directory with genai_config.json"),
    ):
        with pytest.raises(ConfigError, match=said):
            prepare_peers(base / "onnx", PeerSettings((name,), None, tmp_path))


def test_a_gguf_of_a_type_is_found_under_the_model(base: Path, tmp_path: Path) -> None:
    name, digest = model_identity(str(base / "model"))
    file = tmp_path / f"{name}-{digest[:12]}" / "Q4_0.gguf"
    file.parent.mkdir()
    file.write_bytes(b"1")
    settings = PeerSettings(("llama.cpp:Q4_0",), str(base / "model"), tmp_path)
    assert prepare_peers(base / "onnx", settings)[0].path == file


def test_torch_takes_the_model_as_it_is_and_is_all_that_runs_an_encoder(
    base: Path, tmp_path: Path
) -> None:
    (peer,) = prepare_peers(base / "onnx", PeerSettings(("torch",)))
    assert (peer.runtime, peer.path) == (Runtime.TORCH, base / "model")
    assert peer.model_bytes == (base / "model" / "model.safetensors").stat().st_size
    encoder = make_encoder_export(save_encoder(tmp_path / "bert"), tmp_path / "onnx", "W8A8")
    (peer,) = prepare_peers(encoder, PeerSettings(("torch",)))
    assert peer.path == tmp_path / "bert"
    with pytest.raises(ConfigError, match=r"genai-int4,llama.cpp:Q8_0: .*holds an encoder.*torch"):
        prepare_peers(encoder, PeerSettings(("genai-int4", "torch", "llama.cpp:Q8_0")))


def test_peers_are_kept_where_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some")
    assert default_cache() == Path("/some/rolora/peers")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache/rolora/peers"
