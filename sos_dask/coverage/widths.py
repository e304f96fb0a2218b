"""By what the half-widths of an error model are to be multiplied to hold where coverage is low.

Intervals are promised for rows of the catalog and counted on held-out pairs. The two differ: a
reference sees brighter stars of other kinds. So pairs are weighted, which keeps what a conformal
interval promises when the inputs are distributed otherwise (Tibshirani, Foygel Barber, Candes &
Ramdas 2019, Advances in Neural Information Processing Systems 32). The weight of a pair is how
often it is among the nearest pairs of a row, in labels and signal to noise (Lima et al. 2008,
MNRAS 390, 118), to the power of one half: full weights rest on a third of the pairs, and that
noise costs more than the rest of the shift (Shimodaira 2000, J. Stat. Plan. Inference 90, 227).

Wrong measurements count. A user cannot tell them, and where stars are few they are many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sos_dask.coverage.model import INSIDE, KINDS, LACKING, OUTSIDE, SPARSE, Limits
from sos_dask.schema import LABELS

FloatArray = NDArray[np.float64]
LEVEL = 0.68
MIN_WIDTH_PAIRS = 40
_NEAREST = 8
_POWER = 0.5
_LABEL_SCALE = 2.0  # half of a scaled label is as far as a factor e of the signal to noise


@dataclass(frozen=True)
class Target:
    """Rows whose intervals are to hold: a sample of the catalog, of rows that pass the cuts.

    Parameters
    ----------
    columns : mapping of str to ndarray of float, shape (m,)
        As those of the overlap.
    error_class : ndarray of int8, shape (m,)
        1 where the error model has them in its sparse class.
    """

    columns: Mapping[str, NDArray[np.floating]]
    error_class: NDArray[np.int8]


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


def widths(
    score: FloatArray, pairs: Placed, rows: Placed, limits: Limits
) -> tuple[FloatArray, tuple[tuple[int, ...], ...]]:
    """Factors by class of the error model, kind of place and label; and pairs by the first two.

    Where a kind has fewer than `MIN_WIDTH_PAIRS` pairs of a class of the error model, those inside
    and sparse are counted together, and the factor grows as the limit of the kind says. It always
    does so where the overlap lacks stars of a kind: there is nothing to count.

    Parameters
    ----------
    score : ndarray of float64, shape (n, 3)
        |residual| / half-width of held-out pairs.
    pairs, rows : Placed
        The pairs, and the rows whose intervals are to hold.
    """
    found = np.ones((2, len(KINDS), len(LABELS)))
    growth = {INSIDE: 1.0, SPARSE: 1 / limits.inside, OUTSIDE: 1 / limits.outside}
    growth[LACKING] = growth[OUTSIDE]
    n_pairs = []
    for number in (0, 1):
        mine = pairs.error_class == number
        n_pairs.append(tuple(int(np.count_nonzero(mine & (pairs.kind == k))) for k in growth))
        for kind, factor in growth.items():
            used = mine & (pairs.kind == kind)
            if kind == LACKING or n_pairs[number][kind] < MIN_WIDTH_PAIRS:
                used = mine & (pairs.kind <= SPARSE)
            else:
                factor = 1.0
            found[number, kind] = factor
            if np.count_nonzero(used) >= MIN_WIDTH_PAIRS:  # else what the error model says
                at = rows.take((rows.error_class == number) & (rows.kind == kind))
                found[number, kind] *= _quantile(score[used], weights(pairs.take(used), at))
    return found, tuple(n_pairs)


def counted(n_pairs: tuple[tuple[int, ...], ...]) -> dict[str, str]:
    """On how many pairs the widths of each kind of place stand, in words.

    Parameters
    ----------
    n_pairs : tuple of tuple of int
        As of `widths`; empty where nothing was counted.
    """
    found = {}
    for kind, name in enumerate(KINDS):
        enough = [n[kind] for n in n_pairs if n[kind] >= MIN_WIDTH_PAIRS and kind != LACKING]
        found[name] = (
            f"counted on {sum(enough)} held-out pairs"
            if enough
            else "extrapolated: too few held-out pairs"
            if n_pairs
            else "those of the error model, if there is one"
        )
    return found


def weights(pairs: Placed, rows: Placed) -> FloatArray:
    """Weights of pairs (n,) that make them stand for some rows; equal where there are no rows."""
    from scipy.spatial import cKDTree

    if not len(rows.snr):
        return np.ones(len(pairs.snr))
    known = pairs.snr[pairs.snr > 0]
    snr = float(np.median(known)) if len(known) else 1.0
    nearest = cKDTree(pairs.points(snr)).query(rows.points(snr), k=_NEAREST)[1]
    return np.asarray(np.bincount(nearest.ravel(), minlength=len(pairs.snr)) ** _POWER)


def _quantile(score: FloatArray, weight: FloatArray) -> FloatArray:
    """Scores (3,) below which a new row is with at least `LEVEL`: it weighs as much as a pair."""
    level = LEVEL * (weight.sum() + weight.mean())
    found = np.empty(score.shape[1])
    for label, values in enumerate(score.T):
        order = np.argsort(values, kind="stable")
        place = np.searchsorted(np.cumsum(weight[order]), level)
        found[label] = values[order[min(int(place), len(order) - 1)]]
    return found
