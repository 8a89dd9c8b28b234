"""One rotation matrix: a Kronecker product of two small ones, after a change of signs.

R = diag(signs) (left (x) right) acts on row vectors. With x * signs read as a matrix X [l, r]::

    x R = flatten(left^T X right)

which costs l + r multiply-adds per element in place of n = l r. All rotations here have this form:

- random Hadamard: R = diag(signs) H / sqrt(n), H = H_l (x) H_r (`rolora.hadamard`);
- random Hadamard with signs per factor: diag(s_l) H_l / sqrt(l) (x) diag(s_r) H_r / sqrt(r). The
  signs are then part of the two matrices and cost nothing at run time;
- dense orthogonal: left is [[1]].
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from rolora.hadamard import hadamard_factors, hadamard_matrix


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix R = diag(signs) (left (x) right)."""

    left: Tensor
    """[l, l], float64, orthogonal; of order 1 it is [[1]], and `right` is all of it."""
    right: Tensor
    """[r, r], float64, orthogonal."""
    signs: Tensor | None = None
    """[l * r], int8, entries +-1; None means all ones."""

    @property
    def size(self) -> int:
        """Length n = l * r of the vectors it rotates."""
        return self.left.shape[0] * self.right.shape[0]

    def rotate(self, x: Tensor) -> Tensor:
        """Return x R, with every group of n entries of the last dimension rotated alike.

        Args:
            x: Floating tensor [..., m * n]; the result has its dtype and device.

        Raises:
            ValueError: The last dimension is no multiple of n.

        Equivalent to:
            `(x.reshape(..., m, n) @ self.dense()).reshape(x.shape)`
        """
        groups = self._signed(self._split(x))
        left, right = self.left.to(x), self.right.to(x)
        return (left.T @ (groups @ right)).reshape(x.shape)

    def unrotate(self, x: Tensor) -> Tensor:
        """Return x R^T, which undoes `rotate`; arguments and errors are the same."""
        left, right = self.left.to(x), self.right.to(x)
        return self._signed(left @ (self._split(x) @ right.T)).reshape(x.shape)

    def dense(self) -> Tensor:
        """Return R itself, [n, n], float64."""
        return self.rotate(torch.eye(self.size, dtype=torch.float64, device=self.left.device))

    def _split(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.size:
            raise ValueError(
                f"rotation of size {self.size}: expected a last dimension that is a multiple of "
                f"it, got a tensor of shape {tuple(x.shape)}"
            )
        return x.reshape(*x.shape[:-1], -1, self.left.shape[0], self.right.shape[0])

    def _signed(self, groups: Tensor) -> Tensor:
        if self.signs is None:
            return groups
        return groups * self.signs.to(groups).reshape(groups.shape[-2:])


def hadamard_rotation(signs: Tensor) -> Rotation:
    """Build diag(signs) H / sqrt(n) from signs [n], int8.

    Raises:
        ValueError: No Hadamard construction reaches n.
    """
    left, right = hadamard_factors(signs.shape[0])
    return Rotation(_normalized_hadamard(left), _normalized_hadamard(right), signs)


def factored_hadamard_rotation(left_signs: Tensor, right_signs: Tensor) -> Rotation:
    """Build diag(s_l) H_l / sqrt(l) (x) diag(s_r) H_r / sqrt(r) from signs [l] and [r], int8.

    Raises:
        ValueError: No Hadamard construction reaches l or r.
    """
    left, right = (
        signs.unsqueeze(1) * _normalized_hadamard(signs.shape[0])
        for signs in (left_signs, right_signs)
    )
    return factored_rotation(left, right)


def factored_rotation(left: Tensor, right: Tensor) -> Rotation:
    """Build left (x) right from orthogonal matrices [l, l] and [r, r], float64."""
    return dense_rotation(left * right) if left.shape[0] == 1 else Rotation(left, right)


def dense_rotation(matrix: Tensor) -> Rotation:
    """Wrap an orthogonal matrix [n, n], float64."""
    return Rotation(torch.ones(1, 1, dtype=torch.float64), matrix)


def probe_hadamard(rotation: Rotation) -> Tensor:
    """Return (0, 1, ..., n - 1) H for the Hadamard matrix under a rotation, float64 [n], exact.

    It tells which matrix of that order it is, and does not depend on where it is split.
    """
    left, right = (hadamard_matrix(factor.shape[0]) for factor in (rotation.left, rotation.right))
    return Rotation(left, right).rotate(torch.arange(rotation.size, dtype=torch.float64))


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """Draw n fair signs, int8 [n]."""
    return torch.randint(0, 2, (n,), generator=generator).mul(2).sub(1).to(torch.int8)


def balanced_factors(n: int) -> tuple[int, int]:
    """Split n into the factors with the smallest sum, smaller one first; (1, n) if prime."""
    left = next(d for d in range(isqrt(n), 0, -1) if n % d == 0)
    return left, n // left


def check_signs(name: str, signs: Tensor) -> None:
    """Refuse what is no int8 tensor of +-1.

    Raises:
        ValueError: With the name, what was expected and what was found.
    """
    if signs.dtype != torch.int8 or signs.numel() == 0:
        raise ValueError(f"{name}: expected signs in int8, got {_describe(signs)}")
    if not bool(((signs == 1) | (signs == -1)).all()):
        raise ValueError(f"{name}: expected signs of +1 and -1, got other values")


def check_orthogonal(name: str, matrices: Tensor) -> None:
    """Refuse what is not a float64 matrix, or stack of matrices, with M M^T = I.

    The bound is 32 n eps: a Householder QR gives orthogonality to a small multiple of n eps.

    Raises:
        ValueError: With the name, what was expected and what was found.
    """
    shape = matrices.shape
    if matrices.dtype != torch.float64 or len(shape) < 2 or shape[-1] != shape[-2] or 0 in shape:
        raise ValueError(f"{name}: expected square float64 matrices, got {_describe(matrices)}")
    n = shape[-1]
    bound = 32 * n * torch.finfo(torch.float64).eps
    identity = torch.eye(n, dtype=torch.float64)
    error = float((matrices @ matrices.mT - identity).abs().max())
    if not error <= bound:  # written so that NaN is refused
        raise ValueError(
            f"{name}: expected an orthogonal matrix to within {bound:.1e}, got an error of "
            f"{error:.1e}"
        )


def _normalized_hadamard(order: int) -> Tensor:
    return hadamard_matrix(order).div(order**0.5)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
