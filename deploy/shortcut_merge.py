"""Merge a stored adapter; a shortcut that can only be approximated is first observed at work.

For that the adapter is attached to the model in its own basis, online rotations included, and runs
over calibration text: three quarters of the windows give the statistics, the rest measures the
merge's error in each layer. Then it is detached and merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from deploy.adapter_artifact import StoredAdapter
from reslora.adapter import restore_adapter
from reslora.attach import attach_adapters, detach_adapters
from reslora.merge import MergeMethod, merge_adapter
from reslora.merge_error import LayerError, merge_errors
from reslora.merged_factors import merges_exactly, needs_statistics
from reslora.shortcut_statistics import ShortcutStatistics, collect_statistics
from rolora.decoder import DecoderNames
from rolora.online import install_online_rotations


def merge_stored_adapter(
    model: nn.Module,
    names: DecoderNames,
    stored: StoredAdapter,
    method: MergeMethod,
    calibration: Callable[[], list[dict[str, Tensor]]],
) -> dict[str, Any]:
    """Merge into a model that is in the adapter's basis and carries no hooks.

    Args:
        model: Changed in place.
        names: Its parts.
        stored: The adapter.
        method: How.
        calibration: Gives forward-pass batches; called where the merge is an approximation.

    Returns:
        The merge report; for an approximation with `errors`, the relative errors of each layer.

    Raises:
        ValueError: The method does not fit the adapter, or the adapter not the model.
    """
    adapter = stored.adapter
    statistics: ShortcutStatistics | None = None
    errors: tuple[LayerError, ...] = ()
    if method is not MergeMethod.EXACT and not merges_exactly(adapter):
        batches = calibration()
        if len(batches) < 2:
            raise ValueError(
                f"merge method {method.value!r} needs 2 windows of calibration text, got "
                f"{len(batches)}: give more text"
            )
        held_out = batches[-max(1, len(batches) // 4) :]
        attached = attach_adapters(model, adapter.config, list(adapter.factors))
        handles = []
        try:
            restore_adapter(attached, stored.directory)
            if stored.rotation is not None:
                handles = install_online_rotations(attached, stored.rotation, names)
            if needs_statistics(adapter, method):
                statistics = collect_statistics(
                    attached,
                    batches[: -len(held_out)],
                    second_moments=method is MergeMethod.LEAST_SQUARES,
                )
            errors = merge_errors(attached, adapter, method, held_out, statistics)
        finally:
            for handle in handles:
                handle.remove()
            detach_adapters(attached)
    report = merge_adapter(model, adapter, method, statistics).to_dict()
    return report | {"errors": [asdict(error) for error in errors]} if errors else report
