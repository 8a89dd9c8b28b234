from __future__ import annotations

import pytest

from reslora.config import AdapterConfig, Structure
from reslora.settings import TrainSettings


def test_scaling_is_alpha_over_rank() -> None:
    assert AdapterConfig(rank=4, alpha=6).scaling == 1.5


def test_plain_lora_reaches_no_previous_block() -> None:
    assert AdapterConfig(depth=3).reach == 0
    assert AdapterConfig(structure=Structure.BLOCK, depth=3).reach == 3


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"rank .* got 0; alpha .* got -1; dropout .* got 1.0; depth"
    ):
        AdapterConfig(rank=0, alpha=-1, dropout=1.0, depth=-2)


def test_all_training_faults_are_named_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"batch_size .* got 0; .*max_tokens .* got 3; learning_rate"
    ):
        TrainSettings(batch_size=0, max_tokens=3, learning_rate=float("nan"))
