"""Rebuilds of small jobs: what is published, that no row is lost."""

import contextlib
import json
import re
import shutil
import subprocess
import sys

import lsdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from scipy.stats import spearmanr

from sos_dask.correct import FLAG_NULL_INPUT, FLAG_QUALITY
from sos_dask.errors import CatalogError, ConfigError, ModelError
from sos_dask.evidence.coverage import WRONG_SIGMA, CoverageModel
from sos_dask.rebuild.job import ReportSection, load_job
from sos_dask.rebuild.pipeline import rebuild
from sos_dask.rebuild.plan import plan
from sos_dask.schema import LABELS
from sos_dask.stages.coverage import read_overlap
from sos_dask.stages.evidence import read_evidence
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.parts import FOLDER
from sos_dask.storage.store import costs, gc, status, verify
from tests.conftest import ROOT
from tests.job import contents, write_job
from tests.rebuild.conftest import SNR_30, downstream, ran, reasons

CATALOGS = (
    "lamost.observations", "lamost.stars", "apogee.observations", "apogee.stars",
    "galah.observations", "galah.stars", "reference", "lamost.pairs", "lamost.corrected",
)  # fmt: skip


LOOK = """
import json, os, sys
from pathlib import Path
current, stop = Path(sys.argv[1]), sys.argv[2]
seen, failures, n = set(), [], 0
print("ready", flush=True)
while n % 256 or not os.path.exists(stop):
    n += 1
    try:
        name = os.readlink(current)
        if name not in seen:
            seen.add(name)
            build = current.parent / name
            for product in json.loads((build / "build.json").read_text())["products"]:
                os.stat(build / product / "manifest.json")
    except OSError as error:
        failures.append(str(error))
print(json.dumps({"seen": len(seen), "failures": failures, "n": n}))
"""


def read(catalog: Catalog) -> pa.Table:
    return pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])


def test_every_account_closes_and_is_true(small_store, small_sky):
    current = small_store / "current"
    manifests = {product: Manifest.load(current / product) for product in CATALOGS}
    for product, manifest in manifests.items():
        rows = manifest.rows
        left = rows.n_in + sum(rows.added.values())
        assert left == rows.n_out + rows.rejected + sum(rows.dropped.values()), product
        files = (current / product / "dataset").rglob("*.parquet")
        assert sum(pq.read_metadata(file).num_rows for file in files) == rows.n_out, product
        catalog = Catalog.open(current / product)
        assert int(catalog.properties["hats_nrows"]) == rows.n_out
    out = {product: manifest.rows.n_out for product, manifest in manifests.items()}
    n_in = {product: manifest.rows.n_in for product, manifest in manifests.items()}
    for survey in ("lamost", "apogee", "galah"):
        with fits.open(small_sky / f"{survey}.fits") as file:
            assert n_in[f"{survey}.observations"] == len(file[1].data)
        assert n_in[f"{survey}.stars"] == out[f"{survey}.observations"]
    assert n_in["reference"] == out["apogee.stars"] + out["galah.stars"]
    assert n_in["lamost.pairs"] == out["lamost.observations"]
    assert Manifest.load(current / "lamost.model.polynomial").rows.n_in == out["lamost.pairs"]
    assert n_in["lamost.corrected"] == out["lamost.corrected"] == out["lamost.observations"]


def test_rejected_rows_are_in_a_table_with_their_reason(small_store):
    manifest = Manifest.load(small_store / "current/apogee.observations")
    table = pq.read_table(small_store / "current/apogee.observations/rejected.parquet")
    assert table.num_rows == manifest.rows.rejected == sum(manifest.summary["rejected"].values())
    assert set(table["file"].to_pylist()) == {"apogee.fits"}
    assert set(table["reason"].to_pylist()) == set(manifest.summary["rejected"])


def test_all_catalogs_hold_every_invariant(small_store):
    for product in CATALOGS:
        assert verify(small_store / "current" / product) == [], product


def test_corrected_has_every_column_and_row_of_the_observations(small_store):
    observations = Catalog.open(small_store / "current/lamost.observations")
    corrected = Catalog.open(small_store / "current/lamost.corrected")
    new = [f"{label}_{suffix}" for suffix in ("sos", "delta") for label in LABELS]
    new += [f"{label}_{suffix}" for label in LABELS for suffix in ("sos_err", "sos_err_pair")]
    assert corrected.schema.names == [*observations.schema.names, *new, "coverage", "flag_sos"]
    assert corrected.pixels == observations.pixels
    before, after = read(observations), read(corrected)
    assert after.select(before.schema.names).equals(before)
    known = pc.and_(
        pc.and_(pc.is_valid(before["teff"]), pc.is_valid(before["logg"])),
        pc.is_valid(before["feh"]),
    ).to_numpy()
    assert 0 < np.count_nonzero(~known) < len(known)
    for label in LABELS:
        delta, sos = after[f"{label}_delta"], after[f"{label}_sos"]
        assert (pc.is_valid(delta).to_numpy() == known).all()
        assert (pc.is_valid(sos).to_numpy() == known).all()
        expected = pc.subtract(before[label].filter(pa.array(known)), delta.drop_null())
        assert sos.drop_null().equals(expected)
        assert np.abs(delta.drop_null().to_numpy()).max() > 0
    flags = after["flag_sos"].to_numpy()
    assert ((flags & FLAG_NULL_INPUT != 0) == ~known).all()
    assert ((flags & FLAG_QUALITY != 0) == (before["quality"].to_numpy() != 0)).all()


def test_corrected_columns_carry_their_units(small_store):
    catalog = Catalog.open(small_store / "current/lamost.corrected")
    schema = pq.read_schema(catalog.partition_file(catalog.pixels[0]))
    for name, unit in (("teff_sos", b"K"), ("logg_delta", b"log10(cm/s2)"), ("feh_sos", b"dex")):
        assert schema.field(name).metadata[b"unit"] == unit


def test_products_are_named_as_documented(small_store):
    build = json.loads((small_store / "current/build.json").read_text())
    products = list(build["products"])
    assert set(CATALOGS) <= set(products)
    assert products.index("lamost.observations") < products.index("lamost.stars")
    table = (ROOT / "README.md").read_text().split("| product |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([\w.]+)`", "".join(line.split("|")[1] for line in
                table.splitlines() if line.startswith("| `"))))  # fmt: skip
    assert named >= {"reference", "lamost.pairs", "lamost.corrected"}
    asked = {
        "lamost.model.boosted",
        "lamost.generalisation",
        "lamost.projection",
        "report",
        "sos.report",
    }  # where a job has them
    assert named - asked <= set(products)
    for product in products:
        link = small_store / "current" / product
        assert link.is_symlink() and not link.readlink().is_absolute()
        assert link.resolve().name == build["products"][product]


def test_an_unchanged_rebuild_does_nothing(job, store):
    before = {path: path.lstat().st_mtime_ns for path in store.rglob("*")}

    def no_cluster():
        raise AssertionError("a cluster was started for nothing")

    build = rebuild(job, cluster=no_cluster)
    assert ran(build) == set()
    assert {stage.why for stage in build.stages} == {"unchanged"}
    assert build.path == (store / "current").resolve()
    after = {path: path.lstat().st_mtime_ns for path in store.rglob("*")}
    assert after == before


def test_what_outputs_took_is_remembered_beside_them(job, store):
    shutil.rmtree((store / "current/lamost.model.polynomial").resolve())
    rebuild(job)
    fingerprint = Manifest.load(store / "current/lamost.model.polynomial").fingerprint
    cost = costs(store)[fingerprint]
    assert 0 < cost["cpu_s"] < 60 and 0 < cost["wall_s"] < 120
    (store / "costs.json").write_text("{")
    assert costs(store) == {}
    assert ran(rebuild(job)) == set()


def test_a_removed_output_is_made_again_with_the_same_bytes(job, store):
    before = contents(store / "artifacts")
    shutil.rmtree((store / "current/galah.stars").resolve())
    assert [text for text in status(store).missing if text.startswith("galah.stars")]
    assert reasons(job) == {"galah.stars": "its output was removed"}
    assert ran(rebuild(job)) == {"galah.stars"}
    assert contents(store / "artifacts") == before
    assert status(store).missing == ()


def test_a_failed_rebuild_leaves_the_current_build(job, store, small_sky):
    before, published = contents(store / "current"), (store / "current").readlink()
    only_best = (SNR_30[0], SNR_30[1].replace("30", "1e5"))
    changed = load_job(write_job(store.parent, small_sky, only_best))
    with pytest.raises(ModelError, match="0 pairs are fit for training"):
        rebuild(changed)
    assert (store / "current").readlink() == published
    assert contents(store / "current") == before
    assert len(list((store / "builds").iterdir())) == 1
    assert status(store).unused_bytes > 0
    # What was made before the failure is used when the job is mended but for that.
    assert set(reasons(changed)) == downstream(changed, "lamost.model.polynomial")


def test_a_damaged_build_file_does_not_block_a_rebuild(job, store):
    (store / "current/build.json").write_text("{")
    with pytest.raises(CatalogError, match="is not a build"):
        status(store)
    build = rebuild(job)
    assert ran(build) == set()
    assert status(store).current == build.name
    assert len(status(store).builds) == 2


def test_current_is_swapped_atomically(job, changed, store, tmp_path):
    """Another process that looks all the time always finds a whole build."""
    reader = subprocess.Popen(
        [sys.executable, "-c", LOOK, str(store / "current"), str(tmp_path / "stop")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
    try:
        for _ in range(8):
            rebuild(job)
            rebuild(changed)
    finally:
        (tmp_path / "stop").touch()
        found = json.loads(reader.communicate(timeout=60)[0])
    assert found["failures"] == []
    assert found["seen"] > 10 and found["n"] > 1000
    assert len(list((store / "builds").iterdir())) == 18


def test_gc_keeps_what_is_used(changed, store):
    first, second = sorted((store / "builds").iterdir())
    assert (store / "current").resolve() == second
    litter = store / "artifacts/apply/0123"
    (litter / ".work").mkdir(parents=True)
    (litter / ".work/fingerprint").write_text("0123")
    both = contents(store / "artifacts")

    doomed = gc(store, keep=1, dry_run=True)
    assert contents(store / "artifacts") == both and first.is_dir()
    assert {path for path, _ in gc(store, keep=2, dry_run=True)} == {litter}

    removed = gc(store, keep=1)
    assert removed == doomed
    gone = {path for path, _ in removed if FOLDER not in path.parts}
    assert first in gone and litter in gone
    assert len(gone) == 2 + len(downstream(changed, "lamost.observations"))
    assert sum(size for _, size in removed) > 0
    assert not first.exists()
    for product in CATALOGS:
        assert verify(second / product) == []
    assert status(store).unused_bytes == 0
    assert gc(store, keep=1) == []
    assert ran(rebuild(changed)) == set()
    with pytest.raises(ConfigError, match="the current one always stays"):
        gc(store, keep=0)


def test_one_reference_observations_and_margins(store, small_sky, tmp_path):
    galah = '[reference.galah]\nsurvey = "galah-dr4"\nfiles = ["${SMALL_SKY}/galah.fits"]\n'
    changes = (
        (galah, ""),
        ("rows_per_partition = 1500", "rows_per_partition = 1500\nmargin_arcsec = 20.0"),
        ("[train]", '[gate]\nenabled = false\n[crossmatch]\ntarget = "observations"\n[train]'),
    )
    build = rebuild(load_job(write_job(tmp_path, small_sky, *changes)))
    names = [stage.product for stage in build.stages]
    assert {"lamost.stars", "apogee.stars"} <= set(names)
    assert not [name for name in names if name.startswith("galah")]
    assert "lamost.observations" not in ran(build), "a margin is no reason to ingest again"
    pairs = Catalog.open(build.path / "lamost.pairs")
    assert "target_obs_id" in pairs.schema.names
    observations = Catalog.open(build.path / "lamost.observations")
    assert Manifest.load(build.path / "lamost.pairs").rows.n_in == observations.n_rows
    table = read(pairs)
    assert pc.count_distinct(table["target_obs_id"]).as_py() == table.num_rows

    collection = lsdb.open_catalog(build.path / "lamost.collection")
    assert collection.hc_structure.catalog_info.total_rows == observations.n_rows
    assert collection.margin is not None
    assert collection.margin.hc_structure.catalog_info.margin_threshold == 20.0
    rows = Manifest.load(build.path / "lamost.collection/margin").rows
    assert collection.margin.hc_structure.catalog_info.total_rows == rows.n_out > 0

    # Everything is published by links: it works after old builds are gone.
    gc(store, keep=1)
    assert verify(build.path / "lamost.collection") == []
    assert verify(build.path / "lamost.collection/margin") == []
    assert ran(rebuild(load_job(tmp_path / "job.toml"))) == set()
    again = lsdb.open_catalog(build.path / "lamost.collection")
    assert again.hc_structure.catalog_info.total_rows == observations.n_rows


def test_the_store_can_be_given(small_sky, small_store, tmp_path):
    job = load_job(write_job(tmp_path, small_sky))
    assert all(stage.complete for stage in plan(job, small_store))
    assert not any(stage.complete for stage in plan(job))


@pytest.mark.slow
def test_real_giants_are_corrected(real_data, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SOS_REAL_DATA", str(real_data))
    job = load_job(ROOT / "jobs/real.toml")
    build = rebuild(job, tmp_path / "store", cluster=lambda: contextlib.nullcontext(cluster))
    stages = {stage.product: stage for stage in build.stages}
    observations = stages["lamost.observations"]
    assert (observations.rows.n_in, observations.rows.n_out) == (27_125, 21_960)
    assert observations.rows.dropped == {"exact duplicates": 5165}
    assert stages["lamost.pairs"].rows.n_out == 736
    assert stages["lamost.pairs"].summary["reference_stars"] == 601
    assert stages["lamost.corrected"].rows.n_out == 21_960
    feh = [metric for metric in build.choices["lamost"].metrics if metric.label == "feh"]
    assert {metric.method for metric in feh} >= {"polynomial", "boosted"}
    best = min(feh, key=lambda metric: metric.scatter_after)
    assert best.n == 736
    assert best.scatter_before > 0.11
    assert best.scatter_after <= 0.062
    assert abs(best.median_after) <= 0.01


@pytest.mark.slow
def test_the_coverage_tells_errors_of_real_stars(real_data, tmp_path, monkeypatch):
    monkeypatch.setenv("SOS_REAL_DATA", str(real_data))
    job = load_job(ROOT / "jobs/real-galah.toml")
    # The report takes as long as the rest, and `test_real_giants_are_corrected` makes one.
    job = job.model_copy(update={"report": ReportSection(enabled=False)})
    build = rebuild(job, tmp_path / "store")
    stages = {stage.product: stage for stage in build.stages}
    assert stages["galah.pairs"].rows.n_out == 614
    current = (tmp_path / "store" / "current").resolve()
    method = Manifest.load(current / "galah.comparison").summary["method"]
    overlap = read_overlap(current / "galah.evidence", current / f"galah.model.{method}")
    stars = read_evidence(current / "galah.evidence", ["star"])["star"].to_numpy()
    model = CoverageModel.load(current / "galah.coverage")
    score, _ = model.coverage(overlap.columns)
    logg, snr = (overlap.columns[name] for name in ("logg", "snr"))
    noise = model.noise(logg, snr, overlap.reference_error)
    ratio = np.abs(overlap.residual / noise)
    right = ratio.min(axis=1) <= WRONG_SIGMA
    assert np.count_nonzero(right) > 590
    distance, error = -score[right], np.sqrt(np.mean(np.square(ratio[right]), axis=1))

    def found(rows) -> tuple[float, float]:
        """Rank correlation, and mean error of the farthest tenth over that of the nearer half."""
        d, e = distance[rows], error[rows]
        far, near = d >= np.quantile(d, 0.9), d <= np.median(d)
        return spearmanr(d, e).statistic, e[far].mean() / e[near].mean()

    # Resamples of stars, whose pairs are drawn together.
    _, star = np.unique(stars[right], return_inverse=True)
    rows, rng, drawn = np.argsort(star, kind="stable"), np.random.default_rng(0), []
    of_star = np.split(rows, np.flatnonzero(np.diff(star[rows])) + 1)
    assert 500 < len(of_star) < len(rows)
    for _ in range(1000):
        chosen = rng.integers(0, len(of_star), len(of_star))
        drawn.append(found(np.concatenate([of_star[number] for number in chosen])))
    low = np.percentile(drawn, 2.5, axis=0)
    assert low[0] > 0.15 and low[1] > 1.2, (low, found(rows))
