"""How good predictions of labels are, by the figures that GLUE reports for its tasks.

    classes      accuracy, mcc (Matthews correlation); f1 of the second class where there are two
    regression   pearson, spearman

A correlation is 0 where one side is constant: predictions that never change tell nothing.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from reslora.labelled_rows import LabelScheme


def metric_names(labels: LabelScheme) -> tuple[str, ...]:
    """Return the names of the figures that `label_metrics` gives, the task's main one first."""
    if labels.is_regression:
        return ("pearson", "spearman")
    return ("accuracy", "mcc", "f1") if labels.outputs == 2 else ("accuracy", "mcc")


def label_metrics(logits: np.ndarray, targets: np.ndarray, labels: LabelScheme) -> dict[str, float]:
    """Compare predictions with labels.

    Args:
        logits: Float [rows, outputs].
        targets: Class indices or numbers [rows].
        labels: What they mean.

    Returns:
        `metric_names(labels)` with their values.

    Raises:
        ValueError: There is no row, or a logit is not finite.
    """
    if len(targets) == 0:
        raise ValueError("no rows to measure predictions on")
    if not np.isfinite(logits).all():
        raise ValueError("predictions hold NaN or infinite values; run the model in float32")
    if labels.is_regression:
        values = logits.reshape(-1).astype(np.float64)
        if min(np.ptp(values), np.ptp(targets)) == 0:
            return dict.fromkeys(metric_names(labels), 0.0)
        return {
            "pearson": float(pearsonr(values, targets).statistic),
            "spearman": float(spearmanr(values, targets).statistic),
        }
    found = logits.argmax(axis=-1)
    both_vary = min(np.ptp(found), np.ptp(targets)) > 0
    metrics = {
        "accuracy": float(accuracy_score(targets, found)),
        "mcc": float(matthews_corrcoef(targets, found)) if both_vary else 0.0,
    }
    if labels.outputs == 2:
        metrics["f1"] = float(f1_score(targets, found, zero_division=0.0))
    return metrics
