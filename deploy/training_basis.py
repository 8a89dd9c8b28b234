"""The weights that training checkpoints belong to, noted beside them.

A checkpoint of an adapter fits any model of its shapes; going on with another model or rotation
would end in an adapter of neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.errors import ArtifactError, ConfigError
from deploy.staging import write_whole
from deploy.weight_files import read_json_object
from reslora.checkpoints import refuse_existing

BASIS_FILE = "basis.json"
"""Beside training checkpoints: the weights they were trained on."""


def claim_checkpoints(
    directory: Path, basis: Mapping[str, Any], *, resume: bool, notes: bool
) -> None:
    """Note the weights that training checkpoints belong to; refuse those of others.

    Args:
        directory: Of the checkpoints.
        basis: JSON values that tell the weights from all others.
        resume: Whether training goes on from what is there.
        notes: Whether this process is the one, of several, that writes the note.

    Raises:
        ConfigError: The checkpoints to resume from were made with another model or rotation.
        ArtifactError: What says so is damaged.
        ValueError: A new run would lie over the checkpoints of another.
    """
    if not resume:
        refuse_existing(directory)
    marker = directory / BASIS_FILE
    if resume and marker.is_file():
        noted = _read_basis(marker)
        differing = [
            f"{key}: {noted.get(key)} then, {basis[key]} now"
            for key in basis
            if noted.get(key) != basis[key]
        ]
        if differing:
            raise ConfigError(
                f"{directory}: its checkpoints were made with other weights: "
                f"{'; '.join(differing)}; give that model, method and rotation, or remove the "
                "directory and start anew"
            )
    elif notes:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(marker, json.dumps(dict(basis), indent=2) + "\n")


def _read_basis(marker: Path) -> Mapping[str, Any]:
    try:
        return read_json_object(marker)
    except ArtifactError as error:
        raise ArtifactError(
            f"{marker}: expected what its checkpoints were trained on: {error}; remove "
            f"{marker.parent} and start anew"
        ) from error
