"""Run adapters inside the weight of their linear, for layers that must see the merged weight.

An attached layer computes W x + s B A x as two branches. Whoever rounds weights in training must
round W + s B A, which is what a merge leaves. Here the branch is silenced and its weight change
handed out, differentiable, to whatever module takes the base layer's place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn

from reslora.attach import ADAPTER_NAME, attached_config
from reslora.config import AdapterConfig, Structure

WeightChange = Callable[[], Tensor]
"""Returns dW [out, in] of one linear in the factors' dtype, with a gradient to them."""


class _InsideWeight(LoraVariant):
    """PEFT's hook for a changed LoRA branch: the base layer has done it all."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to initialise."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return `result` [..., out] as it is."""
        return result


def put_inside_weights(
    peft_model: PeftModel, replace: Callable[[str, nn.Linear, WeightChange], nn.Module]
) -> None:
    """Silence the branch of every adapted linear and replace its base layer.

    Args:
        peft_model: A model made by `attach_adapters`, of plain LoRA or structure `block`, without
            dropout.
        replace: Given the FQN of a linear, its base layer and its weight change, returns the module
            that computes the base layer with the change in its weight.

    Raises:
        ValueError: See `require_inside_weight`.
    """
    require_inside_weight(attached_config(peft_model))
    decoder = peft_model.get_base_model()
    layers = [
        (name, module) for name, module in decoder.named_modules() if isinstance(module, Linear)
    ]
    for fqn, layer in layers:
        change = partial(layer.get_delta_weight, ADAPTER_NAME)
        base = layer.base_layer
        if not isinstance(base, nn.Linear):
            raise ValueError(f"{fqn}: expected a base layer nn.Linear, got {type(base).__name__}")
        layer.base_layer = replace(fqn, base, change)
        layer.lora_variant[ADAPTER_NAME] = _InsideWeight()


def require_inside_weight(config: AdapterConfig) -> None:
    """Refuse an adapter that is more than a change of weights.

    Raises:
        ValueError: The structure's shortcut is no function of the layer's own input, or dropout is
            on, which acts on a branch and has no place in a weight.
    """
    if config.structure not in (None, Structure.BLOCK) and config.reach != 0:
        raise ValueError(
            f"structure {config.structure}: its shortcut adds other layers' activations, which no "
            "weight can hold; use structure block, or none"
        )
    if config.dropout != 0:
        raise ValueError(
            f"dropout {config.dropout:g} acts on the adapter's own branch, and here the adapter is "
            "part of the weight; use dropout 0"
        )
