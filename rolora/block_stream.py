"""Calibration inputs that walk through a model block by block.

Only the hidden states between two blocks are kept, so that only the block between them needs its
weights in memory. A stream that moves on when a block is quantized shows the next block the inputs
that it will see in the quantized model; one that moves on before shows those of the float model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from rolora.blocks import Block, BlockStack
from rolora.calibration import RangeObserver


class KnownRows(nn.Module):
    """Stands for an embedding of which the rows of some tokens are known.

    Args:
        tokens: int64 [n], ascending, each once.
        rows: float32 [n, hidden_size].
    """

    def __init__(self, tokens: Tensor, rows: Tensor) -> None:
        super().__init__()
        self._tokens = tokens
        self._rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        """Return float32 [..., hidden_size] for known token ids int64 [...]."""
        return self._rows[torch.searchsorted(self._tokens, ids)]


def tokens_in(batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Return the ids that occur in batches, int64 [n], ascending, each once."""
    ids = [batch["input_ids"].flatten() for batch in batches]
    return torch.unique(torch.cat(ids)) if ids else torch.empty(0, dtype=torch.int64)


def rows_of_tokens(tokens: Tensor, rows: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each chunk of an embedding's rows, and those of them that some tokens have.

    Args:
        tokens: See `KnownRows`.
        rows: All rows in order, float32 [n, hidden_size] at a time.
    """
    start = 0
    for chunk in rows:
        inside = tokens[(tokens >= start) & (tokens < start + len(chunk))]
        yield chunk, chunk[inside - start]
        start += len(chunk)


class Moments:
    """Second moments of inputs x' of one model, and with inputs x of another if they are known."""

    def __init__(self) -> None:
        self.hessian = torch.zeros(0, 0)
        """float32 [K, K], sum of x' x'^T."""
        self.cross: Tensor | None = None
        """float32 [K, K], sum of x x'^T."""

    def add(self, own: Tensor, other: Tensor | None) -> None:
        """Add tokens: x' and, for all or for none of them, x; float32 [tokens, K] each."""
        columns = own.shape[1]
        if not self.hessian.numel():
            self.hessian = torch.zeros(columns, columns)
            self.cross = None if other is None else torch.zeros(columns, columns)
        self.hessian.addmm_(own.t(), own)
        if self.cross is not None and other is not None:
            self.cross.addmm_(other.t(), own)

    def require_any(self, fqn: str) -> None:
        """Refuse moments of nothing.

        Raises:
            ValueError: No token was added; the message names the linear.
        """
        if not self.hessian.numel():
            raise ValueError(
                f"{fqn}: no calibration input reached it; give calibration text of at least one "
                f"token"
            )


class _Captured(Exception):
    """What was wanted of a forward pass is known."""


class BlockStream:
    """Hidden states in front of the current block, one entry a calibration batch.

    Args:
        model: A decoder or an encoder.
        names: Its parts.
        batches: Keyword arguments of its forward pass.
        embedding: What takes the embedding's place to begin with; None is the model's own.
    """

    def __init__(
        self,
        model: nn.Module,
        names: BlockStack,
        batches: Iterable[Mapping[str, Tensor]],
        embedding: nn.Module | None = None,
    ) -> None:
        self._model = model
        self.states: list[Tensor] = []
        """float32 [batch, tokens, hidden_size] each."""
        self._arguments: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        """By block, one entry a batch: masks and rotary embeddings, which layers may have of their
        own, by place and by name. Layers that have the same share its tensors."""
        fqns = [block.fqn for block in names.blocks]
        own = model.get_submodule(names.embedding)
        with ExitStack() as stack:
            stack.enter_context(_in_place_of(model, names.embedding, embedding or own))
            for fqn in fqns:
                stand_in = _StandIn(partial(self._capture, fqn, last=fqn == fqns[-1]))
                stack.enter_context(_in_place_of(model, fqn, stand_in))
            stack.enter_context(torch.inference_mode())
            for batch in batches:
                try:
                    model(**batch)
                except _Captured:
                    continue

    def _capture(
        self,
        fqn: str,
        state: Tensor,
        places: tuple[Any, ...],
        options: dict[str, Any],
        *,
        last: bool,
    ) -> None:
        without_cache = options | {"past_key_values": None, "use_cache": False}
        self._arguments.setdefault(fqn, []).append((places, without_cache))
        if last:
            self.states.append(state)
            raise _Captured

    def moments(self, block: Block, fqn: str, others: Sequence[Tensor] | None) -> Moments:
        """Return the second moments of a linear's input.

        Online rotations are hooks that were registered earlier, so the input is seen after them.

        Args:
            block: The current one.
            fqn: The linear.
            others: Its inputs in another model, from `advance`; None leaves cross moments out.

        Raises:
            ValueError: No input reached it; the message names it.
        """
        moments = Moments()
        remaining = repeat(None) if others is None else iter(others)

        def observe(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            moments.add(rows_of(inputs[0]), next(remaining))
            raise _Captured  # what comes behind costs time and is not asked for

        handle = self._model.get_submodule(fqn).register_forward_pre_hook(observe)
        try:
            for run in self._run(block):
                with suppress(_Captured):
                    run()
        finally:
            handle.remove()
        moments.require_any(fqn)
        return moments

    def advance(
        self,
        block: Block,
        observers: Mapping[str, RangeObserver] | None = None,
        kept: Iterable[str] = (),
    ) -> dict[str, list[Tensor]]:
        """Move the states behind the current block.

        Args:
            block: The current one.
            observers: By FQN of a linear in it, what observes the linear's input on the way.
            kept: FQNs of linears in it whose inputs are wanted.

        Returns:
            Of those linears the inputs, float32 [tokens, K] for each batch.

        Raises:
            ValueError: An observed input is NaN or infinite; the message names the linear.
        """
        inputs_of: dict[str, list[Tensor]] = {fqn: [] for fqn in kept}
        listeners: list[tuple[str, Callable[[Tensor], None]]] = [
            (fqn, partial(observer.update_from, fqn)) for fqn, observer in (observers or {}).items()
        ]
        listeners += [(fqn, _keeper(found)) for fqn, found in inputs_of.items()]
        handles = [
            self._model.get_submodule(fqn).register_forward_pre_hook(
                lambda _module, inputs, listen=listen: listen(inputs[0])
            )
            for fqn, listen in listeners
        ]
        try:
            outputs = [run() for run in self._run(block)]
        finally:
            for handle in handles:
                handle.remove()
        self.states = [output[0] if isinstance(output, tuple) else output for output in outputs]
        return inputs_of

    def _run(self, block: Block) -> list[Callable[[], Any]]:
        """Return for each batch what runs the block on its state."""
        module, batches = self._model.get_submodule(block.fqn), self._arguments.get(block.fqn, [])
        run = torch.inference_mode()(module.__call__)
        return [
            partial(run, state, *places, **options)
            for state, (places, options) in zip(self.states, batches, strict=True)
        ]


def rows_of(x: Tensor) -> Tensor:
    """Return an input of any shape as float32 [tokens, K]."""
    return x.reshape(-1, x.shape[-1]).float()


def _keeper(found: list[Tensor]) -> Callable[[Tensor], None]:
    return lambda x: found.append(rows_of(x).clone())


class _StandIn(nn.Module):
    """Takes the place of a block: tells what comes in, and gives the hidden states on."""

    def __init__(self, capture: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__()
        self._capture = capture

    def forward(self, state: Tensor, *places: Any, **options: Any) -> Tensor:
        self._capture(state, places, options)
        return state


@contextmanager
def _in_place_of(model: nn.Module, fqn: str, module: nn.Module) -> Iterator[None]:
    own = model.get_submodule(fqn)
    model.set_submodule(fqn, module)
    try:
        yield
    finally:
        model.set_submodule(fqn, own)
