from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.architecture import decoder_names
from deploy.artifact import ArtifactKind, Manifest
from deploy.errors import ArtifactError
from deploy.rotation_file import ROTATION_NAME, load_rotation, save_rotation
from rolora.rotation import RotationKind, RotationName, RotationPlan
from tests.conftest import build_tiny_model


def draw(kind: RotationKind = RotationKind.HADAMARD, seed: int = 0) -> RotationPlan:
    names = decoder_names(build_tiny_model("llama").config)
    return RotationPlan.draw(names, frozenset(RotationName), kind, seed)


def manifest_of(details: dict[str, Any]) -> Manifest:
    return Manifest(ArtifactKind.CHECKPOINT, details=details)


@pytest.mark.parametrize("kind", RotationKind)
def test_what_was_drawn_comes_back(kind: RotationKind, tmp_path: Path) -> None:
    plan = draw(kind, seed=5)
    manifest = manifest_of(save_rotation(tmp_path, plan))
    text = manifest.to_text()
    found = load_rotation(tmp_path, Manifest.from_text(text, "here"))
    assert found is not None
    assert (found.digest, found.kind, found.seed, found.names) == (plan.digest, kind, 5, plan.names)
    assert plan.digest != draw(kind, seed=6).digest


def test_no_rotation_leaves_no_trace(tmp_path: Path) -> None:
    assert save_rotation(tmp_path, None) == {}
    assert list(tmp_path.iterdir()) == []
    assert load_rotation(tmp_path, manifest_of({})) is None


def test_a_missing_damaged_or_other_rotation_is_refused(tmp_path: Path) -> None:
    manifest = manifest_of(save_rotation(tmp_path, draw()))
    path = tmp_path / ROTATION_NAME
    tensors = load_file(path)

    def refused() -> None:
        with pytest.raises(
            ArtifactError, match=r"rotation.safetensors: not the rotation"
        ) as caught:
            load_rotation(tmp_path, manifest)
        assert "make the artifact again" in str(caught.value)

    path.unlink()
    refused()
    path.write_bytes(b"rubbish")
    refused()
    save_file(draw(seed=1).to_tensors(), path)
    refused()
    key = next(key for key in tensors if key.startswith("R1"))
    flipped = tensors[key].clone()
    flipped[0] = -flipped[0]
    save_file(tensors | {key: flipped}, path)
    refused()
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    refused()
    save_file(tensors, path)
    found = load_rotation(tmp_path, manifest)
    assert found is not None
    torch.testing.assert_close(found.to_tensors()[key], tensors[key], rtol=0, atol=0)


def test_metadata_that_is_no_object_is_refused(tmp_path: Path) -> None:
    save_rotation(tmp_path, draw())
    with pytest.raises(ArtifactError, match="expected an object, got str"):
        load_rotation(tmp_path, manifest_of({"rotation": "R1"}))
