"""Both stage orders, end to end, through the real stages: what one writes, the next one reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.artifact import ArtifactKind, read_manifest, verify_files
from deploy.calibration_text import sample_text
from deploy.language_model import open_language_model
from deploy.loading import load_model
from deploy.parity import relative_error
from deploy.run import Sampling, TextGenerator
from deploy.text_quality import Task, cut_windows, evaluate_model
from reslora.adapter import load_adapter
from reslora.merge import MergeMethod, merge_adapter
from tests.deploy.tiny_artifacts import make_adapter, make_checkpoint, make_export, save_model

IDS = np.arange(30, 94)


@dataclass(frozen=True)
class Line:
    """What one run of the stages left."""

    model: Path
    adapter: Path
    exact: Path
    """Merged and rotated, not quantized."""
    checkpoint: Path
    onnx: Path

    def logits(self, directory: Path) -> np.ndarray:
        return open_language_model(str(directory), threads=1).model.logits(IDS)


def run_stages(base: Path, method: str, model_type: str, scheme: str) -> Line:
    model = save_model(base / "model", model_type)
    adapter = make_adapter(model, base / "adapter", method)
    line = Line(model, adapter, base / "fp32", base / "checkpoint", base / "onnx")
    make_checkpoint(model, line.exact, "FP32", adapter=adapter)
    make_checkpoint(model, line.checkpoint, scheme, adapter=adapter)
    make_export(line.checkpoint, line.onnx)
    return line


@pytest.fixture(scope="module")
def merged_then_rotated(tmp_path_factory: pytest.TempPathFactory) -> Line:
    return run_stages(tmp_path_factory.mktemp("reslora"), "reslora", "qwen2", "W8A8")


@pytest.fixture(scope="module")
def rotated_then_merged(tmp_path_factory: pytest.TempPathFactory) -> Line:
    return run_stages(tmp_path_factory.mktemp("rolora"), "rolora", "llama", "W8A8")


@pytest.fixture(params=["merged_then_rotated", "rotated_then_merged"])
def line(request: pytest.FixtureRequest) -> Line:
    found: Line = request.getfixturevalue(request.param)
    return found


def test_the_chain_of_parents_is_unbroken(line: Line) -> None:
    adapter, checkpoint, onnx = (
        verify_files(directory) for directory in (line.adapter, line.checkpoint, line.onnx)
    )
    kinds = [manifest.kind for manifest in (adapter, checkpoint, onnx)]
    assert kinds == [ArtifactKind.ADAPTER, ArtifactKind.CHECKPOINT, ArtifactKind.ONNX]
    base = load_model(line.model).parents()
    assert adapter.parents.items() >= base.items()
    assert checkpoint.parents == base | {"adapter": adapter.digest}
    assert onnx.parents == {"checkpoint": checkpoint.digest}


def test_the_export_computes_what_was_trained(line: Line) -> None:
    exact = line.logits(line.exact)
    untrained = line.logits(line.model)
    exported = line.logits(line.onnx)
    assert relative_error(exported, line.logits(line.checkpoint)) < 0.05
    assert relative_error(exported, exact) < 0.1, "8 bits"
    assert relative_error(exported, exact) < 0.7 * relative_error(untrained, exact)


def test_merged_then_rotated_is_the_adapter_merged_into_the_plain_model(
    merged_then_rotated: Line,
) -> None:
    loaded = load_model(merged_then_rotated.model)
    with torch.no_grad():
        merge_adapter(loaded.model, load_adapter(merged_then_rotated.adapter), MergeMethod.EXACT)
        expected = loaded.model(input_ids=torch.from_numpy(IDS)[None]).logits[0].numpy()
    found = merged_then_rotated.logits(merged_then_rotated.exact)
    assert relative_error(found, expected) < 1e-5


def test_rotated_then_merged_is_not_the_adapter_merged_into_the_plain_model(
    rotated_then_merged: Line,
) -> None:
    details = [
        read_manifest(directory).details["rotation"]
        for directory in (rotated_then_merged.adapter, rotated_then_merged.checkpoint)
    ]
    assert details[0] == details[1]
    loaded = load_model(rotated_then_merged.model)
    with torch.no_grad():
        merge_adapter(loaded.model, load_adapter(rotated_then_merged.adapter), MergeMethod.EXACT)
        wrong_basis = loaded.model(input_ids=torch.from_numpy(IDS)[None]).logits[0].numpy()
    found = rotated_then_merged.logits(rotated_then_merged.exact)
    assert relative_error(wrong_basis, found) > 1e-2


def test_the_export_is_evaluated_against_the_model_and_answers(line: Line) -> None:
    model, reference = (
        open_language_model(str(directory), threads=1) for directory in (line.onnx, line.exact)
    )
    windows = cut_windows(model.tokenizer, sample_text("evaluation.txt"), 2, 64)
    results = evaluate_model(model.model, reference.model, windows, frozenset(Task))
    assert results["ppl_ratio"] == pytest.approx(1.0, abs=0.1)
    assert results["top1_agreement"] > 0.8
    generator = TextGenerator(line.onnx)
    prompt = generator.chat_prompt([{"role": "user", "content": "say red"}])
    tokens = list(generator.generate(generator.encode(prompt), Sampling(max_new_tokens=6)))
    assert len(tokens) <= 6
    assert all(0 <= token < 262 for token in tokens)
