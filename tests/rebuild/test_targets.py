"""Several targets in one job, and the catalog that joins all surveys."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits

from sos_dask.errors import CatalogError, ConfigError, SosError
from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.pipeline import rebuild
from sos_dask.rebuild.plan import Plan, steps
from sos_dask.stages.report import PAGE, figures
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.store import verify
from tests.job import write_job
from tests.stages.clumps import rows_of

ONE = """target_name = "lamost"
[variables]
SMALL_SKY = "{sky}"
[target]
survey = "lamost-dr11-lrs"
files = ["${{SMALL_SKY}}/lamost.fits"]
"""
TWO = """[variables]
SMALL_SKY = "{sky}"
[targets.north]
survey = "lamost-dr11-lrs"
files = ["0/lamost.fits"]
[targets.south]
survey = "lamost-dr11-lrs"
files = ["1/lamost.fits"]
corrections = ["labels"]
[corrections.labels]
[corrections.rv]
[unify]
"""


SURVEY = """format = 1
name = "mine"
title = "A survey without radial velocities"
position_epoch = 2000.0
missing = [-9999]
[columns]
obs_id = { source = "obsid" }
ra = { source = "ra" }
dec = { source = "dec" }
teff = { source = "teff" }
logg = { source = "logg" }
feh = { source = "feh" }
"""


@pytest.fixture(scope="module")
def halves(small_sky, tmp_path_factory) -> Path:
    """Folder with the rows of LAMOST in two files, in turn."""
    folder: Path = tmp_path_factory.mktemp("halves")
    with fits.open(small_sky / "lamost.fits") as file:
        rows = np.asarray(file[1].data)
    for number in (0, 1):
        (folder / str(number)).mkdir()
        fits.writeto(folder / str(number) / "lamost.fits", rows[number::2])
    return folder


def job_of(halves: Path, small_sky: Path, text: str = TWO, more: str = "") -> Path:
    change = ONE.format(sky=small_sky), text.format(sky=small_sky)
    return write_job(halves, small_sky, change, more=more)


def test_each_target_gets_its_own_products(halves, small_sky):
    job = load_job(job_of(halves, small_sky))
    names = [step.product for step in steps(job)]
    more = load_job(job_of(halves, small_sky, TWO + 'labels = ["rv"]\n')).unify
    assert more is not None and more.labels == ("rv",)
    for target in ("north", "south"):
        assert {f"{target}.{x}" for x in ("pairs", "evidence", "coverage", "corrected")} <= {*names}
    assert "north.rv.corrected" in names and "south.rv.corrected" not in names
    assert names.count("reference") == 1 and names[-2:] == ["sos", "sos.members"]
    sos = steps(job)[-2]
    assert sos.inputs["rows.north"] == "north.rv.corrected"
    assert sos.inputs["rows.south"] == "south.corrected"
    assert sos.inputs["rows.apogee"] == "apogee.observations"
    settings: Any = sos.settings
    assert settings.labels == ("teff", "logg", "feh", "rv")
    assert settings.order == ("apogee", "galah", "north", "south")
    assert settings.flags["north"] == {
        "teff": "flag_sos", "logg": "flag_sos", "feh": "flag_sos", "rv": "flag_sos_rv",
    }  # fmt: skip


def test_two_targets_become_one_catalog(halves, small_sky):
    made = rebuild(load_job(job_of(halves, small_sky)))
    sos, members = (made.path / name for name in ("sos", "sos.members"))
    assert verify(sos) == [] and verify(members) == []
    manifest = Manifest.load(sos)
    n_rows = {x: Manifest.load(made.path / f"{x}.observations").rows.n_out
              for x in ("north", "south", "apogee", "galah")}  # fmt: skip
    assert manifest.summary["rows"] == n_rows
    assert manifest.rows.n_in == sum(n_rows.values()) == Manifest.load(members).rows.n_out
    stars, listed = rows_of(sos), rows_of(members)
    assert sum(stars["n_obs"].to_pylist()) == manifest.rows.n_in
    assert set(listed["star_id"].to_pylist()) == set(stars["star_id"].to_pylist())
    several = stars.filter(pa.array(stars["n_surveys"].to_numpy() > 1))
    assert len(several) > 300
    narrow = several["teff_err"].to_numpy() < several["teff_err_north"].to_numpy(
        zero_copy_only=False
    )
    averaged = (several["teff_n"].to_numpy() > 1) & np.isfinite(
        several["teff_err_north"].to_numpy(zero_copy_only=False)
    )
    assert averaged.sum() > 100 and narrow[averaged].mean() > 0.95
    pairs = [one for one in manifest.summary["errors"] if one.get("other") == "south"]
    assert {one["label"] for one in pairs} >= {"teff", "logg", "feh"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TWO.replace("[targets.south]", "[targets.apogee]"), "two surveys are named 'apogee'"),
        (TWO.replace('corrections = ["labels"]', 'corrections = ["mg"]'), "'mg', which is no"),
        (TWO.replace("1/lamost.fits", "0/lamost.fits"), "one survey twice"),
        (TWO.split("[targets.north]")[0], r"no table \[target\]"),
        (TWO + 'order = ["gaia"]\n', r"unify\.order names 'gaia'"),
        (TWO + "expected_error = {{nrth = {{feh = 0.1}}}}\n", "Did you mean north"),
    ],
)  # fmt: skip
def test_wrong_targets_are_refused(halves, small_sky, text, says):
    with pytest.raises(ConfigError) as caught:
        Plan(load_job(job_of(halves, small_sky, text)))
    assert re.search(says, f"{caught.value.message} {caught.value.hint}")


def test_a_target_goes_without_corrections_of_labels_that_it_lacks(halves, small_sky):
    (halves / "mine.toml").write_text(SURVEY)
    text = TWO.replace("lamost-dr11-lrs", "mine.toml", 2).replace("mine.toml", "lamost-dr11-lrs", 1)
    names = [step.product for step in steps(load_job(job_of(halves, small_sky, text)))]
    free = text.replace('corrections = ["labels"]', "")
    assert names == [step.product for step in steps(load_job(job_of(halves, small_sky, free)))]
    wrong = text.replace('corrections = ["labels"]', 'corrections = ["rv"]')
    with pytest.raises(ConfigError, match="no measured column 'rv'"):
        steps(load_job(job_of(halves, small_sky, wrong)))


LIST = """format = 1
name = "list"
title = "Stars that are known"
position_epoch = 2000.0
[columns]
obs_id = { source = "id" }
ra = { source = "ra" }
dec = { source = "dec" }
teff = { source = "teff" }
[extra.cluster]
source = "cluster"
dtype = "string"
"""


def test_each_target_may_get_columns_of_others(halves, small_sky):
    given = 'files = ["gaia.parquet"]\ncolumns = {{ distance = "distance" }}\n'
    both = f"[attach.one]\n{given}[attach.two]\n{given}"
    job = load_job(job_of(halves, small_sky, TWO + both + 'target = "south"\n'))
    made = {step.product: step for step in steps(job)}
    assert made["north.with-one"].inputs["other"] == "one.companion"
    assert made["south.with-two"].inputs["other"] == "two.companion"
    assert "south.with-one" not in made and "north.with-two" not in made
    assert made["south.sample"].inputs["observations"] == "south.with-two"
    wrong = load_job(job_of(halves, small_sky, TWO + both + 'target = "soth"\n'))
    with pytest.raises(ConfigError, match=r"attach\.two\.target: 'soth' is no target") as caught:
        steps(wrong)
    assert "south" in caught.value.hint


def test_stars_that_are_known_are_compared(halves, small_sky, caplog):
    store = halves / "store"
    if not (store / "current/north.observations").exists():  # of another test
        rebuild(load_job(job_of(halves, small_sky)))
    truth = pq.read_table(small_sky / "truth.parquet").to_pylist()
    teff = {one["obs_id"]: one["teff"] for one in truth if one["survey"] == "lamost"}
    observed = rows_of((store / "current/north.observations").resolve()).to_pylist()
    rows = [one for one in observed if str(one["obs_id"]) in teff][:400]
    with (halves / "list.csv").open("w") as file:
        print("id,ra,dec,teff,cluster", file=file)
        for number, one in enumerate(rows):
            place = f"{one['ra']!r},{one['dec']!r}"
            print(f"{number},{place},{teff[str(one['obs_id'])]},c{number % 3}", file=file)
        first = f"{rows[0]['ra']!r},{rows[0]['dec']!r},{teff[str(rows[0]['obs_id'])]}"
        print(f"9998,{first},c9", file=file)  # in two groups
        print("9999,1.0,89.99,5000,c1", file=file)
    (halves / "list.toml").write_text(LIST)
    more = '[validation.known]\nsurvey = "list.toml"\nfiles = ["list.csv"]\ngroup = "cluster"\n'
    made = rebuild(load_job(job_of(halves, small_sky, TWO + more)))
    directory = made.path / "known.validation"
    manifest = Manifest.load(directory)
    assert manifest.rows.dropped == {"not in the unified catalog": 1}
    assert "1 of 402 stars of the list are not in the unified catalog, such as 9999" in caplog.text
    found = pq.read_table(directory / "validation.parquet").to_pylist()
    known = {(x["label"], x["survey"], x["group"]): x for x in found}
    north = known["teff", "north", "c0"]
    assert north["is_truth"] and 30 < north["n"] < 200
    assert abs(north["median_before"]) > 20 > abs(north["median_after"])
    both = known["teff", "all", "all"]
    assert both["scatter_after"] < both["scatter_before"]
    assert ("teff", "all", "c9") in known and known["teff", "all", "c9"]["n_after"] == 1
    assert not known["feh", "all", "c1"]["is_truth"]
    [of_teff] = [one for one in manifest.summary["groups"] if one["label"] == "teff"]
    assert of_teff["groups"] == 3 and of_teff["scatter_fell"] >= 2
    assert of_teff["survey_spread_after"] < of_teff["survey_spread_before"]


def test_the_unified_catalog_has_a_page_and_a_view(halves, small_sky, cli, monkeypatch):
    file = job_of(halves, small_sky, TWO)
    if not (halves / "store").exists():
        rebuild(load_job(file))
    # Figures of the targets are another test's matter, and they take long to draw.
    monkeypatch.setattr(
        "sos_dask.stages.report.figures", lambda build: figures(build) if build.unified else {}
    )
    file.write_text(file.read_text().replace("enabled = false", "enabled = true"))
    assert steps(load_job(file))[-1].product == "sos.report"
    made = rebuild(load_job(file)).path
    manifest, sos = (Manifest.load(made / name) for name in ("sos.report", "sos"))
    assert set(manifest.summary["figures"]) == {"sky", "pairs", "errors", "velocities"}
    text = (made / "sos.report" / PAGE).read_text()
    n_surveys = pa.compute.value_counts(rows_of(made / "sos")["n_surveys"]).to_pylist()
    assert sum(one["counts"] for one in n_surveys) == sos.rows.n_out
    for n in [sos.rows.n_in, sos.rows.n_out, *(one["counts"] for one in n_surveys),
              *sos.summary["flags"].values(), *sos.summary["rows"].values()]:  # fmt: skip
        assert f">{n:,}</td>" in text, n
    found = cli("agreement", "--store", halves / "store", "--label", "feh", "--json").json
    assert found["errors"] == [x for x in sos.summary["errors"] if x["label"] == "feh"] != []
    shown = cli("agreement", "--store", halves / "store")
    assert shown.code == 0 and f"{sos.rows.n_out:,} stars" in shown.out
    [one] = [x for x in found["errors"] if (x["survey"], x.get("other")) == ("apogee", "galah")
             and "offset" in x]  # fmt: skip
    assert re.search(rf"feh \[dex\] +apogee +galah +{one['n']:,} ", shown.out)
    wrong = cli("agreement", "--store", halves / "store", "--label", "mg")
    assert wrong.code == 3 and "'mg' is not one of teff" in wrong.err


@pytest.mark.parametrize(
    ("stars", "says"),
    [
        ("1,{ra!r},{dec!r},5000,all\n", "has a group 'all', the name of the total"),
        ("1,1.0,89.99,5000,c1\n", "no star of the list .* is in the unified catalog"),
    ],
)
def test_lists_that_cannot_be_compared_are_refused(halves, small_sky, stars, says):
    job = job_of(halves, small_sky)
    store = halves / "store"
    if not store.exists():
        rebuild(load_job(job))
    row = rows_of((store / "current/north.observations").resolve()).to_pylist()[0]
    (halves / "few.csv").write_text("id,ra,dec,teff,cluster\n" + stars.format(**row))
    (halves / "list.toml").write_text(LIST)
    more = '[validation.few]\nsurvey = "list.toml"\nfiles = ["few.csv"]\ngroup = "cluster"\n'
    with pytest.raises(CatalogError, match=says):
        rebuild(load_job(job_of(halves, small_sky, TWO + more)))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ('[validation.known]\nsurvey = "list.toml"\nfiles = ["x"]\ngroup = "gone"\n', "x does not"),
        ('[validation.apogee]\nsurvey = "list.toml"\nfiles = ["x"]\n', "two surveys are named"),
    ],
)
def test_wrong_lists_are_refused(halves, small_sky, more, says):
    (halves / "list.toml").write_text(LIST)
    with pytest.raises(SosError, match=says):
        Plan(load_job(job_of(halves, small_sky, TWO + more)))
    with pytest.raises(ConfigError, match=r"add a table \[unify\]"):
        load_job(job_of(halves, small_sky, TWO.replace("[unify]\n", "") + more))
