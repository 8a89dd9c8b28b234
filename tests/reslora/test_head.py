from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedModel

from reslora.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    load_adapter,
    restore_adapter,
    save_adapter,
)
from reslora.attach import attach_adapters, detach_adapters
from reslora.config import AdapterConfig, Structure
from reslora.merge import MergeMethod, merge_adapter
from reslora.peft_export import recompress, to_peft_adapter, write_peft_adapter
from tests.reslora.tiny_encoder import ENCODERS, build_encoder, encoder_batches, encoder_targets

PLAIN = AdapterConfig(rank=3, alpha=4.5)
BLOCK = AdapterConfig(rank=3, structure=Structure.BLOCK)
CONFIGS = [PLAIN, *(AdapterConfig(rank=3, structure=kind) for kind in Structure)]


def attach_trained(model: PreTrainedModel, config: AdapterConfig = BLOCK) -> PeftModel:
    """Attach, and fill blocks and head with what training might have left."""
    attached = attach_adapters(model, config, encoder_targets(model), head="classifier")
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return attached.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in encoder_batches(1)])


def merged_logits(base: PreTrainedModel, adapter: Adapter) -> torch.Tensor:
    merge_adapter(base, adapter, MergeMethod.EXACT)
    return logits(base)


@pytest.mark.parametrize("model_type", ENCODERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_attaching_changes_no_output_and_trains_blocks_and_head(
    model_type: str, config: AdapterConfig
) -> None:
    model = build_encoder(model_type)
    before = logits(model)
    names = encoder_targets(model)
    attached = attach_adapters(model, config, names, head="classifier")
    assert torch.equal(logits(attached.eval()), before)
    trained = [name for name, p in attached.named_parameters() if p.requires_grad]
    assert len([name for name in trained if "lora_" in name]) == 2 * len(names)
    heads = [name for name in trained if "lora_" not in name]
    assert len(heads) == {"bert": 2, "roberta": 4}[model_type]
    assert all(".classifier.modules_to_save." in name for name in heads)


@pytest.mark.parametrize("model_type", ENCODERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_head_is_stored_and_restored(
    model_type: str, config: AdapterConfig, tmp_path: Path
) -> None:
    model = build_encoder(model_type)
    fresh = copy.deepcopy(model)
    attached = attach_trained(model, config)
    save_adapter(attached, config, tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.head_name == "classifier"
    assert set(adapter.factors) == set(encoder_targets(fresh))
    restored = attach_adapters(fresh, config, list(adapter.factors), head="classifier").eval()
    assert not torch.equal(logits(restored), logits(attached))
    restore_adapter(restored, tmp_path)
    assert torch.equal(logits(restored), logits(attached))


@pytest.mark.parametrize("model_type", ENCODERS)
def test_detaching_gives_the_untrained_head_back(model_type: str) -> None:
    model = build_encoder(model_type)
    before = copy.deepcopy(model.state_dict())
    attached = attach_trained(model)
    assert detach_adapters(attached) is model
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("model_type", ENCODERS)
def test_peft_loads_a_plain_adapter_with_its_head(model_type: str, tmp_path: Path) -> None:
    model = build_encoder(model_type)
    fresh = copy.deepcopy(model)
    attached = attach_trained(model, PLAIN)
    save_adapter(attached, PLAIN, tmp_path)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    assert torch.equal(logits(loaded), logits(attached))
    again = loaded.peft_config["default"]
    assert (again.task_type, again.peft_type) == ("SEQ_CLS", "LORA")


def test_pefts_own_classification_adapter_loads_and_merges(tmp_path: Path) -> None:
    model = build_encoder()
    fresh = copy.deepcopy(model)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"], init_lora_weights=False
    )
    theirs = get_peft_model(model, config).eval()
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    found = merged_logits(fresh, load_adapter(tmp_path))
    torch.testing.assert_close(found, logits(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ENCODERS)
@pytest.mark.parametrize("config", [PLAIN, BLOCK])
def test_an_exact_merge_takes_the_head_along(
    model_type: str, config: AdapterConfig, tmp_path: Path
) -> None:
    model = build_encoder(model_type)
    base, headless = copy.deepcopy(model), copy.deepcopy(model)
    attached = attach_trained(model, config)
    save_adapter(attached, config, tmp_path)
    adapter = load_adapter(tmp_path)
    torch.testing.assert_close(merged_logits(base, adapter), logits(attached), rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # with the old head it is another model
        for new, old in zip(
            base.classifier.parameters(), headless.classifier.parameters(), strict=True
        ):
            new.copy_(old)
    assert (logits(base) - logits(attached)).abs().max() > 1e-2


def test_a_merged_adapter_leaves_with_its_head(tmp_path: Path) -> None:
    model = build_encoder()
    fresh = copy.deepcopy(model)
    attached = attach_trained(model)
    save_adapter(attached, BLOCK, tmp_path / "ours")
    plain = to_peft_adapter(load_adapter(tmp_path / "ours"), MergeMethod.EXACT)
    assert recompress(plain, 2).adapter.head.keys() == plain.head.keys()
    write_peft_adapter(plain, tmp_path / "theirs")
    assert load_adapter(tmp_path / "theirs").head_name == "classifier"
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "theirs")).eval()
    torch.testing.assert_close(logits(loaded), logits(attached), rtol=1e-4, atol=1e-5)


def test_heads_that_do_not_fit_are_refused(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    attached = attach_trained(build_encoder())
    save_adapter(attached, BLOCK, tmp_path)
    adapter = load_adapter(tmp_path)
    more = build_encoder(labels=5)
    before = copy.deepcopy(more.state_dict())
    with pytest.raises(ValueError, match=r"classifier.bias: adapter has \[3\], .* \[5\]"):
        merge_adapter(more, adapter, MergeMethod.EXACT)
    assert all(torch.equal(tensor, before[key]) for key, tensor in more.state_dict().items())
    wider = attach_adapters(more, BLOCK, encoder_targets(more), head="classifier")
    with pytest.raises(ValueError, match=r"the model \[5\]"):
        restore_adapter(wider, tmp_path)
    for head in ("score", "bert"):
        with pytest.raises(ValueError, match="classification head"):
            attach_adapters(build_encoder(), BLOCK, encoder_targets(build_encoder()), head=head)
    with pytest.raises(ValueError, match="classification head"):
        attach_adapters(llama, BLOCK, ["model.layers.0.mlp.up_proj"], head="classifier")
    with pytest.raises(ValueError, match="lies in the head"):
        attach_adapters(build_encoder(), BLOCK, ["classifier"], head="classifier")


def test_damaged_heads_are_refused(tmp_path: Path) -> None:
    save_adapter(attach_trained(build_encoder()), BLOCK, tmp_path)
    path = tmp_path / WEIGHTS_FILE
    whole = load_file(path)
    key = "base_model.model.classifier.weight"
    save_file(whole | {key: whole[key] * torch.nan}, path)
    with pytest.raises(ValueError, match=r"classifier\.weight holds 72 NaN"):
        load_adapter(tmp_path)
    save_file({name: t for name, t in whole.items() if "classifier" not in name}, path)
    with pytest.raises(ValueError, match="expected the tensors of one classification head"):
        load_adapter(tmp_path)
    save_file(whole, path)
    load_adapter(tmp_path)
    settings = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings | {"task_type": "CAUSAL_LM"}))
    with pytest.raises(ValueError, match="modules_to_save"):
        load_adapter(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings | {"modules_to_save": ["pooler"]}))
    with pytest.raises(ValueError, match="modules_to_save"):
        load_adapter(tmp_path)
