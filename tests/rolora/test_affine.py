from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rolora.affine import (
    activation_range,
    dequantize,
    quantize,
    quantize_tokens,
    weight_range,
)

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("bits", "activations", "weights"),
    [(8, (-128, 127), (-127, 127)), (6, (-32, 31), (-32, 31)), (4, (-8, 7), (-8, 7))],
)
def test_ranges_are_twos_complement_but_for_8_bit_weights(
    bits: int, activations: tuple[int, int], weights: tuple[int, int]
) -> None:
    assert activation_range(bits) == activations
    assert weight_range(bits) == weights


def test_ties_round_to_even_and_values_outside_saturate() -> None:
    x = torch.tensor([-1e9, -2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 7.5, 1e9])
    q = quantize(x, torch.tensor(1.0), -8, 7)
    assert q.dtype == torch.int8
    assert q.tolist() == [-8, -2, -2, 0, 0, 0, 2, 2, 7, 7]


def test_divides_where_a_reciprocal_rounds_a_tie_the_other_way() -> None:
    steps = torch.arange(1, 127, dtype=torch.float32) + 0.5
    scales = torch.arange(1, 2000, dtype=torch.float32)[:, None] / 977
    x = steps * scales
    exact = torch.round((x.double() / scales.double()).float()).to(torch.int8)
    assert torch.equal(quantize(x, scales, -128, 127), exact)
    by_reciprocal = torch.round(x * (1 / scales)).clamp(-128, 127).to(torch.int8)
    assert not torch.equal(by_reciprocal, exact)  # the control: this data tells them apart


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([4, 6, 8]), st.integers(1, 70), st.floats(-10, 30), st.integers(0, 2**32 - 1)
)
def test_unclipped_tokens_are_within_half_a_step(
    bits: int, width: int, exponent: float, seed: int
) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    scale = quantize_tokens(x, bits, 1.0)[1]
    restored = dequantize(quantize(x, scale, *activation_range(bits)), scale)
    # Quotient and product round once each; both are at most quant_max + 1 steps.
    slack = 2 * EPS * 2 ** (bits - 1)
    assert ((restored.double() - x).abs() <= (0.5 + slack) * scale.double()).all()
    absmax = x.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale, absmax / (2 ** (bits - 1) - 1), rtol=2 * EPS, atol=1e-10)


def test_a_clip_ratio_saturates_the_largest_and_refines_the_rest() -> None:
    x = torch.tensor([[10.0, 1.0, -0.3]])
    full, clipped = (quantize_tokens(x, 4, ratio)[1] for ratio in (1.0, 0.5))
    torch.testing.assert_close(clipped, full / 2, rtol=2 * EPS, atol=0)
    assert quantize(x, clipped, -8, 7).tolist() == [[7, 1, 0]]
    assert quantize(x, full, -8, 7).tolist() == [[7, 1, 0]]
    restored = [float(dequantize(torch.tensor(7), scale)) for scale in (full, clipped)]
    assert restored == pytest.approx([10.0, 5.0])


def test_a_token_of_zeros_stays_zeros() -> None:
    x = torch.zeros(2, 5)
    x[0, 0] = 1.0
    scale = quantize_tokens(x, 8, 1.0)[1]
    assert float(scale[1]) == pytest.approx(1 / 127)
    assert not quantize(x, scale, -128, 127)[1].any()


def test_the_last_dimension_shares_a_scale_and_no_other() -> None:
    x = torch.randn(2, 3, 4)
    assert quantize_tokens(x, 8, 1.0)[1].shape == (2, 3, 1)
    changed = x.clone()
    changed[1, 2] *= 5
    same = quantize_tokens(changed, 8, 1.0)[1] == quantize_tokens(x, 8, 1.0)[1]
    assert same.flatten().tolist() == [True] * 5 + [False]
