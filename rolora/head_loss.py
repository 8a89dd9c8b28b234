"""The loss of a frozen head, a few tokens at a time, with its gradient computed on the way.

The logits of a window are its largest tensor by far, tokens times vocabulary, and autograd would
keep several of that size. But with z = W h + b and a frozen W, the gradient by h is known at once:

    cross-entropy      mean log sum_v exp z_v - z_target      dh = W^T (softmax z - onehot) / T
    KL to a teacher    mean KL(softmax z' || softmax z)       dh = W^T (softmax z - softmax z') / T

z' are the logits of a teacher's head for its hidden states. So the forward pass keeps the gradient,
of h's size, and drops the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK_ELEMENTS = 1 << 24
"""Logits at a time (64 MiB in float32)."""


@dataclass(frozen=True)
class Head:
    """A linear that is not trained; products are computed in its dtype, softmax in float32."""

    weight: Tensor
    """float [V, D]."""
    bias: Tensor | None = None
    """float [V]."""

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Return log softmax of the logits, float32 or wider [T, V], for hidden [T, D]."""
        weight = self.weight
        bias = None if self.bias is None else self.bias.to(weight)
        logits = functional.linear(hidden.to(weight), weight, bias)
        at_least = torch.promote_types(logits.dtype, torch.float32)
        return torch.log_softmax(logits.to(at_least), dim=-1)


@dataclass(frozen=True)
class _Teacher:
    hidden: Tensor
    head: Head


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, target: Tensor | _Teacher) -> Tensor:
        tokens = hidden.shape[0]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        step = max(1, _CHUNK_ELEMENTS // head.weight.shape[0])
        for start in range(0, tokens, step):
            rows = slice(start, start + step)
            log_q = head.log_probabilities(hidden[rows])
            if isinstance(target, _Teacher):
                log_p = target.head.log_probabilities(target.hidden[rows])
                total += functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
                change = log_q.exp_().sub_(log_p.exp_())
            else:
                chosen = target[rows, None]
                total -= log_q.gather(1, chosen).sum()
                change = log_q.exp_().scatter_add_(1, chosen, log_q.new_full(chosen.shape, -1.0))
            if gradient is not None:
                gradient[rows] = (change.to(head.weight.dtype) @ head.weight).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(tokens))
        return (total / tokens).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


def cross_entropy(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of a frozen head; gradients reach the hidden states.

    Args:
        hidden: float [T, D].
        head: The head.
        targets: int64 [T].
    """
    apply: Callable[..., Tensor] = _HeadLoss.apply
    return apply(hidden, head, targets)


def divergence(hidden: Tensor, head: Head, teacher: Tensor, teacher_head: Head) -> Tensor:
    """Return the mean KL divergence from a teacher; gradients reach the hidden states.

    Args:
        hidden: float [T, D].
        head: The head.
        teacher: The teacher's hidden states, float [T, D'].
        teacher_head: Its head.
    """
    apply: Callable[..., Tensor] = _HeadLoss.apply
    return apply(hidden, head, _Teacher(teacher, teacher_head))
