"""Figures of the symbolic model: its formulas, and the fronts they were chosen from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sos_dask.report.style import BLUE, NAMES, VERMILLION, WIDTH, Drawn, new_figure, tidy_ticks
from sos_dask.report.words import UNITS, WORDS
from sos_dask.schema import LABELS

_TEFF = r"\frac{T_\mathrm{eff}}{5040\,\mathrm{K}}"
_LINE = 92
_LINE_INCHES = 0.21


def formula_lines(latex: str, width: int = _LINE) -> list[str]:
    """LaTeX of a formula in lines that fit a page, broken before signs and factors.

    Teff / 5040 K is written t, and parentheses keep one size, so that a line can end inside them;
    it ends where parentheses are least deep, rather before a sign than before a factor.

    Parameters
    ----------
    latex : str
    width : int
        Letters of a line, about.
    """
    rest = latex.replace(_TEFF, "t").replace(r"\left(", "(").replace(r"\right)", ")")
    lines = []
    while _shown(rest) > width:
        places = [
            (depth + (sign == ""), -at, sign)
            for at, depth, sign in _breaks(rest)
            if 0.6 * width <= _shown(rest[:at]) <= width
        ]
        if not places:
            break
        _, place, sign = min(places)
        lines.append(rest[:-place].strip().removesuffix(r"\,"))
        # An empty group before a sign makes it one between two terms.
        rest = ("{}" if sign else r"\times ") + rest[-place:].strip()
    return [*lines, rest]


def _breaks(latex: str) -> Iterator[tuple[int, int, str]]:
    """Where a line may end: place, depth in parentheses, and the sign that follows."""
    braces = depth = 0
    for match in re.finditer(r"[{}()]| (?=([+-]) )|(?<=\\,) ", latex):
        if match[0] in "{}":
            braces += 1 if match[0] == "{" else -1
        elif match[0] in "()":
            depth += 1 if match[0] == "(" else -1
        elif not braces and match.start():
            yield match.end(), depth, match[1] or ""


def _shown(latex: str) -> int:
    """About how many letters LaTeX shows."""
    plain = re.sub(r"\\(?:mathrm|frac)|\\,|[{}^_ ]", "", latex)
    return len(plain.replace(r"\log", "log"))


def formula_figure(labels: Mapping[str, Mapping[str, Any]], n_sample: int) -> Drawn:
    """The formula of every label.

    Parameters
    ----------
    labels : mapping
        ``labels`` of the model's ``formula.json``.
    n_sample : int
        Pairs that the formulas were searched with.
    """
    blocks = {label: formula_lines(str(labels[label]["latex"])) for label in LABELS}
    n_lines = sum(map(len, blocks.values())) + 0.5 * len(blocks)
    figure = new_figure(_LINE_INCHES * n_lines + 0.1, WIDTH)
    figure.set_layout_engine("none")
    height = 1.0 / (n_lines + 0.4)
    y = 1.0 - height
    for label, lines in blocks.items():
        name = NAMES[label].strip("$") if "$" in NAMES[label] else rf"\mathrm{{{NAMES[label]}}}"
        figure.text(0.005, y, rf"$\Delta {name} =$", va="center", fontsize=8)
        for line in lines:
            figure.text(0.085, y, f"${line}$", va="center", fontsize=7.5)
            y -= height
        y -= 0.5 * height
    complexities = ", ".join(f"{WORDS[label]} {labels[label]['complexity']}" for label in LABELS)
    return Drawn(
        "Formulas of the symbolic model",
        "Predicted target − reference in K, dex and dex, with t = Teff / 5040 K of the target; "
        "numbers are fitted to all training pairs. Complexity (numbers, quantities and "
        f"operators): {complexities}. The formulas were searched with {n_sample:,} pairs. The text "
        "below can be copied into Python or SymPy.",
        "The three formulas, typeset; their text follows the figure.",
        figure,
    )


def front_figure(labels: Mapping[str, Mapping[str, Any]], n_sample: int) -> Drawn:
    """The fronts of accuracy against complexity.

    Parameters
    ----------
    labels, n_sample
        As for `formula_figure`.
    """
    figure = new_figure(2.3)
    for axes, label in zip(figure.subplots(1, len(LABELS)), LABELS, strict=True):
        _front(axes, labels[label], label)
    figure.axes[0].set_ylabel("loss (judging half)")
    return Drawn(
        "Accuracy against complexity of formulas",
        "Every dot is a formula better than all simpler ones: its mean loss (bisquare, 0 is "
        "perfect) on the half of the sample that did not evolve it, with one standard error of the "
        "difference from the best; beside it its scatter (1.4826 MAD). The diamond is the formula "
        "taken: the simplest that loses to the best by no more than the stated standard errors. "
        f"{n_sample // 2:,} pairs judge.",
        "Three panels of loss against complexity for Teff, log g and [Fe/H]; one formula of each "
        "is marked.",
        figure,
    )


def _front(axes: Axes, entry: Mapping[str, Any], label: str) -> None:
    front, chosen = entry["front"], int(entry["chosen"])
    x = np.array([item["complexity"] for item in front], dtype=np.float64)
    loss, error = (np.array([item[key] for item in front]) for key in ("loss", "standard_error"))
    axes.errorbar(x, loss, error, color=BLUE, marker="o", elinewidth=0.8, linewidth=0.9)
    axes.plot(x[chosen], loss[chosen], marker="D", markersize=7, markerfacecolor="none",
              markeredgecolor=VERMILLION, markeredgewidth=1.4, linestyle="none")  # fmt: skip
    digits = 0 if label == "teff" else 3
    for place, side in ((0, "left"), (chosen, "right")):
        axes.annotate(
            f"{front[place]['scatter']:.{digits}f} {UNITS[label]}",
            (x[place], loss[place]),
            xytext=(5, 3) if side == "left" else (4, 8),
            textcoords="offset points",
            fontsize=6.5,
            ha=side,
        )
    axes.set_title(NAMES[label])
    axes.set_xlabel("complexity")
    axes.set_ylim(0, 1.15 * float(loss.max()))
    axes.margins(x=0.12)
    tidy_ticks(axes)
