"""How much rounding each weight and each input harms the loss, from one backward pass.

To second order, and with an empirical Fisher matrix taken token by token, rounding adds to the loss
L of the calibration text

    harm = 1/2 * sum over tokens t of (g_t . d_t)^2

where d is the change of a tensor and g the gradient of L by it: for an input x' - x, for a weight
what its rounding to nearest does to the output, x (W' - W)^T (GPTQ lowers that in all layers).
HAWQ (arXiv:1911.03852) ranks layers by the trace of a Hessian instead.
Departure: with 8 bits a weight's harm is that with fewer bits times the squared ratio of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from rolora.activation import rounded_activation
from rolora.affine import dequantize, weight_range
from rolora.calibration import RangeObserver
from rolora.layer_plan import LayerPlan
from rolora.naming import naming
from rolora.rtn import quantize_weight
from rolora.scheme import ActivationSpec, Granularity, WeightSpec

TOKENS_PER_WINDOW = 256
"""Tokens of one backward pass: bounds its memory."""


_Remove = Callable[[], None]


class Part(StrEnum):
    """What is rounded."""

    WEIGHT = "weight"
    INPUT = "input"


@dataclass(frozen=True)
class Sensitivity:
    """What raising the bits of one weight, or of one shared input, would spare."""

    fqn: str
    """Of the linear, or of the one that stands for all that share the input."""
    part: Part
    bits: int
    harm: float
    """Estimated nats a token that rounding to these bits adds to the loss."""
    raised_harm: float
    """The same with the raised bits."""
    multiplications: int
    """Per token: elements of the weight, or of all weights that the input meets."""


def measure_sensitivities(
    model: nn.Module,
    embedding: str,
    pairs: Sequence[tuple[LayerPlan, LayerPlan]],
    parts: frozenset[Part],
    batches: Iterable[Mapping[str, Tensor]],
    observers: Mapping[str, RangeObserver],
    *,
    clip_search: bool = True,
) -> list[Sensitivity]:
    """Measure every weight and input whose bits differ between two plans.

    Args:
        model: The float model, online rotations in force; its logits are `model(input_ids=...)`.
        embedding: FQN of its embedding.
        pairs: The plan of each linear, and the same with raised bits.
        parts: What to measure.
        batches: `input_ids` int64 [B, T] each, of which `TOKENS_PER_WINDOW` tokens are used.
        observers: Of the inputs with a static scale.
        clip_search: See `rolora.rtn.quantize_weight`.

    Raises:
        ValueError: There is no calibration text of at least two tokens.
    """
    meters: list[_InputMeter | _WeightMeter] = []
    if Part.INPUT in parts:
        for observed in dict.fromkeys(plan.observed for plan, _ in pairs):
            sharing = [pair for pair in pairs if pair[0].observed == observed]
            if sharing[0][0].activation.bits < sharing[0][1].activation.bits:
                scales = observers.get(observed)
                meters.append(_InputMeter(model, sharing, scales))
    if Part.WEIGHT in parts:
        meters += [
            _WeightMeter(model, plan, raised, clip_search=clip_search)
            for plan, raised in pairs
            if plan.weight.bits < raised.weight.bits
        ]
    tokens = 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as undo:
        # Gradients by activations need a leaf, and weights need none.
        for parameter in trained:
            parameter.requires_grad_(False)
            undo.callback(parameter.requires_grad_)
        table = model.get_submodule(embedding)
        undo.callback(table.register_forward_hook(_as_leaf).remove)
        for meter in meters:
            undo.callback(meter.attach(model))
        with torch.enable_grad():
            for batch in batches:
                ids = batch["input_ids"][:, :TOKENS_PER_WINDOW]
                if ids.shape[1] < 2:
                    continue
                logits = model(input_ids=ids).logits[:, :-1].float()
                targets = ids[:, 1:].reshape(-1)
                flat = logits.reshape(-1, logits.shape[-1])
                nn.functional.cross_entropy(flat, targets, reduction="sum").backward()
                tokens += len(targets)
    if not tokens:
        raise ValueError("sensitivity: give calibration text of at least two tokens")
    return [meter.sensitivity(tokens) for meter in meters]


def _as_leaf(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.detach().requires_grad_()


class _InputMeter:
    """Adds up (g . (x' - x))^2 of a shared input, for the planned and the raised bits."""

    def __init__(
        self,
        model: nn.Module,
        sharing: Sequence[tuple[LayerPlan, LayerPlan]],
        observer: RangeObserver | None,
    ) -> None:
        self._plan = sharing[0][0]
        self._specs = [plan.activation for plan in sharing[0]]
        self._scales = [_static_scale(spec, observer) for spec in self._specs]
        self._sums = [0.0, 0.0]
        self._multiplications = sum(_elements(model, plan.fqn) for plan, _ in sharing)

    def attach(self, model: nn.Module) -> _Remove:
        return model.get_submodule(self._plan.observed).register_forward_pre_hook(self._see).remove

    def _see(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        changes = [
            rounded_activation(flat, spec, scale) - flat
            for spec, scale in zip(self._specs, self._scales, strict=True)
        ]

        def add(gradient: Tensor) -> None:
            by_token = gradient.reshape(flat.shape)
            for i, change in enumerate(changes):
                self._sums[i] += _squared_dots(by_token, change)

        x.register_hook(add)

    def sensitivity(self, tokens: int) -> Sensitivity:
        harm, raised = (total / 2 / tokens for total in self._sums)
        bits = self._plan.activation.bits
        return Sensitivity(
            self._plan.observed, Part.INPUT, bits, harm, raised, self._multiplications
        )


class _WeightMeter:
    """Adds up (g . x (W' - W)^T)^2 of one linear."""

    def __init__(
        self, model: nn.Module, plan: LayerPlan, raised: LayerPlan, *, clip_search: bool
    ) -> None:
        self._plan = plan
        self._shrinks = (_step(raised.weight.bits) / _step(plan.weight.bits)) ** 2
        self._sum = 0.0
        self._multiplications = _elements(model, plan.fqn)
        weight = model.get_submodule(plan.fqn).weight
        assert isinstance(weight, Tensor)
        with naming(plan.fqn):
            self._q, self._scale = quantize_weight(
                weight.detach(), plan.weight, clip_search=clip_search
            )

    def attach(self, model: nn.Module) -> _Remove:
        return model.get_submodule(self._plan.fqn).register_forward_hook(self._see).remove

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module.weight, Tensor)
        flat = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        rounded = _restore(self._q, self._scale, self._plan.weight)
        change = flat @ (rounded - module.weight.detach().float()).t()

        def add(gradient: Tensor) -> None:
            self._sum += _squared_dots(gradient.reshape(change.shape), change)

        output.register_hook(add)

    def sensitivity(self, tokens: int) -> Sensitivity:
        harm = self._sum / 2 / tokens
        return Sensitivity(
            self._plan.fqn,
            Part.WEIGHT,
            self._plan.weight.bits,
            harm,
            harm * self._shrinks,
            self._multiplications,
        )


def _static_scale(spec: ActivationSpec, observer: RangeObserver | None) -> Tensor | None:
    if spec.granularity is not Granularity.TENSOR:
        return None
    assert observer is not None
    return torch.tensor(observer.scale(spec.bits))


def _restore(q: Tensor, scale: Tensor, spec: WeightSpec) -> Tensor:
    grouped = q.reshape(len(q), -1, spec.group_size or q.shape[1])
    return dequantize(grouped, scale.reshape(len(q), -1, 1)).reshape(q.shape)


def _step(bits: int) -> float:
    """Return the step of integers that reach to 1."""
    return 1.0 / weight_range(bits)[1]


def _elements(model: nn.Module, fqn: str) -> int:
    weight = model.get_submodule(fqn).weight
    assert isinstance(weight, Tensor)
    return weight.numel()


def _squared_dots(a: Tensor, b: Tensor) -> float:
    """Return the sum over rows of (a . b)^2."""
    return float((a * b).sum(dim=1).double().square().sum())
