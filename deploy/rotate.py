"""Bring a loaded model into a rotated basis."""

from __future__ import annotations

from deploy.errors import ArtifactError
from deploy.loading import LoadedModel
from rolora.decoder import DecoderNames
from rolora.fold import fold_norm_gains, untie_head
from rolora.fuse import fuse_rotations
from rolora.rotation import RotationPlan


def rotate_model(loaded: LoadedModel, names: DecoderNames, plan: RotationPlan) -> None:
    """Untie the head, fold the norms and fuse a rotation, in place; R4's online half is not set.

    Invariant:
        With the online rotations installed, logits are unchanged up to float32 rounding of the
        weights.

    Raises:
        ArtifactError: A weight is not finite.
    """
    try:
        untie_head(loaded.model, names)
        fold_norm_gains(loaded.model, names)
        fuse_rotations(loaded.model, names, plan)
    except ValueError as error:
        raise ArtifactError(f"{loaded.name}: cannot be rotated: {error}") from error
