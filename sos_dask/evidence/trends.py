"""How surveys differ: along other quantities, from each other, and each from the truth.

Medians, percentiles and their errors are those of `stats.numbers`. Two reference surveys are
compared through the target, (target - first) - (target - second) = second - first, of different
stars in one bin; and directly, second - first of the stars that both have.

The three-cornered hat finds the error of each of three surveys from their differences alone. For
independent errors s_ab^2 = s_a^2 + s_b^2 and so on, hence s_a^2 = (s_ab^2 + s_ac^2 - s_bc^2) / 2
(Gray & Allan 1974, Proc. 28th Frequency Control Symposium, p. 243). A negative result says that the
errors are not independent, or smaller than can be told from so many stars: it is given, and
flagged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sos_dask.columns import FloatArray, FloatingArray, IntArray
from sos_dask.errors import ConfigError
from sos_dask.evidence.figures import figure_schema
from sos_dask.stats.numbers import MAD_TO_SIGMA, MIN_COUNT, Axis, binned_quantiles, bins_of

EQUAL_WIDTH, EQUAL_COUNT = "equal-width", "equal-count"
BEFORE, AFTER, FITTED = "before", "after", "fitted"
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
_SAMPLES, _BLOCK = 500, 1 << 21  # of the bootstrap of a hat; values of a block
Columns = Mapping[str, Any]
"""Of bins: arrays with one entry for each, and values that all have."""

_SAMPLE, _BIN, _QUANTILES = "subset sample method", "bin low high centre", "n median p16 p84 error"
TREND_SCHEMA = figure_schema(f"label against binning {_SAMPLE} {_BIN} {_QUANTILES}")
PLANE_SCHEMA = figure_schema(f"label {_SAMPLE} teff_low teff_high logg_low logg_high {_QUANTILES}")
CONTRAST_SCHEMA = figure_schema(
    f"label against binning first second {_BIN} n_first median_first error_first "
    "n_second median_second error_second difference error significance "
    "n_common median_common error_common significance_common"
)


class Binned(NamedTuple):
    """Rows in bins of some quantities; of several, in the cells of all."""

    edges: Mapping[str, FloatArray]
    cell: IntArray  # of each row, the last quantity fastest; -1: in none

    @classmethod
    def of(cls, x: Mapping[str, FloatingArray], edges: Sequence[FloatArray]) -> Binned:
        """Put rows into bins whose edges are as in `bins_of`: one array for each quantity.

        Raises `ConfigError` unless there is one.
        """
        if not len(x) == len(edges) > 0:
            raise ConfigError(f"{len(edges)} arrays of edges for {len(x)} quantities")
        cell: Any = 0
        inside: Any = True
        for values, bounds in zip(x.values(), edges, strict=True):
            index = bins_of(values, bounds)
            cell, inside = cell * max(len(bounds) - 1, 0) + index, inside & (index >= 0)
        return cls(dict(zip(x, edges, strict=True)), np.where(inside, cell, -1))


def trend(rows: Binned, difference: FloatingArray, **about: str | None) -> dict[str, Any]:
    """Make columns of `TREND_SCHEMA` and `PLANE_SCHEMA`: a difference against some quantities.

    The n rows are in bins of the quantities; the difference (n,) is in the unit of the label, nan
    where it is not known. Further columns are ``label``, of which the difference is; ``binning``;
    ``subset``, ``all`` pairs or those whose reference labels are of this survey; ``sample``,
    ``before`` the correction, ``after``: less what a model that was not trained on the star
    predicts, or ``fitted``: the same of the pairs that trained the model; ``method``, None before
    it.
    """
    shape = tuple(max(len(bounds) - 1, 0) for bounds in rows.edges.values())
    n_cells = int(np.prod(shape))
    found: dict[str, Any] = {**about, "against": ",".join(rows.edges), "bin": np.arange(n_cells)}
    places = np.indices(shape).reshape(len(shape), n_cells)
    for (name, bounds), place in reversed([*zip(rows.edges.items(), places, strict=True)]):
        found["low"], found["high"] = low, high = bounds[:-1][place], bounds[1:][place]
        found |= {"centre": (low + high) / 2, f"{name}_low": low, f"{name}_high": high}
    return found | binned_quantiles(rows.cell, difference, n_cells)._asdict()


def contrast(
    first: Columns, second: Columns, common: Columns | None = None, min_count: int = MIN_COUNT
) -> dict[str, Any]:
    """Compare two reference surveys: columns of `CONTRAST_SCHEMA`.

    ``difference`` is second - first through the target, ``significance`` it over its error, nan
    where all values are equal. Bins with less than ``min_count`` pairs of either are not judged:
    both are nan. Given are the `trend` of the pairs of each survey and, in the same bins of the
    first survey's labels, that of second - first on common stars.
    """
    judged = np.minimum(first["n"], second["n"]) >= max(min_count, 2)
    difference = np.where(judged, first["median"] - second["median"], np.nan)
    error = np.where(judged, np.hypot(first["error"], second["error"]), np.nan)
    if common is None:
        common = binned_quantiles(np.empty(0, np.int64), np.empty(0), len(judged))._asdict()
    found: dict[str, Any] = {**first, "first": first["subset"], "second": second["subset"]}
    found |= {"difference": difference, "error": error, "significance": _over(difference, error)}
    for name, of in (("first", first), ("second", second), ("common", common)):
        found |= {f"{key}_{name}": of[key] for key in ("n", "median", "error")}
    return found | {"significance_common": _over(common["median"], common["error"])}


def agreements(columns: Columns, min_count: int = MIN_COUNT) -> list[dict[str, Any]]:
    """Sum up all bins of a `contrast`: through the target and, where there are any, common stars.

    Each has ``first``, ``second``, ``label``, ``against``, ``binning``; ``by`` ``target`` or
    ``common``; ``n_bins`` that are judged; ``median`` and ``rms`` of second - first over them, None
    without bins; ``excess``, the rms beyond what the errors explain, ``sqrt(rms**2 -
    mean(error**2))``; ``p_value``, the chance of so large a sum of squared significances were there
    no difference; ``n_significant``, bins more than 3 errors from zero.
    """
    from scipy.special import chdtrc

    samples = {"target": (columns["difference"], columns["error"])}
    if columns["n_common"].any():
        judged = columns["n_common"] >= max(min_count, 2)
        median = np.where(judged, columns["median_common"], np.nan)
        samples["common"] = (median, columns["error_common"])
    found = []
    for by, (difference, error) in samples.items():
        judged = ~np.isnan(_over(difference, error))
        d, e = difference[judged], error[judged]
        row = {name: columns[name] for name in ("first", "second", "label", "against", "binning")}
        row |= {"by": by, "n_bins": len(d), "median": None, "rms": None, "excess": None}
        if len(d):
            square, noise = float(np.mean(d**2)), float(np.mean(e**2))
            row |= {"median": float(np.median(d)), "rms": float(np.sqrt(square))}
            row["excess"] = float(np.sqrt(max(square - noise, 0.0)))
        row["p_value"] = float(chdtrc(len(d), np.sum((d / e) ** 2))) if len(d) else 1.0
        found.append({**row, "n_significant": int(np.count_nonzero(np.abs(d) > 3 * e))})
    return found


def _over(difference: FloatArray, error: FloatArray) -> FloatArray:
    return difference / np.where(error > 0, error, np.nan)


def trend_table(trends: Sequence[Columns], plane: bool = False) -> pa.Table:
    """Put trends into one long table; cells of the plane without pairs are left out."""
    table = long_table(trends, PLANE_SCHEMA if plane else TREND_SCHEMA)
    return table.filter(pa.array(table["n"].to_numpy() > 0)) if plane else table


def contrast_table(contrasts: Sequence[Columns]) -> pa.Table:
    """Put contrasts into one long table: bins with pairs of both surveys or with common stars."""
    table = long_table(contrasts, CONTRAST_SCHEMA)
    first, second, common = (table[f"n_{one}"].to_numpy() for one in ("first", "second", "common"))
    return table.filter(pa.array(np.minimum(first, second) + common > 0))


def long_table(items: Sequence[Columns], schema: pa.Schema) -> pa.Table:
    """Put columns of bins (``bin`` among them) into one table; a single value counts for all."""
    tables = [schema.empty_table()]
    for columns in items:
        arrays = []
        for field in schema:
            value = columns[field.name]
            if not isinstance(value, np.ndarray):  # a single text is repeated
                value = [value] * len(columns["bin"])
            arrays.append(pa.array(value, field.type, from_pandas=True))
        tables.append(pa.table(arrays, schema=schema))
    return pa.concat_tables(tables).combine_chunks()


def three_cornered_hat(
    values: Sequence[FloatingArray], surveys: Sequence[str], seed: int = 0
) -> list[dict[str, Any]]:
    """Find the errors of three surveys from values (n,) of a label in each, star by star.

    Stars with a nan are left out. Constant offsets between surveys do not matter; trends between
    them count as errors. Of each ``survey`` there are ``n`` stars that all three have; ``variance``
    of its errors, from 1.4826 MAD of the differences; ``sigma``, the root, None where it is
    negative; ``low`` and ``high``, the 95 % bootstrap interval, over stars, of the signed root
    sign(variance) sqrt(abs(variance)); ``negative`` where the variance or ``low`` is below zero.
    Raises `ConfigError` unless there are three surveys with 10 stars.
    """
    from scipy.stats import bootstrap

    if len(values) != 3 or len(surveys) != 3:
        raise ConfigError(f"a three-cornered hat needs three surveys, not {len(surveys)}")
    table = np.stack([np.asarray(value, dtype=np.float64) for value in values])
    table = table[:, np.isfinite(table).all(axis=0)]
    n = table.shape[1]
    if n < 10:
        raise ConfigError(f"{', '.join(surveys)} have only {n} stars in common")
    how = {"paired": True, "method": "percentile", "rng": np.random.default_rng(seed)}
    batch = max(1, _BLOCK // n)
    resampled = bootstrap(table, _variances, n_resamples=_SAMPLES, batch=batch, **how)
    ends = resampled.confidence_interval
    found = []
    for name, variance, *limits in zip(surveys, _variances(*table), *ends, strict=True):
        low, high = (float(np.sign(limit) * np.sqrt(abs(limit))) for limit in limits)
        row: dict[str, Any] = {"survey": name, "n": n, "variance": float(variance)}
        row["sigma"] = float(np.sqrt(variance)) if variance >= 0 else None
        found.append({**row, "low": low, "high": high, "negative": bool(min(variance, low) < 0)})
    return found


def _variances(a: FloatArray, b: FloatArray, c: FloatArray, axis: int = -1) -> FloatArray:
    """Squared errors of the three along the last axis."""
    differences = np.stack([a - b, a - c, b - c])
    middle = np.median(differences, axis=-1, keepdims=True)
    mad = np.median(np.abs(differences - middle), axis=-1)
    ab, ac, bc = (MAD_TO_SIGMA * mad) ** 2
    return np.stack([ab + ac - bc, ab + bc - ac, ac + bc - ab]) / 2
