"""What a quantizer must know of a model that is a stack of blocks, decoder or encoder.

`DecoderNames` and `EncoderNames` have it, each with more that is theirs alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from rolora.decoder import LinearRole


class Block(Protocol):
    """Dotted module names (FQNs) of one block."""

    @property
    def fqn(self) -> str:
        """The module that holds all of it."""

    @property
    def attention(self) -> str:
        """The module that holds query, key and value."""

    @property
    def query(self) -> str:
        """Linear of the queries."""

    @property
    def key(self) -> str:
        """Linear of the keys."""

    @property
    def value(self) -> str:
        """Linear of the values."""

    @property
    def output(self) -> str:
        """Last linear of the attention."""

    @property
    def down(self) -> str:
        """Last linear of the MLP."""

    def linears(self) -> tuple[str, ...]:
        """Return its linears in the order in which data meets them."""

    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Return its linears in data order, those that read one input together.

        Inputs 0 and 2 (of attention and MLP) are outputs of norms.
        """


class BlockStack(Protocol):
    """Dotted module names and sizes of a model."""

    @property
    def embedding(self) -> str:
        """The table of token embeddings."""

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks, in depth order."""

    @property
    def final_norm(self) -> str | None:
        """Norm in front of the head, where there is one."""

    @property
    def head(self) -> str | None:
        """Linear of the logits of tokens; an encoder has none."""

    @property
    def hidden_size(self) -> int:
        """Columns of what flows between the blocks."""

    @property
    def intermediate_size(self) -> int:
        """Columns of what the last linear of the MLP reads."""

    @property
    def num_heads(self) -> int:
        """Heads of the queries."""

    @property
    def head_dim(self) -> int:
        """Columns of a head."""

    def linears(self) -> Iterable[str]:
        """Return the FQNs of all block linears in depth order."""

    def roles(self) -> Iterable[tuple[str, LinearRole]]:
        """Return FQN and role of every linear that can be quantized, in depth order."""


def readers_by_linear(names: BlockStack) -> dict[str, tuple[str, ...]]:
    """Map each linear of the blocks to those that read its input, the one that stands for it first.

    Query stands for query, key and value, gate for gate and up.
    """
    shared = [readers for block in names.blocks for readers in block.shared_inputs()]
    return {fqn: readers for readers in shared for fqn in readers}
