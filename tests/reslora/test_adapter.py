from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from reslora.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter, restore_adapter, save_adapter
from reslora.attach import attach_adapters
from reslora.config import AdapterConfig, Initialization, Structure

BLOCK = AdapterConfig(rank=3, alpha=4.5, dropout=0.1, structure=Structure.BLOCK, depth=2)
FIRST_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def attached(
    model: LlamaForCausalLM, targets: list[str], config: AdapterConfig = BLOCK
) -> PeftModel:
    peft_model = attach_adapters(model, config, targets)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return peft_model.eval()


def change_config(directory: Path, **values: Any) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def saved(llama: LlamaForCausalLM, targets: list[str], tmp_path: Path) -> Path:
    save_adapter(attached(llama, targets), BLOCK, tmp_path)
    return tmp_path


def test_round_trip(llama: LlamaForCausalLM, targets: list[str], tmp_path: Path) -> None:
    model = attached(llama, targets)
    save_adapter(model, BLOCK, tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.config == BLOCK
    assert set(adapter.factors) == set(targets)
    for fqn, (a, b) in adapter.factors.items():
        layer: Any = llama.get_submodule(fqn)
        assert torch.equal(a, layer.lora_A["default"].weight)
        assert torch.equal(b, layer.lora_B["default"].weight)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    restore_adapter(fresh, tmp_path)
    ids = torch.arange(9)[None]
    assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_same_adapter_same_bytes(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    model = attached(llama, targets)
    for name in ("a", "b"):
        save_adapter(model, BLOCK, tmp_path / name)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_plain_peft_refuses_a_shortcut(saved: Path, llama: LlamaForCausalLM) -> None:
    with pytest.raises(KeyError, match="RESLORA"):
        PeftModel.from_pretrained(llama, str(saved))


def test_pefts_own_saving_keeps_the_refusal(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    attached(llama, targets).save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["peft_type"] == "RESLORA"
    assert load_adapter(tmp_path).config == BLOCK


def test_plain_lora_goes_to_peft_and_back(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    base = copy.deepcopy(llama)
    config = AdapterConfig(rank=3, alpha=4.5)
    model = attached(llama, targets, config)
    save_adapter(model, config, tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_an_adapter_made_by_peft_is_read(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = get_peft_model(llama, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    adapter = load_adapter(tmp_path)
    assert adapter.config == AdapterConfig(rank=4, alpha=8)
    assert adapter.shapes()["model.layers.0.self_attn.q_proj"] == (24, 24)


def test_saving_refuses_nan_and_writes_nothing(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    model = attached(llama, targets)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n)[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight holds 1 NaN"):
        save_adapter(model, BLOCK, tmp_path)
    assert not list(tmp_path.iterdir())


def test_saving_refuses_another_configuration(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="asked to save"):
        save_adapter(attached(llama, targets), AdapterConfig(rank=3), tmp_path)


def test_missing_files(saved: Path) -> None:
    (saved / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: missing"):
        load_adapter(saved)
    (saved / CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match=r"adapter_config.json: missing"):
        load_adapter(saved)


@pytest.mark.parametrize("cut", [4, 100, 1000])
def test_truncated_weights(saved: Path, cut: int) -> None:
    data = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(data[:-cut])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: damaged"):
        load_adapter(saved)


def test_damaged_config(saved: Path) -> None:
    (saved / CONFIG_FILE).write_text('{"r": ')
    with pytest.raises(ValueError, match=r"adapter_config.json: unreadable"):
        load_adapter(saved)
    (saved / CONFIG_FILE).write_text("[]")
    with pytest.raises(ValueError, match=r"expected a JSON object, got list"):
        load_adapter(saved)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"structure": "spiral"}, "spiral"),
        ({"r": 0}, "rank must be at least 1"),
        ({"r": 4}, r"expected lora_A \[4, in\] .* got \[3, 40\]"),
        ({"use_dora": True, "bias": "all"}, "use_dora, bias"),
        ({"alora_invocation_tokens": [9, 10]}, "alora_invocation_tokens"),
    ],
)
def test_wrong_config(saved: Path, values: dict[str, Any], message: str) -> None:
    change_config(saved, **values)
    with pytest.raises(ValueError, match=message):
        load_adapter(saved)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_of_a_changed_base_is_refused(saved: Path, start: str) -> None:
    change_config(saved, init_lora_weights=start)
    with pytest.raises(ValueError, match=rf"init_lora_weights is '{start}', .* changed base"):
        load_adapter(saved)


@pytest.mark.parametrize("start", [None, True, False, "gaussian", "eva", "mica"])
def test_a_start_that_left_the_base_alone_is_no_obstacle(saved: Path, start: object) -> None:
    change_config(saved, init_lora_weights=start)
    expected = Initialization.GAUSSIAN if start == "gaussian" else Initialization.DEFAULT
    assert load_adapter(saved).config.initialization is expected


def test_files_from_before_rslora_are_read_as_they_were_meant(saved: Path) -> None:
    values = json.loads((saved / CONFIG_FILE).read_text())
    for key in ("use_rslora", "init_lora_weights"):
        del values[key]
    (saved / CONFIG_FILE).write_text(json.dumps(values))
    assert load_adapter(saved).config == BLOCK
    change_config(saved, use_rslora=True)
    stabilized = load_adapter(saved).config
    assert stabilized.scaling == pytest.approx(BLOCK.scaling * BLOCK.rank**0.5)


def test_wrong_tensors(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS_FILE)

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        save_file(changed, saved / WEIGHTS_FILE)
        with pytest.raises(ValueError, match=message):
            load_adapter(saved)

    refused({k: v for k, v in tensors.items() if k != FIRST_B}, f"{FIRST_B} is missing")
    refused({**tensors, FIRST_B: tensors[FIRST_B] * float("inf")}, f"{FIRST_B} holds .* infinite")
    refused({**tensors, FIRST_B: tensors[FIRST_B].int()}, f"{FIRST_B} has dtype torch.int32")
    refused({**tensors, "lm_head.weight": torch.ones(2)}, "unexpected key 'lm_head.weight'")
    refused({}, "holds no adapter tensors")


def test_restoring_into_other_layers_is_refused(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    other = attach_adapters(copy.deepcopy(llama), BLOCK, targets[:-1])
    save_adapter(attached(llama, targets), BLOCK, tmp_path)
    with pytest.raises(ValueError, match=r"differ in layers: \['model.layers.3.mlp.down_proj'\]"):
        restore_adapter(other, tmp_path)
