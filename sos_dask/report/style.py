"""How figures and numbers look: one style for all, and the same figure always gives the same bytes.

Sizes are those of a journal with two columns (width 7.1 inches over both), colours are told apart
by colour-blind readers (Okabe & Ito 2008, Color Universal Design) and in grey print.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Labels = Mapping[str, str]
"""Units of the labels of a problem by their names, in its order."""

WIDTH = 7.1
DPI = 180
BLACK, GREY = "#000000", "#777777"
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("s", "D", "^", "v", "P", "o")
EMPTY = "#e3e3e3"  # no data, where white means zero
DENSITY_MAP, SIGNED_MAP, SHARE_MAP = "viridis", "RdBu_r", "cividis"

_WORDS = {"teff": "Teff", "logg": "log g", "feh": "[Fe/H]", "rv": "RV", "snr": "S/N",
          "phot_g_mean_mag": "G", "ebv": "E(B-V)", "bp_rp": "BP-RP"}  # fmt: skip
_SYMBOLS = _WORDS | {
    "teff": r"$T_\mathrm{eff}$", "logg": r"$\log\,g$", "phot_g_mean_mag": r"$G$",
    "ebv": r"$E(B-V)$", "bp_rp": r"$G_\mathrm{BP}-G_\mathrm{RP}$",
}  # fmt: skip
_UNITS = {"teff": "K", "logg": "dex", "feh": "dex", "rv": "km/s",
          "phot_g_mean_mag": "mag", "ebv": "mag", "bp_rp": "mag"}  # fmt: skip
_DIGITS = {"K": 1, "km/s": 2}

_RC: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 8,
    "axes.labelsize": 8, "axes.titlesize": 8, "axes.linewidth": 0.7, "axes.axisbelow": True,
    "axes.unicode_minus": True, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "xtick.direction": "in", "ytick.direction": "in", "xtick.top": True, "ytick.right": True,
    "legend.fontsize": 7, "legend.frameon": False, "lines.linewidth": 1.1, "lines.markersize": 3,
    "mathtext.fontset": "dejavusans", "figure.dpi": DPI, "savefig.dpi": DPI,
    "pdf.fonttype": 42,  # text stays text, as journals ask
    "image.interpolation": "nearest",
}  # fmt: skip
_DRAWING = threading.Lock()  # settings and the parser of formulas belong to the whole process


@dataclass(frozen=True)
class Drawn:
    """A figure and what its caption says.

    ``facts``: JSON values, by the names that the caption in the template of the page gives them.
    """

    title: str
    figure: Figure
    facts: Mapping[str, Any]


class Rendered(NamedTuple):
    """A figure as files; title and facts as in `Drawn`."""

    title: str
    facts: Mapping[str, Any]
    png: bytes
    pdf: bytes


def render(draw: Callable[[], Drawn | None]) -> Rendered | None:
    """Draw a figure in the style of this module and make its files; None where there is none.

    They are without dates or versions: the same figure gives the same bytes.
    """
    with _DRAWING, mpl.rc_context():
        mpl.rcdefaults()  # what a user has set for own plots plays no part
        mpl.rcParams.update(_RC)
        drawn = draw()
        if drawn is None:
            return None
        png, pdf = io.BytesIO(), io.BytesIO()
        drawn.figure.savefig(png, format="png", metadata={"Software": None})
        drawn.figure.set_layout_engine("none")  # its places stay as they are
        nothing = dict.fromkeys(("CreationDate", "Creator", "Producer"))
        drawn.figure.savefig(pdf, format="pdf", metadata=nothing)
        return Rendered(drawn.title, drawn.facts, png.getvalue(), pdf.getvalue())


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """Make an empty figure; inches."""
    return Figure(figsize=(width, height), layout="constrained")


def share_of_width(n_columns: int) -> float:
    """Width in inches of a figure with so many columns of panels; three and more fill the page."""
    return WIDTH * min(1.0, 0.1 + 0.3 * n_columns)


def symbol(name: str) -> str:
    """Typeset the name of a quantity, or of a part of the parameter space such as ``feh < -2``."""
    return _named(name, _SYMBOLS)


def word(name: str) -> str:
    """Name a quantity, or a part of the parameter space, as a person does: ``log g < 1``."""
    return _named(name, _WORDS)


def _named(name: str, names: Mapping[str, str]) -> str:
    first, _, rest = name.partition(" ")
    rest = re.sub(r"(?<=\d)-", "–", rest)  # a range
    return f"{names.get(first, first)} {rest}".strip().replace("-", "−").replace("snr", "S/N")


def axis_label(name: str, unit: str | None = None) -> str:
    """Name a quantity with its unit, for an axis."""
    unit = _UNITS.get(name, "") if unit is None else unit
    return symbol(name) + (f" [{unit}]" if unit else "")


def listed(names: Iterable[str]) -> str:
    """Write names as a person does: ``Teff, log g and [Fe/H]``."""
    *first, last = map(word, names)
    return f"{', '.join(first)} and {last}" if first else last


def number(value: float | None, unit: str, sign: bool = False) -> str:
    """Write a value with the digits that mean something; a dash where there is none."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{_DIGITS.get(unit, 4)}f}".replace("-", "−")


def readable(text: str) -> str:
    """Name columns in a text of a manifest as a person does: ``log g`` for ``logg``."""
    return re.sub(r"\b(teff|logg|feh|snr)\b", lambda found: _WORDS[found[1]], text)


def percent(part: int, whole: int) -> str:
    """Format a percentage; non-zero shares never print as 0.0 %."""
    if not whole:
        return "–"
    return "<0.1 %" if 0 < part < 0.0005 * whole else f"{100 * part / whole:.1f} %"


def ordered(found: Iterable[str], first: Iterable[str]) -> list[str]:
    """Sort names: those of ``first`` that are there, then the others as found."""
    names = list(dict.fromkeys(found))
    return [*(n for n in first if n in names), *(n for n in names if n not in first)]


def tidy_ticks(axes: Axes, n_x: int = 4, n_y: int = 4) -> None:
    """Few ticks, so that their labels never touch."""
    axes.xaxis.set_major_locator(MaxNLocator(n_x, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(n_y, steps=[1, 2, 2.5, 5, 10]))


def plain_log_ticks(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 of each decade, or at the decades of a wide axis."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 50 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def robust_limits(low: Any, high: Any, beyond: float = 0.06) -> tuple[float, float]:
    """Limits of an axis that contain zero and all bands but the share ``beyond`` on either side."""
    low, high = low[np.isfinite(low)], high[np.isfinite(high)]
    if not len(low):
        return -1.0, 1.0
    bottom = min(float(np.quantile(low, beyond)), 0.0)
    top = max(float(np.quantile(high, 1 - beyond)), 0.0)
    margin = 0.12 * (top - bottom) or 1.0
    return bottom - margin, top + margin
