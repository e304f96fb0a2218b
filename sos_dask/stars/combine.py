"""One row for each star.

* The *used* rows of a star are those with ``quality`` 0, or all where none has it; ``n_used``
  counts them. The star's ``quality`` is 0 in the first case; in the second the bits that all
  rows have, or all bits that any has where they have none in common.
* ``teff``, ``logg``, ``feh`` and ``rv`` are combined over the used rows that have them.
  ``inverse-variance``: mean with weights 1 / error**2; rows without a positive error are left
  out, but where no row has one the mean is plain and its error null. ``median``: its error is
  sqrt(pi / 2) times the rms error over sqrt(n), without that factor for two rows, whose median
  is the mean. ``best-snr``: the values of the best row, which is the used row with the highest
  ``snr`` (ties: smallest ``obs_id``; null last).
* ``snr`` is the root of the sum of squares, with ``best-snr`` that of the row.
* ``ra``, ``dec``, ``position_epoch`` and ``_healpix_29`` are those of the primary row. Gaia ids
  and the pair of proper motions are those of the best row, or else of the first that has
  them, in the order of ``obs_id``. Every other column is that of the best row.
* The spread of a label is the sample standard deviation over the used rows; ``flag_spread`` is
  set where, for any label, it is over ``max_spread`` times the expected error: the rms of the
  stated errors, or ``expected_error``. A label with neither is not flagged.

Sums are in double precision over rows in the order of ``obs_id``, so they do not depend on the
order of the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
from sos_dask.sky.neighbours import runs
from sos_dask.stars.group import DedupeSettings
from sos_dask.stats.numbers import MEDIAN_ERROR


def combine(
    table: pa.Table,
    primary: IntArray,
    settings: DedupeSettings,
    expected_error: Mapping[str, float],
) -> pa.Table:
    """Combine the observations of each star into one row, by the rule of this module.

    Parameters
    ----------
    table : pyarrow.Table
        Observations: ``_healpix_29``, ``obs_id``, ``ra``, ``dec``, ``quality`` and any others. Text
        may be coded by a dictionary; that of the stars is plain.
    primary : ndarray of int64, shape (n,)
        Row number of each row's primary (`group`); -1 for a row that is left out.
    settings : DedupeSettings
    expected_error : mapping of str to float
        Error of one observation by label, used where none is stated.

    Returns
    -------
    pyarrow.Table
        ``_healpix_29``, ``star_id``, ``n_obs``, ``n_used``, ``ra``, ``dec``, the other columns in
        their order, the spread of each label, ``flag_spread``, ``quality``; sorted by
        (``_healpix_29``, ``star_id``).

    Raises
    ------
    ConfigError
        A column is missing.
    PartitionError
        ``primary`` names rows that are no primaries.
    """
    required = (HEALPIX_COLUMN, "obs_id", "ra", "dec", "quality")
    require_columns(table.schema, required, "the observations to be combined")
    if len(primary) != table.num_rows or not _are_primaries(primary):
        raise PartitionError("primaries do not belong to the rows to be combined")
    leaders = np.flatnonzero(primary == np.arange(len(primary)))
    # Most often in the first of two chunks: nothing is copied into one.
    leading = table.slice(0, leaders[-1] + 1 if len(leaders) else 0)
    leaders = leaders[sky_order(leading, leaders, "obs_id")]
    repeats = _Repeats.of(table, primary, leaders)
    source = leaders.copy()
    source[repeats.star] = repeats.best
    columns = repeats.columns(source, settings, expected_error)
    for name in table.schema.names:
        if name in columns:
            continue
        if name in (HEALPIX_COLUMN, "obs_id", "ra", "dec", "position_epoch"):
            columns[name] = _taken(leading.column(name), leaders)
        else:
            columns[name] = _taken(table.column(name), repeats.source_of(source, name))
    n_obs, n_used = np.ones((2, len(leaders)), dtype=np.int32)
    n_obs[repeats.star] = np.diff(repeats.first)
    n_used[repeats.star] = np.diff(repeats.used_first)
    columns |= {"n_obs": pa.array(n_obs), "n_used": pa.array(n_used)}
    columns["star_id"] = columns.pop("obs_id")
    fields = _star_fields(table.schema, columns)
    return pa.table([columns[field.name] for field in fields], schema=pa.schema(fields))


def _taken(column: pa.ChunkedArray, rows: IntArray) -> pa.Array:
    """Rows of a column; text that is coded becomes plain."""
    values = pc.take(one_array(column), pa.array(rows), boundscheck=False)
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _star_fields(schema: pa.Schema, columns: Mapping[str, pa.Array]) -> list[pa.Field]:
    """Fields of the stars in their order."""
    told: tuple[tuple[str, str, str], ...] = (
        ("star_id", "meta.id;meta.main", "Key of the star: that of its primary observation"),
        ("n_obs", "meta.number", "Observations of the star"),
        ("n_used", "meta.number", "Observations that were combined"),
    )
    key, *counts = (
        pa.field(name, columns[name].type, False, {"ucd": ucd, "description": text})
        for name, ucd, text in told
    )
    first = (HEALPIX_COLUMN, "ra", "dec")
    place, ra, dec = (schema.field(name) for name in first)
    others = [
        field.with_type(columns[field.name].type)
        for field in schema
        if field.name not in (*first, "obs_id", "quality")
    ]
    spreads = []
    for label in LABELS:
        metadata = dict(schema.field(label).metadata or {}) if label in schema.names else {}
        unit, text = metadata.get(b"unit", b"").decode(), f"Standard deviation of {label}"
        spreads.append(Column(f"{label}_spread", "float32", unit, "", text).arrow())
    flag = pa.field("flag_spread", pa.bool_(), False, {"description": "Spread over the limit"})
    quality = QUALITY.arrow(nullable=False)
    return [place, key, *counts, ra, dec, *others, *spreads, flag, quality]


@dataclass(frozen=True)
class _Repeats:
    """Rows of the stars with several observations, by star and then by ``obs_id``.

    The rows of a star are row[first[s]:first[s + 1]], those used of them are
    used_row[used_first[s]:used_first[s + 1]]; ``best_at`` is a place in ``row``.
    """

    table: pa.Table
    star: IntArray
    first: IntArray
    row: IntArray
    used_first: IntArray
    used_row: IntArray
    best_at: IntArray
    quality: IntArray
    snr: FloatingArray

    @classmethod
    def of(cls, table: pa.Table, primary: IntArray, leaders: IntArray) -> _Repeats:
        """Those of some stars; ``leaders`` are the primaries of all."""
        snr = reals_or_nan(table, "snr")
        if not len(leaders):
            none, end = np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
            return cls(table, none, end, none, end, none, none, none, snr[:0])
        from sos_dask.sky.loops import choose, repeated, sort_members

        of_star, first, row = repeated(primary)
        number = np.empty(len(primary), dtype=np.int64)
        number[leaders] = np.arange(len(leaders))
        sort_members(first, row, _keys(table.column("obs_id"), row))
        used_first, used_row = np.empty_like(first), np.empty_like(row)
        best_at, bits = np.empty((2, len(of_star)), dtype=np.int64)
        total = np.empty(len(of_star), dtype=snr.dtype)
        quality = one_array(table.column("quality")).to_numpy()
        choose(first, row, quality, snr, used_first, used_row, best_at, bits, total)
        star = number[of_star]
        return cls(table, star, first, row, used_first, used_row, best_at, bits, total)

    @property
    def best(self) -> IntArray:
        """Best row of each star."""
        return self.row[self.best_at]

    def source_of(self, source: IntArray, name: str) -> IntArray:
        """Row of each star that gives a column: the best row, or for some the first that has it."""
        motion = "pmra", "pmdec"
        names: tuple[str, ...] = (name,)
        if name in motion and set(motion) <= set(self.table.schema.names):
            names = motion
        elif not (name.startswith("gaia_") and name.endswith("_source_id")):
            return source
        rows = source.copy()
        if not any(self.table.column(one).null_count for one in names) or not len(self.star):
            return rows
        has = np.ones(self.table.num_rows, dtype=np.bool_)
        for one in names:
            has &= is_valid(self.table.column(one))
        lacking = np.flatnonzero(~has.take(self.best))
        # Places in ``row`` of their members, those of them that have them, and the first of each.
        count = self.first[lacking + 1] - self.first[lacking]
        place = runs(self.first[lacking], count)
        having = np.append(place[has[self.row[place]]], len(self.row))
        at = having[np.searchsorted(having, self.first[lacking])]
        found = at < self.first[lacking + 1]
        rows[self.star[lacking[found]]] = self.row[at[found]]
        return rows

    def columns(
        self, source: IntArray, settings: DedupeSettings, expected_error: Mapping[str, float]
    ) -> dict[str, pa.Array]:
        """Columns that are combined, by name; ``source`` is the best row of every star."""
        flag = np.zeros(len(source), dtype=np.bool_)
        out: dict[str, pa.Array] = {}
        median_error = MEDIAN_ERROR if settings.method == "median" else 0.0
        for label in (*LABELS, "rv"):
            values = reals_or_nan(self.table, label)
            errors = reals_or_nan(self.table, f"{label}_err")
            limits = expected_error.get(label, np.nan), settings.max_spread, median_error
            used = self.used_first, self.used_row
            value, error, of_stars, is_wide = label_of_stars(*used, values, errors, *limits)
            if label in LABELS:
                flag[self.star] |= is_wide
                spread = np.full(len(source), np.nan, dtype=np.float32)
                spread[self.star] = of_stars
                out[f"{label}_spread"] = _nullable(spread, pa.float32())
            if settings.method != "best-snr":
                out |= self._replaced(label, values, source, value)
                out |= self._replaced(f"{label}_err", errors, source, error)
        if settings.method != "best-snr":
            out |= self._replaced("snr", reals_or_nan(self.table, "snr"), source, self.snr)
        quality = one_array(self.table.column("quality")).to_numpy().take(source)
        quality[self.star] = self.quality
        return out | {"quality": pa.array(quality), "flag_spread": pa.array(flag)}

    def _replaced(
        self, name: str, values: FloatingArray, source: IntArray, combined: FloatingArray
    ) -> dict[str, pa.Array]:
        """A column with the values of these stars; none if the table lacks it."""
        if name not in self.table.schema.names:
            return {}
        of_stars = values.take(source)
        of_stars[self.star] = combined
        return {name: _nullable(of_stars, self.table.schema.field(name).type)}


def label_of_stars(
    first: IntArray,
    row: IntArray,
    values: FloatingArray,
    errors: FloatingArray,
    expected_error: float,
    max_spread: float,
    median_error: float = 0.0,
) -> tuple[FloatingArray, FloatingArray, NDArray[np.float32], BoolArray]:
    """Combine a label over the rows row[first[s]:first[s + 1]] of each star; NaN: none.

    Parameters
    ----------
    first, row : ndarray of int64
    values, errors : ndarray of float, by row
    expected_error : float
        Of one row, used where none is stated; NaN: unknown.
    max_spread : float
    median_error : float
        That of the median over that of the mean; 0: mean weighted by 1 / error**2.

    Returns
    -------
    value, error, spread, is_wide : ndarray by star
    """
    if values.dtype != errors.dtype:
        values, errors = values.astype(np.float64), errors.astype(np.float64)
    value, error = np.empty((2, len(first) - 1), dtype=values.dtype)
    spread, is_wide = np.empty(len(value), dtype=np.float32), np.zeros(len(value), dtype=np.bool_)
    if len(value):
        from sos_dask.sky.loops import combine_label

        limits = expected_error, max_spread, median_error
        combine_label(first, row, values, errors, *limits, value, error, spread, is_wide)
    return value, error, spread, is_wide


def _are_primaries(primary: IntArray) -> bool:
    """Tell whether all rows that are not left out name a row that is its own primary."""
    return not len(primary) or bool(np.all((primary.take(primary) == primary) | (primary < 0)))


def _nullable(values: FloatingArray, dtype: pa.DataType) -> pa.Array:
    """Array with null for NaN."""
    return as_array(values, ~np.isnan(values)).cast(dtype)


def sky_order(table: pa.Table, rows: IntArray, key: str) -> IntArray:
    """Order some rows by (``_healpix_29``, key); the keys of few are needed."""
    cells = table.column(HEALPIX_COLUMN).to_numpy()[rows]
    order = np.argsort(cells, kind="stable")
    tied = ties(cells[order])
    if tied.any():
        keys = pc.rank(table.column(key).take(pa.array(rows[order[tied]])), tiebreaker="dense")
        order[tied] = order[tied][np.lexsort((keys.to_numpy(), cells[order[tied]]))]
    return order


def ties(*keys: NDArray[Any]) -> BoolArray:
    """Tell which rows have the same keys as the one before or after."""
    same = np.ones(max(len(keys[0]) - 1, 0), dtype=np.bool_)
    for values in keys:
        same &= values[1:] == values[:-1]
    n = len(keys[0])
    return np.asarray(np.append(same, False)[:n] | np.append(False, same)[:n])


def _keys(keys: pa.ChunkedArray, rows: IntArray) -> IntArray:
    """Keys as integers in the same order; of text only those of some rows."""
    if pa.types.is_integer(keys.type):
        return np.asarray(one_array(keys).to_numpy(), dtype=np.int64)
    out = np.zeros(len(keys), dtype=np.int64)
    out[rows] = pc.rank(keys.take(pa.array(rows)), tiebreaker="dense").to_numpy()
    return out
