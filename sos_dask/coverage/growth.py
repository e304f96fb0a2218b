"""Error of corrected labels: noise by signal to noise, and growth away from the overlap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sos_dask.schema import LABELS

FloatArray = NDArray[np.float64]
_GIANT_LOGG = 3.5
_KIND_PAIRS = 400  # with fewer the kinds share one law
_ONE_SIGMA = 0.6826894921370859  # of a normal distribution within one standard deviation
_DENSE = 0.5  # share of the held-out pairs with the smallest distances: their error is the unit
_BIN_PAIRS = 40
_TAIL_PAIRS = 10  # beyond the distance of the last so many pairs nothing is measured


def residual_width(values: NDArray[np.floating]) -> float:
    """Half-width of the interval around 0 that holds 68.27 % of the values."""
    return float(np.quantile(np.abs(values), _ONE_SIGMA)) if len(values) else float("nan")


@dataclass(frozen=True)
class Noise:
    """Error of the corrected labels in the dense overlap: sqrt(floor^2 + (slope / snr)^2).

    Giants and dwarfs differ: a correction that sees a narrow main sequence takes out some of the
    noise itself.

    Parameters
    ----------
    floor, slope : tuple of tuple of float
        Of dwarfs, then giants: one a label, in its unit.
    reference : tuple of tuple of float
        By what the stated errors of the reference are to be multiplied, at most 1.
    """

    floor: tuple[tuple[float, ...], ...]
    slope: tuple[tuple[float, ...], ...]
    reference: tuple[tuple[float, ...], ...]

    @classmethod
    def fit(
        cls, residual: FloatArray, logg: FloatArray, snr: FloatArray, reference_error: FloatArray
    ) -> Noise:
        """Fit to residuals of pairs, together with how much of the reference's error is in them.

        Parameters
        ----------
        residual, reference_error : ndarray of float64, shape (n, 3)
            nan in ``reference_error``: not known, nothing is put down to the reference.
        logg, snr : ndarray of float64, shape (n,)
        """
        giant = logg < _GIANT_LOGG
        laws = []
        for kind in (~giant, giant):
            rows = kind if np.count_nonzero(kind) >= _KIND_PAIRS else np.ones_like(kind)
            laws.append(_noise_law(residual[rows], snr[rows], reference_error[rows]))
        return cls(*(tuple(law[part] for law in laws) for part in range(3)))

    def of_pairs(
        self,
        logg: NDArray[np.floating],
        snr: NDArray[np.floating],
        reference_error: FloatArray,
    ) -> FloatArray:
        """Widths (n, 3) of the residuals of pairs: with their share of the reference's error."""
        kind = (np.asarray(logg) < _GIANT_LOGG).astype(np.int64)
        reference = np.array(self.reference)[kind] * np.nan_to_num(reference_error)
        return np.asarray(np.hypot(self(logg, snr), reference))

    def __call__(self, logg: NDArray[np.floating], snr: NDArray[np.floating]) -> FloatArray:
        """Errors (n, 3) of rows; the floor where the signal to noise is not known."""
        kind = (np.asarray(logg) < _GIANT_LOGG).astype(np.int64)
        slope = np.array(self.slope)[kind] * _inverse(snr)[:, None]
        return np.asarray(np.hypot(np.array(self.floor)[kind], slope))


def _inverse(snr: NDArray[np.floating]) -> FloatArray:
    snr = np.asarray(snr, dtype=np.float64)
    return np.asarray(np.where(snr > 0, 1.0 / np.where(snr > 0, snr, 1.0), 0.0))


def _noise_law(
    residual: FloatArray, snr: FloatArray, reference_error: FloatArray
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Floor, slope and share of the reference of each label.

    From squared widths in bins of equally many pairs along S/N, in halves by the reference's error.
    """
    from scipy.optimize import lsq_linear

    inverse = _inverse(snr)
    order = np.argsort(inverse, kind="stable")
    bins = np.array_split(order, int(np.clip(len(order) // 200, 3, 25)))
    stated = np.square(np.nan_to_num(reference_error))
    laws = []
    for label in range(len(LABELS)):
        cells = []
        for rows in bins:
            by_error = rows[np.argsort(stated[rows, label], kind="stable")]
            cells += np.array_split(by_error, 2)
        cells = [cell for cell in cells if len(cell)]
        total = np.array([residual_width(residual[cell, label]) ** 2 for cell in cells])
        total = np.maximum(total, 1e-12)
        terms = np.array(
            [[1.0, np.mean(np.square(inverse[c])), np.median(stated[c, label])] for c in cells]
        )
        # What is left to the row is never less than 40 % of the smallest width: where all pairs
        # have like errors, the share of the reference cannot be told from the row's own floor.
        bounds = ([total.min() * 0.16, 0.0, 0.0], [np.inf, np.inf, 1.0])
        laws.append(lsq_linear(terms / total[:, None], np.ones(len(total)), bounds).x)
    floor, slope, share = np.sqrt(np.array(laws)).T.tolist()
    return tuple(floor), tuple(slope), tuple(share)


@dataclass(frozen=True)
class Growth:
    """Growth of the error with the distance d from the overlap: sqrt(1 + (d / d0)^2).

    Its square is that of the noise plus that of a slope times the distance: what the overlap does
    not show of a difference that changes from place to place.

    Parameters
    ----------
    d0 : float
        Where the two are equal.
    last : float
        Distance of the outermost pairs that tell of it; constant beyond.
    """

    d0: float
    last: float

    @classmethod
    def fit(cls, distance: FloatArray, ratio: FloatArray) -> tuple[Growth, list[dict[str, float]]]:
        """Fit to |residual| / noise of held-out pairs (n, 3); returns the bins of the fit too."""
        from scipy.optimize import least_squares

        order = np.argsort(distance, kind="stable")
        last = float(distance[order[-min(_TAIL_PAIRS, len(order))]])
        bins = np.array_split(order, max(len(order) // _BIN_PAIRS, 4))
        middle = np.array([np.median(distance[b]) for b in bins])
        n = np.array([len(b) for b in bins])
        dense = order[: max(int(_DENSE * len(order)), 1)]
        unit = [residual_width(ratio[dense, label]) for label in range(len(LABELS))]
        width = [[residual_width(ratio[b, i]) for i in range(len(LABELS))] for b in bins]
        relative = np.array(width) / np.maximum(np.array(unit), 1e-12)
        measured = np.sqrt(np.mean(np.square(relative), axis=1))
        log_measured = np.log(np.maximum(measured, 1e-6))
        at = np.log(np.maximum(middle, 1e-12))

        def misfit(p: FloatArray) -> FloatArray:
            log_growth = 0.5 * np.logaddexp(0.0, 2.0 * (at - p[0]))
            return np.asarray(np.sqrt(n) * (log_growth + p[1] - log_measured))

        found = least_squares(misfit, np.array([at[-1], 0.0]), loss="soft_l1").x
        growth, scale = cls(float(np.exp(found[0])), last), float(np.exp(found[1]))
        rows = [
            {
                "distance": float(d),
                "n": int(k),
                "growth_measured": float(m / scale),
                "growth": float(growth(np.array([d]))[0]),
            }
            for d, k, m in zip(middle, n, measured, strict=True)
        ]
        return growth, rows

    def __call__(self, distance: FloatArray) -> FloatArray:
        """Growth at distances, nan where they are."""
        return np.asarray(np.hypot(1.0, np.minimum(distance, self.last) / self.d0))
