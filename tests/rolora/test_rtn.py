from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rolora import rtn
from rolora.affine import weight_range
from rolora.rtn import quantize_weight
from rolora.scheme import WeightSpec

EPS = torch.finfo(torch.float32).eps


def heavy_tailed(rows: int, columns: int, seed: int) -> Tensor:
    """Return weights with outliers, so that clipping pays, and rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-6, 7, (rows, 1), generator=generator)
    return torch.randn(rows, columns, generator=generator) ** 3 * size


def restore(q: Tensor, scale: Tensor) -> Tensor:
    """Return float64 [out, in] without the code under test."""
    by_group = scale.double().reshape(len(q), -1)
    return q.double() * by_group.repeat_interleave(q.shape[1] // by_group.shape[1], dim=1)


cases = given(
    st.sampled_from([4, 6, 8]),
    st.sampled_from([None, 1, 2, 5]),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)


@settings(max_examples=60, deadline=None)
@cases
def test_without_clipping_no_weight_moves_more_than_half_a_step(
    bits: int, group_size: int | None, rows: int, groups: int, seed: int
) -> None:
    weight = heavy_tailed(rows, groups * (group_size or 3), seed)
    q, scale = quantize_weight(weight, WeightSpec(bits, group_size), clip_search=False)
    width = group_size or weight.shape[1]
    absmax = weight.reshape(-1, width).abs().amax(1)
    torch.testing.assert_close(
        scale.flatten(), absmax / weight_range(bits)[1], rtol=EPS, atol=1e-30
    )
    half_step = 0.5 * restore(torch.ones_like(q), scale)
    # The quotient rounds once, and is at most quant_max + 1 steps.
    slack = 1 + 2 * EPS * 2**bits
    assert ((restore(q, scale) - weight).abs() <= half_step * slack).all()
    quant_min, quant_max = weight_range(bits)
    assert quant_min <= int(q.min())
    assert int(q.max()) <= quant_max


@settings(max_examples=60, deadline=None)
@cases
def test_the_clip_search_is_never_worse_than_none(
    bits: int, group_size: int | None, rows: int, groups: int, seed: int
) -> None:
    weight = heavy_tailed(rows, groups * (group_size or 7), seed)
    spec = WeightSpec(bits, group_size)
    errors = []
    for clip_search in (False, True):
        q, scale = quantize_weight(weight, spec, clip_search=clip_search)
        shape = (-1, group_size or weight.shape[1])
        errors.append((restore(q, scale) - weight).square().reshape(shape).sum(1))
    # The search compares float32 sums of `width` squares.
    assert (errors[1] <= errors[0] * (1 + 4 * EPS * shape[1]) + 1e-30).all()


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_clip_search_finds_the_best_ratio_it_may_try(bits: int) -> None:
    weight = heavy_tailed(20, 200, seed=bits)
    unclipped = quantize_weight(weight, WeightSpec(bits), clip_search=False)
    found = quantize_weight(weight, WeightSpec(bits), clip_search=True)
    errors = []
    for ratio in torch.arange(0.3 if bits == 4 else 0.6 if bits == 6 else 0.8, 1.001, 0.02):
        scale = unclipped[1].double()[:, None] * ratio
        q = torch.round(weight / scale).clamp(*weight_range(bits))
        errors.append((q * scale - weight).square().sum(1))
    best = torch.stack(errors).amin(0)
    got = (restore(*found) - weight).square().sum(1)
    torch.testing.assert_close(got, best, rtol=1e-3, atol=0)
    without = (restore(*unclipped) - weight).square().sum(1)
    # The control: with coarse codes clipping pays here.
    assert bits == 8 or float((got / without).mean()) < 0.99


def test_groups_are_rounded_as_rows_of_their_own() -> None:
    weight = heavy_tailed(5, 64, seed=1)
    q, scale = quantize_weight(weight, WeightSpec(4, 16), clip_search=True)
    assert q.shape == (5, 64)
    assert scale.shape == (5, 4)
    for group in range(4):
        columns = slice(16 * group, 16 * group + 16)
        alone = quantize_weight(weight[:, columns], WeightSpec(4), clip_search=True)
        assert torch.equal(q[:, columns], alone[0])
        assert torch.equal(scale[:, group], alone[1])


def test_rows_of_zeros_stay_zeros() -> None:
    weight = torch.randn(4, 6)
    weight[[0, 3]] = 0.0
    q, scale = quantize_weight(weight, WeightSpec(4), clip_search=True)
    assert not q[[0, 3]].any()
    assert scale[[0, 3]].tolist() == [1.0, 1.0]
    assert q[[1, 2]].any(dim=1).all()


@pytest.mark.parametrize("clip_search", [False, True])
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e20, 3e38])
def test_the_ends_of_float32_give_a_positive_finite_scale(size: float, clip_search: bool) -> None:
    weight = torch.tensor([[size, -size / 3, 0.0]])
    q, scale = quantize_weight(weight, WeightSpec(8), clip_search=clip_search)
    assert 0 < float(scale) < float("inf")
    # 8 bits may be clipped to 0.8 of the largest value.
    assert ((restore(q, scale) - weight).abs() <= max(0.21 * size, 1e-30)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("group_size", [None, 2])
def test_a_weight_that_is_not_finite_is_refused(bad: float, group_size: int | None) -> None:
    weight = torch.randn(3, 4)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_weight(weight, WeightSpec(8, group_size), clip_search=True)


def test_shapes_that_do_not_fit_are_refused_with_their_numbers() -> None:
    with pytest.raises(ValueError, match="group size 16 does not divide the 24 input columns"):
        quantize_weight(torch.randn(2, 24), WeightSpec(4, 16), clip_search=False)
    with pytest.raises(ValueError, match=r"\[out, in\], got shape \(3,\)"):
        quantize_weight(torch.randn(3), WeightSpec(4), clip_search=False)


@pytest.mark.parametrize("elements", [1, 24, 50, 51, 10**6])
@pytest.mark.parametrize("group_size", [None, 8])
def test_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, elements: int, group_size: int | None
) -> None:
    weight = heavy_tailed(11, 24, seed=3)
    spec = WeightSpec(4, group_size)
    expected = quantize_weight(weight, spec, clip_search=True)
    monkeypatch.setattr(rtn, "_CHUNK_ELEMENTS", elements)
    seen = []
    inner = rtn._round_rows

    def count(rows: Tensor, bits: int, ratios: list[float]) -> tuple[Tensor, Tensor]:
        seen.append(rows.numel())
        return inner(rows, bits, ratios)

    monkeypatch.setattr(rtn, "_round_rows", count)
    got = quantize_weight(weight, spec, clip_search=True)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert sum(seen) == weight.numel()
    assert max(seen) <= max(elements, group_size or 24)
    assert len(seen) > 1 or elements == 10**6


def test_a_bad_value_in_a_late_chunk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtn, "_CHUNK_ELEMENTS", 8)
    weight = torch.randn(9, 4)
    weight[8, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quantize_weight(weight, WeightSpec(8), clip_search=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_as_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 8).to(dtype)
    expected = quantize_weight(weight.float(), WeightSpec(4), clip_search=True)
    got = quantize_weight(weight, WeightSpec(4), clip_search=True)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert got[1].dtype == torch.float32


def test_the_callers_weight_is_left_alone() -> None:
    weight = torch.randn(3, 8)
    before = weight.clone()
    quantize_weight(weight, WeightSpec(4), clip_search=True)
    assert torch.equal(weight, before)
