"""Numbers that are counted once for all rooms: scales, sparse places, medians, quantiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sos_dask.columns import GOLDEN, BoolArray, FloatArray, FloatingArray, IntArray, mixed
from sos_dask.errors import ConfigError

MAD_TO_SIGMA = 1.4826  # of a normal distribution
ONE_SIGMA = 0.6826894921370859  # of a normal distribution within one standard deviation
MEDIAN_ERROR = float(np.sqrt(np.pi / 2))  # 1.2533: of a median, in units of that of a mean
GIANT_LOGG = 3.5  # dex: stars below are giants
ALL, DENSE, SPARSE = "all", "dense", "sparse"  # subsets of the pairs
MIN_COUNT = 20  # values of a bin whose median counts
_MOST_BINS = 10_000  # of an axis
_SPARSE_SHARE = 0.05
_SPARSE_NEIGHBOURS = 16
_LEAF = 16


def scatter(values: FloatingArray) -> float:
    """Multiply the median absolute deviation from the median by 1.4826; nan without values."""
    if not len(values):
        return float("nan")
    return float(MAD_TO_SIGMA * np.median(np.abs(values - np.median(values))))


def robust_scale(x: FloatingArray) -> tuple[FloatArray, FloatArray]:
    """Find center and scale (k,) of the columns of x (n, k), which outliers do not move.

    The center is the median of the values that are not nan; 0 where there are none. The scale is
    1.4826 times the median absolute deviation from it; where more than half of the values are equal
    the standard deviation, and 1 where all are.
    """
    center, scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
    for number, column in enumerate(np.asarray(x, dtype=np.float64).T):
        known = column[~np.isnan(column)]
        if len(known):
            center[number] = np.median(known)
            scale[number] = scatter(known) or np.std(known) or 1.0
    return center, scale


def knn_distance(
    train: FloatingArray, query: FloatingArray, k: int, within: float = np.inf
) -> FloatArray:
    """Measure the distance (m,) of rows to the k-th nearest of a sample: large where that is thin.

    The sample (n, d) is finite and on one scale. The distance of a row (m, d) depends neither on
    the others nor on the order of the sample. Rows of the sample itself count as their own first
    neighbour: ask for one more. Of a sample with less than k rows the farthest one counts; those
    farther than ``within`` may be given as infinite, which is far cheaper to know.
    """
    from scipy.spatial import cKDTree

    query = np.asarray(query, dtype=np.float64)
    tree = cKDTree(np.asarray(train, dtype=np.float64), leafsize=_LEAF)
    # Rows that are near each other ask for the same branches: one after the other they take half
    # the time of rows in the order of the sky.
    order = cKDTree(query, leafsize=_LEAF).indices
    found = np.empty(len(query))
    bound = within * (1 + 1e-9)  # never less after it is squared
    k = min(k, len(train))
    found[order] = tree.query(query[order], k=[k], distance_upper_bound=bound)[0][:, 0]
    return found


def count_within(train: FloatingArray, query: FloatingArray, radius: FloatArray) -> IntArray:
    """Count the rows of a sample (n, d) within a radius (m,) of each row (m, d), shape (m,)."""
    from scipy.spatial import cKDTree

    tree = cKDTree(np.asarray(train, dtype=np.float64), leafsize=_LEAF)
    return np.asarray(tree.query_ball_point(query, radius, return_length=True), dtype=np.int64)


def find_sparse(
    sample: FloatingArray, others: FloatingArray, share: float = _SPARSE_SHARE
) -> tuple[BoolArray, BoolArray]:
    """Tell which rows lie where a sample is as thin as around the thinnest ``share`` of itself.

    Thin is where the 16th neighbour is far, on the `robust_scale` of the sample. All rows of the
    sample (n, k) and of the others (m, k) are finite; the answers are of shape (n,) and (m,).
    """
    center, scale = robust_scale(sample)
    scaled = (sample - center) / scale
    own = knn_distance(scaled, scaled, _SPARSE_NEIGHBOURS + 1)  # a row is its own first neighbour
    limit = float(np.quantile(own, 1 - share))
    far = knn_distance(scaled, (others - center) / scale, _SPARSE_NEIGHBOURS, limit) > limit
    return own > limit, far


def uniform(keys: NDArray[np.integer], seed: int) -> FloatArray:
    """Make a number in [0, 1) of every key, shape (n,): see `columns.key_hashes`."""
    number = mixed(keys.astype(np.uint64) + np.uint64(seed * GOLDEN % 2**64))
    return (number >> np.uint64(11)).astype(np.float64) * 2.0**-53


# --- bins ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A column of the pairs with its bins of equal width, in the unit of the column.

    Raises `ConfigError` where the limits do not rise, or the width is not positive, leaves no bin
    or more than 10,000.
    """

    name: str
    low: float
    high: float
    width: float

    def __post_init__(self) -> None:
        there = f"bins of {self.name} from {self.low} to {self.high}, {self.width} wide: there are"
        if not (0 < self.width <= self.high - self.low < np.inf):
            raise ConfigError(f"{there} none")
        if (self.high - self.low) / self.width > _MOST_BINS:
            raise ConfigError(f"{there} more than {_MOST_BINS:,}", "Give a larger width.")

    @property
    def edges(self) -> FloatArray:
        """Edges of the bins; the last bin may be narrower."""
        n_bins = int(np.ceil(round((self.high - self.low) / self.width, 6)))
        return np.append(np.round(self.low + self.width * np.arange(n_bins), 10), self.high)


def equal_count_edges(x: FloatingArray, n_bins: int) -> FloatArray:
    """Place edges of bins with equally many values; fewer bins where many values are equal.

    Raises `ConfigError` where ``n_bins`` is not positive.
    """
    if n_bins < 1:
        raise ConfigError(f"n_bins must be positive, got {n_bins}")
    known = np.sort(x[np.isfinite(x)]).astype(np.float64) + 0.0  # -0.0 and 0.0 are one edge
    if not len(known):
        return np.empty(0)
    edges = np.unique(np.quantile(known, np.linspace(0, 1, n_bins + 1)))
    return np.repeat(edges, 2) if len(edges) == 1 else edges


def bins_of(x: FloatingArray, edges: FloatArray) -> IntArray:
    """Number the bin of every value; -1 outside the edges and for nan.

    A bin includes its lower edge, the last one its upper edge, too. Raises `ConfigError` where the
    edges fall, or one is nan.
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
    error: FloatArray  # of the median; nan below two values


def binned_quantiles(bins: IntArray, values: FloatingArray, n_bins: int) -> Quantiles:
    """Rank the finite values (n,) of each bin; a negative number of a bin (n,) is in none.

    Percentiles are exact and depend neither on the order of the values nor on how they were
    partitioned. They are interpolated linearly between order statistics (definition 7 of Hyndman &
    Fan 1996, The American Statistician 50, 361; numpy's default). The error of a median is the
    asymptotic one of a sample from a normal distribution, ``sqrt(pi / 2) * sigma / sqrt(n)``
    (Kendall & Stuart, The Advanced Theory of Statistics, vol. 1, §10.10), with sigma half the width
    from the 16th to the 84th percentile, which outliers do not move. It takes the values for
    independent: repeated observations of one star make it too small.
    """
    known = (bins >= 0) & np.isfinite(values)
    # Few bins are sorted by their digits, and each by itself: a fifth of the time of two keys.
    bins = bins[known].astype(np.int16 if n_bins <= 1 << 15 else np.int64)
    ranked = values[known].astype(np.float64)[np.argsort(bins, kind="stable")] + 0.0
    n = np.bincount(bins, minlength=n_bins).astype(np.int64)
    for some in np.split(ranked, np.cumsum(n)[:-1]):
        some.sort()
    filled = n > 0
    first, last = (np.cumsum(n) - n)[filled], n[filled] - 1
    p16, median, p84 = np.full((3, n_bins), np.nan)
    for share, out in ((0.16, p16), (0.5, median), (0.84, p84)):
        below = np.floor(last * share).astype(np.int64)
        start, stop = ranked[first + below], ranked[first + np.minimum(below + 1, last)]
        t, step = last * share - below, stop - start
        out[filled] = np.where(t < 0.5, start + step * t, stop - step * (1 - t))
    root = np.sqrt(np.where(n > 1, n, np.nan))
    return Quantiles(n, median, p16, p84, MEDIAN_ERROR * (p84 - p16) / 2 / root)


def rms_of_medians(
    n: ArrayLike, median: ArrayLike, min_count: int = MIN_COUNT
) -> tuple[float | None, int]:
    """Find the root mean square of medians of bins with enough values, and how many these are.

    A trend that is left shows here, every bin counted once; None without any bin.
    """
    used = np.asarray(median, dtype=np.float64)[np.asarray(n) >= max(min_count, 1)]
    return (float(np.sqrt(np.mean(used**2))) if len(used) else None), len(used)


# --- quantiles in constant memory ---------------------------------------------------------------


def count(values: FloatingArray) -> tuple[NDArray[np.uint16], IntArray]:
    """Fine logarithmic histogram of finite numbers: the bins that are not empty and their counts.

    A bin is the upper half of a float32 (sign, exponent, 7 bits of mantissa), so bins are 0.4 to
    0.8 % wide at any scale, and counts of any parts add up exactly in any order.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Floats sort like integers once negative ones are flipped.
    ordered = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
    bins, counts = np.unique((ordered >> 16).astype(np.uint16), return_counts=True)
    return bins, counts.astype(np.int64)


class Histogram:
    """Sum of what `count` gives: quantiles in constant memory, the same in any order of parts."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << 16, dtype=np.int64)

    @property
    def n(self) -> int:
        """Number of values."""
        return int(self._counts.sum())

    def add(self, counts: tuple[NDArray[np.uint16], IntArray]) -> None:
        """Add one part."""
        self._counts[counts[0]] += counts[1]

    def quantiles(self, fractions: Sequence[float]) -> FloatArray:
        """Quantiles, interpolated inside their bins (to about 0.1 % of their value)."""
        filled = np.flatnonzero(self._counts)
        n, below = self._counts[filled], np.cumsum(self._counts[filled])
        rank = np.asarray(fractions, dtype=np.float64) * below[-1]
        place = np.searchsorted(below, rank, side="left")
        low, high = (_number(filled[place] << 16 | end) for end in (0, 0xFFFF))
        return np.asarray(low + (high - low) * (rank - (below - n)[place]) / n[place])


def _number(ordered: IntArray) -> FloatArray:
    """Floats of integers that sort like them."""
    bits = np.where(ordered >> 31 == 1, ordered & ((1 << 31) - 1), ~ordered)
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)
