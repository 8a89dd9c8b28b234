"""Fake quantization: the forward of the integer arithmetic, the gradients of STE and LSQ."""

from __future__ import annotations

import pytest
import torch

from rolora.affine import (
    activation_range,
    dequantize,
    quantize,
    quantize_tokens,
    token_magnitude,
    weight_range,
)
from rolora.fake_quant import fake_quantize, fake_quantize_tokens


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_forward_is_the_integer_arithmetic_to_the_bit(bits: int) -> None:
    x = torch.randn(33, 48, generator=torch.Generator().manual_seed(0)) * 3
    scale = quantize_tokens(x, bits, 0.9)[1]
    expected = dequantize(quantize(x, scale, *activation_range(bits)), scale)
    assert torch.equal(fake_quantize(x, scale, *activation_range(bits)), expected)


def test_ties_and_the_ends_of_the_range_round_as_integers_do() -> None:
    x = torch.tensor([[-9.0, -8.5, -8.0, -0.5, 0.5, 1.5, 2.5, 7.49, 7.5, 70.0]])
    found = fake_quantize(x, torch.ones(1), *weight_range(4))
    assert found.tolist() == [[-8.0, -8.0, -8.0, -0.0, 0.0, 2.0, 2.0, 7.0, 7.0, 7.0]]


def test_gradient_passes_where_nothing_was_clamped_and_nowhere_else() -> None:
    x = torch.tensor([-9.0, -8.4, 0.3, 7.4, 7.6], requires_grad=True)
    fake_quantize(x, torch.ones(1), -8, 7).backward(torch.arange(1.0, 6.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


def test_scale_gradient_is_that_of_learned_step_sizes() -> None:
    x = torch.tensor([[0.3, 5.0, -9.0], [1.6, 0.2, 30.0]])
    scale = torch.tensor([[1.0], [2.0]], requires_grad=True)
    fake_quantize(x, scale, -8, 7).backward(torch.ones(2, 3))
    assert scale.grad is not None
    expected = [[(0 - 0.3) + (5 - 5) + -8.0], [(1 - 0.8) + (0 - 0.1) + 7.0]]
    torch.testing.assert_close(scale.grad, torch.tensor(expected))


def test_one_scale_for_all_collects_the_gradient_of_all() -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    shared = torch.tensor(0.2, requires_grad=True)
    apart = torch.full((7, 5), 0.2, requires_grad=True)
    for scale in (shared, apart):
        fake_quantize(x, scale, -8, 7).sum().backward()
    assert shared.grad is not None
    assert apart.grad is not None
    torch.testing.assert_close(shared.grad, apart.grad.sum())


def test_what_needs_no_gradient_gets_none() -> None:
    x = torch.ones(3, requires_grad=True)
    scale = torch.tensor(0.5)
    fake_quantize(x, scale, -8, 7).sum().backward()
    assert scale.grad is None


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("clip_ratio", [1.0, 0.9])
def test_tokens_are_rounded_as_integers_are_to_the_bit(bits: int, clip_ratio: float) -> None:
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(bits)) * 3
    x[3] = 0
    factor = torch.tensor(clip_ratio / activation_range(bits)[1])
    found = fake_quantize_tokens(x, token_magnitude(x), factor, bits)
    assert torch.equal(found, dequantize(*quantize_tokens(x, bits, clip_ratio)))


def test_a_tokens_scale_has_the_gradient_of_learned_step_sizes() -> None:
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(2)).double()
    largest = token_magnitude(x)
    factor = torch.tensor(0.8 / 7, dtype=torch.float64, requires_grad=True)
    fake_quantize_tokens(x, largest, factor, 4).square().sum().backward()
    scale = (largest * factor.detach()).requires_grad_()
    fake_quantize(x, scale, -8, 7).square().sum().backward()
    assert factor.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(factor.grad, (scale.grad * largest).sum())
