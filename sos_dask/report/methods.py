"""The methods side by side: a figure of the comparison, with its intervals."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sos_dask.report.style import (
    CYCLE,
    GREY,
    MARKERS,
    NAMES,
    Drawn,
    new_figure,
    plain_log_ticks,
    tidy_ticks,
    typeset,
)
from sos_dask.report.words import NONE, STATISTICS, SUBSETS, UNITS, ordered, subset_words
from sos_dask.schema import LABELS

_SHOWN = ("mad", "rms_binned")


def comparison_figure(table: pa.Table, chosen: str) -> Drawn | None:
    """Scatter and trend left by each method in each subset, with 95 % intervals.

    Parameters
    ----------
    table : pyarrow.Table
        ``comparison.parquet``.
    chosen : str
        The method that corrects the catalog.
    """
    table = table.filter(pc.equal(table["sample"], "test"))
    table = table.filter(pc.is_valid(table["value"]))
    methods = ordered(table["method"].to_pylist(), (NONE,))
    subsets = ordered(table["subset"].to_pylist(), SUBSETS)
    statistics = [one for one in _SHOWN if one in table["statistic"].to_pylist()]
    if not statistics or len(methods) < 2:
        return None
    figure = new_figure(0.6 + (0.55 + 0.075 * len(methods) * len(subsets)) * len(statistics))
    grid = figure.subplots(len(statistics), len(LABELS), sharey=True, squeeze=False)
    colors = {name: GREY if name == NONE else CYCLE[i % len(CYCLE)]
              for i, name in enumerate(methods, start=-1)}  # fmt: skip
    rows = {(r["method"], r["label"], r["subset"], r["statistic"]): r for r in table.to_pylist()}
    step = 0.72 / len(methods)
    for i, statistic in enumerate(statistics):
        for j, label in enumerate(LABELS):
            axes = grid[i, j]
            for k, method in enumerate(methods):
                found = [
                    (place, rows[key])
                    for place, subset in enumerate(subsets)
                    if (key := (method, label, subset, statistic)) in rows
                ]
                if not found:
                    continue
                y = np.array([place + (k - (len(methods) - 1) / 2) * step for place, _ in found])
                value, low, high = (
                    np.array([r[key] if r[key] is not None else np.nan for _, r in found])
                    for key in ("value", "low", "high")
                )
                errors = np.nan_to_num(np.stack([value - low, high - value]).clip(min=0))
                axes.errorbar(
                    value, y, xerr=errors, linestyle="none", color=colors[method],
                    marker=MARKERS[k % len(MARKERS)], elinewidth=0.9, markersize=3.2,
                    markerfacecolor=colors[method] if method != NONE else "white",
                    label=method + (" (chosen)" if method == chosen else ""),
                )  # fmt: skip
            axes.set_ylim(len(subsets) - 0.5, -0.5)
            axes.set_yticks(range(len(subsets)), [typeset(subset) for subset in subsets])
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", linewidth=0.3, color="#cccccc")
            for edge in range(1, len(subsets)):
                axes.axhline(edge - 0.5, color="#cccccc", linewidth=0.5)
            values = [r["value"] for (_, name, _, kind), r in rows.items()
                      if (name, kind) == (label, statistic)]  # fmt: skip
            if values and min(values) > 0:
                axes.set_xscale("log")
                plain_log_ticks(axes)
            else:
                tidy_ticks(axes)
                axes.set_yticks(range(len(subsets)), [typeset(subset) for subset in subsets])
            axes.set_xlabel(f"{STATISTICS[statistic]}: {NAMES[label]} [{UNITS[label]}]",
                            fontsize=7)  # fmt: skip
    handles, texts = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=min(len(texts), 6))
    n = {
        subset: max(r["n"] for key, r in rows.items() if key[2:] == (subset, statistics[0]))
        for subset in subsets
        if any(key[2:] == (subset, statistics[0]) for key in rows)
    }
    return Drawn(
        "Methods compared",
        "Scatter and trend of target minus reference that each method leaves on pairs it was not "
        "trained on, by part of the parameter space, with 95 % bootstrap intervals; “none” is the "
        "uncorrected difference. Left is better, on logarithmic axes (an interval that reaches "
        "zero leaves its panel); where intervals of two methods overlap widely, neither is better. "
        "Pairs: "
        + "; ".join(f"{subset_words(subset)} {count:,}" for subset, count in n.items())
        + ".",
        "Dots with intervals for every method, label and part of the parameter space.",
        figure,
    )
