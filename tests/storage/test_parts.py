"""Parts that are taken over: those that would be the same, with the bytes of a run from nothing."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from astropy.io import fits

from sos_dask.sky.healpix import ang2pix
from sos_dask.stages.crossmatch import Crossmatch
from sos_dask.stages.dedupe import Dedupe
from sos_dask.stages.ingest import Ingest
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.hats import partition_path
from sos_dask.storage.parts import FOLDER, Former, forgotten, note_empty, traced
from sos_dask.surveys.definition import load_survey
from tests.job import contents
from tests.skies import observations, write_catalog


def made(store: Path, stage, former: Path | None = None):
    """The output of a stage in a store, and how many parts were run and taken over."""
    recipe = stage.recipe(stage.settings, stage.fingerprints())
    directory = store / "artifacts" / recipe.stage / recipe.fingerprint
    stage.run(directory, former=Former(store, former))
    return directory, stage.counted


def again(store: Path, stage_of, old, new) -> dict[str, int]:
    """What a stage runs on changed input after a run on the old one; its bytes must be the same."""
    first, counted = made(store, stage_of(old))
    assert counted["taken"] == 0
    second, counted = made(store, stage_of(new), first)
    whole, _ = made(store.with_name("fresh"), stage_of(new))
    assert contents(second) == contents(whole)
    return counted


def dedupe(catalog: Catalog) -> Dedupe:
    return Dedupe({"observations": catalog}, product="stars")


def moved(table: pa.Table, rng, n: int) -> pa.Table:
    """Rows of a table near where they are, with other keys, sorted."""
    some = table.take(pa.array(rng.choice(len(table), n, replace=False)))
    ra, dec = (some[name].to_numpy().copy() for name in ("ra", "dec"))
    dec = np.clip(dec + rng.uniform(-3, 3, n) / 3600, -90, 90)
    new = {"ra": ra, "dec": dec, "_healpix_29": ang2pix(ra, dec)}
    new["obs_id"] = some["obs_id"].to_numpy() + 10**12
    for name, values in new.items():
        place = some.schema.get_field_index(name)
        some = some.set_column(place, some.schema.field(name), pa.array(values))
    whole = pa.concat_tables([table, some])
    return whole.sort_by([("_healpix_29", "ascending"), ("obs_id", "ascending")])


@pytest.mark.parametrize("seed", range(4))
def test_stars_of_a_catalog_that_grows(tmp_path, seed):
    """In clumps at poles and corners of pixels, where rows of several partitions are one star."""
    rng = np.random.default_rng(seed)
    table = observations(300, seed, spread=seed % 2 == 0)
    old = write_catalog(table, tmp_path / "old", 20)
    new = write_catalog(moved(table, rng, 1 + seed), tmp_path / "new", 21)  # another recipe
    counted = again(tmp_path / "store", dedupe, old, new)
    assert counted["run"] > 0 and (seed % 2 or counted["taken"] > 0)


def test_pairs_of_a_catalog_that_grows(tmp_path):
    rng = np.random.default_rng(1)
    table = observations(300, 1, spread=True)
    old = write_catalog(table, tmp_path / "old", 20)
    new = write_catalog(moved(table, rng, 3), tmp_path / "new", 21)  # another recipe
    stars, _ = made(tmp_path / "store", dedupe(old))

    def crossmatch(catalog):
        return Crossmatch({"target": catalog, "reference": Catalog.open(stars)}, product="pairs")

    counted = again(tmp_path / "store", crossmatch, old, new)
    assert 0 < counted["run"] < counted["taken"]


def test_another_setting_takes_nothing_over(tmp_path):
    catalog = write_catalog(observations(300, spread=True), tmp_path / "old", 20)
    first, counted = made(tmp_path / "store", dedupe(catalog))
    other = Dedupe(
        {"observations": catalog}, Dedupe.Settings(radius_arcsec=1.0), product="stars"
    )  # fmt: skip
    assert made(tmp_path / "store", other, first)[1] == {"run": counted["run"], "taken": 0}


@pytest.fixture
def nights(small_sky, tmp_path):
    """Files of a survey before and after rows around one place were appended."""
    with fits.open(small_sky / "lamost.fits") as file:
        rows = np.asarray(file[1].data)
    apart = np.hypot(rows["ra"] - rows["ra"][100], rows["dec"] - rows["dec"][100])
    rows = rows[np.argsort(-apart, kind="stable")]
    found = []
    for number, n_rows in enumerate((len(rows) - 80, len(rows))):
        (tmp_path / str(number)).mkdir()
        found.append(tmp_path / str(number) / "lamost.fits")
        fits.writeto(found[-1], rows[:n_rows])
    return found


def ingest(file: Path) -> Ingest:
    settings = Ingest.Settings(
        survey=load_survey("lamost-dr11-lrs"), name="lamost", rows_per_partition=300
    )
    return Ingest({"file.0": file}, settings)


def test_a_release_that_appends_rows(nights, tmp_path):
    counted = again(tmp_path / "store", ingest, *nights)
    assert 0 < counted["run"] < counted["taken"]


def test_what_is_damaged_is_made_again(nights, tmp_path):
    store = tmp_path / "store"
    first, counted = made(store, ingest(nights[0]))
    n_parts = counted["run"]
    (whole, _), n_changed = made(tmp_path / "fresh", ingest(nights[1])), []
    for damage in ("file", "file is gone", "memory", "memory is gone"):
        memory = (store / FOLDER / first.name).with_suffix(".json")
        one = sorted(first.rglob("Npix=*.parquet"))[0]
        path = one if damage.startswith("file") else memory
        before = path.read_bytes()
        path.unlink()
        if "gone" not in damage:
            path.write_bytes(before[:-9] + b"x" + before[-8:])
        second, counted = made(store, ingest(nights[1]), first)
        assert contents(second) == contents(whole), damage
        n_changed.append(counted["run"])
        shutil.rmtree(second)
        path.write_bytes(before)
    assert n_changed[0] == n_changed[1] and n_changed[2] == n_changed[3] >= n_parts
    assert n_changed[0] < n_parts / 2
    assert forgotten(store, []) == sorted((store / FOLDER).iterdir())
    assert first.name not in {path.stem for path in forgotten(store, [first.name])}


def test_what_is_damaged_before_it_is_remembered_is_not_taken(nights, tmp_path, monkeypatch):
    remember = Former.remember

    def damage(self, output, *given):
        one = sorted(output.directory.rglob("Npix=*.parquet"))[0]
        one.write_bytes(one.read_bytes()[:-9] + b"x" * 9)
        remember(self, output, *given)

    monkeypatch.setattr(Former, "remember", damage)
    store = tmp_path / "store"
    first, counted = made(store, ingest(nights[0]))
    assert len(Former(store, first)._known["parts"]) == counted["run"] - 1
    monkeypatch.undo()
    second, _ = made(store, ingest(nights[1]), first)
    assert contents(second) == contents(made(tmp_path / "fresh", ingest(nights[1]))[0])


def test_files_out_of_the_output_are_not_taken(tmp_path, nights):
    first, _ = made(tmp_path / "store", ingest(nights[0]))
    former = Former(tmp_path / "store", first)
    for name in ("../x", "/etc/hosts"):
        known = {"pieces": {name: "0"}, "value": {}, "reads": {}}
        assert not former.take(_output(first), "partitions/1-1", known)


def _output(directory: Path):
    from sos_dask.storage.artifact import Output
    from sos_dask.storage.manifest import Manifest

    return Output(directory, Manifest.load(directory).recipe)


def test_what_is_read_is_traced(tmp_path):
    catalog = write_catalog(observations(400, spread=True), tmp_path / "some", 20)
    first, *_, last = catalog.pixels
    with traced() as reads:
        catalog.read(first, ["obs_id"])
        catalog.read_ranges([(last.first, last.stop)], ["obs_id"])
    wanted = {partition_path(one) for one in (first, last)}
    assert reads.files == {catalog.path: wanted} and reads.empty == {catalog.path: set()}
    with traced() as reads:
        found = [(10, 20), (25, 30)]
        note_empty(tmp_path, [(0, 5), (8, 12), (15, 28), (40, 50)], found)
    assert reads.empty[tmp_path] == {(0, 5), (8, 10), (20, 25), (40, 50)}
