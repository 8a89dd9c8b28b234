from __future__ import annotations

import pytest

from reslora.config import AdapterConfig, Initialization, Structure, parse_initialization
from reslora.settings import TrainSettings


def test_scaling_is_alpha_over_rank() -> None:
    assert AdapterConfig(rank=4, alpha=6).scaling == 1.5


def test_rank_stabilized_scaling_is_alpha_over_the_root_of_the_rank() -> None:
    config = AdapterConfig(rank=4, alpha=6, rslora=True, structure=Structure.BLOCK, dropout=0.5)
    assert config.scaling == 3.0
    longer = config.with_rank(36)
    assert (longer.scaling, longer.rank, longer.alpha) == (3.0, 36, 18.0)
    assert (longer.structure, longer.rslora, longer.dropout) == (None, True, 0.5)
    assert AdapterConfig(rank=4, alpha=6).with_rank(36) == AdapterConfig(rank=36, alpha=54)


@pytest.mark.parametrize(
    "name",
    ["pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "lora_ga", "mica", "", "Default"],
)
def test_an_initialization_that_does_not_begin_at_zero_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"supported are default, gaussian, orthogonal\. Others"):
        parse_initialization(name)


def test_orthogonal_needs_an_even_rank_and_no_foreign_a() -> None:
    orthogonal = Initialization.ORTHOGONAL
    assert parse_initialization("orthogonal") is orthogonal
    with pytest.raises(ValueError, match=r"even rank, got 3; .* does not begin at zero .* middle"):
        AdapterConfig(rank=3, structure=Structure.MIDDLE, initialization=orthogonal)
    AdapterConfig(rank=4, structure=Structure.MIDDLE, depth=0, initialization=orthogonal)


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
