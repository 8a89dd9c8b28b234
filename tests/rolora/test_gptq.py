from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rolora import gptq
from rolora.affine import weight_range
from rolora.gptq import Gptq
from rolora.rtn import quantize_weight
from rolora.scheme import WeightSpec

EPS = torch.finfo(torch.float32).eps


def correlated_inputs(
    columns: int, seed: int, tokens: int = 300, rank: int | None = None
) -> Tensor:
    """Return inputs [tokens, columns] whose columns share causes and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, rank or columns // 3 + 1, generator=generator)
    x = causes @ torch.randn(causes.shape[1], columns, generator=generator)
    if rank is None:
        x += 0.3 * torch.randn(x.shape, generator=generator)
    return x * torch.rand(columns, generator=generator).mul(3).exp()


def moments(x: Tensor) -> Tensor:
    return (x.double().t() @ x.double()).float()


def random_weight(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def spread(scale: Tensor, columns: int) -> Tensor:
    by_group = scale.double().reshape(len(scale), -1)
    return by_group.repeat_interleave(columns // by_group.shape[1], dim=1)


def output_error(weight: Tensor, q: Tensor, scale: Tensor, hessian: Tensor) -> float:
    """Return tr((W - Q) H (W - Q)^T) / tr(W H W^T) in float64."""
    change = weight.double() - q.double() * spread(scale, weight.shape[1])
    inner = hessian.double()
    energy = torch.einsum("ri,ij,rj->", weight.double(), inner, weight.double())
    return float(torch.einsum("ri,ij,rj->", change, inner, change) / energy)


def slow_reference(
    weight: Tensor, hessian: Tensor, scale: Tensor, bits: int, *, act_order: bool = True
) -> Tensor:
    """Round one column after the other in float64, without Cholesky factors or blocks.

    After each column its row and column are eliminated from H^-1 (Optimal Brain Quantization,
    arXiv:2208.11580, of which GPTQ is the fast form).
    """
    wide, scale = weight.double().clone(), spread(scale, weight.shape[1])
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.inv(damped)
    order = list(range(len(hessian)))
    if act_order:
        order.sort(key=lambda column: -float(hessian[column, column]))
    q = torch.zeros(weight.shape, dtype=torch.int8)
    for column in order:
        rounded = torch.round(wide[:, column] / scale[:, column]).clamp(*weight_range(bits))
        q[:, column] = rounded.to(torch.int8)
        error = (wide[:, column] - rounded * scale[:, column]) / inverse[column, column]
        wide -= torch.outer(error, inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # eliminated: its row and column are 0, it is not met again
    return q


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("clip_search", [False, True])
@pytest.mark.parametrize("block", [7, 128])
def test_integers_are_those_of_the_slow_form(
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    group_size: int | None,
    clip_search: bool,
    block: int,
) -> None:
    monkeypatch.setattr(gptq, "_BLOCK_COLUMNS", block)
    weight, hessian = random_weight(6, 48, bits), moments(correlated_inputs(48, bits))
    result = Gptq(hessian).round(weight, WeightSpec(bits, group_size), clip_search=clip_search)
    assert result.error < result.rtn_error  # so this is not round-to-nearest
    assert torch.equal(result.q, slow_reference(weight, hessian, result.scale, bits))
    unordered = slow_reference(weight, hessian, result.scale, bits, act_order=False)
    assert not torch.equal(result.q, unordered)  # the control: the order shows


def test_blocks_of_the_real_size_carry_their_errors_on() -> None:
    weight, hessian = random_weight(4, 300, 0), moments(correlated_inputs(300, 0, tokens=900))
    result = Gptq(hessian).round(weight, WeightSpec(4), clip_search=True)
    expected = slow_reference(weight, hessian, result.scale, 4)
    # Over 300 columns a tie may fall the other way in float32; then what follows differs a little.
    assert float((result.q != expected).double().mean()) < 0.02
    slow_error = output_error(weight, expected, result.scale, hessian)
    assert result.error == pytest.approx(slow_error, rel=0.02)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([4, 6, 8]),
    st.sampled_from([None, 8]),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["correlated", "independent", "one token", "dead columns"]),
    st.integers(0, 2**32 - 2),
)
def test_the_output_error_is_never_above_round_to_nearest(
    bits: int,
    group_size: int | None,
    rows: int,
    groups: int,
    clip_search: bool,
    kind: str,
    seed: int,
) -> None:
    columns = 8 * groups
    weight, x = random_weight(rows, columns, seed), correlated_inputs(columns, seed + 1)
    if kind == "independent":
        x = random_weight(300, columns, seed + 1)
    elif kind == "one token":
        x = x[:1]
    elif kind == "dead columns":
        x[:, ::3] = 0.0
    hessian, spec = moments(x), WeightSpec(bits, group_size)
    nearest, scale = quantize_weight(weight, spec, clip_search=clip_search)
    result = Gptq(hessian).round(weight, spec, clip_search=clip_search)
    assert torch.equal(result.scale, scale)
    quant_min, quant_max = weight_range(bits)
    assert quant_min <= int(result.q.min())
    assert int(result.q.max()) <= quant_max
    error, nearest_error = (output_error(weight, q, scale, hessian) for q in (result.q, nearest))
    assert result.error <= result.rtn_error
    # Both are compared as float32 sums of columns^2 terms, as large as those of the weight's norm
    # and the largest moment allow.
    change = weight.double() - nearest.double() * spread(scale, columns)
    magnitude = float(change.square().sum() * hessian.double().diagonal().sum())
    energy = torch.einsum("ri,ij,rj->", weight.double(), hessian.double(), weight.double())
    slack = 4 * columns * EPS * magnitude / float(energy)
    assert error <= nearest_error + slack
    assert result.error == pytest.approx(error, rel=1e-3, abs=slack)
    assert result.rtn_error == pytest.approx(nearest_error, rel=1e-3, abs=slack)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
def test_correlated_inputs_let_columns_make_up_for_each_other(
    bits: int, group_size: int | None
) -> None:
    weight, x = random_weight(16, 64, 0), correlated_inputs(64, 1)
    spec = WeightSpec(bits, group_size)
    result = Gptq(moments(x)).round(weight, spec, clip_search=False)
    assert result.error < 0.5 * result.rtn_error
    wanted, nearest = (x @ weight.t()).double(), quantize_weight(weight, spec, clip_search=False)[0]
    wide = spread(result.scale, 64)
    errors = [
        float((x.double() @ (q * wide).t() - wanted).square().sum()) for q in (result.q, nearest)
    ]
    assert errors[0] < 0.5 * errors[1]  # measured on the outputs themselves


def test_what_is_worse_than_round_to_nearest_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = random_weight(4, 24, 0), moments(correlated_inputs(24, 1))
    monkeypatch.setattr(gptq, "_round_columns", lambda wide, *_: torch.zeros_like(wide).char())
    result = Gptq(hessian).round(weight, WeightSpec(4), clip_search=True)
    assert torch.equal(result.q, quantize_weight(weight, WeightSpec(4), clip_search=True)[0])
    assert 0 < result.error == result.rtn_error < 1


def test_independent_inputs_give_nothing_to_gain() -> None:
    weight = random_weight(16, 64, 0)
    hessian = torch.diag(torch.rand(64) + 0.5)
    result = Gptq(hessian).round(weight, WeightSpec(4), clip_search=True)
    assert torch.equal(result.q, quantize_weight(weight, WeightSpec(4), clip_search=True)[0])
    assert result.error == result.rtn_error


def test_dead_columns_are_rounded_to_nearest_and_disturb_no_other() -> None:
    weight, x = random_weight(8, 40, 0), correlated_inputs(40, 1)
    dead = torch.arange(40) % 5 == 2
    x[:, dead] = 0.0
    result = Gptq(moments(x)).round(weight, WeightSpec(4), clip_search=False)
    nearest, scale = quantize_weight(weight, WeightSpec(4), clip_search=False)
    assert torch.equal(result.q[:, dead], nearest[:, dead])
    assert not torch.equal(result.q[:, ~dead], nearest[:, ~dead])
    assert torch.equal(result.q, slow_reference(weight, moments(x), scale, 4))


@pytest.mark.parametrize("rank", [1, 5])
def test_a_rank_deficient_hessian_is_damped(rank: int) -> None:
    weight, x = random_weight(8, 40, 0), correlated_inputs(40, 1, tokens=20, rank=rank)
    result = Gptq(moments(x)).round(weight, WeightSpec(4), clip_search=True)
    # So few directions leave the columns much room to make up for each other.
    assert result.error < 0.3 * result.rtn_error
    assert result.error == pytest.approx(
        output_error(weight, result.q, result.scale, moments(x)), rel=0.05
    )


def test_damping_is_raised_until_the_hessian_factorizes() -> None:
    hessian = moments(correlated_inputs(24, 1))
    mean = float(hessian.diagonal().mean())
    shifted = hessian - (float(torch.linalg.eigvalsh(hessian)[0]) + 0.5 * mean) * torch.eye(24)
    weight = random_weight(4, 24, 0)
    result = Gptq(shifted).round(weight, WeightSpec(4), clip_search=True)
    assert result.error <= result.rtn_error
    with pytest.raises(ValueError, match="size 24 stays singular with 10 on its diagonal"):
        Gptq(-1e3 * torch.eye(24)).round(weight, WeightSpec(4), clip_search=True)


def test_group_scales_stay_with_their_columns() -> None:
    weight, x = random_weight(4, 64, 0), correlated_inputs(64, 1)
    weight *= torch.tensor([1e-3, 1.0, 30.0, 0.1]).repeat_interleave(16)
    hessian = moments(x)
    assert not torch.equal(hessian.diagonal().argsort(descending=True), torch.arange(64))
    result = Gptq(hessian).round(weight, WeightSpec(4, 16), clip_search=False)
    absmax = weight.reshape(4, 4, 16).abs().amax(2)
    torch.testing.assert_close(result.scale, absmax / 7, rtol=EPS, atol=0)
    assert torch.equal(result.q, slow_reference(weight, hessian, result.scale, 4))
    wrong = slow_reference(weight, hessian, result.scale.flip(1), 4)
    assert not torch.equal(result.q, wrong)


def drifted(x: Tensor, seed: int, share: float = 0.3) -> Tensor:
    """Return inputs that a quantized model might have where the float one has `x`."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return 0.9 * x + share * x.std(dim=0) * noise


def test_the_aim_is_a_share_of_the_way_to_the_best_weight() -> None:
    x = correlated_inputs(24, 3)
    own = drifted(x, 1)
    weight, hessian = random_weight(5, 24, 0), moments(own)
    cross = (x.double().t() @ own.double()).float()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(24)
    best = weight + weight.double() @ (cross - hessian).double() @ torch.linalg.inv(damped)
    for share in (0.0, 0.5, 1.0):
        result = Gptq(hessian, cross, share).round(weight, WeightSpec(4), clip_search=False)
        aim = (weight + share * (best - weight)).float()
        expected = slow_reference(aim, hessian, result.scale, 4)
        # A tie may fall the other way in float32.
        assert float((result.q != expected).double().mean()) < 0.02
        assert result.error == pytest.approx(
            output_error(aim, result.q, result.scale, hessian), rel=1e-3
        )


def test_the_aim_brings_the_output_nearer_to_the_float_models() -> None:
    x = correlated_inputs(48, 5)
    own = drifted(x, 2)
    weight, hessian = random_weight(6, 48, 1), moments(own)
    cross = (x.double().t() @ own.double()).float()

    def distance(result: gptq.GptqResult) -> float:
        wide = (result.q.double() * spread(result.scale, 48)).float()
        return float((x @ weight.t() - own @ wide.t()).square().sum())

    spec = WeightSpec(4)
    with_aim = Gptq(hessian, cross).round(weight, spec, clip_search=True)
    without = Gptq(hessian).round(weight, spec, clip_search=True)
    assert distance(with_aim) < 0.9 * distance(without)
    wide = [Gptq(hessian, c).round(weight, WeightSpec(8), clip_search=True) for c in (cross, None)]
    assert torch.equal(wide[0].q, wide[1].q)  # with 8 bits the weight itself is aimed at
    # Where nothing drifted there is nothing to make up for.
    same = Gptq(hessian, hessian).round(weight, spec, clip_search=True)
    assert torch.equal(same.q, without.q)


def test_an_output_of_zeros_has_no_error() -> None:
    for weight, hessian in (
        (torch.zeros(3, 8), torch.eye(8)),
        (random_weight(3, 8, 0), torch.zeros(8, 8)),
    ):
        result = Gptq(hessian).round(weight, WeightSpec(4), clip_search=True)
        assert (result.error, result.rtn_error) == (0.0, 0.0)
        assert torch.equal(result.q, quantize_weight(weight, WeightSpec(4), clip_search=True)[0])


def test_what_does_not_fit_is_refused() -> None:
    weight, spec = random_weight(3, 8, 0), WeightSpec(4)
    with pytest.raises(ValueError, match=r"expected \[8, 8\], got \[7, 7\]"):
        Gptq(torch.eye(7)).round(weight, spec, clip_search=True)
    for bad in (float("nan"), float("inf")):
        hessian = torch.eye(8)
        hessian[2, 3] = bad
        with pytest.raises(ValueError, match="Hessian has NaN or infinite"):
            Gptq(hessian).round(weight, spec, clip_search=True)
    for cross in (torch.eye(7), torch.full((8, 8), torch.nan)):
        with pytest.raises(ValueError, match="cross moments: expected finite"):
            Gptq(torch.eye(8), cross)
    with pytest.raises(ValueError, match="got shape"):
        Gptq(torch.eye(8)).round(weight[0], spec, clip_search=True)
    with pytest.raises(ValueError, match="group size 16 does not divide the 8"):
        Gptq(torch.eye(8)).round(weight, WeightSpec(4, 16), clip_search=True)
    weight[1, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        Gptq(torch.eye(8)).round(weight, spec, clip_search=True)


def test_weight_and_hessian_are_left_alone() -> None:
    weight, hessian = random_weight(3, 16, 0), moments(correlated_inputs(16, 1))
    before = weight.clone(), hessian.clone()
    Gptq(hessian).round(weight, WeightSpec(4), clip_search=True)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
