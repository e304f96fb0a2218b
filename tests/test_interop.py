"""Catalogs open in other programs as they are, and those find the same pairs."""

import duckdb
import hats
import lsdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hats.io.validation import is_valid_catalog

from sos_dask.api import crossmatch, margin
from sos_dask.stages.attach import MarginSettings
from sos_dask.stages.crossmatch import CrossmatchSettings
from sos_dask.storage.catalog import Catalog
from tests.skies import observations, write_catalog


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    """Two catalogs of clumps at the hard places, the reference with a margin."""
    folder = tmp_path_factory.mktemp("interop")
    left = write_catalog(observations(1500, 1), folder / "left", 100, "left.observations")
    right = write_catalog(observations(1500, 2), folder / "right", 150, "right.observations")
    margin(right, folder / "right.collection", MarginSettings(radius_arcsec=10.0))
    return left, right, folder


def test_lsdb_finds_the_same_pairs(sky, tmp_path):
    left, right, folder = sky
    settings = CrossmatchSettings(radius_arcsec=1.0, use_gaia_id=False)
    crossmatch(left, right, tmp_path / "pairs", settings)
    pairs = Catalog.open(tmp_path / "pairs")
    ours = pa.concat_tables([pairs.read(pixel) for pixel in pairs.pixels])
    theirs = (
        lsdb.open_catalog(left.path)
        .crossmatch(
            lsdb.open_catalog(folder / "right.collection"),
            radius_arcsec=1.0,
            n_neighbors=1,
            suffixes=("_l", "_r"),
            suffix_method="all_columns",
        )
        .compute()
    )
    found = set(
        zip(ours["target_obs_id"].to_pylist(), ours["reference_star_id"].to_pylist(), strict=True)
    )
    expected = set(zip(theirs["obs_id_l"].tolist(), theirs["obs_id_r"].tolist(), strict=True))
    assert len(found) > 500
    assert found == expected
    by_target = dict(
        zip(ours["target_obs_id"].to_pylist(), ours["separation_arcsec"].to_pylist(), strict=True)
    )
    ordered = [by_target[target] for target in theirs["obs_id_l"].tolist()]
    np.testing.assert_allclose(ordered, theirs["_dist_arcsec"].to_numpy(), atol=1e-4)


def test_hats_reads_the_catalog(sky):
    left, _right, folder = sky
    found = hats.read_hats(left.path)
    assert found.catalog_info.total_rows == 1500
    assert len(found.get_healpix_pixels()) == len(left.pixels)
    assert found.schema.field("teff").metadata[b"unit"] == b"K"
    collection = hats.read_hats(folder / "right.collection")
    assert collection.main_catalog.catalog_info.total_rows == 1500
    assert collection.default_margin == "margin"
    assert is_valid_catalog(left.path, strict=True, verbose=True)


def test_duckdb_reads_the_catalog(sky):
    left, _, _ = sky
    query = f"select count(*), min(teff), max(obs_id) from '{left.path}/dataset/**/*.parquet'"
    count, teff, obs_id = duckdb.sql(query).fetchall()[0]
    table = observations(1500, 1)
    assert count == 1500
    assert teff == table["teff"].to_numpy().min()
    assert obs_id == table["obs_id"].to_numpy().max()


def test_a_catalog_written_by_lsdb_is_an_input(sky, tmp_path):
    """A foreign catalog, without our manifest, matches as our own does."""
    left, right, _ = sky
    frame = pd.concat([right.read(pixel).to_pandas() for pixel in right.pixels])
    lsdb.from_dataframe(
        frame.drop(columns="_healpix_29"), ra_column="ra", dec_column="dec"
    ).write_catalog(tmp_path / "foreign", catalog_name="foreign", as_collection=False)
    foreign = Catalog.open(tmp_path / "foreign")
    assert foreign.n_rows == 1500
    settings = CrossmatchSettings(radius_arcsec=1.0)
    results = []
    for number, catalog in enumerate((right, foreign)):
        crossmatch(left, catalog, tmp_path / str(number), settings)
        pairs = Catalog.open(tmp_path / str(number))
        table = pa.concat_tables([pairs.read(pixel) for pixel in pairs.pixels])
        results.append(
            table.select(["target_obs_id", "reference_star_id", "n_candidates"]).to_pydict()
        )
    assert results[0] == results[1]
