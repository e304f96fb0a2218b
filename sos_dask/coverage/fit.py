"""Fit a coverage model to held-out pairs, and compare the measures on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sos_dask.coverage.growth import Growth, Noise
from sos_dask.coverage.measures import (
    MEASURES,
    OF_LABELS,
    Measure,
    Mixture,
    Neighbours,
    Ratio,
    Share,
)
from sos_dask.coverage.model import CLASSES, INSIDE, OUTSIDE, CoverageModel, Limits
from sos_dask.density import robust_scale
from sos_dask.errors import ConfigError, ModelError
from sos_dask.features import PARAMETERS, parameters_of
from sos_dask.schema import LABELS, nearest

FloatArray = NDArray[np.float64]
Columns = Mapping[str, NDArray[np.floating]]
MIN_HELD_OUT = 100
WRONG_SIGMA = 4.0
LEVEL = 0.68
_CATALOG_ROWS = 1  # an overlap star: more are not counted better, the overlap stars are few
_MIN_WIDTH_PAIRS = 40


@dataclass(frozen=True)
class Overlap:
    """The pairs fit for training, with what is known of those that were held out.

    Parameters
    ----------
    columns : mapping of str to ndarray of float, shape (n,)
        Parameters of the target, nan where unknown.
    fold : ndarray of int8, shape (n,)
    residual : ndarray of float64, shape (n, 3)
        Difference less predicted difference, in the order of `LABELS`; nan for pairs that were
        not held out.
    reference_error : ndarray of float64, shape (n, 3)
        Stated errors of the reference, nan where unknown.
    half_width : ndarray of float64, shape (n, 3), optional
        By the error model of the correction; nan for pairs whose residuals it does not speak of.
    error_class : ndarray of int8, shape (n,), optional
        1 where the error model has its pairs in its sparse class.
    star : ndarray of int64, shape (n,), optional
        Equal for pairs of one star.
    """

    columns: Columns
    fold: NDArray[np.int8]
    residual: FloatArray
    reference_error: FloatArray
    half_width: FloatArray | None = None
    error_class: NDArray[np.int8] | None = None
    star: NDArray[np.int64] | None = None

    @property
    def held_out(self) -> NDArray[np.bool_]:
        """Pairs with residuals in all labels, shape (n,)."""
        return np.asarray(np.isfinite(self.residual).all(axis=1))


@dataclass(frozen=True)
class Fit:
    """A fitted model, and on what it stands.

    Parameters
    ----------
    model : CoverageModel
    bins : list of dict
        Of held-out pairs by distance: measured and fitted growth.
    n_held_out, n_wrong : int
        Held-out pairs, and those of them that are off by more than `WRONG_SIGMA` in all labels at
        once: wrong measurements, which say nothing of a correction and are left out.
    n_width : tuple of tuple of int
        Pairs that the widths were counted on, by class of the error model and of the coverage.
    """

    model: CoverageModel
    bins: list[dict[str, float]]
    n_held_out: int
    n_wrong: int
    n_width: tuple[tuple[int, ...], ...]


def check_measure(name: str) -> None:
    """Raise `ConfigError` where there is no such measure."""
    if name not in MEASURES:
        raise ConfigError(
            f"there is no measure of coverage '{name}'",
            nearest(name, MEASURES) or f"Known are: {', '.join(MEASURES)}.",
        )


def fit(overlap: Overlap, catalog: Columns, name: str, limits: Limits, seed: int = 0) -> Fit:
    """Fit a measure to the overlap and calibrate its distances on held-out pairs.

    Held-out pairs are measured from the pairs of the other folds alone, as a new star is.

    Parameters
    ----------
    overlap : Overlap
    catalog : mapping of str to ndarray of float, shape (m,)
        A sample of the catalog; its columns are the parameters that are used.
    name : str
        One of `MEASURES`.

    Raises
    ------
    ConfigError
        Unknown measure.
    ModelError
        Too few held-out pairs.
    """
    check_measure(name)
    held_out = overlap.held_out
    n_held_out = int(np.count_nonzero(held_out))
    if n_held_out < MIN_HELD_OUT:
        raise ModelError(
            f"{n_held_out} held-out pairs are too few to calibrate the coverage",
            f"At least {MIN_HELD_OUT} are needed: match more stars or loosen the cuts.",
        )
    names, center, scale, x, sample = scale_pairs(overlap.columns, catalog, name)
    labels = x[:, : len(LABELS)]
    some = np.random.default_rng(seed).permutation(len(sample))[: _CATALOG_ROWS * len(x)]
    catalog_labels = sample[np.sort(some), : len(LABELS)]
    at = held_out_distance(name, x, sample, overlap.fold, held_out, seed)
    shares = {
        fold: Share(labels[overlap.fold != fold], catalog_labels)
        for fold in np.unique(overlap.fold[held_out])
    }
    distance, residual = at[held_out], overlap.residual[held_out]
    snr = _column(overlap.columns, "snr", len(x))[held_out]
    logg = _column(overlap.columns, "logg", len(x))[held_out]
    reference_error = overlap.reference_error[held_out]
    dense = distance <= np.quantile(distance, 0.5)
    noise = Noise.fit(residual[dense], logg[dense], snr[dense], reference_error[dense])
    ratio = residual / noise.of_pairs(logg, snr, reference_error)
    wrong = np.asarray(np.abs(ratio).min(axis=1) > WRONG_SIGMA)
    growth, bins = Growth.fit(distance[~wrong], ratio[~wrong])
    model = CoverageModel(
        name,
        names,
        center,
        scale,
        _measure(name, x, sample, seed),
        noise,
        growth,
        limits,
        Share(labels, catalog_labels),
        np.ones((2, len(CLASSES), len(LABELS))),
    )
    n_width: tuple[tuple[int, ...], ...] = ()
    if overlap.half_width is not None and overlap.error_class is not None:
        score = np.abs(overlap.residual) / overlap.half_width
        coverage = np.full(len(x), np.nan, dtype=np.float32)
        for fold, share in shares.items():
            rows = held_out & (overlap.fold == fold)
            coverage[rows] = model.coverage_at(x[rows], at[rows], share)
        right = np.asarray(held_out & np.isfinite(score).all(axis=1))
        right[held_out] &= ~wrong
        place = limits.classify(coverage)
        kinds = [right & (overlap.error_class == kind) for kind in (0, 1)]
        found = [_widths(score[kind], place[kind], limits) for kind in kinds]
        model = replace(model, widths=np.array([widths for widths, _ in found]))
        n_width = tuple(n for _, n in found)
    return Fit(
        model,
        bins,
        n_held_out,
        int(np.count_nonzero(wrong)),
        n_width,
    )


def scale_pairs(
    pairs: Columns, catalog: Columns, name: str
) -> tuple[tuple[str, ...], FloatArray, FloatArray, FloatArray, FloatArray]:
    """What a measure sees: names, center and scale (k,), pairs (n, k), rows of the catalog (m, k).

    Rows of the catalog without a label are left out.
    """
    known = LABELS if name in OF_LABELS else PARAMETERS
    names = tuple(p for p in known if p in catalog and p in pairs)
    x = parameters_of(pairs, names)
    center, scale = _robust_scale(x)
    sample = (parameters_of(catalog, names) - center) / scale
    sample = sample[np.isfinite(sample[:, : len(LABELS)]).all(axis=1)]
    return names, center, scale, (x - center) / scale, sample


def held_out_distance(
    name: str,
    x: FloatArray,
    sample: FloatArray,
    fold: NDArray[np.int8],
    held_out: NDArray[np.bool_],
    seed: int,
) -> FloatArray:
    """Distances (n,) of held-out pairs from the pairs of the other folds; nan for the rest."""
    distance = np.full(len(x), np.nan)
    for number in np.unique(fold[held_out]):
        rows, others = held_out & (fold == number), fold != number
        distance[rows] = _measure(name, x[others], sample, seed).distance(x[rows])
    return distance


def _widths(
    score: FloatArray, place: NDArray[np.int8], limits: Limits
) -> tuple[FloatArray, tuple[int, ...]]:
    """Factors of half-widths by class and label, and the pairs of each class.

    Where the pairs are too few to count, errors grow from inside as the limit of the class says.
    Outside they grow by no less: the pairs there are at the near edge, the rows may be far.

    Parameters
    ----------
    score : ndarray of float64, shape (n, 3)
        |residual| / half-width of right measurements.
    place : ndarray of int8, shape (n,)
        Their classes.
    """
    widths = np.ones((len(CLASSES), len(LABELS)))
    n_pairs = []
    for number in range(len(CLASSES)):
        mine = np.sort(score[place == number], axis=0)
        n_pairs.append(len(mine))
        if len(mine) >= _MIN_WIDTH_PAIRS:
            widths[number] = mine[int(np.ceil((len(mine) + 1) * LEVEL)) - 1]
        elif number:
            widths[number] = widths[INSIDE] / limits.inside
    widths[OUTSIDE] = np.maximum(widths[OUTSIDE], widths[INSIDE] / limits.outside)
    return widths, tuple(n_pairs)


def _measure(name: str, x: FloatArray, sample: FloatArray, seed: int) -> Measure:
    if name == "ratio":
        return Ratio.fit(x, sample, seed)
    if name == "mixture":
        return Mixture.fit(x, seed)
    return Neighbours(x[:, : len(LABELS)] if name == "neighbours" else x)


def _robust_scale(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Center and scale of each column over the rows that have it; 0 and 1 where none has."""
    found = [robust_scale(column[np.isfinite(column)][:, None]) if np.isfinite(column).any()
             else (np.zeros(1), np.ones(1)) for column in x.T]  # fmt: skip
    return np.concatenate([c for c, _ in found]), np.concatenate([s for _, s in found])


def _column(columns: Columns, name: str, n: int) -> FloatArray:
    return np.asarray(columns.get(name, np.full(n, np.nan)), dtype=np.float64)
