from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rolora.kronecker import (
    balanced_factors,
    dense_rotation,
    factored_hadamard_rotation,
    hadamard_rotation,
    probe_hadamard,
    random_signs,
)

EPS = torch.finfo(torch.float64).eps


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 4, 12, 20, 36, 44, 48, 64]), st.integers(0, 2**40), st.integers(1, 3))
def test_rotate_is_a_product_with_the_dense_matrix(n: int, seed: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, groups * n, dtype=torch.float64, generator=generator)
    rotation = hadamard_rotation(random_signs(n, generator))
    dense = rotation.dense()
    bound = 8 * n * EPS
    identity = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(dense @ dense.T, identity, rtol=0, atol=bound)
    product = (x.reshape(3, 2, groups, n) @ dense).reshape(x.shape)
    atol = bound * float(x.abs().max()) * n**0.5
    torch.testing.assert_close(rotation.rotate(x), product, rtol=0, atol=atol)
    torch.testing.assert_close(rotation.unrotate(rotation.rotate(x)), x, rtol=0, atol=atol)


def test_rotating_twice_is_not_the_identity() -> None:
    rotation = hadamard_rotation(random_signs(36, torch.Generator().manual_seed(1)))
    x = torch.randn(5, 36, dtype=torch.float64)
    assert (rotation.rotate(rotation.rotate(x)) - x).abs().max() > 0.1


def test_factored_rotation_is_the_kronecker_product_of_its_matrices() -> None:
    generator = torch.Generator().manual_seed(2)
    rotation = factored_hadamard_rotation(random_signs(12, generator), random_signs(4, generator))
    product = torch.kron(rotation.left, rotation.right)
    torch.testing.assert_close(rotation.dense(), product, rtol=0, atol=48 * EPS)
    assert (rotation.dense().abs() - 48**-0.5).abs().max() < 48 * EPS  # a Hadamard matrix still


def test_a_rotation_keeps_dtype_and_refuses_another_size() -> None:
    rotation = dense_rotation(torch.eye(6, dtype=torch.float64))
    assert rotation.rotate(torch.ones(2, 12, dtype=torch.float32)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"size 6: .*multiple of it, got .*\(2, 9\)"):
        rotation.rotate(torch.ones(2, 9))
    with pytest.raises(ValueError, match="size 6"):
        rotation.unrotate(torch.ones(2, 9))


def test_a_rotation_spreads_an_outlier() -> None:
    rotation = hadamard_rotation(random_signs(576, torch.Generator().manual_seed(3)))
    outlier = torch.zeros(576, dtype=torch.float64)
    outlier[17] = 24.0
    torch.testing.assert_close(rotation.rotate(outlier).abs(), torch.ones_like(outlier))


def test_a_probe_does_not_depend_on_the_split_and_tells_matrices_apart() -> None:
    generator = torch.Generator().manual_seed(4)
    signs = [random_signs(n, generator) for n in (48, 12, 4, 24, 2)]
    whole = probe_hadamard(hadamard_rotation(signs[0]))
    assert torch.equal(probe_hadamard(factored_hadamard_rotation(signs[1], signs[2])), whole)
    assert torch.equal(probe_hadamard(factored_hadamard_rotation(signs[3], signs[4])), whole)
    swapped = factored_hadamard_rotation(signs[2], signs[1])
    assert not torch.equal(probe_hadamard(swapped), whole)


def test_signs_are_fair() -> None:
    signs = random_signs(10_000, torch.Generator().manual_seed(5))
    assert set(signs.tolist()) == {-1, 1}
    assert abs(int(signs.sum())) < 500  # five standard errors


@pytest.mark.parametrize(
    ("n", "factors"), [(1, (1, 1)), (13, (1, 13)), (44, (4, 11)), (64, (8, 8)), (172, (4, 43))]
)
def test_balanced_factors(n: int, factors: tuple[int, int]) -> None:
    assert balanced_factors(n) == factors
