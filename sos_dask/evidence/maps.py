"""Counts of rows inside, sparse and outside: on the sky, in the Kiel diagram, in label space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.columns import IntArray
from sos_dask.evidence.widening import CLASSES, OUTSIDE
from sos_dask.sky.healpix import MAX_ORDER

Columns = Mapping[str, NDArray[np.floating]]

SKY_ORDER = 4
STEPS = {
    "kiel": {"teff": 100.0, "logg": 0.1},
    "labels": {"teff": 250.0, "logg": 0.25, "feh": 0.25},
}
"""Width of the cells of each map; a cell begins at a whole multiple of it."""
_BITS, _OFFSET = 16, 1 << 15
_COUNTS = (*CLASSES, "n_g", "sum_g")
_AT_ONCE = 32

MAP_SCHEMA = pa.schema(
    [
        pa.field("map", pa.string(), False, {"description": "sky, kiel or labels"}),
        pa.field("pixel", pa.int64(), True, {"description": f"HEALPix order {SKY_ORDER}, NESTED"}),
        pa.field("teff", pa.float32(), metadata={"unit": "K", "description": "middle of the cell"}),
        pa.field("logg", pa.float32(), metadata={"unit": "dex", "description": "middle"}),
        pa.field("feh", pa.float32(), metadata={"unit": "dex", "description": "middle"}),
        *(pa.field(name, pa.int64(), False) for name in CLASSES),
        pa.field(
            "phot_g_mean_mag",
            pa.float32(),
            metadata={"unit": "mag", "description": "mean Gaia G of the rows outside"},
        ),
    ]
)


def count_maps(cells: IntArray, columns: Columns, place: NDArray[np.int8]) -> pa.Table:
    """Count the rows of one partition in every map.

    Parameters
    ----------
    cells : ndarray of int64, shape (n,)
        ``_healpix_29``.
    columns : mapping of str to ndarray of float, shape (n,)
        Labels, and ``phot_g_mean_mag`` where there is one; nan where unknown.
    place : ndarray of int8, shape (n,)
        Class of each row; -1 for rows that are not counted.

    Returns
    -------
    pyarrow.Table
        ``map``, ``cell``, one column a class, ``n_g`` and ``sum_g`` of the rows outside.
    """
    counted = place >= 0
    for name in STEPS["labels"]:
        counted &= np.isfinite(columns[name])
    rows = np.flatnonzero(counted)
    place = place[rows]
    g = np.asarray(columns.get("phot_g_mean_mag", np.full(len(cells), np.nan)))[rows]
    # In thousandths, so that sums are exact in any order.
    milli_g = np.where(np.isfinite(g), np.rint(np.nan_to_num(g) * 1000), 0).astype(np.int64)
    has_g = np.isfinite(g) & (place == OUTSIDE)
    keys = {"sky": cells[rows] >> 2 * (MAX_ORDER - SKY_ORDER)}
    for name, steps in STEPS.items():
        key = np.zeros(len(rows), dtype=np.int64)
        for label, step in steps.items():
            bin_of = np.floor(columns[label][rows] / step).astype(np.int64) + _OFFSET
            key = (key << _BITS) | np.clip(bin_of, 0, (1 << _BITS) - 1)
        keys[name] = key
    tables = []
    for name, key in keys.items():
        found, inverse = np.unique(key, return_inverse=True)
        n = len(found)
        counts = [np.bincount(inverse[place == c], minlength=n) for c in range(len(CLASSES))]
        n_g = np.bincount(inverse[has_g], minlength=n)
        sum_g = np.zeros(n, dtype=np.int64)
        np.add.at(sum_g, inverse[has_g], milli_g[has_g])
        tables.append(
            pa.table(
                [pa.array([name] * n, pa.string()), *map(pa.array, (found, *counts, n_g, sum_g))],
                names=["map", "cell", *CLASSES, "n_g", "sum_g"],
            )
        )
    return pa.concat_tables(tables)


def sum_maps(parts: Iterable[pa.Table]) -> pa.Table:
    """Maps of the whole catalog from the counts of its partitions; ``MAP_SCHEMA``, sorted.

    Parameters
    ----------
    parts : iterable of pyarrow.Table
        Of `count_maps`; a bounded number of them is held at once.
    """
    left = iter(parts)
    total = _added(list(islice(left, _AT_ONCE)))
    while batch := list(islice(left, _AT_ONCE)):
        total = _added([total, *batch])
    total = total.sort_by([("map", "ascending"), ("cell", "ascending")])
    kind = total["map"].to_numpy(zero_copy_only=False)
    cell = total["cell"].to_numpy()
    labels = {label: np.full(len(cell), np.nan, np.float32) for label in STEPS["labels"]}
    for name, steps in STEPS.items():
        rest = cell[kind == name]
        for label, step in reversed(steps.items()):
            labels[label][kind == name] = ((rest & ((1 << _BITS) - 1)) - _OFFSET + 0.5) * step
            rest = rest >> _BITS
    n_g = total["n_g"].to_numpy()
    mean_g = total["sum_g"].to_numpy() / 1000.0 / np.maximum(n_g, 1)
    columns = [
        total["map"],
        pa.array(cell, mask=kind != "sky"),
        *(pa.array(values, mask=np.isnan(values)) for values in labels.values()),
        *(total[name] for name in CLASSES),
        pa.array(mean_g.astype(np.float32), mask=n_g == 0),
    ]
    return pa.table(columns, names=MAP_SCHEMA.names).cast(MAP_SCHEMA)


def _added(counts: Sequence[pa.Table]) -> pa.Table:
    """Counts of equal cells in one row."""
    together = pa.concat_tables(counts).group_by(["map", "cell"])
    total = together.aggregate([(name, "sum") for name in _COUNTS])
    return total.rename_columns({f"{name}_sum": name for name in _COUNTS})


def follow_up(maps: pa.Table, n: int = 10) -> list[dict[str, float | int | None]]:
    """Cells of label space where references are missed most: those with most rows outside.

    Returns
    -------
    list of dict
        At most ``n``, by falling number of rows outside: middle of the cell, rows outside, all
        rows, mean Gaia G of the rows outside (None where unknown).
    """
    rows = [row for row in maps.to_pylist() if row["map"] == "labels" and row["outside"]]
    rows.sort(key=lambda row: (-row["outside"], row["teff"], row["logg"], row["feh"]))
    return [
        {
            "teff": row["teff"],
            "logg": row["logg"],
            "feh": row["feh"],
            "outside": row["outside"],
            "rows": sum(row[name] for name in CLASSES),
            "phot_g_mean_mag": row["phot_g_mean_mag"],
        }
        for row in rows[:n]
    ]


def coarse(maps: pa.Table, name: str, steps: Mapping[str, float]) -> list[dict[str, Any]]:
    """Cells of a map added up to larger ones: their middles (first pixels), rows and outside."""
    total: dict[tuple[float, ...], list[int]] = {}
    for row in maps.filter(pc.equal(maps["map"], name)).to_pylist():
        cell = tuple(row[column] // step for column, step in steps.items())
        counts = total.setdefault(cell, [0, 0])
        counts[0] += sum(row[kind] for kind in CLASSES)
        counts[1] += row["outside"]
    found = []
    for cell, (n_rows, outside) in sorted(total.items()):
        place: dict[str, Any] = {
            column: int(index) if column == "pixel" else (index + 0.5) * step
            for index, (column, step) in zip(cell, steps.items(), strict=True)
        }
        found.append({**place, "rows": n_rows, "outside": outside})
    return found
