"""Cayley steps: they stay orthogonal, descend as fast as a step can, and are the paper's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rolora.hadamard import random_orthogonal
from rolora.stiefel import cayley_step, nearest_orthogonal

EPS = torch.finfo(torch.float64).eps


def draw(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return an orthogonal matrix and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return random_orthogonal(n, generator), torch.randn(
        n, n, dtype=torch.float64, generator=generator
    )


def defect(matrices: Tensor) -> float:
    identity = torch.eye(matrices.shape[-1], dtype=torch.float64)
    return float((matrices @ matrices.mT - identity).abs().max())


def small_rate(gradient: Tensor) -> float:
    """Return a rate far below the bound at which steps are cut."""
    return float(1e-3 / gradient.abs().sum())


@pytest.mark.parametrize("rate", [1e-9, 0.1, 1e6])
def test_a_thousand_steps_stay_orthogonal(rate: float) -> None:
    matrix, gradient = draw(12)
    for _ in range(1000):
        matrix = cayley_step(matrix, gradient, rate)
    assert defect(matrix) < 1e-12
    assert defect(draw(12)[0] - 1e-3 * gradient) > 1e-4  # as a plain step does not


def test_a_step_is_the_papers_formula() -> None:
    matrix, gradient = draw(7)
    rate = small_rate(gradient)
    g_hat = gradient @ matrix.T - 0.5 * matrix @ matrix.T @ gradient @ matrix.T
    skew, identity = g_hat - g_hat.T, torch.eye(7, dtype=torch.float64)
    expected = torch.linalg.inv(identity + rate / 2 * skew) @ (identity - rate / 2 * skew) @ matrix
    torch.testing.assert_close(cayley_step(matrix, gradient, rate), expected, rtol=0, atol=1e-14)


def test_the_loss_falls_by_the_squared_norm_of_the_direction() -> None:
    matrix, gradient = draw(9)
    rate = small_rate(gradient)
    product = gradient @ matrix.T
    slope = -float(((product - product.T) / 2).square().sum())
    forward, back = (cayley_step(matrix, sign * gradient, rate) for sign in (1.0, -1.0))
    measured = float((gradient * (forward - back)).sum()) / (2 * rate)
    assert measured == pytest.approx(slope, rel=1e-4)
    assert slope < 0


def test_a_stack_moves_as_its_matrices_do_each_with_its_own_bound() -> None:
    pairs = [draw(5, seed) for seed in range(3)]
    stack = torch.stack([matrix for matrix, _ in pairs])
    gradients = torch.stack([gradient * 10.0**k for k, (_, gradient) in enumerate(pairs)])
    moved = cayley_step(stack, gradients, 0.05)
    for one, matrix, gradient in zip(moved, stack, gradients, strict=True):
        torch.testing.assert_close(one, cayley_step(matrix, gradient, 0.05), rtol=0, atol=1e-14)


def test_no_gradient_is_no_step_and_a_long_step_turns_by_a_radian_at_most() -> None:
    matrix, gradient = draw(6)
    still = cayley_step(matrix, torch.zeros_like(matrix), 1.5)
    torch.testing.assert_close(still, matrix, rtol=0, atol=8 * EPS)
    # A gradient along the matrix itself would only stretch it.
    torch.testing.assert_close(cayley_step(matrix, matrix, 1.5), matrix, rtol=0, atol=8 * EPS)
    turned = cayley_step(matrix, gradient, 1e9) @ matrix.T
    angles = torch.linalg.eigvals(turned).angle().abs()
    assert 0.3 < float(angles.max()) < 1.0


def test_steps_find_the_rotation_that_was_hidden() -> None:
    hidden, points = draw(8, seed=1)
    # Two rotations are joined by a path only if their determinants agree.
    start = draw(8, seed=2)[0]
    start[0] *= torch.sign(torch.det(start) * torch.det(hidden))
    target, matrix = points @ hidden, start

    def loss_of(matrix: Tensor) -> float:
        return float((points @ matrix - target).square().sum())

    for step in range(3000):
        gradient = 2 * points.T @ (points @ matrix - target)
        matrix = cayley_step(matrix, gradient, 0.02 * (1 - step / 3000))
    assert loss_of(matrix) < 1e-6 * loss_of(start)


def test_the_nearest_orthogonal_matrix_is_orthogonal_and_nearest() -> None:
    matrix, noise = draw(10)
    blurred = matrix + 1e-3 * noise
    nearest = nearest_orthogonal(blurred)
    assert defect(blurred) > 1e-4
    assert defect(nearest) < 64 * EPS
    distance = float((nearest - blurred).norm())
    for seed in range(20):
        other = cayley_step(nearest, draw(10, seed)[1], 1e-3)
        assert float((other - blurred).norm()) > distance
    torch.testing.assert_close(nearest_orthogonal(matrix), matrix, rtol=0, atol=64 * EPS)
