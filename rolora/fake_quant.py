"""Rounding that a gradient can pass: the integers of `affine`, seen by autograd.

Forward is the arithmetic of the quantized model, so that training meets the rounding that will be
packed:

    v = x / s,   q = clamp(round(v), quant_min, quant_max),   x' = s q

or, where a token has a scale s = m c of its own, v = (x / m) / c.

Backward passes the gradient g of x' straight through where v was not clamped (straight-through
estimator, arXiv:1308.3432), and gives the scale the derivative of learned step size quantization
(LSQ, arXiv:1902.08153, equation 3)

    dx = g [inside],     ds = sum g (q - v [inside])     over all x that share the scale.

Departure: LSQ divides ds by sqrt(elements * quant_max); here scales are trained as logarithms,
whose steps need no such factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rolora.affine import activation_range


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, *divisors: Tensor
    ) -> Tensor:
        divisors = divisors or (scale,)
        ctx.save_for_backward(x, scale, *divisors)
        ctx.range = quant_min, quant_max
        return _divide(x, divisors).round_().clamp_(quant_min, quant_max).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *divisors = ctx.saved_tensors
        quant_min, quant_max = ctx.range
        (gradient,) = gradients
        v = _divide(x, divisors)
        q = torch.round(v)
        inside = (q >= quant_min) & (q <= quant_max)
        of_x = gradient * inside if ctx.needs_input_grad[0] else None
        of_scale = None
        if ctx.needs_input_grad[1]:
            q.clamp_(quant_min, quant_max).sub_(v.mul_(inside)).mul_(gradient)
            of_scale = q.sum_to_size(scale.shape)
        return of_x, of_scale, *(None for _ in ctx.needs_input_grad[2:])


def _divide(x: Tensor, divisors: Sequence[Tensor]) -> Tensor:
    """Return a new tensor: x over the divisors, one after the other."""
    quotient = torch.div(x, divisors[0])
    for divisor in divisors[1:]:
        quotient.div_(divisor)
    return quotient


def fake_quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Round to multiples of a scale and keep the dtype; gradients reach x and the scale.

    Args:
        x: float, any shape.
        scale: Positive, broadcastable to x, of its dtype.
        quant_min: Least integer.
        quant_max: Greatest integer.

    Equivalent to:
        `dequantize(quantize(x, scale, quant_min, quant_max), scale)`, to the bit.
    """
    apply: Callable[..., Tensor] = _FakeQuantize.apply
    return apply(x, scale, quant_min, quant_max)


def fake_quantize_tokens(x: Tensor, largest: Tensor, factor: Tensor, bits: int) -> Tensor:
    """Round tokens with scales of their own; gradients reach x, and the scale's two parts.

    Args:
        x: float [..., K].
        largest: Of each token, [..., 1], from `token_magnitude`.
        factor: Scalar: clip_ratio / quant_max.
        bits: Activation bits.

    Equivalent to:
        `dequantize(*quantize_tokens(x, bits, clip_ratio))`, to the bit.
    """
    apply: Callable[..., Tensor] = _FakeQuantize.apply
    parts = largest.detach(), factor.detach()
    return apply(x, largest * factor, *activation_range(bits), *parts)
