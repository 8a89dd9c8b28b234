"""What may be trained along with an adapter without being part of it.

The training loop knows adapters and the model's own loss. An extension brings another loss, and
modules of its own whose parameters learn too; they are saved in each checkpoint, so that a resumed
run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EXTENSION_FILE = "extension.safetensors"


class LossFunction(Protocol):
    """A loss that replaces the model's own."""

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, Any], items: Tensor | int | None
    ) -> Tensor:
        """Return the mean loss of a batch.

        Args:
            model: As the Trainer wraps it.
            inputs: A batch, `labels` included.
            items: Learned tokens of the whole step, by which the sum is divided; None where the
                batch stands alone.
        """


@dataclass(frozen=True)
class TrainingExtension:
    """A loss, and the parameters that learn with it."""

    loss: LossFunction
    parameters: Mapping[str, nn.Parameter]
    """By name; they are part of the trained model."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What a resumed run must agree on."""


def save_extension(extension: TrainingExtension, directory: Path) -> None:
    """Write the extension's parameters into a checkpoint directory."""
    tensors = {name: each.detach().cpu() for name, each in extension.parameters.items()}
    save_file(tensors, directory / EXTENSION_FILE)


def restore_extension(extension: TrainingExtension, directory: Path) -> None:
    """Read the extension's parameters back, in place.

    Raises:
        ValueError: The file is missing, damaged, or of other parameters.
    """
    path = directory / EXTENSION_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged ({error}); start the training anew") from None
    wanted = {name: tuple(each.shape) for name, each in extension.parameters.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        differing = sorted(
            name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
        )
        raise ValueError(f"{path}: of other parameters ({', '.join(differing[:3])} ...)")
    for name, parameter in extension.parameters.items():
        parameter.data.copy_(tensors[name])
