"""What each survey gets wrong about a star: biases, errors, outliers.

Arrays in, arrays out; every random number is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from sos_dask.simulate.sky import APOGEE, GALAH, LAMOST, BoolArray, FloatArray, Stars

RV_OFFSETS = {LAMOST: -4.9, APOGEE: 0.0, GALAH: 0.2}
"""Injected differences survey - truth of the radial velocity, km/s."""


def _step(x: FloatArray, middle: float, width: float) -> FloatArray:
    """Smooth step from 0 to 1, upwards for a positive width (logistic function)."""
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip((x - middle) / width, -60.0, 60.0))))


def lamost_bias(teff: ArrayLike, logg: ArrayLike, feh: ArrayLike) -> FloatArray:
    """Injected difference LAMOST - truth.

    Smooth and nonlinear in all labels, with log g x [Fe/H] terms, and strong at the sparse ends
    (log g < 1, Teff > 7000 K, [Fe/H] < -2, [Fe/H] > 0.2), each entered by a logistic step.

    Parameters
    ----------
    teff, logg, feh : array_like, shape (n,); K, dex (cgs), dex
        True labels.

    Returns
    -------
    ndarray of float64, shape (n, 3); K, dex, dex
        To be added to the true teff, logg, feh. Absolute values: typically 40 K, 0.07 and
        0.06 dex, at most 200 K, 0.35 and 0.5 dex on the stars of `make_stars`.
    """
    t = (np.asarray(teff, dtype=np.float64) - 5200.0) / 1000.0
    g = np.asarray(logg, dtype=np.float64)
    m = np.clip(np.asarray(feh, dtype=np.float64), -3.5, 0.8)
    giant = _step(g, 3.3, -0.35)
    low, hot = _step(g, 1.0, -0.25), _step(t, 1.8, 0.2)
    poor, rich = _step(m, -2.0, -0.25), _step(m, 0.2, 0.09)
    d_teff = (
        -35.0 + 55.0 * np.tanh(1.2 * t) - 20.0 * np.sin(2.0 * g) + 30.0 * giant * (m + 0.3)
        - 70.0 * low + 130.0 * hot + 60.0 * poor - 40.0 * rich
    )  # fmt: skip
    d_logg = (
        0.06 + 0.09 * np.sin(1.7 * (g - 0.8)) + 0.12 * giant * np.tanh(1.5 * (m + 0.4))
        - 0.06 * (1.0 - giant) * np.tanh(t)
        + 0.20 * low - 0.18 * hot + 0.18 * poor - 0.08 * rich
    )  # fmt: skip
    d_feh = (
        0.05 - 0.08 * np.tanh(1.2 * t) + 0.13 * np.tanh(0.9 * (g - 3.0)) * np.tanh(1.2 * (m + 0.2))
        + 0.04 * np.cos(1.5 * g) + 0.10 * low - 0.12 * hot + 0.14 * poor - 0.12 * rich
    )  # fmt: skip
    return np.stack([d_teff, d_logg, d_feh], axis=-1)


def galah_bias(teff: ArrayLike, logg: ArrayLike, feh: ArrayLike) -> FloatArray:
    """Injected difference GALAH - truth: small, and linear in Teff. APOGEE has none.

    Returns
    -------
    ndarray of float64, shape (n, 3); K, dex, dex
        Teff +30 K - 10 K per 1000 K above 5000 K; log g -0.03; [Fe/H] +0.04.
    """
    t = (np.asarray(teff, dtype=np.float64) - 5000.0) / 1000.0
    return np.stack([30.0 - 10.0 * t, np.full_like(t, -0.03), np.full_like(t, 0.04)], axis=-1)


def stated_error_factor(logg: ArrayLike, snr: ArrayLike) -> FloatArray:
    """Stated error / true error of every survey: 0.5 to 2, by type and signal to noise.

    Dwarfs (log g >= 3.5): 0.6 at low to 1.9 at high S/N; giants: 1.6 at low to 0.55 at high S/N.
    """
    s = np.asarray(snr, dtype=np.float64)
    share = s / (s + 50.0)
    return np.asarray(np.where(np.asarray(logg) < 3.5, 1.6 - 1.1 * share, 0.6 + 1.4 * share))


def difficulty(teff: FloatArray, logg: FloatArray, feh: FloatArray) -> FloatArray:
    """Factor of the true label errors: 1 for most stars, up to 3 for hot, metal-poor, tip stars."""
    return np.asarray(
        1.0 + 0.8 * _step(teff, 7000.0, 200.0) + 0.8 * _step(feh, -1.8, -0.2)
        + 0.4 * _step(logg, 1.0, -0.2)
    )  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Labels as a survey gives them: arrays of shape (n, 3) in the order teff, logg, feh."""

    value: FloatArray
    true_error: FloatArray
    stated_error: FloatArray


def measure(
    stars: Stars,
    snr: FloatArray,
    bias: FloatArray,
    floor: tuple[float, float, float],
    slope: tuple[float, float, float],
    normal: FloatArray,
    is_outlier: BoolArray,
    wrong: FloatArray,
) -> Measured:
    """Labels with bias, noise, mis-stated errors and outliers.

    The true error is sqrt(floor^2 + (slope / snr)^2) times `difficulty`; the stated one is that
    times `stated_error_factor`. Outliers are off by at least 400 K, 0.6 dex and 0.4 dex, to either
    side, in all three labels.

    Parameters
    ----------
    snr : ndarray of float64, shape (n,)
    bias, normal, wrong : ndarray of float64, shape (n, 3)
        Systematic difference; standard normal and uniform random numbers.
    floor, slope : tuple of float; K, dex, dex
    """
    hard = difficulty(stars.teff, stars.logg, stars.feh)[:, None]
    error = hard * np.hypot(np.array(floor), np.array(slope) / snr[:, None])
    value = np.stack([stars.teff, stars.logg, stars.feh], axis=-1) + bias + error * normal
    off = np.flatnonzero(is_outlier)
    if len(off):
        side = 2.0 * wrong[off] - 1.0
        least, more = np.array([400.0, 0.6, 0.4]), np.array([1200.0, 1.4, 1.1])
        move = np.where(side < 0, -1.0, 1.0) * (least + more * np.abs(side))
        moved = value[off] + move
        outside = (moved < [3000.0, -0.5, -3.8]) | (moved > [11000.0, 5.6, 1.0])
        value[off] = np.where(outside, value[off] - move, moved)
    factor = stated_error_factor(stars.logg, snr)[:, None]
    return Measured(value, error, error * factor)
