"""HEALPix cells, pixels and partitions (NESTED only), and positions on the sphere.

A cell of order k at position p is ``ang2pix(p) >> 2 * (29 - k)``, so a partition is a half-open
range of order-29 cells and every overlap of catalogs is an overlap of intervals
(Gorski et al. 2005, ApJ 622, 759).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import FloatArray, IntArray
from sos_dask.errors import ConfigError

MAX_ORDER = 29
ARCSEC_PER_RADIAN = 648000.0 / np.pi

Ranges = list[tuple[int, int]]
"""Half-open ranges (first, stop) of order-29 cells."""


@cache
def _healpy() -> Any:
    """Load the compiled module of healpy without the rest of it.

    ``import healpy`` loads matplotlib and astropy: measured, 0.8 CPU seconds and 60 MB in every
    process, as much as all the rest of a step on a small catalog. Tests compare with its public
    functions, to the last bit.
    """
    package = importlib.util.find_spec("healpy")
    folders = package.submodule_search_locations if package is not None else None
    spec = PathFinder.find_spec("healpy._healpy_pixel_lib", folders) if folders else None
    if spec is None or spec.loader is None:
        raise ImportError("healpy, or the compiled pixel library in it, is not installed")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True, order=True)
class HealpixPixel:
    """One HEALPix pixel in NESTED order; of order 0 to 29 there are ``12 * 4**order``."""

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
                f"'{text}' is not a HEALPix pixel", "Write order:pixel, for example 2:44."
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
        """Tell whether one of the two pixels contains the other."""
        return self.first < other.stop and other.first < self.stop


def ang2pix(ra: FloatArray, dec: FloatArray, order: int = MAX_ORDER) -> IntArray:
    """Find the cells of positions (deg); `ValueError` where a dec is nan or outside [-90, 90]."""
    if not (np.abs(dec) <= 90.0).all():
        raise ValueError("a declination is missing or outside of -90 to 90 degrees")
    # The operations of healpy.ang2pix in its order, so that both agree to the last bit.
    theta, phi = np.pi / 2.0 - np.radians(dec), np.radians(ra)
    return np.asarray(_healpy()._ang2pix_nest(1 << order, theta, phi), dtype=np.int64)


def centre(pixel: HealpixPixel) -> tuple[FloatArray, FloatArray]:
    """Find right ascension and declination of the centre of a pixel, deg, each of shape (1,)."""
    theta, phi = _healpy()._pix2ang_nest(1 << pixel.order, np.array([pixel.pixel]))
    return np.degrees(phi), 90.0 - np.degrees(theta)


def with_neighbours(cells: IntArray, order: int) -> IntArray:
    """List each cell (n,) with its neighbours, shape (n, 9).

    They are the cell, then SW, W, NW, N, NE, E, SE, S; -1 where there is none (at the eight points
    where only three base pixels meet).
    """
    out = np.empty((len(cells), 9), dtype=np.int64)
    out[:, 0] = cells
    if len(cells):
        out[:, 1:] = np.stack(_healpy()._get_neighbors_nest(1 << order, cells)[:8]).T
    return out


def coordinates(code: IntArray) -> tuple[IntArray, IntArray]:
    """Separate the two coordinates of Morton codes (x in the even bits)."""
    x, y, _ = _healpy()._pix2xyf_nest(1 << MAX_ORDER, code)
    return x, y


def cell_ranges(cells: IntArray, order: int) -> Ranges:
    """List the ranges of order-29 cells that sorted unique cells cover, adjacent ones joined."""
    shift = 2 * (MAX_ORDER - order)
    new = np.append(True, np.diff(cells) != 1)[: len(cells)]
    first, stop = cells[new] << shift, (cells[np.roll(new, -1)] + 1) << shift
    return list(zip(first.tolist(), stop.tolist(), strict=True))


def in_ranges(cells29: IntArray, ranges: Ranges) -> NDArray[np.bool_]:
    """Tell which order-29 cells lie in sorted, disjoint half-open ranges."""
    edges = np.array(ranges, dtype=np.int64).ravel()
    return np.asarray(np.searchsorted(edges, cells29, side="right") % 2 == 1)


def plan_partitions(histogram: IntArray, order: int, rows_per_partition: int) -> list[HealpixPixel]:
    """Split the sky until each pixel holds at most so many rows.

    The histogram has the rows of each cell of an order, past which no pixel is split. The pixels
    are sorted by position on the curve; empty ones are left out.
    """
    levels = [histogram]
    while len(levels[-1]) > 12:
        levels.append(levels[-1].reshape(-1, 4).sum(axis=1))
    levels.reverse()
    pixels: list[HealpixPixel] = []
    open_pixels: IntArray = np.arange(12, dtype=np.int64)
    for level in range(order + 1):
        counts = levels[level][open_pixels]
        done = (counts > 0) & ((counts <= rows_per_partition) | (level == order))
        pixels += [HealpixPixel(level, int(p)) for p in open_pixels[done]]
        split = open_pixels[counts > 0] if level < order else open_pixels[:0]
        split = split[levels[level][split] > rows_per_partition]
        open_pixels = (split[:, None] * 4 + np.arange(4)).ravel()
    return sorted(pixels, key=lambda pixel: pixel.first)


def unit_vectors(ra: FloatArray, dec: FloatArray) -> FloatArray:
    """Unit vectors of positions in degrees, shape (n, 3)."""
    lon, lat = np.radians(ra), np.radians(dec)
    cos_lat = np.cos(lat)
    return np.stack([cos_lat * np.cos(lon), cos_lat * np.sin(lon), np.sin(lat)], axis=-1)


def separation_arcsec(
    ra1: FloatArray, dec1: FloatArray, ra2: FloatArray, dec2: FloatArray
) -> FloatArray:
    """Great-circle separation in arcsec (haversine formula), accurate for the smallest angles."""
    lat1, lat2 = np.radians(dec1), np.radians(dec2)
    d_lat = np.radians(dec2 - dec1)
    d_lon = np.radians(ra2 - ra1)
    h = np.sin(d_lat / 2) ** 2 + np.cos(lat1) * np.cos(lat2) * np.sin(d_lon / 2) ** 2
    return np.asarray(2 * np.arcsin(np.sqrt(np.minimum(h, 1.0))) * ARCSEC_PER_RADIAN)


def propagate(
    ra: FloatArray, dec: FloatArray, pmra: FloatArray, pmdec: FloatArray, years: FloatArray | float
) -> tuple[FloatArray, FloatArray]:
    """Move positions in degrees along great circles by their proper motions in mas/yr.

    ``pmra`` includes cos(dec), as Gaia and APOGEE give it. The ra is in [0, 360); stars stay where
    they are where a proper motion is zero.
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
