"""Where each half of each rotation acts: one table that fusing, adapters and the export read.

Activations are row vectors, so a rotation is y = x R with R R^T = I. It changes nothing when each R
that a module puts on its output is undone at the input of every module that reads it::

    R1  residual stream  embedding, o, down put it on; q, k, v, gate, up, head undo it
    R2  one per layer    v puts it on each head of its output; o undoes it on each head of its input
    R3  queries and keys put on at run time behind the rotary embedding; undone by their product
    R4  MLP activation   put on at run time in front of down; down undoes it in its weight
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rolora.decoder import DecoderNames
from rolora.rotation import RotationName, RotationPlan, rotated_widths


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
    """True for a rotation at run time, False for one in the weight: in front of the module (R4, and
    R1 where it is not in the residual stream), or behind it and the rotary embedding (R3)."""


def applications(plan: RotationPlan, names: DecoderNames) -> list[Application]:
    """List where the rotations of a plan act: both halves of each, in the order data meets them.

    R3 has no second half: it acts on the outputs of query and key, after their norms and the rotary
    embedding, and the product of the two undoes it.

    Raises:
        ValueError: The plan was drawn for a decoder of other sizes.
    """
    _check_sizes(plan, names)
    r1, r2, r3, r4 = RotationName
    rotates_stream = plan.rotates_stream(names)
    # What no linear can put on: it acts behind a product or a norm.
    at_run_time = {r3, r4} if rotates_stream else {r1, r3, r4}
    table = [Application(names.embedding, Side.OUTPUT, r1, None, inverse=False, online=False)]
    table = table if rotates_stream else []
    for layer, block in enumerate(names.blocks):
        rows = (
            (block.query, Side.INPUT, r1),
            (block.key, Side.INPUT, r1),
            (block.value, Side.INPUT, r1),
            (block.query, Side.OUTPUT, r3),
            (block.key, Side.OUTPUT, r3),
            (block.value, Side.OUTPUT, r2),
            (block.output, Side.INPUT, r2),
            (block.output, Side.OUTPUT, r1),
            (block.gate, Side.INPUT, r1),
            (block.up, Side.INPUT, r1),
            (block.down, Side.INPUT, r4),
            (block.down, Side.OUTPUT, r1),
        )
        for fqn, side, rotation in rows:
            undoes = side is Side.INPUT
            if rotation is r1 and not undoes and not rotates_stream:
                continue
            if rotation in at_run_time:
                table.append(Application(fqn, side, rotation, layer, inverse=False, online=True))
            if rotation is r3:
                continue
            table.append(Application(fqn, side, rotation, layer, inverse=undoes, online=False))
    if not rotates_stream:
        table.append(Application(names.head, Side.INPUT, r1, None, inverse=False, online=True))
    table.append(Application(names.head, Side.INPUT, r1, None, inverse=True, online=False))
    return [application for application in table if application.rotation in plan.names]


def _check_sizes(plan: RotationPlan, names: DecoderNames) -> None:
    for name in sorted(plan.names):
        label, channels = rotated_widths(names)[name]
        size = plan.find(name, 0).size
        in_stream = name is RotationName.R1 and plan.rotates_stream(names)
        if size != channels and (in_stream or not plan.fits(name, channels)):
            raise _other_model(f"{name}, {label}", channels, size)
    if plan.r2 is not None and len(plan.r2) != len(names.blocks):
        raise _other_model("R2, number of layers", len(names.blocks), len(plan.r2))
    if plan.equalization is not None:
        plan.equalization.require_sizes(names)


def _other_model(what: str, expected: int, got: int) -> ValueError:
    return ValueError(
        f"{what}: expected {expected} as in the model, got a rotation plan with {got}, drawn for "
        f"another model; use the artifact that belongs to this model"
    )
