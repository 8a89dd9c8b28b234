"""The Trainer, narrowed to adapters.

Two stock habits are replaced. A PEFT checkpoint is written without asking the hub about the base
model, and read strictly, where the Trainer takes missing tensors for a warning. A loss that is not
finite stops the run, where the Trainer can average it away. Added is the declaration that a
checkpoint is complete, after the last file of every process is written, and a checkpoint of every
new best state and of the end, where the Trainer knows only those that fall on a multiple of
`save_steps`: the best state it loads at the end is then truly the best one validated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from reslora.adapter import restore_adapter, save_adapter
from reslora.attach import attached_config
from reslora.checkpoints import MARKER_FILE, PREFIX, mark_complete, prune
from reslora.sharding import average_trained, is_sharded
from reslora.training_extension import TrainingExtension, restore_extension, save_extension


class RowDataset(Dataset[Any]):
    """Rows in the order they are trained; one pass of the Trainer is the whole run."""

    def __init__(self, rows: Sequence[Any], order: Sequence[int]) -> None:
        """Show `rows` in `order`, which may name a row several times."""
        self._rows = rows
        self._order = order

    def __len__(self) -> int:
        """Return the number of rows in the run."""
        return len(self._order)

    def __getitem__(self, index: int) -> Any:
        """Return the row trained at place `index`."""
        return self._rows[self._order[index]]


class AdapterTrainer(Trainer):
    """`transformers.Trainer` with strict adapter checkpoints."""

    fingerprint: Mapping[str, Any]
    """What a run that resumes from this one's checkpoints must agree on; set before training."""
    extension: TrainingExtension | None = None
    """Another loss than the model's own, and what learns beside the adapter."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the model's own loss, or the extension's, for which outputs have no meaning."""
        if self.extension is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self.extension.loss(model, inputs, num_items_in_batch)
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # the items are those of all processes, whose gradients will be averaged
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):  # else it is there, and cannot be moved
            super()._move_model_to_device(model, device)

    def _wrap_model(
        self, model: nn.Module, training: bool = True, dataloader: Any = None
    ) -> nn.Module:
        if training and is_sharded(model):
            # accelerate puts autocast on, but averages no gradients beside sharded parameters
            prepared = self.accelerator.prepare_model(model, evaluation_mode=True)
            return average_trained(prepared, self.args.device)
        wrapped: nn.Module = super()._wrap_model(model, training, dataloader)
        return wrapped

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run one forward and backward pass; refuse a loss that is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"training step {self.state.global_step + 1}: loss is {float(loss)}; check that "
                "the base model's weights are finite, lower the learning rate (now "
                f"{self.args.learning_rate:g}), or train in float32"
            )
        return loss

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        # transformers gathers it from sharded parameters only, and an adapter's are whole
        del state_dict
        if self.args.should_save:
            model = _attached(self.model)
            directory = Path(output_dir or str(self.args.output_dir))
            save_adapter(model, attached_config(model), directory)
            if self.extension is not None:
                save_extension(self.extension, directory)

    def _restore(self, directory: Path) -> None:
        restore_adapter(_attached(self.model), directory)
        if self.extension is not None:
            restore_extension(self.extension, directory)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._restore(Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = Path(str(self.args.output_dir))
        checkpoint = directory / f"{PREFIX}{self.state.global_step}"
        if self.args.should_save:
            (checkpoint / MARKER_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(
                checkpoint,
                self.fingerprint,
                best_step=self.state.best_global_step,
                finished=self.control.should_training_stop,
            )
            prune(directory)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = super()._determine_best_metric(metrics, trial)
        if better or self.control.should_training_stop:
            self.control.should_save = True
        return better

    def take_up(self, checkpoint: Path) -> None:
        """Take up the state of a run that is over, where the Trainer would train one step more."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self._restore(checkpoint)
        if self.args.load_best_model_at_end and self.state.best_global_step is not None:
            self._load_best_model()

    def _load_best_model(self) -> None:
        directory = Path(str(self.args.output_dir))
        self._restore(directory / f"{PREFIX}{self.state.best_global_step}")


class FinalValidation(TrainerCallback):
    """Validates after the last step too, before its checkpoint, whatever `eval_steps` is."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a validation at the end."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def _attached(model: object) -> PeftModel:
    if not isinstance(model, PeftModel):
        raise TypeError(f"expected a model made by attach_adapters, got {type(model).__name__}")
    return model
