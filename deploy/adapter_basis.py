"""In which basis a rotated adapter is trained, and how an adapter leaves or enters that basis.

Take one chain of equal linears, with P_n the rotation of layer n's input and Q_n that of its
output (column vectors: x' = P_n^T x, W' = Q_n^T W P_n). A block trained there, A' and B', means
A = A' P_n^T and B = Q_n B' in the model's own basis. There, what a shortcut adds means:

    block    B'_k A'_k x'_n          ->  Q_n Q_k^T  B_k A_k  P_k P_n^T  x_n
    input    B'_n A'_n x'_{n-1}      ->  B_n A_n  P_n P_{n-1}^T  x_{n-1}
    middle   B'_n A'_k x'_k          ->  B_n A_k x_k

So `block` needs equal P and equal Q along the chain, `input` equal P, and `middle` nothing: what it
passes on is rank-sized and belongs to no basis (but its weight-norm merge lets A'_k read x'_n, and
that needs equal P). Where it fails a random matrix stands in the shortcut. The rotations are

    linear          P          Q
    q, k, gate, up  R1         none
    v               R1         R2 of the layer
    o               R2 of the layer    R1
    down            R4         R1

Where R1 acts at run time (`rolora.rotation`), o and down have no Q. An equalization
(`rolora.equalization`) multiplies each P and Q by scales that differ from layer to layer: there an
adapter has no shortcut. R1 and R4 are one for all
layers. Only R2 differs, and mixes bases for v with `block` and for o with `block` and `input`.
Therefore an adapter with a shortcut is trained with one R2 for all layers; then every structure
fits every linear. Plain LoRA keeps an R2 for each layer.

Folding the norm gains is no rotation: the rotated model's shortcuts see normed inputs without
gains, as the same training on the folded, unrotated model would. A merged change has no shortcut
left, so it goes back exactly: rotate back, then take the gain of the norm out of the columns. The
way in is the reverse, and always there: the gain into the columns, then rotate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reslora.adapter import Adapter
from reslora.config import AdapterConfig
from rolora.decoder import DecoderNames
from rolora.fold import norm_gains
from rolora.fuse import rotate_factors, unrotate_factors
from rolora.rotation import DEFAULT_ROTATIONS, RotationKind, RotationPlan


def draw_adapter_basis(
    names: DecoderNames, config: AdapterConfig, kind: RotationKind, seed: int
) -> RotationPlan:
    """Draw R1, R2 and R4 for an adapter to be trained in; one R2 if it has a shortcut.

    Raises:
        ValueError: Kind `hadamard`, and a size that has no Hadamard matrix.
    """
    return RotationPlan.draw(names, DEFAULT_ROTATIONS, kind, seed, one_r2=config.reach != 0)


def require_adapter_basis(plan: RotationPlan, config: AdapterConfig) -> None:
    """Refuse a rotation that was not drawn for an adapter, and does not fit its shortcuts.

    Raises:
        ValueError: The adapter has a shortcut, and R2 or scales differ between the layers.
    """
    if config.reach == 0:
        return
    if plan.equalization is not None:
        raise ValueError(
            "expected no equalization, whose scales differ between the layers that a shortcut "
            "joins, got one; use a rotation made with --equalize none, or train without --structure"
        )
    if plan.r2 is None:
        return
    first = plan.r2[0].dense()
    if not all(torch.equal(other.dense(), first) for other in plan.r2[1:]):
        raise ValueError(
            "expected one R2 for all layers, which an adapter with a shortcut needs, got an R2 for "
            "each; learn it with --shared-r2, or train without --structure"
        )


def to_original_basis(
    adapter: Adapter,
    plan: RotationPlan,
    names: DecoderNames,
    model: PreTrainedModel,
    dtype: torch.dtype = torch.float64,
) -> Adapter:
    """Bring a plain LoRA adapter of a rotated model back to the model's own basis, rank unchanged.

    With R_in and R_out the rotations of a linear's sides, s and t their scales (1 without an
    equalization) and g the gain of the norm it reads: A = A' R_in^T diag(s / g),
    B = diag(1 / t) R_out B'.

    Args:
        adapter: Without a shortcut, as `to_peft_adapter` returns it.
        plan: The rotation it was trained in.
        names: Parts of the decoder.
        model: The model as it was before folding and rotating, for its gains.
        dtype: Of the new factors; the arithmetic is float64.

    Raises:
        ValueError: The adapter has a shortcut; a gain is 0 where the adapter changes the model, so
            that no weight behind it can do what the rotated one does; or a factor is not finite.
    """
    if adapter.config.structure is not None:
        raise ValueError("a shortcut cannot leave its basis: merge it first (to_peft_adapter)")
    gains = norm_gains(model, names)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for fqn, (a, b) in adapter.factors.items():
        a, b = unrotate_factors(a, b, fqn, plan, names)
        if fqn in gains:
            norm, gain = gains[fqn]
            zeros = int((gain == 0).sum())
            if zeros:
                raise ValueError(
                    f"{fqn}: {norm} has a gain of 0 in {zeros} channels, through which a rotated "
                    "adapter reaches the model and one in the model's own basis cannot; use "
                    "rolora merge-rotate-quantize, which stays in the rotated basis"
                )
            a = a / gain
        a, b = a.to(dtype), b.to(dtype)
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"{fqn}: factors are not finite in {dtype} in the model's own basis")
        factors[fqn] = (a, b)
    return Adapter(adapter.config, factors)


def to_rotated_basis(
    adapter: Adapter,
    plan: RotationPlan,
    names: DecoderNames,
    gains: Mapping[str, tuple[str, Tensor]],
) -> Adapter:
    """Bring a plain LoRA adapter of the model as it is into the basis of the rotated model.

    With R_in and R_out the rotations of a linear's sides, s and t their scales (1 without an
    equalization) and g the gain of the norm it reads: A' = A diag(g / s) R_in,
    B' = R_out^T diag(t) B.

    Args:
        adapter: Without a shortcut, trained on the model before folding and rotating.
        plan: The rotation of the model.
        names: Parts of the decoder.
        gains: By linear, from `norm_gains` of that model.

    Returns:
        The adapter with float64 factors, rank unchanged.

    Raises:
        ValueError: The adapter has a shortcut, or changes something that is no linear of a block.

    Invariant:
        The rotated model with it computes what the model with `adapter` computes, to rounding.
    """
    if adapter.config.structure is not None:
        raise ValueError("a shortcut cannot enter a basis: merge it first (to_peft_adapter)")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for fqn, (a, b) in adapter.factors.items():
        folded = a.double() * gains[fqn][1] if fqn in gains else a
        factors[fqn] = rotate_factors(folded, b, fqn, plan, names)
    return Adapter(adapter.config, factors)
