"""The parts of an encoder, by dotted module name: what `decoder` is for decoders.

Attention and an MLP of two linears, each followed by a LayerNorm over its sum with what it read. So
there is no residual stream that only norms read, and R1, which passes RMSNorms alone, has no place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rolora.decoder import LinearRole

ENCODER_ROLES = (
    LinearRole.Q,
    LinearRole.K,
    LinearRole.V,
    LinearRole.O,
    LinearRole.UP,
    LinearRole.DOWN,
)
"""Roles of a block's linears, in data order."""


@dataclass(frozen=True)
class EncoderBlockNames:
    """Dotted module names (FQNs) of one encoder block."""

    fqn: str
    """Module that holds all of it."""
    query: str
    key: str
    value: str
    output: str
    """Last linear of the attention."""
    attention_norm: str
    """LayerNorm over the sum of the attention's output and the block's input."""
    up: str
    """First linear of the MLP, which reads that norm."""
    down: str
    """Last linear of the MLP."""
    mlp_norm: str
    """LayerNorm over the sum of the MLP's output and its input; the block's output."""

    @property
    def attention(self) -> str:
        """The module that holds query, key and value."""
        return self.query.rpartition(".")[0]

    def linears(self) -> tuple[str, ...]:
        """Return the FQNs of the block's linears in the order in which data meets them."""
        return (self.query, self.key, self.value, self.output, self.up, self.down)

    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Return the block's linears in data order, those that read one input together."""
        return ((self.query, self.key, self.value), (self.output,), (self.up,), (self.down,))


@dataclass(frozen=True)
class EncoderNames:
    """Dotted module names and sizes of an encoder, with or without a classification head."""

    embedding: str
    """Table of token embeddings."""
    positions: str
    """Table of position embeddings, added to them."""
    token_types: str
    """Table of token type embeddings, added to them."""
    embedding_norm: str
    """LayerNorm over the sum."""
    stack: str
    """Module that holds the blocks and gives the last hidden states."""
    blocks: tuple[EncoderBlockNames, ...]
    head_linears: tuple[str, str] | None
    """Of a classifier, which read the first token's state, tanh between them; else None."""
    hidden_size: int
    intermediate_size: int
    num_heads: int

    final_norm = None
    head = None

    @property
    def head_dim(self) -> int:
        """Columns of a head."""
        return self.hidden_size // self.num_heads

    def linears(self) -> Iterator[str]:
        """Yield the FQNs of all block linears in depth order."""
        for block in self.blocks:
            yield from block.linears()

    def roles(self) -> Iterator[tuple[str, LinearRole]]:
        """Yield FQN and role of every linear that can be quantized, in depth order."""
        for block in self.blocks:
            yield from zip(block.linears(), ENCODER_ROLES, strict=True)
