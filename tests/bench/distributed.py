"""Training on workers against training in one process: ``python -m tests.bench.distributed``.

Boosted trees of three labels by four inputs on simulated pairs, once in one process and once over
workers, in turn, each in processes of its own. Prints the CPU seconds of driver and workers (the
trackers that they start included, the start of the cluster not), their ratio, and how far
predictions of held-out pairs differ. Both sides import XGBoost in what they measure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sos_dask.api import start, train
from sos_dask.columns import matrix32
from sos_dask.problem import KNOWN_INPUTS, Problem
from sos_dask.run.machine import leave_pandas_out
from sos_dask.schema import CANONICAL, HEALPIX, LABELS
from sos_dask.sky.healpix import ang2pix
from sos_dask.stages.train import TrainSettings
from sos_dask.storage.catalog import Catalog
from tests.bench.measure import table
from tests.skies import write_catalog

PROBLEM = Problem(inputs=KNOWN_INPUTS[:4])
NOISE = {"teff": 60.0, "logg": 0.12, "feh": 0.06}


def make_pairs(n: int, directory: Path) -> None:
    """Write pairs: giants and dwarfs whose differences depend on all inputs."""
    rng = np.random.default_rng(1)
    ra, dec = rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))
    giant = rng.random(n) < 0.5
    logg = np.where(giant, rng.normal(2.4, 0.5, n), rng.normal(4.3, 0.25, n)).clip(0.5, 5.0)
    teff = np.where(giant, 4000 + 280 * logg, 5700) + rng.normal(0, 300, n)
    feh, snr = rng.normal(-0.3, 0.35, n).clip(-2, 0.5), 10 ** rng.uniform(1, 2.5, n)
    t, g, low = (teff - 5000) / 1000, logg - 3, 20 / snr
    bias = {
        "teff": -40 + 40 * t - 12 * t**2 + 35 * feh * g + 30 * low * np.sin(3 * t),
        "logg": 0.08 + 0.1 * feh * g - 0.05 * g**2 + 0.05 * low * t,
        "feh": 0.04 - 0.03 * t - 0.06 * feh * g + 0.03 * low,
    }
    values = {"ra": ra, "dec": dec, "teff": teff, "logg": logg, "feh": feh, "snr": snr}
    fields = [CANONICAL[name].arrow() for name in values]
    for name in LABELS:
        wrong = np.where(rng.random(n) < 0.03, rng.uniform(8, 15, n), 0)
        noise = NOISE[name] * (rng.normal(size=n) * (1 + low) + wrong)
        values[f"{name}_diff"] = bias[name] + noise
        fields.append(pa.field(f"{name}_diff", pa.float32()))
    columns = [pa.array(v).cast(one.type) for v, one in zip(values.values(), fields, strict=True)]
    fields = [HEALPIX.arrow(nullable=False), *fields, pa.field("fold", pa.int8())]
    columns = [pa.array(ang2pix(ra, dec)), *columns, pa.array(rng.integers(0, 5, n, np.int8))]
    made = pa.table(columns, schema=pa.schema(fields))
    made = made.append_column("use", pa.array(np.ones(n, np.bool_)))
    write_catalog(made.sort_by("_healpix_29"), directory, n // 20, "bench.pairs")


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def measure(pairs: Path, out: Path, workers: int, params: dict[str, Any]) -> dict[str, float]:
    """Train once; CPU seconds of driver and workers, and wall seconds."""
    settings = TrainSettings(
        method="boosted", params=params, problem=PROBLEM, validation="holdout",
        distributed="always" if workers else "never",
    )  # fmt: skip
    leave_pandas_out()  # as a command does
    with start(workers, "0") as cluster:
        of_workers = cluster.client.run if cluster.client else lambda function: {}
        wall, driver, there = time.monotonic(), cpu_seconds(), of_workers(cpu_seconds)
        train(Catalog.open(pairs), out, settings, cluster=cluster)
        after = of_workers(cpu_seconds)
        return {
            "driver": cpu_seconds() - driver,
            "workers": sum(after.values()) - sum(there.values()),
            "wall": time.monotonic() - wall,
        }


def held_out(model: Path) -> np.ndarray:
    """Predictions of the held-out pairs, shape (n, l)."""
    names = [label.delta for label in PROBLEM.labels]
    return matrix32(pq.read_table(model / "held_out.parquet", columns=names), names)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where pairs are kept for the next time")
    parser.add_argument("--params", type=json.loads, default={}, help="of the method, as JSON")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        pairs, out, workers = given.measure
        print(json.dumps(measure(Path(pairs), Path(out), int(workers), given.params)))
        return
    with TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        pairs = folder / f"pairs-{given.pairs}"
        if not (pairs / "manifest.json").exists():
            make_pairs(given.pairs, pairs)
        sides = {0: "one process", given.workers: f"{given.workers} workers"}
        rows: list[tuple[str, ...]] = []
        spent: dict[int, list[float]] = {workers: [] for workers in sides}
        models: list[Path] = []
        for number in range(given.times):
            for workers, name in sides.items():
                models.append(Path(temporary) / f"model-{workers}-{number}")
                command = [sys.executable, "-m", "tests.bench.distributed", "--params"]
                command += [json.dumps(given.params), "--measure", str(pairs), str(models[-1])]
                answer = subprocess.check_output([*command, str(workers)], text=True)
                one = json.loads(answer.splitlines()[-1])
                spent[workers].append(one["driver"] + one["workers"])
                rows.append((name, *(f"{one[of]:.1f}" for of in ("driver", "workers", "wall"))))
        columns = "training, >CPU-s of the driver, >of the workers, >wall seconds"
        print("\n".join(table(columns, rows)))
        ratio = min(spent[given.workers]) / min(spent[0])
        print(f"Least CPU seconds, {given.workers} workers / one process: {ratio:.3f}")
        apart = np.abs(held_out(models[-2]) - held_out(models[-1]))
        worst = zip(PROBLEM.names, np.percentile(apart, 99.9, axis=0), strict=True)
        print("Held-out predictions, 99.9th percentile of |difference|:")
        print(", ".join(f"{name} {value:.2g}" for name, value in worst))


if __name__ == "__main__":
    main()
