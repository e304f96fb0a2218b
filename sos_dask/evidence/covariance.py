"""How the errors of the corrected labels of one row go together.

They are those of one spectrum: noise moves all labels at once. The covariance of two labels of a
row is the product of their errors (``*_sos_err``) and of the correlation that is given here by kind
of star and S/N.

Residuals corrected - reference contain the errors of the reference, which are taken as independent
between labels: they make the correlation of residuals smaller, by the product of both labels' own
shares of the widths. That of the residuals comes from the widths of sums and differences of the
two, each in units of its width, (w_sum^2 - w_difference^2) / (w_sum^2 + w_difference^2), by
quantiles (Gnanadesikan & Kettenring 1972, Biometrics 28, 81): wrong measurements hardly change it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sos_dask.columns import BoolArray, FloatArray, FloatingArray
from sos_dask.evidence.figures import BANDS
from sos_dask.stats.numbers import ALL

MIN_PAIRS = 100
# Relative variance, times n, of half of the 16-84 % range of normal numbers:
# p (1 - p) / (2 q f(q))^2 with p = 0.68, their quantile q and density f.
_WIDTH_VARIANCE = 0.93


def groups(giant: BoolArray, snr: FloatArray) -> dict[tuple[str, str], BoolArray]:
    """Give the pairs (n,) of each kind of star and each of `BANDS` of S/N, and of all together."""
    every = np.ones_like(giant)
    kinds = {ALL: every, "giants": giant, "dwarfs": ~giant}
    bands = {ALL: every} | {
        name: (snr >= low) & (snr < high) for name, (low, high) in BANDS.items()
    }
    return {(k, b): kinds[k] & bands[b] for k, b in itertools.product(kinds, bands)}


def correlations(
    residual: FloatArray,
    own: FloatingArray,
    width: FloatingArray,
    labels: Sequence[str],
    places: Mapping[tuple[str, str], BoolArray],
) -> list[dict[str, Any]]:
    """Measure the correlation of the errors of every two labels.

    ``residual``, ``own`` and ``width``, all (n, l), are corrected - reference of pairs, errors of
    the corrected labels themselves, and widths of the residuals. Places are those of `groups`, by
    kind and band; those with less than `MIN_PAIRS` pairs that know both labels are left out. A row
    has ``kind``, ``snr``, ``label``, ``other``, ``n`` pairs, ``correlation`` (-1 to 1) and its
    standard ``error``.
    """
    found = []
    for (kind, band), rows in places.items():
        for one, other in itertools.combinations(range(len(labels)), 2):
            x, y = (residual[rows] / width[rows]).T[[one, other]]
            known = np.isfinite(x) & np.isfinite(y)
            if (n := int(np.count_nonzero(known))) < MIN_PAIRS:
                continue
            both = np.stack([x[known] + y[known], x[known] - y[known]])
            plus, minus = (np.diff(np.quantile(both, [0.16, 0.84], axis=1), axis=0)[0] / 2) ** 2
            share = float(
                np.mean(np.prod((own[rows] / width[rows])[known][:, [one, other]], axis=1))
            )
            total = (plus + minus) * share
            error = 4 * plus * minus / (plus + minus) / total * np.sqrt(2 * _WIDTH_VARIANCE / n)
            row = {"kind": kind, "snr": band, "label": labels[one], "other": labels[other], "n": n}
            value = float(np.clip((plus - minus) / total, -1.0, 1.0))
            found.append(row | {"correlation": value, "error": float(error)})
    return found
