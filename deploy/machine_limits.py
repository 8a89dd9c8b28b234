"""What this machine can do at most: bytes read per second, integer products per second.

The one bounds decoding, which reads every weight for each token; the other bounds prompts, whose
every weight meets hundreds of tokens. Both are measured, best of several tries, with as many
threads as the model has: a sum over a buffer that no cache holds, and one large matrix product with
the kernel of the exported graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from deploy.graph_builder import MICROSOFT, GraphBuilder, graph_value, name_output

TRIES = 7
CACHE_FACTOR = 4
"""How many times larger than the last cache the buffer is."""
LEAST_BUFFER_BYTES = 256 * 2**20
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ROWS, COLUMNS = 512, 2048


@dataclass(frozen=True)
class MachineLimits:
    """Measured bounds."""

    threads: int
    read_bytes_per_s: float
    products_per_s: float
    """Multiply-adds of bytes, summed in 32 bits."""


def measure_limits(threads: int) -> MachineLimits:
    """Measure both, in about a second."""
    return MachineLimits(threads, read_bandwidth(threads), integer_products(threads))


def read_bandwidth(threads: int, buffer_bytes: int | None = None) -> float:
    """Return how many bytes per second a number of threads read.

    Args:
        threads: How many.
        buffer_bytes: Size of what is read; None is four times the last cache, 256 MiB at least.
    """
    size = buffer_bytes or max(CACHE_FACTOR * last_cache_bytes(), LEAST_BUFFER_BYTES)
    buffer = torch.ones(size // 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return buffer.numel() * 4 / _least_seconds(buffer.sum)
    finally:
        torch.set_num_threads(before)


def last_cache_bytes(caches: Path = CACHES) -> int:
    """Return the size of the largest cache that Linux names, or 0 elsewhere."""
    units = {"K": 2**10, "M": 2**20}
    sizes = [path.read_text(encoding="ascii").strip() for path in caches.glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=0)


def integer_products(threads: int, rows: int = ROWS, columns: int = COLUMNS) -> float:
    """Return how many multiply-adds per second MatMulIntegerToFloat reaches.

    Args:
        threads: How many.
        rows: Of the left matrix, uint8 [rows, columns].
        columns: The right matrix is int8 [columns, columns].
    """
    graph = GraphBuilder("product")
    generator = np.random.default_rng(0)
    x = graph_value("x", ir.DataType.UINT8, (rows, columns))
    weight = generator.integers(-127, 128, (columns, columns), dtype=np.int8)
    one, zero = graph.constant(np.float32(1.0)), graph.constant(np.uint8(128))
    scales = graph.constant(np.ones(columns, np.float32))
    held = graph.weight("weight", ir.tensor(weight))
    y = graph.value(
        "MatMulIntegerToFloat", [x, held, one, scales, zero], "product", domain=MICROSOFT
    )
    model = graph.build([x], [name_output(y, "y", ir.DataType.FLOAT, (rows, columns))])
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    inputs = {"x": generator.integers(0, 256, (rows, columns), dtype=np.uint8)}
    return rows * columns**2 / _least_seconds(lambda: session.run(None, inputs))


def _least_seconds(work: Callable[[], object]) -> float:
    """Return the least time of several tries, after one that warms up."""
    times = []
    for _ in range(TRIES + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])
