"""Columns of another catalog, by id and by position, against brute force."""

import numpy as np
import pyarrow as pa
import pytest

from sos_dask.api import attach
from sos_dask.errors import CatalogError, ConfigError
from sos_dask.sky.healpix import ang2pix, separation_arcsec
from sos_dask.stages.attach import AttachSettings
from sos_dask.stages.dedupe import Dedupe
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from tests.skies import observations, write_catalog


def with_ids(table, seed):
    ids = np.random.default_rng(seed).permutation(len(table)) + 1
    ids = pa.array(ids, mask=ids % 7 == 0)
    return table.append_column("gaia_dr3_source_id", ids)


def rows_of(path):
    catalog = Catalog.open(path)
    return pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])


@pytest.fixture
def companion(tmp_path):
    table = with_ids(observations(300, seed=1), 1)
    extinction = pa.array(np.arange(300, dtype=np.float32), mask=np.arange(300) % 11 == 0)
    return write_catalog(table.append_column("extinction", extinction), tmp_path / "other", 60)


def test_by_id_within_the_radius(tmp_path, companion):
    left = with_ids(observations(200, seed=1), 2)
    catalog = write_catalog(left, tmp_path / "left", 50)
    settings = AttachSettings(columns={"ebv": "extinction"}, id_radius_arcsec=5.0)
    manifest = attach(catalog, companion, tmp_path / "out", settings)
    other = rows_of(companion.path)
    by_id = {i: row for row, i in enumerate(other["gaia_dr3_source_id"].to_pylist()) if i}
    found = rows_of(tmp_path / "out")
    expected = []
    for row in found.to_pylist():
        j = by_id.get(row["gaia_dr3_source_id"])
        if j is not None:
            place = [np.array([v]) for v in (row["ra"], row["dec"])]
            there = [np.array([other[c][j].as_py()]) for c in ("ra", "dec")]
            if separation_arcsec(*place, *there)[0] > 5.0:
                j = None
        expected.append(None if j is None else other["extinction"][j].as_py())
    assert found["ebv"].to_pylist() == expected
    assert found.drop_columns("ebv").equals(rows_of(catalog.path))
    assert manifest.summary["nulls"] == {"ebv": expected.count(None)}
    assert 0 < manifest.summary["matched"] < 200


@pytest.mark.parametrize("rows_per_partition", [30, 10**6])
def test_by_position_takes_the_nearest(tmp_path, companion, rows_per_partition):
    catalog = write_catalog(observations(200, seed=4), tmp_path / "left", rows_per_partition)
    settings = AttachSettings(columns={"ebv": "extinction"}, by="position", radius_arcsec=1.0)
    manifest = attach(catalog, companion, tmp_path / "out", settings)
    found, other = rows_of(tmp_path / "out"), rows_of(companion.path)
    ra, dec = other["ra"].to_numpy(), other["dec"].to_numpy()
    n_several = 0
    for row in found.to_pylist():
        distance = separation_arcsec(np.full(300, row["ra"]), np.full(300, row["dec"]), ra, dec)
        nearest = int(np.argmin(distance))
        expected = other["extinction"][nearest].as_py() if distance[nearest] <= 1.0 else None
        assert row["ebv"] == expected
        n_several += int((distance <= 1.0).sum()) > 1
    assert manifest.summary["ambiguous"] == n_several > 0


def test_nothing_is_overwritten_or_made_up(tmp_path, companion):
    catalog = write_catalog(observations(50, seed=5), tmp_path / "left")
    with pytest.raises(CatalogError, match="has a column 'teff' already"):
        attach(
            catalog,
            companion,
            tmp_path / "a",
            AttachSettings(columns={"teff": "teff"}, by="position"),
        )
    with pytest.raises(CatalogError, match="no column 'gaia_dr3_source_id'"):
        attach(catalog, companion, tmp_path / "b", AttachSettings(columns={"ebv": "extinction"}))
    with pytest.raises(CatalogError, match="no column 'ebv'"):
        attach(
            catalog,
            companion,
            tmp_path / "c",
            AttachSettings(columns={"ebv": "ebv"}, by="position"),
        )
    with pytest.raises(ConfigError, match="by: must be"):
        AttachSettings(columns={"ebv": "ebv"}, by="name")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["2nd", "a b", "", "x" * 65])
def test_names_that_no_column_can_have(name):
    with pytest.raises(ConfigError, match="cannot name a column"):
        AttachSettings(columns={name: "ebv"})


def at(ra, dec, first, **columns):
    """Observations at these places, in their order on the sky."""
    table = observations(len(ra)).select(["_healpix_29", "obs_id", "ra", "dec"])
    cells = ang2pix(np.array(ra), np.array(dec))
    columns = {"_healpix_29": cells, "obs_id": first, "ra": ra, "dec": dec, **columns}
    made = pa.table({name: pa.array(values) for name, values in columns.items()})
    types = pa.schema([*table.schema, *list(made.schema)[4:]])
    return made.cast(types).sort_by("_healpix_29")


@pytest.mark.parametrize("ids", [(7, 3), (3, 7)])
def test_of_rows_as_near_the_smallest_key_counts(tmp_path, ids):
    left = write_catalog(at([10.0], [0.0], [1]), tmp_path / "left")
    both = at([10.0 + 1 / 3600, 10.0 - 1 / 3600], [0.0, 0.0], list(ids), ebv=np.array(ids, float))
    other = write_catalog(both, tmp_path / "other")
    settings = AttachSettings(columns={"ebv": "ebv"}, by="position", radius_arcsec=2.0)
    manifest = attach(left, other, tmp_path / "out", settings)
    assert rows_of(tmp_path / "out")["ebv"].to_pylist() == [3.0]
    assert (manifest.summary["matched"], manifest.summary["ambiguous"]) == (1, 1)


def test_equal_ids_count_within_their_own_radius(tmp_path):
    left = at([10.0, 20.0], [0.0, 0.0], [1, 2], gaia_dr3_source_id=[5, 6])
    ra = [10.0 + 4.9 / 3600, 20.0 + 5.1 / 3600]
    other = at(ra, [0.0, 0.0], [8, 9], gaia_dr3_source_id=[5, 6], ebv=[0.5, 0.6])
    catalogs = write_catalog(left, tmp_path / "left"), write_catalog(other, tmp_path / "other")
    for radius, id_radius, n in ((1.0, 5.0, 1), (6.0, 5.0, 2), (1.0, 6.0, 2), (1.0, 4.0, 0)):
        settings = AttachSettings(
            columns={"ebv": "ebv"}, radius_arcsec=radius, id_radius_arcsec=id_radius
        )
        out = tmp_path / f"{radius}-{id_radius}"
        manifest = attach(*catalogs, out, settings)
        assert manifest.summary["matched"] == n
        assert rows_of(out)["ebv"].null_count == 2 - n == manifest.summary["nulls"]["ebv"]


def test_what_is_known_of_the_observations_is_handed_on(small_store, tmp_path):
    path = small_store / "current" / "lamost.observations"
    settings = AttachSettings(columns={"other_snr": "snr"}, by="position")
    made = attach(path, path, tmp_path / "out", settings).summary
    known = Manifest.load(path).summary
    for name in ("survey", "expected_error"):
        assert made[name] == known[name]
    assert Dedupe({"observations": tmp_path / "out"}).expected_error == known["expected_error"]
