"""Columns of another catalog, by id and by position, against brute force."""

import numpy as np
import pyarrow as pa
import pytest

from sos_dask.api import attach
from sos_dask.errors import CatalogError, ConfigError
from sos_dask.sky.healpix import separation_arcsec
from sos_dask.stages.attach import AttachSettings
from sos_dask.storage.catalog import Catalog
from tests.sky import observations, write_catalog


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
