"""Which rows of two catalogs are the same star: exact, by Gaia id and by position.

The rule for one pair of rows:

* **Common epoch.** If the right row has a proper motion (both components) and both rows have an
  epoch, the right row is moved to the left row's epoch; else, if the left row has one and both
  have an epoch, the left row is moved to the right row's epoch; else both stay where they are. Rows
  move along great circles (`healpix.propagate`).
* **Ids.** In a Gaia release in which both rows have an id, the ids decide. Equal in any release:
  the pair is a candidate when its separation is at most ``id_radius_arcsec`` (``by_id``). Different
  in every common release: never a pair, however near (a conflict). Ids of different releases are
  never compared, for DR2 and DR3 number the same star differently.
* **Positions.** Without a common release the pair is a candidate when its separation is at most
  ``radius_arcsec``.
* **Best.** Of the candidates of a left row: those by id first, then the smallest separation, then
  the smallest key of the right row.

The candidates are those of brute force over all pairs, also at the poles, across RA 0 and where
only three base pixels meet: a row looks as far as its own proper motion can carry it over the
epochs of the other side, and every pair found is measured one by one at its own common epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from sos_dask.columns import BoolArray, FloatArray, IntArray, floats_or_nan
from sos_dask.errors import ConfigError, PartitionError
from sos_dask.schema import HEALPIX_COLUMN, require_columns
from sos_dask.sky import healpix, neighbours
from sos_dask.sky.neighbours import first_of_runs, is_crowded, order_by, starts
from sos_dask.stars.group import GAIA_IDS, Radii, rank_of

MOTION = ("pmra", "pmdec", "position_epoch")
_KeysOf = Callable[[IntArray], pa.ChunkedArray]  # keys of rows

# An id on this many pairs of rows is a placeholder or a calibration star: search it on the sky,
# so that a million rows with the same wrong id cannot make a million times a million pairs.
_MANY_PAIRS = 4096
# Of rows that crowd, so many pairs in a partition when all are wanted: about 4 GB.
_MOST_PAIRS = 1 << 25


class MatchSettings(Radii):
    """How two catalogs are matched."""

    radius_arcsec: float = Field(
        1.0,
        gt=0,
        lt=3600,
        description="Largest separation of a pair found by position, at the common epoch.",
    )
    id_radius_arcsec: float = Field(
        10.0, gt=0, lt=3600, description="Largest separation of a pair with equal Gaia ids."
    )
    pairs: Literal["best", "all"] = Field(
        "best", description="One pair for each target, or every candidate."
    )


@dataclass(frozen=True)
class Motion:
    """Bounds of the motion in a whole catalog.

    The largest total proper motion is 0 where there is none; the first and the last
    ``position_epoch``, in years, are NaN.
    """

    max_pm_mas_yr: float
    epoch_min: float
    epoch_max: float


@dataclass(frozen=True)
class Matches:
    """Pairs of rows (n,) by their numbers, sorted by (left, by_id first, separation, right key).

    Separations are at the common epoch; ``n_candidates`` are those of that left row; ``by_id``: the
    pair shares a Gaia id; ``n_conflicts`` are pairs within ``radius_arcsec`` that are none, because
    their ids differ.
    """

    left: IntArray
    right: IntArray
    separation_arcsec: FloatArray
    n_candidates: NDArray[np.int32]
    by_id: BoolArray
    n_conflicts: int


def reach_arcsec(
    settings: MatchSettings,
    left: Motion,
    right: Motion,
    ids: bool,
    pm_mas_yr: FloatArray | float | None = None,
) -> FloatArray | float:
    """Bound how far apart the stored positions of a pair can be: the margin a partition needs.

    Motions are bounds over the whole of each catalog; ``ids``: the catalogs have a Gaia release in
    common; ``pm_mas_yr``: total proper motions (n,) of single right rows, instead of the largest
    one. The bound includes a milliarcsecond for rounding.
    """
    radius = settings.id_radius_arcsec if ids and settings.use_gaia_id else settings.radius_arcsec
    years = max(left.epoch_max - right.epoch_min, right.epoch_max - left.epoch_min, 0.0)
    # A comparison with NaN is false: a catalog without epochs does not move.
    pm = right.max_pm_mas_yr if pm_mas_yr is None else pm_mas_yr
    drift = np.maximum(left.max_pm_mas_yr, pm) * years / 1000.0 if years > 0 else 0.0
    return (radius + drift) * (1.0 + 1e-9) + 1e-3


def moved_arcsec(motion: Motion, epoch: float) -> float:
    """Bound how far a star of a catalog can stand from its place at the common epoch."""
    years = max(abs(motion.epoch_min - epoch), abs(motion.epoch_max - epoch))
    return motion.max_pm_mas_yr / 1000.0 * years if np.isfinite(years) else 0.0


def at_epoch(table: pa.Table, epoch: float) -> pa.Table:
    """Move the rows that have a proper motion and an epoch; the others stay as they are."""
    if not set(MOTION) <= set(table.schema.names) or not table.num_rows:
        return table
    pmra, pmdec, since = (np.asarray(table[name].to_numpy(), np.float64) for name in MOTION)
    moving = np.isfinite(pmra) & np.isfinite(pmdec) & np.isfinite(since)
    pmra, pmdec, years = (np.where(moving, values, 0.0) for values in (pmra, pmdec, epoch - since))
    ra, dec = healpix.propagate(table["ra"].to_numpy(), table["dec"].to_numpy(), pmra, pmdec, years)
    new = {"ra": ra, "dec": dec, HEALPIX_COLUMN: healpix.ang2pix(ra, dec)}
    new["position_epoch"] = np.where(moving, epoch, since)
    for name, values in new.items():
        index, field = table.schema.get_field_index(name), table.schema.field(name)
        table = table.set_column(index, field, pa.array(values, field.type, from_pandas=True))
    return table


def match(
    left: pa.Table, right: pa.Table, settings: MatchSettings, right_key: str | _KeysOf = "star_id"
) -> Matches:
    """Find the pairs of two sky tables by the rule of this module.

    The tables are sorted by ``_healpix_29``, with ``ra``, ``dec`` and, where there are any,
    ``pmra``, ``pmdec``, ``position_epoch``, ``gaia_dr3_source_id``, ``gaia_dr2_source_id`` (null or
    not positive: no id). ``right`` holds every row that can match (`reach_arcsec`), and may hold
    more. ``right_key`` is the column of the right table that breaks ties, int64 or string; or what
    gives that column of some rows, for keys that are read only where there are ties.

    Raises `ConfigError`: a column is missing; `PartitionError`: a table is not sorted on the sky.
    """
    if isinstance(right_key, str):
        require_columns(right.schema, (right_key,), "the right side of the crossmatch")
        right_key = partial(_taken, right.column(right_key))
    a = _Side.read(left, "the left side of the crossmatch", settings.use_gaia_id)
    b = _Side.read(right, "the right side of the crossmatch", settings.use_gaia_id)
    rank: _Rank = partial(_rank, right_key)
    most = sys.maxsize
    sides = [(_Classes.single(a), _Classes.single(b))] * 2
    if is_crowded(a.cells, settings.radius_arcsec) or is_crowded(b.cells, settings.radius_arcsec):
        most, rows = _MOST_PAIRS, np.arange(len(a.cells))
        preference = rank(np.arange(len(b.cells)))
        rank = preference.__getitem__
        sides = [
            (_Classes.alike(a, rows, ids), _Classes.alike(b, preference, ids))
            for ids in (True, False)
        ]
    conflicts: list[int] = []
    by_id, by_position = (
        (one, other, _candidates(one, other, settings, ids, conflicts))
        for ids, (one, other) in zip((True, False), sides, strict=True)
    )
    if settings.pairs == "all":
        return _sorted(_every(*by_id, most), _every(*by_position, most), conflicts, rank)
    n_id, row_id, apart_id = _best(*by_id, rank)
    n_near, row_near, apart_near = _best(*by_position, rank)
    i = np.flatnonzero(n_id + n_near)
    has_id = n_id[i] > 0
    chosen = np.where(has_id, row_id[i], row_near[i])
    separation = np.where(has_id, apart_id[i], apart_near[i])
    n_candidates = (n_id + n_near)[i].astype(np.int32)
    return Matches(i, chosen, separation, n_candidates, has_id, sum(conflicts))


@dataclass(frozen=True)
class _Side:
    """The columns of one side as arrays; NaN and 0 stand for null.

    ``position`` is ra, dec, epoch, pmra and pmdec: NaN where the table has none.
    """

    position: tuple[FloatArray, ...]
    cells: IntArray
    ids: dict[str, IntArray]

    @classmethod
    def read(cls, table: pa.Table, where: str, use_gaia_id: bool) -> _Side:
        require_columns(table.schema, (HEALPIX_COLUMN, "ra", "dec"), where)
        cells = table.column(HEALPIX_COLUMN).to_numpy()
        if np.any(cells[1:] < cells[:-1]):
            raise PartitionError(f"{where} is not sorted by {HEALPIX_COLUMN}")
        ids = {
            name: _ids(table, name, where)
            for name in GAIA_IDS.values()
            if use_gaia_id and name in table.schema.names
        }
        names = ("ra", "dec", "position_epoch", "pmra", "pmdec")
        return cls(tuple(floats_or_nan(table, name) for name in names), cells, ids)

    def take(self, rows: IntArray) -> _Side:
        ids = {name: values[rows] for name, values in self.ids.items()}
        return _Side(tuple(values[rows] for values in self.position), self.cells[rows], ids)

    @property
    def epoch(self) -> FloatArray:
        return self.position[2]

    @cached_property
    def has_epoch(self) -> BoolArray:
        return np.isfinite(self.epoch)

    @cached_property
    def moves(self) -> BoolArray:
        _, _, _, pmra, pmdec = self.position
        return np.asarray(np.isfinite(pmra) & np.isfinite(pmdec) & self.has_epoch)

    def at(self, rows: IntArray, epoch: FloatArray | float) -> tuple[FloatArray, FloatArray]:
        """Positions of rows that move, at an epoch."""
        ra, dec, own, pmra, pmdec = (values[rows] for values in self.position)
        return healpix.propagate(ra, dec, pmra, pmdec, epoch - own)


_Block = tuple[IntArray, IntArray, FloatArray]
_Rank = Callable[[IntArray], IntArray]  # places of right rows among each other, by their key


@dataclass(frozen=True)
class _Classes:
    """Rows of one side that are alike in all that decides, by the sky; ``row`` is one of each.

    Where rows crowd, those that are alike, as at one position, are compared only once.
    """

    side: _Side
    row: IntArray
    of: IntArray
    size: IntArray

    @classmethod
    def single(cls, side: _Side) -> _Classes:
        """Every row by itself."""
        row = np.arange(len(side.cells))
        return cls(side, row, row, np.ones_like(row))

    @classmethod
    def alike(cls, side: _Side, preference: IntArray, ids: bool) -> _Classes:
        """Classes of rows with the same ids, or with ids of the same releases.

        Whether ids conflict depends on the releases; pairs of equal ids are found by themselves.
        """
        keys: list[NDArray[Any]]
        keys = [np.ascontiguousarray(v).view(np.int64) for v in reversed(side.position)]
        keys += [np.maximum(v, 0) if ids else v > 0 for v in side.ids.values()]
        order = np.lexsort((preference, *keys, side.cells))
        row, of = first_of_runs(order, *keys, side.cells)
        return cls(side.take(row), row, of, np.bincount(of, minlength=len(row)))

    @cached_property
    def members(self) -> tuple[IntArray, IntArray]:
        """Rows by class, and where those of each class begin."""
        return np.argsort(self.of, kind="stable"), np.cumsum(self.size) - self.size


def _candidates(
    one: _Classes, other: _Classes, settings: MatchSettings, ids: bool, conflicts: list[int]
) -> Iterator[_Block]:
    """Candidates by id or by position; ``conflicts`` add up to the pairs that ids refuse."""
    radius = settings.radius_arcsec
    if ids:
        for p, q, separation in _equal_ids(one.side, other.side, settings.id_radius_arcsec):
            n_pairs = one.size[p] * other.size[q]
            conflicts.append(-int(n_pairs[separation <= radius].sum()))
            yield p, q, separation
        return
    for p, q, separation in _near(one.side, other.side, radius):
        common = _have_common_release(one.side, other.side, p, q)
        conflicts.append(int((one.size[p] * other.size[q])[common].sum()))
        yield p[~common], q[~common], separation[~common]


def _best(
    one: _Classes, other: _Classes, blocks: Iterator[_Block], rank: _Rank
) -> tuple[IntArray, IntArray, FloatArray]:
    """By left row: how many candidates there are, the best, and its separation."""
    count = np.zeros(len(one.row), dtype=np.int64)
    best, nearest = np.full(len(count), -1), np.full(len(count), np.inf)

    def preferred(p: IntArray, row: IntArray, separation: FloatArray) -> _Block:
        """The nearest pair of each class, by the key of equally near ones."""
        some = separation == nearest[p]
        p, row, separation = p[some], row[some], separation[some]
        order = order_by((p,), lambda tied: rank(row[tied]))
        first = order[starts(p[order])]
        return p[first], row[first], separation[first]

    kept: list[_Block] = [(best[:0], best[:0], nearest[:0])]
    for p, q, separation in blocks:
        np.add.at(count, p, other.size[q])
        np.minimum.at(nearest, p, separation)
        kept.append(preferred(p, other.row[q], separation))
    p, row, _ = preferred(*_together(kept))
    best[p] = row
    return count[one.of], best[one.of], nearest[one.of]


def _every(one: _Classes, other: _Classes, blocks: Iterator[_Block], most: int) -> _Block:
    """All pairs of rows, refused where they are more than ``most``."""
    found: list[_Block] = [(one.row[:0], one.row[:0], np.empty(0))]
    total = 0
    for p, q, separation in blocks:
        n_pairs = one.size[p] * other.size[q]
        total += int(n_pairs.sum())
        if total > most:
            a, b = p[np.argmax(n_pairs)], q[np.argmax(n_pairs)]
            ra, dec = (values[a] for values in one.side.position[:2])
            raise ConfigError(
                f"pairs = 'all': {total:,} pairs or more in one partition; {one.size[a]:,} target "
                f"and {other.size[b]:,} reference rows crowd at ra {ra:.6f}, dec {dec:.6f}",
                f"At most {most:,} are made there: use pairs = 'best', or remove these rows.",
            )
        at = neighbours.runs(np.zeros_like(n_pairs), n_pairs)
        p, q = np.repeat(p, n_pairs), np.repeat(q, n_pairs)
        (rows, first), (others, other_first) = one.members, other.members
        i, j = rows[first[p] + at // other.size[q]], others[other_first[q] + at % other.size[q]]
        found.append((i, j, np.repeat(separation, n_pairs)))
    return _together(found)


def _sorted(by_id: _Block, by_position: _Block, conflicts: list[int], rank: _Rank) -> Matches:
    """All candidates by left row, and how many each one has."""
    left, right, separation = _together([by_id, by_position])
    far = np.arange(len(left)) >= len(by_id[0])

    def place(some: IntArray) -> IntArray:
        """Places of candidates of rows that have several."""
        keys = separation[some], far[some], left[some]
        return np.argsort(order_by(keys, lambda tied: rank(right[some[tied]])))

    order = order_by((left,), place)
    left = left[order]
    n_candidates = np.bincount(left)[left].astype(np.int32)
    kept = left, right[order], separation[order], n_candidates, ~far[order]
    return Matches(*kept, sum(conflicts))


def _together(blocks: list[_Block]) -> _Block:
    i, j, separation = (np.concatenate(side) for side in zip(*blocks, strict=True))
    return i, j, separation


def _taken(column: pa.ChunkedArray, rows: IntArray) -> pa.ChunkedArray:
    return column.take(pa.array(rows))


def _rank(keys_of: _KeysOf, rows: IntArray) -> IntArray:
    """Places of rows by their key, then as they stand."""
    return np.argsort(np.lexsort((rows, rank_of(keys_of(rows)))))


def _ids(table: pa.Table, name: str, where: str) -> IntArray:
    try:
        ids = table.column(name).cast(pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise PartitionError(f"{where}: column '{name}' is not an id: {error}") from None
    return np.asarray(pc.fill_null(ids, 0).to_numpy())


def _have_common_release(a: _Side, b: _Side, i: IntArray, j: IntArray) -> BoolArray:
    """For pairs: whether both rows have an id of one release."""
    common = np.zeros(len(i), dtype=np.bool_)
    for name in a.ids.keys() & b.ids.keys():
        common |= (a.ids[name][i] > 0) & (b.ids[name][j] > 0)
    return common


def _separation(a: _Side, b: _Side, i: IntArray, j: IntArray) -> FloatArray:
    """Separation of pairs at their common epoch."""
    (ra1, dec1), (ra2, dec2) = ([v[k] for v in s.position[:2]] for s, k in ((a, i), (b, j)))
    if a.has_epoch.any() and b.has_epoch.any():
        right = b.moves[j] & a.has_epoch[i]
        if right.any():
            ra2[right], dec2[right] = b.at(j[right], a.epoch[i[right]])
        left = ~right & a.moves[i] & b.has_epoch[j]
        if left.any():
            ra1[left], dec1[left] = a.at(i[left], b.epoch[j[left]])
    return healpix.separation_arcsec(ra1, dec1, ra2, dec2)


def _near(a: _Side, b: _Side, radius_arcsec: float) -> Iterator[_Block]:
    """Every pair within a radius at its common epoch."""
    for i, j in _near_candidates(a, b, radius_arcsec):
        separation = _separation(a, b, i, j)
        near = separation <= radius_arcsec
        yield i[near], j[near], separation[near]


def _near_candidates(a: _Side, b: _Side, radius: float) -> Iterator[tuple[IntArray, IntArray]]:
    """Pairs that contain all those within a radius, by which of the two rows would move."""
    for j, i in _moved(b, b.moves, a, a.has_epoch, radius):
        yield i, j
    yield from _moved(a, a.moves, b, b.has_epoch & ~b.moves, radius)
    for left, right in (
        (~a.has_epoch, b.moves),
        (~a.moves, b.has_epoch & ~b.moves),
        (np.ones_like(a.moves), ~b.has_epoch),
    ):
        i, j = np.flatnonzero(left), np.flatnonzero(right)
        if len(i) <= len(j):
            for one, other in neighbours.candidates(a.cells[i], radius, b.cells[j]):
                yield i[one], j[other]
        else:
            for other, one in neighbours.candidates(b.cells[j], radius, a.cells[i]):
                yield i[one], j[other]


def _moved(
    mover: _Side, moves: BoolArray, other: _Side, stays: BoolArray, radius_arcsec: float
) -> Iterator[tuple[IntArray, IntArray]]:
    """Candidates of rows that move to the other row's epoch with rows that stay.

    A row is moved to the middle of the epochs it may meet, and looks half their span farther.
    """
    rows, others = np.flatnonzero(moves), np.flatnonzero(stays)
    if len(rows) == 0 or len(others) == 0:
        return
    epochs = other.epoch[others]
    first, last = float(epochs.min()), float(epochs.max())
    ra, dec = mover.at(rows, (first + last) / 2)
    total_pm = np.hypot(mover.position[3][rows], mover.position[4][rows])
    reach = radius_arcsec + total_pm * ((last - first) / 2000.0)
    for i, j in neighbours.candidates(healpix.ang2pix(ra, dec), reach, other.cells[others]):
        yield rows[i], others[j]


def _equal_ids(a: _Side, b: _Side, radius_arcsec: float) -> Iterator[_Block]:
    """Every pair within a radius with the same id in any release, once."""
    done: list[str] = []
    for name in GAIA_IDS.values():
        if name not in a.ids or name not in b.ids:
            continue
        one, other = a.ids[name], b.ids[name]
        for i, j, separation in _join_ids(a, b, one, other, radius_arcsec):
            new = separation <= radius_arcsec
            for earlier in done:
                new &= (a.ids[earlier][i] <= 0) | (a.ids[earlier][i] != b.ids[earlier][j])
            yield i[new], j[new], separation[new]
        done.append(name)


def _join_ids(
    a: _Side, b: _Side, one: IntArray, other: IntArray, radius_arcsec: float
) -> Iterator[_Block]:
    order = np.argsort(other, kind="stable")
    order = order[np.searchsorted(other[order], 1) :]
    values, first, count = np.unique(other[order], return_index=True, return_counts=True)
    if len(values) == 0:
        return
    place = pc.index_in(pa.array(one), value_set=pa.array(values))
    i = np.flatnonzero(pc.is_valid(place).to_numpy(zero_copy_only=False))
    value = pc.fill_null(place, 0).to_numpy()[i]
    crowded = np.bincount(value, minlength=len(values)) * count > _MANY_PAIRS
    if crowded.any():
        rows = i[crowded[value]]
        others = np.flatnonzero(np.isin(other, values[crowded]))
        for p, q, separation in _near(a.take(rows), b.take(others), radius_arcsec):
            same = one[rows[p]] == other[others[q]]
            yield rows[p[same]], others[q[same]], separation[same]
        i, value = i[~crowded[value]], value[~crowded[value]]
    i, j = np.repeat(i, count[value]), order[neighbours.runs(first[value], count[value])]
    yield i, j, _separation(a, b, i, j)
