"""Rebuilds of small jobs: what runs and why, what is published, that no row is lost."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lsdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from scipy.stats import spearmanr

from sos_dask.correct import FLAG_NULL_INPUT, FLAG_QUALITY
from sos_dask.errors import CatalogError, ConfigError, ModelError, PartitionError, SurveyError
from sos_dask.evidence.coverage import WRONG_SIGMA, CoverageModel
from sos_dask.rebuild.job import ReportSection, load_job
from sos_dask.rebuild.pipeline import rebuild
from sos_dask.rebuild.plan import plan
from sos_dask.run.cluster import Cluster
from sos_dask.schema import LABELS
from sos_dask.stages.coverage import read_overlap
from sos_dask.stages.evidence import read_evidence
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.store import costs, gc, status, verify
from tests.conftest import ROOT
from tests.job import contents, write_job

SNR_30 = ('files = ["${SMALL_SKY}/lamost.fits"]', 'files = ["${SMALL_SKY}/lamost.fits"]\n'
          "override = { cuts = { snr = { min = 30 } } }")  # fmt: skip
CATALOGS = (
    "lamost.observations", "lamost.stars", "apogee.observations", "apogee.stars",
    "galah.observations", "galah.stars", "reference", "pairs", "lamost.corrected",
)  # fmt: skip
OF_LAMOST = {
    "lamost.observations", "lamost.stars", "pairs", "model.polynomial", "comparison", "uncertainty",
    "coverage", "lamost.corrected",
}  # fmt: skip
OF_GALAH = {"galah.observations", "galah.stars", "reference", "pairs", "lamost.corrected"}


def read(catalog: Catalog) -> pa.Table:
    return pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])


def ran(build) -> set[str]:
    return {stage.product for stage in build.stages if stage.ran}


def reasons(job, store=None) -> dict[str, str]:
    return {stage.product: stage.reason for stage in plan(job, store) if not stage.complete}


def downstream(job, *first: str) -> set[str]:
    """Products that are made of some products, directly or not, and these."""
    found = set(first)
    fingerprints = {s.recipe.fingerprint for s in plan(job) if s.product in found}
    for stage in plan(job):
        if fingerprints & set(stage.recipe.inputs.values()):
            found.add(stage.product)
            fingerprints.add(stage.recipe.fingerprint)
    return found


@pytest.fixture
def store(small_store, small_sky, tmp_path) -> Path:
    """A copy of the store beside its job, free to be changed."""
    shutil.copytree(small_store, tmp_path / "store", symlinks=True)
    write_job(tmp_path, small_sky)
    return tmp_path / "store"


@pytest.fixture(scope="module")
def twice_built(small_store, small_sky, tmp_path_factory) -> Path:
    """A store with a second build, of another cut; only to be copied, as `changed` does."""
    folder: Path = tmp_path_factory.mktemp("twice")
    shutil.copytree(small_store, folder / "store", symlinks=True)
    rebuild(load_job(write_job(folder, small_sky, SNR_30)))
    return folder / "store"


@pytest.fixture
def changed(store, twice_built, small_sky):
    """The job with the other cut, which is built in the store."""
    shutil.rmtree(store)
    shutil.copytree(twice_built, store, symlinks=True)
    return load_job(write_job(store.parent, small_sky, SNR_30))


@pytest.fixture
def job(store):
    return load_job(store.parent / "job.toml")


# -- no row is lost -------------------------------------------------------------------------------


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
    assert n_in["pairs"] == out["lamost.stars"]
    assert Manifest.load(current / "model.polynomial").rows.n_in == out["pairs"]
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


# -- the product ----------------------------------------------------------------------------------


def test_corrected_has_every_column_and_row_of_the_observations(small_store):
    observations = Catalog.open(small_store / "current/lamost.observations")
    corrected = Catalog.open(small_store / "current/lamost.corrected")
    new = [f"{label}_{suffix}" for suffix in ("sos", "delta", "sos_err") for label in LABELS]
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
    assert named >= {"reference", "pairs", "lamost.corrected"}
    asked = {"model.boosted", "generalisation", "projection", "report"}  # where a job has them
    assert named - asked <= set(products)
    for product in products:
        link = small_store / "current" / product
        assert link.is_symlink() and not link.readlink().is_absolute()
        assert link.resolve().name == build["products"][product]


# -- what runs, and why ---------------------------------------------------------------------------


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


def test_a_changed_setting_runs_what_depends_on_it(job, store, small_sky):
    changed = load_job(write_job(store.parent, small_sky, SNR_30))
    why = reasons(changed)
    assert set(why) == downstream(changed, "lamost.observations") >= OF_LAMOST
    assert not {"apogee.stars", "galah.stars", "reference"} & set(why)
    assert why["lamost.observations"] == "cuts.snr.min 20 -> 30"
    assert why["lamost.stars"] == "lamost.observations changed"
    assert why["pairs"] == "lamost.stars changed"
    assert why["lamost.corrected"] == (
        "comparison changed; lamost.observations changed; uncertainty changed; coverage changed; "
        "model.polynomial changed"
    )
    before = contents(store / "artifacts")
    build = rebuild(changed, cluster=Cluster())
    assert ran(build) == set(why)
    after = contents(store / "artifacts")
    assert {name: after[name] for name in before} == before, "an old output was changed"
    good = {
        name: Manifest.load(path / "lamost.observations").summary["pass_all_cuts"]
        for name, path in (("old", sorted((store / "builds").iterdir())[0]), ("new", build.path))
    }
    assert 0 < good["new"] < good["old"]
    assert ran(rebuild(job)) == set(), "the first setting's outputs are still there"


@pytest.mark.parametrize(
    ("change", "first", "why"),
    [
        (("rows_per_partition = 1500", "rows_per_partition = 1000"), "lamost.observations",
         "rows_per_partition 1500 -> 1000"),
        (("[train]", '[dedupe]\nmethod = "best-snr"\n[train]'), "lamost.stars",
         "method inverse-variance -> best-snr"),
        (("[train]", "[reference_union]\nradius_arcsec = 2.0\n[train]"), "reference",
         "radius_arcsec 1.5 -> 2"),
        (("[train]", "[crossmatch]\nn_folds = 4\n[train]"), "pairs", "n_folds 5 -> 4"),
        (("[train]", "[train.params.polynomial]\norder = 3\n[train]"), "model.polynomial",
         "params.order 4 -> 3"),
        (("[train]", '[compare]\nrule = "scatter"\n[train]'), "comparison",
         "rule balanced -> scatter"),
        (("[train]", '[uncertainty]\nreference_error = "removed"\n[train]'), "uncertainty",
         "reference_error included -> removed"),
    ],
)  # fmt: skip
def test_a_plan_says_why(job, store, small_sky, change, first, why):
    found = reasons(load_job(write_job(store.parent, small_sky, change)))
    assert found[first] == why
    products = [stage.product for stage in plan(job)]
    earlier = products[: products.index(first)]
    assert not [name for name in earlier if name in found and not name.endswith(".observations")]


def test_how_a_model_was_chosen_does_not_matter_to_what_it_corrects(job, store, small_sky):
    """Another setting of the comparison runs it alone, unless it chooses another model."""
    before = contents(store / "artifacts")
    more = write_job(store.parent, small_sky, ("[train]", "[compare]\nn_bootstrap = 150\n[train]"))
    assert set(reasons(load_job(more))) == {  # the model is not known before
        "comparison", "uncertainty", "coverage", "lamost.corrected",
    }  # fmt: skip
    build = rebuild(load_job(more))
    assert ran(build) == {"comparison"}
    assert build.chosen == "polynomial" and build.why == "polynomial: the only method"
    named = write_job(
        store.parent, small_sky, ("[train]", '[compare]\nrule = "polynomial"\n[train]')
    )
    assert set(reasons(load_job(named))) == {"comparison"}
    after = contents(store / "artifacts")
    assert {name: after[name] for name in before} == before


def test_what_outputs_took_is_remembered_beside_them(job, store):
    shutil.rmtree((store / "current/model.polynomial").resolve())
    rebuild(job)
    fingerprint = Manifest.load(store / "current/model.polynomial").fingerprint
    cost = costs(store)[fingerprint]
    assert 0 < cost["cpu_s"] < 60 and 0 < cost["wall_s"] < 120
    (store / "costs.json").write_text("{")
    assert costs(store) == {}
    assert ran(rebuild(job)) == set()


def test_a_touched_file_is_the_same_and_a_changed_one_is_not(small_sky, store, tmp_path):
    sky = shutil.copytree(small_sky, tmp_path / "sky")
    job = load_job(write_job(tmp_path, sky))
    os.utime(sky / "galah.fits")
    assert reasons(job) == {}
    with fits.open(sky / "galah.fits", mode="update") as file:
        file[1].data["teff"][7] += 1.0
    why = reasons(job)
    assert why["galah.observations"] == "galah.fits changed"
    assert set(why) == downstream(job, "galah.observations") >= OF_GALAH
    assert not {"lamost.stars", "apogee.stars"} & set(why)
    assert why["galah.stars"] == "galah.observations changed"


def test_a_removed_output_is_made_again_with_the_same_bytes(job, store):
    before = contents(store / "artifacts")
    shutil.rmtree((store / "current/galah.stars").resolve())
    assert [text for text in status(store).missing if text.startswith("galah.stars")]
    assert reasons(job) == {"galah.stars": "its output was removed"}
    assert ran(rebuild(job)) == {"galah.stars"}
    assert contents(store / "artifacts") == before
    assert status(store).missing == ()


def test_a_first_plan_says_that_nothing_is_there(small_sky, tmp_path):
    job = load_job(write_job(tmp_path, small_sky))
    assert set(reasons(job).values()) == {"not built before"}


def test_an_unknown_method_or_a_missing_file_is_told_before_anything_runs(small_sky, tmp_path):
    methods = ('methods = ["polynomial"]', 'methods = ["polynomal"]')
    job = load_job(write_job(tmp_path, small_sky, methods))
    with pytest.raises(ConfigError, match=r"there is no method 'polynomal'\n.*polynomial"):
        plan(job)
    rule = ("[train]", '[compare]\nrule = "smoothest"\n[train]')
    with pytest.raises(ConfigError, match="there is no rule 'smoothest'"):
        plan(load_job(write_job(tmp_path, small_sky, rule)))
    files = ('files = ["${SMALL_SKY}/galah.fits"]', 'files = ["galah.fits"]')
    with pytest.raises(SurveyError, match=r"galah\.fits does not exist"):
        rebuild(load_job(write_job(tmp_path, small_sky, files)))
    assert not list((tmp_path / "store").glob("artifacts/*"))


# -- failures -------------------------------------------------------------------------------------


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
    assert set(reasons(changed)) == downstream(changed, "model.polynomial")


def test_an_unfinished_output_is_shown_and_goes_on(job, store):
    before = contents(store / "artifacts")
    observations = Catalog.open((store / "current/lamost.observations").resolve())
    shutil.rmtree((store / "current/lamost.stars").resolve())
    broken = observations.partition_file(observations.pixels[-1])
    sound = broken.read_bytes()
    broken.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(CatalogError, match=re.escape(str(broken))):
        rebuild(job)
    teff = (
        pq.read_metadata(pa.BufferReader(sound))
        .row_group(0)
        .column(observations.schema.names.index("teff"))
    )
    last = teff.data_page_offset + teff.total_compressed_size - 1
    broken.write_bytes(sound[:last] + bytes([sound[last] ^ 1]) + sound[last + 1 :])
    with pytest.raises(PartitionError, match=re.escape(str(broken))):
        rebuild(job)
    (unfinished,) = status(store).unfinished
    assert unfinished.startswith("artifacts/dedupe/")
    assert reasons(job) == {"lamost.stars": "unfinished: goes on where it stopped"}
    broken.write_bytes(sound)
    assert ran(rebuild(job)) == {"lamost.stars"}
    assert contents(store / "artifacts") == before
    assert status(store).unfinished == ()


def test_a_damaged_build_file_does_not_block_a_rebuild(job, store):
    (store / "current/build.json").write_text("{")
    with pytest.raises(CatalogError, match="is not a build"):
        status(store)
    build = rebuild(job)
    assert ran(build) == set()
    assert status(store).current == build.name
    assert len(status(store).builds) == 2


# -- publishing -----------------------------------------------------------------------------------


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

    doomed = gc(store, dry_run=True)
    assert contents(store / "artifacts") == both and first.is_dir()
    assert {path for path, _ in gc(store, keep_builds=2, dry_run=True)} == {litter}

    removed = gc(store, keep_builds=1)
    assert removed == doomed
    gone = {path for path, _ in removed}
    assert first in gone and litter in gone
    assert len(gone) == 2 + len(downstream(changed, "lamost.observations"))
    assert sum(size for _, size in removed) > 0
    assert not first.exists()
    for product in CATALOGS:
        assert verify(second / product) == []
    assert status(store).unused_bytes == 0
    assert gc(store) == []
    assert ran(rebuild(changed)) == set()
    with pytest.raises(ConfigError, match="the current one always stays"):
        gc(store, keep_builds=0)


# -- other jobs -----------------------------------------------------------------------------------


def test_one_reference_observations_and_margins(store, small_sky, tmp_path):
    galah = '[reference.galah]\nsurvey = "galah-dr4"\nfiles = ["${SMALL_SKY}/galah.fits"]\n'
    changes = (
        (galah, ""),
        ("rows_per_partition = 1500", "rows_per_partition = 1500\nmargin_arcsec = 20.0"),
        ("[train]", '[crossmatch]\ntarget = "observations"\n[train]'),
    )
    build = rebuild(load_job(write_job(tmp_path, small_sky, *changes)))
    names = [stage.product for stage in build.stages]
    assert {"lamost.stars", "apogee.stars"} <= set(names)
    assert not [name for name in names if name.startswith("galah")]
    assert "lamost.observations" not in ran(build), "a margin is no reason to ingest again"
    pairs = Catalog.open(build.path / "pairs")
    assert "target_obs_id" in pairs.schema.names
    observations = Catalog.open(build.path / "lamost.observations")
    assert Manifest.load(build.path / "pairs").rows.n_in == observations.n_rows
    table = read(pairs)
    assert pc.count_distinct(table["target_obs_id"]).as_py() == table.num_rows

    collection = lsdb.open_catalog(build.path / "lamost.collection")
    assert collection.hc_structure.catalog_info.total_rows == observations.n_rows
    assert collection.margin is not None
    assert collection.margin.hc_structure.catalog_info.margin_threshold == 20.0
    rows = Manifest.load(build.path / "lamost.collection/margin").rows
    assert collection.margin.hc_structure.catalog_info.total_rows == rows.n_out > 0

    # Everything is published by links: it works after old builds are gone.
    gc(store)
    assert verify(build.path / "lamost.collection") == []
    assert verify(build.path / "lamost.collection/margin") == []
    assert ran(rebuild(load_job(tmp_path / "job.toml"))) == set()
    again = lsdb.open_catalog(build.path / "lamost.collection")
    assert again.hc_structure.catalog_info.total_rows == observations.n_rows


def test_one_definition_of_two_surveys_makes_no_confusion(small_sky, tmp_path):
    """The same survey twice, under two names: their products differ by name alone."""
    galah = '[reference.galah]\nsurvey = "galah-dr4"\nfiles = ["${SMALL_SKY}/galah.fits"]\n'
    twin = '[reference.apogee2]\nsurvey = "apogee-dr17"\nfiles = ["${SMALL_SKY}/apogee.fits"]\n'
    job = load_job(write_job(tmp_path, small_sky, (galah, twin)))
    directories = [stage.directory for stage in plan(job)]
    assert len(set(directories)) == len(directories)


def test_the_store_can_be_given(small_sky, small_store, tmp_path):
    job = load_job(write_job(tmp_path, small_sky))
    assert all(stage.complete for stage in plan(job, small_store))
    assert not any(stage.complete for stage in plan(job))


# -- real data ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_giants_are_corrected(real_data, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SOS_REAL_DATA", str(real_data))
    job = load_job(ROOT / "jobs/real.toml")
    build = rebuild(job, tmp_path / "store", cluster=lambda: contextlib.nullcontext(cluster))
    stages = {stage.product: stage for stage in build.stages}
    observations = stages["lamost.observations"]
    assert (observations.rows.n_in, observations.rows.n_out) == (27_125, 21_960)
    assert observations.rows.dropped == {"exact duplicates": 5165}
    assert stages["pairs"].rows.n_out == 736
    assert stages["pairs"].summary["reference_stars"] == 601
    assert stages["lamost.corrected"].rows.n_out == 21_960
    feh = [metric for metric in build.metrics if metric.label == "feh"]
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
    assert stages["pairs"].rows.n_out == 614
    current = (tmp_path / "store" / "current").resolve()
    method = Manifest.load(current / "comparison").summary["method"]
    overlap = read_overlap(current / "evidence", current / f"model.{method}")
    stars = read_evidence(current / "evidence", ["star"])["star"].to_numpy()
    model = CoverageModel.load(current / "coverage")
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
