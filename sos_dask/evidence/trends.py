"""Trends: how the difference target - reference runs with another quantity.

Medians, percentiles and their errors are those of `stats.binned`. Two reference surveys are
compared through the target, (target - first) - (target - second) = second - first, of different
stars in one bin; and directly, second - first of the stars that both have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sos_dask.errors import ConfigError
from sos_dask.sky.healpix import FloatArray, IntArray
from sos_dask.stats.binned import MIN_COUNT, Axis, Quantiles, binned_quantiles, bins_of

EQUAL_WIDTH, EQUAL_COUNT = "equal-width", "equal-count"
BEFORE, AFTER, FITTED = "before", "after", "fitted"
ALL = "all"
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


def _fields(kind: pa.DataType, *names: str) -> tuple[tuple[str, pa.DataType], ...]:
    return tuple((name, kind) for name in names)


_BIN = (("bin", pa.int32()), *_fields(pa.float64(), "low", "high", "centre"))
_CELL = _fields(pa.float64(), *(f"{name}_{side}" for name in PLANE for side in ("low", "high")))
_NAMES = _fields(pa.string(), "label", "against", "binning")
_SAMPLE = _fields(pa.string(), "subset", "sample", "method")
_PAIR = _fields(pa.string(), "first", "second")
_QUANTILES = (("n", pa.int64()), *_fields(pa.float64(), "median", "p16", "p84", "error"))
_CONTRAST = (
    *(("n_first", pa.int64()), *_fields(pa.float64(), "median_first", "error_first")),
    *(("n_second", pa.int64()), *_fields(pa.float64(), "median_second", "error_second")),
    *_fields(pa.float64(), "difference", "error", "significance"),
    *(("n_common", pa.int64()), *_fields(pa.float64(), "median_common", "error_common")),
    ("significance_common", pa.float64()),
)
TREND_SCHEMA = pa.schema([*_NAMES, *_SAMPLE, *_BIN, *_QUANTILES])
PLANE_SCHEMA = pa.schema([_NAMES[0], *_SAMPLE, *_CELL, *_QUANTILES])
CONTRAST_SCHEMA = pa.schema([*_NAMES, *_PAIR, *_BIN, *_CONTRAST])
PLANE_CONTRAST_SCHEMA = pa.schema([_NAMES[0], *_PAIR, *_CELL, *_CONTRAST])


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
        A bin includes its lower edges; the last one along a quantity its upper edge, too.
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
    """Bin a difference by one quantity, or by several at once.

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
    n_cells = int(np.prod(shape))
    index = np.stack([bins_of(values, bounds) for values, bounds in zip(x, edges, strict=True)])
    inside = (index >= 0).all(axis=0)
    cell: IntArray = np.full(len(difference), -1, dtype=np.int64)
    if n_cells:
        cell[inside] = np.ravel_multi_index(tuple(index[:, inside]), shape)
    place = np.indices(shape).reshape(len(shape), n_cells)
    low = [bounds[:-1][at] for bounds, at in zip(edges, place, strict=True)]
    high = [bounds[1:][at] for bounds, at in zip(edges, place, strict=True)]
    quantiles = binned_quantiles(cell, difference, n_cells)
    sides = np.stack(low, axis=1), np.stack(high, axis=1)
    return Trend(label, against, binning, subset, sample, method, *sides, quantiles)


@dataclass(frozen=True, eq=False)
class Contrast:
    """Two reference surveys, compared through the target and on the stars that both have.

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
    def columns(self) -> dict[str, NDArray[Any]]:
        """Columns of `CONTRAST_SCHEMA` bin by bin, nan where a bin is not judged.

        ``difference`` is second - first through the target, ``significance`` it over its error,
        nan where all values are equal.
        """
        one, other = self.first.quantiles, self.second.quantiles
        judged = np.minimum(one.n, other.n) >= max(self.min_count, 2)
        difference = np.where(judged, one.median - other.median, np.nan)
        error = np.where(judged, np.hypot(one.error, other.error), np.nan)
        found: dict[str, NDArray[Any]] = {"difference": difference, "error": error}
        found["significance"] = _over(difference, error)
        nothing = binned_quantiles(np.empty(0, np.int64), np.empty(0), len(one.n))
        direct = nothing if self.common is None else self.common.quantiles
        for name, of in (("first", one), ("second", other), ("common", direct)):
            found |= {f"n_{name}": of.n, f"median_{name}": of.median, f"error_{name}": of.error}
        found["significance_common"] = _over(direct.median, direct.error)
        return found

    def agreements(self) -> list[dict[str, Any]]:
        """Sum up all bins: through the target and, where there are any, on common stars.

        Returns
        -------
        list of dict
            ``first``, ``second``, ``label``, ``against``; ``by`` ``target`` or ``common``;
            ``n_bins`` that are judged; ``median`` and ``rms`` of second - first over them, None
            without bins; ``excess``, the rms beyond what the errors explain, ``sqrt(rms**2 -
            mean(error**2))``; ``chi2``, sum of squared significances, and ``p_value``, the chance
            of one so large were there no difference; ``n_significant``, bins more than 3 errors
            from zero.
        """
        columns = self.columns
        found = [self._agreement("target", columns["difference"], columns["error"])]
        if self.common is not None:
            judged = columns["n_common"] >= max(self.min_count, 2)
            median, error = (
                np.where(judged, columns[f"{name}_common"], np.nan) for name in ("median", "error")
            )
            found.append(self._agreement("common", median, error))
        return found

    def _agreement(self, by: str, difference: FloatArray, error: FloatArray) -> dict[str, Any]:
        from scipy.special import chdtrc

        judged = ~np.isnan(_over(difference, error))
        d, e = difference[judged], error[judged]
        n_bins = len(d)
        square, noise = (float(np.mean(v**2)) if n_bins else 0.0 for v in (d, e))
        total = float(np.sum((d / e) ** 2))
        return {
            "first": self.first.subset,
            "second": self.second.subset,
            "label": self.first.label,
            "against": ",".join(self.first.against),
            "by": by,
            "n_bins": n_bins,
            "median": float(np.median(d)) if n_bins else None,
            "rms": float(np.sqrt(square)) if n_bins else None,
            "excess": float(np.sqrt(max(square - noise, 0.0))) if n_bins else None,
            "chi2": total,
            "p_value": float(chdtrc(n_bins, total)) if n_bins else 1.0,
            "n_significant": int(np.count_nonzero(np.abs(d) > 3 * e)),
        }


def _over(difference: FloatArray, error: FloatArray) -> FloatArray:
    return difference / np.where(error > 0, error, np.nan)


def trend_table(trends: Sequence[Trend], plane: bool = False) -> pa.Table:
    """Put trends into one long table.

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
    tables = [(PLANE_SCHEMA if plane else TREND_SCHEMA).empty_table()]
    for one in trends:
        about = {"subset": one.subset, "sample": one.sample, "method": one.method}
        columns = about | asdict(one.quantiles)
        tables.append(_long(one, columns, tables[0].schema, one.quantiles.n > 0 if plane else None))
    return pa.concat_tables(tables).combine_chunks()


def contrast_table(contrasts: Sequence[Contrast], plane: bool = False) -> pa.Table:
    """Put contrasts into one long table: bins with pairs of both surveys or with common stars.

    Returns
    -------
    pyarrow.Table
        `CONTRAST_SCHEMA` or `PLANE_CONTRAST_SCHEMA`.
    """
    tables = [(PLANE_CONTRAST_SCHEMA if plane else CONTRAST_SCHEMA).empty_table()]
    for one in contrasts:
        columns = one.columns
        n = np.minimum(columns["n_first"], columns["n_second"]) + columns["n_common"]
        pair = {"first": one.first.subset, "second": one.second.subset}
        tables.append(_long(one.first, {**columns, **pair}, tables[0].schema, n > 0))
    return pa.concat_tables(tables).combine_chunks()


def _long(
    trend: Trend,
    values: Mapping[str, object],
    schema: pa.Schema,
    kept: NDArray[np.bool_] | None,
) -> pa.Table:
    """One row a bin, or of those that are kept."""
    n_bins, low, high = len(trend.low), trend.low[:, 0], trend.high[:, 0]
    columns: dict[str, object] = {
        "label": trend.label,
        "against": ",".join(trend.against),
        "binning": trend.binning,
        "bin": np.arange(n_bins),
        "low": low,
        "high": high,
        "centre": (low + high) / 2,
        **{f"{name}_low": trend.low[:, i] for i, name in enumerate(trend.against)},
        **{f"{name}_high": trend.high[:, i] for i, name in enumerate(trend.against)},
        **values,
    }
    arrays = []
    for field in schema:
        value = columns[field.name]
        if not isinstance(value, np.ndarray):  # a single text is repeated
            value = [value] * n_bins
        arrays.append(pa.array(value, field.type, from_pandas=True))
    table = pa.table(arrays, schema=schema)
    return table if kept is None else table.filter(pa.array(kept))
