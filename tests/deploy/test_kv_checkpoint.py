"""Checkpoints with a quantized key-value cache, from the settings to the rebuilt model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from deploy.artifact import MANIFEST_NAME
from deploy.checkpoint import Checkpoint
from deploy.checkpoint_reader import WEIGHTS_NAME
from deploy.checkpoint_settings import CheckpointSettings, default_rotations, parse_rotation
from deploy.errors import ArtifactError, ConfigError
from rolora.kv_attention import CODEC_NAME
from rolora.rotation import DEFAULT_ROTATIONS, RotationKind, RotationName
from tests.deploy.tiny_artifacts import make_checkpoint, save_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
IDS = torch.arange(24)[None] * 5 % 60
SCALE = f"model.layers.1.self_attn.{CODEC_NAME}.key_scale"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def eight_bits(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("kv") / "kv8"
    rotate = "r1,r2,r3,r4"
    return make_checkpoint(models["llama"], output, "W8A8", weights="rtn", rotate=rotate, kv_bits=8)


def load(directory: Path) -> tuple[Checkpoint, PreTrainedModel]:
    with Checkpoint(directory) as checkpoint:
        return checkpoint, checkpoint.load_model()


def run(model: PreTrainedModel, ids: Tensor, past: object = None) -> tuple[Tensor, object]:
    with torch.inference_mode():
        output = model(input_ids=ids, past_key_values=past, use_cache=True)
    return output.logits, output.past_key_values


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_rebuilt_model_rounds_its_cache_in_prompts_and_steps_alike(
    models: dict[str, Path], tmp_path: Path, family: str, bits: int
) -> None:
    directory = make_checkpoint(models[family], tmp_path / "kv", "FP32", kv_bits=bits)
    checkpoint, model = load(directory)
    assert checkpoint.kv_bits == bits
    assert checkpoint.rotation is not None
    assert (RotationName.R3 in checkpoint.rotation.names) is (bits == 4)
    full, _ = run(model, IDS)
    prompt, past = run(model, IDS[:, :20])
    steps = [prompt]
    for token in range(20, IDS.shape[1]):
        logits, past = run(model, IDS[:, token : token + 1], past)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=0, atol=1e-4)
    _, float_cache = load(make_checkpoint(models[family], tmp_path / "float", "FP32"))
    changed = float((run(float_cache, IDS)[0] - full).abs().max())
    assert changed > {8: 1e-4, 4: 1e-3}[bits]


def test_the_checkpoint_is_the_model_that_was_calibrated(eight_bits: Path) -> None:
    with Checkpoint(eight_bits) as checkpoint:
        model, stored = checkpoint.load_model(), load_file(eight_bits / WEIGHTS_NAME)
        for block in checkpoint.names.blocks:
            prefix = f"{block.attention}.{CODEC_NAME}"
            codec = model.get_submodule(prefix)
            parts = checkpoint.cache_parts(block)
            assert parts.keys() == {"key_scale", "value_scale"}
            for name, part in parts.items():
                assert np.array_equal(codec.get_buffer(name).numpy(), part)
                assert np.array_equal(stored[f"{prefix}.{name}"], part)
            assert np.array_equal(codec.get_buffer("rotation").numpy(), checkpoint.r3)


def test_r3_with_a_float_cache_changes_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    plain = make_checkpoint(models["qwen3"], tmp_path / "plain", "FP32")
    rotated = make_checkpoint(models["qwen3"], tmp_path / "r3", "FP32", rotate="r1,r2,r3,r4")
    (without, float_model), (with_r3, model) = load(plain), load(rotated)
    assert without.r3 is None
    assert with_r3.r3 is not None
    torch.testing.assert_close(run(model, IDS)[0], run(float_model, IDS)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rotate", ["none", "r1,r2,r4"])
def test_a_chosen_rotation_without_r3_stays_without(
    models: dict[str, Path], tmp_path: Path, rotate: str
) -> None:
    directory = make_checkpoint(models["llama"], tmp_path / "c", "FP32", rotate=rotate, kv_bits=4)
    checkpoint, model = load(directory)
    assert checkpoint.kv_bits == 4
    assert checkpoint.r3 is None
    assert torch.isfinite(run(model, IDS)[0]).all()


def test_only_a_cache_of_four_bits_gets_r3_by_default() -> None:
    assert default_rotations(16) == frozenset(RotationName) - {RotationName.R3}
    assert default_rotations(8) == default_rotations(16) == DEFAULT_ROTATIONS
    assert default_rotations(4) == frozenset(RotationName)
    seeded = parse_rotation(None, RotationKind.HADAMARD, 5, kv_bits=4)
    assert seeded is not None
    assert seeded.names == frozenset(RotationName)


def test_other_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 8, 4, or 16 .* got 6"):
        CheckpointSettings("m", None, None, None, None, None, kv_bits=6)


def test_a_model_whose_keys_are_not_finite_is_refused(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model")
    tensors = load_file(directory / WEIGHTS_NAME)
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = 3e38
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"KV cache cannot be .*layers\.1\.self_attn: .*infinite"):
        make_checkpoint(directory, tmp_path / "c", "FP32", rotate="none", kv_bits=8)
    assert not (tmp_path / "c").exists()


def damaged(source: Path, copy: Path, value: np.ndarray | None, kv_bits: object) -> Checkpoint:
    shutil.copytree(source, copy)
    tensors = load_file(copy / WEIGHTS_NAME)
    tensors.pop(SCALE)
    if value is not None:
        tensors[SCALE] = value
    save_file(tensors, copy / WEIGHTS_NAME, metadata={"format": "pt"})
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    manifest["details"]["kv_bits"] = kv_bits
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest))
    return Checkpoint(copy, verify=False)


@pytest.mark.parametrize(
    ("value", "kv_bits", "message"),
    [
        (None, 8, r"key_scale' is missing"),
        (np.ones((2, 1, 3), np.float32), 8, r"key_scale: expected shape \(2, 1, 16\), got"),
        (np.full((2, 1, 16), -1, np.float32), 8, r"layers\.1\.self_attn: .*key_scale: .*positive"),
        (np.ones((2, 1, 16), np.float32), 4, "key_gain' is missing"),
        (None, 6, "kv_bits are unreadable: .*got 6"),
        (None, "8", "kv_bits are unreadable"),
    ],
)
def test_a_damaged_cache_is_refused(
    eight_bits: Path, tmp_path: Path, value: np.ndarray | None, kv_bits: object, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        damaged(eight_bits, tmp_path / "copy", value, kv_bits).load_model()


def test_a_checkpoint_of_an_older_version_has_a_float_cache(
    models: dict[str, Path], tmp_path: Path
) -> None:
    directory = make_checkpoint(models["llama"], tmp_path / "old", "FP32")
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    del manifest["details"]["kv_bits"]
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))
    with Checkpoint(directory, verify=False) as checkpoint:
        assert checkpoint.kv_bits == 16
