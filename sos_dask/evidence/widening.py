"""Errors away from the overlap: noise, its growth with the distance, and how intervals widen.

The noise of corrected labels is that of the dense overlap, by signal to noise. Residuals in its
units grow with the distance from the overlap (`Growth`); the coverage is one over that growth.

By what the half-widths of an error model are to be multiplied where coverage is low is counted
(`fit_widths`). Intervals are promised for rows of the catalog and counted on held-out pairs. The
two differ: a reference sees brighter stars of other kinds. So pairs are weighted, which keeps what
a conformal interval promises when the inputs are distributed otherwise (Tibshirani, Foygel Barber,
Candes & Ramdas 2019, Advances in Neural Information Processing Systems 32). The weight of a pair is
how often it is among the nearest pairs of a row, in labels and signal to noise (Lima et al. 2008,
MNRAS 390, 118). Wrong measurements count but inside: a user cannot tell them, and where stars are
few they are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from sos_dask.columns import BoolArray, FloatArray, FloatingArray
from sos_dask.settings import Settings
from sos_dask.stats.numbers import GIANT_LOGG, ONE_SIGMA

INSIDE, SPARSE, OUTSIDE, LACKING = 0, 1, 2, 3
CLASSES = ("inside", "sparse", "outside")
KINDS = (
    *CLASSES[:2],
    "outside: few stars of any survey here",
    "outside: no reference star of this kind",
)
_MEANINGS = "; ".join(f"{number}: {name}" for number, name in enumerate(KINDS))
KIND_FIELD = pa.field("kind_coverage", pa.int8(), metadata={"description": _MEANINGS})
MIN_GROWTH_PAIRS = 150
_LEVEL = 0.68
_KIND_PAIRS = 400  # with fewer giants and dwarfs share one law of noise
# Of laws from constant to steep and 630 pairs, with wrong ones, bins of 40 to 80 called most nearly
# the true share outside.
_BIN_PAIRS, _LEAST_BINS = 80, 3
_THIN_SHARE = 0.05
_TAIL_PAIRS = 10  # beyond the distance of the last so many pairs nothing is measured
_LEAST_WIDTH = 1e-6
_MIN_WIDTH_PAIRS = 40
_NEAREST = 8
_INPUT_SCALE = 2.0  # half of a scaled input is as far as a factor e of the signal to noise
_LEAST_FACTOR = 0.05  # residuals can be zero


class Limits(Settings):
    """What the coverage must be: the error growth that is borne is one over them."""

    inside: float = Field(
        0.8, gt=0, lt=1, description="From this coverage on a row is inside: its error is small"
    )
    outside: float = Field(
        0.5, gt=0, lt=1, description="Below this coverage a row is outside; between, sparse"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.outside < self.inside:
            raise ValueError(f"outside = {self.outside:g} is not below inside = {self.inside:g}")
        return self

    def meaning(self) -> dict[str, str]:
        """What the coverage and its classes say, in words."""
        low, high = 1 / self.inside, 1 / self.outside
        few = "so few pairs of its kind that nothing tells"
        there = "times that in the dense overlap"
        return {
            "coverage": "error in the dense overlap over the error here, at equal signal to noise",
            "inside": f"the error of a corrected label is at most {low:.2f} {there}",
            "sparse": f"{low:.2f} to {high:.2f} times",
            "outside": f"more than {high:.2f} times, or {few}",
        }

    def classify(self, coverage: FloatingArray) -> NDArray[np.int8]:
        """`INSIDE`, `SPARSE` or `OUTSIDE` of every coverage; nan is outside."""
        reached = (coverage >= self.outside).astype(np.int8) + (coverage >= self.inside)
        return np.asarray(OUTSIDE - reached, dtype=np.int8)


def _width(values: FloatingArray) -> FloatArray:
    """Half-widths of the intervals around 0 that contain 68.27 % of the values in each column."""
    return np.asarray(np.quantile(np.abs(values), ONE_SIGMA, axis=0))


@dataclass(frozen=True)
class Noise:
    """Error of the corrected labels in the dense overlap: sqrt(floor^2 + (slope / snr)^2).

    Giants and dwarfs differ: a correction that sees a narrow main sequence takes out some of the
    noise itself.
    """

    floor: Sequence[Sequence[float]]  # of dwarfs, then giants: one a label, in its unit
    slope: Sequence[Sequence[float]]
    reference: Sequence[Sequence[float]]  # factors of the stated errors of the reference, at most 1

    @classmethod
    def fit(
        cls, residual: FloatArray, logg: FloatArray, snr: FloatArray, reference_error: FloatArray
    ) -> Noise:
        """Fit to residuals (n, l) of pairs, together with how much of the reference's error is in.

        Where its stated error (n, l) is nan, nothing is put down to the reference.
        """
        giant = logg < GIANT_LOGG
        laws = []
        for kind in (~giant, giant):
            rows = kind if np.count_nonzero(kind) >= _KIND_PAIRS else np.ones_like(kind)
            laws.append(_noise_law(residual[rows], _inverse(snr[rows]), reference_error[rows]))
        return cls(*np.stack(laws, axis=1).tolist())

    def __call__(
        self, logg: FloatingArray, snr: FloatingArray, reference_error: FloatArray | float = 0.0
    ) -> FloatArray:
        """Widths (n, l) of residuals with this error of the reference; without, errors of rows.

        The floor where the signal to noise is not known.
        """
        kind = (np.asarray(logg) < GIANT_LOGG).astype(np.int64)
        floor, slope, share = (np.array(x)[kind] for x in (self.floor, self.slope, self.reference))
        own = np.hypot(floor, slope * _inverse(snr)[:, None])
        return np.asarray(np.hypot(own, share * np.nan_to_num(reference_error)))


def _inverse(snr: FloatingArray) -> FloatArray:
    return 1.0 / np.where(snr > 0, np.asarray(snr, dtype=np.float64), np.inf)


def _noise_law(
    residual: FloatArray, inverse: FloatArray, reference_error: FloatArray
) -> FloatArray:
    """Floor, slope and share of the reference of each label, shape (3, l).

    From squared widths in bins of equally many pairs along S/N, in halves by the reference's error.
    """
    from scipy.optimize import lsq_linear

    order = np.argsort(inverse, kind="stable")
    bins = np.array_split(order, int(np.clip(len(order) // 200, 3, 25)))
    laws = []
    for values, stated in zip(residual.T, np.square(np.nan_to_num(reference_error)).T, strict=True):
        halves = (np.array_split(rows[np.argsort(stated[rows], kind="stable")], 2) for rows in bins)
        cells = [cell for pair in halves for cell in pair if len(cell)]
        total = np.maximum([_width(values[cell]) ** 2 for cell in cells], 1e-12)
        terms = np.array(
            [[1.0, np.mean(np.square(inverse[cell])), np.median(stated[cell])] for cell in cells]
        )
        # What is left to the row is never less than 40 % of the smallest width: where all pairs
        # have like errors, the share of the reference cannot be told from the row's own floor.
        bounds = ([total.min() * 0.16, 0.0, 0.0], [np.inf, np.inf, 1.0])
        laws.append(lsq_linear(terms / total[:, None], np.ones(len(total)), bounds).x)
    return np.asarray(np.sqrt(laws).T)


@dataclass(frozen=True)
class Growth:
    """Growth of the error with the distance from the overlap, never falling.

    It is 1 in the nearer half of the held-out pairs by definition: their error is the unit. Beyond,
    it is that of bins of pairs by isotonic regression, straight lines between their middles. A
    single place: the growth could not be measured and is 1 everywhere.
    """

    distance: Sequence[float]  # ascending, from the end of the nearer half
    growth: Sequence[float]  # at each distance
    last: float  # distance of the outermost pairs that tell of it
    thin: float  # 95 % of the held-out pairs are nearer

    @classmethod
    def fit(cls, distance: FloatArray, ratio: FloatArray) -> tuple[Growth, list[dict[str, float]]]:
        """Fit to residuals over noise (n, l) of held-out pairs at distances (n,); give its bins.

        A label whose errors are all 0 in the nearer half is left out. Without any bin the growth is
        1: there are fewer than `MIN_GROWTH_PAIRS` pairs, all are equally far, or no label has
        errors.
        """
        from scipy.optimize import isotonic_regression

        order = np.argsort(distance, kind="stable")
        far = distance[order] if len(order) else np.zeros(1)
        half, last = float(far[max(len(far) // 2 - 1, 0)]), float(far[-_TAIL_PAIRS:][0])
        thin = float(np.quantile(far, 1 - _THIN_SHARE))
        flat = cls((half,), (1.0,), last, thin)
        if len(far) < MIN_GROWTH_PAIRS:
            return flat, []
        bins = []
        for rows in (order[far <= half], order[far > half]):
            parts = np.array_split(rows, max(len(rows) // _BIN_PAIRS, _LEAST_BINS))
            bins += [part for part in parts if len(part)]
        middle = np.array([np.median(distance[rows]) for rows in bins])
        width = np.array([_width(ratio[rows]) for rows in bins])
        near = middle <= half
        unit = np.sqrt(np.mean(np.square(width[near]), axis=0))
        if near.all() or not unit.any():
            return flat, []
        measured = np.sqrt(np.mean(np.square(width[:, unit > 0] / unit[unit > 0]), axis=1))
        n = np.array([len(rows) for rows in bins])
        # Errors of widths are in proportion to them, so their logarithms are averaged.
        log_width = np.log(np.maximum(measured[~near], _LEAST_WIDTH))
        rising = np.exp(isotonic_regression(log_width, weights=n[~near]).x)
        at, values = np.append(half, middle[~near]), np.maximum(np.append(1.0, rising), 1.0)
        # Bins in a row of equal growth are one line between the first and the last of them.
        bends = np.diff(values) > 0
        kept = np.concatenate([[True], bends[:-1] | bends[1:], [True]])
        growth = cls(tuple(at[kept].tolist()), tuple(values[kept].tolist()), last, thin)
        names = ("distance", "n", "growth_measured", "growth")
        columns = (x.tolist() for x in (middle, n, measured, growth(middle)))
        return growth, [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def __call__(self, distance: FloatArray) -> FloatArray:
        """Growth at distances, nan where they are; constant beyond the last bin."""
        return np.asarray(np.interp(distance, self.distance, self.growth))


class Placed(NamedTuple):
    """Pairs or rows with their places, n of each."""

    kind: NDArray[np.int8]  # number in `KINDS`; -1 where they do not count
    error_class: NDArray[np.int8]  # 1: sparse by the error model
    points: FloatArray  # (n, k + 1): scaled labels, logarithm of S/N (nan where unknown)


@dataclass(frozen=True)
class Widths:
    """How half-widths of an error model are widened.

    Rows outside where stars are few have half-widths of their own: the pairs there are right or
    wrong measurements, whose errors do not follow the noise. Where they are not known, those rows
    count as rows of a kind that the reference lacks.
    """

    factors: Sequence[Any]  # (2, 3, l): class of the error model, class of the coverage, label
    few: Sequence[float] | None = None  # (l,): where stars are few, in units of the labels

    def widening(
        self, kind: NDArray[np.int8], error_class: NDArray[np.integer], half_width: FloatingArray
    ) -> FloatArray:
        """Factors (n, l) of half-widths (n, l) of the error model at places of some `KINDS`."""
        factors = np.array(self.factors)
        found = np.asarray(factors[error_class, np.minimum(kind, OUTSIDE)])
        if self.few is not None:
            rows = np.flatnonzero(kind == OUTSIDE)
            least = factors[error_class[rows], SPARSE]
            found[rows] = np.maximum(least, np.array(self.few) / half_width[rows])
        return found


def fit_widths(
    residual: FloatArray,
    half_width: FloatArray,
    right: BoolArray,
    pairs: Placed,
    rows: Placed,
    limits: Limits,
) -> tuple[Widths, tuple[tuple[int, ...], ...]]:
    """Widths, and the pairs by class of the error model and kind of place.

    Inside and sparse, and outside where stars are few, are counted. Where there are fewer than 40
    pairs of a class, those inside and sparse count together, and the factor grows as the limit of
    the class says. So it does where the overlap lacks stars, from right pairs: nothing is there to
    count, and nothing says that more measurements are wrong.

    Residuals and half-widths (n, l) are those of pairs, of which some are right; the intervals are
    those of the rows.
    """
    score = np.abs(residual) / half_width
    factors = np.ones((2, len(CLASSES), residual.shape[1]))
    n_pairs = np.zeros((2, len(KINDS)), dtype=np.int64)
    np.add.at(n_pairs, (pairs.error_class[pairs.kind >= 0], pairs.kind[pairs.kind >= 0]), 1)
    for number in (0, 1):
        near = (pairs.error_class == number) & np.isin(pairs.kind, (INSIDE, SPARSE))
        for kind, growth in ((INSIDE, 1.0), (SPARSE, 1 / limits.inside)):
            enough = n_pairs[number, kind] >= _MIN_WIDTH_PAIRS
            # A wrong row inside is rare, and that of a reference is none of the row's.
            used = (near & (pairs.kind == kind) if enough else near) & (right | (kind != INSIDE))
            at = (rows.error_class == number) & (rows.kind == kind)
            weight = stand_in_weights(pairs.points[used], rows.points[at])
            factors[number, kind] = _quantile(score[used], weight) * (1.0 if enough else growth)
        of_right = score[near & right]
        factors[number, OUTSIDE] = _quantile(of_right, np.ones(len(of_right))) / limits.outside
    few, used = None, pairs.kind == OUTSIDE
    if np.count_nonzero(used) >= _MIN_WIDTH_PAIRS:
        weight = stand_in_weights(pairs.points[used], rows.points[rows.kind == OUTSIDE])
        few = _quantile(np.abs(residual[used]), weight).tolist()
    widths = Widths(np.maximum(factors, _LEAST_FACTOR).tolist(), few)
    return widths, tuple(tuple(n) for n in n_pairs.tolist())


def stand_in_weights(pairs: FloatArray, rows: FloatArray) -> FloatArray:
    """Weights (n,) of the points of pairs (n, k + 1) that make them stand for rows (m, k + 1).

    Equal where there are no rows, and where all would rest on less than 40 pairs (their effective
    number is the squared sum over the sum of squares: Kish 1965, Survey Sampling). Rows of unknown
    S/N are placed at the median of the pairs.
    """
    equal = np.ones(len(pairs))
    if not len(rows) or len(pairs) < _MIN_WIDTH_PAIRS:
        return equal
    weight = count_nearest(pairs, rows)
    effective = weight.sum() ** 2 / np.square(weight).sum()
    return weight if effective >= _MIN_WIDTH_PAIRS else equal


def points_of(scaled: FloatArray, snr: FloatingArray) -> FloatArray:
    """Make points (n, k + 1) of scaled star inputs (n, k) and S/N: its logarithm, nan if unknown.

    Between them distances are counted for weights.
    """
    return np.column_stack([_INPUT_SCALE * scaled, np.log(np.where(snr > 0, snr, np.nan))])


def count_nearest(pairs: FloatArray, rows: FloatArray) -> FloatArray:
    """Count how often each pair is among the eight nearest of a row: see `stand_in_weights`."""
    from scipy.spatial import cKDTree

    known = pairs[np.isfinite(pairs[:, -1]), -1]
    middle = np.median(known) if len(known) else 0.0
    pairs, rows = (np.where(np.isnan(points), middle, points) for points in (pairs, rows))
    nearest = cKDTree(pairs).query(rows, k=min(_NEAREST, len(pairs)))[1]
    return np.bincount(nearest.ravel(), minlength=len(pairs)).astype(np.float64)


def _quantile(score: FloatArray, weight: FloatArray) -> FloatArray:
    """Scores (l,) below which a new row is with at least 68 %: it weighs as much as a pair.

    1, what the error model says, where too few know the label.
    """
    found = np.ones(score.shape[1])
    for label, known in enumerate(np.isfinite(score).T):
        if np.count_nonzero(known) >= _MIN_WIDTH_PAIRS and weight[known].any():
            level = min(_LEVEL * (1 + 1 / np.count_nonzero(known)), 1.0)
            values = score[known, label], level
            found[label] = np.quantile(*values, weights=weight[known], method="inverted_cdf")
    return found


def counted(n_pairs: Sequence[Sequence[int]]) -> dict[str, str]:
    """On how many pairs the widths of each kind of place stand, in words.

    ``n_pairs`` is that of `fit_widths`; empty where nothing was counted.
    """
    if not n_pairs:
        return dict.fromkeys(KINDS, "as the error model says")
    found = dict.fromkeys(KINDS, "extrapolated: too few held-out pairs to count on")
    for kind in (INSIDE, SPARSE, OUTSIDE):
        per_class = [n[kind] for n in n_pairs]
        if kind == OUTSIDE:  # these are counted together
            per_class = [sum(per_class)]
        if n := sum(n for n in per_class if n >= _MIN_WIDTH_PAIRS):
            found[KINDS[kind]] = f"counted on {n} held-out pairs"
    return found
