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

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import FloatArray, IntArray
from sos_dask.stats.numbers import MAD_TO_SIGMA

N_GROUPS = 1024
LEVEL = 0.95
_COLUMNS = 256  # between nodes, of a whole sample
_COLUMNS_A_BIN = 16
_REACH = 5.0  # of the nodes around the median of a bin, in 1 / sqrt(n): ten standard errors
_HALVINGS = 40
_EXACT_FLOAT32 = 1 << 22  # sums of so many pairs stay below 2^24


def groups_of(star: NDArray[np.uint64]) -> IntArray:
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
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(known, [tail, 100 - tail])
    shift = value - float(np.mean(known))
    return float(low + shift), float(high + shift)


class Replicates(NamedTuple):
    """Figures of one sample in every resample, each of shape (n_resamples,)."""

    median: FloatArray
    mad: FloatArray  # 1.4826 times the median absolute deviation from the median
    width: FloatArray  # half of that from the 16th to the 84th percentile


@dataclass(frozen=True, eq=False)
class Ranked:
    """Values of a sample in rising order, each with the group of its star.

    Parameters
    ----------
    values : ndarray of float64, shape (n,)
    groups : ndarray of int64, shape (n,)
    """

    values: FloatArray
    groups: IntArray

    def resampled(self, weights: FloatArray) -> Replicates:
        """Measure the resamples of `draw`; nan where a resample is empty."""
        n = len(self.values)
        ranks = np.unique(np.linspace(0, n, min(n, _COLUMNS) + 1).astype(np.int64))
        column = np.repeat(np.arange(len(ranks) - 1), np.diff(ranks))
        totals = _totals(weights, self.groups, column, len(ranks) - 1)
        found = _Distributions.of(_between(self.values, ranks), totals)
        p16, median, p84 = (found.quantile(share) for share in (0.16, 0.5, 0.84))
        return Replicates(median, MAD_TO_SIGMA * found.deviation(median), (p84 - p16) / 2)

    def binned_medians(
        self, weights: FloatArray, bins: IntArray, n_bins: int, min_count: int
    ) -> tuple[IntArray, FloatArray, FloatArray]:
        """Find the median of the values in each bin, and in every resample.

        Parameters
        ----------
        weights : ndarray of float64, shape (n_resamples, n_groups)
        bins : ndarray of int, shape (n,)
            Bin of each value, negative where it is in none.
        min_count : int
            Bins with fewer values have no median.

        Returns
        -------
        n : ndarray of int64, shape (n_bins,)
        medians : ndarray of float64, shape (n_bins,)
        replicates : ndarray of float64, shape (n_resamples, n_bins)
            nan where there is no median.
        """
        inside = bins >= 0
        bins, values, groups = bins[inside], self.values[inside], self.groups[inside]
        # Few small numbers sort by radix; inside a bin the order of the values stays.
        order = np.argsort(bins.astype(np.uint16), kind="stable")
        values, groups = values[order], groups[order]
        n = np.bincount(bins, minlength=n_bins).astype(np.int64)
        stops = np.cumsum(n)
        medians = np.full(n_bins, np.nan)
        replicates = np.full((len(weights), n_bins), np.nan)
        used = np.flatnonzero(n >= max(min_count, 1))
        nodes, column, first = [], np.full(len(values), -1, dtype=np.int64), [0]
        for number in used:
            span = slice(stops[number] - n[number], stops[number])
            ranks = _ranks_around_median(int(n[number]))
            medians[number] = np.median(values[span])
            nodes.append(_between(values[span], ranks))
            column[span] = first[-1] + np.repeat(np.arange(len(ranks) - 1), np.diff(ranks))
            first.append(first[-1] + len(ranks) - 1)
        kept = column >= 0
        totals = _totals(weights, groups[kept], column[kept], first[-1])
        for place, number in enumerate(used):
            of_bin = totals[:, first[place] : first[place + 1]]
            replicates[:, number] = _Distributions.of(nodes[place], of_bin).quantile(0.5)
        return n, medians, replicates


def _ranks_around_median(n: int) -> IntArray:
    reach = min(0.5, _REACH / np.sqrt(n))
    inner = np.linspace((0.5 - reach) * n, (0.5 + reach) * n, _COLUMNS_A_BIN + 1)
    return np.unique(np.concatenate([[0], inner.round().astype(np.int64), [n]]))


def _between(values: FloatArray, ranks: IntArray) -> FloatArray:
    """Values at ranks: halfway between the sorted values on either side."""
    n = len(values)
    return (values[np.maximum(ranks - 1, 0)] + values[np.minimum(ranks, n - 1)]) / 2


def _totals(weights: FloatArray, groups: IntArray, column: IntArray, n_columns: int) -> FloatArray:
    """Weight of each column in each resample, shape (n_resamples, n_columns)."""
    n_groups = weights.shape[1]
    counts = np.bincount(groups * n_columns + column, minlength=n_groups * n_columns)
    kind = np.float32 if len(groups) < _EXACT_FLOAT32 else np.float64
    product = weights.astype(kind) @ counts.reshape(n_groups, n_columns).astype(kind)
    return np.asarray(product, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class _Distributions:
    """Distribution of each resample: its weight below each node, linear between nodes."""

    nodes: FloatArray  # (k,), rising
    below: FloatArray  # (n_resamples, k)

    @classmethod
    def of(cls, nodes: FloatArray, totals: FloatArray) -> _Distributions:
        below = np.zeros((len(totals), len(nodes)))
        np.cumsum(totals, axis=1, out=below[:, 1:])
        return cls(nodes, below)

    def quantile(self, share: float) -> FloatArray:
        wanted = share * self.below[:, -1]
        last = len(self.nodes) - 2
        column = np.count_nonzero(self.below[:, 1:] < wanted[:, None], axis=1).clip(max=last)
        row = np.arange(len(self.below))
        start, stop = self.below[row, column], self.below[row, column + 1]
        low, high = self.nodes[column], self.nodes[column + 1]
        part = (wanted - start) / np.where(stop > start, stop - start, np.nan)
        return np.asarray(low + (high - low) * part)

    def deviation(self, center: FloatArray) -> FloatArray:
        """Median absolute deviation of each resample from its center."""
        wanted = self.below[:, -1] / 2
        low = np.zeros(len(center))
        high = np.full(len(center), self.nodes[-1] - self.nodes[0])
        known = np.isfinite(center)
        center = np.where(known, center, 0.0)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            enough = self._at(center + middle) - self._at(center - middle) >= wanted
            high = np.where(enough, middle, high)
            low = np.where(enough, low, middle)
        return np.where(known, high, np.nan)

    def _at(self, values: FloatArray) -> FloatArray:
        last = len(self.nodes) - 2
        column = (np.searchsorted(self.nodes, values, side="right") - 1).clip(0, last)
        row = np.arange(len(self.below))
        low, high = self.nodes[column], self.nodes[column + 1]
        width = np.where(high > low, high - low, 1.0)
        part = np.clip((values - low) / width, 0.0, 1.0)
        part = np.where(high > low, part, values >= high)
        start, stop = self.below[row, column], self.below[row, column + 1]
        return np.asarray(start + (stop - start) * part)
