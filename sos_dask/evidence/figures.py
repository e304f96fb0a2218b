"""The figures of a comparison: every method on the same pairs, in the same subsets and resamples.

Statistics of target - reference less the predicted difference; ``none`` is without a correction:

* ``median``; ``mad``, 1.4826 times the median absolute deviation from it; ``width``, half of the
  width from the 16th to the 84th percentile;
* ``rms_binned``, root mean square of the medians of bins along each label of the target, every bin
  with enough pairs counted once; its ``error`` is what the noise of those medians alone would make;
* ``worst_bin``, the largest absolute median of those bins, with its error and its place.

Intervals are those of `bootstrap.interval`. ``behind`` is how far a method is behind the best
correction on the very same resamples: it is worse where ``behind_low`` is above zero, and only
there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sos_dask.errors import ModelError
from sos_dask.schema import LABELS
from sos_dask.stats.bootstrap import MAD_TO_SIGMA, FloatArray, IntArray, Ranked, interval

NONE = "none"
TRAIN, TEST = "train", "test"
STATISTICS = ("median", "mad", "width", "rms_binned", "worst_bin")
EDGES = ("logg < 1", "teff > 7000", "feh < -2", "feh > 0.2")
ALL, DENSE, SPARSE = "all", "dense", "sparse"
SUBSETS = (ALL, DENSE, SPARSE, *EDGES)
# With fewer stars a resample may hold none of them.
MIN_STARS = 20


@dataclass(frozen=True)
class Figure:
    """One figure of a comparison; None where the pairs are too few.

    Parameters
    ----------
    method, label, sample, subset, statistic : str
    value, low, high : float, optional
        With its 95 % interval, in the unit of the label.
    error : float, optional
        See the module; of ``rms_binned`` and ``worst_bin`` only.
    n : int
        Pairs it is made of: of the subset, of the bins with enough pairs, of the worst bin.
    behind, behind_low, behind_high : float, optional
        How much larger the figure (of a median its absolute value) is than that of the best
        correction, with its interval.
    against, bin_low, bin_high : str and float, optional
        Where the worst bin is.
    """

    method: str
    label: str
    sample: str
    subset: str
    statistic: str
    value: float | None
    low: float | None
    high: float | None
    error: float | None
    n: int
    behind: float | None = None
    behind_low: float | None = None
    behind_high: float | None = None
    against: str | None = None
    bin_low: float | None = None
    bin_high: float | None = None


FIGURE_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("method", "label", "sample", "subset", "statistic")),
        *((name, pa.float64()) for name in ("value", "low", "high", "error")),
        ("n", pa.int64()),
        *((name, pa.float64()) for name in ("behind", "behind_low", "behind_high")),
        ("against", pa.string()),
        *((name, pa.float64()) for name in ("bin_low", "bin_high")),
    ]
)


class Scored(NamedTuple):
    """A figure in every resample."""

    value: float
    replicates: FloatArray


@dataclass(frozen=True, eq=False)
class Sample:
    """Pairs that all methods are compared on.

    Parameters
    ----------
    name : str
        ``train`` or ``test``.
    labels : ndarray of float, shape (n, 3)
        Of the target, in the order of `LABELS`: K, dex, dex.
    groups : ndarray of int64, shape (n,)
        Of the stars, as `bootstrap.group_of_stars` gives them.
    sparse : ndarray of bool, shape (n,)
    """

    name: str
    labels: NDArray[np.floating]
    groups: IntArray
    sparse: NDArray[np.bool_]

    @property
    def subsets(self) -> dict[str, NDArray[np.bool_]]:
        """Which pairs are in each of `SUBSETS`."""
        found = {
            ALL: np.ones(len(self.groups), dtype=np.bool_),
            DENSE: ~self.sparse,
            SPARSE: self.sparse,
        }
        for name in EDGES:
            label, sign, limit = name.split()
            values = self.labels[:, LABELS.index(label)]
            found[name] = values < float(limit) if sign == "<" else values > float(limit)
        return found


def figures(
    sample: Sample,
    label: str,
    residuals: Mapping[str, NDArray[np.floating]],
    edges: Mapping[str, FloatArray],
    weights: FloatArray,
    min_pairs: int,
    min_bin_pairs: int,
) -> tuple[list[Figure], dict[tuple[str, str], Scored]]:
    """All figures of one label in one sample.

    Parameters
    ----------
    sample : Sample
    label : str
    residuals : mapping of str to ndarray of float, shape (n,)
        By method, `NONE` among them; nan where the difference is not known.
    edges : mapping of str to ndarray of float64
        Edges of the bins along each label.
    weights : ndarray of float64, shape (n_resamples, n_groups)
        See `bootstrap.draw`.
    min_pairs, min_bin_pairs : int
        A subset with fewer pairs has no figures, a bin with fewer no median.

    Returns
    -------
    list of Figure
    dict
        Of the subset ``all`` by method and statistic, ``mad`` and ``rms_binned``.

    Raises
    ------
    ModelError
        The sample has fewer than ``min_pairs`` pairs or too few stars.
    """
    known = np.logical_and.reduce([np.isfinite(values) for values in residuals.values()])
    n = int(np.count_nonzero(known))
    if n < min_pairs:
        raise ModelError(
            f"{n} {sample.name} pairs have a known {label} difference and a prediction by every "
            f"method: at least {min_pairs} are needed to compare methods",
            "Match more stars, loosen the cuts, or lower compare.min_pairs.",
        )
    n_stars = len(np.unique(sample.groups[known]))
    if n_stars < MIN_STARS:
        raise ModelError(
            f"the {n} {sample.name} pairs are of about {n_stars} stars: at least {MIN_STARS} are "
            "needed for an interval",
            "Match more stars, or loosen the cuts.",
        )
    bins = {name: _bins_of(sample.labels[:, LABELS.index(name)], e) for name, e in edges.items()}
    found: list[Figure] = []
    scores: dict[tuple[str, str], Scored] = {}
    measured: dict[tuple[str, str, str], Scored] = {}
    masks = sample.subsets
    for method, values in residuals.items():
        order = np.flatnonzero(known)
        order = order[np.argsort(values[order], kind="stable")]
        for subset, mask in masks.items():
            rows = order[mask[order]]
            about = (method, label, sample.name, subset)
            if len(rows) < min_pairs:
                found += [
                    Figure(*about, name, None, None, None, None, len(rows)) for name in STATISTICS
                ]
                continue
            ranked = Ranked(values[rows].astype(np.float64), sample.groups[rows])
            one = _Measured(about, ranked, weights)
            found += one.whole()
            inside = {name: which[rows] for name, which in bins.items()}
            found += one.binned(inside, edges, min_bin_pairs)
            measured |= {(method, subset, name): score for name, score in one.scores.items()}
            if subset == ALL:
                scores |= {(method, name): one.scores[name] for name in one.scores}
    return [_with_behind(figure, measured) for figure in found], scores


def figure_table(found: Sequence[Figure]) -> pa.Table:
    """Figures as a table of `FIGURE_SCHEMA`."""
    return pa.Table.from_pylist([asdict(figure) for figure in found], schema=FIGURE_SCHEMA)


def _bins_of(x: NDArray[np.floating], edges: FloatArray) -> IntArray:
    """Number of the bin of every value, -1 outside; the last bin holds its upper edge, too."""
    index = np.searchsorted(edges, x, side="right") - 1
    index[x == edges[-1]] = len(edges) - 2
    index[index >= len(edges) - 1] = -1
    return index


class _Measured:
    """Figures of one method in one subset."""

    def __init__(
        self, about: tuple[str, str, str, str], ranked: Ranked, weights: FloatArray
    ) -> None:
        self.about = about
        self.ranked = ranked
        self.weights = weights
        self.scores: dict[str, Scored] = {}

    def whole(self) -> list[Figure]:
        """Median and both widths."""
        values = self.ranked.values
        replicates = self.ranked.resampled(self.weights)
        p16, median, p84 = np.percentile(values, [16, 50, 84])
        self.scores["median"] = Scored(float(median), replicates.median)
        deviation = MAD_TO_SIGMA * np.median(np.abs(values - median))
        self.scores["mad"] = Scored(float(deviation), replicates.mad)
        self.scores["width"] = Scored(float(p84 - p16) / 2, replicates.width)
        return [
            self._figure(name, self.scores[name], len(values), None)
            for name in ("median", "mad", "width")
        ]

    def binned(
        self, bins: Mapping[str, IntArray], edges: Mapping[str, FloatArray], min_count: int
    ) -> list[Figure]:
        """Figures of the medians of bins."""
        n, medians, replicates, places = [], [], [], []
        for name, index in bins.items():
            lows, highs = edges[name][:-1], edges[name][1:]
            found = self.ranked.binned_medians(self.weights, index, len(lows), min_count)
            used = np.isfinite(found[1])
            n.append(found[0][used])
            medians.append(found[1][used])
            replicates.append(found[2][:, used])
            places += [
                (name, float(a), float(b)) for a, b in zip(lows[used], highs[used], strict=True)
            ]
        count, median = np.concatenate(n), np.concatenate(medians)
        if not len(median):
            return [
                Figure(*self.about, name, None, None, None, None, 0)
                for name in ("rms_binned", "worst_bin")
            ]
        resampled = np.concatenate(replicates, axis=1)
        errors = np.nanstd(resampled, axis=0)
        # A resample may leave out all pairs of a bin.
        resampled = np.where(np.isnan(resampled), median, resampled)
        score = Scored(float(np.sqrt(np.mean(median**2))), np.sqrt(np.mean(resampled**2, axis=1)))
        self.scores["rms_binned"] = score
        noise = float(np.sqrt(np.mean(errors**2)))
        worst = int(np.argmax(np.abs(median)))
        sign = 1.0 if median[worst] >= 0 else -1.0
        largest = Scored(float(sign * median[worst]), sign * resampled[:, worst])
        place = places[worst]
        return [
            self._figure("rms_binned", score, int(count.sum()), noise),
            self._figure("worst_bin", largest, int(count[worst]), float(errors[worst]), place),
        ]

    def _figure(
        self,
        statistic: str,
        score: Scored,
        n: int,
        error: float | None,
        place: tuple[str, float, float] | tuple[()] = (),
    ) -> Figure:
        low, high = interval(*score)
        low = low if statistic == "median" else max(low, 0.0)
        nothing = (None, None, None)
        return Figure(
            *self.about, statistic, score.value, low, high, error, n, *nothing, *(place or nothing)
        )


def _with_behind(figure: Figure, measured: Mapping[tuple[str, str, str], Scored]) -> Figure:
    """A figure with its distance from the best correction."""
    key = (figure.method, figure.subset, figure.statistic)
    if key not in measured:
        return figure
    others = {
        method: score
        for (method, subset, statistic), score in measured.items()
        if (subset, statistic) == key[1:] and method != NONE
    }
    best = min(others, key=lambda method: (abs(others[method].value), method))
    value, low, high = difference(measured[key], others[best])
    return Figure(**{**asdict(figure), "behind": value, "behind_low": low, "behind_high": high})


def difference(one: Scored, other: Scored) -> tuple[float, float, float]:
    """How much larger one figure is than another one, in absolute values, with its interval."""
    value = abs(one.value) - abs(other.value)
    low, high = interval(value, np.abs(one.replicates) - np.abs(other.replicates))
    return value, low, high
