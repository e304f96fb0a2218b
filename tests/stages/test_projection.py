"""Stage projection on a small store: every row has its place, whoever works."""

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sos_dask.errors import ModelError
from sos_dask.evidence.projection import ProjectionSettings, density_map
from sos_dask.stages.projection import MAPS, SAMPLE, ProjectionStage, load_projection
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.store import verify
from tests.job import contents

pytest.importorskip("umap")
SETTINGS = ProjectionSettings(sample_rows=400, map_bins=32)


@pytest.fixture(scope="module")
def inputs(small_store):
    current = small_store / "current"
    return {
        "observations": Catalog.open(current / "lamost.observations"),
        "pairs": Catalog.open(current / "lamost.pairs"),
    }


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("projection") / "alone"
    return folder, ProjectionStage(inputs, SETTINGS, product="projection").run(folder)


def test_every_observation_has_its_row_in_the_same_order(inputs, made):
    folder, manifest = made
    observations, placed = inputs["observations"], Catalog.open(folder)
    assert not verify(folder)
    assert manifest.rows.n_out == observations.n_rows
    missing = 0
    for pixel in observations.pixels:
        ours = placed.read(pixel)
        theirs = observations.read(pixel, ["obs_id", "teff", "logg", "feh", "snr", "rv"])
        assert ours["obs_id"].equals(theirs["obs_id"])
        unknown = np.array([None in row.values() for row in theirs.to_pylist()])
        null = ours["umap_1"].is_null().to_numpy()
        assert null[unknown].all()
        missing += int(null.sum())
    assert manifest.summary["without_place"]["target"] == missing
    assert manifest.summary["left_out"] == ["distance", "ebv"]


def test_sample_holds_target_and_overlap_and_the_maps_count_every_placed_row(inputs, made):
    folder, manifest = made
    sample = pq.read_table(folder / SAMPLE)
    counts = {
        name: int((np.array(sample["sample"].to_pylist()) == name).sum())
        for name in ("target", "overlap")
    }
    assert all(100 < n < 300 for n in counts.values()), counts
    maps = pq.read_table(folder / MAPS)
    summary = manifest.summary["without_place"]
    plane, total = load_projection(folder), np.zeros((32, 32), np.int64)
    placed = Catalog.open(folder)
    for pixel in placed.pixels:
        table = placed.read(pixel, ["umap_1", "umap_2"])
        place = np.stack([table[n].to_numpy() for n in table.column_names], axis=1)
        total += density_map(place.astype(np.float32), plane.limits(), 32)
    cells = maps["cell_1"].to_numpy(), maps["cell_2"].to_numpy()
    assert maps["n_target"].to_pylist() == total[cells].tolist()
    assert total.sum() == sum(maps["n_target"].to_pylist()) == placed.n_rows - summary["target"]
    n_pairs = inputs["pairs"].n_rows
    assert sum(maps["n_overlap"].to_pylist()) == n_pairs - summary["overlap"]


def test_a_share_of_the_rows_gets_the_same_places(inputs, made, tmp_path):
    settings = SETTINGS.but(share=0.25)
    manifest = ProjectionStage(inputs, settings).run(tmp_path / "part")
    whole, part = Catalog.open(made[0]), Catalog.open(tmp_path / "part")
    assert not verify(tmp_path / "part")
    n_placed = 0
    for pixel in whole.pixels:
        ours, theirs = part.read(pixel), whole.read(pixel)
        assert ours["obs_id"].equals(theirs["obs_id"])
        placed = ours["umap_1"].is_valid()
        n_placed += pc.sum(placed).as_py()
        assert ours.filter(placed).equals(theirs.filter(placed))
    summary = manifest.summary
    assert n_placed == whole.n_rows - summary["not_asked"] - summary["without_place"]["target"]
    assert abs(summary["not_asked"] / whole.n_rows - 0.75) < 0.03
    assert sum(pq.read_table(tmp_path / "part" / MAPS)["n_target"].to_pylist()) == n_placed
    overlap = [pq.read_table(folder / MAPS)["n_overlap"].to_pylist() for folder in
               (made[0], tmp_path / "part")]  # fmt: skip
    assert sum(overlap[0]) == sum(overlap[1])


def test_workers_make_the_same_bytes(inputs, made, cluster, tmp_path):
    ProjectionStage(inputs, SETTINGS, product="projection").run(tmp_path / "there", cluster=cluster)
    assert contents(tmp_path / "there") == contents(made[0])


def test_catalogs_that_share_no_parameter_are_refused(inputs, tmp_path):
    wrong = Catalog.open(inputs["observations"].path)
    few = wrong.schema.empty_table().select(["_healpix_29", "obs_id", "teff"]).schema
    object.__setattr__(wrong, "schema", few)
    with pytest.raises(ModelError, match=r"share teff of the parameters.*needs two"):
        ProjectionStage({**inputs, "observations": wrong}, SETTINGS).run(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_plane_is_named(made, tmp_path):
    (tmp_path / "projection.json").write_text("{}")
    with pytest.raises(ModelError, match=r"projection\.json cannot be read"):
        load_projection(tmp_path)
