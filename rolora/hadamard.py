"""Hadamard matrices by construction, and random orthogonal matrices.

A Hadamard matrix H has entries +-1 and H H^T = n I, so H / sqrt(n) is a rotation that spreads one
large coordinate evenly over all n. Papers ship tables of them; here they are built.

**Sylvester.** H_2 = [[1, 1], [1, -1]], and the Kronecker product (x) of two Hadamard matrices is
one: (A (x) B)(A (x) B)^T = (A A^T) (x) (B B^T) = ab I.

**Paley.** Let q be an odd prime power, chi the quadratic character of GF(q) (0 at zero, +1 at
squares, -1 elsewhere) and Q[a, b] = chi(a - b). Then Q Q^T = q I - J and Q J = J Q = 0. Bordered::

    S = [[0, 1^T], [e 1, Q]]    S S^T = q I    of order q + 1, with e = chi(-1)

- Paley I, q = 3 mod 4: e = -1, S is skew and H = I + S, of order q + 1:
  H H^T = I + S + S^T + S S^T = (1 + q) I.
- Paley II, q = 1 mod 4: e = +1, S is symmetric and, of order 2 (q + 1),
  H = S (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]; the cross terms cancel and
  H H^T = (2q + 2) I.

A size is written as Paley orders ("cores") times a power of two, with the fewest and then the
smallest cores. Their order in the Kronecker product is fixed: cores ascending, then twos. So the
place where the product is split into two small matrices changes the speed and never the matrix.

Used as in QuaRot (arXiv:2404.00456). Departure: its table of 11 cores has no entry for 4864, 5632,
9728 or 18944; the constructions reach them.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import count, product
from math import isqrt, prod

import torch
from torch import Tensor


def hadamard_matrix(n: int) -> Tensor:
    """Build the Hadamard matrix of order `n`.

    Args:
        n: Order, at least 1.

    Returns:
        Tensor [n, n], float64, entries +-1; the caller owns it.

    Raises:
        ValueError: No construction reaches `n`.

    Invariant:
        `H @ H.T == n * I` exactly. For every `n` the same matrix, on every machine.
    """
    matrix = torch.ones(1, 1, dtype=torch.int8)
    for size in _kronecker_sizes(n):
        matrix = torch.kron(matrix, _core_matrix(size))
    return matrix.to(torch.float64)


def hadamard_factors(n: int) -> tuple[int, int]:
    """Split `n` into the two sizes through which its Hadamard matrix is applied fastest.

    Through two factors a vector costs `left + right` multiply-adds per element instead of `n`. The
    split with the smallest sum is taken; of equals the one with the larger right factor, since the
    right product is one large matrix product over all tokens, the left one a batch of small ones.
    On two cores with ONNX Runtime and 512 tokens, 48 x 32 takes 0.6 of the time of 12 x 128, and
    112 x 128 takes 0.46 of the time of 28 x 512, as the sums 80 : 140 and 240 : 540 say.

    Args:
        n: Order, at least 1.

    Returns:
        `(left, right)`, `left * right == n`; `right` is a power of two where there is a split into
        two factors at all and `n` needs only one core.

    Raises:
        ValueError: No construction reaches `n`.

    Invariant:
        `hadamard_matrix(n) == kron(hadamard_matrix(left), hadamard_matrix(right))` exactly.
    """
    sizes = _kronecker_sizes(n)
    splits = [(prod(sizes[:at]), prod(sizes[at:])) for at in range(len(sizes) + 1)]
    return min(splits, key=lambda split: (sum(split), -split[1]))


def hadamard_construction(n: int) -> str:
    """Name the Kronecker factors of `hadamard_matrix(n)`, e.g. `paley1(12) x sylvester(128)`.

    Raises:
        ValueError: No construction reaches `n`.
    """
    sizes = _kronecker_sizes(n)
    cores = [size for size in sizes if size != 2]
    names = [f"paley1({c})" if _is_paley_one(c) else f"paley2({c})" for c in cores]
    twos = 2 ** (len(sizes) - len(cores))
    return " x ".join([*names, f"sylvester({twos})"])


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Draw an orthogonal matrix from the Haar measure.

    The Q of a Gaussian matrix's QR decomposition is Haar distributed once the signs of R's diagonal
    are moved into it; without that step it depends on the sign convention of the QR routine.

    Args:
        n: Order, at least 1.
        generator: Source of randomness, on the CPU; it advances.

    Returns:
        Tensor [n, n], float64.

    Raises:
        ValueError: `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"orthogonal matrix: expected an order of at least 1, got {n}")
    gaussian = torch.randn(n, n, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    haar: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(torch.float64)
    return haar


@lru_cache(maxsize=256)
def _kronecker_sizes(n: int) -> tuple[int, ...]:
    """Return the cores, ascending, followed by twos: the orders whose Kronecker product is `n`."""
    if n < 1:
        raise ValueError(f"Hadamard matrix: expected an order of at least 1, got {n}")
    for number_of_cores in range(n.bit_length() // 3 + 1):  # the smallest core, 12, is above 2^3
        cores = _find_cores(n, number_of_cores, smallest=12)
        if cores is not None:
            twos = (n // prod(cores)).bit_length() - 1
            return (*cores, *(2,) * twos)
    raise ValueError(
        f"Hadamard matrix: no construction reaches order {n}: it is no power of two and no product "
        f"of Paley orders (q + 1 for a prime power q = 3 mod 4, 2 (q + 1) for q = 1 mod 4) times a "
        f"power of two; use --rotation-kind orthogonal"
    )


def _find_cores(n: int, number_of_cores: int, smallest: int) -> tuple[int, ...] | None:
    if number_of_cores == 0:
        return () if _is_power_of_two(n) else None
    for core in _divisors(n):
        if core >= smallest and _is_core(core):
            rest = _find_cores(n // core, number_of_cores - 1, core)
            if rest is not None:
                return (core, *rest)
    return None


def _divisors(n: int) -> list[int]:
    low = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def _is_core(n: int) -> bool:
    return not _is_power_of_two(n) and (_is_paley_one(n) or _is_paley_two(n))


def _is_paley_one(n: int) -> bool:
    return n % 4 == 0 and _prime_power(n - 1) is not None


def _is_paley_two(n: int) -> bool:
    return n % 4 == 0 and (n // 2 - 1) % 4 == 1 and _prime_power(n // 2 - 1) is not None


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return `(p, k)` with `p ** k == q` and `p` prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, isqrt(q) + 1) if q % d == 0), q)
    for k in count(1):
        if p**k >= q:
            return (p, k) if p**k == q else None
    raise AssertionError("unreachable: powers grow without bound")


@lru_cache(maxsize=64)
def _core_matrix(order: int) -> Tensor:
    """Build H_2 or a Paley matrix. Tensor [order, order], int8; shared, so never written to."""
    sylvester = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    if order == 2:
        return sylvester
    if _is_paley_one(order):
        return torch.eye(order, dtype=torch.int8) + _bordered_jacobsthal(order - 1)
    conference = _bordered_jacobsthal(order // 2 - 1)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    identity = torch.eye(order // 2, dtype=torch.int8)
    return torch.kron(conference, sylvester) + torch.kron(identity, diagonal)


def _bordered_jacobsthal(q: int) -> Tensor:
    """Build S of the module docstring. Tensor [q + 1, q + 1], int8."""
    field = _prime_power(q)
    if field is None:
        raise AssertionError(f"{q} is no prime power")  # the callers have checked
    p, k = field
    character = _quadratic_character(p, k)
    digits = torch.arange(q).unsqueeze(1) // p ** torch.arange(k) % p  # [q, k]
    difference = torch.zeros(q, q, dtype=torch.int64)
    for place in range(k):
        column = digits[:, place]
        difference += (column.unsqueeze(1) - column) % p * p**place
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    bordered[0, 1:] = 1
    bordered[1:, 0] = 1 if q % 4 == 1 else -1
    bordered[1:, 1:] = character[difference]
    return bordered


def _quadratic_character(p: int, k: int) -> Tensor:
    """Tabulate chi on GF(p^k).

    An element is a polynomial of degree below k over Z_p, kept as the number whose base-p digits
    are its coefficients. Modulo a monic polynomial of degree k, multiply by x until the powers of x
    return to 1. If that takes q - 1 steps, every non-zero element is a power of x: the ring is a
    field, x generates it, and squares are the even powers. Such a (primitive) polynomial exists for
    every q.

    Returns:
        Tensor [p^k], int8, entries -1, 0, 1.
    """
    q = p**k
    for low_coefficients in product(range(p), repeat=k):
        powers = _cycle_of_x(low_coefficients, p)
        if len(powers) == q - 1:
            character = torch.zeros(q, dtype=torch.int8)
            character[torch.tensor(powers[0::2])] = 1
            character[torch.tensor(powers[1::2])] = -1
            return character
    raise AssertionError(f"no primitive polynomial over GF({p}) of degree {k}")


def _cycle_of_x(low_coefficients: tuple[int, ...], p: int) -> list[int]:
    """List 1, x, x^2, ... modulo x^k + sum(c_i x^i) until a power is 1 again; empty if none is."""
    k = len(low_coefficients)
    one = (1, *(0,) * (k - 1))
    element, powers = one, []
    for _ in range(p**k - 1):
        powers.append(sum(digit * p**place for place, digit in enumerate(element)))
        shifted, top = (0, *element[:-1]), element[-1]
        element = tuple(
            (digit - top * c) % p for digit, c in zip(shifted, low_coefficients, strict=True)
        )
        if element == one:
            return powers
    return []
