"""Rotations of a decoder as data: which matrices there are, drawn, saved and found again.

    R1  residual stream                         R2  values, a head at a time, one for each layer
    R3  queries and keys, a head at a time      R4  MLP activation

Where each half of them acts is `rolora.rotation_table`.

R1 asks that nothing but a linear writes the residual stream. Where a norm does (Gemma), its gains
stand between the linear and the stream, and no rotation in front passes them. There the stream
stays as it is, and R1 is put on at run time in front of the linears that read it, like R4::

    R1  normed stream    put on in front of q, k, v, gate, up, head, which undo it in their weights

The same is done where an equalization (`rolora.equalization`) has scales behind the norms: they
differ from norm to norm, and an R1 in the stream could not follow them.

R2 passes through attention because attention only averages the value vectors of one head over
positions; query heads that share a key-value head share its R2. R3 is the same for every head and
layer; it helps only a quantized KV cache, so it is not among `DEFAULT_ROTATIONS`.

- Kind `hadamard`: R = diag(signs) H / sqrt(n). For R4, which costs time at every token, the signs
  are drawn per factor of H, so that two small matrices are all of it.
- Kind `orthogonal`: Haar random, for sizes without a Hadamard matrix. R1 and R2 are dense; R4 is a
  Kronecker product of two, from the most balanced factors of its size (dense if it is prime).
- Kind `learned`: R1 and R2 are matrices, R4 is signs as for `hadamard`. Drawing it gives the random
  Hadamard matrices where learning (`rolora.learned`) starts; `with_matrices` puts in where it ends.

What acts at run time may act on blocks of channels (`in_blocks`): each block of 64 is multiplied by
one small matrix, which is faster and mixes less than the whole width through two.

Sources: QuaRot (arXiv:2404.00456), SpinQuant (2405.16406) for R2 offline, RoLoRA (2407.08044).
Departure: RoLoRA's release redraws its rotation at merge time and lands in another basis. Here what
was drawn is saved with a digest, and what does not match its digest is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from rolora.decoder import DecoderNames
from rolora.equalization import KEYS, Equalization, Equalized
from rolora.hadamard import hadamard_construction, hadamard_factors, random_orthogonal
from rolora.kronecker import (
    Rotation,
    balanced_factors,
    check_orthogonal,
    check_signs,
    dense_rotation,
    factored_hadamard_rotation,
    factored_rotation,
    hadamard_rotation,
    probe_hadamard,
    random_signs,
)


class RotationKind(StrEnum):
    """How the matrices of a plan are drawn."""

    HADAMARD = "hadamard"
    ORTHOGONAL = "orthogonal"
    LEARNED = "learned"


DRAWN_KINDS = (RotationKind.HADAMARD, RotationKind.ORTHOGONAL)
"""Kinds that are complete when drawn."""


class RotationName(StrEnum):
    """Which activation is rotated."""

    R1 = "R1"
    R2 = "R2"
    R3 = "R3"
    R4 = "R4"


LARGEST_BLOCK = 256
"""Most channels of a block; more take longer than the whole width through two factors."""

DEFAULT_ROTATIONS = frozenset({RotationName.R1, RotationName.R2, RotationName.R4})
"""What a model is rotated by whose KV cache is not quantized."""


@dataclass(frozen=True, eq=False)
class RotationPlan:
    """The rotations of one model; one that is not used is None."""

    kind: RotationKind
    seed: int
    """Seed of the draw, for the record; what was drawn is what counts."""
    content: Mapping[str, Tensor]
    """What was drawn: signs or matrices, under the names of `to_tensors`. The rest follows."""
    r1: Rotation | None
    """Size hidden_size, or of a block of it."""
    r2: tuple[Rotation, ...] | None
    """One per block, each of size head_dim."""
    r3: Rotation | None
    """Size head_dim, shared by all heads and blocks."""
    r4: Rotation | None
    """Size intermediate_size, or of a block of channels; shared by all blocks of the decoder;
    `left` and `right` are all of it (no signs)."""
    equalization: Equalization | None = None
    """Scales that are put on before any rotation."""

    @classmethod
    def draw(
        cls,
        names: DecoderNames,
        rotations: Iterable[RotationName],
        kind: RotationKind,
        seed: int,
        *,
        one_r2: bool = False,
    ) -> RotationPlan:
        """Draw the chosen rotations for a model.

        Every rotation has its own generator, seeded by `seed`, its name and its layer: R1 of a seed
        is the same with and without R4. The global random state is neither read nor advanced.

        Args:
            names: Sizes of the decoder.
            rotations: Which to draw; none is a plan that changes nothing.
            kind: Hadamard with random signs, Haar random, or the former as a start for learning.
            seed: Any integer.
            one_r2: Give every layer the R2 of the first.

        Raises:
            ValueError: Kind `hadamard` or `learned` and a size that no construction reaches; the
                message names the rotation, the size and the way out.
        """
        sizes = rotated_widths(names)
        content: dict[str, Tensor] = {}
        for name in sorted(set(rotations)):
            label, size = sizes[name]
            number = len(names.blocks) if name is RotationName.R2 else 1
            try:
                layers = [0] * number if one_r2 else range(number)
                orders = _orders(kind, name, size)
                drawn = [_draw(kind, name, orders, seed, layer) for layer in layers]
            except ValueError as error:
                raise ValueError(f"{name} over {label} = {size}: {error}") from error
            for entry in drawn[0]:
                stacked = torch.stack([tensors[entry] for tensors in drawn])
                content[f"{name}.{entry}"] = stacked if name is RotationName.R2 else stacked[0]
        return cls._build(kind, seed, content)

    def with_matrices(self, r1: Tensor, r2: Tensor) -> RotationPlan:
        """Return a plan of kind `learned` with other R1 and R2.

        Args:
            r1: float64 [hidden, hidden], orthogonal.
            r2: float64 [layers, head_dim, head_dim], orthogonal.

        Raises:
            ValueError: This plan is of another kind, or a matrix is of another shape or not
                orthogonal.
        """
        if self.kind is not RotationKind.LEARNED:
            raise ValueError(f"rotation plan: expected one of kind learned, got {self.kind}")
        content = dict(self.content)
        for key, new in (("R1.matrix", r1), ("R2.matrix", r2)):
            if key not in content or content[key].shape != new.shape:
                expected = tuple(content[key].shape) if key in content else "none"
                raise ValueError(f"{key}: expected shape {expected}, got {tuple(new.shape)}")
            content[key] = new
        return self._build(self.kind, self.seed, content)

    def with_equalization(self, equalization: Equalization) -> RotationPlan:
        """Return a plan with scales in front of its rotations.

        Its R1 acts at run time where the norms have scales.

        Raises:
            ValueError: This plan has scales, or its R1 was learned for the stream.
        """
        if self.equalization is not None:
            raise ValueError("rotation plan: expected none with an equalization, got one")
        if self.kind is RotationKind.LEARNED:
            raise ValueError(
                "rotation plan: expected one that is drawn, got a learned one; it was learned for "
                "channels without scales"
            )
        content = {**self.content, **equalization.to_tensors()}
        return self._build(self.kind, self.seed, content)

    def rotates_stream(self, names: DecoderNames) -> bool:
        """Return whether R1 is in the residual stream, not at run time behind each norm."""
        scaled = self.equalization is not None and self.equalization.inputs is Equalized.ALL
        return names.post_norm is None and not scaled

    def with_r3(self, names: DecoderNames) -> RotationPlan:
        """Return the plan with an R3 of its kind and seed; a plan that has one is returned as is.

        The model's basis is not changed: R3 is undone where it acts.

        Raises:
            ValueError: As `draw`.
        """
        if self.r3 is not None:
            return self
        drawn = RotationPlan.draw(names, [RotationName.R3], self.kind, self.seed)
        return RotationPlan._build(self.kind, self.seed, {**self.content, **drawn.content})

    def in_blocks(self, names: DecoderNames, size: int) -> RotationPlan:
        """Return a plan of its kind and seed whose rotations at run time act on blocks of channels.

        These are R4, and R1 where it is not in the residual stream; the others stay as they are.

        Args:
            names: Parts of the decoder.
            size: Channels of a block, at most `LARGEST_BLOCK`.

        Raises:
            ValueError: The size is out of range, divides a width not, or has no Hadamard matrix; or
                this plan is a learned one.
        """
        at_run_time = {RotationName.R4}
        if not self.rotates_stream(names):
            at_run_time.add(RotationName.R1)
        content = dict(self.content)
        for name in sorted(at_run_time & self.names):
            self.require_blocks(name, names, size)
            drawn = _draw(self.kind, name, (1, size), self.seed, 0)
            content = {key: old for key, old in content.items() if not key.startswith(f"{name}.")}
            content |= {f"{name}.{entry}": tensor for entry, tensor in drawn.items()}
        return self._build(self.kind, self.seed, content)

    def require_blocks(self, name: RotationName, names: DecoderNames, size: int) -> None:
        """Refuse blocks of channels that a rotation of this kind cannot act on.

        Raises:
            ValueError: As `in_blocks`.
        """
        if self.kind is RotationKind.LEARNED:
            raise ValueError("rotation plan: expected one that is drawn, got a learned one")
        _, width = rotated_widths(names)[name]
        if not 2 <= size <= LARGEST_BLOCK or width % size:
            raise ValueError(
                f"{name} in blocks: expected a size from 2 to {LARGEST_BLOCK} that divides the "
                f"{width} channels, got {size}"
            )
        if self.kind is RotationKind.HADAMARD:
            hadamard_factors(size)

    @classmethod
    def from_saved(cls, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RotationPlan:
        """Rebuild a plan from what `to_metadata` and `to_tensors` returned.

        Raises:
            ValueError: A field or tensor is missing, unknown, or of a wrong type or shape; a matrix
                is not orthogonal; or the content is not that whose digest was saved.
        """
        kinds, kind = [str(kind) for kind in RotationKind], metadata.get("kind")
        if kind not in kinds:
            raise ValueError(f"rotation metadata, kind: expected one of {kinds}, got {kind!r}")
        seed = metadata.get("seed")
        if not isinstance(seed, int):
            raise ValueError(f"rotation metadata, seed: expected an integer, got {seed!r}")
        plan = cls._build(RotationKind(kind), seed, dict(tensors))
        if metadata.get("digest") != plan.digest:
            raise ValueError(
                f"rotation: expected content with the digest {metadata.get('digest')}, got "
                f"{plan.digest}; it is damaged, of another artifact, or of a version with other "
                f"Hadamard matrices: use the artifact that it was saved with"
            )
        return plan

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what must be saved.

        Kind `hadamard` (int8, +-1): `R1.signs` [hidden], `R2.signs` [layers, head_dim],
        `R3.signs` [head_dim], `R4.left_signs` [l], `R4.right_signs` [r]. Kind `orthogonal`
        (float64): `R1.matrix` [hidden, hidden], `R2.matrix` [layers, head_dim, head_dim],
        `R3.matrix` [head_dim, head_dim], `R4.left` [l, l], `R4.right` [r, r]. An R1 on blocks has
        two factors as R4 has, the left of order 1. Kind `learned`: R1
        and R2 as in `orthogonal`, R3 and R4 as in `hadamard`. An equalization adds
        `equalization.<name>`, float64, of the shapes that `Equalization` says.
        """
        return dict(self.content)

    def to_metadata(self) -> dict[str, Any]:
        """Return a JSON-ready description: kind, seed, digest, shapes, which inputs have scales."""
        rotations: dict[str, dict[str, Any]] = {}
        for name, members in self._members():
            left, right = members[0].left.shape[0], members[0].right.shape[0]
            entry = {"size": members[0].size, "factors": [left, right], "count": len(members)}
            if _are_signs(self.kind, name):
                entry["construction"] = hadamard_construction(members[0].size)
            rotations[str(name)] = entry
        return {
            "kind": str(self.kind),
            "seed": self.seed,
            "digest": self.digest,
            "rotations": rotations,
        } | ({} if self.equalization is None else {"equalized": str(self.equalization.inputs)})

    def fits(self, name: RotationName, channels: int) -> bool:
        """Return whether a rotation is for so many channels; one on blocks fits multiples."""
        rotation = self.find(name, 0)
        on_blocks = _in_factors(name, self.content) and rotation.left.shape[0] == 1
        return rotation.size == channels or (on_blocks and channels % rotation.size == 0)

    @property
    def digest(self) -> str:
        """Sha256 over the content, hexadecimal; two plans with the same digest rotate alike.

        It covers what was drawn and, by a probe, the Hadamard matrices: a plan saved by a version
        with another construction is refused rather than fused into another basis.
        """
        sha = hashlib.sha256(f"rolora rotation 1 {self.kind}".encode())
        for name, tensor in sorted(self.content.items()):
            _update_digest(sha, name, tensor)
        for rotation_name, members in self._members():
            if _are_signs(self.kind, rotation_name):
                _update_digest(sha, f"{rotation_name} probe", probe_hadamard(members[0]))
        return sha.hexdigest()

    @property
    def names(self) -> frozenset[RotationName]:
        """Which rotations the plan has."""
        return frozenset(name for name, _ in self._members())

    def find(self, name: RotationName, layer: int | None) -> Rotation:
        """Return the rotation that acts in block `layer`; all but R2 are the same in all.

        Raises:
            ValueError: The plan has none.
        """
        members = dict(self._members()).get(name)
        if members is None:
            have = sorted(str(name) for name in self.names)
            raise ValueError(f"rotation plan: expected {name} in it, got a plan with {have}")
        if name is not RotationName.R2:
            return members[0]
        if layer is None or not 0 <= layer < len(members):
            raise ValueError(f"{name}: expected a layer from 0 to {len(members) - 1}, got {layer}")
        return members[layer]

    def _members(self) -> Iterator[tuple[RotationName, tuple[Rotation, ...]]]:
        if self.r1 is not None:
            yield RotationName.R1, (self.r1,)
        if self.r2 is not None:
            yield RotationName.R2, self.r2
        if self.r3 is not None:
            yield RotationName.R3, (self.r3,)
        if self.r4 is not None:
            yield RotationName.R4, (self.r4,)

    @classmethod
    def _build(cls, kind: RotationKind, seed: int, content: dict[str, Tensor]) -> RotationPlan:
        """Check content and make its rotations; a drawn and a loaded plan both come from here."""
        expected = {
            name: [f"{name}.{entry}" for entry in _entries(kind, name, _in_factors(name, content))]
            for name in RotationName
        }
        known = {key for keys in expected.values() for key in keys} | set(KEYS)
        unknown = sorted(content.keys() - known)
        if unknown:
            raise ValueError(f"rotation of kind {kind}: got unknown tensors {unknown}")
        members: dict[RotationName, tuple[Rotation, ...]] = {}
        for name, keys in expected.items():
            if missing := [key for key in keys if key not in content]:
                if len(missing) < len(keys):
                    raise ValueError(f"rotation {name}: expected tensors {keys}, got no {missing}")
                continue
            tensors = [content[key] for key in keys]
            for key, tensor in zip(keys, tensors, strict=True):
                _check_content(kind, name, key, tensor)
            layers = tensors[0] if name is RotationName.R2 else None
            members[name] = (
                (_build_rotation(kind, name, tensors),)
                if layers is None
                else tuple(_build_rotation(kind, name, [one]) for one in layers)
            )
        r1, r3, r4 = (
            members.get(name, (None,))[0]
            for name in (RotationName.R1, RotationName.R3, RotationName.R4)
        )
        equalization = Equalization.from_tensors(content)
        return cls(kind, seed, content, r1, members.get(RotationName.R2), r3, r4, equalization)


def rotated_widths(names: DecoderNames) -> dict[RotationName, tuple[str, int]]:
    """Return how many channels each rotation is for, and how a model's configuration calls them."""
    return {
        RotationName.R1: ("hidden_size", names.hidden_size),
        RotationName.R2: ("head_dim", names.head_dim),
        RotationName.R3: ("head_dim", names.head_dim),
        RotationName.R4: ("intermediate_size", names.intermediate_size),
    }


def _are_signs(kind: RotationKind, name: RotationName) -> bool:
    """Tell whether a rotation is kept as the signs of a Hadamard matrix, or as matrices."""
    learned = kind is RotationKind.LEARNED
    fixed = name in (RotationName.R3, RotationName.R4)
    return kind is RotationKind.HADAMARD or (learned and fixed)


def _in_factors(name: RotationName, content: Mapping[str, Tensor]) -> bool:
    """Tell whether a rotation is kept as two factors: R4 is, and an R1 on blocks."""
    return name is RotationName.R4 or any(key.startswith(f"{name}.left") for key in content)


def _entries(kind: RotationKind, name: RotationName, in_factors: bool) -> tuple[str, ...]:
    """Name the tensors of one rotation."""
    if _are_signs(kind, name):
        return ("left_signs", "right_signs") if in_factors else ("signs",)
    return ("left", "right") if in_factors else ("matrix",)


def _draw(
    kind: RotationKind, name: RotationName, orders: tuple[int, ...], seed: int, layer: int
) -> dict[str, Tensor]:
    """Draw what is kept of a rotation: one tensor, or one for each of two factors."""
    key = hashlib.sha256(f"{seed} {name} {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7]))
    hadamard = kind is not RotationKind.ORTHOGONAL
    draw_one = random_signs if hadamard else random_orthogonal
    drawn = [draw_one(order, generator) for order in orders]
    if hadamard and not _are_signs(kind, name):
        drawn = [hadamard_rotation(signs).dense() for signs in drawn]
    return dict(zip(_entries(kind, name, len(orders) == 2), drawn, strict=True))


def _orders(kind: RotationKind, name: RotationName, size: int) -> tuple[int, ...]:
    """Return the sizes of what is drawn: R4 through its fastest factors, the others whole."""
    hadamard = kind is not RotationKind.ORTHOGONAL
    factors = hadamard_factors(size) if hadamard else balanced_factors(size)
    return factors if name is RotationName.R4 else (size,)


def _check_content(kind: RotationKind, name: RotationName, key: str, tensor: Tensor) -> None:
    dims = (1 if _are_signs(kind, name) else 2) + (name is RotationName.R2)
    if tensor.dim() != dims:
        raise ValueError(
            f"{key}: expected {dims} dimensions, got a tensor of shape {tuple(tensor.shape)}"
        )
    check = check_signs if _are_signs(kind, name) else check_orthogonal
    check(key, tensor)


def _build_rotation(kind: RotationKind, name: RotationName, tensors: list[Tensor]) -> Rotation:
    if _are_signs(kind, name):
        single, factored = hadamard_rotation, factored_hadamard_rotation
        return single(*tensors) if len(tensors) == 1 else factored(*tensors)
    return dense_rotation(*tensors) if len(tensors) == 1 else factored_rotation(*tensors)


def _update_digest(sha: hashlib._Hash, name: str, tensor: Tensor) -> None:
    sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    sha.update(tensor.cpu().contiguous().numpy().tobytes())
