"""Figures of trends: differences in bins of one quantity, before and after, and by reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sos_dask.columns import floats
from sos_dask.report.style import (
    BLACK,
    BLUE,
    GREY,
    NAMES,
    ORANGE,
    VERMILLION,
    Drawn,
    axis_label,
    new_figure,
    robust_limits,
    tidy_ticks,
)
from sos_dask.report.words import UNITS, WORDS
from sos_dask.schema import LABELS

MIN_COUNT = 20
_SIGNIFICANT = 3.0


def _chosen(table: pa.Table, **wanted: str | None) -> pa.Table:
    for name, value in wanted.items():
        column = table[name]
        table = table.filter(pc.is_null(column) if value is None else pc.equal(column, value))
    return table


def quantities(table: pa.Table) -> list[str]:
    """Quantities that trends are against, with bins full enough to show, labels first."""
    found = pc.unique(table.filter(pc.greater_equal(table["n"], MIN_COUNT))["against"]).to_pylist()
    return [*(name for name in LABELS if name in found), *(n for n in found if n not in LABELS)]


def trend_figure(
    table: pa.Table, method: str, against: Sequence[str], target: str, reference: str
) -> Drawn | None:
    """Binned medians before and after one method's correction.

    Parameters
    ----------
    table : pyarrow.Table
        Trends, as `sos_dask.evidence.trends.trend_table` lays them out.
    method : str
    against : sequence of str
        Quantities, a column of panels each.
    target, reference : str
        What to call the surveys.

    Returns
    -------
    Drawn or None
        None where no bin is full enough.
    """
    table = _chosen(table, binning="equal-width", subset="all")
    table = table.filter(pc.greater_equal(table["n"], MIN_COUNT))
    against = [name for name in against if pc.any(pc.equal(table["against"], name)).as_py()]
    if not against:
        return None
    figure = new_figure(0.5 + 1.75 * len(LABELS))
    grid = figure.subplots(len(LABELS), len(against), sharex="col", sharey="row", squeeze=False)
    outside = False
    n = dict.fromkeys(("before", "after", "fitted"), 0)
    has_fitted = pc.any(pc.equal(table["sample"], "fitted")).as_py()
    for row, label in enumerate(LABELS):
        before = _chosen(table, label=label, sample="before")
        limits = robust_limits(floats(before, "p16"), floats(before, "p84"))
        for column, quantity in enumerate(against):
            axes: Axes = grid[row, column]
            axes.axhline(0, color=BLACK, linewidth=0.6)
            for sample, name, color in (
                ("before", None, GREY),
                ("fitted", method, ORANGE),
                ("after", method, BLUE),
            ):
                bins = _chosen(table, label=label, against=quantity, sample=sample, method=name)
                if not bins.num_rows:
                    continue
                n[sample] = max(n[sample], int(pc.sum(bins["n"]).as_py()))
                x, median, low, high = (
                    floats(bins, key) for key in ("centre", "median", "p16", "p84")
                )
                far = (median < limits[0]) | (median > limits[1])
                edge = np.where(median < limits[0], *limits)
                for marker, side in (("v", limits[0]), ("^", limits[1])):
                    there = far & (edge == side)
                    marks = axes.plot(x[there], edge[there], marker, color=color, clip_on=False)
                    marks[0].set(markersize=5, in_layout=False)
                outside |= bool(far.any())
                low, high, median = (np.where(far, np.nan, v) for v in (low, high, median))
                if sample == "fitted":
                    axes.plot(x, low, color=color, linewidth=0.7, linestyle="--")
                    axes.plot(x, high, color=color, linewidth=0.7, linestyle="--")
                    axes.plot(x, median, color=color, linewidth=1.0)
                    continue
                axes.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
                axes.errorbar(
                    x,
                    median,
                    floats(bins, "error"),
                    color=color,
                    marker="o",
                    markersize=2.4,
                    elinewidth=0.8,
                    linewidth=1.1,
                )
            axes.set_ylim(*limits)
            tidy_ticks(axes)
            if column == 0:
                axes.set_ylabel(rf"$\Delta$ {axis_label(label)}")
            if row == len(LABELS) - 1:
                axes.set_xlabel(f"{target} {axis_label(quantity)}")
                axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    handles: list[Any] = [  # pairs of artists, drawn over each other
        (Patch(color=GREY, alpha=0.25, linewidth=0), Line2D([], [], color=GREY, marker="o")),
        (Patch(color=BLUE, alpha=0.25, linewidth=0), Line2D([], [], color=BLUE, marker="o")),
    ]
    texts = ["before", "after, held-out pairs"]
    trained = (Line2D([], [], color=ORANGE), Line2D([], [], color=ORANGE, linestyle="--"))
    if has_fitted:
        handles.append(trained)
        texts.append("after, pairs that trained it")
    figure.legend(
        handles, texts, loc="outside upper center", ncols=3,
        handlelength=2.4,
        handler_map={tuple: HandlerTuple(1), trained: HandlerTuple(None, pad=0.6)},
    )  # fmt: skip
    fitted_text = (
        f" Orange: the same of the {n['fitted']:,} pairs that trained it, with the band's edges "
        "dashed; far from the blue, the method has learned noise."
        if has_fitted
        else ""
    )
    clipped = " Triangles at an edge are medians beyond it." if outside else ""
    words = [WORDS.get(name, name) for name in against]
    about = "Trends" if set(against) <= set(LABELS) else f"Trends with {' and '.join(words)}"
    return Drawn(
        f"{about} before and after: {method}",
        f"{target} minus {reference} in bins of the {target} value: median with its standard error "
        "and, shaded, the 16th to the 84th percentile. Grey: before the correction, "
        f"{n['before']:,} pairs. Blue: after the correction by {method}, {n['after']:,} pairs that "
        f"the model was not trained on.{fitted_text} A good correction is flat at zero. Bins with "
        f"fewer than {MIN_COUNT} pairs are left out; limits are those of the differences before, "
        f"the same for every method.{clipped}",
        f"Panels of {target} minus {reference} in Teff, log g and [Fe/H] against "
        + ", ".join(words)
        + f", before and after the correction by {method}.",
        figure,
    )


def reference_figure(table: pa.Table, first: str, second: str, target: str) -> Drawn | None:
    """Two references side by side.

    Parameters
    ----------
    table : pyarrow.Table
        Contrasts, as `sos_dask.evidence.trends.contrast_table` lays them out.
    first, second, target : str

    Returns
    -------
    Drawn or None
        None where no bin can be judged.
    """
    table = _chosen(table, binning="equal-width", first=first, second=second)
    judged = table.filter(pc.is_valid(table["difference"]))
    against = [name for name in LABELS if pc.any(pc.equal(judged["against"], name)).as_py()]
    if not against:
        return None
    figure = new_figure(8.4)
    grid = figure.subplots(
        2 * len(LABELS), len(against), sharex="col", sharey="row", squeeze=False,
        height_ratios=[1.6, 1] * len(LABELS),
    )  # fmt: skip
    n_judged = n_significant = n_common = 0
    for number, label in enumerate(LABELS):
        mine = _chosen(table, label=label)
        full = mine.filter(pc.is_valid(mine["difference"]))
        both = [floats(full, f"median_{side}") for side in ("first", "second")]
        limits = robust_limits(np.minimum(*both), np.maximum(*both), 0.03)
        for column, quantity in enumerate(against):
            bins = _chosen(mine, against=quantity)
            upper: Axes = grid[2 * number, column]
            lower: Axes = grid[2 * number + 1, column]
            x = floats(bins, "centre")
            for side, color, marker in (("first", BLUE, "o"), ("second", VERMILLION, "s")):
                enough = bins[f"n_{side}"].to_numpy() >= MIN_COUNT
                upper.errorbar(
                    x[enough], floats(bins, f"median_{side}")[enough],
                    floats(bins, f"error_{side}")[enough],
                    color=color, marker=marker, elinewidth=0.8, linewidth=0.9,
                )  # fmt: skip
            upper.axhline(0, color=BLACK, linewidth=0.6)
            upper.set_ylim(*limits)
            significance = floats(bins, "significance")
            known = np.isfinite(significance)
            n_judged += int(np.count_nonzero(known))
            n_significant += int(np.count_nonzero(np.abs(significance[known]) > _SIGNIFICANT))
            lower.axhspan(-_SIGNIFICANT, _SIGNIFICANT, color=GREY, alpha=0.18, linewidth=0)
            lower.axhline(0, color=BLACK, linewidth=0.6)
            width = 0.36 * float(np.min(np.diff(x))) if len(x) > 1 else 0.1
            lower.bar(x[known], significance[known], 2 * width, color=BLACK, alpha=0.75)
            enough = bins["n_common"].to_numpy() >= MIN_COUNT
            direct = np.where(enough, floats(bins, "significance_common"), np.nan)
            n_common = max(n_common, int(bins["n_common"].to_numpy().sum()))
            lower.plot(x, direct, linestyle="none", marker="D", markersize=3.2,
                       markerfacecolor="white", color=ORANGE)  # fmt: skip
            lower.set_ylim(-9, 9)
            tidy_ticks(upper)
            lower.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 6], symmetric=True))
            lower.set_yticks([-6, 0, 6])
            lower.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            if column == 0:
                upper.set_ylabel(rf"$\Delta$ {NAMES[label]} [{UNITS[label]}]")
                lower.set_ylabel(r"signif. [$\sigma$]")
            if number == len(LABELS) - 1:
                lower.set_xlabel(f"{target} {axis_label(quantity)}")
    figure.align_ylabels()
    handles = [
        Line2D([], [], color=BLUE, marker="o"),
        Line2D([], [], color=VERMILLION, marker="s"),
        Patch(color=BLACK, alpha=0.75),
        Line2D([], [], color=ORANGE, marker="D", markerfacecolor="white", linestyle="none"),
    ]
    texts = [
        f"{target} − {first}", f"{target} − {second}", f"{second} − {first} through {target}",
        f"{second} − {first}, stars in both",
    ]  # fmt: skip
    figure.legend(handles, texts, loc="outside upper center", ncols=4, columnspacing=1.2)
    return Drawn(
        f"References side by side: {first} and {second}",
        f"Is one union of the references justified? Upper panels: median of {target} minus each "
        "reference in the same bins, with its standard error; the references are on the zero "
        "points that the union gave them. Lower panels: their difference over its error. Bars: "
        f"through {target} (different stars of one bin), {n_significant} of {n_judged} bins beyond "
        f"3σ; diamonds: directly, on the {n_common:,} stars that both observed. The grey band is "
        f"±3σ; values beyond ±9σ are cut. Bins with fewer than {MIN_COUNT} pairs of either are not "
        "judged. Many bars beyond the band mean that the zero points alone do not unite them.",
        f"Panels of {target} minus {first} and {target} minus {second} against Teff, log g and "
        "[Fe/H], with the significance of their difference below each.",
        figure,
    )
