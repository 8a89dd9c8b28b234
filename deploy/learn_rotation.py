"""The stage before the others, if wanted: model + text -> a rotation learned for a scheme.

    load -> [choose the best of several draws] -> learn R1 and R2 -> write

It takes long and its result serves many runs, so it is an artifact of its own, which `finetune
--method rolora` and `merge-rotate-quantize` take with `--rotation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deploy.architecture import decoder_names
from deploy.artifact import (
    ArtifactKind,
    Manifest,
    finished_artifact,
    hash_sources,
    library_versions,
    new_artifact,
    write_manifest,
)
from deploy.calibration_text import disjoint_batches
from deploy.conventions import conventions
from deploy.errors import ArtifactError, ConfigError, UnsupportedModelError
from deploy.loading import load_model
from deploy.memory import peak_memory_bytes
from deploy.rotation_file import save_rotation
from deploy.staging import require_writable
from rolora.decoder import DecoderNames
from rolora.fold import fold_norm_gains, untie_head
from rolora.learned import LearningSettings, compare_starts, learn_rotation
from rolora.rotation import DEFAULT_ROTATIONS, RotationKind, RotationPlan
from rolora.scheme import UNQUANTIZED_BITS, QuantizationRecipe


@dataclass(frozen=True)
class LearnRotationSettings:
    """Resolved settings of the stage."""

    model: str
    recipe: QuantizationRecipe
    """Of which inputs are rounded how; weights stay float while a rotation is learned."""
    learning: LearningSettings = field(default_factory=LearningSettings)
    calibration: str | None = None
    seed: int = 0
    """Of the draw where learning starts, and of the order of the text."""
    best_of: int = 1
    """Draws, with the seeds from `seed` on, of which the best is the start."""
    tokens: int = 1024
    """Of a window: one is learned from at each step."""
    held_out: int = 4
    """Windows on which scales are observed and draws and ends are measured."""

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            ConfigError: A count or the learning rate is out of range, or the scheme rounds no
                activations.
        """
        if self.recipe.scheme.activation_bits == UNQUANTIZED_BITS:
            raise ConfigError(
                f"--scheme {self.recipe.scheme}: expected one that rounds activations, such as W4A4"
            )
        least = {"steps": (self.learning.steps, 0), "best-of": (self.best_of, 1)}
        least |= {"window-tokens": (self.tokens, 2), "held-out": (self.held_out, 1)}
        for option, (value, bound) in least.items():
            if value < bound:
                raise ConfigError(f"--{option}: expected at least {bound}, got {value}")
        if not 0 < self.learning.learning_rate < float("inf"):
            raise ConfigError(
                f"--learning-rate: expected a positive number, got {self.learning.learning_rate}"
            )

    def to_config(self) -> dict[str, Any]:
        """Return the settings as plain data for the manifest."""
        return {
            "model": self.model,
            "recipe": asdict(self.recipe) | {"scheme": str(self.recipe.scheme)},
            "learning": asdict(self.learning),
            "calibration": self.calibration,
            "seed": self.seed,
            "best_of": self.best_of,
            "window_tokens": self.tokens,
            "held_out": self.held_out,
        }


@dataclass(frozen=True)
class LearnRotationReport:
    """What the stage did."""

    output: Path
    manifest: Manifest
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        details: Any = self.manifest.details
        return {
            "output": str(self.output),
            "digest": self.manifest.digest,
            "scheme": details["scheme"],
            "rotation": details["rotation"],
            "learning": details["learning"],
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def learn_rotation_artifact(
    settings: LearnRotationSettings,
    output: Path,
    progress: Callable[[str], None] = lambda step: None,
    step_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LearnRotationReport:
    """Run the stage.

    Args:
        settings: What to do.
        output: The directory to make.
        progress: Called with a line for each step of the stage.
        step_progress: Called with the numbers of finished and of all optimizer steps.

    Raises:
        ConfigError: The output exists, the text is too short, or the loss is not finite.
        ArtifactError: The model is damaged.
        UnsupportedModelError: The model is of another family, or a size has no Hadamard matrix.
    """
    progress(f"loading {settings.model}")
    loaded = load_model(settings.model)
    parents = loaded.parents() | hash_sources({"calibration": settings.calibration})
    wanted = Manifest(ArtifactKind.ROTATION, parents, settings.to_config(), library_versions())
    if done := finished_artifact(output, wanted, progress):
        return LearnRotationReport(output, done, peak_memory_bytes())
    require_writable(output)
    names = decoder_names(loaded.model.config)
    if conventions(loaded.model.config).logit_cap is not None:
        raise UnsupportedModelError(
            f"{loaded.name}: caps its logits by a tanh (final_logit_softcapping), and learning "
            f"computes its loss at the head without one; quantize with a drawn rotation (--rotate)"
        )
    held_out, batches = _text(
        disjoint_batches(
            loaded,
            settings.calibration,
            windows=settings.learning.steps + settings.held_out,
            tokens=settings.tokens,
        ),
        settings,
    )
    plans = _starts(names, settings)
    try:
        untie_head(loaded.model, names)
        fold_norm_gains(loaded.model, names)
    except ValueError as error:
        raise ArtifactError(f"{loaded.name}: cannot be rotated: {error}") from error

    def count(step: int, loss: float) -> None:
        progress(f"learning, loss {loss:.3f}")
        step_progress(step, settings.learning.steps)

    def count_draw(done: int, loss: float) -> None:
        progress(f"draw {done} of {len(plans)}, loss {loss:.3f}")

    try:
        draws = (
            compare_starts(
                loaded.model, names, settings.recipe, plans, held_out, settings.learning, count_draw
            )
            if len(plans) > 1
            else []
        )
        start = plans[draws.index(min(draws))] if draws else plans[0]
        plan, report = learn_rotation(
            loaded.model, names, settings.recipe, start, batches, held_out, settings.learning, count
        )
    except ValueError as error:
        raise ConfigError(f"{loaded.name}: no rotation can be learned: {error}") from error
    with new_artifact(output) as directory:
        details: dict[str, Any] = {
            "scheme": str(settings.recipe.scheme),
            "learning": {
                **asdict(report),
                "losses": list(report.losses),
                "steps": len(report.losses),
                "draws": {str(plan.seed): loss for plan, loss in zip(plans, draws, strict=False)},
            },
        }
        details |= save_rotation(directory, plan)
        manifest = write_manifest(directory, replace(wanted, details=details))
    return LearnRotationReport(output, manifest, peak_memory_bytes())


def _starts(names: DecoderNames, settings: LearnRotationSettings) -> list[RotationPlan]:
    try:
        return [
            RotationPlan.draw(
                names,
                DEFAULT_ROTATIONS,
                RotationKind.LEARNED,
                settings.seed + number,
                one_r2=settings.learning.one_r2,
            )
            for number in range(settings.best_of)
        ]
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from error


def _text(
    windows: list[dict[str, Tensor]], settings: LearnRotationSettings
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Shuffle windows, and part them into those held out and those to learn from.

    Raises:
        ConfigError: There are too few.
    """
    needed = settings.held_out + bool(settings.learning.steps)
    if len(windows) < needed:
        raise ConfigError(
            f"calibration {settings.calibration or 'sample'}: expected at least "
            f"{needed} windows of {settings.tokens} tokens, of which {settings.held_out} are held "
            f"out, got {len(windows)}; give more text, or lower --window-tokens or --held-out"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    order = [int(index) for index in torch.randperm(len(windows), generator=generator)]
    shuffled = [windows[index] for index in order]
    return shuffled[: settings.held_out], shuffled[settings.held_out :]
