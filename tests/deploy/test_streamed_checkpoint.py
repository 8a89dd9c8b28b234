"""A model quantized part by part, from disk, through kills: the same files as in one go."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deploy import part_store, part_walk
from deploy.artifact import read_manifest
from deploy.calibration_text import calibration_batches
from deploy.checkpoint import Checkpoint, stored_tensors
from deploy.checkpoint_reader import WEIGHTS_NAME
from deploy.errors import ArtifactError, ConfigError
from deploy.loading import load_local_tokenizer
from deploy.merge_rotate_quantize import merge_rotate_quantize
from deploy.part_store import PartStore, progress_directory
from rolora.calibration import observe_inputs
from rolora.overrides import Override
from tests.conftest import MODEL_TYPES, build_tiny_model
from tests.deploy.tiny_artifacts import HEAD_DIM, make_adapter, make_checkpoint, save_model

ROOT = Path(__file__).parents[2]
GPTQ = {"scheme": "W4A8", "windows": 3}
KILLED = """
import sys, time
from pathlib import Path
from deploy.part_store import PartStore
from tests.deploy.tiny_artifacts import make_checkpoint
add = PartStore.add
def add_and_hang(store, *arguments):
    add(store, *arguments)
    if len(store.parts) == int(sys.argv[3]):
        print("stored", flush=True)
        time.sleep(120)
PartStore.add = add_and_hang
make_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), "W4A8", windows=3)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("streamed") / "tiny", "qwen2", num_hidden_layers=3)


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest(make_checkpoint(model, tmp_path_factory.mktemp("whole") / "out", **GPTQ))


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run the stage with the whole model in memory."""

    def make(*arguments: Any, **options: Any) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr("deploy.decoder_source.open_weight_stream", lambda located: None)
            return make_checkpoint(*arguments, **options)

    return make


@pytest.fixture
def no_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("the whole model was loaded")

    monkeypatch.setattr("deploy.decoder_source.load_model", refuse)


def digest(checkpoint: Path) -> str:
    """Return the digest of the manifest, which names the sha256 of every file."""
    return read_manifest(checkpoint).digest


def fail_at(monkeypatch: pytest.MonkeyPatch, part: int, error: BaseException) -> None:
    """Let the writing of a part and of all behind it fail, until the patch is undone."""
    add = PartStore.add

    def add_or_fail(store: PartStore, *arguments: Any) -> None:
        if len(store.parts) >= part:
            raise error
        add(store, *arguments)

    monkeypatch.setattr(PartStore, "add", add_or_fail)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "W4A8", "windows": 2},
        {"scheme": "W8A8", "weights": "rtn", "rotate": "r1,r4", "adapter": "reslora"},
        {"scheme": "W8A6", "weights": "rtn", "adapter": "rolora"},
        {"scheme": "W8A8", "rotate": "none", "head_bits": 32, "embedding_bits": 32},
        {"scheme": "FP32", "adapter": "reslora"},
        {"scheme": "FP32", "rotate": "none"},
        {"scheme": "W4A4", "weights": "rtn"},
        {"scheme": "FP32", "equalize": "all", "adapter": "reslora"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_a_streamed_checkpoint_is_that_of_the_model_in_memory(
    model_type: str,
    options: dict[str, Any],
    tmp_path: Path,
    in_memory: Callable[..., Path],
    request: pytest.FixtureRequest,
) -> None:
    tied = model_type in ("llama", "qwen3")
    model = save_model(tmp_path / "model", model_type, tied=tied)
    if "adapter" in options:
        options = options | {"adapter": make_adapter(model, tmp_path / "a", options["adapter"])}
    expected = in_memory(model, tmp_path / "memory", **options)
    request.getfixturevalue("no_whole_model")
    streamed = make_checkpoint(model, tmp_path / "streamed", **options)
    assert digest(streamed) == digest(expected)
    assert not progress_directory(streamed).exists()


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "W4A8", "windows": 2, "kv_bits": 8},
        {"scheme": "FP32", "kv_bits": 4, "embedding_bits": 32},
        {"scheme": "W4A16", "weights": "rtn", "overrides": ("down=W16A8",)},
        {"scheme": "W8A8", "weights": "rtn", "overrides": ("head=W16",)},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_caches_and_overrides_stream_too(
    options: dict[str, Any],
    model: Path,
    tmp_path: Path,
    in_memory: Callable[..., Path],
    request: pytest.FixtureRequest,
) -> None:
    overrides = tuple(Override.parse(text) for text in options.get("overrides", ()))
    options = options | {"overrides": overrides}
    expected = in_memory(model, tmp_path / "memory", **options)
    request.getfixturevalue("no_whole_model")
    streamed = make_checkpoint(model, tmp_path / "streamed", **options)
    assert digest(streamed) == digest(expected)


@pytest.mark.parametrize("scheme", ["W4A8", "FP32"])
def test_a_quantized_cache_goes_on_behind_an_interruption(
    scheme: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"scheme": scheme, "windows": 2, "kv_bits": 8}
    expected = digest(make_checkpoint(model, tmp_path / "whole", **options))
    fail_at(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(model, tmp_path / "out", **options)
    monkeypatch.undo()
    copy = tmp_path / "control"
    shutil.copytree(progress_directory(tmp_path / "out"), progress_directory(copy))
    assert digest(make_checkpoint(model, tmp_path / "out", **options)) == expected
    states = PartStore.states  # the control: behind other hidden states come other scales
    monkeypatch.setattr(
        PartStore,
        "states",
        lambda s: {key: 2 * value + key.startswith("cache.") for key, value in states(s).items()},
    )
    assert digest(make_checkpoint(model, copy, **options)) != expected


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("weights", ["rtn", "gptq"])
def test_a_shared_table_streams_and_outlives_an_interruption(
    weights: str,
    bits: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_memory: Callable[..., Path],
    request: pytest.FixtureRequest,
) -> None:
    model = save_model(tmp_path / "model", "llama", tied=True)
    options = {
        "scheme": "W4A8",
        "weights": weights,
        "windows": 2,
        "shared_table": True,
        "embedding_bits": bits,
        "head_bits": bits,
    }
    expected = digest(in_memory(model, tmp_path / "memory", **options))
    request.getfixturevalue("no_whole_model")
    with monkeypatch.context() as patch:
        fail_at(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make_checkpoint(model, tmp_path / "out", **options)
    assert digest(make_checkpoint(model, tmp_path / "out", **options)) == expected


@pytest.mark.parametrize("equalize", ["inner", "all"])
def test_a_run_goes_on_with_the_channel_scales_of_its_stored_parts(
    equalize: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"scheme": "W4A4", "weights": "rtn", "equalize": equalize}
    expected = digest(make_checkpoint(model, tmp_path / "whole", **options))
    for finished in (2, 5):
        output = tmp_path / f"out-{finished}"
        with monkeypatch.context() as patch:
            if finished == 2:
                fail_at(patch, finished, KeyboardInterrupt())
            else:  # killed between the last part and the checkpoint
                patch.setattr("deploy.merge_rotate_quantize.write_weights", interrupt)
            with pytest.raises(KeyboardInterrupt):
                make_checkpoint(model, output, **options)
        with monkeypatch.context() as patch:
            patch.setattr(
                "deploy.merge_rotate_quantize.measure_equalization",
                lambda *_: pytest.fail("measured anew: another basis on another machine"),
            )
            assert digest(make_checkpoint(model, output, **options)) == expected


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_is_chosen_on_the_running_model_has_all_of_it_and_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    run = merge_rotate_quantize
    monkeypatch.setattr(
        "tests.deploy.tiny_artifacts.merge_rotate_quantize",
        lambda settings, output: run(settings, output, said.append),
    )
    options = {"scheme": "W8A8", "weights": "rtn", "static": "auto"}
    expected = digest(make_checkpoint(model, tmp_path / "whole", **options))
    assert any("whole model in memory: bits, clips or static" in line for line in said)
    said.clear()
    make_checkpoint(model, tmp_path / "streamed", "W8A8", weights="rtn")
    assert said
    assert not any("whole model" in line for line in said)
    fail_at(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(model, tmp_path / "out", **options)
    monkeypatch.undo()
    formats = part_walk.formats_to_details
    with monkeypatch.context() as patch:
        patch.setattr(part_walk, "formats_to_details", lambda plans: formats(plans[1:]))
        with pytest.raises(ConfigError, match=r"q_proj and 0 others .*--no-resume"):
            make_checkpoint(model, tmp_path / "out", **options)
    assert digest(make_checkpoint(model, tmp_path / "out", **options)) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_of_halves_stream_too(
    dtype: torch.dtype, tmp_path: Path, in_memory: Callable[..., Path]
) -> None:
    model = save_model(tmp_path / "model")
    halves = build_tiny_model("llama", head_dim=HEAD_DIM, num_hidden_layers=2).to(dtype)
    (model / "model.safetensors").unlink()
    halves.save_pretrained(model, max_shard_size=20_000)
    assert len(list(model.glob("model-*.safetensors"))) > 2
    expected = in_memory(model, tmp_path / "memory", "W8A8")
    streamed = make_checkpoint(model, tmp_path / "streamed", "W8A8")
    assert digest(streamed) == digest(expected)


def test_static_scales_are_those_of_a_forward_pass_of_the_whole_float_model(
    model: Path, tmp_path: Path
) -> None:
    exact = make_checkpoint(model, tmp_path / "float", "FP32")
    output = make_checkpoint(model, tmp_path / "out", "W8A8", windows=3, equalize="none")
    with Checkpoint(exact) as checkpoint:
        names, float_model = checkpoint.names, checkpoint.load_model()
    batches = calibration_batches(load_local_tokenizer(exact), None, windows=3, tokens=64)
    fqns = [fqn for block in names.blocks for fqn in (block.query, block.gate)] + [names.head]
    observers = observe_inputs(float_model, fqns, batches)
    tensors = load_file(output / WEIGHTS_NAME)
    for fqn in fqns:
        assert tensors[f"{fqn}.input_scale"] == torch.tensor(observers[fqn].scale(8)), fqn
    other = observe_inputs(float_model, fqns, batches[:1])
    assert any(other[fqn].scale(8) != observers[fqn].scale(8) for fqn in fqns)


def test_no_more_than_one_part_is_in_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    def look(whole: nn.Module, fqns: Iterable[str]) -> dict[str, Tensor]:
        held = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
        present = {name for name, tensor in held.items() if tensor.device.type != "meta"}
        parts = tuple(fqns)
        outside = {name for name in present if not name.startswith(parts)}
        assert present - outside
        seen.append({name for name in outside if "inv_freq" not in name})
        return stored_tensors(whole, parts)

    monkeypatch.setattr(part_walk, "stored_tensors", look)
    make_checkpoint(model, tmp_path / "out", **GPTQ)
    assert seen == [set()] * 5


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_kill_9_costs_only_the_part_at_hand(
    parts: int,
    model: Path,
    uninterrupted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(model), str(output), str(parts)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stored\n"
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    assert progress_directory(output).is_dir()
    copy = tmp_path / "control" / "out"
    copy.parent.mkdir()
    shutil.copytree(progress_directory(output), progress_directory(copy))
    worked: list[str] = []
    add = PartStore.add

    def note(store: PartStore, name: str, *arguments: Any) -> None:
        worked.append(name)
        add(store, name, *arguments)

    monkeypatch.setattr(PartStore, "add", note)
    assert digest(make_checkpoint(model, output, **GPTQ)) == uninterrupted
    assert worked == ["embedding", "block-0000", "block-0001", "block-0002", "head"][parts:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["control", "out"]
    if parts < 5:  # the control: behind other hidden states come other integers
        states = PartStore.states
        monkeypatch.setattr(
            PartStore, "states", lambda s: {key: 2 * value + 1 for key, value in states(s).items()}
        )
        assert digest(make_checkpoint(model, copy, **GPTQ)) != uninterrupted


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (OSError(28, "No space left on device"), ArtifactError, "the disk is full"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (SystemExit(143), SystemExit, "^143$"),
    ],
)
def test_an_interruption_keeps_finished_parts_and_says_so(
    error: BaseException,
    raised: type[BaseException],
    said: str,
    model: Path,
    uninterrupted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fail_at(monkeypatch, 3, error)
    with pytest.raises(raised, match=said):
        make_checkpoint(model, tmp_path / "out", **GPTQ)
    assert [path.name for path in tmp_path.iterdir()] == ["out.quantizing"]
    assert "keeps 3 finished parts: the same command goes on from there" in caplog.text
    monkeypatch.undo()
    assert digest(make_checkpoint(model, tmp_path / "out", **GPTQ)) == uninterrupted


def test_other_settings_do_not_go_on_with_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(model, tmp_path / "out", **GPTQ)
    monkeypatch.undo()
    with pytest.raises(
        ConfigError, match=r"3 finished .*scheme: 'W4A8' then, 'W8A8' now.*--no-resume"
    ):
        make_checkpoint(model, tmp_path / "out", "W8A8", windows=3)
    damaged = progress_directory(tmp_path / "out") / "block-0001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ArtifactError, match=r"block-0001\.safetensors: not what was written"):
        make_checkpoint(model, tmp_path / "out", **GPTQ)
    assert not (tmp_path / "out").exists()


def test_parts_of_a_finished_output_are_removed(model: Path, tmp_path: Path) -> None:
    output = make_checkpoint(model, tmp_path / "out", "FP32", rotate="none")
    left = progress_directory(output)
    left.mkdir()
    (left / part_store.RECORD_NAME).write_text("{}")
    make_checkpoint(model, output, "FP32", rotate="none")
    assert not left.exists()


def edit(model: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = model / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.usefixtures("no_whole_model")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"model.norm.weight": t["model.norm.weight"][:-1]}, r"norm.*file \[31\]"),
        (lambda t: t | {"model.more": t["model.norm.weight"].clone()}, "has not, model.more"),
        (
            lambda t: {key: value for key, value in t.items() if "1.mlp.up" not in key},
            r"lack model\.layers\.1\.mlp\.up_proj\.weight",
        ),
    ],
)
def test_files_that_do_not_fit_are_named_before_any_work(
    change: Any, said: str, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model")
    edit(model, change)
    with pytest.raises(ArtifactError, match=said):
        make_checkpoint(model, tmp_path / "out", "W8A8")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.usefixtures("no_whole_model")
def test_old_rotary_buffers_in_the_files_do_no_harm(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    before = make_checkpoint(model, tmp_path / "a", "FP32")
    edit(model, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    after = make_checkpoint(model, tmp_path / "b", "FP32")
    assert (after / WEIGHTS_NAME).read_bytes() == (before / WEIGHTS_NAME).read_bytes()


def test_files_with_other_names_are_left_to_transformers(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tied=True)
    before = make_checkpoint(model, tmp_path / "a", "FP32")
    edit(model, lambda t: {key.removeprefix("model."): value for key, value in t.items()})
    after = make_checkpoint(model, tmp_path / "b", "FP32")
    assert (after / WEIGHTS_NAME).read_bytes() == (before / WEIGHTS_NAME).read_bytes()


def test_another_text_in_the_same_calibration_file_is_another_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five. " * 40, encoding="utf-8")
    options: dict[str, Any] = {"scheme": "W8A8", "weights": "rtn", "calibration": str(text)}
    make_checkpoint(model, tmp_path / "out", **options)
    make_checkpoint(model, tmp_path / "out", **options)
    with monkeypatch.context() as patch:
        fail_at(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make_checkpoint(model, tmp_path / "killed", **options)
    text.write_text("other words entirely, and more of them. " * 40, encoding="utf-8")
    for name in ("out", "killed"):
        with pytest.raises(ConfigError):
            make_checkpoint(model, tmp_path / name, **options)
