"""Small skies for tests: tables of observations, and catalogs of them on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sos_dask.run.cluster import Cluster, silent
from sos_dask.schema import CANONICAL, HEALPIX, QUALITY
from sos_dask.sky.healpix import HealpixPixel, ang2pix, plan_partitions
from sos_dask.stages.base import Run, partition_record
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Recipe, Rows


def hard_positions(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions in tight clumps where matching goes wrong: poles, RA 0, corners of base pixels."""
    centres = np.array(
        [
            (0.0, 90.0),
            (123.0, -90.0),
            (0.0, 0.0),
            (360.0 - 1e-7, 41.8103),
            (45.0, 41.8103148957786),
            (45.0, 0.0),
            (90.0, -41.8103148957786),
            (200.3, 12.7),
        ]
    )
    chosen = centres[rng.integers(0, len(centres), n)]
    angle, distance = rng.uniform(0, 2 * np.pi, n), 6.0 / 3600 * np.sqrt(rng.uniform(0, 1, n))
    north, east = distance * np.cos(angle), distance * np.sin(angle)
    dec = chosen[:, 1] + north
    over = np.abs(dec) > 90
    dec = np.where(over, np.sign(dec) * 180 - dec, dec)
    ra = (
        chosen[:, 0] + east / np.maximum(np.cos(np.radians(dec)), 1e-6) + np.where(over, 180.0, 0.0)
    )
    return ra % 360.0, dec


def observations(n: int, seed: int = 0, spread: bool = False) -> pa.Table:
    """Observations with labels and errors, sorted as on disk."""
    rng = np.random.default_rng(seed)
    if spread:
        ra, dec = rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))
    else:
        ra, dec = hard_positions(n, rng)
    logg = rng.uniform(0.5, 5.0, n)
    values = {
        "obs_id": rng.permutation(n).astype(np.int64) + 10**9,
        "ra": ra,
        "dec": dec,
        "teff": rng.uniform(4000, 7000, n),
        "teff_err": rng.uniform(20, 80, n),
        "logg": logg,
        "logg_err": rng.uniform(0.05, 0.2, n),
        "feh": rng.uniform(-2, 0.4, n),
        "feh_err": rng.uniform(0.02, 0.1, n),
        "snr": rng.uniform(10, 200, n),
    }
    fields = [
        CANONICAL[name].arrow(nullable=name not in ("obs_id", "ra", "dec")) for name in values
    ]
    columns = [pa.array(v).cast(f.type) for v, f in zip(values.values(), fields, strict=True)]
    table = pa.table(
        [pa.array(ang2pix(ra, dec)), *columns, pa.array(rng.integers(0, 5, n) // 4)],
        schema=pa.schema([HEALPIX.arrow(nullable=False), *fields, QUALITY.arrow(nullable=False)]),
    )
    return table.sort_by([("_healpix_29", "ascending"), ("obs_id", "ascending")])


def write_catalog(
    table: pa.Table,
    directory: Path,
    rows_per_partition: int = 10**6,
    name: str = "test.observations",
) -> Catalog:
    """Write a table as a complete catalog."""
    output = Output.prepare(directory, Recipe("test", 1, {"rows": rows_per_partition}, {}))
    cells = table["_healpix_29"].to_numpy()
    order = 8  # the clumps lie on corners of such cells: finer ones cut them no further
    histogram = np.bincount(cells >> 2 * (29 - order), minlength=12 * 4**order).astype(np.int64)
    pixels = plan_partitions(histogram, order, rows_per_partition)
    done = []
    for pixel in pixels:
        inside = (cells >= pixel.first) & (cells < pixel.stop)
        done.append({"file": partition_record(output, pixel, table.filter(pa.array(inside)))})
    commit(output, name, pixels, done, table.schema)
    return Catalog.open(directory)


def commit(
    output: Output,
    name: str,
    pixels: list[HealpixPixel],
    records: list[dict[str, Any]],
    schema: pa.Schema,
) -> None:
    """Complete a catalog whose partitions are written."""
    run = Run(output, Cluster(), silent)
    n_rows = run.write_catalog(name, pixels, records, schema)
    output.commit(Rows(n_rows, n_rows), tuple(run.files), {})
