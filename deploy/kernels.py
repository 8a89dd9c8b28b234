"""Which kernels an export uses on which target, and the graphs that follow from it.

    integer   one graph; activations are quantized once per token or with a static scale, products
              are integer matrix products
    nbits     one graph; MatMulNBits at accuracy level 4, which quantizes activations to 8 bits per
              block of input columns itself
    qdq       one graph of standard operators, whose integer products the runtime makes itself from
              static scales
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
    8 bits in the       a graph each for all of these: for a single token it is the cache that has
    key-value cache     to be small, but many tokens are multiplied some three times as fast in
                        float32 (`attention_ops`); the cache must be one buffer, past and present

The other targets take the same graphs with the operands that their processors want, but CUDA, whose
MatMulNBits quantizes no activations: it has integer products only.

All compute the logits of a prompt's last token only; the head by itself gives those of the others.
A float model is the one graph of `integer`, which computes them all, as that of `qdq` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from deploy.checkpoint import Checkpoint
from deploy.checkpoint_reader import AnyCheckpoint, StoredLinear
from deploy.errors import ConfigError, UnsupportedModelError
from deploy.session import GRAPH_NAME, HEAD_NAME, PROMPT_NAME, TOKEN_NAME
from deploy.targets import INTEGER_FORMATS, IntegerFormat, Target
from rolora.kv_cache import FLOAT_KV_BITS
from rolora.scheme import UNQUANTIZED_BITS, Granularity

NBITS_ACTIVATION_BITS = 8
"""What MatMulNBits quantizes activations to at accuracy level 4."""


class Kernel(StrEnum):
    """Kernels of the quantized linears."""

    AUTO = "auto"
    INTEGER = "integer"
    NBITS = "nbits"
    QDQ = "qdq"


TARGET_KERNELS = {
    Target.CPU: (Kernel.AUTO, Kernel.INTEGER, Kernel.NBITS),
    Target.CPU_AVX2: (Kernel.AUTO, Kernel.INTEGER, Kernel.NBITS),
    Target.CPU_ARM64: (Kernel.AUTO, Kernel.INTEGER, Kernel.NBITS),
    Target.CUDA: (Kernel.AUTO, Kernel.INTEGER),
    Target.QDQ: (Kernel.AUTO, Kernel.QDQ),
}
"""What each target offers."""


@dataclass(frozen=True)
class GraphForm:
    """What distinguishes the graphs of an export."""

    file: str
    kernel: Kernel
    """INTEGER, NBITS or QDQ."""
    four_bits_only: bool = False
    """NBITS multiplies weights of 4 bits only; those of more take integer products."""
    blocked: bool = False
    """Integer kernels unpack the weights of MatMulNBits, when the graph is loaded."""
    last_logits: bool = False
    """Logits of each sequence's last token only; the hidden states of all are a further output."""
    target: Target = Target.CPU
    half: bool = False
    """Activations and cache are float16; logits stay float32."""
    float_attention: bool = False
    """Attention multiplies float32 over a cache of 8 bits."""

    @property
    def numbers(self) -> IntegerFormat:
        """How operands of integer products are stored."""
        return replace(INTEGER_FORMATS[self.target], half=self.half)

    @property
    def head_only(self) -> bool:
        """Whether the graph is no decoder, but its head."""
        return self.file == HEAD_NAME

    def takes_nbits(self, linear: StoredLinear) -> bool:
        """Return whether MatMulNBits multiplies a quantized linear without groups."""
        return self.kernel is Kernel.NBITS and (linear.weight.bits == 4 or not self.four_bits_only)


ONE_INTEGER_GRAPH = GraphForm(GRAPH_NAME, Kernel.INTEGER)
PORTABLE_GRAPH = GraphForm(GRAPH_NAME, Kernel.QDQ, target=Target.QDQ)
ONE_NBITS_GRAPH = GraphForm(GRAPH_NAME, Kernel.NBITS)
LAST_INTEGER_GRAPH = GraphForm(GRAPH_NAME, Kernel.INTEGER, last_logits=True)
TOKEN_GRAPH = GraphForm(TOKEN_NAME, Kernel.NBITS, four_bits_only=True, blocked=True)
PROMPT_GRAPH = GraphForm(PROMPT_NAME, Kernel.INTEGER, blocked=True, last_logits=True)
INTEGER_TOKEN_GRAPH = GraphForm(TOKEN_NAME, Kernel.INTEGER)
INTEGER_PROMPT_GRAPH = GraphForm(
    PROMPT_NAME, Kernel.INTEGER, last_logits=True, float_attention=True
)
HEAD_GRAPH = GraphForm(HEAD_NAME, Kernel.INTEGER)
BLOCKED_HEAD_GRAPH = GraphForm(HEAD_NAME, Kernel.INTEGER, blocked=True)
"""The head by itself, for callers that want the logits of every position of a prompt."""


ENCODER_TARGETS = (Target.CPU, Target.CPU_AVX2, Target.CPU_ARM64, Target.QDQ)
"""Where encoders run; no graph of theirs is of float16."""
ENCODER_KERNELS = (Kernel.AUTO, Kernel.INTEGER, Kernel.QDQ)


def encoder_form(
    checkpoint: AnyCheckpoint, kernel: Kernel, target: Target = Target.CPU
) -> GraphForm:
    """Return the one graph of an encoder, which reads whole texts and never single tokens.

    Args:
        checkpoint: What is exported.
        kernel: The user's choice.
        target: Where it will run.

    Raises:
        ConfigError: An encoder has no such kernel, or cannot run there.
        UnsupportedModelError: A linear's format has no kernel.
    """
    if kernel not in ENCODER_KERNELS or target not in ENCODER_TARGETS:
        raise ConfigError(
            f"--target {target} --kernel {kernel}: an encoder is one graph of integer products, "
            f"for --target {', '.join(ENCODER_TARGETS)} with --kernel auto, integer or qdq"
        )
    require_offered(target, kernel)
    linears = [checkpoint.linear(fqn) for fqn in checkpoint.names.linears()]
    if target is Target.QDQ:
        _require_wide_embedding(checkpoint, target)
        require_static(checkpoint, linears)
        return PORTABLE_GRAPH
    for linear in linears:
        _require_kernel(checkpoint, linear, target)
    return replace(ONE_INTEGER_GRAPH, target=target)


def require_offered(target: Target, kernel: Kernel) -> None:
    """Refuse a kernel that a target does not have.

    Raises:
        ConfigError: The combination does not exist; the message names those that do.
    """
    if kernel in TARGET_KERNELS[target]:
        return
    offered = "; ".join(f"{each}: {', '.join(known)}" for each, known in TARGET_KERNELS.items())
    raise ConfigError(
        f"--target {target} has no --kernel {kernel}; what exists, as TARGET: KERNELS, is {offered}"
    )


def graph_forms(
    checkpoint: Checkpoint, kernel: Kernel, target: Target = Target.CPU
) -> tuple[GraphForm, ...]:
    """Return the graphs to export; the first one owns the weights, the others refer to them.

    Args:
        checkpoint: What is exported.
        kernel: The user's choice.
        target: Where they will run.

    Raises:
        ConfigError: The target does not have the kernel.
        UnsupportedModelError: A linear's format has no kernel on the target, MatMulNBits cannot
            keep the checkpoint's scheme, or there is nothing to quantize.
    """
    require_offered(target, kernel)
    names = checkpoint.names
    linears = [checkpoint.linear(fqn) for fqn in (*names.linears(), names.head)]
    if target is Target.CUDA:
        _require_float16(checkpoint)
    if target in (Target.QDQ, Target.CUDA):
        _require_wide_embedding(checkpoint, target)
    if target is Target.QDQ:
        _require_float_cache(checkpoint, target, "float")
        require_static(checkpoint, linears)
        return (PORTABLE_GRAPH,)
    for linear in linears:
        _require_kernel(checkpoint, linear, target)
    if target is Target.CUDA:
        _require_float_cache(checkpoint, target, "float16")
    half = target is Target.CUDA
    forms = _forms(checkpoint, kernel, linears, phases=not half)
    return tuple(replace(form, target=target, half=half) for form in forms)


def require_adapters_fed(forms: Sequence[GraphForm]) -> None:
    """Refuse graphs that adapters cannot be fed to at run time.

    Raises:
        ConfigError: There is a graph for prompts and another for single tokens, which
            onnxruntime-genai feeds no adapter; or they are of float16.
    """
    if len([form for form in forms if not form.head_only]) > 1:
        raise ConfigError(
            f"--keep-adapter: with --kernel {Kernel.AUTO} this scheme has a graph for prompts and "
            f"one for single tokens, which onnxruntime-genai feeds no adapter to; use --kernel "
            f"{Kernel.INTEGER}"
        )
    if forms[0].half:
        raise ConfigError(
            f"--keep-adapter: --target {forms[0].target} computes in float16, adapters are kept in "
            f"float32; use --target {Target.CPU}, {Target.CPU_AVX2}, {Target.CPU_ARM64} or "
            f"{Target.QDQ}"
        )


def _require_float16(checkpoint: Checkpoint) -> None:
    """Refuse a family whose residual stream float16 does not hold."""
    if checkpoint.names.blocks[0].attention_post_norm is not None:
        raise UnsupportedModelError(
            f"{checkpoint.directory}: --target {Target.CUDA} computes in float16 between the "
            f"linears, which {checkpoint.config.model_type}'s residual stream exceeds: its norms "
            f"stand behind the linears too; use --target {Target.CPU} or {Target.QDQ}"
        )


def _require_float_cache(checkpoint: Checkpoint, target: Target, kept: str) -> None:
    """Refuse a quantized KV cache."""
    if checkpoint.kv_bits != FLOAT_KV_BITS:
        raise UnsupportedModelError(
            f"{checkpoint.directory}: --target {target} keeps the KV cache in {kept}, the "
            f"checkpoint has {checkpoint.kv_bits} bits; quantize with --kv-bits {FLOAT_KV_BITS}"
        )


def _require_wide_embedding(checkpoint: AnyCheckpoint, target: Target) -> None:
    """Refuse a table of 4 bits, which only a kernel of the CPU looks up."""
    spec = checkpoint.embedding_spec
    if spec is not None and spec.bits == 4:
        raise UnsupportedModelError(
            f"{checkpoint.directory}: the embedding has 4 bits, which --target {target} cannot "
            f"look up; quantize with --embedding-bits 8"
        )


def _forms(
    checkpoint: Checkpoint, kernel: Kernel, linears: list[StoredLinear], *, phases: bool
) -> tuple[GraphForm, ...]:
    """Return the graphs of a CPU; `phases` allows one for prompts and one for single tokens."""
    quantized = [linear.activation for linear in linears if linear.activation is not None]
    bits = min((spec.bits for spec in quantized), default=None)
    in_blocks = [linear.activation for linear in linears[:-1] if linear.activation is not None]
    grouped = any(spec.granularity is Granularity.GROUP for spec in in_blocks)
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
    rounded_cache = phases and checkpoint.kv_bits != FLOAT_KV_BITS
    eight_bits = bits == NBITS_ACTIVATION_BITS and not grouped
    if phases and eight_bits and any(linear.weight.bits == 4 for linear in linears[:-1]):
        prompt = replace(PROMPT_GRAPH, float_attention=rounded_cache)
        return TOKEN_GRAPH, prompt, BLOCKED_HEAD_GRAPH
    if rounded_cache:
        return INTEGER_TOKEN_GRAPH, INTEGER_PROMPT_GRAPH, HEAD_GRAPH
    return LAST_INTEGER_GRAPH, HEAD_GRAPH


def _require_kernel(checkpoint: AnyCheckpoint, linear: StoredLinear, target: Target) -> None:
    """Refuse a format that only the torch model computes, or another target."""
    spec = linear.activation
    if spec is None:
        return
    grouped = not spec.is_float and spec.granularity is Granularity.GROUP
    if linear.weight.bits == UNQUANTIZED_BITS:
        fault = f"a float weight with an input of {spec}"
    elif grouped and not (spec.symmetric and spec.bits == NBITS_ACTIVATION_BITS):
        fault = f"an input of {spec}"
    elif linear.weight.group_size is not None and spec.granularity is Granularity.TENSOR:
        portable = f"export it with --target {Target.QDQ}, or " if linear.weight.bits == 4 else ""
        raise UnsupportedModelError(
            f"{checkpoint.directory}: {linear.fqn} has weights in groups of "
            f"{linear.weight.group_size} and an input of {spec}, which no kernel of --target "
            f"{target} multiplies; {portable}quantize without --static all"
        )
    elif target is Target.CUDA and linear.needs_blocks:
        raise UnsupportedModelError(
            f"{checkpoint.directory}: {linear.fqn} has {linear.weight.bits}-bit weights per "
            f"{linear.weight.granularity} and an input of {spec}; --target cuda multiplies "
            f"integers only: weights of 4, 6 or 8 bits per channel with inputs per token or "
            f"static, such as W8A8, W4A8 and W4A4 without --group-size and --activation-group-size"
        )
    else:
        return
    raise UnsupportedModelError(
        f"{checkpoint.directory}: {linear.fqn} has {fault}, which `evaluate` runs in torch but no "
        f"kernel in ONNX Runtime; what exports: weights of 4, 6 or 8 bits with inputs per token or "
        f"static of 4, 6 or 8 bits, in float, or symmetric in groups of 8 bits"
    )


def require_static(checkpoint: AnyCheckpoint, linears: list[StoredLinear]) -> None:
    """Refuse what QuantizeLinear and DequantizeLinear with constant scales cannot say, or run.

    ONNX Runtime makes a MatMulIntegerToFloat of bytes in groups and a rounded input, and refuses to
    load that.

    Raises:
        UnsupportedModelError: An input has run-time scales or fewer than 8 bits, or weights of 8
            bits have groups behind a rounded input; the message says how to make a checkpoint
            without that.
    """
    for linear in linears:
        spec = linear.activation
        if spec is None or spec.is_float:
            continue
        static = spec.granularity is Granularity.TENSOR and spec.bits == NBITS_ACTIVATION_BITS
        if static and linear.weight.bits == 8 and linear.weight.group_size is not None:
            raise UnsupportedModelError(
                f"{checkpoint.directory}: {linear.fqn} has 8-bit weights in groups of "
                f"{linear.weight.group_size} and an input of {spec}, which ONNX Runtime does not "
                f"run in the form of --target {Target.QDQ}; quantize without --group-size, or with "
                f"weights of 4 bits (--scheme W4A8)"
            )
        if static and linear.weight.bits != UNQUANTIZED_BITS:
            continue
        raise UnsupportedModelError(
            f"{checkpoint.directory}: {linear.fqn} has {linear.weight.bits}-bit weights and an "
            f"input of {spec}; --target qdq needs weights of 4, 6 or 8 bits and one calibrated "
            f"scale for every input of 8 bits (or inputs in float). Make such a checkpoint with "
            f"rolora merge-rotate-quantize --scheme W8A8 (or W4A8, W4A16) --static all"
        )
