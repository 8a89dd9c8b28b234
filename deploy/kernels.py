"""Which kernels an export uses, and the graphs that follow from it.

    integer   one graph; activations are quantized once per token or with a static scale, products
              are integer matrix products
    nbits     one graph; MatMulNBits at accuracy level 4, which quantizes activations to 8 bits per
              block of input columns itself
    auto      integer products for prompts, where they are two to three times as fast, MatMulNBits
              for single tokens, where it needs the fewest nodes: a graph each, one set of weights

Where both kernels would give the same graph (float models, weights in groups), or MatMulNBits would
not keep the scheme (activations below 8 bits), `auto` is the one graph of `integer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from deploy.checkpoint import Checkpoint
from deploy.errors import UnsupportedModelError
from deploy.session import GRAPH_NAME, HEAD_NAME, PROMPT_NAME, TOKEN_NAME
from rolora.scheme import Granularity

NBITS_ACTIVATION_BITS = 8
"""What MatMulNBits quantizes activations to at accuracy level 4."""


class Kernel(StrEnum):
    """Kernels of the quantized linears."""

    AUTO = "auto"
    INTEGER = "integer"
    NBITS = "nbits"


@dataclass(frozen=True)
class GraphForm:
    """What distinguishes the graphs of an export."""

    file: str
    kernel: Kernel
    """INTEGER or NBITS."""
    blocked: bool = False
    """Integer kernels unpack the weights of MatMulNBits, when the graph is loaded."""
    last_logits: bool = False
    """Logits of each sequence's last token only; the hidden states of all are a further output."""


ONE_INTEGER_GRAPH = GraphForm(GRAPH_NAME, Kernel.INTEGER)
ONE_NBITS_GRAPH = GraphForm(GRAPH_NAME, Kernel.NBITS)
TOKEN_GRAPH = GraphForm(TOKEN_NAME, Kernel.NBITS)
PROMPT_GRAPH = GraphForm(PROMPT_NAME, Kernel.INTEGER, blocked=True, last_logits=True)
HEAD_GRAPH = GraphForm(HEAD_NAME, Kernel.INTEGER, blocked=True)
"""The prompt graph's head by itself, for callers that want the logits of every position."""


def graph_forms(checkpoint: Checkpoint, kernel: Kernel) -> tuple[GraphForm, ...]:
    """Return the graphs to export; the first one owns the weights, the others refer to them.

    Args:
        checkpoint: What is exported.
        kernel: The user's choice.

    Raises:
        UnsupportedModelError: MatMulNBits cannot keep the checkpoint's scheme, or there is nothing
            to quantize.
    """
    names = checkpoint.names
    activations = [checkpoint.linear(fqn).activation for fqn in (*names.linears(), names.head)]
    quantized = [spec for spec in activations if spec is not None]
    bits = min((spec.bits for spec in quantized), default=None)
    grouped = any(spec.granularity is Granularity.GROUP for spec in quantized)
    if kernel is Kernel.NBITS:
        if bits != NBITS_ACTIVATION_BITS:
            scheme = checkpoint.manifest.details.get("scheme")
            raise UnsupportedModelError(
                f"{checkpoint.directory}: --kernel nbits quantizes activations to "
                f"{NBITS_ACTIVATION_BITS} bits, the scheme is {scheme}; use --kernel integer, or "
                f"quantize with W8A8 or W4A8"
            )
        return (ONE_NBITS_GRAPH,)
    if kernel is Kernel.INTEGER or bits != NBITS_ACTIVATION_BITS or grouped:
        return (ONE_INTEGER_GRAPH,)
    return TOKEN_GRAPH, PROMPT_GRAPH, HEAD_GRAPH
