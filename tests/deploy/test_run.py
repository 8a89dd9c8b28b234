from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.checkpoint import Checkpoint
from deploy.errors import ArtifactError, ConfigError, StageOrderError
from deploy.run import Sampling, TextGenerator
from tests.deploy.tiny_artifacts import make_checkpoint, make_export, save_model

PROMPT = "hello world"


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    base = tmp_path_factory.mktemp("run")
    model = save_model(base / "m", request.param)
    checkpoint = make_checkpoint(model, base / "c", "W8A8", weights="rtn")
    make_export(checkpoint, base / "onnx")
    return checkpoint, TextGenerator(base / "onnx")


def torch_greedy(checkpoint: Path, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """Return greedy tokens of the torch reference, and by how much each led its runner-up."""
    with Checkpoint(checkpoint) as opened:
        model = opened.load_model()
    sequence, leads = list(ids), []
    with torch.inference_mode():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([sequence])).logits[0, -1]
            best = torch.topk(logits, 2).values
            leads.append(float(best[0] - best[1]))
            sequence.append(int(logits.argmax()))
            if sequence[-1] == 2:
                return sequence[len(ids) : -1], leads
    return sequence[len(ids) :], leads


def test_greedy_tokens_in_stock_genai_are_the_torch_references(pair: tuple) -> None:
    checkpoint, generator = pair
    ids = generator.encode(PROMPT)
    found = list(generator.generate(ids, Sampling(max_new_tokens=24)))
    expected, leads = torch_greedy(checkpoint, ids, 24)
    assert min(leads) > 1e-4, "a tie: choose another prompt"
    assert found == expected
    assert len(found) > 3


def test_pieces_join_to_the_text_of_the_tokens(pair: tuple) -> None:
    _, generator = pair
    sampling = Sampling(max_new_tokens=8)
    tokens = list(generator.generate(generator.encode(PROMPT), sampling))
    pieces = list(generator.stream(PROMPT, sampling))
    assert len(pieces) == len(tokens)


def test_a_seed_decides_the_sample(pair: tuple) -> None:
    _, generator = pair
    ids = generator.encode(PROMPT)

    def sample(seed: int) -> list[int]:
        return list(generator.generate(ids, Sampling(12, 1.5, 0.9, seed)))

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1


def test_the_chat_template_is_the_models(pair: tuple) -> None:
    _, generator = pair
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    expected = "<|system|>be<eos><|user|>hi<eos><|assistant|>"
    assert generator.chat_prompt(messages) == expected


def test_prompts_that_cannot_run_are_refused(pair: tuple) -> None:
    _, generator = pair
    with pytest.raises(ConfigError, match="expected some text"):
        list(generator.stream("", Sampling()))
    with pytest.raises(ConfigError, match="128 tokens, the model's context 128"):
        list(generator.stream("a" * 128, Sampling()))
    assert 0 < len(list(generator.generate(list(np.arange(6, 130)), Sampling()))) <= 4


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_sampling_out_of_range_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="--"):
        Sampling(**values)  # type: ignore[arg-type]


def test_other_directories_are_refused(pair: tuple, tmp_path: Path) -> None:
    checkpoint, generator = pair
    with pytest.raises(StageOrderError, match="rolora export"):
        TextGenerator(checkpoint)
    with pytest.raises(ConfigError, match="no such directory"):
        TextGenerator(tmp_path / "absent")
    copy = shutil.copytree(generator.directory, tmp_path / "copy")
    (copy / "model.onnx").write_bytes(b"rubbish")
    with pytest.raises(ArtifactError, match="onnxruntime-genai cannot load it"):
        TextGenerator(copy)
