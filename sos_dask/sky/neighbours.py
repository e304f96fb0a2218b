"""The sky around HEALPix pixels: what lies within a reach of one, and of its edges."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ConfigError
from sos_dask.sky.healpix import (
    MAX_ORDER,
    FloatArray,
    HealpixPixel,
    IntArray,
    Ranges,
    cell_ranges,
    coordinates,
    interleave,
    with_neighbours,
)
from sos_dask.sky.sphere import ARCSEC_PER_RADIAN

# Largest gradient of a HEALPix coordinate on the sphere, in sides of a base pixel per radian. In
# the polar caps x = t * sqrt(6) * sin(theta / 2), t in [0, 1] the longitude in quarter turns, so
# |grad x|^2 = 1.5 * (t^2 cos^2(theta / 2) + 4 / (pi^2 cos^2(theta / 2))), largest for t = 1 at the
# pole; in the belt x = 1/2 + t -+ 3/4 sin(dec) stays below 1.03 (derived from the projection of
# Gorski et al. 2005).
_STEEPEST = float(np.sqrt(1.5 * (1.0 + 4.0 / np.pi**2)))


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


def largest_step(reach_arcsec: FloatArray) -> FloatArray:
    """How far a reach can change a coordinate, in sides of a base pixel.

    Two order-29 cells (0.8 mas) more stand for the rounding of positions to cells.
    """
    return np.asarray(_STEEPEST * reach_arcsec / ARCSEC_PER_RADIAN + 2.0**-28)


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
        edge = np.unique(first + interleave(x, y))
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
    step = largest_step(np.asarray(reach_arcsec, dtype=np.float64)) * (1 << pixel.order)
    near = (cells29 < pixel.first) | (cells29 >= pixel.stop)
    # A table over coarse places leaves few rows for which the fine place is worked out.
    depth = min(6, MAX_ORDER - pixel.order)
    code = np.arange(1 << 2 * depth, dtype=np.int64)
    table = _near_sides(code, depth, np.asarray(np.max(step, initial=0.0)))
    place = (cells29 >> 2 * (MAX_ORDER - pixel.order - depth)) & (len(table) - 1)
    rows = np.flatnonzero(table.take(place) & ~near)
    depth = min(16, MAX_ORDER - pixel.order)
    place = (cells29[rows] - pixel.first) >> 2 * (MAX_ORDER - pixel.order - depth)
    near[rows] = _near_sides(place, depth, step if step.ndim == 0 else step[rows])
    return np.asarray(near)


def _near_sides(code: IntArray, depth: int, step: FloatArray) -> NDArray[np.bool_]:
    """Which places in a square (Morton codes) reach one of its sides; ``step`` in sides."""
    side = 1 << depth
    near = np.zeros(len(code), dtype=np.bool_)
    for along in coordinates(code, depth):
        near |= (along <= step * side) | (along + 1 >= side - step * side)
    return near
