"""Maps: the sky, Teff and log g (kiel), coverage and its error growth, all parameters in a plane.

Figures are made of counts in cells or of a table of a product; None where there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from sos_dask.columns import FloatArray, IntArray
from sos_dask.evidence.widening import CLASSES
from sos_dask.report.figures import select
from sos_dask.report.style import (
    BLACK,
    BLUE,
    DENSITY_MAP,
    EMPTY,
    GREY,
    SHARE_MAP,
    SIGNED_MAP,
    VERMILLION,
    Drawn,
    Labels,
    axis_label,
    new_figure,
    plain_log_ticks,
    share_of_width,
    tidy_ticks,
)
from sos_dask.sky.healpix import ang2pix

ORDER = 6  # HEALPix cells of 0.92 degrees
N_SKY = 12 << (2 * ORDER)
_COARSEST = 3
_ROWS_A_CELL = 4.0
_CENTRE_DEG = 180.0
_STEPS = 1400  # of the picture along the equator

_TEFF = (3000.0, 10000.0, 140)  # cells of 50 K
_LOGG = (-0.5, 5.5, 120)  # cells of 0.05 dex
_SHAPE = (_TEFF[2], _LOGG[2])
N_CELLS = _SHAPE[0] * _SHAPE[1]
LOG_QUANTUM = 1e-6
"""Logarithms are summed as whole numbers of it, so that sums do not depend on their order."""
_SCATTER = (-2.0, 3.0, 51)  # of radial velocities: edges of cells of 0.1 in the logarithm
_MOST_ROWS = 40  # of a star; more count as so many
_VELOCITIES = _MOST_ROWS + 1, _SCATTER[2] - 1
N_VELOCITY = _VELOCITIES[0] * _VELOCITIES[1]
_ERRORS = (-4.0, 4.0, 400)  # cells of 2 % in the logarithm: 4.7 % in the error
N_ERRORS = _ERRORS[2]
# Most cells along an axis: with more of them too many contain no pair by chance alone.
_MAX_BINS = 64
_MIN_CELL = 5
_RATIO = 3.0
_BINS_A_DECADE = 8
_Mesh = tuple[FloatArray, FloatArray, FloatArray]  # edges along each axis, picture


# --- counts -------------------------------------------------------------------------------------


def _cells_2d(
    places: Sequence[NDArray[np.floating]], limits: Sequence[float], shape: Sequence[int]
) -> IntArray:
    """Cell of every place, the first coordinate slowest; -1 beyond the limits or where one is nan.

    ``limits``: low and high along each axis.
    """
    out = np.zeros(len(places[0]), dtype=np.int64)
    inside = np.ones(len(out), dtype=np.bool_)
    for values, low, high, n_bins in zip(places, limits[::2], limits[1::2], shape, strict=True):
        place = np.floor((values.astype(np.float64) - low) * (n_bins / (high - low)))
        good = (place >= 0) & (place < n_bins)
        inside &= good
        out = out * n_bins + np.where(good, place, 0).astype(np.int64)
    return np.where(inside, out, -1)


def kiel_cells(teff: NDArray[np.floating], logg: NDArray[np.floating]) -> IntArray:
    """Cell of every row; N_CELLS beyond the bins, -1 where a label is nan."""
    cells = _cells_2d((teff, logg), (*_TEFF[:2], *_LOGG[:2]), _SHAPE)
    return np.where((cells < 0) & np.isfinite(teff) & np.isfinite(logg), N_CELLS, cells)


_TEFF_EDGES, _LOGG_EDGES = (np.linspace(low, high, n + 1) for low, high, n in (_TEFF, _LOGG))


def kiel_centres() -> tuple[FloatArray, FloatArray]:
    """Teff and log g of the centres of all cells, in their order."""
    teff, logg = (0.5 * (e[1:] + e[:-1]) for e in (_TEFF_EDGES, _LOGG_EDGES))
    return np.repeat(teff, len(logg)), np.tile(logg, len(teff))


# --- the sky ------------------------------------------------------------------------------------


def sky_figure(maps: Mapping[str, IntArray]) -> Drawn | None:
    """Draw the density of each catalog on the sky.

    ``maps``: rows in each of the N_SKY cells of order `ORDER`, by what to call the catalog.
    """
    maps = {name: counts for name, counts in maps.items() if counts.any()}
    if not maps:
        return None
    order = min(_order(counts) for counts in maps.values())
    area = 41252.961 / (12 << (2 * order))  # square degrees
    densities = [_coarser(counts, order) / area for counts in maps.values()]
    values = np.concatenate([density[density > 0] for density in densities])
    norm = LogNorm(float(values.min()), float(max(values.max(), 2 * values.min())))
    n_columns = min(len(maps), 2)
    n_rows = -(-len(maps) // n_columns)
    figure = new_figure(0.55 + 1.95 * n_rows * (2 / n_columns))
    grid = figure.subplots(n_rows, n_columns, squeeze=False, subplot_kw={"projection": "mollweide"})
    for axes, (name, counts), density in zip(grid.flat, maps.items(), densities, strict=False):
        sky_map(axes, np.where(density > 0, density, np.nan), order, norm)
        axes.set_title(f"{name} ({int(counts.sum()):,} rows)")
    for axes in grid.flat[len(maps) :]:
        axes.set_axis_off()
    figure.colorbar(
        ScalarMappable(norm, DENSITY_MAP), ax=grid, orientation="horizontal", shrink=0.6,
        aspect=40, fraction=0.05, pad=0.03, label="rows per square degree",
    )  # fmt: skip
    n = {name: int(counts.sum()) for name, counts in maps.items()}
    facts = {"order": order, "degrees": round(float(np.sqrt(area)), 1), "rows": n}
    return Drawn("Density of the catalogs on the sky", figure, facts)


def _coarser(counts: IntArray, order: int) -> IntArray:
    return np.asarray(counts.reshape(-1, 1 << (2 * (ORDER - order))).sum(axis=1))


def _order(counts: IntArray) -> int:
    """Finest order at which filled cells contain a few rows on average."""
    order = ORDER
    while order > _COARSEST and counts.sum() < _ROWS_A_CELL * (_coarser(counts, order) > 0).sum():
        order -= 1
    return order


def sky_map(
    axes: Any, values: FloatArray, order: int, norm: Normalize, *, names: bool = True
) -> None:
    """Draw one map on Mollweide axes: every point of the picture looks up its cell.

    ``values``: of the 12 * 4**order cells (nested); nan: left white. ``names``: write right
    ascensions and declinations at the lines.
    """
    from astropy.coordinates import SkyCoord

    # Places of a picture of the whole ellipse (Snyder 1987, USGS Prof. Paper 1395, p. 251).
    x, y = np.meshgrid(*((np.arange(n) + 0.5) * 2 / n - 1 for n in (_STEPS, _STEPS // 2)))
    angle = np.arcsin(y)
    east = 180 * x / np.cos(angle)
    dec = np.rad2deg(np.arcsin((2 * angle + np.sin(2 * angle)) / np.pi))
    cells = ang2pix(((_CENTRE_DEG - east) % 360.0).ravel(), dec.ravel(), order)
    picture = np.where(np.abs(east) <= 180, values[cells].reshape(x.shape), np.nan)
    image = AxesImage(
        axes, norm=norm, cmap=DENSITY_MAP, interpolation="nearest", origin="lower",
        extent=(0.0, 1.0, 0.0, 1.0), transform=axes.transAxes,
    )  # fmt: skip
    image.set_data(picture)
    axes.add_image(image)
    plane = SkyCoord(np.linspace(0, 360, 721), 0.0, unit="deg", frame="galactic").icrs
    x = _CENTRE_DEG - plane.ra.deg
    by_x = np.argsort(x, kind="stable")
    axes.plot(np.deg2rad(x[by_x]), plane.dec.rad[by_x], color=VERMILLION, linewidth=0.9)
    axes.set_longitude_grid(60)
    axes.set_latitude_grid(30)
    axes.set_longitude_grid_ends(90)
    axes.grid(color="#999999", linewidth=0.35)
    if not names:
        axes.tick_params(labelleft=False, labelbottom=False)
        return
    axes.xaxis.set_major_formatter(lambda x, _: f"{(_CENTRE_DEG - np.rad2deg(x)) % 360:.0f}°")
    axes.yaxis.set_major_formatter(
        lambda y, _: f"{np.rad2deg(y):+.0f}°".replace("-", "−").replace("+0", "0")
    )
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set(fontsize=6, path_effects=[withStroke(linewidth=1.6, foreground="white")])


# --- stars of the unified catalog ---------------------------------------------------------------


def velocity_cells(n_obs: IntArray, scatter: FloatArray) -> IntArray:
    """Cell of every star with several rows and a scatter of its radial velocities; -1 of others."""
    known = (n_obs > 1) & (scatter > 0)
    log = np.log10(np.where(known, scatter, np.nan)).clip(*(_SCATTER[0], _SCATTER[1] - 0.01))
    rows = np.minimum(n_obs, _MOST_ROWS).astype(np.float64)
    limits = (0.0, _MOST_ROWS + 1.0, *_SCATTER[:2])
    return _cells_2d((rows, log), limits, _VELOCITIES)


def velocity_figure(stars: IntArray, variable: IntArray) -> Drawn | None:
    """Draw stars, and the share of suspected binaries, by number of rows and scatter.

    ``stars``, ``variable``: in each of the N_VELOCITY cells.
    """
    if not stars.any():
        return None
    n, varies = (one.reshape(_VELOCITIES).T.astype(np.float64) for one in (stars, variable))
    used = np.flatnonzero(n.any(axis=1))
    last = 1 + int(np.flatnonzero(n.any(axis=0)).max())
    n[n == 0] = np.nan
    edges = np.arange(last + 1.0) - 0.5, np.asarray(np.logspace(*_SCATTER), np.float64)
    figure = new_figure(2.9)
    grid = figure.subplots(1, 2, sharey=True)
    norms: tuple[Normalize, ...] = (
        LogNorm(1, max(float(np.nanmax(n)), 10)),
        PowerNorm(0.5, 0, 100),
    )
    shown = (n, "stars", DENSITY_MAP), (100 * varies / n, "suspected binaries [%]", SHARE_MAP)
    for axes, norm, (values, text, colors) in zip(grid, norms, shown, strict=True):
        image = _mesh(axes, *edges, values[:, :last], norm, colors)
        axes.set(yscale="log", xlim=(1.5, last - 0.5), xlabel="observations of the star")
        axes.set_ylim(edges[1][used[0]], edges[1][used[-1] + 1])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        plain_log_ticks(axes.yaxis)
        figure.colorbar(image, ax=axes, label=text, aspect=30, pad=0.02)
    grid[0].set_ylabel("scatter of its RV [km/s]")
    facts = {"stars": int(stars.sum()), "variable": int(variable.sum()), "most": _MOST_ROWS}
    return Drawn("Radial velocities that vary", figure, facts)


def error_cells(errors: FloatArray) -> IntArray:
    """Cell of every error by its logarithm; -1 where it is unknown."""
    known = np.log10(np.where(errors > 0, errors, np.nan))
    return _cells_2d((known,), _ERRORS[:2], _ERRORS[2:])


def typical_errors(counts: IntArray) -> tuple[float, float, float]:
    """Median, 16th and 84th percentile of errors that are counted in the N_ERRORS cells."""
    low, high, n = _ERRORS
    centres = low + (np.arange(n) + 0.5) * (high - low) / n
    found = np.quantile(centres, (0.5, 0.16, 0.84), weights=counts, method="inverted_cdf")
    middle, low, high = (10.0**found).tolist()
    return middle, low, high


# --- the plane of Teff and log g ----------------------------------------------------------------


def _mesh(
    axes: Axes, x: FloatArray, y: FloatArray, values: FloatArray, norm: Normalize, cmap: str
) -> QuadMesh:
    axes.set_facecolor(EMPTY)
    return axes.pcolormesh(x, y, values, norm=norm, cmap=cmap, rasterized=True)


def _mosaic(x: FloatArray, y: FloatArray, steps: Sequence[float], values: FloatArray) -> _Mesh:
    """Edges and picture of cells of equal size, from the middles of some of them."""
    if not len(values):
        return np.array([0.0, 1.0]), np.array([0.0, 1.0]), np.full((1, 1), np.nan)
    places, edges = [], []
    for middles, step in zip((x, y), steps, strict=True):
        places.append(np.rint((middles - middles.min()) / step).astype(np.int64))
        ends = np.arange(middles.min() - step / 2, middles.max() + step, step)
        edges.append(ends[: places[-1].max() + 2])
    picture = np.full((len(edges[1]) - 1, len(edges[0]) - 1), np.nan)
    picture[places[1], places[0]] = values
    return edges[0], edges[1], picture


def _kiel_axes(grid: Any, teff: Sequence[float], logg: Sequence[float]) -> None:
    """Reversed axes, as usual, with labels on the left and below."""
    for axes in grid.flat:
        axes.set_xlim(max(teff), min(teff))
        axes.set_ylim(max(logg), min(logg))
        tidy_ticks(axes, 4, 6)
        axes.tick_params(labelleft=axes in grid[:, 0], labelbottom=axes in grid[-1])
    for axes in grid[:, 0]:
        axes.set_ylabel(axis_label("logg"))
    for axes in grid[-1]:
        axes.set_xlabel(axis_label("teff"))


def _nearly_all(places: FloatArray, n: Any, share: float, margin: float) -> tuple[float, float]:
    """Range of nearly all of the rows that are counted at places."""
    ends = ((1 - share) / 2, (1 + share) / 2)
    low, high = np.quantile(places, ends, weights=n, method="inverted_cdf")
    return float(low) - margin, float(high) + margin


def kiel_figure(before: IntArray, after: IntArray) -> Drawn | None:
    """Draw the target in Teff and log g before and after the correction.

    ``before``, ``after``: rows in each of the N_CELLS cells, and beyond the bins.
    """
    total = (before + after)[:N_CELLS]
    if not total.any():
        return None
    teff, logg = kiel_centres()
    figure = new_figure(3.5)
    grid = figure.subplots(1, 2, squeeze=False)
    norm = LogNorm(1, max(float(before[:N_CELLS].max()), float(after[:N_CELLS].max()), 10.0))
    for axes, found, title in ((grid[0, 0], before, "before"), (grid[0, 1], after, "after")):
        counts = found[:N_CELLS].reshape(_SHAPE).T.astype(np.float64)
        shown = np.where(counts > 0, counts, np.nan)
        edges = _TEFF_EDGES, _LOGG_EDGES
        image = axes.pcolormesh(*edges, shown, norm=norm, cmap=DENSITY_MAP, rasterized=True)
        axes.set_title(f"{title}: {int(counts.sum()):,} rows")
    _kiel_axes(grid, _nearly_all(teff, total, 0.9995, 125), _nearly_all(logg, total, 0.9995, 0.125))
    figure.colorbar(image, ax=grid, label="rows per cell", aspect=30, pad=0.02)
    n = {"known": int(before.sum()), "before": int(before[-1]), "after": int(after[-1])}
    return Drawn("Kiel diagram before and after", figure, n)


def correction_figure(
    planes: pa.Table, labels: Labels, method: str, correction: FloatArray, errors: FloatArray
) -> Drawn | None:
    """Draw the difference before, the correction, the difference after, and the error.

    ``planes``: ``planes.parquet`` of the stage trends. ``correction``, ``errors``: the model's
    prediction in each cell and the error of a corrected row, of shape (N_CELLS, n_labels), nan
    where unknown; they are shown where there are pairs.
    """
    planes = select(planes, subset="all")
    planes = planes.filter(pc.greater_equal(planes["n"], _MIN_CELL))
    before, after = select(planes, sample="before"), select(planes, sample="after", method=method)
    if not before.num_rows:
        return None
    covered = _covered(before)
    figure = new_figure(2.1 * len(labels) + (0.4 if len(labels) < 3 else 0.0))
    grid = figure.subplots(len(labels), 4, squeeze=False)
    n_before = n_after = 0
    for row, (label, unit) in enumerate(labels.items()):
        mine, rest = select(before, label=label), select(after, label=label)
        n_before, n_after = (int(pc.sum(one["n"]).as_py() or 0) for one in (mine, rest))
        size = float(np.quantile(np.abs(mine["median"].to_numpy()), 0.95)) or 1.0
        signed = Normalize(-size, size)
        left = _mesh(grid[row, 0], *_coarse(mine, "median"), signed, SIGNED_MAP)
        _mesh(grid[row, 1], *_fine(covered, correction[:, row]), signed, SIGNED_MAP)
        _mesh(grid[row, 2], *_coarse(rest, "median"), signed, SIGNED_MAP)
        shown = errors[covered & np.isfinite(errors[:, row]), row]
        low, top = np.quantile(shown, (0.02, 0.98)) if len(shown) else (1.0, 2.0)
        norm = LogNorm(low, max(top, 1.1 * low))
        right = _mesh(grid[row, 3], *_fine(covered, errors[:, row]), norm, SHARE_MAP)
        bar = figure.colorbar(left, ax=list(grid[row, :3]), pad=0.01, aspect=22, extend="both",
                              ticks=MaxNLocator(4))  # fmt: skip
        bar.set_label(rf"$\Delta$ {axis_label(label, unit)}")
        bar = figure.colorbar(right, ax=grid[row, 3], pad=0.01, aspect=22, label=f"[{unit}]",
                              extend="both")  # fmt: skip
        plain_log_ticks(bar.ax.yaxis)
    titles = ("difference before", "correction", "difference after", "error of a row")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    teff, logg = (
        (pc.min(before[f"{name}_low"]).as_py(), pc.max(before[f"{name}_high"]).as_py())
        for name in ("teff", "logg")
    )
    _kiel_axes(grid, teff, logg)
    for axes in grid.flat:
        axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    facts = {"n_before": n_before, "n_after": n_after}
    return Drawn(f"The correction on the plane of Teff and log g: {method}", figure, facts)


def _covered(before: pa.Table) -> NDArray[np.bool_]:
    """Fine cells that lie in a coarse cell with pairs."""
    teff, logg = kiel_centres()
    out = np.zeros(N_CELLS, dtype=np.bool_)
    names = ("teff_low", "teff_high", "logg_low", "logg_high")
    for a, b, c, d in set(zip(*(before[name].to_pylist() for name in names), strict=True)):
        out |= (teff >= a) & (teff < b) & (logg >= c) & (logg < d)
    return out


def _coarse(table: pa.Table, value: str) -> _Mesh:
    """Picture of a column of the trends on the plane, whose cells are of one size."""
    low, high = (
        np.stack([table[f"{name}_{end}"].to_numpy() for name in ("teff", "logg")])
        for end in ("low", "high")
    )
    steps = np.median(high - low, axis=1) if table.num_rows else np.ones(2)
    x, y = (low + high) / 2
    return _mosaic(x, y, steps.tolist(), table[value].to_numpy())


def _fine(shown: NDArray[np.bool_], values: FloatArray) -> _Mesh:
    return _TEFF_EDGES, _LOGG_EDGES, np.where(shown, values, np.nan).reshape(_SHAPE).T


# --- coverage -----------------------------------------------------------------------------------


def coverage_figure(maps: pa.Table, order: int, steps: Mapping[str, float]) -> Drawn | None:
    """Draw the share of rows inside, sparse and outside, on the sky and in Teff and log g.

    ``maps``: ``maps.parquet`` of the stage coverage. ``order``: HEALPix order of its sky.
    ``steps``: width of the cells of its map ``kiel`` in K and dex.
    """
    sky, kiel = select(maps, map="sky"), select(maps, map="kiel")
    on_sky, on_kiel = (
        np.stack([table[name].to_numpy() for name in CLASSES]).astype(np.float64)
        for table in (sky, kiel)
    )
    total = on_kiel.sum(axis=1)
    n_rows = int(total.sum())
    if not n_rows:
        return None
    figure = new_figure(4.2)
    rows = figure.add_gridspec(2, 1, height_ratios=(1, 1.9))
    upper: Any = rows[0].subgridspec(1, 3).subplots(subplot_kw={"projection": "mollweide"})
    lower: Any = rows[1].subgridspec(1, 3).subplots(squeeze=False)
    # Steps of a few per cent count near zero, where most cells are.
    norm, relative = PowerNorm(0.5, 0, 100), LogNorm(1 / _RATIO, _RATIO)
    teff, logg = (kiel[name].to_numpy().astype(np.float64) for name in ("teff", "logg"))
    widths = [steps["teff"], steps["logg"]]
    for i, name in enumerate(CLASSES):
        values = np.full(12 << (2 * order), np.nan)
        shares = on_sky[i] / on_sky.sum(axis=0)
        values[sky["pixel"].to_numpy()] = shares * (n_rows / total[i] if total[i] else 1.0)
        sky_map(upper[i], values, order, relative, names=False)
        upper[i].set_title(f"{name}: {100 * total[i] / n_rows:.1f} %")
        cells = _mosaic(teff, logg, widths, 100 * on_kiel[i] / on_kiel.sum(axis=0))
        _mesh(lower[0, i], *cells, norm, SHARE_MAP)
    _kiel_axes(lower, *(_nearly_all(middles, on_kiel.sum(axis=0), 0.999, step)
                        for middles, step in zip((teff, logg), widths, strict=True)))  # fmt: skip
    bar = figure.colorbar(ScalarMappable(relative, DENSITY_MAP), ax=list(upper), aspect=12,
                          pad=0.02, extend="both", label="of the mean")  # fmt: skip
    bar.set_ticks([1 / _RATIO, 1, _RATIO], labels=[f"1/{_RATIO:g}", "1", f"{_RATIO:g}"])
    bar.ax.minorticks_off()
    figure.colorbar(ScalarMappable(norm, SHARE_MAP), ax=lower, aspect=24, pad=0.02,
                    ticks=(0, 1, 5, 10, 25, 50, 75, 100), label="rows of the cell [%]")  # fmt: skip
    counts = {name: int(n) for name, n in zip(CLASSES, total, strict=True)}
    facts = {"n": n_rows, "rows": counts, "order": order, "steps": dict(steps)}
    return Drawn("Where the overlap represents the catalog", figure, facts)


def growth_figure(table: pa.Table, limits: Mapping[str, float]) -> Drawn | None:
    """Draw how the scatter of held-out pairs grows away from the overlap.

    ``table``: ``calibration.parquet`` of the stage coverage. ``limits``: coverage above which a row
    is ``inside``, and below which it is ``outside``.
    """
    table = table.filter(pc.greater(table["distance"], 0.0))  # on a logarithmic axis
    if not table.num_rows:
        return None
    figure = new_figure(3.0, 4.4)
    axes = figure.subplots()
    x, n, measured, fitted = (
        table[name].to_numpy() for name in ("distance", "n", "growth_measured", "growth")
    )
    axes.plot(x, measured, linestyle="none", marker=".", markersize=2, color=GREY, alpha=0.6,
              label=f"bins of about {int(np.median(n))} held-out pairs")  # fmt: skip
    axes.errorbar(*_together(x, n, measured), color=BLUE, marker="o", linestyle="none",
                  elinewidth=0.9, label="means of bins")  # fmt: skip
    axes.plot(x, fitted, color=VERMILLION, label="model")
    axes.axhline(1, color=BLACK, linewidth=0.6)
    for name, text in (("inside", "sparse above"), ("outside", "outside above")):
        if limits.get(name):
            axes.axhline(1 / limits[name], color=BLACK, linewidth=0.6, linestyle=":")
            axes.annotate(text, (0, 1 / limits[name]), (3, 2), xycoords=("axes fraction", "data"),
                          textcoords="offset points", ha="left", fontsize=6)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(0.8 * float(x.min()), 1.25 * float(x.max()))
    plain_log_ticks(axes.xaxis)
    if measured.min() > 0:
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    axes.set_xlabel("distance from the overlap [no unit]")
    axes.set_ylabel("scatter over that of the dense part")
    axes.legend(loc="lower right")
    worse = measured > 1.5 * fitted
    facts: dict[str, Any] = {"n_bins": table.num_rows, "n_pairs": int(n.sum()), "worse": None}
    if worse.any():
        of_them = {"n_bins": int(worse.sum()), "n_pairs": int(n[worse].sum())}
        facts["worse"] = {**of_them, "distance": float(f"{x[worse].min():.2g}")}
    return Drawn("Error growth away from the overlap", figure, facts)


def _together(x: Any, n: Any, values: Any) -> Any:
    """Places, means and standard errors of bins in steps of equal ratio."""
    step = np.floor(np.log10(x) * _BINS_A_DECADE)
    found = []
    for one in np.unique(step):
        mine = step == one
        many = np.count_nonzero(mine)
        error = float(np.std(values[mine], ddof=1)) / np.sqrt(many) if many > 1 else 0.0
        mean = np.average(values[mine], weights=n[mine])
        found.append((np.exp(np.mean(np.log(x[mine]))), mean, error))
    return np.array(found).T


# --- all parameters -----------------------------------------------------------------------------


class Plane(NamedTuple):
    """Cells of the plane of all parameters, and the coarse ones in which coverage is judged.

    ``limits``: low and high along each axis. ``bins``: cells along each axis.
    """

    limits: tuple[float, float, float, float]
    bins: int

    @property
    def group(self) -> int:
        """Cells along each side of a coarse cell."""
        return -(-self.bins // _MAX_BINS)

    @property
    def coarse(self) -> int:
        """Coarse cells along each axis."""
        return -(-self.bins // self.group)

    def cells(self, first: NDArray[np.floating], second: NDArray[np.floating]) -> IntArray:
        """Coarse cell of each place; -1 beyond the limits or where a coordinate is nan."""
        fine = _cells_2d((first, second), self.limits, (self.bins, self.bins))
        i, j = fine // self.bins // self.group, fine % self.bins // self.group
        return np.where(fine < 0, -1, i * self.coarse + j)

    def edges(self, group: int = 1) -> tuple[FloatArray, FloatArray]:
        """Edges along each axis of the cells, or of every ``group`` of them."""
        steps = group * np.arange(-(-self.bins // group) + 1, dtype=np.float64) / self.bins
        low, high, bottom, top = self.limits
        return low + (high - low) * steps, bottom + (top - bottom) * steps


def projection_figure(
    maps: pa.Table, plane: Plane, scored: tuple[IntArray, IntArray] | None, is_sample: bool
) -> Drawn | None:
    """Draw the catalog and the overlap in one plane, and the share outside the coverage.

    ``maps``: ``maps.parquet`` of the stage projection. ``scored``: rows with a coverage in each of
    the plane.coarse**2 coarse cells, and those of them that lie outside. ``is_sample``: only a
    share of the catalog was to be placed.
    """
    n = {name: int(np.sum(maps[f"n_{name}"].to_numpy())) for name in ("target", "overlap")}
    if not n["target"]:
        return None
    n_panels = 2 if scored is None else 3
    figure = new_figure(3.7 if scored is None else 2.75, share_of_width(3))
    panels = figure.subplots(1, n_panels, sharex=True, sharey=True)
    titles = (f"{'sample of the' if is_sample else 'full'} catalog: {n['target']:,} rows",
              f"overlap: {n['overlap']:,} pairs")  # fmt: skip
    for axes, name, title in zip(panels, n, titles, strict=False):
        picture = np.full((plane.bins, plane.bins), np.nan)
        counts = maps[f"n_{name}"].to_numpy()
        counts = np.where(counts > 0, counts, np.nan)
        picture[maps["cell_2"].to_numpy(), maps["cell_1"].to_numpy()] = counts
        norm = LogNorm(1, max(float(np.nanmax(counts, initial=2)), 2))
        image = _mesh(axes, *plane.edges(), picture, norm, DENSITY_MAP)
        axes.set_title(title, fontsize=7)
        figure.colorbar(image, ax=axes, location="bottom", aspect=22, label="number per cell")
    facts: dict[str, Any] = {"n_scored": 0, "group": plane.group}
    if scored is not None:
        known, outside = scored
        share = 100.0 * outside / np.where(known > 0, known, np.nan)
        picture = share.reshape(plane.coarse, plane.coarse).T
        edges = plane.edges(plane.group)
        image = _mesh(panels[2], *edges, picture, PowerNorm(0.5, 0, 100), SHARE_MAP)
        panels[2].set_title("outside the coverage", fontsize=7)
        bar = figure.colorbar(image, ax=panels[2], location="bottom", aspect=22,
                              label="rows of the cell [%]", ticks=(0, 5, 25, 50, 100))  # fmt: skip
        bar.ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        facts["n_scored"] = int(known.sum())
    for axes in panels:
        axes.set(xticks=[], yticks=[], xlabel="UMAP 1")
    panels[0].set_ylabel("UMAP 2")
    return Drawn("Catalog and overlap in one plane", figure, facts)
