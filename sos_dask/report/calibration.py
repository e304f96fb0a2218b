"""Are the errors right: how many held-out pairs lie in their intervals."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sos_dask.report.style import (
    BLACK,
    BLUE,
    GREY,
    NAMES,
    VERMILLION,
    Drawn,
    new_figure,
    plain_log_ticks,
    tidy_ticks,
    typeset,
)
from sos_dask.report.words import SUBSETS, ordered, subset_words
from sos_dask.schema import LABELS
from sos_dask.sky.healpix import FloatArray, IntArray

_LEVELS = ((0.68, 0.02, BLUE, "o", -0.17), (0.95, 0.01, VERMILLION, "s", 0.17))
_BINS_A_DECADE = 8


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
        axes.axvline(0, color=BLACK, linewidth=0.6)
        for level, margin, color, marker, shift in _LEVELS:
            mine = table.filter(
                pc.and_(pc.equal(table["label"], label), pc.equal(table["level"], level))
            )
            for edge in (-margin, margin):
                axes.axvline(100 * edge, color=color, linewidth=0.6, linestyle=":")
            value, low, high = (
                100 * (mine[n].to_numpy() - level) for n in ("coverage", "low", "high")
            )
            axes.errorbar(
                value,
                [subsets.index(name) + shift for name in mine["subset"].to_pylist()],
                xerr=np.stack([value - low, high - value]).clip(min=0),
                linestyle="none",
                color=color,
                marker=marker,
                elinewidth=0.9,
                label=f"{100 * level:g} % interval",
            )
        axes.set_title(NAMES[label])
        axes.set_xlabel("inside − level [% points]")
        tidy_ticks(axes)
        axes.set_yticks(range(len(subsets)), [typeset(name) for name in subsets])
        axes.set_ylim(len(subsets) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        for edge in range(1, len(subsets)):
            axes.axhline(edge - 0.5, color="#cccccc", linewidth=0.5)
    handles, texts = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=2)
    n = {
        subset: pc.max(table.filter(pc.equal(table["subset"], subset))["n"]).as_py()
        for subset in subsets
    }
    return Drawn(
        "Are the errors right",
        "Share of held-out pairs whose difference after the correction lies inside its 68 % and "
        "95 % interval, minus that level in percentage points, with the 95 % interval of the "
        "share, by part of the label space. Zero is right; left of it the stated errors are too "
        "small, right of it too large. Dotted: ±2 for the 68 %, ±1 for the 95 % interval. Pairs: "
        + "; ".join(f"{subset_words(name)} {count:,}" for name, count in n.items())
        + ".",
        "Dots with intervals around zero for Teff, log g and [Fe/H].",
        figure,
    )


def growth_figure(table: pa.Table, limits: Mapping[str, float]) -> Drawn | None:
    """How the scatter of held-out pairs grows away from the overlap.

    Parameters
    ----------
    table : pyarrow.Table
        ``calibration.parquet`` of the stage coverage: ``distance, n, growth_measured, growth``.
    limits : mapping of str to float
        Coverage above which a row is ``inside``, and below which it is ``outside``.

    Returns
    -------
    Drawn or None
        None without bins.
    """
    table = table.filter(pc.greater(table["distance"], 0.0))  # on a logarithmic axis
    if not table.num_rows:
        return None
    figure = new_figure(3.0, 4.4)
    axes = figure.subplots()
    x, n, measured, fitted = (
        table[name].to_numpy() for name in ("distance", "n", "growth_measured", "growth")
    )
    axes.plot(x, measured, linestyle="none", marker=".", markersize=2, color=GREY, alpha=0.6,
              label=f"bins of about {int(np.median(n))} held-out pairs")  # fmt: skip
    axes.errorbar(*_together(x, n, measured), linestyle="none", marker="o", color=BLUE,
                  elinewidth=0.9, label="means of bins")  # fmt: skip
    axes.plot(x, fitted, color=VERMILLION, label="model")
    axes.axhline(1, color=BLACK, linewidth=0.6)
    for name, word in (("inside", "sparse above"), ("outside", "outside above")):
        if limits.get(name):
            axes.axhline(1 / limits[name], color=BLACK, linewidth=0.6, linestyle=":")
            axes.annotate(word, (1, 1 / limits[name]), (-3, 2), xycoords=("axes fraction", "data"),
                          textcoords="offset points", ha="right", fontsize=6)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(0.8 * float(x.min()), 1.25 * float(x.max()))
    plain_log_ticks(axes)
    if measured.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("distance from the overlap [no unit]")
    axes.set_ylabel("scatter over that of the dense part")
    axes.legend(loc="lower right")
    worse = measured > 1.5 * fitted
    grows = (
        f" In {np.count_nonzero(worse)} bins of {int(n[worse].sum()):,} pairs, the nearest at a "
        f"distance of {x[worse].min():.2g}, the scatter is more than 1.5 times that of the model."
        if worse.any()
        else ""
    )
    return Drawn(
        "How the scatter grows away from the overlap",
        "Scatter of held-out pairs after the correction, in units of the scatter where pairs are "
        "dense, against the distance from the other pairs in label space, on the scale on which "
        f"the coverage is measured. {table.num_rows:,} bins of "
        f"{int(n.sum()):,} pairs; the line is the model: a row's coverage is one over it." + grows,
        "Dots of measured scatter against distance, and the fitted line.",
        figure,
    )


def _together(
    x: FloatArray, n: IntArray, values: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Places, means and standard errors of bins in steps of equal ratio."""
    step = np.floor(np.log10(x) * _BINS_A_DECADE).astype(np.int64)
    found = []
    for one in np.unique(step):
        mine = step == one
        mean = np.average(values[mine], weights=n[mine])
        many = np.count_nonzero(mine)
        error = float(np.std(values[mine], ddof=1)) / np.sqrt(many) if many > 1 else 0.0
        found.append((float(np.exp(np.mean(np.log(x[mine])))), float(mean), error))
    place, mean, error = np.array(found).T
    return place, mean, error
