"""The live chain: everything the layers of one chain share while the model runs.

Structure `block` shares factors, which are parameters. Structures `input` and `middle` share
activations: each layer leaves a tensor for later layers of its chain. Such a tensor lives for one
forward pass only: the chain's first layer begins a pass, each layer must follow the one before it,
and what was left is dropped when the chain's last layer has run. Shortcuts run along depth, between
tensors of the same tokens, so decoding with a key-value cache computes what the full pass computes.

Activation checkpointing runs a piece of the model a second time during the backward pass, last
piece first, when what earlier layers left is long gone. The piece is therefore run in the contexts
of `recompute_contexts`: the first run keeps what each layer received on a tape, the second reads it
from there. Gradients do not need the tape: they flow through the first run's graph, for which the
second run only restores saved values. The tape belongs to the piece and is freed with it; it holds
one tensor a layer, [tokens, rank] for `middle` and [tokens, in] for `input`, where linears with the
same input share it.

`torch.compile` breaks its graph where a layer takes and leaves tensors, and runs that step as is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from reslora.chains import Chain

Observer = Callable[[int, Tensor, Tensor | None], None]
"""Called with a layer's position, its input x_n and what it received from earlier layers."""


class ShortcutBlock(Protocol):
    """A layer that owns one LoRA block."""

    def factor(self, side: Literal["lora_A", "lora_B"], adapter_name: str) -> Tensor:
        """Return A [r, in] or B [out, r]."""


class LiveChain:
    """The attached layers of one chain; owns all cross-layer references and tensors."""

    def __init__(self, chain: Chain, layers: Sequence[ShortcutBlock], reach: int) -> None:
        """Tie `layers` (in the order of `chain.fqns`) together with shortcuts of length `reach`."""
        self.chain = chain
        self.layers = tuple(layers)
        self.reach = reach
        self.observer: Observer | None = None
        self._pass = _Pass()

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

    @torch.compiler.disable(reason="crosses layers")  # type: ignore[untyped-decorator]  # torch
    def earlier_sum(self, position: int, own: Tensor) -> Tensor | None:
        """Return the sum of what the window's earlier layers left, and leave `own` to later ones.

        Args:
            position: Of the calling layer.
            own: What it contributes, [..., in] or [..., r]; not detached.

        Returns:
            A tensor like `own`; None for the first layer of the chain.

        Raises:
            ValueError: The layer before it has not run in this pass or saw other tokens, or this is
                a second run of a checkpointed piece without `recompute_contexts`.
        """
        tape = _current.tape
        if isinstance(tape, _Replay):
            return tape.take()
        # torch.utils.checkpoint asks the same way whether a backward pass is running
        if torch._C._current_graph_task_id() != -1:
            raise ValueError(
                f"{self.chain.fqns[position]}: activation checkpointing runs it again without what "
                "earlier layers left; enable it with {'use_reentrant': False, 'context_fn': "
                "reslora.live_chain.recompute_contexts}"
            )
        earlier = self._step(position, own)
        if isinstance(tape, _Record):
            tape.keep(earlier)
        return earlier

    def observe(self, position: int, x: Tensor, received: Tensor | None) -> None:
        """Show a layer's input and what it received to the observer, if there is one."""
        if self.observer is not None:
            self.observer(position, x, received)

    def _step(self, position: int, own: Tensor) -> Tensor | None:
        state, fqns = self._pass, self.chain.fqns
        left = () if position == 0 else state.left
        expected, state.left, state.expected = state.expected, (), 0
        if position not in (0, expected):
            raise ValueError(
                f"{fqns[position]}: {fqns[position - 1]} did not run just before it in this "
                "forward pass; structures input and middle need every layer of a chain once, in "
                "depth order"
            )
        earlier: Tensor | None = None
        for tensor in left:
            if tensor.shape != own.shape:
                raise ValueError(
                    f"{fqns[position]}: got {list(own.shape)}, earlier layers left "
                    f"{list(tensor.shape)}; structures input and middle need the same tokens in "
                    "every layer of a chain: use structure block"
                )
            moved = tensor.to(own.device)
            earlier = moved if earlier is None else earlier + moved
        if position + 1 < len(fqns):
            if self.reach < 0:
                state.left = (own if earlier is None else earlier + own,)
            else:
                state.left = (*left, own)[-self.reach :]
            state.expected = position + 1
        return earlier


def recompute_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a checkpointed piece's first run and of its repetition.

    This is a `context_fn` for `torch.utils.checkpoint` with `use_reentrant=False`.
    """
    held: list[Tensor | None] = []
    return _Record(held), _Replay(held)


class _Pass(threading.local):
    """What was left so far in the pass that runs in this thread; a copy starts empty."""

    left: tuple[Tensor, ...] = ()
    expected: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _Pass, ()


class _Tape:
    """A context in which layers of this thread use `held`; it can be entered again."""

    def __init__(self, held: list[Tensor | None]) -> None:
        self.held = held
        self._outer: list[_Tape | None] = []

    def __enter__(self) -> None:
        self._outer.append(_current.tape)
        _current.tape = self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _current.tape = self._outer.pop()


class _Record(_Tape):
    def keep(self, received: Tensor | None) -> None:
        # as part of no graph, but needing a gradient where the original did: autograd decides by
        # that what it saves, and both runs must save the same
        if received is not None:
            received = received.detach().requires_grad_(received.requires_grad)
        self.held.append(received)


class _Replay(_Tape):
    _rest: Iterator[Tensor | None] = iter(())

    def __enter__(self) -> None:
        super().__enter__()
        self._rest = iter(self.held)

    def take(self) -> Tensor | None:
        return next(self._rest)


class _Current(threading.local):
    tape: _Tape | None = None


_current = _Current()
"""Which tape the layers of this thread use; torch repeats pieces in the backward pass's threads."""
