"""What is near on the sky: the surroundings of pixels, and rows within reach of each other.

No path on the sphere changes a HEALPix coordinate faster than a known gradient (`_STEEPEST`), and
coordinates continue across the edges of base pixels. So the cells that a position may reach follow
from its place inside its own cell, also where only three base pixels meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import BoolArray, FloatArray, IntArray
from sos_dask.errors import ConfigError
from sos_dask.sky.healpix import (
    ARCSEC_PER_RADIAN,
    MAX_ORDER,
    HealpixPixel,
    Ranges,
    cell_ranges,
    coordinates,
    in_ranges,
    separation_arcsec,
    with_neighbours,
)

# Largest gradient of a HEALPix coordinate on the sphere, in sides of a base pixel per radian. In
# the polar caps x = t * sqrt(6) * sin(theta / 2), t in [0, 1] the longitude in quarter turns, so
# |grad x|^2 = 1.5 * (t^2 cos^2(theta / 2) + 4 / (pi^2 cos^2(theta / 2))), largest for t = 1 at the
# pole; in the belt x = 1/2 + t -+ 3/4 sin(dec) stays below 1.03 (derived from the projection of
# Gorski et al. 2005).
_STEEPEST = float(np.sqrt(1.5 * (1.0 + 4.0 / np.pi**2)))
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


def order_for_radius(radius_arcsec: float) -> int:
    """Deepest order whose cell and its neighbours hold every point within a radius of the cell.

    The narrowest HEALPix cell is 1/1.6 of the square root of its area across (Fernique et al. 2014,
    MOC 1.0, section 4); a factor 2 is taken.
    """
    if not 0 < radius_arcsec < 180 * 3600:
        raise ConfigError(f"radius {radius_arcsec} arcsec is not positive")
    side_arcsec = np.sqrt(np.pi / 3.0) * ARCSEC_PER_RADIAN  # order 0
    order = int(np.floor(np.log2(side_arcsec / (2.0 * radius_arcsec))))
    return max(0, min(MAX_ORDER, order))


@dataclass(frozen=True)
class Sky:
    """Rows on the sky, shape (n,) each, in degrees with the order-29 ``cells`` of the positions.

    ``rank`` is the preference, the smallest first; of equal ranks the first row.
    """

    ra: FloatArray
    dec: FloatArray
    cells: IntArray
    rank: IntArray

    def separation(self, i: IntArray, j: IntArray) -> FloatArray:
        """Separations of rows in arcsec."""
        return separation_arcsec(self.ra[i], self.dec[i], self.ra[j], self.dec[j])


def starts(*keys: NDArray[Any]) -> BoolArray:
    """Tell which rows differ from the one before in any of some keys; the first one does."""
    new = np.zeros(len(keys[0]), dtype=np.bool_)
    new[:1] = True
    for values in keys:
        new[1:] |= values[1:] != values[:-1]
    return new


def ties(*keys: NDArray[Any]) -> BoolArray:
    """Tell which rows have the same keys as the one before or after."""
    new = starts(*keys)
    return np.asarray(~(new & np.append(new[1:], True)[: len(new)]))


def first_of_runs(order: IntArray, *keys: NDArray[Any]) -> tuple[IntArray, IntArray]:
    """Find the first row of each run of equal keys in an order, and the run of each row."""
    new = starts(*(values[order] for values in keys))
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(new) - 1
    return order[new], number


def order_by(keys: tuple[NDArray[Any], ...], more: Callable[[IntArray], NDArray[Any]]) -> IntArray:
    """Sort rows by keys (n,), the last one first, as `numpy.lexsort` does.

    ``more`` gives a further key of some rows: it is asked for those alone that have equal keys.
    Where all is equal the row numbers ascend.
    """
    order = np.lexsort(keys)
    tied = ties(*(values[order] for values in keys))
    if tied.any():
        some = order[tied]
        order[tied] = some[np.lexsort((more(some), *(values[some] for values in keys)))]
    return order


def is_crowded(cells29: IntArray, radius_arcsec: float) -> bool:
    """Tell whether more than 64 rows (sorted on the sky) share a cell a few radii wide."""
    cells = cells29 >> 2 * (MAX_ORDER - order_for_radius(radius_arcsec))
    return bool(np.any(cells[_CROWDED:] == cells[:-_CROWDED]))


def _largest_step(reach_arcsec: FloatArray | float) -> FloatArray:
    """Bound how far a reach changes a coordinate, in sides of a base pixel.

    Two order-29 cells (0.8 mas) more stand for the rounding of positions to cells.
    """
    reach = np.asarray(reach_arcsec, dtype=np.float64)
    return np.asarray(_STEEPEST * reach / ARCSEC_PER_RADIAN + 2.0**-28)


def surrounding_cells(pixel: HealpixPixel, order: int, layers: int) -> list[IntArray]:
    """List rings of cells of an order (the pixel's or deeper) that are 1, 2, ... steps away."""
    depth = order - pixel.order
    first = pixel.pixel << 2 * depth
    code = np.arange(1 << 2 * depth)
    x, y = coordinates(code)
    last = (1 << depth) - 1
    front = seen = first + code[(x == 0) | (x == last) | (y == 0) | (y == last)]
    rings = []
    for _ in range(layers):
        ring = np.unique(with_neighbours(front, order)[:, 1:])
        ring = ring[(ring >= 0) & ((ring < first) | (ring >= first + len(code)))]
        front = np.setdiff1d(ring, seen, assume_unique=True)
        seen = np.union1d(seen, front)
        rings.append(front)
    return rings


def surroundings(pixel: HealpixPixel, radius_arcsec: float, layers: int = 1) -> list[Ranges]:
    """List the sky around a pixel in layers, each at least a radius deep, as order-29 ranges.

    Every point within the radius of a point in the pixel (of layer i) lies in the pixel or in layer
    1 (in layers up to i + 1). The ranges (first, stop) of a layer are sorted and disjoint; none
    contains a point of the pixel itself. Layer 1 also contains what surrounds a pixel that is
    itself smaller than the radius.
    """
    # Cells finer than 1/128 of the pixel would only lengthen the list of ranges.
    order = min(order_for_radius(radius_arcsec), pixel.order + 7)
    above = max(pixel.order - order, 0)
    parent = HealpixPixel(pixel.order - above, pixel.pixel >> 2 * above)
    around = [cell_ranges(ring, order) for ring in surrounding_cells(parent, order, layers)]
    siblings = [(parent.first, pixel.first), (pixel.stop, parent.stop)]
    around[0] = sorted([*around[0], *(part for part in siblings if part[0] < part[1])])
    return around


def near_pixel(pixel: HealpixPixel, cells29: IntArray, reach_arcsec: float) -> BoolArray:
    """Tell which cells lie in a pixel or may lie within a reach of it.

    The order-29 cells (n,) are inside of the pixel or in layer 1 of its `surroundings`; fewer are
    near than these would say, whose cells may be much wider than the reach.
    """
    near = in_ranges(cells29, [(pixel.first, pixel.stop)])
    order = order_for_radius(reach_arcsec)
    rows = np.flatnonzero(~near)
    around = with_neighbours(cells29[rows] >> 2 * (MAX_ORDER - order), order)
    parent = pixel.pixel >> 2 * max(pixel.order - order, 0)
    near[rows] = np.any(around >> 2 * max(order - pixel.order, 0) == parent, axis=1)
    return near


def near_edge(
    pixel: HealpixPixel, cells29: IntArray, reach_arcsec: FloatArray | float
) -> BoolArray:
    """Tell from which positions a reach (arcsec; one, or by position) may lead out of a pixel.

    Order-29 cells outside of the pixel count as near its edge, and some a little farther inside, up
    to 1/65536 of the pixel.
    """
    step = _largest_step(reach_arcsec) * (1 << pixel.order)
    near = ~in_ranges(cells29, [(pixel.first, pixel.stop)])
    depth = min(16, MAX_ORDER - pixel.order)
    side = 1 << depth
    for along in coordinates((cells29 - pixel.first) >> 2 * (MAX_ORDER - pixel.order - depth)):
        near |= (along <= step * side) | (along + 1 >= side - step * side)
    return near


def candidates(
    cells: IntArray, reach_arcsec: FloatArray | float, sorted_cells: IntArray
) -> Iterator[tuple[IntArray, IntArray]]:
    """Find index pairs that contain every pair of positions within reach, in blocks.

    Each position is entered into its cell and into those neighbours that the reach can touch, at an
    order whose cells are wider than the reach; the entries are joined with the sorted side by
    binary search.

    Order-29 ``cells`` (n,) may have any order of rows, and are fastest when sorted;
    ``reach_arcsec`` says how far all, or each (n,), look, at most 20 degrees; ``sorted_cells`` (m,)
    of the other side ascend. Yields indices into these two: every pair at most once, in no stated
    order, many of them farther apart than the reach. Raises `ConfigError` where a reach is
    negative, not finite or over 20 degrees.
    """
    for rows, low, count in _runs(cells, reach_arcsec, sorted_cells):
        some = count > 0
        rows, low, count = rows[some], low[some], count[some]
        for block in blocks(count):
            yield np.repeat(rows[block], count[block]), runs(low[block], count[block])


def _runs(
    cells: IntArray, reach_arcsec: FloatArray | float, sorted_cells: IntArray
) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
    """The pairs of `candidates`: row, first of the sorted rows, and how many from there on."""
    if len(cells) == 0 or len(sorted_cells) == 0:
        return
    if not (np.all(reach_arcsec >= 0) and np.all(reach_arcsec <= 72000)):
        raise ConfigError(f"a reach of {np.max(reach_arcsec)} arcsec is outside 0..72000")
    step = _largest_step(reach_arcsec)
    deepest = np.ceil(-np.log2(step)).astype(np.int64) - 1
    start = np.maximum(deepest - int(np.log2(_CELLS_PER_REACH)) + 1, 0)
    step, deepest, start = (np.broadcast_to(one, len(cells)) for one in (step, deepest, start))
    orders = np.flatnonzero(np.bincount(start)).tolist()
    waiting = {order: [np.flatnonzero(start == order)] for order in orders}
    while waiting:
        order = min(waiting)
        rows = np.concatenate(waiting.pop(order))
        shift = 2 * (MAX_ORDER - order)
        fine = cells[rows]
        own = fine >> shift
        at, entered = _touched(fine, own, order, float(step[rows].max()) * 2.0**order)
        low, found = _rows_in(own, shift, sorted_cells)
        near_low, near_found = _rows_in(entered, shift, sorted_cells)
        crowded = found > _CROWDED
        crowded[at[near_found > _CROWDED]] = True
        if crowded.any():
            crowded &= order < deepest[rows]
            found[crowded] = 0
            near_found[crowded[at]] = 0
        if crowded.any():
            waiting.setdefault(order + 1, []).append(rows[crowded])
        yield rows, low, found
        yield rows[at], near_low, near_found


def rows_near(
    sorted_cells: IntArray, cells: IntArray, reach_arcsec: FloatArray | float
) -> IntArray:
    """Rows that may lie within reach of one of some positions: all within reach, and some beyond.

    The order-29 cells of the rows (n,) ascend, and so do the row numbers that are found; a reach,
    one or by position (m,), is at most 20 degrees.
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


def _touched(fine: IntArray, own: IntArray, order: int, step: float) -> tuple[IntArray, IntArray]:
    """Neighbour cells that positions may reach: index of the position, cell.

    ``step`` is the largest change of a coordinate, in cells of the order. A table over the place
    inside the cell (a few more bits of the Morton code) says which neighbours it may touch.
    """
    table, depth = _touch_table(order, step)
    mask = table[(fine >> 2 * (MAX_ORDER - order - depth)) & (len(table) - 1)]
    at = np.flatnonzero(mask)
    around = with_neighbours(own[at], order)[:, 1:].T
    wanted = (mask[at] >> np.arange(8, dtype=np.uint8)[:, None]) & 1 == 1
    wanted &= around >= 0
    return np.broadcast_to(at, wanted.shape)[wanted], around[wanted]


@lru_cache(maxsize=64)
def _touch_table(order: int, step: float) -> tuple[NDArray[np.uint8], int]:
    """Bits of the neighbours that a position may reach, by its place inside its cell; its depth."""
    depth = min(7, MAX_ORDER - order)
    side = 1 << depth
    code = np.arange(1 << 2 * depth, dtype=np.int64)
    x, y = coordinates(code)
    touches_x = {-1: x <= step * side, 0: x >= 0, 1: x + 1 >= (1.0 - step) * side}
    touches_y = {-1: y <= step * side, 0: y >= 0, 1: y + 1 >= (1.0 - step) * side}
    table = np.zeros(len(code), dtype=np.uint8)
    for bit in range(8):
        reached = touches_x[int(_STEP_X[bit])] & touches_y[int(_STEP_Y[bit])]
        table |= reached.astype(np.uint8) << np.uint8(bit)
    return table, depth


def blocks(count: IntArray) -> Iterator[slice]:
    """Slice entries so that of each slice not much more than 2 million things are counted."""
    stop, first = np.cumsum(count), 0
    while first < len(count):
        done = stop[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(stop, done + _BLOCK, side="right")))
        yield slice(first, last)
        first = last


def runs(first: IntArray, count: IntArray) -> IntArray:
    """List ``count`` numbers from each ``first`` on, one run after the other."""
    start = np.repeat(first - (np.cumsum(count) - count), count)
    return np.asarray(np.arange(len(start)) + start)


def pairs_within(
    ra: FloatArray, dec: FloatArray, cells29: IntArray, radius_arcsec: float, most: int
) -> tuple[IntArray, IntArray] | None:
    """Find all pairs of rows within a radius of each other, unless they are too many.

    The search of `candidates`, compiled and with the separations in it. Positions (n,) are in
    degrees, their order-29 cells ascend, and the radius is at most a degree. Gives rows i < j, each
    pair once, in no stated order; None: there are more than ``most``, for which room is asked of
    the system, and taken as it is filled.
    """
    none = np.empty(0, dtype=np.int64)
    if len(cells29) < 2:
        return none, none
    from sos_dask.sky.loops import pairs_on_faces

    step = float(_largest_step(radius_arcsec))
    order = max(int(np.ceil(-np.log2(step))) - _SELF_ORDERS, 0)
    touches = _touch_table(order, step * 2.0**order)
    # By the tangent of half the angle: NumPy has vector code for tan but not for cos.
    square = np.tan(dec * (np.pi / 360.0)) ** 2
    columns = (cells29, ra, dec, (1.0 - square) / (1.0 + square))
    found = pairs_on_faces(*columns, radius_arcsec / 3600.0, order, *touches, most)
    if found is None:
        return None
    i, j, near, crosses = found
    unsure = np.flatnonzero(near == 2)
    p, q = i[unsure], j[unsure]
    near[unsure] = separation_arcsec(ra[p], dec[p], ra[q], dec[q]) <= radius_arcsec
    if not near.all():
        i, j = i[near > 0], j[near > 0]
    rows, face = np.flatnonzero(crosses), 2 * MAX_ORDER
    for at, q in candidates(cells29[rows], radius_arcsec, cells29):
        p = rows[at]
        wanted = (p < q) & (cells29[p] >> face != cells29[q] >> face)
        p, q = p[wanted], q[wanted]
        close = separation_arcsec(ra[p], dec[p], ra[q], dec[q]) <= radius_arcsec
        if close.any():
            i, j = np.append(i, p[close]), np.append(j, q[close])
    return i, j
