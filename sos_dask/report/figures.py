"""Figures of panels for each label: trends, methods, hit rates, groups left out, formulas.

A function takes a table of a product; ``labels`` are the units of the labels by their names,
``target`` is the name of the survey, ``chosen`` the method that corrects the catalog. It gives None
where there is nothing to show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sos_dask.columns import FloatingArray, floats
from sos_dask.evidence.figures import BANDS, NONE, SUBSETS, TEST, snr_subsets
from sos_dask.problem import SNR
from sos_dask.report.style import (
    BLACK,
    BLUE,
    CYCLE,
    GREY,
    MARKERS,
    ORANGE,
    VERMILLION,
    WIDTH,
    Drawn,
    Labels,
    axis_label,
    listed,
    new_figure,
    number,
    ordered,
    percent,
    plain_log_ticks,
    robust_limits,
    share_of_width,
    symbol,
    tidy_ticks,
    word,
)

_MIN_COUNT = 20
_SIGNIFICANT = 3.0
_LINE = "#cccccc"


def select(table: pa.Table, **wanted: Any) -> pa.Table:
    """Rows whose columns have these values; None: a null."""
    for name, value in wanted.items():
        column = table[name]
        table = table.filter(pc.is_null(column) if value is None else pc.equal(column, value))
    return table


# --- pairs and rows of the catalog ---------------------------------------------------------------

_N_BINS, _BEYOND = 40, 0.2  # of a panel; per cent of pairs or rows that lie beyond either end


def overlap_figure(
    pairs: Mapping[str, FloatingArray], rows: Mapping[str, FloatingArray], labels: Labels
) -> Drawn | None:
    """Draw how pairs (n,) and rows of the catalog (m,) are distributed in some quantities."""
    shown = {}
    for name in pairs:
        both = [x[np.isfinite(x) & ((x > 0) | (name != SNR))] for x in (pairs[name], rows[name])]
        if all(map(len, both)):
            ends = np.stack([np.percentile(x, [_BEYOND, 100 - _BEYOND]) for x in both])
            low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
            spaced = np.geomspace if name == SNR else np.linspace
            shown[name] = both, spaced(low, high if high > low else low + 1, _N_BINS + 1)
    if not shown:
        return None
    n_columns = min(len(shown), 3)
    n_lines = -(-len(shown) // n_columns)
    figure = new_figure(0.35 + 1.55 * n_lines, share_of_width(n_columns))
    grid = figure.subplots(n_lines, n_columns, squeeze=False)
    for axes, (name, (both, edges)) in zip(grid.flat, shown.items(), strict=False):
        of_pairs, of_rows = (100 * np.histogram(x, edges)[0] / len(x) for x in both)
        axes.stairs(of_rows, edges, fill=True, color=GREY, alpha=0.35, label="rows of the catalog")
        axes.stairs(of_pairs, edges, color=BLUE, linewidth=1.1, label="pairs")
        tidy_ticks(axes)
        if name == SNR:
            for edge, _ in BANDS.values():
                axes.axvline(edge, color=BLACK, linewidth=0.5, linestyle=":")
            axes.set_xscale("log")
            plain_log_ticks(axes.xaxis)
        axes.set(xlim=(edges[0], edges[-1]), xlabel=axis_label(name, labels.get(name)))
        axes.set_ylim(bottom=0)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel("share [%]")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    inside = [snr_subsets(of.get(SNR)) for of in (pairs, rows)]
    facts = {name: len(next(iter(of.values()))) for name, of in (("pairs", pairs), ("rows", rows))}
    shares = {
        word(band): [percent(int(one[band].sum()), len(one[band])) for one in inside]
        for band in inside[0]
    }
    more = {"bins": _N_BINS, "beyond": _BEYOND, "bands": shares}
    return Drawn("How pairs and rows of the catalog differ", figure, {**facts, **more})


# --- trends -------------------------------------------------------------------------------------


def trend_figure(
    table: pa.Table, labels: Labels, method: str, others: bool, target: str
) -> Drawn | None:
    """Draw binned medians (``trends.parquet``) before and after the correction by a method.

    ``others``: against the other quantities instead of the labels.
    """
    table = select(table, binning="equal-width", subset="all")
    table = table.filter(pc.greater_equal(table["n"], _MIN_COUNT))
    found = ordered(table["against"].to_pylist(), labels)
    against = [name for name in found if (name not in labels) == others]
    if not against:
        return None
    figure, grid = _panels(labels, against, target, 1.75, (1.0,))
    samples = (("before", None, GREY), ("fitted", method, ORANGE), ("after", method, BLUE))
    n = {sample: 0 for sample, _, _ in samples}
    clipped = False
    for line, label in zip(grid, labels, strict=True):
        before = select(table, label=label, sample="before")
        limits = robust_limits(floats(before, "p16"), floats(before, "p84"))
        for axes, quantity in zip(line, against, strict=True):
            for sample, name, color in samples:
                bins = select(table, label=label, against=quantity, sample=sample, method=name)
                if bins.num_rows:
                    n[sample] = max(n[sample], pc.sum(bins["n"]).as_py())
                    clipped |= _band(axes, bins, limits, color, sample == "fitted")
            axes.set_ylim(*limits)
    trained = (Line2D([], [], color=ORANGE), Line2D([], [], color=ORANGE, linestyle="--"))
    handles: list[Any] = [  # pairs of artists, drawn over each other
        (Patch(color=color, alpha=0.25, linewidth=0), Line2D([], [], color=color, marker="o"))
        for color in (GREY, BLUE)
    ]
    texts = ["before", "after, held-out pairs", "after, pairs that trained it"]
    drawn_by: dict[Any, Any] = {tuple: HandlerTuple(1), trained: HandlerTuple(None, pad=0.6)}
    shown = 3 if n["fitted"] else 2
    figure.legend([*handles, trained][:shown], texts[:shown], loc="outside upper center",
                  ncols=shown, handlelength=2.4, handler_map=drawn_by)  # fmt: skip
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
    for axes, (label, unit) in zip(grid[:: len(heights), 0], labels.items(), strict=True):
        axes.set_ylabel(rf"$\Delta$ {axis_label(label, unit)}")
    for axes, quantity in zip(grid[-1], against, strict=True):
        axes.set_xlabel(f"{target} {axis_label(quantity, labels.get(quantity))}")
    return figure, grid


def _band(
    axes: Axes, bins: pa.Table, limits: tuple[float, float], color: str, dashed: bool
) -> bool:
    """Medians with their band; triangles where they leave the panel, whether there are any."""
    x, median, low, high = (floats(bins, key) for key in ("centre", "median", "p16", "p84"))
    below, above = median < limits[0], median > limits[1]
    for marker, edge, far in (("v", limits[0], below), ("^", limits[1], above)):
        marks = axes.plot(x[far], np.full(far.sum(), edge), marker, color=color, clip_on=False)
        marks[0].set(markersize=5, in_layout=False)
    low, high, median = (np.where(below | above, np.nan, v) for v in (low, high, median))
    if dashed:
        for values in (low, high):
            axes.plot(x, values, color=color, linewidth=0.7, linestyle="--")
        axes.plot(x, median, color=color, linewidth=1.0)
    else:
        axes.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
        _points(axes, x, median, floats(bins, "error"), color, "o", markersize=2.4)
    return bool((below | above).any())


def _points(
    axes: Axes, x: Any, y: Any, error: Any, color: str, marker: str, **options: Any
) -> None:
    axes.errorbar(x, y, error, color=color, marker=marker, elinewidth=0.8, **options)


def reference_figure(
    table: pa.Table, labels: Labels, first: str, second: str, target: str
) -> Drawn | None:
    """Draw two references side by side (``references.parquet``)."""
    table = select(table, binning="equal-width", first=first, second=second)
    judged = table.filter(pc.is_valid(table["difference"]))
    against = [name for name in labels if pc.any(pc.equal(judged["against"], name)).as_py()]
    if not against:
        return None
    figure, grid = _panels(labels, against, target, 2.65, (1.6, 1.0))
    n = dict.fromkeys(("judged", "significant", "common"), 0)
    for label, uppers, lowers in zip(labels, grid[::2], grid[1::2], strict=True):
        both = [floats(select(judged, label=label), f"median_{s}") for s in ("first", "second")]
        limits = robust_limits(np.minimum(*both), np.maximum(*both), 0.03)
        for upper, lower, quantity in zip(uppers, lowers, against, strict=True):
            bins = select(table, label=label, against=quantity)
            x = floats(bins, "centre")
            for side, color, marker in (("first", BLUE, "o"), ("second", VERMILLION, "s")):
                enough = bins[f"n_{side}"].to_numpy() >= _MIN_COUNT
                median, error = (floats(bins, f"{name}_{side}") for name in ("median", "error"))
                _points(upper, x[enough], median[enough], error[enough], color, marker,
                        linewidth=0.9)  # fmt: skip
            upper.set_ylim(*limits)
            through = floats(bins, "significance")
            known = np.isfinite(through)
            n["judged"] += int(known.sum())
            n["significant"] += int((np.abs(through[known]) > _SIGNIFICANT).sum())
            in_both = bins["n_common"].to_numpy()
            n["common"] = max(n["common"], int(in_both.sum()))
            direct = np.where(in_both >= _MIN_COUNT, floats(bins, "significance_common"), np.nan)
            _significance(lower, x, np.where(known, through, np.nan), direct)
    for axes in grid[1::2, 0]:
        axes.set_ylabel(r"signif. [$\sigma$]")
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


# --- dots: one panel for each label, places from top to bottom, one mark for each series --------


class Series(NamedTuple):
    """Marks of one kind, at one height (``slot``) within each place; ``text`` for the legend."""

    name: str
    text: str
    color: str
    marker: str
    slot: int
    filled: bool = True


# By row, label, place and series: value, and the ends of its line.
Points = Mapping[tuple[str, str, str, str], tuple[float, float | None, float | None]]


def dots(
    labels: Labels, places: Mapping[str, str], rows: Mapping[str, str],
    series: Sequence[Series], points: Points, logarithmic: bool = True,
) -> tuple[Figure, Any]:  # fmt: skip
    """Draw panels of dots, ``rows`` by labels; positive values on logarithmic axes."""
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
            if values and min(values) > 0 and logarithmic:
                axes.set_xscale("log")
                plain_log_ticks(axes.xaxis)
            else:
                axes.axvline(0, color=BLACK, linewidth=0.6)
                axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.set_xlabel(text.format(unit=unit), fontsize=7)
            axes.set_ylim(len(places) - 0.5, -0.5)
            axes.set_yticks(range(len(places)), list(places.values()))
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", linewidth=0.3, color=_LINE)
            for edge in range(1, len(places)):
                axes.axhline(edge - 0.5, color=_LINE, linewidth=0.5)
    for axes, label in zip(grid[0], labels, strict=True):
        axes.set_title(symbol(label))
    handles, texts = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=min(len(texts), 5))
    return figure, grid


def _of_methods(methods: Sequence[str], chosen: str) -> list[Series]:
    """One series for each method; grey crosses without a correction."""
    found = []
    for slot, name in enumerate(methods):
        i = (slot - (NONE in methods)) % len(CYCLE)
        look = (GREY, "x") if name == NONE else (CYCLE[i], MARKERS[i])
        found.append(Series(name, name + " (chosen)" * (name == chosen), *look, slot))
    return found


def comparison_figure(table: pa.Table, labels: Labels, chosen: str) -> Drawn | None:
    """Draw scatter and trend left by each method in each subset (``comparison.parquet``)."""
    table = table.filter(pc.and_(pc.equal(table["sample"], TEST), pc.is_valid(table["value"])))
    methods = ordered(table["method"].to_pylist(), (NONE,))
    places = ordered(table["subset"].to_pylist(), SUBSETS)
    known = {"mad": "scatter [{unit}]", "rms_binned": "rms of binned medians [{unit}]"}
    rows = {key: text for key, text in known.items() if key in table["statistic"].to_pylist()}
    if not rows or len(methods) < 2:
        return None
    items = table.to_pylist()
    points = {
        (r["statistic"], r["label"], r["subset"], r["method"]): (r["value"], r["low"], r["high"])
        for r in items
    }
    symbols = {name: symbol(name) for name in places}
    figure, _ = dots(labels, symbols, rows, _of_methods(methods, chosen), points)
    first = next(iter(rows))
    n = {word(r["subset"]): r["n"] for r in items if r["statistic"] == first}
    return Drawn("Methods compared", figure, {"pairs": n})


def calibration_figure(table: pa.Table, labels: Labels) -> Drawn | None:
    """Draw how many held-out pairs lie in their 68 % and 95 % intervals.

    The columns are ``label, subset, level, n, hit_rate`` and its 95 % interval, ``low, high``.
    """
    if not table.num_rows:
        return None
    items = table.to_pylist()
    places = ordered(table["subset"].to_pylist(), SUBSETS)
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
    symbols = {name: symbol(name) for name in places}
    rows = {"": "hit rate − level [% points]"}
    figure, grid = dots(labels, symbols, rows, series, points)
    for axes in grid.flat:
        for _, margin, color, _ in levels:
            for edge in (-margin, margin):
                axes.axvline(edge, color=color, linewidth=0.6, linestyle=":")
    n = {word(p): max(r["n"] for r in items if r["subset"] == p) for p in places}
    return Drawn("Are the errors right", figure, {"pairs": n})


def left_out_figure(table: pa.Table, labels: Labels, chosen: str) -> Drawn | None:
    """Draw median and scatter of every group left out and not (``generalisation.parquet``)."""
    if not table.num_rows:
        return None
    left_out = _of_methods(ordered(table["method"].to_pylist(), (NONE, chosen)), chosen)
    kept = [one._replace(name=f"{one.name} kept", text="", filled=False)
            for one in left_out if one.name != NONE]  # fmt: skip
    points: dict[Any, Any] = {}
    n: dict[str, int] = {}
    for r in table.to_pylist():
        group = group_words(r)
        n[group] = max(n.get(group, 0), r["n"])
        for statistic in ("median", "mad"):
            value, other = r[statistic], r[f"{statistic}_random"]
            key = (statistic, r["label"], group)
            ends: list[float | None] = [None, None]
            if r["method"] != NONE and value is not None and other is not None:
                ends = sorted((value, other))
                points[*key, f"{r['method']} kept"] = (other, None, None)
            if value is not None:
                points[*key, r["method"]] = (value, *ends)
    rows = {"median": "median [{unit}]", "mad": "scatter [{unit}]"}
    figure, _ = dots(labels, {group: group for group in n}, rows, [*left_out, *kept], points)
    return Drawn("Groups of pairs left out", figure, {"pairs": n})


def group_words(row: Mapping[str, Any]) -> str:
    """Name a group of pairs that was left out."""
    name = str(row["group"]).replace("<=", "≤").replace(">=", "≥").replace("-", "−")
    return f"{name} pairs" if row["split"] == "density" else name


# --- the symbolic model -------------------------------------------------------------------------

_TEFF = r"\frac{T_\mathrm{eff}}{5040\,\mathrm{K}}"
_LINE_INCHES = 0.21
_LETTERS = 92


def formula_lines(latex: str) -> list[str]:
    """Break LaTeX of a formula into lines that fit the figure, before signs and factors.

    Teff / 5040 K is written t, and parentheses keep one size, so that a line can end inside them.
    """
    latex = latex.replace(_TEFF, "t").replace(r"\left(", "(").replace(r"\right)", ")")
    lines, line, braces = [], "", 0
    for piece in re.split(r" (?=[+-] )|(?<=\\,) ", latex):
        if line and not braces and _n_letters(f"{line} {piece}") > _LETTERS:
            lines.append(line.strip().removesuffix(r"\,"))
            # An empty group before a sign makes it one between two terms.
            line = ("{}" if piece[0] in "+-" else r"\times ") + piece
        else:
            line = f"{line} {piece}".strip()
        braces += piece.count("{") - piece.count("}")
    return [*lines, line]


def _n_letters(latex: str) -> int:
    """About how many letters LaTeX shows."""
    plain = re.sub(r"\\(?:mathrm|frac)|\\,|[{}^_ ]", "", latex)
    return len(plain.replace(r"\log", "log"))


def formula_figure(
    formulas: Mapping[str, Mapping[str, Any]], labels: Labels, n_sample: int
) -> Drawn:
    """Draw the formula of every label: ``labels`` and ``n_sample`` of ``formula.json``."""
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
    """Draw the fronts of accuracy against complexity, as `formula_figure`."""
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
