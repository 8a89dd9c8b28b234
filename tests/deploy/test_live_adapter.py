from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy.errors import ArtifactError, StageOrderError
from deploy.finetune import finetune
from deploy.language_model import open_language_model
from deploy.parity import relative_error
from reslora.config import AdapterConfig, Structure
from tests.deploy.tiny_artifacts import (
    finetune_settings,
    make_adapter,
    make_checkpoint,
    save_model,
    write_rows,
)

PROMPTS = [[40, 50, 60], [41, 42, 43, 44, 45, 46, 47], [99]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("live")
    save_model(base / "model", num_hidden_layers=3)
    save_model(base / "other", num_hidden_layers=2)
    write_rows(base / "rows.jsonl")
    for structure in (Structure.INPUT, Structure.MIDDLE):
        settings = finetune_settings(base / "model", base / "rows.jsonl", "reslora")
        adapter = AdapterConfig(rank=2, alpha=8.0, structure=structure)
        finetune(replace(settings, adapter=adapter), base / structure)
    make_adapter(base / "model", base / "rolora", "rolora")
    return base


@pytest.mark.parametrize("structure", ["input", "middle"])
def test_generation_over_a_cache_is_that_of_full_passes_with_the_shortcuts_alive(
    base: Path, structure: str
) -> None:
    live = open_language_model(str(base / "model"), adapter=base / structure).model
    plain = open_language_model(str(base / "model")).model
    answers = live.generate(PROMPTS, 12, frozenset())
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = list(prompt)
        for token in answer:
            assert live.logits(np.array(ids))[-1].argmax() == token
            ids.append(token)
        assert len(answer) == 12
    ids = np.array(PROMPTS[1])
    assert relative_error(live.logits(ids), plain.logits(ids)) > 1e-3  # the adapter does something
    batch = live.batch_logits(np.stack([ids, ids[::-1]]), 2)
    assert relative_error(batch[0], live.logits(ids)[2:]) < 1e-5


def test_an_unmerged_rolora_adapter_is_the_merged_one(base: Path, tmp_path: Path) -> None:
    live = open_language_model(str(base / "model"), adapter=base / "rolora").model
    merged = make_checkpoint(base / "model", tmp_path / "merged", "FP32", adapter=base / "rolora")
    ids = np.arange(40, 72)
    expected = open_language_model(str(merged)).model.logits(ids)
    assert relative_error(live.logits(ids), expected) < 1e-4
    plain = open_language_model(str(base / "model")).model
    assert relative_error(plain.logits(ids), expected) > 1e-3


def test_an_adapter_of_another_model_is_refused(base: Path) -> None:
    with pytest.raises(ArtifactError, match="give the model it was trained on"):
        open_language_model(str(base / "other"), adapter=base / "input")
    with pytest.raises(StageOrderError, match="got an artifact of kind adapter"):
        open_language_model(str(base / "input"), adapter=base / "input")
