"""How well a correction does on pairs it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ConfigError, ModelError
from sos_dask.schema import LABELS
from sos_dask.stats.bootstrap import MAD_TO_SIGMA


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


@dataclass(frozen=True)
class BinnedMedians:
    """Medians of residuals along another quantity: a trend that is left shows here.

    Parameters
    ----------
    edges : tuple of float
        One more than bins.
    n : tuple of int
        Residuals in each bin.
    median : tuple of float
        nan in bins with too few residuals.
    rms : float
        Root mean square of the medians, every bin with enough residuals counted once; nan where
        there is none.
    """

    edges: tuple[float, ...]
    n: tuple[int, ...]
    median: tuple[float, ...]
    rms: float


def binned_median_rms(
    x: NDArray[np.floating],
    residual: NDArray[np.floating],
    bins: int | Sequence[float] = 10,
    min_count: int = 20,
) -> BinnedMedians:
    """How far medians of residuals in bins of another quantity are from zero.

    Parameters
    ----------
    x, residual : ndarray of float, shape (n,)
        Pairs with a nan are left out.
    bins : int or sequence of float
        Number of bins with equally many pairs, or rising edges (a bin includes its lower edge, the
        last one its upper edge too).
    min_count : int
        Bins with fewer pairs do not count: a median of few says little.

    Raises
    ------
    ConfigError
        No bin, or edges that do not rise.
    """
    known = np.isfinite(x) & np.isfinite(residual)
    x, residual = x[known].astype(np.float64), residual[known].astype(np.float64)
    if isinstance(bins, int | np.integer):
        if bins < 1:
            raise ConfigError(f"bins = {bins} is not positive")
        edges = np.quantile(x, np.linspace(0, 1, bins + 1)) if len(x) else np.empty(0)
        # Many equal values can make bins of no width.
        edges = np.unique(edges)
        if len(edges) == 1:
            edges = np.repeat(edges, 2)
    else:
        edges = np.asarray(bins, dtype=np.float64)
        if len(edges) < 2 or not (np.diff(edges) > 0).all():
            raise ConfigError("edges of bins must be two or more rising numbers")
    n_bins = max(len(edges) - 1, 0)
    index = np.searchsorted(edges, x, side="right") - 1
    if n_bins:
        index[x == edges[-1]] = n_bins - 1
    counts, medians = [], []
    for number in range(n_bins):
        inside = residual[index == number]
        counts.append(len(inside))
        enough = len(inside) >= max(min_count, 1)
        medians.append(float(np.median(inside)) if enough else float("nan"))
    used = [median for median in medians if not np.isnan(median)]
    return BinnedMedians(
        tuple(edges.tolist()),
        tuple(counts),
        tuple(medians),
        float(np.sqrt(np.mean(np.square(used)))) if used else float("nan"),
    )
