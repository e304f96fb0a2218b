"""A store of objects on a real S3 server: same bytes as on disk, faults, races, other programs."""

import json
import random
import signal
import subprocess
import time

import numpy as np
import pytest

from sos_dask import api
from sos_dask.errors import CatalogError, LockedError
from sos_dask.rebuild.history import RunLog, runs
from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.lock import holder_of, locked
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import FileRecord, Manifest, Recipe, Rows, files_below
from sos_dask.storage.objects import ObjectPath, as_path
from sos_dask.storage.store import gc, status, verify
from tests.command_line import command
from tests.foreign import of_others, rows_of, stars
from tests.job import write_job
from tests.s3 import KEYS, manifests, same_files
from tests.skies import observations, write_catalog
from tests.storage.test_parts import dedupe, made, moved


def rebuild(job, store) -> subprocess.Popen:
    options = ("--store", store, "--workers", "0", "--json", "--no-lock")
    return subprocess.Popen(
        command("rebuild", job, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def store(small_store, small_sky, s3_server, tmp_path_factory) -> ObjectPath:
    """Store of two rebuilds at once, one of which is killed, and then run again."""
    folder = tmp_path_factory.mktemp("object-store")
    store = ObjectPath(f"s3://tests/{folder.name}/store")
    job = write_job(folder, small_sky)
    killed, other = rebuild(job, store), rebuild(job, store)
    time.sleep(random.uniform(3, 6))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    builds = []
    for process in (other, None):
        out, _ = (process or rebuild(job, store)).communicate(timeout=240)
        builds.append(json.loads(out)["build"])
    current = store.parent / "store" / "current"
    assert [f"builds/{build}\n" for build in builds] == [current.read_text()] * 2
    assert not any((folder / name).exists() for name in ("s3:", "store"))
    return store


def test_the_bytes_are_those_on_disk(store, small_store):
    assert manifests(store) == manifests(small_store)
    assert same_files(store) > 100
    assert [
        one for path in (store / "artifacts").glob("*/*") for one in path.rglob(".work/*")
    ] == []


def test_nothing_runs_again_and_all_is_found(store, small_sky, tmp_path):
    found = status(store)
    assert len(found.builds) == 1
    assert found.current == found.builds[0]
    assert (found.missing, found.unfinished, found.unused_bytes) == ((), (), 0)
    job = load_job(write_job(tmp_path, small_sky, ('"store"', f'"{store}"')))
    build = api.rebuild(job)
    assert not any(one.ran for one in build.stages)
    assert build.name == found.current
    catalog = Catalog.open(f"{store}/current/lamost.corrected")
    assert catalog.n_rows == Catalog.open(build.products["lamost.observations"]).n_rows
    assert verify(f"{store}/current/lamost.pairs") == []
    assert not any(secret in str(vars(build)) for secret in KEYS.values())


def test_lsdb_opens_a_product(store, monkeypatch):
    import dask
    import lsdb
    import obstore.fsspec
    from upath import UPath

    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    obstore.fsspec.register("s3")
    corrected = as_path(f"{store}/current/lamost.corrected")
    with dask.config.set(scheduler="synchronous"):  # workers of other tests lack the settings
        rows = lsdb.open_catalog(UPath(str(corrected))).compute()
    assert len(rows) == Catalog.open(corrected).n_rows
    assert rows["teff_sos"].notna().any()


def test_a_changed_object_is_found(store):
    changed = as_path(f"{store}/current/lamost.stars")
    catalog = Catalog.open(changed)
    partition = catalog.partition_file(catalog.pixels[0])
    model = as_path(f"{store}/current/lamost.model.polynomial")
    coefficients = next(path for path in model.rglob("coefficients*"))
    for path, at in ((partition, 1000), (coefficients, 10)):
        assert isinstance(path, ObjectPath)
        content = path.read_bytes()
        path.put(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        where = changed if path is partition else model
        assert any("its SHA-256 is not the manifest's" in one for one in verify(where))
        if path is coefficients:
            with pytest.raises(CatalogError, match="SHA-256"):
                Manifest.checked(model)
        path.put(content)
        assert verify(where) == []


def test_gc_keeps_what_the_current_build_uses(store, prefix):
    for path in store.rglob("*"):
        ObjectPath(f"{prefix}/{path.relative_to(store)}").put(path.read_bytes())
    copy = as_path(prefix)
    assert isinstance(copy, ObjectPath)
    before = manifests(copy)
    left = copy / "artifacts" / "ingest" / "unfinished"
    (left / ".work" / "fingerprint").put(b"x")
    old = copy / "builds" / "20000101T000000.000000Z"
    (old / "build.json").put((copy / "current").resolve().joinpath("build.json").read_bytes())
    assert sorted(path for path, _ in gc(copy, keep=1)) == sorted([left, old])
    assert manifests(copy) == before
    assert status(copy).builds == ((copy / "current").resolve().name,)


def test_shards_share_one_output(store, cli, prefix):
    model, catalog = (f"{store}/current/lamost.{one}" for one in ("model.polynomial", "stars"))
    for shard in ("1/3", "3/3", "2/3"):
        ran = cli("apply", model, catalog, "-o", f"{prefix}/out", "--partitions", shard)
        assert ran.code == 0, ran.err
    whole = api.apply(model, catalog, f"{prefix}/whole/out")
    assert Manifest.load(as_path(f"{prefix}/out")).document == whole.document
    assert verify(f"{prefix}/out") == []


@pytest.mark.parametrize("suffix", [".parquet", "/"])
def test_a_catalog_of_another_program(prefix, tmp_path, suffix):
    on_disk = Catalog.open(of_others(tmp_path / "theirs", stars(), suffix=suffix))
    for path in files_below(on_disk.path):
        ObjectPath(f"{prefix}/{path.relative_to(on_disk.path)}").put(path.read_bytes())
    found = Catalog.open(prefix)
    assert found.pixels == on_disk.pixels
    assert found.fingerprint == on_disk.fingerprint
    assert rows_of(found).equals(rows_of(on_disk))
    assert verify(prefix) == []


def test_a_server_that_is_away_for_a_while(s3_server, small_sky, prefix, tmp_path):
    files = command("ingest", "lamost-dr11-lrs", small_sky / "lamost.fits")
    options = ["--rows-per-partition", "1000", "-o", f"{prefix}/lamost", "--threads", "1"]
    process = subprocess.Popen([*files, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("write"):
            break
    s3_server.stop()
    time.sleep(4)
    s3_server.start()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert verify(f"{prefix}/lamost") == []


def test_the_first_manifest_stays(prefix, caplog):
    def made(stage: str, content: bytes) -> tuple[Output, Manifest]:
        output = Output(as_path(f"{prefix}/{stage}"), Recipe(stage, 1, {}, {}))
        record = output.write_bytes("model.json", content)
        return output, Manifest(output.recipe, Rows(0, 0), (record,))

    for stage in ("train-boosted", "dedupe"):
        output, first = made(stage, b"first")
        late = output.write_bytes("model.json", b"other")
        assert output.commit(Rows(0, 0), first.files).files == first.files
        assert isinstance(late, FileRecord)
        if stage == "dedupe":
            with pytest.raises(CatalogError, match="completed by another run with other content"):
                output.commit(Rows(0, 0), (late,))
        else:
            assert output.commit(Rows(0, 0), (late,)).files == first.files
            assert "that one is used" in caplog.text
            assert Manifest.checked(output.directory, "sha256").files == first.files
            assert verify(output.directory) == []


def test_nights_on_objects(prefix, tmp_path):
    """Parts are taken over, a lock is held by one, logs are kept, as on disk."""
    table = observations(300, 1, spread=True)
    old = write_catalog(table, tmp_path / "old", 30)
    new = write_catalog(moved(table, np.random.default_rng(1), 2), tmp_path / "new", 31)
    store = as_path(f"{prefix}/nights")
    first, _ = made(store, dedupe(old))
    second, counted = made(store, dedupe(new), first)
    whole, _ = made(tmp_path / "store", dedupe(new))
    assert 0 < counted["run"] < sum(counted.values())
    assert Manifest.load(second).document == Manifest.load(whole).document
    assert verify(second) == []
    with locked(store, "rebuild") as at:
        at("train")
        RunLog(store).event("start", job="mine", host="another", pid=1)
        with pytest.raises(LockedError, match="'train'"), locked(store, "gc"):
            pass
    with locked(store, "gc"):
        assert [one["outcome"] for one in runs(store)] == ["killed"]
    assert holder_of(store) is None
