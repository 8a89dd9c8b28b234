"""FSDP: the frozen weights are shared out over the processes, what is trained stays whole in each.

That split saves what can be saved, for the adapter is small beside the model, and leaves the rest
of training as it is with several processes: DistributedDataParallel averages the gradients of the
adapter and the optimizer, checkpoints and adapters on disk hold plain tensors. Sharded adapters
would not do: a layer of structure `block` reads the factors of other layers of its chain, outside
of the forward pass for which FSDP gathers these layers' parameters.

`accelerate launch --use_fsdp --fsdp_version 2` asks for it. accelerate itself shards on GPUs only,
and all parameters; here torch's `fully_shard` does it, on CPUs too, where gloo carries it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)

SWITCH = "ACCELERATE_USE_FSDP"
_ON = ("true", "1")
_UNSUPPORTED = {
    "FSDP_OFFLOAD_PARAMS": "--fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "--fsdp_activation_checkpointing",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}
"""Switches of accelerate that would change what is done here, and their options."""


def sharding_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether accelerate was started with FSDP, and refuse what cannot be done.

    Raises:
        ValueError: DeepSpeed, FSDP of version 1, or an option of FSDP that is not supported.
    """

    def is_on(name: str) -> bool:
        return environment.get(name, "false").lower() in _ON

    if is_on("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "accelerate is set up for DeepSpeed, which is not supported: use `accelerate launch "
            "--use_fsdp --fsdp_version 2` to shard the frozen weights, or `accelerate launch "
            "--multi_gpu`, where every process holds the model"
        )
    if not is_on(SWITCH):
        return False
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"accelerate is set up for FSDP version {version}, which flattens an adapter into the "
            "weights that it shards: use `accelerate launch --use_fsdp --fsdp_version 2`"
        )
    for name, option in _UNSUPPORTED.items():
        if is_on(name):
            raise ValueError(
                f"accelerate is set up with {option}, which is not supported: leave it out "
                "(activation checkpointing is a setting of the training itself)"
            )
    return True


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Keep accelerate from sharding a second time what is sharded here."""
    told = os.environ.pop(SWITCH, None)
    try:
        yield
    finally:
        if told is not None:
            os.environ[SWITCH] = told


def shard_frozen(model: PeftModel, device: torch.device, processes: int) -> None:
    """Leave each process its share of the parameters that are not trained.

    Each block of the model is gathered for its own pass; what lies in no block (embeddings, last
    norm, output) is gathered for the whole forward and backward pass. Called in every process.

    Args:
        model: The attached model; changed in place, and not to be made whole again.
        device: Where the process trains.
        processes: How many there are.

    Raises:
        ValueError: There is one process only, or the model does not name its blocks.
    """
    if processes < 2:
        raise ValueError(
            "accelerate is set up for FSDP and started one process, which has nothing to share "
            "out: start more, --num_processes 2, or leave --use_fsdp out"
        )
    base: Any = model.get_base_model()
    blocks = set(base._no_split_modules or ())
    if not blocks:
        raise ValueError(
            f"FSDP gathers a model block by block, and {type(base).__name__} names no blocks "
            "(`_no_split_modules`): use `accelerate launch --multi_gpu`"
        )
    mesh = init_device_mesh(device.type, (processes,))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, ignored_params=trained)
    # not the base model: peft calls its forward method past the hooks
    fully_shard(model, mesh=mesh, ignored_params=trained)
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    logger.info("FSDP: %d of %d parameters in this process", held_parameters(model), total)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `shard_frozen` was called with the model."""
    return isinstance(model, FSDPModule)


def release_gathered(model: nn.Module) -> None:
    """Drop what was gathered for a forward pass that no backward pass followed, if sharded."""
    if isinstance(model, FSDPModule):
        model.reshard()


def held_parameters(model: nn.Module) -> int:
    """Return how many numbers of the model's parameters this process holds between passes."""
    return sum(
        (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
        for parameter in model.parameters()
    )


def average_trained(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wrap a sharded model so that the gradients of what is trained are averaged.

    Args:
        model: After `shard_frozen`.
        device: Where the process trains.
    """
    frozen = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])
