"""Calibration inputs that walk through a decoder block by block.

Only the hidden states between two blocks are kept. As the blocks behind are quantized already, a
block sees the inputs that it will see in the quantized model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rolora.decoder import BlockNames, DecoderNames


class _Captured(Exception):
    """The inputs of the first block are known."""


class BlockStream:
    """Hidden states in front of the current block, one entry a calibration batch.

    Args:
        model: The decoder.
        names: Its parts.
        batches: Keyword arguments of its forward pass.
    """

    def __init__(
        self, model: nn.Module, names: DecoderNames, batches: Iterable[Mapping[str, Tensor]]
    ) -> None:
        self._model = model
        self._states: list[Tensor] = []
        self._options: list[dict[str, Any]] = []
        first = model.get_submodule(block_fqn(names.blocks[0]))
        handle = first.register_forward_pre_hook(self._capture, with_kwargs=True)
        try:
            with torch.inference_mode():
                for batch in batches:
                    try:
                        model(**batch)
                    except _Captured:
                        continue
        finally:
            handle.remove()

    def _capture(
        self, _module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self._states.append(inputs[0])
        self._options.append(options | {"past_key_values": None, "use_cache": False})
        raise _Captured

    def hessian(self, block: BlockNames, fqn: str) -> Tensor:
        """Return the second moments sum x x^T of a linear's input, float32 [K, K].

        Online rotations are hooks that were registered earlier, so the input is seen after them.
        """
        moments: list[Tensor] = []

        def observe(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            if moments:
                moments[0].addmm_(x.t(), x)
            else:
                moments.append(x.t() @ x)

        handle = self._model.get_submodule(fqn).register_forward_pre_hook(observe)
        try:
            self._run(block)
        finally:
            handle.remove()
        if not moments:
            raise ValueError(
                f"{fqn}: no calibration input reached it; give calibration text of at least one "
                f"token"
            )
        return moments[0]

    def advance(self, block: BlockNames) -> None:
        """Move the states behind the current block."""
        self._states = self._run(block)

    def _run(self, block: BlockNames) -> list[Tensor]:
        module = self._model.get_submodule(block_fqn(block))
        with torch.inference_mode():
            outputs = [
                module(state, **options)
                for state, options in zip(self._states, self._options, strict=True)
            ]
        return [output[0] if isinstance(output, tuple) else output for output in outputs]


def block_fqn(block: BlockNames) -> str:
    """Return the FQN of the module that holds a block's norms, attention and MLP."""
    return block.attention_norm.rpartition(".")[0]
