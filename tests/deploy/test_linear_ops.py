from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.checkpoint_reader import ALL, StoredLinear
from deploy.graph_builder import GraphBuilder, graph_value, name_output
from deploy.input_ops import QuantizedInput, quantize_input
from deploy.linear_ops import float_linear, integer_linear, nbits_linear
from deploy.targets import CPU_FORMAT
from rolora.affine import activation_range, weight_range
from rolora.linear import QuantizedLinear
from rolora.packing import pack_int4
from rolora.scheme import FLOAT_INPUT, ActivationSpec, Granularity, WeightSpec

TOKEN, TENSOR, GROUP = Granularity.TOKEN, Granularity.TENSOR, Granularity.GROUP


class StubCheckpoint:
    """What the nodes of a linear ask a checkpoint."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors = tensors

    def array(self, key: str) -> np.ndarray:
        return self.tensors[key]

    def integers(self, linear: StoredLinear) -> np.ndarray:
        return self.tensors[f"{linear.fqn}.integers"]

    def integer_rows(self, linear: StoredLinear, rows: slice) -> np.ndarray:
        return self.integers(linear)[rows]

    def integer_columns(self, linear: StoredLinear, columns: slice) -> np.ndarray:
        return self.integers(linear)[:, columns]

    def part(self, key: str, rows: slice, columns: slice = ALL) -> np.ndarray:
        return self.tensors[key][rows, columns]


class TinyLinear:
    """One random linear, as a checkpoint stores it and as torch runs it."""

    def __init__(
        self,
        fqn: str,
        shape: tuple[int, int],
        weight: WeightSpec,
        activation: ActivationSpec,
        *,
        bias: bool,
        input_scale: float | None = None,
        seed: int = 0,
    ) -> None:
        random = np.random.default_rng(seed)
        low, high = weight_range(weight.bits)
        rows, columns = shape
        self.q = random.integers(low, high, shape, dtype=np.int8, endpoint=True)
        groups = 1 if weight.group_size is None else columns // weight.group_size
        scale_shape = (rows,) if weight.group_size is None else (rows, groups)
        self.scale = random.uniform(0.001, 0.1, scale_shape).astype(np.float32)
        self.bias = random.normal(size=rows).astype(np.float32) if bias else None
        self.stored = StoredLinear(fqn, columns, rows, bias, weight, activation)
        self.module = QuantizedLinear(
            torch.from_numpy(self.q),
            torch.from_numpy(self.scale),
            None if self.bias is None else torch.from_numpy(self.bias),
            weight,
            activation,
            None if input_scale is None else torch.tensor(input_scale),
        )

    def tensors(self) -> dict[str, np.ndarray]:
        four = self.stored.weight.bits == 4
        stored = pack_int4(torch.from_numpy(self.q)).numpy() if four else self.q
        fqn = self.stored.fqn
        tensors = {
            f"{fqn}.weight": stored,
            f"{fqn}.integers": self.q,
            f"{fqn}.weight_scale": self.scale,
        }
        return tensors if self.bias is None else tensors | {f"{fqn}.bias": self.bias}


def run(graph: GraphBuilder, x: ir.Value, outputs: list[ir.Value], given: np.ndarray) -> list:
    typed = [name_output(value, f"y{i}", dtype, ("b", "s", "n")) for i, (value, dtype) in outputs]
    model = graph.build([x], typed)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": given})


def start(columns: int) -> tuple[GraphBuilder, ir.Value]:
    return GraphBuilder("g"), graph_value("x", ir.DataType.FLOAT, ("b", "s", columns))


def run_linears(linears: list[TinyLinear], x: np.ndarray) -> np.ndarray:
    """Run the graph of linears that share an input, float32 [B, S, sum of out_features]."""
    first = linears[0]
    spec = first.stored.activation
    assert spec is not None
    stub = StubCheckpoint({k: v for linear in linears for k, v in linear.tensors().items()})
    stored = [linear.stored for linear in linears]
    graph, value = start(x.shape[-1])
    if first.stored.needs_blocks:
        y = nbits_linear(graph, value, stub, stored, "name")
    else:
        scale = first.module.input_scale
        array = None if scale is None else scale.numpy()
        q = quantize_input(graph, value, spec, array, "name/input")
        y = integer_linear(graph, q, stub, stored, "name")
    return run(graph, value, [(0, (y, ir.DataType.FLOAT))], x)[0]


def run_quantizer(spec: ActivationSpec, scale: float | None, x: np.ndarray) -> tuple:
    """Return the integers that the graph makes of [T, K], and the scale of each token."""
    graph, value = start(x.shape[1])
    array = None if scale is None else np.float32(scale)
    q = quantize_input(graph, value, spec, array, "input")
    outputs = [(0, (q.q, ir.DataType.UINT8))]
    if q.token_scale is not None:
        outputs.append((1, (q.token_scale, ir.DataType.FLOAT)))
    results = run(graph, value, outputs, x[None])
    integers = results[0][0].astype(np.int16) - CPU_FORMAT.zero_point
    if len(results) == 1:
        return integers, np.float32(scale)
    factor = q.static_scale.const_value
    assert factor is not None
    return integers, results[1][0] * factor.numpy()


def reference_quantizer(spec: ActivationSpec, scale: float | None, x: np.ndarray) -> tuple:
    module = QuantizedLinear(
        torch.zeros(1, x.shape[1], dtype=torch.int8),
        torch.ones(1),
        None,
        WeightSpec(8),
        spec,
        None if scale is None else torch.tensor(scale),
    )
    found = module.quantize_input(torch.from_numpy(x))
    return found.q.numpy(), found.scale.numpy()


def ties(scale: float) -> np.ndarray:
    """Return rows of exact multiples of half a scale, in and out of range."""
    halves = np.arange(-300, 301, dtype=np.float32) * np.float32(scale) / 2
    return np.stack([halves, halves[::-1]])


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("scale", [0.25, 0.1, 3e-5])
def test_static_integers_equal_the_reference_at_ties_and_beyond_the_range(
    bits: int, scale: float
) -> None:
    spec = ActivationSpec(bits, TENSOR)
    x = np.concatenate([ties(scale), np.zeros((1, 601), np.float32)])
    found, _ = run_quantizer(spec, scale, x)
    expected, _ = reference_quantizer(spec, scale, x)
    np.testing.assert_array_equal(found, expected)
    assert (found.min(), found.max()) == activation_range(bits)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("clip_ratio", [1.0, 0.9, 0.5])
def test_token_integers_and_scales_equal_the_reference(bits: int, clip_ratio: float) -> None:
    spec = ActivationSpec(bits, TOKEN, clip_ratio)
    random = np.random.default_rng(bits)
    rows = random.normal(size=(64, 48)).astype(np.float32) * np.float32(10.0) ** random.integers(
        -12, 6, (64, 1)
    ).astype(np.float32)
    quant_max = activation_range(bits)[1]
    tied = np.resize(np.arange(-quant_max, quant_max + 0.5, 0.5), 48).astype(np.float32)
    tied[0] = quant_max / clip_ratio  # the scale is 1 now, or next to it
    x = np.concatenate([rows, tied[None]])
    found, scales = run_quantizer(spec, None, x)
    expected, expected_scales = reference_quantizer(spec, None, x)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(found, expected)
    if clip_ratio < 1.0:
        assert (found == quant_max).sum(axis=1)[:64].max() > 1, "nothing saturated"


@settings(max_examples=40)
@given(
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32, allow_nan=False), min_size=4, max_size=4),
    st.sampled_from([4, 6, 8]),
    st.sampled_from([1.0, 0.9]),
)
def test_token_integers_equal_the_reference_for_any_row(
    row: list[float], bits: int, clip_ratio: float
) -> None:
    spec = ActivationSpec(bits, TOKEN, clip_ratio)
    x = np.array([row], np.float32)
    found, scales = run_quantizer(spec, None, x)
    if x.any():
        np.testing.assert_array_equal(found, reference_quantizer(spec, None, x)[0])
    else:  # 0 / 0: whatever the integers are, they stand for 0
        assert not (found * scales).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_token_of_zeros_is_a_row_of_biases(bits: int) -> None:
    linear = TinyLinear("w", (8, 32), WeightSpec(8), ActivationSpec(bits, TOKEN), bias=True)
    x = np.random.default_rng(0).normal(size=(1, 3, 32)).astype(np.float32)
    x[0, 1] = 0
    found = run_linears([linear], x)[0]
    assert linear.module.bias is not None
    np.testing.assert_array_equal(found[1], linear.module.bias.numpy())
    assert np.isfinite(found).all()
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("columns", [48, 1536])
def test_accumulators_equal_int64_even_where_every_product_is_extreme(
    bits: int, columns: int
) -> None:
    """Scales of 1 leave the int32 sums bare; up to 2^24 a float32 holds them exactly."""
    linear = TinyLinear(
        "w", (40, columns), WeightSpec(bits), ActivationSpec(8, TENSOR), bias=False, input_scale=1.0
    )
    linear.scale[:] = 1.0
    low, high = weight_range(bits)
    linear.q[0], linear.q[1], linear.q[2, ::2] = low, high, low
    random = np.random.default_rng(0)
    q = random.integers(-128, 127, (9, columns), endpoint=True)
    q[0], q[1], q[2, ::2] = -128, 127, 127
    found = run_linears([linear], q[None].astype(np.float32))[0]
    exact = q.astype(np.int64) @ linear.q.astype(np.int64).T
    sums = exact[np.abs(exact) < 2**24]
    assert sums.size > 0.9 * exact.size
    np.testing.assert_array_equal(found[np.abs(exact) < 2**24], sums.astype(np.float32))
    np.testing.assert_allclose(found, exact, rtol=2.0**-24)


def test_a_wrong_zero_point_would_show_in_the_accumulators() -> None:
    linear = TinyLinear(
        "w", (8, 16), WeightSpec(8), ActivationSpec(8, TENSOR), bias=False, input_scale=1.0
    )
    linear.scale[:] = 1.0
    graph, x = start(16)
    shifted = graph.value(
        "QuantizeLinear", [x, graph.constant(np.float32(1)), graph.constant(np.uint8(127))], "q"
    )
    q = QuantizedInput(shifted, graph.constant(np.float32(1)), None)
    y = integer_linear(graph, q, StubCheckpoint(linear.tensors()), [linear.stored], "w")
    given = np.arange(-8, 8, dtype=np.float32)[None, None]
    found = run(graph, x, [(0, (y, ir.DataType.FLOAT))], given)[0][0, 0]
    exact = linear.q.astype(np.int64) @ given[0, 0].astype(np.int64)
    np.testing.assert_array_equal(found, exact - linear.q.sum(axis=1, dtype=np.int64))
    assert not np.array_equal(found, exact)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("activation", [ActivationSpec(8, TENSOR), ActivationSpec(4, TOKEN, 0.9)])
def test_linears_side_by_side_equal_the_torch_modules(
    bits: int, activation: ActivationSpec
) -> None:
    scale = 0.05 if activation.granularity is TENSOR else None
    linears = [
        TinyLinear(
            name, (rows, 48), WeightSpec(bits), activation, bias=bias, input_scale=scale, seed=rows
        )
        for name, rows, bias in (("q", 32, True), ("k", 15, False), ("v", 7, True))
    ]
    x = np.random.default_rng(1).normal(size=(2, 5, 48)).astype(np.float32)
    found = run_linears(linears, x)
    expected = torch.cat([linear.module(torch.from_numpy(x)) for linear in linears], dim=-1)
    # Two products and a sum are rounded, in another order: 4 roundings of the largest term.
    bound = 4 * 2.0**-24 * float(expected.abs().max())
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=bound)
    without_bias = found[..., 32:47]
    linears[1].module.bias = torch.full((15,), 0.01)
    assert np.abs(without_bias - linears[1].module(torch.from_numpy(x)).numpy()).max() > bound


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 32])
def test_block_quantized_linears_equal_the_torch_modules(bits: int, group_size: int) -> None:
    activation = ActivationSpec(8, GROUP, group_size=group_size)
    weight = WeightSpec(bits, group_size)
    linears = [
        TinyLinear(name, (rows, 96), weight, activation, bias=bias, seed=rows)
        for name, rows, bias in (("gate", 48, False), ("up", 17, True))
    ]
    x = np.random.default_rng(1).normal(size=(2, 5, 96)).astype(np.float32)
    x[0, 0] = 0.0
    found = run_linears(linears, x)
    expected = torch.cat([linear.module(torch.from_numpy(x)) for linear in linears], dim=-1)
    scale = float(expected.abs().max())
    # The kernel quantizes the input itself, and may round a value next to a tie the other way: one
    # step of a few of the 96 products.
    assert np.abs(found - expected.numpy()).max() < 5e-3 * scale
    assert np.abs(found - expected.numpy()).mean() < 5e-5 * scale
    linears[0].q[3, 5] ^= 8 if bits == 4 else 64
    changed = linears[0].module(torch.from_numpy(x)).numpy()
    assert np.abs(found[..., :48] - changed).max() > 5e-3 * scale


def test_a_float_linear_is_a_matmul_with_its_bias() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(6, 8)).astype(np.float32)
    bias = random.normal(size=6).astype(np.float32)
    stub = StubCheckpoint({"w.weight": weight, "w.bias": bias})
    stored = StoredLinear("w", 8, 6, True, WeightSpec(32), None)
    graph, x = start(8)
    y = float_linear(graph, x, stub, [stored], "w")
    given = random.normal(size=(1, 3, 8)).astype(np.float32)
    found = run(graph, x, [(0, (y, ir.DataType.FLOAT))], given)[0]
    np.testing.assert_allclose(found, given @ weight.T + bias, rtol=1e-5, atol=1e-5)


def test_integer_weights_of_four_bits_take_half_a_byte() -> None:
    linear = TinyLinear(
        "w", (5, 6), WeightSpec(4), ActivationSpec(8, TENSOR), bias=False, input_scale=1.0
    )
    graph, x = start(6)
    q = quantize_input(graph, x, ActivationSpec(8, TENSOR), np.float32(1.0), "i")
    stub = StubCheckpoint({"w.integers": linear.q, "w.weight_scale": linear.scale})
    y = integer_linear(graph, q, stub, [linear.stored], "w")
    model = graph.build([x], [name_output(y, "y", ir.DataType.FLOAT, ("b", "s", 5))])
    tensor = model.graph.initializers["w.weight"].const_value
    assert tensor is not None
    assert len(tensor.tobytes()) == 15
    np.testing.assert_array_equal(tensor.numpy().astype(np.int8), linear.q.T)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_zero_points_are_taken_off_the_product_again(bits: int, bias: bool) -> None:
    spec = ActivationSpec(bits, TOKEN, 0.95, symmetric=False)
    linears = [
        TinyLinear(name, (rows, 24), WeightSpec(4), spec, bias=bias, seed=rows)
        for name, rows in (("a", 5), ("b", 8))
    ]
    x = np.random.default_rng(3).normal(1.5, 1.0, (2, 7, 24)).astype(np.float32)
    x[0, 0], x[0, 1] = 0.0, -np.abs(x[0, 1])
    found = run_linears(linears, x)
    expected = np.concatenate([one.module(torch.from_numpy(x)).numpy() for one in linears], axis=2)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    # The control: with symmetric inputs the same integers mean something else.
    plain = TinyLinear("a", (5, 24), WeightSpec(4), ActivationSpec(bits, TOKEN), bias=bias, seed=5)
    other = plain.module(torch.from_numpy(x)).numpy()
    assert np.abs(other - expected[..., :5]).max() > 1e-3 * np.abs(expected).max()


def test_zero_points_are_taken_off_where_the_weights_of_a_row_are_extreme() -> None:
    spec = ActivationSpec(8, TOKEN, symmetric=False)
    linear = TinyLinear("w", (5, 1536), WeightSpec(8), spec, bias=False)
    linear.q[0], linear.q[1] = weight_range(8)
    x = np.random.default_rng(3).normal(1.5, 1.0, (1, 7, 1536)).astype(np.float32)
    found, expected = run_linears([linear], x), linear.module(torch.from_numpy(x)).numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("group_size", [None, 16, 32])
def test_a_float_input_is_not_rounded(bits: int, group_size: int | None) -> None:
    if bits == 6 and group_size is not None:
        return
    spec = WeightSpec(bits, group_size)
    linear = TinyLinear("w", (9, 64), spec, FLOAT_INPUT, bias=True)
    x = np.random.default_rng(3).normal(size=(1, 5, 64)).astype(np.float32)
    found, expected = run_linears([linear], x), linear.module(torch.from_numpy(x)).numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    rounded = TinyLinear("w", (9, 64), WeightSpec(bits), ActivationSpec(8, TOKEN), bias=True)
    if group_size is None:
        other = rounded.module(torch.from_numpy(x)).numpy()
        assert np.abs(other - expected).max() > 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_inputs_alone_are_the_kernels_blocks(group_size: int, bits: int) -> None:
    spec = ActivationSpec(8, GROUP, group_size=group_size)
    linear = TinyLinear("w", (9, 128), WeightSpec(bits), spec, bias=False)
    x = np.random.default_rng(3).normal(size=(1, 5, 128)).astype(np.float32)
    x[..., 7] *= 50
    found, expected = run_linears([linear], x), linear.module(torch.from_numpy(x)).numpy()
    # The kernel rounds half away from zero, torch half to even, and it multiplies by 1 / s.
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    other = TinyLinear("w", (9, 128), WeightSpec(bits), ActivationSpec(8, TOKEN), bias=False)
    far = other.module(torch.from_numpy(x)).numpy()
    assert np.abs(far - expected).max() > 1e-3 * np.abs(expected).max()
