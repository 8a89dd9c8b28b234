"""Fuse the offline halves of a rotation plan into the weights.

With row vectors a linear computes y = x W^T + b, W [out, in]. Let R be orthogonal.

- OUTPUT side, y' = y R:  y R = x (R^T W)^T + b R,  so W' = R^T W and b' = b R.
- INPUT side, x' = x R:   x W^T = x' R^T W^T = x' (W R)^T,  so W' = W R and b' = b.
- An embedding gives a row of its table, y = E[token]:  E' = E R.

Every row of W (INPUT), column of W (OUTPUT) and the bias is therefore rotated by the same x -> x R.
For R2 that happens to each group of head_dim entries: the matrix is block diagonal, a block a head.

No entry of R^T W S exceeds the Frobenius norm of W, whatever the orthogonal R and S. So a norm
below the largest number of the weight's dtype proves the result finite before anything is written;
only where that bound fails is the result computed beforehand to look at it.

Sources: QuaRot (arXiv:2404.00456), SpinQuant (2405.16406), RoLoRA (2407.08044). Departures: biases
are rotated, weights shared by two modules are refused (the reference code rotates a tied head
twice), and the embedding is not centred.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rolora.decoder import DecoderNames
from rolora.equalization import scale_delta
from rolora.fold import norm_gain, norms_and_readers, row_chunks
from rolora.kronecker import Rotation
from rolora.rotation import RotationName, RotationPlan
from rolora.rotation_table import Application, Side, applications


def fuse_rotations(
    model: PreTrainedModel,
    names: DecoderNames,
    plan: RotationPlan,
    only: Container[str] | None = None,
) -> dict[RotationName, int]:
    """Rotate a model's weights in place, as `applications(plan, names)` lists.

    R4 needs its online half too: `install_online_rotations`.

    Args:
        model: Norm gains folded and head untied, if the plan has R1; equalized, if it has scales.
        names: Its parts.
        plan: Drawn for these sizes.
        only: FQNs of the modules to rotate, the others are not looked at; None is all.

    Returns:
        For each rotation, into how many modules it was fused.

    Raises:
        ValueError: The plan is for other sizes; a module is no plain linear or embedding, or shares
            its weight; a norm gain is not 1; a weight is not finite, or would not be in its dtype.
            The message names the module, and the model is unchanged.

    Invariant:
        Logits are unchanged (with R4 online) up to rounding: each new weight is computed in float64
        and rounded once to its dtype. Memory on top of the model is a few float64 copies of one
        linear; the embedding and the head are done in chunks of rows.
    """
    table = [
        entry
        for entry in applications(plan, names)
        if not entry.online and (only is None or entry.fqn in only)
    ]
    by_module: dict[str, list[Application]] = {}
    for entry in table:
        by_module.setdefault(entry.fqn, []).append(entry)
    with torch.no_grad():
        if RotationName.R1 in plan.names and plan.rotates_stream(names):
            _check_gains_folded(model, names, only)
        _check_unshared(model, by_module)
        for entry in table:
            _check_divides(_rotatable(model, entry.fqn), entry, plan)
        for fqn, entries in by_module.items():
            _check_result_finite(model, fqn, entries, plan)
        for fqn, entries in by_module.items():
            module = _rotatable(model, fqn)
            for rows in _independent_rows(module, entries):
                rotated = _rotated_weight(module, rows, entries, plan)
                module.weight[rows] = rotated.to(module.weight.dtype)
            if (bias := _bias(module)) is not None:
                bias.copy_(_rotated_bias(bias, entries, plan))
    return {name: sum(entry.rotation is name for entry in table) for name in sorted(plan.names)}


def fuse_into_weight(weight: Tensor, side: Side, rotation: Rotation) -> Tensor:
    """Return R^T W (OUTPUT) or W R (INPUT) of a linear's weight, in float64.

    A LoRA pair rotates likewise: `lora_A` [rank, in] on INPUT, `lora_B` [out, rank] on OUTPUT.

    Args:
        weight: Floating [out, in].
        side: Of the module, where the rotation acts.
        rotation: Its size divides that side; each group of that size is rotated alike.

    Raises:
        ValueError: The size does not divide the side.
    """
    weight = weight.double()
    return rotation.rotate(weight) if side is Side.INPUT else rotation.rotate(weight.T).T


def remove_from_weight(weight: Tensor, side: Side, rotation: Rotation) -> Tensor:
    """Return the weight from which `fuse_into_weight` makes the given one, in float64."""
    weight = weight.double()
    return rotation.unrotate(weight) if side is Side.INPUT else rotation.unrotate(weight.T).T


def rotate_delta(delta: Tensor, fqn: str, plan: RotationPlan, names: DecoderNames) -> Tensor:
    """Bring the change of a linear's weight into the basis of the rotated model.

    Args:
        delta: Floating [out, in], a change of the folded, unrotated weight.
        fqn: The linear.
        plan: The rotation.
        names: Parts of the decoder.

    Returns:
        float64 [out, in].

    Raises:
        ValueError: `fqn` is no linear of the decoder, or its shape does not fit the plan.

    Invariant:
        Rotating W + delta equals rotated W + rotated delta, to float64 rounding.
    """
    delta = scale_delta(delta, *_scales_of(fqn, plan, names))
    for entry in _offline_entries(fqn, plan, names):
        delta = fuse_into_weight(delta, entry.side, plan.find(entry.rotation, entry.layer))
    return delta


def unrotate_delta(delta: Tensor, fqn: str, plan: RotationPlan, names: DecoderNames) -> Tensor:
    """Undo `rotate_delta`: bring a change of a rotated weight back to the unrotated basis."""
    delta = delta.double()
    for entry in _offline_entries(fqn, plan, names):
        delta = remove_from_weight(delta, entry.side, plan.find(entry.rotation, entry.layer))
    return scale_delta(delta, *_inverse_scales_of(fqn, plan, names))


def rotate_factors(
    a: Tensor, b: Tensor, fqn: str, plan: RotationPlan, names: DecoderNames
) -> tuple[Tensor, Tensor]:
    """Do to B A what `rotate_delta` does to a change, factor by factor: the rank stays.

    Args:
        a: Floating [rank, in].
        b: Floating [out, rank].
        fqn: The linear.
        plan: The rotation.
        names: Parts of the decoder.

    Returns:
        A and B, float64.

    Raises:
        ValueError: As `rotate_delta`.
    """
    before, behind = _scales_of(fqn, plan, names)
    a, b = scale_delta(a, before, None), scale_delta(b, None, behind)
    for entry in _offline_entries(fqn, plan, names):
        rotation = plan.find(entry.rotation, entry.layer)
        if entry.side is Side.INPUT:
            a = fuse_into_weight(a, Side.INPUT, rotation)
        else:
            b = fuse_into_weight(b, Side.OUTPUT, rotation)
    return a, b


def unrotate_factors(
    a: Tensor, b: Tensor, fqn: str, plan: RotationPlan, names: DecoderNames
) -> tuple[Tensor, Tensor]:
    """Undo `rotate_factors`."""
    a, b = a.double(), b.double()
    for entry in _offline_entries(fqn, plan, names):
        rotation = plan.find(entry.rotation, entry.layer)
        if entry.side is Side.INPUT:
            a = remove_from_weight(a, Side.INPUT, rotation)
        else:
            b = remove_from_weight(b, Side.OUTPUT, rotation)
    before, behind = _inverse_scales_of(fqn, plan, names)
    return scale_delta(a, before, None), scale_delta(b, None, behind)


def _scales_of(
    fqn: str, plan: RotationPlan, names: DecoderNames
) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if plan.equalization is None else plan.equalization.of_linear(fqn, names)


def _inverse_scales_of(
    fqn: str, plan: RotationPlan, names: DecoderNames
) -> tuple[Tensor | None, Tensor | None]:
    before, behind = _scales_of(fqn, plan, names)
    return (None if before is None else 1.0 / before), (None if behind is None else 1.0 / behind)


def _offline_entries(fqn: str, plan: RotationPlan, names: DecoderNames) -> list[Application]:
    if fqn != names.head and fqn not in names.linears():
        raise ValueError(
            f"{fqn}: expected a linear of the decoder, got a name that is none of them"
        )
    return [entry for entry in applications(plan, names) if entry.fqn == fqn and not entry.online]


def _rotated_weight(
    module: nn.Linear | nn.Embedding,
    rows: slice,
    entries: Iterable[Application],
    plan: RotationPlan,
) -> Tensor:
    weight = module.weight[rows].double()
    for entry in entries:
        # A row of an embedding is an output, a row of a linear is an input.
        side = Side.INPUT if isinstance(module, nn.Embedding) else entry.side
        weight = fuse_into_weight(weight, side, plan.find(entry.rotation, entry.layer))
    return weight


def _rotated_bias(bias: Tensor, entries: Iterable[Application], plan: RotationPlan) -> Tensor:
    rotated = bias.double()
    for entry in entries:
        if entry.side is Side.OUTPUT:
            rotated = plan.find(entry.rotation, entry.layer).rotate(rotated)
    return rotated


def _independent_rows(
    module: nn.Linear | nn.Embedding, entries: Iterable[Application]
) -> Iterable[slice]:
    """Split the rows where no rotation mixes them; else return all of them as one slice."""
    mixed = isinstance(module, nn.Linear) and any(entry.side is Side.OUTPUT for entry in entries)
    return [slice(None)] if mixed else row_chunks(module.weight)


def _rotatable(model: PreTrainedModel, fqn: str) -> nn.Linear | nn.Embedding:
    module = model.get_submodule(fqn)
    if not isinstance(module, nn.Linear | nn.Embedding) or not module.weight.is_floating_point():
        raise ValueError(
            f"{fqn}: expected a plain linear or embedding with float weights, got "
            f"{type(module).__name__}; rotate before quantizing, and merge adapters first"
        )
    return module


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _check_gains_folded(
    model: PreTrainedModel, names: DecoderNames, only: Container[str] | None
) -> None:
    for fqn in dict(norms_and_readers(names, only)):
        if not bool((norm_gain(model, names, fqn) == 1).all()):
            raise ValueError(f"{fqn}: expected a gain of 1, got others; call fold_norm_gains first")


def _check_unshared(model: PreTrainedModel, fqns: Iterable[str]) -> None:
    owners: dict[int, str] = {}
    for fqn in fqns:
        owner = owners.setdefault(id(_rotatable(model, fqn).weight), fqn)
        if owner != fqn:
            raise ValueError(
                f"{fqn}: expected a weight of its own, got one shared with {owner}, which would be "
                f"rotated twice; call untie_head first"
            )


def _check_result_finite(
    model: PreTrainedModel, fqn: str, entries: list[Application], plan: RotationPlan
) -> None:
    module = _rotatable(model, fqn)
    weight, bias = module.weight, _bias(module)
    largest = torch.finfo(weight.dtype).max
    norm = sum(float(weight[rows].double().square().sum()) for rows in row_chunks(weight)) ** 0.5
    bias_norm = 0.0 if bias is None else float(bias.double().norm())
    if norm <= largest and bias_norm <= largest:
        return
    results = [
        _rotated_weight(module, rows, entries, plan).to(weight.dtype).isfinite().all()
        for rows in _independent_rows(module, entries)
    ]
    if bias is not None:
        results.append(_rotated_bias(bias, entries, plan).to(bias.dtype).isfinite().all())
    if not all(bool(result) for result in results):
        raise ValueError(
            f"{fqn}: rotating it gives values that are not finite in {weight.dtype}; "
            f"load the model in float32 and check its weights for NaN and Inf"
        )


def _check_divides(
    module: nn.Linear | nn.Embedding, entry: Application, plan: RotationPlan
) -> None:
    rows_are_inputs = isinstance(module, nn.Embedding) or entry.side is Side.INPUT
    length = module.weight.shape[1 if rows_are_inputs else 0]
    size = plan.find(entry.rotation, entry.layer).size
    if length % size:
        raise ValueError(
            f"{entry.fqn}: expected its {entry.side} to be a multiple of {size}, the size of "
            f"{entry.rotation}, got {length}"
        )
