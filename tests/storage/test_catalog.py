import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.errors import CatalogError, PartitionError
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.sky.neighbours import surroundings
from sos_dask.storage.artifact import write_parquet
from sos_dask.storage.catalog import Catalog
from tests.skies import observations, write_catalog


@pytest.fixture(scope="module")
def catalog(tmp_path_factory) -> Catalog:
    return write_catalog(observations(3000, spread=True), tmp_path_factory.mktemp("c") / "cat", 200)


def test_reads_back_what_was_written(catalog):
    table = pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])
    assert table.equals(observations(3000, spread=True))
    assert catalog.n_rows == 3000
    assert len(catalog.pixels) > 12
    assert {pixel.order for pixel in catalog.pixels} >= {1}


def test_units_are_kept_with_the_columns(catalog):
    schema = pq.read_schema(catalog.partition_file(catalog.pixels[0]))
    assert schema.field("teff").metadata[b"unit"] == b"K"
    assert schema.field("ra").metadata[b"ucd"] == b"pos.eq.ra;meta.main"
    assert pq.read_schema(catalog.path / "dataset/_common_metadata").equals(schema)


def test_travels_by_path_alone(catalog):
    text = pickle.dumps(catalog)
    assert len(text) < 500
    assert pickle.loads(text).pixels == catalog.pixels


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 12 * 4**8 - 1)), min_size=1, max_size=6)
)
def test_ranges_equal_a_filter(catalog, items):
    pixels = sorted({HealpixPixel(order, number % (12 * 4**order)) for order, number in items})
    ranges: list[tuple[int, int]] = []
    for pixel in sorted(pixels, key=lambda p: p.first):
        if not ranges or pixel.first >= ranges[-1][1]:
            ranges.append((pixel.first, pixel.stop))
    table = observations(3000, spread=True)
    cells = table["_healpix_29"].to_numpy()
    inside = np.zeros(len(cells), dtype=bool)
    for first, stop in ranges:
        inside |= (cells >= first) & (cells < stop)
    expected = table.filter(pa.array(inside)).select(["_healpix_29", "obs_id", "ra"])
    assert catalog.read_ranges(ranges, ["_healpix_29", "obs_id", "ra"]).equals(expected)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory) -> Catalog:
    """A partition of many row groups, as others may write it."""
    catalog = write_catalog(observations(3000), tmp_path_factory.mktemp("g") / "cat")
    for pixel in catalog.pixels:
        path = catalog.partition_file(pixel)
        pq.write_table(pq.ParquetFile(path).read(), path, row_group_size=50)
    return replace(catalog, manifest=None)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_rows_of_a_partition(grouped, data):
    pixel = max(grouped.pixels, key=grouped.partition_rows)
    table = grouped.read(pixel)
    cells = table["_healpix_29"].to_numpy()
    assert len(cells) > 500
    edges = sorted(set(data.draw(st.lists(st.sampled_from(cells.tolist()), max_size=8))))
    ranges = list(zip(edges[::2], edges[1::2], strict=False))
    inside = np.zeros(len(cells), dtype=bool)
    for first, stop in ranges:
        inside |= (cells >= first) & (cells < stop)
    rows = grouped.rows_in(pixel, ranges)
    assert rows.tolist() == np.flatnonzero(inside).tolist()
    odd = grouped.rows_in(pixel, ranges, wanted=lambda some: some % 2 == 1)
    assert odd.tolist() == np.flatnonzero(inside & (cells % 2 == 1)).tolist()
    assert grouped.cells(pixel).tolist() == cells.tolist()
    some = rows[data.draw(st.integers(0, 3)) :: 3]
    assert grouped.take(pixel, some, ["obs_id", "ra"]).equals(
        table.select(["obs_id", "ra"]).take(pa.array(some, pa.int64()))
    )


def test_rows_that_are_not_sorted_are_refused(tmp_path):
    catalog = replace(write_catalog(observations(300), tmp_path / "cat"), manifest=None)
    pixel = max(catalog.pixels, key=catalog.partition_rows)
    table = catalog.read(pixel)
    rows = np.arange(table.num_rows)[::-1]
    pq.write_table(table.take(pa.array(rows)), catalog.partition_file(pixel))
    with pytest.raises(PartitionError, match="not sorted"):
        catalog.rows_in(pixel, [(pixel.first, (pixel.first + pixel.stop) // 2)])
    with pytest.raises(PartitionError, match="not sorted"):
        catalog.cells(pixel)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12 * 4**4 - 1)), max_size=6, unique=True)
)
def test_partitions_that_meet_ranges(catalog, items):
    pixels = [HealpixPixel(order, number % (12 * 4**order)) for order, number in items]
    ranges: list[tuple[int, int]] = []
    for pixel in sorted(pixels, key=lambda p: p.first):
        if not ranges or pixel.first >= ranges[-1][1]:
            ranges.append((pixel.first, pixel.stop))
    expected = [
        pixel
        for pixel in catalog.pixels
        if any(first < pixel.stop and pixel.first < stop for first, stop in ranges)
    ]
    assert catalog.overlapping(ranges) == expected


def test_surroundings_hold_every_neighbour(catalog):
    """Rows within the radius of a partition's rows are in the partition or in its first layer."""
    table = observations(3000, spread=True)
    cells = table["_healpix_29"].to_numpy()
    from sos_dask.sky.healpix import in_ranges, separation_arcsec

    ra, dec = table["ra"].to_numpy(), table["dec"].to_numpy()
    radius = 5000.0
    for pixel in catalog.pixels[::7]:
        own = (cells >= pixel.first) & (cells < pixel.stop)
        near = np.zeros(len(cells), dtype=bool)
        for row in np.flatnonzero(own):
            near |= separation_arcsec(ra[row], dec[row], ra, dec) <= radius
        layer = in_ranges(cells, surroundings(pixel, radius)[0])
        assert not (near & ~own & ~layer).any()
        assert not (own & layer).any()


def test_bounds_come_from_the_footers(catalog):
    teff = observations(3000, spread=True)["teff"].to_numpy()
    assert catalog.bounds("teff", "none") == {"teff": (teff.min(), teff.max())}


def test_every_type_reads_back_in_few_bytes(tmp_path):
    rng = np.random.default_rng(3)
    n, few = 50_000, rng.random(50_000) < 0.1
    teff = (rng.normal(5500.0, 800.0, n)).astype(np.float32)
    table = pa.table(
        {
            "_healpix_29": np.sort(rng.integers(0, 12 << 58, n)),
            "id": pa.array(rng.integers(-(1 << 62), 1 << 62, n), mask=few),
            "small": rng.integers(0, 9, n).astype(np.int8),
            "ra": rng.uniform(0.0, 360.0, n),
            "teff": pa.array(teff, mask=few),
            "class": pa.array(rng.choice(["STAR", "GALAXY"], n), mask=few),
            "flag": few,
            "nothing": pa.nulls(n, pa.float32()),
        }
    )
    assert write_parquet(table, tmp_path / "ours.parquet") == n
    assert pq.read_table(tmp_path / "ours.parquet").equals(table)
    pq.write_table(table, tmp_path / "plain.parquet", compression="lz4", use_dictionary=["class"])
    ours, plain = ((tmp_path / f"{name}.parquet").stat().st_size for name in ("ours", "plain"))
    assert ours < 0.95 * plain


@pytest.fixture
def small(tmp_path) -> Catalog:
    return write_catalog(observations(500, spread=True), tmp_path / "cat", 100)


def test_a_flipped_bit_is_seen_by_what_reads_its_column(small):
    pixel = small.pixels[0]
    path = small.partition_file(pixel)
    content, group = path.read_bytes(), pq.read_metadata(path).row_group(0)
    for number, name in enumerate(small.schema.names):
        chunk = group.column(number)
        last = chunk.data_page_offset + chunk.total_compressed_size
        last -= chunk.data_page_offset - (chunk.dictionary_page_offset or chunk.data_page_offset)
        damaged = bytearray(content)
        damaged[last - 1] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(PartitionError, match=f"Npix={pixel.pixel}.parquet cannot be read"):
            small.read(pixel, [name])
        with pytest.raises(PartitionError, match="cannot be read"):
            small.take(pixel, np.arange(3), [name])
        others = [other for other in small.schema.names if other != name]
        assert small.read(pixel, others).num_rows == group.num_rows
    path.write_bytes(content)


def test_missing_column_names_the_nearest(catalog):
    with pytest.raises(CatalogError, match="Did you mean teff"):
        catalog.require("tef")


def test_not_a_catalog(tmp_path):
    with pytest.raises(CatalogError, match="does not exist"):
        Catalog.open(tmp_path / "nothing")
    with pytest.raises(CatalogError, match="not an output of sos-dask"):
        Catalog.open(tmp_path)


def test_the_bytes_of_the_largest_partition(catalog):
    pixel, n_bytes = catalog.largest_partition()
    assert catalog.partition_rows(pixel) == max(map(catalog.partition_rows, catalog.pixels))
    own = catalog.read(pixel).nbytes  # without text and nulls: what it takes
    assert own <= n_bytes < 1.1 * own + 3000


def test_text_of_few_values_comes_as_codes(tmp_path):
    table = observations(20_000, spread=True)
    few = pa.array([f"s{number % 3}" for number in range(20_000)])
    many = pa.array([f"star {number}" for number in range(20_000)])
    table = table.append_column("few", few).append_column("many", many)
    written = write_catalog(table, tmp_path / "cat")
    read = written.read(written.pixels[0], ["few", "many"], coded=True)
    assert pa.types.is_dictionary(read["few"].type) and pa.types.is_string(read["many"].type)
    assert read["few"].cast(pa.string()).equals(written.read(written.pixels[0])["few"])


def test_nothing_lies_in_no_range(catalog):
    assert catalog.overlapping([]) == []
    assert catalog.rows_in(catalog.pixels[0], []).tolist() == []
    assert catalog.read_ranges([], ["obs_id"]).num_rows == 0
    edges = [(pixel.stop, pixel.stop) for pixel in catalog.pixels[:1]]
    assert catalog.overlapping(edges) == []
