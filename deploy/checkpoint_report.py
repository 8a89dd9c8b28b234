"""What the manifest of a checkpoint says of its quantization, and what its stage reports of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.artifact import Manifest
from deploy.checkpoint_reader import formats_to_details
from deploy.checkpoint_settings import FLOAT_SCHEME
from deploy.shortcut_merge import model_wide_figures
from rolora.calibrated_plan import CalibratedPlan
from rolora.scheme import QuantizationRecipe


def quantization_details(
    recipe: QuantizationRecipe | None,
    planned: CalibratedPlan,
    rounding: Iterable[Mapping[str, Any]],
    merged: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what the manifest says.

    Args:
        recipe: None where nothing is quantized.
        planned: How each linear was quantized, and what that was chosen on.
        rounding: `LayerError` of each linear, as plain data.
        merged: The report of the merge, if there was one.
    """
    return {
        "scheme": FLOAT_SCHEME if recipe is None else str(recipe.scheme),
        "linears": formats_to_details(planned.plans),
        "choices": planned.to_details(),
        "rounding": {error["fqn"]: error for error in rounding},
        "merge": merged,
    }


@dataclass(frozen=True)
class CheckpointReport:
    """What the stage did."""

    output: Path
    manifest: Manifest
    peak_memory_bytes: int
    seconds_per_block: tuple[float, ...] = ()
    """Of each block, until it is stored; nothing if the checkpoint was finished already."""
    resumed_parts: int = 0
    """Parts of the model that an earlier process had finished."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        rounding: Any = self.manifest.details["rounding"]
        return {
            "output": str(self.output),
            "digest": self.manifest.digest,
            "scheme": self.manifest.details["scheme"],
            "merge": model_wide_figures(self.manifest.details["merge"]),
            "quantized_layers": len(rounding),
            "largest_rounding_error": max(
                rounding.values(), key=lambda layer: layer["relative_error"], default=None
            ),
            "peak_memory_bytes": self.peak_memory_bytes,
            "seconds_per_block": list(self.seconds_per_block),
            "resumed_parts": self.resumed_parts,
        }
