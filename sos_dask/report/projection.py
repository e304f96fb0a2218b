"""All parameters in one plane: the catalog, the overlap, and what each says of coverage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from sos_dask.report.style import DENSITY_MAP, EMPTY, Drawn, new_figure
from sos_dask.report.tables import Table
from sos_dask.sky.healpix import FloatArray, IntArray

MAX_BINS = 64
"""Most cells along an axis: with more of them too many hold no pair by chance alone."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Cells of the plane, and the coarse ones in which coverage is judged.

    Parameters
    ----------
    limits : tuple of 4 float
        Low and high along each axis.
    bins : int
        Cells along each axis.
    """

    limits: tuple[float, float, float, float]
    bins: int

    @property
    def group(self) -> int:
        """Cells along each side of a coarse cell."""
        return -(-self.bins // MAX_BINS)

    @property
    def coarse(self) -> int:
        """Coarse cells along each axis."""
        return -(-self.bins // self.group)

    def cells(self, first: NDArray[np.floating], second: NDArray[np.floating]) -> IntArray:
        """Coarse cell of each place; -1 beyond the limits or where a coordinate is nan.

        Parameters
        ----------
        first, second : ndarray of float, shape (n,)
        """
        out = np.zeros(len(first), dtype=np.int64)
        inside = np.ones(len(first), dtype=np.bool_)
        for values, low, high in (
            (first, *self.limits[:2]),
            (second, *self.limits[2:]),
        ):
            place = np.floor((values.astype(np.float64) - low) * (self.bins / (high - low)))
            good = (place >= 0) & (place < self.bins)
            inside &= good
            out = out * self.coarse + np.where(good, place, 0).astype(np.int64) // self.group
        return np.where(inside, out, -1)

    def edges(self, group: int = 1) -> tuple[FloatArray, FloatArray]:
        """Edges along each axis of the cells, or of every ``group`` of them."""
        steps = group * np.arange(-(-self.bins // group) + 1, dtype=np.float64) / self.bins
        low, high, bottom, top = self.limits
        return low + (high - low) * steps, bottom + (top - bottom) * steps

    def coarsened(self, maps: pa.Table, column: str) -> IntArray:
        """Counts of ``maps.parquet`` in the coarse cells, shape (coarse**2,)."""
        first, second = (
            maps[f"cell_{i}"].to_numpy().astype(np.int64) // self.group for i in (1, 2)
        )
        cells = first * self.coarse + second
        counts = np.zeros(self.coarse**2, dtype=np.int64)
        np.add.at(counts, cells, maps[column].to_numpy())
        return counts


def projection_figure(
    maps: pa.Table,
    grid: Grid,
    joined: tuple[IntArray, IntArray] | None,
    parameters: tuple[str, ...],
    n_without: int,
    n_not_asked: int = 0,
) -> Drawn | None:
    """Density of the catalog and of the overlap in one plane, and the share outside coverage.

    Parameters
    ----------
    maps : pyarrow.Table
        ``maps.parquet`` of the stage projection.
    grid : Grid
    joined : tuple of ndarray of int64, shape (grid.coarse**2,), optional
        Scored rows of each coarse cell, and those of them that lie outside the coverage.
    parameters : tuple of str
        What the plane was made of.
    n_without : int
        Rows without a place in it, because they lack a parameter.
    n_not_asked : int
        Rows beyond the share that was to be placed.
    """
    n = {name: int(np.sum(maps[f"n_{name}"].to_numpy())) for name in ("target", "overlap")}
    if not n["target"]:
        return None
    figure = new_figure(2.75 if joined is not None else 3.7)
    panels = figure.subplots(1, 3 if joined is not None else 2, sharex=True, sharey=True)
    first, second = grid.edges()
    for axes, (name, count) in zip(panels, n.items(), strict=False):
        picture = np.full((grid.bins, grid.bins), np.nan)
        counts = maps[f"n_{name}"].to_numpy().astype(np.float64)
        picture[maps["cell_2"].to_numpy(), maps["cell_1"].to_numpy()] = np.where(
            counts > 0, counts, np.nan
        )
        image = axes.pcolormesh(first, second, picture, norm=LogNorm(1, max(counts.max(), 2)),
                                cmap=DENSITY_MAP, rasterized=True)  # fmt: skip
        whole = "sample of the catalog" if n_not_asked else "full catalog"
        words = whole if name == "target" else "overlap"
        axes.set_title(f"{words}: {count:,} {'rows' if name == 'target' else 'pairs'}", fontsize=7)
        figure.colorbar(image, ax=axes, location="bottom", aspect=22, label="number per cell")
    third = ""
    if joined is not None:
        known, outside = joined
        share = np.full(len(known), np.nan)
        np.divide(100.0 * outside, known, out=share, where=known > 0)
        image = panels[2].pcolormesh(
            *grid.edges(grid.group),
            share.reshape(grid.coarse, grid.coarse).T,
            norm=PowerNorm(0.5, 0, 100),
            cmap="cividis",
            rasterized=True,
        )
        panels[2].set_title("outside the coverage", fontsize=7)
        bar = figure.colorbar(image, ax=panels[2], location="bottom", aspect=22,
                              label="rows of the cell [%]", ticks=(0, 5, 25, 50, 100))  # fmt: skip
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        third = (
            f"; right: share of rows outside the coverage, in cells {grid.group} times as wide, "
            f"on a scale stretched near zero ({int(known.sum()):,} scored rows)"
        )
    drawn = n["target"] + n_without
    sampled = (
        f" Drawn is a sample of {100 * drawn / (drawn + n_not_asked):.3g} % of the catalog."
        if n_not_asked
        else ""
    )
    for axes in panels:
        axes.set_facecolor(EMPTY)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("UMAP 1")
    panels[0].set_ylabel("UMAP 2")
    return Drawn(
        "Catalog and overlap in one plane",
        f"UMAP (McInnes et al. 2018) lays rows that are alike in {len(parameters)} parameters ("
        + ", ".join(parameters)
        + ") beside each other; its axes have no unit. Left and middle: rows of the catalog and "
        f"pairs with a reference in the same cells, logarithmic; grey: none{third}. "
        f"{n_without:,} rows lack a parameter and have no place.{sampled}",
        "Density maps of the catalog and of the overlap in the plane of UMAP, and the share of "
        "rows outside the coverage.",
        figure,
    )


def agreement(overlap: IntArray, joined: tuple[IntArray, IntArray]) -> Table | None:
    """Whether a cell without a pair and the coverage say the same of a row.

    Parameters
    ----------
    overlap : ndarray of int64, shape (n,)
        Pairs in each coarse cell.
    joined : tuple of ndarray of int64, shape (n,)
        Scored rows of each cell, and those of them outside.

    Returns
    -------
    Table or None
        Two by two, with how many rows agree; None without rows.
    """
    known, outside = joined
    n = int(known.sum())
    if not n:
        return None
    counts = np.array(
        [
            [int((known - outside)[chosen].sum()), int(outside[chosen].sum())]
            for chosen in (overlap > 0, overlap == 0)
        ]
    )
    agree = (counts[0, 0] + counts[1, 1]) / n
    by_chance = float(counts.sum(axis=0) @ counts.sum(axis=1)) / n**2
    rows = [
        (name, *(f"{value:,}" for value in (*row, row.sum())))
        for name, row in (
            ("cell with pairs", counts[0]),
            ("cell without a pair", counts[1]),
            ("all", counts.sum(axis=0)),
        )
    ]
    return Table(
        f"Do the plane and the coverage agree? Of {n:,} rows with a place in the plane and a "
        f"coverage {100 * agree:.1f} % get the same answer: covered by both or by neither. Two "
        "answers as frequent as these that know nothing of each other would agree for "
        f"{100 * by_chance:.1f} %. The plane weighs all parameters alike, the coverage is measured "
        "in those that the correction depends on; it is the coverage that makes the flag.",
        ("", ">inside or sparse", ">outside the coverage", ">all"),
        tuple(rows),
    )
