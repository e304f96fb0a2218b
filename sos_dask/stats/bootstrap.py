"""Bootstrap of medians and widths by star, for many figures of one sample on the same resamples.

Stars are spread over some groups by a hash of their ids, and groups are drawn with replacement
(Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 6 and 8): pairs of one star
stay together, and a resample is one weight a group. A subset with few stars has about one star a
group: the ordinary bootstrap; of many stars the groups are as good, since every group is a random
sample of them, and errors are as certain as those of as many values as there are groups (2 % with
1024). Values are sorted once. Their distribution in a resample is known at a few nodes between
them, as sums of the groups' counts, and taken for linear between two nodes: where a column between
nodes holds one value this is exact, else what it leaves out is the noise inside one column, below
1 % of an error. Sums are of whole numbers, so that nothing depends on the order of the pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sos_dask.columns import FloatArray, FloatingArray, IntArray, KeyArray
from sos_dask.stats.numbers import MAD_TO_SIGMA

N_GROUPS = 1024
_COLUMNS = 256  # between nodes, of a whole sample
_COLUMNS_A_BIN = 16
_BINS_AT_ONCE = 32
_REACH = 5.0  # of the nodes around the median of a bin, in 1 / sqrt(n): ten standard errors
_HALVINGS = 40
_EXACT_FLOAT32 = 1 << 22  # sums of so many pairs stay below 2^24


def groups_of(star: KeyArray) -> IntArray:
    """Find the group of each star by its number alone: 0 to `N_GROUPS` - 1.

    The highest bits of the number decide whether very many pairs are thinned, the lowest ones its
    fold: groups are of the bits between.
    """
    return ((star >> np.uint64(20)) % np.uint64(N_GROUPS)).astype(np.int64)


def draw(n_resamples: int, seed: int, n_groups: int = N_GROUPS) -> FloatArray:
    """Draw how often each resample contains each group, shape (n_resamples, n_groups)."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_resamples)
    return counts.astype(np.float64)


def interval(value: float, replicates: FloatArray) -> tuple[float, float]:
    """Find the 95 % interval of a figure: percentiles of its resamples, moved to the figure.

    Resamples of a figure that noise raises (a root of squares, a maximum) are raised twice; moved
    by the difference of figure and mean, their spread is that of the figure.
    """
    known = replicates[np.isfinite(replicates)]
    if not len(known) or not np.isfinite(value):
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5]) + (value - np.mean(known))
    return float(low), float(high)


class Replicates(NamedTuple):
    """Figures of one sample in every resample, each of shape (n_resamples,)."""

    median: FloatArray
    mad: FloatArray  # 1.4826 times the median absolute deviation from the median
    width: FloatArray  # half of that from the 16th to the 84th percentile


def resampled(values: FloatArray, groups: IntArray, weights: FloatArray) -> Replicates:
    """Measure rising values (n,), with the groups (n,) of their stars, in every resample of `draw`.

    nan where a resample is empty.
    """
    n = len(values)
    ranks = np.unique(np.linspace(0, n, min(n, _COLUMNS) + 1).astype(np.int64))
    column = np.repeat(np.arange(len(ranks) - 1), np.diff(ranks))
    below = _below(_totals(_light(weights, n), groups, column, len(ranks) - 1))
    nodes = _between(values, ranks)
    p16, median, p84 = (_quantile(nodes, below, share) for share in (0.16, 0.5, 0.84))
    return Replicates(median, MAD_TO_SIGMA * _deviation(nodes, below, median), (p84 - p16) / 2)


def resampled_bins(
    values: FloatArray,
    groups: IntArray,
    weights: FloatArray,
    bins: IntArray,
    n_bins: int,
    min_count: int,
) -> tuple[IntArray, FloatArray, FloatArray]:
    """Find the medians of bins (n,) of values as those of `resampled`; a negative bin is none.

    Gives the number of values and the median by bin, nan in bins with less than ``min_count``
    values, and the medians in every resample, shape (n_resamples, n_bins).
    """
    inside = np.flatnonzero(bins >= 0)
    # Few small numbers sort by radix; inside a bin the order of the values stays.
    inside = inside[np.argsort(bins[inside].astype(np.uint16), kind="stable")]
    n = np.bincount(bins[inside], minlength=n_bins).astype(np.int64)
    stops, light = np.cumsum(n), _light(weights, len(values))
    medians, replicates = np.full(n_bins, np.nan), np.full((len(weights), n_bins), np.nan)
    used = np.flatnonzero(n >= max(min_count, 1))
    for first in range(0, len(used), _BINS_AT_ONCE):  # large products of matrices are far cheaper
        some = used[first : first + _BINS_AT_ONCE]
        rows = [inside[stops[number] - n[number] : stops[number]] for number in some]
        ranks = [_ranks_around_median(len(one)) for one in rows]
        ends = np.cumsum([len(one) - 1 for one in ranks])
        column = np.repeat(np.arange(ends[-1]), np.concatenate([np.diff(one) for one in ranks]))
        totals = _totals(light, groups[np.concatenate(rows)], column, int(ends[-1]))
        parts = np.split(totals, ends[:-1], axis=1)
        for number, inner, rank, part in zip(some, rows, ranks, parts, strict=True):
            medians[number] = np.median(values[inner])
            replicates[:, number] = _quantile(_between(values[inner], rank), _below(part), 0.5)
    return n, medians, replicates


def _ranks_around_median(n: int) -> IntArray:
    reach = min(0.5, _REACH / np.sqrt(n))
    inner = np.linspace(n * (0.5 - reach), n * (0.5 + reach), _COLUMNS_A_BIN + 1)
    return np.unique([0, *inner.round().astype(np.int64), n])


def _between(values: FloatArray, ranks: IntArray) -> FloatArray:
    """Values at ranks: halfway between the sorted values on either side."""
    n = len(values)
    return (values[np.maximum(ranks - 1, 0)] + values[np.minimum(ranks, n - 1)]) / 2


def _light(weights: FloatArray, n: int) -> FloatingArray:
    """Weights in the precision that counts ``n`` pairs exactly."""
    return weights.astype(np.float32) if n < _EXACT_FLOAT32 else weights


def _totals(
    weights: FloatingArray, groups: IntArray, column: IntArray, n_columns: int
) -> FloatingArray:
    """Weight between nodes in each resample, shape (n_resamples, n_columns)."""
    n_groups = weights.shape[1]
    counts = np.bincount(groups * n_columns + column, minlength=n_groups * n_columns)
    return np.asarray(weights @ counts.reshape(n_groups, n_columns).astype(weights.dtype))


def _below(totals: FloatingArray) -> FloatArray:
    """Weight below each node in each resample, shape (n_resamples, n_columns + 1)."""
    return np.pad(np.cumsum(totals, axis=1, dtype=np.float64), ((0, 0), (1, 0)))


def _quantile(nodes: FloatArray, below: FloatArray, share: float) -> FloatArray:
    """Quantile of each resample, linear between nodes."""
    wanted, row = share * below[:, -1], np.arange(len(below))
    column = np.count_nonzero(below[:, 1:] < wanted[:, None], axis=1).clip(max=len(nodes) - 2)
    start, stop = below[row, column], below[row, column + 1]
    low, high = nodes[column], nodes[column + 1]
    part = (wanted - start) / np.where(stop > start, stop - start, np.nan)
    return np.asarray(low + (high - low) * part)


def _deviation(nodes: FloatArray, below: FloatArray, center: FloatArray) -> FloatArray:
    """Median absolute deviation of each resample from its center."""
    wanted, known = below[:, -1] / 2, np.isfinite(center)
    low, high = np.zeros(len(center)), np.full(len(center), nodes[-1] - nodes[0])
    center = np.where(known, center, 0.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        inside = _at(nodes, below, center + middle) - _at(nodes, below, center - middle)
        high = np.where(inside >= wanted, middle, high)
        low = np.where(inside >= wanted, low, middle)
    return np.where(known, high, np.nan)


def _at(nodes: FloatArray, below: FloatArray, values: FloatArray) -> FloatArray:
    """Weight of each resample below its value."""
    column = (np.searchsorted(nodes, values, side="right") - 1).clip(0, len(nodes) - 2)
    row, low, high = np.arange(len(below)), nodes[column], nodes[column + 1]
    part = np.clip((values - low) / np.where(high > low, high - low, 1.0), 0.0, 1.0)
    part = np.where(high > low, part, values >= high)
    start, stop = below[row, column], below[row, column + 1]
    return np.asarray(start + (stop - start) * part)
