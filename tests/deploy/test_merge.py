"""The way out: what other programs make of a merged model, and of a plain adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import deploy.merge
import deploy.merge_sources
from deploy.artifact import ArtifactKind, hash_file, read_manifest, verify_files
from deploy.checkpoint import Checkpoint
from deploy.errors import ArtifactError, ConfigError
from deploy.language_model import open_language_model
from deploy.loading import load_model
from deploy.merge import Destination, FloatType, MergeSettings, MergeStageReport, merge
from reslora.config import AdapterConfig, Structure
from reslora.merge import MergeMethod
from tests.deploy.tiny_artifacts import (
    finetune_settings,
    make_adapter,
    make_checkpoint,
    save_model,
    write_adapter,
    write_rows,
)

IDS = torch.arange(30, 70)[None]
WITHOUT_US = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    torch.save(model(torch.arange(30, 70)[None]).logits, output)
ours = {"reslora", "deploy", "rolora", "cli"} & {name.split(".")[0] for name in sys.modules}
assert not ours, ours
"""


def adapter_of(
    model: Path, output: Path, method: str, structure: Structure | None, **adapter: Any
) -> Path:
    settings = finetune_settings(model, write_rows(output.with_suffix(".jsonl")), method)
    config = replace(settings.adapter, structure=structure, **adapter)
    return write_adapter(replace(settings, adapter=config), output)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("merge") / "tiny", num_hidden_layers=3, tied=True)


CASES: dict[str, tuple[str, Structure | None, MergeMethod, int]] = {
    "lora": ("lora", None, MergeMethod.EXACT, 2),
    "block": ("reslora", Structure.BLOCK, MergeMethod.EXACT, 6),
    "input": ("reslora", Structure.INPUT, MergeMethod.LEAST_SQUARES, 2),
    "rolora": ("rolora", None, MergeMethod.EXACT, 2),
    "rolora block": ("rolora", Structure.BLOCK, MergeMethod.EXACT, 6),
    "rolora middle": ("rolora", Structure.MIDDLE, MergeMethod.LEAST_SQUARES, 2),
}
"""Name to method, structure, merge and the rank that the written adapter has."""


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("adapters")
    return {
        name: adapter_of(
            model, base / name.replace(" ", "-"), method, structure, rslora="block" in name
        )
        for name, (method, structure, _, _) in CASES.items()
    }


def settings_for(
    model: Path, adapter: Path | None, to: str, merge: MergeMethod | None, **options: Any
) -> MergeSettings:
    quick = {"calibration_windows": 4, "calibration_tokens": 64}
    return MergeSettings(str(model), adapter, Destination(to), merge, **quick | options)


def run(
    model: Path,
    adapter: Path | None,
    to: str,
    output: Path,
    merge_method: MergeMethod | None = MergeMethod.EXACT,
    **options: Any,
) -> MergeStageReport:
    return merge(settings_for(model, adapter, to, merge_method, **options), output)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(IDS).logits
    return logits


def plain_logits(directory: Path) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(directory, dtype="auto"))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in directory.iterdir()}


@pytest.mark.parametrize("name", CASES)
def test_a_merged_model_and_adapter_compute_what_the_checkpoint_computes(
    name: str, model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The checkpoint is merged in the adapter's own basis, and rotated or not."""
    adapter, (_, structure, method, rank) = adapters[name], CASES[name]
    inputs = hashes(model), hashes(adapter)
    rotate = None if name.startswith("rolora") else "none"
    checkpoint = make_checkpoint(
        *(model, tmp_path / "checkpoint", "FP32"),
        **{"adapter": adapter, "merge": method, "windows": 4, "rotate": rotate},
    )
    with Checkpoint(checkpoint) as opened:
        expected = logits_of(opened.load_model())
    run(model, adapter, "model", tmp_path / "model", method)
    report = run(model, adapter, "adapter", tmp_path / "plain", method)
    before = plain_logits(model)
    assert distance(before, expected) > 1e-2, "the adapter does nothing"
    assert distance(plain_logits(tmp_path / "model"), expected) < 1e-5
    paths = [str(tmp_path / part) for part in ("plain", "logits.pt")]
    # isolated: neither this directory nor PYTHONPATH is searched
    subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_US, str(model), *paths], cwd=tmp_path, check=True
    )
    assert distance(torch.load(tmp_path / "logits.pt"), expected) < 1e-5
    values = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (values["peft_type"], values["r"]) == ("LORA", rank)
    assert report.to_dict()["rank"] == rank
    details: Any = read_manifest(tmp_path / "model").details["merge"]
    assert (details["method"], details["structure"]) == (method, structure)
    assert ("errors" in details) == (method is not MergeMethod.EXACT)
    assert (hashes(model), hashes(adapter)) == inputs


def test_a_conversion_left_out_would_be_noticed(
    model: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, adapters["rolora"], "model", tmp_path / "right")
    monkeypatch.setattr(deploy.merge_sources, "to_original_basis", lambda plain, *_: plain)
    run(model, adapters["rolora"], "model", tmp_path / "wrong")
    assert distance(plain_logits(tmp_path / "wrong"), plain_logits(tmp_path / "right")) > 1e-2


def test_the_model_is_an_ordinary_one(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(model, adapters["block"], "model", out)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    original = AutoModelForCausalLM.from_pretrained(model)
    assert merged.state_dict().keys() == original.state_dict().keys()
    assert (
        load_file(out / "model.safetensors").keys() == load_file(model / "model.safetensors").keys()
    )
    tokenizers = [AutoTokenizer.from_pretrained(directory) for directory in (out, model)]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template is not None
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert merged.generation_config.eos_token_id == original.generation_config.eos_token_id
    # and one of ours: it is trained further, merged again, quantized and evaluated
    assert verify_files(out).kind is ArtifactKind.MODEL
    assert open_language_model(str(out)).model.logits(IDS[0].numpy()) is not None
    again = make_adapter(out, tmp_path / "again", "lora")
    run(out, again, "model", tmp_path / "twice")
    make_checkpoint(out, tmp_path / "checkpoint", "W8A8")


def test_a_merged_model_that_was_damaged_is_not_loaded(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, None, "model", out)
    weights = out / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of one weight: a file that loads as well as before
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model.safetensors: expected sha256 .* on purpose"):
        load_model(str(out))
    (out / "rolora_manifest.json").unlink()
    assert load_model(str(out)).digest != load_model(str(model)).digest


def test_writing_a_model_draws_nothing(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(model, None, "model", tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_the_plain_adapter_is_one_of_ours_too(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    run(model, adapters["rolora middle"], "adapter", tmp_path / "plain", MergeMethod.LEAST_SQUARES)
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "rolora_manifest.json",
    ]
    run(model, tmp_path / "plain", "model", tmp_path / "out")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "plain")
    )
    assert distance(plain_logits(tmp_path / "out"), logits_of(loaded)) < 1e-5


@pytest.mark.parametrize("dtype", [FloatType.BFLOAT16, FloatType.FLOAT16])
def test_lower_precision_rounds_once(
    dtype: FloatType, model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    run(model, adapters["lora"], "model", tmp_path / "full")
    run(model, adapters["lora"], "model", tmp_path / "low", dtype=dtype)
    full, low = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "low"))
    for key, tensor in full.items():
        assert torch.equal(low[key], tensor.to(dtype.torch_dtype)), key
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "low", dtype="auto").dtype is (
        dtype.torch_dtype
    )
    run(model, adapters["lora"], "adapter", tmp_path / "plain", dtype=dtype)
    stored = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype.torch_dtype}


@pytest.mark.parametrize("to", list(Destination))
def test_what_overflows_in_float16_is_refused(
    to: Destination, tmp_path: Path, adapters: dict[str, Path], model: Path
) -> None:
    stored = deploy.merge.open_adapter(adapters["lora"])
    for _, b in stored.adapter.factors.values():
        b.fill_(1e6)
    big = deploy.merge_sources.DecoderSource(str(model), None, 4, 64)
    plain, _ = big.plain_merge(stored, MergeMethod.EXACT)
    settings = settings_for(model, adapters["lora"], to, None, dtype=FloatType.FLOAT16)

    def write() -> None:
        if to is Destination.ADAPTER:
            deploy.merge._write_adapter(plain, settings, tmp_path)
        else:
            deploy.merge.merge_adapter(big.loaded.model, plain, MergeMethod.EXACT)
            deploy.merge._write_model(big, torch.float16, tmp_path)

    with pytest.raises(ArtifactError, match=r"not finite in torch.float16; use float32"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_recompression_says_what_it_costs(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    whole = run(model, adapters["block"], "adapter", tmp_path / "whole")
    assert whole.to_dict()["recompression_error"] is None
    errors = []
    for rank in (6, 3, 1):
        report = run(model, adapters["block"], "adapter", tmp_path / str(rank), rank=rank)
        details: Any = report.manifest.details["recompression"]
        stored = deploy.merge.open_adapter(tmp_path / str(rank)).adapter
        full = deploy.merge.open_adapter(tmp_path / "whole").adapter
        missed = squares = 0.0
        for fqn, (a, b) in full.factors.items():
            delta = full.config.scaling * b.double() @ a.double()
            lower_a, lower_b = stored.factors[fqn]
            difference = delta - stored.config.scaling * lower_b.double() @ lower_a.double()
            relative = float(difference.norm() / delta.norm())
            assert relative == pytest.approx(details["layers"][fqn], abs=1e-6)
            missed += float(difference.square().sum())
            squares += float(delta.square().sum())
        assert details["relative_error"] == pytest.approx((missed / squares) ** 0.5, abs=1e-6)
        errors.append(details["relative_error"])
    assert errors[0] < 1e-6 < errors[1] < errors[2] < 1
    with pytest.raises(ConfigError, match=r"--rank 7: rank must be from 1 to 6, got 7"):
        run(model, adapters["block"], "adapter", tmp_path / "more", rank=7)
    assert not (tmp_path / "more").exists()


def test_auto_reports_all_candidates(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    report = run(model, adapters["rolora middle"], "model", tmp_path / "out", None).to_dict()
    figures = {name: each["kl_mean"] for name, each in report["merge"]["candidates"].items()}
    assert report["merge"]["method"] == min(figures, key=lambda name: figures[name])
    assert report["merge"]["kl_mean"] == min(figures.values())


def test_a_finished_output_is_kept_and_another_is_not_overwritten(
    model: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(model, adapters["lora"], "adapter", tmp_path / "out")
    assert first.manifest.parents == load_model(str(model)).parents() | {
        "adapter": read_manifest(adapters["lora"]).digest,
    }
    monkeypatch.setattr(deploy.merge, "_merge", None)  # must not be called
    again = run(model, adapters["lora"], "adapter", tmp_path / "out")
    assert again.manifest.digest == first.manifest.digest
    with pytest.raises(ConfigError, match="exists already"):
        run(model, adapters["lora"], "adapter", tmp_path / "out", rank=1)


def test_another_text_in_the_same_calibration_file_is_another_run(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five. " * 40, encoding="utf-8")
    for _ in range(2):
        run(model, adapters["lora"], "adapter", tmp_path / "out", calibration=str(text))
    text.write_text("other words entirely, and more of them. " * 40, encoding="utf-8")
    with pytest.raises(ConfigError, match="exists already"):
        run(model, adapters["lora"], "adapter", tmp_path / "out", calibration=str(text))


def test_without_an_adapter_the_model_itself_is_written(model: Path, tmp_path: Path) -> None:
    report = run(model, None, "model", tmp_path / "base")
    assert report.to_dict()["merge"] is None
    assert torch.equal(plain_logits(tmp_path / "base"), plain_logits(model))


def test_impossible_merges_are_refused(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"2 faults:\n.*needs --adapter\n.*at least 1, got 0"):
        settings_for(model, None, "adapter", None, rank=0)
    with pytest.raises(ConfigError, match=r"--rank is for --to adapter"):
        settings_for(model, None, "model", None, rank=2)
    with pytest.raises(ConfigError, match=r"'exact' cannot merge .* use 'least-squares', or auto"):
        run(model, adapters["input"], "model", tmp_path / "out")
    other = save_model(tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(ArtifactError, match="was trained on"):
        run(other, adapters["lora"], "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_stage_with_rslora_keeps_its_scale(model: Path, tmp_path: Path) -> None:
    stored = adapter_of(
        *(model, tmp_path / "rs", "lora", None), **{"rslora": True, "rank": 4, "alpha": 6.0}
    )
    assert json.loads((stored / "adapter_config.json").read_text())["use_rslora"] is True
    assert deploy.merge.open_adapter(stored).adapter.config == AdapterConfig(4, 6.0, rslora=True)
    run(model, stored, "adapter", tmp_path / "plain", rank=2)
    plain = deploy.merge.open_adapter(tmp_path / "plain").adapter.config
    assert plain.scaling == pytest.approx(3.0)
