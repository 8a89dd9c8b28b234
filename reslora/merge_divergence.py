"""How far merges are from the model they replace, as one figure for the model.

For each token, with p of the unmerged model (the adapter attached, its shortcut alive) and q of the
merged one,

    kl_mean = mean KL(p || q)      top1_agreement = mean [argmax p = argmax q]

A classifier predicts once for each text, not for each token. A regression's prediction y is taken
as the mean of a normal distribution of variance 1, of which squared error is the likelihood; then
KL(p || q) = (y_p - y_q)^2 / 2.

Errors of all layers enter, and how they add up: the methods can be ranked by it. The merged model
is not built: in every wrapped layer s B*_n A*_n x_n takes the branch's place, which is the merged
weight's function to rounding. So no weight is copied or written, several methods are measured in
one sweep, and of logits only those of one batch from two models are in memory, in float64 only
those of a few tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from reslora.adapter import Adapter
from reslora.merge_error import wrapped_layers
from reslora.merged_factors import Factors, MergeMethod, merged_factors
from reslora.shortcut_statistics import ShortcutStatistics, token_mask

CHUNK_TOKENS = 64
"""Tokens whose probabilities are in memory at a time."""


@dataclass(frozen=True)
class Divergence:
    """Of a merged model from the unmerged one, over all tokens that no mask leaves out."""

    kl_mean: float
    """In nats per token; of a classifier, per text."""
    top1_agreement: float | None
    """Share of the tokens whose most probable successor is the same, or of the texts whose most
    probable class is; None for a regression."""


def merge_divergences(
    model: PeftModel,
    adapter: Adapter,
    methods: Sequence[MergeMethod],
    batches: Iterable[Mapping[str, Any]],
    statistics: ShortcutStatistics | None = None,
) -> dict[MergeMethod, Divergence]:
    """Measure what each method would change in the model's predictions; nothing is merged.

    Args:
        model: The attached language model or classifier that carries `adapter`; each batch runs
            once in it, and once for every method.
        adapter: The adapter to merge.
        methods: See `merged_factors`.
        batches: As for `collect_statistics`, but held out from it.
        statistics: For the methods that need them.

    Returns:
        The figures by method, in the order given.

    Raises:
        ValueError: As `merged_factors`; model and adapter differ in layers; there is no token, or a
            logit is not finite.
    """
    factors = {method: dict(merged_factors(adapter, method, statistics)) for method in methods}
    sums = {method: _Sums() for method in methods}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                expected = _logits(model, batch)
                for method in methods:
                    with _merged_branches(model, factors[method], adapter.config.scaling):
                        sums[method].add(expected, _logits(model, batch))
    finally:
        model.train(was_training)
    return {method: total.divergence(method) for method, total in sums.items()}


@dataclass
class _Sums:
    """Running sums over predictions."""

    count: int = 0
    kl: float = 0.0
    agreements: int = 0
    is_regression: bool = False

    def add(self, expected: Tensor, found: Tensor) -> None:
        self.count += expected.shape[0]
        if expected.shape[-1] == 1:
            self.is_regression = True
            self.kl += float((expected.double() - found.double()).square().sum()) / 2
            return
        chunks = zip(expected.split(CHUNK_TOKENS), found.split(CHUNK_TOKENS), strict=True)
        for one, other in chunks:
            log_p, log_q = (logits.double().log_softmax(dim=-1) for logits in (one, other))
            self.kl += float(nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
            self.agreements += int((one.argmax(dim=-1) == other.argmax(dim=-1)).sum())

    def divergence(self, method: MergeMethod) -> Divergence:
        if self.count == 0:
            raise ValueError("no held-out token to compare predictions on: give more text")
        if not math.isfinite(self.kl):
            raise ValueError(
                f"merge method {method.value!r}: logits are not finite on the held-out batches; "
                "run them in float32"
            )
        agreement = None if self.is_regression else self.agreements / self.count
        return Divergence(self.kl / self.count, agreement)


def _logits(model: PeftModel, batch: Mapping[str, Any]) -> Tensor:
    """Return the logits [N, V] of the tokens that no mask leaves out, or [B, classes] of texts."""
    logits: Tensor = model(**batch).logits
    if logits.ndim == 2:
        return logits
    rows = logits.reshape(-1, logits.shape[-1])
    mask = token_mask(batch)
    return rows if mask is None else rows[mask.to(rows.device)]


@contextmanager
def _merged_branches(
    model: PeftModel, factors: Mapping[str, Factors], scaling: float
) -> Iterator[None]:
    """Let every wrapped layer compute W x + s B* A* x while the context lasts."""
    handles = []
    for fqn, layer in wrapped_layers(model, factors).items():
        branch = _MergedBranch(factors[fqn], scaling)
        handles.append(layer.get_base_layer().register_forward_hook(branch.keep_base))
        handles.append(layer.register_forward_hook(branch.replace))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _MergedBranch:
    """Hooks on a wrapped layer and the layer inside it."""

    def __init__(self, factors: Factors, scaling: float) -> None:
        self._factors = factors
        self._scaling = scaling
        self._base: Tensor | None = None

    def keep_base(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._base = output

    def replace(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        base, self._base = self._base, None
        if base is None:
            raise RuntimeError("a wrapped layer ran without the layer inside it")
        x = inputs[0]
        wide = torch.promote_types(x.dtype, torch.float32)
        a, b = (factor.to(x.device, wide) for factor in self._factors)
        return (base.to(wide) + self._scaling * (x.to(wide) @ a.T @ b.T)).to(output.dtype)
