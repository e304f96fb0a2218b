"""Three-cornered hat: the error of each of three surveys from their differences alone.

For independent errors s_ab^2 = s_a^2 + s_b^2 and so on, hence
s_a^2 = (s_ab^2 + s_ac^2 - s_bc^2) / 2 (Gray & Allan 1974, Proc. 28th Frequency Control Symposium,
p. 243). Scatters are 1.4826 MAD. A negative result says that the errors are not independent, or
smaller than can be told from so many stars: it is given, and flagged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ConfigError

_MAD_TO_SIGMA = 1.4826
_SAMPLES = 500
_BLOCK = 1 << 21
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Corner:
    """Error of one of the three surveys.

    Parameters
    ----------
    survey : str
    n : int
        Stars that all three have.
    variance : float
        Squared unit of the label.
    sigma : float or None
        Its root; None where it is negative.
    low, high : float
        95 % bootstrap interval of the signed root sign(variance) sqrt(|variance|).
    negative : bool
        The variance is negative, or its interval reaches below zero.
    """

    survey: str
    n: int
    variance: float
    sigma: float | None
    low: float
    high: float
    negative: bool


def three_cornered_hat(
    values: Sequence[NDArray[np.floating]], surveys: Sequence[str], seed: int = 0
) -> list[Corner]:
    """Errors of three surveys on the stars that all have.

    Parameters
    ----------
    values : sequence of three ndarray of float, shape (n,)
        A label in each survey, star by star; stars with a nan are left out. Constant offsets
        between surveys do not matter; trends between them count as errors.
    surveys : sequence of three str
    seed : int
        Of the bootstrap over stars.

    Raises
    ------
    ConfigError
        Not three surveys, or fewer than 10 stars.
    """
    if len(values) != 3 or len(surveys) != 3:
        raise ConfigError(f"a three-cornered hat needs three surveys, not {len(surveys)}")
    table = np.stack([np.asarray(value, dtype=np.float64) for value in values])
    table = table[:, np.isfinite(table).all(axis=0)]
    n = table.shape[1]
    if n < 10:
        raise ConfigError(f"{', '.join(surveys)} have only {n} stars in common")
    differences = np.stack([table[0] - table[1], table[0] - table[2], table[1] - table[2]])
    variances = _corners(_variances(differences[:, None, :]))[:, 0]
    random = np.random.default_rng(seed)
    step = max(1, _BLOCK // n)
    samples = []
    for first in range(0, _SAMPLES, step):
        rows = random.integers(0, n, (min(step, _SAMPLES - first), n))
        samples.append(_corners(_variances(differences[:, rows])))
    low, high = np.quantile(np.concatenate(samples, axis=1), [0.025, 0.975], axis=1)
    return [
        Corner(
            survey,
            n,
            float(variance),
            float(np.sqrt(variance)) if variance >= 0 else None,
            float(np.sign(a) * np.sqrt(abs(a))),
            float(np.sign(b) * np.sqrt(abs(b))),
            bool(variance < 0 or a < 0),
        )
        for survey, variance, a, b in zip(surveys, variances, low, high, strict=True)
    ]


def _variances(differences: FloatArray) -> FloatArray:
    """Squared robust scatter over the last axis."""
    middle = np.median(differences, axis=-1, keepdims=True)
    mad = np.median(np.abs(differences - middle), axis=-1)
    return np.asarray((_MAD_TO_SIGMA * mad) ** 2)


def _corners(pairs: FloatArray) -> FloatArray:
    ab, ac, bc = pairs
    return np.stack([ab + ac - bc, ab + bc - ac, ac + bc - ab]) / 2
