"""Fake-quantized inputs in a basis that can be learned, on a model that is not rotated itself.

A rotated linear computes Q(x R) (W R)^T. With the rotation undone behind the rounding instead of in
the weight, that is W Q(x R) R^T: the same numbers from the model's own weights. So no weight is
rotated at each step, none needs a gradient, and four sites in a block carry all of R::

    after either norm   x -> Q(x R1) R1^T     one hook on the norm serves all linears that read it
    in front of o       x -> Q(x R2) R2^T     each head of the input alike
    in front of down    x -> Q(x R4) R4^T     R4 is fixed

Without Q every site is the identity. Weights are those of the float model, which is how SpinQuant
(arXiv:2405.16406) learns rotations for weights that GPTQ rounds afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rolora.affine import activation_range, token_magnitude
from rolora.calibration import RangeObserver
from rolora.decoder import DecoderNames
from rolora.fake_quant import fake_quantize, fake_quantize_tokens
from rolora.kronecker import Rotation
from rolora.naming import naming
from rolora.rotation import RotationPlan
from rolora.scheme import FLOAT_BITS, ActivationSpec, Granularity, QuantizationRecipe


@dataclass(frozen=True, eq=False)
class Basis:
    """The rotations as tensors."""

    r1: Tensor
    """Floating [hidden, hidden]; may require a gradient."""
    r2: Tensor
    """Floating [layers, head_dim, head_dim]; may require a gradient."""
    r4: Rotation

    @classmethod
    def of(cls, plan: RotationPlan) -> Basis:
        """Return the rotations of a plan, float64.

        Raises:
            ValueError: R1, R2 or R4 is missing.
        """
        if plan.r1 is None or plan.r2 is None or plan.r4 is None:
            have = ", ".join(sorted(plan.names)) or "none"
            raise ValueError(f"rotation plan: expected R1, R2 and R4 in it, got {have}")
        return cls(plan.r1.dense(), torch.stack([r2.dense() for r2 in plan.r2]), plan.r4)


Rounding = Callable[[Tensor, ActivationSpec, float | None], Tensor]
"""(rotated input, how it is quantized, its static scale if it has one) -> the input, rounded."""
Turn = Callable[[Tensor], Tensor]


def fake_quantize_input(x: Tensor, spec: ActivationSpec, static_scale: float | None) -> Tensor:
    """Round an input as `QuantizedLinear` will; gradients pass straight through.

    Scales of tokens and groups are functions of x, and the gradient goes through them too: a
    smaller maximum means a finer scale, which is what a rotation can do for a token.

    Args:
        x: float [..., K].
        spec: Bits and granularity.
        static_scale: For TENSOR granularity, and only there.

    Returns:
        [..., K], float32, or float64 if x is.

    Raises:
        ValueError: A static scale is missing, or the group size does not divide K.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    quant_min, quant_max = activation_range(spec.bits)
    if spec.granularity is Granularity.TENSOR:
        if static_scale is None:
            raise ValueError("an input with a static scale: expected one, got none; observe first")
        return fake_quantize(x, x.new_tensor(static_scale), quant_min, quant_max)
    columns = x.shape[-1]
    width = (spec.granularity is Granularity.GROUP and spec.group_size) or columns
    if columns % width:
        raise ValueError(f"group size {width} does not divide the {columns} input columns")
    grouped = x.unflatten(-1, (-1, width))
    largest = token_magnitude(grouped)
    factor = largest.new_tensor(spec.clip_ratio / quant_max)
    return fake_quantize_tokens(grouped, largest, factor, spec.bits).flatten(-2)


@dataclass(frozen=True, eq=False)
class _Site:
    """One input: how it is quantized, and how it goes into the basis and back."""

    fqn: str
    spec: ActivationSpec
    turn: Turn
    turn_back: Turn


class RotatedInputs:
    """Hooks on a model that round the inputs of its linears in a basis.

    Outside of `rounded` and `observed` the model is the float model.

    Args:
        model: A float decoder with folded norms.
        names: Its parts.
        recipe: How inputs are quantized; what it says of weights plays no part.
        basis: May be replaced at any time by assigning to `basis`.
        rounding: What is done to a rotated input.
    """

    def __init__(
        self,
        model: nn.Module,
        names: DecoderNames,
        recipe: QuantizationRecipe,
        basis: Basis,
        rounding: Rounding = fake_quantize_input,
    ) -> None:
        self.basis = basis
        self._rounding = rounding
        self._visit: Callable[[_Site, Tensor], Tensor] = _pass_by
        self._observers: dict[str, RangeObserver] = {}
        self._scales: dict[str, float] = {}
        self._handles: list[RemovableHandle] = []
        after_norm, other = (recipe.block_input(after_norm=norm) for norm in (True, False))
        for block in names.blocks:
            for norm in (block.attention_norm, block.mlp_norm):
                self._hook_norm(model, self._residual_site(norm, after_norm))
        if recipe.head_bits != FLOAT_BITS:
            head_input = recipe.head_input(recipe.head_weight(names.hidden_size))
            self._hook_norm(model, self._residual_site(names.final_norm, head_input))
        for layer, block in enumerate(names.blocks):
            self._hook_input(model, self._heads_site(block.output, other, layer))
            self._hook_input(model, self._mlp_site(block.down, other))

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Round the inputs of the forward passes inside the block."""
        self._visit = self._round
        try:
            yield
        finally:
            self._visit = _pass_by

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Set static scales, as calibration does, from the forward passes inside the block."""
        self._observers = {}
        self._scales = {}
        self._visit = self._observe
        try:
            yield
        finally:
            self._visit = _pass_by

    def _residual_site(self, fqn: str, spec: ActivationSpec) -> _Site:
        return _Site(fqn, spec, lambda x: x @ self.basis.r1, lambda x: x @ self.basis.r1.mT)

    def _heads_site(self, fqn: str, spec: ActivationSpec, layer: int) -> _Site:
        return _Site(
            fqn,
            spec,
            lambda x: _turn_heads(x, self.basis.r2[layer]),
            lambda x: _turn_heads(x, self.basis.r2[layer].mT),
        )

    def _mlp_site(self, fqn: str, spec: ActivationSpec) -> _Site:
        return _Site(
            fqn, spec, lambda x: self.basis.r4.rotate(x), lambda x: self.basis.r4.unrotate(x)
        )

    def _hook_norm(self, model: nn.Module, site: _Site) -> None:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return self._visit(site, output)

        self._handles.append(model.get_submodule(site.fqn).register_forward_hook(hook))

    def _hook_input(self, model: nn.Module, site: _Site) -> None:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self._visit(site, inputs[0]), *inputs[1:])

        self._handles.append(model.get_submodule(site.fqn).register_forward_pre_hook(hook))

    def _round(self, site: _Site, x: Tensor) -> Tensor:
        scale = None
        if site.spec.granularity is Granularity.TENSOR:
            scale = self._static_scale(site)
        with naming(site.fqn):
            rounded = self._rounding(site.turn(x), site.spec, scale)
        return site.turn_back(rounded).to(x.dtype)

    def _observe(self, site: _Site, x: Tensor) -> Tensor:
        if site.spec.granularity is Granularity.TENSOR:
            with naming(site.fqn):
                self._observers.setdefault(site.fqn, RangeObserver()).update(site.turn(x))
        return x

    def _static_scale(self, site: _Site) -> float:
        """Return the scale of the last observation; the search for it is worth keeping."""
        if site.fqn not in self._scales:
            if site.fqn not in self._observers:
                raise ValueError(
                    f"{site.fqn}: its scale is static and was not observed; run calibration text "
                    f"inside `observed` first"
                )
            self._scales[site.fqn] = self._observers[site.fqn].scale(site.spec.bits)
        return self._scales[site.fqn]


def _turn_heads(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply each head of x [..., heads * n] by a matrix [n, n]."""
    heads = x.unflatten(-1, (-1, matrix.shape[0]))
    turned: Tensor = (heads @ matrix).flatten(-2)
    return turned


def _pass_by(_site: _Site, x: Tensor) -> Tensor:
    return x
