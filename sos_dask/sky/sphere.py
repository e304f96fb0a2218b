"""Positions on the sphere: vectors, separations, proper motion."""

from __future__ import annotations

import numpy as np

from sos_dask.sky.healpix import FloatArray

ARCSEC_PER_RADIAN = 648000.0 / np.pi


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
