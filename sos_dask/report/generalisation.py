"""What a method does where nothing like the star trained it: groups of pairs left out."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sos_dask.report.style import CYCLE, GREY, MARKERS, NAMES, Drawn, new_figure, tidy_ticks
from sos_dask.report.tables import Table
from sos_dask.report.words import NONE, UNITS, WORDS, number, ordered
from sos_dask.schema import LABELS

_SHOWN = {"median": "median", "mad": "scatter (1.4826 MAD)"}


def generalisation_figure(table: pa.Table, statistic: str, chosen: str) -> Drawn | None:
    """Median or scatter of every group of pairs, left out and not.

    Parameters
    ----------
    table : pyarrow.Table
        ``generalisation.parquet``.
    statistic : str
        ``median`` or ``mad``.
    chosen : str
        The method that corrects the catalog.

    Returns
    -------
    Drawn or None
        None without groups.
    """
    if not table.num_rows:
        return None
    rows = {(r["method"], r["label"], _group(r)): r for r in table.to_pylist()}
    groups = list(dict.fromkeys(key[2] for key in rows))
    methods = ordered(table["method"].to_pylist(), (NONE, chosen))
    figure = new_figure(0.9 + (0.1 + 0.06 * len(methods)) * len(groups))
    step = 0.76 / len(methods)
    for axes, label in zip(figure.subplots(1, len(LABELS), sharey=True), LABELS, strict=True):
        for k, method in enumerate(methods):
            found = [
                (place + (k - (len(methods) - 1) / 2) * step, rows[key])
                for place, group in enumerate(groups)
                if (key := (method, label, group)) in rows
            ]
            y = np.array([place for place, _ in found])
            left_out, at_random = (
                np.array([np.nan if r[name] is None else r[name] for _, r in found])
                for name in (statistic, f"{statistic}_random")
            )
            color = GREY if method == NONE else CYCLE[(k - 1) % len(CYCLE)]
            if method != NONE:
                axes.hlines(y, at_random, left_out, color=color, linewidth=0.8)
                axes.plot(at_random, y, linestyle="none", marker=MARKERS[k % len(MARKERS)],
                          markersize=2.8, color=color, markerfacecolor="white",
                          markeredgewidth=0.7)  # fmt: skip
            axes.plot(
                left_out, y, linestyle="none", marker="x" if method == NONE
                else MARKERS[k % len(MARKERS)], markersize=2.8, color=color,
                label=method + (" (chosen)" if method == chosen else ""),
            )  # fmt: skip
        tidy_ticks(axes)
        axes.set_yticks(range(len(groups)), groups)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        for edge in range(1, len(groups)):
            axes.axhline(edge - 0.5, color="#cccccc", linewidth=0.5)
        axes.grid(axis="x", linewidth=0.3, color="#cccccc")
        if statistic == "median":
            axes.axvline(0, color="black", linewidth=0.6)
        axes.set_xlabel(f"{statistic if statistic == 'median' else 'scatter'}: "
                        f"{NAMES[label]} [{UNITS[label]}]")  # fmt: skip
    handles, texts = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=min(len(texts), 6))
    word = _SHOWN[statistic]
    return Drawn(
        f"Groups of pairs left out: {word}",
        f"{word.capitalize()} of target minus reference in groups of pairs. Filled: after a "
        "correction that no pair of the group trained; open: after one that was trained on four "
        "fifths of all pairs, the group among them, on other pairs of the group; crosses: without "
        "a correction. The length of the line is what it costs to have no pair of the kind. Pairs "
        "left out: " + "; ".join(f"{group} {_pairs(table, group):,}" for group in groups) + ".",
        "Dots for every group of pairs, label and method: left out and not.",
        figure,
    )


def _group(row: dict[str, object]) -> str:
    name = str(row["group"]).replace("<=", "≤").replace(">=", "≥").replace("-", "−")
    return f"{name} pairs" if row["split"] == "density" else name


def _pairs(table: pa.Table, group: str) -> int:
    return max(int(r["n"]) for r in table.to_pylist() if _group(r) == group)


def generalisation_table(table: pa.Table, method: str, chosen: str) -> Table:
    """Median and scatter of one method in every group, left out and not.

    Parameters
    ----------
    table : pyarrow.Table
        ``generalisation.parquet``.
    method, chosen : str
    """
    mine = table.filter(pc.equal(table["method"], method)).to_pylist()
    before = {
        (r["split"], r["group"], r["label"]): r
        for r in table.filter(pc.equal(table["method"], NONE)).to_pylist()
    }
    rows = []
    for label in LABELS:
        for row in mine:
            if row["label"] != label:
                continue
            raw = before.get((row["split"], row["group"], label), {})
            rows.append(
                (
                    f"{WORDS[label]} [{UNITS[label]}]",
                    row["split"],
                    _group(row),
                    f"{row['n_train']:,}",
                    f"{row['n']:,}",
                    number(raw.get("median"), label, True),
                    number(row["median"], label, True),
                    number(row["median_random"], label, True),
                    number(raw.get("mad"), label),
                    number(row["mad"], label),
                    number(row["mad_random"], label),
                    f"{row['n_random']:,}",
                )
            )
    what = f"{method}, which corrects the catalog" if method == chosen else method
    return Table(
        f"Groups of pairs left out: {what}. Median and scatter (1.4826 MAD) of target minus "
        "reference in a group of pairs: without a correction, after one that no pair of the group "
        "trained (left out), and after one that other pairs of the group trained (not left out).",
        (
            "label", "split", "group left out", ">trained on", ">pairs left out",
            ">median uncorrected", ">left out", ">not left out", ">scatter uncorrected",
            ">left out", ">not left out", ">pairs not left out",
        ),
        tuple(rows),
    )  # fmt: skip
