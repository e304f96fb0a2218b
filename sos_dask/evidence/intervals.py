"""Half-widths that contain the share of residuals they promise, counted on pairs not seen before.

They are kept as tables over the cells of label space and over S/N: an error costs two look-ups.

A residual corrected - reference has the error of the reference in it, which differs from pair to
pair: that of a faint star of one survey may be five times that of a bright one of another. So the
error of the corrected label is not what is left of a width of residuals less a typical error of
references, but the scale that, with the error of each pair's own reference, explains its residual
best (`_fit_own`).
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
from sos_dask.evidence.beyond import giants
from sos_dask.problem import BLOCK_ROWS, DEFAULT, Problem
from sos_dask.run.machine import import_xgboost
from sos_dask.stats.numbers import DENSE, ONE_SIGMA, SPARSE
from sos_dask.stats.table import Grid, seal, unseal

LEVELS = (0.68, 0.95)
TABLES = ("values", "profile", "reference", "reference_profile")
_FORMAT = 4
_NAME = "error"
_N_CELLS = 48  # along each axis, fewer from four inputs on: not more in all than of three
_N_STEPS = 1024  # of log S/N
_LOG_SNR = (float(np.log(0.1)), float(np.log(1e4)))
_MIN_PAIRS = 40
_MIN_FOR_TREES = 2000
_SNR_PAIRS = 80  # fewer tell nothing of S/N
_BENDS = np.append(0.0, np.geomspace(1.0, 1000.0, 61))  # S/N
_KIND_PAIRS = 400  # with fewer giants and dwarfs have one profile
_ROUNDS = 150
# Residuals are not taken for smaller than this part of their median: the logarithm of a residual
# that happens to be zero says nothing of its scale.
_SMALLEST = 0.05
_LEAST = 1e-6  # K, dex: an error of 0 would weigh without end, and residuals can all be zero
_WRONG = 8.0  # times the median size: 5.4 standard deviations of a normal distribution
_STEPS = 3  # two more change errors by about half a percent
_STEPS_OF_LOG = 64.0  # of log S/N: 1.6 % wide
_CLIP = 1.5  # standard deviations; a residual beyond it counts as if it were there
# Mean square of normal numbers that are clipped so, and the part of it that is not.
_CLIPPED, _UNCLIPPED = 0.7784, 0.4778
_LEAST_OWN = 1 / 3  # of a width
_OF_REFERENCE = _LEAST_OWN / math.sqrt(1 - _LEAST_OWN**2)  # the same in errors of the reference


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

    ``about`` has ``correction`` (SHA-256 of the model whose residuals these are), by label and
    class ``factors_95`` (half-width of the 95 % interval of corrected - reference in that of the
    68 % one) and ``factors_68`` (what wrong measurements make of the latter), and ``unknown_snr``
    (step that counts where the S/N is not known).
    """

    problem: Problem
    grid: Grid  # of n cells
    about: Mapping[str, Any]
    values: Float32Array  # (n, l): of the 68 % interval in each cell, where the profile is 1
    # (2048, l): factor by S/N, in equal steps of its logarithm, of dwarfs, then of giants
    profile: Float32Array
    sparse: BoolArray  # (n,): cells of the sparse class
    # The same two tables of the error of the reference, which corrected - reference has more in
    # quadrature; 0 where it is not stated.
    reference: Float32Array
    reference_profile: Float32Array

    def half_width(self, features: Float32Array, snr: FloatingArray | None) -> Float32Array:
        """Look up the half-widths (n, l) of corrected - reference of right measurements."""
        return self._half_widths(features, snr, np.ones((2, len(self.problem.labels))))[1]

    def half_widths(
        self, features: Float32Array, snr: FloatingArray | None
    ) -> tuple[Float32Array, Float32Array]:
        """Look up the half-widths (n, l) of 68 % intervals in the units of the labels.

        First those of the corrected labels themselves, of right measurements and without the error
        of the reference; at least a third of a width. Then those of corrected - reference, wrong
        measurements included. nan where a feature (n, k) is nan or infinite; outside the training
        box those of the nearest place on it count, as in a correction. With falling S/N (n,)
        half-widths grow at most as its inverse; where it is unknown or not positive, that of the
        noisiest pairs counts. Each label is contiguous. Raises `ModelError` at another number of
        features.
        """
        of_label = [self.about["factors_68"][name] for name in self.problem.names]
        factors = [[of[name] for of in of_label] for name in (DENSE, SPARSE)]
        return self._half_widths(features, snr, np.array(factors))

    def _half_widths(
        self, features: Float32Array, snr: FloatingArray | None, factors: FloatArray
    ) -> tuple[Float32Array, Float32Array]:
        """See `half_widths`; the latter by factors (2, l) of the classes."""
        k = len(self.grid.shape)
        if features.ndim != 2 or features.shape[1] != k:
            raise ModelError(f"error model: features have shape {features.shape}, not (n, {k})")
        own, pair = np.empty((2, len(self.problem.labels), len(features)), dtype=np.float32)
        for first in range(0, len(features), BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            x = features[block]
            cell = self.grid.cells(x)
            step = self._steps(None if snr is None else snr[block])
            step = step + _N_STEPS * self._giant[cell]
            is_sparse = self.sparse[cell].astype(np.int8)
            known = np.isfinite(x).all(axis=1)
            for number, tables in enumerate(self._by_label):
                width = own[number, block]
                np.take(tables[0], cell, out=width, mode="clip")
                width *= tables[1][step]
                width[~known] = np.nan
                theirs = tables[2][cell] * tables[3][step]
                np.maximum(width, theirs * np.float32(_OF_REFERENCE), out=width)
                np.hypot(width, theirs, out=pair[number, block])
                pair[number, block] *= factors[:, number].astype(np.float32)[is_sparse]
                # Of few pairs the factor may be below 1.
                np.minimum(width, pair[number, block], out=width)
        return own.T, pair.T

    @cached_property
    def _giant(self) -> BoolArray:
        return giants(self.problem, self.grid.centers())

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
            what = "the error model was made for another correction"
            raise ModelError(what, "Give the one that was made from this model's held-out pairs.")

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
    problem: Problem = DEFAULT


def least_log_snr(snr: FloatArray) -> float:
    """Find the logarithm of the lowest positive S/N; that of the tables where none is known."""
    known = snr[snr > 0]
    return float(np.log(known.min())) if len(known) else _LOG_SNR[0]


class LabelErrors(NamedTuple):
    """Errors of one label, and whether cross-fitted intervals contain each of n held-out pairs."""

    tables: Sequence[Float32Array]  # of `TABLES`: columns of those of `ErrorModel`
    factors: Mapping[str, Mapping[str, float]]  # those of `ErrorModel.about`, by class
    known: BoolArray  # (n,): pairs with a residual
    inside: BoolArray  # (n, 2): in the interval of each of `LEVELS`
    n_class: Mapping[str, int]  # pairs that the factors of a class were counted on


def fit_label(held_out: HeldOut, label: str, grid: Grid, sparse: BoolArray) -> LabelErrors:
    """Fit and calibrate half-widths of a label, and check the procedure on pairs it has not seen.

    Sparse cells are `find_sparse` of the training pairs at the centers of the grid. Raises
    `ModelError` at too few pairs or parts.
    """
    number = held_out.problem.names.index(label)
    known = np.isfinite(held_out.residuals[:, number])
    rows = np.flatnonzero(known)
    n_parts = len(np.unique(held_out.part[rows]))
    if len(rows) < _MIN_PAIRS:
        what = f"{label}: errors need {_MIN_PAIRS} held-out pairs, not {len(rows)}"
        raise ModelError(what, "Match more stars, or loosen the cuts.")
    if n_parts < 3:
        raise ModelError(
            f"{label}: errors need held-out stars in three parts; the {len(rows)} pairs are of so "
            f"few stars that they fill {n_parts}",
            "Match more stars; if there are many, check the ids: pairs with an id in common count "
            "as one star.",
        )
    cell, giant = grid.cells(held_out.features)[rows], giants(held_out.problem, grid.centers())
    faintest = least_log_snr(held_out.snr)
    log_snr = np.log(np.where(held_out.snr > 0, held_out.snr, np.exp(faintest)))[rows]
    error = held_out.reference_errors[rows, number]
    shape, has = grid.shape if len(rows) >= _MIN_FOR_TREES else (), error > 0
    place, theirs, typical = (cell, log_snr, giant[cell]), None, np.zeros(len(rows))
    if 2 * np.count_nonzero(has) >= len(rows):
        at = cell[has], log_snr[has], giant[cell[has]]
        theirs = _fit_scale(*at, _log_size(error[has]), shape)
        typical = theirs.size(*place)
    error = np.where(has, error, typical) if theirs else typical
    size, right = held_out.residuals[rows, number], ~_wrong(held_out.residuals)[rows]
    pairs = _Pairs(*place, size, held_out.part[rows], sparse[cell], right, error, typical)
    own, inside = np.empty(len(rows)), np.zeros((len(known), len(LEVELS)), dtype=np.bool_)
    own, inside[rows] = pairs.cross_fitted(shape)
    factors, scale = pairs.factors(own), _fit_own(pairs.take(pairs.right), shape)
    of_class = [np.where(sparse, *x) for x in zip(factors[SPARSE], factors[DENSE], strict=True)]
    every, steps = np.arange(grid.size), np.tile(_snr_steps(), 2)
    of_giant = np.repeat([False, True], _N_STEPS)
    found = [of_class[0] * np.exp(scale.middle + scale.of_cell(every))]
    found.append(np.exp(scale.of_snr(steps, of_giant)))
    if theirs:
        # The noise of a target tells nothing of a reference fainter than those of the pairs.
        steps = np.maximum(steps, faintest)
        found.append(of_class[1] * np.exp(theirs.middle + theirs.of_cell(every)))
        found.append(np.exp(theirs.of_snr(steps, of_giant)))
    else:
        found += [np.zeros(len(every)), np.ones(len(steps))]
    tables = [table.astype(np.float32) for table in found]
    n_sparse = int(np.count_nonzero(pairs.is_sparse))
    n_class = {DENSE: len(rows) - n_sparse, SPARSE: n_sparse}
    of_pair = {
        "factors_68": {name: narrow for name, (*_, narrow, _) in factors.items()},
        "factors_95": {name: wide / narrow for name, (*_, narrow, wide) in factors.items()},
    }
    return LabelErrors(tables, of_pair, known, inside, n_class)


def error_model(
    tables: Sequence[Sequence[Float32Array]],
    factors: Sequence[Mapping[str, Mapping[str, float]]],
    grid: Grid,
    sparse: BoolArray,
    least: float,
    *,
    problem: Problem,
    correction: str,
) -> ErrorModel:
    """Put the `LabelErrors` of all labels together; ``least`` is `least_log_snr` of the pairs."""
    about: dict[str, Any] = {
        "correction": correction,
        "unknown_snr": int(np.searchsorted(_snr_steps(), least)),
    }
    for name in factors[0]:
        about[name] = {x: dict(of[name]) for x, of in zip(problem.names, factors, strict=True)}
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


class _Pairs(NamedTuple):
    """Held-out pairs that know a label, n each."""

    cell: IntArray
    log_snr: FloatArray
    giant: BoolArray
    residual: FloatArray
    part: NDArray[np.int8]
    is_sparse: BoolArray
    right: BoolArray
    error: FloatArray  # of the pair's reference, 0 where it states none
    typical: FloatArray  # error of references in the cell at this S/N

    def take(self, rows: Any) -> _Pairs:
        """Some of the pairs."""
        return _Pairs(*(values[rows] for values in self))

    def cross_fitted(self, shape: tuple[int, ...]) -> tuple[FloatArray, BoolArray]:
        """Scales of all pairs, and whether they lie inside intervals made without them.

        A scale is fitted without the pair's part. To check a part, the scales of the others have
        not seen it either: they are fitted without both.
        """
        parts, place = np.unique(self.part, return_inverse=True)
        n, every = len(place), range(len(parts))
        own = np.empty((len(parts), n))  # of pairs by scales without their and this part
        for one, other in itertools.combinations_with_replacement(every, 2):
            at = np.isin(place, (one, other))
            scale = _fit_own(self.take(self.right & ~at), shape)
            for part, without in ((one, other), (other, one)):
                rows = place == part
                own[without, rows] = scale.size(*(x[rows] for x in self[:3]))
        inside = np.zeros((n, len(LEVELS)), dtype=np.bool_)
        for part in every:
            at = place == part
            factors = self.take(~at).factors(own[part, ~at])
            mine, theirs, *limits = self.take(at)._of_class(factors)
            width = np.hypot(mine * own[part, at], theirs * self.typical[at])
            inside[at] = np.abs(self.residual[at, None]) <= np.transpose(limits) * width[:, None]
        return own[place, np.arange(n)], inside

    def factors(self, own: FloatArray) -> dict[str, tuple[float, float, float, float]]:
        """By class: of the scales ``own``, of typical errors, and of the 68 % and 95 % intervals.

        68 % of the right pairs lie inside what the scales and the error of their own reference
        make, and so many inside what they and typical errors make. The others do that for all
        pairs, wrong measurements included.
        """
        size, right = np.abs(self.residual), self.right
        of_own = self._quantiles(_less(size, self.error) / own, LEVELS[0], right)
        mine, of_theirs = self._of_class(of_own) * own, dict.fromkeys(of_own, 0.0)
        theirs = np.zeros_like(own)
        if self.typical.any():
            of_theirs = self._quantiles(_less(size, mine) / self.typical, LEVELS[0], right)
            theirs = self._of_class(of_theirs) * self.typical
        score = size / np.hypot(mine, theirs)
        narrow, wide = (self._quantiles(score, level) for level in LEVELS)
        return {x: (of_own[x], of_theirs[x], narrow[x], wide[x]) for x in of_own}

    def _of_class(self, factors: Mapping[str, Any]) -> FloatArray:
        """Factors of the class of each pair, in the last axis."""
        dense, sparse = (np.asarray(factors[name])[..., None] for name in (DENSE, SPARSE))
        return np.where(self.is_sparse, sparse, dense)

    def _quantiles(
        self, scores: FloatArray, level: float, used: BoolArray | bool = True
    ) -> dict[str, float]:
        """Scores that contain a share of the pairs of each class, of those that are used."""
        masks = {DENSE: ~self.is_sparse & used, SPARSE: self.is_sparse & used}
        every = np.sort(scores[masks[DENSE] | masks[SPARSE]])
        return {name: _quantile(np.sort(scores[m]), every, level) for name, m in masks.items()}


def _less(size: FloatArray, other: FloatArray) -> FloatArray:
    """What is left of sizes in quadrature, at least 0."""
    return np.sqrt(np.maximum(size * size - other * other, 0.0))


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
    bends: Sequence[float]  # of dwarfs, giants: S/N where noise is as large as the floor; 0: none
    middle: float  # logarithm of the scale where both others are 0, on average
    shape: tuple[int, ...]  # of the grid of cells, where there are trees

    def size(self, cell: IntArray, log_snr: FloatArray, giant: BoolArray) -> FloatArray:
        """Scale of some pairs."""
        log_size = self.middle + self.of_cell(cell) + self.of_snr(log_snr, giant)
        return np.asarray(np.exp(log_size))

    def of_cell(self, cell: IntArray) -> FloatArray:
        """Logarithm of the scale by cell."""
        if self.trees is None:
            return np.zeros(len(cell))
        used, of_cell = np.flatnonzero(np.bincount(cell)), np.empty(math.prod(self.shape))
        of_cell[used] = self.trees.inplace_predict(_numbers(used, self.shape))
        return np.asarray(of_cell[cell])

    def of_snr(self, log_snr: FloatArray, giant: BoolArray) -> FloatArray:
        """Logarithm of the scale by S/N, relative to that of an endless one."""
        return _law(np.where(giant, self.bends[1], self.bends[0]), log_snr)


def _law(bend: FloatingArray, log_snr: FloatArray) -> FloatArray:
    """Logarithm of a floor and a noise that falls as 1/snr, in quadrature; 0 for unknown S/N."""
    return np.asarray(0.5 * np.nan_to_num(np.log1p((bend * np.exp(-log_snr)) ** 2)))


def _fit_own(pairs: _Pairs, shape: tuple[int, ...]) -> _Scale:
    """Scale of the errors of corrected labels: of residuals, without the error of the reference.

    Maximum likelihood of normal numbers by Fisher scoring, on the logarithm of the scale; it begins
    with the scale of the residuals. A pair counts by its share of the variance that is not of the
    reference, and residuals are clipped.
    """
    place, error = pairs[:3], pairs.error
    scale = _fit_scale(*place, _log_size(pairs.residual), shape)
    if not error.any():
        return scale
    size, width = np.abs(pairs.residual), scale.size(*place)
    width *= max(np.quantile(size / width, ONE_SIGMA), _LEAST)
    own = np.maximum(_less(width, error), _LEAST_OWN * width)
    for _ in range(_STEPS):
        total = np.hypot(own, error)
        share = np.maximum((own / total) ** 2, _LEAST_OWN**2)
        excess = (np.minimum(size / total, _CLIP) ** 2 - _CLIPPED) / (2 * _UNCLIPPED)
        scale = _fit_scale(*place, np.log(own) + excess / share, shape, share**2)
        own = np.clip(scale.size(*place), _LEAST_OWN * width, width)
    return scale


def _log_size(values: FloatingArray) -> FloatArray:
    """Logarithms of sizes, none far below their median."""
    size = np.abs(np.asarray(values, dtype=np.float64))
    return np.log(np.maximum(size, _SMALLEST * float(np.median(size) or size.mean() or 1.0)))


def _fit_scale(
    cell: IntArray,
    log_snr: FloatArray,
    giant: BoolArray,
    log_size: FloatArray,
    shape: tuple[int, ...],
    weight: FloatArray | None = None,
) -> _Scale:
    """Scale of logarithms of sizes (n,) with weights; by the cell where a grid is given."""
    weight = np.ones(len(cell)) if weight is None else weight / weight.mean()
    known = log_snr, giant, weight
    scale = _Scale(None, _bends(log_size, *known), 0.0, shape)
    if shape:
        rest = log_size - scale.of_snr(log_snr, giant)
        rest -= np.average(rest, weights=weight)
        scale = scale._replace(trees=_fit_trees(cell, rest, weight, shape))
        scale = scale._replace(bends=_bends(log_size - scale.of_cell(cell), *known))
    rest = log_size - scale.of_cell(cell) - scale.of_snr(log_snr, giant)
    return scale._replace(middle=float(np.average(rest, weights=weight)))


def _bends(
    log_size: FloatArray, log_snr: FloatArray, giant: BoolArray, weight: FloatArray
) -> list[float]:
    """Fit `_law` to the sizes of dwarfs and of giants; where a kind has few pairs, to all."""
    found = []
    for kind in (~giant, giant):
        rows = kind if np.count_nonzero(kind) >= _KIND_PAIRS else np.ones_like(kind)
        told = np.count_nonzero(rows) >= _SNR_PAIRS and np.ptp(log_snr[rows]) > 0
        # Sizes of one step of S/N differ from their mean whatever the law.
        step = np.round(log_snr[rows] * _STEPS_OF_LOG)
        at, place = np.unique(step, return_inverse=True)
        n = np.bincount(place, weight[rows])
        used = n > 0
        mean = np.bincount(place, weight[rows] * log_size[rows])[used] / n[used]
        n, at = n[used], at[used] / _STEPS_OF_LOG
        misfit = []
        for bend in _BENDS if told else _BENDS[:1]:
            rest = mean - _law(bend, at)
            misfit.append(np.average((rest - np.average(rest, weights=n)) ** 2, weights=n))
        found.append(float(_BENDS[np.argmin(misfit)]))
    return found


def _fit_trees(
    cell: IntArray, log_size: FloatArray, weight: FloatArray, shape: tuple[int, ...]
) -> Any:
    """Boosted trees of a logarithm over the numbers of the cells: constant on every cell.

    Least squares see of a cell only the mean and the weight of its pairs, so that a fit takes as
    long as there are cells with pairs.
    """
    xgboost = import_xgboost()

    n = np.bincount(cell, weight)
    used = np.flatnonzero(n)
    mean = (np.bincount(cell, weight * log_size)[used] / n[used]).astype(np.float32)
    matrix = xgboost.QuantileDMatrix(
        _numbers(used, shape), mean, weight=n[used].astype(np.float32), max_bin=shape[0] + 1,
        nthread=1,
    )  # fmt: skip
    params = {
        "tree_method": "hist", "max_depth": 3, "learning_rate": 0.05, "reg_lambda": 20.0,
        "min_child_weight": max(50.0, len(log_size) / 400), "max_bin": shape[0] + 1,
        "base_score": 0.0, "nthread": 1, "verbosity": 0,
    }  # fmt: skip
    return xgboost.train(params, matrix, _ROUNDS)


def _numbers(cell: IntArray, shape: tuple[int, ...]) -> Float32Array:
    """Numbers of cells along the axes."""
    return np.stack(np.unravel_index(cell, shape), axis=1).astype(np.float32)
