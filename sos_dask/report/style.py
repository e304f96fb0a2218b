"""How figures look, and how they become files: the same figure always gives the same bytes.

Sizes are those of a journal with two columns (width 7.1 inches over both), colours are told apart
by colour-blind readers (Okabe & Ito 2008, Color Universal Design) and in grey print.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sos_dask.report.words import UNITS

WIDTH = 7.1
DPI = 180
BLACK, GREY = "#000000", "#777777"
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "D", "^", "v", "P")
EMPTY = "#e3e3e3"  # no data, where white means zero
DENSITY_MAP, SIGNED_MAP = "viridis", "RdBu_r"

NAMES = {
    "teff": r"$T_\mathrm{eff}$",
    "logg": r"$\log\,g$",
    "feh": "[Fe/H]",
    "snr": "S/N",
    "phot_g_mean_mag": r"$G$",
    "ebv": r"$E(B-V)$",
    "bp_rp": r"$G_\mathrm{BP}-G_\mathrm{RP}$",
}
AXIS_UNITS = {**UNITS, "phot_g_mean_mag": "mag", "ebv": "mag", "bp_rp": "mag"}

_RC: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.direction": "in",
    "ytick.direction": "in",
    "xtick.top": True,
    "ytick.right": True,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 3,
    "mathtext.fontset": "dejavusans",
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "pdf.fonttype": 42,  # text stays text, as journals ask
    "image.interpolation": "nearest",
}
_DRAWING = threading.Lock()  # settings and the parser of formulas belong to the whole process


@dataclass(frozen=True)
class Drawn:
    """A figure and what is said of it.

    Parameters
    ----------
    title : str
    caption : str
        What it shows, how to read it, of how many.
    alt : str
        What it shows, in a sentence, for those who do not see it.
    figure : Figure
    """

    title: str
    caption: str
    alt: str
    figure: Figure


@dataclass(frozen=True)
class Rendered:
    """A figure as files.

    Parameters
    ----------
    title, caption, alt : str
        As in `Drawn`.
    png, pdf : bytes
    """

    title: str
    caption: str
    alt: str
    png: bytes
    pdf: bytes


def render(draw: Callable[[], Drawn | None]) -> Rendered | None:
    """Draw a figure in the style of this module and make its files.

    Parameters
    ----------
    draw : callable
        Gives the figure, or None where there is nothing to show.

    Returns
    -------
    Rendered or None
        Without dates or versions in it: the same figure gives the same bytes.
    """
    with _DRAWING, mpl.rc_context():
        mpl.rcdefaults()  # what a user has set for own plots plays no part
        mpl.rcParams.update(_RC)
        drawn = draw()
        if drawn is None:
            return None
        png, pdf = io.BytesIO(), io.BytesIO()
        drawn.figure.savefig(
            png, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True}
        )
        nothing = {"CreationDate": None, "Creator": None, "Producer": None}
        drawn.figure.savefig(pdf, format="pdf", metadata=nothing)
        return Rendered(drawn.title, drawn.caption, drawn.alt, png.getvalue(), pdf.getvalue())


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, inches."""
    return Figure(figsize=(width, height), layout="constrained")


def axis_label(name: str) -> str:
    """A quantity with its unit, for an axis."""
    unit = AXIS_UNITS.get(name, "")
    return NAMES.get(name, name) + (f" [{unit}]" if unit else "")


def typeset(subset: str) -> str:
    """A part of the parameter space, for an axis."""
    first, _, rest = subset.partition(" ")
    return f"{NAMES.get(first, first)} {rest}".strip().replace("-", "−").replace("snr", "S/N")


def tidy_ticks(axes: Axes, n_x: int = 4, n_y: int = 4) -> None:
    """Few ticks, so that their labels never touch."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(n_x, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(n_y, steps=[1, 2, 2.5, 5, 10]))


def plain_log_ticks(axes: Axes) -> None:
    """Plain numbers at 1, 2 and 5 of each decade, or at the decades of a wide horizontal axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def robust_limits(
    low: NDArray[np.floating], high: NDArray[np.floating], beyond: float = 0.06
) -> tuple[float, float]:
    """Limits of an axis that hold zero and all bands but the share ``beyond`` on either side."""
    low, high = low[np.isfinite(low)], high[np.isfinite(high)]
    if not len(low):
        return -1.0, 1.0
    bottom = min(float(np.quantile(low, beyond)), 0.0)
    top = max(float(np.quantile(high, 1 - beyond)), 0.0)
    margin = 0.12 * (top - bottom) or 1.0
    return bottom - margin, top + margin
