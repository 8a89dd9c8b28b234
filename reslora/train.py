"""Train an attached adapter with `transformers.Trainer`.

The order of the data is drawn once for the whole run, so that a resumed run meets the same batches;
to the Trainer the run is one pass over that order. Checkpoints hold adapter weights, optimizer and
random states, and count only when complete.

Invariant: for equal inputs, settings, number of processes and library versions on the CPU, a run
that is killed and resumed ends with the same adapter weights, bit for bit, as one that was not.

Several processes: `accelerate launch --multi_gpu --num_processes N` (or torchrun), on CPUs too,
where torch's gloo carries the gradients. `batch_size` is then per process.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from reslora.adapter import restore_adapter
from reslora.attach import attached_config
from reslora.batches import schedule_rows
from reslora.checkpoints import newest_complete, refuse_existing, step_of
from reslora.live_chain import recompute_contexts
from reslora.progress import TrainingProgress
from reslora.settings import TrainSettings
from reslora.trainer import AdapterTrainer, RowDataset
from reslora.training_data import TrainingData

__all__ = ["TrainReport", "TrainSettings", "train_adapter"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainReport:
    """What a training run did."""

    steps: int
    """Optimizer steps of the whole run."""
    resumed_from_step: int
    """Step this process started at; 0 for a run of its own."""
    trainable_parameters: int
    train_rows: int
    """Rows of the training set (packed rows, when packing)."""
    validation_rows: int
    loss: tuple[tuple[int, float], ...]
    """(step, mean loss a learned token) of every step of the run."""
    eval_loss: tuple[tuple[int, float], ...]
    """(step, validation loss); empty without validation rows."""
    seconds: float
    """Wall time of this process's training loop, validation and checkpoints included."""
    tokens: int
    """Tokens seen by all processes in that time, padding not counted."""
    tokens_per_s: float
    peak_rss_bytes: int
    """Highest resident memory of this process so far."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def train_adapter(
    model: PeftModel,
    data: TrainingData,
    settings: TrainSettings,
    checkpoint_dir: Path,
    resume: bool,
) -> TrainReport:
    """Train the adapter of a model made by `attach_adapters`, in place.

    Args:
        model: The attached model; hooks on its layers stay where they are.
        data: What it learns from.
        settings: The run's settings.
        checkpoint_dir: Where checkpoints go. The final artifact is the caller's to save.
        resume: Continue from the newest complete checkpoint; without one, start at the beginning.

    Returns:
        The report; the model holds the trained adapter and is in evaluation mode.

    Raises:
        ValueError: No data to learn from, a loss or weight that is not finite (names the step), or
            a checkpoint directory that belongs to another run.
    """
    arguments = _arguments(settings, checkpoint_dir, validate=bool(data.validation))
    group = settings.batch_size * settings.gradient_accumulation * arguments.world_size
    steps = settings.max_steps or math.ceil(settings.epochs * len(data.train) / group)
    arguments.max_steps = steps
    order = schedule_rows(data.train_lengths, steps * group, group, settings.seed)
    tokens_until = [0]
    for step in range(steps):
        batch = order[step * group : (step + 1) * group]
        tokens_until.append(tokens_until[-1] + sum(data.train_lengths[index] for index in batch))

    fingerprint = _fingerprint(model, data, settings, arguments.world_size)
    checkpoint = newest_complete(checkpoint_dir, fingerprint) if resume else None
    if not resume:
        refuse_existing(checkpoint_dir)
    elif checkpoint is None:
        logger.warning("%s: no complete checkpoint, starting at step 0", checkpoint_dir)
    first_step = 0 if checkpoint is None else step_of(checkpoint)

    _declare_float(model)
    _warn_if_alone(arguments.world_size)
    progress = TrainingProgress(tokens_until)
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        data_collator=data.collate,
        train_dataset=RowDataset(data.train, order),
        eval_dataset=RowDataset(data.validation, range(len(data.validation)))
        if data.validation
        else None,
        callbacks=[progress],
    )
    trainer.fingerprint = fingerprint
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    try:
        if checkpoint is not None and first_step >= steps:
            # the Trainer would train one step more
            restore_adapter(model, checkpoint)
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if data.validation and not any(step == steps for step, _ in _history(trainer, "eval_loss")):
            trainer.evaluate()
    finally:
        progress.close()
        if settings.gradient_checkpointing:
            base: Any = model.get_base_model()
            base.activation_checkpointing_disable()
        model.zero_grad(set_to_none=True)
        model.eval()
    seconds = time.perf_counter() - started
    tokens = tokens_until[steps] - tokens_until[first_step]
    return TrainReport(
        steps=steps,
        resumed_from_step=first_step,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        train_rows=len(data.train),
        validation_rows=len(data.validation),
        loss=_history(trainer, "loss"),
        eval_loss=_history(trainer, "eval_loss"),
        seconds=seconds,
        tokens=tokens,
        tokens_per_s=tokens / seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


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


def _arguments(settings: TrainSettings, output: Path, *, validate: bool) -> TrainingArguments:
    evaluate = validate and settings.eval_every > 0
    return TrainingArguments(
        output_dir=str(output),
        max_steps=settings.max_steps or 1,  # the caller sets it once the world size is known
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_ratio,
        lr_scheduler_type=settings.scheduler.value,
        weight_decay=settings.weight_decay,
        optim="adamw_torch",
        seed=settings.seed,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=settings.eval_every if evaluate else None,
        save_strategy="steps",
        save_steps=settings.save_every,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        train_sampling_strategy="sequential",
        activation_checkpointing=settings.gradient_checkpointing,
        # reentrant checkpointing fires a block's gradient hooks once for every layer that uses it
        activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": recompute_contexts},
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        disable_tqdm=True,
        report_to="none",
    )


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
        "processes": processes,
    }
