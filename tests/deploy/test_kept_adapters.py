"""Adapters kept beside an exported base: what they compute, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import deploy.export
import deploy.kept_adapters
from deploy.adapter_artifact import open_adapter
from deploy.adapter_files import find_adapter, read_adapter_file
from deploy.artifact import read_manifest, verify_files
from deploy.checkpoint import Checkpoint
from deploy.checkpoint_settings import CheckpointSettings, choose_recipe
from deploy.describe import describe_artifact
from deploy.errors import (
    ArtifactError,
    ConfigError,
    ParityError,
    RoloraError,
    StageOrderError,
    UnsupportedModelError,
)
from deploy.export import ExportReport, Target, export_onnx
from deploy.kept_adapters import active_adapter, open_kept_adapter, parse_adapter_choices
from deploy.kernels import Kernel
from deploy.live_adapter import attach_to_loaded
from deploy.loading import load_model
from deploy.merge import Destination, MergeSettings, merge
from deploy.merge_rotate_quantize import merge_rotate_quantize
from deploy.parity import relative_error, torch_logits
from deploy.run import Sampling, TextGenerator
from deploy.session import GRAPH_NAME, OnnxDecoder
from reslora.merge import MergeMethod
from rolora.rotation import RotationKind
from tests.deploy.tiny_artifacts import make_adapter, make_checkpoint, save_model

IDS = np.arange(20, 68)
PROMPT = "hello world"
ROUNDING = 1e-5
"""Relative error of float32 logits over two blocks, whatever the basis."""


def make_base(model: Path, output: Path, scheme: str, rotation: Path, **recipe: Any) -> Path:
    """Quantize a model without an adapter, in the basis of one."""
    settings = CheckpointSettings(
        model=str(model),
        adapter=None,
        merge=MergeMethod.EXACT,
        rotation=None,
        stored_rotation=rotation,
        recipe=choose_recipe(scheme, **recipe),
        calibration=None,
        calibration_windows=1,
        calibration_tokens=64,
    )
    merge_rotate_quantize(settings, output)
    return output


def keep(
    checkpoint: Path,
    output: Path,
    *adapters: Path | str,
    kernel: Kernel = Kernel.INTEGER,
    target: Target = Target.CPU,
    model: str | None = None,
) -> ExportReport:
    """Export with adapters beside the base."""
    choices = parse_adapter_choices([str(adapter) for adapter in adapters])
    return export_onnx(checkpoint, output, target, kernel, keep=choices, model=model)


def onnx_logits(directory: Path, adapter: str | None = None) -> np.ndarray:
    with OnnxDecoder(directory, threads=1, adapter=adapter) as decoder:
        return decoder.logits(IDS)


def float_logits(model: Path, adapter: Path) -> np.ndarray:
    """Return what the float model computes with an adapter attached as it was trained."""
    return torch_logits(attach_to_loaded(load_model(model), open_adapter(adapter)), IDS)


def save_peft(model: Path, output: Path, targets: list[str], **options: Any) -> PeftModel:
    """Let PEFT put an adapter on a model as transformers loads it, and save it, B not zero."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **options)
    made: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    made.save_pretrained(output, save_embedding_layers=False)
    return made.eval()


class Kept:
    """One tiny model, its adapters, bases and exports."""

    def __init__(self, root: Path, model_type: str = "llama") -> None:
        self.root = root
        self.model = save_model(root / "model", model_type, hidden_size=64, intermediate_size=96)
        self.plain = make_adapter(self.model, root / "plain", "lora")
        self.rotated = make_adapter(self.model, root / "rotated", "rolora")
        self.float_base = make_base(self.model, root / "float", "FP32", self.rotated)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def base(kept: Kept) -> Path:
    return make_base(kept.model, kept.root / "w8a8", "W8A8", kept.rotated, weights="rtn")


@pytest.fixture(scope="module")
def export(kept: Kept, base: Path) -> Path:
    keep(base, kept.root / "export", kept.plain, kept.rotated, kernel=Kernel.AUTO)
    return kept.root / "export"


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "gemma3_text"])
def test_a_float_base_with_an_adapter_is_the_float_model_with_it(
    model_type: str, tmp_path: Path
) -> None:
    made = Kept(tmp_path, model_type)
    keep(made.float_base, tmp_path / "onnx", made.plain, made.rotated)
    without = onnx_logits(tmp_path / "onnx")
    for name, adapter in (("plain", made.plain), ("rotated", made.rotated)):
        found = onnx_logits(tmp_path / "onnx", name)
        assert relative_error(found, float_logits(made.model, adapter)) < ROUNDING
        assert relative_error(found, without) > 0.03, "the adapter says something"


def test_a_float_base_with_channel_scales_takes_adapters_too(kept: Kept, tmp_path: Path) -> None:
    scaled = make_checkpoint(kept.model, tmp_path / "scaled", "FP32", equalize="all")
    keep(scaled, tmp_path / "onnx", kept.plain)
    found = onnx_logits(tmp_path / "onnx", "plain")
    assert relative_error(found, float_logits(kept.model, kept.plain)) < ROUNDING
    with pytest.raises(ArtifactError, match="was trained in the basis of a rotation"):
        keep(scaled, tmp_path / "other", kept.rotated)


@pytest.mark.parametrize("forgotten", ["gains", "rotation"])
def test_an_adapter_in_another_basis_would_be_seen(
    forgotten: str, kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forgotten == "gains":
        monkeypatch.setattr(deploy.export, "base_norm_gains", lambda *_: {})
    else:
        monkeypatch.setattr(deploy.kept_adapters, "to_rotated_basis", lambda adapter, *_: adapter)
    keep(kept.float_base, tmp_path / "onnx", kept.plain)
    found = onnx_logits(tmp_path / "onnx", "plain")
    assert relative_error(found, float_logits(kept.model, kept.plain)) > 1e3 * ROUNDING


def test_a_base_that_is_not_rotated_takes_plain_adapters_only(kept: Kept, tmp_path: Path) -> None:
    unrotated = make_checkpoint(kept.model, tmp_path / "base", "FP32", rotate="none")
    keep(unrotated, tmp_path / "onnx", kept.plain)
    found = onnx_logits(tmp_path / "onnx", "plain")
    assert relative_error(found, float_logits(kept.model, kept.plain)) < ROUNDING
    with pytest.raises(ArtifactError, match="has no rotation; make a base in its basis"):
        keep(unrotated, tmp_path / "other", kept.rotated)


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [("llama", ["q_proj", "down_proj"]), ("phi3", ["qkv_proj", "gate_up_proj", "o_proj"])],
)
def test_pefts_own_adapters_are_taken_as_they_are(
    model_type: str, targets: list[str], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", model_type, hidden_size=64, intermediate_size=96)
    made: Any = save_peft(model, tmp_path / "peft", targets, r=3, lora_alpha=5, use_rslora=True)
    base = make_checkpoint(model, tmp_path / "base", "FP32")
    keep(base, tmp_path / "onnx", f"p={tmp_path / 'peft'}")
    found = onnx_logits(tmp_path / "onnx", "p")
    assert relative_error(found, torch_logits(made, IDS)) < ROUNDING
    graph = onnx.load(tmp_path / "onnx" / GRAPH_NAME, load_external_data=False).graph
    inputs = [value.name for value in graph.input if ".lora_A." in value.name]
    assert len(inputs) == 2 * (2 if model_type == "llama" else 4), "no branch without an adapter"


def test_without_an_adapter_the_logits_are_those_of_a_bare_export(
    export: Path, base: Path, tmp_path: Path
) -> None:
    export_onnx(base, tmp_path / "bare", Target.CPU, Kernel.AUTO)
    bare = onnx_logits(tmp_path / "bare")
    np.testing.assert_array_equal(onnx_logits(export), bare)
    for name in ("plain", "rotated"):
        assert not np.array_equal(onnx_logits(export, name), bare)
    np.testing.assert_array_equal(onnx_logits(export), bare)


def torch_reference(base: Path, adapter: Path) -> tuple[Any, Any]:
    with Checkpoint(base) as opened:
        (choice,) = parse_adapter_choices([str(adapter)])
        gains = deploy.export.base_norm_gains(opened, None)
        return opened.load_model(), open_kept_adapter(choice, opened, lambda: gains)


@pytest.mark.parametrize("name", ["plain", "rotated"])
def test_a_quantized_base_adds_the_float_branch(
    name: str, kept: Kept, base: Path, export: Path
) -> None:
    model, adapter = torch_reference(base, kept.root / name)
    with active_adapter(model, adapter):
        expected = torch_logits(model, IDS)
    assert relative_error(onnx_logits(export, name), expected) < ROUNDING
    assert relative_error(torch_logits(model, IDS), expected) > 0.03, "its hooks are taken off"


@pytest.mark.parametrize("name", ["plain", "rotated"])
def test_stock_onnxruntime_takes_the_adapter_by_its_run_options(name: str, export: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(export / GRAPH_NAME), options)
    adapter = ort.LoraAdapter()
    adapter.Load(str(export / f"{name}.onnx_adapter"))
    active = ort.RunOptions()
    active.add_active_adapter(adapter)
    feeds = {
        "input_ids": IDS[None],
        "attention_mask": np.ones((1, len(IDS)), np.int64),
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            heads, size = value.shape[1], value.shape[3]
            feeds[value.name] = np.zeros((1, heads, 0, size), np.float32)
    assert set(feeds) == {value.name for value in session.get_inputs()}, "adapters are optional"
    (base,) = session.run(["logits"], feeds)
    (adapted,) = session.run(["logits"], feeds, active)
    np.testing.assert_allclose(adapted[0, -1], onnx_logits(export, name)[-1], rtol=0, atol=1e-5)
    assert np.abs(adapted - base).max() > 0.01
    np.testing.assert_array_equal(session.run(["logits"], feeds)[0], base)


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    sequence = list(ids)
    for _ in range(count):
        logits = torch_logits(model, np.array(sequence))[-1]
        best = np.sort(logits)[-2:]
        assert best[1] - best[0] > 1e-4, "a tie: choose another prompt"
        sequence.append(int(logits.argmax()))
    return sequence[len(ids) :]


def test_stock_genai_generates_with_each_adapter_and_without(
    kept: Kept, base: Path, export: Path
) -> None:
    generator = TextGenerator(export)
    ids = generator.encode(PROMPT)
    found = {None: list(generator.generate(ids, Sampling(12)))}
    for name in ("plain", "rotated"):
        found[name] = list(TextGenerator(export, name).generate(ids, Sampling(12)))
        model, adapter = torch_reference(base, kept.root / name)
        with active_adapter(model, adapter):
            assert found[name] == greedy(model, ids, 12)
    assert len({tuple(tokens) for tokens in found.values()}) == 3
    assert list(generator.generate(ids, Sampling(12))) == found[None]


def test_an_unknown_adapter_is_refused_with_those_present(export: Path, tmp_path: Path) -> None:
    for opener in (lambda: TextGenerator(export, "absent"), lambda: onnx_logits(export, "absent")):
        with pytest.raises(ConfigError, match="has no adapter 'absent', it has plain, rotated"):
            opener()
    copy = shutil.copytree(export, tmp_path / "copy")
    (copy / "plain.onnx_adapter").write_bytes(b"rubbish")
    with pytest.raises(ArtifactError, match=r"plain\.onnx_adapter: ONNX Runtime cannot load it"):
        onnx_logits(copy, "plain")
    with pytest.raises(ArtifactError, match="cannot load it"):
        TextGenerator(copy, "plain")


def test_the_manifest_lists_the_adapters(export: Path, kept: Kept) -> None:
    manifest: Any = verify_files(export)
    digests = {name: read_manifest(kept.root / name).digest for name in ("plain", "rotated")}
    listed = manifest.details["adapters"]
    assert {name: entry["digest"] for name, entry in listed.items()} == digests
    assert [entry["trained"] for entry in listed.values()] == ["not rotated", "rotated"]
    assert all(entry["rank"] == 2 and entry["linears"] == 14 for entry in listed.values())
    for name, digest in digests.items():
        assert manifest.parents[f"adapter {name}"] == digest
        assert listed[name]["file"] in manifest.files
        report = manifest.checks["adapters"][name]
        assert max(report["prefill_error"], report["decode_error"]) <= report["bound"]
        assert report["adapter_effect"] > report["bound"], "or the check could not see it"
    assert manifest.checks["parity"]["adapter_effect"] is None
    shown = dict(describe_artifact(export, verify=False).summary())
    assert shown["adapter plain"].startswith("rank 2, 14 linears, trained not rotated, digest ")


def test_equal_inputs_give_equal_files_and_a_finished_export_is_kept(
    kept: Kept, base: Path, export: Path, tmp_path: Path
) -> None:
    adapters = (kept.plain, kept.rotated)
    again = keep(base, tmp_path / "again", *adapters, kernel=Kernel.AUTO)
    assert again.manifest.files == read_manifest(export).files
    assert keep(base, export, *adapters, kernel=Kernel.AUTO).manifest == read_manifest(export)
    with pytest.raises(ConfigError, match="exists already and was made from other inputs"):
        keep(base, export, kept.plain, kernel=Kernel.AUTO)


@pytest.mark.parametrize("kernel", [Kernel.NBITS, Kernel.QDQ])
def test_other_graphs_take_adapters_too(kernel: Kernel, kept: Kept, tmp_path: Path) -> None:
    recipe = {"static": "all"} if kernel is Kernel.QDQ else {}
    base = make_checkpoint(kept.model, tmp_path / "base", "W8A8", weights="rtn", **recipe)
    target = Target.QDQ if kernel is Kernel.QDQ else Target.CPU
    report = keep(base, tmp_path / "onnx", kept.plain, kernel=kernel, target=target)
    found = report.to_dict()["adapters"]["plain"]
    assert found["adapter_effect"] > found["bound"]
    bare = export_onnx(base, tmp_path / "bare", target, kernel)
    np.testing.assert_array_equal(onnx_logits(tmp_path / "onnx"), onnx_logits(bare.output))
    assert relative_error(onnx_logits(tmp_path / "onnx", "plain"), onnx_logits(bare.output)) > 0.03


def swap_two(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Feed the factors of one layer's output projection to the other's."""
    layers = ("model.layers.0.", "model.layers.1.")
    swapped = dict(arrays)
    for side in ("lora_A", "lora_B"):
        one, other = (f"{layer}self_attn.o_proj.{side}.weight" for layer in layers)
        swapped[one], swapped[other] = arrays[other], arrays[one]
    return swapped


@pytest.mark.parametrize(
    "fault",
    [swap_two, lambda arrays: {name: 1.1 * array for name, array in arrays.items()}],
    ids=["layers swapped", "wrong scale"],
)
def test_factors_that_are_fed_wrongly_are_found(
    fault: Callable[..., Any], kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = deploy.export.adapter_arrays
    monkeypatch.setattr(deploy.export, "adapter_arrays", lambda *given: fault(made(*given)))
    with pytest.raises(ParityError, match="adapter plain: the exported graph departs"):
        keep(kept.float_base, tmp_path / "onnx", kept.plain)
    assert not (tmp_path / "onnx").exists()


def test_an_adapter_of_another_rotation_is_refused(kept: Kept, tmp_path: Path) -> None:
    base = make_checkpoint(kept.model, tmp_path / "o", "FP32", kind=RotationKind.ORTHOGONAL)
    with pytest.raises(ArtifactError, match=r"basis of a rotation \(digest .* has a rotation with"):
        keep(base, tmp_path / "onnx", kept.rotated)
    keep(base, tmp_path / "plain", kept.plain)  # the model's own basis goes into any


def test_r3_of_a_quantized_cache_changes_no_basis(kept: Kept, tmp_path: Path) -> None:
    rotate = "r1,r2,r3,r4"
    base = make_checkpoint(
        kept.model,
        tmp_path / "base",
        "W8A8",
        rotate=rotate,
        kv_bits=8,
        weights="rtn",
        equalize="none",
    )
    with Checkpoint(base) as opened:
        assert opened.rotation is not None
        assert opened.rotation.r3 is not None
    report = keep(base, tmp_path / "onnx", kept.rotated)
    found = report.to_dict()["adapters"]["rotated"]
    assert found["adapter_effect"] > found["bound"]


def test_shortcuts_have_to_be_merged_first(kept: Kept, base: Path, tmp_path: Path) -> None:
    shortcut = make_adapter(kept.model, tmp_path / "shortcut", "reslora")
    with pytest.raises(StageOrderError, match=r"rolora merge --model MODEL .* --to adapter"):
        keep(base, tmp_path / "onnx", shortcut)
    settings = MergeSettings(str(kept.model), shortcut, Destination.ADAPTER)
    merge(settings, tmp_path / "merged")
    keep(kept.float_base, tmp_path / "onnx", tmp_path / "merged")
    found = onnx_logits(tmp_path / "onnx", "merged")
    assert relative_error(found, float_logits(kept.model, shortcut)) < ROUNDING


def test_a_base_with_an_adapter_in_it_is_refused(kept: Kept, tmp_path: Path) -> None:
    merged = make_checkpoint(kept.model, tmp_path / "base", "W8A8", adapter=kept.plain)
    with pytest.raises(StageOrderError, match="an adapter is merged into it"):
        keep(merged, tmp_path / "onnx", kept.plain)


def test_a_graph_for_each_phase_is_refused(kept: Kept, tmp_path: Path) -> None:
    base = make_checkpoint(kept.model, tmp_path / "base", "W4A8", weights="rtn")
    with pytest.raises(ConfigError, match="use --kernel integer"):
        keep(base, tmp_path / "onnx", kept.plain, kernel=Kernel.AUTO)
    keep(base, tmp_path / "onnx", kept.plain)
    with pytest.raises(ConfigError, match="--target cuda computes in float16"):
        keep(base, tmp_path / "cuda", kept.plain, target=Target.CUDA)


def test_the_model_is_found_where_it_was_moved_to(kept: Kept, tmp_path: Path) -> None:
    moved = shutil.copytree(kept.model, tmp_path / "moved")
    lost = shutil.copytree(kept.model, tmp_path / "lost")
    base = make_checkpoint(lost, tmp_path / "base", "FP32")
    shutil.rmtree(lost)
    with pytest.raises(ConfigError, match="no such file or directory"):
        keep(base, tmp_path / "onnx", kept.plain)
    keep(base, tmp_path / "onnx", kept.plain, model=str(moved))
    found = onnx_logits(tmp_path / "onnx", "plain")
    assert relative_error(found, float_logits(kept.model, kept.plain)) < ROUNDING
    other = save_model(tmp_path / "other", "llama", hidden_size=32, intermediate_size=96)
    with pytest.raises(ArtifactError, match="name the model it was made from with --model"):
        keep(base, tmp_path / "wrong", kept.plain, model=str(other))


def test_adapters_that_do_not_fit_are_refused(kept: Kept, base: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", "llama", hidden_size=64, intermediate_size=48)
    make_adapter(other, tmp_path / "foreign", "lora")
    save_peft(kept.model, tmp_path / "head", ["lm_head", "q_proj"], r=2)
    save_peft(other, tmp_path / "narrow", ["up_proj"], r=2)
    (tmp_path / "empty").mkdir()
    faults: dict[str, tuple[type[RoloraError], str]] = {
        "absent": (ConfigError, "no such directory"),
        "empty": (ArtifactError, "adapter_config.json: missing"),
        "foreign": (ArtifactError, "was trained on .*other"),
        "head": (UnsupportedModelError, "changes lm_head; --keep-adapter takes changes"),
        "narrow": (ArtifactError, "up_proj: adapter is for a linear"),
    }
    for name, (kind, message) in faults.items():
        with pytest.raises(kind, match=message):
            keep(base, tmp_path / "onnx", tmp_path / name)
    damaged = shutil.copytree(kept.plain, tmp_path / "damaged")
    config = json.loads((damaged / "adapter_config.json").read_text())
    (damaged / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
    with pytest.raises(ArtifactError, match="expected"):
        keep(base, tmp_path / "onnx", damaged)
    assert not (tmp_path / "onnx").exists()


def test_names_are_the_directories_or_the_users(tmp_path: Path) -> None:
    first, second = parse_adapter_choices([f"{tmp_path}/a/", "b=x=y"])
    assert (first.name, first.directory) == ("a", tmp_path / "a")
    assert (second.name, second.directory) == ("b", Path("x=y"))
    with pytest.raises(ConfigError) as caught:
        parse_adapter_choices(["x/a", "y/a", "../b=z", "=z"])
    message = str(caught.value)
    assert "3 faults" in message
    assert "'a' is the name of two adapters" in message
    assert "got '../b'" in message


def test_an_adapter_file_holds_what_the_graph_takes(export: Path) -> None:
    held = read_adapter_file(find_adapter(export, "plain"))
    arrays = {name: value.numpy() for name, value in held.items()}
    graph = onnx.load(export / GRAPH_NAME, load_external_data=False).graph
    optional = {value.name: value for value in graph.input if ".lora_" in value.name}
    assert arrays.keys() == optional.keys()
    qkv = "model.layers.0.self_attn.qkv"
    a, b = (arrays[f"{qkv}.lora_{side}.weight"] for side in "AB")
    assert a.shape == (64, 6)
    assert b.shape == (6, 4 * 16 + 2 * 2 * 16)
    assert not b[:2, 64:].any()
    assert not b[2:, :64].any()
    assert b[:2, :64].all()
