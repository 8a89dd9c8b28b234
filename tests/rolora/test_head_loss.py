"""The head's loss in chunks: the values of torch, and gradients that hold up to differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import rolora.head_loss
from rolora.head_loss import Head, cross_entropy, divergence

TOKENS, WIDTH, VOCABULARY = 7, 5, 11


@pytest.fixture(params=[1 << 24, 3 * VOCABULARY, 1], ids=["whole", "chunks", "rows"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolora.head_loss, "_CHUNK_ELEMENTS", request.param)


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.fixture
def parts() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, targets, hidden states of a teacher."""
    targets = torch.arange(TOKENS) * 5 % VOCABULARY
    hidden = draw(TOKENS, WIDTH, seed=0).requires_grad_()
    teacher = draw(TOKENS, WIDTH, seed=3)
    return hidden, draw(VOCABULARY, WIDTH, seed=1), draw(VOCABULARY, seed=2), targets, teacher


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_are_those_of_torch(
    parts: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], biased: bool
) -> None:
    hidden, weight, some_bias, targets, teacher = parts
    bias = some_bias if biased else None
    log_q = functional.linear(hidden, weight, bias).log_softmax(-1)
    log_p = functional.linear(teacher, weight, bias).log_softmax(-1)
    for found, expected in (
        (cross_entropy(hidden, Head(weight, bias), targets), functional.nll_loss(log_q, targets)),
        (
            divergence(hidden, Head(weight, bias), teacher, Head(weight, bias)),
            functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True),
        ),
    ):
        torch.testing.assert_close(found, expected)
        (theirs,) = torch.autograd.grad(3 * expected, hidden, retain_graph=True)
        (ours,) = torch.autograd.grad(3 * found, hidden)
        torch.testing.assert_close(ours, theirs)
        assert float(ours.abs().max()) > 1e-3


@pytest.mark.usefixtures("_chunks")
def test_gradients_hold_up_to_differences(
    parts: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    hidden, weight, bias, targets, teacher = parts
    assert torch.autograd.gradcheck(
        lambda h: cross_entropy(h, Head(weight, bias), targets), (hidden,)
    )
    assert torch.autograd.gradcheck(
        lambda h: divergence(h, Head(weight, bias), teacher, Head(weight, bias)), (hidden,)
    )


def test_a_teacher_is_not_diverged_from_by_itself(
    parts: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    hidden, weight, bias, _, teacher = parts
    loss = divergence(hidden, Head(weight, bias), hidden.detach(), Head(weight, bias))
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-15)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert float(gradient.abs().max()) < 1e-15
    assert float(divergence(hidden, Head(weight, bias), teacher, Head(weight, bias)).detach()) > 0.1


def test_a_bfloat16_head_is_near_the_float_one(
    parts: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    hidden, weight, bias, targets, _ = parts
    exact = cross_entropy(hidden, Head(weight, bias), targets)
    rough = cross_entropy(hidden.float(), Head(weight.bfloat16(), bias), targets)
    assert rough.dtype == torch.float32
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), rel=0.02)
    assert float(rough.detach()) != float(exact.detach())


def test_a_teacher_may_have_another_head_and_width(
    parts: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    hidden, weight, bias, _, _ = parts
    wide, wide_head = draw(TOKENS, WIDTH + 3, seed=7), draw(VOCABULARY, WIDTH + 3, seed=8)
    expected = functional.kl_div(
        functional.linear(hidden, weight, bias).log_softmax(-1),
        functional.linear(wide, wide_head).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    found = divergence(hidden, Head(weight, bias), wide, Head(wide_head))
    torch.testing.assert_close(found, expected)
    without = divergence(hidden.detach(), Head(weight, bias), wide, Head(wide_head))
    assert not without.requires_grad
    assert without == found
