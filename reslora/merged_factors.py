r"""The merged form of every block: factors A*_n, B*_n with delta W_n = s B*_n A*_n.

Exact where the branch is linear in the layer's own input (plain LoRA, structure `block`):

    A*_n = [A_n; ..; A_{n-m}],  B*_n = [B_n, .., B_{n-m}],  m = min(depth, n)    rank (m + 1) r

Structures `input` and `middle` add a term e_n of other layers' inputs before B_n
(`shortcut_statistics`), and a merge puts a linear map of x_n in its place; B*_n = B_n, rank r.

    drop            A*_n = A_n: the shortcut is left out
    input-norm      ResLoRA (arXiv:2402.18039) §3.3 on inputs ("bi"): A*_n = (1 + alpha_n) A_n
                      input    alpha_n = f_{n-1} / f_n,  f = mean ||x||_F;  alpha_0 = 1
                      middle   alpha_n = sum_k f_{n-k} / f_n,  f = mean ||A x||_F
    weight-norm     ibid. on weights ("bw"): ||x_n|| is taken to grow like ||W*_{n-1}||_F, the norm
                    of the merged weight before it, so with f*_n = ||W*_n||_F
                      input    A*_n = (1 + f*_{n-2} / f*_{n-1}) A_n;  2 A_n in the first two layers
                      middle   A*_n = A_n + sum_k (f*_{n-k-1} / f*_{n-1}) A_{n-k}
    least-squares   the best linear map of x_n, which fits the same rank:
                      A*_n = A_n + E[e_n x_n^T] E[x_n x_n^T]^{-1}
    least-squares-scalar   the best multiple: A*_n = (1 + alpha_n) A_n with
                      alpha_n = E<B_n z_n, B_n e_n> / E||B_n z_n||^2

A ratio with a zero norm counts as 1, as in the reference code; a missing layer before the first too
(for `middle` the paper names no f: the one of `input` is used).

The inverse needs damping where calibration tokens leave directions open. Shrinking the whole
correction would then drop the shortcut there; instead only what the scalar merge leaves is damped,

    A*_n = (1 + alpha_n) A_n + (E[e_n x_n^T] - alpha_n A_n S_n) (S_n + d mean(diag S_n) I)^{-1}

with S_n = E[x_n x_n^T]: the formula above for d = 0, the scalar merge for d -> infinity, and never
worse than the scalar merge on the calibration tokens in E||z_n + e_n - A* x_n||^2 (a ridge
regression of its residual). The first layer of an input chain, e_0 = z_0, is exact for every method
but `drop`. Arithmetic is float64.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from enum import StrEnum

import torch
from torch import Tensor

from reslora.adapter import Adapter
from reslora.chains import Chain, find_chains
from reslora.config import Structure
from reslora.shortcut_statistics import LayerStatistics, ShortcutStatistics, factors_digest


class MergeMethod(StrEnum):
    """How a shortcut becomes a weight change."""

    EXACT = "exact"
    INPUT_NORM = "input-norm"
    WEIGHT_NORM = "weight-norm"
    LEAST_SQUARES = "least-squares"
    LEAST_SQUARES_SCALAR = "least-squares-scalar"
    DROP = "drop"


EXACT_STRUCTURES: frozenset[Structure | None] = frozenset({None, Structure.BLOCK})
"""Structures whose shortcut is a linear map of the layer's own input."""

Factors = tuple[Tensor, Tensor]
"""A [rank, in] and B [out, rank], float64."""


def merges_exactly(adapter: Adapter) -> bool:
    """Return whether every branch is a linear map of the layer's own input."""
    return adapter.config.structure in EXACT_STRUCTURES or adapter.config.reach == 0


def require_fit(adapter: Adapter, method: MergeMethod) -> None:
    """Refuse a method that is not for the adapter's structure.

    Raises:
        ValueError: `exact` where a shortcut can only be approximated, or the reverse.
    """
    structure = adapter.config.structure
    exact = merges_exactly(adapter)
    if method is MergeMethod.EXACT and not exact:
        raise ValueError(
            f"merge method {method.value!r} cannot merge structure {structure!s}: its shortcut is "
            f"no function of the layer's own input; use {MergeMethod.LEAST_SQUARES.value!r}"
        )
    if exact and method not in (MergeMethod.EXACT, MergeMethod.DROP):
        raise ValueError(
            f"merge method {method.value!r} estimates a shortcut, but structure {structure!s} with "
            f"depth {adapter.config.depth} merges exactly; use {MergeMethod.EXACT.value!r}"
        )


def needs_statistics(adapter: Adapter, method: MergeMethod) -> bool:
    """Return whether `merged_factors` must be given statistics."""
    return not merges_exactly(adapter) and method not in (MergeMethod.EXACT, MergeMethod.DROP)


def merged_factors(
    adapter: Adapter,
    method: MergeMethod,
    statistics: ShortcutStatistics | None = None,
    only: Container[str] | None = None,
) -> Iterator[tuple[str, Factors]]:
    """Yield each layer's merged factors, chain by chain in depth order.

    Args:
        adapter: A loaded adapter.
        method: `exact` for plain LoRA, structure `block` and depth 0; the other methods for `input`
            and `middle`; `drop` for all.
        statistics: Of this very adapter, from `collect_statistics`; for methods that need them.
        only: FQNs of the layers to yield, for methods without statistics; None is all.

    Yields:
        FQN, and A* and B*.

    Raises:
        ValueError: The method does not fit the structure, or statistics are missing or of another
            adapter.
    """
    require_fit(adapter, method)
    if not needs_statistics(adapter, method):
        return _factors_without_statistics(adapter, method, only)
    if only is not None:
        raise ValueError(
            f"merge method {method.value!r} looks at all layers together; merge the whole model"
        )
    if statistics is None:
        raise ValueError(
            f"merge method {method.value!r} needs statistics of the attached model: collect them "
            "with reslora.shortcut_statistics.collect_statistics"
        )
    _require_same_adapter(adapter, statistics)
    if method is MergeMethod.LEAST_SQUARES:
        without = [fqn for fqn, layer in statistics.layers.items() if layer.second_moment is None]
        if without:
            raise ValueError(
                f"{without[0]}: merge method {method.value!r} needs second moments: collect the "
                "statistics with second_moments=True"
            )
        if not (math.isfinite(statistics.damping) and statistics.damping >= 0):
            raise ValueError(f"damping must be a number >= 0, got {statistics.damping}")
    return _factors_with_statistics(adapter, method, statistics)


def _factors_without_statistics(
    adapter: Adapter, method: MergeMethod, only: Container[str] | None
) -> Iterator[tuple[str, Factors]]:
    reach = adapter.config.reach if method is MergeMethod.EXACT else 0
    for chain in find_chains(adapter.shapes()):
        for position, fqn in enumerate(chain.fqns):
            if only is not None and fqn not in only:
                continue
            pairs = [adapter.factors[chain.fqns[k]] for k in chain.window(position, reach)]
            a_cat = torch.cat([a.double() for a, _ in pairs])  # [(m+1) r, in]
            b_cat = torch.cat([b.double() for _, b in pairs], dim=1)  # [out, (m+1) r]
            yield fqn, (a_cat, b_cat)


def _factors_with_statistics(
    adapter: Adapter, method: MergeMethod, statistics: ShortcutStatistics
) -> Iterator[tuple[str, Factors]]:
    for chain in find_chains(adapter.shapes()):
        merged_norms: list[float] = []  # f*_n, of the layers before
        for position, fqn in enumerate(chain.fqns):
            a, b = (factor.to("cpu", torch.float64) for factor in adapter.factors[fqn])
            layer = statistics.layers[fqn]
            if method is MergeMethod.INPUT_NORM:
                merged = (1 + _input_norm_ratio(adapter, chain, position, statistics)) * a
            elif method is MergeMethod.WEIGHT_NORM:
                merged = _by_weight_norms(adapter, chain, position, merged_norms)
                merged_norms.append(_merged_norm(layer, merged, b, adapter.config.scaling))
            elif method is MergeMethod.LEAST_SQUARES_SCALAR:
                merged = (1 + _best_scalar(layer)) * a
            else:
                merged = _best_map(fqn, a, layer, statistics.damping)
            yield fqn, (merged, b)


def _input_norm_ratio(
    adapter: Adapter, chain: Chain, position: int, statistics: ShortcutStatistics
) -> float:
    norms = [statistics.layers[fqn].mean_norm for fqn in chain.fqns]
    if adapter.config.structure is Structure.INPUT and position == 0:
        return 1.0
    earlier = chain.window(position, adapter.config.reach)[1:]
    return sum(_ratio(norms[k], norms[position]) for k in earlier)


def _by_weight_norms(
    adapter: Adapter, chain: Chain, position: int, norms: Sequence[float]
) -> Tensor:
    """Return A*_n from the norms of the merged weights before it."""

    def growth(k: int) -> float:
        """Estimate ||x_k|| / ||x_n||."""
        return _ratio(norms[k - 1], norms[position - 1]) if k > 0 else 1.0

    own = adapter.factors[chain.fqns[position]][0].to("cpu", torch.float64)
    if adapter.config.structure is Structure.INPUT:
        return own * (1 + (growth(position - 1) if position > 0 else 1.0))
    merged = own
    for k in chain.window(position, adapter.config.reach)[1:]:
        merged = merged + growth(k) * adapter.factors[chain.fqns[k]][0].to("cpu", torch.float64)
    return merged


def _merged_norm(layer: LayerStatistics, a: Tensor, b: Tensor, scaling: float) -> float:
    """Return ||W + s B A||_F = sqrt(||W||^2 + 2 s <B^T W, A> + s^2 <B^T B A, A>)."""
    overlap = float((layer.weight_projection.to("cpu", torch.float64) * a).sum())
    delta_square = float(((b.T @ b @ a) * a).sum())
    square = layer.weight_square + 2 * scaling * overlap + scaling**2 * delta_square
    return math.sqrt(max(0.0, square))


def _best_scalar(layer: LayerStatistics) -> float:
    if layer.own_square == 0:
        return 0.0  # B_n A_n vanishes on every token: any scalar gives the same
    return layer.earlier_product / layer.own_square


def _best_map(fqn: str, a: Tensor, layer: LayerStatistics, damping: float) -> Tensor:
    if layer.second_moment is None:
        raise ValueError(f"{fqn}: no second moment")
    moment = layer.second_moment.to("cpu", torch.float64)
    merged = (1 + _best_scalar(layer)) * a
    scale = float(moment.diagonal().mean())
    if scale == 0:
        return merged
    residual = layer.cross_moment.to("cpu", torch.float64) - _best_scalar(layer) * (a @ moment)
    damped = moment + damping * scale * torch.eye(moment.shape[0], dtype=torch.float64)
    root, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise ValueError(
            f"{fqn}: calibration tokens do not span the layer's inputs; use a damping above "
            f"{damping:g} or more tokens"
        )
    return merged + torch.cholesky_solve(residual.T, root).T


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if numerator > 0 and denominator > 0 else 1.0


def _require_same_adapter(adapter: Adapter, statistics: ShortcutStatistics) -> None:
    if statistics.layers.keys() != adapter.factors.keys():
        differing = sorted(statistics.layers.keys() ^ adapter.factors.keys())
        raise ValueError(f"statistics and adapter differ in layers: {', '.join(differing[:5])}")
    if statistics.config != adapter.config:
        raise ValueError(
            f"statistics are of an adapter with {statistics.config}, this one has {adapter.config}"
        )
    if statistics.factors_digest != factors_digest(adapter.factors):
        raise ValueError(
            "statistics are of other factors than the adapter's: collect them again on a model "
            "that carries this adapter"
        )
