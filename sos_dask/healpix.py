"""HEALPix geometry on the sphere: cells, partitions, neighbours, separations (NESTED only).

A cell of order k at position p is ``ang2pix(p) >> 2 * (29 - k)``, so a partition is a half-open
range of order-29 cells and every overlap of catalogs is an overlap of intervals
(Gorski et al. 2005, ApJ 622, 759).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ConfigError

MAX_ORDER = 29
ARCSEC_PER_RADIAN = 648000.0 / np.pi

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


def _compiled_healpy() -> Any:
    """The compiled module of healpy without the rest of it.

    ``import healpy`` loads matplotlib and astropy: 0.9 CPU seconds and 50 MB in every process.
    """
    package = importlib.util.find_spec("healpy")
    folders = package.submodule_search_locations if package is not None else None
    spec = PathFinder.find_spec("healpy._healpy_pixel_lib", folders) if folders else None
    if spec is None or spec.loader is None:
        raise ImportError("healpy, or the compiled pixel library in it, is not installed")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_healpy = _compiled_healpy()


@dataclass(frozen=True, order=True)
class HealpixPixel:
    """One HEALPix pixel in NESTED order.

    Parameters
    ----------
    order : int
        0 to 29; the sky has ``12 * 4**order`` pixels.
    pixel : int
        Index in NESTED order.
    """

    order: int
    pixel: int

    def __post_init__(self) -> None:
        if not 0 <= self.order <= MAX_ORDER:
            raise ConfigError(f"HEALPix order {self.order} is outside 0..{MAX_ORDER}")
        if not 0 <= self.pixel < 12 * 4**self.order:
            raise ConfigError(
                f"pixel {self.pixel} does not exist at HEALPix order {self.order} "
                f"(0..{12 * 4**self.order - 1})"
            )

    def __str__(self) -> str:
        return f"{self.order}:{self.pixel}"

    @classmethod
    def parse(cls, text: str) -> HealpixPixel:
        """Read ``order:pixel``, for example ``2:44``."""
        try:
            order, pixel = (int(part) for part in text.split(":"))
        except ValueError:
            raise ConfigError(
                f"'{text}' is not a HEALPix pixel",
                "Write order:pixel, for example 2:44.",
            ) from None
        return cls(order, pixel)

    @property
    def first(self) -> int:
        """First order-29 cell inside."""
        return self.pixel << 2 * (MAX_ORDER - self.order)

    @property
    def stop(self) -> int:
        """First order-29 cell after the last one inside."""
        return (self.pixel + 1) << 2 * (MAX_ORDER - self.order)

    def overlaps(self, other: HealpixPixel) -> bool:
        """Whether one of the two pixels contains the other."""
        return self.first < other.stop and other.first < self.stop


def ang2pix(ra: FloatArray, dec: FloatArray, order: int = MAX_ORDER) -> IntArray:
    """Cells of positions.

    Parameters
    ----------
    ra, dec : ndarray of float64, shape (n,), deg
        Finite; dec within [-90, 90].

    Returns
    -------
    ndarray of int64, shape (n,)

    Raises
    ------
    ValueError
        A declination is nan or outside.
    """
    if not (np.abs(dec) <= 90.0).all():
        raise ValueError("a declination is missing or outside of -90 to 90 degrees")
    # The operations of healpy.ang2pix in its order, so that both agree to the last bit.
    theta, phi = np.pi / 2.0 - np.radians(dec), np.radians(ra)
    return np.asarray(_healpy._ang2pix_nest(1 << order, theta, phi), dtype=np.int64)


def _neighbours(cells: IntArray, order: int) -> IntArray:
    """The eight neighbours of cells, -1 where there is none, shape (8, n)."""
    return np.stack(_healpy._get_neighbors_nest(1 << order, cells)[:8])


def unit_vectors(ra: FloatArray, dec: FloatArray) -> FloatArray:
    """Unit vectors of positions in degrees, shape (n, 3)."""
    lon, lat = np.radians(ra), np.radians(dec)
    cos_lat = np.cos(lat)
    return np.stack([cos_lat * np.cos(lon), cos_lat * np.sin(lon), np.sin(lat)], axis=-1)


def separation_arcsec(
    ra1: FloatArray, dec1: FloatArray, ra2: FloatArray, dec2: FloatArray
) -> FloatArray:
    """Great-circle separation (haversine formula), accurate for the smallest angles.

    Parameters
    ----------
    ra1, dec1, ra2, dec2 : ndarray of float64, deg

    Returns
    -------
    ndarray of float64, arcsec
    """
    lat1, lat2 = np.radians(dec1), np.radians(dec2)
    d_lat = np.radians(dec2 - dec1)
    d_lon = np.radians(ra2 - ra1)
    h = np.sin(d_lat / 2) ** 2 + np.cos(lat1) * np.cos(lat2) * np.sin(d_lon / 2) ** 2
    return np.asarray(2 * np.arcsin(np.sqrt(np.minimum(h, 1.0))) * ARCSEC_PER_RADIAN)


def propagate(
    ra: FloatArray,
    dec: FloatArray,
    pmra: FloatArray,
    pmdec: FloatArray,
    years: FloatArray | float,
) -> tuple[FloatArray, FloatArray]:
    """Move positions along great circles by their proper motions.

    Parameters
    ----------
    ra, dec : ndarray of float64, deg
    pmra, pmdec : ndarray of float64, mas/yr
        ``pmra`` includes cos(dec), as Gaia and APOGEE give it.
    years : float or ndarray of float64, yr

    Returns
    -------
    ra, dec : ndarray of float64, deg
        ra in [0, 360). Stars stay where they are where a proper motion is zero.
    """
    lon, lat = np.radians(ra), np.radians(dec)
    east, north = pmra * years, pmdec * years
    angle = np.hypot(east, north) / 1000.0 / ARCSEC_PER_RADIAN
    still = angle < 1e-200  # its inverse could overflow
    scale = np.where(still, 0.0, 1.0 / np.where(still, 1.0, np.hypot(east, north)))
    sin_lat, cos_lat = np.sin(lat), np.cos(lat)
    sin_lon, cos_lon = np.sin(lon), np.cos(lon)
    e, n = east * scale * np.sin(angle), north * scale * np.sin(angle)
    c = np.cos(angle)
    x = c * cos_lat * cos_lon - e * sin_lon - n * sin_lat * cos_lon
    y = c * cos_lat * sin_lon + e * cos_lon - n * sin_lat * sin_lon
    z = c * sin_lat + n * cos_lat
    new_ra = np.degrees(np.arctan2(y, x)) % 360.0
    new_ra = np.where(new_ra >= 360.0, 0.0, new_ra)
    new_dec = np.degrees(np.arctan2(z, np.hypot(x, y)))
    return np.where(still, ra, new_ra), np.where(still, dec, new_dec)


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


def with_neighbours(cells: IntArray, order: int) -> IntArray:
    """Each cell and its neighbours.

    Parameters
    ----------
    cells : ndarray of int64, shape (n,)

    Returns
    -------
    ndarray of int64, shape (n, 9)
        Column 0 is the cell itself; a neighbour that does not exist (at the eight points where only
        three base pixels meet) is -1.
    """
    out = np.empty((len(cells), 9), dtype=np.int64)
    out[:, 0] = cells
    if len(cells):
        out[:, 1:] = _neighbours(cells, order).T
    return out


def surrounding_cells(pixel: HealpixPixel, order: int, layers: int) -> list[IntArray]:
    """Rings of cells around a pixel: ring i holds the cells that are i steps away.

    Parameters
    ----------
    order : int
        Order of the cells; not above the pixel's own order it is taken as the pixel's order.
    layers : int
        Number of rings.
    """
    order = max(order, pixel.order)
    depth = order - pixel.order
    first = pixel.pixel << 2 * depth
    if depth == 0:
        edge = np.array([pixel.pixel], dtype=np.int64)
    else:
        side = np.arange(1 << depth, dtype=np.int64)
        low, high = np.zeros_like(side), np.full_like(side, (1 << depth) - 1)
        x = np.concatenate([side, side, low, high])
        y = np.concatenate([low, high, side, side])
        edge = np.unique(first + _interleave(x, y))
    seen = edge
    rings = []
    front = edge
    for _ in range(layers):
        ring = np.unique(with_neighbours(front, order)[:, 1:])
        ring = ring[(ring >= 0) & ((ring < first) | (ring >= first + (1 << 2 * depth)))]
        ring = np.setdiff1d(ring, seen, assume_unique=True)
        rings.append(ring)
        seen = np.union1d(seen, ring)
        front = ring
    return rings


def _coordinates(code: IntArray, depth: int) -> tuple[IntArray, IntArray]:
    """The two coordinates of Morton codes of so many bits each."""
    x, y = np.zeros_like(code), np.zeros_like(code)
    for bit in range(depth):
        x |= ((code >> 2 * bit) & 1) << bit
        y |= ((code >> 2 * bit + 1) & 1) << bit
    return x, y


def _interleave(x: IntArray, y: IntArray) -> IntArray:
    """Morton code of two coordinates below 2**29 (x in the even bits)."""
    code = np.zeros_like(x)
    for bit in range(MAX_ORDER):
        code |= ((x >> bit) & 1) << (2 * bit) | ((y >> bit) & 1) << (2 * bit + 1)
    return code


def cell_ranges(cells: IntArray, order: int) -> list[tuple[int, int]]:
    """Half-open ranges of order-29 cells covered by sorted unique cells, adjacent ones joined."""
    shift = 2 * (MAX_ORDER - order)
    if len(cells) == 0:
        return []
    breaks = np.flatnonzero(np.diff(cells) != 1) + 1
    starts = np.concatenate([[0], breaks])
    stops = np.concatenate([breaks, [len(cells)]])
    return [
        (int(cells[a]) << shift, (int(cells[b - 1]) + 1) << shift)
        for a, b in zip(starts, stops, strict=True)
    ]


def plan_partitions(
    histogram: IntArray,
    order: int,
    rows_per_partition: int,
    max_order: int | None = None,
) -> list[HealpixPixel]:
    """Split the sky until each pixel holds at most so many rows.

    Parameters
    ----------
    histogram : ndarray of int64, shape (12 * 4**order,)
        Rows per cell of the given order.
    rows_per_partition : int
        A pixel of the histogram's own order is not split further.

    Returns
    -------
    list of HealpixPixel
        Sorted by position on the curve; empty pixels are left out.
    """
    levels = [histogram]
    while len(levels[-1]) > 12:
        levels.append(levels[-1].reshape(-1, 4).sum(axis=1))
    levels.reverse()
    deepest = order if max_order is None else min(order, max_order)
    pixels: list[HealpixPixel] = []
    open_pixels: IntArray = np.arange(12, dtype=np.int64)
    for level in range(deepest + 1):
        counts = levels[level][open_pixels]
        done = (counts > 0) & ((counts <= rows_per_partition) | (level == deepest))
        pixels += [HealpixPixel(level, int(p)) for p in open_pixels[done]]
        split = open_pixels[counts > 0] if level < deepest else open_pixels[:0]
        split = split[levels[level][split] > rows_per_partition]
        open_pixels = (split[:, None] * 4 + np.arange(4)).ravel()
    return sorted(pixels, key=lambda pixel: pixel.first)


def partition_of(cells29: IntArray, pixels: Iterable[HealpixPixel]) -> IntArray:
    """Index of the pixel that holds each order-29 cell; -1 where none does.

    ``pixels`` must not overlap and must be sorted by ``first``.
    """
    pixels = list(pixels)
    firsts = np.array([pixel.first for pixel in pixels], dtype=np.int64)
    stops = np.array([pixel.stop for pixel in pixels], dtype=np.int64)
    index = np.searchsorted(firsts, cells29, side="right") - 1
    inside = (index >= 0) & (cells29 < stops[np.maximum(index, 0)]) if len(pixels) else index >= 0
    return np.where(inside, index, -1)


Ranges = list[tuple[int, int]]


def surroundings(pixel: HealpixPixel, radius_arcsec: float, layers: int = 1) -> list[Ranges]:
    """Sky around a pixel in layers, each at least ``radius_arcsec`` deep, as order-29 ranges.

    Parameters
    ----------
    pixel : HealpixPixel
    radius_arcsec : float
        Every point within it of a point in the pixel (of layer i) lies in the pixel or in layer 1
        (in layers up to i + 1).
    layers : int

    Returns
    -------
    list of lists of (first, stop)
        One a layer, sorted and disjoint; none holds a point of the pixel itself. Layer 1 also holds
        what surrounds a pixel that is itself smaller than the radius.
    """
    # Cells finer than 1/128 of the pixel would only lengthen the list of ranges.
    order = min(order_for_radius(radius_arcsec), pixel.order + 7)
    if order >= pixel.order:
        rings = surrounding_cells(pixel, order, layers)
        return [cell_ranges(ring, order) for ring in rings]
    parent = HealpixPixel(order, pixel.pixel >> 2 * (pixel.order - order))
    around = [cell_ranges(ring, order) for ring in surrounding_cells(parent, order, layers)]
    siblings = [(parent.first, pixel.first), (pixel.stop, parent.stop)]
    around[0] = sorted([*around[0], *(part for part in siblings if part[0] < part[1])])
    return around


def near_pixel(pixel: HealpixPixel, cells29: IntArray, reach_arcsec: float) -> NDArray[np.bool_]:
    """Which cells lie in a pixel or may lie within a reach of it.

    Parameters
    ----------
    pixel : HealpixPixel
    cells29 : ndarray of int64, shape (n,)
        Order-29 cells inside of the pixel or in layer 1 of its `surroundings`.
    reach_arcsec : float

    Returns
    -------
    ndarray of bool, shape (n,)
        Fewer than `surroundings` would say, whose cells may be much wider than the reach.
    """
    near = (cells29 >= pixel.first) & (cells29 < pixel.stop)
    order = order_for_radius(reach_arcsec)
    rows = np.flatnonzero(~near)
    around = with_neighbours(cells29[rows] >> 2 * (MAX_ORDER - order), order)
    if order < pixel.order:
        parent = pixel.pixel >> 2 * (pixel.order - order)
        near[rows] = np.any(around == parent, axis=1)
    else:
        near[rows] = np.any(around >> 2 * (order - pixel.order) == pixel.pixel, axis=1)
    return near


def around_cells(pixel: HealpixPixel, cells29: IntArray, reach_arcsec: float) -> Ranges:
    """The part of a pixel that lies within a reach of some cells, as order-29 ranges.

    Parameters
    ----------
    pixel : HealpixPixel
    cells29 : ndarray of int64, shape (n,)
        Order-29 cells, also outside of the pixel.
    reach_arcsec : float

    Returns
    -------
    list of (first, stop)
        Sorted and disjoint, in steps of 1/32 of the pixel or of the reach: they hold more sky.
    """
    order = min(order_for_radius(reach_arcsec), pixel.order + 5)
    shift = 2 * (MAX_ORDER - order)
    near = np.unique(with_neighbours(np.unique(cells29 >> shift), order))
    meets = (near >= 0) & (near + 1 << shift > pixel.first) & (near << shift < pixel.stop)
    ranges = cell_ranges(near[meets], order)
    return [(max(first, pixel.first), min(stop, pixel.stop)) for first, stop in ranges]


def in_ranges(cells29: IntArray, ranges: Ranges) -> NDArray[np.bool_]:
    """Which order-29 cells lie in sorted, disjoint half-open ranges."""
    if not ranges:
        return np.zeros(len(cells29), dtype=bool)
    starts = np.array([first for first, _ in ranges], dtype=np.int64)
    stops = np.array([stop for _, stop in ranges], dtype=np.int64)
    if len(cells29) > len(ranges) and not np.any(cells29[1:] < cells29[:-1]):
        # Sorted: it is enough to find where the ranges begin and end.
        steps = np.zeros(len(cells29) + 1, dtype=np.int64)
        np.add.at(steps, np.searchsorted(cells29, starts), 1)
        np.subtract.at(steps, np.searchsorted(cells29, stops), 1)
        return np.asarray(np.cumsum(steps[:-1]) > 0)
    position = np.searchsorted(starts, cells29, side="right") - 1
    return (position >= 0) & (cells29 < stops[np.maximum(position, 0)])


# Cells a reach is spread over at first: one cell is so many times wider than it. Measured: wider
# cells need fewer entries in neighbours, narrower ones fewer candidates.
_CELLS_PER_REACH = 16.0
# A cell with more rows than this is searched again at a deeper order, where that order allows it.
_CROWDED = 64
_BLOCK = 1 << 21
# Cells of `pairs_within` are four to eight times wider than the radius (measured, too).
_SELF_ORDERS = 3
# Largest gradient of a HEALPix coordinate on the sphere, in sides of a base pixel per radian. In
# the polar caps x = t * sqrt(6) * sin(theta / 2), t in [0, 1] the longitude in quarter turns, so
# |grad x|^2 = 1.5 * (t^2 cos^2(theta / 2) + 4 / (pi^2 cos^2(theta / 2))), largest for t = 1 at the
# pole; in the belt x = 1/2 + t -+ 3/4 sin(dec) stays below 1.03 (derived from the projection of
# Gorski et al. 2005).
_STEEPEST = float(np.sqrt(1.5 * (1.0 + 4.0 / np.pi**2)))
# Steps of the eight neighbours in the order of healpy: SW, W, NW, N, NE, E, SE, S.
_STEP_X = np.array([-1, -1, 0, 1, 1, 1, 0, -1])
_STEP_Y = np.array([0, 1, 1, 1, 0, -1, -1, -1])


def near_edge(
    pixel: HealpixPixel, cells29: IntArray, reach_arcsec: FloatArray | float
) -> NDArray[np.bool_]:
    """Positions from which a reach may lead out of a pixel.

    Parameters
    ----------
    pixel : HealpixPixel
    cells29 : ndarray of int64, shape (n,)
        Order-29 cells; those outside of the pixel count as near its edge.
    reach_arcsec : float or ndarray of float64, shape (n,), arcsec

    Returns
    -------
    ndarray of bool, shape (n,)
        Also true a little farther inside, up to 1/65536 of the pixel.
    """
    step = _step(np.asarray(reach_arcsec, dtype=np.float64)) * (1 << pixel.order)
    near = (cells29 < pixel.first) | (cells29 >= pixel.stop)
    # A table over coarse places leaves few rows for which the fine place is worked out.
    depth = min(6, MAX_ORDER - pixel.order)
    code = np.arange(1 << 2 * depth, dtype=np.int64)
    table = _near_sides(code, depth, np.asarray(np.max(step, initial=0.0)))
    place = (cells29 - pixel.first) >> 2 * (MAX_ORDER - pixel.order - depth)
    rows = np.flatnonzero(table[np.where(near, 0, place)] & ~near)
    depth = min(16, MAX_ORDER - pixel.order)
    place = (cells29[rows] - pixel.first) >> 2 * (MAX_ORDER - pixel.order - depth)
    near[rows] = _near_sides(place, depth, step if step.ndim == 0 else step[rows])
    return np.asarray(near)


def _near_sides(code: IntArray, depth: int, step: FloatArray) -> NDArray[np.bool_]:
    """Which places in a square (Morton codes) reach one of its sides; ``step`` in sides."""
    side = 1 << depth
    near = np.zeros(len(code), dtype=np.bool_)
    for along in _coordinates(code, depth):
        near |= (along <= step * side) | (along + 1 >= side - step * side)
    return near


def _step(reach_arcsec: FloatArray) -> FloatArray:
    """How far a reach can change a coordinate, in sides of a base pixel.

    Two order-29 cells (0.8 mas) more stand for the rounding of positions to cells.
    """
    return np.asarray(_STEEPEST * reach_arcsec / ARCSEC_PER_RADIAN + 2.0**-28)


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
    if len(cells) == 0 or len(sorted_cells) == 0:
        return
    reach = np.asarray(reach_arcsec, dtype=np.float64)
    if not (np.all(reach >= 0) and np.all(reach <= 72000)):
        raise ConfigError(f"a reach of {np.max(reach)} arcsec is outside 0..72000")
    step = _step(reach)
    deepest = np.ceil(-np.log2(step)).astype(np.int64) - 1
    start = np.maximum(deepest - int(np.log2(_CELLS_PER_REACH)) + 1, 0)
    waiting: dict[int, list[IntArray]] = {}
    if start.ndim == 0:
        waiting[int(start)] = [np.arange(len(cells), dtype=np.int64)]
    else:
        for order in np.unique(start).tolist():
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
        low = rows + 1 if later_only else np.searchsorted(sorted_cells, own << shift)
        if later_only and everything:
            high = _run_stops(own)
        else:
            high = np.searchsorted(sorted_cells, (own + 1) << shift)
        near_low = np.searchsorted(sorted_cells, entered << shift)
        near_high = np.searchsorted(sorted_cells, (entered + 1) << shift)
        found, near_found = high - low, near_high - near_low
        crowded = found > _CROWDED
        crowded[at[near_found > _CROWDED]] = True
        if crowded.any():
            crowded &= order < (deepest if deepest.ndim == 0 else deepest[rows])
            found[crowded] = 0
            near_found[crowded[at]] = 0
            if crowded.any():
                waiting.setdefault(order + 1, []).append(rows[crowded])
        yield from _expand(rows, low, found)
        yield from _expand(rows[at], near_low, near_found)


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
    neighbours = _neighbours(own[at], order)
    wanted = (mask[at] >> np.arange(8, dtype=np.uint8)[:, None]) & 1 == 1
    wanted &= neighbours > (own[at] if later_only else -1)
    return np.broadcast_to(at, wanted.shape)[wanted], neighbours[wanted]


def _touch_table(order: int, step: float) -> tuple[NDArray[np.uint8], int]:
    """Bits of the neighbours that a position may reach, by its place inside its cell; its depth."""
    depth = min(7, MAX_ORDER - order)
    side = 1 << depth
    code = np.arange(1 << 2 * depth, dtype=np.int64)
    x, y = _coordinates(code, depth)
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
    ra: FloatArray, dec: FloatArray, cells29: IntArray, radius_arcsec: float
) -> tuple[IntArray, IntArray]:
    """All pairs of rows within a radius of each other.

    The search of `candidates`, compiled and with the separations in it.

    Parameters
    ----------
    ra, dec : ndarray of float64, shape (n,), deg
    cells29 : ndarray of int64, shape (n,)
        Order-29 cells of the positions, ascending.
    radius_arcsec : float
        At most a degree.

    Returns
    -------
    i, j : ndarray of int64, shape (m,)
        i < j, each pair once, in no stated order.
    """
    none = np.empty(0, dtype=np.int64)
    if len(cells29) < 2:
        return none, none
    from sos_dask.compiled import pairs_on_faces

    step = float(_step(np.asarray(radius_arcsec)))
    order = max(int(np.ceil(-np.log2(step))) - _SELF_ORDERS, 0)
    table, depth = _touch_table(order, step * 2.0**order)
    columns = (cells29, ra, dec, np.cos(np.radians(dec)))
    crosses = np.zeros(len(cells29), dtype=np.bool_)
    count = np.array([2 * len(cells29)])
    room = -1
    while room < count[0]:
        room = int(count[0])
        i, j = np.empty((2, room), dtype=np.int64)
        near = np.empty(room, dtype=np.int8)
        search = (radius_arcsec / 3600.0, order, table, depth)
        pairs_on_faces(*columns, *search, i, j, near, crosses, count)
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
