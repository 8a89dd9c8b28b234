"""The fused head and loss against torch's own, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rolora.head_loss import Teacher, head_loss

TOKENS = [1, 255, 256, 600]


def _draw(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 12, generator=generator, dtype=torch.float64)
    head = torch.randn(31, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 31, (tokens,), generator=generator)
    return hidden.requires_grad_(), head, labels


@pytest.mark.parametrize("tokens", TOKENS)
def test_cross_entropy_and_its_gradient_are_torchs(tokens: int) -> None:
    hidden, head, labels = _draw(tokens)
    expected = functional.cross_entropy(hidden @ head.T, labels, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, hidden)
    found = head_loss(hidden, head, labels)
    (gradient,) = torch.autograd.grad(3 * found, hidden)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, 3 * wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", TOKENS)
def test_divergence_and_its_gradient_are_torchs(tokens: int) -> None:
    hidden, head, _ = _draw(tokens)
    generator = torch.Generator().manual_seed(9)
    theirs = torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
    their_head = torch.randn(31, 8, generator=generator, dtype=torch.float64)
    expected = functional.kl_div(
        functional.log_softmax(hidden @ head.T, -1),
        functional.log_softmax(theirs @ their_head.T, -1),
        reduction="sum",
        log_target=True,
    )
    (wanted,) = torch.autograd.grad(expected, hidden)
    found = head_loss(hidden, head, Teacher(theirs, their_head))
    (gradient,) = torch.autograd.grad(found, hidden)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn() -> None:
    hidden, head, _ = _draw(40)
    found = head_loss(hidden, head, Teacher(hidden.detach(), head))
    (gradient,) = torch.autograd.grad(found, hidden)
    assert abs(found.item()) < 1e-6
    assert gradient.abs().max().item() < 1e-7


def test_without_gradient_only_the_loss_is_computed() -> None:
    hidden, head, labels = _draw(5)
    assert not head_loss(hidden.detach(), head, labels).requires_grad
