"""Merge a stored adapter; a shortcut that can only be approximated is first observed at work.

For that the adapter is attached to the model in its own basis, online rotations included, and runs
over calibration text: three quarters of the windows give the statistics, the rest measures how far
the merged model's predictions are from the unmerged one's, and the error of each layer. Then it is
detached and merged. Without a method given, all that fit are measured and the nearest is taken.

An exact merge is not measured: it differs by rounding only, and needs no calibration text.
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
from reslora.merge_divergence import merge_divergences
from reslora.merge_error import merge_errors
from reslora.merged_factors import merges_exactly, needs_statistics
from reslora.shortcut_statistics import ShortcutStatistics, collect_statistics
from rolora.decoder import DecoderNames
from rolora.online import install_online_rotations

AUTO = "auto"
"""What a user writes for the nearest method."""

APPROXIMATIONS = tuple(method for method in MergeMethod if method is not MergeMethod.EXACT)
"""Every method that fits a shortcut which does not merge exactly."""


def merge_stored_adapter(
    model: nn.Module,
    names: DecoderNames | None,
    stored: StoredAdapter,
    method: MergeMethod | None,
    calibration: Callable[[], list[dict[str, Tensor]]],
) -> dict[str, Any]:
    """Merge into a model that is in the adapter's basis and carries no hooks.

    Args:
        model: Changed in place.
        names: Its parts; None for an encoder, which carries no rotation.
        stored: The adapter.
        method: How; None is `exact` where that is possible, else the method whose predictions have
            the least KL from the unmerged model's.
        calibration: Gives forward-pass batches; called where the merge is an approximation.

    Returns:
        The merge report; for an approximation with `kl_mean` and `top1_agreement` of the model and
            `errors`, the relative errors of each layer. Where the method was open, `candidates` has
            the figures of all.

    Raises:
        ValueError: The method does not fit the adapter, or the adapter not the model.
    """
    adapter = stored.adapter
    if method is MergeMethod.EXACT or (method is None and merges_exactly(adapter)):
        return merge_adapter(model, adapter, MergeMethod.EXACT).to_dict()
    methods = APPROXIMATIONS if method is None else (method,)
    statistics: ShortcutStatistics | None = None
    batches = calibration()
    if len(batches) < 2:
        raise ValueError(
            f"merge method {str(method or AUTO)!r} needs 2 windows of calibration text, got "
            f"{len(batches)}: give more text"
        )
    held_out = batches[-max(1, len(batches) // 4) :]
    attached = attach_adapters(model, adapter.config, list(adapter.factors), head=adapter.head_name)
    handles = []
    try:
        restore_adapter(attached, stored.directory)
        if stored.rotation is not None and names is not None:
            handles = install_online_rotations(attached, stored.rotation, names)
        if any(needs_statistics(adapter, each) for each in methods):
            statistics = collect_statistics(
                attached,
                batches[: -len(held_out)],
                second_moments=MergeMethod.LEAST_SQUARES in methods,
            )
        found = merge_divergences(attached, adapter, methods, held_out, statistics)
        nearest = min(found, key=lambda each: found[each].kl_mean)
        errors = merge_errors(attached, adapter, nearest, held_out, statistics)
    finally:
        for handle in handles:
            handle.remove()
        detach_adapters(attached)
    report = merge_adapter(model, adapter, nearest, statistics).to_dict()
    report |= asdict(found[nearest]) | {"errors": [asdict(error) for error in errors]}
    if method is None:
        report["candidates"] = {str(each): asdict(figures) for each, figures in found.items()}
    return report
