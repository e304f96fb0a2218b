"""Small numbers that every room needs, each defined once: scale, sparseness, shares, quantiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import (
    GOLDEN,
    BoolArray,
    Float32Array,
    FloatArray,
    IntArray,
    mixed,
)

MAD_TO_SIGMA = 1.4826  # of a normal distribution
SPARSE_SHARE = 0.05
SPARSE_NEIGHBOURS = 16
_LEAF = 16


def scatter(values: NDArray[np.floating]) -> float:
    """Multiply the median absolute deviation from the median by 1.4826; nan without values."""
    if not len(values):
        return float("nan")
    return float(MAD_TO_SIGMA * np.median(np.abs(values - np.median(values))))


def robust_scale(x: NDArray[np.floating]) -> tuple[FloatArray, FloatArray]:
    """Find center and scale of each column, which outliers do not move.

    Parameters
    ----------
    x : ndarray of float, shape (n, k)
        nan where unknown; at least one row.

    Returns
    -------
    center : ndarray of float64, shape (k,)
        Medians; 0 where a column has no values.
    scale : ndarray of float64, shape (k,)
        1.4826 times the median absolute deviation from the median; where more than half of the
        values are equal the standard deviation, and 1 where all are.
    """
    center, scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
    for number, column in enumerate(np.asarray(x, dtype=np.float64).T):
        known = column[~np.isnan(column)]
        if len(known):
            center[number] = np.median(known)
            scale[number] = scatter(known) or np.std(known) or 1.0
    return center, scale


def knn_distance(
    train: NDArray[np.floating],
    query: NDArray[np.floating],
    k: int,
    within: float = np.inf,
) -> FloatArray:
    """Measure the distance to the k-th nearest neighbour: large where the sample is thin.

    Parameters
    ----------
    train : ndarray of float, shape (n, d)
        The sample; finite, on one scale.
    query : ndarray of float, shape (m, d)
        Rows of the sample itself count as their own first neighbour: ask for one more.
    k : int
        From 1; of a sample with fewer rows the farthest one counts.
    within : float
        Farther ones may be given as infinite, which is far cheaper to know.

    Returns
    -------
    ndarray of float64, shape (m,)
        Of a row it does not depend on the other rows asked for, nor on the order of the sample.
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


def count_within(
    train: NDArray[np.floating], query: NDArray[np.floating], radius: FloatArray
) -> IntArray:
    """Count the rows of a sample (n, d) within a radius (m,) of each row (m, d), shape (m,)."""
    from scipy.spatial import cKDTree

    tree = cKDTree(np.asarray(train, dtype=np.float64), leafsize=_LEAF)
    return np.asarray(tree.query_ball_point(query, radius, return_length=True), dtype=np.int64)


def find_sparse(
    sample: NDArray[np.floating],
    others: NDArray[np.floating],
    share: float = SPARSE_SHARE,
) -> tuple[BoolArray, BoolArray]:
    """Tell which rows lie where a sample is as thin as around the thinnest 5 % of itself.

    Thin is where the 16th neighbour is far, on the `robust_scale` of the sample.

    Parameters
    ----------
    sample : ndarray of float, shape (n, k)
        Finite, at least one row.
    others : ndarray of float, shape (m, k)
        Finite rows that are not of the sample.
    share : float
        Of the sample, that is sparse.

    Returns
    -------
    of_sample : ndarray of bool, shape (n,)
    of_others : ndarray of bool, shape (m,)
    """
    center, scale = robust_scale(sample)
    scaled = (sample - center) / scale
    own = knn_distance(scaled, scaled, SPARSE_NEIGHBOURS + 1)  # a row is its own first neighbour
    limit = float(np.quantile(own, 1 - share))
    far = knn_distance(scaled, (others - center) / scale, SPARSE_NEIGHBOURS, limit) > limit
    return own > limit, far


def uniform(keys: NDArray[np.integer], seed: int) -> FloatArray:
    """Make a number in [0, 1) of every key, shape (n,): see `columns.key_hashes`."""
    number = mixed(keys.astype(np.uint64) + np.uint64(seed * GOLDEN % 2**64))
    return (number >> np.uint64(11)).astype(np.float64) * 2.0**-53


def count(values: Float32Array) -> tuple[NDArray[np.uint16], IntArray]:
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
        cumulative = np.cumsum(self._counts)
        out = []
        for fraction in fractions:
            rank = fraction * cumulative[-1]
            index = int(np.searchsorted(cumulative, rank, side="left"))
            index = max(index, int(np.argmax(self._counts > 0)))
            inside = (rank - (cumulative[index] - self._counts[index])) / self._counts[index]
            low, high = _bin_edges(index)
            out.append(low + (high - low) * inside)
        return np.array(out)


def _bin_edges(index: int) -> tuple[float, float]:
    ordered = np.array([index << 16, (index << 16) | 0xFFFF], dtype=np.uint32)
    bits = np.where(ordered >> 31 == 1, ordered & np.uint32((1 << 31) - 1), ~ordered)
    low, high = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return float(low), float(high)
