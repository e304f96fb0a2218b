"""Columns added to a Parquet file: every reader sees the table that a plain write would give."""

import shutil

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sos_dask.errors import PartitionError
from sos_dask.schema import described
from sos_dask.stages.apply import apply
from sos_dask.storage.artifact import Output, Recipe
from sos_dask.storage.catalog import Catalog, parquet_settings, write_partition
from sos_dask.storage.digests import sha256_of_file
from sos_dask.storage.hats import partition_path
from sos_dask.storage.splice import append_columns, can_extend, extend_partition
from sos_dask.storage.verify import verify

TYPES = [pa.int64(), pa.int32(), pa.float32(), pa.float64(), pa.string(), pa.bool_()]


@st.composite
def tables(draw):
    """A table, how many of its columns a file has, and the rows of that file's row groups."""
    n = draw(st.integers(0, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    fields, columns = [], []
    for number, kind in enumerate(draw(st.lists(st.sampled_from(TYPES), min_size=2, max_size=40))):
        nullable = draw(st.booleans())
        values = pa.array(rng.integers(-5, 5, n)).cast(pa.float64())
        values = values.cast(pa.int8()).cast(kind) if kind != pa.bool_() else values.cast(kind)
        if nullable:
            values = pa.array(values.to_pylist(), kind, mask=rng.random(n) < 0.3)
        metadata = draw(st.sampled_from([None, {"unit": "K", "description": "Länge"}]))
        fields.append(pa.field(f"c{number}", kind, nullable, metadata))
        columns.append(values)
    table = pa.Table.from_arrays(columns, schema=pa.schema(fields))
    return table, draw(st.integers(1, len(fields) - 1)), draw(st.integers(1, 320))


@given(tables())
def test_the_file_is_that_of_a_plain_write(tmp_path_factory, drawn):
    table, n_old, group_rows = drawn
    folder = tmp_path_factory.mktemp("splice")
    old, new = (table.select(part) for part in (range(n_old), range(n_old, table.num_columns)))
    pq.write_table(
        old, folder / "old", **{**parquet_settings(old.schema), "row_group_size": group_rows}
    )
    digests = append_columns(folder / "old", new, table.schema, folder / "made")
    assert digests == tuple(sha256_of_file(folder / name) for name in ("old", "made"))
    pq.write_table(
        table, folder / "plain", **{**parquet_settings(table.schema), "row_group_size": group_rows}
    )
    made, plain = (pq.ParquetFile(folder / name) for name in ("made", "plain"))
    assert made.read().equals(table)
    assert made.schema_arrow.equals(described(table.schema), check_metadata=True)
    assert made.schema.equals(plain.schema)
    assert groups(made.metadata) == groups(plain.metadata)
    assert made.metadata.num_rows == table.num_rows
    for name in table.schema.names:
        assert made.read([name])[name].equals(table[name])
    if table.num_rows:
        query = "select * from read_parquet('{}')"
        seen, wanted = (
            duckdb.sql(query.format(folder / name)).to_arrow_table() for name in ("made", "plain")
        )
        assert seen.equals(wanted)


def groups(footer: pq.FileMetaData) -> list:
    """What a footer says of its column chunks, but for their places."""
    said = []
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        chunks = [group.column(column).to_dict() for column in range(group.num_columns)]
        for chunk in chunks:
            for place in ("file_offset", "data_page_offset", "dictionary_page_offset"):
                del chunk[place]
        said.append((group.num_rows, group.total_byte_size, chunks))
    return said


@pytest.fixture
def observations(small_store) -> Catalog:
    return Catalog.open((small_store / "current/lamost.observations").resolve())


def test_a_partition_gets_a_column(observations, tmp_path):
    schema = observations.schema.append(pa.field("number", pa.int32()))
    output = Output.prepare(tmp_path / "out", Recipe("test", 1, {}, {}))
    pixel = observations.pixels[0]
    table = observations.read(pixel)
    new = pa.table({"number": pa.array(range(table.num_rows), pa.int32())})
    assert can_extend(observations, pixel, schema)
    record = extend_partition(output, observations, pixel, new, schema)
    made = pq.read_table(tmp_path / "out" / record.path, partitioning=None)
    assert record.rows == table.num_rows and record.path == partition_path(pixel)
    assert made.equals(table.append_column("number", new["number"]))
    plain = write_partition(output, pixel, made)
    assert abs(plain.bytes - record.bytes) < 16


def test_other_representations_are_not_extended(observations):
    pixel, schema = observations.pixels[0], observations.schema
    more = pa.field("number", pa.int32())
    index = schema.get_field_index("teff")
    assert not can_extend(observations, pixel, schema)
    assert not can_extend(observations, pixel, schema.remove(index).append(more).append(more))
    wide = schema.field("teff").with_type(pa.float64())
    assert not can_extend(observations, pixel, schema.set(index, wide).append(more))


def test_a_damaged_partition_is_named(observations, tmp_path):
    broken = Catalog(tmp_path, observations.pixels, observations.schema)
    schema = observations.schema.append(pa.field("number", pa.int32()))
    with pytest.raises(PartitionError, match="is missing"):
        can_extend(broken, broken.pixels[0], schema)
    file = broken.partition_file(broken.pixels[0])
    file.parent.mkdir(parents=True)
    file.write_bytes(observations.partition_file(broken.pixels[0]).read_bytes()[:5000])
    with pytest.raises(PartitionError, match="cannot be read"):
        can_extend(broken, broken.pixels[0], schema)


def test_apply_makes_the_same_rows_of_columns_that_it_must_replace(
    observations, small_store, tmp_path
):
    """A corrected catalog has the new columns already: it is decoded and written as a whole."""
    model = small_store / "current/model.polynomial"
    apply(model, observations, tmp_path / "once")
    once = Catalog.open(tmp_path / "once")
    apply(model, once, tmp_path / "twice")
    twice = Catalog.open(tmp_path / "twice")
    for pixel in once.pixels:
        assert not can_extend(once, pixel, twice.schema)
        assert twice.read(pixel).equals(once.read(pixel))
    assert verify(tmp_path / "once") == []


def test_damage_in_what_is_copied_is_found(observations, tmp_path):
    """Columns that apply does not read are copied undecoded: their bytes are checked."""
    copy = tmp_path / "copy"
    shutil.copytree(observations.path, copy)
    damaged = Catalog.open(copy)
    pixel = damaged.pixels[0]
    file = damaged.partition_file(pixel)
    chunk = pq.read_metadata(file).row_group(0).column(damaged.schema.get_field_index("rv"))
    content = bytearray(file.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    file.write_bytes(content)
    schema = damaged.schema.append(pa.field("number", pa.int32()))
    new = pa.table({"number": pa.array(range(damaged.partition_rows(pixel)), pa.int32())})
    output = Output.prepare(tmp_path / "out", Recipe("test", 1, {}, {}))
    with pytest.raises(PartitionError, match=r"Npix=.* is not the file that was written"):
        extend_partition(output, damaged, pixel, new, schema)
    assert not list((tmp_path / "out").rglob("*.parquet*"))
    foreign = Catalog(copy, damaged.pixels, damaged.schema)  # nobody has said what it must be
    assert extend_partition(output, foreign, pixel, new, schema).rows == new.num_rows
