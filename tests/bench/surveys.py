"""What the unified catalog promises, counted on five mock surveys against the truth of their stars.

``python -m tests.bench.surveys --out DIR [--rows 4500000] [--seed 31]``: a sky with clusters and
binaries (at 19,000,000 rows 1,700,000 of the references, 1,000,000 and 600,000 of the others), a
job that corrects LAMOST, RAVE and the RVS of Gaia to APOGEE and GALAH, and what came of it. What is
in DIR already is not made again.

``--cost``: CPU seconds and memory of correcting LAMOST's labels alone, and of the whole job to
``sos`` with the labels of all five, both from the files on.

**Stars.** A star of the truth is split where several stars of ``sos`` have rows of it; a star of
``sos`` is mixed where its rows are of several true stars.

**Error.** Half of the 16-84 % range of label - truth, of stars in several surveys whose label is
right (no flag 1, 2), in bins of Teff, log g, [Fe/H] and G with over 200 stars. A bin of a survey
fails where the averages are off by more than the survey's own corrected labels of the same stars,
and by more than twice the error of the difference (bootstrap by star); the worst ratio is told.

**Pull.** (label - truth) / error; its width is half of its 16-84 % range; of 1 where errors are
right. *Zero points*: median of a survey's velocities on the common scale less the truth. *Factors*:
width of the pulls of a survey's own normalised errors. Pulls of velocities are of stars that are no
binaries, whose mean velocity no error of a row tells.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from sos_dask.columns import FloatArray
from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.pipeline import rebuild
from sos_dask.run.cluster import start
from sos_dask.simulate import SkySettings, simulate
from sos_dask.stages.unify import FLAG_FAILS, FLAG_UNCOVERED, FLAG_VARIABLE
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from tests.bench.measure import SOS, measure

JOB = """format = 1
name = "five"
store = "store"
[targets.lamost]
survey = "lamost-dr11-lrs"
files = ["sky/lamost.fits"]
[targets.rave]
survey = "rave-dr6"
files = ["sky/rave.fits"]
[targets.rvs]
survey = "gaia-dr3-rvs"
files = ["sky/rvs.fits"]
[reference.apogee]
survey = "apogee-dr17"
files = ["sky/apogee.fits"]
[reference.galah]
survey = "galah-dr4"
files = ["sky/galah.fits"]
[corrections.labels]
[corrections.rv]
[train]
methods = ["polynomial", "boosted"]
[report]
enabled = true
[unify]
[validation.clusters]
survey = "members.toml"
files = ["sky/members.parquet"]
group = "cluster"
"""
LIST = """format = 1
name = "members"
title = "Members of clusters"
reference = "the simulation"
position_epoch = 2016.0
[columns]
obs_id = { source = "source_id" }
ra = { source = "ra" }
dec = { source = "dec" }
gaia_dr3_source_id = { source = "source_id" }
[extra.cluster]
source = "cluster"
dtype = "string"
"""
SURVEYS = ("apogee", "galah", "lamost", "rave", "rvs")
LABELS = ("teff", "logg", "feh", "rv")
EDGES = {
    "teff": np.arange(3500.0, 8001.0, 250.0),
    "logg": np.arange(0.0, 5.1, 0.25),
    "feh": np.arange(-2.6, 0.61, 0.2),
    "phot_g_mean_mag": np.arange(8.0, 18.1, 0.5),
}
MIN_STARS = 200
_N_RESAMPLES = 50


def sky(out: Path, rows: int, seed: int) -> None:
    """Simulate what is not there."""
    if not (out / "sky" / "truth.parquet").exists():
        share = rows / 4_500_000
        settings = SkySettings(
            n_lamost=rows, n_rave=round(600_000 * min(share, 1.0)),
            n_rvs=round(2_000_000 * min(share, 0.5 if share > 4 else 1.0)),
            n_clusters=max(20, round(400 * min(share, 1.0))), binaries=0.1, seed=seed,
        )  # fmt: skip
        simulate(settings, out / "sky")


def make(out: Path, workers: int) -> Path:
    """Rebuild what is not there; the build."""
    (out / "job.toml").write_text(JOB)
    (out / "members.toml").write_text(LIST)
    with start(workers) as cluster:
        return rebuild(load_job(out / "job.toml"), cluster=cluster).path


def cost(out: Path, workers: int) -> Iterator[str]:
    """CPU seconds and memory of LAMOST's rebuild and of the whole job."""
    begin, rest = JOB.split("[targets.rave]")
    alone = begin + "[reference.apogee]" + rest.split("[reference.apogee]")[1].split("[unify]")[0]
    whole = JOB.split("[validation")[0]
    seconds = []
    for name, text in (("lamost", alone), ("whole", whole)):
        job = out / f"{name}.toml"
        job.write_text(text.replace("[corrections.rv]\n", "").replace('"store"', f'"{name}"'))
        command = [SOS, "rebuild", str(job), "--workers", str(workers)]
        used = measure(command, out / f"{name}.log")
        seconds.append(used.cpu_s)
        yield (
            f"{name}: {used.cpu_s:.0f} CPU-s, {used.wall_s:.0f} s, largest worker "
            f"{used.worker_gib:.2f} GiB, driver {used.driver_gib:.2f} GiB"
        )
        for part in used.parts:
            if part.cpu_s > 5 or part.name.startswith(("unify", "stars in", "members")):
                yield f"  {part.name}: {part.cpu_s:.1f} CPU-s, worker {part.worker_gib:.2f} GiB"
    yield f"ratio: {seconds[1] / seconds[0]:.2f}"


def width(values: FloatArray) -> float:
    """Half of the 16-84 % range."""
    low, high = np.percentile(values, [16.0, 84.0])
    return float(high - low) / 2


def read(build: Path, truth: Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """Stars with the truth of theirs (``true_*``), and how many were split or mixed."""

    def whole(name: str, columns: list[str] | None = None) -> pd.DataFrame:
        catalog = Catalog.open((build / name).resolve())
        return pd.concat([catalog.read(x, columns).to_pandas() for x in catalog.pixels])

    names = ["survey", "obs_id", "star", "teff", "logg", "feh", "rv", "rv_amplitude"]
    known = pq.read_table(truth, columns=names).to_pandas()
    known.index = known["survey"] + ":" + known["obs_id"]
    members = whole("sos.members", ["obs_id", "star_id"])
    # A key of the simulation may occur again only as an exact duplicate.
    star = known["star"][~known.index.duplicated()].reindex(members["obs_id"]).to_numpy()
    both = pd.DataFrame({"star": star, "star_id": members["star_id"].to_numpy()}).dropna()
    pairs = both.drop_duplicates()
    counts = {
        "stars": pairs["star_id"].nunique(),
        "true stars": pairs["star"].nunique(),
        "split": int((pairs.groupby("star").size() > 1).sum()),
        "mixed": int((pairs.groupby("star_id").size() > 1).sum()),
        "rows": len(members),
        "rows without truth": len(members) - len(both),
    }
    of_star = known.drop_duplicates("star").set_index("star")[[*LABELS, "rv_amplitude"]]
    first = both.drop_duplicates("star_id").set_index("star_id")["star"]
    stars = whole("sos")
    found = of_star.reindex(first.reindex(stars["star_id"])).add_prefix("true_")
    return stars.reset_index(drop=True).join(found.reset_index(drop=True)), counts


def bins(stars: pd.DataFrame, seed: int) -> Iterator[dict[str, Any]]:
    """Errors of averages and of each survey on the same stars, by bins of each quantity."""
    rng = np.random.default_rng(seed)
    right = (stars["flag_sos"] & (FLAG_FAILS | FLAG_UNCOVERED)) == 0
    for label in LABELS:
        use = stars[right & (stars[f"{label}_n"] > 1) & stars[f"true_{label}"].notna()]
        off = (use[label] - use[f"true_{label}"]).to_numpy()
        for survey in SURVEYS:
            own = (use[f"{label}_{survey}"] - use[f"true_{label}"]).to_numpy()
            for quantity, edges in EDGES.items():
                by = use[f"true_{quantity}" if f"true_{quantity}" in use else quantity]
                place = np.digitize(by, edges)
                for number in np.unique(place[np.isfinite(own)]):
                    rows = np.flatnonzero((place == number) & np.isfinite(own))
                    if len(rows) <= MIN_STARS or not 0 < number < len(edges):
                        continue
                    drawn = rng.integers(len(rows), size=(_N_RESAMPLES, len(rows)))
                    more = [width(off[rows[one]]) - width(own[rows[one]]) for one in drawn]
                    yield {
                        "label": label, "survey": survey, "quantity": quantity,
                        "low": edges[number - 1], "n": len(rows), "error": width(off[rows]),
                        "own": width(own[rows]), "sigma": float(np.std(more)),
                    }  # fmt: skip


def told(out: Path, build: Path, seed: int) -> Iterator[str]:
    """What is found, in Markdown."""
    stars, counts = read(build, out / "sky" / "truth.parquet")
    yield ", ".join(f"{name}: {number:,}" for name, number in counts.items())
    found = pd.DataFrame(bins(stars, seed))
    found["ratio"] = found["error"] / found["own"]
    found["fails"] = found["error"] - found["own"] > 2 * found["sigma"]
    right = (stars["flag_sos"] & (FLAG_FAILS | FLAG_UNCOVERED)) == 0
    yield "\n| label | pull width, all stars | several surveys | bins | fail | worst ratio |"
    yield "|---|---|---|---|---|---|"
    for label in LABELS:
        pull = (stars[label] - stars[f"true_{label}"]) / stars[f"{label}_err"]
        good = right & np.isfinite(pull) & ((label != "rv") | (stars["true_rv_amplitude"] == 0))
        several = good & (stars[f"{label}_n"] > 1)
        mine = found[found["label"] == label]
        cells = [f"{width(pull[x]):.3f} ({int(x.sum()):,})" for x in (good, several)]
        cells += [str(len(mine)), str(int(mine["fails"].sum())), f"{mine['ratio'].max():.3f}"]
        yield f"| {label} | {' | '.join(cells)} |"
    for one in found[found["fails"]].itertuples():
        yield (
            f"fails: {one.label} of {one.survey} at {one.quantity} {one.low:g}: "
            f"{one.error:.4g} over {one.own:.4g} +- {one.sigma:.2g} ({one.n} stars)"
        )
    yield "\n| survey | " + " | ".join(f"{x}: offset, pull width" for x in LABELS) + " |"
    yield "|---|" + "---|" * len(LABELS)
    for survey in SURVEYS:
        cells = []
        for label in LABELS:
            off = stars[f"{label}_{survey}"] - stars[f"true_{label}"]
            pull = off / stars[f"{label}_err_{survey}"]
            good = right & np.isfinite(pull)
            good &= (label != "rv") | (stars["true_rv_amplitude"] == 0)
            cells.append(f"{np.median(off[good]):+.3f}, {width(pull[good]):.3f}")
        yield f"| {survey} | {' | '.join(cells)} |"
    flagged, amplitude = stars["flag_sos"] & FLAG_VARIABLE > 0, stars["true_rv_amplitude"]
    often = stars["n_obs"] > 2
    for low, high in ((0.0, 0.0), (2.0, 5.0), (5.0, 10.0), (10.0, 20.0), (20.0, 1e9)):
        some = often & (amplitude >= low) & (amplitude <= high)
        share = flagged[some].mean()
        yield f"velocity of amplitude {low:g}-{high:g} km/s: flagged {share:.4f} of {some.sum()}"
    groups = Manifest.load((build / "clusters.validation").resolve()).summary["groups"]
    yield json.dumps(groups)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4_500_000)
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cost", action="store_true")
    given = parser.parse_args()
    sky(given.out, given.rows, given.seed)
    if given.cost:
        lines = cost(given.out, given.workers)
    else:
        lines = told(given.out, make(given.out, given.workers), given.seed)
    for line in lines:
        print(line, flush=True)
