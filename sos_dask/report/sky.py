"""Sky maps: rows by HEALPix cell, and their densities in the projection of Mollweide."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from sos_dask.report.style import BLACK, DENSITY_MAP, VERMILLION, WIDTH, Drawn, new_figure
from sos_dask.sky.healpix import MAX_ORDER, FloatArray, IntArray, ang2pix

ORDER = 6  # cells of 0.92 degrees
N_CELLS = 12 << (2 * ORDER)
COARSEST = 3
_ROWS_A_CELL = 4.0
_CENTRE_DEG = 180.0
_PIXELS = 900
# North galactic pole and the galactic longitude of the north celestial pole, degrees, ICRS:
# The Hipparcos and Tycho Catalogues (ESA SP-1200, 1997), vol. 1, section 1.5.3.
_POLE_RA, _POLE_DEC, _NODE = 192.85948, 27.12825, 122.93192


def cell_counts(healpix29: NDArray[np.int64]) -> tuple[IntArray, IntArray]:
    """Cells of order `ORDER` (nested) that hold rows, and how many each.

    Parameters
    ----------
    healpix29 : ndarray of int64, shape (n,)
    """
    cells = healpix29 >> (2 * (MAX_ORDER - ORDER))
    if not len(cells):
        return cells, cells
    first = int(cells.min())
    counts = np.bincount(cells - first)
    filled = np.flatnonzero(counts)
    return filled + first, counts[filled].astype(np.int64)


def sky_figure(maps: Mapping[str, IntArray]) -> Drawn | None:
    """Density of each catalog on the sky.

    Parameters
    ----------
    maps : mapping of str to ndarray of int64, shape (12 * 4**ORDER,)
        Rows a cell of order `ORDER`, by what to call the catalog.

    Returns
    -------
    Drawn or None
        None where no map has rows.
    """
    maps = {name: counts for name, counts in maps.items() if counts.any()}
    if not maps:
        return None
    order = min(_order(counts) for counts in maps.values())
    area = 41252.961 / (12 << (2 * order))  # square degrees
    densities = {
        name: counts.reshape(-1, 1 << (2 * (ORDER - order))).sum(axis=1) / area
        for name, counts in maps.items()
    }
    values = np.concatenate([density[density > 0] for density in densities.values()])
    norm = LogNorm(float(values.min()), float(max(values.max(), 2 * values.min())))
    n_columns = 1 if len(maps) == 1 else 2
    n_rows = -(-len(maps) // n_columns)
    figure = new_figure(0.55 + 1.95 * n_rows * (2 / n_columns), WIDTH)
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    image = None
    for axes, (name, density) in zip(grid.flat, densities.items(), strict=False):
        image = draw_map(axes, np.where(density > 0, density, np.nan), order, norm, DENSITY_MAP)
        axes.set_title(f"{name} ({int(maps[name].sum()):,} rows)")
    for axes in list(grid.flat)[len(maps) :]:
        axes.set_axis_off()
    assert image is not None
    bar = figure.colorbar(
        image, ax=grid, orientation="horizontal", shrink=0.6, aspect=40, fraction=0.05, pad=0.03
    )
    bar.set_label("rows per square degree")
    counts_text = "; ".join(f"{name}: {int(counts.sum()):,} rows" for name, counts in maps.items())
    return Drawn(
        "Density of the catalogs on the sky",
        "Rows per square degree in HEALPix cells of order "
        f"{order} ({np.sqrt(area):.1f}° wide), all panels on one logarithmic scale; white: none. "
        "Equatorial coordinates (ICRS), Mollweide's equal-area projection, right ascension grows "
        "to the left, lines every 60° and 30°; the orange line is the galactic plane. A pair is a "
        f"star that target and reference share. {counts_text}.",
        "Maps of the sky in Mollweide's projection, with the density of rows of "
        + ", ".join(maps)
        + ".",
        figure,
    )


def _order(counts: IntArray) -> int:
    """Finest order at which filled cells hold a few rows on average."""
    for order in range(ORDER, COARSEST, -1):
        coarse = counts.reshape(-1, 1 << (2 * (ORDER - order))).sum(axis=1)
        if coarse.sum() >= _ROWS_A_CELL * np.count_nonzero(coarse):
            return order
    return COARSEST


def draw_map(
    axes: Axes, values: FloatArray, order: int, norm: Normalize, cmap: str, *, names: bool = True
) -> AxesImage:
    """One map: every point of the picture looks up its cell.

    Parameters
    ----------
    axes : Axes
    values : ndarray of float64, shape (12 * 4**order,)
        Of the cells (nested); nan: left white.
    order : int
    norm : Normalize
    cmap : str
    names : bool
        Whether right ascensions and declinations are written at the lines.
    """
    root = np.sqrt(2.0)
    x, y = np.meshgrid(
        np.linspace(-2 * root, 2 * root, _PIXELS), np.linspace(-root, root, _PIXELS // 2)
    )
    inside = (x / 2) ** 2 + y**2 < 2
    picture = np.full(x.shape, np.nan)
    ra, dec = unproject(x[inside], y[inside])
    picture[inside] = values[ang2pix(ra % 360.0, dec, order)]
    image = axes.imshow(
        picture,
        extent=(-2 * root, 2 * root, -root, root),
        origin="lower",
        cmap=cmap,
        norm=norm,
        interpolation="nearest",
    )
    for dec_deg in range(-60, 61, 30):
        _line(axes, np.linspace(0.01, 359.99, 181), np.full(181, float(dec_deg)))
        if dec_deg and names:
            edge_x, edge_y = project(np.array([359.9]), np.array([float(dec_deg)]))
            axes.text(
                edge_x[0] - 0.06, edge_y[0], f"{dec_deg:+d}°".replace("-", "−"),
                ha="right", va="center", fontsize=6,
            )  # fmt: skip
    for ra_deg in range(60, 301, 60):
        _line(axes, np.full(121, float(ra_deg)), np.linspace(-90, 90, 121))
        if not names:
            continue
        text_x, text_y = project(np.array([float(ra_deg)]), np.array([0.0]))
        axes.text(
            text_x[0],
            text_y[0],
            f"{ra_deg}°",
            ha="center",
            va="center",
            fontsize=6,
            path_effects=[withStroke(linewidth=1.6, foreground="white")],
        )
    _line(axes, *galactic_plane(), VERMILLION, 0.9)
    angle = np.linspace(0, 2 * np.pi, 361)
    axes.plot(2 * root * np.cos(angle), root * np.sin(angle), color=BLACK, linewidth=0.7)
    axes.set_xlim(-2 * root - 0.3, 2 * root + 0.05)
    axes.set_ylim(-root - 0.03, root + 0.03)
    axes.set_axis_off()
    return image


def galactic_plane() -> tuple[FloatArray, FloatArray]:
    """Right ascension and declination of the galactic equator, degrees, by right ascension."""
    longitude = np.deg2rad(_NODE - np.linspace(0, 360, 721))
    pole = np.deg2rad(_POLE_DEC)
    dec = np.arcsin(np.cos(pole) * np.cos(longitude))
    turn = np.arctan2(np.sin(longitude), -np.sin(pole) * np.cos(longitude))
    ra = (_POLE_RA + np.rad2deg(turn)) % 360
    order = np.argsort(ra, kind="stable")
    return ra[order], np.rad2deg(dec[order])


def unproject(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Inverse of `project` (Snyder 1987, eqs. 31-5 to 31-7), degrees."""
    theta = np.arcsin(np.clip(y / np.sqrt(2), -1, 1))
    dec = np.arcsin(np.clip((2 * theta + np.sin(2 * theta)) / np.pi, -1, 1))
    ra = _CENTRE_DEG - np.rad2deg(np.pi * x / (2 * np.sqrt(2) * np.cos(theta)))
    return ra, np.rad2deg(dec)


def project(ra: FloatArray, dec: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mollweide's projection, right ascension growing to the left.

    Snyder 1987, Map Projections: A Working Manual (USGS Professional Paper 1395), eqs. 31-1 to
    31-4, for a sphere of radius 1.

    Parameters
    ----------
    ra, dec : ndarray of float64, deg

    Returns
    -------
    x, y : ndarray of float64
        Within the ellipse of half axes 2 sqrt(2) and sqrt(2).
    """
    phi = np.deg2rad(dec)
    theta = phi.copy()
    for _ in range(50):
        slope = 2 + 2 * np.cos(2 * theta)
        step = (2 * theta + np.sin(2 * theta) - np.pi * np.sin(phi)) / np.maximum(slope, 1e-9)
        theta = np.clip(theta - step, -np.pi / 2, np.pi / 2)
    x = 2 * np.sqrt(2) / np.pi * np.deg2rad(_CENTRE_DEG - ra) * np.cos(theta)
    return x, np.sqrt(2) * np.sin(theta)


def _line(
    axes: Axes, ra: FloatArray, dec: FloatArray, color: str = "#999999", width: float = 0.35
) -> None:
    x, y = project(ra, dec)
    axes.plot(x, y, color=color, linewidth=width)
