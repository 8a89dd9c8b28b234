"""What approximate merges must know about activations: one calibration pass after training.

An input or middle shortcut adds a term e_n to the rank-sized value z_n = A_n x_n before B_n,

    input    e_n = A_n x_{n-1}                    (x_{-1} = x_0)
    middle   e_n = sum_{k=1..m} A_{n-k} x_{n-k}

and a merge replaces e_n by a function of x_n. How well that goes is decided by second moments over
tokens, all of which are small except E[x x^T]; they are observed where the layers run, so that they
are of the very tensors the adapter was trained with. Padding is left out. Sums are float32, or
float64 for a float64 model, whatever lower dtype the model runs in.

The reference code averages norms while it trains, over whole batches with padding, in half
precision, and writes into the frozen weight to take its norm; here training pays nothing and the
base weights are only read.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from reslora.attach import ADAPTER_NAME, attached_config
from reslora.config import AdapterConfig, Structure
from reslora.layers import ShortcutLinear
from reslora.live_chain import LiveChain

DEFAULT_WINDOW = 100
"""Batches in the mean of the norms, as in the reference code."""

DEFAULT_DAMPING = 0.01
"""Of the rank-r least-squares merge, in units of the mean diagonal of E[x x^T]."""


@dataclass(frozen=True)
class LayerStatistics:
    """What was observed at one layer."""

    mean_norm: float
    """f_n: mean over batches of ||x_n||_F (input) or ||A_n x_n||_F (middle)."""
    own_square: float
    """E ||B_n z_n||^2."""
    earlier_product: float
    """E <B_n z_n, B_n e_n>."""
    cross_moment: Tensor
    """E[e_n x_n^T], [rank, in]."""
    second_moment: Tensor | None
    """E[x_n x_n^T], [in, in]; layers with the same input share it. None if it was not asked for."""
    weight_square: float
    """||W_n||_F^2 of the frozen weight."""
    weight_projection: Tensor
    """B_n^T W_n, [rank, in]: gives ||W_n + s B_n A||_F for any A without the weight."""


@dataclass(frozen=True)
class ShortcutStatistics:
    """Statistics of every adapted layer, and of which adapter they are."""

    config: AdapterConfig
    factors_digest: str
    tokens: int
    """Tokens that were observed, padding left out."""
    layers: Mapping[str, LayerStatistics]
    """By FQN."""
    damping: float = DEFAULT_DAMPING
    """Pulls the rank-r least-squares merge towards the scalar one; `dataclasses.replace` it."""


def collect_statistics(
    model: PeftModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    window: int = DEFAULT_WINDOW,
    second_moments: bool = True,
) -> ShortcutStatistics:
    """Run calibration batches through an attached model and gather what merges need.

    Args:
        model: Made by `attach_adapters`, with the trained factors, its shortcuts alive.
        batches: Keyword arguments of the model's forward. Where they have an `attention_mask`
            [B, T], tokens that it masks are left out.
        window: Batches, counted from the last, in the mean of the norms.
        second_moments: Gather E[x x^T], which only the rank-r least-squares merge needs: one
            [in, in] matrix for each distinct input of a layer.

    Returns:
        The statistics; the model is as it was, also its training mode.

    Raises:
        ValueError: The adapter's structure needs no statistics, there is no token to observe, a
            mask does not fit, or something observed is not finite.
    """
    config = attached_config(model)
    if config.structure not in (Structure.INPUT, Structure.MIDDLE) or config.reach == 0:
        raise ValueError(
            f"structure {config.structure!s} with depth {config.depth} merges exactly: it needs no "
            "statistics"
        )
    layers = attached_layers(model)
    moments = _SharedMoments() if second_moments else None
    observed = {fqn: _Observed(layer, config.structure, window) for fqn, layer in layers.items()}
    links = {id(layer.link): layer.link for layer in layers.values() if layer.link is not None}
    mask = _TokenMask()
    was_training = model.training
    model.eval()
    try:
        for link in links.values():
            link.observer = _observer(link, observed, mask, moments)
        with torch.no_grad():
            for batch in batches:
                mask.begin(batch)
                if moments is not None:
                    moments.begin()
                model(**batch)
    finally:
        for link in links.values():
            link.observer = None
        model.train(was_training)
    if not all(layer.tokens for layer in observed.values()):
        unseen = [fqn for fqn, layer in observed.items() if not layer.tokens]
        raise ValueError(f"no calibration token reached {unseen[0]}: give batches with tokens")
    return ShortcutStatistics(
        config,
        factors_digest({fqn: _factors(layer) for fqn, layer in layers.items()}),
        next(iter(observed.values())).tokens,
        {
            fqn: layer.finish(fqn, None if moments is None else moments.mean(fqn))
            for fqn, layer in observed.items()
        },
    )


def attached_layers(model: PeftModel) -> dict[str, ShortcutLinear]:
    """Return the shortcut layers of an attached model by the FQN their linears had."""
    base: nn.Module = model.get_base_model()
    return {
        name: module for name, module in base.named_modules() if isinstance(module, ShortcutLinear)
    }


def factors_digest(factors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """Return a SHA-256 of factors by FQN, equal for equal values in any dtype up to float32."""
    digest = hashlib.sha256()
    for fqn in sorted(factors):
        digest.update(fqn.encode())
        for tensor in factors[fqn]:
            values = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def select_tokens(values: Tensor, mask: Tensor | None, fqn: str) -> Tensor:
    """Return the unmasked rows of `values` [..., features] as [N, features], float32 or better.

    Raises:
        ValueError: The mask has another number of tokens.
    """
    rows = values.detach().reshape(-1, values.shape[-1])
    if mask is not None:
        if mask.numel() != rows.shape[0]:
            raise ValueError(
                f"{fqn}: attention_mask covers {mask.numel()} tokens, the layer saw {rows.shape[0]}"
            )
        rows = rows[mask.to(rows.device)]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def token_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Return a batch's mask as booleans [B * T]; None where it has none.

    Raises:
        ValueError: The mask is not of the form [B, T].
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError("attention_mask: expected a tensor [batch, tokens], one value a token")
    return mask.reshape(-1) != 0


class _TokenMask:
    """The mask of the batch that is running."""

    current: Tensor | None = None

    def begin(self, batch: Mapping[str, Any]) -> None:
        self.current = token_mask(batch)


class _SharedMoments:
    """E[x x^T] of each distinct input: layers that are given the same tensor share one matrix.

    Which layers share is seen in the first batch; a model gives its layers the same inputs always.
    """

    def __init__(self) -> None:
        self._owner: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._seen: list[tuple[Tensor, str]] = []

    def begin(self) -> None:
        self._seen = []

    def add(self, fqn: str, x: Tensor, rows: Tensor) -> None:
        owner = self._owner.get(fqn)
        if owner is None:
            owner = next((other for seen, other in self._seen if seen is x), fqn)
            self._owner[fqn] = owner
            self._seen.append((x, owner))
        if owner != fqn:
            return
        square = rows.T @ rows
        self._sums[fqn] = square if fqn not in self._sums else self._sums[fqn].add_(square)
        self._tokens[fqn] = self._tokens.get(fqn, 0) + rows.shape[0]

    def mean(self, fqn: str) -> Tensor:
        owner = self._owner[fqn]
        total, tokens = self._sums[owner], self._tokens[owner]
        if tokens:  # in place, once: a matrix may be large
            total.div_(tokens)
            self._tokens[owner] = 0
        return total


class _Observed:
    """Sums over the tokens one layer has seen."""

    def __init__(self, layer: ShortcutLinear, structure: Structure, window: int) -> None:
        a, b = _factors(layer)
        self._a, self._b = a.detach(), b.detach()
        base: Any = layer.get_base_layer()
        self._weight: Tensor = base.weight.detach()
        self._on_inputs = structure is Structure.INPUT
        self._norms: deque[Tensor] = deque(maxlen=window)
        self._own_square: Any = 0.0
        self._product: Any = 0.0
        self._cross: Any = 0.0
        self.tokens = 0

    def add(self, rows: Tensor, received: Tensor | None) -> None:
        """Add tokens: x_n as `rows` [N, in]; x_{n-1} [N, in] or the sum of z [N, r] `received`."""
        a, b = self._a.to(rows.dtype), self._b.to(rows.dtype)
        own = rows @ a.T  # [N, r]
        if received is None:
            earlier = torch.zeros_like(own)
        else:
            earlier = received @ a.T if self._on_inputs else received
        through_b = own @ (b.T @ b)  # <B z, B e> = <z B^T B, e>
        self._own_square += (through_b * own).sum(dtype=torch.float64)
        self._product += (through_b * earlier).sum(dtype=torch.float64)
        self._cross += earlier.T @ rows
        self._norms.append((rows if self._on_inputs else own).norm().double())
        self.tokens += rows.shape[0]

    def finish(self, fqn: str, second_moment: Tensor | None) -> LayerStatistics:
        weight = self._weight.to(torch.promote_types(self._weight.dtype, torch.float32))
        result = LayerStatistics(
            mean_norm=float(torch.stack(list(self._norms)).mean()),
            own_square=float(self._own_square) / self.tokens,
            earlier_product=float(self._product) / self.tokens,
            cross_moment=self._cross / self.tokens,
            second_moment=second_moment,
            weight_square=float(weight.square().sum(dtype=torch.float64)),
            weight_projection=self._b.to(weight.dtype).T @ weight,
        )
        for name, value in vars(result).items():
            if value is not None and not bool(torch.isfinite(torch.as_tensor(value)).all()):
                raise ValueError(
                    f"{fqn}: {name} is not finite on the calibration batches; run them in float32"
                )
        return result


def _observer(
    link: LiveChain,
    observed: Mapping[str, _Observed],
    mask: _TokenMask,
    moments: _SharedMoments | None,
) -> Any:
    def observe(position: int, x: Tensor, received: Tensor | None) -> None:
        fqn = link.chain.fqns[position]
        rows = select_tokens(x, mask.current, fqn)
        earlier = None if received is None else select_tokens(received, mask.current, fqn)
        observed[fqn].add(rows, None if earlier is None else earlier.to(rows))
        if moments is not None:
            moments.add(fqn, x, rows)

    return observe


def _factors(layer: ShortcutLinear) -> tuple[Tensor, Tensor]:
    return layer.factor("lora_A", ADAPTER_NAME), layer.factor("lora_B", ADAPTER_NAME)
