"""Labels of a star that several surveys have measured: mean, error, and how well they agree.

Of a label, rows of the best grade that a star has count. Inside of a survey they are averaged with
weights 1 / error**2; from three on, one farther than ``clip`` of its errors from their median is
left out. The mean of a survey has a floor beside its error: what all of its rows share, such as a
fault of its calibration, which repeats do not show and do not make smaller. Means of surveys are
averaged the same way, and the chi-square of that tells whether they agree. Where no row, or no
survey, has an error, the mean is plain and its error unknown.

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

    Parameters
    ----------
    value, error : ndarray of float64, shape (r,)
        Of rows, nan where unknown; errors that are not positive are unknown.
    star, survey : ndarray of int64, shape (r,)
        Numbers of star and survey.
    shape : tuple of int
        Number of stars n and of surveys s.
    clip : float

    Returns
    -------
    Means
    """
    group = star * shape[1] + survey
    n_groups = shape[0] * shape[1]
    has = np.isfinite(value)
    kept = has & ~_far(value, error, group, has, n_groups, clip)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.where(kept & (error > 0), error**-2.0, 0.0)
        total = np.bincount(group, weight, n_groups)
        mean = np.bincount(group, weight * np.where(kept, value, 0.0), n_groups) / total
        n_kept = np.bincount(group[kept], minlength=n_groups)
        plain = np.bincount(group[kept], value[kept], n_groups) / n_kept
    known = total > 0
    found = np.where(known, mean, np.where(n_kept > 0, plain, np.nan))
    with np.errstate(divide="ignore"):
        error = np.where(known, total**-0.5, np.nan)
    return Means(found.reshape(shape), error.reshape(shape), has & ~kept)


def _far(
    value: FloatArray, error: FloatArray, group: IntArray, has: BoolArray, n: int, clip: float
) -> BoolArray:
    """Rows that are too far from the median of a group of three or more."""
    far = np.zeros(len(value), dtype=np.bool_)
    rows = np.flatnonzero(has & (np.bincount(group[has], minlength=n) > 2)[group])
    if len(rows):
        rows = rows[np.lexsort((value[rows], group[rows]))]
        first = np.flatnonzero(starts(group[rows]))
        count = np.diff(np.append(first, len(rows)))
        middle = value[rows[first + (count - 1) // 2]] + value[rows[first + count // 2]]
        distance = np.abs(value[rows] - np.repeat(middle / 2, count))
        far[rows] = distance > clip * error[rows]
    return far


def average(
    means: Means, floor: FloatArray, clip: float, correlation: FloatArray | None = None
) -> Average:
    """Average the means of the surveys of each star.

    ``floor`` (s,): error that all rows of a survey share; ``correlation`` (s, s) of the errors of
    two surveys. Of three surveys or more, one that is farther than ``clip`` of its errors from
    their median is left out, as long as two are left.
    """
    value = means.value
    variance = means.error**2 + floor**2
    with_error = np.isfinite(value) & np.isfinite(variance)
    some: BoolArray = np.any(with_error, axis=1)
    used = np.where(some[:, None], with_error, np.isfinite(value))
    rejected = np.zeros(len(value), dtype=np.bool_)
    rows = np.flatnonzero(some & (used.sum(axis=1) > 2))
    if len(rows):
        median = np.nanmedian(np.where(used[rows], value[rows], np.nan), axis=1)
        with np.errstate(invalid="ignore"):
            far = np.abs(value[rows] - median[:, None]) > clip * np.sqrt(variance[rows])
        far &= used[rows] & ((used[rows] & ~far).sum(axis=1) > 1)[:, None]
        used[rows] &= ~far
        rejected[rows] = far.any(axis=1)
    weight = np.where(used, np.where(some[:, None], 1 / np.where(used, variance, 1.0), 1.0), 0.0)
    total = weight.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (weight * np.where(used, value, 0.0)).sum(axis=1) / total
        root = np.sqrt(weight)  # weight times error
        shared = root @ (np.eye(value.shape[1]) if correlation is None else correlation)
        error = np.where(some, np.sqrt((shared * root).sum(axis=1)) / total, np.nan)
    difference = np.where(used, value - mean[:, None], 0.0)
    chi2 = np.where(some, (weight * difference**2).sum(axis=1), np.nan)
    return Average(mean, error, chi2, used.sum(axis=1), rejected)


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

    Parameters
    ----------
    value, error : ndarray of float, shape (n, s)
        Means of the surveys of stars, nan where unknown.
    surveys : sequence of str
        Their names.

    Returns
    -------
    floor : ndarray of float64, shape (s,)
        0 where a survey cannot be compared.
    correlation : ndarray of float64, shape (s, s)
        Of the errors of two surveys, from 0 to 0.9; of a survey with itself 1.
    found : list of dict
        A row for each two surveys: ``survey``, ``other``, ``n`` stars in common, ``offset``
        (median of survey - other), ``scatter`` of it, ``width`` (scatter in units of the stated
        errors), ``correlation``; then a row for each survey: its ``floor``.
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
    rows: list[FloatArray] = []
    wanted: list[float] = []
    least = 1e-3 * min(weight for _, weight in excess.values())
    for pair, (one, weight) in excess.items():
        row = np.zeros(n)
        row[list(pair)] = weight
        rows.append(row)
        wanted.append(weight * one)
    # Two surveys alone do not tell whose it is: half each.
    for number in range(n):
        mine = [one / 2 for pair, (one, _) in excess.items() if number in pair]
        if mine:
            row = np.zeros(n)
            row[number] = least
            rows.append(row)
            wanted.append(least * float(np.mean(mine)))
    square, _ = nnls(np.array(rows), np.array(wanted))
    return np.asarray(np.sqrt(square))
