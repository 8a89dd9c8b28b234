from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import deploy.compressed_export
from deploy.artifact import ArtifactKind, read_manifest, verify_files
from deploy.calibration_text import sample_text
from deploy.checkpoint import Checkpoint
from deploy.compressed_card import CARD_NAME
from deploy.compressed_export import CompressedReport, export_compressed
from deploy.compressed_reader import load_compressed
from deploy.compressed_scheme import reader_divisor
from deploy.errors import (
    ArtifactError,
    ConfigError,
    ParityError,
    StageOrderError,
    UnsupportedModelError,
)
from deploy.language_model import open_language_model
from deploy.parity import LEAST_BOUND, float_activation_logits, relative_error
from deploy.text_quality import Task, cut_windows, evaluate_model
from rolora.affine import quantize_tokens
from rolora.overrides import Override
from rolora.rotation import RotationKind
from rolora.scheme import Scheme
from tests.deploy.tiny_artifacts import make_checkpoint, save_model

IDS = np.arange(30, 94)
ROOT = Path(__file__).parents[2]
DOWN = "model.layers.0.mlp.down_proj"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Exported:
    checkpoint: Path
    directory: Path
    report: CompressedReport

    @property
    def quantization(self) -> dict[str, Any]:
        config = json.loads((self.directory / "config.json").read_text())
        settings: dict[str, Any] = config["quantization_config"]
        return settings

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.directory / WEIGHTS)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "W8A8": ("llama", {"rotate": "r1,r2"}),
    "W8A8 online": ("qwen2", {}),
    "W4A4 online": ("mistral", {"activation_clip": 1.0, "equalize": "none"}),
    "W8A8 online blocks": ("llama", {"rotation_block": 8}),
    "W4A8 grouped": ("qwen3", {"rotate": "none", "group_size": 16}),
    "W8A8 grouped": ("mistral", {"rotate": "r1,r2", "group_size": 16}),
    "W6A6": (
        "llama",
        {"rotate": "r1,r2", "equalize": "none", "head_bits": 32, "embedding_bits": 32},
    ),
}
ONLINE = [name for name in CASES if "online" in name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Export a case, once."""
    done: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in done:
            base = tmp_path_factory.mktemp("compressed")
            family, options = CASES[name]
            model = save_model(base / "model", family)
            made = make_checkpoint(
                model, base / "checkpoint", name.split()[0], weights="rtn", **options
            )
            report = export_compressed(made, base / "export")
            done[name] = Exported(made, base / "export", report)
        return done[name]

    return make


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = model(input_ids=torch.from_numpy(IDS)[None]).logits[0].numpy()
    return found


def own_logits(exported: Exported) -> tuple[np.ndarray, float]:
    """The checkpoint's logits, and how far a reader may be from them.

    Both round the same inputs with nearly the same scales, so each is about as far from the model
    with float inputs: the triangle inequality bounds their distance by twice that.
    """
    with Checkpoint(exported.checkpoint) as checkpoint:
        model = checkpoint.load_model()
    own = logits(model)
    return own, 2 * relative_error(own, float_activation_logits(model, IDS))


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_what_the_checkpoint_does(
    made: Callable[[str], Exported], name: str
) -> None:
    exported = made(name)
    own, tolerance = own_logits(exported)
    if name in ONLINE:
        reader = load_compressed(exported.directory)
    else:
        reader = AutoModelForCausalLM.from_pretrained(exported.directory, dtype=torch.float32)
    found = logits(reader)
    assert relative_error(found, own) <= tolerance
    check = exported.report.to_dict()["reader"]
    assert check["error"] <= check["bound"]
    if name not in ONLINE:  # the same operations on the same numbers
        assert check["error"] < LEAST_BOUND
    assert check["bound"] < tolerance * 2, "the check would let through more than rounding does"
    opened = open_language_model(str(exported.directory)).model
    assert relative_error(opened.logits(IDS), found) < LEAST_BOUND


@pytest.mark.parametrize("name", ONLINE)
def test_who_ignores_an_online_rotation_computes_nonsense(
    made: Callable[[str], Exported], name: str
) -> None:
    exported = made(name)
    own, tolerance = own_logits(exported)
    ignorant = AutoModelForCausalLM.from_pretrained(exported.directory, dtype=torch.float32)
    assert relative_error(logits(ignorant), own) > max(1.5 * tolerance, 0.5)
    card = (exported.directory / CARD_NAME).read_text()
    assert "**Warning.**" in card
    assert "apply_transform_config" in card
    assert exported.report.needs_transform


def test_a_model_without_online_rotation_asks_nothing_of_its_reader(
    made: Callable[[str], Exported],
) -> None:
    exported = made("W8A8")
    card = (exported.directory / CARD_NAME).read_text()
    assert "Warning" not in card
    assert "transform" not in card.replace("transformers", "")
    assert "rotated (R1, R2)" in card
    assert not exported.report.needs_transform
    assert exported.quantization["transform_config"] == {}


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("W8A8", f"{DOWN}.weight_scale"),
        ("W8A8", "model.layers.0.self_attn.q_proj.input_scale"),
        ("W4A8 grouped", f"{DOWN}.weight_scale"),
        ("W4A4 online", f"{DOWN}.R4_input.weight"),
    ],
)
def test_a_changed_scale_or_rotation_is_seen(
    made: Callable[[str], Exported], tmp_path: Path, name: str, tensor: str
) -> None:
    exported = made(name)
    copy = shutil.copytree(exported.directory, tmp_path / "copy")
    tensors = exported.tensors
    tensors[tensor] = tensors[tensor] * 2
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    right = logits(load_compressed(exported.directory))
    wrong = relative_error(logits(load_compressed(copy)), right)
    assert wrong > exported.report.to_dict()["reader"]["bound"]
    with pytest.raises(ArtifactError, match=f"{WEIGHTS}: expected sha256"):
        open_language_model(str(copy))


def test_a_fault_of_the_export_is_refused_and_leaves_nothing(
    made: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = deploy.compressed_export._pack_linear

    def with_fault(checkpoint: Checkpoint, fqn: str, scheme: Any) -> dict[str, Tensor]:
        packed = pack(checkpoint, fqn, scheme)
        if fqn == DOWN:
            packed[f"{fqn}.weight_scale"] = packed[f"{fqn}.weight_scale"] * 1.5
        return packed

    monkeypatch.setattr(deploy.compressed_export, "_pack_linear", with_fault)
    with pytest.raises(ParityError, match="transformers computes something else"):
        export_compressed(made("W8A8").checkpoint, tmp_path / "out")

    def without_norm(checkpoint: Checkpoint, quantized: set[str]) -> dict[str, Tensor]:
        tensors = others(checkpoint, quantized)
        del tensors["model.norm.weight"]
        return tensors

    others = deploy.compressed_export._other_tensors
    monkeypatch.undo()
    monkeypatch.setattr(deploy.compressed_export, "_other_tensors", without_norm)
    with pytest.raises(ArtifactError, match=r"missing for transformers: model.norm.weight;"):
        export_compressed(made("W8A8").checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_the_library_changes_is_refused(
    made: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = deploy.compressed_export.BaseCompressor.get_value_from_registry

    def changing(name: str) -> SimpleNamespace:
        def decompress(packed: dict[str, Tensor], scheme: Any) -> dict[str, Tensor]:
            return {"weight": real(name).decompress(packed, scheme)["weight"] * (1 + 1e-6)}

        return SimpleNamespace(compress=real(name).compress, decompress=decompress)

    library = SimpleNamespace(get_value_from_registry=changing)
    monkeypatch.setattr(deploy.compressed_export, "BaseCompressor", library)
    with pytest.raises(ParityError, match="compressed-tensors unpacks another weight"):
        export_compressed(made("W8A8").checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_at_once(
    made: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, usage = made("W8A8").checkpoint, shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ArtifactError, match=r"disk is full: .* needed, 100 bytes are"):
        export_compressed(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_config_says_what_is_quantized_and_how(made: Callable[[str], Exported]) -> None:
    found = made("W8A8").quantization
    assert found["quant_method"] == "compressed-tensors"
    assert found["version"] == "0.20.0"
    assert found["format"] == "int-quantized"
    assert found["quantization_status"] == "compressed"
    assert found["ignore"] == []
    static, token = found["config_groups"].values()
    assert [target for target in static["targets"] if target.startswith("re:")] == [
        rf"re:.*\.{part}$" for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    ]
    assert "lm_head" in static["targets"]
    assert token["targets"] == [r"re:.*\.o_proj$", r"re:.*\.down_proj$"]
    for group, strategy, dynamic in ((static, "tensor", False), (token, "token", True)):
        inputs, weights = group["input_activations"], group["weights"]
        assert (inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == (8, strategy, dynamic)
        assert (weights["num_bits"], weights["strategy"]) == (8, "channel")
        assert weights["symmetric"]
        assert inputs["symmetric"]
        assert group["format"] == "int-quantized"


@pytest.mark.parametrize("stored", [{}, {"architectures": None}, {"architectures": []}])
def test_a_config_without_architectures_gets_one(
    made: Callable[[str], Exported], tmp_path: Path, stored: dict[str, object]
) -> None:
    exported = made("W8A8")
    config = json.loads((exported.checkpoint / "config.json").read_text())
    assert config.pop("architectures", None) in (None, ["LlamaForCausalLM"])
    copy = shutil.copytree(exported.checkpoint, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps(config | stored))
    with Checkpoint(copy, verify=False) as checkpoint:
        deploy.compressed_export._name_architecture(checkpoint, copy)
    found = json.loads((copy / "config.json").read_text())
    assert found == config | {"architectures": ["LlamaForCausalLM"]}
    exported_config = json.loads((exported.directory / "config.json").read_text())
    assert exported_config["architectures"] == ["LlamaForCausalLM"]


def test_fewer_bits_are_packed_and_the_head_has_its_own_format(
    made: Callable[[str], Exported],
) -> None:
    found = made("W4A4 online").quantization
    assert found["format"] == "mixed-precision"
    groups = {group["targets"][0]: group for group in found["config_groups"].values()}
    assert groups["lm_head"]["format"] == "int-quantized"
    assert groups[r"re:.*\.o_proj$"]["format"] == "pack-quantized"
    assert groups[r"re:.*\.o_proj$"]["input_activations"]["num_bits"] == 4
    grouped = made("W4A8 grouped").quantization["config_groups"]["group_0"]
    for part in ("weights", "input_activations"):
        assert (grouped[part]["strategy"], grouped[part]["group_size"]) == ("group", 16)
    assert made("W6A6").quantization["ignore"] == ["lm_head"]


@pytest.mark.parametrize("name", CASES)
def test_the_stored_numbers_are_the_checkpoints(made: Callable[[str], Exported], name: str) -> None:
    exported = made(name)
    tensors = exported.tensors
    with Checkpoint(exported.checkpoint) as checkpoint:
        bits = Scheme.parse(name.split()[0]).weight_bits
        integers = checkpoint.integers(checkpoint.linear(DOWN)).astype(np.int64)
        scale = checkpoint.array(f"{DOWN}.weight_scale")
        q_input = checkpoint.linear("model.layers.0.self_attn.q_proj").activation
        static = checkpoint.has("model.layers.0.self_attn.q_proj.input_scale")
        table = checkpoint.load_model().get_submodule(checkpoint.names.embedding)
        rows = table(torch.arange(checkpoint.config.vocab_size))
        assert q_input is not None
    assert tensors[f"{DOWN}.weight_scale"].shape == (len(scale), scale.size // len(scale))
    assert np.array_equal(tensors[f"{DOWN}.weight_scale"].numpy().reshape(scale.shape), scale)
    assert ("model.layers.0.self_attn.q_proj.input_scale" in tensors) == static
    if static:
        assert tensors["model.layers.0.self_attn.q_proj.input_scale"].shape == (1,)
    assert torch.equal(tensors["model.embed_tokens.weight"], rows)
    if name.startswith("W8A8") and "grouped" not in name:
        assert tensors[f"{DOWN}.weight"].dtype == torch.int8
        assert np.array_equal(tensors[f"{DOWN}.weight"].numpy(), integers)
        return
    assert tensors[f"{DOWN}.weight_shape"].tolist() == list(integers.shape)
    words = tensors[f"{DOWN}.weight_packed"].numpy().view(np.uint32)
    stream = (words[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1  # low bits first
    columns = integers.shape[1]
    digits = stream.reshape(len(words), -1)[:, : columns * bits].reshape(-1, columns, bits)
    unpacked = (digits.astype(np.int64) << np.arange(bits)).sum(axis=-1) - 2 ** (bits - 1)
    assert np.array_equal(unpacked, integers)


def test_the_online_rotation_is_one_matrix_of_signs(made: Callable[[str], Exported]) -> None:
    exported = made("W8A8 online")
    (key,) = (key for key in exported.tensors if "R4" in key)
    stored = exported.tensors[key]
    assert key == f"{DOWN}.R4_input.weight"
    assert torch.equal(stored.abs(), torch.ones_like(stored))
    with Checkpoint(exported.checkpoint) as checkpoint:
        assert checkpoint.rotation is not None
        assert checkpoint.rotation.r4 is not None
        dense = checkpoint.rotation.r4.dense()
    torch.testing.assert_close(stored.double() / len(stored) ** 0.5, dense)
    (group,) = exported.quantization["transform_config"]["config_groups"].values()
    assert group["type"] == "random-hadamard"
    assert [
        (entry["targets"], entry["location"], entry["inverse"]) for entry in group["apply"]
    ] == [([r"re:.*\.down_proj$"], "input", False)]


def test_one_linear_with_its_own_format_is_named_in_full(
    made: Callable[[str], Exported], tmp_path: Path
) -> None:
    copy = shutil.copytree(made("W8A8").checkpoint, tmp_path / "copy")
    manifest = json.loads((copy / "rolora_manifest.json").read_text())
    manifest["details"]["linears"][DOWN]["activation_bits"] = 6
    (copy / "rolora_manifest.json").write_text(json.dumps(manifest))
    report = export_compressed(copy, tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    groups = [group["targets"] for group in config["quantization_config"]["config_groups"].values()]
    other = DOWN.replace("layers.0", "layers.1")
    assert groups[1:] == [[r"re:.*\.o_proj$", other], [DOWN]]
    assert report.to_dict()["reader"]["error"] < LEAST_BOUND


def test_what_the_format_cannot_say_is_refused(
    made: Callable[[str], Exported], tmp_path: Path
) -> None:
    model = made("W8A8").checkpoint.parent / "model"
    clipped = make_checkpoint(
        model, tmp_path / "clipped", "W4A4", weights="rtn", rotate="r1,r2", equalize="none"
    )
    message = r"4 linears .*o_proj .*clip their inputs at 0.7 .*--activation-clip 1"
    with pytest.raises(ConfigError, match=message):
        export_compressed(clipped, tmp_path / "out")
    plain = make_checkpoint(model, tmp_path / "plain", "FP32")
    with pytest.raises(ConfigError, match="nothing is quantized"):
        export_compressed(plain, tmp_path / "out")
    with pytest.raises(StageOrderError, match="make one with rolora merge-rotate-quantize"):
        export_compressed(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 8}, "the KV cache has 8 bits, expected a float one"),
        ({"asymmetric": True, "static": False}, "asymmetric, expected weights and inputs of 4"),
        ({"overrides": (Override.parse("down=A16"),)}, "down_proj has float, expected weights and"),
    ],
)
def test_what_is_not_written_here_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model")
    made = make_checkpoint(
        model, tmp_path / "made", "W8A8", weights="rtn", rotate="r1,r2", **options
    )
    with pytest.raises(ConfigError, match=message):
        export_compressed(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rotation_that_the_library_cannot_build_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", intermediate_size=45)
    checkpoint = make_checkpoint(
        model, tmp_path / "checkpoint", "W8A8", weights="rtn", kind=RotationKind.ORTHOGONAL
    )
    with pytest.raises(UnsupportedModelError, match=r"R4's size 45 .*--rotate r1,r2"):
        export_compressed(checkpoint, tmp_path / "out")


def test_an_orthogonal_rotation_is_read_too(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    checkpoint = make_checkpoint(
        model, tmp_path / "checkpoint", "W8A8", weights="rtn", kind=RotationKind.ORTHOGONAL
    )
    reader = export_compressed(checkpoint, tmp_path / "out").to_dict()["reader"]
    assert reader["error"] <= reader["bound"]


def test_a_finished_export_is_kept(made: Callable[[str], Exported]) -> None:
    exported = made("W8A8")
    written = (exported.directory / WEIGHTS).stat().st_mtime_ns
    assert export_compressed(exported.checkpoint, exported.directory).manifest == (
        exported.report.manifest
    )
    assert (exported.directory / WEIGHTS).stat().st_mtime_ns == written
    manifest = verify_files(exported.directory)
    assert manifest.kind is ArtifactKind.COMPRESSED
    assert manifest.parents == {"checkpoint": read_manifest(exported.checkpoint).digest}
    assert manifest.versions["compressed-tensors"] == "0.20.0"


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_readers_take_another_scale_than_we_do(bits: int) -> None:
    x = torch.tensor([[-3.0, 1.0]])
    greatest = 2 ** (bits - 1) - 1
    assert reader_divisor(bits) == greatest + 0.5
    assert float(quantize_tokens(x, bits, 1.0)[1]) == pytest.approx(3 / greatest)


@pytest.mark.parametrize("name", ["W8A8", "W8A8 online"])
def test_the_example_measures_the_same_without_this_package(
    made: Callable[[str], Exported], tmp_path: Path, name: str
) -> None:
    script = ROOT / "examples" / "read_compressed_tensors.py"
    imports = {
        alias.name.partition(".")[0]
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        str(node.module).partition(".")[0]
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    assert not imports & {"cli", "deploy", "reslora", "rolora"}
    exported = made(name)
    text = tmp_path / "text.txt"
    text.write_text(sample_text("evaluation.txt"), encoding="utf-8")
    options = ["--windows", "3", "--tokens", "64"]
    result = subprocess.run(
        [sys.executable, "-I", str(script), str(exported.directory), str(text), *options],
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr.decode()
    found = json.loads(result.stdout)["ppl"]
    opened = open_language_model(str(exported.directory))
    windows = cut_windows(opened.tokenizer, text.read_text(encoding="utf-8"), 3, 64)
    expected = evaluate_model(opened.model, None, windows, frozenset({Task.PPL}))["ppl"]
    assert found == pytest.approx(expected, rel=1e-4)


def test_r4_is_put_where_it_acts_in_a_plan_with_r3_too(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    checkpoint = make_checkpoint(
        model, tmp_path / "checkpoint", "W8A8", weights="rtn", rotate="r1,r2,r3,r4"
    )
    export_compressed(checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    transforms = json.dumps(config["quantization_config"]["transform_config"])
    assert "down_proj" in transforms
    assert "q_proj" not in transforms
