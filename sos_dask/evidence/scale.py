"""The size of residuals as a function of the star and of S/N."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.evidence.error_tables import N_CELLS, every_cell

MIN_FOR_TREES = 2000
_SNR_KNOTS = 12
_MIN_IN_KNOT = 40
_ROUNDS = 150
# Residuals are not taken for smaller than this part of their median: the logarithm of a residual
# that happens to be zero says nothing of its scale.
_SMALLEST = 0.05

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.integer]


@dataclass(frozen=True)
class Scale:
    """Size of residuals as a function of cell and S/N: exp(of_cell + of_snr).

    Parameters
    ----------
    trees : xgboost.Booster, optional
        Of the numbers of a cell along the axes; None: 0.
    knots, levels : ndarray of float64, shape (m,)
        log S/N and its contribution, which never rises; no knots: no dependence.
    middle : float
        Mean logarithm of what was fitted: add it to have the size itself.
    """

    trees: Any
    knots: FloatArray
    levels: FloatArray
    middle: float = 0.0

    def of_cell(self, cell: IntArray) -> FloatArray:
        """Logarithm of the scale by cell."""
        if self.trees is None:
            return np.zeros(len(cell))
        used = np.flatnonzero(np.bincount(cell))
        of_cell = np.empty(N_CELLS**3)
        of_cell[used] = self.trees.inplace_predict(every_cell()[used].astype(np.float32))
        return np.asarray(of_cell[cell])

    def of_snr(self, log_snr: FloatArray) -> FloatArray:
        """Logarithm of the scale by S/N: see `ErrorModel.half_width` for the ends."""
        if not len(self.knots):
            return np.zeros(len(log_snr))
        inside = np.interp(np.nan_to_num(log_snr, nan=-np.inf), self.knots, self.levels)
        below = np.nan_to_num(self.knots[0] - log_snr, nan=0.0)
        return np.asarray(inside + np.maximum(below, 0.0))


def fit_scale(
    cell: IntArray,
    log_snr: FloatArray,
    residual: NDArray[np.floating],
    with_trees: bool,
) -> Scale:
    """Fit the size of residuals.

    Parameters
    ----------
    cell : ndarray of int, shape (n,)
        `Grid.cells` of the pairs.
    log_snr : ndarray of float64, shape (n,)
        nan where unknown.
    residual : ndarray of float, shape (n,)
        target - reference - correction, finite.
    with_trees : bool
        Whether the size depends on the cell; the same for all fits whose scores are put together.
    """
    size = np.abs(np.asarray(residual, dtype=np.float64))
    middle = float(np.median(size) or size.mean() or 1.0)
    log_size = np.log(np.maximum(size, _SMALLEST * middle))
    center = float(log_size.mean())
    log_size -= center
    bins = _bins(log_snr)
    plain = Scale(None, *_falling(bins, log_snr, log_size), center)
    if not with_trees:
        return plain
    trees, of_cell = fit_trees(cell, log_size - plain.of_snr(log_snr))
    return Scale(trees, *_falling(bins, log_snr, log_size - of_cell), center)


def _bins(log_snr: FloatArray) -> list[IntArray]:
    """Pairs in bins of S/N with equally many, or none."""
    order = np.argsort(log_snr, kind="stable")
    order = order[np.isfinite(log_snr[order])]
    n_bins = min(_SNR_KNOTS, len(order) // _MIN_IN_KNOT)
    if n_bins < 2 or log_snr[order[0]] == log_snr[order[-1]]:
        return []
    return np.array_split(order, n_bins)


def _falling(
    bins: list[IntArray], log_snr: FloatArray, log_size: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Means in the bins, made to fall with S/N."""
    from scipy.optimize import isotonic_regression

    if not bins:
        return np.empty(0), np.empty(0)
    knots = np.array([log_snr[rows].mean() for rows in bins])
    means = np.array([log_size[rows].mean() for rows in bins])
    weights = np.array([float(len(rows)) for rows in bins])
    levels = isotonic_regression(means, weights=weights, increasing=False).x
    knots, first = np.unique(knots, return_index=True)
    return knots, np.asarray(levels, dtype=np.float64)[first]


def fit_trees(cell: IntArray, log_size: FloatArray) -> tuple[Any, FloatArray]:
    """Boosted trees of a logarithm over the numbers of the cells: constant on every cell.

    Least squares see of a cell only the mean and the number of its pairs, so that a fit takes as
    long as there are cells with pairs. Beside the trees it gives their value for every pair.
    """
    import xgboost

    n = np.bincount(cell)
    used = np.flatnonzero(n)
    mean = np.bincount(cell, log_size)[used] / n[used]
    matrix = xgboost.QuantileDMatrix(
        every_cell()[used].astype(np.float32),
        mean.astype(np.float32),
        weight=n[used].astype(np.float32),
        max_bin=N_CELLS + 1,
        nthread=1,
    )
    params = {
        "tree_method": "hist",
        "max_depth": 3,
        "learning_rate": 0.05,
        "min_child_weight": max(50.0, len(log_size) / 400),
        "reg_lambda": 20.0,
        "max_bin": N_CELLS + 1,
        "base_score": 0.0,
        "nthread": 1,
        "verbosity": 0,
    }
    trees = xgboost.train(params, matrix, _ROUNDS)
    of_cell = np.empty(len(n))
    of_cell[used] = trees.predict(matrix)  # known since the last tree was made
    return trees, of_cell[cell]
