"""Our settings in the Trainer's words."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from reslora.settings import LOSS, Keep, Precision, TrainSettings
from reslora.training_data import TrainingData


def keeps_best(settings: TrainSettings, data: TrainingData) -> bool:
    """Tell whether a run ends with its best state, or the last.

    Raises:
        ValueError: The best state, or an early end, is asked for and nothing tells which is best.
    """
    wanted = settings.keep is Keep.BEST or settings.early_stopping is not None
    if wanted and not data.validation:
        raise ValueError(
            "keeping the best state and stopping early need validation rows, and there are none: "
            "give some, hold out a share of the training rows, or keep the last state"
        )
    figures = (LOSS, *data.metrics)
    if settings.best_metric not in figures:
        raise ValueError(
            f"best metric {settings.best_metric!r}: this task's validation gives "
            f"{', '.join(figures)}"
        )
    return bool(data.validation) and settings.keep is not Keep.LAST


def training_arguments(
    settings: TrainSettings, data: TrainingData, checkpoint_dir: Path
) -> TrainingArguments:
    """Return the Trainer's arguments.

    Args:
        settings: The run's settings.
        data: What it learns from.
        checkpoint_dir: Where checkpoints go.

    Raises:
        ValueError: As `keeps_best`.
    """
    evaluate = bool(data.validation) and settings.eval_every > 0
    best = keeps_best(settings, data)
    arguments = TrainingArguments(
        output_dir=str(checkpoint_dir),
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
        bf16=settings.precision is Precision.BFLOAT16,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=settings.eval_every if evaluate else None,
        metric_for_best_model=settings.best_metric if best or settings.early_stopping else None,
        greater_is_better=settings.best_metric != LOSS,
        save_strategy="steps",
        save_steps=settings.save_every,
        restore_callback_states_from_checkpoint=True,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=data.measure is None,
        disable_tqdm=True,
        report_to="none",
    )
    # set late, past the check that every validation is a save step: each new best state is saved
    arguments.load_best_model_at_end = best
    return arguments
