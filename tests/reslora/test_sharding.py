from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reslora.adapter import load_adapter
from reslora.attach import attach_adapters
from reslora.checkpoints import MARKER_FILE
from reslora.config import AdapterConfig, Structure
from reslora.settings import TrainSettings
from reslora.sharding import (
    SWITCH,
    hidden_from_accelerate,
    is_sharded,
    shard_frozen,
    sharding_wanted,
)
from reslora.train import train_adapter
from reslora.train_report import OF_THIS_PROCESS
from reslora.training_data import language_data
from tests.reslora import train_tiny
from tests.reslora.tiny import build_llama, build_tokenizer, tiny_examples

TRAIN_TINY = str(train_tiny.__file__)
REPLICATED = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
SHARDED = (
    *("accelerate.commands.launch", "--use_fsdp", "--fsdp_version=2", "--num_processes=2"),
    *("--main_process_port=0", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
)
WEIGHTS = "adapter_model.safetensors"
KINDS = {"lora": ("--lora",)} | {name.value: ("--structure", name.value) for name in Structure}
FSDP = {SWITCH: "true", "FSDP_VERSION": "2"}


def launch(launcher: tuple[str, ...], *runs: tuple[str, ...]) -> int:
    """Run `train_tiny.py` in two processes on the CPU; pytest shows what they complain of."""
    command = [sys.executable, "-W", "ignore", "-m", *launcher, TRAIN_TINY]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--in-turn", json.dumps(runs)],
        stdout=subprocess.PIPE,
        timeout=900,
        env=environment,
    )
    return done.returncode


def difference(ours: Path, theirs: Path) -> float:
    """Largest difference of two adapters' tensors, relative to the largest of the first."""
    factors = [load_adapter(path).factors for path in (ours, theirs)]
    assert factors[0].keys() == factors[1].keys()
    pairs = [
        pair for fqn in factors[0] for pair in zip(factors[0][fqn], factors[1][fqn], strict=True)
    ]
    largest = max(float(a.abs().max()) for a, _ in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


def held(run: Path) -> list[int]:
    """Return how many parameters each process of a run held when it ended."""
    return [int((run / f"held-{rank}").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_a_sharded_run_trains_as_a_replicated_one_and_survives_a_kill(tmp_path: Path) -> None:
    # step 2 stays the best and the run stops at 6: best state and patience must survive the kill
    early = {"max_steps": 10, "learning_rate": 2e-2, "early_stopping": 2}

    def run(name: str, kind: str, *more: str) -> tuple[str, ...]:
        places = (str(place(name, kind)), str(tmp_path / name / f"{kind}.training"))
        return (*places, *KINDS[kind], "--contrary", "--settings", json.dumps(early), *more)

    def place(name: str, kind: str) -> Path:
        return tmp_path / name / kind

    assert launch(REPLICATED, *(run("replicated", kind) for kind in KINDS)) == 0
    assert launch(SHARDED, *(run("whole", kind) for kind in KINDS)) == 0
    for kind in KINDS:
        assert launch(SHARDED, run("cut", kind, "--die", "6")) != 0
        half_written = tmp_path / "cut" / f"{kind}.training" / "checkpoint-6"
        assert (half_written / WEIGHTS).is_file()
        assert not (half_written / MARKER_FILE).exists()
    assert launch(SHARDED, *(run("cut", kind, "--resume") for kind in KINDS)) == 0

    for kind in KINDS:
        replicated, whole, cut = (place(name, kind) for name in ("replicated", "whole", "cut"))
        assert difference(replicated, whole) < 1e-5, kind
        assert (cut / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes(), kind
        reports = [json.loads((run / "report.json").read_text()) for run in (whole, cut)]
        assert reports[1]["resumed_from_step"] == 4
        total, trained = held(replicated)[0], reports[0]["trainable_parameters"]
        assert held(replicated) == [total, total]
        assert sum(held(whole)) == total + trained
        assert max(held(whole)) < 0.6 * total
        parted = [
            {key: value for key, value in report.items() if key not in OF_THIS_PROCESS}
            for report in reports
        ]
        assert parted[0] == parted[1], kind


@pytest.mark.slow
def test_a_sharded_run_accumulates_recomputes_and_casts_as_a_replicated_one(
    tmp_path: Path,
) -> None:
    settings = {
        "gradient_accumulation": 2,
        "gradient_checkpointing": True,
        "precision": "bfloat16",
        "learning_rate": 1e-2,
    }

    def run(name: str, kind: str, *more: str) -> tuple[str, ...]:
        places = (str(tmp_path / name / kind), str(tmp_path / name / f"{kind}.training"))
        return (*places, *KINDS[kind], "--settings", json.dumps(settings), *more)

    assert launch(REPLICATED, *(run("replicated", kind) for kind in KINDS)) == 0
    # negative control, last because it stays on: each process follows its own rows
    sharded = [run("sharded", kind) for kind in KINDS]
    assert launch(SHARDED, *sharded, *(run("apart", kind, "--apart") for kind in KINDS)) == 0
    for kind in KINDS:
        replicated = tmp_path / "replicated" / kind
        assert difference(replicated, tmp_path / "sharded" / kind) < 1e-4, kind
        assert difference(replicated, tmp_path / "apart" / kind) > 1e-2, kind


def test_fsdp_of_version_2_is_taken_and_nothing_else() -> None:
    assert sharding_wanted(FSDP | {"FSDP_OFFLOAD_PARAMS": "false"})
    assert not sharding_wanted({})
    assert not sharding_wanted({SWITCH: "false", "FSDP_VERSION": "1"})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which is not supported: use .*--use_fs"),
        ({SWITCH: "true"}, "FSDP version 1.*--fsdp_version 2"),
        (FSDP | {"FSDP_VERSION": "1"}, "FSDP version 1"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "True"}, "--fsdp_offload_params, which is not supported"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "1"}, "--fsdp_activation_checkpointing"),
        (FSDP | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "--use_parallelism_config"),
    ],
)
def test_what_accelerate_may_not_be_told(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sharding_wanted(environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (FSDP, "set up for FSDP and started one process.*--num_processes 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "set up for DeepSpeed"),
    ],
)
def test_training_refuses_before_it_writes(
    environment: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = TrainSettings(max_steps=1, batch_size=2, max_tokens=48)
    model = attach_adapters(build_llama(), AdapterConfig(rank=2), ["model.layers.0.mlp.up_proj"])
    data = language_data(tiny_examples(4), None, build_tokenizer(chat=True), settings)
    with pytest.raises(ValueError, match=message):
        train_adapter(model, data, settings, tmp_path, resume=False)
    assert not list(tmp_path.iterdir())
    assert not is_sharded(model)


def test_a_model_that_names_no_blocks_is_refused() -> None:
    llama = build_llama()
    llama._no_split_modules = None
    model = attach_adapters(llama, AdapterConfig(rank=2), ["model.layers.0.mlp.up_proj"])
    with pytest.raises(ValueError, match="LlamaForCausalLM names no blocks"):
        shard_frozen(model, torch.device("cpu"), 2)
    assert not is_sharded(model)


@pytest.mark.parametrize("told", ["true", None])
def test_the_switch_comes_back(told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    if told is not None:
        monkeypatch.setenv(SWITCH, told)

    def fail() -> None:
        with hidden_from_accelerate():
            assert SWITCH not in os.environ
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert os.environ.get(SWITCH) == told
