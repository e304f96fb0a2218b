"""Dedupe of rows that crowd at a place, beside as many rows that are spread over the sky.

``python -m tests.bench.crowded [--rows 1000000] [--repeats 3]`` prints the wall and CPU seconds and
the peak memory of ``sos-dask dedupe CATALOG -o OUT --threads 1``: the mean of several runs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.bench.measure import SOS, interleaved, table

SURVEY = """format = 1
name = "crowded"
title = "rows that crowd"
position_epoch = 2000.0
[columns]
""" + "\n".join(f"{name} = {{ source = '{name}' }}" for name in (
    "obs_id", "ra", "dec", "teff", "logg", "feh", "gaia_dr3_source_id"
))  # fmt: skip


def write_tables(folder: Path, n: int) -> list[str]:
    """Write the cases, with the same columns each; their names."""
    rng = np.random.default_rng(1)
    sky = rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))
    few = n // 100
    near = 10 + rng.normal(0, 0.7 / 3600, few), 5 + rng.normal(0, 0.7 / 3600, few)
    node = rng.integers(0, 100, (2, n))
    places: dict[str, Any] = {
        "spread over the sky": (*sky, 0),
        "one position": (np.full(n, 10.0), np.full(n, 5.0), 0),
        "one position, another id each": (np.full(n, 10.0), np.full(n, 5.0), 1 + np.arange(n)),
        "spread, one id on all": (*sky, 1),
        "within 0.1 arcsec": (
            *(x + rng.uniform(-3e-5, 3e-5, n) for x in (10.0, 5.0)),
            0,
        ),
        f"{few:,} stars within 1.5 arcsec": (
            *(np.append(x[few:], y) for x, y in zip(sky, near, strict=True)),
            1 + np.arange(n),
        ),
        "grid of 100 x 100 exposures": (10 + node[0] / 1800, 5 + node[1] / 1800, 0),
    }
    labels = {"teff": rng.normal(5000, 50, n), "logg": rng.normal(2.5, 0.1, n)}
    labels["feh"] = rng.normal(0, 0.1, n)
    for name, (ra, dec, ids) in places.items():
        columns = {"obs_id": np.arange(n), "ra": ra, "dec": dec, **labels}
        columns["gaia_dr3_source_id"] = np.zeros(n, dtype=np.int64) + ids
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return list(places)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.crowded", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        survey, log = place / "s.toml", place / "log"
        survey.write_text(SURVEY)
        names = write_tables(place, given.rows)
        commands, outputs = {}, []
        for name in names:
            catalog, out = place / f"{name} o", place / f"{name} d"
            ingest = (SOS, "ingest", survey, place / f"{name}.parquet", "-o", catalog)
            interleaved({name: (*ingest, "--threads", "1")}, 1, log)
            commands[name] = (SOS, "dedupe", catalog, "-o", out, "--threads", "1", "--overwrite")
            outputs.append(out)
        interleaved(commands, 1, log)  # loops are compiled
        runs = interleaved(commands, given.repeats, log, *outputs)
    rows = []
    for name, used in runs.items():
        wall, cpu, gib = np.mean([(one.wall_s, one.cpu_s, one.process_gib) for one in used], axis=0)
        rows.append((name, f"{wall:.1f}", f"{cpu:.1f}", f"{gib:.2f}"))
    print("\n".join(table(f"{given.rows} rows, >wall s, >CPU s, >GiB", rows)))


if __name__ == "__main__":
    main()
