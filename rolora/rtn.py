"""Round-to-nearest weights with a search for the clipping point.

Per row (or group) the scale is p * absmax / quant_max. A smaller p rounds the many small weights
finer and saturates the few large ones; the p with the least squared error wins (QuaRot,
arXiv:2404.00456, searches alike with |e|^2.4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolora.affine import quantize, weight_range
from rolora.scheme import WeightSpec

_CHUNK_ELEMENTS = 1 << 20
"""Elements searched at a time: bounds the temporaries to a few times 4 MiB."""

_SMALLEST_SCALE = 1e-30
"""Lower bound of a row's scale, so that a row of subnormal numbers has none of 0."""


def _candidates(bits: int) -> list[float]:
    """Return the clip ratios tried, the unclipped one first; coarser codes clip deeper."""
    lowest, step = {8: (0.80, 0.02), 6: (0.60, 0.02)}.get(bits, (0.30, 0.02))
    return [1.0 - step * i for i in range(round((1.0 - lowest) / step) + 1)]


def quantize_weight(
    weight: Tensor, spec: WeightSpec, *, clip_search: bool
) -> tuple[Tensor, Tensor]:
    """Round a weight to nearest.

    Args:
        weight: float [out, in], finite.
        spec: Bits and group size.
        clip_search: Search the clip ratio of each scale; otherwise the scale covers the absolute
            maximum.

    Returns:
        Integers int8 [out, in] and scales float32 [out] (per channel) or [out, in / group_size].

    Raises:
        ValueError: The weight is not finite, not 2-D, or its columns are no multiple of the group
            size.
    """
    if weight.ndim != 2:
        raise ValueError(
            f"weight: expected 2 dimensions [out, in], got shape {tuple(weight.shape)}"
        )
    rows, columns = weight.shape
    width = spec.group_size or columns
    if columns % width:
        raise ValueError(
            f"group size {width} does not divide the {columns} input columns; use a divisor or no "
            f"group size"
        )
    quantized = torch.empty(rows * columns // width, width, dtype=torch.int8)
    scales = torch.empty(rows * columns // width, 1)
    flat = weight.reshape(-1, width)
    step = rows_at_a_time(width)
    for start in range(0, flat.shape[0], step):
        chunk = flat[start : start + step].float()
        if not torch.isfinite(chunk).all():
            raise ValueError("weight has NaN or infinite values: nothing to round to")
        q, scale = _round_rows(chunk, spec.bits, _candidates(spec.bits) if clip_search else [1.0])
        quantized[start : start + step] = q
        scales[start : start + step] = scale
    scale_shape = (rows,) if spec.group_size is None else (rows, columns // width)
    return quantized.reshape(rows, columns), scales.reshape(scale_shape)


def rows_at_a_time(columns: int) -> int:
    """Return how many rows of so many columns are rounded at a time."""
    return max(1, _CHUNK_ELEMENTS // columns)


def _round_rows(rows: Tensor, bits: int, ratios: list[float]) -> tuple[Tensor, Tensor]:
    """Round rows [n, width] with the best of the clip ratios; returns int8, scales [n, 1]."""
    quant_min, quant_max = weight_range(bits)
    absmax = rows.abs().amax(dim=1, keepdim=True)
    # A row of zeros keeps scale 1: its integers are all 0.
    smallest = (absmax / quant_max).clamp(min=_SMALLEST_SCALE)
    full = torch.where(absmax > 0, smallest, torch.ones_like(absmax))
    best_scale = full.clone()
    best_error = torch.full_like(absmax, torch.inf)
    for ratio in ratios:
        scale = full * ratio
        rounded = torch.div(rows, scale).round_().clamp_(quant_min, quant_max).mul_(scale)
        error = rounded.sub_(rows).square_().sum(dim=1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return quantize(rows, best_scale, quant_min, quant_max), best_scale
