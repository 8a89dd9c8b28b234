"""GPTQ: round column by column, let those that are left make up for it (arXiv:2210.17323).

With the second moments H = sum x x^T of a layer's inputs, rounding column i of W by an error e_i is
best repaired by

    W[:, j] -= e_i / U[i, i] * U[i, j]     for the columns j > i,        U = upper Cholesky factor
    of H^-1.

Columns go in the order of falling H[i, i] (act-order), scales are fixed beforehand from the
original weight (so groups keep their columns), and the diagonal is damped by a share of its mean,
ten times more after each failed
factorization.

**What is aimed at.** In front of a layer the quantized model has inputs x' where the float model
has x, since the layers before are rounded already. The weight that makes the most of them is

    W* = argmin sum ||W x - W* x'||^2 = W C H^-1,          C = sum x x'^T,  H = sum x' x'^T

(GPTAQ, arXiv:2504.02692, minimizes the same; here the float weight is moved before it is rounded).
On a small calibration text W* also follows what only that text has, so the aim A goes a share of
the way: A = W + a (W* - W) for weights of 4 bits, a the aim share. With more bits there is so
little to make up for that the text's own noise outweighs it, and A = W.

Departure: the result is kept only if its error tr((A - Q) H (A - Q)^T) is below that of W rounded
to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rolora.affine import weight_range
from rolora.rtn import quantize_weight
from rolora.scheme import WeightSpec

_BLOCK_COLUMNS = 128
_ROWS = 1024
_DAMPING = 0.01
_DAMPING_TRIES = 4
AIM_BITS = 4
"""Most bits of a weight that aims elsewhere than at itself."""


@dataclass(frozen=True)
class GptqResult:
    """Integers of one weight, and what they cost on the calibration inputs."""

    q: Tensor
    """int8 [out, in]."""
    scale: Tensor
    """float32 [out] or [out, groups]."""
    error: float
    """tr((A - Q) H (A - Q)^T) over tr(A H A^T), A the aim; 0 where that output is."""
    rtn_error: float
    """The same of round-to-nearest with the same scales."""
    energy: float
    """tr(A H A^T), the weight of these errors among those of other rows."""


def aims_elsewhere(spec: WeightSpec) -> bool:
    """Return whether a weight aims at more than itself, for which it needs cross moments."""
    return spec.bits <= AIM_BITS


class Gptq:
    """Rounds the rows of weights that read one input, which is factorized once.

    Args:
        hessian: float32 [in, in], sum of x' x'^T over calibration inputs x' of the quantized model.
        cross: float32 [in, in], sum of x x'^T, x the float model's inputs; None aims at the weight
            itself.
        aim_share: How much of the way from the weight to the best one for these inputs is aimed at.
            SmolLM2-135M, W4A4 on 3,072 tokens, shares 0, 0.25, 0.5, 0.75: KL divergence 0.28, 0.26,
            0.29, 0.35. Without channel scales, on 4,096, shares 0 and 0.5: 1.88 and 1.59 times the
            float model's perplexity. W8A8, shares 0 and 0.5: KL 0.0043 and 0.0046.

    Raises:
        ValueError: The Hessian is not square, not finite, or cannot be factorized even with strong
            damping; or the cross moments have another size or are not finite.
    """

    def __init__(
        self, hessian: Tensor, cross: Tensor | None = None, aim_share: float = 0.5
    ) -> None:
        if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
            raise ValueError(f"Hessian: expected a square matrix, got {list(hessian.shape)}")
        if not torch.isfinite(hessian).all():
            raise ValueError(
                "Hessian has NaN or infinite values; check the calibration text and the model's "
                "weights"
            )
        if cross is not None and (cross.shape != hessian.shape or not torch.isfinite(cross).all()):
            raise ValueError(
                f"cross moments: expected finite {list(hessian.shape)}, got {list(cross.shape)}"
            )
        self._hessian = hessian
        self._aim_share = aim_share
        self._drift = None if cross is None else cross - hessian
        self._order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        self._factor = _inverse_factor(hessian[self._order][:, self._order])

    def _aim(self, weight: Tensor, spec: WeightSpec) -> Tensor:
        """Return A for a weight, float32 [out, in]."""
        if self._drift is None or not aims_elsewhere(spec):
            return weight
        change = weight @ self._drift
        # The factor is that of the damped inverse, and the damping pulls W* towards W.
        step = (change[:, self._order] @ self._factor.t()) @ self._factor
        aim = weight.clone()
        aim[:, self._order] += self._aim_share * step
        return aim

    def round(self, weight: Tensor, spec: WeightSpec, *, clip_search: bool) -> GptqResult:
        """Round rows with GPTQ, or to nearest where that is better for all of them together.

        Args:
            weight: float [out, in], finite.
            spec: Bits and group size.
            clip_search: See `rolora.rtn.quantize_weight`, which sets the scales.

        Raises:
            ValueError: As `quantize_weight`; or the Hessian has another size.
        """
        columns, size = weight.shape[-1], self._hessian.shape[0]
        if columns != size:
            raise ValueError(
                f"Hessian: expected [{columns}, {columns}], got {list(self._hessian.shape)}"
            )
        nearest, scale = quantize_weight(weight, spec, clip_search=clip_search)
        weight = self._aim(weight.detach().float(), spec)
        wide_scale = _per_column(scale, columns)
        rounded = torch.empty_like(nearest)
        rounded[:, self._order] = _round_columns(
            weight[:, self._order].clone(), wide_scale[:, self._order], self._factor, spec.bits
        )
        energy = _quadratic(weight, self._hessian)
        error, rtn_error = (
            _quadratic(weight - q.float() * wide_scale, self._hessian) / energy if energy else 0.0
            for q in (rounded, nearest)
        )
        if not error < rtn_error:
            rounded, error = nearest, rtn_error
        return GptqResult(rounded, scale, error, rtn_error, energy)


def _per_column(scale: Tensor, columns: int) -> Tensor:
    """Spread scales [out] or [out, groups] over the columns: float32 [out, in]."""
    by_group = scale[:, None] if scale.ndim == 1 else scale
    return by_group.repeat_interleave(columns // by_group.shape[1], dim=1)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor U of the damped inverse, H^-1 = U^T U, float32."""
    damped = hessian.double()
    mean = float(damped.diagonal().mean())
    # A column that never was non-zero has no say in any other; mean 0 means that none has.
    share = _DAMPING * (mean if mean > 0.0 else 1.0)
    for _ in range(_DAMPING_TRIES):
        trial = damped.clone()
        trial.diagonal().add_(share)
        trial, failed = torch.linalg.cholesky_ex(trial)
        if not failed:
            trial, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(trial), upper=True)
        if not failed:
            upper: Tensor = trial.float()
            return upper
        share *= 10.0
    raise ValueError(
        f"Hessian of size {len(hessian)} stays singular with {share / 10:.3g} on its diagonal"
    )


def _round_columns(weight: Tensor, scale: Tensor, factor: Tensor, bits: int) -> Tensor:
    """Round the columns of float32 [out, in], which it overwrites; returns int8 [out, in]."""
    quant_min, quant_max = weight_range(bits)
    q = torch.empty(weight.shape, dtype=torch.int8)
    # Rows do not know each other: so many at a time that a block of them stays in the cache.
    for some, steps, integers in zip(*(x.split(_ROWS) for x in (weight, scale, q)), strict=True):
        for start in range(0, weight.shape[1], _BLOCK_COLUMNS):
            end = min(start + _BLOCK_COLUMNS, weight.shape[1])
            # One row per column of the weight, so that the inner loop touches contiguous memory.
            block, step = (x[:, start:end].t().contiguous() for x in (some, steps))
            rounded, errors = torch.empty_like(block), torch.empty_like(block)
            for i in range(end - start):
                torch.div(block[i], step[i], out=rounded[i])
                rounded[i].round_().clamp_(quant_min, quant_max)
                torch.addcmul(block[i], rounded[i], step[i], value=-1, out=errors[i])
                errors[i] /= factor[start + i, start + i]
                block[i + 1 :].addr_(factor[start + i, start + i + 1 : end], errors[i], alpha=-1)
            integers[:, start:end] = rounded.t()
            some[:, end:] -= errors.t() @ factor[start:end, end:]
    return q


def _quadratic(weight: Tensor, hessian: Tensor) -> float:
    """Return tr(W H W^T)."""
    return float(((weight @ hessian) * weight).sum(dtype=torch.float64))
