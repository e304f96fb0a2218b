"""Are the errors right: how many held-out pairs lie in their intervals."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sos_dask.report.style import (
    BLACK,
    BLUE,
    GREY,
    NAMES,
    VERMILLION,
    Drawn,
    new_figure,
    plain_log_ticks,
)
from sos_dask.report.words import SUBSETS, ordered
from sos_dask.schema import LABELS

_LEVELS = ((0.68, 0.02, BLUE, "o"), (0.95, 0.01, VERMILLION, "s"))


def calibration_figure(table: pa.Table) -> Drawn | None:
    """Share of held-out pairs inside their 68 % and 95 % intervals, by part of label space.

    Parameters
    ----------
    table : pyarrow.Table
        ``calibration.parquet`` of the stage uncertainty: ``label, subset, level, n, coverage`` and
        the 95 % interval of the coverage, ``low`` and ``high``.

    Returns
    -------
    Drawn or None
        None where no pair was checked.
    """
    if not table.num_rows:
        return None
    subsets = ordered(table["subset"].to_pylist(), SUBSETS)
    figure = new_figure(0.9 + 0.24 * len(subsets))
    for axes, label in zip(figure.subplots(1, len(LABELS), sharey=True), LABELS, strict=True):
        for level, margin, color, marker in _LEVELS:
            mine = table.filter(
                pc.and_(pc.equal(table["label"], label), pc.equal(table["level"], level))
            )
            axes.axvspan(100 * (level - margin), 100 * (level + margin), color=GREY, alpha=0.25,
                         linewidth=0)  # fmt: skip
            axes.axvline(100 * level, color=BLACK, linewidth=0.6)
            value, low, high = (100 * mine[n].to_numpy() for n in ("coverage", "low", "high"))
            axes.errorbar(
                value,
                [subsets.index(name) for name in mine["subset"].to_pylist()],
                xerr=np.stack([value - low, high - value]).clip(min=0),
                linestyle="none",
                color=color,
                marker=marker,
                elinewidth=0.9,
                label=f"{100 * level:g} % interval",
            )
        axes.set_title(NAMES[label])
        axes.set_xlabel("pairs inside [%]")
        axes.set_yticks(range(len(subsets)), subsets)
        axes.set_ylim(len(subsets) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
    handles, texts = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=2)
    n = {
        subset: pc.max(table.filter(pc.equal(table["subset"], subset))["n"]).as_py()
        for subset in subsets
    }
    return Drawn(
        "Are the errors right",
        "Share of held-out pairs whose difference after the correction lies inside its 68 % and "
        "95 % interval, with the 95 % interval of that share, by part of the label space. Lines: "
        "what it should be; bands: 66 to 70 % and 94 to 96 %. Pairs: "
        + "; ".join(f"{name} {count:,}" for name, count in n.items())
        + ".",
        "Dots with intervals around 68 and 95 percent for Teff, log g and [Fe/H].",
        figure,
    )


def growth_figure(table: pa.Table) -> Drawn | None:
    """How the scatter of held-out pairs grows away from the overlap.

    Parameters
    ----------
    table : pyarrow.Table
        ``calibration.parquet`` of the stage coverage: ``distance, n, growth_measured, growth``.

    Returns
    -------
    Drawn or None
        None without bins.
    """
    if not table.num_rows:
        return None
    figure = new_figure(2.6, 3.6)
    axes = figure.subplots()
    x, measured, fitted = (
        table[name].to_numpy() for name in ("distance", "growth_measured", "growth")
    )
    axes.plot(x, measured, linestyle="none", marker="o", color=BLUE, label="held-out pairs")
    axes.plot(x, fitted, color=VERMILLION, label="model")
    axes.axhline(1, color=BLACK, linewidth=0.6)
    axes.set_xscale("log")
    axes.set_xlim(0.8 * float(x.min()), 1.25 * float(x.max()))
    plain_log_ticks(axes)
    axes.set_xlabel("distance from the overlap")
    axes.set_ylabel("scatter over that of the dense part")
    axes.legend()
    return Drawn(
        "How far to trust the correction",
        "Scatter of held-out pairs after the correction against their distance from the other "
        f"pairs in label space, {table.num_rows} bins of {pc.sum(table['n']).as_py():,} pairs, in "
        "units of the scatter where pairs are dense; the line is the model that gives every "
        "corrected row its coverage.",
        "Dots of measured scatter against distance, and the fitted line.",
        figure,
    )
