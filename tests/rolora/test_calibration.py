from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rolora.calibration import RangeObserver, observe_inputs


def draw(seed: int, *sizes: float) -> list[Tensor]:
    """Return one batch per size, values uniform within +-size; the largest is the size itself."""
    generator = torch.Generator().manual_seed(seed)
    batches = [(torch.rand(50, 20, generator=generator) * 2 - 1) * size for size in sizes]
    for batch, size in zip(batches, sizes, strict=True):
        batch[0, 0] = size
    return batches


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(2.0**-10, 2.0**10, width=32), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_growth_loses_no_count_and_moves_none_to_another_bin(sizes: list[float], seed: int) -> None:
    batches = draw(seed, *sizes)
    observer = RangeObserver()
    for batch in batches:
        observer.update(batch)
    assert observer.limit >= max(sizes)
    assert observer.limit < 2 * max(sizes) or observer.limit == sizes[0]
    assert math.log2(observer.limit / sizes[0]).is_integer()
    magnitudes = torch.cat(batches).abs().flatten()
    # A value at the limit of its time was counted in the bin below it.
    at_limit = torch.isin(magnitudes, sizes[0] * 2.0 ** torch.arange(20))
    bins = len(observer.counts)
    direct = torch.histc(magnitudes[~at_limit], bins=bins, min=0.0, max=observer.limit).double()
    difference = observer.counts - direct
    assert float(difference.abs().sum()) == float(at_limit.sum())
    assert float(difference.min()) >= 0
    assert float(observer.counts.sum()) == magnitudes.numel()


def test_the_order_of_batches_matters_only_for_the_range() -> None:
    small, large = draw(0, 1.0, 8.0)
    rising, falling = RangeObserver(), RangeObserver()
    for observer, batches in ((rising, (small, large)), (falling, (large, small))):
        for batch in batches:
            observer.update(batch)
    assert rising.limit == falling.limit == 8.0
    # 1.0, the limit of its time, may be one bin lower.
    assert float((rising.counts - falling.counts).abs().sum()) <= 2
    assert rising.scale(8) == falling.scale(8)


def gaussian_error(clip: float, quant_max: int) -> float:
    """Return the expected squared error of clipping and rounding a standard normal value."""
    outside = math.erfc(clip / math.sqrt(2))
    density = math.exp(-clip * clip / 2) / math.sqrt(2 * math.pi)
    saturation = (1 + clip * clip) * outside - 2 * clip * density
    return (clip / quant_max) ** 2 / 12 * (1 - outside) + saturation


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("sigma", [0.01, 1.0, 300.0])
def test_the_scale_of_a_gaussian_is_near_the_analytic_optimum(bits: int, sigma: float) -> None:
    observer = RangeObserver()
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        observer.update(sigma * torch.randn(50_000, generator=generator))
    quant_max = 2 ** (bits - 1) - 1
    clip = observer.scale(bits) * quant_max / sigma
    best = min((c / 100 for c in range(100, 700)), key=lambda c: gaussian_error(c, quant_max))
    # 200,000 samples know the tail to a few percent, and the optimum is flat.
    assert clip == pytest.approx(best, rel=0.05)
    assert gaussian_error(clip, quant_max) < 1.01 * gaussian_error(best, quant_max)
    absmax = observer.limit / sigma
    assert bits == 8 or gaussian_error(absmax, quant_max) > 1.1 * gaussian_error(
        best, quant_max
    )  # the control: no clipping


def test_one_outlier_does_not_set_a_4_bit_scale() -> None:
    observer = RangeObserver()
    values = torch.randn(100_000)
    values[0] = 20.0
    observer.update(values)
    assert observer.scale(4) * 7 < 5.0


def test_uniform_values_are_hardly_clipped() -> None:
    observer = RangeObserver()
    observer.update(torch.linspace(-3, 3, 10_001))
    assert 0.98 * 3 < observer.scale(8) * 127 <= 3.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_and_not_counted(bad: float) -> None:
    observer = RangeObserver()
    observer.update(torch.ones(3))
    x = torch.ones(2, 4)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        observer.update(x)
    assert float(observer.counts.sum()) == 3
    assert observer.limit == 1.0


def test_nothing_observed_is_refused() -> None:
    observer = RangeObserver()
    observer.update(torch.empty(0, 4))
    with pytest.raises(ValueError, match="no activation was observed"):
        observer.scale(8)


def test_zeros_count_as_zeros_and_give_a_scale_above_0() -> None:
    observer = RangeObserver()
    observer.update(torch.zeros(10))
    assert observer.scale(8) > 0
    observer.update(torch.full((3,), 5.0))
    assert float(observer.counts[0]) == 10
    assert float(observer.counts[-1]) == 3
    assert observer.scale(8) * 127 == pytest.approx(5.0, rel=0.02)


def test_inputs_of_the_named_modules_are_observed_and_hooks_removed() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    batches = [{"input": torch.randn(5, 4) * size} for size in (1.0, 3.0)]
    observers = observe_inputs(model, ["0", "2"], batches)
    assert list(observers) == ["0", "2"]
    for fqn, seen in (
        ("0", torch.cat([batch["input"] for batch in batches])),
        ("2", torch.cat([model[:2](batch["input"]) for batch in batches])),
    ):
        assert float(observers[fqn].counts.sum()) == seen.numel()
        expected = RangeObserver()
        for part in seen.detach().split(5):
            expected.update(part)
        assert torch.equal(observers[fqn].counts, expected.counts)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_bad_input_is_named_and_hooks_are_removed() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"^1: calibration: an activation is NaN"):
        observe_inputs(model, ["0", "1"], [{"input": torch.randn(5, 4)}])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_query_key_and_value_of_a_decoder_see_one_input(
    make_decoder: Callable[..., Any],
) -> None:
    decoder = make_decoder("qwen3")
    block = decoder.names.blocks[1]
    batches = [{"input_ids": torch.arange(9)[None]}]
    observers = observe_inputs(decoder.model, [block.query, block.value, block.gate], batches)
    assert torch.equal(observers[block.query].counts, observers[block.value].counts)
    assert not torch.equal(observers[block.query].counts, observers[block.gate].counts)
