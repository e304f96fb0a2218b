"""The rule by which one method corrects the catalog, and why in a sentence.

A method is *worse* than the best one of a label in scatter (held-out 1.4826 MAD) or in binned
medians (their rms) if the 95 % interval of the difference, on the same resamples, is above zero and
the difference is larger than ``tolerance`` times the best: with very many pairs differences become
certain that do not matter.

* ``balanced``: of the methods that are worse in no label, the smoothest (the smallest mean over the
  labels of the roughness). Where none is left, those that are not worse in the scatter averaged
  over the labels, each in units of the scatter without a correction.
* ``scatter``: the smallest averaged scatter.
* the name of a method: that one.

Of equals the first by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sos_dask.errors import ConfigError, ModelError
from sos_dask.evidence.figures import NONE, Scored, difference
from sos_dask.schema import nearest
from sos_dask.stats.bootstrap import interval

BALANCED, SCATTER = "balanced", "scatter"
RULES = (BALANCED, SCATTER)
TOLERANCE = 0.01
_NAMES = {"mad": "scatter", "rms_binned": "binned medians"}
_Share = tuple[float, float, float]  # with its interval


@dataclass(frozen=True)
class Choice:
    """The method that a rule chooses.

    Parameters
    ----------
    method, rule, why : str
    scores : mapping
        By method: ``scatter``, averaged over the labels in units of the uncorrected scatter, with
        ``scatter_low`` and ``scatter_high``; ``roughness``, averaged; and ``worse_in``, by label
        and score where it is worse than the best: by how much, as a share of the best, with the
        interval.
    """

    method: str
    rule: str
    why: str
    scores: Mapping[str, Mapping[str, Any]]


def check_rule(rule: str, methods: Sequence[str]) -> str:
    """Return the rule; `ConfigError` where it is neither one of `RULES` nor one of the methods."""
    known = (*RULES, *methods)
    if rule not in known:
        raise ConfigError(
            f"there is no rule '{rule}' to choose a method by",
            nearest(rule, known) or f"Known are: {', '.join(known)}.",
        )
    return rule


def choose(
    rule: str,
    figures: Mapping[str, Mapping[tuple[str, str], Scored]],
    roughness: Mapping[str, float],
    tolerance: float = TOLERANCE,
) -> Choice:
    """Choose a method.

    Parameters
    ----------
    rule : str
    figures : mapping of str to mapping
        By label, what `figures.figures` gives for the held-out sample.
    roughness : mapping of str to float
        By method, mean over the labels; nan where it is not known.
    tolerance : float

    Raises
    ------
    ModelError
        There is no method.
    ConfigError
        Unknown rule.
    """
    methods = sorted({method for of in figures.values() for method, _ in of} - {NONE})
    if not methods:
        raise ModelError("there is no method to choose from")
    check_rule(rule, methods)
    scatter = {method: _averaged(figures, method) for method in methods}
    worse: dict[str, dict[str, _Share]] = {method: {} for method in methods}
    for label, of in figures.items():
        for statistic, text in _NAMES.items():
            scores = {m: of[m, statistic] for m in methods if (m, statistic) in of}
            for method, how_much in _worse(scores, tolerance).items():
                worse[method][f"{label} {text}"] = how_much
    smooth = {m: roughness[m] for m in methods if np.isfinite(roughness.get(m, np.nan))}
    found: dict[str, dict[str, Any]] = {}
    for method in methods:
        low, high = interval(*scatter[method])
        found[method] = {"scatter": scatter[method].value, "scatter_low": max(low, 0.0)}
        found[method] |= {"scatter_high": high, "roughness": smooth.get(method)}
        found[method]["worse_in"] = worse[method]
    chosen = min(methods, key=lambda method: scatter[method].value)  # of equals the first by name
    if rule not in RULES:
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
        chosen, why = _balanced(scatter, worse, smooth, tolerance)
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
    best = min(scores, key=lambda method: scores[method].value, default="")
    for method, score in scores.items():
        behind, low, high = difference(score, scores[best])
        scale = scores[best].value
        if scale > 0 and low > 0 and behind > tolerance * scale:
            found[method] = (behind / scale, low / scale, high / scale)
    return found


def _balanced(
    scatter: Mapping[str, Scored],
    worse: Mapping[str, Mapping[str, _Share]],
    smooth: Mapping[str, float],
    tolerance: float,
) -> tuple[str, str]:
    """Method and why."""
    good = [method for method in scatter if not worse[method]]
    what = "no label is significantly worse than with the best method"
    if not good:
        behind = _worse(scatter, tolerance)
        good = [method for method in scatter if method not in behind]
        what = "every method is worse in some label; not in the scatter averaged over them"
    listed = " and ".join([", ".join(good[:-1]), good[-1]])
    if len(good) == 1:
        chosen, why = good[0], what
    elif known := [method for method in good if method in smooth]:
        chosen = min(known, key=lambda method: smooth[method])
        why = f"{what}; the smoothest (roughness {smooth[chosen]:.3f}) of {listed}"
    else:
        chosen = min(good, key=lambda method: scatter[method].value)
        why = (
            f"{what}; the smallest held-out scatter of {listed}: too few cells have pairs to "
            "compare their smoothness"
        )
    rejected = []
    for method in scatter:
        if method not in good:
            name = max(worse[method], key=lambda name: worse[method][name][1])
            by, low, high = (100 * share for share in worse[method][name])
            more = f", and in {len(worse[method]) - 1} more" if len(worse[method]) > 1 else ""
            rejected.append(f"{method} is worse in {name} by {by:.2f} % [{low:.2f}, {high:.2f}]")
            rejected[-1] += more
    return chosen, "; ".join([why, *rejected])
