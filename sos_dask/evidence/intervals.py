"""Half-widths that hold the share of residuals they promise, counted on pairs not seen before."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import BoolArray, Float32Array, FloatArray, IntArray
from sos_dask.errors import ModelError
from sos_dask.evidence.error_tables import LOG_SNR, N_CELLS, ErrorModel, snr_steps
from sos_dask.schema import LABELS
from sos_dask.stats.table import Grid

LEVELS = (0.68, 0.95)
TABLES = ("values", "profile", "reference", "reference_profile")
DENSE, SPARSE = "dense", "sparse"
MIN_PAIRS = 40
MIN_FOR_TREES = 2000
_SNR_KNOTS = 12
_MIN_IN_KNOT = 40
_ROUNDS = 150
# Residuals are not taken for smaller than this part of their median: the logarithm of a residual
# that happens to be zero says nothing of its scale.
_SMALLEST = 0.05
_LEAST = 1e-6  # K, dex: an error of 0 would weigh without end, and residuals can all be zero
_WRONG = 8.0  # times the median size: 5.4 standard deviations of a normal distribution


@dataclass(frozen=True)
class HeldOut:
    """Pairs that a correction has not been trained on.

    Parameters
    ----------
    features : ndarray of float32, shape (n, 3)
    snr : ndarray of float64, shape (n,)
        nan where unknown.
    residuals : ndarray of float64, shape (n, 3)
        target - reference - correction (K, dex, dex), nan where unknown.
    reference_errors : ndarray of float64, shape (n, 3)
        Normalised errors of the reference, nan where it states none.
    part : ndarray of int8, shape (n,)
        At least three parts; pairs of one star are in one part.
    """

    features: Float32Array
    snr: FloatArray
    residuals: FloatArray
    reference_errors: FloatArray
    part: NDArray[np.int8]

    @cached_property
    def log_snr(self) -> FloatArray:
        """Logarithm of S/N, nan where it is unknown or not positive."""
        return np.asarray(np.log(np.where(self.snr > 0, self.snr, np.nan)))


def least_log_snr(snr: FloatArray) -> float:
    """Find the logarithm of the lowest positive S/N; that of the tables where none is known."""
    known = snr[snr > 0]
    return float(np.log(known.min())) if len(known) else LOG_SNR[0]


class LabelErrors(NamedTuple):
    """Errors of one label: columns of the tables of `ErrorModel`."""

    tables: tuple[Float32Array, ...]  # of `TABLES`
    factors_95: Mapping[str, float]  # by class


class Checked(NamedTuple):
    """Whether cross-fitted intervals of a label contain each held-out pair."""

    known: BoolArray  # (n,): pairs with a residual
    inside: BoolArray  # (n, 2): in the interval of each of `LEVELS`
    n_class: Mapping[str, int]  # pairs that the factors of a class were counted on


def fit_label(
    held_out: HeldOut, label: str, grid: Grid, sparse: BoolArray
) -> tuple[LabelErrors, Checked]:
    """Fit and calibrate half-widths of a label, and check the procedure on pairs it has not seen.

    Parameters
    ----------
    held_out : HeldOut
    label : str
    grid : Grid
    sparse : ndarray of bool, shape (N_CELLS ** 3,)
        Cells of the sparse class: `find_sparse` of the training pairs at the centers of the cells.

    Raises
    ------
    ModelError
        Too few pairs or parts.
    """
    number = LABELS.index(label)
    known = np.isfinite(held_out.residuals[:, number])
    rows = np.flatnonzero(known)
    n_parts = len(np.unique(held_out.part[rows]))
    if len(rows) < MIN_PAIRS:
        raise ModelError(
            f"{label}: errors need {MIN_PAIRS} held-out pairs, not {len(rows)}",
            "Match more stars, or loosen the cuts.",
        )
    if n_parts < 3:
        raise ModelError(
            f"{label}: errors need held-out stars in three parts; the {len(rows)} pairs are of so "
            f"few stars that they fill {n_parts}",
            "Match more stars; if there are many, check the ids: pairs with an id in common count "
            "as one star.",
        )
    cell, log_snr = grid.cells(held_out.features), held_out.log_snr
    one = _Label(
        cell[rows],
        log_snr[rows],
        held_out.residuals[rows, number],
        held_out.part[rows],
        sparse[cell[rows]],
        ~_wrong(held_out.residuals)[rows],
    )
    inside = np.zeros((len(known), len(LEVELS)), dtype=np.bool_)
    scores, inside[rows] = one.cross_fitted()
    factors = _factors(scores, one.is_sparse)
    scale = one.fit(one.right)
    of_class = np.where(sparse, factors[SPARSE][0], factors[DENSE][0])
    every, steps = np.arange(grid.size), snr_steps()
    reference, reference_profile = np.zeros(len(every)), np.ones(len(steps))
    stated = rows[held_out.reference_errors[rows, number] > 0]
    if 2 * len(stated) >= len(rows):
        error = held_out.reference_errors[stated, number]
        theirs = fit_scale(cell[stated], log_snr[stated], error, one.with_trees)
        reference = np.exp(theirs.middle + theirs.of_cell(every))
        # The noise of a target tells nothing of a reference fainter than those of the pairs.
        reference_profile = np.exp(theirs.of_snr(np.maximum(steps, least_log_snr(held_out.snr))))
    values, profile = of_class * np.exp(scale.of_cell(every)), np.exp(scale.of_snr(steps))
    tables = (values, profile, reference, reference_profile)
    factors_95 = {name: both[1] / both[0] for name, both in factors.items()}
    n_sparse = int(np.count_nonzero(one.is_sparse))
    return (
        LabelErrors(tuple(table.astype(np.float32) for table in tables), factors_95),
        Checked(known, inside, {DENSE: len(rows) - n_sparse, SPARSE: n_sparse}),
    )


def error_model(
    of_label: Sequence[LabelErrors],
    grid: Grid,
    sparse: BoolArray,
    least: float,
    *,
    correction: str,
    reference_error: str = "included",
) -> ErrorModel:
    """Put the errors of all labels together.

    Parameters
    ----------
    of_label : sequence of LabelErrors
        In the order of ``LABELS``.
    grid : Grid
    sparse : ndarray of bool, shape (N_CELLS ** 3,)
    least : float
        `least_log_snr` of the pairs.
    correction : str
        SHA-256 of the correction whose residuals these are.
    reference_error : {"included", "removed"}
        Whether the model gives half-widths with the error of the reference.
    """
    about = {
        "correction": correction,
        "factors_95": {
            label: dict(one.factors_95) for label, one in zip(LABELS, of_label, strict=True)
        },
        "reference_error": reference_error,
        "unknown_snr": int(np.searchsorted(snr_steps(), least)),
    }
    columns = zip(*(one.tables for one in of_label), strict=True)
    values, profile, error, error_profile = (np.stack(column, axis=1) for column in columns)
    return ErrorModel(grid, values, profile, sparse, error, error_profile, about)


def _wrong(residuals: FloatArray) -> BoolArray:
    """Pairs that are far off in all labels at once: one of the two measurements is wrong.

    They are few, but where stars are few they may be most of the pairs, and would set the scale
    there. The hit rate is counted with them.
    """
    size = np.abs(residuals)
    known = np.asarray(np.isfinite(size).all(axis=1))
    if not known.any():
        return known
    return np.asarray(known & (size > _WRONG * np.median(size[known], axis=0)).all(axis=1))


class _Label(NamedTuple):
    """Held-out pairs that know a label."""

    cell: NDArray[np.int64]
    log_snr: FloatArray
    residual: FloatArray
    part: NDArray[np.int8]
    is_sparse: BoolArray
    right: BoolArray

    @property
    def with_trees(self) -> bool:
        """Whether the pairs are enough to see how residuals depend on the star."""
        return len(self.residual) >= MIN_FOR_TREES

    def fit(self, used: BoolArray) -> Scale:
        """Scale of some pairs."""
        return fit_scale(self.cell[used], self.log_snr[used], self.residual[used], self.with_trees)

    def scores(self, without: tuple[int, ...], at: BoolArray) -> FloatArray:
        """Residuals of some pairs over a scale fitted to right measurements without some parts."""
        used = self.right & ~np.isin(self.part, without)
        scale = self.fit(used)
        size = np.exp(scale.of_cell(self.cell[at]) + scale.of_snr(self.log_snr[at]))
        return np.asarray(np.abs(self.residual[at]) / size)

    def cross_fitted(self) -> tuple[FloatArray, BoolArray]:
        """Scores of all pairs, and whether they lie inside intervals made without them.

        A score comes from a scale fitted without its part. To check a part, the scores of the
        others come from scales that have not seen it either: fitted without both.
        """
        n, parts = len(self.residual), np.unique(self.part).tolist()
        scores = np.empty(n)
        for part in parts:
            at = self.part == part
            scores[at] = self.scores((part,), at)
        without = {part: np.empty(n) for part in parts}
        for one, other in itertools.combinations(parts, 2):
            at = np.isin(self.part, (one, other))
            found, of_one = self.scores((one, other), at), self.part[at] == one
            without[one][self.part == other] = found[~of_one]
            without[other][self.part == one] = found[of_one]
        inside = np.zeros((n, len(LEVELS)), dtype=np.bool_)
        for part in parts:
            at = self.part == part
            factors = _factors(without[part][~at], self.is_sparse[~at])
            for level, (dense, sparse) in enumerate(zip(*factors.values(), strict=True)):
                inside[at, level] = scores[at] <= np.where(self.is_sparse[at], sparse, dense)
        return scores, inside


def _factors(scores: FloatArray, is_sparse: BoolArray) -> dict[str, tuple[float, ...]]:
    """Factor of each level, by class."""
    everyone = np.sort(scores)
    classes = {DENSE: np.sort(scores[~is_sparse]), SPARSE: np.sort(scores[is_sparse])}
    return {
        name: tuple(_quantile(mine, everyone, level) for level in LEVELS)
        for name, mine in classes.items()
    }


def _quantile(mine: FloatArray, everyone: FloatArray, level: float) -> float:
    """Score below which a new pair of a class lies with at least this probability.

    Where the class has too few scores to say so, the largest of them, or that of all classes.
    """
    rank = int(np.ceil((len(mine) + 1) * level))
    if rank <= len(mine):
        return float(max(mine[rank - 1], _LEAST))
    rank = min(int(np.ceil((len(everyone) + 1) * level)), len(everyone))
    return float(max(everyone[rank - 1], mine[-1] if len(mine) else 0.0, _LEAST))


@dataclass(frozen=True)
class HitRate:
    """Share of held-out pairs inside their interval.

    Parameters
    ----------
    label, subset : str
    level : float
        0.68 or 0.95.
    n : int
        Pairs.
    hit_rate : float
    low, high : float
        95 % interval of it (Clopper & Pearson 1934, Biometrika 26, 404).
    """

    label: str
    subset: str
    level: float
    n: int
    hit_rate: float
    low: float
    high: float


def hit_rates(label: str, checked: Checked, subsets: Mapping[str, BoolArray]) -> list[HitRate]:
    """Count the hits of a label at every level in some subsets; those without pairs are left out.

    Parameters
    ----------
    label : str
    checked : Checked
    subsets : mapping of str to ndarray of bool, shape (n,)
    """
    from scipy.stats import binomtest

    found = []
    for subset, chosen in subsets.items():
        inside = checked.inside[chosen & checked.known]
        for level, hits in zip(LEVELS, np.count_nonzero(inside, axis=0).tolist(), strict=True):
            if n := len(inside):
                limits = binomtest(hits, n).proportion_ci(0.95)
                low, high = float(limits.low), float(limits.high)
                found.append(HitRate(label, subset, level, n, hits / n, low, high))
    return found


# --- the size of residuals as a function of the star and of S/N ---------------------------------


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
        """Find the logarithm of the scale by cell."""
        if self.trees is None:
            return np.zeros(len(cell))
        used = np.flatnonzero(np.bincount(cell))
        of_cell = np.empty(N_CELLS**3)
        of_cell[used] = self.trees.inplace_predict(_numbers(used))
        return np.asarray(of_cell[cell])

    def of_snr(self, log_snr: FloatArray) -> FloatArray:
        """Find the logarithm of the scale by S/N: see `ErrorModel.half_width` for the ends."""
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
    trees, of_cell = _fit_trees(cell, log_size - plain.of_snr(log_snr))
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


def _fit_trees(cell: IntArray, log_size: FloatArray) -> tuple[Any, FloatArray]:
    """Boosted trees of a logarithm over the numbers of the cells: constant on every cell.

    Least squares see of a cell only the mean and the number of its pairs, so that a fit takes as
    long as there are cells with pairs. Beside the trees it gives their value for every pair.
    """
    import xgboost

    n = np.bincount(cell)
    used = np.flatnonzero(n)
    mean = np.bincount(cell, log_size)[used] / n[used]
    matrix = xgboost.QuantileDMatrix(
        _numbers(used),
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


def _numbers(cell: IntArray) -> Float32Array:
    """Numbers of cells along the axes."""
    return np.stack(np.unravel_index(cell, (N_CELLS,) * 3), axis=1).astype(np.float32)
