"""Chains: the linears of equal role, one per layer, that ResLoRA's shortcuts connect.

ResLoRA (arXiv:2402.18039) links a LoRA block to the previous blocks "of the same kind". The kind is
read off the dotted module name: two linears belong to one chain when their FQNs are equal after the
layer index is taken out. The layer index is the first number in the name, so that an expert number
further right stays part of the kind and every expert gets a chain of its own.

A shortcut adds products of shape [out, in], so linked linears must agree in both sizes. Where they
do not, the chain ends and a new one starts; the new one carries the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Chain:
    """Linears of one kind and one shape in depth order."""

    kind: str
    """The common FQN with `*` for the layer index."""
    fqns: tuple[str, ...]
    shape: tuple[int, int]
    """(out_features, in_features) of every member."""
    break_reason: str | None = None
    """Why it does not continue the chain before it; None for the first chain of its kind."""

    def window(self, position: int, reach: int) -> tuple[int, ...]:
        """Return the positions whose blocks act at `position`, nearest first.

        Args:
            position: Index into `fqns`.
            reach: How many previous blocks take part; -1 for all of them.
        """
        first = 0 if reach < 0 else max(0, position - reach)
        return tuple(range(position, first - 1, -1))


def find_chains(shapes: Mapping[str, tuple[int, int]]) -> list[Chain]:
    """Group linears into chains.

    Args:
        shapes: FQN to (out_features, in_features), in any order.

    Returns:
        Every given FQN in exactly one chain, kinds in order of first appearance. A linear without a
        layer index is a chain of its own.
    """
    kinds: dict[str, list[tuple[int, str]]] = {}
    for fqn in shapes:
        kind, layer = _split_layer_index(fqn)
        kinds.setdefault(kind, []).append((layer, fqn))
    chains: list[Chain] = []
    for kind, members in kinds.items():
        run: list[str] = []
        reason: str | None = None
        for _, fqn in sorted(members):
            if run and shapes[fqn] != shapes[run[-1]]:
                chains.append(Chain(kind, tuple(run), shapes[run[-1]], reason))
                reason = (
                    f"{fqn} has shape {list(shapes[fqn])} but {run[-1]} has {list(shapes[run[-1]])}"
                )
                run = []
            run.append(fqn)
        chains.append(Chain(kind, tuple(run), shapes[run[-1]], reason))
    return chains


def _split_layer_index(fqn: str) -> tuple[str, int]:
    parts = fqn.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join([*parts[:index], "*", *parts[index + 1 :]]), int(part)
    return fqn, 0
