"""Fold a trained adapter into the weights, so that inference pays nothing for it.

Plain LoRA and ResLoRA's block shortcut (arXiv:2402.18039 §3.3) are linear in the layer's own input,
so their merge is exact:

    W*_n = W_n + s * sum_{k=0..m} B_{n-k} A_{n-k},   m = min(depth, n),   s = alpha / rank

(the paper prints the product as A B). The window is found from the adapter alone: `find_chains`
over its shapes gives the chains that training used. The sum has rank up to (m + 1) r.

Arithmetic is float64 whatever the weights are; the result is cast to the weight's dtype once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from reslora.adapter import Adapter
from reslora.chains import find_chains
from reslora.config import Structure


class MergeMethod(StrEnum):
    """How a shortcut becomes a weight change; approximate methods join here."""

    EXACT = "exact"


EXACT_STRUCTURES: frozenset[Structure | None] = frozenset({None, Structure.BLOCK})
"""Structures whose shortcut is a linear map of the layer's own input."""


@dataclass(frozen=True)
class MergedLayer:
    """What the merge did to one weight."""

    fqn: str
    blocks: int
    """LoRA blocks summed into this weight (the window m + 1)."""
    delta_norm: float
    """Frobenius norm of the change."""
    relative_change: float
    """`delta_norm` over the norm of the weight before."""


@dataclass(frozen=True)
class MergeReport:
    """Every merged layer; zero layers never happen, that is an error."""

    method: MergeMethod
    structure: Structure | None
    layers: tuple[MergedLayer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def delta_weights(adapter: Adapter, method: MergeMethod) -> Iterator[tuple[str, Tensor]]:
    """Yield the weight change of each layer.

    Args:
        adapter: A loaded adapter.
        method: `exact` for plain LoRA and structure `block`.

    Yields:
        FQN and delta [out, in], float64, chain by chain in depth order; one at a time is in memory.

    Invariant: (W + delta) x equals the trained layer's output without dropout, to float64 rounding.

    Raises:
        ValueError: The method cannot merge the adapter's structure.
    """
    if method is MergeMethod.EXACT and adapter.config.structure not in EXACT_STRUCTURES:
        raise ValueError(
            f"merge method {method.value!r} cannot merge structure "
            f"{adapter.config.structure!s}: its shortcut is no function of the layer's own input"
        )
    return (_exact_delta(adapter, window) for window in _windows(adapter))


def merge_adapter(model: nn.Module, adapter: Adapter, method: MergeMethod) -> MergeReport:
    """Add an adapter's weight changes to a model that carries no adapter layers.

    Two passes, one layer in memory at a time: the first computes and checks every merged weight,
    the second writes. A refusal leaves the model as it was.

    Args:
        model: The model the adapter was trained on (same basis, same shapes), changed in place.
        adapter: A loaded adapter.
        method: See `delta_weights`.

    Invariant: in float64 the merged model computes what the adapted model computed, to rounding; in
        a lower dtype each weight is the float64 result rounded once.

    Raises:
        ValueError: A layer is missing, of other shape, shares its weight, or would not be finite.
    """
    weights = _matching_weights(model, adapter)
    for fqn, delta in delta_weights(adapter, method):
        merged = _merged(weights[fqn], delta)
        if not bool(torch.isfinite(merged).all()):
            raise ValueError(
                f"{fqn}: merged weight has NaN or infinite values in {merged.dtype}; the model is "
                "unchanged; check the base model, or merge in float32"
            )
    blocks = {window[0]: len(window) for window in _windows(adapter)}
    layers = []
    for fqn, delta in delta_weights(adapter, method):
        weight = weights[fqn]
        delta_norm = float(delta.norm())
        before = float(weight.detach().double().norm())
        with torch.no_grad():
            weight.copy_(_merged(weight, delta))
        relative = delta_norm / before if before > 0 else 0.0
        layers.append(MergedLayer(fqn, blocks[fqn], delta_norm, relative))
    return MergeReport(method, adapter.config.structure, tuple(layers))


def _windows(adapter: Adapter) -> Iterator[tuple[str, ...]]:
    """Yield, for every layer, the FQNs of its blocks: the layer itself first."""
    for chain in find_chains(adapter.shapes()):
        for position in range(len(chain.fqns)):
            window = chain.window(position, adapter.config.reach)
            yield tuple(chain.fqns[index] for index in window)


def _exact_delta(adapter: Adapter, window: tuple[str, ...]) -> tuple[str, Tensor]:
    pairs = [adapter.factors[fqn] for fqn in window]
    a_cat = torch.cat([a.double() for a, _ in pairs])  # [(m+1) r, in]
    b_cat = torch.cat([b.double() for _, b in pairs], dim=1)  # [out, (m+1) r]
    return window[0], adapter.config.scaling * (b_cat @ a_cat)


def _merged(weight: Tensor, delta: Tensor) -> Tensor:
    return (weight.detach().double() + delta.to(weight.device)).to(weight.dtype)


def _matching_weights(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Return the weight of every adapted layer, or refuse with the first that does not fit."""
    modules = dict(model.named_modules())
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    weights: dict[str, Tensor] = {}
    for fqn, shape in adapter.shapes().items():
        module = modules.get(fqn)
        if not isinstance(module, nn.Linear):
            found = "no such module" if module is None else type(module).__name__
            raise ValueError(
                f"{fqn}: adapter changes a linear {list(shape)}, the model has {found}; "
                "the adapter was trained for another model"
            )
        if tuple(module.weight.shape) != shape:
            raise ValueError(
                f"{fqn}: adapter is for a weight {list(shape)}, the model's is "
                f"{list(module.weight.shape)}; the adapter was trained for another model"
            )
        sharing = [name for name in users[id(module.weight)] if name != f"{fqn}.weight"]
        if sharing:
            raise ValueError(
                f"{fqn}: its weight is shared with {', '.join(sharing)}, which the merge would "
                "change too; untie the model first"
            )
        weights[fqn] = module.weight
    return weights
