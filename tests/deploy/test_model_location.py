from __future__ import annotations

import json
from pathlib import Path

import pytest

import deploy.model_location
from deploy.model_location import is_encoder
from tests.deploy.tiny_artifacts import save_model
from tests.deploy.tiny_classifiers import save_encoder


def test_an_encoder_is_known_by_its_config_alone(tmp_path: Path) -> None:
    assert is_encoder("minilm-l6")
    assert is_encoder(save_encoder(tmp_path / "roberta", "roberta"))
    assert not is_encoder(save_model(tmp_path / "llama"))
    (tmp_path / "only").mkdir()
    assert not is_encoder(tmp_path / "only")
    for text, expected in (
        (json.dumps({"model_type": "bert"}), True),
        ("[1]", False),
        ("{", False),
    ):
        (tmp_path / "only" / "config.json").write_text(text)
        assert is_encoder(str(tmp_path / "only")) is expected
    for name in ("smollm2-135m", str(tmp_path / "absent"), "m.gguf", "a b", "no/such-model"):
        assert not is_encoder(name)


def test_of_a_hub_id_the_config_is_fetched_unless_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "roberta"}))
    fetched: list[str] = []

    def download(repository: str, file: str) -> str:
        fetched.append(f"{repository}/{file}")
        return str(config)

    monkeypatch.setattr(deploy.model_location, "hf_hub_download", download)
    assert not is_encoder("some/encoder", fetch=False)
    assert fetched == []
    assert is_encoder("some/encoder")
    assert fetched == ["some/encoder/config.json"]
    monkeypatch.setattr(deploy.model_location, "try_to_load_from_cache", lambda *_: str(config))
    assert is_encoder("some/encoder", fetch=False)
    assert len(fetched) == 1
