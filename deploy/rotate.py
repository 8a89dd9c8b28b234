"""Bring a loaded model into a rotated basis."""

from __future__ import annotations

from collections.abc import Container

from deploy.errors import ArtifactError
from deploy.loading import LoadedModel
from rolora.decoder import DecoderNames
from rolora.equalization import equalize_model
from rolora.fold import fold_norm_gains, untie_head
from rolora.fuse import fuse_rotations
from rolora.rotation import RotationPlan


def rotate_model(
    loaded: LoadedModel,
    names: DecoderNames,
    plan: RotationPlan,
    only: Container[str] | None = None,
) -> None:
    """Untie the head, fold the norms, equalize, fuse a rotation, in place; without online halves.

    Args:
        loaded: The model.
        names: Its parts.
        plan: The rotation.
        only: FQNs of the modules to rewrite, whose weights are in memory, in a model whose head is
            untied already; None is all.

    Invariant:
        With the online rotations installed, logits are unchanged up to float32 rounding of the
        weights.

    Raises:
        ArtifactError: A weight is not finite.
    """
    try:
        if only is None:
            untie_head(loaded.model, names)
        fold_norm_gains(loaded.model, names, only)
        if plan.equalization is not None:
            equalize_model(loaded.model, names, plan.equalization, only)
        fuse_rotations(loaded.model, names, plan, only)
    except ValueError as error:
        raise ArtifactError(f"{loaded.name}: cannot be rotated: {error}") from error
