"""The figures of a comparison: every method on the same pairs, in the same subsets and resamples.

Statistics of target - reference less the predicted difference; ``none`` is without a correction:

* ``median``; ``mad``, 1.4826 times the median absolute deviation from it; ``width``, half of the
  width from the 16th to the 84th percentile;
* ``rms_binned``, root mean square of the medians of bins along each label of the target, every bin
  with enough pairs counted once; its ``error`` is what the noise of those medians alone would make;
* ``worst_bin``, the largest absolute median of those bins, with its error and its place:
  ``against`` which label, from ``bin_low`` to ``bin_high``.

``low`` and ``high`` are those of `bootstrap.interval`. ``n`` counts the pairs that a figure is made
of: of the subset, of the bins with enough pairs, of the worst bin. ``behind`` is how far a method
is behind the best correction on the very same resamples: it is worse where ``behind_low`` is above
zero, and only there. What too few pairs cannot tell is null.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sos_dask.columns import FloatArray, IntArray
from sos_dask.errors import ModelError
from sos_dask.stats.binned import bins_of
from sos_dask.stats.bootstrap import Ranked, interval
from sos_dask.stats.numbers import scatter

NONE = "none"
TRAIN, TEST = "train", "test"
STATISTICS = ("median", "mad", "width", "rms_binned", "worst_bin")
EDGES = ("logg < 1", "teff > 7000", "feh < -2", "feh > 0.2")
ALL, DENSE, SPARSE = "all", "dense", "sparse"
SUBSETS = (ALL, DENSE, SPARSE, *EDGES)
# With fewer stars a resample may hold none of them.
MIN_STARS = 20
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


@dataclass(frozen=True)
class Metric:
    """Median and scatter of target - reference, before and after the correction.

    Parameters
    ----------
    method, label, subset : str
    n : int
        Pairs with a difference and a prediction.
    median_before, scatter_before, median_after, scatter_after : float
        In the unit of the label; scatter is that of `scatter`.
    """

    method: str
    label: str
    subset: str
    n: int
    median_before: float
    scatter_before: float
    median_after: float
    scatter_after: float


def held_out_metrics(
    method: str,
    labels: Sequence[str],
    differences: NDArray[np.float32],
    predicted: NDArray[np.float32],
) -> list[Metric]:
    """Measure each label on held-out pairs.

    Parameters
    ----------
    method : str
    labels : sequence of str
    differences, predicted : ndarray of float32, shape (n, n_labels)
        Pairs with a nan in a label are left out of that label.

    Raises
    ------
    ModelError
        A label has no held-out pair at all.
    """
    metrics = []
    for number, label in enumerate(labels):
        before = differences[:, number].astype(np.float64)
        after = before - predicted[:, number]
        known = np.isfinite(after)
        if not known.any():
            raise ModelError(f"{method}: no held-out pair has {label} and a prediction of it")
        both = [(float(np.median(x)), scatter(x)) for x in (before[known], after[known])]
        metrics.append(Metric(method, label, ALL, int(known.sum()), *both[0], *both[1]))
    return metrics


class Scored(NamedTuple):
    """A figure in every resample."""

    value: float
    replicates: FloatArray


class _Found(NamedTuple):
    score: Scored
    n: int
    error: float | None = None
    place: tuple[str, float, float] | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """Pairs that all methods are compared on.

    Parameters
    ----------
    name : str
        ``train`` or ``test``.
    labels : mapping of str to ndarray of float, shape (n,)
        Of the target.
    groups : ndarray of int, shape (n,)
        Of the stars, for the bootstrap.
    sparse : ndarray of bool, shape (n,)
    """

    name: str
    labels: Mapping[str, NDArray[np.floating]]
    groups: IntArray
    sparse: NDArray[np.bool_]

    @property
    def subsets(self) -> dict[str, NDArray[np.bool_]]:
        """Pairs in each of `SUBSETS`, of `EDGES` those whose label there is."""
        found = {ALL: np.ones_like(self.sparse), DENSE: ~self.sparse, SPARSE: self.sparse}
        return found | edges(self.labels)


def edges(labels: Mapping[str, NDArray[np.floating]]) -> dict[str, NDArray[np.bool_]]:
    """Find the pairs in each of `EDGES` whose label is known."""
    found = {}
    for name in EDGES:
        label, sign, limit = name.split()
        if label in labels:
            values = labels[label]
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
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], Scored]]:
    """Measure all figures of one label in one sample.

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
    list of dict
        Rows of `FIGURE_SCHEMA`.
    dict
        Of the subset ``all`` by method and statistic.

    Raises
    ------
    ModelError
        The sample has fewer than ``min_pairs`` pairs or too few stars.
    """
    known = np.logical_and.reduce([np.isfinite(values) for values in residuals.values()])
    _check_sample(sample, label, known, min_pairs)
    bins = {name: bins_of(sample.labels[name], edges[name]) for name in edges}
    rows = np.flatnonzero(known)
    ranked = {m: rows[np.argsort(x[rows], kind="stable")] for m, x in residuals.items()}
    found: list[dict[str, Any]] = []
    scores: dict[tuple[str, str], Scored] = {}
    for subset, mask in sample.subsets.items():
        n = int(np.count_nonzero(mask & known))
        measured: dict[str, dict[str, _Found]] = {}
        for method, order in ranked.items() if n >= min_pairs else ():
            rows = order[mask[order]]
            one = Ranked(residuals[method][rows].astype(np.float64), sample.groups[rows])
            inside = {name: which[rows] for name, which in bins.items()}
            measured[method] = _whole(one, weights)
            measured[method] |= _binned(one, weights, inside, edges, min_bin_pairs)
            if subset == ALL:
                scores |= {(method, name): item.score for name, item in measured[method].items()}
        about = {"label": label, "sample": sample.name, "subset": subset}
        for method, statistic in itertools.product(residuals, STATISTICS):
            row = {"method": method, **about, "statistic": statistic, "n": 0 if measured else n}
            row |= _values(measured, method, statistic)
            found.append(dict.fromkeys(FIGURE_SCHEMA.names) | row)
    return found, scores


def _check_sample(sample: Sample, label: str, known: NDArray[np.bool_], min_pairs: int) -> None:
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


def _whole(ranked: Ranked, weights: FloatArray) -> dict[str, _Found]:
    """Median and both widths."""
    values, replicates = ranked.values, ranked.resampled(weights)
    p16, median, p84 = np.percentile(values, [16, 50, 84])
    return {
        "median": _Found(Scored(float(median), replicates.median), len(values)),
        "mad": _Found(Scored(scatter(values), replicates.mad), len(values)),
        "width": _Found(Scored(float(p84 - p16) / 2, replicates.width), len(values)),
    }


def _binned(
    ranked: Ranked,
    weights: FloatArray,
    bins: Mapping[str, IntArray],
    edges: Mapping[str, FloatArray],
    min_count: int,
) -> dict[str, _Found]:
    """Figures of the medians of bins; none where no bin has enough pairs."""
    n, medians, replicates, places = [], [], [], []
    for name, index in bins.items():
        lows, highs = edges[name][:-1], edges[name][1:]
        found = ranked.binned_medians(weights, index, len(lows), min_count)
        used = np.flatnonzero(np.isfinite(found[1]))
        n.append(found[0][used])
        medians.append(found[1][used])
        replicates.append(found[2][:, used])
        places += [(name, float(lows[i]), float(highs[i])) for i in used]
    if not places:
        return {}
    count, median = np.concatenate(n), np.concatenate(medians)
    resampled = np.concatenate(replicates, axis=1)
    errors = np.nanstd(resampled, axis=0)
    # A resample may leave out all pairs of a bin.
    resampled = np.where(np.isnan(resampled), median, resampled)
    score = Scored(float(np.sqrt(np.mean(median**2))), np.sqrt(np.mean(resampled**2, axis=1)))
    worst = int(np.argmax(np.abs(median)))
    sign = 1.0 if median[worst] >= 0 else -1.0
    largest = Scored(float(sign * median[worst]), sign * resampled[:, worst])
    return {
        "rms_binned": _Found(score, int(count.sum()), float(np.sqrt(np.mean(errors**2)))),
        "worst_bin": _Found(largest, int(count[worst]), float(errors[worst]), places[worst]),
    }


def _values(
    measured: Mapping[str, Mapping[str, _Found]], method: str, statistic: str
) -> dict[str, Any]:
    """Columns of a figure with its distance from the best correction; none of what is unknown."""
    one = measured.get(method, {}).get(statistic)
    if one is None:
        return {}
    low, high = interval(*one.score)
    low = low if statistic == "median" else max(low, 0.0)
    row: dict[str, Any] = {"value": one.score.value, "low": low, "high": high}
    row |= {"error": one.error, "n": one.n}
    if one.place is not None:  # the worst bins of two methods are not the same pairs
        return row | dict(zip(("against", "bin_low", "bin_high"), one.place, strict=True))
    others = [of[statistic].score for name, of in sorted(measured.items()) if name != NONE]
    best = min(others, key=lambda score: abs(score.value))
    names = ("behind", "behind_low", "behind_high")
    return row | dict(zip(names, difference(one.score, best), strict=True))


def difference(one: Scored, other: Scored) -> tuple[float, float, float]:
    """Subtract the absolute values of two figures; the difference with its interval."""
    value = abs(one.value) - abs(other.value)
    return value, *interval(value, np.abs(one.replicates) - np.abs(other.replicates))
