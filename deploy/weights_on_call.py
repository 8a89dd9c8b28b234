"""Weights that are in memory only while their linear is called.

A model that runs a few times, to be compared with an export, need not be in memory: each of its
large linears reads its weight from the checkpoint when it is called and forgets it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rolora.linear import InputQuantizedLinear, QuantizedLinear


def read_on_call(
    module: QuantizedLinear | InputQuantizedLinear, read: Callable[[], Tensor]
) -> None:
    """Take a linear's weight out of memory between its calls.

    Hooks on its output that need the weight must come before the one that forgets it: register
    them with `prepend`.

    Args:
        module: With its weight, whose shape and dtype stay known.
        read: Returns the weight.
    """
    absent = torch.empty_like(module.weight, device="meta")
    module.weight = absent

    def bring(_module: Any, _inputs: Any) -> None:
        module.weight = read()

    def forget(_module: Any, _inputs: Any, _output: Any) -> None:
        module.weight = absent

    module.register_forward_pre_hook(bring)
    module.register_forward_hook(forget, always_call=True)


@contextmanager
def held(
    module: QuantizedLinear | InputQuantizedLinear, read: Callable[[], Tensor]
) -> Iterator[None]:
    """Have a linear's weight in memory inside the block, if it is read on call.

    Args:
        module: A linear; one that has its weight keeps it.
        read: Returns the weight.
    """
    absent = module.weight
    if not absent.is_meta:
        yield
        return
    module.weight = read()
    try:
        yield
    finally:
        module.weight = absent
