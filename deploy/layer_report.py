"""What a comparison layer by layer found, and which layer departs first."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deploy.errors import ParityError
from deploy.graph_probes import EMBEDDING, HEAD

MOST_FLIPS = 1e-3
"""Share of integers that may fall differently for equal inputs."""
LEAST_FLIPS = 2
COLUMNS = ("layer", "phase", "part", "max abs", "relative", "bound", "integers", "")


@dataclass(frozen=True)
class PartParity:
    """One comparison."""

    layer: str
    """`embedding`, the number of a block, or `head`."""
    phase: str
    part: str
    """`embedding`, `attention`, `mlp`, `stream` after the block, or the linears of a product; of an
    encoder `mlp` is the block's output."""
    max_abs: float
    relative_error: float
    bound: float
    integers: int = 0
    """Compared ones; 0 where there are none."""
    integer_mismatches: int = 0
    """Of a linear: for equal inputs. Of attention and MLP: of its linears' inputs in both runs."""
    is_linear: bool = False

    @property
    def beyond(self) -> bool:
        """Whether it lies outside its bound; NaN does."""
        flips = max(LEAST_FLIPS, MOST_FLIPS * self.integers)
        flipped = self.is_linear and self.integer_mismatches > flips
        return flipped or not self.relative_error <= self.bound


@dataclass(frozen=True)
class LayerReport:
    """All comparisons, in the order in which data flows, prompts first."""

    parts: tuple[PartParity, ...]

    @property
    def first(self) -> PartParity | None:
        """The first part beyond its bound; None if all lie within.

        A linear that computes something else on equal inputs is sure, so it goes before streams.
        """
        found = [part for part in self.parts if part.beyond]
        exact = [part for part in found if part.is_linear]
        return min(exact or found, key=lambda part: _depth(part.layer), default=None)

    def describe_first(self) -> str:
        """Return a sentence on the first part beyond its bound."""
        part = self.first
        if part is None:
            return "no layer by itself lies beyond its bound"
        where = part.layer if not part.layer.isdigit() else f"layer {part.layer}"
        flips = ""
        if part.is_linear and part.integers:
            flips = f", {part.integer_mismatches} of {part.integers} integers differ"
        return (
            f"the first to depart is {where}, {part.part}, at {part.phase}: relative error "
            f"{part.relative_error:.3g}, bound {part.bound:.3g}{flips}"
        )

    def require_within_bounds(self) -> None:
        """Refuse a report with a part beyond its bound.

        Raises:
            ParityError: It names the first one.
        """
        if self.first is not None:
            raise ParityError(f"the export departs from torch; {self.describe_first()}")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        first = self.first
        return {
            "first": None if first is None else asdict(first),
            "parts": [asdict(part) | {"beyond": part.beyond} for part in self.parts],
        }

    def rows(self, *, every: bool = False) -> list[tuple[str, ...]]:
        """Return a row of texts for each stream and each part beyond, or each part."""
        return [
            (
                part.layer,
                part.phase,
                part.part,
                f"{part.max_abs:.2e}",
                f"{part.relative_error:.2e}",
                f"{part.bound:.2e}",
                f"{part.integer_mismatches}/{part.integers}" if part.integers else "",
                "beyond" if part.beyond else "",
            )
            for part in self.parts
            if every or part.beyond or not part.is_linear
        ]


def _depth(layer: str) -> float:
    return {EMBEDDING: -1.0, HEAD: float("inf")}.get(layer) or float(layer)
