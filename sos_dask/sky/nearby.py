"""Rows near each other on the sky, found by their cells."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ConfigError
from sos_dask.sky.healpix import MAX_ORDER, FloatArray, IntArray, coordinates, neighbours
from sos_dask.sky.neighbours import largest_step
from sos_dask.sky.sphere import separation_arcsec

# Cells a reach is spread over at first: one cell is so many times wider than it. Measured: wider
# cells need fewer entries in neighbours, narrower ones fewer candidates.
_CELLS_PER_REACH = 16.0
# A cell with more rows than this is searched again at a deeper order, where that order allows it.
_CROWDED = 64
_BLOCK = 1 << 21
# Cells of `pairs_within` are four to eight times wider than the radius (measured, too).
_SELF_ORDERS = 3
# Steps of the eight neighbours in the order of healpy: SW, W, NW, N, NE, E, SE, S.
_STEP_X = np.array([-1, -1, 0, 1, 1, 1, 0, -1])
_STEP_Y = np.array([0, 1, 1, 1, 0, -1, -1, -1])


def candidates(
    cells: IntArray,
    reach_arcsec: FloatArray | float,
    sorted_cells: IntArray,
    *,
    later_only: bool = False,
) -> Iterator[tuple[IntArray, IntArray]]:
    """Index pairs that contain every pair of positions within reach of each other, in blocks.

    Each position is entered into its cell and into those neighbours that the reach can touch, at
    an order whose cells are wider than the reach; the entries are joined with the sorted side by
    binary search. No path on the sphere changes a HEALPix coordinate faster than a known gradient,
    and coordinates continue across the edges of base pixels, so the cells entered hold everything
    within reach, also where only three base pixels meet.

    Parameters
    ----------
    cells : ndarray of int64, shape (n,)
        Order-29 cells; any order of rows, fastest when sorted.
    reach_arcsec : float or ndarray of float64, shape (n,), arcsec
        How far each position looks. At most 20 degrees.
    sorted_cells : ndarray of int64, shape (m,)
        Order-29 cells of the other side, ascending.
    later_only : bool
        The two sides are the same rows: give each pair once, with i < j.

    Yields
    ------
    i, j : ndarray of int64
        Indices into ``cells`` and ``sorted_cells``. Every pair at most once, in no stated order,
        many of them farther apart than the reach.

    Raises
    ------
    ConfigError
        A reach is negative, not finite or over 20 degrees.
    """
    for found in _runs(cells, reach_arcsec, sorted_cells, later_only=later_only):
        yield from _expand(*found)


def _runs(
    cells: IntArray,
    reach_arcsec: FloatArray | float,
    sorted_cells: IntArray,
    *,
    later_only: bool = False,
) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
    """The pairs of `candidates`: row, first of the sorted rows, and how many from there on."""
    if len(cells) == 0 or len(sorted_cells) == 0:
        return
    reach = np.asarray(reach_arcsec, dtype=np.float64)
    if not (np.all(reach >= 0) and np.all(reach <= 72000)):
        raise ConfigError(f"a reach of {np.max(reach)} arcsec is outside 0..72000")
    step = largest_step(reach)
    deepest = np.ceil(-np.log2(step)).astype(np.int64) - 1
    start = np.maximum(deepest - int(np.log2(_CELLS_PER_REACH)) + 1, 0)
    waiting: dict[int, list[IntArray]] = {}
    if start.ndim == 0:
        waiting[int(start)] = [np.arange(len(cells), dtype=np.int64)]
    else:
        for order in np.flatnonzero(np.bincount(start)).tolist():
            waiting[order] = [np.flatnonzero(start == order)]
    while waiting:
        order = min(waiting)
        rows = np.concatenate(waiting.pop(order))
        shift = 2 * (MAX_ORDER - order)
        everything = len(rows) == len(cells)
        if everything:
            rows = np.arange(len(cells), dtype=np.int64)
        fine = cells if everything else cells[rows]
        own = fine >> shift
        step_max = float(step if step.ndim == 0 else step[rows].max())
        at, entered = _touched(fine, own, order, step_max * 2.0**order, later_only)
        if not later_only:
            low, found = _rows_in(own, shift, sorted_cells)
        elif everything:
            low, found = rows + 1, _run_stops(own) - rows - 1
        else:
            low, found = rows + 1, np.searchsorted(sorted_cells, (own + 1) << shift) - rows - 1
        near_low, near_found = _rows_in(entered, shift, sorted_cells)
        crowded = found > _CROWDED
        crowded[at[near_found > _CROWDED]] = True
        if crowded.any():
            crowded &= order < (deepest if deepest.ndim == 0 else deepest[rows])
            found[crowded] = 0
            near_found[crowded[at]] = 0
            if crowded.any():
                waiting.setdefault(order + 1, []).append(rows[crowded])
        yield rows, low, found
        yield rows[at], near_low, near_found


def rows_near(
    sorted_cells: IntArray, cells: IntArray, reach_arcsec: FloatArray | float
) -> IntArray:
    """Rows that may lie within reach of one of some positions.

    Parameters
    ----------
    sorted_cells : ndarray of int64, shape (n,)
        Order-29 cells of the rows, ascending.
    cells : ndarray of int64, shape (m,)
        Order-29 cells of the positions.
    reach_arcsec : float or ndarray of float64, shape (m,), arcsec
        At most 20 degrees.

    Returns
    -------
    ndarray of int64
        Row numbers, ascending: all that lie within reach, and some beyond.
    """
    steps = np.zeros(len(sorted_cells) + 1, dtype=np.int64)
    for _, low, count in _runs(cells, reach_arcsec, sorted_cells):
        np.add.at(steps, low, 1)
        np.subtract.at(steps, low + count, 1)
    return np.flatnonzero(np.cumsum(steps[:-1]))


def _rows_in(cells: IntArray, shift: int, sorted_cells: IntArray) -> tuple[IntArray, IntArray]:
    """The first of the sorted rows in each cell, and how many: where there is one, they are sought.

    Most neighbours are empty, and the second search costs as much as the first.
    """
    low = np.searchsorted(sorted_cells, cells << shift)
    last = len(sorted_cells) - 1
    some = np.flatnonzero(sorted_cells[np.minimum(low, last)] >> shift == cells)
    count = np.zeros(len(cells), dtype=np.int64)
    count[some] = np.searchsorted(sorted_cells, (cells[some] + 1) << shift) - low[some]
    return low, count


def _run_stops(values: IntArray) -> IntArray:
    """Where the run of equal values ends that each value of a sorted array is in."""
    stops = np.flatnonzero(np.append(values[1:] != values[:-1], True)) + 1
    return np.repeat(stops, np.diff(stops, prepend=0))


def _touched(
    fine: IntArray, own: IntArray, order: int, step: float, later_only: bool
) -> tuple[IntArray, IntArray]:
    """Neighbour cells that positions may reach: index of the position, cell.

    ``step`` is the largest change of a coordinate, in cells of the order. A table over the place
    inside the cell (a few more bits of the Morton code) says which neighbours it may touch.
    """
    table, depth = _touch_table(order, step)
    place = (fine >> 2 * (MAX_ORDER - order - depth)) & (len(table) - 1)
    mask = table[place]
    at = np.flatnonzero(mask)
    around = neighbours(own[at], order)
    wanted = (mask[at] >> np.arange(8, dtype=np.uint8)[:, None]) & 1 == 1
    wanted &= around > (own[at] if later_only else -1)
    return np.broadcast_to(at, wanted.shape)[wanted], around[wanted]


@lru_cache(maxsize=64)
def _touch_table(order: int, step: float) -> tuple[NDArray[np.uint8], int]:
    """Bits of the neighbours that a position may reach, by its place inside its cell; its depth."""
    depth = min(7, MAX_ORDER - order)
    side = 1 << depth
    code = np.arange(1 << 2 * depth, dtype=np.int64)
    x, y = coordinates(code, depth)
    touches_x = {-1: x <= step * side, 0: x >= 0, 1: x + 1 >= (1.0 - step) * side}
    touches_y = {-1: y <= step * side, 0: y >= 0, 1: y + 1 >= (1.0 - step) * side}
    table = np.zeros(len(code), dtype=np.uint8)
    for bit in range(8):
        reached = touches_x[int(_STEP_X[bit])] & touches_y[int(_STEP_Y[bit])]
        table |= reached.astype(np.uint8) << np.uint8(bit)
    return table, depth


def _expand(rows: IntArray, low: IntArray, count: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Pairs of each row with the ``count`` rows from ``low`` on, in blocks of bounded size."""
    some = np.flatnonzero(count > 0)
    rows, low, count = rows[some], low[some], count[some]
    stop = np.cumsum(count)
    first = 0
    while first < len(rows):
        done = stop[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(stop, done + _BLOCK, side="right")))
        counts = count[first:last]
        offset = np.repeat(low[first:last] - (stop[first:last] - counts - done), counts)
        yield np.repeat(rows[first:last], counts), np.arange(len(offset)) + offset
        first = last


def pairs_within(
    ra: FloatArray, dec: FloatArray, cells29: IntArray, radius_arcsec: float, most: int = 1 << 62
) -> tuple[IntArray, IntArray] | None:
    """All pairs of rows within a radius of each other, unless they are too many.

    The search of `candidates`, compiled and with the separations in it.

    Parameters
    ----------
    ra, dec : ndarray of float64, shape (n,), deg
    cells29 : ndarray of int64, shape (n,)
        Order-29 cells of the positions, ascending.
    radius_arcsec : float
        At most a degree.
    most : int
        So many pairs are stored.

    Returns
    -------
    i, j : ndarray of int64, shape (m,)
        i < j, each pair once, in no stated order. None: there are more than ``most``.
    """
    none = np.empty(0, dtype=np.int64)
    if len(cells29) < 2:
        return none, none
    from sos_dask.sky.loops import pairs_on_faces

    step = float(largest_step(np.asarray(radius_arcsec)))
    order = max(int(np.ceil(-np.log2(step))) - _SELF_ORDERS, 0)
    table, depth = _touch_table(order, step * 2.0**order)
    # By the tangent of half the angle: NumPy has vector code for tan but not for cos.
    square = np.tan(dec * (np.pi / 360.0)) ** 2
    columns = (cells29, ra, dec, (1.0 - square) / (1.0 + square))
    crosses = np.zeros(len(cells29), dtype=np.bool_)
    count = np.array([2 * len(cells29)])
    room = -1
    while room < count[0]:
        room = int(count[0])
        i, j = np.empty((2, room), dtype=np.int64)
        near = np.empty(room, dtype=np.int8)
        search = (radius_arcsec / 3600.0, order, table, depth)
        pairs_on_faces(*columns, *search, most, i, j, near, crosses, count)
        if count[0] > most:
            return None
    i, j, near = i[: count[0]], j[: count[0]], near[: count[0]]
    unsure = np.flatnonzero(near == 2)
    p, q = i[unsure], j[unsure]
    near[unsure] = separation_arcsec(ra[p], dec[p], ra[q], dec[q]) <= radius_arcsec
    if not near.all():
        i, j = i[near > 0], j[near > 0]
    parts = [(i, j)]
    rows, face = np.flatnonzero(crosses), 2 * MAX_ORDER
    for at, q in candidates(cells29[rows], radius_arcsec, cells29):
        p = rows[at]
        wanted = (p < q) & (cells29[p] >> face != cells29[q] >> face)
        p, q = p[wanted], q[wanted]
        apart = separation_arcsec(ra[p], dec[p], ra[q], dec[q])
        parts.append((p[apart <= radius_arcsec], q[apart <= radius_arcsec]))
    if len(parts) == 1:
        return i, j
    return np.concatenate([p for p, _ in parts]), np.concatenate([q for _, q in parts])
