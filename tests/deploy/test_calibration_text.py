from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deploy.calibration_text import calibration_batches, sample_path, sample_text
from deploy.errors import ConfigError
from tests.conftest import build_tiny_tokenizer


@pytest.mark.parametrize("name", ["calibration.txt", "evaluation.txt"])
def test_a_sample_ships_with_the_package(name: str) -> None:
    text = sample_text(name)
    assert len(text.split()) > 500
    assert sample_path(name).read_text(encoding="utf-8") == text


def test_what_calibrates_is_not_what_is_evaluated() -> None:
    lines = {
        name: {line for line in sample_text(name).splitlines() if len(line) > 20}
        for name in ("calibration.txt", "evaluation.txt")
    }
    assert not lines["calibration.txt"] & lines["evaluation.txt"]


def test_batches_are_windows_of_the_text(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 10)
    batches = calibration_batches(tokenizer, str(path), windows=3, tokens=16)
    assert [batch["input_ids"].shape for batch in batches] == [(1, 16)] * 3
    assert batches[0]["input_ids"].dtype == torch.int64
    assert tokenizer.decode(batches[0]["input_ids"][0]) == "abcdefghijabcdef"
    assert tokenizer.decode(batches[2]["input_ids"][0]) == "efghijabcdefghij"


def test_a_short_text_shortens_the_windows_and_none_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    path = tmp_path / "text.txt"
    path.write_text("abc")
    batches = calibration_batches(tokenizer, str(path), windows=2, tokens=512)
    assert [batch["input_ids"].shape for batch in batches] == [(1, 3)] * 2
    path.write_text("a")
    with pytest.raises(ConfigError, match="at least 2 tokens of text, got 1"):
        calibration_batches(tokenizer, str(path), windows=2, tokens=512)


def test_the_default_is_our_sample() -> None:
    tokenizer = build_tiny_tokenizer()
    batch = calibration_batches(tokenizer, None, windows=1, tokens=32)[0]["input_ids"][0]
    assert sample_text("calibration.txt").startswith(tokenizer.decode(batch))
