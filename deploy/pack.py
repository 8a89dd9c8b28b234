"""The stage that ends quantization-aware training: start + trained adapter -> checkpoint.

Nothing is calibrated or chosen here: the adapter was trained in the rounding of its start, and the
integers are those that its last forward pass used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from deploy.adapter_artifact import StoredAdapter, open_trained_adapter
from deploy.artifact import (
    ArtifactKind,
    Manifest,
    finished_artifact,
    library_versions,
    new_artifact,
    write_manifest,
)
from deploy.checkpoint import Checkpoint, table_keys, write_model
from deploy.checkpoint_report import CheckpointReport
from deploy.errors import ArtifactError, ConfigError, StageOrderError
from deploy.loading import load_model, save_tokenizer
from deploy.memory import peak_memory_bytes
from deploy.quantized_training import (
    AwareModel,
    build_aware_model,
    open_start,
    packed_model,
    restore_scales,
)
from deploy.rotation_file import save_rotation
from reslora.adapter import restore_adapter
from rolora.linear import QuantizedLinear


@dataclass(frozen=True)
class PackSettings:
    """Resolved settings of the stage."""

    model: str
    adapter: Path
    start: Path | None = None
    """The checkpoint that the adapter was trained in; None looks where it was then."""

    def to_config(self) -> dict[str, Any]:
        """Return the settings as plain data for the manifest."""
        start = None if self.start is None else str(self.start)
        return {"model": self.model, "adapter": str(self.adapter), "start": start}


def pack(
    settings: PackSettings, output: Path, progress: Callable[[str], None] = lambda step: None
) -> CheckpointReport:
    """Run the stage.

    Args:
        settings: What to do.
        output: The checkpoint directory to make.
        progress: Called with a line for each step.

    Raises:
        ConfigError: The output exists, or the start is not where it was.
        StageOrderError: The adapter was not trained in a checkpoint, or in another one.
        ArtifactError: A file is damaged, or the adapter belongs to another model.
    """
    adapter = open_trained_adapter(settings.adapter)
    directory = settings.start or _recorded_start(adapter)
    progress(f"loading {settings.model}")
    loaded = load_model(settings.model)
    adapter.require_base(loaded.digest, settings.model)
    with open_start(directory, loaded) as start:
        _require_start(adapter, start)
        parents = loaded.parents() | {
            "adapter": adapter.manifest_digest,
            "start": start.manifest.digest,
        }
        config = settings.to_config()
        wanted = Manifest(ArtifactKind.CHECKPOINT, parents, config, library_versions())
        if done := finished_artifact(output, wanted, progress):
            return CheckpointReport(output, done, peak_memory_bytes())
        progress(f"packing {settings.adapter} into {directory}")
        stored = adapter.adapter
        aware = build_aware_model(loaded, start, stored.config, list(stored.factors), seed=0)
        try:
            restore_adapter(aware.peft_model, settings.adapter)
        except ValueError as error:
            raise ArtifactError(f"{settings.adapter}: cannot be attached: {error}") from error
        restore_scales(aware, settings.adapter)
        model = packed_model(aware)
        with new_artifact(output) as written:
            details = _details(aware, start, model) | save_rotation(written, start.rotation)
            start.config.save_pretrained(written)
            save_tokenizer(loaded, written)
            write_model(written, model, table_keys(start.names.head) if start.shares_table else ())
            manifest = write_manifest(written, replace(wanted, details=details))
    return CheckpointReport(output, manifest, peak_memory_bytes())


def _recorded_start(adapter: StoredAdapter) -> Path:
    recorded = adapter.manifest.config.get("start")
    directory = Path(str(recorded))
    if not directory.is_dir():
        raise ConfigError(
            f"{adapter.directory}: was trained in the checkpoint {recorded}, which is not there; "
            "say with --start where it is now"
        )
    return directory


def _require_start(adapter: StoredAdapter, start: Checkpoint) -> None:
    expected = str(adapter.manifest.parents.get("start"))
    if expected != start.manifest.digest:
        raise StageOrderError(
            f"{adapter.directory}: was trained in a checkpoint with the digest {expected[:12]}, "
            f"but {start.directory} has {start.manifest.digest[:12]}; give with --start the one "
            "it was trained in"
        )


def _details(aware: AwareModel, start: Checkpoint, model: nn.Module) -> dict[str, Any]:
    """Return the manifest details: the start's, with the clip ratios that were trained."""
    linears: Any = start.manifest.details["linears"]
    formats = {}
    for fqn, raw in linears.items():
        module = model.get_submodule(fqn)
        assert isinstance(module, QuantizedLinear)
        formats[fqn] = raw | {"activation_clip_ratio": module.activation.clip_ratio}
    return {
        "scheme": start.manifest.details["scheme"],
        "kv_bits": start.kv_bits,
        "linears": formats,
        "rounding": {},
        "merge": None,
        "trained": {
            "integers_changed": changed_integers(aware, start),
        },
    } | ({"shared_table": True} if start.shares_table else {})


def changed_integers(aware: AwareModel, start: Checkpoint) -> float:
    """Return the share of the blocks' integers that training changed."""
    changed = total = 0
    for fqn, layer in aware.layers.items():
        before = start.integers(start.linear(fqn))
        changed += int((layer.integers().numpy() != before).sum())
        total += before.size
    return changed / total
