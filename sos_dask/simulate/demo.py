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
from sos_dask.stats.numbers import binned_quantiles, bins_of, rms_of_medians
from sos_dask.storage.artifact import write_text
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import canonical_json

# Where stars of all kinds are many: 95 % of the overlap; the sparse edges are outside.
DENSE = {"teff": (4000.0, 6800.0), "logg": (1.2, 5.0), "feh": (-1.2, 0.2)}
N_BINS = 20
MIN_STARS_A_BIN = 50


@dataclass(frozen=True)
class Recovery:
    """Rms of the binned medians of label - truth, before and after the correction."""

    label: str
    binned_by: str
    n_bins: int  # with enough rows
    n: int  # rows in them
    rms_before: float  # in the unit of the label
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
        settings = SkySettings(n_lamost=n_lamost, seed=seed)
        simulate(settings, sky, lambda survey, *rows: report(f"simulate {survey}", *rows))
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
    known = pq.read_table(truth, columns=["survey", "obs_id", *LABELS, "is_outlier"])
    known = known.filter(pc.equal(known["survey"], "lamost")).drop_columns(["survey"])
    known = known.set_column(0, "obs_id", known["obs_id"].cast(pa.int64())).sort_by("obs_id")
    keys = known["obs_id"].to_numpy()
    catalog = Catalog.open(corrected)
    columns = ["obs_id", "quality", *LABELS, *(f"{label}_sos" for label in LABELS)]
    parts = []
    for pixel in catalog.pixels:
        table = catalog.read(pixel, columns)
        table = table.filter(pc.and_(pc.equal(table["quality"], 0), pc.is_valid(table["feh_sos"])))
        true = known.take(pa.array(np.searchsorted(keys, table["obs_id"].to_numpy())))
        values = [*table.columns[2:], *true.columns[1:4]]
        rows = np.stack([value.to_numpy() for value in values], axis=1)
        parts.append(rows[~true["is_outlier"].to_numpy()])
    before, after, true_labels = np.split(np.concatenate(parts), 3, axis=1)
    low, high = np.array([DENSE[label] for label in LABELS]).T
    inside = ((before >= low) & (before < high)).all(axis=1)
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
