"""Half-widths that hold the share of residuals they promise, counted on pairs not seen before."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sos_dask.density import knn_distance, robust_scale
from sos_dask.errors import ModelError
from sos_dask.schema import LABELS
from sos_dask.uncertainty.scale import MIN_FOR_TREES, Scale, fit_scale
from sos_dask.uncertainty.tables import (
    LOG_SNR,
    N_STEPS,
    ErrorModel,
    Grid,
    every_cell,
    snr_steps,
)

LEVELS = (0.68, 0.95)
DENSE, SPARSE = "dense", "sparse"
MIN_PAIRS = 40
_NEIGHBOURS = 16
_WRONG = 8.0  # times the median size: 5.4 standard deviations of a normal distribution

Float32Array = NDArray[np.float32]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Sparseness:
    """How near the training stars are, and where they are sparse.

    Parameters
    ----------
    center, scale : ndarray of float64, shape (3,)
        Of the features: median and 1.4826 MAD.
    training : ndarray of float64, shape (n, 3)
        Scaled features of the training stars.
    limit : float
        Distance to the 16th neighbour above which a place is sparse.
    """

    center: FloatArray
    scale: FloatArray
    training: FloatArray
    limit: float

    @classmethod
    def of(cls, training: Float32Array, fraction: float = 0.05) -> Sparseness:
        """Limit that makes a share of the training stars sparse; finite features, shape (n, 3)."""
        center, scale = robust_scale(training)
        scaled = (training - center) / scale
        own = knn_distance(scaled, scaled, min(_NEIGHBOURS + 1, len(scaled)))
        return cls(center, scale, scaled, float(np.quantile(own, 1 - fraction)))

    def stars(self, features: Float32Array) -> BoolArray:
        """Which of some training stars are sparse, shape (n,)."""
        return self._far(features, min(_NEIGHBOURS + 1, len(self.training)))

    def cells(self, grid: Grid) -> BoolArray:
        """Which cells are sparse, by their middle, shape (N_CELLS ** 3,)."""
        return self._far(grid.centers(), min(_NEIGHBOURS, len(self.training)))

    def _far(self, features: NDArray[np.floating], k: int) -> BoolArray:
        scaled = (features - self.center) / self.scale
        return np.asarray(knn_distance(self.training, scaled, k) > self.limit)


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


@dataclass(frozen=True)
class Checked:
    """What intervals made without a pair say of that pair.

    Parameters
    ----------
    known : ndarray of bool, shape (n, 3)
        Pairs with a residual.
    inside : ndarray of bool, shape (n, 3, 2)
        Whether it lies inside the interval of each of `LEVELS`.
    n_class : mapping of str to mapping of str to int
        By label and class: pairs that its factors were counted on.
    """

    known: BoolArray
    inside: BoolArray
    n_class: Mapping[str, Mapping[str, int]]


def fit_errors(
    held_out: HeldOut,
    grid: Grid,
    sparse: BoolArray,
    *,
    correction: str,
    reference_error: str = "included",
) -> tuple[ErrorModel, Checked]:
    """Fit and calibrate half-widths, and check the procedure on pairs it has not seen.

    Parameters
    ----------
    held_out : HeldOut
    grid : Grid
    sparse : ndarray of bool, shape (N_CELLS ** 3,)
        See `Sparseness`.
    correction : str
        SHA-256 of the correction whose residuals these are.
    reference_error : {"included", "removed"}
        Whether the model gives half-widths with the error of the reference.

    Raises
    ------
    ModelError
        Too few pairs or parts, or residuals that are all zero.
    """
    n = len(held_out.part)
    axes = grid.axes(held_out.features)
    is_sparse = sparse[grid.cells(held_out.features)]
    snr = np.where(held_out.snr > 0, held_out.snr, np.nan)
    log_snr = np.log(snr)
    all_axes = every_cell()
    known = np.isfinite(held_out.residuals)
    right = ~wrong_measurements(held_out.residuals)
    inside = np.zeros((n, len(LABELS), len(LEVELS)), dtype=np.bool_)
    values = np.empty((len(all_axes), len(LABELS)), dtype=np.float32)
    profile = np.empty((N_STEPS, len(LABELS)), dtype=np.float32)
    reference, reference_profile = np.zeros_like(values), np.ones_like(profile)
    steps = snr_steps()
    least = np.nanmin(log_snr) if np.isfinite(log_snr).any() else LOG_SNR[0]
    factors_95: dict[str, dict[str, float]] = {}
    n_class: dict[str, dict[str, int]] = {}
    for number, label in enumerate(LABELS):
        rows = np.flatnonzero(known[:, number])
        n_parts = len(np.unique(held_out.part[rows]))
        if len(rows) < MIN_PAIRS:
            raise ModelError(
                f"{label}: errors need {MIN_PAIRS} held-out pairs, not {len(rows)}",
                "Match more stars, or loosen the cuts.",
            )
        if n_parts < 3:
            raise ModelError(
                f"{label}: errors need held-out stars in three parts; the {len(rows)} pairs are of "
                f"so few stars that they fill {n_parts}",
                "Match more stars; if there are many, check the ids: pairs with an id in common "
                "count as one star.",
            )
        one = _Label(
            axes[rows],
            log_snr[rows],
            held_out.residuals[rows, number],
            held_out.part[rows],
            is_sparse[rows],
            right[rows],
        )
        scores, inside[rows, number] = one.cross_fitted()
        factors = _factors(scores, one.is_sparse)
        scale = one.scale(one.right)
        of_class = np.where(sparse, factors[SPARSE][0], factors[DENSE][0])
        values[:, number] = of_class * np.exp(scale.of_cell(all_axes))
        profile[:, number] = np.exp(scale.of_snr(steps))
        factors_95[label] = {name: both[1] / both[0] for name, both in factors.items()}
        n_sparse = int(np.count_nonzero(one.is_sparse))
        n_class[label] = {DENSE: len(rows) - n_sparse, SPARSE: n_sparse}
        stated = rows[held_out.reference_errors[rows, number] > 0]
        if 2 * len(stated) >= len(rows):
            error = held_out.reference_errors[stated, number]
            scale = fit_scale(axes[stated], log_snr[stated], error, one.with_trees)
            reference[:, number] = np.exp(scale.middle + scale.of_cell(all_axes))
            # The noise of a target tells nothing of a reference fainter than those of the pairs.
            reference_profile[:, number] = np.exp(scale.of_snr(np.maximum(steps, least)))
    about = {
        "correction": correction,
        "factors_95": factors_95,
        "reference_error": reference_error,
        "unknown_snr": int(np.searchsorted(steps, least)),
    }
    return (
        ErrorModel(grid, values, profile, sparse, reference, reference_profile, about),
        Checked(known, inside, n_class),
    )


def wrong_measurements(residuals: FloatArray) -> BoolArray:
    """Pairs that are far off in all labels at once: one of the two measurements is wrong.

    They are few, but where stars are few they may be most of the pairs, and would set the scale
    there. The share of pairs that an interval holds is counted with them.

    Parameters
    ----------
    residuals : ndarray of float64, shape (n, 3)
        nan where unknown: such a pair counts as right.
    """
    size = np.abs(residuals)
    known = np.asarray(np.isfinite(size).all(axis=1))
    if not known.any():
        return known
    return np.asarray(known & (size > _WRONG * np.median(size[known], axis=0)).all(axis=1))


@dataclass(frozen=True)
class _Label:
    """Held-out pairs that know a label."""

    axes: NDArray[np.int64]
    log_snr: FloatArray
    residual: FloatArray
    part: NDArray[np.int8]
    is_sparse: BoolArray
    right: BoolArray

    @property
    def with_trees(self) -> bool:
        """Whether the pairs are enough to see how residuals depend on the star."""
        return len(self.residual) >= MIN_FOR_TREES

    def scale(self, used: BoolArray) -> Scale:
        """Scale fitted to some pairs."""
        return fit_scale(self.axes[used], self.log_snr[used], self.residual[used], self.with_trees)

    def log_scale(self, without: tuple[int, ...], at: BoolArray) -> FloatArray:
        """Scale of some pairs by a model fitted to right measurements without some parts."""
        scale = self.scale(self.right & ~np.isin(self.part, without))
        return scale.of_cell(self.axes[at]) + scale.of_snr(self.log_snr[at])

    def cross_fitted(self) -> tuple[FloatArray, BoolArray]:
        """Scores of all pairs, and whether they lie inside intervals made without them.

        A score comes from a scale fitted without its part. To check a part, the scores of the
        others come from scales that have not seen it either: fitted without both.
        """
        size = np.abs(self.residual)
        parts = [int(part) for part in np.unique(self.part)]
        scores = np.empty(len(size))
        own = {}
        for part in parts:
            at = self.part == part
            own[part] = np.exp(self.log_scale((part,), at))
            scores[at] = size[at] / own[part]
        without: dict[int, FloatArray] = {part: np.empty(len(size)) for part in parts}
        for one, other in itertools.combinations(parts, 2):
            at = np.isin(self.part, (one, other))
            found = size[at] / np.exp(self.log_scale((one, other), at))
            of_one = self.part[at] == one
            without[one][self.part == other] = found[~of_one]
            without[other][self.part == one] = found[of_one]
        inside = np.zeros((len(size), len(LEVELS)), dtype=np.bool_)
        for part in parts:
            at = self.part == part
            factors = _factors(without[part][~at], self.is_sparse[~at])
            for level in range(len(LEVELS)):
                of_class = np.where(
                    self.is_sparse[at], factors[SPARSE][level], factors[DENSE][level]
                )
                inside[at, level] = size[at] <= of_class * own[part]
        return scores, inside


def _factors(scores: FloatArray, is_sparse: BoolArray) -> dict[str, tuple[float, ...]]:
    """Factor of each level, by class."""
    found = {}
    for name, mine in ((DENSE, scores[~is_sparse]), (SPARSE, scores[is_sparse])):
        found[name] = tuple(_quantile(np.sort(mine), np.sort(scores), level) for level in LEVELS)
    return found


def _quantile(mine: FloatArray, everyone: FloatArray, level: float) -> float:
    """Score below which a new pair of a class lies with at least this probability.

    Where the class has too few scores to say so, the largest of them, or that of all classes.
    """
    rank = int(np.ceil((len(mine) + 1) * level))
    if rank <= len(mine):
        return float(mine[rank - 1])
    rank = min(int(np.ceil((len(everyone) + 1) * level)), len(everyone))
    return float(max(everyone[rank - 1], mine[-1] if len(mine) else 0.0))


@dataclass(frozen=True)
class Coverage:
    """Share of held-out pairs inside their interval.

    Parameters
    ----------
    label, subset : str
    level : float
        0.68 or 0.95.
    n : int
        Pairs.
    coverage : float
    low, high : float
        95 % interval of it (Clopper & Pearson 1934, Biometrika 26, 404).
    """

    label: str
    subset: str
    level: float
    n: int
    coverage: float
    low: float
    high: float


def coverages(checked: Checked, subsets: Mapping[str, BoolArray]) -> list[Coverage]:
    """Coverage of every label and level in some subsets; those without pairs are left out.

    Parameters
    ----------
    checked : Checked
    subsets : mapping of str to ndarray of bool, shape (n,)
    """
    found = []
    for number, label in enumerate(LABELS):
        for subset, chosen in subsets.items():
            rows = chosen & checked.known[:, number]
            n = int(np.count_nonzero(rows))
            for place, level in enumerate(LEVELS):
                if n:
                    hits = int(np.count_nonzero(checked.inside[rows, number, place]))
                    low, high = binomial_interval(hits, n)
                    found.append(Coverage(label, subset, level, n, hits / n, low, high))
    return found


def binomial_interval(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a probability after so many hits of n (Clopper & Pearson 1934)."""
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    low = float(betaincinv(hits, n - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return low, high
