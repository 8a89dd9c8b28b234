"""A stored adapter at work on its model, unmerged: nothing is approximated.

The model is brought into the basis that the adapter was trained in, the adapter is attached with
its shortcuts, and the online rotations of that basis are put before the linears that need them.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from deploy.adapter_artifact import StoredAdapter
from deploy.architecture import decoder_names
from deploy.errors import ArtifactError
from deploy.loading import LoadedModel
from deploy.rotate import rotate_model
from reslora.adapter import restore_adapter
from reslora.attach import attach_adapters
from rolora.decoder import DecoderNames
from rolora.online import install_online_rotations


def attach_to_loaded(loaded: LoadedModel, stored: StoredAdapter) -> PeftModel:
    """Attach an adapter to the model it was trained on.

    Args:
        loaded: Changed in place; rotated first if the adapter was trained in a rotated basis.
        stored: The adapter.

    Returns:
        The model with the adapter, in evaluation mode.

    Raises:
        ArtifactError: The adapter belongs to another model or does not fit it.
        UnsupportedModelError: The model is of another family.
    """
    stored.require_base(loaded.digest, loaded.name)
    names = decoder_names(loaded.model.config)
    try:
        with torch.no_grad():
            if stored.rotation is not None:
                rotate_model(loaded, names, stored.rotation)
        attached, _ = attach_stored(loaded.model, names, stored)
    except ValueError as error:
        raise ArtifactError(f"{stored.directory}: cannot be attached: {error}") from error
    return attached.eval()


def attach_stored(
    model: nn.Module, names: DecoderNames | None, stored: StoredAdapter
) -> tuple[PeftModel, list[RemovableHandle]]:
    """Attach an adapter to a model that is in its basis already.

    Args:
        model: Changed in place; without hooks.
        names: Its parts; None for an encoder, which carries no rotation.
        stored: The adapter.

    Returns:
        The model with the adapter, and the handles of the online rotations.

    Raises:
        ValueError: The adapter does not fit the model.
    """
    adapter = stored.adapter
    attached = attach_adapters(model, adapter.config, list(adapter.factors), head=adapter.head_name)
    restore_adapter(attached, stored.directory)
    if stored.rotation is None or names is None:
        return attached, []
    return attached, install_online_rotations(attached, stored.rotation, names)
