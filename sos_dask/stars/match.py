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
from sos_dask.sky.neighbours import is_crowded, preferred
from sos_dask.stars.combine import ties
from sos_dask.stars.group import GAIA_IDS, Radii

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

    Parameters
    ----------
    max_pm_mas_yr : float
        Largest total proper motion, 0 where there is none.
    epoch_min, epoch_max : float, yr
        First and last ``position_epoch``, NaN where there is none.
    """

    max_pm_mas_yr: float
    epoch_min: float
    epoch_max: float


@dataclass(frozen=True)
class Matches:
    """Pairs of rows, sorted by (left, by_id first, separation, right key).

    Parameters
    ----------
    left, right : ndarray of int64, shape (n,)
        Row numbers.
    separation_arcsec : ndarray of float64, shape (n,)
        At the common epoch.
    n_candidates : ndarray of int32, shape (n,)
        Candidates of that left row.
    by_id : ndarray of bool, shape (n,)
        The pair shares a Gaia id.
    n_conflicts : int
        Pairs within ``radius_arcsec`` that are none, because their ids differ.
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

    Parameters
    ----------
    left, right : Motion
        Bounds over the whole of each catalog.
    ids : bool
        Whether the catalogs have a Gaia release in common.
    pm_mas_yr : float or ndarray of float64, shape (n,), optional
        Total proper motions of single right rows, instead of the largest one.

    Returns
    -------
    float or ndarray of float64, shape (n,), arcsec
        Includes a milliarcsecond for rounding.
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
    left: pa.Table,
    right: pa.Table,
    settings: MatchSettings,
    right_key: str | _KeysOf = "star_id",
) -> Matches:
    """Find the pairs of two sky tables by the rule of this module.

    Parameters
    ----------
    left, right : pyarrow.Table
        Sorted by ``_healpix_29``; ``ra``, ``dec`` and, where there are any, ``pmra``, ``pmdec``,
        ``position_epoch``, ``gaia_dr3_source_id``, ``gaia_dr2_source_id`` (null or not positive: no
        id). ``right`` holds every row that can match (`reach_arcsec`), and may hold more.
    right_key : str or callable
        Column of the right table that breaks ties, int64 or string; or what gives that column of
        some rows, for keys that are read only where there are ties.

    Returns
    -------
    Matches

    Raises
    ------
    ConfigError
        A column is missing.
    PartitionError
        A table is not sorted on the sky.
    """
    if isinstance(right_key, str):
        require_columns(right.schema, (right_key,), "the right side of the crossmatch")
        right_key = partial(_taken, right.column(right_key))
    a = _Side.read(left, "the left side of the crossmatch", settings.use_gaia_id)
    b = _Side.read(right, "the right side of the crossmatch", settings.use_gaia_id)
    radius, id_radius = settings.radius_arcsec, settings.id_radius_arcsec
    if is_crowded(a.cells, radius) or is_crowded(b.cells, radius):
        return _match_crowds(a, b, settings, right_key)
    found = list(_equal_ids(a, b, id_radius))
    n_by_id = sum(len(i) for i, _, _ in found)
    n_conflicts = -sum(int(np.count_nonzero(apart <= radius)) for _, _, apart in found)
    for i, j, separation in _near(a, b, radius):
        common = _have_common_release(a, b, i, j)
        n_conflicts += int(np.count_nonzero(common))
        found.append((i[~common], j[~common], separation[~common]))
    return _ordered(found, n_by_id, n_conflicts, right_key, settings.pairs == "all")


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
        return _Side(
            tuple(values[rows] for values in self.position),
            self.cells[rows],
            {name: values[rows] for name, values in self.ids.items()},
        )

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


@dataclass(frozen=True)
class _Classes:
    """Rows of one side that are alike in all that decides, by the sky; ``row`` is one of each."""

    side: _Side
    row: IntArray
    of: IntArray
    size: IntArray

    @classmethod
    def of_side(cls, side: _Side, preference: IntArray, ids: bool) -> _Classes:
        """Classes of rows with the same ids, or with ids of the same releases."""
        keys: list[NDArray[Any]]
        keys = [np.ascontiguousarray(v).view(np.int64) for v in reversed(side.position)]
        keys += [np.maximum(v, 0) if ids else v > 0 for v in side.ids.values()]
        row, of = preferred((preference,), *keys, side.cells)
        return cls(side.take(row), row, of, np.bincount(of, minlength=len(row)))

    def members(self) -> tuple[IntArray, IntArray]:
        """Rows by class, and where those of each class begin."""
        return np.argsort(self.of, kind="stable"), np.cumsum(self.size) - self.size


def _match_crowds(a: _Side, b: _Side, settings: MatchSettings, keys_of: _KeysOf) -> Matches:
    """Match where many rows crowd: rows that are alike, as those at one position, only once.

    Whether ids conflict depends on the releases; pairs of equal ids are found by themselves.
    """
    key = pc.rank(keys_of(np.arange(len(b.cells))), tiebreaker="dense").to_numpy()
    order = np.lexsort((np.arange(len(key)), key))
    preference = np.empty(len(key), dtype=np.int64)
    preference[order] = np.arange(len(key))
    sides = [
        (_Classes.of_side(a, np.arange(len(a.cells)), ids), _Classes.of_side(b, preference, ids))
        for ids in (True, False)
    ]
    n_conflicts = 0

    def by_id() -> Iterator[_Block]:
        nonlocal n_conflicts
        one, other = sides[0]
        for p, q, separation in _equal_ids(one.side, other.side, settings.id_radius_arcsec):
            n_pairs = one.size[p] * other.size[q]
            n_conflicts -= int(n_pairs[separation <= settings.radius_arcsec].sum())
            yield p, q, separation

    def by_position() -> Iterator[_Block]:
        nonlocal n_conflicts
        one, other = sides[1]
        for p, q, separation in _near(one.side, other.side, settings.radius_arcsec):
            common = _have_common_release(one.side, other.side, p, q)
            n_conflicts += int((one.size[p] * other.size[q])[common].sum())
            yield p[~common], q[~common], separation[~common]

    if settings.pairs == "all":
        found: list[list[_Block]] = []
        n_pairs = 0
        for (one, other), blocks in zip(sides, (by_id(), by_position()), strict=True):
            found.append([])
            for block in blocks:
                n_pairs += int((one.size[block[0]] * other.size[block[1]]).sum())
                if n_pairs > _MOST_PAIRS:
                    _refuse_all(n_pairs, one, other, block)
                found[-1].append(_pairs_of(one, other, block))
        n_by_id = sum(len(i) for i, _, _ in found[0])
        return _ordered(found[0] + found[1], n_by_id, n_conflicts, keys_of, True)
    best = [
        _best(one, other, preference, blocks)
        for (one, other), blocks in zip(sides, (by_id(), by_position()), strict=True)
    ]
    (n_id, row_id, apart_id), (n_near, row_near, apart_near) = best
    left = np.flatnonzero(n_id + n_near)
    has_id = n_id[left] > 0
    return Matches(
        left,
        np.where(has_id, row_id[left], row_near[left]),
        np.where(has_id, apart_id[left], apart_near[left]),
        (n_id + n_near)[left].astype(np.int32),
        has_id,
        n_conflicts,
    )


def _best(
    one: _Classes, other: _Classes, preference: IntArray, blocks: Iterator[_Block]
) -> tuple[IntArray, IntArray, FloatArray]:
    """By left row: how many candidates there are, the best, and its separation."""
    count = np.zeros(len(one.row), dtype=np.int64)
    best, apart = np.full(len(count), -1), np.full(len(count), np.inf)
    for p, q, separation in blocks:
        np.add.at(count, p, other.size[q])
        nearest = apart.copy()
        np.minimum.at(nearest, p, separation)
        some = separation == nearest[p]  # few
        p, row = p[some], other.row[q[some]]
        order = np.lexsort((preference[row], p))
        order = order[np.append(True, np.diff(p[order]) != 0)[: len(order)]]
        p, row = p[order], row[order]
        better = nearest[p] < apart[p]
        better |= preference[row] < preference[best[p]]
        best[p[better]], apart = row[better], nearest
    return count[one.of], best[one.of], apart[one.of]


def _pairs_of(one: _Classes, other: _Classes, block: _Block) -> _Block:
    """The pairs of rows of pairs of classes."""
    p, q, separation = block
    (rows, first), (others, other_first) = one.members(), other.members()
    n_pairs = one.size[p] * other.size[q]
    at = neighbours.runs(np.zeros_like(n_pairs), n_pairs)
    p, q = np.repeat(p, n_pairs), np.repeat(q, n_pairs)
    i, j = rows[first[p] + at // other.size[q]], others[other_first[q] + at % other.size[q]]
    return i, j, np.repeat(separation, n_pairs)


def _refuse_all(n_pairs: int, one: _Classes, other: _Classes, block: _Block) -> None:
    at = int(np.argmax(one.size[block[0]] * other.size[block[1]]))
    p, q = block[0][at], block[1][at]
    raise ConfigError(
        f"pairs = 'all': {n_pairs:,} pairs or more in one partition; {one.size[p]:,} target and "
        f"{other.size[q]:,} reference rows crowd at ra {one.side.position[0][p]:.6f}, "
        f"dec {one.side.position[1][p]:.6f}",
        f"At most {_MOST_PAIRS:,} are made there: use pairs = 'best', or remove these rows.",
    )


def _taken(column: pa.ChunkedArray, rows: IntArray) -> pa.ChunkedArray:
    return column.take(pa.array(rows))


def _ids(table: pa.Table, name: str, where: str) -> IntArray:
    try:
        ids = table.column(name).cast(pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise PartitionError(f"{where}: column '{name}' is no id: {error}") from None
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


def _ordered(
    found: list[_Block], n_by_id: int, n_conflicts: int, keys_of: _KeysOf, every: bool
) -> Matches:
    """Sort candidates, count those of each left row, and keep the best or all."""
    none = np.empty(0, dtype=np.int64)
    blocks = zip((none, none, np.empty(0)), *found, strict=True)
    left, right, separation = (np.concatenate(side) for side in blocks)
    by_position = np.arange(len(left)) >= n_by_id
    order = np.argsort(left, kind="stable")
    at = np.flatnonzero(ties(left[order]))  # of few rows there are several candidates
    some = order[at]
    order[at] = some[np.lexsort((right[some], separation[some], by_position[some], left[some]))]
    some = order[at]
    at = at[ties(left[some], by_position[some], separation[some])]
    if len(at):  # only then do the keys matter
        some = order[at]
        key = pc.rank(keys_of(right[some]), tiebreaker="dense").to_numpy()
        order[at] = some[
            np.lexsort((right[some], key, separation[some], by_position[some], left[some]))
        ]
    left, right, separation = left[order], right[order], separation[order]
    starts = np.flatnonzero(np.append(True, left[1:] != left[:-1])[: len(left)])
    count = np.diff(np.append(starts, len(left)))
    keep = slice(None) if every else starts
    return Matches(
        left[keep],
        right[keep],
        separation[keep],
        (np.repeat(count, count) if every else count).astype(np.int32),
        ~by_position[order][keep],
        n_conflicts,
    )
