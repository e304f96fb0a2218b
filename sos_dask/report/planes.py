"""Figures on the (Teff, log g) plane: the correction and its error, and the Kiel diagram."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from sos_dask.report.style import (
    DENSITY_MAP,
    EMPTY,
    NAMES,
    SIGNED_MAP,
    Drawn,
    axis_label,
    new_figure,
)
from sos_dask.report.words import UNITS
from sos_dask.schema import LABELS
from sos_dask.sky.healpix import FloatArray, IntArray

TEFF_BINS = (3000.0, 10000.0, 140)  # cells of 50 K
LOGG_BINS = (-0.5, 5.5, 120)  # cells of 0.05 dex
N_CELLS = TEFF_BINS[2] * LOGG_BINS[2]
LOG_QUANTUM = 1e-6
"""Logarithms are summed as whole numbers of it, so that sums do not depend on their order."""
_MIN_CELL = 5
_SHOWN = 0.9995


@dataclass(frozen=True, eq=False)
class Histogram:
    """Rows on the plane: the counts of cells, and how many rows had none.

    Parameters
    ----------
    counts : ndarray of int64, shape (N_CELLS,)
        Teff rises slowly, log g fast.
    n_outside : int
        With both labels, but beyond the bins.
    """

    counts: IntArray
    n_outside: int


def cells_of(teff: NDArray[np.float32], logg: NDArray[np.float32]) -> IntArray:
    """Cell of every row; -1 beyond the bins, -2 where a label is nan."""
    out = np.zeros(len(teff), dtype=np.int64)
    inside = np.ones(len(teff), dtype=np.bool_)
    for values, (low, high, n_bins) in ((teff, TEFF_BINS), (logg, LOGG_BINS)):
        place = np.floor((values.astype(np.float64) - low) * (n_bins / (high - low)))
        good = (place >= 0) & (place < n_bins)
        inside &= good
        out = out * n_bins + np.where(good, place, 0).astype(np.int64)
    known = np.isfinite(teff) & np.isfinite(logg)
    return np.where(inside, out, np.where(known, -1, -2))


def histogram(cells: IntArray) -> Histogram:
    """Counts of the cells that `cells_of` gave."""
    counts = np.bincount(cells[cells >= 0], minlength=N_CELLS).astype(np.int64)
    return Histogram(counts, int(np.count_nonzero(cells == -1)))


def _edges(bins: tuple[float, float, int]) -> FloatArray:
    return np.linspace(bins[0], bins[1], bins[2] + 1)


def kiel_figure(before: Histogram, after: Histogram, target: str, n_rows: int) -> Drawn | None:
    """Kiel diagram of the target before and after the correction.

    Parameters
    ----------
    before, after : Histogram
    target : str
    n_rows : int
        Rows of the catalog, with and without labels.
    """
    total = before.counts + after.counts
    if not total.any():
        return None
    shape = (TEFF_BINS[2], LOGG_BINS[2])
    teff_range, logg_range = (
        _range(total.reshape(shape).sum(axis=other), bins)
        for other, bins in ((1, TEFF_BINS), (0, LOGG_BINS))
    )
    figure = new_figure(3.5)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    norm = LogNorm(1, max(float(before.counts.max()), float(after.counts.max()), 10.0))
    image = None
    for axes, found, title in ((left, before, "before"), (right, after, "after")):
        counts = found.counts.reshape(shape).astype(np.float64).T
        image = axes.pcolormesh(
            _edges(TEFF_BINS), _edges(LOGG_BINS), np.where(counts > 0, counts, np.nan),
            norm=norm, cmap=DENSITY_MAP, rasterized=True,
        )  # fmt: skip
        axes.set_title(f"{title}: {int(found.counts.sum()):,} rows")
        axes.set_xlabel(axis_label("teff"))
    left.set_ylabel(axis_label("logg"))
    left.set_xlim(*reversed(teff_range))
    left.set_ylim(*reversed(logg_range))
    left.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    assert image is not None
    figure.colorbar(image, ax=[left, right], label="rows per cell", aspect=30, pad=0.02)
    n_known = int(before.counts.sum()) + before.n_outside
    return Drawn(
        "Kiel diagram before and after",
        f"Surface gravity against effective temperature of {target}, as observed and corrected: "
        f"rows in cells of 50 K by 0.05 dex, on one logarithmic scale. Both axes are reversed, "
        f"as usual: hot stars left, giants above. All {n_known:,} rows with both labels of "
        f"{n_rows:,}, also those that fail a quality cut; {before.n_outside:,} before and "
        f"{after.n_outside:,} after lie beyond the bins. Straight edges and stripes after the "
        "correction would be artifacts of the method or of the limits of its training pairs.",
        f"Two density maps of {target} in log g against Teff, before and after the correction.",
        figure,
    )


def _range(counts: IntArray, bins: tuple[float, float, int]) -> tuple[float, float]:
    """Limits that hold nearly all rows, and a little more."""
    share = np.cumsum(counts) / counts.sum()
    edges = _edges(bins)
    first = int(np.searchsorted(share, (1 - _SHOWN) / 2))
    last = int(np.searchsorted(share, 1 - (1 - _SHOWN) / 2))
    first, last = max(first - 2, 0), min(last + 2, bins[2] - 1)
    return float(edges[first]), float(edges[last + 1])


@dataclass(frozen=True, eq=False)
class Surface:
    """Something of each label on the cells of `Histogram`, K or dex; nan where it is not known.

    Parameters
    ----------
    values : ndarray of float64, shape (N_CELLS, 3)
    about : str
        Words for the caption.
    """

    values: FloatArray
    about: str


def plane_centres() -> tuple[FloatArray, FloatArray]:
    """Teff and log g of the centres of all cells, in their order."""
    teff, logg = (0.5 * (e[1:] + e[:-1]) for e in (_edges(TEFF_BINS), _edges(LOGG_BINS)))
    return np.repeat(teff, len(logg)), np.tile(logg, len(teff))


def correction_figure(
    planes: pa.Table,
    method: str,
    correction: Surface,
    error: Surface | None,
    target: str,
    reference: str,
) -> Drawn | None:
    """Maps of the difference before, the correction, the difference after, and the error.

    Parameters
    ----------
    planes : pyarrow.Table
        Trends on the plane, as `sos_dask.evidence.trends.trend_table` lays them out.
    method : str
    correction : Surface
        The model's prediction; it is shown where there are pairs.
    error : Surface, optional
        Of a single corrected row; without it the standard error of the median after is shown.
    target, reference : str
    """
    planes = planes.filter(pc.equal(planes["subset"], "all"))
    planes = planes.filter(pc.greater_equal(planes["n"], _MIN_CELL))
    before = planes.filter(pc.equal(planes["sample"], "before"))
    after = planes.filter(
        pc.and_(pc.equal(planes["sample"], "after"), pc.equal(planes["method"], method))
    )
    if not before.num_rows:
        return None
    covered = _covered(before)
    error_title = "error of a row" if error is not None else "error of the median"
    titles = ["difference before", "correction", "difference after", error_title]
    figure = new_figure(6.3)
    grid = figure.subplots(len(LABELS), 4, sharex=True, sharey=True, squeeze=False)
    teff, logg = _edges(TEFF_BINS), _edges(LOGG_BINS)
    shape = (TEFF_BINS[2], LOGG_BINS[2])
    for row, label in enumerate(LABELS):
        mine = before.filter(pc.equal(before["label"], label))
        size = float(np.quantile(np.abs(mine["median"].to_numpy()), 0.95)) or 1.0
        signed = Normalize(-size, size)
        left = _cells(grid[row, 0], mine, "median", signed, SIGNED_MAP)
        shown = np.where(covered, correction.values[:, row], np.nan).reshape(shape).T
        grid[row, 1].pcolormesh(teff, logg, shown, norm=signed, cmap=SIGNED_MAP, rasterized=True)
        rest = after.filter(pc.equal(after["label"], label))
        _cells(grid[row, 2], rest, "median", signed, SIGNED_MAP)
        if error is None:
            errors = rest.filter(pc.is_valid(rest["error"]))
            top = float(np.quantile(errors["error"].to_numpy(), 0.9)) if errors.num_rows else 1.0
            right = _cells(grid[row, 3], errors, "error", Normalize(0, top or 1.0), "cividis")
        else:
            values = np.where(covered, error.values[:, row], np.nan)
            known = values[np.isfinite(values)]
            low, top = np.quantile(known, (0.02, 0.98)) if len(known) else (1.0, 2.0)
            right = grid[row, 3].pcolormesh(
                teff, logg, values.reshape(shape).T, norm=LogNorm(low, max(top, 1.1 * low)),
                cmap="cividis", rasterized=True,
            )  # fmt: skip
        for image, axes in ((left, list(grid[row, :3])), (right, [grid[row, 3]])):
            is_log = isinstance(image.norm, LogNorm)
            bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=22, extend="both"
                                  if image is left or is_log else "max")  # fmt: skip
            if is_log:
                bar.locator = LogLocator(subs=(1.0, 2.0, 5.0))
                bar.formatter = FuncFormatter(lambda value, place: f"{value:g}")
                bar.minorlocator = NullLocator()
            else:
                bar.locator = MaxNLocator(4)
            bar.update_ticks()
            if image is left:
                bar.set_label(rf"$\Delta$ {NAMES[label]} [{UNITS[label]}]")
            else:
                bar.set_label(f"[{UNITS[label]}]")
        grid[row, 0].set_ylabel(axis_label("logg"))
    for axes in grid.flat:
        axes.set_facecolor(EMPTY)
    for column, title in enumerate(titles):
        grid[0, column].set_title(title)
        grid[-1, column].set_xlabel(axis_label("teff"))
    low_high = [
        (before[f"{name}_low"].to_numpy().min(), before[f"{name}_high"].to_numpy().max())
        for name in ("teff", "logg")
    ]
    grid[0, 0].set_xlim(low_high[0][1], low_high[0][0])
    grid[0, 0].set_ylim(low_high[1][1], low_high[1][0])
    grid[0, 0].xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    grid[0, 0].yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    n_before = int(pc.sum(mine["n"]).as_py())
    n_after = int(pc.sum(rest["n"]).as_py() or 0)
    error_text = (
        error.about
        if error is not None
        else "standard error of the median after, in the cells of 250 K by 0.25 dex"
    )
    return Drawn(
        f"The correction on the plane of Teff and log g: {method}",
        f"From left: median of {target} minus {reference} before the correction ({n_before:,} "
        f"pairs); the correction by {method}, {correction.about}, in cells of 50 K by 0.05 dex "
        f"where there are pairs; median after it of {n_after:,} held-out pairs; {error_text}. "
        "Differences of one label have one colour scale: where the third column is white the "
        "trend is gone, "
        f"and a pattern in the second that the first lacks is an artifact. Cells with fewer than "
        f"{_MIN_CELL} pairs are left out (grey); colours saturate at the 95th percentile.",
        "Maps in log g against Teff, a row for each of Teff, log g and [Fe/H]: the difference "
        "before, the correction, the difference after, and the error.",
        figure,
    )


def _covered(before: pa.Table) -> NDArray[np.bool_]:
    """Cells of the fine plane that lie in a coarse cell with pairs."""
    teff, logg = plane_centres()
    out = np.zeros(len(teff), dtype=np.bool_)
    names = ("teff_low", "teff_high", "logg_low", "logg_high")
    for bounds in set(zip(*(before[name].to_pylist() for name in names), strict=True)):
        out |= (teff >= bounds[0]) & (teff < bounds[1]) & (logg >= bounds[2]) & (logg < bounds[3])
    return out


def _cells(axes: Axes, table: pa.Table, value: str, norm: Normalize, cmap: str) -> QuadMesh:
    """Coarse cells as a picture; they are of equal size."""
    teff_low, logg_low, values = (
        table[name].to_numpy().astype(np.float64) for name in ("teff_low", "logg_low", value)
    )
    teff_high, logg_high = table["teff_high"].to_numpy(), table["logg_high"].to_numpy()
    x = np.unique(np.concatenate([teff_low, teff_high])) if len(values) else np.array([0.0, 1.0])
    y = np.unique(np.concatenate([logg_low, logg_high])) if len(values) else np.array([0.0, 1.0])
    picture = np.full((len(y) - 1, len(x) - 1), np.nan)
    picture[np.searchsorted(y, logg_low), np.searchsorted(x, teff_low)] = values
    return axes.pcolormesh(x, y, picture, norm=norm, cmap=cmap, rasterized=True)
