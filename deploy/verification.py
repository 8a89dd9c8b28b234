"""Where an export was checked, and what that leaves open for the processors it is meant for."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from deploy.graph_builder import GraphBuilder, graph_value, name_output
from deploy.session import CPU_PROVIDER, CUDA_PROVIDER
from deploy.targets import Target

_X64 = ("x86_64", "amd64")
_ARM64 = ("aarch64", "arm64")


@dataclass(frozen=True)
class Verification:
    """The machine and the execution provider that parity was measured with."""

    target: str
    provider: str
    onnxruntime: str
    machine: str
    saturates: bool
    """Whether this CPU's products of unsigned and signed bytes saturate at 16 bits."""
    on_target: bool
    """Whether this is a processor and provider that the target means."""
    not_run: str | None
    """What has not been run, in words."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data."""
        return asdict(self)


def verify_on(target: Target) -> Verification:
    """Say with what an export for a target is checked here."""
    on_gpu = target is Target.CUDA and CUDA_PROVIDER in ort.get_available_providers()
    machine = platform.machine().lower()
    saturates = cpu_saturates()
    not_run = {
        Target.CPU: None if machine in _X64 and not saturates else "on x64 with VNNI",
        Target.CPU_AVX2: (
            None
            if machine in _X64 and saturates
            else "on x64 without VNNI; the operators ran here with this processor's kernels"
        ),
        Target.CPU_ARM64: (
            None
            if machine in _ARM64
            else "on ARM64; the operators ran here with this processor's kernels"
        ),
        Target.CUDA: (
            None
            if on_gpu
            else "on CUDA: this ONNX Runtime has no CUDA provider. Its CPU provider ran the graph, "
            "and the same graph in float32; that CUDA has a kernel for every node was looked up"
        ),
        Target.QDQ: "in TensorRT, OpenVINO, QNN and browsers; ONNX Runtime's CPU provider ran it",
    }[target]
    return Verification(
        target=str(target),
        provider=CUDA_PROVIDER if on_gpu else CPU_PROVIDER,
        onnxruntime=ort.__version__,
        machine=machine,
        saturates=saturates,
        on_target=not_run is None or target is Target.QDQ,
        not_run=not_run,
    )


def saturation_hint(target: Target, verification: Verification) -> str:
    """Return what to say of a failed check where this CPU's products saturate; "" if they do not.

    Args:
        target: Of the export.
        verification: From `verify_on`.
    """
    if target is not Target.CPU or not verification.saturates:
        return ""
    return (
        f". This processor has no VNNI: products of unsigned and signed bytes saturate at 16 bits, "
        f"so that graph cannot run here; export with --target {Target.CPU_AVX2}, or on a processor "
        f"with VNNI"
    )


@cache
def cpu_saturates() -> bool:
    """Multiply the largest bytes, unsigned by signed, and see whether ONNX Runtime is exact."""
    columns, rows = 64, 32
    graph = GraphBuilder("probe")
    x = graph_value("x", ir.DataType.UINT8, ("m", columns))
    weight = graph.weight("weight", ir.tensor(np.full((columns, rows), 127, np.int8)))
    y = graph.value("MatMulInteger", [x, weight], "MatMulInteger")
    model = graph.build([x], [name_output(y, "y", ir.DataType.INT32, ("m", rows))])
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=[CPU_PROVIDER])
    found = session.run(None, {"x": np.full((4, columns), 255, np.uint8)})[0]
    return bool((found != columns * 255 * 127).any())
