"""Observations do not depend on files, chunks or order; what is refused leaves nothing."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.io import fits

from sos_dask.errors import CatalogError, ConfigError, SurveyError
from sos_dask.ingest.canonical import Chunk
from sos_dask.stages.ingest import Ingest, IngestSettings, SurveySettings, ingest
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from sos_dask.surveys.definition import load_survey
from tests.job import contents
from tests.survey_files import rows, survey, write_fits


def repeated_keys(n: int, n_keys: int) -> dict:
    """Rows of which each key stands at one place with several labels."""
    data = rows(n)
    first = np.arange(n) % n_keys
    return data | {name: data[name][first] for name in ("obsid", "ra", "dec")}


def test_a_key_whose_rows_share_a_position_is_refused(tmp_path):
    path = write_fits(tmp_path / "stars.fits", repeated_keys(2000, 100))
    out = tmp_path / "out"
    with pytest.raises(
        SurveyError, match="survey mock: 'obs_id' is not a key: 1900 of 2000"
    ) as caught:
        ingest(survey(), [path], out, IngestSettings(rows_per_partition=50))
    assert "join" in caught.value.hint
    assert not (out / "manifest.json").exists()


def test_few_rows_with_a_used_key_are_rejected(tmp_path):
    path = write_fits(tmp_path / "stars.fits", repeated_keys(200, 100))
    rows_of = ingest(survey(), [path], tmp_path / "out").rows
    assert (rows_of.n_in, rows_of.n_out, rows_of.rejected) == (200, 100, 100)
    rejected = pq.read_table(tmp_path / "out" / "rejected.parquet")
    assert set(rejected["reason"].to_pylist()) == {"conflicting obs_id"}


def test_another_cut_into_chunks_goes_on_where_one_was_killed(tmp_path, monkeypatch):
    path = write_fits(tmp_path / "stars.fits", rows(2000) | {"obsid": np.arange(2000) % 1990})
    whole = tmp_path / "whole"
    ingest(survey(), [path], whole, IngestSettings(rows_per_partition=300))
    orders = [(300, 700), (700, 300), (300, 300)]
    for number, order in enumerate(orders):
        out = tmp_path / str(number)
        killed = ("conflicts_of_range", "merged_partition")
        for killed_in, chunk_rows in zip(killed, order, strict=True):
            settings = IngestSettings(rows_per_partition=300, chunk_rows=chunk_rows)
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Ingest, killed_in, interrupted)
                ingest(survey(), [path], out, settings)
        settings = IngestSettings(rows_per_partition=300, chunk_rows=order[0])
        ingest(survey(), [path], out, settings)
        assert contents(out) == contents(whole)


def interrupted(*part: object) -> None:
    raise KeyboardInterrupt


def test_records_of_other_rows_are_no_part_of_a_catalog(tmp_path, monkeypatch):
    path = write_fits(tmp_path / "stars.fits", rows(200))
    monkeypatch.setattr(
        "sos_dask.stages.ingest.plan_chunks", lambda source, n: [Chunk(source, 50, 200)]
    )
    with pytest.raises(CatalogError, match=r"200 rows of .*stars.fits, of which 150 were read"):
        ingest(survey(), [path], tmp_path / "out")


@pytest.mark.parametrize("empty", [slice(0, 100), slice(100, 200), slice(200, 250), slice(0, 250)])
def test_chunks_without_a_usable_row(tmp_path, empty):
    data = rows(250)
    data["ra"][empty] = np.nan
    n_bad = len(data["ra"][empty])
    path = write_fits(tmp_path / "stars.fits", data)
    settings = IngestSettings(rows_per_partition=50, chunk_rows=100)
    if n_bad == 250:
        with pytest.raises(SurveyError):
            ingest(survey(), [path], tmp_path / "out", settings)
        return
    made = ingest(survey(max_rejected_fraction=1.0), [path], tmp_path / "out", settings)
    assert (made.rows.n_out, made.rows.rejected) == (250 - n_bad, n_bad)


def test_what_decides_no_row_is_not_in_the_recipe():
    recipes = [
        Ingest.recipe(SurveySettings(survey=survey(**more), name="mock"), {"file.0": "a" * 64})
        for more in ({}, {"allow": ["ra_below_24"]}, {"max_rejected_fraction": 0.5})
    ]
    assert recipes[0] == recipes[1] == recipes[2]
    other = SurveySettings(survey=survey(missing=[]), name="mock")
    assert recipes[0] != Ingest.recipe(other, {"file.0": "a" * 64})


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = write_fits(tmp_path / "stars.fits", rows(500))

    def change(step: str, done: int, total: int) -> None:
        if step.startswith("write") and done == 0:
            os.utime(path, ns=(1, 1))

    with pytest.raises(CatalogError, match="was changed while"):
        ingest(survey(), [path], tmp_path / "out", report=change)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_refused_files_leave_nothing_behind(tmp_path):
    """Refused after the first pass, when pieces are there: the mended command starts afresh."""
    rng = np.random.default_rng(0)
    giants = load_survey("lamost-dr3-giants")
    ra, dec = rng.uniform(0, 360, 200), rng.uniform(-60, 60, 200)
    text = "obsid,ra,dec,l,b,teff,logg,feh,rv\n" + "".join(
        f"{i},{ra[i]},{dec[i]},0,0,3.69,2.0,-0.5,1\n" for i in range(200)
    )
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(SurveyError, match="log10"):
        ingest(giants, [tmp_path / "log.csv"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "log.csv").write_text(text.replace(",3.69,", ",4900,"))
    assert ingest(giants, [tmp_path / "log.csv"], tmp_path / "out").rows.n_out == 200


@pytest.fixture(scope="module")
def lamost(small_sky, tmp_path_factory) -> dict[str, list[Path]]:
    """The same rows as one file, as three, and in another order."""
    folder = tmp_path_factory.mktemp("files")
    with fits.open(small_sky / "lamost.fits") as file:
        data = file[1].data
        shuffled = np.random.default_rng(5).permutation(len(data))
        parts = {
            "a": data[shuffled[:700]], "b": data[shuffled[700:701]], "c": data[shuffled[701:]],
            "reversed": data[::-1],
        }  # fmt: skip
        for name, rows in parts.items():
            fits.BinTableHDU(rows.copy()).writeto(folder / f"{name}.fits")
    return {
        "one": [small_sky / "lamost.fits"],
        "three": [folder / f"{name}.fits" for name in "abc"],
        "other order": [folder / f"{name}.fits" for name in "cab"],
        "reversed": [folder / "reversed.fits"],
    }


@pytest.mark.parametrize("chunk_rows", [500_000, 317])
def test_ingest_does_not_depend_on_files_chunks_or_order(lamost, tmp_path, chunk_rows):
    survey = load_survey("lamost-dr11-lrs")
    found = {}
    for name, files in lamost.items():
        settings = IngestSettings(rows_per_partition=1000, chunk_rows=chunk_rows)
        manifest = ingest(survey, files, tmp_path / name, settings, name="lamost")
        assert (manifest.rows.n_in, manifest.rows.n_out) == (5000, 4996)
        found[name] = contents(tmp_path / name / "dataset")
    assert all(item == found["one"] for item in found.values())
    assert len(found["one"]) > 12
    both = [Manifest.load(tmp_path / name) for name in ("three", "other order")]
    assert both[0] == both[1], "the order in which files are named is no difference"
    if chunk_rows == 317:
        whole = ingest(
            survey,
            lamost["one"],
            tmp_path / "whole",
            IngestSettings(rows_per_partition=1000),
            name="lamost",
        )
        assert whole == Manifest.load(tmp_path / "one"), "chunk_rows decides memory alone"


def test_ingest_refuses_a_file_twice(lamost, tmp_path):
    copy = shutil.copy(lamost["three"][0], tmp_path / "copy.fits")
    with pytest.raises(ConfigError, match="the same content is given twice"):
        ingest(load_survey("lamost-dr11-lrs"), [lamost["three"][0], copy], tmp_path / "out")


def test_a_run_that_made_nothing_leaves_nothing(lamost, small_sky, tmp_path):
    """So the same directory serves the next try, with whatever was wrong mended."""
    survey = load_survey("lamost-dr11-lrs")
    with pytest.raises(SurveyError, match="no column"):
        ingest(survey, [small_sky / "apogee.fits"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ingest(survey, lamost["one"], tmp_path / "out")
    with pytest.raises(CatalogError, match="--overwrite"):
        ingest(survey, lamost["three"], tmp_path / "out")
    ingest(survey, lamost["three"], tmp_path / "out", overwrite=True)


def test_rows_are_counted_by_cut(small_store):
    path = small_store / "current" / "lamost.observations"
    manifest, catalog = Manifest.load(path), Catalog.open(path)
    quality = np.concatenate(
        [catalog.read(pixel, ["quality"])["quality"].to_numpy() for pixel in catalog.pixels]
    )
    cuts = load_survey("lamost-dr11-lrs").cuts.values()
    failed = {cut.name: int(np.count_nonzero(quality & (1 << cut.bit))) for cut in cuts}
    assert manifest.summary["fail_cut"] == failed and max(failed.values()) > 100
    assert manifest.summary["pass_all_cuts"] == np.count_nonzero(quality == 0)
    assert sum(manifest.summary["rejected"].values()) == manifest.rows.rejected
