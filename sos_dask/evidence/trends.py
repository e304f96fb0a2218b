"""Trends: how the difference target - reference runs with another quantity.

All pairs of a bin are ranked, so medians and percentiles are exact and depend neither on the order
of the pairs nor on how they were partitioned. Percentiles are interpolated linearly between order
statistics (definition 7 of Hyndman & Fan 1996, The American Statistician 50, 361; numpy's default).

The error of a median is the asymptotic one of a sample from a normal distribution,
``sqrt(pi / 2) * sigma / sqrt(n)`` (Kendall & Stuart, The Advanced Theory of Statistics, vol. 1,
§10.10), with sigma half the width from the 16th to the 84th percentile, which outliers do not move.
It takes the pairs for independent: repeated observations of one star make it too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sos_dask.errors import ConfigError
from sos_dask.sky.healpix import FloatArray, IntArray

MEDIAN_ERROR = float(np.sqrt(np.pi / 2))  # 1.2533: of a median, in units of that of a mean
EQUAL_WIDTH, EQUAL_COUNT = "equal-width", "equal-count"
BEFORE, AFTER, FITTED = "before", "after", "fitted"
ALL = "all"
MIN_COUNT = 20


@dataclass(frozen=True)
class Axis:
    """A quantity that trends are binned against, with its bins of equal width.

    Parameters
    ----------
    name : str
        A column of the pairs.
    low, high, width : float
        In the unit of the column.

    Raises
    ------
    ConfigError
        The limits do not rise, or the width is not positive or leaves no bin.
    """

    name: str
    low: float
    high: float
    width: float

    def __post_init__(self) -> None:
        if not (0 < self.width <= self.high - self.low < np.inf):
            raise ConfigError(
                f"bins of {self.name} from {self.low} to {self.high}, {self.width} wide: there "
                "are none"
            )

    @property
    def edges(self) -> FloatArray:
        """Edges of the bins; the last bin may be narrower."""
        n_bins = int(np.ceil(round((self.high - self.low) / self.width, 6)))
        return np.append(np.round(self.low + self.width * np.arange(n_bins), 10), self.high)


AXES = (
    Axis("teff", 3000.0, 10000.0, 250.0),
    Axis("logg", -0.5, 5.5, 0.25),
    Axis("feh", -3.0, 1.0, 0.2),
    Axis("snr", 0.0, 1000.0, 50.0),
    Axis("phot_g_mean_mag", 3.0, 21.0, 0.5),
    Axis("ebv", 0.0, 2.0, 0.1),
    Axis("bp_rp", -0.5, 4.0, 0.25),
)
PLANE = ("teff", "logg")


@dataclass(frozen=True)
class Quantiles:
    """Percentiles of the values in each bin: float64 arrays, one entry a bin, nan where none.

    Parameters
    ----------
    n : ndarray of int64
    median, p16, p84 : ndarray of float64
    error : ndarray of float64
        Of the median, by the formula of this module; nan below two values.
    """

    n: IntArray
    median: FloatArray
    p16: FloatArray
    p84: FloatArray
    error: FloatArray


@dataclass(frozen=True, eq=False)
class Trend:
    """Difference target - reference in bins of one quantity, or of several at once.

    Parameters
    ----------
    label : str
        Of which the difference is.
    against : tuple of str
        Quantities of the bins: one, or two for a plane.
    binning : str
        ``equal-width`` or ``equal-count``.
    subset : str
        ``all`` pairs, or those whose reference labels are of this survey.
    sample : str
        ``before`` the correction; ``after``: difference less what a model that was not trained on
        the star predicts; ``fitted``: the same of the pairs that trained the model.
    method : str, optional
        Of the correction; None before it.
    low, high : ndarray of float64, shape (n_bins, len(against))
        A bin holds its lower edges; the last one along a quantity its upper edge, too.
    quantiles : Quantiles
        In the unit of the label.
    """

    label: str
    against: tuple[str, ...]
    binning: str
    subset: str
    sample: str
    method: str | None
    low: FloatArray
    high: FloatArray
    quantiles: Quantiles


def equal_count_edges(x: NDArray[np.floating], n_bins: int) -> FloatArray:
    """Edges of bins with equally many values; fewer bins where many values are equal.

    Raises
    ------
    ConfigError
        ``n_bins`` is not positive.
    """
    if n_bins < 1:
        raise ConfigError(f"{n_bins} bins are none")
    known = np.sort(x[np.isfinite(x)]).astype(np.float64) + 0.0  # -0.0 and 0.0 are one edge
    if not len(known):
        return np.empty(0)
    edges = np.unique(np.quantile(known, np.linspace(0, 1, n_bins + 1)))
    return np.repeat(edges, 2) if len(edges) == 1 else edges


def bins_of(x: NDArray[np.floating], edges: FloatArray) -> IntArray:
    """Number of the bin of every value; -1 outside the edges and for nan."""
    n_bins = len(edges) - 1
    index = np.searchsorted(edges, x, side="right") - 1
    if n_bins > 0:
        index[x == edges[-1]] = n_bins - 1
    index[index >= n_bins] = -1
    return index


def binned_quantiles(bins: IntArray, values: NDArray[np.floating], n_bins: int) -> Quantiles:
    """Exact percentiles of the values in each bin.

    Parameters
    ----------
    bins : ndarray of int64, shape (n,)
        From 0; negative: in no bin.
    values : ndarray of float, shape (n,)
        Those that are not finite are left out.
    n_bins : int
    """
    known = (bins >= 0) & np.isfinite(values)
    bins = bins[known]
    ranked = values[known].astype(np.float64) + 0.0
    ranked = ranked[np.lexsort((ranked, bins))]
    n = np.bincount(bins, minlength=n_bins).astype(np.int64)
    first = np.cumsum(n) - n
    filled = n > 0

    def quantile(share: float) -> FloatArray:
        out = np.full(n_bins, np.nan)
        place = (n[filled] - 1) * share
        below = np.floor(place).astype(np.int64)
        above = np.minimum(below + 1, n[filled] - 1)
        start, stop = ranked[first[filled] + below], ranked[first[filled] + above]
        t, step = place - below, stop - start
        out[filled] = np.where(t < 0.5, start + step * t, stop - step * (1 - t))
        return out

    p16, median, p84 = quantile(0.16), quantile(0.5), quantile(0.84)
    root = np.sqrt(np.where(n > 1, n, np.nan))
    return Quantiles(n, median, p16, p84, MEDIAN_ERROR * (p84 - p16) / 2 / root)


def trend(
    x: Sequence[NDArray[np.floating]],
    difference: NDArray[np.floating],
    edges: Sequence[FloatArray],
    *,
    label: str,
    against: tuple[str, ...],
    binning: str,
    subset: str = ALL,
    sample: str = BEFORE,
    method: str | None = None,
) -> Trend:
    """Difference in bins of one quantity, or of several at once.

    Parameters
    ----------
    x : sequence of ndarray of float, shape (n,)
        The quantities of ``against``.
    difference : ndarray of float, shape (n,)
        In the unit of the label; nan where it is not known.
    edges : sequence of ndarray of float64
        Of the bins, one array a quantity.
    label, against, binning, subset, sample, method
        As in `Trend`.

    Raises
    ------
    ConfigError
        Not one array of edges a quantity.
    """
    if not len(x) == len(edges) == len(against) > 0:
        raise ConfigError(f"{len(edges)} arrays of edges for {len(against)} quantities")
    shape = tuple(max(len(e) - 1, 0) for e in edges)
    cell = np.zeros(len(difference), dtype=np.int64)
    inside = np.ones(len(difference), dtype=np.bool_)
    for values, bounds, n_bins in zip(x, edges, shape, strict=True):
        index = bins_of(values, bounds)
        inside &= index >= 0
        cell = cell * n_bins + index
    cell[~inside] = -1
    n_cells = int(np.prod(shape))
    place = np.indices(shape).reshape(len(shape), n_cells)
    low = [bounds[:-1][at] for bounds, at in zip(edges, place, strict=True)]
    high = [bounds[1:][at] for bounds, at in zip(edges, place, strict=True)]
    return Trend(
        label,
        against,
        binning,
        subset,
        sample,
        method,
        np.stack(low, axis=1),
        np.stack(high, axis=1),
        binned_quantiles(cell, difference, n_cells),
    )


@dataclass(frozen=True, eq=False)
class Contrast:
    """Two reference surveys, compared through the target and on the stars that both have.

    Through the target: (target - first) - (target - second) = second - first, of different stars
    in one bin. Directly: second - first of the same stars.

    Parameters
    ----------
    first, second : Trend
        Of the pairs of each survey, in the same bins.
    common : Trend, optional
        Of second - first on common stars, in the same bins, of the first survey's labels.
    min_count : int
        Bins with fewer pairs of either survey are not judged.
    """

    first: Trend
    second: Trend
    common: Trend | None = None
    min_count: int = MIN_COUNT

    @property
    def difference(self) -> FloatArray:
        """Second - first through the target; nan where a bin is not judged."""
        one, other = self.first.quantiles, self.second.quantiles
        enough = np.minimum(one.n, other.n) >= max(self.min_count, 2)
        return np.where(enough, one.median - other.median, np.nan)

    @property
    def error(self) -> FloatArray:
        """Error of `difference`; nan where a bin is not judged."""
        error = np.hypot(self.first.quantiles.error, self.second.quantiles.error)
        return np.where(np.isnan(self.difference), np.nan, error)

    @property
    def significance(self) -> FloatArray:
        """Difference over its error; nan where a bin is not judged or all its values are equal."""
        return _over(self.difference, self.error)


def _over(difference: FloatArray, error: FloatArray) -> FloatArray:
    return difference / np.where(error > 0, error, np.nan)


@dataclass(frozen=True)
class Agreement:
    """How far two reference surveys agree over all bins.

    Parameters
    ----------
    first, second : str
        Surveys; differences are second - first.
    label : str
    against : str
        Quantities of the bins, joined by a comma.
    by : str
        ``target``: through the target; ``common``: on stars that both have.
    n_bins : int
        Bins that are judged.
    median, rms : float, optional
        Of the difference over the bins, in the unit of the label; None without bins.
    excess : float, optional
        Rms over the bins beyond what the errors explain: ``sqrt(rms**2 - mean(error**2))``, 0 where
        they explain all.
    chi2 : float
        Sum of squared significances.
    p_value : float
        Chance of so large a chi2 were there no difference.
    n_significant : int
        Bins more than 3 errors from zero.
    """

    first: str
    second: str
    label: str
    against: str
    by: str
    n_bins: int
    median: float | None
    rms: float | None
    excess: float | None
    chi2: float
    p_value: float
    n_significant: int


def agreements(contrast: Contrast) -> list[Agreement]:
    """Sum up a contrast: through the target and, where there are any, on common stars."""
    found = [_agreement(contrast, "target", contrast.difference, contrast.error)]
    if contrast.common is not None:
        direct = contrast.common.quantiles
        judged = direct.n >= max(contrast.min_count, 2)
        median, error = (np.where(judged, v, np.nan) for v in (direct.median, direct.error))
        found.append(_agreement(contrast, "common", median, error))
    return found


def _agreement(contrast: Contrast, by: str, difference: FloatArray, error: FloatArray) -> Agreement:
    from scipy.stats import chi2

    judged = ~np.isnan(_over(difference, error))
    d, e = difference[judged], error[judged]
    n_bins = len(d)
    square = float(np.mean(d**2)) if n_bins else 0.0
    noise = float(np.mean(e**2)) if n_bins else 0.0
    total = float(np.sum((d / e) ** 2))
    return Agreement(
        contrast.first.subset,
        contrast.second.subset,
        contrast.first.label,
        ",".join(contrast.first.against),
        by,
        n_bins,
        float(np.median(d)) if n_bins else None,
        float(np.sqrt(square)) if n_bins else None,
        float(np.sqrt(max(square - noise, 0.0))) if n_bins else None,
        total,
        float(chi2.sf(total, n_bins)) if n_bins else 1.0,
        int(np.count_nonzero(np.abs(d) > 3 * e)),
    )


_BINS_1D = tuple((name, pa.float64()) for name in ("low", "high", "centre"))
_BINS_PLANE = tuple((f"{name}_{side}", pa.float64()) for name in PLANE for side in ("low", "high"))
_QUANTILES = (
    ("n", pa.int64()),
    *((name, pa.float64()) for name in ("median", "p16", "p84", "error")),
)
_NAMES = tuple((name, pa.string()) for name in ("label", "against", "binning"))
_SAMPLE = tuple((name, pa.string()) for name in ("subset", "sample", "method"))
TREND_SCHEMA = pa.schema([*_NAMES, *_SAMPLE, ("bin", pa.int32()), *_BINS_1D, *_QUANTILES])
PLANE_SCHEMA = pa.schema([_NAMES[0], *_SAMPLE, *_BINS_PLANE, *_QUANTILES])
_CONTRAST = (
    ("n_first", pa.int64()),
    ("median_first", pa.float64()),
    ("error_first", pa.float64()),
    ("n_second", pa.int64()),
    ("median_second", pa.float64()),
    ("error_second", pa.float64()),
    ("difference", pa.float64()),
    ("error", pa.float64()),
    ("significance", pa.float64()),
    ("n_common", pa.int64()),
    ("median_common", pa.float64()),
    ("error_common", pa.float64()),
    ("significance_common", pa.float64()),
)
_PAIR = (("first", pa.string()), ("second", pa.string()))
CONTRAST_SCHEMA = pa.schema([*_NAMES, *_PAIR, ("bin", pa.int32()), *_BINS_1D, *_CONTRAST])
PLANE_CONTRAST_SCHEMA = pa.schema([_NAMES[0], *_PAIR, *_BINS_PLANE, *_CONTRAST])


def trend_table(trends: Sequence[Trend], plane: bool = False) -> pa.Table:
    """Trends as one long table.

    Parameters
    ----------
    trends : sequence of Trend
    plane : bool
        They are on the plane: cells without pairs are left out. Bins of one quantity without
        pairs stay, with ``n`` 0 and nulls.

    Returns
    -------
    pyarrow.Table
        `TREND_SCHEMA` or `PLANE_SCHEMA`.
    """
    schema = PLANE_SCHEMA if plane else TREND_SCHEMA
    return _long([(t, _of_trend(t)) for t in trends], schema, "n" if plane else None)


def contrast_table(contrasts: Sequence[Contrast], plane: bool = False) -> pa.Table:
    """Contrasts as one long table, bins with pairs of both surveys or with common stars only.

    Returns
    -------
    pyarrow.Table
        `CONTRAST_SCHEMA` or `PLANE_CONTRAST_SCHEMA`.
    """
    schema = PLANE_CONTRAST_SCHEMA if plane else CONTRAST_SCHEMA
    return _long([(c.first, _of_contrast(c)) for c in contrasts], schema, "_any")


def _of_trend(trend: Trend) -> dict[str, object]:
    q = trend.quantiles
    values = {"n": q.n, "median": q.median, "p16": q.p16, "p84": q.p84, "error": q.error}
    return {"subset": trend.subset, "sample": trend.sample, "method": trend.method, **values}


def _of_contrast(contrast: Contrast) -> dict[str, object]:
    one, other = contrast.first.quantiles, contrast.second.quantiles
    empty = np.full(len(one.n), np.nan)
    direct = (
        contrast.common.quantiles
        if contrast.common is not None
        else Quantiles(np.zeros(len(one.n), dtype=np.int64), empty, empty, empty, empty)
    )
    return {
        "first": contrast.first.subset,
        "second": contrast.second.subset,
        "n_first": one.n,
        "median_first": one.median,
        "error_first": one.error,
        "n_second": other.n,
        "median_second": other.median,
        "error_second": other.error,
        "difference": contrast.difference,
        "error": contrast.error,
        "significance": contrast.significance,
        "n_common": direct.n,
        "median_common": direct.median,
        "error_common": direct.error,
        "significance_common": _over(direct.median, direct.error),
        "_any": np.minimum(one.n, other.n) + direct.n,
    }


def _long(
    items: Sequence[tuple[Trend, dict[str, object]]], schema: pa.Schema, keep: str | None
) -> pa.Table:
    tables = [schema.empty_table()]
    for trend, values in items:
        n_bins = len(trend.low)
        columns: dict[str, object] = {
            "label": trend.label,
            "against": ",".join(trend.against),
            "binning": trend.binning,
            "bin": np.arange(n_bins),
            "low": trend.low[:, 0],
            "high": trend.high[:, 0],
            "centre": (trend.low[:, 0] + trend.high[:, 0]) / 2,
            **{f"{name}_low": trend.low[:, i] for i, name in enumerate(trend.against)},
            **{f"{name}_high": trend.high[:, i] for i, name in enumerate(trend.against)},
            **values,
        }
        table = pa.table([_column(columns[f.name], f.type, n_bins) for f in schema], schema=schema)
        if keep is not None:
            table = table.filter(pa.array(np.asarray(columns[keep]) > 0))
        tables.append(table)
    return pa.concat_tables(tables).combine_chunks()


def _column(values: object, kind: pa.DataType, n: int) -> pa.Array:
    """An Arrow column; a single text is repeated, nan becomes null."""
    if not isinstance(values, np.ndarray):
        return pa.array([values] * n, kind)
    return pa.array(values, kind, from_pandas=True)
