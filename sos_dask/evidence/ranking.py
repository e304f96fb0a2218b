"""Which measure of coverage tells best where errors are large, and how certain that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sos_dask.evidence.coverage_fit import (
    WRONG_SIGMA,
    Columns,
    Overlap,
    held_out_distance,
    scale_pairs,
)
from sos_dask.evidence.growth import Noise
from sos_dask.evidence.measures import MEASURES

FloatArray = NDArray[np.float64]
ALL, SPARSE, FAR = "all", "sparse", "far"
FAR_SHARE = 0.1
_N_RESAMPLES = 1000
_TAIL = 2.5  # per cent beyond each end of an interval


@dataclass(frozen=True)
class Ranking:
    """One statistic of one measure on held-out pairs.

    Parameters
    ----------
    measure : str
        One of `MEASURES`.
    statistic : str
        ``all``: rank correlation (Spearman's) of distance and error over noise. ``sparse``: the
        same among the tenth of the pairs that all measures together have farthest. ``far``: mean
        error of the tenth that this measure has farthest over that of its nearer half.
    n : int
        Pairs it is made of.
    value, low, high : float
        With its 95 % interval: percentiles of resamples by star (Efron & Tibshirani 1993, An
        Introduction to the Bootstrap, chapter 13).
    behind, behind_low, behind_high : float
        How much larger it is for the best measure, on the same resamples; the measure is worse
        where ``behind_low`` is above 0. All 0 for the best.
    """

    measure: str
    statistic: str
    n: int
    value: float
    low: float
    high: float
    behind: float = 0.0
    behind_low: float = 0.0
    behind_high: float = 0.0


def compare(
    overlap: Overlap, catalog: Columns, seed: int = 0, most: int = 50_000
) -> Sequence[Ranking]:
    """Every measure on the same (at most ``most``) pairs, in the order of `MEASURES`.

    The overlap that a held-out pair is measured from is made of the other folds alone.

    Parameters
    ----------
    overlap : Overlap
    catalog : mapping of str to ndarray of float, shape (m,)
        A sample of the catalog; its columns are the parameters that are used.
    """
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(overlap.fold))[:most])
    overlap = Overlap(
        {key: values[chosen] for key, values in overlap.columns.items()},
        overlap.fold[chosen],
        overlap.residual[chosen],
        overlap.reference_error[chosen],
        star=None if overlap.star is None else overlap.star[chosen],
    )
    held_out = overlap.held_out
    distances = {}
    for name in MEASURES:
        _, _, _, x, sample = scale_pairs(overlap.columns, catalog, name)
        distance = held_out_distance(name, x, sample, overlap.fold, held_out, seed)
        distances[name] = distance[held_out]
    ranks = np.mean([_ranks(distance) for distance in distances.values()], axis=0)
    near = ranks <= np.median(ranks)
    columns = {name: values[held_out] for name, values in overlap.columns.items()}
    unknown = np.full(len(ranks), np.nan)
    of_noise = (
        columns["logg"], columns.get("snr", unknown), overlap.reference_error[held_out],
    )  # fmt: skip
    residual = overlap.residual[held_out]
    noise = Noise.fit(residual[near], *(values[near] for values in of_noise))
    ratio = np.abs(residual / noise.of_pairs(*of_noise))
    right = ratio.min(axis=1) <= WRONG_SIGMA
    star = np.arange(len(ranks)) if overlap.star is None else overlap.star[held_out]
    return rank(
        {name: distance[right] for name, distance in distances.items()},
        np.sqrt(np.mean(np.square(ratio[right]), axis=1)),
        star[right],
        rng,
    )


def rank(
    distances: Mapping[str, FloatArray],
    error: FloatArray,
    star: NDArray[np.integer],
    rng: np.random.Generator,
) -> Sequence[Ranking]:
    """How well distances tell errors.

    Parameters
    ----------
    distances : mapping of str to ndarray of float64, shape (n,)
        By measure.
    error : ndarray of float64, shape (n,)
        In units of the noise.
    star : ndarray of int, shape (n,)
        Equal for pairs of one star, which are drawn together.
    """
    stars, group = np.unique(star, return_inverse=True)
    together = np.mean([_ranks(distance) for distance in distances.values()], axis=0)
    sparse = together >= np.quantile(together, 1 - FAR_SHARE)
    rows = {ALL: np.ones(len(error), dtype=np.bool_), SPARSE: sparse}
    sums = {}
    for name, distance in distances.items():
        for statistic, chosen in rows.items():
            sums[statistic, name] = _moments(distance, error, chosen)
        sums[FAR, name] = _far_and_near(distance, error)
    by_star = {
        key: np.stack([np.bincount(group, column, len(stars)) for column in terms], axis=1)
        for key, terms in sums.items()
    }
    drawn: dict[tuple[str, str], list[FloatArray]] = {key: [] for key in sums}
    weights = np.ones(len(stars))
    for _ in range(_N_RESAMPLES + 1):  # the first is the sample itself
        for key, terms in by_star.items():
            drawn[key].append(weights @ terms)
        weights = rng.multinomial(len(stars), np.full(len(stars), 1 / len(stars))).astype(float)
    found = []
    for statistic in (ALL, SPARSE, FAR):
        of = _ratio if statistic == FAR else _correlation
        values = {name: of(np.array(drawn[statistic, name])) for name in distances}
        best = max(values, key=lambda name: float(values[name][0]))
        n = int(np.count_nonzero(rows.get(statistic, rows[ALL])))
        for name, value in values.items():
            behind = values[best] - value
            found.append(
                Ranking(
                    name,
                    statistic,
                    n,
                    float(value[0]),
                    *_interval(value[1:]),
                    float(behind[0]),
                    *_interval(behind[1:]),
                )
            )
    return found


def _ranks(values: FloatArray) -> FloatArray:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values))


def _moments(
    distance: FloatArray, error: FloatArray, chosen: NDArray[np.bool_]
) -> Sequence[FloatArray]:
    """Per row what a correlation is summed from: of ranks, which resamples take as they are."""
    a, b = np.zeros(len(error)), np.zeros(len(error))
    for out, values in ((a, distance), (b, error)):
        place = _ranks(values[chosen])
        out[chosen] = (place - place.mean()) / len(place)
    return chosen.astype(np.float64), a, b, a * a, b * b, a * b


def _correlation(sums: FloatArray) -> FloatArray:
    n, a, b, aa, bb, ab = sums.T
    spread = np.sqrt(np.maximum((aa - a * a / n) * (bb - b * b / n), 0.0))
    return np.asarray((ab - a * b / n) / np.maximum(spread, 1e-12))


def _far_and_near(distance: FloatArray, error: FloatArray) -> Sequence[FloatArray]:
    far = distance >= np.quantile(distance, 1 - FAR_SHARE)
    near = distance <= np.median(distance)
    return far.astype(np.float64), far * error, near.astype(np.float64), near * error


def _ratio(sums: FloatArray) -> FloatArray:
    n_far, far, n_near, near = np.maximum(sums, 1e-12).T
    return np.asarray((far / n_far) / (near / n_near))


def _interval(values: FloatArray) -> tuple[float, float]:
    low, high = np.percentile(values, [_TAIL, 100 - _TAIL])
    return float(low), float(high)
