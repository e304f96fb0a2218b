"""Where the correction can be trusted: maps of the coverage, the regions to follow up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, PowerNorm

from sos_dask.report.sky import draw_map
from sos_dask.report.style import DENSITY_MAP, EMPTY, Drawn, axis_label, new_figure, tidy_ticks
from sos_dask.report.tables import Table
from sos_dask.schema import LABELS

CLASSES = ("inside", "sparse", "outside")
_TICKS = (0, 1, 5, 10, 25, 50, 75, 100)
_SHOWN = 0.999
_RATIO = 3.0


def coverage_figure(
    maps: pa.Table, order: int, steps: Mapping[str, float], meaning: Mapping[str, str]
) -> Drawn | None:
    """Share of rows inside, sparse and outside, on the sky and in the Kiel diagram.

    Parameters
    ----------
    maps : pyarrow.Table
        ``maps.parquet`` of the stage coverage.
    order : int
        HEALPix order of its sky.
    steps : mapping of str to float
        Width of the cells of its Kiel diagram: ``teff`` in K, ``logg`` in dex.
    meaning : mapping of str to str
        What each class means.

    Returns
    -------
    Drawn or None
        None without rows.
    """
    sky, kiel = (maps.filter(pc.equal(maps["map"], name)) for name in ("sky", "kiel"))
    total = {name: int(pc.sum(kiel[name]).as_py() or 0) for name in CLASSES}
    n_rows = sum(total.values())
    if not n_rows:
        return None
    figure = new_figure(4.2)
    upper, lower = figure.subplots(2, len(CLASSES), height_ratios=(1, 1.9))
    # Steps of a few per cent count near zero, where most cells are.
    norm, cmap = PowerNorm(0.5, 0, 100), "cividis"
    relative = LogNorm(1 / _RATIO, _RATIO)
    pixels = sky["pixel"].to_numpy()
    teff, teff_edges = _axis(kiel["teff"].to_numpy(), steps["teff"])
    logg, logg_edges = _axis(kiel["logg"].to_numpy(), steps["logg"])
    for i, (name, share, on_sky) in enumerate(
        zip(CLASSES, _shares(kiel), _shares(sky), strict=True)
    ):
        values = np.full(12 << (2 * order), np.nan)
        values[pixels] = on_sky
        if total[name]:
            values *= n_rows / (100 * total[name])
        draw_map(upper[i], values, order, relative, DENSITY_MAP, names=False)
        upper[i].set_title(f"{name}: {100 * total[name] / n_rows:.1f} %")
        picture = np.full((len(logg_edges) - 1, len(teff_edges) - 1), np.nan)
        picture[logg, teff] = share
        axes = lower[i]
        axes.pcolormesh(teff_edges, logg_edges, picture, norm=norm, cmap=cmap, rasterized=True)
        axes.set_facecolor(EMPTY)
        axes.set_xlim(*reversed(_limits(kiel, "teff", steps["teff"])))
        axes.set_ylim(*reversed(_limits(kiel, "logg", steps["logg"])))
        tidy_ticks(axes, 4, 6)
        axes.set_xlabel(axis_label("teff"))
        axes.set_ylabel(axis_label("logg") if i == 0 else "")
        axes.tick_params(labelleft=i == 0)
    sky_bar = figure.colorbar(
        ScalarMappable(relative, DENSITY_MAP), ax=list(upper), aspect=12, pad=0.02, extend="both"
    )
    sky_bar.set_ticks([1 / _RATIO, 1, _RATIO], labels=[f"1/{_RATIO:g}", "1", f"{_RATIO:g}"])
    sky_bar.ax.minorticks_off()
    sky_bar.set_label("of the mean")
    bar = figure.colorbar(
        ScalarMappable(norm, cmap), ax=list(lower), aspect=24, pad=0.02, ticks=_TICKS
    )
    bar.set_label("rows of the cell [%]")
    said = "; ".join(f"{name}: {meaning.get(name, '')}" for name in CLASSES)
    return Drawn(
        "Where the overlap carries the correction",
        "Share of rows in each class of coverage: on the sky, over that of all rows (HEALPix cells "
        f"of order {order}, Mollweide's projection as above; orange: the galactic plane, white: no "
        "rows), and in the Kiel diagram before the correction (cells of "
        f"{steps['teff']:g} K by {steps['logg']:g} dex; grey: no rows). "
        f"{said}. All {n_rows:,} rows with labels: "
        + ", ".join(f"{total[name]:,} {name}" for name in CLASSES)
        + ". The scale of the Kiel diagram is stretched near zero.",
        "Maps of the sky and of log g against Teff with the share of rows inside the coverage, "
        "in its sparse part and outside.",
        figure,
    )


def _shares(table: pa.Table) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    counts = np.stack([table[name].to_numpy() for name in CLASSES]).astype(np.float64)
    return list(100 * counts / counts.sum(axis=0))


def _axis(middles: Any, step: float) -> tuple[Any, Any]:
    """Cell of each middle from the lowest on, and the edges of all cells."""
    cell = np.rint(middles.astype(np.float64) / step - 0.5).astype(np.int64)
    first, last = int(cell.min()), int(cell.max())
    return cell - first, np.arange(first, last + 2) * step


def _limits(table: pa.Table, name: str, step: float) -> tuple[float, float]:
    """Limits that hold nearly all rows."""
    middles = table[name].to_numpy()
    order = np.argsort(middles, kind="stable")
    n = np.sum([table[one].to_numpy() for one in CLASSES], axis=0)[order]
    share = np.cumsum(n) / n.sum()
    low, high = (
        float(middles[order][min(int(np.searchsorted(share, at)), len(order) - 1)])
        for at in ((1 - _SHOWN) / 2, (1 + _SHOWN) / 2)
    )
    return low - step, high + step


def follow_up(regions: Sequence[Mapping[str, Any]], steps: Mapping[str, float]) -> Table:
    """Regions of label space where observations of reference quality would help most.

    Parameters
    ----------
    regions : sequence of mapping
        As `sos_dask.coverage.follow_up` gives them.
    steps : mapping of str to float
        Width of a region in each label.
    """
    rows = []
    for region in regions:
        low_high = [
            f"{region[label] - steps[label] / 2:g} to {region[label] + steps[label] / 2:g}"
            for label in LABELS
        ]
        bright = region["phot_g_mean_mag"]
        rows.append(
            (
                *(text.replace("-", "−") for text in low_high),
                f"{region['outside']:,}",
                f"{region['rows']:,}",
                "–" if bright is None else f"{bright:.1f}",
            )
        )
    return Table(
        "Where more reference stars would help most: the cells of label space with most rows "
        "outside the coverage. Rows count observations, a star can have several; G: mean of the "
        "rows outside, to plan exposures with. Labels as observed by the target: far from the "
        "main sequence and the giants they can be wrong measurements.",
        ("Teff [K]", "log g [dex]", "[Fe/H] [dex]", ">rows outside", ">all rows", ">G [mag]"),
        tuple(rows),
    )
