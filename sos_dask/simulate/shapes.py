"""Shapes of a hard sky: what the target's pipeline does to labels, errors and radial velocity.

Amplitudes, signs and places are drawn from the seed of the sky: another seed is another pipeline.
Each shape has random numbers of its own, so that it is the same whatever others are given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sos_dask.columns import FloatArray
from sos_dask.simulate.sky import SHAPES, SkySettings, generator

_STREAM = 3  # of random numbers, beside those of plates and their centres
_SMOOTH, _RV = len(SHAPES), len(SHAPES) + 1  # parts of it, beside those of the shapes
_STEP_WIDTH = 8.0  # K
_RV_ZERO_POINT = -4.5  # km/s

# The ends of the labels where the pipeline hooks: label, sign, edge, and depth of half a hook.
_HOOKS = ((0, 1, 7000.0, 500.0), (1, -1, 1.0, 0.4), (2, -1, -2.0, 0.25), (2, 1, 0.2, 0.12))
# The ends where labels saturate: label, sign, where it begins and what is left beyond (from, to).
_ENDS = (
    (0, 1, (6800.0, 7200.0), (500.0, 1200.0)), (0, -1, (4000.0, 4300.0), (150.0, 400.0)),
    (1, 1, (4.5, 4.65), (0.1, 0.25)), (1, -1, (0.9, 1.5), (0.3, 0.8)),
    (2, 1, (0.15, 0.3), (0.08, 0.2)), (2, -1, (-2.0, -1.5), (0.35, 0.8)),
)  # fmt: skip


def lamost_pipeline(settings: SkySettings, true: FloatArray, noise: FloatArray) -> FloatArray:
    """Injected difference LAMOST - truth of a sky with shapes, K, dex, dex, shape (n, 3).

    Smooth by the true labels (typically 50 K, 0.08 and 0.06 dex), on every sky with shapes; on it
    come the hooks; the sum saturates at both ends. The step is a function of the Teff that the
    pipeline sees, its ``noise`` (n, 3) included: for what is observed it is as sharp as it is.
    """
    labels = true + _smooth(settings.seed, true)
    if "hooks" in settings.shapes:
        labels += _hooks(settings.seed, true)
    if "saturation" in settings.shapes:
        labels = _saturated(settings.seed, labels)
    if "step" in settings.shapes:
        labels += _step(settings.seed, labels[:, 0] + noise[:, 0])
    return labels - true


def correlated(settings: SkySettings, normal: FloatArray) -> FloatArray:
    """Correlate normal errors (n, 3) of the labels: Teff with log g and [Fe/H] by 0.5 to 0.8."""
    if "correlated" not in settings.shapes:
        return normal
    teff_logg, teff_feh, part = _generator(settings.seed, "correlated").uniform(
        [0.5, 0.5, 0.0], [0.8, 0.8, 0.3]
    )
    logg_feh = teff_logg * teff_feh + part * np.sqrt((1 - teff_logg**2) * (1 - teff_feh**2))
    matrix = [[1, teff_logg, teff_feh], [teff_logg, 1, logg_feh], [teff_feh, logg_feh, 1]]
    return np.asarray(normal @ np.linalg.cholesky(np.array(matrix)).T)


def stated_factor(settings: SkySettings, snr: FloatArray) -> FloatArray:
    """Stated error / true error of each label, (n, 3): 0.5 to 2 at S/N 50, by a power of the S/N.

    The power is 0.2 to 0.45 of either sign; the factor stays between 0.3 and 3.
    """
    rng = _generator(settings.seed, "correlated", 1)
    at_50, power = np.exp(_either(rng, 0.25, 0.7, 3)), _either(rng, 0.2, 0.45, 3)
    return np.asarray(np.clip(at_50 * (snr[:, None] / 50.0) ** power, 0.3, 3.0))


def rv_offset(settings: SkySettings, teff: ArrayLike, snr: ArrayLike) -> FloatArray:
    """Injected difference of the radial velocity, LAMOST - truth, km/s, of a sky with shapes.

    -4.5, with trends of some tenths in log S/N and true Teff.
    """
    by_snr, by_teff = _either(_generator(settings.seed, _RV), 0.2, 0.5, 2)
    x = np.log10(np.asarray(snr, dtype=np.float64) / 60.0)
    t = (np.asarray(teff, dtype=np.float64) - 5400.0) / 1000.0
    return np.asarray(_RV_ZERO_POINT + by_snr * x + by_teff * np.tanh(t))


def preference(
    settings: SkySettings, g: FloatArray, distance: FloatArray, feh: FloatArray
) -> FloatArray:
    """Weight of stars (n,) for the references: bright and near ones of a narrow sky, not poor."""
    if "narrow" not in settings.shapes:
        return np.ones_like(g)
    weight = np.exp(-np.maximum(g - 12.5, 0.0) / 1.2 - distance / 6000.0)
    return np.asarray(weight * np.where(feh < -1.2, 0.2, 1.0))


def _generator(seed: int, part: str | int, more: int = 0) -> np.random.Generator:
    number = SHAPES.index(part) if isinstance(part, str) else part
    return generator(seed, _STREAM, number, more)


def _either(rng: np.random.Generator, low: Any, high: Any, *shape: int) -> FloatArray:
    """Uniform between two sizes, of either sign."""
    size = rng.uniform(low, high, shape)
    return np.where(rng.random(shape) < 0.5, -size, size)


def _smooth(seed: int, true: FloatArray) -> FloatArray:
    """Smooth difference, nonlinear in all labels, with terms of two of them."""
    rng = _generator(seed, _SMOOTH)
    t, g, m = (true[:, 0] - 5200.0) / 1000.0, true[:, 1], np.clip(true[:, 2], -3.5, 0.8)
    rate, phase = rng.uniform(1.2, 2.0), rng.uniform(0.0, 2.0 * np.pi)
    giant = 1.0 / (1.0 + np.exp((g - 3.3) / 0.35))
    wave, rich = np.sin(rate * g + phase), np.tanh(1.3 * (m + 0.3))
    terms = np.stack([np.ones_like(t), np.tanh(1.2 * t), wave, rich, giant * rich, wave * rich])
    parts = _either(rng, 0.4, 1.0, 6, 3) * np.array([0.5, 1.0, 0.6, 0.5, 0.8, 0.5])[:, None]
    return np.asarray(terms.T @ (parts * np.array([45.0, 0.08, 0.06])))


def _hooks(seed: int, true: FloatArray) -> FloatArray:
    """What is added beyond the edges of label space, up to 250 K, 0.4 dex and 0.3 dex."""
    rng = _generator(seed, "hooks")
    found = np.zeros_like(true)
    for label, sign, edge, depth in _HOOKS:
        beyond = np.maximum(sign * (true[:, label] - edge), 0.0) / depth
        size = _either(rng, [100.0, 0.15, 0.1], [250.0, 0.4, 0.3], 3)
        found += size * (beyond**2 / (1.0 + beyond**2))[:, None]
    return found


def _saturated(seed: int, labels: FloatArray) -> FloatArray:
    """Labels that are compressed at both ends, and never pass what is left there."""
    rng = _generator(seed, "saturation")
    found = labels.copy()
    for label, sign, place, room in _ENDS:
        begin, left = rng.uniform(*place), rng.uniform(*room)
        beyond = np.maximum(sign * (labels[:, label] - begin), 0.0)
        found[:, label] += sign * (left * (1.0 - np.exp(-beyond / left)) - beyond)
    return found


def _step(seed: int, teff: FloatArray) -> FloatArray:
    """A step by Teff (n,) as seen, 8 K wide, of 40-120 K, 0.06-0.18 and 0.04-0.12 dex."""
    rng = _generator(seed, "step")
    place = rng.uniform(4900.0, 6200.0)
    size = _either(rng, [40.0, 0.06, 0.04], [120.0, 0.18, 0.12], 3)
    return np.asarray(0.5 * (1.0 + np.tanh((teff - place) / _STEP_WIDTH))[:, None] * size)
