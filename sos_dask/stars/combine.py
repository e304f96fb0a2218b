"""One row for each star.

* The *used* rows of a star are those with ``quality`` 0, or all where none has it; ``n_used``
  counts them. The star's ``quality`` is 0 in the first case; in the second the bits that all
  rows have, or all bits that any has where they have none in common.
* ``teff``, ``logg``, ``feh``, ``rv`` and the further ``labels`` are combined over the used rows
  that have them, their errors ``*_err`` with them.
  ``inverse-variance``: mean with weights 1 / error**2; rows without a positive error are left
  out, but where no row has one the mean is plain and its error null. ``median``: its error is
  sqrt(pi / 2) times the rms error over sqrt(n), without that factor for two rows, whose median
  is the mean. ``best-snr``: the values of the best row, which is the used row with the highest
  ``snr`` (ties: smallest ``obs_id``; null last).
* ``snr`` is the root of the sum of squares, with ``best-snr`` that of the row.
* ``ra``, ``dec``, ``position_epoch`` and ``_healpix_29`` are those of the primary row. Gaia ids
  and the pair of proper motions are those of the best row, or else of the first that has
  them, in the order of ``obs_id``. Every other column is that of the best row.
* The spread of ``teff``, ``logg`` and ``feh`` is the sample standard deviation over the used rows;
  ``flag_spread`` is set where any is over ``max_spread`` times the expected error: the rms of the
  stated errors, or ``expected_error``. A label with neither is not flagged.

Sums are in double precision over rows in the order of ``obs_id``, so they do not depend on the
order of the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.columns import (
    BoolArray,
    FloatingArray,
    IntArray,
    as_array,
    is_valid,
    one_array,
    reals_or_nan,
)
from sos_dask.errors import PartitionError
from sos_dask.schema import HEALPIX_COLUMN, LABELS, QUALITY, Column, require_columns
from sos_dask.sky.neighbours import order_by, runs
from sos_dask.stars.group import DedupeSettings, rank_of
from sos_dask.stats.numbers import MEDIAN_ERROR

_OF_PRIMARY = (HEALPIX_COLUMN, "obs_id", "ra", "dec", "position_epoch")
_MOTION = ("pmra", "pmdec")


def combine(
    table: pa.Table,
    primary: IntArray,
    settings: DedupeSettings,
    expected_error: Mapping[str, float],
) -> pa.Table:
    """Combine the observations of each star into one row, by the rule of this module.

    Observations have ``_healpix_29``, ``obs_id``, ``ra``, ``dec``, ``quality`` and any other
    columns; text may be coded by a dictionary, that of the stars is plain. ``primary`` (n,) is the
    row number of each row's primary (`group`); -1 for a row that is left out. ``expected_error``,
    of one observation by label, is used where none is stated.

    Stars have ``_healpix_29``, ``star_id``, ``n_obs``, ``n_used``, ``ra``, ``dec``, the other
    columns in their order, the spread of each label, ``flag_spread``, ``quality``; sorted by
    (``_healpix_29``, ``star_id``).

    Raises `ConfigError`: a column is missing; `PartitionError`: ``primary`` names rows that are no
    primaries.
    """
    required = (HEALPIX_COLUMN, "obs_id", "ra", "dec", "quality")
    require_columns(table.schema, required, "the observations to be combined")
    is_out = primary < 0
    if len(primary) != table.num_rows or not (is_out | (primary[primary] == primary)).all():
        raise PartitionError("primaries do not belong to the rows to be combined")
    schema = _star_schema(table.schema)
    if not table.num_rows:
        return schema.empty_table()
    leaders = np.flatnonzero(primary == np.arange(len(primary)))
    # Most often in the first of two chunks: nothing is copied into one.
    leading = table.slice(0, leaders[-1] + 1 if len(leaders) else 0)
    leaders = leaders[sky_order(leading, leaders, "obs_id")]
    repeats, columns = _combined(table, primary, leaders, settings, expected_error)
    source = leaders.copy()
    source[repeats.star] = repeats.best
    for name in table.schema.names:
        if name in _OF_PRIMARY:
            columns[name] = _taken(leading.column(name), leaders)
        elif name not in columns:
            rows = source
            if name in _MOTION and set(_MOTION) <= set(table.schema.names):
                rows = _having(table, _MOTION, source, repeats)
            elif name.startswith("gaia_") and name.endswith("_source_id"):
                rows = _having(table, (name,), source, repeats)
            columns[name] = _taken(table.column(name), rows)
    columns["star_id"] = columns.pop("obs_id")
    return pa.table([columns[name] for name in schema.names], schema=schema)


class _Repeats(NamedTuple):
    """Stars with several observations: number of the star, its rows by ``obs_id``, the best row.

    The rows of a star are row[first[s]:first[s + 1]].
    """

    star: IntArray
    first: IntArray
    row: IntArray
    best: IntArray


def _combined(
    table: pa.Table,
    primary: IntArray,
    leaders: IntArray,
    settings: DedupeSettings,
    expected_error: Mapping[str, float],
) -> tuple[_Repeats, dict[str, pa.Array]]:
    """Stars with several observations, and the columns of all stars that are combined."""
    from sos_dask.sky.loops import choose, repeated, sort_members

    snr, quality = reals_or_nan(table, "snr"), one_array(table.column("quality")).to_numpy()
    of_star, first, row = repeated(primary)
    number = np.empty(len(primary), dtype=np.int64)
    number[leaders] = np.arange(len(leaders))
    star = number[of_star]
    sort_members(first, row, _keys(table.column("obs_id"), row))
    used_first, used_row, best, bits, total_snr = choose(first, row, quality, snr)
    source = leaders.copy()
    source[star] = best

    def with_stars(of_all: NDArray[Any], of_stars: NDArray[Any]) -> NDArray[Any]:
        of_all[star] = of_stars
        return of_all

    flag = np.zeros(len(leaders), dtype=np.bool_)
    merged = {"snr": (snr, total_snr)}
    columns: dict[str, pa.Array] = {}
    median_error = MEDIAN_ERROR if settings.method == "median" else 0.0
    further = (name for name in ("rv", *settings.labels) if name in table.schema.names)
    for label in (*LABELS, *further):
        values, errors = reals_or_nan(table, label), reals_or_nan(table, f"{label}_err")
        limits = expected_error.get(label, np.nan), settings.max_spread, median_error
        value, error, spread, is_wide = label_of_stars(used_first, used_row, values, errors, limits)
        merged |= {label: (values, value), f"{label}_err": (errors, error)}
        if label in LABELS:
            flag[star] |= is_wide
            no_spread = np.full(len(leaders), np.nan, dtype=np.float32)
            columns[f"{label}_spread"] = _nullable(with_stars(no_spread, spread), pa.float32())
    if settings.method != "best-snr":
        for name in merged.keys() & set(table.schema.names):
            of_stars = with_stars(merged[name][0].take(source), merged[name][1])
            columns[name] = _nullable(of_stars, table.schema.field(name).type)
    n_obs, n_used = np.ones((2, len(leaders)), dtype=np.int32)
    columns |= {
        "n_obs": pa.array(with_stars(n_obs, np.diff(first))),
        "n_used": pa.array(with_stars(n_used, np.diff(used_first))),
        "quality": pa.array(with_stars(quality.take(source), bits)),
        "flag_spread": pa.array(flag),
    }
    return _Repeats(star, first, row, best), columns


def _having(
    table: pa.Table, names: tuple[str, ...], source: IntArray, repeats: _Repeats
) -> IntArray:
    """Row of each star that gives columns: the best row, or else the first that has them all."""
    if not any(table.column(name).null_count for name in names):
        return source
    has = np.all([is_valid(table.column(name)) for name in names], axis=0)
    lacking = np.flatnonzero(~has[repeats.best])
    # Places of their rows, those of them that have them, and the first of each star.
    first, stop = repeats.first[lacking], repeats.first[lacking + 1]
    place = runs(first, stop - first)
    having = np.append(place[has[repeats.row[place]]], len(repeats.row))
    at = having[np.searchsorted(having, first)]
    found = at < stop
    rows = source.copy()
    rows[repeats.star[lacking[found]]] = repeats.row[at[found]]
    return rows


def _taken(column: pa.ChunkedArray, rows: IntArray) -> pa.Array:
    """Rows of a column; text that is coded becomes plain."""
    values = pc.take(one_array(column), pa.array(rows), boundscheck=False)
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _star_schema(schema: pa.Schema) -> pa.Schema:
    """Fields of the stars in their order."""

    def key(name: str, dtype: pa.DataType, ucd: str, text: str) -> pa.Field:
        return pa.field(name, dtype, False, {"ucd": ucd, "description": text})

    others, spreads = [], []
    for field in schema:
        coded = pa.types.is_dictionary(field.type)
        if field.name not in (HEALPIX_COLUMN, "obs_id", "ra", "dec", "quality"):
            others.append(field.with_type(field.type.value_type) if coded else field)
    for label in LABELS:
        metadata = dict(schema.field(label).metadata or {}) if label in schema.names else {}
        unit, text = metadata.get(b"unit", b"").decode(), f"Standard deviation of {label}"
        spreads.append(Column(f"{label}_spread", "float32", unit, "", text).arrow())
    text = "Key of the star: that of its primary observation"
    return pa.schema([
        schema.field(HEALPIX_COLUMN),
        key("star_id", schema.field("obs_id").type, "meta.id;meta.main", text),
        key("n_obs", pa.int32(), "meta.number", "Observations of the star"),
        key("n_used", pa.int32(), "meta.number", "Observations that were combined"),
        schema.field("ra"),
        schema.field("dec"),
        *others,
        *spreads,
        pa.field("flag_spread", pa.bool_(), False, {"description": "Spread over the limit"}),
        QUALITY.arrow(nullable=False),
    ])  # fmt: skip


def label_of_stars(
    first: IntArray,
    row: IntArray,
    values: FloatingArray,
    errors: FloatingArray,
    limits: tuple[float, float, float],
) -> tuple[FloatingArray, FloatingArray, NDArray[np.float32], BoolArray]:
    """Combine a label of some stars, which may be none, as `loops.combine_label` does."""
    if len(first) == 1:  # nothing that would be worth the import of numba
        return values[:0], errors[:0], np.empty(0, dtype=np.float32), np.empty(0, dtype=np.bool_)
    from sos_dask.sky.loops import combine_label

    if values.dtype != errors.dtype:
        values, errors = values.astype(np.float64), errors.astype(np.float64)
    return combine_label(first, row, values, errors, limits)


def _nullable(values: FloatingArray, dtype: pa.DataType) -> pa.Array:
    """Array with null for NaN."""
    return as_array(values, ~np.isnan(values)).cast(dtype)


def sky_order(table: pa.Table, rows: IntArray, key: str) -> IntArray:
    """Order some rows by (``_healpix_29``, key); the keys of few are needed."""
    cells = table.column(HEALPIX_COLUMN).to_numpy()[rows]
    return order_by((cells,), lambda some: rank_of(table.column(key).take(pa.array(rows[some]))))


def _keys(keys: pa.ChunkedArray, rows: IntArray) -> IntArray:
    """Keys as integers in the same order; of text only those of some rows."""
    if pa.types.is_integer(keys.type):
        return rank_of(one_array(keys))
    out = np.zeros(len(keys), dtype=np.int64)
    out[rows] = rank_of(keys.take(pa.array(rows)))
    return out
