"""A tokenizer with a token more than its model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from deploy.calibration_text import calibration_for, disjoint_batches
from deploy.errors import ConfigError
from deploy.finetune import finetune
from deploy.known_tokens import require_known_tokens
from deploy.language_model import open_language_model
from deploy.loading import load_model
from tests.deploy.tiny_artifacts import finetune_settings, make_checkpoint, make_export, save_model

UNKNOWN = r"the text has token 262, and the model's embedding has tokens 0 to 261"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_model(tmp_path_factory.mktemp("tokens") / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<added>"])
    tokenizer.pad_token = "<added>"
    tokenizer.save_pretrained(directory)
    return directory


def write(path: Path, *words: str) -> str:
    path.write_text(" ".join(words) * 40, encoding="utf-8")
    return str(path)


def test_the_greatest_is_named() -> None:
    require_known_tokens([[], [0, 9], np.array([[3], [4]]), np.zeros((1, 0), int)], 10)
    with pytest.raises(ConfigError, match=r"has token 11, and .* tokens 0 to 9"):
        require_known_tokens([[0, 9], np.array([[3], [11]])], 10)


def test_calibration_needs_text_without_it(model: Path, tmp_path: Path) -> None:
    loaded = load_model(model)
    usual, unknown = (
        write(tmp_path / f"{name}.txt", "some words ", name) for name in ("usual", "<added>")
    )
    for cut in (calibration_for, disjoint_batches):
        assert cut(loaded, usual, windows=2, tokens=32)
        with pytest.raises(ConfigError, match=UNKNOWN):
            cut(loaded, unknown, windows=2, tokens=32)


def test_training_pads_with_what_the_model_knows(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a" * (3 + i), "completion": "b"} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert finetune(finetune_settings(model, data, "lora"), tmp_path / "adapter") is not None
    rows[3]["completion"] = "<added>"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=UNKNOWN):
        finetune(finetune_settings(model, data, "lora"), tmp_path / "other")


def test_a_model_and_its_export_refuse_it_in_the_same_words(model: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(model, tmp_path / "checkpoint", "W8A8", weights="rtn")
    make_export(checkpoint, tmp_path / "onnx")
    known, unknown = np.array([5, 261]), np.array([5, 262])
    for directory in (model, checkpoint, tmp_path / "onnx"):
        opened = open_language_model(str(directory)).model
        assert opened.logits(known).shape == (2, 262)
        for ask in (
            lambda opened=opened: opened.logits(unknown),
            lambda opened=opened: opened.generate([unknown.tolist()], 2, frozenset()),
        ):
            with pytest.raises(ConfigError, match=UNKNOWN):
                ask()
