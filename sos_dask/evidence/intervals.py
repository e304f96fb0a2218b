"""Half-widths that hold the share of residuals they promise, counted on pairs not seen before."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ModelError
from sos_dask.evidence.error_tables import LOG_SNR, N_CELLS, ErrorModel, Grid, snr_steps
from sos_dask.evidence.scale import MIN_FOR_TREES, Scale, fit_scale
from sos_dask.schema import LABELS
from sos_dask.stats.numbers import SPARSE_SHARE, find_sparse

LEVELS = (0.68, 0.95)
DENSE, SPARSE = "dense", "sparse"
MIN_PAIRS = 40
_LEAST = 1e-6  # K, dex: an error of 0 would weigh without end, and residuals can all be zero
_WRONG = 8.0  # times the median size: 5.4 standard deviations of a normal distribution

Float32Array = NDArray[np.float32]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Sparseness:
    """Where the training stars are sparse.

    Parameters
    ----------
    of_stars : ndarray of bool, shape (n,)
        Training stars whose 16th neighbour is far.
    of_cells : ndarray of bool, shape (N_CELLS ** 3,)
        Cells whose middle is as far from its 16th neighbour.
    """

    of_stars: BoolArray
    of_cells: BoolArray

    @classmethod
    def of(cls, training: Float32Array, grid: Grid, fraction: float = SPARSE_SHARE) -> Sparseness:
        """Far is what makes a share of the training stars sparse.

        Parameters
        ----------
        training : ndarray of float32, shape (n, 3)
            Finite features.
        grid : Grid
        fraction : float
        """
        return cls(*find_sparse(training, grid.centers(), fraction))


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

    @property
    def least(self) -> float:
        """Logarithm of the lowest S/N."""
        known = np.isfinite(self.log_snr).any()
        return float(np.nanmin(self.log_snr)) if known else LOG_SNR[0]


@dataclass(frozen=True)
class LabelErrors:
    """Errors of one label: columns of the tables of `ErrorModel`.

    Parameters
    ----------
    values, reference : ndarray of float32, shape (N_CELLS ** 3,)
    profile, reference_profile : ndarray of float32, shape (N_STEPS,)
    factors_95 : mapping of str to float
        By class.
    """

    values: Float32Array
    reference: Float32Array
    profile: Float32Array
    reference_profile: Float32Array
    factors_95: Mapping[str, float]


@dataclass(frozen=True)
class Checked:
    """What intervals of a label made without a pair say of that pair.

    Parameters
    ----------
    known : ndarray of bool, shape (n,)
        Pairs with a residual.
    inside : ndarray of bool, shape (n, 2)
        Whether it lies inside the interval of each of `LEVELS`.
    n_class : mapping of str to int
        Pairs that the factors of a class were counted on.
    """

    known: BoolArray
    inside: BoolArray
    n_class: Mapping[str, int]


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
        See `Sparseness`.

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
    cell = grid.cells(held_out.features)
    log_snr = held_out.log_snr
    one = _Label(
        cell[rows],
        log_snr[rows],
        held_out.residuals[rows, number],
        held_out.part[rows],
        sparse[cell[rows]],
        ~wrong_measurements(held_out.residuals)[rows],
    )
    inside = np.zeros((len(known), len(LEVELS)), dtype=np.bool_)
    scores, inside[rows] = one.cross_fitted()
    factors = _factors(scores, one.is_sparse)
    scale = one.scale(one.right)
    of_class = np.where(sparse, factors[SPARSE][0], factors[DENSE][0])
    every, steps = np.arange(N_CELLS**3), snr_steps()
    reference, reference_profile = np.zeros(len(every)), np.ones(len(steps))
    stated = rows[held_out.reference_errors[rows, number] > 0]
    if 2 * len(stated) >= len(rows):
        error = held_out.reference_errors[stated, number]
        theirs = fit_scale(cell[stated], log_snr[stated], error, one.with_trees)
        reference = np.exp(theirs.middle + theirs.of_cell(every))
        # The noise of a target tells nothing of a reference fainter than those of the pairs.
        reference_profile = np.exp(theirs.of_snr(np.maximum(steps, held_out.least)))
    n_sparse = int(np.count_nonzero(one.is_sparse))
    return (
        LabelErrors(
            (of_class * np.exp(scale.of_cell(every))).astype(np.float32),
            reference.astype(np.float32),
            np.exp(scale.of_snr(steps)).astype(np.float32),
            reference_profile.astype(np.float32),
            {name: both[1] / both[0] for name, both in factors.items()},
        ),
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
        `HeldOut.least`.
    correction : str
        SHA-256 of the correction whose residuals these are.
    reference_error : {"included", "removed"}
        Whether the model gives half-widths with the error of the reference.
    """
    return ErrorModel(
        grid,
        np.stack([one.values for one in of_label], axis=1),
        np.stack([one.profile for one in of_label], axis=1),
        sparse,
        np.stack([one.reference for one in of_label], axis=1),
        np.stack([one.reference_profile for one in of_label], axis=1),
        {
            "correction": correction,
            "factors_95": {
                label: dict(one.factors_95) for label, one in zip(LABELS, of_label, strict=True)
            },
            "reference_error": reference_error,
            "unknown_snr": int(np.searchsorted(snr_steps(), least)),
        },
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

    def scale(self, used: BoolArray) -> Scale:
        """Scale fitted to some pairs."""
        return fit_scale(self.cell[used], self.log_snr[used], self.residual[used], self.with_trees)

    def log_scale(self, without: tuple[int, ...], at: BoolArray) -> FloatArray:
        """Scale of some pairs by a model fitted to right measurements without some parts."""
        scale = self.scale(self.right & ~np.isin(self.part, without))
        return scale.of_cell(self.cell[at]) + scale.of_snr(self.log_snr[at])

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
    everyone = np.sort(scores)
    return {
        name: tuple(_quantile(mine, everyone, level) for level in LEVELS)
        for name, mine in (
            (DENSE, np.sort(scores[~is_sparse])),
            (SPARSE, np.sort(scores[is_sparse])),
        )
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


def coverages(label: str, checked: Checked, subsets: Mapping[str, BoolArray]) -> list[Coverage]:
    """Coverage of a label at every level in some subsets; those without pairs are left out.

    Parameters
    ----------
    label : str
    checked : Checked
    subsets : mapping of str to ndarray of bool, shape (n,)
    """
    found = []
    for subset, chosen in subsets.items():
        rows = chosen & checked.known
        n = int(np.count_nonzero(rows))
        for place, level in enumerate(LEVELS):
            if n:
                hits = int(np.count_nonzero(checked.inside[rows, place]))
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
