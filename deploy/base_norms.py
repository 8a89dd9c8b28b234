"""The norm gains of the model that a checkpoint was made from.

A rotated checkpoint has them inside its weights, where they can no longer be told apart.
"""

from __future__ import annotations

from torch import Tensor

from deploy.checkpoint import Checkpoint
from deploy.errors import ArtifactError
from deploy.loading import load_model
from deploy.model_location import locate_model
from deploy.weight_stream import open_weight_stream, set_weight
from rolora.fold import norm_gains, norms_and_readers


def base_norm_gains(checkpoint: Checkpoint, model: str | None) -> dict[str, tuple[str, Tensor]]:
    """Read the gains that were folded into a checkpoint's linears.

    Args:
        checkpoint: A rotated one.
        model: Where its model lies; None is where the checkpoint says that it lay.

    Returns:
        As `norm_gains`.

    Raises:
        As `load_model`.
        ArtifactError: The model is not the one of the checkpoint.
    """
    reference = model or str(checkpoint.manifest.config["model"])
    opened = open_weight_stream(locate_model(reference))
    if opened is None:
        loaded = load_model(reference)
    else:
        loaded, reader = opened
        for norm in {norm for norm, _ in norms_and_readers(checkpoint.names)}:
            set_weight(loaded.model, f"{norm}.weight", reader.read(f"{norm}.weight"))
    expected = checkpoint.manifest.parents["model"]
    if loaded.digest != expected:
        raise ArtifactError(
            f"{checkpoint.directory}: was made from another model (digest {expected[:12]}) than "
            f"{reference} (digest {loaded.digest[:12]}) is now, whose norm gains an adapter needs; "
            f"name the model it was made from with --model"
        )
    return norm_gains(loaded.model, checkpoint.names)
