"""Rows with one key: duplicates are dropped, and of conflicting rows one is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sos_dask.ingest.arrays import BoolArray, IntArray, one_array, taken
from sos_dask.ingest.keys import codes_of, sort_order
from sos_dask.schema import HEALPIX_COLUMN

FILE, ROW = "_file", "_row"
"""Columns of rows on their way: index of the file, and row there from 0."""
REJECTED_SCHEMA = pa.schema(
    {
        "file": pa.string(),
        "row": pa.int64(),
        "reason": pa.string(),
        "obs_id": pa.string(),
        "ra": pa.float64(),
        "dec": pa.float64(),
    }
)
CONFLICT = "conflicting obs_id"


@dataclass(frozen=True)
class Merged:
    """One partition.

    Parameters
    ----------
    rows : pyarrow.Table
        Sorted by ``_healpix_29`` and ``obs_id``, each key once, without ``_file`` and ``_row``.
    rejected : pyarrow.Table
        ``REJECTED_SCHEMA``: rows whose key another row with other content has.
    n_duplicates : int
        Rows left out because all their values are those of the row that was kept.
    """

    rows: pa.Table
    rejected: pa.Table
    n_duplicates: int


def merge_rows(tables: Sequence[pa.Table], files: Sequence[str]) -> Merged:
    """Merge sorted slices of `Batch.rows` that lie in one partition.

    Of rows with one ``obs_id`` at one place the one with most values is kept, then with the fewest
    failed cuts, then with the highest ``snr``, then with the smallest content, so that the result
    depends on the rows alone. The others are duplicates (equal content) or rejected.

    Parameters
    ----------
    tables : sequence of pyarrow.Table
        At least one.
    files : sequence of str
        Names for ``rejected``, by file index.
    """
    table = pa.concat_tables(tables)
    cells = table[HEALPIX_COLUMN].to_numpy()
    ids = one_array(table["obs_id"])
    numbers = ids if pa.types.is_string(ids.type) else ids.to_numpy()
    order = sort_order(cells, numbers)
    same = np.zeros(len(order), dtype=bool)  # whether a row has the key of the one before
    in_order = cells[order]
    candidates = np.flatnonzero(in_order[1:] == in_order[:-1]) + 1
    left, right = (taken(ids, order[candidates - step]) for step in (1, 0))
    same[candidates] = pc.equal(left, right).to_numpy(zero_copy_only=False)
    if not same.any():
        return Merged(_observations(table, order), REJECTED_SCHEMA.empty_table(), 0)
    repeated = same.copy()
    repeated[:-1] |= same[1:]
    where = np.flatnonzero(repeated)
    group = np.cumsum(~same[where]) - 1
    repeats = _rows(table, order[where])
    winner, equal = _settle(repeats, group)
    lost = np.flatnonzero(~winner & ~equal)
    rejected = rejected_rows(repeats.take(pa.array(lost)), CONFLICT, files)
    keep = np.ones(len(order), dtype=bool)
    keep[where] = winner
    rows = _observations(table, order[keep])
    return Merged(rows, rejected, int(np.count_nonzero(~winner & equal)))


def _observations(table: pa.Table, index: IntArray) -> pa.Table:
    return _rows(table.drop_columns([FILE, ROW]), index)


def _rows(table: pa.Table, index: IntArray) -> pa.Table:
    """Rows of a table of many chunks; one column after the other, to hold one copy of one only."""
    columns = [taken(one_array(column), index) for column in table.columns]
    return pa.Table.from_arrays(columns, schema=table.schema)


def losing_rows(rows: pa.Table) -> pa.Table:
    """Rows that lose where one ``obs_id`` stands at several places, by the rule of `merge_rows`.

    Parameters
    ----------
    rows : pyarrow.Table
        All rows of these keys, as `Batch.rows`, in any order.

    Returns
    -------
    pyarrow.Table
        Rows to take out, in the order of files and rows. Rows equal to the one that is kept are not
        among them: `merge_rows` drops them.
    """
    rows = rows.combine_chunks()
    codes = codes_of(one_array(rows["obs_id"]))
    order = np.argsort(codes, kind="stable")
    group = np.cumsum(np.diff(codes[order], prepend=codes[order][:1]) != 0)
    in_order = rows.take(pa.array(order))
    winner, equal = _settle(in_order, group)
    lost = in_order.filter(pa.array(~winner & ~equal))
    return lost.sort_by([(FILE, "ascending"), (ROW, "ascending")])


def rejected_rows(rows: pa.Table, reason: str, files: Sequence[str]) -> pa.Table:
    """Rows of `Batch.rows` as a table of ``REJECTED_SCHEMA``, in the order of files and rows."""
    rows = rows.sort_by([(FILE, "ascending"), (ROW, "ascending")])
    names = pa.array(list(files), pa.string())
    columns = [
        names.take(one_array(rows[FILE])),
        rows[ROW],
        pa.array([reason] * rows.num_rows, pa.string()),
        rows["obs_id"].cast(pa.string()),
        rows["ra"],
        rows["dec"],
    ]
    return pa.Table.from_arrays(columns, schema=REJECTED_SCHEMA)


def _settle(rows: pa.Table, group: IntArray) -> tuple[BoolArray, BoolArray]:
    """Of each group the row to keep, and which rows have its content.

    Parameters
    ----------
    rows : pyarrow.Table
    group : ndarray of int64, shape (n,)
        Ascending from 0.
    """
    content, n_valid = [], np.zeros(len(group), dtype=np.int64)
    for name in rows.column_names:
        if name not in (FILE, ROW):
            column = one_array(rows[name])
            valid = column.is_valid().to_numpy(zero_copy_only=False)
            n_valid += valid
            content += [valid, codes_of(column)]
    starts = np.flatnonzero(np.diff(group, prepend=-1))

    def equal_to(leader: IntArray) -> BoolArray:
        equal = np.ones(len(group), dtype=bool)
        for codes in content:
            equal &= codes == codes[leader[group]]
        return equal

    winner = np.zeros(len(group), dtype=bool)
    winner[starts] = True
    equal = equal_to(starts)
    if equal.all():
        return winner, equal
    quality = np.bitwise_count(rows["quality"].to_numpy())
    snr = np.zeros(len(group))
    if "snr" in rows.column_names:
        snr = rows["snr"].cast(pa.float64()).fill_null(-np.inf).to_numpy()
    order = np.lexsort((*reversed(content), -snr, quality, -n_valid, group))
    best = order[starts]
    winner[:] = False
    winner[best] = True
    return winner, equal_to(best)
