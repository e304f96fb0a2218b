import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sos_dask.errors import CatalogError, PartitionError
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.storage import objects
from sos_dask.storage import store as module
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.hats import partition_path
from sos_dask.storage.manifest import Recipe, Rows
from sos_dask.storage.store import (
    builds_in,
    costs,
    current_product,
    current_recipes,
    gc,
    publish,
    published,
    put_cost,
    require_store,
    status,
    stores_near,
    verify,
)
from tests.skies import observations, write_catalog


@pytest.fixture
def small(tmp_path) -> Catalog:
    return write_catalog(observations(500, spread=True), tmp_path / "cat", 100)


def rewrite(catalog: Catalog, change) -> HealpixPixel:
    """Damage one partition behind the manifest's back."""
    pixel = catalog.pixels[3]
    path = catalog.partition_file(pixel)
    pq.write_table(change(pq.ParquetFile(path).read()), path)
    return pixel


def test_a_sound_catalog_has_no_problems(small):
    assert verify(small.path) == []


def test_verify_finds_a_changed_byte(small):
    path = small.partition_file(small.pixels[2])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert any("SHA-256" in problem and path.name in problem for problem in verify(small.path))


def test_verify_finds_wrong_order(small):
    pixel = rewrite(small, lambda table: table.take(list(range(table.num_rows))[::-1]))
    assert any(f"pixel {pixel}: not sorted" in problem for problem in verify(small.path))


def test_verify_finds_rows_of_another_pixel(small):
    other = small.read(small.pixels[4])
    pixel = rewrite(small, lambda table: pa.concat_tables([table, other.slice(0, 1)]))
    found = verify(small.path)
    assert any(f"pixel {pixel}: 1 rows lie outside" in problem for problem in found)
    assert any("keys occur more than once" in problem for problem in found)
    assert any("the manifest says" in problem for problem in found)


def test_verify_finds_a_wrong_cell(small):
    def shift(table):
        cells = table["_healpix_29"].to_numpy() + 1
        return table.set_column(0, table.schema.field(0), pa.array(cells))

    pixel = rewrite(small, shift)
    assert any(
        f"pixel {pixel}: _healpix_29 does not fit" in problem for problem in verify(small.path)
    )


def test_verify_finds_missing_and_foreign_files(small):
    gone = small.partition_file(small.pixels[0])
    stray = small.path / "dataset/Norder=9/Dir=0/Npix=1.parquet"
    stray.parent.mkdir(parents=True)
    gone.rename(stray)
    found = verify(small.path)
    assert any(
        partition_path(small.pixels[0]) in problem and "missing" in problem for problem in found
    )
    assert any("Npix=1.parquet is not in the manifest" in problem for problem in found)


def test_corrupt_partition_is_named(small):
    path = small.partition_file(small.pixels[1])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        PartitionError, match=f"Npix={small.pixels[1].pixel}.parquet cannot be read"
    ):
        small.read(small.pixels[1])
    assert any(f"pixel {small.pixels[1]}" in problem for problem in verify(small.path))


@pytest.fixture
def store(tmp_path):
    """Three builds of one product, whose settings differ."""
    for number in range(3):
        recipe = Recipe("test", 1, {"number": number}, {})
        directory = tmp_path / "store/artifacts/test" / recipe.fingerprint
        output = Output.prepare(directory, recipe)
        record = output.write_bytes("a", b"x" * 100)
        output.commit(Rows(number, number), (record,))
        publish(tmp_path / "store", "job", "text", {"made": (recipe, directory)})
    return tmp_path / "store"


def test_the_latest_builds_and_what_they_use_stay(store):
    assert [one.rows for one in status(store).products] == [Rows(2, 2)]
    assert (len(status(store).builds), status(store).unused_bytes) == (3, 0)
    gone = [path.parent.name for path, _ in gc(store, keep=2, dry_run=True)]
    assert gone == ["builds", "test"] and len(status(store).builds) == 3
    gc(store, keep=2)
    assert len(status(store).builds) == 2 and status(store).unused_bytes == 0
    removed = gc(store, keep=1)
    assert all(size > 100 for path, size in removed if path.parent.name == "test")
    assert current_product(store, "made").name == published(store)["made"]
    assert gc(store, keep=1) == [] and verify(current_product(store, "made")) == []


def test_of_refused_builds_the_latest_stays(store):
    recipe = Recipe("test", 1, {"number": 9}, {})
    for why in ("rows", "shift"):
        directory = store / "artifacts/test" / recipe.fingerprint
        last = publish(store, why, "text", {"made": (recipe, directory)}, [why])
    gc(store, keep=2)
    kept = builds_in(store)
    assert len(kept) == 3 and last in kept


def test_gc_stops_where_a_build_appears(store, monkeypatch):
    before, removed = builds_in(store), objects.remove_tree

    def remove(path, **more):
        removed(path, **more)
        (store / "builds/9").mkdir(exist_ok=True)

    monkeypatch.setattr(module, "remove_tree", remove)
    with pytest.raises(CatalogError, match="a build was made meanwhile"):
        gc(store, keep=1)
    assert builds_in(store)[:2] == before[1:], "only the first was removed"


def test_the_current_build_stays_though_it_is_not_the_latest(store):
    first = sorted((store / "builds").iterdir())[0]
    (store / "current").unlink()
    (store / "current").symlink_to(f"builds/{first.name}")
    gc(store, keep=1)
    assert set(status(store).builds) >= {first.name} and len(status(store).builds) == 2
    assert status(store).missing == ()


def test_an_equal_build_is_kept(store):
    directory = current_product(store, "made")
    before = (store / "current").readlink()
    recipe = current_recipes(store)["made"]
    assert publish(store, "job", "text", {"made": (recipe, directory)}).name == before.name
    assert (store / "current").readlink() == before
    with pytest.raises(CatalogError, match="cannot be named"):
        publish(store, "job", "text", {"../made": (recipe, directory)})


def test_costs_are_remembered_by_output(store):
    put_cost(store, "a", wall_s=1.23456, cpu_s=2.0)
    put_cost(store, "b", wall_s=3.0, cpu_s=4.0)
    put_cost(store, "a", wall_s=5.0, cpu_s=6.0)
    assert costs(store) == {
        "a": {"wall_s": 5.0, "cpu_s": 6.0},
        "b": {"wall_s": 3.0, "cpu_s": 4.0},
    }


def test_stores_are_found_near_a_folder(store, tmp_path):
    assert stores_near(tmp_path / "other") == [store]
    assert store in stores_near(tmp_path)
    with pytest.raises(CatalogError, match="no sos-dask store") as caught:
        require_store(tmp_path / "other")
    assert f"Stores near it: {store}" in caught.value.hint
