from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deploy.encoder_calibration
from deploy.encoder_calibration import labelled_batches, single_rows, text_batches
from deploy.encoder_loading import load_classifier, load_encoder
from deploy.errors import ConfigError
from tests.deploy.tiny_classifiers import ROWS, save_encoder, write_labelled


def test_rows_stand_alone_and_lose_their_padding(tmp_path: Path) -> None:
    opened = load_classifier(save_encoder(tmp_path / "bert", with_head=True))
    batches = labelled_batches(opened, str(write_labelled(tmp_path / "rows.jsonl")))
    assert all(batch.keys() == {*opened.loaded.tokenizer.model_input_names} for batch in batches)
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    rows = single_rows(batches)
    assert len(rows) == len(ROWS)
    for row, example in zip(rows, ROWS, strict=True):
        expected = opened.loaded.tokenizer(str(example["sentence"]))
        for key, tensor in row.items():
            assert tensor.tolist() == [expected[key]]
        assert row["attention_mask"].all()


def test_texts_are_read_with_their_marks_and_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, _ = load_encoder(save_encoder(tmp_path / "bert"))
    text = tmp_path / "text.txt"
    text.write_text("first\n\n \nsecond, and longer\nthird\n")
    batches = text_batches(loaded, str(text), token_limit=12)
    assert [batch["input_ids"].shape[1] for batch in batches] == [7, 12, 7]
    for batch in batches:
        assert batch["input_ids"][0, 0] == 1
        assert batch["input_ids"][0, -1] == 2
    monkeypatch.setattr(deploy.encoder_calibration, "CALIBRATION_TEXTS", 1)
    (only,) = text_batches(loaded, str(text), token_limit=12)
    assert torch.equal(only["input_ids"], batches[0]["input_ids"])
    with pytest.raises(ConfigError, match=r"none\.jsonl: no such file"):
        text_batches(loaded, str(tmp_path / "none.jsonl"), token_limit=12)


def test_our_own_sample_serves_by_default(tmp_path: Path) -> None:
    loaded, _ = load_encoder(save_encoder(tmp_path / "bert"))
    batches = text_batches(loaded, None, token_limit=80)
    assert len(batches) > 20
    assert max(batch["input_ids"].shape[1] for batch in batches) == 80
