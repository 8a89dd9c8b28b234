from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deploy.encoder_session import OnnxEncoder
from deploy.errors import ArtifactError, ConfigError
from tests.deploy.tiny_classifiers import save_encoder
from tests.deploy.tiny_encoder_artifacts import make_encoder_export
from tests.reslora.tiny_encoder import ENCODERS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("session")
    return make_encoder_export(save_encoder(base / "bert"), base / "onnx", "W8A8")


def test_a_mask_and_types_that_are_not_given_are_those_of_one_whole_text(export: Path) -> None:
    encoder = OnnxEncoder(export, threads=1)
    ids = np.array([[1, 30, 31, 2], [1, 40, 41, 2]])
    whole = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    whole["token_type_ids"] = np.zeros_like(ids)
    found, expected = encoder.run({"input_ids": ids}), encoder.run(whole)
    assert found.keys() == {"last_hidden_state"}
    assert np.array_equal(found["last_hidden_state"], expected["last_hidden_state"])
    whole["token_type_ids"] = np.ones_like(ids)
    assert not np.array_equal(found["last_hidden_state"], encoder.run(whole)["last_hidden_state"])


@pytest.mark.parametrize("kind", ENCODERS)
def test_batches_that_the_model_cannot_read_are_refused(kind: str, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / kind, kind)
    encoder = OnnxEncoder(make_encoder_export(model, tmp_path / "onnx", "W8A8"))
    for ids in (np.full((2, 81), 5), np.full((2, 4), 300), np.full((1, 3), -301)):
        with pytest.raises(ConfigError, match="ONNX Runtime refuses it"):
            encoder.run({"input_ids": ids})
    found = encoder.run({"input_ids": np.full((2, 4), 5)})
    assert found["last_hidden_state"].shape == (2, 4, 24)


def test_a_directory_without_a_graph_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model.onnx: ONNX Runtime cannot load it"):
        OnnxEncoder(tmp_path)


def test_the_example_script_compares_sentences_without_torch(export: Path) -> None:
    blocked = "import sys; sys.modules.update(torch=None, transformers=None); import runpy; "
    script = f"sys.argv = ['embed.py', {str(export)!r}, 'one text', 'another, longer', 'x']; " + (
        f"runpy.run_path({str(ROOT / 'examples' / 'embed.py')!r}, run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", blocked + script], capture_output=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr.decode()
    lines = result.stdout.decode().splitlines()
    assert len(lines) == 3
    assert lines[0] == " 1.000  one text"
