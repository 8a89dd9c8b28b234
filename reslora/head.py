"""A classification head: trained whole beside the low-rank blocks, and stored with them.

PEFT wraps it: the untouched module stays in `original_module`, a copy is trained in
`modules_to_save`. In files its parameters have the names they have in the model, so that PEFT loads
the head of a plain LoRA adapter made here, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

HEAD_NAMES = ("classifier", "score")
"""Names under which PEFT, for sequence classification, knows a model's head."""


def wrapped_heads(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """Return the heads that an attached model trains, by dotted name; a language model has none."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def trained_head_tensors(
    named: Iterable[tuple[str, Tensor]], adapter_name: str
) -> dict[str, Tensor]:
    """Return the trained tensors of a head under the names that PEFT's files have.

    Args:
        named: Names and tensors of an attached model.
        adapter_name: PEFT's name of the adapter.
    """
    place = f".modules_to_save.{adapter_name}."
    return {
        name.replace(place, "."): tensor.detach().to("cpu").contiguous()
        for name, tensor in named
        if place in name
    }


def require_head(where: str, head: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check a stored head against a model's.

    Args:
        where: Put before every error.
        head: Stored tensors by dotted name.
        expected: The model's own, of any values.

    Raises:
        ValueError: Names or shapes differ.
    """
    if head.keys() != expected.keys():
        differing = ", ".join(sorted(head.keys() ^ expected.keys())[:5])
        raise ValueError(
            f"{where}: classification head of adapter and model differ in {differing}; the adapter "
            "was trained for another kind of model"
        )
    for name, tensor in head.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{where}: {name}: adapter has {list(tensor.shape)}, the model "
                f"{list(expected[name].shape)}; load the model with the labels that the adapter "
                "was trained on"
            )


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a plain model's head by dotted name, empty where it has none."""
    heads = {name: module for name, module in model.named_children() if name in HEAD_NAMES}
    return _parameters(heads)


def trained_head_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Return the trained parameters of an attached model's head by the names of a plain one."""
    heads = wrapped_heads(model).items()
    return _parameters({name: head.modules_to_save[adapter_name] for name, head in heads})


def write_head(parameters: Mapping[str, nn.Parameter], head: Mapping[str, Tensor]) -> None:
    """Copy stored tensors into parameters of the same names and shapes."""
    with torch.no_grad():
        for name, tensor in head.items():
            parameters[name].copy_(tensor)


def _parameters(heads: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{key}": parameter
        for name, module in heads.items()
        for key, parameter in module.named_parameters()
    }
