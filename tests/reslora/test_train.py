from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import reslora.trainer
from reslora.adapter import load_adapter
from reslora.attach import attach_adapters
from reslora.checkpoints import MARKER_FILE
from reslora.config import AdapterConfig, Structure
from reslora.settings import Precision, TrainSettings
from reslora.train import train_adapter
from reslora.train_report import OF_THIS_PROCESS, TrainReport
from reslora.trainer import AdapterTrainer
from reslora.training_data import language_data
from tests.reslora import train_tiny
from tests.reslora.tiny import build_llama, tiny_examples

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
BLOCK = AdapterConfig(rank=3, structure=Structure.BLOCK)
QUICK = TrainSettings(max_steps=3, batch_size=2, max_tokens=48, learning_rate=1e-2)


def train(
    model: LlamaForCausalLM,
    tokenizer: Any,
    targets: list[str],
    directory: Path,
    settings: TrainSettings = QUICK,
    *,
    config: AdapterConfig = BLOCK,
    resume: bool = False,
) -> TrainReport:
    attached = attach_adapters(model, config, targets)
    examples = tiny_examples(12)
    data = language_data(examples, None, tokenizer, settings)
    return train_adapter(attached, data, settings, directory, resume)


TRAIN_TINY = str(train_tiny.__file__)


def run_tiny(*options: str, text: str | None = None) -> str:
    """Run Python with some options and return what it prints; pytest shows what it complains of."""
    command = [sys.executable, "-W", "ignore", *options]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, timeout=180, text=True, input=text
    )
    return done.stdout


def run_each(*runs: tuple[str, ...]) -> list[int]:
    """Run `train_tiny.py` with each of some arguments and return the exit codes."""
    codes: list[int] = json.loads(run_tiny(TRAIN_TINY, "--each", text=json.dumps(runs)))
    return codes


def test_killed_while_saving_then_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    # step 2 stays the best and the run stops at 6: best state and patience must survive the kill
    early = {"max_steps": 10, "learning_rate": 2e-2, "early_stopping": 2}
    told = {
        structure: ("--structure", structure, "--contrary", "--settings", json.dumps(early))
        for structure in Structure
    }

    def places(name: str, structure: Structure) -> tuple[str, str]:
        base = tmp_path / structure / name
        return str(base / "adapter"), str(base / "checkpoints")

    # one process for all that is killed or not; here, in another one, the killed are resumed
    codes = run_each(
        *((*places("whole", structure), *told[structure]) for structure in Structure),
        *((*places("cut", structure), *told[structure], "--die", "6") for structure in Structure),
    )
    assert codes == [0] * len(Structure) + [-signal.SIGKILL] * len(Structure)
    for structure in Structure:
        half_written = Path(places("cut", structure)[1], "checkpoint-6")
        assert (half_written / "adapter_model.safetensors").is_file()
        assert not (half_written / MARKER_FILE).exists()
        train_tiny.main([*places("cut", structure), *told[structure], "--resume"])
        whole, resumed = (Path(places(name, structure)[0]) for name in ("whole", "cut"))
        file = "adapter_model.safetensors"
        assert (resumed / file).read_bytes() == (whole / file).read_bytes(), structure
        reports = [json.loads((run / "report.json").read_text()) for run in (whole, resumed)]
        assert reports[1]["resumed_from_step"] == 4
        parted = [
            {key: value for key, value in report.items() if key not in OF_THIS_PROCESS}
            for report in reports
        ]
        assert parted[0] == parted[1], structure
        assert [parted[0][key] for key in ("planned_steps", "steps", "kept_step")] == [10, 6, 2]


def test_training_lowers_the_loss_and_reports(
    llama: LlamaForCausalLM,
    targets: list[str],
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    frozen = {n: p.clone() for n, p in llama.named_parameters()}
    settings = TrainSettings(
        max_steps=25, batch_size=6, max_tokens=48, learning_rate=3e-2, eval_every=0, warmup_ratio=0
    )
    report = train(llama, chat_tokenizer, targets, tmp_path, settings)
    assert report.loss[-1][1] < 0.8 * report.loss[0][1]
    assert [step for step, _ in report.loss] == list(range(1, 26))
    assert [step for step, _ in report.eval_loss] == [25]
    assert (report.train_rows, report.validation_rows) == (11, 1)
    assert report.trainable_parameters == 4 * 3 * ((24 + 24) + (24 + 12) + (40 + 24))
    assert report.tokens > 25 * 6 * 20
    assert report.peak_rss_bytes > 1e8
    assert json.loads(json.dumps(report.to_dict()))["steps"] == 25
    assert capsys.readouterr().out == ""
    for name, parameter in llama.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")])


@pytest.mark.parametrize("structure", Structure)
def test_packing_and_checkpointed_activations_train_alike(
    targets: list[str],
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    structure: Structure,
) -> None:
    config = AdapterConfig(rank=3, dropout=0.2, structure=structure)
    losses = []
    for recompute in (False, True):
        settings = TrainSettings(
            max_steps=3,
            batch_size=2,
            max_tokens=90,
            packing=True,
            learning_rate=1e-2,
            gradient_checkpointing=recompute,
        )
        directory = tmp_path / str(recompute)
        report = train(build_llama(), chat_tokenizer, targets, directory, settings, config=config)
        assert report.train_rows < 11
        losses.append(report.loss)
    assert [loss for _, loss in losses[0]] == pytest.approx(
        [loss for _, loss in losses[1]], rel=1e-5
    )


def test_a_loss_that_is_no_number_names_the_step(
    llama: LlamaForCausalLM,
    targets: list[str],
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    with torch.no_grad():
        llama.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(ValueError, match=r"training step 1: loss is nan; check .* learning rate"):
        train(llama, chat_tokenizer, targets, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_resuming_a_finished_run_trains_no_further(
    targets: list[str], chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    models = [build_llama(), build_llama()]
    first = train(models[0], chat_tokenizer, targets, tmp_path)
    second = train(models[1], chat_tokenizer, targets, tmp_path, resume=True)
    assert (second.resumed_from_step, second.tokens) == (3, 0)
    assert (second.loss, second.eval_loss) == (first.loss, first.eval_loss)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_plain_lora_keeps_its_best_state_whatever_depth_is_given(
    llama: LlamaForCausalLM,
    targets: list[str],
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    report = train(llama, chat_tokenizer, targets, tmp_path, config=AdapterConfig(rank=3, depth=4))
    assert report.best_step is not None


def test_resume_without_a_checkpoint_starts_at_the_beginning(
    llama: LlamaForCausalLM,
    targets: list[str],
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    assert train(llama, chat_tokenizer, targets, tmp_path, resume=True).resumed_from_step == 0


def test_other_settings_and_old_checkpoints_are_refused(
    targets: list[str], chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    train(build_llama(), chat_tokenizer, targets, tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        train(build_llama(), chat_tokenizer, targets, tmp_path)
    other = TrainSettings(max_steps=3, batch_size=2, max_tokens=48, learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"learning_rate: 0.01 then, 0.001 now"):
        train(build_llama(), chat_tokenizer, targets, tmp_path, other, resume=True)


def test_the_last_batch_of_a_pass_need_not_be_full(
    llama: LlamaForCausalLM,
    targets: list[str],
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    settings = replace(QUICK, max_steps=None, epochs=0.5, gradient_accumulation=1)
    report = train(llama, chat_tokenizer, targets, tmp_path, settings)
    assert (report.train_rows, report.steps) == (11, 3)


def test_the_seed_decides_the_order_of_the_rows(
    targets: list[str], chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    losses = []
    for seed in (0, 0, 1):
        settings = replace(QUICK, max_steps=1, seed=seed)
        data = language_data(tiny_examples(12), tiny_examples(1), chat_tokenizer, settings)
        model = attach_adapters(build_llama(), BLOCK, targets)  # B is 0: the base's own loss
        directory = tmp_path / str(len(losses))
        losses.append(train_adapter(model, data, settings, directory, resume=False).loss)
    assert losses[0] == losses[1] != losses[2]


def test_a_run_goes_on_with_as_many_processes_as_it_had(
    targets: list[str], chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    train(build_llama(), chat_tokenizer, targets, tmp_path)
    path = tmp_path / "checkpoint-3" / MARKER_FILE
    marker = json.loads(path.read_text())
    marker["fingerprint"]["processes"] = 2
    path.write_text(json.dumps(marker))
    with pytest.raises(ValueError, match="processes: 2 then, 1 now"):
        train(build_llama(), chat_tokenizer, targets, tmp_path, resume=True)


def test_a_checkpoint_that_is_written_again_is_not_whole_meanwhile(
    llama: LlamaForCausalLM,
    targets: list[str],
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marker = tmp_path / "checkpoint-3" / MARKER_FILE
    marker.parent.mkdir()
    marker.write_text("{}")
    there: list[bool] = []
    save = reslora.trainer.save_adapter

    def record(*arguments: Any) -> None:
        there.append(marker.exists())
        save(*arguments)

    monkeypatch.setattr(reslora.trainer, "save_adapter", record)
    train(llama, chat_tokenizer, targets, tmp_path, resume=True)
    assert there == [False]
    assert marker.exists()


def test_interrupt_passes_through_and_leaves_the_model_usable(
    llama: LlamaForCausalLM,
    targets: list[str],
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reslora.trainer.mark_complete", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(llama, chat_tokenizer, targets, tmp_path)
    assert not llama.training
    assert all(parameter.grad is None for parameter in llama.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("structure", Structure)
def test_two_processes_train_as_one_with_twice_the_batch(
    tmp_path: Path, structure: Structure
) -> None:
    one, two, small = (str(tmp_path / name) for name in ("one", "two", "small"))
    told = ("--dropout", "0", "--structure", structure, "--settings")
    rate = {"learning_rate": 1e-2}
    twice = json.dumps({**rate, "batch_size": 6})
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", TRAIN_TINY)
    run_tiny(*launcher, two, str(tmp_path / "b"), *told, json.dumps(rate))
    codes = run_each(
        (one, str(tmp_path / "a"), *told, twice),
        (small, str(tmp_path / "c"), *told, json.dumps(rate)),
    )
    assert codes == [0, 0]
    reports = [json.loads(Path(name, "report.json").read_text()) for name in (one, two)]
    assert reports[0]["tokens"] == reports[1]["tokens"]
    losses = [[loss for _, loss in report["loss"]] for report in reports]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    weights = [load_adapter(Path(name)).factors for name in (one, two, small)]
    assert distance(weights[0], weights[1]) < 1e-4
    assert distance(weights[0], weights[2]) > 1e-2  # negative control: half the batch


def distance(ours: Factors, theirs: Factors) -> float:
    """Largest difference of two adapters' tensors, relative to the largest of the first."""
    pairs = [(a, b) for fqn in ours for a, b in zip(ours[fqn], theirs[fqn], strict=True)]
    largest = max(float(a.abs().max()) for a, _ in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


@pytest.mark.parametrize("structure", [None, *Structure])
def test_accumulated_batches_train_as_one_big_batch(
    structure: Structure | None,
    targets: list[str],
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def final(name: str, batch: int, accumulation: int) -> Factors:
        settings = replace(QUICK, batch_size=batch, gradient_accumulation=accumulation)
        llama = build_llama()
        train(
            llama,
            chat_tokenizer,
            targets,
            tmp_path / name,
            settings,
            config=AdapterConfig(rank=3, structure=structure),
        )
        return load_adapter(tmp_path / name / "checkpoint-3").factors

    big, parts = final("big", 6, 1), final("parts", 2, 3)
    assert distance(big, parts) < 1e-4
    # negative control: the mean of the batches' means, as if their tokens were equally many
    monkeypatch.setattr(AdapterTrainer, "_get_num_items_in_batch", lambda *_: None)
    assert distance(big, final("means", 2, 3)) > 1e-3


@pytest.mark.parametrize("structure", [None, *Structure])
def test_bfloat16_trains_like_float32_and_is_taken_off_again(
    structure: Structure | None,
    targets: list[str],
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    config = AdapterConfig(rank=3, structure=structure)
    losses = {}
    for precision in Precision:
        llama = build_llama()
        report = train(
            llama,
            chat_tokenizer,
            targets,
            tmp_path / precision,
            replace(QUICK, precision=precision),
            config=config,
        )
        losses[precision] = [loss for _, loss in report.loss]
        assert {p.dtype for p in llama.parameters()} == {torch.float32}
        probe = torch.arange(8, 20)[None]
        hidden = llama.model.layers[0].mlp.gate_proj(llama.model.embed_tokens(probe))
        assert hidden.dtype == torch.float32
        assert "forward" not in vars(llama), "autocast is still around the forward pass"
    full, low = losses[Precision.FLOAT32], losses[Precision.BFLOAT16]
    assert low == pytest.approx(full, rel=28 * torch.finfo(torch.bfloat16).eps)
    assert low != full
