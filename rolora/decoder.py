"""The parts of a decoder, by dotted module name.

A rotation or a quantizer must know which linears read the residual stream, which write it, and
which pairs share a head. Those facts are data. `deploy` fills them in for each model family; this
package never spells a module name itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class LinearRole(StrEnum):
    """What a linear does, in short names for users."""

    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    HEAD = "head"


@dataclass(frozen=True)
class BlockNames:
    """Dotted module names (FQNs) of one decoder block."""

    attention_norm: str
    """RMSNorm whose output query, key and value read."""
    query: str
    key: str
    value: str
    output: str
    """Linear that writes the attention result back to the residual stream."""
    mlp_norm: str
    """RMSNorm whose output gate and up read."""
    gate: str
    up: str
    down: str
    """Linear that writes the MLP result back to the residual stream."""
    attention_post_norm: str | None = None
    """RMSNorm between `output` and the residual stream, where there is one."""
    mlp_post_norm: str | None = None
    """RMSNorm between `down` and the residual stream, where there is one."""

    @property
    def fqn(self) -> str:
        """The module that holds the block's norms, attention and MLP."""
        return self.attention_norm.rpartition(".")[0]

    @property
    def attention(self) -> str:
        """The module that holds query, key and value."""
        return self.output.rpartition(".")[0]

    def linears(self) -> tuple[str, ...]:
        """Return the FQNs of the block's linears in the order in which data meets them."""
        return (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)

    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Return the block's linears in data order, those that read one input together."""
        return (
            (self.query, self.key, self.value),
            (self.output,),
            (self.gate, self.up),
            (self.down,),
        )


@dataclass(frozen=True)
class DecoderNames:
    """Dotted module names and sizes of a pre-norm decoder with gated MLPs."""

    embedding: str
    blocks: tuple[BlockNames, ...]
    final_norm: str
    head: str
    hidden_size: int
    intermediate_size: int
    head_dim: int
    num_heads: int
    num_key_value_heads: int
    norm_offset: float = 0.0
    """What an RMSNorm adds to its weight to have its gain."""

    @property
    def post_norm(self) -> str | None:
        """The first norm that stands between a linear and the residual stream, if any does."""
        norms = (block.attention_post_norm or block.mlp_post_norm for block in self.blocks)
        return next(filter(None, norms), None)

    def linears(self) -> Iterator[str]:
        """Yield the FQNs of all block linears in depth order (the head is not among them)."""
        for block in self.blocks:
            yield from block.linears()

    def roles(self) -> Iterator[tuple[str, LinearRole]]:
        """Yield FQN and role of every linear in depth order, the head last."""
        for block in self.blocks:
            yield from zip(block.linears(), LinearRole, strict=False)
        yield self.head, LinearRole.HEAD
