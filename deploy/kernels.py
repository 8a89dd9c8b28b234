"""Which kernels an export uses, and the graphs that follow from it.

    integer   one graph; activations are quantized once per token or with a static scale, products
              are integer matrix products
    nbits     one graph; MatMulNBits at accuracy level 4, which quantizes activations to 8 bits per
              block of input columns itself
    auto      what measured best for the scheme

A single token costs what its weights cost to read, a prompt what its products cost. Integer kernels
hold 8 bits per weight whatever the file has. So, in `auto`:

    weights of 8 bits   one graph of integer products, the fastest for prompts and for single tokens
    weights of 4 bits   integer products for prompts; for single tokens MatMulNBits, which reads
                        half the bytes, and integer products where a weight has 8 bits (the head): a
                        graph each, one set of weights
    everything else     one graph, since both kernels would give the same (groups, weights alone
                        quantized) or MatMulNBits would not keep the scheme (activations below 8
                        bits); MatMulNBits computes what no integer product can

All compute the logits of a prompt's last token only; the head by itself gives those of the others.
A float model is the one graph of `integer`, which computes them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from deploy.checkpoint import Checkpoint, StoredLinear
from deploy.errors import UnsupportedModelError
from deploy.session import GRAPH_NAME, HEAD_NAME, PROMPT_NAME, TOKEN_NAME
from rolora.scheme import UNQUANTIZED_BITS, Granularity

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
    four_bits_only: bool = False
    """NBITS multiplies weights of 4 bits only; those of more take integer products."""
    blocked: bool = False
    """Integer kernels unpack the weights of MatMulNBits, when the graph is loaded."""
    last_logits: bool = False
    """Logits of each sequence's last token only; the hidden states of all are a further output."""

    @property
    def head_only(self) -> bool:
        """Whether the graph is no decoder, but its head."""
        return self.file == HEAD_NAME

    def takes_nbits(self, linear: StoredLinear) -> bool:
        """Return whether MatMulNBits multiplies a quantized linear without groups."""
        return self.kernel is Kernel.NBITS and (linear.weight.bits == 4 or not self.four_bits_only)


ONE_INTEGER_GRAPH = GraphForm(GRAPH_NAME, Kernel.INTEGER)
ONE_NBITS_GRAPH = GraphForm(GRAPH_NAME, Kernel.NBITS)
LAST_INTEGER_GRAPH = GraphForm(GRAPH_NAME, Kernel.INTEGER, last_logits=True)
TOKEN_GRAPH = GraphForm(TOKEN_NAME, Kernel.NBITS, four_bits_only=True, blocked=True)
PROMPT_GRAPH = GraphForm(PROMPT_NAME, Kernel.INTEGER, blocked=True, last_logits=True)
HEAD_GRAPH = GraphForm(HEAD_NAME, Kernel.INTEGER)
BLOCKED_HEAD_GRAPH = GraphForm(HEAD_NAME, Kernel.INTEGER, blocked=True)
"""The head by itself, for callers that want the logits of every position of a prompt."""


def graph_forms(checkpoint: Checkpoint, kernel: Kernel) -> tuple[GraphForm, ...]:
    """Return the graphs to export; the first one owns the weights, the others refer to them.

    Args:
        checkpoint: What is exported.
        kernel: The user's choice.

    Raises:
        UnsupportedModelError: A linear's format has no kernel at all, MatMulNBits cannot keep the
            checkpoint's scheme, or there is nothing to quantize.
    """
    names = checkpoint.names
    linears = [checkpoint.linear(fqn) for fqn in (*names.linears(), names.head)]
    for linear in linears:
        _require_kernel(checkpoint, linear)
    quantized = [linear.activation for linear in linears if linear.activation is not None]
    bits = min((spec.bits for spec in quantized), default=None)
    grouped = any(spec.granularity is Granularity.GROUP for spec in quantized)
    if kernel is Kernel.NBITS:
        if bits not in (NBITS_ACTIVATION_BITS, UNQUANTIZED_BITS):
            scheme = checkpoint.manifest.details.get("scheme")
            raise UnsupportedModelError(
                f"{checkpoint.directory}: --kernel nbits quantizes activations to "
                f"{NBITS_ACTIVATION_BITS} bits, the scheme is {scheme}; use --kernel integer, or "
                f"quantize with W8A8, W4A8, W8A16 or W4A16"
            )
        return (ONE_NBITS_GRAPH,)
    if kernel is Kernel.INTEGER or bits is None:
        return (ONE_INTEGER_GRAPH,)
    if bits != NBITS_ACTIVATION_BITS or grouped:
        return LAST_INTEGER_GRAPH, HEAD_GRAPH
    if any(checkpoint.linear(fqn).weight.bits == 4 for fqn in names.linears()):
        return TOKEN_GRAPH, PROMPT_GRAPH, BLOCKED_HEAD_GRAPH
    return LAST_INTEGER_GRAPH, HEAD_GRAPH


def _require_kernel(checkpoint: Checkpoint, linear: StoredLinear) -> None:
    """Refuse a format that only the torch model computes."""
    spec = linear.activation
    if spec is None:
        return
    grouped = not spec.is_float and spec.granularity is Granularity.GROUP
    if linear.weight.bits == UNQUANTIZED_BITS:
        fault = f"a float weight with an input of {spec}"
    elif grouped and not (spec.symmetric and spec.bits == NBITS_ACTIVATION_BITS):
        fault = f"an input of {spec}"
    else:
        return
    raise UnsupportedModelError(
        f"{checkpoint.directory}: {linear.fqn} has {fault}, which `evaluate` runs in torch but no "
        f"kernel in ONNX Runtime; what exports: weights of 4, 6 or 8 bits with inputs per token or "
        f"static of 4, 6 or 8 bits, in float, or symmetric in groups of 8 bits"
    )
