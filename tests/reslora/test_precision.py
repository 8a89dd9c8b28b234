"""Mixed precision: bfloat16 products stay near float64, through every shortcut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reslora.attach import attach_adapters
from reslora.config import AdapterConfig, Structure
from reslora.live_chain import recompute_contexts
from tests.reslora.tiny import build_llama

BF16_EPS = torch.finfo(torch.bfloat16).eps
IDS = torch.randint(8, 300, (3, 24), generator=torch.Generator().manual_seed(5))


def attached(structure: Structure | None, depth: int, dtype: torch.dtype) -> Any:
    llama = build_llama().to(dtype)
    endings = ("q_proj", "v_proj", "down_proj")
    targets = [name for name, _ in llama.named_modules() if name.endswith(endings)]
    model = attach_adapters(llama, AdapterConfig(3, 5, structure=structure, depth=depth), targets)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def learn(model: Any, *, low: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits [3, 24, 300] and the gradients of the loss."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        output = model(IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return output.logits.detach(), gradients


def distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("structure", [None, *Structure])
def test_bfloat16_stays_near_float64(structure: Structure | None, recompute: bool) -> None:
    logits, exact = learn(attached(structure, -1, torch.float64))
    low_model = attached(structure, -1, torch.float32)
    if recompute:
        low_model.get_base_model().activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": recompute_contexts}
        )
        low_model.train()
    low_logits, low = learn(low_model, low=True)
    # each of about 4 x 7 products in a row rounds its output once
    assert distance(low_logits, logits) < 28 * BF16_EPS
    ours = torch.cat([low[name].flatten() for name in exact])
    theirs = torch.cat([gradient.flatten() for gradient in exact.values()])
    assert ours.dtype == torch.float32
    assert distance(ours, theirs) < 2 * 28 * BF16_EPS
    assert all(bool(gradient.any()) for gradient in low.values())
    if structure is not None:  # negative control: the gradient without the shortcut
        cut = learn(attached(structure, 0, torch.float64))[1]
        plain = torch.cat([gradient.flatten() for gradient in cut.values()])
        assert distance(plain, theirs) > 2 * 28 * BF16_EPS
        assert distance(ours, theirs) < 0.5 * distance(plain, theirs)
