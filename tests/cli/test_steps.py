"""Single steps and whole rebuilds: what they make, and damaged inputs."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from astropy.io import fits

from sos_dask import corrections as models
from sos_dask.stages.report import figures
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import MANIFEST, sealed_json
from tests.command_line import (
    BUILD,
    LAMOST,
    METRIC,
    STEP,
    Ran,
    assert_error,
    assert_nothing_final,
    assert_shape,
    command,
)
from tests.job import contents, write_job
from tests.skies import observations, write_catalog
from tests.stages.pairs import read


@pytest.fixture
def observed(small_store, tmp_path) -> Path:
    """A copy of the observations, free to be damaged."""
    return Path(shutil.copytree(small_store / "current/lamost.observations", tmp_path / "observed"))


def test_a_catalog_of_a_newer_format(cli, observed):
    manifest = observed / MANIFEST
    manifest.write_text(sealed_json({**json.loads(manifest.read_text()), "format": 3}))
    ran = cli("dedupe", observed, "-o", "out", "-w", 0)
    assert_error(ran, 5, r"observed/manifest\.json has format 3", "Install a newer sos-dask")


def test_an_unfinished_catalog(cli, small_store):
    current = small_store / "current"
    model, catalog = current / "lamost.model.polynomial", current / "lamost.observations"
    assert cli("apply", model, catalog, "-o", "out", "-w", 0, "--partitions", "0").code == 0
    ran = cli("verify", "out")
    assert_error(ran, 5, r"out has no manifest\.json", "unfinished: run the command that makes it")


@pytest.mark.parametrize(
    ("damage", "workers"), [("cut", 0), ("cut", 1), ("gone", 0), ("overwritten", 0)]
)
def test_a_damaged_partition_is_named(cli, observed, workers, damage):
    catalog = Catalog.open(observed)
    file = catalog.partition_file(catalog.pixels[1])
    if damage == "gone":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[:3000] if damage == "cut" else bytes(len(content)))
    ran = cli("dedupe", observed, "-o", "out", "-w", workers)
    # Sizes are seen when the catalog is opened, content where it is read.
    code = 6 if damage == "overwritten" else 5
    assert_error(ran, code, re.escape(str(file)), "(remove|Remove) (its catalog|.*/observed)")
    assert_nothing_final(observed.parent / "out")
    assert not (observed.parent / "out" / MANIFEST).exists()
    checked = cli("verify", observed)
    assert checked.code == 5 and file.name in checked.out
    as_json = cli("verify", observed, "--json")
    assert as_json.code == 5
    assert any(file.name in text for text in as_json.json["problems"][str(observed)])


def test_a_tampered_model(cli, small_store, tmp_path):
    model = Path(
        shutil.copytree(small_store / "current/lamost.model.polynomial", tmp_path / "model")
    )
    (name,) = json.loads((model / "model.json").read_text())["files"]
    (model / name).write_bytes((model / name).read_bytes() + b" ")
    ran = cli("apply", model, small_store / "current/lamost.observations", "-o", "out", "-w", 0)
    assert_error(ran, 7, f"{name} is not the file that was saved", "train the model again")
    assert not (tmp_path / "out").exists()


def test_a_simulated_sky_replaces_no_files_unless_told(cli, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/galah.fits").write_text("the real one")
    ran = cli("simulate", "-o", "mine", "--rows", 1000)
    assert_error(ran, 5, "mine/galah.fits exists", "--overwrite")
    assert contents(tmp_path / "mine").keys() == {"galah.fits"}
    assert cli("simulate", "-o", "mine", "--rows", 1000, "--overwrite").code == 0
    assert fits.getheader(tmp_path / "mine/galah.fits", 1)["NAXIS2"] > 0
    ran = cli("simulate", "-o", "hard", "--rows", 1000, "--sky", "step", "--sky", "hook")
    assert_error(ran, 3, "sky.1: must be 'step', 'hooks'", "hook")


def test_a_reference_made_by_hand_is_that_of_a_rebuild(cli, small_store):
    current = small_store / "current"
    surveys = [f"{name}={current / f'{name}.stars'}" for name in ("apogee", "galah")]
    assert cli("reference", *surveys, "-o", "reference", "-w", 0).code == 0
    made, built = (
        pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])
        for catalog in (Catalog.open("reference"), Catalog.open((current / "reference").resolve()))
    )
    assert made.equals(built)
    assert cli("reference", *surveys, "-o", "raw", "-w", 0, "--no-offsets").code == 0
    raw = Catalog.open("raw")
    assert not pa.concat_tables([raw.read(pixel) for pixel in raw.pixels]).equals(built)


def test_shards_may_run_at_once(small_store, tmp_path):
    current = small_store / "current"
    catalog = current / "lamost.observations"
    arguments = [
        "apply",
        current / "lamost.model.polynomial",
        catalog,
        "-o",
        tmp_path / "out",
        "-w",
        0,
    ]
    shards = [
        subprocess.Popen(
            command(*arguments, "--json", "--partitions", f"{number}/3"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2, 3)
    ]
    ended = [shard.communicate(timeout=120) for shard in shards]
    assert [shard.returncode for shard in shards] == [0, 0, 0], ended
    documents = [json.loads(out) for out, _ in ended]
    assert any(document["complete"] for document in documents), "nobody committed"
    alone = subprocess.run(
        command(*arguments[:4], tmp_path / "out", "-w", 0, "--json"), capture_output=True, text=True
    )
    assert json.loads(alone.stdout)["rows"]["out"] == Catalog.open(catalog).n_rows


def test_steps_print_their_account_as_json(cli, small_sky, tmp_path):
    """All single steps, one after the other, on what the one before wrote."""

    def step(*arguments: object) -> Any:
        ran = cli(*arguments, "-w", 0, "--json")
        assert ran.code == 0, ran.err
        assert_shape(ran.json, STEP)
        assert ran.json["complete"] and ran.json["path"] == str(arguments[-1])
        return ran.json

    for survey, definition in (
        ("lamost", LAMOST),
        ("apogee", "apogee-dr17"),
        ("galah", "galah-dr4"),
    ):
        done = step("ingest", definition, small_sky / f"{survey}.fits", "-o", survey)
        rows = done["rows"]
        assert rows["in"] == rows["out"] + rows["rejected"] + sum(rows["dropped"].values())
        stars = step("dedupe", survey, "-o", f"{survey}.stars")
        assert stars["rows"]["in"] == rows["out"]
    step("reference", "apogee=apogee.stars", "galah=galah.stars", "-o", "reference")
    pairs = step("crossmatch", "lamost.stars", "reference", "--radius-arcsec", 1, "-o", "pairs")
    model = step("train", "pairs", "-m", "polynomial", "-p", "order=3", "-o", "model")
    assert_shape(model["summary"]["metrics"], [METRIC])
    assert model["rows"]["in"] == pairs["rows"]["out"]
    assert models.load(tmp_path / "model").info.params["order"] == 3
    corrected = step("apply", "model", "lamost", "-o", "corrected")
    assert corrected["rows"]["out"] == corrected["rows"]["in"] == 4996
    verified = cli("verify", "corrected", "pairs", "--json")
    assert verified.json == {"problems": {"corrected": [], "pairs": []}}
    again = cli("apply", "model", "lamost", "-o", "corrected", "-w", 0, "--json")
    assert again.json == corrected, "a finished output is left alone"


def test_an_unfinished_apply_says_so(cli, small_store):
    current = small_store / "current"
    arguments = [
        "apply",
        current / "lamost.model.polynomial",
        current / "lamost.observations",
        "-w",
        0,
    ]
    ran = cli(*arguments, "-o", "out", "--partitions", "1/2", "--json")
    assert ran.json == {"complete": False, "path": "out"}
    ran = cli(*arguments, "-o", "out", "--partitions", "1/2")
    assert ran.out == "out: other partitions are still missing\n"


def test_rebuild_prints_one_json_object_and_nothing_else(small_sky, small_store, tmp_path):
    """In a real process with workers: whatever those print must not get between."""
    shutil.copytree(small_store, tmp_path / "store", symlinks=True)
    both = 'methods = ["polynomial", "boosted"]\nparams = {boosted = {n_rounds = 20}}'
    job = write_job(tmp_path, small_sky, ('methods = ["polynomial"]', both))
    ran = subprocess.run(
        command("rebuild", job, "-w", 1, "--json"), capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert_shape(document, BUILD)
    assert re.search(r"^train boosted: \d/\d$", ran.stderr, re.M), "progress goes to stderr"
    assert Ran(0, "", ran.stderr).message == "", "nothing but progress is on stderr"
    stages = document["stages"]
    assert stages["lamost.observations"]["why"] == "unchanged"
    assert not stages["lamost.observations"]["ran"]
    assert stages["lamost.observations"]["rows"] == {
        "in": 5000, "out": 4996, "rejected": 0, "dropped": {"exact duplicates": 4}, "added": {},
    }  # fmt: skip
    assert stages["lamost.model.boosted"]["ran"] and stages["lamost.comparison"]["ran"]
    (choice,) = document["corrections"].values()
    assert choice["chosen"] in ("polynomial", "boosted")
    assert choice["why"].startswith(f"{choice['chosen']}: ")
    # The same model as before corrects the same rows.
    assert stages["lamost.corrected"]["ran"] == (choice["chosen"] == "boosted")
    found = {(metric["method"], metric["label"]) for metric in choice["metrics"]}
    assert found >= {
        (m, label) for m in ("polynomial", "boosted") for label in ("teff", "logg", "feh")
    }
    for metric in choice["metrics"]:
        assert metric["n"] > 100 and metric["scatter_after"] < metric["scatter_before"]
    assert set(document["products"]) == set(stages)


def test_apply_adds_errors(cli, small_store, tmp_path):
    build = (small_store / "current").resolve()
    given = ["apply", build / "lamost.model.polynomial", build / "lamost.observations", "-w", 0]
    ran = cli(*given, "--errors", build / "lamost.uncertainty", "-o", "corrected")
    assert ran.code == 0, ran.err
    names = Catalog.open(tmp_path / "corrected").schema.names
    assert [name for name in names if name.endswith("_sos_err")] == [
        "teff_sos_err", "logg_sos_err", "feh_sos_err",
    ]  # fmt: skip
    assert_error(cli(*given, "--errors", build / "lamost.pairs", "-o", "other"), 7, "error.json")


def test_demo_compares_with_the_truth(cli, tmp_path, monkeypatch):
    # Which figures there are is another test's matter, and they take as long as the rest.
    monkeypatch.setattr(
        "sos_dask.stages.report.figures", lambda build: {"sky": figures(build)["sky"]}
    )
    ran = cli("demo", "--rows", 3000, "--store", "demo", "-w", 0, "--json")
    assert ran.code == 0, ran.err
    truth = ran.json.pop("truth")
    document = {key: value for key, value in ran.json.items() if key != "truth"}
    assert_shape(document, BUILD)
    assert len(truth) == 9
    for item in truth:
        assert set(item) == {"label", "binned_by", "n_bins", "n", "rms_before", "rms_after"}
    assert (tmp_path / "demo/current/lamost.corrected/manifest.json").is_file()
    again = cli("demo", "--rows", 3000, "--store", "demo", "-w", 0)
    assert again.code == 0 and "unchanged" in again.out
    assert "simulate" not in again.err, "the sky is made once"
    for text in ("Held-out pairs", "Label - truth", "teff [K]", "scatter", "feh [dex]"):
        assert text in again.out


def test_a_catalog_of_others_has_no_account_of_errors(cli, tmp_path):
    """Observations without our manifest are deduplicated, too."""
    catalog = write_catalog(observations(300, spread=True), tmp_path / "theirs")
    (catalog.path / MANIFEST).unlink()
    properties = catalog.path / "hats.properties"
    properties.write_text(properties.read_text().replace("hats_builder=sos-dask\n", ""))
    ran = cli("dedupe", "theirs", "-o", "stars", "-w", 0)
    assert ran.code == 0, ran.err
    assert "300 rows in" in ran.out


def test_two_corrections_are_made_and_shown(small_store, small_sky, cli, tmp_path):
    """The corrected catalog of the last has the columns of both; the zero point of RV is found."""
    shutil.copytree(small_store, store := tmp_path / "store", symlinks=True)
    two = '[corrections.labels]\nlabels = ["teff", "feh"]\n[corrections.rv]\n[train]'
    ran = cli("rebuild", write_job(tmp_path, small_sky, ("[train]", two)), "-w", 0)
    assert ran.code == 0, ran.err
    assert "Chosen for lamost is" in ran.out and "Chosen for lamost.rv is" in ran.out
    rows = read(store / "current" / "lamost.rv.corrected").to_pandas()
    assert {"teff_sos", "feh_sos", "rv_sos", "coverage", "coverage_rv", "flag_sos_rv"} <= {*rows}
    assert "logg_sos" not in rows and "logg" in rows
    first = read(store / "current" / "lamost.corrected").to_pandas()
    assert rows[list(first)].equals(first), "a further correction leaves the others as they are"
    known = rows["rv_sos"].notna()
    assert known.mean() > 0.8 and (rows["flag_sos_rv"] & 1).eq(~known).all()
    moved = (rows["rv_sos"] - rows["rv"])[known & (rows["flag_sos_rv"] & 16 == 0)]
    assert moved.median() == pytest.approx(4.9, abs=0.4)
    shown = cli("compare", "--store", store, "--correction", "rv", "--json")
    assert {row["label"] for row in json.loads(shown.out)["figures"]} == {"rv"}
    unknown = cli("uncertainty", "--store", store, "--correction", "vr")
    assert unknown.code != 0 and "no product 'vr.uncertainty'" in unknown.err
    assert "lamost.rv.uncertainty" in unknown.err
