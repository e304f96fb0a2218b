"""Error of corrected labels: noise by signal to noise, and growth away from the overlap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import FloatArray

_GIANT_LOGG = 3.5
_KIND_PAIRS = 400  # with fewer the kinds share one law
_ONE_SIGMA = 0.6826894921370859  # of a normal distribution within one standard deviation
MIN_GROWTH_PAIRS = 150
# Of laws from constant to steep and 630 pairs, with wrong ones, bins of 40 to 80 called most nearly
# the true share outside.
_BIN_PAIRS, _LEAST_BINS = 80, 3
_LEAST = 1e-6
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
    for label in range(residual.shape[1]):
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
    """Growth of the error with the distance from the overlap, never falling.

    It is 1 in the nearer half of the held-out pairs by definition: their error is the unit. Beyond,
    it is that of bins of pairs by isotonic regression, straight lines between their middles.

    Parameters
    ----------
    distance, growth : tuple of float
        Distances, ascending, and the growth at each; the first is the end of the nearer half.
        A single place: the growth could not be measured and is 1 everywhere.
    last : float
        Distance of the outermost pairs that tell of it.
    """

    distance: tuple[float, ...]
    growth: tuple[float, ...]
    last: float

    @classmethod
    def fit(cls, distance: FloatArray, ratio: FloatArray) -> tuple[Growth, list[dict[str, float]]]:
        """Fit to residuals over noise of held-out pairs.

        Parameters
        ----------
        distance : ndarray of float64, shape (n,)
        ratio : ndarray of float64, shape (n, 3)
            A label whose errors are all 0 in the nearer half is left out.

        Returns
        -------
        Growth
        list of dict
            Bins of the fit: ``distance``, ``n``, ``growth_measured``, ``growth``. Empty, with a
            growth of 1, where there are fewer than `MIN_GROWTH_PAIRS` pairs, all are equally
            far, or no label has errors.
        """
        from scipy.optimize import isotonic_regression

        order = np.argsort(distance, kind="stable")
        far_off = distance[order]
        last = float(far_off[-min(_TAIL_PAIRS, len(order))]) if len(order) else 0.0
        half = float(far_off[max(len(order) // 2 - 1, 0)]) if len(order) else 0.0
        dense, sparse = (
            np.array_split(rows, max(len(rows) // _BIN_PAIRS, _LEAST_BINS))
            for rows in (order[far_off <= half], order[far_off > half])
        )
        bins = [rows for rows in (*dense, *sparse) if len(rows)]
        middle = np.array([np.median(distance[rows]) for rows in bins])
        width = np.array([[residual_width(column) for column in ratio[rows].T] for rows in bins])
        near = middle <= half
        unit = np.sqrt(np.mean(np.square(width[near]), axis=0)) if near.any() else np.zeros(1)
        if len(order) < MIN_GROWTH_PAIRS or near.all() or not (unit > 0).any():
            return cls((half,), (1.0,), last), []
        measured = np.sqrt(np.mean(np.square(width[:, unit > 0] / unit[unit > 0]), axis=1))
        n = np.array([len(rows) for rows in bins])
        # Errors of widths are in proportion to them, so their logarithms are averaged.
        log_width = np.log(np.maximum(measured[~near], _LEAST))
        rising = np.exp(isotonic_regression(log_width, weights=n[~near]).x)
        # Bins in a row of equal growth are one line between the first and the last of them.
        at = np.append(half, middle[~near])
        values = np.maximum(np.append(1.0, rising), 1.0)
        kept = np.append(True, (np.diff(values[:-1]) > 0) | (np.diff(values[1:]) > 0))
        kept = np.append(kept, True)
        growth = cls(tuple(at[kept].tolist()), tuple(values[kept].tolist()), last)
        return growth, [
            {"distance": float(d), "n": int(k), "growth_measured": float(m), "growth": float(g)}
            for d, k, m, g in zip(middle, n, measured, growth(middle), strict=True)
        ]

    @property
    def measured(self) -> bool:
        """False where there were too few pairs, so that the growth is 1 everywhere."""
        return len(self.distance) > 1

    @property
    def d0(self) -> float:
        """Distance at which the error has grown by the root of 2; infinite where it never does."""
        above = np.flatnonzero(np.array(self.growth) >= np.sqrt(2))
        if not len(above):
            return float("inf")
        some = slice(above[0] - 1, above[0] + 1)
        return float(np.interp(np.sqrt(2), self.growth[some], self.distance[some]))

    def __call__(self, distance: FloatArray) -> FloatArray:
        """Growth at distances, nan where they are; constant beyond the last bin."""
        return np.asarray(np.interp(distance, self.distance, self.growth))
