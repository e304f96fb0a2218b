"""Medians and percentiles of values in bins of other quantities.

All values of a bin are ranked, so medians and percentiles are exact and depend neither on the order
of the values nor on how they were partitioned. Percentiles are interpolated linearly between order
statistics (definition 7 of Hyndman & Fan 1996, The American Statistician 50, 361; numpy's default).

The error of a median is the asymptotic one of a sample from a normal distribution,
``sqrt(pi / 2) * sigma / sqrt(n)`` (Kendall & Stuart, The Advanced Theory of Statistics, vol. 1,
§10.10), with sigma half the width from the 16th to the 84th percentile, which outliers do not move.
It takes the values for independent: repeated observations of one star make it too small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sos_dask.columns import FloatArray, IntArray
from sos_dask.errors import ConfigError

MEDIAN_ERROR = float(np.sqrt(np.pi / 2))  # 1.2533: of a median, in units of that of a mean
MIN_COUNT = 20
MOST_BINS = 10_000  # of an axis


@dataclass(frozen=True)
class Axis:
    """A quantity with its bins of equal width.

    Parameters
    ----------
    name : str
        A column of the pairs.
    low, high, width : float
        In the unit of the column.

    Raises
    ------
    ConfigError
        The limits do not rise, or the width is not positive, leaves no bin or more than
        `MOST_BINS`.
    """

    name: str
    low: float
    high: float
    width: float

    def __post_init__(self) -> None:
        if not (0 < self.width <= self.high - self.low < np.inf):
            raise ConfigError(
                f"bins of {self.name} from {self.low} to {self.high}, {self.width} wide: there "
                "are none"
            )
        if (self.high - self.low) / self.width > MOST_BINS:
            raise ConfigError(
                f"bins of {self.name} from {self.low} to {self.high}, {self.width} wide: there "
                f"are more than {MOST_BINS:,}",
                "Give a larger width.",
            )

    @property
    def edges(self) -> FloatArray:
        """Edges of the bins; the last bin may be narrower."""
        n_bins = int(np.ceil(round((self.high - self.low) / self.width, 6)))
        return np.append(np.round(self.low + self.width * np.arange(n_bins), 10), self.high)


def equal_count_edges(x: NDArray[np.floating], n_bins: int) -> FloatArray:
    """Place edges of bins with equally many values; fewer bins where many values are equal.

    Raises
    ------
    ConfigError
        ``n_bins`` is not positive.
    """
    if n_bins < 1:
        raise ConfigError(f"n_bins must be positive, got {n_bins}")
    known = np.sort(x[np.isfinite(x)]).astype(np.float64) + 0.0  # -0.0 and 0.0 are one edge
    if not len(known):
        return np.empty(0)
    edges = np.unique(np.quantile(known, np.linspace(0, 1, n_bins + 1)))
    return np.repeat(edges, 2) if len(edges) == 1 else edges


def bins_of(x: NDArray[np.floating], edges: FloatArray) -> IntArray:
    """Number the bin of every value; -1 outside the edges and for nan.

    A bin includes its lower edge, the last one its upper edge, too.

    Raises
    ------
    ConfigError
        The edges fall, or one is nan.
    """
    if not (np.diff(edges) >= 0).all():
        raise ConfigError("edges of bins must be rising numbers")
    n_bins = len(edges) - 1
    index = np.searchsorted(edges, x, side="right") - 1
    if n_bins > 0:
        index[x == edges[-1]] = n_bins - 1
    index[index >= n_bins] = -1
    return index


class Quantiles(NamedTuple):
    """Percentiles of the values in each bin: one entry for each, nan where there are none."""

    n: IntArray
    median: FloatArray
    p16: FloatArray
    p84: FloatArray
    error: FloatArray  # of the median, by the formula of this module; nan below two values


def binned_quantiles(bins: IntArray, values: NDArray[np.floating], n_bins: int) -> Quantiles:
    """Rank the values of each bin.

    Parameters
    ----------
    bins : ndarray of int64, shape (n,)
        From 0; negative: in no bin.
    values : ndarray of float, shape (n,)
        Those that are not finite are left out.
    n_bins : int
    """
    known = (bins >= 0) & np.isfinite(values)
    bins = bins[known]
    ranked = values[known].astype(np.float64) + 0.0
    ranked = ranked[np.lexsort((ranked, bins))]
    n = np.bincount(bins, minlength=n_bins).astype(np.int64)
    first = np.cumsum(n) - n
    filled = n > 0

    def quantile(share: float) -> FloatArray:
        out = np.full(n_bins, np.nan)
        place = (n[filled] - 1) * share
        below = np.floor(place).astype(np.int64)
        above = np.minimum(below + 1, n[filled] - 1)
        start, stop = ranked[first[filled] + below], ranked[first[filled] + above]
        t, step = place - below, stop - start
        out[filled] = np.where(t < 0.5, start + step * t, stop - step * (1 - t))
        return out

    p16, median, p84 = quantile(0.16), quantile(0.5), quantile(0.84)
    root = np.sqrt(np.where(n > 1, n, np.nan))
    return Quantiles(n, median, p16, p84, MEDIAN_ERROR * (p84 - p16) / 2 / root)


def rms_of_medians(
    n: ArrayLike, median: ArrayLike, min_count: int = MIN_COUNT
) -> tuple[float | None, int]:
    """Average the squared medians of bins with enough values: a trend that is left shows here.

    Returns
    -------
    float or None
        Root mean square, every bin counted once; None without any.
    int
        Bins that count.
    """
    used = np.asarray(median, dtype=np.float64)[np.asarray(n) >= max(min_count, 1)]
    return (float(np.sqrt(np.mean(used**2))) if len(used) else None), len(used)
