"""By what the half-widths of an error model are to be multiplied to hold where coverage is low.

Intervals are promised for rows of the catalog and counted on held-out pairs. The two differ: a
reference sees brighter stars of other kinds. So pairs are weighted, which keeps what a conformal
interval promises when the inputs are distributed otherwise (Tibshirani, Foygel Barber, Candes &
Ramdas 2019, Advances in Neural Information Processing Systems 32). The weight of a pair is how
often it is among the nearest pairs of a row, in labels and signal to noise (Lima et al. 2008,
MNRAS 390, 118).

Wrong measurements count. A user cannot tell them, and where stars are few they are many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from sos_dask.columns import FloatArray
from sos_dask.settings import Settings

INSIDE, SPARSE, OUTSIDE, LACKING = 0, 1, 2, 3
CLASSES = ("inside", "sparse", "outside")
KINDS = (
    "inside",
    "sparse",
    "outside: few stars of any survey here",
    "outside: no reference star of this kind",
)
KIND_FIELD = pa.field(
    "kind_coverage",
    pa.int8(),
    metadata={"description": "; ".join(f"{number}: {name}" for number, name in enumerate(KINDS))},
)
LEVEL = 0.68
MIN_WIDTH_PAIRS = 40
_NEAREST = 8
_LEAST = 0.05  # of factors: residuals can be zero
_LABEL_SCALE = 2.0  # half of a scaled label is as far as a factor e of the signal to noise


class Limits(Settings):
    """What the coverage must be: the error growth that is borne is one over them."""

    inside: float = Field(
        0.8, gt=0, lt=1, description="From this coverage on a row is inside: its error is small"
    )
    outside: float = Field(
        0.5, gt=0, lt=1, description="Below this coverage a row is outside; between, sparse"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.outside < self.inside:
            raise ValueError(
                f"limits of coverage: outside = {self.outside:g} is not below inside = "
                f"{self.inside:g}"
            )
        return self

    def meaning(self) -> dict[str, str]:
        """What the coverage and its classes say, in words."""
        low, high = 1 / self.inside, 1 / self.outside
        return {
            "coverage": "error in the dense overlap over the error here, at equal signal to noise",
            "inside": f"the error of a corrected label is at most {low:.2f} times that in the "
            "dense overlap",
            "sparse": f"{low:.2f} to {high:.2f} times",
            "outside": f"more than {high:.2f} times, or so few pairs of its kind that nothing "
            "tells",
        }

    def classify(self, coverage: NDArray[np.floating]) -> NDArray[np.int8]:
        """`INSIDE`, `SPARSE` or `OUTSIDE` of every coverage; nan is outside."""
        place = np.full(len(coverage), OUTSIDE, dtype=np.int8)
        place[coverage >= self.outside] = SPARSE
        place[coverage >= self.inside] = INSIDE
        return place


@dataclass(frozen=True)
class Placed:
    """Pairs or rows in one place: the kind of it, its class in the error model, labels and S/N.

    Parameters
    ----------
    kind, error_class : ndarray of int8, shape (n,)
    labels : ndarray of float64, shape (n, 3)
        Scaled.
    snr : ndarray of float64, shape (n,)
        nan where unknown.
    """

    kind: NDArray[np.int8]
    error_class: NDArray[np.int8]
    labels: FloatArray
    snr: FloatArray

    def take(self, rows: NDArray[np.bool_]) -> Placed:
        """Some of them."""
        return Placed(self.kind[rows], self.error_class[rows], self.labels[rows], self.snr[rows])

    def points(self, snr: float) -> FloatArray:
        """Labels and log S/N (n, 4) where distances are counted; ``snr`` where it is unknown."""
        known = np.where(self.snr > 0, self.snr, snr)
        return np.column_stack([_LABEL_SCALE * self.labels, np.log(known)])


@dataclass(frozen=True)
class Widths:
    """How half-widths of an error model are widened.

    Parameters
    ----------
    factors : ndarray of float64, shape (2, 3, 3)
        By class of the error model (dense, sparse), class of the coverage, label.
    few : ndarray of float64, shape (3,), optional
        Half-widths (K, dex, dex) of rows outside where stars are few. The pairs there are right or
        wrong measurements, whose errors do not follow the noise. Not known: they count as rows of a
        kind that the reference lacks.
    """

    factors: FloatArray
    few: FloatArray | None = None

    def widening(
        self,
        kind: NDArray[np.int8],
        error_class: NDArray[np.integer],
        half_width: NDArray[np.floating],
    ) -> FloatArray:
        """Factors (n, 3) of half-widths of the error model (n, 3).

        Parameters
        ----------
        kind : ndarray of int8, shape (n,)
            See `KINDS`.
        error_class : ndarray of int, shape (n,)
        half_width : ndarray of float, shape (n, 3)
        """
        found = np.asarray(self.factors[error_class, np.minimum(kind, OUTSIDE)])
        if self.few is not None:
            rows = np.flatnonzero(kind == OUTSIDE)
            least = self.factors[error_class[rows], SPARSE]
            found[rows] = np.maximum(least, self.few / half_width[rows])
        return found

    def as_json(self) -> dict[str, Any]:
        """JSON values of the fields."""
        few = None if self.few is None else self.few.tolist()
        return {"factors": self.factors.tolist(), "few": few}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Widths:
        """Widths of what `as_json` gave."""
        few = document["few"]
        return cls(np.array(document["factors"]), None if few is None else np.array(few))


def fit_widths(
    residual: FloatArray,
    half_width: FloatArray,
    right: NDArray[np.bool_],
    pairs: Placed,
    rows: Placed,
    limits: Limits,
) -> tuple[Widths, tuple[tuple[int, ...], ...]]:
    """Widths, and the pairs by class of the error model and kind of place.

    Inside and sparse, and outside where stars are few, are counted. Where there are fewer than
    `MIN_WIDTH_PAIRS` pairs of a class, those inside and sparse count together, and the factor grows
    as the limit of the class says. So it does where the overlap lacks stars, from right pairs:
    nothing is there to count, and nothing says that more measurements are wrong.

    Parameters
    ----------
    residual, half_width : ndarray of float64, shape (n, 3)
        Of held-out pairs.
    right : ndarray of bool, shape (n,)
        Pairs that are no wrong measurements.
    pairs, rows : Placed
        The pairs, and the rows whose intervals are to hold.
    """
    score = np.abs(residual) / half_width
    factors = np.ones((2, OUTSIDE + 1, residual.shape[1]))
    n_pairs = []
    for number in (0, 1):
        mine = pairs.error_class == number
        n = [int(np.count_nonzero(mine & (pairs.kind == kind))) for kind in range(len(KINDS))]
        n_pairs.append(tuple(n))
        near = mine & (pairs.kind <= SPARSE)
        for kind, growth in ((INSIDE, 1.0), (SPARSE, 1 / limits.inside)):
            enough = n[kind] >= MIN_WIDTH_PAIRS
            used = mine & (pairs.kind == kind) if enough else near
            at = rows.take((rows.error_class == number) & (rows.kind == kind))
            factors[number, kind] = _quantile(score[used], weights(pairs.take(used), at))
            factors[number, kind] *= 1.0 if enough else growth
        used = near & right
        factors[number, OUTSIDE] = _quantile(score[used], np.ones(np.count_nonzero(used)))
        factors[number, OUTSIDE] /= limits.outside
    few = None
    used = pairs.kind == OUTSIDE
    if np.count_nonzero(used) >= MIN_WIDTH_PAIRS:
        weight = weights(pairs.take(used), rows.take(rows.kind == OUTSIDE))
        few = _quantile(np.abs(residual[used]), weight)
    return Widths(np.maximum(factors, _LEAST), few), tuple(n_pairs)


def counted(n_pairs: tuple[tuple[int, ...], ...]) -> dict[str, str]:
    """On how many pairs the widths of each kind of place stand, in words.

    Parameters
    ----------
    n_pairs : tuple of tuple of int
        As of `fit_widths`; empty where nothing was counted.
    """
    if not n_pairs:
        return dict.fromkeys(KINDS, "as the error model says")
    found = {}
    for kind, name in enumerate(KINDS):
        per_class = [n[kind] for n in n_pairs]
        if kind == OUTSIDE:  # these are counted together
            per_class = [sum(per_class)]
        n = sum(n for n in per_class if n >= MIN_WIDTH_PAIRS)
        found[name] = (
            f"counted on {n} held-out pairs"
            if n and kind != LACKING
            else "extrapolated: too few held-out pairs to count on"
        )
    return found


def weights(pairs: Placed, rows: Placed) -> FloatArray:
    """Weights of pairs (n,) that make them stand for some rows.

    Equal where there are no rows, and where all would rest on less than `MIN_WIDTH_PAIRS` pairs
    (their effective number is the squared sum over the sum of squares: Kish 1965, Survey Sampling).
    """
    from scipy.spatial import cKDTree

    equal = np.ones(len(pairs.snr))
    if not len(rows.snr) or len(pairs.snr) < MIN_WIDTH_PAIRS:
        return equal
    known = pairs.snr[pairs.snr > 0]
    snr = float(np.median(known)) if len(known) else 1.0
    nearest = cKDTree(pairs.points(snr)).query(rows.points(snr), k=_NEAREST)[1]
    weight = np.bincount(nearest.ravel(), minlength=len(equal)).astype(np.float64)
    effective = weight.sum() ** 2 / np.square(weight).sum()
    return weight if effective >= MIN_WIDTH_PAIRS else equal


def _quantile(score: FloatArray, weight: FloatArray) -> FloatArray:
    """Scores (3,) below which a new row is with at least `LEVEL`: it weighs as much as a pair.

    1, what the error model says, where there are too few.
    """
    if len(score) < MIN_WIDTH_PAIRS:
        return np.ones(score.shape[1])
    level = LEVEL * (weight.sum() + weight.mean())
    found = np.empty(score.shape[1])
    for label, values in enumerate(score.T):
        order = np.argsort(values, kind="stable")
        place = np.searchsorted(np.cumsum(weight[order]), level)
        found[label] = values[order[min(int(place), len(order) - 1)]]
    return found
