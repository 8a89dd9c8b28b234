"""Symmetric quantization: the arithmetic that torch and the exported graph share.

For a scale s > 0 and the range [quant_min, quant_max]

    q = clamp(round_half_even(x / s), quant_min, quant_max)          x' = s * q

Both use the two's complement range (-128..127, -8..7) with s = absmax / quant_max (QuaRot,
arXiv:2404.00456), but for weights of 8 bits -128 is left out: nothing is gained by it. Division,
not multiplication by 1/s:
ONNX QuantizeLinear divides, and a reciprocal rounds some ties the other way.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-10
"""Lower bound of scales that are divided by, so that zeros stay zeros."""


def activation_range(bits: int) -> tuple[int, int]:
    """Return (quant_min, quant_max) of activations with `bits` bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def weight_range(bits: int) -> tuple[int, int]:
    """Return (quant_min, quant_max) of weights with `bits` bits."""
    quant_max = 2 ** (bits - 1) - 1
    return (-quant_max if bits == 8 else -quant_max - 1), quant_max


def quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Round to integers.

    Args:
        x: Values, float, any shape.
        scale: Positive scales, broadcastable to x.
        quant_min: Least integer.
        quant_max: Greatest integer.

    Returns:
        int8 tensor of x's shape.
    """
    return torch.clamp(torch.round(x / scale), quant_min, quant_max).to(torch.int8)


def quantize_tokens(x: Tensor, bits: int, clip_ratio: float) -> tuple[Tensor, Tensor]:
    """Round each token (or last-dimension group) with a scale s = c m of its own, m = max|x|.

    x is divided by m and then by the constant c = clip_ratio / quant_max, as the exported graph
    does, where c is in the product's scale and m alone is left for run time. Against x / s that
    moves a tie by the last place.

    Args:
        x: float [..., K].
        bits: Activation bits.
        clip_ratio: Part of the absolute maximum that the range covers.

    Returns:
        int8 [..., K]; s, float [..., 1], c for a token of zeros.
    """
    quant_min, quant_max = activation_range(bits)
    factor = torch.tensor(clip_ratio / quant_max, dtype=x.dtype, device=x.device)
    largest = token_magnitude(x)
    return quantize(x / largest, factor, quant_min, quant_max), largest * factor


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Return `q * scale` in the dtype of the scale."""
    return q.to(scale.dtype) * scale


def token_magnitude(x: Tensor) -> Tensor:
    """Return m = max|x| of each token (or last-dimension group), float [..., 1]; 1 for zeros."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    return torch.where(largest == 0, 1.0, largest)
