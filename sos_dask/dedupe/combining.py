"""One row for each star. The rule is that of `combine`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.dedupe.settings import DedupeSettings
from sos_dask.errors import PartitionError
from sos_dask.healpix import FloatArray, IntArray
from sos_dask.schema import HEALPIX_COLUMN, LABELS, QUALITY, Column, require_columns

BoolArray = NDArray[np.bool_]

# Standard error of the median of many normal values over that of the mean: the square root of one
# over its asymptotic efficiency 2 / pi (Kendall & Stuart, The Advanced Theory of Statistics).
_MEDIAN_ERROR = float(np.sqrt(np.pi / 2.0))


def combine(
    table: pa.Table,
    primary: IntArray,
    settings: DedupeSettings,
    expected_error: Mapping[str, float],
) -> pa.Table:
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

    Parameters
    ----------
    table : pyarrow.Table
        Observations: ``_healpix_29``, ``obs_id``, ``ra``, ``dec``, ``quality`` and any others.
    primary : ndarray of int64, shape (n,)
        Row number of each row's primary (`group`); -1 for a row that is left out.
    settings : DedupeSettings
    expected_error : mapping of str to float
        Error of one observation by label, used where none is stated.

    Returns
    -------
    pyarrow.Table
        ``_healpix_29``, ``star_id``, ``n_obs``, ``n_used``, ``ra``, ``dec``, the other columns in
        their order, ``teff_spread``, ``logg_spread``, ``feh_spread``, ``flag_spread``, ``quality``;
        sorted by (``_healpix_29``, ``star_id``).

    Raises
    ------
    ConfigError
        A column is missing.
    PartitionError
        ``primary`` names rows that are no primaries.
    """
    required = (HEALPIX_COLUMN, "obs_id", "ra", "dec", "quality")
    require_columns(table.schema, required, "the observations to be combined")
    is_given = primary >= 0
    is_primary = primary == np.arange(len(primary))
    if len(primary) != table.num_rows or not is_primary[primary[is_given]].all():
        raise PartitionError("primaries do not belong to the rows to be combined")
    table = table.combine_chunks()
    leaders = np.flatnonzero(is_primary)
    leaders = leaders[_sky_order(table.select([HEALPIX_COLUMN, "obs_id"]), leaders)]
    number = np.full(len(primary), -1, dtype=np.int64)
    number[leaders] = np.arange(len(leaders))
    star = np.where(is_given, number[primary], -1)
    n_obs = np.bincount(star + 1, minlength=len(leaders) + 1)[1:]
    repeats = _Repeats.of(table, star, n_obs)

    source = leaders.copy()
    source[repeats.star] = repeats.best
    columns: dict[str, pa.Array] = {}
    for name in table.schema.names:
        rows = source
        if name in (HEALPIX_COLUMN, "obs_id", "ra", "dec", "position_epoch"):
            rows = leaders
        elif name in ("pmra", "pmdec") and {"pmra", "pmdec"} <= set(table.schema.names):
            rows = repeats.source_of(source, ("pmra", "pmdec"))
        elif name.startswith("gaia_") and name.endswith("_source_id"):
            rows = repeats.source_of(source, (name,))
        columns[name] = table.column(name).take(pa.array(rows)).combine_chunks()

    flag = np.zeros(len(leaders), dtype=np.bool_)
    spreads: dict[str, FloatArray] = {}
    for label in (*LABELS, "rv"):
        if label not in columns:
            continue
        value, error, spread, expected = repeats.combined(
            label, settings.method, expected_error.get(label)
        )
        if settings.method != "best-snr":
            columns[label] = _replaced(columns[label], repeats.star, value)
            if f"{label}_err" in columns:
                columns[f"{label}_err"] = _replaced(columns[f"{label}_err"], repeats.star, error)
        if label in LABELS:
            spreads[label] = np.full(len(leaders), np.nan)
            spreads[label][repeats.star] = spread
            with np.errstate(invalid="ignore"):
                flag[repeats.star] |= spread > settings.max_spread * expected
    if "snr" in columns and settings.method != "best-snr":
        columns["snr"] = _replaced(columns["snr"], repeats.star, repeats.total_snr())
    columns["quality"] = _replaced(columns["quality"], repeats.star, repeats.quality())

    n_used = np.ones(len(leaders), dtype=np.int32)
    n_used[repeats.star] = repeats.n_used()
    return _star_table(table.schema, columns, n_obs, n_used, spreads, flag)


def _star_table(
    schema: pa.Schema,
    columns: dict[str, pa.Array],
    n_obs: IntArray,
    n_used: NDArray[np.int32],
    spreads: dict[str, FloatArray],
    flag: BoolArray,
) -> pa.Table:
    key = schema.field("obs_id")
    text = "Key of the star: that of its primary observation"
    out: list[tuple[pa.Field, pa.Array]] = [
        (schema.field(HEALPIX_COLUMN), columns.pop(HEALPIX_COLUMN)),
        (
            Column("star_id", "int64", "", "meta.id;meta.main", text)
            .arrow(nullable=False)
            .with_type(key.type),
            columns.pop("obs_id"),
        ),
        (_count_field("n_obs", "Observations of the star"), pa.array(n_obs.astype(np.int32))),
        (_count_field("n_used", "Observations that were combined"), pa.array(n_used)),
        (schema.field("ra"), columns.pop("ra")),
        (schema.field("dec"), columns.pop("dec")),
    ]
    quality = columns.pop("quality")
    out += [(schema.field(name), values) for name, values in columns.items()]
    for label in LABELS:
        unit = (
            dict(schema.field(label).metadata or {}).get(b"unit", b"") if label in columns else b""
        )
        column = Column(
            f"{label}_spread", "float32", unit.decode(), "", f"Standard deviation of {label}"
        )
        values = spreads.get(label, np.full(len(flag), np.nan))
        out.append((column.arrow(), _masked(values, pa.float32())))
    flag_field = pa.field(
        "flag_spread", pa.bool_(), False, {"description": "Spread over the limit"}
    )
    out += [(flag_field, pa.array(flag)), (QUALITY.arrow(nullable=False), quality)]
    return pa.table([values for _, values in out], schema=pa.schema([field for field, _ in out]))


def _count_field(name: str, description: str) -> pa.Field:
    return pa.field(name, pa.int32(), False, {"ucd": "meta.number", "description": description})


@dataclass(frozen=True)
class _Repeats:
    """Rows of the stars with several observations, by star and then by ``obs_id``.

    ``star`` and ``first`` have one entry a star, the others one a row; ``segment`` says which star.
    """

    table: pa.Table
    star: IntArray
    first: IntArray
    row: IntArray
    segment: IntArray
    used: BoolArray
    quality_bits: IntArray
    best_at: IntArray

    @classmethod
    def of(cls, table: pa.Table, star: IntArray, n_obs: IntArray) -> _Repeats:
        # Rows that are left out have star -1, which is the number added here.
        row = np.flatnonzero((np.append(n_obs, 0) > 1)[star])
        row = row[_order_in_stars(star[row], table.column("obs_id").take(pa.array(row)))]
        is_first = np.append(True, star[row[1:]] != star[row[:-1]])[: len(row)]
        first = np.flatnonzero(is_first)
        segment = np.cumsum(is_first) - 1
        bits = table.column("quality").to_numpy()[row]
        used = bits == 0
        used |= (np.bincount(segment, used, minlength=len(first)) == 0)[segment]
        repeats = cls(table, star[row[first]], first, row, segment, used, bits, first)
        # Unused rows rank below null, null below every value; the first row of the highest wins.
        snr = repeats.values("snr")
        score = np.where(used, np.where(np.isnan(snr), -np.inf, snr), np.nan)
        highest = np.fmax.reduceat(score, first) if len(row) else score
        return replace(repeats, best_at=repeats._first_of(score == highest[segment]))

    @property
    def best(self) -> IntArray:
        """Best row of each star."""
        return self.row[self.best_at]

    def values(self, name: str) -> FloatArray:
        """A column in double precision, NaN where there is none."""
        if name not in self.table.schema.names:
            return np.full(len(self.row), np.nan)
        column = self.table.column(name).take(pa.array(self.row))
        return np.asarray(column.to_numpy(), dtype=np.float64)

    def _first_of(self, wanted: BoolArray) -> IntArray:
        """Place of each star's first row of those wanted, for stars that have one."""
        at = np.flatnonzero(wanted)
        is_first = np.append(True, self.segment[at[1:]] != self.segment[at[:-1]])[: len(at)]
        return np.asarray(at[is_first])

    def _sum(self, values: FloatArray | BoolArray) -> FloatArray:
        total = np.bincount(self.segment, values, minlength=len(self.first))
        return np.asarray(total, dtype=np.float64)

    def n_used(self) -> IntArray:
        return self._sum(self.used).astype(np.int64)

    def quality(self) -> IntArray:
        if not len(self.row):
            return self.quality_bits
        # Bits without one in common must not look like a row that passes.
        common = np.bitwise_and.reduceat(self.quality_bits, self.first)
        any_bit = np.bitwise_or.reduceat(self.quality_bits, self.first)
        passed = self._sum(self.quality_bits == 0) > 0
        return np.asarray(np.where(passed, 0, np.where(common == 0, any_bit, common)), np.int64)

    def total_snr(self) -> FloatArray:
        snr = self.values("snr")
        has = self.used & ~np.isnan(snr)
        total = np.sqrt(self._sum(np.where(has, snr, 0.0) ** 2))
        return np.where(self._sum(has) > 0, total, np.nan)

    def source_of(self, source: IntArray, names: tuple[str, ...]) -> IntArray:
        """Row of each star that gives these columns: the best row, or the first that has them."""
        has = np.ones(len(self.row), dtype=np.bool_)
        for name in names:
            column = self.table.column(name)
            if column.null_count:
                has &= column.is_valid().to_numpy()[self.row]
        lacking = ~has[self.best_at]
        at = self._first_of(has & lacking[self.segment])
        rows = source.copy()
        rows[self.star[self.segment[at]]] = self.row[at]
        return rows

    def combined(
        self, label: str, method: str, fallback: float | None
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Combined value, its error, spread and expected error of one observation; NaN: none."""
        value, error = self.values(label), self.values(f"{label}_err")
        has = self.used & ~np.isnan(value)
        stated = has & (error > 0)
        value, error = np.where(has, value, 0.0), np.where(stated, error, 1.0)
        n, n_stated = self._sum(has), self._sum(stated)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = self._sum(value) / n
            deviation = np.where(has, value - mean[self.segment], 0.0)
            spread = np.where(n > 1, np.sqrt(self._sum(deviation**2) / (n - 1)), np.nan)
            rms = np.sqrt(self._sum(np.where(stated, error, 0.0) ** 2) / n_stated)
            if method == "median":
                value_out = self._median(value, has, mean)
                factor = np.where(n > 2, _MEDIAN_ERROR, 1.0)
                error_out = np.where(n_stated > 0, factor * rms / np.sqrt(n), np.nan)
            else:
                plain = n_stated == 0
                weight = np.where(plain[self.segment], has, stated / error**2)
                total = self._sum(weight)
                value_out = self._sum(weight * value) / total
                error_out = np.where(plain, np.nan, 1.0 / np.sqrt(total))
        expected = np.where(n_stated > 0, rms, np.nan if fallback is None else fallback)
        return value_out, error_out, spread, expected

    def _median(self, value: FloatArray, has: BoolArray, mean: FloatArray) -> FloatArray:
        out = mean.copy()
        rows = np.flatnonzero(has & (self._sum(has) > 2)[self.segment])
        rows = rows[np.lexsort((value[rows], self.segment[rows]))]
        star = self.segment[rows]
        first = np.flatnonzero(np.append(True, star[1:] != star[:-1])[: len(rows)])
        n = np.diff(np.append(first, len(rows)))
        low, high = value[rows[first + (n - 1) // 2]], value[rows[first + n // 2]]
        out[star[first]] = (low + high) / 2
        return out


def _masked(values: NDArray[np.generic], dtype: pa.DataType) -> pa.Array:
    """Array with null for NaN."""
    mask = np.isnan(values) if values.dtype.kind == "f" else None
    return pa.array(values.astype(dtype.to_pandas_dtype()), dtype, mask=mask)


def _replaced(column: pa.Array, at: IntArray, values: NDArray[np.generic]) -> pa.Array:
    """A column with some values replaced."""
    out = column.to_numpy(zero_copy_only=False).copy()
    out[at] = values
    return _masked(out, column.type)


def _sky_order(table: pa.Table, rows: IntArray) -> IntArray:
    """Order of some rows by (``_healpix_29``, ``obs_id``)."""
    cells = table.column(HEALPIX_COLUMN).to_numpy()[rows]
    order = np.argsort(cells, kind="stable")
    equal = np.append(False, cells[order[1:]] == cells[order[:-1]])[: len(order)]
    tied = equal | np.append(equal[1:], False)[: len(order)]
    if tied.any():
        keys = pc.rank(table.column("obs_id").take(pa.array(rows[order[tied]])), tiebreaker="dense")
        order[tied] = order[tied][np.lexsort((keys.to_numpy(), cells[order[tied]]))]
    return order


def _order_in_stars(star: IntArray, keys: pa.ChunkedArray) -> IntArray:
    """Order of rows by (star, key); keys are unique."""
    if not pa.types.is_integer(keys.type):
        keys = pc.rank(keys, tiebreaker="dense")
    key = keys.to_numpy().astype(np.int64)
    if not len(key):
        return np.empty(0, dtype=np.int64)
    low, high = int(key.min()), int(key.max())
    bits = (high - low).bit_length()
    if bits + int(star.max()).bit_length() < 64:
        # Both in one integer: several times faster than to sort by two.
        return np.asarray(np.argsort(star << bits | key - low, kind="stable"))
    return np.asarray(np.lexsort((key, star)))
