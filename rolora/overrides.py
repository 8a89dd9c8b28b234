"""Bits of single linears, by pattern: ``down=A8``, ``q,k,v=W8A8``, ``layers.0.*=W8A8``.

A pattern is a role (q, k, v, o, gate, up, down, head) or a glob on the linear's FQN, from its start
or from any dot. A value names new bits for weights, activations or both. Of several overrides that
match a linear the last one counts, for weights and activations apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rolora.blocks import BlockStack
from rolora.decoder import LinearRole
from rolora.scheme import ACTIVATION_BITS, WEIGHT_BITS, Scheme


@dataclass(frozen=True)
class Override:
    """New bits for the linears that one of the patterns matches."""

    patterns: tuple[str, ...]
    weight_bits: int | None
    """None keeps the scheme's."""
    activation_bits: int | None

    @classmethod
    def parse(cls, text: str) -> Override:
        """Read `PATTERN[,PATTERN...]=BITS`, BITS being `W8`, `A8` or `W8A8`.

        Raises:
            ValueError: The text has another form, or names an unsupported width.
        """
        left, equals, right = text.partition("=")
        patterns = tuple(part.strip() for part in left.split(","))
        match = re.fullmatch(r"(?:[wW]([0-9]{1,3}))?(?:[aA]([0-9]{1,3}))?", right.strip())
        if not equals or not all(patterns) or match is None or not match[0]:
            raise ValueError(
                f"override {text!r}: expected PATTERN=BITS, for example down=A8, q,k,v=W8A8 or "
                f"layers.0.*=W8A8"
            )
        weight_bits, activation_bits = (
            None if bits is None else int(bits) for bits in match.groups()
        )
        for name, bits, known in (
            ("weights", weight_bits, WEIGHT_BITS),
            ("activations", activation_bits, ACTIVATION_BITS),
        ):
            if bits is not None and bits not in known:
                raise ValueError(
                    f"override {text!r}: expected {name} of {', '.join(map(str, known))} bits, "
                    f"got {bits}"
                )
        return cls(patterns, weight_bits, activation_bits)

    def __str__(self) -> str:
        weight = "" if self.weight_bits is None else f"W{self.weight_bits}"
        activation = "" if self.activation_bits is None else f"A{self.activation_bits}"
        return f"{','.join(self.patterns)}={weight}{activation}"

    def apply(self, scheme: Scheme) -> Scheme:
        """Return the scheme with the override's bits in place of its own."""
        return Scheme(
            scheme.weight_bits if self.weight_bits is None else self.weight_bits,
            scheme.activation_bits if self.activation_bits is None else self.activation_bits,
        )


def matches(pattern: str, fqn: str, role: LinearRole) -> bool:
    """Return whether a pattern names a linear."""
    return pattern == role or fnmatchcase(fqn, pattern) or fnmatchcase(fqn, f"*.{pattern}")


def overridden(names: BlockStack, overrides: Sequence[Override]) -> dict[str, list[Override]]:
    """Return the overrides of each linear that has any, in the order given.

    Args:
        names: The model's parts.
        overrides: What the user asked for.

    Raises:
        ValueError: A pattern matches no linear.
    """
    found: dict[str, list[Override]] = {}
    linears = list(names.roles())
    for override in overrides:
        named = set()
        for pattern in override.patterns:
            hits = {fqn for fqn, role in linears if matches(pattern, fqn, role)}
            if not hits:
                roles = dict.fromkeys(role for _, role in linears)
                raise ValueError(
                    f"override {str(override)!r}: {pattern!r} matches no linear; roles are "
                    f"{', '.join(roles)}, names look like {linears[0][0]}"
                )
            named |= hits
        for fqn, _ in linears:
            if fqn in named:
                found.setdefault(fqn, []).append(override)
    return found
