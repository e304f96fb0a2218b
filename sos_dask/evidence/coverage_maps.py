"""Maps of the coverage: rows of each class on the sky, in the Kiel diagram and in label space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.columns import Columns, IntArray, column_or_nan
from sos_dask.evidence.widening import CLASSES, OUTSIDE
from sos_dask.sky.healpix import MAX_ORDER

SKY_ORDER = 4
STEPS = {"kiel": {"teff": 100.0, "logg": 0.1}, "labels": {"teff": 250.0, "logg": 0.25, "feh": 0.25}}
"""Width of the cells of each map; a cell begins at a whole multiple of it."""
_AT_ONCE = 32

_G_MEANS = {"unit": "mag", "description": "mean Gaia G of the rows outside"}
MAP_SCHEMA = pa.schema(
    [
        pa.field("map", pa.string(), False, {"description": "sky, kiel or labels"}),
        pa.field("pixel", pa.int64(), True, {"description": f"HEALPix order {SKY_ORDER}, NESTED"}),
        pa.field("teff", pa.float32(), metadata={"unit": "K", "description": "middle of the cell"}),
        pa.field("logg", pa.float32(), metadata={"unit": "dex", "description": "middle"}),
        pa.field("feh", pa.float32(), metadata={"unit": "dex", "description": "middle"}),
        *(pa.field(name, pa.int64(), False) for name in CLASSES),
        pa.field("phot_g_mean_mag", pa.float32(), metadata=_G_MEANS),
    ]
)


_KEYS, _COUNTED = ("pixel", *STEPS["labels"]), (*CLASSES, "n_g", "sum_g")


def count_maps(cells: IntArray, columns: Columns, place: NDArray[np.int8]) -> pa.Table:
    """Count the rows of one partition, by ``_healpix_29`` (n,) and labels (n,), in every map.

    Rows without a class (n,), -1, or with an unknown label of the map are not counted. Columns are
    those of `MAP_SCHEMA`, but for ``n_g`` and ``sum_g`` of the rows outside.
    """
    rows = np.flatnonzero(place >= 0)
    place, g = place[rows], column_or_nan(columns, "phot_g_mean_mag", len(cells))[rows]
    has_g = np.isfinite(g) & (place == OUTSIDE)
    counts = {name: place == number for number, name in enumerate(CLASSES)}
    # In thousandths, so that sums are exact in any order.
    sum_g = np.rint(np.where(has_g, g, 0) * 1000).astype(np.int64)
    labels = {name: column_or_nan(columns, name, len(cells))[rows] for name in STEPS["labels"]}
    keys: dict[str, dict[str, NDArray[Any]]]
    keys = {"sky": {"pixel": cells[rows] >> 2 * (MAX_ORDER - SKY_ORDER)}}
    for name, steps in STEPS.items():
        keys[name] = {
            label: ((np.floor(labels[label] / step) + 0.5) * step).astype(np.float32)
            for label, step in steps.items()
        }
    tables = []
    for name, of_map in keys.items():
        every_row = pa.table({**of_map, **counts, "n_g": has_g, "sum_g": sum_g})
        known = np.logical_and.reduce([np.isfinite(values) for values in of_map.values()])
        found = _added([every_row.filter(pa.array(known))], list(of_map))
        tables.append(found.append_column("map", pa.repeat(name, found.num_rows)))
    columns = {"map": pa.string(), **{key: MAP_SCHEMA.field(key).type for key in _KEYS}}
    schema = pa.schema([*columns.items(), *((name, pa.int64()) for name in _COUNTED)])
    return pa.concat_tables(tables, promote_options="permissive").select(schema.names).cast(schema)


def _added(counts: list[pa.Table], keys: Sequence[str] = ("map", *_KEYS)) -> pa.Table:
    """Counts of equal cells in one row."""
    total = pa.concat_tables(counts).group_by(keys).aggregate([(n, "sum") for n in _COUNTED])
    return total.rename_columns({f"{name}_sum": name for name in _COUNTED})


def sum_maps(parts: Iterable[pa.Table]) -> pa.Table:
    """Maps of the whole catalog from the `count_maps` of its partitions; ``MAP_SCHEMA``, sorted.

    A bounded number of the partitions is in memory at once.
    """
    left, total = iter(parts), pa.table({})
    while batch := list(islice(left, _AT_ONCE)):
        total = _added([total, *batch] if total.num_columns else batch)
    total = total.sort_by([(name, "ascending") for name in ("map", *_KEYS)])
    n_g = total["n_g"].to_numpy()
    mean_g = total["sum_g"].to_numpy() / 1000.0 / np.maximum(n_g, 1)
    magnitude = pa.array(mean_g.astype(np.float32), mask=n_g == 0)
    total = total.drop_columns(["n_g", "sum_g"])
    return total.append_column(MAP_SCHEMA.names[-1], magnitude).cast(MAP_SCHEMA)


def follow_up(maps: pa.Table, n: int = 10) -> list[dict[str, float | int | None]]:
    """Cells of label space where references are missed most: the n with most rows outside.

    Each has its middle, the rows outside, all rows, and the mean Gaia G of the rows outside (None
    where unknown).
    """
    rows = [row for row in maps.to_pylist() if row["map"] == "labels" and row["outside"]]
    rows.sort(key=lambda row: (-row["outside"], row["teff"], row["logg"], row["feh"]))
    names = ("teff", "logg", "feh", "outside", "rows", "phot_g_mean_mag")
    found = [row | {"rows": sum(row[name] for name in CLASSES)} for row in rows[:n]]
    return [{name: row[name] for name in names} for row in found]


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
