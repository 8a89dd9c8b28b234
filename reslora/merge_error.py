"""How far a merge is from the model it replaces, layer by layer.

Each layer of the attached model is run on its own inputs, with its shortcut alive; beside its true
branch output s B (A x + e) stands what the merged weight would add, s B* A* x. The error of a layer
is thus its own: errors of layers before it do not enter. Held-out batches should be used, not those
that the statistics come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from reslora.adapter import Adapter
from reslora.merged_factors import Factors, MergeMethod, merged_factors
from reslora.shortcut_statistics import ShortcutStatistics, select_tokens, token_mask


@dataclass(frozen=True)
class LayerError:
    """Relative errors of one merged layer, Frobenius norms over all tokens."""

    fqn: str
    branch_error: float
    """Of what the adapter adds to the layer's output."""
    output_error: float
    """Of the whole output of the layer."""


def merge_errors(
    model: PeftModel,
    adapter: Adapter,
    method: MergeMethod,
    batches: Iterable[Mapping[str, Any]],
    statistics: ShortcutStatistics | None = None,
) -> tuple[LayerError, ...]:
    """Measure what a merge would change in each layer; nothing is merged.

    Args:
        model: The attached model that carries `adapter`. In float32 errors below about 1e-6 are
            rounding, in lower precision correspondingly more.
        adapter: The adapter to merge.
        method: See `merged_factors`.
        batches: As for `collect_statistics`.
        statistics: For the methods that need them.

    Raises:
        ValueError: As `merged_factors`; model and adapter differ in layers; there is no token.
    """
    factors = dict(merged_factors(adapter, method, statistics))
    layers = wrapped_layers(model, factors)
    watches = {
        fqn: _Watch(fqn, layer, factors[fqn], adapter.config.scaling)
        for fqn, layer in layers.items()
    }
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                mask = token_mask(batch)
                for watch in watches.values():
                    watch.mask = mask
                model(**batch)
    finally:
        for watch in watches.values():
            watch.remove()
        model.train(was_training)
    return tuple(watch.error() for watch in watches.values())


def wrapped_layers(model: PeftModel, factors: Mapping[str, Factors]) -> dict[str, Any]:
    """Return the LoRA layers of an attached model by the FQN their linears had.

    Raises:
        ValueError: They are not those of `factors`.
    """
    layers: dict[str, Any] = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }
    if layers.keys() != factors.keys():
        differing = sorted(layers.keys() ^ factors.keys())
        raise ValueError(f"model and adapter differ in layers: {', '.join(differing[:5])}")
    return layers


class _Watch:
    """Hooks on a wrapped layer and the layer inside it; their difference is the branch."""

    def __init__(self, fqn: str, layer: Any, factors: Factors, scaling: float) -> None:
        self.mask: Tensor | None = None
        self._fqn = fqn
        self._factors = factors
        self._scaling = scaling
        self._base: Tensor | None = None
        self._squares = [torch.zeros((), dtype=torch.float64)] * 3
        self._handles = [
            layer.get_base_layer().register_forward_hook(self._keep_base),
            layer.register_forward_hook(self._compare),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._base = None

    def error(self) -> LayerError:
        missed, branch, output = (math.sqrt(float(square)) for square in self._squares)
        if output == 0:
            raise ValueError(f"{self._fqn}: no token, or none with an output, in the batches")
        return LayerError(self._fqn, missed / branch if branch > 0 else 0.0, missed / output)

    def _keep_base(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._base = output

    def _compare(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._base is None:
            return
        x = select_tokens(inputs[0], self.mask, self._fqn)
        whole = select_tokens(output, self.mask, self._fqn)
        branch = whole - select_tokens(self._base, self.mask, self._fqn)
        self._base = None
        a, b = (factor.to(x) for factor in self._factors)
        missed = self._scaling * (x @ a.T @ b.T) - branch
        self._squares = [
            total + value.square().sum(dtype=torch.float64).cpu()
            for total, value in zip(self._squares, (missed, branch, whole), strict=True)
        ]
