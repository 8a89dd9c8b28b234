"""Blocks of two linears, the smallest model with a depth."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from reslora.attach import attach_adapters
from reslora.config import AdapterConfig

RANK = 3
DOUBLE_EPS = torch.finfo(torch.float64).eps


class Ladder(nn.Module):
    """Blocks of two linears, the smallest thing with a depth; biases are not zero."""

    def __init__(self, depth: int = 5, width: int = 11) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 13), "down": nn.Linear(13, width)})
            for _ in range(depth)
        )
        self.config = PreTrainedConfig()  # PEFT reads its model_type

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """Take the name and the surplus arguments that PEFT passes."""
        x = input_ids
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return x

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks for the method's presence."""


def attached_ladder(config: AdapterConfig, depth: int = 5) -> tuple[Any, Ladder]:
    torch.manual_seed(0)
    ladder = Ladder(depth).double()
    original = copy.deepcopy(ladder)
    fqns = [name for name, module in ladder.named_modules() if isinstance(module, nn.Linear)]
    model = attach_adapters(ladder, config, fqns)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model, original


def ladder_input() -> Tensor:
    return torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
