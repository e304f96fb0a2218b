"""How well a correction does on pairs it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ModelError
from sos_dask.schema import LABELS

MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Metric:
    """Median and scatter of target - reference, before and after the correction.

    Parameters
    ----------
    method, label, subset : str
    n : int
        Pairs with a difference and a prediction.
    median_before, scatter_before, median_after, scatter_after : float
        In the unit of the label; scatter is 1.4826 times the median absolute deviation from the
        median.
    """

    method: str
    label: str
    subset: str
    n: int
    median_before: float
    scatter_before: float
    median_after: float
    scatter_after: float


def scatter(values: NDArray[np.floating]) -> float:
    """1.4826 times the median absolute deviation from the median; NaN without values."""
    if not len(values):
        return float("nan")
    return float(MAD_TO_SIGMA * np.median(np.abs(values - np.median(values))))


def held_out_metrics(
    method: str,
    differences: NDArray[np.float32],
    predicted: NDArray[np.float32],
    subset: str = "all",
) -> list[Metric]:
    """Metrics of each label on held-out pairs.

    Parameters
    ----------
    method, subset : str
    differences, predicted : ndarray of float32, shape (n, 3)
        In the order of `LABELS`; pairs with a NaN in a label are left out of that label.

    Raises
    ------
    ModelError
        A label has no held-out pair at all.
    """
    metrics = []
    for number, label in enumerate(LABELS):
        before = differences[:, number].astype(np.float64)
        after = before - predicted[:, number]
        known = np.isfinite(after)
        if not known.any():
            raise ModelError(f"{method}: no held-out pair has {label} and a prediction of it")
        before, after = before[known], after[known]
        metrics.append(
            Metric(
                method,
                label,
                subset,
                len(before),
                float(np.median(before)),
                scatter(before),
                float(np.median(after)),
                scatter(after),
            )
        )
    return metrics


def choose(metrics: Sequence[Metric]) -> str:
    """The method with the smallest scatter: mean over labels of after / before; ties by name."""
    if not metrics:
        raise ModelError("there is no metric to choose a method by")
    ratios: dict[str, list[float]] = {}
    for metric in metrics:
        ratio = metric.scatter_after / metric.scatter_before if metric.scatter_before else np.inf
        ratios.setdefault(metric.method, []).append(ratio)
    return min(ratios, key=lambda method: (float(np.mean(ratios[method])), method))
