"""Observations on their way to partitions: rows a cell, order, conflicts of keys, merged rows.

Pieces of sorted rows are cut at the edges of the partitions. A key that stands at more than one
place of the sky conflicts; rows with one key at one place are merged: duplicates are dropped, and
of conflicting rows one is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.columns import BoolArray, IntArray, KeyArray, is_valid, key_hashes, one_array, taken
from sos_dask.errors import SurveyError
from sos_dask.schema import HEALPIX_COLUMN
from sos_dask.sky.healpix import MAX_ORDER, HealpixPixel
from sos_dask.storage.objects import local

FILE, ROW = "_file", "_row"
"""Columns of rows on their way: index of the file, and row there from 0."""
REJECTED_SCHEMA = pa.schema(
    {"file": pa.string(), "row": pa.int64(), "reason": pa.string(), "obs_id": pa.string()}
    | dict.fromkeys(("ra", "dec"), pa.float64())
)
CONFLICT = "conflicting obs_id"
HISTOGRAM_ORDER = 10
_SHIFT = 2 * (MAX_ORDER - HISTOGRAM_ORDER)
_LARGEST = (1 << 64) - 1
_SAMPLES, _GOLDEN_RATIO = 64, 0.6180339887498949

Run: TypeAlias = KeyArray | Path
"""Ascending hashes, or the NumPy file that contains them."""


# --- rows a cell of the sky: they decide the partitions -------------------------------------------


def histogram_of(cells29: IntArray) -> NDArray[np.int32]:
    """Count rows by cell of ``HISTOGRAM_ORDER``: the cells and their rows, shape (2, m).

    ``cells29`` is ``_healpix_29`` of the rows.
    """
    return np.stack(np.unique(cells29 >> _SHIFT, return_counts=True)).astype(np.int32)


def partition_edges(
    pixels: Sequence[HealpixPixel], histograms: Iterable[NDArray[np.int32]]
) -> NDArray[np.int32]:
    """Find the first row of each partition in sorted pieces, shape (partitions + 1, pieces).

    ``pixels`` are the partitions in the order of the sky; together they have all rows, so that
    where one ends the next begins. The last row of the result has the rows of the pieces, of which
    ``histograms`` has `histogram_of` each.
    """
    starts = [pixel.first >> _SHIFT for pixel in pixels]
    edges = [
        np.append(0, np.cumsum(n_rows))[[*np.searchsorted(cells, starts), len(cells)]]
        for cells, n_rows in histograms
    ]
    return np.array(edges, np.int32).reshape(-1, len(starts) + 1).T


# --- order ----------------------------------------------------------------------------------------


def sort_order(cells: IntArray, ids: pa.Array) -> IntArray:
    """Order by cell, then by id (text by its bytes); rows equal in both keep their order."""
    order: IntArray = np.argsort(cells, kind="stable")
    in_order = cells[order]
    same = np.append(False, in_order[1:] == in_order[:-1])[: len(order)]
    where = np.flatnonzero(same | np.append(same[1:], False))
    if not len(where):
        return order
    rows = order[where]
    # Cell and id in one integer, all but sorted already: many times faster than two keys.
    codes = np.cumsum(~same[where]) * (len(rows) + 1) + _codes(taken(ids, rows))
    order[where] = rows[np.argsort(codes, kind="stable")]
    return order


def _codes(column: pa.Array) -> IntArray:
    """Integers from 1 ordered as the values are, equal only for equal values; 0 where null."""
    codes: IntArray = pc.rank(column, tiebreaker="dense").to_numpy().astype(np.int64)
    codes[~is_valid(column)] = 0
    return codes


# --- keys that stand at more than one place -------------------------------------------------------


def sorted_hashes(ids: pa.Array) -> KeyArray:
    """`key_hashes`, ascending: next to nothing where the keys of a file are."""
    return np.sort(key_hashes(ids), kind="stable")


def key_ranges(runs: Sequence[Run], n_ranges: int) -> list[tuple[int, int]]:
    """First and last hash of ranges that contain about equally many, together all 64-bit integers.

    There are at most ``n_ranges``: a key that is very frequent has a range of its own.
    """
    samples = [np.empty(0, np.uint64)]
    for number, run in enumerate(map(_mapped, runs)):
        # Not the same places in each: runs that are alike would tell no more than one of them.
        places = np.arange(_SAMPLES) + number * _GOLDEN_RATIO % 1.0
        if len(run):
            samples.append(run[(places * (len(run) / _SAMPLES)).astype(np.int64)])
    sample = np.sort(np.concatenate(samples))
    cuts = np.arange(1, n_ranges) * len(sample) // n_ranges
    edges = np.unique(sample[cuts]) if len(sample) else sample
    starts = [0, *(int(edge) for edge in edges if edge)]
    return list(zip(starts, [*(start - 1 for start in starts[1:]), _LARGEST], strict=True))


def conflicting_keys(
    pieces: Sequence[Path | pa.Table], runs: Sequence[Run], first: int = 0, last: int = _LARGEST
) -> pa.Array:
    """Values of ``obs_id`` that stand at more than one place, sorted.

    ``pieces`` are tables or uncompressed Arrow IPC files (memory-mapped) with ``obs_id`` and
    ``_healpix_29``; only those with a key that stands twice are read. ``runs`` are `sorted_hashes`
    of each, of which those from ``first`` to ``last`` fit in memory.

    Raises `SurveyError`: more than 100 rows, and more than 1 % of the range's, share their key with
    a row elsewhere.
    """
    inside = [np.empty(0, np.uint64)]
    for run in map(_mapped, runs):
        start = run.searchsorted(np.uint64(first))
        inside.append(np.array(run[start : run.searchsorted(np.uint64(last), side="right")]))
    inside.sort(key=lambda run: int(run[0]) if len(run) else 0)
    hashed = np.concatenate(inside)
    hashed.sort(kind="stable")  # which merges runs, and finds those of an ordered file in order
    n_rows = len(hashed)
    # Nearly all keys stand once: only of the others it matters where.
    repeated = np.unique(hashed[1:][hashed[1:] == hashed[:-1]])
    low, high = np.full(len(repeated), np.iinfo(np.int64).max), np.full(len(repeated), -1)
    count = np.zeros(len(repeated), dtype=np.int64)
    held = [pieces[number] for number in holders(runs, repeated)]
    for ids, cell in _keys(held):
        row, place = _found(key_hashes(ids), repeated)
        np.minimum.at(low, place, cell[row])
        np.maximum.at(high, place, cell[row])
        count += np.bincount(place, minlength=len(repeated))
    conflicts, n_excess = repeated[low < high], int((count[low < high] - 1).sum())
    if not len(conflicts):
        return pa.array([], next((ids.type for ids, _ in _keys(pieces)), pa.int64()))
    found = []
    for ids, cell in _keys(held):
        row, _ = _found(key_hashes(ids), conflicts)
        found.append(pa.table({"key": ids.take(pa.array(row)), "cell": cell[row]}))
        if n_excess > 100 and len(row):
            check_conflicts(n_excess, n_rows, str(found[-1]["key"][0]))
    # Two texts may share a hash: the texts themselves decide.
    table = pa.concat_tables(found)
    extent = table.group_by("key").aggregate([("cell", "min"), ("cell", "max")])
    keys = extent.filter(pc.not_equal(extent["cell_min"], extent["cell_max"]))["key"]
    return one_array(keys.take(pc.sort_indices(keys)))


def holders(runs: Sequence[Run], wanted: KeyArray) -> list[int]:
    """Numbers of the runs that contain one of the hashes."""
    found = []
    for number, run in enumerate(map(_mapped, runs)):
        if len(run):
            place = np.minimum(run.searchsorted(wanted), len(run) - 1)
            if (run[place] == wanted).any():
                found.append(number)
    return found


def check_conflicts(n_conflicts: int, n_rows: int, example: str, where: str = "") -> None:
    """Raise `SurveyError` when so many rows share their key with another that it is not a key.

    Conflicts are rows beyond the first of their key that are not its exact duplicates.
    """
    if n_conflicts > 100 and n_conflicts > 0.01 * n_rows:
        raise SurveyError(
            f"{where + ': ' if where else ''}'obs_id' is not a key: {n_conflicts} of {n_rows} rows "
            f"have the key of another row and other values, for example {example}",
            'Map obs_id to another column, or join several: join = ["field", "fibre"].',
        )


def _mapped(run: Run) -> KeyArray:
    """A run to look into; not to be kept, for each that is mapped keeps a file open."""
    return np.load(local(run), mmap_mode="r") if isinstance(run, Path) else run


def _keys(pieces: Sequence[Path | pa.Table]) -> Iterator[tuple[pa.Array, IntArray]]:
    for piece in pieces:
        if isinstance(piece, Path):
            piece = pa.ipc.open_file(pa.memory_map(str(local(piece)))).read_all()
        for batch in piece.to_batches():
            yield batch["obs_id"], batch[HEALPIX_COLUMN].to_numpy()


def _found(hashes: KeyArray, wanted: KeyArray) -> tuple[IntArray, IntArray]:
    """Rows whose hash is among those wanted (ascending), and its place there."""
    may_be = np.zeros(1 << 16, dtype=bool)
    may_be[wanted.astype(np.uint16)] = True
    row: IntArray = np.flatnonzero(may_be[hashes.astype(np.uint16)])
    place = np.minimum(np.searchsorted(wanted, hashes[row]), len(wanted) - 1)
    is_wanted = wanted[place] == hashes[row]
    return row[is_wanted], place[is_wanted]


# --- rows with one key ----------------------------------------------------------------------------


class Merged(NamedTuple):
    """One partition."""

    rows: pa.Table  # by _healpix_29 and obs_id, each key once, without _file and _row
    rejected: pa.Table  # rows whose key another row with other content has
    n_duplicates: int  # exact ones, which were left out


def merge_rows(tables: Sequence[pa.Table], files: Sequence[str]) -> Merged:
    """Merge sorted slices of `Batch.rows` that lie in one partition.

    Of rows with one ``obs_id`` at one place the one with most values is kept, then with the fewest
    failed cuts, then with the highest ``snr``, then with the smallest content, so that the result
    depends on the rows alone. The others are duplicates (equal content) or rejected; ``files`` are
    the names there, by index.
    """
    table = pa.concat_tables(tables)
    cells, ids = table[HEALPIX_COLUMN].to_numpy(), one_array(table["obs_id"])
    order = sort_order(cells, ids)
    candidates = np.flatnonzero(np.diff(cells[order]) == 0) + 1
    left, right = (taken(ids, order[candidates - step]) for step in (1, 0))
    same = np.zeros(len(order) + 1, dtype=bool)  # whether a row has the key of the one before
    same[candidates] = pc.equal(left, right).to_numpy(zero_copy_only=False)
    where = np.flatnonzero(same[:-1] | same[1:])
    keep = np.ones(len(order), dtype=bool)
    rejected, n_duplicates = REJECTED_SCHEMA.empty_table(), 0
    if len(where):
        winner, lost = _settle(_rows(table, order[where]))
        rejected = rejected_rows(lost, files)
        n_duplicates = int(np.count_nonzero(~winner)) - lost.num_rows
        keep[where] = winner
    rows = _rows(table.drop_columns([FILE, ROW]), order[keep])
    return Merged(rows, rejected, n_duplicates)


def _rows(table: pa.Table, index: IntArray) -> pa.Table:
    """Rows of a table of many chunks; one column after the other, to hold one copy of one only."""
    columns = [taken(one_array(column), index) for column in table.columns]
    return pa.Table.from_arrays(columns, schema=table.schema)


def losing_rows(rows: pa.Table) -> pa.Table:
    """Rows that lose where one ``obs_id`` stands at several places, by the rule of `merge_rows`.

    Of all `Batch.rows` of these keys those to take out, in the order of files and rows. Rows equal
    to the one that is kept stay: `merge_rows` drops them.
    """
    return _settle(rows)[1]


def without_rows(rows: pa.Table, losers: pa.Table) -> pa.Table:
    """Rows that are not among others."""
    lost, numbers = (  # file and row there as one: files have less than 10**12 rows
        some[FILE].to_numpy().astype(np.int64) << 40 | some[ROW].to_numpy()
        for some in (losers, rows)
    )
    return rows.filter(pa.array(~np.isin(numbers, lost)))


def rejected_rows(rows: pa.Table, files: Sequence[str]) -> pa.Table:
    """`losing_rows` as a table of ``REJECTED_SCHEMA``."""
    names = pa.array(list(files), pa.string()).take(one_array(rows[FILE]))
    reason, ids = pa.repeat(CONFLICT, rows.num_rows), rows["obs_id"].cast(pa.string())
    columns = [names, rows[ROW], reason, ids, rows["ra"], rows["dec"]]
    return pa.Table.from_arrays(columns, schema=REJECTED_SCHEMA)


def _settle(rows: pa.Table) -> tuple[BoolArray, pa.Table]:
    """Which row of each ``obs_id`` to keep, and those of other content, by file and row."""
    columns = {n: one_array(rows[n]) for n in rows.column_names if n not in (FILE, ROW)}
    content = {name: _codes(column) for name, column in columns.items()}
    group = content["obs_id"] - 1
    n_valid = np.sum([is_valid(column) for column in columns.values()], axis=0)
    n_failed = np.bitwise_count(columns["quality"].to_numpy())
    snr = np.zeros(len(group))
    if "snr" in columns:
        snr = columns["snr"].cast(pa.float64()).fill_null(-np.inf).to_numpy()
    order = np.lexsort((*reversed(content.values()), -snr, n_failed, -n_valid, group))
    best = order[np.flatnonzero(np.diff(group[order], prepend=-1))]
    winner = np.isin(np.arange(len(group)), best)
    differs = np.any([codes != codes[best[group]] for codes in content.values()], axis=0)
    lost = rows.filter(pa.array(differs))
    return winner, lost.sort_by([(FILE, "ascending"), (ROW, "ascending")])
