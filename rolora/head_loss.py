"""The loss of a language model from the hidden states before its head, without its logits.

Logits of a large vocabulary are most of the memory of a training step: [tokens, vocabulary] floats,
several times over. Loss and gradient are therefore computed together, a few hundred tokens at a
time, while the forward pass runs:

    z = h W^T,      p = softmax(z)
    cross-entropy   -log p[label]                d/dz = p - onehot(label)
    distillation    KL(p_t || p)                 d/dz = p - p_t

with p_t the prediction of a teacher, and dh = dz W. The head's weight W is not trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_TOKENS_AT_ONCE = 256


@dataclass(frozen=True)
class Teacher:
    """What a teacher says of the same tokens."""

    hidden: Tensor
    """[N, D'], before its head."""
    head: Tensor
    """Weight of its head, [V, D']."""


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, target: Tensor | Teacher) -> Tensor:
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            logits = functional.linear(hidden[part].to(head.dtype), head).float()
            log_p = functional.log_softmax(logits, dim=-1)
            if isinstance(target, Teacher):
                theirs = functional.linear(target.hidden[part].to(target.head.dtype), target.head)
                log_t = functional.log_softmax(theirs.float(), dim=-1)
                p_t = log_t.exp()
                total += (p_t * log_t.sub_(log_p)).sum()
                of_logits = log_p.exp_().sub_(p_t)
            else:
                labels = target[part, None]
                total -= log_p.gather(1, labels).sum()
                of_logits = log_p.exp_()
                of_logits.scatter_add_(1, labels, torch.full_like(of_logits[:, :1], -1.0))
            if gradient is not None:
                gradient[part] = (of_logits.to(head.dtype) @ head).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * gradients[0], None, None


def head_loss(hidden: Tensor, head: Tensor, target: Tensor | Teacher) -> Tensor:
    """Return the summed loss of N positions, float32 scalar, with a gradient for `hidden`.

    Args:
        hidden: float32 [N, D], inputs of the head.
        head: Its weight [V, D]; products are computed in its dtype, sums in float32.
        target: Labels int64 [N] for cross-entropy, or a teacher for KL divergence.
    """
    apply: Callable[..., Tensor] = _HeadLoss.apply
    return apply(hidden, head, target)
