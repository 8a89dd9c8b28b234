"""Rotations of a decoder as data: which matrices, and on which side of which module each half acts.

Activations are row vectors, so a rotation is y = x R with R R^T = I. A rotation changes nothing when
each R that a module puts on its output is undone at the input of every module that reads it::

    R1  residual stream   embedding, o, down put it on; q, k, v, gate, up, head undo it
    R2  one per layer     v puts it on every head of its output; o undoes it on every head of its input
    R4  MLP activation    put on at run time in front of down; down undoes it in its weight

R2 passes through attention because attention only averages the value vectors of one head over
positions, and query heads that share a key-value head share its R2. (R3 is for a quantized KV cache.)
`applications` lists both halves of all of them in one table; fusing, adapters and the export read it.

A rotation of size n is a Kronecker product of two matrices, after a change of signs::

    R = diag(signs) (left (x) right)        x R = left^T reshape(x * signs, [l, r]) right

- kind `hadamard`: R = diag(signs) H / sqrt(n). For R4, which costs time at every token, the signs are
  drawn per factor, diag(s_l) H_l (x) diag(s_r) H_r, and so are part of the two matrices.
- kind `orthogonal`: Haar random, for sizes without a Hadamard matrix. R1 and R2 are dense (left is
  [[1]]); R4 has two factors, the most balanced ones of its size (dense if the size is prime).

Sources: QuaRot (arXiv:2404.00456), SpinQuant (2405.16406) for R2 offline, RoLoRA (2407.08044).
Departure: RoLoRA's release redraws its rotation at merge time and lands in another basis. Here what was
drawn is saved with a digest, and what does not match its digest is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from rolora.decoder import DecoderNames
from rolora.hadamard import (
    hadamard_construction,
    hadamard_factors,
    hadamard_matrix,
    random_orthogonal,
)


class RotationKind(StrEnum):
    """How the matrices of a plan are drawn."""

    HADAMARD = "hadamard"
    ORTHOGONAL = "orthogonal"


class RotationName(StrEnum):
    """Which activation is rotated."""

    R1 = "R1"
    R2 = "R2"
    R4 = "R4"


class Side(StrEnum):
    """Side of a module on which a rotation acts."""

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True)
class Application:
    """One half of one rotation: where it acts, and in which direction."""

    fqn: str
    """Dotted name of the module."""
    side: Side
    rotation: RotationName
    layer: int | None
    """Index of the block; None for the embedding and the head."""
    inverse: bool
    """True where the module undoes the rotation of what it reads."""
    online: bool
    """True for a rotation at run time in front of the module, False for one fused into its weight."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix R = diag(signs) (left (x) right) that acts on row vectors."""

    left: Tensor
    """[l, l], float64, orthogonal."""
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
                f"rotation of size {self.size}: expected a last dimension that is a multiple of it, "
                f"got a tensor of shape {tuple(x.shape)}"
            )
        return x.reshape(*x.shape[:-1], -1, self.left.shape[0], self.right.shape[0])

    def _signed(self, groups: Tensor) -> Tensor:
        if self.signs is None:
            return groups
        return groups * self.signs.to(groups).reshape(groups.shape[-2:])


@dataclass(frozen=True, eq=False)
class RotationPlan:
    """The rotations of one model; one that is not used is None."""

    kind: RotationKind
    seed: int
    """Seed of the draw, for the record; what was drawn is what counts."""
    content: Mapping[str, Tensor]
    """What was drawn and is saved: signs (int8) or matrices (float64), see `to_tensors`."""
    r1: Rotation | None
    """Size hidden_size."""
    r2: tuple[Rotation, ...] | None
    """One per block, each of size head_dim."""
    r4: Rotation | None
    """Size intermediate_size, shared by all blocks, online; without signs: two matrices are all of it."""

    @classmethod
    def draw(
        cls,
        names: DecoderNames,
        rotations: Iterable[RotationName],
        kind: RotationKind,
        seed: int,
    ) -> RotationPlan:
        """Draw the chosen rotations for a model.

        Every rotation has its own generator, seeded by `seed`, its name and its layer: R1 of a seed is
        the same with and without R4, and the global random state is neither read nor advanced.

        Args:
            names: Sizes of the decoder.
            rotations: Which to draw; none is a plan that changes nothing.
            kind: Hadamard with random signs, or Haar random.
            seed: Any integer.

        Raises:
            ValueError: Kind `hadamard` and a size that no construction reaches; the message names the
                rotation, the size and the way out.
        """
        sizes = {
            RotationName.R1: ("hidden_size", names.hidden_size),
            RotationName.R2: ("head_dim", names.head_dim),
            RotationName.R4: ("intermediate_size", names.intermediate_size),
        }
        content: dict[str, Tensor] = {}
        for name in sorted(set(rotations)):
            label, size = sizes[name]
            number = len(names.blocks) if name is RotationName.R2 else 1
            try:
                drawn = [_draw(kind, name, size, seed, layer) for layer in range(number)]
            except ValueError as error:
                raise ValueError(f"{name} over {label} = {size}: {error}") from error
            for entry in drawn[0]:
                stacked = torch.stack([tensors[entry] for tensors in drawn])
                content[f"{name}.{entry}"] = stacked if name is RotationName.R2 else stacked[0]
        return cls._build(kind, seed, content)

    @classmethod
    def from_saved(cls, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RotationPlan:
        """Rebuild a plan from what `to_metadata` and `to_tensors` returned.

        Raises:
            ValueError: A field or tensor is missing, unknown, of a wrong type or shape; a matrix is not
                orthogonal; or the content is not the one whose digest was saved.
        """
        kinds = [str(kind) for kind in RotationKind]
        if metadata.get("kind") not in kinds:
            got = metadata.get("kind")
            raise ValueError(f"rotation metadata: expected a kind of {kinds}, got {got!r}")
        kind, seed = RotationKind(metadata["kind"]), metadata.get("seed")
        if not isinstance(seed, int):
            raise ValueError(f"rotation metadata: expected an integer seed, got {seed!r}")
        for name, tensor in tensors.items():
            _check_content(name, tensor)
        plan = cls._build(kind, seed, dict(tensors))
        if metadata.get("digest") != plan.digest:
            raise ValueError(
                f"rotation: expected content with the digest {metadata.get('digest')}, got "
                f"{plan.digest}; it is damaged, of another artifact, or of a rolora version with "
                f"other Hadamard matrices: take it from the artifact that it was saved with"
            )
        return plan

    @classmethod
    def _build(cls, kind: RotationKind, seed: int, content: dict[str, Tensor]) -> RotationPlan:
        """Make the rotations of saved or drawn content; both go through here and cannot differ."""
        entries: dict[RotationName, dict[str, Tensor]] = {}
        for name in RotationName:
            keys = [f"{name}.{entry}" for entry in _entries(kind, name)]
            if any(key in content for key in keys):
                if missing := [key for key in keys if key not in content]:
                    raise ValueError(f"rotation: expected tensors {keys}, {missing} missing")
                entries[name] = {key.split(".")[1]: content[key] for key in keys}
        known = {f"{name}.{entry}" for name, tensors in entries.items() for entry in tensors}
        if unknown := sorted(content.keys() - known):
            raise ValueError(f"rotation of kind {kind}: got unknown tensors {unknown}")
        r2: tuple[Rotation, ...] | None = None
        if (per_layer := entries.pop(RotationName.R2, None)) is not None:
            (entry, stacked), *_ = per_layer.items()
            r2 = tuple(_build_rotation({entry: one}) for one in stacked)
        shared = {name: _build_rotation(tensors) for name, tensors in entries.items()}
        r1, r4 = shared.get(RotationName.R1), shared.get(RotationName.R4)
        return cls(kind, seed, content, r1, r2, r4)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what must be saved, under stable names.

        Kind `hadamard` (int8, +-1): `R1.signs` [hidden], `R2.signs` [layers, head_dim], `R4.left_signs`
        [l], `R4.right_signs` [r]. Kind `orthogonal` (float64): `R1.matrix` [hidden, hidden],
        `R2.matrix` [layers, head_dim, head_dim], `R4.left` [l, l], `R4.right` [r, r].
        """
        return dict(self.content)

    def to_metadata(self) -> dict[str, Any]:
        """Return a JSON-ready description: kind, seed, digest, and size and construction of each."""
        rotations: dict[str, dict[str, Any]] = {}
        for name, members in self._members():
            size = members[0].size
            left, right = members[0].left.shape[0], members[0].right.shape[0]
            rotations[name] = {"size": size, "factors": [left, right], "count": len(members)}
            if self.kind is RotationKind.HADAMARD:
                rotations[name]["construction"] = hadamard_construction(size)
        return {
            "kind": str(self.kind),
            "seed": self.seed,
            "digest": self.digest,
            "rotations": rotations,
        }

    @property
    def digest(self) -> str:
        """Sha256 over the content, hexadecimal; two plans with the same digest rotate alike.

        It covers what was drawn and the Hadamard matrices themselves, so a plan saved by a version
        with another construction is refused rather than fused into another basis.
        """
        sha = hashlib.sha256(f"rolora rotation 1 {self.kind}".encode())
        for name, tensor in sorted(self.content.items()):
            _update_digest(sha, name, tensor)
        if self.kind is RotationKind.HADAMARD:
            for name, members in self._members():
                _update_digest(sha, f"{name} probe", _probe_hadamard(members[0]))
        return sha.hexdigest()

    @property
    def names(self) -> frozenset[RotationName]:
        """Which rotations the plan has."""
        return frozenset(name for name, _ in self._members())

    def find(self, name: RotationName, layer: int | None) -> Rotation:
        """Return the rotation that acts in block `layer` (R1 and R4 are the same in all).

        Raises:
            ValueError: The plan has none.
        """
        members = dict(self._members()).get(name)
        if members is None:
            raise ValueError(
                f"rotation plan: expected {name}, got a plan with {sorted(self.names)}"
            )
        if len(members) == 1:
            return members[0]
        if layer is None or not 0 <= layer < len(members):
            raise ValueError(f"{name}: expected a layer below {len(members)}, got {layer}")
        return members[layer]

    def _members(self) -> Iterator[tuple[RotationName, tuple[Rotation, ...]]]:
        if self.r1 is not None:
            yield RotationName.R1, (self.r1,)
        if self.r2 is not None:
            yield RotationName.R2, self.r2
        if self.r4 is not None:
            yield RotationName.R4, (self.r4,)


def applications(plan: RotationPlan, names: DecoderNames) -> list[Application]:
    """List where the rotations of a plan act: both halves of each, in the order data meets them.

    Raises:
        ValueError: The plan was drawn for a decoder of other sizes.
    """
    _check_sizes(plan, names)
    r1, r2, r4 = RotationName
    table = [Application(names.embedding, Side.OUTPUT, r1, None, inverse=False, online=False)]
    for layer, block in enumerate(names.blocks):

        def puts_on(fqn: str, rotation: RotationName, layer: int = layer) -> Application:
            return Application(fqn, Side.OUTPUT, rotation, layer, inverse=False, online=False)

        def undoes(fqn: str, rotation: RotationName, layer: int = layer) -> Application:
            return Application(fqn, Side.INPUT, rotation, layer, inverse=True, online=False)

        table += [
            undoes(block.query, r1),
            undoes(block.key, r1),
            undoes(block.value, r1),
            puts_on(block.value, r2),
            undoes(block.output, r2),
            puts_on(block.output, r1),
            undoes(block.gate, r1),
            undoes(block.up, r1),
            Application(block.down, Side.INPUT, r4, layer, inverse=False, online=True),
            undoes(block.down, r4),
            puts_on(block.down, r1),
        ]
    table.append(Application(names.head, Side.INPUT, r1, None, inverse=True, online=False))
    return [application for application in table if application.rotation in plan.names]


def _check_sizes(plan: RotationPlan, names: DecoderNames) -> None:
    expected = {
        "R1 (hidden_size)": (plan.r1 and plan.r1.size, names.hidden_size),
        "R2 (head_dim)": (plan.r2 and plan.r2[0].size, names.head_dim),
        "R2 (number of layers)": (plan.r2 and len(plan.r2), len(names.blocks)),
        "R4 (intermediate_size)": (plan.r4 and plan.r4.size, names.intermediate_size),
    }
    for label, (got, wanted) in expected.items():
        if got is not None and got != wanted:
            raise ValueError(
                f"{label}: expected {wanted} as in the model, got a rotation plan with {got}; "
                f"it was drawn for another model"
            )


def _entries(kind: RotationKind, name: RotationName) -> tuple[str, ...]:
    """Name the saved tensors of one rotation. R4 is kept per factor."""
    if kind is RotationKind.HADAMARD:
        return ("left_signs", "right_signs") if name is RotationName.R4 else ("signs",)
    return ("left", "right") if name is RotationName.R4 else ("matrix",)


def _draw(
    kind: RotationKind, name: RotationName, size: int, seed: int, layer: int
) -> dict[str, Tensor]:
    key = hashlib.sha256(f"{seed} {name} {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7]))
    hadamard = kind is RotationKind.HADAMARD
    left, right = hadamard_factors(size) if hadamard else _balanced_factors(size)
    orders = (left, right) if name is RotationName.R4 else (size,)
    draw_one = _random_signs if hadamard else random_orthogonal
    return {
        entry: draw_one(order, generator)
        for entry, order in zip(_entries(kind, name), orders, strict=True)
    }


def _random_signs(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (n,), generator=generator).mul(2).sub(1).to(torch.int8)


def _balanced_factors(n: int) -> tuple[int, int]:
    left = next(d for d in range(isqrt(n), 0, -1) if n % d == 0)
    return left, n // left


def _build_rotation(tensors: Mapping[str, Tensor]) -> Rotation:
    match tensors:
        case {"signs": signs}:
            left, right = hadamard_factors(signs.shape[0])
            return Rotation(_normalized(left), _normalized(right), signs)
        case {"left_signs": left_signs, "right_signs": right_signs}:
            left_half, right_half = (
                signs.unsqueeze(1) * _normalized(signs.shape[0])
                for signs in (left_signs, right_signs)
            )
            return Rotation(left_half, right_half)
        case {"matrix": matrix}:
            return Rotation(torch.ones(1, 1, dtype=torch.float64), matrix)
        case _:
            return Rotation(tensors["left"], tensors["right"])


def _normalized(order: int) -> Tensor:
    return hadamard_matrix(order) / order**0.5


def _check_content(name: str, tensor: Tensor) -> None:
    """Refuse signs that are no signs and matrices that are not orthogonal."""
    per_layer = name.startswith(RotationName.R2)
    if name.endswith("signs"):
        kind, dtype, dims = "signs of +-1", torch.int8, 1 + per_layer
    else:
        kind, dtype, dims = "orthogonal matrix", torch.float64, 2 + per_layer
    got = f"{tensor.dtype} {tuple(tensor.shape)}"
    if tensor.dtype != dtype or tensor.dim() != dims or tensor.numel() == 0:
        raise ValueError(f"{name}: expected {kind}, {dtype} of {dims} dimensions, got {got}")
    if dtype == torch.int8:
        if not bool((tensor.abs() == 1).all()):
            raise ValueError(f"{name}: expected {kind}, got other values")
        return
    n = tensor.shape[-1]
    if tensor.shape[-2] != n:
        raise ValueError(f"{name}: expected a square {kind}, got {got}")
    # A Householder QR in float64 is orthogonal to a small multiple of n eps.
    bound = 32 * n * torch.finfo(torch.float64).eps
    error = (tensor @ tensor.mT - torch.eye(n, dtype=torch.float64)).abs().max().item()
    if not error <= bound:  # also when error is NaN
        raise ValueError(f"{name}: expected an {kind} to {bound:.1e}, got an error of {error:.1e}")


def _probe_hadamard(rotation: Rotation) -> Tensor:
    """Return (0, 1, ..., n - 1) H, exact in float64: tells H apart, however it is split."""
    left, right = (hadamard_matrix(m.shape[0]) for m in (rotation.left, rotation.right))
    return Rotation(left, right).rotate(torch.arange(rotation.size, dtype=torch.float64))


def _update_digest(sha: hashlib._Hash, name: str, tensor: Tensor) -> None:
    sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    sha.update(tensor.cpu().contiguous().numpy().tobytes())
