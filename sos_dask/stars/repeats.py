"""What repeat observations say of stated errors: the width of pulls, and the factor it makes.

The pull of two observations i, j of one star is (x_i - x_j) / sqrt(e_i^2 + e_j^2). Its distribution
has width 1 where the stated errors e are right, whatever the star; a width w says that errors of
this kind must be multiplied by w. The width is the median of |pull| over 0.6745, the median of the
absolute value of a standard normal number, of the pulls below `CLIP` widths: 6 % of wrong
measurements would else make it 7 % too large. (Those that are off by less remain.) This is
the normalisation of the Survey of Surveys (Tsantaki et al. 2022, A&A 659, A95), by S/N and for
giants and dwarfs separately.

Where the factor f depends on S/N, the squared width of a pull is (f_i^2 e_i^2 + f_j^2 e_j^2) /
(e_i^2 + e_j^2). To first order in the slope p of log f by log S/N, this is f^2 at the mean log S/N
of both observations, weighted by e^2: there the pull counts. The next order makes a width too large
by p^2 / 4 of the squared difference of log S/N at most: 2 % for p = 0.4 and a factor of 2. Pulls of
observations that differ by more count for their kind alone. Between the bins of S/N, log f is
linear in log S/N.

Pulls are counted in a histogram, so that counts of any parts of the sky add up exactly. Every
observation is compared with the next one of its star in the order of the sky, then of ``obs_id``.

Errors that were themselves calibrated on repeats, like those of APOGEE, have width 1 by
construction; systematic errors that all observations of a star share are in no pull.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sos_dask.columns import FloatArray, IntArray, reals_or_nan
from sos_dask.schema import HEALPIX_COLUMN, LABELS
from sos_dask.stats.numbers import GIANT_LOGG

# Bins of S/N: below the first, ..., above the last.
SNR_EDGES = (10.0, 20.0, 30.0, 50.0, 100.0, 200.0, 400.0, 800.0)
KINDS = ("dwarf", "giant")
MIN_PULLS = 100  # the width of as many is known to 12 %
_HALF_NORMAL_MEDIAN = 0.6744897501960817
# Standard error of a median of half-normal numbers, in units of it times 1 / sqrt(n):
# 1 / (2 f(m) m) with the density f (Kendall & Stuart, The Advanced Theory of Statistics).
_MEDIAN_ERROR = 1.1664
CLIP = 3.0  # normal numbers are beyond once in 370: the width is 0.2 % too small
_LOWEST, _BINS_AN_OCTAVE, _N_BINS = -10.0, 12, 192  # of |pull|, from 2^-10 to 2^6, 6 % wide
_LIMITS = tuple(zip((None, *SNR_EDGES), (*SNR_EDGES, None), strict=True))
_NO_SNR = len(SNR_EDGES) + 1
_Snr = tuple[float | None, float | None, float | None]  # limits and mean
_UNITS = 1024  # of an octave of S/N: the last place of each histogram has the sum of log2 S/N
MEASURED = (*LABELS, "rv")
_SHAPE = (len(MEASURED), len(KINDS), _NO_SNR + 1, _N_BINS + 1)


@dataclass(frozen=True)
class Factor:
    """Width of the pulls of one kind of observations."""

    label: str
    kind: str  # ``giant`` (log g < 3.5), ``dwarf``, or ``all``
    snr_low: float | None  # S/N, weighted mean of both observations; None: no limit
    snr_high: float | None
    mean_snr: float | None  # geometric: where this is the factor; None: of all pulls, of any S/N
    n: int  # pulls, without those clipped
    factor: float  # of the stated errors: the width, or 1 below `MIN_PULLS` pulls
    low: float | None  # 95 % interval of the width; None where it was not measured
    high: float | None


def pull_counts(
    table: pa.Table, primary: IntArray, expected_error: Mapping[str, float] | None = None
) -> list[int]:
    """Count the pulls of the repeats in a table: number and count of each bin that is not empty.

    Observations, in the order of their catalog, have ``_healpix_29``, ``quality``, labels, and
    where there are ``*_err`` and ``snr``. Only rows with quality 0 count, and of measurements that
    are listed twice only one. ``primary`` (n,) is equal for observations of one star; negative: of
    none. ``expected_error``, of one observation by label, is for surveys that state none.
    """
    counts = np.zeros(_SHAPE, dtype=np.int64)
    if table.num_rows:
        from sos_dask.sky.loops import count_pulls, repeated, sort_members

        _, first, row = repeated(primary)
        # Rows of one cell stand in the order of their keys already: the order of the catalog.
        sort_members(first, row, table[HEALPIX_COLUMN].to_numpy())
        names = [*MEASURED, *(f"{label}_err" for label in MEASURED), "snr"]
        columns = [reals_or_nan(table, name).view() for name in names]
        if len({values.dtype for values in columns}) > 1:
            columns = [values.astype(np.float64) for values in columns]
        for values in columns:
            values.flags.writeable = False  # all of one type
        known = expected_error or {}
        expected = np.array([known.get(label, np.nan) for label in MEASURED], dtype=np.float64)
        n = len(MEASURED)
        given = tuple(columns[:n]), tuple(columns[n : 2 * n]), expected, columns[-1]
        bins = np.log2(SNR_EDGES), _UNITS, _LOWEST, float(_BINS_AN_OCTAVE)
        count_pulls(first, row, table["quality"].to_numpy(), *given, GIANT_LOGG, *bins, counts)
    filled = np.flatnonzero(counts)
    flat: list[int] = np.stack([filled, counts.ravel()[filled]], axis=1).ravel().tolist()
    return flat


def merged_pulls(parts: Sequence[Sequence[int]]) -> list[Factor]:
    """Find the factors of a whole survey from the pulls of its parts.

    Of each label: all pulls, then giants and dwarfs, each also in bins of S/N that are joined until
    they have `MIN_PULLS`; only those with pulls, but of the first three always that of all.
    """
    counts = np.zeros(_SHAPE, dtype=np.int64)
    for part in parts:
        place, count = np.array(part, dtype=np.int64).reshape(-1, 2).T
        counts.ravel()[place] += count
    found = []
    for label, of_label in zip(MEASURED, counts, strict=True):
        whole = _factor(of_label[..., :-1].sum(axis=(0, 1)), label, "all")
        if not whole.n and label not in LABELS:
            continue
        found.append(whole)
        for kind, of_kind in zip(KINDS, of_label, strict=True):
            some = [_factor(of_kind[:, :-1].sum(axis=0), label, kind)]
            some += _by_snr(of_kind[:_NO_SNR], label, kind)
            found += [factor for factor in some if factor.n]
    return found


def normalisation(
    factors: Sequence[Mapping[str, Any]],
    label: str,
    logg: NDArray[np.floating],
    snr: NDArray[np.floating],
) -> FloatArray:
    """Find the factor of the stated errors of some rows, by log g and S/N (n,), nan where unknown.

    ``factors`` are `Factor` as in the summary of a survey's stars; may be empty. The factor is that
    of the row's kind, interpolated to its S/N and constant beyond the first and the last bin with
    pulls enough; without any, or without S/N, of its kind alone, or of all; 1 where nothing was
    measured.
    """
    # Stars of an older version do not tell the S/N: their stated errors stay.
    of_label = [one for one in factors if one["label"] == label and "mean_snr" in one]
    known = [one for one in of_label if one["n"] >= MIN_PULLS]
    whole = {one["kind"]: one["factor"] for one in known if one["mean_snr"] is None}
    is_giant, has_snr = np.asarray(logg) < GIANT_LOGG, np.isfinite(snr)
    log_snr = np.log(np.where(snr > 0, snr, 1e-3))
    found = np.empty(len(log_snr))
    for kind, mine in zip(KINDS, (~is_giant, is_giant), strict=True):
        found[mine] = whole.get(kind, whole.get("all", 1.0))
        of_kind = [one for one in known if one["kind"] == kind and one["mean_snr"] is not None]
        if of_kind:
            nodes = np.log([(one["mean_snr"], one["factor"]) for one in of_kind]).T
            found[mine & has_snr] = np.exp(np.interp(log_snr[mine & has_snr], *nodes))
    return found


def pull_correlation(values: FloatArray, errors: FloatArray, star: NDArray[Any]) -> FloatArray:
    """Measure how the errors of several labels go together, from repeats of stars.

    By the share of pulls that have one sign in two labels, which is 1/2 + asin(r) / pi of normal
    numbers of correlation r, whatever their widths (Sheppard 1899); pulls beyond `CLIP` do not
    count. Values and errors are of shape (n, l); ``star`` (n,) is equal for observations of one
    star. The matrix (l, l) is positive definite, without a correlation below `MIN_PULLS` pulls.
    """
    order = np.argsort(star, kind="stable")
    again = order[1:][star[order[1:]] == star[order[:-1]]]
    before = order[:-1][star[order[1:]] == star[order[:-1]]]
    with np.errstate(divide="ignore", invalid="ignore"):  # errors of 0 tell nothing
        pull = (values[again] - values[before]) / np.hypot(errors[again], errors[before])
    pull = pull[(np.abs(pull) < CLIP).all(axis=1)]
    if len(pull) < MIN_PULLS:
        return np.eye(values.shape[1])
    sign = np.sign(pull)
    found = np.sin(np.pi / 2 * (sign.T @ sign) / len(sign))
    np.fill_diagonal(found, 1.0)
    size, vectors = np.linalg.eigh(found)
    found = (vectors * np.maximum(size, 1e-6)) @ vectors.T
    width = np.sqrt(np.diag(found))
    return np.asarray(found / np.outer(width, width))


def _by_snr(counts: IntArray, label: str, kind: str) -> list[Factor]:
    """Factors in bins of S/N, joined so that each has pulls enough; none for a single bin."""
    found, first, n = [], 0, counts[:, :-1].sum(axis=1)
    for stop, (_, high) in enumerate(_LIMITS, 1):
        if high is None or min(n[first:stop].sum(), n[stop:].sum()) >= MIN_PULLS:
            some = counts[first:stop].sum(axis=0)
            snr = 2.0 ** (some[-1] / max(n[first:stop].sum(), 1) / _UNITS)
            limits = _LIMITS[first][0], high, float(snr)
            found.append(_factor(some[:-1], label, kind, limits))
            first = stop
    return found if len(found) > 1 else []


def _factor(counts: IntArray, label: str, kind: str, snr: _Snr = (None, None, None)) -> Factor:
    width, stop = 1.0, len(counts)
    while counts[:stop].any():
        # The median, in bins from the lower end.
        half, below = counts[:stop].sum() / 2, np.cumsum(counts[:stop])
        place = int(np.searchsorted(below, half))
        median = float(place + (half - (below[place] - counts[place])) / counts[place])
        width = 2.0 ** (_LOWEST + median / _BINS_AN_OCTAVE) / _HALF_NORMAL_MEDIAN
        limit = int((np.log2(CLIP * width) - _LOWEST) * _BINS_AN_OCTAVE) + 1
        if limit >= stop:
            break
        stop = limit
    n = int(counts[:stop].sum())
    if n < MIN_PULLS:
        return Factor(label, kind, *snr, n, 1.0, None, None)
    relative = 1.96 * _MEDIAN_ERROR / np.sqrt(n)
    return Factor(label, kind, *snr, n, width, width * (1 - relative), width * (1 + relative))
