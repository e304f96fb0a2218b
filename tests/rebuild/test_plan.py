"""What a job asks for: which outputs are made, and why."""

import os
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits

from sos_dask.errors import CatalogError, ConfigError, PartitionError, SurveyError
from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.pipeline import rebuild
from sos_dask.rebuild.plan import plan
from sos_dask.run.cluster import Cluster
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.store import status
from tests.job import contents, write_job
from tests.rebuild.conftest import SNR_30, downstream, ran, reasons

OF_LAMOST = {
    "lamost.observations", "lamost.stars", "lamost.pairs", "lamost.model.polynomial",
    "lamost.comparison", "lamost.uncertainty", "lamost.coverage", "lamost.corrected",
}  # fmt: skip
OF_GALAH = {"galah.observations", "galah.stars", "reference", "lamost.pairs", "lamost.corrected"}


def test_a_changed_setting_runs_what_depends_on_it(job, store, small_sky):
    changed = load_job(write_job(store.parent, small_sky, SNR_30))
    why = reasons(changed)
    assert set(why) == downstream(changed, "lamost.observations") >= OF_LAMOST
    assert not {"apogee.stars", "galah.stars", "reference"} & set(why)
    assert why["lamost.observations"] == "cuts.snr.min 20 -> 30"
    assert why["lamost.stars"] == "lamost.observations changed"
    assert why["lamost.pairs"] == "lamost.observations changed"
    assert why["lamost.corrected"] == (
        "lamost.comparison changed; lamost.observations changed; lamost.uncertainty changed; "
        "lamost.coverage changed"
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
        (("[train]", "[crossmatch]\nn_folds = 4\n[train]"), "lamost.pairs", "n_folds 5 -> 4"),
        (("[train]", "[train.params.polynomial]\norder = 3\n[train]"), "lamost.model.polynomial",
         "params.order 4 -> 3"),
        (("[train]", '[compare]\nrule = "scatter"\n[train]'), "lamost.comparison",
         "rule balanced -> scatter"),
        (("[train]", "[uncertainty]\nsparse_fraction = 0.1\n[train]"), "lamost.uncertainty",
         "sparse_fraction 0.05 -> 0.1"),
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
        "lamost.comparison", "lamost.uncertainty", "lamost.coverage", "lamost.corrected",
    }  # fmt: skip
    build = rebuild(load_job(more))
    assert ran(build) == {"lamost.comparison"}
    (choice,) = build.choices.values()
    assert choice.chosen == "polynomial" and choice.why == "polynomial: the only method"
    named = write_job(
        store.parent, small_sky, ("[train]", '[compare]\nrule = "polynomial"\n[train]')
    )
    assert set(reasons(load_job(named))) == {"lamost.comparison"}
    after = contents(store / "artifacts")
    assert {name: after[name] for name in before} == before


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


def test_one_file_as_two_surveys_is_refused(small_sky, tmp_path):
    """Its stars would agree with themselves, and count twice."""
    galah = '[reference.galah]\nsurvey = "galah-dr4"\nfiles = ["${SMALL_SKY}/galah.fits"]\n'
    twin = '[reference.apogee2]\nsurvey = "apogee-dr17"\nfiles = ["${SMALL_SKY}/apogee.fits"]\n'
    job = load_job(write_job(tmp_path, small_sky, (galah, twin)))
    with pytest.raises(ConfigError, match=r"apogee\.observations: one survey twice"):
        plan(job)


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


TWO = ("[train]", '[corrections.labels]\nlabels = ["teff", "feh"]\n[corrections.rv]\n[train]')


def test_corrections_have_products_of_their_own(job, store, small_sky):
    """Two of one target: pairs and surveys are common, all else is of each."""
    reports = ("enabled = false", "enabled = true")
    two = load_job(write_job(store.parent, small_sky, TWO, reports))
    stages = {stage.product: stage for stage in plan(two)}
    of_first = {name for name in stages if name.startswith("lamost.") and ".rv." not in name}
    common = {"lamost.observations", "lamost.stars", "lamost.pairs", "lamost.sample"}
    own = {name.removeprefix("lamost.") for name in of_first - common}
    assert {f"lamost.rv.{name}" for name in own} | {"lamost.rv.report"} == {
        name for name in stages if ".rv." in name
    }
    pairs = stages["lamost.pairs"].recipe.params["settings"]
    assert pairs["labels"] == ["teff", "feh", "rv"]
    assert set(pairs["inputs"]) == {"teff", "logg", "feh", "phot_g_mean_mag", "snr"}
    problem = stages["lamost.rv.model.polynomial"].recipe.params["settings"]["problem"]
    assert problem["labels"] == [{"name": "rv", "unit": "km/s", "error": "rv_err"}]
    assert [one["name"] for one in problem["inputs"]][1] == "teff_5040"
    rv = stages["lamost.rv.corrected"].step
    assert rv.inputs["observations"] == "lamost.corrected"
    assert rv.settings.as_json["suffix"] == "_rv"
    assert "lamost.rv.evidence" in stages["lamost.rv.report"].step.inputs.values()
    assert "lamost.evidence" not in stages["lamost.rv.report"].step.inputs.values()


EXTRA = """
[target.override.extra]
n_bad = {source = "n", dtype = "int64"}
vsini = {source = "vsini", unit = "km/s"}
[reference.galah.override.extra]
n_bad = {source = "n", dtype = "int64"}
vsini = {source = "vsini", unit = "m/s"}
"""

TAKEN = """
[target.override.extra]
fold = {source = "snrr"}
teff_diff = {source = "snrr"}
rv_sos_err_pair = {source = "snrr"}
other = {source = "snrr"}
"""


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[corrections.labels]\ninputs = ["teff", "loggg"]', "no measured column 'loggg' (inputs)"),
        ('[corrections.rv]\nlabels = ["rvv"]', "no measured column 'rvv' (labels)"),
        ('[corrections.other]\nlabels = ["teff"]', "'inputs' is missing"),
        ("[corrections.other]", "'labels' is missing"),
        ('[corrections.labels]\nlabels = ["class"]', "no measured column 'class'"),
        ('[corrections.labels]\ninputs = ["teff", "ra"]', "no measured column 'ra'"),
        ('[corrections.labels]\nlabels = ["snrr"]', "no measured column 'snrr'"),
        ('[corrections.labels]\nlabels = ["ebv"]', "no measured column 'ebv'"),
        (f'{EXTRA}[corrections.labels]\nlabels = ["n_bad"]', "'n_bad' is int64 in the target"),
        (
            f'{EXTRA}[corrections.labels]\nlabels = ["vsini"]',
            "'km/s' in the target and in 'm/s' in",
        ),
        (
            '[corrections.labels]\n[corrections.again]\nlabels = ["logg"]\ninputs = ["teff"]',
            "[corrections.again] makes a column 'logg_sos', which [corrections.labels] has",
        ),
        (f'{TAKEN}[corrections.labels]\ninputs = ["fold"]', "'fold' (inputs) has the name of a"),
        (f'{TAKEN}[corrections.labels]\ninputs = ["teff_diff"]', "'teff_diff' (inputs) has the"),
        (f"{TAKEN}[corrections.rv]", "[corrections.rv] makes a column 'rv_sos_err_pair', which"),
        (f'{TAKEN}[corrections.labels]\nlabels = ["other"]', "the label 'other'\n  They have: "),
        ("[reference_union]\noffsets = {galah = {ten = 1.0}}", "reference.galah has no 'ten'"),
        ('[corrections.labels]\nlabels = ["teff", "teff"]', "names 'teff' twice"),
        ('[corrections.labels]\nmethods = ["polynom"]', "no method 'polynom'"),
        ('[corrections.labels]\nlabel = ["teff"]', "label"),
        ('[corrections."a b"]', "'a b' is not a name"),
        ('[crossmatch]\nlabels = ["teff"]', "unknown key 'crossmatch.labels'"),
        ("[corrections.labels.params.polynomial]\nordr = 3", "ordr"),
    ],
)
def test_wrong_corrections_are_refused(job, store, small_sky, table, message):
    changed = write_job(store.parent, small_sky, ("[train]", f"{table}\n[train]"))
    with pytest.raises(ConfigError) as caught:
        plan(load_job(changed))
    assert message in str(caught.value)
    assert str(changed) in str(caught.value)
