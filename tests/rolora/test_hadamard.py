from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rolora.hadamard import (
    hadamard_construction,
    hadamard_factors,
    hadamard_matrix,
    random_orthogonal,
)

SMALL = (1, 2, 4, 12, 20, 28, 36, 40, 44, 52, 60, 64, 76, 108, 128, 140, 148, 344)
MODEL_SIZES = (
    *(576, 1536, 2048, 4096, 4864, 5120, 5632, 8192, 8960, 9728, 11008, 13824, 14336, 18944),
    *(27648, 28672, 29568, 53248),
)
# Multiples of 4 up to 1000 that Sylvester, Paley I, Paley II and their Kronecker products miss,
# as listed in the literature on Hadamard's conjecture.
UNREACHED = (
    *(92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324, 356, 372, 376, 404, 412, 428),
    *(436, 452, 472, 476, 508, 520, 532, 536, 584, 596, 604, 612, 652, 668, 712, 716, 732, 756),
    *(764, 772, 808, 836, 852, 856, 872, 876, 892, 904, 932, 940, 944, 952, 956, 964, 980, 988),
    996,
)


def is_hadamard(matrix: Tensor) -> bool:
    """Check entries and H H^T = n I exactly.

    All partial sums are integers far below 2^53, so float64 adds them without any rounding.
    """
    n = matrix.shape[0]
    entries = torch.equal(matrix.abs(), torch.ones(n, n, dtype=torch.float64))
    return entries and torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", SMALL)
def test_matrix_is_hadamard_exactly(n: int) -> None:
    matrix = hadamard_matrix(n)
    assert matrix.dtype == torch.float64
    assert matrix.shape == (n, n)
    assert is_hadamard(matrix)
    integers = matrix.to(torch.int64)
    assert torch.equal(integers @ integers.T, n * torch.eye(n, dtype=torch.int64))


@pytest.mark.parametrize("n", SMALL[2:])
def test_one_wrong_sign_is_noticed(n: int) -> None:
    matrix = hadamard_matrix(n)
    matrix[n // 2, n // 3] *= -1
    assert not is_hadamard(matrix)


@pytest.mark.parametrize("n", [*SMALL, *MODEL_SIZES])
def test_factors_multiply_to_the_size_and_are_hadamard(n: int) -> None:
    left, right = hadamard_factors(n)
    assert left * right == n
    # The Kronecker product of two Hadamard matrices is one, so this proves order n.
    assert is_hadamard(hadamard_matrix(left))
    assert is_hadamard(hadamard_matrix(right))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300).map(lambda quarter: 4 * quarter))
def test_splitting_never_changes_the_matrix(n: int) -> None:
    try:
        left, right = hadamard_factors(n)
    except ValueError:
        return
    split = torch.kron(hadamard_matrix(left), hadamard_matrix(right))
    assert torch.equal(split, hadamard_matrix(n))


def test_every_reachable_order_up_to_1000_is_reached() -> None:
    refused = []
    for n in range(4, 1001, 4):
        try:
            hadamard_construction(n)
        except ValueError:
            refused.append(n)
    assert tuple(refused) == UNREACHED


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 100).map(lambda quarter: 4 * quarter).filter(lambda n: n not in UNREACHED))
def test_any_reachable_order_is_hadamard(n: int) -> None:
    assert is_hadamard(hadamard_matrix(n))


@pytest.mark.parametrize(
    ("n", "factors"),
    [
        (576, (36, 16)),
        (1536, (48, 32)),
        (14336, (112, 128)),
        (11008, (344, 32)),
        (64, (8, 8)),
        (1904, (28, 68)),
    ],
)
def test_the_cheapest_split_is_taken(n: int, factors: tuple[int, int]) -> None:
    assert hadamard_factors(n) == factors


@pytest.mark.parametrize(
    ("n", "construction"),
    [
        (576, "paley2(36) x sylvester(16)"),
        (11008, "paley1(344) x sylvester(32)"),
        (240, "paley1(60) x sylvester(4)"),
        (400, "paley2(100) x sylvester(4)"),
        (1904, "paley1(28) x paley1(68) x sylvester(1)"),
    ],
)
def test_construction_is_named(n: int, construction: str) -> None:
    assert hadamard_construction(n) == construction


@pytest.mark.parametrize("n", [3, 6, 92, 172, 156, 4 * 4913])
def test_unreachable_order_names_the_number_and_the_way_out(n: int) -> None:
    with pytest.raises(ValueError, match=rf"order {n}:.*Paley.*--rotation-kind orthogonal"):
        hadamard_matrix(n)


@pytest.mark.parametrize("n", [0, -4])
def test_order_must_be_positive(n: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {n}"):
        hadamard_factors(n)
    with pytest.raises(ValueError, match=f"at least 1, got {n}"):
        random_orthogonal(n, torch.Generator())


def test_callers_own_the_matrix() -> None:
    hadamard_matrix(12).zero_()
    hadamard_matrix(2).zero_()
    assert is_hadamard(hadamard_matrix(12))
    assert is_hadamard(hadamard_matrix(2))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 48), st.integers(0, 2**62))
def test_random_matrix_is_orthogonal_and_follows_its_generator(n: int, seed: int) -> None:
    matrix = random_orthogonal(n, torch.Generator().manual_seed(seed))
    bound = 8 * n * torch.finfo(torch.float64).eps
    identity = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=bound)
    again = random_orthogonal(n, torch.Generator().manual_seed(seed))
    assert torch.equal(matrix, again)


def test_random_matrix_has_no_preferred_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_orthogonal(4, generator) for _ in range(400)])
    plain = torch.linalg.qr(torch.randn(400, 4, 4, dtype=torch.float64, generator=generator)).Q
    # Haar: mean 0 and variance 1/4, so five standard errors of 400 draws are 0.125.
    assert abs(drawn[:, 0, 0].mean()) < 0.125
    assert abs(plain[:, 0, 0].mean()) > 0.125  # what the sign correction is for
