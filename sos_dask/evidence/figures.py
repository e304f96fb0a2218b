"""Methods compared on the same pairs, in the same subsets and resamples; and the choice of one.

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

Cross-validation leaves out stars at random, so that every left-out star has neighbours that trained
the model. `left_out_groups` are whole regions instead (Roberts et al. 2017, Ecography 40, 913, on
blocked cross-validation): what is found there is what to expect where the overlap ends.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sos_dask.columns import BoolArray, Float32Array, FloatArray, FloatingArray, IntArray
from sos_dask.errors import ConfigError, ModelError
from sos_dask.problem import SNR
from sos_dask.schema import nearest
from sos_dask.stats.bootstrap import interval, resampled, resampled_bins
from sos_dask.stats.numbers import ALL, DENSE, GIANT_LOGG, SPARSE, bins_of, scatter

NONE = "none"
TRAIN, TEST = "train", "test"
STATISTICS = ("median", "mad", "width", "rms_binned", "worst_bin")
EDGES = ("logg < 1", "teff > 7000", "feh < -2", "feh > 0.2")
BANDS = {"snr 20-50": (20.0, 50.0), "snr 50-100": (50.0, 100.0), "snr > 100": (100.0, np.inf)}
SUBSETS = (ALL, DENSE, SPARSE, *EDGES, *BANDS)
_MIN_STARS = 20  # with fewer a resample may contain none of them
BALANCED, SCATTER = "balanced", "scatter"
TOLERANCE = 0.01
_NAMES = {"mad": "scatter", "rms_binned": "binned medians"}
_Share = tuple[float, float, float]  # with its interval
DENSITY, REGION, REFERENCE, RANDOM = "density", "region", "reference", "random"
_TEFF_EDGES_K, _LOGG_EDGES = (4500.0, 5250.0, 6000.0, 7000.0), (1.0, 2.0, GIANT_LOGG)


def figure_schema(names: str) -> pa.Schema:
    """Make the schema of figures: names of columns say what they contain, most of them numbers."""
    texts = "method label sample subset statistic against binning first second where split group "
    texts += "band weighting"
    kinds = dict.fromkeys(texts.split(), pa.string()) | {"n": pa.int64(), "bin": pa.int32()}
    kinds |= {"n_effective": pa.float64(), "fails": pa.bool_()}
    counts = pa.int64(), pa.float64()
    return pa.schema(
        [(one, kinds.get(one, counts[not one.startswith("n_")])) for one in names.split()]
    )


FIGURE_SCHEMA = figure_schema(
    "method label sample subset statistic value low high error n behind behind_low behind_high "
    "against bin_low bin_high"
)


@dataclass(frozen=True)
class Metric:
    """Median and `scatter` of target - reference, before and after the correction, in its unit."""

    method: str
    label: str
    subset: str
    n: int  # pairs with a difference and a prediction
    median_before: float
    scatter_before: float
    median_after: float
    scatter_after: float


def held_out_metrics(
    method: str, labels: Sequence[str], differences: Float32Array, predicted: Float32Array
) -> list[Metric]:
    """Measure each label on held-out pairs with a difference and a prediction (n, n_labels) of it.

    Raises `ModelError` where a label has no held-out pair at all.
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


_Found = tuple[Scored, dict[str, Any]]  # with other columns of `FIGURE_SCHEMA`


class Sample(NamedTuple):
    """The n pairs that all methods are compared on."""

    name: str  # `TRAIN` or `TEST`
    labels: Mapping[str, FloatingArray]  # of the target, and its S/N
    groups: IntArray  # of the stars, for the bootstrap
    sparse: BoolArray

    @property
    def subsets(self) -> dict[str, BoolArray]:
        """Pairs in each of `SUBSETS`, of `EDGES` and `BANDS` those whose quantity there is."""
        found = {ALL: np.ones_like(self.sparse), DENSE: ~self.sparse, SPARSE: self.sparse}
        return found | edge_subsets(self.labels) | snr_subsets(self.labels.get(SNR))


def edge_subsets(labels: Mapping[str, FloatingArray]) -> dict[str, BoolArray]:
    """Find the pairs in each of `EDGES` whose label is known."""
    sides = {"<": np.less, ">": np.greater}
    parts = {name: name.split() for name in EDGES}
    return {
        name: sides[sign](labels[label], float(limit))
        for name, (label, sign, limit) in parts.items()
        if label in labels
    }


def snr_subsets(snr: FloatingArray | None) -> dict[str, BoolArray]:
    """Find the pairs in each of `BANDS`; none where S/N is not known."""
    if snr is None:
        return {}
    return {name: (snr >= low) & (snr < high) for name, (low, high) in BANDS.items()}


def figures(
    sample: Sample,
    label: str,
    residuals: Mapping[str, FloatingArray],
    edges: Mapping[str, FloatArray],
    weights: FloatArray,
    min_pairs: int,
    min_bin_pairs: int,
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], Scored]]:
    """Measure all figures of one label in one sample: rows of `FIGURE_SCHEMA`.

    Residuals (n,) are by method, `NONE` among them, nan where the difference is not known; edges
    are those of the bins along each label; weights (n_resamples, n_groups) are of `bootstrap.draw`.
    Figures of the subset ``all`` are given in every resample, too, by method and statistic. A
    subset with less than ``min_pairs`` has no figures, a bin with less than ``min_bin_pairs`` no
    median. Raises `ModelError` where the sample has fewer than ``min_pairs`` pairs or too few
    stars.
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
            values, groups = residuals[method][rows].astype(np.float64), sample.groups[rows]
            inside = {name: which[rows] for name, which in bins.items()}
            measured[method] = _measured(values, groups, weights, inside, edges, min_bin_pairs)
            if subset == ALL:
                scores |= {(method, name): score for name, (score, _) in measured[method].items()}
        about = {"label": label, "sample": sample.name, "subset": subset}
        for method, statistic in itertools.product(residuals, STATISTICS):
            row = {"method": method, **about, "statistic": statistic, "n": 0 if measured else n}
            row |= _values(measured, method, statistic)
            found.append(dict.fromkeys(FIGURE_SCHEMA.names) | row)
    return found, scores


def _check_sample(sample: Sample, label: str, known: BoolArray, min_pairs: int) -> None:
    n = int(np.count_nonzero(known))
    if n < min_pairs:
        raise ModelError(
            f"{n} {sample.name} pairs have a known {label} difference and a prediction by every "
            f"method: at least {min_pairs} are needed to compare methods",
            "Match more stars, loosen the cuts, or lower compare.min_pairs.",
        )
    n_stars = len(np.unique(sample.groups[known]))
    if n_stars < _MIN_STARS:
        raise ModelError(
            f"the {n} {sample.name} pairs are of about {n_stars} stars: at least {_MIN_STARS} are "
            "needed for an interval",
            "Match more stars, or loosen the cuts.",
        )


def _measured(
    values: FloatArray,
    groups: IntArray,
    weights: FloatArray,
    bins: Mapping[str, IntArray],
    edges: Mapping[str, FloatArray],
    min_count: int,
) -> dict[str, _Found]:
    """Figures by statistic; those of the medians of bins where a bin has enough pairs."""
    n, replicates = len(values), resampled(values, groups, weights)
    p16, middle, p84 = np.percentile(values, [16, 50, 84])
    found = float(middle), scatter(values), float(p84 - p16) / 2
    whole = zip(STATISTICS, found, replicates, strict=False)
    measured: dict[str, _Found] = {name: (Scored(x, rest), {"n": n}) for name, x, rest in whole}
    parts, places = [], []
    for name, index in bins.items():
        limits = list(itertools.pairwise(edges[name].tolist()))
        part = resampled_bins(values, groups, weights, index, len(limits), min_count)
        used = np.flatnonzero(np.isfinite(part[1]))
        parts.append([column[..., used] for column in part])
        places += [(name, *limits[number]) for number in used]
    if not places:
        return measured
    count, median, rest = (np.concatenate(x, axis=-1) for x in zip(*parts, strict=True))
    errors = np.nanstd(rest, axis=0)
    rest = np.where(np.isnan(rest), median, rest)  # a resample may leave out all pairs of a bin
    rms = Scored(float(np.sqrt(np.mean(median**2))), np.sqrt(np.mean(rest**2, axis=1)))
    worst = int(np.argmax(np.abs(median)))
    sign = 1.0 if median[worst] >= 0 else -1.0
    largest = Scored(float(sign * median[worst]), sign * rest[:, worst])
    place = dict(zip(("against", "bin_low", "bin_high"), places[worst], strict=True))
    of_all = {"n": int(count.sum()), "error": float(np.sqrt(np.mean(errors**2)))}
    of_worst = {"n": int(count[worst]), "error": float(errors[worst]), **place}
    return measured | {"rms_binned": (rms, of_all), "worst_bin": (largest, of_worst)}


def _values(
    measured: Mapping[str, Mapping[str, _Found]], method: str, statistic: str
) -> dict[str, Any]:
    """Columns of a figure with its distance from the best correction; none of what is unknown."""
    if statistic not in measured.get(method, {}):
        return {}
    score, more = measured[method][statistic]
    low, high = interval(*score)
    low = low if statistic == "median" else max(low, 0.0)
    row = {"value": score.value, "low": low, "high": high, **more}
    if statistic != "worst_bin":  # those of two methods are not the same pairs
        others = [of[statistic][0] for name, of in sorted(measured.items()) if name != NONE]
        behind = _difference(score, min(others, key=lambda other: abs(other.value)))
        row |= dict(zip(("behind", "behind_low", "behind_high"), behind, strict=True))
    return row


def _difference(one: Scored, other: Scored) -> _Share:
    """Difference of the absolute values of two figures with its interval."""
    value = abs(one.value) - abs(other.value)
    return value, *interval(value, np.abs(one.replicates) - np.abs(other.replicates))


# --- choice -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The method that a rule chooses, and why."""

    method: str
    rule: str
    why: str
    # By method: ``scatter``, averaged over the labels in units of the uncorrected scatter, with
    # ``scatter_low`` and ``scatter_high``; ``roughness``, averaged; and ``worse_in``, by label and
    # score where it is worse than the best: by how much, as a share of the best, with the interval.
    scores: Mapping[str, Mapping[str, Any]]


def check_rule(rule: str, methods: Sequence[str]) -> None:
    """Raise `ConfigError` where a rule is neither known (see `choose`) nor one of the methods."""
    known = (BALANCED, SCATTER, *methods)
    if rule not in known:
        what = f"there is no rule '{rule}' to choose a method by"
        raise ConfigError(what, nearest(rule, known) or f"Known are: {', '.join(known)}.")


def choose(
    rule: str,
    figures: Mapping[str, Mapping[tuple[str, str], Scored]],
    roughness: Mapping[str, float],
    tolerance: float = TOLERANCE,
) -> Choice:
    """Choose the method that corrects the catalog; of equals the first by name.

    A method is *worse* than the best one of a label in scatter (held-out 1.4826 MAD) or in binned
    medians (their rms) if the 95 % interval of the difference, on the same resamples, is above zero
    and the difference is larger than ``tolerance`` times the best: with very many pairs differences
    become certain that do not matter.

    The rule ``balanced`` takes, of the methods that are worse in no label, the smoothest (the
    smallest mean over the labels of the roughness); where none is left, of those that are not worse
    in the scatter averaged over the labels, each in units of the scatter without a correction.
    ``scatter`` takes the smallest averaged scatter, and the name of a method that one.

    ``figures`` are by label what `figures` gives for the held-out sample, ``roughness`` by method
    the mean over the labels, nan where it is not known. Raises `ModelError` without any method, and
    as `check_rule`.
    """
    methods = sorted({method for of in figures.values() for method, _ in of} - {NONE})
    if not methods:
        raise ModelError("there is no method to choose from")
    check_rule(rule, methods)
    scatters = {method: _averaged(figures, method) for method in methods}
    worse: dict[str, dict[str, _Share]] = {method: {} for method in methods}
    for label, of in figures.items():
        for statistic, text in _NAMES.items():
            scores = {m: of[m, statistic] for m in methods if (m, statistic) in of}
            for method, how_much in _worse(scores, tolerance).items():
                worse[method][f"{label} {text}"] = how_much
    smooth = {m: roughness[m] for m in methods if np.isfinite(roughness.get(m, np.nan))}
    found: dict[str, dict[str, Any]] = {}
    for method in methods:
        low, high = interval(*scatters[method])
        score = {"scatter": scatters[method].value, "scatter_low": max(low, 0.0)}
        more = {"roughness": smooth.get(method), "worse_in": worse[method]}
        found[method] = {**score, "scatter_high": high, **more}
    chosen = min(methods, key=lambda method: scatters[method].value)
    if rule in methods:
        chosen, why = rule, "the job names it"
    elif len(methods) == 1:
        why = "the only method"
    elif rule == SCATTER:
        value, low, high = (found[chosen][f"scatter{end}"] for end in ("", "_low", "_high"))
        why = (
            f"the smallest held-out scatter averaged over the labels, {value:.4f} "
            f"[{low:.4f}, {high:.4f}] of the uncorrected one"
        )
    else:
        chosen, why = _balanced(scatters, worse, smooth, tolerance)
    return Choice(chosen, rule, f"{chosen}: {why}", found)


def _averaged(figures: Mapping[str, Mapping[tuple[str, str], Scored]], method: str) -> Scored:
    """Scatter of a method in units of the uncorrected one, averaged over the labels."""
    pairs = [(of[method, "mad"], of[NONE, "mad"].value or np.inf) for of in figures.values()]
    return Scored(
        float(np.mean([score.value / unit for score, unit in pairs])),
        np.mean([score.replicates / unit for score, unit in pairs], axis=0),
    )


def _worse(scores: Mapping[str, Scored], tolerance: float) -> dict[str, _Share]:
    """Methods that are worse than the best, each with by how much, as a share of the best."""
    found = {}
    best = min(scores.values(), key=lambda score: score.value, default=Scored(0.0, np.empty(0)))
    for method, score in scores.items():
        behind, low, high = _difference(score, best)
        if best.value > 0 and low > 0 and behind > tolerance * best.value:
            found[method] = (behind / best.value, low / best.value, high / best.value)
    return found


def _balanced(
    scatters: Mapping[str, Scored],
    worse: Mapping[str, Mapping[str, _Share]],
    smooth: Mapping[str, float],
    tolerance: float,
) -> tuple[str, str]:
    """Method and why."""
    good = [method for method in scatters if not worse[method]]
    what = "no label is significantly worse than with the best method"
    if not good:
        behind = _worse(scatters, tolerance)
        good = [method for method in scatters if method not in behind]
        what = "every method is worse in some label; not in the scatter averaged over them"
    listed = " and ".join([", ".join(good[:-1]), good[-1]])
    if len(good) == 1:
        chosen, why = good[0], what
    elif known := [method for method in good if method in smooth]:
        chosen = min(known, key=lambda method: smooth[method])
        why = f"{what}; the smoothest (roughness {smooth[chosen]:.3f}) of {listed}"
    else:
        chosen = min(good, key=lambda method: scatters[method].value)
        why = (
            f"{what}; the smallest held-out scatter of {listed}: too few cells have pairs to "
            "compare their smoothness"
        )
    for method in (one for one in scatters if one not in good):
        name = max(worse[method], key=lambda name: worse[method][name][1])
        by, low, high = (100 * share for share in worse[method][name])
        more = f", and in {len(worse[method]) - 1} more" if len(worse[method]) > 1 else ""
        why += f"; {method} is worse in {name} by {by:.2f} % [{low:.2f}, {high:.2f}]{more}"
    return chosen, why


# --- regions left out ---------------------------------------------------------------------------


def region_groups(teff: FloatingArray, logg: FloatingArray) -> list[str]:
    """Name the cell of the Kiel diagram of pairs by Teff (n,) in K and log g (n,) in dex (cgs).

    Empty where one is not known.
    """
    parts = []
    for name, edges, x in (("Teff", _TEFF_EDGES_K, teff), ("log g", _LOGG_EDGES, logg)):
        inner = [f"{low:g} <= {name} < {high:g}" for low, high in itertools.pairwise(edges)]
        names = np.array([f"{name} < {edges[0]:g}", *inner, f"{name} >= {edges[-1]:g}"])
        parts.append(names[np.searchsorted(edges, x, side="right")].tolist())
    known = np.isfinite(teff + logg).tolist()
    return [f"{one}, {other}" if k else "" for one, other, k in zip(*parts, known, strict=True)]


def left_out_groups(splits: Mapping[str, Sequence[str]], min_pairs: int) -> list[tuple[str, str]]:
    """List the groups that are left out one after the other, as (split, group), sorted.

    A group is left out if it and the rest have ``min_pairs`` pairs each. Of the dense and the
    sparse pairs only the sparse ones are: the question is what training on the dense ones gives.
    """
    counts = {split: Counter(name for name in groups if name) for split, groups in splits.items()}
    return sorted(
        (split, name)
        for split, of in counts.items()
        for name, n in of.items()
        if min(n, of.total() - n) >= min_pairs and (split, name) != (DENSITY, DENSE)
    )
