"""Adapters that are not merged but stay beside an exported base, to be swapped at run time.

The base is quantized once, without an adapter. An adapter is kept in float32, brought into the
basis of that base:

    trained on the model as it is (lora, PEFT)    gains and rotation go into A and B
    trained on the rotated model (rolora)         as it is, if the rotation is the base's own

so that base + adapter computes what the float model + adapter does, up to the rounding of the base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deploy.adapter_artifact import StoredAdapter, open_adapter
from deploy.adapter_basis import to_rotated_basis
from deploy.adapter_files import SUFFIX
from deploy.adapter_ops import Factors
from deploy.artifact import is_artifact
from deploy.checkpoint import Checkpoint
from deploy.errors import ArtifactError, ConfigError, StageOrderError, UnsupportedModelError
from deploy.module_layout import adapter_in_our_layout
from deploy.weight_files import digest_files, name_some
from reslora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, load_adapter
from rolora.rotation import RotationPlan

Gains = Callable[[], Mapping[str, tuple[str, Tensor]]]
"""Returns the norm gains of the base model, by linear; called where they are needed."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter to keep, and the name it is selected by."""

    name: str
    directory: Path


@dataclass(frozen=True)
class KeptAdapter:
    """An adapter in the basis of the checkpoint it is kept beside."""

    name: str
    digest: str
    """Of the artifact, or of PEFT's two files."""
    rank: int
    trained_rotated: bool
    """In the rotated basis, as method rolora does."""
    factors: dict[str, Factors]
    """By linear, float32."""

    @property
    def file(self) -> str:
        """Name of its file in the export."""
        return f"{self.name}{SUFFIX}"

    def to_details(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        return {
            "file": self.file,
            "digest": self.digest,
            "rank": self.rank,
            "trained": "rotated" if self.trained_rotated else "not rotated",
            "linears": len(self.factors),
        }


def parse_adapter_choices(texts: Sequence[str]) -> tuple[AdapterChoice, ...]:
    """Read `[NAME=]DIRECTORY` of each `--keep-adapter`; the name is the directory's by default.

    Raises:
        ConfigError: Two have one name, or a name makes no file name; all faults in one message.
    """
    choices: list[AdapterChoice] = []
    faults = []
    for text in texts:
        name, equals, place = text.partition("=")
        directory = Path(place if equals else text)
        name = name if equals else directory.resolve().name
        if _NAME.fullmatch(name) is None:
            faults.append(
                f"{text}: expected a name of letters, digits, '.', '_' and '-', got {name!r}; "
                f"write NAME=DIRECTORY"
            )
        elif name in (choice.name for choice in choices):
            faults.append(f"{text}: {name!r} is the name of two adapters; write NAME=DIRECTORY")
        choices.append(AdapterChoice(name, directory))
    if faults:
        raise ConfigError.from_faults("--keep-adapter", faults)
    return tuple(choices)


def require_base_without_adapter(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that an adapter is merged into.

    Raises:
        StageOrderError: It is one.
    """
    if "adapter" in checkpoint.manifest.parents:
        raise StageOrderError(
            f"{checkpoint.directory}: an adapter is merged into it; --keep-adapter needs a base "
            f"made by rolora merge-rotate-quantize without --adapter"
        )


def open_kept_adapter(choice: AdapterChoice, checkpoint: Checkpoint, gains: Gains) -> KeptAdapter:
    """Read an adapter and bring it into the basis of a checkpoint.

    Args:
        choice: A plain LoRA adapter: what finetune or merge --to adapter wrote, or PEFT.
        checkpoint: The base.
        gains: For an adapter of the model as it is beside a rotated base.

    Raises:
        ConfigError: No such directory.
        StageOrderError: The adapter has shortcuts, which have to be merged first, or is one that
            was trained in a quantized checkpoint.
        ArtifactError: A file is missing or damaged; or the adapter is of another model, or was
            trained in the basis of another rotation.
        UnsupportedModelError: It changes more than the linears of the blocks.
    """
    where = choice.directory
    if not where.is_dir():
        raise ConfigError(f"--keep-adapter {where}: no such directory")
    plan: RotationPlan | None = None
    if is_artifact(where):
        stored = open_adapter(where)
        adapter, digest, plan = stored.adapter, stored.manifest_digest, stored.rotation
        _require_plain(where, adapter)
        model = str(checkpoint.manifest.config["model"])
        stored.require_base(checkpoint.manifest.parents["model"], model)
        _require_basis(stored, checkpoint)
    else:
        try:
            adapter = load_adapter(where)
        except ValueError as error:
            raise ArtifactError(str(error)) from error
        _require_plain(where, adapter)
        digest = digest_files([where / CONFIG_FILE, where / WEIGHTS_FILE])
    ours = adapter_in_our_layout(adapter, checkpoint.config)
    _require_fit(where, ours, checkpoint)
    if checkpoint.rotation is not None and plan is None:
        ours = to_rotated_basis(ours, checkpoint.rotation, checkpoint.names, gains())
    scaling = ours.config.scaling
    factors = {
        fqn: (a.float(), (b.double() * scaling).float()) for fqn, (a, b) in ours.factors.items()
    }
    return KeptAdapter(choice.name, digest, ours.config.rank, plan is not None, factors)


def _require_plain(where: Path, adapter: Adapter) -> None:
    if adapter.head:
        raise UnsupportedModelError(
            f"{where}: is an adapter of a classifier; --keep-adapter takes those of language models"
        )
    if adapter.config.structure is not None:
        raise StageOrderError(
            f"{where}: has shortcuts between layers (structure {adapter.config.structure}), which "
            f"the branch of one linear cannot compute; merge it to a plain adapter first: rolora "
            f"merge --model MODEL --adapter {where} --to adapter --output PLAIN"
        )


def _require_basis(stored: StoredAdapter, checkpoint: Checkpoint) -> None:
    """Refuse an adapter of another rotation than the checkpoint's; R3 changes no basis."""
    own, base = stored.rotation, checkpoint.rotation
    if own is None:
        return
    if base is not None and base.r3 is not None:
        own = own.with_r3(checkpoint.names)
    if base is None or own.digest != base.digest:
        has = "no rotation" if base is None else f"a rotation with the digest {base.digest[:12]}"
        raise ArtifactError(
            f"{stored.directory}: was trained in the basis of a rotation (digest "
            f"{own.digest[:12]}), {checkpoint.directory} has {has}; make a base in its basis with "
            f"rolora merge-rotate-quantize --rotation {stored.directory}, or bring the adapter "
            f"back to the model's own basis with rolora merge --to adapter"
        )


def _require_fit(where: Path, adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Refuse what is no change of the linears in the blocks."""
    linears = list(checkpoint.names.linears())
    if other := sorted(adapter.factors.keys() - set(linears)):
        raise UnsupportedModelError(
            f"{where}: changes {name_some(other)}; --keep-adapter takes changes of the linears in "
            f"the blocks, such as {linears[0]}"
        )
    for fqn, shape in adapter.shapes().items():
        linear = checkpoint.linear(fqn)
        expected = (linear.out_features, linear.in_features)
        if shape != expected:
            raise ArtifactError(
                f"{where}: {fqn}: adapter is for a linear {list(shape)}, the model's is "
                f"{list(expected)}; give an adapter of this model"
            )


@contextmanager
def active_adapter(model: nn.Module, adapter: KeptAdapter) -> Iterator[None]:
    """Let the linears of a torch model add an adapter's float branch while the block runs.

    What a linear reads is taken as it comes in, behind online rotations and before it is rounded.

    Args:
        model: In the basis of the adapter.
        adapter: Its factors are of the model's linears.
    """

    def branch(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + nn.functional.linear(nn.functional.linear(inputs[0], a), b)

        return add

    with ExitStack() as hooks, torch.no_grad():
        for fqn, (a, b) in adapter.factors.items():
            handle = model.get_submodule(fqn).register_forward_hook(branch(a, b))
            hooks.callback(handle.remove)
        yield
