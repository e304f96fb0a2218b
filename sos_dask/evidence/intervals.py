"""Half-widths that contain the share of residuals they promise, counted on pairs not seen before.

They are kept as tables over the cells of label space and over S/N: an error costs two look-ups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sos_dask import __version__
from sos_dask.columns import BoolArray, Float32Array, FloatArray, FloatingArray, IntArray
from sos_dask.errors import ModelError
from sos_dask.problem import BLOCK_ROWS, DEFAULT, Problem
from sos_dask.run.machine import import_xgboost
from sos_dask.stats.numbers import DENSE, SPARSE
from sos_dask.stats.table import Grid, seal, unseal

LEVELS = (0.68, 0.95)
TABLES = ("values", "profile", "reference", "reference_profile")
_FORMAT = 3
_NAME = "error"
_N_CELLS = 48  # along each axis, fewer from four inputs on: not more in all than of three
_N_STEPS = 1024  # of log S/N
_LOG_SNR = (float(np.log(0.1)), float(np.log(1e4)))
_MIN_PAIRS = 40
_MIN_FOR_TREES = 2000
_SNR_KNOTS = 12
_MIN_IN_KNOT = 40
_ROUNDS = 150
# Residuals are not taken for smaller than this part of their median: the logarithm of a residual
# that happens to be zero says nothing of its scale.
_SMALLEST = 0.05
_LEAST = 1e-6  # K, dex: an error of 0 would weigh without end, and residuals can all be zero
_WRONG = 8.0  # times the median size: 5.4 standard deviations of a normal distribution


# --- tables -------------------------------------------------------------------------------------


def error_grid(low: Sequence[float], high: Sequence[float]) -> Grid:
    """Cut the box of the training pairs, between two corners in the inputs, into cells."""
    n = min(_N_CELLS, round(_N_CELLS ** (3 / len(low))))
    return Grid(tuple(low), tuple(high), (n,) * len(low))


def _snr_steps() -> FloatArray:
    """Logarithm of S/N in the middle of every step of a profile."""
    return _LOG_SNR[0] + (np.arange(_N_STEPS) + 0.5) * (_LOG_SNR[1] - _LOG_SNR[0]) / _N_STEPS


@dataclass(frozen=True)
class ErrorModel:
    """Half-widths of intervals around the l corrected labels, by k inputs of the star.

    ``about`` has ``correction`` (SHA-256 of the model whose residuals these are), ``factors_95``
    (by label and class: half-width of the 95 % interval in that of the 68 % one) and
    ``unknown_snr`` (step that counts where the S/N is not known).
    """

    problem: Problem
    grid: Grid  # of n cells
    about: Mapping[str, Any]
    values: Float32Array  # (n, l): of the 68 % interval in each cell, where the profile is 1
    profile: Float32Array  # (1024, l): factor by S/N, in equal steps of its logarithm
    sparse: BoolArray  # (n,): cells of the sparse class
    # The same two tables of the error of the reference, which the half-widths include; 0 where it
    # is not stated.
    reference: Float32Array
    reference_profile: Float32Array

    def half_width(self, features: Float32Array, snr: FloatingArray | None) -> Float32Array:
        """Look up the half-widths (n, l) of corrected - reference: see `half_widths`."""
        return self.half_widths(features, snr)[1]

    def half_widths(
        self, features: Float32Array, snr: FloatingArray | None
    ) -> tuple[Float32Array, Float32Array]:
        """Look up the half-widths (n, l) of 68 % intervals in the units of the labels.

        First those of the corrected labels themselves: without the error of the reference, which is
        taken out in quadrature; at least a third of a width is left. Then those of corrected -
        reference. nan where a feature (n, k) is nan or infinite; outside the training box those of
        the nearest place on it count, as in a correction. Below the smallest S/N (n,) of the pairs
        half-widths grow as its inverse, above the largest they stay; where it is unknown or not
        positive, that of the noisiest pairs counts. Each label is contiguous. Raises `ModelError`
        at another number of features.
        """
        k = len(self.grid.shape)
        if features.ndim != 2 or features.shape[1] != k:
            raise ModelError(f"error model: features have shape {features.shape}, not (n, {k})")
        own, pair = np.empty((2, len(self.problem.labels), len(features)), dtype=np.float32)
        for first in range(0, len(features), BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            x = features[block]
            cell = self.grid.cells(x)
            step = self._steps(None if snr is None else snr[block])
            known = np.isfinite(x).all(axis=1)
            for number, tables in enumerate(self._by_label):
                width = pair[number, block]
                np.take(tables[0], cell, out=width, mode="clip")
                width *= tables[1][step]
                width[~known] = np.nan
                theirs = tables[2][cell] * tables[3][step]
                square = width * width
                own[number, block] = np.sqrt(np.maximum(square - theirs * theirs, square / 9))
        return own.T, pair.T

    @cached_property
    def _by_label(self) -> list[tuple[Float32Array, ...]]:
        tables = (self.values, self.profile, self.reference, self.reference_profile)
        return list(zip(*(np.ascontiguousarray(table.T) for table in tables), strict=True))

    def _steps(self, snr: FloatingArray | None) -> IntArray:
        unknown = int(self.about["unknown_snr"])
        if snr is None:
            return np.full(1, unknown)
        steps = np.float32(_N_STEPS / (_LOG_SNR[1] - _LOG_SNR[0]))
        with np.errstate(divide="ignore", invalid="ignore"):
            place = (np.log(snr, dtype=np.float32) - np.float32(_LOG_SNR[0])) * steps
        place = np.where(np.isfinite(place), place, np.float32(unknown))
        return np.asarray(np.clip(place, 0, _N_STEPS - 1), dtype=np.int64)

    def is_sparse(self, features: Float32Array) -> BoolArray:
        """Tell which rows are of the sparse class, shape (n,)."""
        return np.asarray(self.sparse[self.grid.cells(features)])

    def require(self, correction: str) -> None:
        """Raise `ModelError` unless these are the errors of the correction with this SHA-256."""
        if self.about["correction"] != correction:
            raise ModelError(
                "the error model was made for another correction",
                "Give the one that was made from this model's held-out pairs.",
            )

    def describe(self, label: str) -> tuple[str, str]:
        """Say what the half-widths of a label are: its own, and that of corrected - reference."""
        factors = self.about["factors_95"][label]
        of_pair = (
            f"half-width of the 68 % interval of {label} corrected - reference; for 95 % times "
            f"{factors[DENSE]:.2f} (dense), {factors[SPARSE]:.2f} (sparse)"
        )
        own = f"half-width of the 68 % interval of corrected {label}"
        stated = bool(self.reference[:, self.problem.names.index(label)].any())
        less = "less the normalised error of the reference" if stated else "which states no errors"
        return f"{own}: that of corrected - reference, {less}", of_pair

    def files(self) -> dict[str, bytes]:
        """Pack the model into files, by name; equal models give equal bytes."""
        tables = (self.values, self.profile, self.sparse, self.reference, self.reference_profile)
        document = {
            "format": _FORMAT,
            "sos_dask": __version__,
            "problem": self.problem.as_json,
            "low": list(self.grid.low),
            "high": list(self.grid.high),
            "about": dict(self.about),
        }
        return seal(_NAME, document, tables)


def load_errors(directory: Path, problem: Problem | None = None) -> ErrorModel:
    """Read the files of an `ErrorModel`, of the correction of a problem where one is given.

    Raises `ModelError` where a file is missing, not the one that was saved, of another format, or
    of other labels or inputs than the correction.
    """
    document, tables = unseal(directory, _NAME, _FORMAT, "error model")
    theirs = Problem(**document["problem"])
    if theirs != (problem or theirs):
        raise ModelError(
            f"{directory / _NAME}.json has errors of {theirs.words}; the correction is of "
            f"{problem.words if problem else ''}",
            "Give the error model that was made from this correction's held-out pairs.",
        )
    grid = error_grid(document["low"], document["high"])
    return ErrorModel(theirs, grid, document["about"], *tables)


# --- fit ----------------------------------------------------------------------------------------


class HeldOut(NamedTuple):
    """The n pairs that a correction has not been trained on."""

    features: Float32Array  # (n, k)
    snr: FloatArray  # nan where unknown
    residuals: FloatArray  # (n, l) target - reference - correction, nan where unknown
    reference_errors: FloatArray  # (n, l) normalised, nan where the reference states none
    part: NDArray[np.int8]  # at least three parts; pairs of one star are in one part
    labels: Sequence[str] = DEFAULT.names


def least_log_snr(snr: FloatArray) -> float:
    """Find the logarithm of the lowest positive S/N; that of the tables where none is known."""
    known = snr[snr > 0]
    return float(np.log(known.min())) if len(known) else _LOG_SNR[0]


class LabelErrors(NamedTuple):
    """Errors of one label, and whether cross-fitted intervals contain each of n held-out pairs."""

    tables: Sequence[Float32Array]  # of `TABLES`: columns of those of `ErrorModel`
    factors_95: Mapping[str, float]  # by class
    known: BoolArray  # (n,): pairs with a residual
    inside: BoolArray  # (n, 2): in the interval of each of `LEVELS`
    n_class: Mapping[str, int]  # pairs that the factors of a class were counted on


def fit_label(held_out: HeldOut, label: str, grid: Grid, sparse: BoolArray) -> LabelErrors:
    """Fit and calibrate half-widths of a label, and check the procedure on pairs it has not seen.

    Sparse cells are `find_sparse` of the training pairs at the centers of the grid. Raises
    `ModelError` at too few pairs or parts.
    """
    number = held_out.labels.index(label)
    known = np.isfinite(held_out.residuals[:, number])
    rows = np.flatnonzero(known)
    n_parts = len(np.unique(held_out.part[rows]))
    if len(rows) < _MIN_PAIRS:
        raise ModelError(
            f"{label}: errors need {_MIN_PAIRS} held-out pairs, not {len(rows)}",
            "Match more stars, or loosen the cuts.",
        )
    if n_parts < 3:
        raise ModelError(
            f"{label}: errors need held-out stars in three parts; the {len(rows)} pairs are of so "
            f"few stars that they fill {n_parts}",
            "Match more stars; if there are many, check the ids: pairs with an id in common count "
            "as one star.",
        )
    cell, shape = grid.cells(held_out.features), grid.shape if len(rows) >= _MIN_FOR_TREES else ()
    log_snr = np.log(np.where(held_out.snr > 0, held_out.snr, np.nan))
    residual, right = held_out.residuals[rows, number], ~_wrong(held_out.residuals)[rows]
    is_sparse = sparse[cell[rows]]
    one = _Label(cell[rows], log_snr[rows], residual, held_out.part[rows], is_sparse, right, shape)
    inside = np.zeros((len(known), len(LEVELS)), dtype=np.bool_)
    scores, inside[rows] = one.cross_fitted()
    factors = _factors(scores, one.is_sparse)
    every, steps = np.arange(grid.size), _snr_steps()
    scale, of_class = one.fit(one.right), np.where(sparse, factors[SPARSE][0], factors[DENSE][0])
    found = [of_class * np.exp(scale.of_cell(every)), np.exp(scale.of_snr(steps))]
    stated = rows[held_out.reference_errors[rows, number] > 0]
    if 2 * len(stated) >= len(rows):
        error = held_out.reference_errors[stated, number]
        theirs = _fit_scale(cell[stated], log_snr[stated], error, shape)
        # The noise of a target tells nothing of a reference fainter than those of the pairs.
        steps = np.maximum(steps, least_log_snr(held_out.snr))
        found += [np.exp(theirs.middle + theirs.of_cell(every)), np.exp(theirs.of_snr(steps))]
    else:
        found += [np.zeros(len(every)), np.ones(len(steps))]
    tables = [table.astype(np.float32) for table in found]
    factors_95 = {name: both[1] / both[0] for name, both in factors.items()}
    n_sparse = int(np.count_nonzero(one.is_sparse))
    n_class = {DENSE: len(rows) - n_sparse, SPARSE: n_sparse}
    return LabelErrors(tables, factors_95, known, inside, n_class)


def error_model(
    tables: Sequence[Sequence[Float32Array]],
    factors_95: Sequence[Mapping[str, float]],
    grid: Grid,
    sparse: BoolArray,
    least: float,
    *,
    problem: Problem,
    correction: str,
) -> ErrorModel:
    """Put the `LabelErrors` of all labels together; ``least`` is `least_log_snr` of the pairs."""
    by_label = {label: dict(of) for label, of in zip(problem.names, factors_95, strict=True)}
    about = {
        "correction": correction,
        "factors_95": by_label,
        "unknown_snr": int(np.searchsorted(_snr_steps(), least)),
    }
    columns = zip(*tables, strict=True)
    values, profile, error, error_profile = (np.stack(column, axis=1) for column in columns)
    return ErrorModel(problem, grid, about, values, profile, sparse, error, error_profile)


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

    cell: IntArray
    log_snr: FloatArray
    residual: FloatArray
    part: NDArray[np.int8]
    is_sparse: BoolArray
    right: BoolArray
    shape: tuple[int, ...]  # of the grid of cells; none: too few pairs for trees

    def fit(self, used: BoolArray) -> _Scale:
        """Scale of some pairs."""
        # All fits whose scores are put together are of one kind.
        return _fit_scale(self.cell[used], self.log_snr[used], self.residual[used], self.shape)

    def scores(self, without: tuple[int, ...], at: BoolArray) -> FloatArray:
        """Residuals of some pairs over a scale fitted to right measurements without some parts."""
        scale = self.fit(self.right & ~np.isin(self.part, without))
        size = np.exp(scale.of_cell(self.cell[at]) + scale.of_snr(self.log_snr[at]))
        return np.asarray(np.abs(self.residual[at]) / size)

    def cross_fitted(self) -> tuple[FloatArray, BoolArray]:
        """Scores of all pairs, and whether they lie inside intervals made without them.

        A score comes from a scale fitted without its part. To check a part, the scores of the
        others come from scales that have not seen it either: fitted without both.
        """
        parts, place = np.unique(self.part, return_inverse=True)
        n, every = len(place), range(len(parts))
        table = np.empty((len(parts), n))  # scores of pairs from scales without their and this part
        for one, other in itertools.combinations_with_replacement(every, 2):
            at = np.isin(place, (one, other))
            found, of_one = self.scores((parts[one], parts[other]), at), place[at] == one
            table[other, place == one] = found[of_one]
            table[one, place == other] = found[place[at] == other]
        inside = np.zeros((n, len(LEVELS)), dtype=np.bool_)
        for part in every:
            at = place == part
            factors = _factors(table[part, ~at], self.is_sparse[~at])
            limits = np.where(self.is_sparse[at, None], factors[SPARSE], factors[DENSE])
            inside[at] = table[part, at, None] <= limits
        return table[place, np.arange(n)], inside


def _factors(scores: FloatArray, is_sparse: BoolArray) -> dict[str, list[float]]:
    """Factor of each level, by class."""
    dense, sparse, every = (np.sort(x) for x in (scores[~is_sparse], scores[is_sparse], scores))
    classes = ((DENSE, dense), (SPARSE, sparse))
    return {name: [_quantile(mine, every, level) for level in LEVELS] for name, mine in classes}


def _quantile(mine: FloatArray, everyone: FloatArray, level: float) -> float:
    """Score below which a new pair of a class lies with at least this probability.

    Where the class has too few scores to say so, the largest of them, or that of all classes.
    """
    rank = int(np.ceil((len(mine) + 1) * level))
    if rank <= len(mine):
        return float(max(mine[rank - 1], _LEAST))
    rank = min(int(np.ceil((len(everyone) + 1) * level)), len(everyone))
    return float(max(everyone[rank - 1], mine[-1] if len(mine) else 0.0, _LEAST))


def hit_rates(
    label: str, checked: LabelErrors, subsets: Mapping[str, BoolArray]
) -> list[dict[str, Any]]:
    """Count the held-out pairs inside their interval at every level, in subsets (n,) with pairs.

    Each has ``label``, ``subset``, ``level`` (0.68 or 0.95), ``n`` pairs, ``hit_rate``, and its
    95 % interval ``low`` to ``high`` (Clopper & Pearson 1934, Biometrika 26, 404).
    """
    from scipy.stats import binomtest

    found = []
    for subset, chosen in subsets.items():
        inside = checked.inside[chosen & checked.known]
        for level, hits in zip(LEVELS, np.count_nonzero(inside, axis=0).tolist(), strict=True):
            if n := len(inside):
                low, high = binomtest(hits, n).proportion_ci(0.95)
                row = {"label": label, "subset": subset, "level": level, "n": n}
                found.append(row | {"hit_rate": hits / n, "low": float(low), "high": float(high)})
    return found


# --- the size of residuals as a function of the star and of S/N ---------------------------------


class _Scale(NamedTuple):
    """Size of residuals as a function of cell and S/N: exp(of_cell + of_snr + middle)."""

    trees: Any  # xgboost.Booster of the numbers of a cell along the axes; None: 0
    knots: FloatArray  # log S/N; none: no dependence
    levels: FloatArray  # contribution at the knots, which never rises
    middle: float  # mean logarithm of what was fitted
    shape: tuple[int, ...]  # of the grid of cells, where there are trees

    def of_cell(self, cell: IntArray) -> FloatArray:
        """Logarithm of the scale by cell."""
        if self.trees is None:
            return np.zeros(len(cell))
        used, of_cell = np.flatnonzero(np.bincount(cell)), np.empty(math.prod(self.shape))
        of_cell[used] = self.trees.inplace_predict(_numbers(used, self.shape))
        return np.asarray(of_cell[cell])

    def of_snr(self, log_snr: FloatArray) -> FloatArray:
        """Logarithm of the scale by S/N: see `ErrorModel.half_width` for the ends."""
        if not len(self.knots):
            return np.zeros(len(log_snr))
        inside = np.interp(np.nan_to_num(log_snr, nan=-np.inf), self.knots, self.levels)
        below = np.nan_to_num(self.knots[0] - log_snr, nan=0.0)
        return np.asarray(inside + np.maximum(below, 0.0))


def _fit_scale(
    cell: IntArray, log_snr: FloatArray, residual: FloatingArray, shape: tuple[int, ...]
) -> _Scale:
    """Scale of finite residuals (n,); it depends on the cell where a grid is given."""
    size = np.abs(np.asarray(residual, dtype=np.float64))
    middle = float(np.median(size) or size.mean() or 1.0)
    log_size = np.log(np.maximum(size, _SMALLEST * middle))
    center = float(log_size.mean())
    log_size -= center
    # Pairs in bins of S/N with equally many, or none.
    order = np.argsort(log_snr, kind="stable")
    order = order[np.isfinite(log_snr[order])]
    n_bins = min(_SNR_KNOTS, len(order) // _MIN_IN_KNOT)
    flat = n_bins < 2 or log_snr[order[0]] == log_snr[order[-1]]
    bins = [] if flat else np.array_split(order, n_bins)
    plain = _Scale(None, *_falling(bins, log_snr, log_size), center, shape)
    if not shape:
        return plain
    scale = plain._replace(trees=_fit_trees(cell, log_size - plain.of_snr(log_snr), shape))
    knots, levels = _falling(bins, log_snr, log_size - scale.of_cell(cell))
    return scale._replace(knots=knots, levels=levels)


def _falling(
    bins: list[IntArray], log_snr: FloatArray, log_size: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Means in the bins, made to fall with S/N."""
    from scipy.optimize import isotonic_regression

    if not bins:
        return np.empty(0), np.empty(0)
    knots, means = (np.array([x[rows].mean() for rows in bins]) for x in (log_snr, log_size))
    weights = [float(len(rows)) for rows in bins]
    levels = isotonic_regression(means, weights=weights, increasing=False).x
    knots, first = np.unique(knots, return_index=True)
    return knots, np.asarray(levels, dtype=np.float64)[first]


def _fit_trees(cell: IntArray, log_size: FloatArray, shape: tuple[int, ...]) -> Any:
    """Boosted trees of a logarithm over the numbers of the cells: constant on every cell.

    Least squares see of a cell only the mean and the number of its pairs, so that a fit takes as
    long as there are cells with pairs.
    """
    xgboost = import_xgboost()

    n = np.bincount(cell)
    used = np.flatnonzero(n)
    mean = (np.bincount(cell, log_size)[used] / n[used]).astype(np.float32)
    weight = n[used].astype(np.float32)
    matrix = xgboost.QuantileDMatrix(
        _numbers(used, shape), mean, weight=weight, max_bin=shape[0] + 1, nthread=1
    )
    params = {
        "tree_method": "hist", "max_depth": 3, "learning_rate": 0.05, "reg_lambda": 20.0,
        "min_child_weight": max(50.0, len(log_size) / 400), "max_bin": shape[0] + 1,
        "base_score": 0.0, "nthread": 1, "verbosity": 0,
    }  # fmt: skip
    return xgboost.train(params, matrix, _ROUNDS)


def _numbers(cell: IntArray, shape: tuple[int, ...]) -> Float32Array:
    """Numbers of cells along the axes."""
    return np.stack(np.unravel_index(cell, shape), axis=1).astype(np.float32)
