"""The demonstration: a simulated sky, its job file, and the comparison with the truth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sos_dask.run.cluster import Report, silent
from sos_dask.schema import LABELS
from sos_dask.simulate import SkySettings, simulate
from sos_dask.stats.binned import binned_quantiles, bins_of, rms_of_medians
from sos_dask.storage.artifact import write_text
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import canonical_json

# Where stars of all kinds are many: 95 % of the overlap; the sparse edges are outside.
DENSE = {"teff": (4000.0, 6800.0), "logg": (1.2, 5.0), "feh": (-1.2, 0.2)}
N_BINS = 20
MIN_STARS_A_BIN = 50


@dataclass(frozen=True)
class Recovery:
    """How far binned medians of label - truth are from zero, before and after the correction.

    Parameters
    ----------
    label, binned_by : str
    n_bins, n : int
        Bins with enough rows, and rows in them.
    rms_before, rms_after : float
        Root mean square over the bins, in the unit of the label.
    """

    label: str
    binned_by: str
    n_bins: int
    n: int
    rms_before: float
    rms_after: float


def prepare(store: Path, n_lamost: int, seed: int, report: Report = silent) -> Path:
    """Simulate the sky of the demonstration, unless it is there, and write its job file.

    Returns
    -------
    Path
        The job file, in ``store``.
    """
    sky = store / "sky"
    wanted = canonical_json({"n_lamost": n_lamost, "seed": seed})
    done = sky / "settings.json"
    if not done.is_file() or done.read_text("utf-8") != wanted:
        done.unlink(missing_ok=True)

        def progress(survey: str, rows: int, total: int) -> None:
            report(f"simulate {survey}", rows, total)

        simulate(SkySettings(n_lamost=n_lamost, seed=seed), sky, progress)
        write_text(done, wanted)
    job = store / "demo.toml"
    template = resources.files("sos_dask") / "templates" / "demo.toml"
    write_text(job, template.read_text("utf-8"))
    return job


def against_truth(corrected: Path, truth: Path) -> list[Recovery]:
    """Compare corrected LAMOST labels with the truth of the simulation, in the dense region.

    Rows that fail a quality cut, outliers and rows without a correction are left out. The bins are
    equal parts of the dense region in the observed labels.
    """
    known = _true_labels(truth)
    keys = known["obs_id"].to_numpy()
    catalog = Catalog.open(corrected)
    columns = ["obs_id", "quality", *LABELS, *(f"{label}_sos" for label in LABELS)]
    parts = []
    for pixel in catalog.pixels:
        table = catalog.read(pixel, columns)
        good = pc.and_(pc.equal(table["quality"], 0), pc.is_valid(table["feh_sos"]))
        table = table.filter(good)
        row = np.searchsorted(keys, table["obs_id"].to_numpy())
        true = known.take(pa.array(row))
        values = [table[name].to_numpy() for name in columns[2:]]
        values += [true[label].to_numpy() for label in LABELS]
        parts.append(np.stack(values, axis=1)[~true["is_outlier"].to_numpy()])
    rows = np.concatenate(parts)
    before, after, true_labels = rows[:, :3], rows[:, 3:6], rows[:, 6:]
    inside = np.ones(len(rows), dtype=bool)
    for number, label in enumerate(LABELS):
        low, high = DENSE[label]
        inside &= (before[:, number] >= low) & (before[:, number] < high)
    found = []
    for number, label in enumerate(LABELS):
        for other, binned_by in enumerate(LABELS):
            bins = bins_of(before[inside, other], np.linspace(*DENSE[binned_by], N_BINS + 1))
            rms = []
            for residual in (before - true_labels, after - true_labels):
                some = binned_quantiles(bins, residual[inside, number], N_BINS)
                rms.append(rms_of_medians(some.n, some.median, MIN_STARS_A_BIN)[0] or math.nan)
            used = some.n[some.n >= MIN_STARS_A_BIN]
            found.append(Recovery(label, binned_by, len(used), int(used.sum()), *rms))
    return found


def _true_labels(truth: Path) -> pa.Table:
    columns = ["survey", "obs_id", *LABELS, "is_outlier"]
    table = pq.read_table(truth, columns=columns)
    table = table.filter(pc.equal(table["survey"], "lamost")).drop_columns(["survey"])
    keys = table["obs_id"].cast(pa.int64())
    return table.set_column(0, "obs_id", keys).sort_by("obs_id")
