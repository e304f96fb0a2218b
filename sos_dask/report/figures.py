"""Figures of panels for each label: trends, methods, hit rates, groups left out, formulas.

``labels`` are the units of the labels by their names. A function gives None where there is nothing
to show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sos_dask.columns import floats
from sos_dask.report.style import (
    BLACK,
    BLUE,
    CYCLE,
    GREY,
    MARKERS,
    NONE,
    ORANGE,
    SUBSETS,
    VERMILLION,
    WIDTH,
    Drawn,
    Labels,
    axis_label,
    listed,
    new_figure,
    number,
    ordered,
    plain_log_ticks,
    robust_limits,
    share_of_width,
    symbol,
    tidy_ticks,
    word,
)

MIN_COUNT = 20
_SIGNIFICANT = 3.0


def select(table: pa.Table, **wanted: Any) -> pa.Table:
    """Rows whose columns have these values; None: a null."""
    for name, value in wanted.items():
        column = table[name]
        table = table.filter(pc.is_null(column) if value is None else pc.equal(column, value))
    return table


# --- trends -------------------------------------------------------------------------------------


def trend_figure(
    table: pa.Table, labels: Labels, method: str, others: bool, target: str
) -> Drawn | None:
    """Draw binned medians before and after one method's correction.

    Parameters
    ----------
    table : pyarrow.Table
        ``trends.parquet``.
    method : str
    others : bool
        Against the other quantities instead of the labels.
    target : str
        Name of the survey.
    """
    table = select(table, binning="equal-width", subset="all")
    table = table.filter(pc.greater_equal(table["n"], MIN_COUNT))
    found = ordered(table["against"].to_pylist(), labels)
    against = [name for name in found if (name not in labels) == others]
    if not against:
        return None
    figure, grid = _panels(labels, against, target, 1.75, (1.0,))
    samples = (("before", None, GREY), ("fitted", method, ORANGE), ("after", method, BLUE))
    n = {sample: 0 for sample, _, _ in samples}
    clipped = False
    for row, label in enumerate(labels):
        before = select(table, label=label, sample="before")
        limits = robust_limits(floats(before, "p16"), floats(before, "p84"))
        for column, quantity in enumerate(against):
            for sample, name, color in samples:
                bins = select(table, label=label, against=quantity, sample=sample, method=name)
                if bins.num_rows:
                    n[sample] = max(n[sample], pc.sum(bins["n"]).as_py())
                    clipped |= _band(grid[row, column], bins, limits, color, sample == "fitted")
            grid[row, column].set_ylim(*limits)
    _trend_legend(figure, n["fitted"] > 0)
    facts = {"method": method, "against": against, "n": n, "clipped": clipped}
    about = f"Trends with {listed(against)}" if others else "Trends"
    return Drawn(f"{about} before and after: {method}", figure, facts)


def _panels(
    labels: Labels, against: Sequence[str], target: str, height: float, heights: Sequence[float]
) -> tuple[Figure, Any]:
    """Panels of differences: for each label rows of these heights, a column for each quantity."""
    figure = new_figure(0.5 + height * len(labels), share_of_width(len(against)))
    grid = figure.subplots(
        len(heights) * len(labels), len(against), sharex="col", sharey="row", squeeze=False,
        height_ratios=[*heights] * len(labels),
    )  # fmt: skip
    for axes in grid.flat:
        axes.axhline(0, color=BLACK, linewidth=0.6)
        tidy_ticks(axes, 5)
    for row, (label, unit) in enumerate(labels.items()):
        grid[row * len(heights), 0].set_ylabel(rf"$\Delta$ {axis_label(label, unit)}")
    for axes, quantity in zip(grid[-1], against, strict=True):
        axes.set_xlabel(f"{target} {axis_label(quantity, labels.get(quantity))}")
    return figure, grid


def _band(
    axes: Axes, bins: pa.Table, limits: tuple[float, float], color: str, dashed: bool
) -> bool:
    """Medians with their band; triangles where they leave the panel, whether there are any."""
    x, median, low, high = (floats(bins, key) for key in ("centre", "median", "p16", "p84"))
    beyond = False
    for marker, edge, far in (("v", limits[0], median < limits[0]),
                              ("^", limits[1], median > limits[1])):  # fmt: skip
        marks = axes.plot(x[far], np.full(far.sum(), edge), marker, color=color, clip_on=False)
        marks[0].set(markersize=5, in_layout=False)
        beyond |= bool(far.any())
        low, high, median = (np.where(far, np.nan, v) for v in (low, high, median))
    if dashed:
        for values in (low, high):
            axes.plot(x, values, color=color, linewidth=0.7, linestyle="--")
        axes.plot(x, median, color=color, linewidth=1.0)
    else:
        axes.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
        _points(axes, x, median, floats(bins, "error"), color, "o", markersize=2.4)
    return beyond


def _points(
    axes: Axes, x: Any, y: Any, error: Any, color: str, marker: str, **options: Any
) -> None:
    axes.errorbar(x, y, error, color=color, marker=marker, elinewidth=0.8, **options)


def _trend_legend(figure: Figure, has_fitted: bool) -> None:
    handles: list[Any] = [  # pairs of artists, drawn over each other
        (Patch(color=color, alpha=0.25, linewidth=0), Line2D([], [], color=color, marker="o"))
        for color in (GREY, BLUE)
    ]
    trained = (Line2D([], [], color=ORANGE), Line2D([], [], color=ORANGE, linestyle="--"))
    texts = ["before", "after, held-out pairs", "after, pairs that trained it"]
    drawn_by: dict[Any, Any] = {tuple: HandlerTuple(1), trained: HandlerTuple(None, pad=0.6)}
    n = 3 if has_fitted else 2
    figure.legend([*handles, trained][:n], texts[:n], loc="outside upper center", ncols=n,
                  handlelength=2.4, handler_map=drawn_by)  # fmt: skip


def reference_figure(
    table: pa.Table, labels: Labels, first: str, second: str, target: str
) -> Drawn | None:
    """Draw two references side by side.

    Parameters
    ----------
    table : pyarrow.Table
        ``references.parquet``.
    first, second, target : str
    """
    table = select(table, binning="equal-width", first=first, second=second)
    judged = table.filter(pc.is_valid(table["difference"]))
    against = [name for name in labels if pc.any(pc.equal(judged["against"], name)).as_py()]
    if not against:
        return None
    figure, grid = _panels(labels, against, target, 2.65, (1.6, 1.0))
    n = dict.fromkeys(("judged", "significant", "common"), 0)
    for number_of, label in enumerate(labels):
        mine = select(table, label=label)
        both = [floats(select(judged, label=label), f"median_{s}") for s in ("first", "second")]
        limits = robust_limits(np.minimum(*both), np.maximum(*both), 0.03)
        for upper, lower, quantity in zip(
            grid[2 * number_of], grid[2 * number_of + 1], against, strict=True
        ):
            bins = select(mine, against=quantity)
            x = floats(bins, "centre")
            for side, color, marker in (("first", BLUE, "o"), ("second", VERMILLION, "s")):
                enough = bins[f"n_{side}"].to_numpy() >= MIN_COUNT
                median, error = (floats(bins, f"{name}_{side}") for name in ("median", "error"))
                _points(upper, x[enough], median[enough], error[enough], color, marker,
                        linewidth=0.9)  # fmt: skip
            upper.set_ylim(*limits)
            found = floats(bins, "significance")
            known = np.isfinite(found)
            n["judged"] += int(known.sum())
            n["significant"] += int((np.abs(found[known]) > _SIGNIFICANT).sum())
            in_both = bins["n_common"].to_numpy()
            n["common"] = max(n["common"], int(in_both.sum()))
            direct = np.where(in_both >= MIN_COUNT, floats(bins, "significance_common"), np.nan)
            _significance(lower, x, np.where(known, found, np.nan), direct)
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
    facts = {"first": first, "second": second, **n}
    return Drawn(f"References side by side: {first} and {second}", figure, facts)


def _significance(axes: Axes, x: Any, through: Any, direct: Any) -> None:
    axes.axhspan(-_SIGNIFICANT, _SIGNIFICANT, color=GREY, alpha=0.18, linewidth=0)
    width = 0.72 * float(np.min(np.diff(x))) if len(x) > 1 else 0.2
    axes.bar(x, through, width, color=BLACK, alpha=0.75)
    axes.plot(x, direct, linestyle="none", marker="D", markersize=3.2, markerfacecolor="white",
              color=ORANGE)  # fmt: skip
    axes.set_ylim(-9, 9)
    axes.set_yticks([-6, 0, 6])
    if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        axes.set_ylabel(r"signif. [$\sigma$]")


# --- dots: one panel for each label, places from top to bottom, one mark for each series --------


@dataclass(frozen=True)
class Series:
    """Marks of one kind in `_dots`, at one height within each place.

    Parameters
    ----------
    name : str
    text : str
        For the legend; empty for none.
    color, marker : str
    slot : int
        Its height, counted from the top.
    filled : bool
    """

    name: str
    text: str
    color: str
    marker: str
    slot: int
    filled: bool = True


Point = tuple[float, float | None, float | None]  # value, and the ends of its line


def _dots(
    labels: Labels,
    places: Mapping[str, str],
    rows: Mapping[str, str],
    series: Sequence[Series],
    points: Mapping[tuple[str, str, str, str], Point],
) -> tuple[Figure, Any]:
    """Panels of dots: ``rows`` by labels, points by row, label, place and series."""
    n_slots = 1 + max(one.slot for one in series)
    panel = 0.62 + (0.13 + 0.05 * n_slots) * len(places)
    figure = new_figure(0.25 + panel * len(rows), share_of_width(len(labels)))
    grid = figure.subplots(len(rows), len(labels), sharey=True, squeeze=False)
    step = 0.76 / n_slots
    for (row, text), line in zip(rows.items(), grid, strict=True):
        for axes, (label, unit) in zip(line, labels.items(), strict=True):
            values = []
            for one in series:
                found = [(at, points[key]) for at, place in enumerate(places)
                         if (key := (row, label, place, one.name)) in points]  # fmt: skip
                if not found:
                    continue
                y = [at + (one.slot - (n_slots - 1) / 2) * step for at, _ in found]
                value, low, high = np.array([point for _, point in found], dtype=np.float64).T
                values += value.tolist()
                axes.errorbar(
                    value, y, xerr=np.nan_to_num(np.stack([value - low, high - value]).clip(min=0)),
                    linestyle="none", color=one.color, marker=one.marker, elinewidth=0.9,
                    markersize=3.2, markerfacecolor=one.color if one.filled else "white",
                    label=one.text or None,
                )  # fmt: skip
            if values and min(values) > 0:
                axes.set_xscale("log")
                plain_log_ticks(axes.xaxis)
            else:
                axes.axvline(0, color=BLACK, linewidth=0.6)
                axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.set_xlabel(text.format(unit=unit), fontsize=7)
            axes.set_ylim(len(places) - 0.5, -0.5)
            axes.set_yticks(range(len(places)), list(places.values()))
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", linewidth=0.3, color="#cccccc")
            for edge in range(1, len(places)):
                axes.axhline(edge - 0.5, color="#cccccc", linewidth=0.5)
    for axes, label in zip(grid[0], labels, strict=True):
        axes.set_title(symbol(label))
    handles, texts = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=min(len(texts), 5))
    return figure, grid


def _of_methods(methods: Sequence[str], chosen: str) -> list[Series]:
    """One series for each method; grey crosses without a correction."""
    found = []
    for slot, name in enumerate(methods):
        i = slot - (NONE in methods)
        color, marker = CYCLE[i % len(CYCLE)], MARKERS[i % len(MARKERS)]
        text = name + (" (chosen)" if name == chosen else "")
        found.append(Series(name, text, *((GREY, "x") if name == NONE else (color, marker)), slot))
    return found


def comparison_figure(table: pa.Table, labels: Labels, chosen: str) -> Drawn | None:
    """Draw scatter and trend left by each method in each subset, with 95 % intervals.

    Parameters
    ----------
    table : pyarrow.Table
        ``comparison.parquet``.
    chosen : str
        The method that corrects the catalog.
    """
    table = table.filter(pc.and_(pc.equal(table["sample"], "test"), pc.is_valid(table["value"])))
    methods = ordered(table["method"].to_pylist(), (NONE,))
    places = {name: symbol(name) for name in ordered(table["subset"].to_pylist(), SUBSETS)}
    known = {"mad": "scatter [{unit}]", "rms_binned": "rms of binned medians [{unit}]"}
    rows = {key: text for key, text in known.items() if key in table["statistic"].to_pylist()}
    if not rows or len(methods) < 2:
        return None
    items = table.to_pylist()
    points = {
        (r["statistic"], r["label"], r["subset"], r["method"]): (r["value"], r["low"], r["high"])
        for r in items
    }
    figure, _ = _dots(labels, places, rows, _of_methods(methods, chosen), points)
    first = next(iter(rows))
    n = {r["subset"]: r["n"] for r in items if r["statistic"] == first}
    return Drawn("Methods compared", figure, {"pairs": _named(n)})


def _named(n: Mapping[str, int]) -> dict[str, int]:
    return {word(name): count for name, count in n.items()}


def calibration_figure(table: pa.Table, labels: Labels) -> Drawn | None:
    """Draw how many held-out pairs lie in their 68 % and 95 % intervals.

    Parameters
    ----------
    table : pyarrow.Table
        ``label, subset, level, n, hit_rate`` and its 95 % interval, ``low`` and ``high``.
    """
    if not table.num_rows:
        return None
    items = table.to_pylist()
    n = {place: max(r["n"] for r in items if r["subset"] == place)
         for place in ordered(table["subset"].to_pylist(), SUBSETS)}  # fmt: skip
    points: dict[Any, Any] = {
        ("", r["label"], r["subset"], str(r["level"])): tuple(
            100 * (r[name] - r["level"]) for name in ("hit_rate", "low", "high")
        )
        for r in items
    }
    levels = ((0.68, 2, BLUE, "o"), (0.95, 1, VERMILLION, "s"))
    series = [
        Series(str(level), f"{100 * level:g} % interval", color, marker, slot)
        for slot, (level, _, color, marker) in enumerate(levels)
    ]
    figure, grid = _dots(
        labels, {name: symbol(name) for name in n}, {"": "hit rate − level [% points]"}, series,
        points,
    )  # fmt: skip
    for axes in grid.flat:
        for _, margin, color, _ in levels:
            for edge in (-margin, margin):
                axes.axvline(edge, color=color, linewidth=0.6, linestyle=":")
    return Drawn("Are the errors right", figure, {"pairs": _named(n)})


def left_out_figure(table: pa.Table, labels: Labels, chosen: str) -> Drawn | None:
    """Draw median and scatter of every group of pairs, left out and not.

    Parameters
    ----------
    table : pyarrow.Table
        ``generalisation.parquet``.
    chosen : str
        The method that corrects the catalog.
    """
    if not table.num_rows:
        return None
    methods = ordered(table["method"].to_pylist(), (NONE, chosen))
    left_out = _of_methods(methods, chosen)
    kept = [
        Series(f"{one.name} kept", "", one.color, one.marker, one.slot, filled=False)
        for one in left_out
        if one.name != NONE
    ]
    points: dict[tuple[str, str, str, str], Point] = {}
    n: dict[str, int] = {}
    for r in table.to_pylist():
        group = group_words(r)
        n[group] = max(n.get(group, 0), r["n"])
        for statistic in ("median", "mad"):
            value, other = r[statistic], r[f"{statistic}_random"]
            key = (statistic, r["label"], group)
            if r["method"] == NONE or value is None or other is None:
                ends: list[float | None] = [None, None]
            else:
                ends = [min(value, other), max(value, other)]
                points[*key, f"{r['method']} kept"] = (other, None, None)
            if value is not None:
                points[*key, r["method"]] = (value, *ends)
    rows = {"median": "median [{unit}]", "mad": "scatter [{unit}]"}
    figure, _ = _dots(labels, {group: group for group in n}, rows, [*left_out, *kept], points)
    return Drawn("Groups of pairs left out", figure, {"pairs": n})


def group_words(row: Mapping[str, Any]) -> str:
    """Name a group of pairs that was left out."""
    name = str(row["group"]).replace("<=", "≤").replace(">=", "≥").replace("-", "−")
    return f"{name} pairs" if row["split"] == "density" else name


# --- the symbolic model -------------------------------------------------------------------------

_TEFF = r"\frac{T_\mathrm{eff}}{5040\,\mathrm{K}}"
_LINE_INCHES = 0.21


def formula_lines(latex: str, width: int = 92) -> list[str]:
    """Break LaTeX of a formula into lines of about ``width`` letters, before signs and factors.

    Teff / 5040 K is written t, and parentheses keep one size, so that a line can end inside them.
    """
    latex = latex.replace(_TEFF, "t").replace(r"\left(", "(").replace(r"\right)", ")")
    lines, line, braces = [], "", 0
    for piece in re.split(r" (?=[+-] )|(?<=\\,) ", latex):
        if line and not braces and _shown(f"{line} {piece}") > width:
            lines.append(line.strip().removesuffix(r"\,"))
            # An empty group before a sign makes it one between two terms.
            line = ("{}" if piece[0] in "+-" else r"\times ") + piece
        else:
            line = f"{line} {piece}".strip()
        braces += piece.count("{") - piece.count("}")
    return [*lines, line]


def _shown(latex: str) -> int:
    """About how many letters LaTeX shows."""
    plain = re.sub(r"\\(?:mathrm|frac)|\\,|[{}^_ ]", "", latex)
    return len(plain.replace(r"\log", "log"))


def formula_figure(
    formulas: Mapping[str, Mapping[str, Any]], labels: Labels, n_sample: int
) -> Drawn:
    """Draw the formula of every label.

    Parameters
    ----------
    formulas : mapping
        ``labels`` of the model's ``formula.json``.
    n_sample : int
        Pairs that the formulas were searched with.
    """
    blocks = {label: formula_lines(str(formulas[label]["latex"])) for label in labels}
    n_lines = sum(map(len, blocks.values())) + 0.5 * len(blocks)
    figure = new_figure(_LINE_INCHES * n_lines + 0.1, WIDTH)
    figure.set_layout_engine("none")
    height = 1.0 / (n_lines + 0.4)
    y = 1.0 - height
    for label, lines in blocks.items():
        figure.text(0.005, y, rf"$\Delta$ {symbol(label)} $=$", va="center", fontsize=8)
        for line in lines:
            figure.text(0.095, y, f"${line}$", va="center", fontsize=7.5)
            y -= height
        y -= 0.5 * height
    complexity = {word(label): formulas[label]["complexity"] for label in labels}
    facts = {"complexity": complexity, "n_sample": n_sample}
    return Drawn("Formulas of the symbolic model", figure, facts)


def front_figure(formulas: Mapping[str, Mapping[str, Any]], labels: Labels, n_sample: int) -> Drawn:
    """Draw the fronts of accuracy against complexity; parameters as for `formula_figure`."""
    figure = new_figure(2.3, share_of_width(len(labels)))
    grid = figure.subplots(1, len(labels), squeeze=False)
    for axes, (label, unit) in zip(grid[0], labels.items(), strict=True):
        front, chosen = formulas[label]["front"], int(formulas[label]["chosen"])
        x, loss, error = (
            np.array([item[key] for item in front], dtype=np.float64)
            for key in ("complexity", "loss", "standard_error")
        )
        _points(axes, x, loss, error, BLUE, "o", linewidth=0.9)
        axes.plot(x[chosen], loss[chosen], marker="D", markersize=7, markerfacecolor="none",
                  markeredgecolor=VERMILLION, markeredgewidth=1.4, linestyle="none")  # fmt: skip
        for place, side, offset in ((0, "left", (5, 3)), (chosen, "right", (4, 8))):
            text = f"{number(front[place]['scatter'], unit)} {unit}"
            axes.annotate(text, (x[place], loss[place]),
                          offset, textcoords="offset points", fontsize=6.5, ha=side)  # fmt: skip
        axes.set_title(symbol(label))
        axes.set_xlabel("complexity")
        axes.set_ylim(0, 1.15 * float(loss.max()))
        axes.margins(x=0.12)
        tidy_ticks(axes)
    grid[0, 0].set_ylabel("loss (judging half)")
    return Drawn("Accuracy against complexity of formulas", figure, {"n_judge": n_sample // 2})
