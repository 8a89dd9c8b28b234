"""Descent on orthogonal matrices: the Cayley step, and the orthogonal matrix nearest to another.

For a loss with the Euclidean gradient G at the orthogonal R, the skew-symmetric

    Y = (G R^T - R G^T) / 2

turns R into the direction of steepest descent, d/da loss = -||Y||^2, along the curve

    R(a) = (I + a/2 Y)^{-1} (I - a/2 Y) R

which is orthogonal for every a (SpinQuant, arXiv:2405.16406, equations 3 and 4, with the sign of
the gradient written out; Li et al., 2002.01113, for the bound on a).

Departure: the papers approximate the inverse by fixed-point iterations, and repair at random what
orthogonality that loses. Here it is solved in float64, where a step keeps orthogonality to
rounding; at the hidden sizes of decoders that costs less than the gradient of one window of text.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cayley_step(matrices: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Move orthogonal matrices against a gradient, along the manifold.

    Args:
        matrices: float64 [..., n, n], orthogonal.
        gradient: Of the loss by each entry, same shape.
        rate: Length a of the step; for each matrix at most 1 / ||Y||_1, where the papers' iteration
            still converges and no vector turns by more than a radian.

    Returns:
        float64 [..., n, n], orthogonal to rounding.
    """
    product = gradient.to(matrices) @ matrices.mT
    skew = (product - product.mT) / 2
    norm = skew.abs().sum(dim=-2).amax(dim=-1)[..., None, None]
    # A gradient of 0 has norm 0 and makes no step, however long.
    half = torch.minimum(torch.full_like(norm, rate), 1 / norm) / 2 * skew
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    moved: Tensor = torch.linalg.solve(identity + half, (identity - half) @ matrices)
    return moved


def nearest_orthogonal(matrices: Tensor) -> Tensor:
    """Return the orthogonal matrices nearest in Frobenius norm: U V^T of U S V^T = M.

    Args:
        matrices: float64 [..., n, n], of full rank.
    """
    left, _, right = torch.linalg.svd(matrices)
    nearest: Tensor = left @ right
    return nearest
