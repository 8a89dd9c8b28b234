"""The LoRA layer with a block shortcut, and the live chain that owns the links between layers.

Block shortcut, ResLoRA (arXiv:2402.18039) §3.2, with s = alpha / rank and m = min(depth, n):

    h_n = W_n x_n + s * sum_{k=0..m} B_{n-k} A_{n-k} D(x_n)

The sum is one product of rank (m + 1) r with the factors set side by side,

    A_cat = [A_n; A_{n-1}; ...; A_{n-m}]    [(m+1) r, in]
    B_cat = [B_n, B_{n-1}, ..., B_{n-m}]    [out, (m+1) r]
    sum_{k} B_{n-k} A_{n-k} = B_cat A_cat

so a layer costs two matrix products however deep the shortcut reaches. Gradients flow into every
block of the window: that is the method's purpose, and nothing is detached.

Departures: the paper draws a dropout mask per block call, here the window shares one mask (with one
product there is one input); a window of one block takes PEFT's own code path, so depth 0 is LoRA to
the bit.

The links live in `LiveChain`, which is no module: a layer's parameters appear once in the state
dict, under the layer itself, and a checkpoint has neither cycles nor duplicates. The window is
concatenated anew in each forward, so activation checkpointing recomputes it with its gradient path
intact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn
from torch.nn import functional

from reslora.chains import Chain


class LiveChain:
    """The attached layers of one chain; owns all cross-layer references."""

    def __init__(self, chain: Chain, layers: Sequence[BlockShortcutLinear], reach: int) -> None:
        """Tie `layers` (in the order of `chain.fqns`) together with shortcuts of length `reach`."""
        self.chain = chain
        self.layers = tuple(layers)
        self.reach = reach

    def factors(self, position: int, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return A_cat [(m+1) r, in] and B_cat [out, (m+1) r] for the layer at `position`."""
        window = [self.layers[index] for index in self.chain.window(position, self.reach)]
        a = [layer.factor("lora_A", adapter_name) for layer in window]
        b = [layer.factor("lora_B", adapter_name) for layer in window]
        # .to() is a no-op unless a device map split the chain over several devices
        device = a[0].device
        a_cat = torch.cat([factor.to(device) for factor in a])
        b_cat = torch.cat([factor.to(device) for factor in b], dim=1)
        return a_cat, b_cat


class BlockShortcut(LoraVariant):
    """PEFT's hook for a changed LoRA branch: forward and merge over the window of blocks.

    Invariant: for input x and dropout off, `forward` equals the base layer with weight
    W + `get_delta_weight`, up to rounding in the dtype of the factors.
    """

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to initialise: the blocks are ordinary LoRA blocks."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Add the shortcut branch to `result` [..., out] for x [..., in]."""
        a_cat, b_cat = module.link.factors(module.position, active_adapter)
        x = module.lora_dropout[active_adapter](x)
        branch = functional.linear(functional.linear(x, a_cat), b_cat)
        scaling: float = module.scaling[active_adapter]
        return result + branch * scaling

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return W + delta [out, in] as a new tensor."""
        delta: Tensor = module.get_delta_weight(active_adapter)
        return orig_weight + delta.to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add delta [out, in] to the weight in place."""
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return W - delta [out, in] as a new tensor."""
        delta: Tensor = module.get_delta_weight(active_adapter)
        return orig_weight - delta.to(orig_weight.dtype)

    def supports_lora_conversion(self) -> bool:
        """Refuse PEFT's conversion, which would look at the layer's own block only."""
        return False


class BlockShortcutLinear(Linear):
    """A PEFT LoRA linear whose branch also runs previous blocks of its chain."""

    link: LiveChain | None = None
    position: int = 0

    def join(self, link: LiveChain, position: int, adapter_name: str) -> None:
        """Take the place `position` in `link`; a window of one block stays plain LoRA."""
        self.link = link
        self.position = position
        if len(link.chain.window(position, link.reach)) > 1:
            self.lora_variant[adapter_name] = BlockShortcut()

    def factor(self, side: Literal["lora_A", "lora_B"], adapter_name: str) -> Tensor:
        """Return this layer's own A [r, in] or B [out, r]."""
        blocks: nn.ModuleDict = getattr(self, side)
        weight = blocks[adapter_name].weight
        if not isinstance(weight, Tensor):
            raise TypeError(f"{side} of adapter {adapter_name!r} holds no tensor")
        return weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return s * B_cat A_cat [out, in], the exact weight change of the whole window."""
        if self.link is None or adapter not in self.lora_variant:
            return super().get_delta_weight(adapter)
        a_cat, b_cat = self.link.factors(self.position, adapter)
        delta: Tensor = (b_cat @ a_cat) * self.scaling[adapter]
        return delta
