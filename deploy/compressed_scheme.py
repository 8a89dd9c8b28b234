"""Our formats in the words of compressed-tensors, the checkpoint format of vLLM and llm-compressor.

Each group of its `config_groups` names the linears that share a format::

    weights            8 bits per channel: int-quantized (int8)
                       4 or 6 bits, or groups: pack-quantized (int32 words)
    input_activations  TENSOR  the scale is stored (`input_scale`)
                       TOKEN, GROUP  the reader takes the absolute maximum of what it sees

It has no word for the part of that maximum that our scale covers, so another clip ratio than 1 is
refused. Which scale a maximum gives is the reader's choice too: compressed-tensors itself divides
by half the range (127.5, 7.5), vLLM's 8-bit kernels by the greatest integer (127), as we do.

Embeddings are written in float32: readers take quantized ones only since the middle of 2026.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
)

from deploy.checkpoint import Checkpoint
from deploy.checkpoint_reader import StoredLinear
from deploy.errors import ConfigError
from rolora.affine import activation_range
from rolora.kv_cache import FLOAT_KV_BITS
from rolora.scheme import UNQUANTIZED_BITS, ActivationSpec, Granularity, WeightSpec

_REMAKE = "make the checkpoint again with rolora merge-rotate-quantize"


@dataclass(frozen=True)
class CompressedScheme:
    """How a whole checkpoint is said in compressed-tensors."""

    config: QuantizationConfig
    by_linear: Mapping[str, QuantizationScheme]
    """FQN of each quantized linear to its group."""


def compressed_scheme(checkpoint: Checkpoint) -> CompressedScheme:
    """Express the formats of a checkpoint.

    Raises:
        ConfigError: Nothing is quantized, or a format cannot be expressed.
    """
    names = checkpoint.names
    linears = [checkpoint.linear(fqn) for fqn in (*names.linears(), names.head)]
    quantized = {linear.fqn: linear for linear in linears if linear.activation is not None}
    if not quantized:
        raise ConfigError(
            f"{checkpoint.directory}: nothing is quantized, so there is nothing to say in "
            f"compressed-tensors; {_REMAKE} --scheme W8A8"
        )
    faults = _inexpressible(quantized)
    if checkpoint.kv_bits != FLOAT_KV_BITS:
        faults.append(
            f"the KV cache has {checkpoint.kv_bits} bits, expected a float one: the scales and "
            f"rotation of ours are not written here; {_REMAKE} --kv-bits {FLOAT_KV_BITS}"
        )
    if checkpoint.shares_table:
        faults.append(
            "embedding and head share a table of integers, and transformers ties float weights "
            f"only; {_REMAKE} without --share-table"
        )
    if faults:
        raise ConfigError.from_faults(str(checkpoint.directory), faults)
    members: dict[tuple[WeightSpec, ActivationSpec], list[str]] = defaultdict(list)
    for fqn, linear in quantized.items():
        assert linear.activation is not None
        members[linear.weight, linear.activation].append(fqn)
    schemes = [
        QuantizationScheme(
            targets=_targets(fqns, [linear.fqn for linear in linears]),
            weights=_weight_args(weight),
            input_activations=_input_args(activation),
            format=_format(weight),
        )
        for (weight, activation), fqns in members.items()
    ]
    formats = {_format(weight) for weight, _ in members}
    config = QuantizationConfig(
        config_groups={f"group_{index}": scheme for index, scheme in enumerate(schemes)},
        format=(formats.pop() if len(formats) == 1 else CompressionFormat.mixed_precision).value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[linear.fqn for linear in linears if linear.activation is None],
    )
    by_linear = {
        fqn: scheme for scheme, fqns in zip(schemes, members.values(), strict=True) for fqn in fqns
    }
    return CompressedScheme(config, by_linear)


def reader_divisor(bits: int) -> float:
    """Return what compressed-tensors divides an absolute maximum by: half the range of integers.

    We divide by the greatest integer.
    """
    quant_min, quant_max = activation_range(bits)
    return (quant_max - quant_min) / 2


def describe_group(scheme: QuantizationScheme) -> str:
    """Return a group in a few words."""
    weights, inputs = scheme.weights, scheme.input_activations
    assert weights is not None
    assert inputs is not None
    kind = "at run time" if inputs.dynamic else "static"
    return (
        f"weights {weights.num_bits} bits per {_granularity(weights)}, inputs {inputs.num_bits} "
        f"bits per {_granularity(inputs)} ({kind})"
    )


def _granularity(args: QuantizationArgs) -> str:
    return f"{args.strategy} of {args.group_size}" if args.group_size else str(args.strategy)


def _inexpressible(quantized: Mapping[str, StoredLinear]) -> list[str]:
    """Return a sentence for each thing that readers would not apply."""
    faults = [
        f"{fqn} has {spec}, expected weights and inputs of 4 to 8 bits, inputs without a zero "
        f"point: the other forms are not written here; {_REMAKE} a scheme such as W8A8, without "
        f"exceptions for it"
        for fqn, linear in quantized.items()
        if (spec := linear.activation) is not None
        and (spec.is_float or not spec.symmetric or linear.weight.bits == UNQUANTIZED_BITS)
    ][:1]
    clipped: dict[float, list[str]] = defaultdict(list)
    for fqn, linear in quantized.items():
        spec = linear.activation
        if spec is not None and spec.granularity is not Granularity.TENSOR and spec.clip_ratio != 1:
            clipped[spec.clip_ratio].append(fqn)
    return faults + [
        f"{len(fqns)} linears ({fqns[0]} ...) clip their inputs at {ratio:g} of the absolute "
        f"maximum, expected 1: compressed-tensors has no word for it, and readers would compute "
        f"something else; {_REMAKE} --activation-clip 1"
        for ratio, fqns in clipped.items()
    ]


def _weight_args(spec: WeightSpec) -> QuantizationArgs:
    grouped = spec.group_size is not None
    return QuantizationArgs(
        num_bits=spec.bits,
        strategy=QuantizationStrategy.GROUP if grouped else QuantizationStrategy.CHANNEL,
        group_size=spec.group_size,
    )


def _input_args(spec: ActivationSpec) -> QuantizationArgs:
    if spec.granularity is Granularity.TENSOR:
        return QuantizationArgs(num_bits=spec.bits, strategy=QuantizationStrategy.TENSOR)
    grouped = spec.granularity is Granularity.GROUP
    return QuantizationArgs(
        num_bits=spec.bits,
        strategy=QuantizationStrategy.GROUP if grouped else QuantizationStrategy.TOKEN,
        group_size=spec.group_size if grouped else None,
        dynamic=True,
    )


def _format(spec: WeightSpec) -> CompressionFormat:
    # vLLM has no kernel for int8 weights with groups, but one for packed ones.
    if spec.bits == 8 and spec.group_size is None:
        return CompressionFormat.int_quantized
    return CompressionFormat.pack_quantized


def _targets(fqns: list[str], all_fqns: list[str]) -> list[str]:
    """Name linears: by their last name where all of that name are meant, else in full."""
    targets = []
    for part in dict.fromkeys(fqn.rpartition(".")[2] for fqn in fqns):
        meant = [fqn for fqn in fqns if fqn.rpartition(".")[2] == part]
        same = [fqn for fqn in all_fqns if fqn.rpartition(".")[2] == part]
        nested = meant[0] != part  # a regular expression must not need a dot that is not there
        targets += [f"re:.*\\.{part}$"] if nested and meant == same else meant
    return targets
