"""Places on the sphere for tests: strategies, and where geometry goes wrong."""

import healpy
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sos_dask.columns import FloatArray
from sos_dask.sky.healpix import MAX_ORDER, HealpixPixel

SETTINGS = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, max_examples=100
)
right_ascensions = st.floats(0, 360, exclude_max=True, allow_subnormal=False)
declinations = st.floats(-90, 90, allow_subnormal=False)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def pixels(draw: st.DrawFn, max_order: int = MAX_ORDER) -> HealpixPixel:
    order = draw(st.integers(0, max_order))
    return HealpixPixel(order, draw(st.integers(0, 12 * 4**order - 1)))


def on_sphere(rng: np.random.Generator, n: int) -> tuple[FloatArray, FloatArray]:
    return rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))


def hard_places() -> list[tuple[float, float]]:
    """Poles, RA 0, and every corner of the twelve base pixels: at eight only three of them meet."""
    corners = healpy.boundaries(1, np.arange(12), step=1, nest=True).transpose(0, 2, 1)
    x, y, z = corners.reshape(-1, 3).T
    found = {
        (round(float(ra), 9) % 360, round(float(dec), 9))
        for ra, dec in zip(np.degrees(np.arctan2(y, x)), np.degrees(np.arcsin(z)), strict=True)
    }
    return [*sorted(found), (0.0, 0.0), (0.0, 30.0), (180.0, -60.0)]


HARD = hard_places()


def around(
    rng: np.random.Generator, ra: FloatArray, dec: FloatArray, radius_arcsec: float
) -> tuple[FloatArray, FloatArray]:
    """Points at a random angle from others, at most (and often almost) the radius away."""
    n = len(ra)
    angle = np.radians(radius_arcsec / 3600) * np.minimum(1, rng.uniform(0, 1.3, n)) * 0.999999
    towards = rng.uniform(0, 2 * np.pi, n)
    lon, lat = np.radians(ra), np.radians(dec)
    sin_lat = np.sin(lat) * np.cos(angle) + np.cos(lat) * np.sin(angle) * np.cos(towards)
    d_lon = np.arctan2(
        np.sin(towards) * np.sin(angle) * np.cos(lat), np.cos(angle) - np.sin(lat) * sin_lat
    )
    return np.degrees(lon + d_lon) % 360, np.degrees(np.arcsin(np.clip(sin_lat, -1, 1)))
