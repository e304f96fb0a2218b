"""Dedupe of rows that crowd at a place, beside as many rows that are spread over the sky.

``python -m tests.bench.crowded [--rows 1000000] [--repeats 3]`` prints the wall and CPU seconds and
the peak memory of ``sos-dask dedupe CATALOG -o OUT --threads 1``: the mean of several runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CALL = (sys.executable, "-c", "import sys; from sos_dask.cli import main; sys.exit(main())")
SURVEY = """format = 1
name = "crowded"
title = "rows that crowd"
position_epoch = 2000.0
[columns]
""" + "\n".join(f"{name} = {{ source = '{name}' }}" for name in (
    "obs_id", "ra", "dec", "teff", "logg", "feh", "gaia_dr3_source_id"
))  # fmt: skip


def write_tables(folder: Path, n: int) -> None:
    """Write the cases, with the same columns each."""
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


def run(*arguments: object) -> tuple[float, float, float]:
    """Wall and CPU seconds and MiB of a command."""
    start = time.monotonic()
    command = [*CALL, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.monotonic() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.crowded", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print(f"| {given.rows:,} rows | wall s | CPU s | MiB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "s.toml").write_text(SURVEY)
        # In another process: what a process has held at most counts for its children, too.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(write_tables, place, given.rows).result()
        for path in sorted(place.glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns):
            catalog, out = place / f"{path.stem} o", place / f"{path.stem} d"
            run("ingest", place / "s.toml", path, "-o", catalog, "--threads", 1)
            dedupe = ("dedupe", catalog, "-o", out, "--threads", 1, "--overwrite")
            run(*dedupe)  # loops are compiled
            runs = []
            for _ in range(given.repeats):
                shutil.rmtree(out)
                runs.append(run(*dedupe))
            wall, cpu, mib = np.mean(runs, axis=0)
            print(f"| {path.stem} | {wall:.1f} | {cpu:.1f} | {mib:.0f} |", flush=True)


if __name__ == "__main__":
    main()
