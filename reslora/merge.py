"""Fold a trained adapter into the weights, so that inference pays nothing for it.

With s = `AdapterConfig.scaling` and the merged factors of `merged_factors`, the new weight is

    W*_n = W_n + s B*_n A*_n

Plain LoRA and ResLoRA's block shortcut (arXiv:2402.18039 §3.3) are linear in the layer's own input,
so their merge is exact (the paper prints the product as A B). Input and middle shortcuts are not,
and their merges are approximate; `merge_error` measures by how much. The window is found from the
adapter alone: `find_chains` over its shapes gives the chains that training used.

Arithmetic is float64 whatever the weights are; the result is cast to the weight's dtype once.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reslora.adapter import Adapter
from reslora.config import Structure
from reslora.head import head_parameters, require_head, write_head
from reslora.merged_factors import Factors, MergeMethod, merged_factors
from reslora.shortcut_statistics import ShortcutStatistics

__all__ = [
    "MergeMethod",
    "MergeReport",
    "MergedLayer",
    "delta_weights",
    "matching_weights",
    "merge_adapter",
]


@dataclass(frozen=True)
class MergedLayer:
    """What the merge did to one weight."""

    fqn: str
    blocks: int
    """Rank of the change over the adapter's rank: the window m + 1 of `block`, else 1."""
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


def delta_weights(
    adapter: Adapter, method: MergeMethod, statistics: ShortcutStatistics | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Compute what merging adds to each weight.

    Args:
        adapter: A loaded adapter.
        method: See `merged_factors`.
        statistics: For the methods that need them.

    Yields:
        FQN and delta [out, in], float64, chain by chain in depth order; one at a time is in memory.

    Invariant: for `exact`, (W + delta) x equals the trained layer's output without dropout, to
        float64 rounding.

    Raises:
        ValueError: The method cannot merge the adapter's structure, or statistics are missing or of
            another adapter.
    """
    merged = merged_factors(adapter, method, statistics)
    return ((fqn, _delta(adapter, factors)) for fqn, factors in merged)


def merge_adapter(
    model: nn.Module,
    adapter: Adapter,
    method: MergeMethod,
    statistics: ShortcutStatistics | None = None,
    only: Container[str] | None = None,
) -> MergeReport:
    """Add an adapter's weight changes to a model that carries no adapter layers.

    A classification head that was trained with the adapter takes the place of the model's.

    Two passes, one layer in memory at a time: the first computes and checks every merged weight,
    the second writes. A refusal leaves the model as it was.

    Args:
        model: The model the adapter was trained on (same basis, same shapes), changed in place.
        adapter: A loaded adapter.
        method: See `merged_factors`.
        statistics: For the methods that need them.
        only: FQNs of the layers to merge, where the method needs no statistics: the other layers'
            weights are not looked at. None is all.

    Invariant: for `exact`, in float64, the merged model computes what the adapted model computed,
        to rounding; in a lower dtype each weight is the float64 result rounded once.

    Raises:
        ValueError: A layer is missing, of other shape, shares its weight, or would not be finite;
            model and adapter differ in their classification heads; or as `delta_weights`.
    """
    weights = matching_weights(model, adapter, only)
    head = head_parameters(model)
    require_head("merge", adapter.head, head)
    factors = dict(merged_factors(adapter, method, statistics, only))
    for fqn, pair in factors.items():
        merged = _merged(weights[fqn], _delta(adapter, pair))
        if not bool(torch.isfinite(merged).all()):
            raise ValueError(
                f"{fqn}: merged weight has NaN or infinite values in {merged.dtype}; the model is "
                "unchanged; check the base model, or merge in float32"
            )
    layers = []
    for fqn, pair in factors.items():
        weight, delta = weights[fqn], _delta(adapter, pair)
        delta_norm = float(delta.norm())
        before = float(weight.detach().double().norm())
        with torch.no_grad():
            weight.copy_(_merged(weight, delta))
        relative = delta_norm / before if before > 0 else 0.0
        blocks = pair[0].shape[0] // adapter.config.rank
        layers.append(MergedLayer(fqn, blocks, delta_norm, relative))
    write_head(head, adapter.head)
    return MergeReport(method, adapter.config.structure, tuple(layers))


def _delta(adapter: Adapter, factors: Factors) -> Tensor:
    a, b = factors
    return adapter.config.scaling * (b @ a)


def _merged(weight: Tensor, delta: Tensor) -> Tensor:
    return (weight.detach().double() + delta.to(weight.device)).to(weight.dtype)


def matching_weights(
    model: nn.Module, adapter: Adapter, only: Container[str] | None = None
) -> dict[str, Tensor]:
    """Return the weight of every adapted layer (in `only`); weights on the meta device do.

    Raises:
        ValueError: A layer is missing, of other shape, or shares its weight.
    """
    modules = dict(model.named_modules())
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    weights: dict[str, Tensor] = {}
    for fqn, shape in adapter.shapes().items():
        if only is not None and fqn not in only:
            continue
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
