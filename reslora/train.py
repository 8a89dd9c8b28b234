"""Train an attached adapter with `transformers.Trainer`.

The order of the data is drawn once for the whole run, so that a resumed run meets the same batches;
to the Trainer the run is one pass over that order. Checkpoints hold adapter weights, optimizer and
random states, and count only when complete.

Invariant: for equal inputs, settings, number of processes and library versions on the CPU, a run
that is killed and resumed ends with the same adapter weights, bit for bit, as one that was not.

Several processes: `accelerate launch --multi_gpu --num_processes N` (or torchrun), on CPUs too,
where torch's gloo carries the gradients. `batch_size` is then per process. With `--use_fsdp
--fsdp_version 2` each process holds its share of the frozen weights only (`reslora.sharding`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from reslora.attach import attached_config
from reslora.batches import schedule_rows
from reslora.checkpoints import had_finished, newest_complete, refuse_existing, step_of
from reslora.live_chain import recompute_contexts
from reslora.progress import TrainingProgress
from reslora.settings import TrainSettings
from reslora.sharding import (
    hidden_from_accelerate,
    release_gathered,
    shard_frozen,
    sharding_wanted,
)
from reslora.train_arguments import training_arguments
from reslora.train_report import TrainReport
from reslora.trainer import AdapterTrainer, FinalValidation, RowDataset
from reslora.training_data import TrainingData
from reslora.training_extension import TrainingExtension

logger = logging.getLogger(__name__)


def train_adapter(
    model: PeftModel,
    data: TrainingData,
    settings: TrainSettings,
    checkpoint_dir: Path,
    resume: bool,
    *,
    tensorboard: Path | None = None,
    extension: TrainingExtension | None = None,
) -> TrainReport:
    """Train the adapter of a model made by `attach_adapters`, in place.

    Args:
        model: The attached model; hooks on its layers stay where they are.
        data: What it learns from.
        settings: The run's settings.
        checkpoint_dir: Where checkpoints go. The final artifact is the caller's to save.
        resume: Continue from the newest complete checkpoint; without one, start at the beginning.
        tensorboard: Where to write curves for TensorBoard; nowhere if None.
        extension: Another loss than the model's own, and parameters that learn with it.

    Returns:
        The report; the model holds the trained adapter, the best validated or the last one as the
        settings say, and is in evaluation mode. Under FSDP its frozen weights stay sharded.

    Raises:
        ValueError: No data to learn from or to choose the best state by, a loss or weight that is
            not finite (names the step), a checkpoint directory that belongs to another run,
            TensorBoard is asked for and not installed, or accelerate was told to shard in a way
            that is not supported (`sharding_wanted`, `shard_frozen`).
    """
    sharded = sharding_wanted()
    if sharded and extension is not None:
        raise ValueError(
            "FSDP shards plain and residual LoRA only, not training through the rounding of a "
            "quantized checkpoint; use `accelerate launch --multi_gpu`"
        )
    arguments = training_arguments(settings, data, checkpoint_dir)
    callbacks: list[TrainerCallback] = []
    if tensorboard is not None:
        callbacks.append(_tensorboard(tensorboard))
    if settings.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping))
    if data.validation:
        callbacks.append(FinalValidation())
    group = settings.batch_size * settings.gradient_accumulation * arguments.world_size
    steps = settings.max_steps or math.ceil(settings.epochs * len(data.train) / group)
    arguments.max_steps = steps
    order = schedule_rows(data.train_lengths, steps * group, group, settings.seed)
    tokens_until = [0]
    for step in range(steps):
        batch = order[step * group : (step + 1) * group]
        tokens_until.append(tokens_until[-1] + sum(data.train_lengths[index] for index in batch))

    fingerprint = _fingerprint(model, data, settings, arguments.world_size)
    if extension is not None:
        fingerprint |= extension.identity
    checkpoint = newest_complete(checkpoint_dir, fingerprint) if resume else None
    if not resume:
        refuse_existing(checkpoint_dir)
    elif checkpoint is None:
        logger.warning("%s: no complete checkpoint, starting at step 0", checkpoint_dir)
    first_step = 0 if checkpoint is None else step_of(checkpoint)

    _declare_float(model)
    _warn_if_alone(arguments.world_size)
    if sharded:
        shard_frozen(model, arguments.device, arguments.world_size)
    progress = TrainingProgress(tokens_until)
    with hidden_from_accelerate():
        trainer = AdapterTrainer(
            model=model,
            args=arguments,
            data_collator=data.collate,
            train_dataset=RowDataset(data.train, order),
            eval_dataset=RowDataset(data.validation, range(len(data.validation)))
            if data.validation
            else None,
            compute_metrics=data.measure,
            callbacks=[progress, *callbacks],
        )
    trainer.fingerprint = fingerprint
    trainer.extension = extension
    trainer.remove_callback(PrinterCallback)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    _dress(model, settings)
    try:
        if checkpoint is not None and had_finished(checkpoint):
            trainer.take_up(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if arguments.load_best_model_at_end and trainer.state.best_global_step is None:
            raise ValueError(
                f"validation: {settings.best_metric} was never a number, so no state is the best; "
                "check the validation rows, or keep the last state"
            )
    finally:
        progress.close()
        _undress(trainer, model, settings)
    seconds = time.perf_counter() - started
    state = trainer.state
    tokens = tokens_until[state.global_step] - tokens_until[first_step]
    kept = state.best_global_step if arguments.load_best_model_at_end else state.global_step
    return TrainReport(
        steps=state.global_step,
        planned_steps=steps,
        kept_step=int(kept or 0),
        best_step=state.best_global_step,
        resumed_from_step=first_step,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        train_rows=len(data.train),
        validation_rows=len(data.validation),
        loss=_history(trainer, "loss"),
        eval_loss=_history(trainer, "eval_loss"),
        eval_metrics=_metrics(trainer, data.metrics),
        seconds=seconds,
        tokens=tokens,
        tokens_per_s=tokens / seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        peak_cuda_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    )


def _dress(model: PeftModel, settings: TrainSettings) -> None:
    """Put on the model what is for training only."""
    if settings.gradient_checkpointing:
        base: Any = model.get_base_model()
        # not by the Trainer's arguments, which must have a JSON form for TensorBoard;
        # reentrant checkpointing fires a block's gradient hooks once for every layer that uses it
        base.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": recompute_contexts}
        )


def _undress(trainer: Trainer, model: PeftModel, settings: TrainSettings) -> None:
    """Take off what training put on the model."""
    # autocast stays on the forward method otherwise
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if settings.gradient_checkpointing:
        base: Any = model.get_base_model()
        base.activation_checkpointing_disable()
    release_gathered(model)
    model.zero_grad(set_to_none=True)
    model.eval()


def _tensorboard(directory: Path) -> TensorBoardCallback:
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "TensorBoard is not installed: pip install 'rolora[tensorboard]', or train without it"
        )
    callback = TensorBoardCallback()
    callback.logging_dir = str(directory)
    return callback


def _warn_if_alone(processes: int) -> None:
    """Without --multi_gpu, accelerate on CPUs sets up for N processes and starts one."""
    launched_for_several = (
        "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    )
    if processes == 1 and launched_for_several and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "accelerate was asked for several processes but started one: add --multi_gpu "
            "(it works on CPUs too), or use torchrun"
        )


def _declare_float(model: PeftModel) -> None:
    """Clear the mark that a dequantized GGUF model keeps and the Trainer refuses to train."""
    base: Any = model.get_base_model()
    weights_are_float = all(parameter.is_floating_point() for parameter in base.parameters())
    if getattr(base, "is_quantized", False) and weights_are_float:
        base.is_quantized = False


def _history(trainer: Trainer, key: str) -> tuple[tuple[int, float], ...]:
    entries = trainer.state.log_history
    return tuple((int(entry["step"]), float(entry[key])) for entry in entries if key in entry)


def _metrics(trainer: Trainer, names: Sequence[str]) -> tuple[tuple[int, dict[str, float]], ...]:
    histories = {name: dict(_history(trainer, f"eval_{name}")) for name in names}
    steps = [step for step, _ in _history(trainer, f"eval_{names[0]}")] if names else []
    return tuple((step, {name: histories[name][step] for name in names}) for step in steps)


def _fingerprint(
    model: PeftModel, data: TrainingData, settings: TrainSettings, processes: int
) -> dict[str, Any]:
    """Everything that decides the final weights, short enough to be compared key by key."""
    trained = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return {
        **asdict(settings),
        **{f"adapter_{key}": value for key, value in asdict(attached_config(model)).items()},
        "adapter_parameters_sha256": hashlib.sha256("\n".join(trained).encode()).hexdigest(),
        "data_sha256": data.digest(),
        "validation_sha256": data.validation_digest(),
        "processes": processes,
    }
