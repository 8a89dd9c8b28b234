"""LoRA layers with a shortcut: PEFT's linear, and one hook for each structure's branch.

ResLoRA (arXiv:2402.18039) §3.2, with s = `AdapterConfig.scaling`, m = min(depth, n) and D the
dropout:

    block    h_n = W_n x_n + s * sum_{k=0..m} B_{n-k} A_{n-k} D(x_n)
    input    h_n = W_n x_n + s * B_n A_n D(x_n + x_{n-1}),     x_{-1} := x_0
    middle   h_n = W_n x_n + s * B_n sum_{k=0..m} A_{n-k} D(x_{n-k})

The block sum is one product of rank (m + 1) r with the factors set side by side,

    A_cat = [A_n; A_{n-1}; ...; A_{n-m}]    [(m+1) r, in]
    B_cat = [B_n, B_{n-1}, ..., B_{n-m}]    [out, (m+1) r]
    sum_{k} B_{n-k} A_{n-k} = B_cat A_cat

so a layer costs two matrix products however deep the shortcut reaches. Input and middle shortcuts
add what earlier layers left in this forward pass (`LiveChain.earlier_sum`). Gradients flow into
every layer of the window: that is the method's purpose, and nothing is detached.

Departures: the paper draws a dropout mask per block call, here the window of `block` shares one
mask (with one product there is one input); a layer without a shortcut takes PEFT's own code path,
so depth 0 is LoRA to the bit.

The links live in `LiveChain`, which is no module: a layer's parameters appear once in the state
dict, under the layer itself, and a checkpoint has neither cycles nor duplicates. The block window
is concatenated anew in each forward, so activation checkpointing recomputes it with its gradient
path intact.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn
from torch.nn import functional

from reslora.live_chain import LiveChain


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


class InputShortcut(BlockShortcut):
    """The block sees the sum of its own and the previous layer's input."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Add the shortcut branch to `result` [..., out] for x [..., in]."""
        link: LiveChain = module.link
        earlier = link.earlier_sum(module.position, x)
        received = x if earlier is None else earlier
        link.observe(module.position, x, received)
        inner = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x + received))
        branch: Tensor = module.lora_B[active_adapter](inner)
        scaling: float = module.scaling[active_adapter]
        return result + branch * scaling


class MiddleShortcut(BlockShortcut):
    """B sees the sum of its own and the previous layers' rank-sized intermediates."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Add the shortcut branch to `result` [..., out] for x [..., in]."""
        link: LiveChain = module.link
        inner = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        earlier = link.earlier_sum(module.position, inner)
        link.observe(module.position, x, earlier)
        branch: Tensor = module.lora_B[active_adapter](
            inner if earlier is None else inner + earlier
        )
        scaling: float = module.scaling[active_adapter]
        return result + branch * scaling


class ShortcutLinear(Linear):
    """A PEFT LoRA linear that has a place in a chain."""

    link: LiveChain | None = None
    position: int = 0

    def join(self, link: LiveChain, position: int, adapter_name: str) -> None:
        """Take the place `position` in `link`; where no shortcut acts, the layer is plain LoRA."""
        self.link = link
        self.position = position
        variant = self._variant(link, position)
        if variant is not None:
            self.lora_variant[adapter_name] = variant

    def factor(self, side: Literal["lora_A", "lora_B"], adapter_name: str) -> Tensor:
        """Return this layer's own A [r, in] or B [out, r]."""
        blocks: nn.ModuleDict = getattr(self, side)
        weight = blocks[adapter_name].weight
        if not isinstance(weight, Tensor):
            raise TypeError(f"{side} of adapter {adapter_name!r} holds no tensor")
        return weight

    def _variant(self, link: LiveChain, position: int) -> LoraVariant | None:
        raise NotImplementedError


class BlockShortcutLinear(ShortcutLinear):
    """A PEFT LoRA linear whose branch also runs previous blocks of its chain."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return s * B_cat A_cat [out, in], the exact weight change of the whole window."""
        if self.link is None or adapter not in self.lora_variant:
            return super().get_delta_weight(adapter)
        a_cat, b_cat = self.link.factors(self.position, adapter)
        delta: Tensor = (b_cat @ a_cat) * self.scaling[adapter]
        return delta

    def _variant(self, link: LiveChain, position: int) -> LoraVariant | None:
        return BlockShortcut() if len(link.chain.window(position, link.reach)) > 1 else None


class _PassingLinear(ShortcutLinear):
    """A linear whose branch uses activations of other layers, so that no weight equals it."""

    structure: ClassVar[str]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Refuse, unless the layer is plain LoRA."""
        if self.link is not None and adapter in self.lora_variant:
            raise ValueError(
                f"{self.link.chain.fqns[self.position]}: the {self.structure} shortcut is no "
                "function of the layer's own input, so PEFT cannot merge it; use "
                "reslora.merge.merge_adapter with an approximate method"
            )
        return super().get_delta_weight(adapter)


class InputShortcutLinear(_PassingLinear):
    """A PEFT LoRA linear whose branch also sees the previous layer's input."""

    structure = "input"

    def _variant(self, link: LiveChain, position: int) -> LoraVariant | None:
        return InputShortcut() if link.reach != 0 else None


class MiddleShortcutLinear(_PassingLinear):
    """A PEFT LoRA linear whose B also sees previous layers' intermediates."""

    structure = "middle"

    def _variant(self, link: LiveChain, position: int) -> LoraVariant | None:
        linked = link.reach != 0 and len(link.chain.fqns) > 1
        return MiddleShortcut() if linked else None
