"""What the report says first: the method, what it gained, what to watch out for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sos_dask.report.words import UNITS, WORDS, number, percent, readable
from sos_dask.schema import LABELS

_MANY, _SHOWN = 200, 5


@dataclass(frozen=True)
class Gain:
    """Scatter of one label before and after, as text."""

    label: str
    unit: str
    before: str
    after: str
    n: str
    share: str


def gains(items: Sequence[Mapping[str, Any]], chosen: str) -> list[Gain]:
    """Gain in each label by the chosen method on held-out pairs.

    Parameters
    ----------
    items : sequence of mapping
        Metrics of every method, as `sos_dask.compare.Metric` has them.
    chosen : str
    """
    found = []
    for label in LABELS:
        for item in items:
            if (item["method"], item["label"]) != (chosen, label):
                continue
            before, after = item["scatter_before"], item["scatter_after"]
            found.append(
                Gain(
                    WORDS[label],
                    UNITS[label],
                    _short(before, label),
                    _short(after, label),
                    f"{item['n']:,}",
                    f"{100 * (1 - after / before):+.0f} %".replace("+", "−").replace("-", "+")
                    if before
                    else "",
                )
            )
    return found


def _short(value: float, label: str) -> str:
    return f"{value:.0f}" if UNITS[label] == "K" else f"{value:.3f}"


def worst_bins(trends: pa.Table, method: str) -> list[str]:
    """The largest binned median that is left of each label, in bins of enough held-out pairs."""
    after = trends.filter(
        pc.and_(
            pc.and_(pc.equal(trends["sample"], "after"), pc.equal(trends["method"], method)),
            pc.and_(pc.equal(trends["binning"], "equal-width"), pc.equal(trends["subset"], "all")),
        )
    )
    least = _MANY if pc.any(pc.greater_equal(after["n"], _MANY)).as_py() else 20
    after = after.filter(pc.greater_equal(after["n"], least))
    found = []
    for label in LABELS:
        mine = [
            row
            for row in after.filter(pc.equal(after["label"], label)).to_pylist()
            if row["against"] in LABELS
        ]
        if not mine:
            continue
        row = max(mine, key=lambda row: abs(row["median"]))
        place = WORDS[row["against"]]
        found.append(
            f"{WORDS[label]} {number(row['median'], label, True)}\u00a0±\u00a0"
            f"{number(row['error'], label)}\u00a0{UNITS[label]} at {place} "
            f"{row['low']:g} to {row['high']:g} (n\u00a0=\u00a0{row['n']:,})".replace(" -", " −")
        )
    if not found:
        return []
    return [
        f"Largest binned median that is left, of held-out pairs in bins with {least} or more: "
        + "; ".join(found)
        + "."
    ]


def of_references(agreements: Sequence[Mapping[str, Any]]) -> list[str]:
    """What two references say of each other, if they differ."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for item in agreements:
        if (item["binning"], item["by"]) == ("equal-width", "target") and (
            item["against"] in LABELS
        ):
            key = (item["first"], item["second"])
            found.setdefault(key, []).append((item["n_significant"], item["n_bins"]))
    notes = []
    for (first, second), counts in found.items():
        n_significant, n_bins = (sum(values) for values in zip(*counts, strict=True))
        if n_significant:
            notes.append(
                f"{first} and {second} differ by more than 3σ in {n_significant} of {n_bins} bins "
                "of Teff, log g and [Fe/H]: their union carries that difference."
            )
    return notes


def of_intervals(calibration: pa.Table) -> list[str]:
    """Where stated intervals hold fewer held-out pairs than they say, the worst first.

    Parameters
    ----------
    calibration : pyarrow.Table
        ``label, subset, level, n, coverage, low, high``: the share that each interval holds, with
        its own 95 % interval, which leaves out the level where it is named here.
    """
    short = [row for row in calibration.to_pylist() if row["n"] and row["high"] < row["level"]]
    short.sort(key=lambda row: row["coverage"] - row["level"])
    shown = [
        f"{WORDS[row['label']]}, {readable(row['subset'])}: {100 * row['coverage']:.0f}\u00a0% "
        f"instead of {100 * row['level']:.0f}\u00a0% (n\u00a0=\u00a0{row['n']:,})"
        for row in short[:_SHOWN]
    ]
    if len(short) > _SHOWN:
        shown.append(f"and {len(short) - _SHOWN} more")
    if not shown:
        return []
    return ["Intervals that hold fewer held-out pairs than they say: " + "; ".join(shown) + "."]


def of_flags(meanings: Mapping[str, int], n_rows: int) -> list[str]:
    """How many corrected rows carry each flag."""
    shown = [
        f"{percent(n, n_rows)} ({n:,}): {readable(text).replace(': ', ', ')}"
        for text, n in sorted(meanings.items(), key=lambda item: (-item[1], item[0]))
        if n
    ]
    return [f"Of {n_rows:,} corrected rows, " + "; ".join(shown) + "."] if shown else []
