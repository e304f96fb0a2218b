"""A large sky made as partitions, without files of surveys: for the limits of single stages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import healpy
import numpy as np
import pyarrow as pa

from sos_dask.schema import CANONICAL, HEALPIX, QUALITY
from sos_dask.sky.healpix import MAX_ORDER, HealpixPixel, ang2pix
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import write_partition
from sos_dask.storage.manifest import Recipe
from tests.skies import commit

ROWS_PER_PARTITION = 1_000_000
REFERENCE_SHARE = 1.7 / 19
SHARED = 0.35  # of the reference rows, that are rows of the target, too
# What both sides, and the largest output of a step, take on disk for a row of the target.
BYTES_PER_ROW = 140
_LABELS = ("teff", "teff_err", "logg", "logg_err", "feh", "feh_err", "snr")


@dataclass(frozen=True)
class _Part:
    output: Output
    pixel: HealpixPixel
    n_rows: int
    n_reference: int
    side: str


def fitting_rows(wanted: int, folder: Path) -> int:
    """So many rows, or what the disk holds."""
    free = shutil.disk_usage(folder).free * 8 // 10
    return min(wanted, free // BYTES_PER_ROW // 1_000_000 * 1_000_000 or wanted)


def make(rows: int, left: Path, right: Path, workers: int) -> None:
    """Write a target and a reference, uniform on the sky, unless they are there.

    Parameters
    ----------
    rows : int
        Of the target. The reference has 9 % as many, of which `SHARED` are within 0.5 arcsec of a
        row of the target.
    left, right : Path
        Catalogs of observations and of stars.
    workers : int
        Processes.
    """
    order = 0
    while rows / (12 * 4**order) > ROWS_PER_PARTITION:
        order += 1
    n_pixels = 12 * 4**order
    pixels = [HealpixPixel(order, number) for number in range(n_pixels)]
    counts = np.diff(np.arange(n_pixels + 1) * rows // n_pixels)
    with ProcessPoolExecutor(max(workers, 1), get_context("spawn")) as pool:
        for side, path in (("left", left), ("right", right)):
            recipe = Recipe("bench-scale", 1, {"rows": rows, "side": side}, {})
            output = Output.prepare(path, recipe, overwrite=True)
            if output.complete:
                continue
            parts = [
                _Part(output, pixel, int(n), int(n * REFERENCE_SHARE), side)
                for pixel, n in zip(pixels, counts, strict=True)
            ]
            records = list(pool.map(_make_part, parts))
            schema = _left(parts[0], 1).schema if side == "left" else _right(parts[0], 1).schema
            commit(output, side, pixels, records, schema)


def _make_part(part: _Part) -> dict[str, Any]:
    make: dict[str, Callable[[_Part, int], pa.Table]] = {"left": _left, "right": _right}
    n_rows = part.n_rows if part.side == "left" else part.n_reference
    table = make[part.side](part, n_rows)
    return {"file": asdict(write_partition(part.output, part.pixel, table))}


def _left(part: _Part, n_rows: int) -> pa.Table:
    cells = _cells(part, n_rows)
    obs_id = (part.pixel.pixel << 32) + np.arange(len(cells), dtype=np.int64)
    return _table(part, cells, *_positions(cells), "obs_id", pa.array(obs_id))


def _right(part: _Part, n_rows: int) -> pa.Table:
    rng = np.random.default_rng([2, part.pixel.order, part.pixel.pixel])
    n_shared = min(int(SHARED * n_rows), part.n_rows)
    near = np.sort(rng.choice(_cells(part, part.n_rows), n_shared, replace=False))
    ra, dec = _positions(near)
    dec = np.clip(dec + rng.uniform(-0.5, 0.5, n_shared) / 3600.0, -90.0, 90.0)
    inside = ang2pix(ra, dec)
    inside = inside[(inside >= part.pixel.first) & (inside < part.pixel.stop)]
    others = rng.integers(part.pixel.first, part.pixel.stop, n_rows - len(inside))
    cells = np.sort(np.concatenate([inside, others]))
    numbers = pa.array((part.pixel.pixel << 32) + np.arange(len(cells))).cast(pa.string())
    return _table(part, cells, *_positions(cells), "star_id", numbers)


def _cells(part: _Part, n_rows: int) -> np.ndarray:
    """Order-29 cells of the target: uniform in area."""
    rng = np.random.default_rng([1, part.pixel.order, part.pixel.pixel])
    return np.sort(rng.integers(part.pixel.first, part.pixel.stop, n_rows))


def _positions(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres of order-29 cells."""
    ra, dec = healpy.pix2ang(1 << MAX_ORDER, cells, nest=True, lonlat=True)
    return ra % 360.0, dec


def _table(
    part: _Part, cells: np.ndarray, ra: np.ndarray, dec: np.ndarray, key: str, keys: pa.Array
) -> pa.Table:
    rng = np.random.default_rng([3, part.pixel.order, part.pixel.pixel, len(cells)])
    uniform = rng.random((len(_LABELS), len(cells)), dtype=np.float32)
    ranges = ((4000, 6800), (20, 80), (1.2, 5.0), (0.05, 0.2), (-1.2, 0.2), (0.02, 0.1), (10, 200))
    low = np.array([first for first, _ in ranges], np.float32)[:, None]
    high = np.array([last for _, last in ranges], np.float32)[:, None]
    values = low + uniform * (high - low)
    fields = [
        HEALPIX.arrow(nullable=False),
        pa.field(key, keys.type, False),
        *(CANONICAL[name].arrow(nullable=False) for name in ("ra", "dec")),
        *(CANONICAL[name].arrow() for name in _LABELS),
        QUALITY.arrow(nullable=False),
    ]
    quality = (rng.random(len(cells)) < 0.1).astype(np.int64)
    columns = [pa.array(cells), keys, pa.array(ra), pa.array(dec), *map(pa.array, values)]
    return pa.table([*columns, pa.array(quality)], schema=pa.schema(fields))
