"""Attach adapters to a model's linears, and take them off again.

PEFT does the wrapping: a LoRA configuration with a custom module class where the structure needs
one. Forward hooks that a caller puts on the wrapped module afterwards (online rotations) see the
input of both branches, because PEFT's layer contains the base layer.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from reslora.chains import find_chains
from reslora.config import ALL_PREVIOUS, AdapterConfig, Initialization, Structure
from reslora.head import HEAD_NAMES, wrapped_heads
from reslora.layers import (
    BlockShortcutLinear,
    InputShortcutLinear,
    MiddleShortcutLinear,
    ShortcutLinear,
)
from reslora.live_chain import LiveChain

logger = logging.getLogger(__name__)

ADAPTER_NAME = "default"
RESLORA_TYPE = "RESLORA"
"""Written as `peft_type` for adapters with a shortcut: PEFT knows no such type and refuses to load
them, where it would otherwise drop the shortcut silently."""

SHORTCUT_LAYERS: dict[Structure, type[ShortcutLinear]] = {
    Structure.BLOCK: BlockShortcutLinear,
    Structure.INPUT: InputShortcutLinear,
    Structure.MIDDLE: MiddleShortcutLinear,
}
"""Layer class of each structure."""

PEFT_INITIALIZATIONS: dict[Initialization, Any] = {
    Initialization.DEFAULT: True,
    Initialization.GAUSSIAN: "gaussian",
    Initialization.ORTHOGONAL: "orthogonal",
}
"""What each initialization is called in PEFT's `init_lora_weights`."""


@dataclass
class ShortcutLoraConfig(LoraConfig):
    """PEFT's LoRA configuration that remembers the shortcut, and says so whenever it is written."""

    structure: str | None = field(default=None)
    depth: int = field(default=ALL_PREVIOUS)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; a configuration with a shortcut is of no type PEFT would load."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]  # peft
        if self.structure is None:
            del values["structure"], values["depth"]
        else:
            values["peft_type"] = RESLORA_TYPE
        return values


def attach_adapters(
    model: nn.Module,
    config: AdapterConfig,
    target_fqns: Sequence[str],
    *,
    seed: int = 0,
    head: str | None = None,
) -> PeftModel:
    """Put a LoRA or ResLoRA block on each target linear; only they and a head are trainable.

    Args:
        model: A transformers model; its modules are replaced in place.
        config: The adapter.
        target_fqns: Dotted names of `nn.Linear` modules.
        seed: Seed of the A matrices; the global generator is left as it was.
        head: Name of the model's classification head, `classifier` or `score`: a copy of it is
            trained as a whole. None for a language model.

    Returns:
        The PEFT model around `model`.

    Invariant: B A starts at zero, so the wrapped model computes what `model` computed; to the bit
        where B is zero, to rounding with initialization `orthogonal`.

    Raises:
        ValueError: No target, a target or head that is missing, a target that is no linear or lies
            in the head, or a model that already carries adapters.
    """
    _check_head(model, head, target_fqns)
    shapes = _target_shapes(model, target_fqns)
    # peft declares an int but scales by any number; whole numbers stay whole in the file
    alpha: Any = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    peft_config = ShortcutLoraConfig(
        task_type=TaskType.CAUSAL_LM if head is None else TaskType.SEQ_CLS,
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        target_modules=list(shapes),
        bias="none",
        use_rslora=config.rslora,
        init_lora_weights=PEFT_INITIALIZATIONS[config.initialization],
        structure=None if config.structure is None else config.structure.value,
        depth=config.depth,
    )
    if config.structure is not None:
        peft_config._register_custom_module({nn.Linear: SHORTCUT_LAYERS[config.structure]})
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # peft 0.21 reads a model property that transformers 5 has renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, peft_config, adapter_name=ADAPTER_NAME)
    wrapped = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if set(wrapped) != set(shapes):
        surplus = sorted(set(wrapped) ^ set(shapes))
        raise ValueError(f"adapter targets and wrapped modules differ: {', '.join(surplus[:5])}")
    if head is not None:
        # transformers' heads take the Trainer's count of items and average over the batch instead
        model.accepts_loss_kwargs = False  # type: ignore[assignment]  # no module, as torch expects
    if config.structure is not None:
        _link_chains(model, config, shapes)
    return peft_model


def detach_adapters(peft_model: PeftModel) -> nn.Module:
    """Take the adapters off without merging them.

    Hooks registered on the wrapped layers go with those layers; the caller removes them by its
    handles.

    Returns:
        The model that was given to `attach_adapters`.

    Invariant: the returned model's weights are bit for bit those before attaching.
    """
    # peft would leave the trained head in place
    heads = wrapped_heads(peft_model.get_base_model())
    base: nn.Module = peft_model.unload()
    for name, wrapper in heads.items():
        base.set_submodule(name, wrapper.original_module)
    return base.requires_grad_(True)


def attached_config(peft_model: PeftModel) -> AdapterConfig:
    """Return the configuration a model made by `attach_adapters` was given."""
    held = peft_model.peft_config[ADAPTER_NAME]
    if not isinstance(held, ShortcutLoraConfig):
        raise TypeError(
            f"model carries a {type(held).__name__}, expected one made by attach_adapters; "
            "attach the adapter with reslora.attach.attach_adapters"
        )
    return AdapterConfig(
        rank=held.r,
        alpha=float(held.lora_alpha),
        dropout=held.lora_dropout,
        structure=None if held.structure is None else Structure(held.structure),
        depth=held.depth,
        rslora=held.use_rslora,
        initialization=_initialization(held.init_lora_weights),
    )


def _initialization(value: Any) -> Initialization:
    return next(name for name, theirs in PEFT_INITIALIZATIONS.items() if theirs == value)


def _check_head(model: nn.Module, head: str | None, target_fqns: Sequence[str]) -> None:
    if head is None:
        return
    if head not in HEAD_NAMES or head not in dict(model.named_children()):
        raise ValueError(
            f"classification head {head!r}: expected one of {', '.join(HEAD_NAMES)} that the model "
            f"has, got a {type(model).__name__}; load it for sequence classification"
        )
    inside = [fqn for fqn in target_fqns if fqn.split(".")[0] == head]
    if inside:
        raise ValueError(f"target {inside[0]}: lies in the head, which is trained as a whole")


def _target_shapes(model: nn.Module, target_fqns: Sequence[str]) -> dict[str, tuple[int, int]]:
    if not target_fqns:
        raise ValueError("no target modules: the adapter would change nothing; name at least one")
    modules = dict(model.named_modules())
    if any(isinstance(module, LoraLayer) for module in modules.values()):
        raise ValueError("model already carries adapters: detach or merge them first")
    shapes: dict[str, tuple[int, int]] = {}
    for fqn in target_fqns:
        module = modules.get(fqn)
        if module is None:
            raise ValueError(f"target {fqn}: the model has no such module; check the target names")
        if not isinstance(module, nn.Linear):
            raise ValueError(f"target {fqn}: expected nn.Linear, got {type(module).__name__}")
        shapes[fqn] = (module.out_features, module.in_features)
    return shapes


def _link_chains(
    model: nn.Module, config: AdapterConfig, shapes: dict[str, tuple[int, int]]
) -> None:
    for chain in find_chains(shapes):
        if chain.break_reason is not None:
            logger.warning("shortcut chain %s starts anew: %s", chain.kind, chain.break_reason)
        layers: list[ShortcutLinear] = []
        for fqn in chain.fqns:
            layer = model.get_submodule(fqn)
            if not isinstance(layer, ShortcutLinear):
                raise TypeError(f"{fqn}: peft made a {type(layer).__name__}, no shortcut layer")
            layers.append(layer)
        link = LiveChain(chain, layers, config.reach)
        for position, layer in enumerate(layers):
            layer.join(link, position, ADAPTER_NAME)
