"""Bins that fail: where the median that a correction leaves is too large, and not by chance.

Bins along each of `AXES`, the first and the last open, of all held-out pairs and of each band of
S/N (`figures.BANDS`). They are counted for `PAIRS`, each once, and for `ROWS` of the catalog, each
pair as often as it stands for one.

The error of a median is that of `numbers.binned_quantiles` for the effective number of pairs: the
square of the sum of their weights over the sum of squares of weight times sign(value - median),
added over the pairs of a group of stars first, since pairs of one star are not independent (Liang &
Zeger 1986, Biometrika 73, 13); at most that of independent pairs (Kish 1965, Survey Sampling).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from sos_dask.columns import FloatArray, FloatingArray, IntArray
from sos_dask.evidence.figures import figure_schema, snr_subsets
from sos_dask.evidence.trends import long_table
from sos_dask.problem import SNR
from sos_dask.stats.bootstrap import N_GROUPS
from sos_dask.stats.numbers import ALL, MEDIAN_ERROR, Axis, bins_of

LIMITS = {"teff": 10.0, "logg": 0.02, "feh": 0.01, "rv": 0.05}  # K, dex, dex, km/s
LIMIT_SHARE = 0.1  # of the smallest held-out scatter after a correction, for any other label
RULE = (
    "A bin fails where the median is over 10 K (teff), 0.02 dex (logg), 0.01 dex (feh), 0.05 km/s "
    "(rv) or a tenth of the scatter (other labels), and over three standard errors."
)
AXES = (
    Axis("teff", 3000.0, 8500.0, 250.0),
    Axis("logg", -0.5, 5.5, 0.25),
    Axis("feh", -3.0, 1.0, 0.1),
)
PAIRS, ROWS = "pairs", "rows"
BIN_SCHEMA = figure_schema(
    "method label against band weighting bin_low bin_high n n_effective median error fails"
)


def weighted_medians(
    cells: IntArray, values: FloatArray, weights: FloatArray, groups: IntArray, n_cells: int
) -> dict[str, Any]:
    """Find ``median``, its ``error``, ``n`` and ``n_effective`` of values (n,) in cells.

    Cells rise, and the values of each. Weights are positive whole numbers, of which sums are exact;
    quantiles are linear between their middles (definition 5 of Hyndman & Fan 1996).
    """
    n, total = np.bincount(cells, minlength=n_cells), np.bincount(cells, weights, n_cells)
    up_to, last = np.cumsum(weights), np.cumsum(n)[n > 0] - 1
    middle, first = up_to - weights / 2, last - n[n > 0] + 1
    p16, median, p84 = np.full((3, n_cells), np.nan)
    for share, out in ((0.16, p16), (0.5, median), (0.84, p84)) if len(cells) else ():
        wanted = up_to[last] - (1 - share) * total[n > 0]
        out[n > 0] = np.interp(np.clip(wanted, middle[first], middle[last]), middle, values)
    signs = weights * np.sign(values - median[cells])
    of_groups = np.bincount(cells * N_GROUPS + groups, signs, n_cells * N_GROUPS)
    squares = np.square(of_groups).reshape(n_cells, N_GROUPS).sum(axis=1)
    squares = np.maximum(squares, np.bincount(cells, weights**2, n_cells))
    effective = total**2 / np.where(n > 0, squares, 1.0)
    error = MEDIAN_ERROR * (p84 - p16) / 2 / np.sqrt(np.where(n > 1, effective, np.nan))
    return {"n": n, "n_effective": effective, "median": median, "error": error}


def failing_bins(
    label: str,
    limit: float,
    residuals: Mapping[str, FloatingArray],
    labels: Mapping[str, FloatingArray],
    groups: IntArray,
    weights: Mapping[str, FloatArray],
    min_count: int,
) -> pa.Table:
    """Measure the bins of one label: a table of `BIN_SCHEMA`.

    ``residuals`` (n,) are by method: pairs with a nan in one count for none. ``labels`` are those
    of the target, and S/N where it is known. ``weights``, whole numbers, are by weighting. Bins
    with an effective number below ``min_count`` are not judged: ``fails`` is null.
    """
    known = np.logical_and.reduce([np.isfinite(values) for values in residuals.values()])
    bands = {ALL: known, **{n: known & x for n, x in snr_subsets(labels.get(SNR)).items()}}
    axes = [axis for axis in AXES if axis.name in labels]
    places = {x.name: bins_of(labels[x.name], np.r_[-np.inf, x.edges, np.inf]) for x in axes}
    found = []
    for (method, values), axis in itertools.product(residuals.items(), axes):
        low, high = np.append(np.nan, axis.edges), np.append(axis.edges, np.nan)
        place = np.where(known, places[axis.name], -1)
        order = np.argsort(values, kind="stable")
        order = order[np.argsort(place[order].astype(np.int16), kind="stable")]
        for (band, inside), (weighting, weight) in itertools.product(
            bands.items(), weights.items()
        ):
            used = order[(inside & (place >= 0) & (weight > 0))[order]]
            given = place[used], values[used].astype(np.float64), weight[used], groups[used]
            row = weighted_medians(*given, len(low))
            fails = np.abs(row["median"]) > np.maximum(limit, 3 * row["error"])
            judged = (row["n"] > 1) & (row["n_effective"] >= min_count)
            row["fails"] = np.where(judged, fails.astype(object), np.array(None))
            row |= {"method": method, "label": label, "against": axis.name, "band": band}
            row |= {"weighting": weighting, "bin": low, "bin_low": low, "bin_high": high}
            found.append(row)
    table = long_table(found, BIN_SCHEMA)
    return table.filter(pa.array(table["n"].to_numpy() > 0))


def count_failing(table: pa.Table) -> list[dict[str, Any]]:
    """Count bins that fail and that are judged: ``counts`` by weighting and band.

    An entry for each method, label and axis, and for ``all`` labels ``against`` all of a method.
    """
    rows = table.to_pylist()
    kinds = dict.fromkeys(f"{row['weighting']} {row['band']}" for row in rows)
    found: dict[tuple[str, str, str], dict[str, list[int]]] = {}
    for row in rows:
        for place in ((row["label"], row["against"]), (ALL, ALL)):
            counts = found.setdefault((row["method"], *place), {kind: [0, 0] for kind in kinds})
            of = counts[f"{row['weighting']} {row['band']}"]
            of[:] = of[0] + (row["fails"] or 0), of[1] + (row["fails"] is not None)
    names = ("method", "label", "against")
    entries = [dict(zip(names, key, strict=True)) | {"counts": n} for key, n in found.items()]
    return sorted(entries, key=lambda entry: entry["label"] == ALL)
