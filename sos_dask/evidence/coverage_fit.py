"""Fit a coverage model to held-out pairs, and compare the measures on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ConfigError, ModelError
from sos_dask.evidence.coverage import CoverageModel
from sos_dask.evidence.growth import Growth, Noise
from sos_dask.evidence.measures import (
    MEASURES,
    NEIGHBOURS,
    OF_LABELS,
    Measure,
    Mixture,
    Neighbours,
    Ratio,
    Share,
)
from sos_dask.evidence.widening import OUTSIDE, Limits, Placed, Target, Widths, fit_widths
from sos_dask.problem import PARAMETERS, parameters_of
from sos_dask.schema import LABELS, nearest
from sos_dask.stats.numbers import robust_scale

FloatArray = NDArray[np.float64]
Columns = Mapping[str, NDArray[np.floating]]
MIN_HELD_OUT = 100
WRONG_SIGMA = 4.0
_CATALOG_ROWS = 1  # an overlap star: more are not counted better, the overlap stars are few


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
        once: wrong measurements, which say nothing of the growth and are left out of it.
    outside : float
        Share of the held-out pairs that the model calls outside.
    n_width : tuple of tuple of int
        Pairs that the widths were counted on, by class of the error model and kind of place.
    """

    model: CoverageModel
    bins: list[dict[str, float]]
    n_held_out: int
    n_wrong: int
    outside: float
    n_width: tuple[tuple[int, ...], ...]


def check_measure(name: str) -> None:
    """Raise `ConfigError` where there is no such measure."""
    if name not in MEASURES:
        raise ConfigError(
            f"there is no measure of coverage '{name}'",
            nearest(name, MEASURES) or f"Known are: {', '.join(MEASURES)}.",
        )


def fit(
    overlap: Overlap,
    catalog: Columns,
    name: str,
    limits: Limits,
    seed: int = 0,
    target: Target | None = None,
) -> Fit:
    """Fit a measure to the overlap and calibrate its distances on held-out pairs.

    Held-out pairs are measured from the pairs of the other folds alone, as a new star is; these
    are fewer, and in proportion is the number of the neighbour to which distances are.

    Parameters
    ----------
    overlap : Overlap
    catalog : mapping of str to ndarray of float, shape (m,)
        A sample of the catalog; its columns are the parameters that are used.
    name : str
        One of `MEASURES`.
    target : Target, optional
        Rows whose intervals are to hold. Without them, or half-widths of the pairs, no widths are
        counted.

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
    shares = {}
    for fold in np.unique(overlap.fold[held_out]):
        others = overlap.fold != fold
        shares[fold] = Share(labels[others], catalog_labels, _neighbours(others))
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
        Widths(np.ones((2, OUTSIDE + 1, len(LABELS)))),
    )
    kind = np.full(len(x), -1, dtype=np.int8)
    for fold, share in shares.items():
        rows = held_out & (overlap.fold == fold)
        kind[rows] = model.coverage_at(x[rows], at[rows], share)[1]
    n_width: tuple[tuple[int, ...], ...] = ()
    if target and overlap.half_width is not None and overlap.error_class is not None:
        snr = _column(overlap.columns, "snr", len(x))
        told = np.asarray(held_out & np.isfinite(overlap.half_width).all(axis=1))
        found, n_width = fit_widths(
            overlap.residual[told],
            overlap.half_width[told],
            ~wrong[told[held_out]],
            Placed(kind, overlap.error_class, labels, snr).take(told),
            _placed(model, target),
            limits,
        )
        model = replace(model, widths=found)
    return Fit(
        model,
        bins,
        n_held_out,
        int(np.count_nonzero(wrong)),
        float(np.mean(kind[held_out] >= OUTSIDE)),
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
        measure = _measure(name, x[others], sample, seed, _neighbours(others))
        distance[rows] = measure.distance(x[rows])
    return distance


def _neighbours(others: NDArray[np.bool_]) -> int:
    """Number of the neighbour among some of the pairs that is as far as `NEIGHBOURS` of all."""
    return max(round(NEIGHBOURS * float(np.mean(others))), 1)


def _placed(model: CoverageModel, target: Target) -> Placed:
    """The rows of the target that have a coverage."""
    x = model.scaled(target.columns)
    kind = model.coverage_at(x, model.measure.distance(x), model.share)[1]
    labels, snr = x[:, : len(LABELS)], _column(target.columns, "snr", len(x))
    return Placed(kind, target.error_class, labels, snr).take(kind >= 0)


def _measure(
    name: str, x: FloatArray, sample: FloatArray, seed: int, k: int = NEIGHBOURS
) -> Measure:
    if name == "ratio":
        return Ratio.fit(x, sample, seed)
    if name == "mixture":
        return Mixture.fit(x, seed)
    return Neighbours(x[:, : len(LABELS)] if name == "neighbours" else x, k)


def _robust_scale(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Center and scale of each column over the rows that have it; 0 and 1 where none has."""
    found = [robust_scale(column[np.isfinite(column)][:, None]) if np.isfinite(column).any()
             else (np.zeros(1), np.ones(1)) for column in x.T]  # fmt: skip
    return np.concatenate([c for c, _ in found]), np.concatenate([s for _, s in found])


def _column(columns: Columns, name: str, n: int) -> FloatArray:
    return np.asarray(columns.get(name, np.full(n, np.nan)), dtype=np.float64)
