from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rolora import linear
from rolora.linear import QuantizedEmbedding, QuantizedLinear, integer_matmul
from rolora.rtn import quantize_weight
from rolora.scheme import ActivationSpec, Granularity, WeightSpec

EPS = torch.finfo(torch.float32).eps
LARGE_K = 9001
"""9001 * 128 * 128 is above 2^27, so that float32 sums would lose three bits; and it is odd."""


def integers(shape: tuple[int, ...], seed: int, low: int = -128, high: int = 127) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=generator)


def exact_product(q_x: Tensor, q_w: Tensor) -> Tensor:
    return q_x.long() @ q_w.long().t()


@pytest.fixture(params=["native", "fallback"])
def _both_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with the product of a CPU with VNNI (if this is one) and of one without."""
    if request.param == "fallback":
        monkeypatch.setattr(linear, "_native_product_is_exact", lambda: False)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(1, 20),
    st.sampled_from([0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025]),
    st.sampled_from([(-128, 127), (-128, -128), (127, 127), (-8, 7)]),
    st.integers(0, 2**32 - 2),
)
def test_the_product_is_exact(
    tokens: int, out: int, columns: int, limits: tuple[int, int], seed: int
) -> None:
    q_x, q_w = integers((tokens, columns), seed, *limits), integers((out, columns), seed + 1)
    product = integer_matmul(q_x, q_w)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), exact_product(q_x, q_w))


@pytest.mark.usefixtures("_both_products")
@pytest.mark.parametrize("columns", [1, 2, 1024, 1025, LARGE_K])
@pytest.mark.parametrize("value", [-128, 127])
def test_extremes_are_exact_where_float32_would_not_be(columns: int, value: int) -> None:
    q_x = torch.full((5, columns), value, dtype=torch.int8)
    q_x[1] = -128
    q_x[2] = 127
    q_x[3, 0] = 3  # an odd sum, which float32 cannot hold
    q_w = torch.full((3, columns), -128, dtype=torch.int8)
    q_w[1:] = 127
    q_w[2, ::2] = -128
    exact = exact_product(q_x, q_w)
    assert torch.equal(integer_matmul(q_x, q_w).long(), exact)
    if columns == LARGE_K:
        assert not torch.equal((q_x.float() @ q_w.float().t()).long(), exact)


@pytest.mark.usefixtures("_both_products")
def test_strided_operands_are_read_right() -> None:
    wide_x, wide_w = integers((8, 96), 0), integers((7, 96), 1)
    for columns in (slice(32, 64), slice(0, 96, 3)):
        q_x, q_w = wide_x[:, columns], wide_w[:, columns]
        assert torch.equal(integer_matmul(q_x, q_w).long(), exact_product(q_x, q_w))
    assert torch.equal(
        integer_matmul(wide_x.t(), integers((7, 8), 2)).long(),
        exact_product(wide_x.t(), integers((7, 8), 2)),
    )


def test_a_product_that_saturates_at_16_bits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = linear._native_product_is_exact.__wrapped__

    def saturating(q_x: Tensor, q_w: Tensor) -> Tensor:
        """Add pairs of products in 16 bits, the left operand made unsigned, as without VNNI."""
        shifted = q_x.int() + 128
        pairs = (shifted[:, :, None] * q_w.int()).reshape(len(q_x), -1, 2, q_w.shape[1]).sum(2)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(1).int() - 128 * q_w.int().sum(0)

    monkeypatch.setattr(torch, "_int_mm", lambda q_x, q_w: exact_product(q_x, q_w.t()).int())
    assert probe()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not probe()


@pytest.mark.slow
def test_a_cpu_without_vnni_multiplies_exactly() -> None:
    # There the native kernel saturates at 16 bits; oneDNN can be told to do as on such a CPU.
    script = """
import torch
from rolora.linear import integer_matmul
torch.set_num_threads(1)
q = torch.tensor([[-128], [127]], dtype=torch.int8).repeat(9, 200)
assert torch.equal(integer_matmul(q, q).long(), q.long() @ q.long().t())
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def make_linear(
    granularity: Granularity,
    q_w: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    group_size: int | None = None,
    bits: int = 8,
    clip: float = 1.0,
    input_scale: float = 2.0**-6,
) -> QuantizedLinear:
    group = group_size if granularity is Granularity.GROUP else None
    static = torch.tensor(input_scale) if granularity is Granularity.TENSOR else None
    activation = ActivationSpec(bits, granularity, clip, group)
    return QuantizedLinear(q_w, scale, bias, WeightSpec(8, group), activation, static)


@pytest.mark.usefixtures("_both_products")
def test_per_tensor_is_the_exact_sum_rounded_once() -> None:
    q_x, q_w = integers((6, LARGE_K), 0), integers((5, LARGE_K), 1)
    q_x[0], q_w[0], q_w[1] = -128, -128, 127
    # Sums that rise far above 2^24 and come back.
    q_x[1], q_w[2] = integers((2, LARGE_K), 2, 64)
    q_w[2, LARGE_K // 2 :] *= -1
    # Powers of two, so that neither quantizing nor scaling rounds.
    module = make_linear(Granularity.TENSOR, q_w, 2.0 ** torch.arange(-2, 3))
    x = (q_x.float() * 2.0**-6).reshape(2, 3, LARGE_K)
    y = module(x)
    exact = exact_product(q_x, q_w).double() * 2.0**-6 * 2.0 ** torch.arange(-2, 3)
    assert y.shape == (2, 3, 5)
    assert torch.equal(y.reshape(6, 5), exact.float())
    wrong = (q_x.float() @ q_w.float().t()) * 2.0**-6 * 2.0 ** torch.arange(-2, 3)
    assert not torch.equal(wrong, exact.float())  # the control: sums in float32 are another result


def reference(module: QuantizedLinear, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return y and the sum of the magnitudes that make it up, both float64, from the formula."""
    spec = module.activation
    quant_max = 2 ** (spec.bits - 1) - 1
    groups = x.reshape(len(x), -1, width)
    factor = torch.tensor(spec.clip_ratio / quant_max)
    scale = (groups.abs().amax(-1, keepdim=True) * factor).clamp(min=1e-10)
    if module.input_scale is not None:
        scale = module.input_scale.expand(len(x), 1, 1)
    q_x = torch.round(groups / scale).clamp(-quant_max - 1, quant_max).long()
    q_w = module.weight.long().reshape(module.out_features, -1, width)
    product = torch.einsum("tgk,ngk->tgn", q_x, q_w).double()
    weight_scale = module.weight_scale.double().reshape(module.out_features, -1)
    terms = product * scale.double() * weight_scale.t()
    bias = 0.0 if module.bias is None else module.bias.double()
    return terms.sum(1) + bias, terms.abs().sum(1) + abs(bias)


@pytest.mark.usefixtures("_both_products")
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize("granularity", [Granularity.TOKEN, Granularity.TENSOR, Granularity.GROUP])
def test_each_granularity_follows_the_formula(
    granularity: Granularity, bits: int, clip: float
) -> None:
    columns, width = 96, 32 if granularity is Granularity.GROUP else 96
    generator = torch.Generator().manual_seed(bits)
    scale = torch.rand(5, columns // width, generator=generator) + 0.1
    scale = scale if granularity is Granularity.GROUP else scale[:, 0]
    bias = torch.randn(5, generator=generator)
    module = make_linear(granularity, integers((5, columns), 2), scale, bias, width, bits, clip)
    x = torch.randn(4, columns, generator=generator) * torch.tensor([[1e-3], [1.0], [0.0], [50.0]])
    x[1, 40] = 30.0  # an outlier, that only its own group should feel
    expected, magnitude = reference(module, x, width)
    y = module(x)
    # Converting, two products and one sum a group round, and the bias.
    bound = (3 + columns // width + 1) * EPS * magnitude
    assert ((y.double() - expected).abs() <= bound).all()
    torch.testing.assert_close(y[2], bias, rtol=0, atol=0)  # a token of zeros
    moved = x.clone()
    moved[1, 40] = 15.0
    assert ((module(moved) - y).abs() > bound).any(dim=1).tolist() == [
        False,
        granularity is not Granularity.TENSOR,  # there both saturate
        False,
        False,
    ]


@pytest.mark.parametrize("granularity", [Granularity.TOKEN, Granularity.GROUP])
def test_tokens_do_not_feel_each_other(granularity: Granularity) -> None:
    scale = torch.rand(5, 2) if granularity is Granularity.GROUP else torch.rand(5)
    module = make_linear(granularity, integers((5, 32), 2), scale, None, 16)
    x = torch.randn(7, 32)
    alone = torch.cat([module(token[None]) for token in x])
    assert torch.equal(module(x), alone)


def test_a_grouped_weight_dequantizes_group_by_group() -> None:
    q_w, scale = integers((3, 6), 0), torch.rand(3, 2)
    module = make_linear(Granularity.GROUP, q_w, scale, group_size=3)
    expected = torch.cat([q_w[:, :3] * scale[:, :1], q_w[:, 3:] * scale[:, 1:]], dim=1)
    assert torch.equal(module.dequantized_weight(), expected)
    plain = make_linear(Granularity.TOKEN, q_w, scale[:, 0])
    assert torch.equal(plain.dequantized_weight(), q_w * scale[:, :1])
    assert not torch.equal(plain.dequantized_weight(), expected)


def test_groups_of_a_weight_go_with_one_static_scale_of_the_input() -> None:
    q_w, scale, static = integers((5, 96), 2), torch.rand(5, 3) + 0.1, torch.tensor(2.0**-6)
    bias = torch.randn(5)
    module = QuantizedLinear(
        q_w, scale, bias, WeightSpec(8, 32), ActivationSpec(8, Granularity.TENSOR), static
    )
    x = torch.randn(4, 96)
    expected, magnitude = reference(module, x, 32)
    assert ((module(x).double() - expected).abs() <= 8 * EPS * magnitude).all()
    module.weight_scale[:, 1] *= 1.01  # the control: a group's scale counts
    assert ((module(x).double() - expected).abs() > 8 * EPS * magnitude).any()


def test_an_input_scale_and_the_granularity_must_agree() -> None:
    q_w, scale, weight = integers((2, 4), 0), torch.ones(2), WeightSpec(8)
    with pytest.raises(ValueError, match="tensor granularity needs one, got none"):
        QuantizedLinear(q_w, scale, None, weight, ActivationSpec(8, Granularity.TENSOR))
    with pytest.raises(ValueError, match="token granularity takes none, got one"):
        QuantizedLinear(
            q_w, scale, None, weight, ActivationSpec(8, Granularity.TOKEN), torch.tensor(1.0)
        )


@pytest.mark.parametrize(
    ("weight_groups", "activation"),
    [
        (2, ActivationSpec(8, Granularity.TOKEN)),
        (2, ActivationSpec(8, Granularity.GROUP, group_size=4)),
    ],
)
def test_weight_and_input_must_have_the_same_groups(
    weight_groups: int | None, activation: ActivationSpec
) -> None:
    with pytest.raises(ValueError, match="groups: expected the same for weight and input"):
        QuantizedLinear(
            integers((2, 4), 0), torch.ones(2, 2), None, WeightSpec(8, weight_groups), activation
        )


def test_the_printed_form_names_bits_and_granularity() -> None:
    module = make_linear(Granularity.TOKEN, integers((2, 4), 0), torch.ones(2))
    assert repr(module) == (
        "QuantizedLinear(in=4, out=2, weight=8 bits per channel, input=8 bits per token)"
    )


def test_a_4_bit_embedding_has_a_scale_for_each_group() -> None:
    before = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    before[:, 32:] *= 8
    spec = WeightSpec(4, 32)
    q, scale = quantize_weight(before, spec, clip_search=False)
    table = QuantizedEmbedding(q, scale, spec)
    steps = scale.repeat_interleave(32, dim=1)
    assert ((table(torch.arange(9)) - before).abs() <= 0.5001 * steps).all()
    one_scale, _ = quantize_weight(before, WeightSpec(4), clip_search=False)
    assert not torch.equal(q[:, :32], one_scale[:, :32])  # the control: groups matter
    assert table(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 64)


def test_an_embedding_restores_the_rows_asked_for() -> None:
    q, scale = integers((11, 6), 0), torch.rand(11)
    ids = torch.tensor([[0, 10, 3], [3, 3, 1]])
    rows = QuantizedEmbedding(q, scale, WeightSpec(8))(ids)
    assert rows.shape == (2, 3, 6)
    assert torch.equal(rows, (q.float() * scale[:, None])[ids])
