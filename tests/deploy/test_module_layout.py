"""Families with a layout of their own: split when they come, joined again when they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from deploy.adapter_artifact import open_adapter
from deploy.architecture import decoder_names, joined_projections
from deploy.compressed_export import export_compressed
from deploy.errors import UnsupportedModelError
from deploy.finetune import finetune
from deploy.loading import load_model
from deploy.merge import Destination, MergeSettings, merge
from deploy.module_layout import (
    JoinedLinear,
    adapter_in_our_layout,
    adapter_in_own_layout,
    own_places,
    save_in_own_layout,
    to_our_layout,
)
from reslora.adapter import Adapter
from reslora.config import AdapterConfig
from tests.conftest import build_tiny_model
from tests.deploy.tiny_artifacts import (
    finetune_settings,
    make_adapter,
    make_checkpoint,
    make_export,
    save_model,
    write_rows,
)

IDS = torch.arange(30, 70)[None]


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(IDS).logits
    return logits


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_joined_linear_is_the_linear_of_all_rows() -> None:
    whole = nn.Linear(6, 5)
    parts = {"a": nn.Linear(6, 2), "b": nn.Linear(6, 3)}
    with torch.no_grad():
        for part, rows in zip(parts.values(), (slice(0, 2), slice(2, 5)), strict=True):
            part.weight.copy_(whole.weight[rows])
            part.bias.copy_(whole.bias[rows])
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(JoinedLinear(parts)(x), whole(x))
    assert not torch.allclose(JoinedLinear(dict(reversed(parts.items())))(x), whole(x))


def test_splitting_changes_no_logit_and_saving_gives_every_byte_back(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "phi3", tied=True)
    loaded = load_model(source)
    assert distance(logits_of(loaded.model), logits_of(build_tiny_model_of(source))) < 1e-6
    save_in_own_layout(loaded.model, tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def build_tiny_model_of(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_most_families_have_our_layout_already() -> None:
    model = build_tiny_model("qwen3")
    before = [name for name, _ in model.named_modules()]
    to_our_layout(model)
    assert [name for name, _ in model.named_modules()] == before
    assert own_places(model.config) == {}


@pytest.mark.parametrize("method", ["lora", "reslora", "rolora"])
def test_merged_model_and_adapter_leave_in_the_layout_that_other_programs_know(
    method: str, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "model", "phi3", num_hidden_layers=3)
    adapter = make_adapter(source, tmp_path / "adapter", method)
    for to in Destination:
        merge(MergeSettings(str(source), adapter, to), tmp_path / f"out-{to}")
    before = logits_of(build_tiny_model_of(source))
    merged = logits_of(build_tiny_model_of(tmp_path / "out-model"))
    plain = PeftModel.from_pretrained(build_tiny_model_of(source), tmp_path / "out-adapter")
    assert distance(logits_of(plain), merged) < 1e-5
    assert distance(before, merged) > 1e-2


def test_a_part_that_an_adapter_leaves_alone_stays_as_it_is() -> None:
    model = build_tiny_model("phi3")
    to_our_layout(model)
    names = decoder_names(model.config)
    block = names.blocks[0]
    factors = {
        fqn: (torch.randn(2, model.get_submodule(fqn).in_features), torch.randn(rows, 2))
        for fqn, rows in ((block.query, 32), (block.value, 16), (block.output, 32))
    }
    config = AdapterConfig(rank=2, alpha=3.0)
    adapter = Adapter(config, factors)
    own = adapter_in_own_layout(adapter, model.config)
    joined = joined_projections(model.config)[0]
    assert set(own.factors) == {joined.fqn, block.output}
    assert own.config.rank == 4
    assert own.config.scaling == config.scaling
    a, b = own.factors[joined.fqn]
    q, v = (b_part @ a_part for a_part, b_part in (factors[block.query], factors[block.value]))
    torch.testing.assert_close(b @ a, torch.cat([q, torch.zeros(16, 32), v]))
    a, b = own.factors[block.output]
    torch.testing.assert_close(b @ a, factors[block.output][1] @ factors[block.output][0])


def test_an_adapter_of_the_own_layout_is_split_as_its_linears_are() -> None:
    model = build_tiny_model("phi3")
    own_fqns = [joined.fqn for joined in joined_projections(model.config)][:2]
    linears = {fqn: model.get_submodule(fqn) for fqn in own_fqns}
    factors = {
        fqn: (torch.randn(2, linear.in_features), torch.randn(linear.out_features, 2))
        for fqn, linear in linears.items()
    }
    split = adapter_in_our_layout(Adapter(AdapterConfig(rank=2), factors), model.config)
    to_our_layout(model)
    for fqn, (a, b) in factors.items():
        parts = [name for name in split.factors if name.startswith(f"{fqn}.")]
        assert len(parts) == len(list(model.get_submodule(fqn).children()))
        changes = [split.factors[part][1] @ split.factors[part][0] for part in parts]
        torch.testing.assert_close(torch.cat(changes), b @ a)
        assert fqn not in split.factors
    again = adapter_in_our_layout(split, model.config)
    assert again.factors.keys() == split.factors.keys()


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8", "W4A4"])
def test_every_scheme_is_exported_and_keeps_parity(scheme: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "phi3")
    checkpoint = make_checkpoint(source, tmp_path / "c", scheme)
    report = make_export(checkpoint, tmp_path / "onnx").to_dict()
    assert report["parity"]["exact_weights"] == 2 * 7 + 1


def test_readers_with_other_modules_are_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "phi3")
    checkpoint = make_checkpoint(source, tmp_path / "c", "W8A8", weights="rtn")
    with pytest.raises(UnsupportedModelError, match=r"'phi3'.*supported are llama.*--format onnx"):
        export_compressed(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("model_type", ["phi3", "gemma2", "gemma3_text"])
def test_adapters_of_every_layout_are_trained(model_type: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", model_type, tied=True)
    settings = finetune_settings(source, write_rows(tmp_path / "rows.jsonl"), "rolora")
    finetune(settings, tmp_path / "adapter")
    trained = open_adapter(tmp_path / "adapter").adapter.factors
    names = decoder_names(load_model(source).model.config)
    assert set(trained) == set(names.linears())
    assert all(bool(b.any()) for _, b in trained.values())  # B begins at zero
