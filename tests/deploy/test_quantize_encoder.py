from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deploy.artifact import ArtifactKind, read_manifest, verify_files
from deploy.checkpoint import Checkpoint
from deploy.checkpoint_settings import RotationChoice
from deploy.encoder_checkpoint import EncoderCheckpoint
from deploy.encoder_loading import load_classifier, load_encoder
from deploy.errors import ArtifactError, ConfigError, StageOrderError, UnsupportedModelError
from deploy.quantize_encoder import quantize_encoder
from reslora.config import Structure
from rolora.equalization import Equalized
from rolora.linear import QuantizedEmbedding, QuantizedLinear
from rolora.mixed_precision import Budget
from rolora.overrides import Override
from rolora.rotation import RotationName
from tests.deploy.tiny_artifacts import make_checkpoint, save_model
from tests.deploy.tiny_classifiers import (
    make_classifier_adapter,
    save_encoder,
    write_labelled,
)
from tests.deploy.tiny_encoder_artifacts import encoder_settings, make_encoder_checkpoint
from tests.reslora.tiny_encoder import ENCODERS, encoder_batches


@pytest.fixture(params=[(kind, head) for kind in ENCODERS for head in (False, True)], ids=str)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind, head = request.param
    return save_encoder(tmp_path / kind, kind, with_head=head)


def outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        found: Any = model(**batch)
    if "logits" in found:
        return found.logits
    return found.last_hidden_state[batch["attention_mask"].bool()]


def test_another_text_in_the_same_calibration_file_is_another_run(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", "bert")
    text = tmp_path / "text.txt"
    text.write_text("one two three four five. " * 40, encoding="utf-8")
    for _ in range(2):
        make_encoder_checkpoint(model, tmp_path / "out", "W8A8", calibration=str(text))
    text.write_text("other words entirely, and more of them. " * 40, encoding="utf-8")
    with pytest.raises(ConfigError, match="exists already"):
        make_encoder_checkpoint(model, tmp_path / "out", "W8A8", calibration=str(text))


@pytest.mark.parametrize(("scheme", "bound"), [("W8A8", 0.1), ("W4A8", 0.5)])
def test_a_checkpoint_is_near_its_model_and_quantizes_what_it_says(
    model: Path, scheme: str, bound: float, tmp_path: Path
) -> None:
    checkpoint = make_encoder_checkpoint(model, tmp_path / "out", scheme, weights="gptq")
    with EncoderCheckpoint(checkpoint) as opened:
        quantized, names = opened.load_model(), opened.names
        linears = set(opened.names.linears())
        assert opened.manifest.details["linears"].keys() == linears
        assert (opened.labels is None) == (names.head_linears is None)
    integers = {n for n, m in quantized.named_modules() if isinstance(m, QuantizedLinear)}
    assert integers == linears
    assert len(linears) == 12
    assert isinstance(quantized.get_submodule(names.embedding), QuantizedEmbedding)
    floats = {n for n, m in quantized.named_modules() if isinstance(m, nn.Linear)}
    assert floats == set(names.head_linears or ())
    loaded, _ = load_encoder(model)
    for batch in encoder_batches(1):
        expected, found = outputs(loaded.model, batch), outputs(quantized, batch)
        assert torch.linalg.norm(found - expected) < bound * torch.linalg.norm(expected)
        assert not torch.equal(found, expected)


def test_a_float_checkpoint_is_its_model(model: Path, tmp_path: Path) -> None:
    checkpoint = make_encoder_checkpoint(model, tmp_path / "out", "FP32")
    loaded, _ = load_encoder(model)
    with EncoderCheckpoint(checkpoint) as opened:
        rebuilt = opened.load_model()
    for batch in encoder_batches(2):
        assert torch.equal(outputs(loaded.model, batch), outputs(rebuilt, batch))


def test_gptq_beats_rounding_to_nearest_on_what_it_saw(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert")
    checkpoint = make_encoder_checkpoint(model, tmp_path / "out", "W4A8", weights="gptq")
    rounding: Any = read_manifest(checkpoint).details["rounding"]
    assert len(rounding) == 12
    for error in rounding.values():
        assert error["output_error"] <= error["nearest_output_error"]
    assert any(e["output_error"] < 0.9 * e["nearest_output_error"] for e in rounding.values())


def test_equal_inputs_give_equal_files(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert")
    for name in ("a", "b"):
        make_encoder_checkpoint(model, tmp_path / name, "W4A8", weights="gptq")
    first, second = (read_manifest(tmp_path / name) for name in ("a", "b"))
    assert first.digest == second.digest
    make_encoder_checkpoint(model, tmp_path / "a", "W4A8", weights="gptq")
    with pytest.raises(ConfigError, match="exists already and was made from other"):
        make_encoder_checkpoint(model, tmp_path / "a", "W8A8", weights="gptq")


def test_an_adapter_is_merged_with_its_head_and_labels(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert")
    adapter = make_classifier_adapter(model, tmp_path / "adapter", Structure.INPUT)
    checkpoint = make_encoder_checkpoint(
        model, tmp_path / "out", "W8A8", adapter=adapter, merge=None, weights="gptq"
    )
    manifest = verify_files(checkpoint)
    assert manifest.kind is ArtifactKind.CHECKPOINT
    assert manifest.parents.keys() == {"model", "tokenizer", "adapter"}
    assert manifest.details["labels"] == ["0", "1"]
    merge: Any = manifest.details["merge"]
    assert merge["kl_mean"] >= 0.0
    assert json.loads((checkpoint / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    (tmp_path / "adapter.jsonl").unlink()
    with pytest.raises(ConfigError, match="is not there or has changed; give --calibration"):
        make_encoder_checkpoint(
            model, tmp_path / "again", "W8A8", adapter=adapter, merge=None, weights="gptq"
        )
    other = save_encoder(tmp_path / "other", layers=3)
    with pytest.raises(ArtifactError, match="give the model it was trained on"):
        make_encoder_checkpoint(other, tmp_path / "again", "W8A8", adapter=adapter)
    assert not (tmp_path / "again").exists()


def test_rows_of_the_task_calibrate_a_classifier(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert", with_head=True)
    rows = write_labelled(tmp_path / "rows.jsonl")
    text = tmp_path / "text.txt"
    text.write_text("one line\nand another\n")
    on_rows = make_encoder_checkpoint(
        model, tmp_path / "rows", "W8A8", weights="gptq", calibration=str(rows)
    )
    default = make_encoder_checkpoint(model, tmp_path / "default", "W8A8", weights="gptq")
    assert read_manifest(on_rows).files != read_manifest(default).files
    with pytest.raises(ConfigError, match=r"calibration: .*text.txt"):
        make_encoder_checkpoint(
            model, tmp_path / "text", "W8A8", weights="gptq", calibration=str(text)
        )
    bare = save_encoder(tmp_path / "bare")
    make_encoder_checkpoint(bare, tmp_path / "text", "W8A8", weights="gptq", calibration=str(text))


def test_single_linears_and_static_scales_follow_the_options(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert")
    checkpoint = make_encoder_checkpoint(
        model,
        tmp_path / "out",
        "W4A8",
        static="all",
        overrides=(Override.parse("down=W8"), Override.parse("layer.0.*=W6")),
    )
    with EncoderCheckpoint(checkpoint) as opened:
        bits = [opened.linear(fqn).weight.bits for fqn in opened.names.linears()]
        assert bits == [6] * 6 + [4] * 5 + [8]
        assert all(opened.has(f"{fqn}.input_scale") for fqn in opened.names.linears())
    with pytest.raises(ConfigError, match=r"'gate' matches no linear; roles are q, k, v, o, up"):
        make_encoder_checkpoint(
            model, tmp_path / "other", "W4A8", overrides=(Override.parse("gate=W8"),)
        )


def test_what_only_decoders_have_is_refused_at_once(tmp_path: Path) -> None:
    settings = encoder_settings("nowhere", "W8A8", head_bits=8)
    settings = replace(
        settings,
        rotation=RotationChoice(frozenset({RotationName.R1})),
        kv_bits=8,
        equalize=Equalized.ALL,
        budget=Budget.parse("W4.5"),
    )
    with pytest.raises(ConfigError, match=r"5 faults") as raised:
        quantize_encoder(settings, tmp_path / "out")
    for fault in ("LayerNorms", "KV cache", "--mixed-precision", "--head-bits"):
        assert fault in str(raised.value)
    with pytest.raises(ConfigError, match="is not rotated"):
        quantize_encoder(
            replace(encoder_settings("nowhere", "W8A8"), stored_rotation=tmp_path), tmp_path / "out"
        )


def test_other_kinds_are_told_where_they_belong(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "bert")
    decoder = save_model(tmp_path / "llama")
    with pytest.raises(UnsupportedModelError, match="'llama' is a decoder"):
        make_encoder_checkpoint(decoder, tmp_path / "out", "W8A8")
    with pytest.raises(UnsupportedModelError, match=r"'bert' is an encoder.*take it as it is"):
        make_checkpoint(encoder, tmp_path / "out", "W8A8")
    checkpoint = make_encoder_checkpoint(encoder, tmp_path / "out", "W8A8")
    with pytest.raises(UnsupportedModelError, match="'bert' is an encoder"):
        Checkpoint(checkpoint)
    with pytest.raises(StageOrderError, match="expected a model, got an artifact of kind check"):
        load_encoder(checkpoint)
    with pytest.raises(UnsupportedModelError, match="is a decoder"):
        EncoderCheckpoint(make_checkpoint(decoder, tmp_path / "decoder", "FP32"))


def test_bad_weights_and_widths_are_named(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert")
    with pytest.raises(ConfigError, match="embedding bits: 4 bits have a scale for 64, 32, 16"):
        make_encoder_checkpoint(model, tmp_path / "out", "W8A8", embedding_bits=4)
    with pytest.raises(ConfigError, match="group size 16"):
        make_encoder_checkpoint(model, tmp_path / "out", "W4A8", group_size=16)
    classifier = load_classifier(save_encoder(tmp_path / "head", with_head=True)).loaded.model
    with torch.no_grad():
        classifier.get_parameter("bert.encoder.layer.1.output.dense.weight")[3, 4] = torch.nan
    classifier.save_pretrained(tmp_path / "head")
    with pytest.raises(ArtifactError, match=r"layer.1.output.dense.weight holds NaN"):
        make_encoder_checkpoint(tmp_path / "head", tmp_path / "out", "W8A8")
    assert not (tmp_path / "out").exists()
