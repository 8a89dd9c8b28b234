"""Merge a stored adapter; a shortcut that can only be approximated is first observed at work.

For that the adapter is attached to the model in its own basis, online rotations included, and runs
over calibration text: three quarters of the windows give the statistics, the rest measures how far
the merged model's predictions are from the unmerged one's, and the error of each layer. Then it is
detached and merged. Without a method given, all that fit are measured and the nearest is taken.

An exact merge is not measured: it differs by rounding only, and needs no calibration text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from deploy.adapter_artifact import StoredAdapter
from deploy.errors import ConfigError
from deploy.live_adapter import attach_stored
from reslora.attach import detach_adapters
from reslora.merge import MergeMethod, merge_adapter
from reslora.merge_divergence import merge_divergences
from reslora.merge_error import merge_errors
from reslora.merged_factors import merges_exactly, needs_statistics, require_fit
from reslora.shortcut_statistics import ShortcutStatistics, collect_statistics
from rolora.decoder import DecoderNames

AUTO = "auto"
"""What a user writes for the nearest method."""

APPROXIMATIONS = tuple(method for method in MergeMethod if method is not MergeMethod.EXACT)
"""Every method that fits a shortcut which does not merge exactly."""


@dataclass(frozen=True)
class ChosenMerge:
    """How an adapter will be merged, and how far that is from leaving it unmerged."""

    method: MergeMethod
    statistics: ShortcutStatistics | None
    """What the method needs to know; None where it needs nothing."""
    figures: dict[str, Any]
    """Of an approximation: `kl_mean` and `top1_agreement` of the model, `errors` of each layer, and
    `candidates` where the method was open. Empty for an exact merge."""


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
        method: See `choose_merge`.
        calibration: See `choose_merge`.

    Returns:
        The merge report, with the figures of `ChosenMerge`.

    Raises:
        ConfigError: See `choose_merge`.
        ValueError: The adapter does not fit the model.
    """
    chosen = choose_merge(model, names, stored, method, calibration)
    report = merge_adapter(model, stored.adapter, chosen.method, chosen.statistics)
    return report.to_dict() | chosen.figures


def require_method(stored: StoredAdapter, method: MergeMethod | None) -> None:
    """Refuse a method that cannot merge an adapter; None is open, which always fits.

    Raises:
        ConfigError: The method does not fit.
    """
    if method is not None:
        try:
            require_fit(stored.adapter, method)
        except ValueError as error:
            raise ConfigError(f"{stored.directory}: {error}, or auto") from error


def is_exact(stored: StoredAdapter, method: MergeMethod | None) -> bool:
    """Return whether a merge will be exact, so that nothing has to be observed for it."""
    return method is MergeMethod.EXACT or (method is None and merges_exactly(stored.adapter))


def choose_merge(
    model: nn.Module,
    names: DecoderNames | None,
    stored: StoredAdapter,
    method: MergeMethod | None,
    calibration: Callable[[], list[dict[str, Tensor]]],
) -> ChosenMerge:
    """Observe an adapter at work, and measure how far merges are from it; nothing is merged.

    Args:
        model: In the adapter's basis, without hooks; as it was on return. Not touched where the
            merge is exact.
        names: Its parts; None for an encoder, which carries no rotation.
        stored: The adapter.
        method: How; None is `exact` where that is possible, else the method whose predictions have
            the least KL from the unmerged model's.
        calibration: Gives forward-pass batches; called where the merge is an approximation.

    Raises:
        ConfigError: The method does not fit the adapter, or there is too little text.
        ValueError: The adapter does not fit the model.
    """
    adapter = stored.adapter
    require_method(stored, method)
    if is_exact(stored, method):
        return ChosenMerge(MergeMethod.EXACT, None, {})
    methods = APPROXIMATIONS if method is None else (method,)
    statistics: ShortcutStatistics | None = None
    batches = calibration()
    if len(batches) < 2:
        raise ConfigError(
            f"merge method {str(method or AUTO)!r} needs 2 windows of calibration text, got "
            f"{len(batches)}: give more text"
        )
    held_out = batches[-max(1, len(batches) // 4) :]
    attached, handles = attach_stored(model, names, stored)
    try:
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
    figures: dict[str, Any] = asdict(found[nearest])
    figures["errors"] = [asdict(error) for error in errors]
    if method is None:
        figures["candidates"] = {str(each): asdict(values) for each, values in found.items()}
    return ChosenMerge(nearest, statistics, figures)


def model_wide_figures(report: Any) -> dict[str, Any] | None:
    """Return what a merge report says of the whole model, to be shown; None without a merge."""
    wide = ("method", "kl_mean", "top1_agreement", "candidates")
    return {key: report[key] for key in wide if key in report} if report else None
