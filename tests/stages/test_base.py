"""What all stages do: inputs, parts and their records, and that a cluster changes nothing."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sos_dask.api import crossmatch, dedupe
from sos_dask.errors import CatalogError, ClusterError, ConfigError, StorageError
from sos_dask.run.cluster import Cluster, silent
from sos_dask.settings import Settings
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.stages.base import (
    Made,
    Role,
    Run,
    Stage,
    by_pixel,
    key_column,
    motion_of,
    require_whole,
)
from sos_dask.stages.crossmatch import CrossmatchSettings
from sos_dask.stages.dedupe import Dedupe
from sos_dask.stars.group import DedupeSettings
from sos_dask.stars.match import Motion
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Recipe, Rows
from tests.job import contents
from tests.skies import observations, write_catalog
from tests.stages.clumps import SETTINGS
from tests.steps import apply


def test_a_run_that_is_refused_leaves_no_claim(tmp_path):
    class Small(Cluster):
        @property
        def memory_limit_bytes(self) -> int:
            return 1 << 20

    catalog = write_catalog(observations(500), tmp_path / "obs")
    out = tmp_path / "stars"
    with pytest.raises(ClusterError, match="dedupe: partition"):
        Dedupe({"observations": catalog}).run(out, cluster=Small())
    assert not out.exists()
    made = Dedupe({"observations": catalog}, DedupeSettings(max_spread=2.0)).run(out)
    assert made.rows.n_in == 500


def _part(output: Output, key: str, item: int) -> dict[str, int]:
    return {"rows": item}


def test_a_missing_record_is_an_error_not_an_empty_product(tmp_path):
    class Forgetful(Cluster):
        def run(self, *arguments: Any) -> list[Any]:
            return []

    output = Output.prepare(tmp_path / "out", Recipe("dedupe", 1, {}, {}))
    assert Run(output, Cluster(), silent).parts("stars", {"0-1": 3}, _part) == [{"rows": 3}]
    run = Run(output, Forgetful(), silent)
    assert run.parts("stars", {"0-1": 4}, _part) == [{"rows": 3}], "made before"
    with pytest.raises(StorageError, match="'stars/0-2' of a finished part is missing"):
        run.parts("stars", {"0-1": 3, "0-2": 5}, _part)


def test_two_workers_give_the_same_bytes(cluster, stars, current, tmp_path):
    assert isinstance(cluster, Cluster)
    for name, running in (("alone", Cluster()), ("together", cluster)):
        dedupe(
            Catalog.open(stars / "obs1-40"), tmp_path / name / "stars", SETTINGS, cluster=running
        )
        crossmatch(
            Catalog.open(stars / "obs1-40"),
            Catalog.open(stars / "stars2-40"),
            tmp_path / name / "pairs",
            CrossmatchSettings(radius_arcsec=1.0),
            cluster=running,
        )
        model, catalog = current / "lamost.model.polynomial", current / "lamost.observations"
        apply(model, Catalog.open(catalog), tmp_path / name / "applied", cluster=running)
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


# -- inputs ---------------------------------------------------------------------------------------


class Sum(Stage[Settings]):
    """Sums the rows of catalogs, one partition in one part."""

    name, version = "sum", 1
    roles = (
        Role("one", "One catalog."),
        Role("more", "Others.", many=True, optional=True),
        Role("made", "An output.", "output", optional=True),
    )
    partitioned = "one"

    def make(self, run: Run) -> Made | None:
        items = {f"{name}-{key}": (name, pixel) for name in self.inputs
                 for key, pixel in by_pixel(self.catalog(name).pixels).items()}  # fmt: skip
        done = run.parts("rows", items, self.count)
        run.write_bytes("seen.txt", b"done")
        n_rows = sum(record["rows"] for record in done)
        return Rows(n_rows, n_rows), {"parts": len(done)}

    def count(self, output: Output, key: str, item: tuple[str, HealpixPixel]) -> dict[str, Any]:
        name, pixel = item
        return {"rows": self.catalog(name).read(pixel, ["obs_id"]).num_rows}


@pytest.fixture(scope="module")
def catalogs(tmp_path_factory) -> dict[str, Catalog]:
    root = tmp_path_factory.mktemp("catalogs")
    return {
        name: write_catalog(observations(n, n), root / name, 100)
        for name, n in (("one", 300), ("other", 200))
    }


def test_inputs_go_by_their_roles(catalogs, tmp_path):
    with pytest.raises(ConfigError, match="sum: the input 'one' is missing: One catalog"):
        Sum({"more.x": catalogs["other"]})
    for wrong in ("two", "ones", "one.x", "mores.x"):
        with pytest.raises(ConfigError, match=f"sum has no input '{wrong}'"):
            Sum({"one": catalogs["one"], wrong: catalogs["other"]})
    stage = Sum({"more.b": catalogs["other"].path, "one": str(catalogs["one"].path), "made": "x"})
    assert stage.named("more") == ["more.b"] and stage.named("one") == ["one"]
    assert stage.path("made") == Path("x") and stage.path("one") == catalogs["one"].path
    again = pickle.loads(pickle.dumps(Sum({"one": catalogs["one"]})))
    assert again.catalog("one").fingerprint == catalogs["one"].fingerprint
    assert again.path("one") == catalogs["one"].path


def test_a_complete_output_is_left_alone_and_another_recipe_needs_leave(catalogs, tmp_path):
    inputs = {"one": catalogs["one"], "more.b": catalogs["other"]}
    told: list[tuple[str, int, int]] = []
    made = Sum(inputs).run(tmp_path / "out", report=lambda *step: told.append(step))
    n_parts = made.summary["parts"]
    assert made.rows.n_in == 500 and n_parts > 4
    assert told[-1] == ("sum", n_parts, n_parts)
    assert [file.path for file in made.files] == ["seen.txt"]
    told.clear()
    assert Sum(inputs).run(tmp_path / "out", report=lambda *step: told.append(step)) == made
    assert not told, "nothing was run"
    with pytest.raises(CatalogError, match="--overwrite"):
        Sum({"one": catalogs["one"]}).run(tmp_path / "out")
    again = Sum({"one": catalogs["one"]}).run(tmp_path / "out", overwrite=True)
    assert again.rows.n_in == 300


def test_finished_parts_are_not_run_again(catalogs, tmp_path):
    def stop(step: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    inputs = {"one": catalogs["one"]}
    with pytest.raises(KeyboardInterrupt):
        Sum(inputs).run(tmp_path / "out", report=stop)
    seen: list[int] = []
    made = Sum(inputs).run(tmp_path / "out", report=lambda step, done, total: seen.append(total))
    n_parts = len(catalogs["one"].pixels)
    assert set(seen) == {n_parts - 2} and made.summary["parts"] == n_parts


def test_parts_that_others_make_are_waited_for_by_nobody(catalogs, tmp_path):
    class Shared(Sum):
        def make(self, run: Run) -> None:
            return None

    stage = Shared({"one": catalogs["one"]})
    assert stage.attempt(tmp_path / "out") is None
    with pytest.raises(StorageError, match="parts of other processes are missing"):
        stage.run(tmp_path / "out")
    assert (tmp_path / "out").exists(), "its parts are waited for"


class Limited(Cluster):
    """A cluster whose workers have so much memory."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self.n_bytes = n_bytes

    @property
    def memory_limit_bytes(self) -> int:
        return self.n_bytes


def test_what_a_partition_needs_is_what_is_said(catalogs):
    stage, catalog = Sum({"one": catalogs["one"]}), catalogs["one"]
    pixel, n_bytes = catalog.largest_partition()
    needed = (Sum.memory[0] << 20) + Sum.memory[1] * n_bytes
    stage.require_partition(Limited(int(needed / 0.95) + 2), catalog)
    n_rows = catalog.partition_rows(pixel)
    text = f"sum: partition {pixel} of {catalog.path} ({n_rows:,} rows) needs about"
    with pytest.raises(ClusterError, match=re.escape(text)):
        stage.require_partition(Limited(int(needed / 0.95) - 2), catalog)


def test_what_a_planned_partition_needs_is_its_share_of_all_rows(catalogs):
    stage = Sum({"one": catalogs["one"]}, product="out")
    histogram = np.zeros(12 * 4**3, dtype=np.int64)
    histogram[[0, 63, 64, 200]] = (10, 20, 60, 10)
    pixels = [HealpixPixel(0, 0), HealpixPixel(1, 4), HealpixPixel(1, 12)]
    stage.require_pixel(Limited(1), [], histogram, 10**12)
    needed = (Sum.memory[0] << 20) + Sum.memory[1] * 60 * 10**8
    stage.require_pixel(Limited(int(needed / 0.95) + 9), pixels, histogram, 10**10)
    text = "sum: partition 1:4 of out (60 rows) needs about"
    with pytest.raises(ClusterError, match=re.escape(text)):
        stage.require_pixel(Limited(int(needed / 0.95) - 9), pixels, histogram, 10**10)


# -- catalogs that are matched --------------------------------------------------------------------


def catalog_of(folder: Path, **columns: Any) -> Catalog:
    table = observations(20)
    table = table.rename_columns(["number" if n == "obs_id" else n for n in table.schema.names])
    for name, values in columns.items():
        table = table.append_column(name, values)
    return write_catalog(table, folder)


def test_a_key_is_named_or_asked_for(catalogs, tmp_path):
    assert key_column(catalogs["one"]) == "obs_id"
    text = pa.array(["x"] * 20)
    for name, columns, hint in (
        ("all", {"a": text}, "--key number or --key quality or --key a."),
        ("alike", {"a": text, "designation": text}, "for example --key designation."),
    ):
        with pytest.raises(CatalogError, match="neither star_id nor obs_id") as caught:
            key_column(catalog_of(tmp_path / name, **columns))
        assert caught.value.hint.endswith(hint)
    bare = observations(20).drop_columns(["obs_id", "quality"])
    with pytest.raises(CatalogError) as caught:
        key_column(write_catalog(bare, tmp_path / "bare"))
    assert "no column of integers or text" in caught.value.hint


def test_bounds_of_the_motion(catalogs, tmp_path):
    def column(*values: float | None) -> pa.Array:
        return pa.array([values[i % len(values)] for i in range(20)], pa.float32())

    still = motion_of(catalogs["one"])
    assert still.max_pm_mas_yr == 0 and np.isnan([still.epoch_min, still.epoch_max]).all()
    epochs = column(2000.0, None, 2016.5)
    moving = {"pmra": column(-30.0, 3.0), "pmdec": column(4.0, -40.0)}
    found = motion_of(catalog_of(tmp_path / "a", **moving, position_epoch=epochs))
    assert found == Motion(50.0, 2000.0, 2016.5)
    half = motion_of(catalog_of(tmp_path / "b", pmra=moving["pmra"], position_epoch=epochs))
    assert half == Motion(0.0, 2000.0, 2016.5), "one component is no motion"
    for name, days in (("c", column(2451545.0)), ("d", column(1e-3, 2000.0))):
        with pytest.raises(CatalogError, match="Julian years are needed"):
            motion_of(catalog_of(tmp_path / name, position_epoch=days))


def test_ids_that_lost_digits_are_refused(tmp_path):
    ids = pa.array(np.arange(20.0))
    catalog = catalog_of(tmp_path / "a", gaia_dr3_source_id=ids)
    require_whole(catalog, ["number", "gaia_dr2_source_id"])
    with pytest.raises(CatalogError, match="'gaia_dr3_source_id' is stored as float"):
        require_whole(catalog, ["gaia_dr3_source_id"])
