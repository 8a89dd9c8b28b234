from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploy.artifact import ArtifactKind, Manifest, new_artifact, write_manifest
from deploy.checkpoint import Checkpoint
from deploy.errors import ArtifactError, ConfigError, StageOrderError
from deploy.kernels import Kernel
from deploy.language_model import (
    OnnxLanguageModel,
    TorchLanguageModel,
    load_tokenizer,
    open_language_model,
)
from deploy.parity import relative_error
from deploy.session import OnnxDecoder
from tests.deploy.tiny_artifacts import make_checkpoint, make_export, save_model

IDS = np.arange(40, 72)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One float model as it came, as a rotated checkpoint, and as an export."""
    base = tmp_path_factory.mktemp("forms")
    model = save_model(base / "model", "mistral")
    checkpoint = make_checkpoint(model, base / "checkpoint", "FP32")
    make_export(checkpoint, base / "onnx")
    return {"model": model, "checkpoint": checkpoint, "onnx": base / "onnx"}


def test_every_form_of_a_model_gives_its_logits_through_one_door(forms: dict[str, Path]) -> None:
    opened = {name: open_language_model(str(path), threads=1) for name, path in forms.items()}
    logits = {name: entry.model.logits(IDS) for name, entry in opened.items()}
    for name, found in logits.items():
        assert found.shape == (32, 262)
        assert found.dtype == np.float32
        assert relative_error(found, logits["model"]) < 1e-4
        assert opened[name].model.name == str(forms[name])
        assert (
            opened[name].tokenizer("abc")["input_ids"]
            == opened["model"].tokenizer("abc")["input_ids"]
        )


def test_a_damaged_export_is_refused(forms: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in forms["onnx"].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model.onnx.data: expected sha256"):
        open_language_model(str(copy))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "adapter") as directory:
        write_manifest(directory, Manifest(ArtifactKind.ADAPTER))
    with pytest.raises(StageOrderError, match="merge it first: rolora merge --model"):
        open_language_model(str(tmp_path / "adapter"))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or directory"):
        open_language_model(str(tmp_path / "absent"))
    with pytest.raises(ArtifactError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_prompts_of_unequal_length_go_on_together(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    directory = make_checkpoint(model, tmp_path / "checkpoint", "W8A8", weights="rtn")
    make_export(directory, tmp_path / "onnx", Kernel.AUTO)
    with Checkpoint(directory) as checkpoint:
        torch_model = TorchLanguageModel("torch", checkpoint.load_model())
    onnx_model = OnnxLanguageModel("onnx", OnnxDecoder(tmp_path / "onnx", threads=1))
    for lengths in ((5, 7), (3, 12, 5, 9)):
        prompts = [[(7 * at + length) % 250 + 6 for at in range(length)] for length in lengths]
        expected = torch_model.generate(prompts, 6, frozenset())
        assert onnx_model.generate(prompts, 6, frozenset()) == expected
