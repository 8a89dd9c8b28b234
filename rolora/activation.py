"""Inputs of linears as integers, with or without a zero point.

Symmetric, s = clip * max|x| / quant_max as in `affine`. Asymmetric, with low = min(x, 0) and
high = max(x, 0) of a token (or of a group of its columns)

    s = clip * (high - low) / (2^bits - 1)           z = round(quant_min - clip * low / s)
    q = clamp(round(x / s + z), quant_min, quant_max)                 x' = s * (q - z)

so that 0 is always represented exactly. z is added before rounding, as the exported graph does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rolora.affine import SMALLEST_SCALE, activation_range, quantize, quantize_tokens
from rolora.scheme import ActivationSpec, Granularity


@dataclass(frozen=True)
class QuantizedActivation:
    """An input as integers."""

    q: Tensor
    """int8 [T, K]."""
    scale: Tensor
    """float32 [] (TENSOR), [T, 1] (TOKEN) or [T, groups, 1] (GROUP)."""
    zero_point: Tensor | None
    """int32 of the scale's shape; None where it is 0 everywhere."""

    def dequantize(self) -> Tensor:
        """Return the values that the integers stand for, float32 [T, K]."""
        integers = self.q.float()
        if self.scale.ndim == 3:
            integers = integers.reshape(*self.scale.shape[:2], -1)
        if self.zero_point is not None:
            integers = integers - self.zero_point
        return (integers * self.scale).reshape(self.q.shape)


def quantize_activation(
    x: Tensor, spec: ActivationSpec, input_scale: Tensor | None
) -> QuantizedActivation:
    """Quantize an input.

    Args:
        x: float32 [T, K].
        spec: How; not float.
        input_scale: The calibrated scale, float32 scalar, for TENSOR granularity.
    """
    quant_min, quant_max = activation_range(spec.bits)
    if spec.granularity is Granularity.TENSOR:
        assert input_scale is not None
        return QuantizedActivation(
            quantize(x, input_scale, quant_min, quant_max), input_scale, None
        )
    grouped = x
    if spec.granularity is Granularity.GROUP:
        grouped = x.reshape(x.shape[0], -1, spec.group_size or x.shape[1])
    if spec.symmetric:
        q, scale = quantize_tokens(grouped, spec.bits, spec.clip_ratio)
        return QuantizedActivation(q.reshape(x.shape), scale, None)
    scale, zero_point = token_scale_and_zero_point(grouped, spec.bits, spec.clip_ratio)
    q = torch.clamp(torch.round(grouped / scale + zero_point), quant_min, quant_max).to(torch.int8)
    return QuantizedActivation(q.reshape(x.shape), scale, zero_point.int())


def rounded_activation(x: Tensor, spec: ActivationSpec, input_scale: Tensor | None) -> Tensor:
    """Return the values that a linear sees in place of its input, float32 [T, K]."""
    if spec.is_float:
        return x
    return quantize_activation(x, spec, input_scale).dequantize()


def token_scale_and_zero_point(x: Tensor, bits: int, clip_ratio: float) -> tuple[Tensor, Tensor]:
    """Return the run-time scale and zero point of each token (or last-dimension group).

    Args:
        x: float [..., K].
        bits: Activation bits.
        clip_ratio: Part of the range that is covered.

    Returns:
        float [..., 1] each; the zero point is an integer of the activation range.
    """
    low = x.amin(dim=-1, keepdim=True).clamp(max=0.0)
    high = x.amax(dim=-1, keepdim=True).clamp(min=0.0)
    clip = torch.tensor(clip_ratio, dtype=x.dtype)
    factor = torch.tensor(clip_ratio / (2**bits - 1), dtype=x.dtype)
    scale = torch.clamp((high - low) * factor, min=SMALLEST_SCALE)
    return scale, torch.round(activation_range(bits)[0] - low * clip / scale)
