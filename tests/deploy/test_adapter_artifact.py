from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.adapter_artifact import open_adapter
from deploy.artifact import MANIFEST_NAME, hash_file
from deploy.errors import ArtifactError, ConfigError, StageOrderError
from tests.deploy.tiny_artifacts import make_adapter, save_model

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("adapter")
    return make_adapter(save_model(base / "model"), base / "rolora", "rolora")


def sign_again(directory: Path) -> None:
    """Make the manifest agree with the files, so that later checks are reached."""
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    for name, record in manifest["files"].items():
        path = directory / name
        record |= {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))


def test_an_adapter_comes_back_with_its_basis_and_its_name(adapter: Path) -> None:
    stored = open_adapter(adapter)
    assert stored.directory == adapter
    assert stored.manifest_digest == stored.manifest.digest
    assert stored.adapter.config.rank == 2
    assert stored.rotation is not None


def test_another_base_is_refused_by_name_and_digest(adapter: Path) -> None:
    stored = open_adapter(adapter)
    stored.require_base(stored.manifest.parents["model"], "any name")
    with pytest.raises(ArtifactError) as caught:
        stored.require_base("f" * 64, "other-model")
    message = str(caught.value)
    for part in (str(adapter), "other-model", "f" * 12, stored.manifest.parents["model"][:12]):
        assert part in message
    assert caught.value.exit_code == 4


def test_changed_bytes_are_refused(adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    content = bytearray((copy / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (copy / WEIGHTS).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: expected sha256"):
        open_adapter(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: missing"):
        open_adapter(copy)


def test_a_tensor_that_is_no_number_is_named(adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    tensors = load_file(copy / WEIGHTS)
    key = sorted(tensors)[0]
    tensors[key] = torch.full_like(tensors[key], float("inf"))
    save_file(tensors, copy / WEIGHTS)
    sign_again(copy)
    with pytest.raises(ArtifactError) as caught:
        open_adapter(copy)
    assert key in str(caught.value)


def test_a_lost_rotation_is_an_error_and_not_another_basis(adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    (copy / "rotation.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"rotation.safetensors"):
        open_adapter(copy)


def test_what_is_no_adapter_of_ours_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        open_adapter(tmp_path / "absent")
    with pytest.raises(StageOrderError, match="make one with rolora finetune"):
        open_adapter(adapter.parent / "model")
