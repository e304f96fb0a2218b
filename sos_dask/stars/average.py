"""Labels of a star that several surveys have measured: mean, error, and how well they agree.

Of a label, rows of the best grade that a star has count. Inside of a survey they are averaged with
weights 1 / error**2. From three on, one is left out that is farther than ``clip`` errors from the
mean of the others (its own error and that of their mean), the farthest first, where the others then
agree: by the distance from a median the most precise one would be an outlier of noisier ones. The
mean of a survey has a floor beside its error: what all of its rows share, such as a fault of its
calibration, which repeats do not show and do not make smaller. Means of surveys are averaged the
same way, and the chi-square of that tells whether they agree. Where no row, or no survey, has an
error, the mean is plain and its error unknown.

The floors follow from stars in common (`floors`): squared and summed over two surveys they are what
the variance of their differences has over the stated one. With three surveys that is the
three-cornered hat, with two each gets half, with more it is a fit of least squares to numbers that
are not negative. Differences that scatter less than stated tell that errors of two surveys go
together, as those of two corrections that lean on the same star's labels: their correlation makes
the error of the mean larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from sos_dask.columns import BoolArray, FloatArray, IntArray
from sos_dask.errors import CatalogError
from sos_dask.sky.neighbours import starts
from sos_dask.stats.numbers import scatter

MIN_COMMON = 50
"""Stars in common from which on two surveys are compared."""
_MOST_COMPARED = 100_000  # of them tell a scatter to 0.3 %
_STEPS = 50
_CLIP = 3.0
_MOST_CORRELATED = 0.9


class Means(NamedTuple):
    """Mean and error by star and survey, (n, s), nan where unknown; rows that were left out."""

    value: FloatArray
    error: FloatArray
    rejected: BoolArray


class Average(NamedTuple):
    """Of stars, (n,): mean, its error, chi-square, surveys that count, whether one was left out."""

    value: FloatArray
    error: FloatArray
    chi2: FloatArray
    n_surveys: IntArray
    rejected: BoolArray


def survey_means(
    value: FloatArray,
    error: FloatArray,
    star: IntArray,
    survey: IntArray,
    shape: tuple[int, int],
    clip: float,
) -> Means:
    """Average the rows of each star in each survey.

    The ``shape`` is the number of stars and of surveys. Values and errors (r,) are nan where
    unknown; errors that are not positive are unknown, too. Stars and surveys (r,) are numbered from
    0; rows are sorted by star, then by survey.
    """
    group = star * shape[1] + survey
    is_first = starts(group)
    number = np.cumsum(is_first) - 1
    has = np.isfinite(value)
    kept = has & ~_far(value, error, number, has, clip)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.where(kept & (error > 0), error**-2.0, 0.0)
        total = np.bincount(number, weight)
        mean = np.bincount(number, weight * np.where(kept, value, 0.0)) / total
        n_kept = np.bincount(number, kept)
        plain = np.bincount(number, np.where(kept, value, 0.0)) / n_kept
        found = total**-0.5
    known = total > 0
    out = np.full((2, shape[0] * shape[1]), np.nan)
    out[:, group[is_first]] = np.where(known, mean, plain), np.where(known, found, np.nan)
    return Means(out[0].reshape(shape), out[1].reshape(shape), has & ~kept)


def _far(
    value: FloatArray, error: FloatArray, group: IntArray, has: BoolArray, clip: float
) -> BoolArray:
    """Rows of groups (in their order) of three or more that are too far from all others."""
    far = np.zeros(len(value), dtype=np.bool_)
    rows = np.flatnonzero(has & (error > 0))
    rows = rows[(np.bincount(group[rows], minlength=1) > 2)[group[rows]]]
    while len(rows):
        is_first = starts(group[rows])
        first = np.flatnonzero(is_first)
        number = np.cumsum(is_first) - 1
        count = np.diff(np.append(first, len(rows)))
        off, weight = value[rows] - value[rows[first]][number], error[rows] ** -2.0
        total, moment, square = (
            np.bincount(number, weight * power) for power in (np.ones(len(off)), off, off**2)
        )
        rest = total[number] - weight
        # How much smaller the chi-square of the group is without a row.
        drop = (off - (moment[number] - weight * off) / rest) ** 2 * weight * rest / total[number]
        worst = first + _first_largest(drop, first)
        left = square - moment**2 / total - drop[worst]
        gone = (drop[worst] > clip**2) & ((count > 3) | (left < clip**2))
        far[rows[worst[gone]]] = True
        rows = rows[(gone & (count > 3))[number] & ~far[rows]]
    return far


def _first_largest(values: FloatArray, first: IntArray) -> IntArray:
    """Place in each group, whose rows begin at ``first``, of the first of its largest values."""
    largest = np.maximum.reduceat(values, first)
    number = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(values))))
    at = np.flatnonzero(values == largest[number])
    return np.asarray(at[starts(number[at])] - first)


def average(
    means: Means, floor: FloatArray, clip: float, correlation: FloatArray | None = None
) -> Average:
    """Average the means of the surveys of each star.

    ``floor`` (s,): error that all rows of a survey share; ``correlation`` (s, s) of the errors of
    two surveys. Of three surveys or more, one that is too far from the others is left out.
    """
    has = np.isfinite(means.value)
    count = has.sum(axis=1)
    one = np.argmax(has, axis=1)  # most stars are in one survey
    rows = np.arange(len(has))
    value, error = means.value[rows, one], np.hypot(means.error[rows, one], floor[one])
    chi2 = np.where(np.isfinite(error), 0.0, np.nan)
    rejected = np.zeros(len(value), dtype=np.bool_)
    several = np.flatnonzero(count > 1)
    some = Means(means.value[several], means.error[several], means.rejected[:0])
    found = _average(some, floor, clip, correlation)
    both = Average(value, error, chi2, count, rejected)
    for whole, part in zip(both, found, strict=True):
        whole[several] = part
    return both


def _average(
    means: Means, floor: FloatArray, clip: float, correlation: FloatArray | None
) -> Average:
    value = means.value
    variance = means.error**2 + floor**2
    with_error = np.isfinite(value) & np.isfinite(variance)
    some: BoolArray = np.any(with_error, axis=1)
    used = np.where(some[:, None], with_error, np.isfinite(value))
    star = np.repeat(np.arange(len(value)), value.shape[1])
    far = _far(value.ravel(), np.sqrt(variance).ravel(), star, with_error.ravel(), clip)
    far = far.reshape(value.shape)
    used &= ~far
    rejected = np.asarray(far.any(axis=1))
    weight = np.where(used, np.where(some[:, None], 1 / np.where(used, variance, 1.0), 1.0), 0.0)
    share, sigma = weight / weight.sum(axis=1, keepdims=True), 1 / weight.sum(axis=1) ** 0.5
    if correlation is not None and np.any(correlation != np.eye(len(correlation))):
        error = np.sqrt(np.where(used, variance, 1.0))
        share[some], sigma[some] = _best_shares(error[some], used[some], correlation)
    mean = (share * np.where(used, value, 0.0)).sum(axis=1)
    error = np.where(some, sigma, np.nan)
    difference = np.where(used, value - mean[:, None], 0.0)
    chi2 = np.where(some, (weight * difference**2).sum(axis=1), np.nan)
    return Average(mean, error, chi2, used.sum(axis=1), rejected)


def _best_shares(
    error: FloatArray, used: BoolArray, correlation: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Shares of the means of smallest error, none negative, where errors go together; that error.

    Of two surveys whose errors are almost the same one, the noisier one adds nothing.
    """
    values, vectors = np.linalg.eigh(correlation)  # of pairs measured one by one it may be none
    near = (vectors * np.maximum(values, 0.01)) @ vectors.T
    near /= np.sqrt(np.outer(near.diagonal(), near.diagonal()))
    used = used.copy()
    share = np.zeros(error.shape)
    total, todo = np.ones(len(error)), np.arange(len(error))
    while len(todo):
        both = used[todo, :, None] & used[todo, None, :]
        inverse = 1 / error[todo]
        matrix = np.where(both, near, np.eye(error.shape[1]))
        # Of errors times shares: the matrix has no units.
        found = np.linalg.solve(matrix, (used[todo] * inverse)[..., None])[..., 0] * inverse
        worst = np.argmin(np.where(used[todo], found, np.inf), axis=1)
        bad = found[np.arange(len(todo)), worst] < 0
        good = todo[~bad]
        total[good] = found[~bad].sum(axis=1)
        share[good] = found[~bad] / total[good, None]
        todo, worst = todo[bad], worst[bad]
        used[todo, worst] = False
    return share, total**-0.5


def improbable(chi2: FloatArray, dof: IntArray, level: float) -> BoolArray:
    """Check which values of chi-square are exceeded by chance less often than ``level``."""
    from scipy.special import gammaincc

    known = np.isfinite(chi2) & (dof > 0)
    chance = np.ones(len(chi2))
    chance[known] = gammaincc(dof[known] / 2, chi2[known] / 2)
    return np.asarray(chance < level)


def floors(
    value: FloatArray, error: FloatArray, surveys: Sequence[str]
) -> tuple[FloatArray, FloatArray, list[dict[str, Any]]]:
    """Measure the floors of the errors of surveys by stars in common.

    Values and errors (n, s) are means of the surveys of stars, nan where unknown. Gives the floors
    (s,), 0 where a survey cannot be compared; the correlations (s, s) of the errors of two surveys,
    from 0 to 0.9, of a survey with itself 1; and a row for each two surveys: ``survey``, ``other``,
    ``n`` stars in common, ``offset`` (median of survey - other), ``scatter`` of it, ``width``
    (scatter in units of the stated errors), ``correlation``; then a row for each survey: its
    ``floor``.
    """
    found: list[dict[str, Any]] = []
    excess: dict[tuple[int, int], tuple[float, float]] = {}  # and its weight
    correlation = np.eye(len(surveys))
    for i, j in combinations(range(len(surveys)), 2):
        both = np.flatnonzero(np.isfinite(value[:, [i, j]]).all(axis=1))
        both = some_of(both, _MOST_COMPARED)
        if len(both) < MIN_COMMON:
            continue
        difference = np.asarray(value[both, i] - value[both, j], dtype=np.float64)
        offset, spread = float(np.median(difference)), scatter(difference)
        if spread == 0:
            what = f"'{surveys[i]}' and '{surveys[j]}' have the same values of {len(both)} stars"
            raise CatalogError(f"{what}: they are one survey", "Take one of them out.")
        one = {"survey": surveys[i], "other": surveys[j], "n": len(both), "offset": offset}
        found.append({**one, "scatter": spread})
        errors = np.asarray(error[both][:, [i, j]], dtype=np.float64)
        stated, difference = (errors**2).sum(axis=1), difference - offset
        # Wrong rows, which are no error of the others, would make it too wide.
        right = np.abs(difference) < _CLIP * np.sqrt(stated + spread**2)
        if np.count_nonzero(right) < MIN_COMMON:
            continue
        difference, stated, errors = difference[right], stated[right], errors[right]
        surplus = _excess(difference, stated)
        # A scatter of n numbers is known to 1.17 / sqrt(n) of it, its square to twice that.
        excess[i, j] = max(surplus, 0.0), len(difference) ** 0.5 / scatter(difference) ** 2
        width = scatter(difference / np.sqrt(stated))
        if width < 1 - 2 * 1.17 / len(difference) ** 0.5:
            together = -surplus / (2 * np.median(errors.prod(axis=1)))
            correlation[i, j] = correlation[j, i] = min(together, _MOST_CORRELATED)
        found[-1] |= {"width": width, "correlation": float(correlation[i, j])}
    floor = _shared(excess, len(surveys))
    found += [{"survey": name, "floor": float(floor[i])} for i, name in enumerate(surveys)]
    return floor, correlation, found


def some_of(rows: IntArray, most: int) -> IntArray:
    """Choose at most so many rows, from all of the sky."""
    return rows[:: max(1, -(-len(rows) // most))]


def _excess(difference: FloatArray, stated: FloatArray) -> float:
    """Variance beside the stated one with which differences have the scatter of a unit normal."""
    low, high = 0.0, float(np.max(difference**2))
    width = scatter(difference / np.sqrt(stated))
    if width <= 1:
        return float((width**2 - 1) * np.median(stated))
    for _ in range(_STEPS):
        middle = (low + high) / 2
        is_wide = scatter(difference / np.sqrt(stated + middle)) > 1
        low, high = (middle, high) if is_wide else (low, middle)
    return high


def _shared(excess: dict[tuple[int, int], tuple[float, float]], n: int) -> FloatArray:
    """Floors whose squares sum up to the excess variances of pairs, as far as they can."""
    from scipy.optimize import nnls

    if not excess:
        return np.zeros(n)
    wanted = [(list(pair), weight, one) for pair, (one, weight) in excess.items()]
    # Two surveys alone do not tell whose it is: half each.
    least = 1e-3 * min(weight for _, weight in excess.values())
    for number in range(n):
        if mine := [one / 2 for pair, (one, _) in excess.items() if number in pair]:
            wanted.append(([number], least, float(np.mean(mine))))
    rows = np.zeros((len(wanted), n))
    for row, (places, weight, _) in zip(rows, wanted, strict=True):
        row[places] = weight
    square, _ = nnls(rows, np.array([weight * one for _, weight, one in wanted]))
    return np.asarray(np.sqrt(square))
