"""Quantization-aware training: what was trained is what is packed, exported and run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import deploy.finetune
from deploy.adapter_artifact import open_adapter, open_trained_adapter
from deploy.artifact import read_manifest
from deploy.checkpoint import Checkpoint
from deploy.errors import ArtifactError, ConfigError, StageOrderError
from deploy.finetune import FinetuneSettings, Method, finetune
from deploy.loading import load_model
from deploy.pack import PackSettings, pack
from deploy.quantized_training import (
    SCALES_FILE,
    LearnFrom,
    build_aware_model,
    open_start,
    restore_scales,
    training_extension,
)
from reslora.adapter import restore_adapter
from reslora.batches import IGNORED
from reslora.config import AdapterConfig, Structure
from rolora.linear import QuantizedLinear
from tests.deploy.tiny_artifacts import (
    finetune_settings,
    make_adapter,
    make_checkpoint,
    make_export,
    save_model,
    write_rows,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("aware") / "tiny")


@pytest.fixture(scope="module")
def start(model: Path) -> Path:
    make_checkpoint(model, model.parent / "start", "W4A4", static=True)
    return model.parent / "start"


@pytest.fixture(scope="module")
def data(model: Path) -> Path:
    return write_rows(model.parent / "rows.jsonl")


def settings_for(model: Path, data: Path, start: Path, **changes: object) -> FinetuneSettings:
    settings = finetune_settings(model, data, "rolora", learning_rate=2e-2, max_steps=6)
    return replace(settings, start=start, **changes)


@pytest.fixture(scope="module")
def trained(model: Path, data: Path, start: Path) -> Path:
    finetune(settings_for(model, data, start), model.parent / "trained")
    return model.parent / "trained"


@pytest.fixture(scope="module")
def packed(model: Path, trained: Path) -> Path:
    pack(PackSettings(str(model), trained), model.parent / "packed")
    return model.parent / "packed"


def tokens(length: int = 24) -> torch.Tensor:
    return torch.randint(0, 60, (2, length), generator=torch.Generator().manual_seed(3))


def test_before_training_the_model_rounds_as_its_start(model: Path, start: Path) -> None:
    loaded = load_model(model)
    with open_start(start, loaded) as checkpoint:
        config = AdapterConfig(rank=2, alpha=2.0, dropout=0.0)
        aware = build_aware_model(
            loaded, checkpoint, config, list(checkpoint.names.linears()), seed=0
        )
        reference = checkpoint.load_model()
        for fqn, layer in aware.layers.items():
            quantized = reference.get_submodule(fqn)
            assert isinstance(quantized, QuantizedLinear)
            assert torch.equal(layer.integers(), quantized.weight), fqn
            x = torch.randn(5, quantized.in_features, generator=torch.Generator().manual_seed(1))
            attached = aware.peft_model.get_base_model().get_submodule(fqn)
            torch.testing.assert_close(attached(x), quantized(x), rtol=1e-5, atol=1e-5)


def test_a_batch_counts_by_its_share_of_the_tokens_of_its_step(model: Path, start: Path) -> None:
    loaded = load_model(model)
    with open_start(start, loaded) as checkpoint:
        config = AdapterConfig(rank=2, alpha=2.0, dropout=0.0)
        targets = list(checkpoint.names.linears())
        aware = build_aware_model(loaded, checkpoint, config, targets, seed=0)
        loss = training_extension(aware, None, torch.float32).loss
    labels = tokens()
    labels[:, :9] = IGNORED
    inputs = {"input_ids": tokens(), "labels": labels}
    with torch.no_grad():
        alone, part = (loss(aware.peft_model, inputs, items) for items in (None, 2 * 15 * 4))
    torch.testing.assert_close(4 * part, alone)


def test_what_is_packed_is_what_the_last_forward_pass_rounded_to(
    model: Path, start: Path, trained: Path, packed: Path
) -> None:
    loaded = load_model(model)
    with open_start(start, loaded) as checkpoint, Checkpoint(packed) as result:
        config = open_trained_adapter(trained).adapter.config
        targets = list(checkpoint.names.linears())
        aware = build_aware_model(loaded, checkpoint, config, targets, seed=9)
        restore_adapter(aware.peft_model, trained)
        restore_scales(aware, trained)
        changed = total = 0
        for fqn, layer in aware.layers.items():
            linear = result.linear(fqn)
            assert (result.integers(linear) == layer.integers().numpy()).all()
            assert (result.array(f"{fqn}.weight_scale") == layer.scale().detach().numpy()).all()
            changed += int(
                (result.integers(linear) != checkpoint.integers(checkpoint.linear(fqn))).sum()
            )
            total += linear.in_features * linear.out_features
        assert result.manifest.details["trained"] == {"integers_changed": changed / total}
        assert changed > 0, "training moved no integer: the comparison shows nothing"
        ids = tokens()
        hidden = aware.peft_model(input_ids=ids).logits
        quantized = result.load_model()
        head = quantized.get_submodule(checkpoint.names.head)
        assert isinstance(head, QuantizedLinear)
        logits = torch.nn.functional.linear(hidden, head.dequantized_weight())
        found = quantized(input_ids=ids).logits
        torch.testing.assert_close(found, logits.detach(), rtol=2e-3, atol=2e-3)


def test_scales_of_weights_and_inputs_are_trained(start: Path, packed: Path) -> None:
    with Checkpoint(start) as before, Checkpoint(packed) as after:
        block = before.names.blocks[0]
        for fqn in block.linears():
            key = f"{fqn}.weight_scale"
            assert (before.array(key) != after.array(key)).any(), fqn
        key = f"{block.query}.input_scale"
        assert before.array(key) != after.array(key)
        assert after.array(key) == after.array(f"{block.value}.input_scale")
        clips = [c.linear(block.down).activation for c in (before, after)]
        assert clips[0] is not None
        assert clips[1] is not None
        assert clips[0].clip_ratio != clips[1].clip_ratio


def test_a_packed_checkpoint_exports(packed: Path, tmp_path: Path) -> None:
    report = make_export(packed, tmp_path / "onnx")
    assert report.to_dict()["parity"]


def test_training_from_the_teacher_and_from_labels_differ(
    model: Path, data: Path, start: Path, trained: Path, tmp_path: Path
) -> None:
    finetune(settings_for(model, data, start, learn_from=LearnFrom.LABELS), tmp_path / "labels")
    manifests = [read_manifest(each) for each in (trained, tmp_path / "labels")]
    assert manifests[0].digest != manifests[1].digest


def test_a_resumed_run_ends_with_the_same_adapter_and_scales(
    model: Path, data: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(model, data, start)
    settings = replace(settings, training=replace(settings.training, save_every=2, max_steps=4))
    whole = finetune(settings, tmp_path / "whole")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(deploy.finetune, "save_adapter", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings, tmp_path / "out")
    shutil.rmtree(tmp_path / "out.training" / "checkpoint-4")
    resumed = finetune(settings, tmp_path / "out", resume=True)
    assert whole is not None
    assert resumed is not None
    assert resumed.to_dict()["training"]["resumed_from_step"] == 2
    assert resumed.manifest.digest == whole.manifest.digest


def test_block_shortcuts_are_packed_too(model: Path, data: Path, tmp_path: Path) -> None:
    make_checkpoint(model, tmp_path / "start", "W4A8", rotate="r1,r4")
    settings = settings_for(model, data, tmp_path / "start")
    adapter = replace(settings.adapter, structure=Structure.BLOCK)
    finetune(replace(settings, adapter=adapter), tmp_path / "block")
    report = pack(PackSettings(str(model), tmp_path / "block"), tmp_path / "packed")
    assert report.manifest.details["trained"]["integers_changed"] > 0  # type: ignore[index, call-overload]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": Method.LORA}, "the method must be rolora"),
        ({"adapter": AdapterConfig(2, 2.0, 0.1)}, "use dropout 0"),
        ({"adapter": AdapterConfig(2, 2.0, 0.0, Structure.INPUT, 1)}, "use structure block"),
        ({"adapter": AdapterConfig(2, 2.0, 0.0, Structure.BLOCK, 1)}, "scales of its own"),
    ],
)
def test_what_cannot_be_inside_a_weight_is_refused(
    changes: dict[str, object], message: str, model: Path, data: Path, start: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(settings_for(model, data, start, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shortcut_between_rotations_of_their_own_is_refused(
    model: Path, data: Path, tmp_path: Path
) -> None:
    start = make_checkpoint(model, tmp_path / "start", "W4A4", weights="rtn", equalize="none")
    shortcut = AdapterConfig(2, 2.0, 0.0, Structure.BLOCK, 1)
    with pytest.raises(ConfigError, match="R2 of its own"):
        finetune(settings_for(model, data, start, adapter=shortcut), tmp_path / "out")


def test_a_shortcut_between_scales_of_their_own_is_refused_where_there_are_some(
    model: Path, data: Path, tmp_path: Path
) -> None:
    shortcut = AdapterConfig(2, 2.0, 0.0, Structure.BLOCK, 1)
    for equalize, targets in (("inner", "all"), ("all", "q,k,gate")):
        start = make_checkpoint(model, tmp_path / equalize, "W8A8", equalize=equalize)
        settings = settings_for(model, data, start, adapter=shortcut, targets=targets)
        with pytest.raises(ConfigError, match=r"channel scales of its own.*--equalize none"):
            finetune(settings, tmp_path / "out")
    settings = settings_for(model, data, tmp_path / "inner", adapter=shortcut, targets="q,k,gate")
    finetune(settings, tmp_path / "between")


def test_a_start_of_another_model_is_refused(data: Path, start: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", rope_theta=20000.0)
    with pytest.raises(ArtifactError, match="give the model it was made of"):
        finetune(settings_for(other, data, start), tmp_path / "out")


def test_training_can_start_from_what_it_packed_before(
    model: Path, data: Path, packed: Path, tmp_path: Path
) -> None:
    finetune(settings_for(model, data, packed), tmp_path / "further")
    report = pack(PackSettings(str(model), tmp_path / "further"), tmp_path / "packed")
    with Checkpoint(packed) as before, Checkpoint(report.output) as after:
        fqn = before.names.blocks[0].down
        assert (before.integers(before.linear(fqn)) != after.integers(after.linear(fqn))).any()


def test_a_start_that_holds_an_adapter_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", "rolora")
    make_checkpoint(model, tmp_path / "start", "W4A8", adapter=adapter, rotate=None)
    with pytest.raises(ConfigError, match="holds a merged adapter"):
        finetune(settings_for(model, data, tmp_path / "start"), tmp_path / "out")


def test_a_float_start_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    make_checkpoint(model, tmp_path / "float", "FP32")
    with pytest.raises(ConfigError, match="nothing in it is quantized"):
        finetune(settings_for(model, data, tmp_path / "float"), tmp_path / "out")


def test_an_aware_adapter_is_no_change_of_the_float_model(trained: Path) -> None:
    with pytest.raises(StageOrderError, match="rolora pack"):
        open_adapter(trained)


def test_pack_refuses_a_float_adapter_and_another_start(
    model: Path, trained: Path, tmp_path: Path
) -> None:
    plain = make_adapter(model, tmp_path / "plain", "rolora")
    with pytest.raises(StageOrderError, match="trained on float weights"):
        pack(PackSettings(str(model), plain), tmp_path / "out")
    make_checkpoint(model, tmp_path / "start", "W4A8")
    with pytest.raises(StageOrderError, match="give with --start the one"):
        pack(PackSettings(str(model), trained, tmp_path / "start"), tmp_path / "out")


def test_scales_that_are_not_finite_are_refused(
    model: Path, start: Path, trained: Path, tmp_path: Path
) -> None:
    loaded = load_model(model)
    with open_start(start, loaded) as checkpoint:
        config = AdapterConfig(rank=2, alpha=2.0, dropout=0.0)
        targets = list(checkpoint.names.linears())
        aware = build_aware_model(loaded, checkpoint, config, targets, seed=0)
    tensors = load_file(trained / SCALES_FILE)
    name = f"{targets[0]}.weight_scale"
    tensors[name][1] = torch.nan
    save_file(tensors, tmp_path / SCALES_FILE)
    with pytest.raises(ArtifactError, match=f"{name} is not finite; train with a lower"):
        restore_scales(aware, tmp_path)


def test_damaged_scales_are_refused(model: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    (tmp_path / "copy" / SCALES_FILE).write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=SCALES_FILE):
        pack(PackSettings(str(model), tmp_path / "copy"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
