"""Where an export runs, and what its integer products have to look like there.

    cpu         x64 with VNNI     uint8 inputs, zero point 128, times int8 weights
    cpu-avx2    x64 without       the same, but weights of 8 bits are uint8 with zero point 128
    cpu-arm64   ARM64             int8 inputs times int8 weights
    cuda        NVIDIA GPUs       int8 times int8 in MatMulInteger; everything else in float16
    qdq         any runtime       standard operators only: QuantizeLinear and DequantizeLinear in
                                  front of float products, which runtimes replace by integer ones

Without VNNI, x64 multiplies unsigned by signed bytes with VPMADDUBSW, which adds two products in 16
bits and saturates (ONNX Runtime's quantization guide, "When and why do I need to try U8U8?"): 2 *
255 * 127 does not fit, 2 * 255 * 64 does. So weights of 4 and 6 bits are safe as they are, and
those of 8 bits are stored as unsigned bytes, whose kernel widens to 16 bits before it multiplies;
the integers they stand for stay the same. MatMulNBits needs nothing of the kind: on a Haswell that
QEMU emulates, its logits with 8 bits are those of VNNI to 3e-7.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np


class Target(StrEnum):
    """Where the graph will run; integer kernels differ between processors."""

    CPU = "cpu"
    CPU_AVX2 = "cpu-avx2"
    CPU_ARM64 = "cpu-arm64"
    CUDA = "cuda"
    QDQ = "qdq"


@dataclass(frozen=True)
class IntegerFormat:
    """How the operands of an integer product are stored."""

    zero_point: int = 128
    """Of the inputs: 128 for uint8, 0 for int8."""
    shifted_weights: bool = False
    """Weights of 8 bits are uint8 with zero point 128."""
    fused: bool = True
    """One MatMulIntegerToFloat; otherwise MatMulInteger, Cast and Mul."""
    half: bool = False
    """Inputs and outputs are float16; scales and the arithmetic with them stay float32."""

    def byte(self, integer: int) -> np.generic:
        """Return what stands for an integer of an input; for 0 that is the zero point."""
        return np.uint8(self.zero_point + integer) if self.zero_point else np.int8(integer)

    def shifts(self, bits: int) -> bool:
        """Return whether weights of so many bits are stored unsigned."""
        return self.shifted_weights and bits == 8


INTEGER_FORMATS = {
    Target.CPU: IntegerFormat(),
    Target.CPU_AVX2: IntegerFormat(shifted_weights=True),
    Target.CPU_ARM64: IntegerFormat(zero_point=0),
    Target.CUDA: IntegerFormat(zero_point=0, fused=False),
}
"""Targets with integer products of their own."""
CPU_FORMAT = INTEGER_FORMATS[Target.CPU]
