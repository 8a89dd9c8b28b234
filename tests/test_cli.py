"""What a user sees: exit codes, messages, JSON, and nothing left behind."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import cli
from deploy.export import ExportFormat, Target
from deploy.finetune import Method
from deploy.finetune_tasks import TrainingTask
from deploy.kernels import Kernel
from deploy.merge import Destination, FloatType
from deploy.presets import PRESETS, Preset
from deploy.quantized_training import LearnFrom
from deploy.shortcut_merge import AUTO
from reslora.config import Structure
from reslora.merge import MergeMethod
from reslora.settings import Keep, Precision, Scheduler
from rolora.learned import Objective
from rolora.rotation import DRAWN_KINDS
from rolora.scheme import ALL, WeightMethod
from rolora.scheme import AUTO as CHOSEN
from tests.deploy.tiny_artifacts import (
    make_adapter,
    make_checkpoint,
    make_export,
    save_model,
    write_rows,
)
from tests.deploy.tiny_classifiers import make_classifier_adapter, save_encoder, write_labelled

ROOT = Path(__file__).parents[1]
STAGES = (
    *("finetune", "merge", "learn-rotation", "merge-rotate-quantize", "export", "run"),
    *("evaluate", "bench", "parity", "inspect"),
)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class Terminal:
    """Runs the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: object) -> Result:
        self._monkeypatch.setattr(sys, "argv", ["rolora", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        streams = self._capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Result(code, streams.out, " ".join(streams.err.split()))


@pytest.fixture
def terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Terminal]:
    monkeypatch.setenv("COLUMNS", "200")
    levels = {name: logging.getLogger(name).level for name in ("transformers", "datasets")}
    yield Terminal(capsys, monkeypatch)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and what each stage makes of it."""
    base = tmp_path_factory.mktemp("cli")
    model = save_model(base / "model")
    save_model(base / "other", num_hidden_layers=3)
    write_rows(base / "rows.jsonl")
    make_adapter(model, base / "adapter", "rolora")
    make_checkpoint(model, base / "checkpoint", "FP32")
    make_export(base / "checkpoint", base / "onnx", Kernel.AUTO)
    return base


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "cli.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
        **options,
    )


def test_a_real_process_tells_faults_apart_and_keeps_json_alone_on_stdout(
    base: Path, tmp_path: Path
) -> None:
    helped = process("--help")
    assert helped.returncode == 0
    for stage in (*STAGES, "demo"):
        assert stage in helped.stdout
    good = process("inspect", base / "onnx", "--json")
    assert (good.returncode, json.loads(good.stdout)["manifest"]["kind"]) == (0, "onnx")
    wrong = process("inspect", base / "model")
    assert (wrong.returncode, wrong.stdout) == (3, "")
    assert wrong.stderr.startswith("error: ")
    assert "Traceback" not in wrong.stderr
    assert process("no-such-stage").returncode == 2


@pytest.mark.parametrize("stage", [*STAGES, "demo"])
def test_every_stage_explains_itself(terminal: Terminal, stage: str) -> None:
    result = terminal(stage, "--help")
    assert result.code == 0
    assert f"rolora {stage}" in result.out
    assert "--help" in result.out


def test_the_stages_run_from_the_command_line_with_json(
    terminal: Terminal, base: Path, tmp_path: Path
) -> None:
    result = terminal(
        *("finetune", "--model", base / "model", "--data", base / "rows.jsonl"),
        *("--output", tmp_path / "adapter", "--max-steps", 1, "--batch-size", 2),
        *("--max-tokens", 48, "--rank", 2, "--json"),
    )
    assert result.code == 0, result.err
    assert json.loads(result.out)["training"]["steps"] == 1
    text = tmp_path / "text.txt"
    text.write_text("a short calibration text, " * 9)
    result = terminal(
        *("merge-rotate-quantize", "--model", base / "model", "--adapter", tmp_path / "adapter"),
        *("--scheme", "w8a8", "--calibration", text, "--output", tmp_path / "checkpoint"),
        "--json",
    )
    assert result.code == 0, result.err
    assert json.loads(result.out)["scheme"] == "W8A8"
    result = terminal(
        *("export", "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "onnx"),
        "--json",
    )
    assert result.code == 0, result.err
    parity = json.loads(result.out)["parity"]
    assert parity["prefill_error"] <= parity["bound"]
    result = terminal(
        *("run", "--model", tmp_path / "onnx", "--prompt", "hi", "--chat", "--system", "be kind"),
        *("--max-new-tokens", 3, "--json"),
    )
    assert result.code == 0, result.err
    assert set(json.loads(result.out)) == {"model", "prompt", "text"}
    result = terminal(
        *("evaluate", "--model", tmp_path / "onnx", "--reference", base / "model"),
        *("--tasks", "ppl,kl", "--windows", 1, "--window-tokens", 32, "--threads", 1, "--json"),
    )
    assert result.code == 0, result.err
    assert set(json.loads(result.out)["results"]) >= {"ppl", "ppl_ratio", "kl_mean"}
    result = terminal(
        *("bench", "--model", tmp_path / "onnx", "--prompt-tokens", 8, "--new-tokens", 2),
        *("--runs", 1, "--threads", 1, "--json"),
    )
    assert result.code == 0, result.err
    assert json.loads(result.out)["prefill_tokens_per_s"] > 0
    result = terminal(
        *("bench", "--model", tmp_path / "onnx", "--prompt-tokens", 8, "--new-tokens", 2),
        *("--runs", 1, "--threads", 1, "--batch", 2, "--against", f"genai:{tmp_path / 'onnx'}"),
        *("--profile", tmp_path / "profile.json"),
    )
    assert result.code == 0, result.err
    for said in ("ours", "median of the rounds", "GroupQueryAttention", "multiplies at most"):
        assert said in result.out
    assert json.loads((tmp_path / "profile.json").read_text())["settings"]["batch"] == 2
    compared = ("--model", tmp_path / "onnx", "--checkpoint", tmp_path / "checkpoint")
    result = terminal("parity", *compared, "--report", tmp_path / "layers.json", "--every")
    assert result.code == 0, result.err
    assert "down_proj" in result.out
    assert json.loads((tmp_path / "layers.json").read_text())["first"] is None


def test_an_export_beyond_its_bounds_is_shown_and_ends_with_six(
    terminal: Terminal, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.part_parity.LEAST_BOUND", 0.0)
    monkeypatch.setattr("deploy.part_parity.FLOOR_FACTOR", 0.0)
    result = terminal(
        *("parity", "--model", base / "onnx", "--checkpoint", base / "checkpoint", "--json")
    )
    assert result.code == 6
    assert "the first to depart is layer 0" in result.err
    assert json.loads(result.out)["first"]["layer"] == "0"


def test_a_rotation_is_learned_shown_and_used(
    terminal: Terminal, base: Path, tmp_path: Path
) -> None:
    result = terminal(
        *("learn-rotation", "--model", base / "model", "--scheme", "W4A4", "--steps", 2),
        *("--best-of", 2, "--window-tokens", 16, "--held-out", 1, "--output", tmp_path / "r"),
        "--json",
    )
    assert result.code == 0, result.err
    learning = json.loads(result.out)["learning"]
    assert (learning["steps"], sorted(learning["draws"])) == (2, ["0", "1"])
    shown = terminal("inspect", tmp_path / "r").out
    assert "R1, R2, R4 (learned, seed" in shown
    assert "after 2 steps" in shown
    result = terminal(
        *mrq(base, "--scheme", "FP32", "--rotation", tmp_path / "r"),
        *("--output", tmp_path / "checkpoint", "--json"),
    )
    assert result.code == 0, result.err


def test_a_merge_says_how_far_it_is_from_the_unmerged_model(
    terminal: Terminal, base: Path, tmp_path: Path
) -> None:
    result = terminal(
        *("finetune", "--model", base / "model", "--data", base / "rows.jsonl"),
        *("--output", tmp_path / "adapter", "--max-steps", 1, "--batch-size", 2),
        *("--max-tokens", 48, "--rank", 2, "--structure", "input"),
    )
    assert result.code == 0, result.err
    said = "".join(result.out.split())  # lines fold anywhere
    assert "--mergeauto--schemeW8A8" in said, "without it the next command would fail"
    merge = mrq(base, "--adapter", tmp_path / "adapter", "--scheme", "FP32", "--merge")
    result = terminal(*merge, "auto", "--output", tmp_path / "auto", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)["merge"]
    assert report["kl_mean"] == min(each["kl_mean"] for each in report["candidates"].values())
    result = terminal(*merge, "auto", "--output", tmp_path / "auto")  # it is there already
    assert f"{report['method']}, KL to unmerged {report['kl_mean']:.3g}, top-1" in result.out
    assert f"input-norm {report['candidates']['input-norm']['kl_mean']:.3g}, " in result.out
    result = terminal(*merge, "drop", "--output", tmp_path / "drop")
    assert "drop, KL to unmerged" in result.out
    assert "KL of each method" not in result.out
    result = terminal(*merge, "auto", "--output", tmp_path / "dry", "--dry-run")
    assert json.loads(result.out)["merge"] == "auto"


def test_a_merge_leaves_as_a_model_and_as_an_adapter(
    terminal: Terminal, base: Path, tmp_path: Path
) -> None:
    result = terminal(
        *("finetune", "--model", base / "model", "--data", base / "rows.jsonl", "--max-steps", 1),
        *("--batch-size", 2, "--max-tokens", 48, "--rank", 2, "--rslora", "--init", "gaussian"),
        *("--output", tmp_path / "trained"),
    )
    assert result.code == 0, result.err
    merge = ("merge", "--model", base / "model", "--adapter", tmp_path / "trained", "--to")
    result = terminal(*merge, "model", "--dtype", "bfloat16", "--output", tmp_path / "m", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["merge"] == {"method": "exact"}
    result = terminal(*merge, "adapter", "--rank", 1, "--output", tmp_path / "a")
    assert result.code == 0, result.err
    assert "error of the lower rank" in result.out
    result = terminal(
        *("evaluate", "--model", tmp_path / "m", "--windows", 1, "--window-tokens", 32, "--json")
    )
    assert result.code == 0, result.err
    result = terminal(*merge, "adapter", "--output", tmp_path / "no", "--dry-run")
    assert json.loads(result.out)["to"] == "adapter"
    result = terminal(*merge, "model", "--rank", 1, "--output", tmp_path / "no")
    assert (result.code, "--rank is for --to adapter" in result.err) == (2, True)
    result = terminal(
        *("finetune", "--model", base / "model", "--data", base / "rows.jsonl"),
        *("--init", "pissa", "--output", tmp_path / "no"),
    )
    assert (result.code, "supported are default, gaussian" in result.err) == (2, True)
    assert not (tmp_path / "no").exists()


def test_results_are_readable_without_json(terminal: Terminal, base: Path) -> None:
    result = terminal("inspect", base / "adapter", "--verify")
    assert result.code == 0
    assert "trainable parameters" in result.out
    result = terminal("run", "--model", base / "onnx", "--prompt", "hello", "--max-new-tokens", 4)
    assert result.code == 0
    assert result.out.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "stage"),
    [
        (["finetune", "--model", "m", "--data", "d", "--method", "rolora"], "finetune"),
        (
            ["merge-rotate-quantize", "--model", "m", "--scheme", "W4A4", "--rotate", "r1"],
            "merge-rotate-quantize",
        ),
        (["export", "--checkpoint", "c"], "export"),
        (["export", "--checkpoint", "c", "--format", "compressed-tensors"], "export"),
    ],
)
def test_a_dry_run_prints_the_settings_and_does_nothing(
    terminal: Terminal, tmp_path: Path, arguments: list[str], stage: str
) -> None:
    result = terminal(*arguments, "--output", tmp_path / "out", "--dry-run")
    assert result.code == 0, result.err
    settings = json.loads(result.out)
    assert settings["stage"] == stage
    assert settings["output"] == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", Preset)
def test_a_preset_gives_defaults_that_options_override(terminal: Terminal, preset: str) -> None:
    bare = ("finetune", "--model", "m", "--data", "d", "--output", "out", "--dry-run")

    def shown(*options: object) -> dict[str, Any]:
        result = terminal(*bare, *options)
        assert result.code == 0, result.err
        settings = json.loads(result.out)
        parts = settings.pop("adapter") | settings.pop("training")
        flat = settings | parts
        assert flat.pop("preset") in (None, preset)
        return dict(flat)

    plain, taken = shown(), shown("--preset", preset)
    told = PRESETS[preset]
    assert taken == plain | told, "a preset sets what it names, and nothing else"
    assert taken != plain
    assert taken["batch_size"] * taken["gradient_accumulation"] == 128
    # also where an option says what would be its default without the preset
    rest = ("--rank", 16, "--learning-rate", 0.01)
    for order in ((*rest, "--preset", preset), ("--preset", preset, *rest)):
        assert shown(*order) == taken | {"rank": 16, "learning_rate": 0.01}


def test_training_options_reach_the_settings(terminal: Terminal) -> None:
    result = terminal(
        *("finetune", "--model", "m", "--data", "d", "--output", "out", "--dry-run"),
        *("--warmup-ratio", 0.2, "--scheduler", "linear", "--weight-decay", 0.3),
        *("--precision", "bfloat16", "--early-stopping", 3, "--keep", "last"),
        *("--best-metric", "accuracy", "--tensorboard", "curves"),
    )
    assert result.code == 0, result.err
    shown = json.loads(result.out)
    assert shown["tensorboard"] == "curves"
    training = shown["training"]
    told = {
        "warmup_ratio": 0.2,
        "scheduler": "linear",
        "weight_decay": 0.3,
        "precision": "bfloat16",
        "early_stopping": 3,
        "keep": "last",
        "best_metric": "accuracy",
    }
    assert training | told == training


def mrq(base: Path, *rest: object) -> list[object]:
    return ["merge-rotate-quantize", "--model", base / "model", *rest]


def faults(base: Path, tmp: Path) -> dict[str, tuple[int, str, list[object]]]:
    """Name each fault: exit code, words of the message, command line without --output."""
    tune = ["finetune", "--model", base / "model", "--data"]
    rows = base / "rows.jsonl"
    learn = ["learn-rotation", "--model", base / "model"]
    learn_w4a4 = [*learn, "--scheme", "W4A4"]
    return {
        "unknown preset": (2, "'reslora-nlg', 'reslora-nlu'", [*tune, rows, "--preset", "lora"]),
        "nothing to stop by": (
            2,
            "early_stopping needs validations",
            [*tune, rows, "--early-stopping", 2, "--eval-every", 0],
        ),
        "unknown scheme": (2, "supported: W{4,6,8,16}A{4,6,8,16}", mrq(base, "--scheme", "W5A5")),
        "unknown rotation": (2, "r1, r2, r3, r4", mrq(base, "--scheme", "W8A8", "--rotate", "r9")),
        "unknown cache bits": (
            2,
            "KV cache bits: expected 8, 4, or 16",
            mrq(base, "--scheme", "W8A8", "--kv-bits", 6),
        ),
        "other model": (
            4,
            "give the model it was trained on",
            [
                *("merge-rotate-quantize", "--model", base / "other", "--scheme", "W8A8"),
                *("--adapter", base / "adapter"),
            ],
        ),
        "other basis": (
            2,
            "can be merged only there",
            mrq(base, "--scheme", "W8A8", "--adapter", base / "adapter", "--rotation-seed", 7),
        ),
        "adapter for a model": (
            3,
            "expected a model, got an artifact of kind adapter",
            ["merge-rotate-quantize", "--model", base / "adapter", "--scheme", "W8A8"],
        ),
        "NaN": (
            4,
            "tensor model.norm.weight holds NaN",
            ["merge-rotate-quantize", "--model", tmp / "nan", "--scheme", "W8A8"],
        ),
        "damaged": (
            4,
            "model.safetensors",
            ["merge-rotate-quantize", "--model", tmp / "cut", "--scheme", "W8A8"],
        ),
        "missing shard": (
            4,
            "model-00002-of-00002.safetensors",
            ["merge-rotate-quantize", "--model", tmp / "shards", "--scheme", "W8A8"],
        ),
        "family": (
            5,
            "supported are llama, mistral, qwen2, qwen3",
            ["merge-rotate-quantize", "--model", tmp / "gpt2", "--scheme", "W8A8"],
        ),
        "no Hadamard": (
            5,
            "--rotation-kind orthogonal",
            ["merge-rotate-quantize", "--model", tmp / "odd", "--scheme", "W8A8"],
        ),
        "no data": (2, "holds no rows", [*tune, tmp / "empty.jsonl"]),
        "bad row": (2, "bad.jsonl:2: not valid JSON", [*tune, tmp / "bad.jsonl"]),
        "no file": (2, "no such file", [*tune, tmp / "absent.jsonl"]),
        "bad rank": (2, "rank must be at least 1, got 0", [*tune, rows, "--rank", 0]),
        "bad steps": (2, "max_steps must be at least 1", [*tune, rows, "--max-steps", 0]),
        "bad target": (2, "--targets 'z'", [*tune, rows, "--targets", "z"]),
        "structure": (
            2,
            "--method lora has no shortcuts",
            [*tune, rows, "--method", "lora", "--structure", "block"],
        ),
        "no rotation": (
            3,
            "rolora learn-rotation",
            mrq(base, "--scheme", "W8A8", "--rotation", base / "onnx"),
        ),
        "two rotations": (
            2,
            "leave --rotate",
            mrq(base, "--scheme", "W8A8", "--rotation", base / "checkpoint", "--rotate", "r1"),
        ),
        "rotation without rolora": (
            2,
            "use --method rolora",
            [*tune, rows, "--method", "lora", "--rotation", base / "checkpoint"],
        ),
        "no shortcuts": (
            2,
            "the shortcuts of --structure reach",
            [*tune, rows, "--method", "lora", "--depth", 2],
        ),
        "nothing to learn from": (
            2,
            "name it with --start",
            [*tune, rows, "--learn-from", "labels"],
        ),
        "no rotation to draw": (2, "use --method rolora", [*tune, rows, "--rotation-seed", 3]),
        "nothing to merge": (
            2,
            "--merge least-squares needs --adapter",
            mrq(base, "--scheme", "W8A8", "--merge", "least-squares"),
        ),
        "nothing to merge to": (
            2,
            "--merge and --calibration need --adapter",
            ["merge", "--to", "model", "--model", base / "model", "--merge", "auto"],
        ),
        "nothing to round": (
            2,
            "FP32 rounds nothing: --group-size, --static would do nothing",
            mrq(base, "--scheme", "FP32", "--group-size", 16, "--static", "all"),
        ),
        "nothing to learn for": (2, "such as W4A4", [*learn, "--scheme", "FP32"]),
        "no steps": (2, "--steps: expected at least 0, got -1", [*learn_w4a4, "--steps", -1]),
        "no rate": (2, "positive number, got 0.0", [*learn_w4a4, "--learning-rate", 0]),
        "only weights rounded": (
            2,
            "expected one that rounds activations",
            [*learn, "--scheme", "W4A16"],
        ),
        "long windows": (2, "held out, got 1; give", [*learn_w4a4, "--calibration", rows]),
        "not a checkpoint": (3, "rolora merge-rotate", ["export", "--checkpoint", base / "model"]),
        "no checkpoint": (2, "no such directory", ["export", "--checkpoint", tmp / "absent"]),
    }


NAMES = list(faults(Path(), Path()))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data with one fault each."""
    tmp = tmp_path_factory.mktemp("broken")
    (tmp / "empty.jsonl").write_text("")
    (tmp / "bad.jsonl").write_text('{"text": "fine"}\n{"text": oops}\n')
    save_model(tmp / "odd", intermediate_size=46)
    model = save_model(tmp / "nan")
    shutil.copytree(model, tmp / "cut")
    weights = tmp / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    tensors = load_file(model / "model.safetensors")
    half = sorted(tensors)[::2]
    shutil.copytree(model, tmp / "shards")
    (tmp / "shards" / "model.safetensors").unlink()
    save_file({key: tensors[key] for key in half}, tmp / "shards/model-00001-of-00002.safetensors")
    index = {key: f"model-0000{1 if key in half else 2}-of-00002.safetensors" for key in tensors}
    (tmp / "shards" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    shutil.copytree(model, tmp / "gpt2")
    config = json.loads((model / "config.json").read_text()) | {"model_type": "gpt2"}
    (tmp / "gpt2" / "config.json").write_text(json.dumps(config))
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return tmp


@pytest.mark.parametrize("name", NAMES)
def test_each_fault_has_its_exit_code_its_message_and_leaves_nothing(
    name: str, terminal: Terminal, base: Path, broken: Path, tmp_path: Path
) -> None:
    code, said, arguments = faults(base, broken)[name]
    result = terminal(*arguments, "--output", tmp_path / "deep" / "out")
    assert said in result.err
    assert (result.code, result.out) == (code, "")
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["evaluate", "--model", "onnx", "--tasks", "bleu"], 2, "--tasks 'bleu'"),
        (["evaluate", "--model", "onnx", "--tasks", "kl", "--windows", "1"], 2, "--reference"),
        (["evaluate", "--model", "onnx", "--window-tokens", "500"], 2, "context length of 128"),
        (["evaluate", "--model", "onnx", "--data", "absent.txt"], 2, "no such file"),
        (["evaluate", "--model", "onnx", "--threads", "0"], 2, "--threads: expected at least 1"),
        (["evaluate", "--model", "adapter"], 3, "no model by itself"),
        (["demo", "--steps", "0"], 2, "max_steps must be at least 1"),
        (["run", "--model", "checkpoint", "--prompt", "x"], 3, "rolora export"),
        (["run", "--model", "onnx", "--prompt", ""], 2, "expected some text"),
        (["run", "--model", "onnx", "--prompt", "x", "--system", "y"], 2, "--system needs --chat"),
        (["run", "--model", "onnx", "--prompt", "x", "--top-p", "2"], 2, "--top-p"),
        (["bench", "--model", "onnx", "--runs", "0"], 2, "every count must be at least 1"),
        (["bench", "--model", "adapter"], 3, "expected an artifact of kind onnx"),
        (["bench", "--model", "onnx", "--against", "vllm"], 2, "'vllm' is none of"),
        (["bench", "--model", "onnx", "--peer-model", "m"], 2, "only --against takes peers"),
        (["bench", "--model", "onnx", "--profile", "no/p.json"], 2, "--profile no/p.json"),
        (["parity", "--model", "adapter", "--checkpoint", "checkpoint"], 3, "of kind onnx"),
        (["inspect", "absent"], 2, "no such directory"),
    ],
)
def test_stages_that_write_nothing_tell_faults_apart_too(
    terminal: Terminal,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(base)
    result = terminal(*arguments)
    assert said in result.err
    assert (result.code, result.out) == (code, "")


@pytest.mark.parametrize("bits", [[], ["--scheme", "W8A8", "--method", "x"]])
def test_a_missing_or_unknown_option_is_a_usage_error(terminal: Terminal, bits: list[str]) -> None:
    assert terminal("merge-rotate-quantize", "--model", "m", "--output", "o", *bits).code == 2


def test_an_output_that_exists_is_refused_and_the_very_result_is_kept(
    terminal: Terminal, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("precious")
    command = ("export", "--checkpoint", base / "checkpoint", "--output")
    result = terminal(*command, tmp_path / "kept")
    assert result.code == 2
    assert "exists already" in result.err
    assert (tmp_path / "kept" / "thesis.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    written = (base / "onnx" / "model.onnx").stat().st_mtime_ns
    again = terminal(*command, base / "onnx", "--json")
    assert again.code == 0
    assert json.loads(again.out)["output"] == str(base / "onnx")
    assert (base / "onnx" / "model.onnx").stat().st_mtime_ns == written


def test_a_failed_parity_check_ends_with_six_and_nothing_on_disk(
    terminal: Terminal, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.parity.LEAST_BOUND", 0.0)
    monkeypatch.setattr("deploy.parity.FLOOR_FACTOR", 0.0)
    result = terminal("export", "--checkpoint", base / "checkpoint", "--output", tmp_path / "out")
    assert result.code == 6
    assert "departs from the torch reference" in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_that_a_target_lacks_is_refused_before_anything_is_read(
    terminal: Terminal, tmp_path: Path
) -> None:
    command = ("export", "--checkpoint", tmp_path / "no", "--output", tmp_path / "out", "--dry-run")
    refused = terminal(*command, "--target", "qdq", "--kernel", "nbits")
    assert refused.code == 2
    assert "--target qdq has no --kernel nbits" in refused.err
    portable = json.loads(terminal(*command, "--kernel", "qdq").out)
    assert (portable["target"], portable["kernel"]) == ("qdq", "qdq")
    plain = json.loads(terminal(*command).out)
    assert (plain["target"], plain["kernel"]) == ("cpu", "auto")


def test_adapters_are_kept_by_name_and_selected_by_it(
    terminal: Terminal, base: Path, tmp_path: Path
) -> None:
    command = ("export", "--checkpoint", base / "checkpoint", "--output", tmp_path / "out")
    for options, said in (
        (("--model", "m"), "--model needs --keep-adapter"),
        (("--keep-adapter", "a", "--format", "compressed-tensors"), "only --format onnx has"),
        (("--keep-adapter", "x/a", "--keep-adapter", "y/a"), "is the name of two adapters"),
    ):
        refused = terminal(*command, *options)
        assert (refused.code, said in refused.err) == (2, True), refused.err
    resolved = json.loads(terminal(*command, "--keep-adapter", "one=x/a", "--dry-run").out)
    assert resolved["keep_adapter"] == {"one": "x/a"}
    exported = terminal(*command, "--keep-adapter", f"one={base / 'adapter'}")
    assert (exported.code, "changes logits by" in exported.out) == (0, True), exported.err
    run = ("run", "--model", tmp_path / "out", "--prompt", "x", "--max-new-tokens", "6", "--json")
    plain, adapted = (json.loads(terminal(*run, *name).out) for name in ((), ("--adapter", "one")))
    assert plain["text"] != adapted["text"]
    refused = terminal(*run, "--adapter", "two")
    assert (refused.code, "has no adapter 'two', it has one" in refused.err) == (2, True)


def test_an_export_for_other_programs_warns_of_what_they_must_do(
    terminal: Terminal, base: Path, tmp_path: Path
) -> None:
    command = ("export", "--format", "compressed-tensors", "--checkpoint")
    for option in (("--kernel", "auto"), ("--target", "cpu")):
        refused = terminal(*command, base / "checkpoint", "--output", tmp_path / "out", *option)
        assert (refused.code, f"{option[0]}: only --format onnx" in refused.err) == (2, True)
    make_checkpoint(base / "model", tmp_path / "online", "W8A8", weights="rtn")
    make_checkpoint(base / "model", tmp_path / "plain", "W8A8", weights="rtn", rotate="r1,r2")
    warned = terminal(*command, tmp_path / "online", "--output", tmp_path / "out", "--json")
    assert warned.code == 0
    assert json.loads(warned.out)["online_rotation"]
    assert "ignores `transform_config`" in warned.err
    quiet = terminal(*command, tmp_path / "plain", "--output", tmp_path / "other")
    assert quiet.code == 0
    assert "transform_config" not in quiet.err
    assert "group_0" in quiet.out
    described = terminal("inspect", tmp_path / "out", "--json")
    assert json.loads(described.out)["manifest"]["kind"] == "compressed-tensors"
    ran = terminal("run", "--model", tmp_path / "out", "--prompt", "x")
    assert (ran.code, "evaluate --model, transformers or vLLM" in ran.err) == (3, True)


def test_a_bug_shows_its_traceback(
    terminal: Terminal, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("deploy.describe.describe_artifact", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        terminal("inspect", base / "onnx")


WAITING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
import {module} as stage
def wait(*arguments, **options):
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(120)
stage.{function} = wait
import cli
sys.argv = ["rolora", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.parametrize(
    ("module", "function", "arguments"),
    [
        ("deploy.export", "check_parity", ["export", "--checkpoint", "checkpoint"]),
        (
            "deploy.merge_rotate_quantize",
            "write_weights",
            ["merge-rotate-quantize", "--model", "model", "--scheme", "FP32"],
        ),
        (
            "deploy.finetune",
            "save_adapter",
            [
                *("finetune", "--model", "model", "--data", "rows.jsonl", "--max-steps", "1"),
                *("--max-tokens", "48", "--rank", "2"),
            ],
        ),
    ],
)
def test_ctrl_c_while_a_stage_writes_leaves_nothing_that_looks_finished(
    module: str, function: str, arguments: list[str], base: Path, tmp_path: Path
) -> None:
    script = WAITING.format(module=module, function=function)
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments, "--output", tmp_path / "out"],
        cwd=base,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as running:
        try:
            assert running.stderr is not None
            before = []
            for text in running.stderr:
                before.append(text)
                if "waiting" in text:
                    break
            hidden = [path.name for path in tmp_path.iterdir() if ".partial-" in path.name]
            assert hidden, "".join(before)
            running.send_signal(signal.SIGINT)
            _, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 130, err
    assert "interrupted; nothing half-written is left" in err
    assert "Traceback" not in err
    left = {path.name for path in tmp_path.iterdir()}
    kept = {"deploy.finetune": {"out.training"}, "deploy.merge_rotate_quantize": {"out.quantizing"}}
    assert left == kept.get(module, set()), "only what a rerun goes on from stays"


def test_an_encoder_learns_to_classify_from_the_command_line(
    terminal: Terminal, base: Path, tmp_path: Path
) -> None:
    model, data = save_encoder(tmp_path / "bert"), write_labelled(tmp_path / "rows.jsonl")
    train = ("finetune", "--model", model, "--data", data, "--structure", "input", "--rank", 2)
    quick = ("--max-steps", 2, "--max-tokens", 32, "--targets", "query,value")
    forgot = terminal(*train, *quick, "--output", tmp_path / "out")
    assert forgot.code == 2
    assert "labels are learned by an encoder with --task classification" in forgot.err
    data_of_language = write_rows(tmp_path / "language.jsonl")
    forgot = terminal(*train[:3], "--data", data_of_language, "--output", tmp_path / "out")
    assert (forgot.code, "add --task classification" in forgot.err) == (5, True)
    task = ("--task", "classification")
    done = terminal(*train, *quick, *task, "--output", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    training = json.loads(done.out)["training"]
    assert training["eval_metrics"][-1][1].keys() == {"accuracy", "mcc", "f1"}
    measure = ("evaluate", "--tasks", "classification", "--data", data, "--model", model)
    found = terminal(*measure, "--adapter", tmp_path / "out", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["results"].keys() == {"accuracy", "mcc", "f1", "n", "loss"}
    assert terminal(*measure, "--json").code == 2, "the bare encoder has no head"
    mixed = terminal("evaluate", "--tasks", "ppl,classification", "--data", data, "--model", model)
    assert (mixed.code, "classification stands alone" in mixed.err) == (2, True)
    limited = terminal(*measure, "--adapter", tmp_path / "out", "--limit", 1)
    assert (limited.code, "no --limit" in limited.err) == (2, True)


def test_an_encoder_goes_from_adapter_to_answers_in_integers(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = save_encoder(tmp_path / "bert"), tmp_path / "adapter.jsonl"
    make_classifier_adapter(model, tmp_path / "adapter")
    quantize = ("merge-rotate-quantize", "--model", model, "--adapter", tmp_path / "adapter")
    options = ("--scheme", "W8A8", "--output", tmp_path / "checkpoint")
    shown = json.loads(terminal(*quantize, *options, "--dry-run").out)
    assert (shown["rotate"], shown["recipe"]["static_after_norm"]) == ([], None)
    assert shown["recipe"]["head_bits"] == 32
    unfit = ("--rotate", "r1,r2", "--rotation-block", 8, "--head-bits", 8)
    refused = terminal(*quantize, *options, *unfit)
    assert refused.code == 2
    assert "3 faults: - an encoder is not rotated" in refused.err
    shortcut = terminal(*quantize, *options)
    assert (shortcut.code, "cannot merge structure input" in shortcut.err) == (2, True)
    done = terminal(*quantize, *options, "--merge", "auto", "--rotate", "none")
    assert done.code == 0, done.err
    export = ("export", "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "onnx")
    with monkeypatch.context() as patch:
        patch.setattr("deploy.encoder_parity.LEAST_BOUND", 0.0)
        patch.setattr("deploy.encoder_parity.FLOOR_FACTOR", 0.0)
        failed = terminal(*export)
        assert failed.code == 6
        assert "departs from the torch reference" in failed.err
        assert not (tmp_path / "onnx").exists()
    written = terminal(*export)
    assert written.code == 0, written.err
    assert "rolora evaluate --tasks classification" in written.out
    measure = ("evaluate", "--tasks", "classification", "--data", data, "--model")
    for directory in ("checkpoint", "onnx"):
        found = terminal(*measure, tmp_path / directory, "--threads", 1, "--json")
        assert found.code == 0, found.err
        assert json.loads(found.out)["results"]["n"] == 16
    inspected = terminal("inspect", tmp_path / "onnx", "--verify")
    assert inspected.code == 0
    assert "onnx-encoder" in inspected.out
    assert "MultiHeadAttention" in inspected.out
    wrong = terminal("run", "--model", tmp_path / "onnx", "--prompt", "x")
    assert (wrong.code, "got kind onnx-encoder" in wrong.err) == (3, True)


@pytest.mark.parametrize(
    ("offered", "known"),
    [
        (cli.MethodName, Method),
        (cli.TaskName, TrainingTask),
        (cli.StructureName, Structure),
        (cli.PresetName, Preset),
        (cli.SchedulerName, Scheduler),
        (cli.KeepName, Keep),
        (cli.PrecisionName, Precision),
        (cli.MergeName, [*MergeMethod, AUTO]),
        (cli.DestinationName, Destination),
        (cli.DtypeName, FloatType),
        (cli.KindName, DRAWN_KINDS),
        (cli.ObjectiveName, Objective),
        (cli.WeightsName, WeightMethod),
        (cli.LearnFromName, LearnFrom),
        (cli.FormatName, ExportFormat),
        (cli.TargetName, Target),
        (cli.KernelName, Kernel),
        (cli.StaticName, ["yes", "no", CHOSEN, ALL]),
    ],
)
def test_the_choices_offered_are_those_that_the_stages_know(offered: Any, known: Any) -> None:
    # cli.py spells them again, since importing the stages for --help would take seconds.
    assert {str(choice) for choice in offered} == {str(choice) for choice in known}
