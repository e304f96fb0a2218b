"""Sample of the rows of a catalog: chosen by their keys alone."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sos_dask.columns import key_hashes
from sos_dask.errors import PartitionError
from sos_dask.stages.sample import Sample, SampleSettings, read_sample
from sos_dask.stats.numbers import uniform
from tests.job import contents
from tests.skies import observations, write_catalog

SETTINGS = SampleSettings(n_rows=1000)


@pytest.fixture(scope="module")
def sky() -> pa.Table:
    return observations(5000, 3, spread=True)


def make(table: pa.Table, folder, size: int = 10**6, settings=SETTINGS, **options):
    catalog = write_catalog(table, folder / "rows", size)
    manifest = Sample({"observations": catalog}, settings).run(folder / "sample", **options)
    return catalog, manifest


def test_rows_are_those_that_their_keys_choose(sky, tmp_path):
    _, manifest = make(sky, tmp_path, 700)
    found = read_sample(tmp_path / "sample")
    chosen = uniform(key_hashes(sky["obs_id"]), 0) < 1000 / 5000
    names = [*SETTINGS.columns, "quality"]
    names = [name for name in dict.fromkeys(names) if name in sky.schema.names]
    assert found.schema.names == names and "phot_g_mean_mag" not in names
    assert found.equals(sky.filter(pa.array(chosen)).select(names).replace_schema_metadata())
    assert abs(found.num_rows - 1000) < 5 * np.sqrt(800)
    assert manifest.rows.n_in == 5000 and manifest.rows.n_out == found.num_rows
    assert manifest.rows.dropped == {"not chosen": 5000 - found.num_rows}


def test_partitions_and_workers_change_no_byte(sky, cluster, tmp_path):
    few, _ = make(sky, tmp_path / "few")
    many, _ = make(sky, tmp_path / "many", 100)
    make(sky, tmp_path / "workers", 400, cluster=cluster)
    assert len(many.pixels) > 2 * len(few.pixels)
    made = [contents(tmp_path / one / "sample") for one in ("few", "many", "workers")]
    assert made[0]["sample.parquet"] == made[1]["sample.parquet"] == made[2]["sample.parquet"]


def test_what_other_rows_there_are_does_not_matter(sky, tmp_path):
    """Of half of the catalog the same half of the sample, where the share is the same."""
    half = sky.filter(pa.array(np.arange(5000) % 2 == 0))
    make(half, tmp_path / "half", settings=SETTINGS.but(n_rows=1250))
    make(sky, tmp_path / "all", settings=SETTINGS.but(n_rows=2500))
    some, every = (read_sample(tmp_path / name / "sample") for name in ("half", "all"))
    assert 0 < some.num_rows < every.num_rows
    inside = pc.is_in(every["teff"], half["teff"].combine_chunks())
    assert some.equals(every.filter(inside))


def test_a_small_catalog_is_its_own_sample(tmp_path):
    table = observations(800, 1)
    make(table, tmp_path, 100)
    assert read_sample(tmp_path / "sample").num_rows == 800
    make(table.slice(0, 0), tmp_path / "none")
    assert read_sample(tmp_path / "none" / "sample").num_rows == 0


def test_seeds_choose_others(sky, tmp_path):
    make(sky, tmp_path / "a", settings=SETTINGS.but(n_rows=2500))
    make(sky, tmp_path / "b", settings=SETTINGS.but(n_rows=2500, seed=1))
    one, other = (read_sample(tmp_path / name / "sample")["teff"] for name in "ab")
    both = pc.sum(pc.is_in(one, other.combine_chunks())).as_py()
    assert abs(both - 1250) < 5 * np.sqrt(1250)


def test_columns_are_those_that_are_asked_for_and_there(sky, tmp_path):
    key = sky.append_column("star_id", pc.cast(sky["obs_id"], pa.string()))
    key = key.drop_columns(["obs_id", "quality"])
    asked = SETTINGS.but(columns=("snr", "rv", "feh", "star_id"))
    make(key, tmp_path, 700, settings=asked)
    found = read_sample(tmp_path / "sample", good=True)
    chosen = uniform(key_hashes(key["star_id"]), 0) < 1000 / 5000
    wanted = key.filter(pa.array(chosen)).select(["snr", "feh", "star_id"])
    assert found.equals(wanted.replace_schema_metadata()), "the key where it is asked for"


def test_good_rows_pass_all_cuts(sky, tmp_path):
    make(sky, tmp_path)
    every, good = (read_sample(tmp_path / "sample", good=one) for one in (False, True))
    assert 0 < good.num_rows < every.num_rows
    assert good.equals(every.filter(pc.equal(every["quality"], 0)))


def test_a_damaged_sample_is_named(sky, tmp_path):
    make(sky, tmp_path)
    file = tmp_path / "sample" / "sample.parquet"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(PartitionError, match=r"sample\.parquet"):
        read_sample(tmp_path / "sample")
    pq.write_table(sky.select(["teff"]), file)
    assert read_sample(tmp_path / "sample", good=True).num_rows == 5000
