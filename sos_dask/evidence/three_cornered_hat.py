"""Three-cornered hat: the error of each of three surveys from their differences alone.

For independent errors s_ab^2 = s_a^2 + s_b^2 and so on, hence
s_a^2 = (s_ab^2 + s_ac^2 - s_bc^2) / 2 (Gray & Allan 1974, Proc. 28th Frequency Control Symposium,
p. 243). Scatters are 1.4826 MAD. A negative result says that the errors are not independent, or
smaller than can be told from so many stars: it is given, and flagged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import FloatArray
from sos_dask.errors import ConfigError
from sos_dask.stats.numbers import MAD_TO_SIGMA

_SAMPLES = 500
_BLOCK = 1 << 21


def three_cornered_hat(
    values: Sequence[NDArray[np.floating]], surveys: Sequence[str], seed: int = 0
) -> list[dict[str, Any]]:
    """Find the errors of three surveys on the stars that all have.

    Parameters
    ----------
    values : sequence of three ndarray of float, shape (n,)
        A label in each survey, star by star; stars with a nan are left out. Constant offsets
        between surveys do not matter; trends between them count as errors.
    surveys : sequence of three str
    seed : int
        Of the bootstrap over stars.

    Returns
    -------
    list of dict
        Of each ``survey``: ``n`` stars that all three have; ``variance`` of its errors; ``sigma``,
        the root, None where it is negative; ``low`` and ``high``, the 95 % bootstrap interval of
        the signed root sign(variance) sqrt(abs(variance)); ``negative`` where the variance or
        ``low`` is below zero.

    Raises
    ------
    ConfigError
        Not three surveys, or fewer than 10 stars.
    """
    from scipy.stats import bootstrap

    if len(values) != 3 or len(surveys) != 3:
        raise ConfigError(f"a three-cornered hat needs three surveys, not {len(surveys)}")
    table = np.stack([np.asarray(value, dtype=np.float64) for value in values])
    table = table[:, np.isfinite(table).all(axis=0)]
    n = table.shape[1]
    if n < 10:
        raise ConfigError(f"{', '.join(surveys)} have only {n} stars in common")
    resampled = bootstrap(
        table,
        _variances,
        n_resamples=_SAMPLES,
        batch=max(1, _BLOCK // n),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    found = []
    for name, variance, *limits in zip(
        surveys, _variances(*table), resampled.low, resampled.high, strict=True
    ):
        low, high = (float(np.sign(limit) * np.sqrt(abs(limit))) for limit in limits)
        row: dict[str, Any] = {"survey": name, "n": n, "variance": float(variance)}
        row["sigma"] = float(np.sqrt(variance)) if variance >= 0 else None
        found.append({**row, "low": low, "high": high, "negative": bool(min(variance, low) < 0)})
    return found


def _variances(a: FloatArray, b: FloatArray, c: FloatArray, axis: int = -1) -> FloatArray:
    """Squared errors of the three along the last axis."""
    differences = np.stack([a - b, a - c, b - c])
    middle = np.median(differences, axis=-1, keepdims=True)
    mad = np.median(np.abs(differences - middle), axis=-1)
    ab, ac, bc = (MAD_TO_SIGMA * mad) ** 2
    return np.stack([ab + ac - bc, ab + bc - ac, ac + bc - ab]) / 2
