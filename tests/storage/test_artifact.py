import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sos_dask.errors import CatalogError, ConfigError, PartitionError, StorageError
from sos_dask.storage.artifact import (
    Output,
    atomic_path,
    open_parquet,
    row_group_bounds,
    storage_errors,
    taken,
)
from sos_dask.storage.manifest import (
    MANIFEST,
    Manifest,
    Recipe,
    Rows,
    sha256_of_file,
)

RECIPE = Recipe("dedupe", 1, {"radius_arcsec": 1.5}, {"observations": "abc"})


def test_output_is_complete_only_with_its_manifest(tmp_path):
    output = Output.prepare(tmp_path / "out", RECIPE)
    record = output.write_file("data/a.txt", lambda path: path.write_text("hello"))
    assert not output.complete
    with pytest.raises(CatalogError, match="unfinished"):
        Manifest.load(output.directory)
    output.put_record("part", "1", {"n": 1})
    assert output.get_record("part", "1") == {"n": 1}
    assert output.get_record("part", "2") is None
    output.commit(Rows(5, 5), (record,), {"note": "x"})
    assert Output.prepare(tmp_path / "out", RECIPE).complete
    assert not output.work.exists()
    manifest = Manifest.load(output.directory)
    assert manifest.files == (record,)
    assert record.sha256 == sha256_of_file(output.directory / "data/a.txt")
    assert Output.prepare(tmp_path / "out", RECIPE).complete


def test_manifest_has_no_time_and_no_path(tmp_path):
    texts = []
    for name in ("one", "two"):
        output = Output.prepare(tmp_path / name, RECIPE)
        record = output.write_file("a", lambda path: path.write_text("hello"))
        output.commit(Rows(1, 1), (record,))
        texts.append((output.directory / MANIFEST).read_text())
    assert texts[0] == texts[1]


def test_another_recipe_does_not_mix_into_a_directory(tmp_path):
    other = Recipe("dedupe", 1, {"radius_arcsec": 9.0}, RECIPE.inputs)
    Output.prepare(tmp_path, RECIPE)
    Output.prepare(tmp_path, RECIPE)  # the same goes on
    with pytest.raises(CatalogError, match="already holds another run"):
        Output.prepare(tmp_path, other)
    output = Output.prepare(tmp_path, other, overwrite=True)
    output.commit(Rows(0, 0), ())
    with pytest.raises(CatalogError, match="--overwrite"):
        Output.prepare(tmp_path, RECIPE)
    Output.prepare(tmp_path, RECIPE, overwrite=True)


def test_overwrite_never_removes_files_of_others(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CatalogError, match="not overwritten"):
        Output.prepare(tmp_path, RECIPE, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_account_of_rows_must_close(tmp_path):
    output = Output.prepare(tmp_path, RECIPE)
    with pytest.raises(CatalogError, match="10 rows in"):
        output.commit(Rows(10, 8, 1), ())
    assert not output.complete
    output.commit(Rows(10, 8, 1, {"merged": 2}, {"twice": 1}), ())


def test_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="boom"), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ValueError("boom")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_named():
    with pytest.raises(StorageError, match="disk is full: cannot write /data/x"):  # noqa: SIM117
        with storage_errors(Path("/data/x")):
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.fault
def test_really_full_disk(tmp_path):
    """A file-size limit of the process: the kernel refuses the write in the middle."""
    code = f"""
import resource, signal
from pathlib import Path
import pyarrow as pa
from sos_dask.storage.artifact import Output, Recipe
from sos_dask.storage.catalog import write_partition
from sos_dask.sky.healpix import HealpixPixel
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
output = Output(Path({str(tmp_path)!r}), Recipe("x", 1, {{}}, {{}}))
import random
table = pa.table({{"a": [random.random() for _ in range(10000)]}})
write_partition(output, HealpixPixel(0, 0), table)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "StorageError: the disk is full" in done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file()], "nothing under a final name"


def test_two_processes_may_write_the_same_file(tmp_path):
    code = (
        "from pathlib import Path; from sos_dask.storage.artifact import write_text\n"
        f"for _ in range(200): write_text(Path({str(tmp_path / 'a')!r}), 'x' * 5000)"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert (tmp_path / "a").read_text() == "x" * 5000
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_only_the_row_groups_of_wanted_rows_are_read(tmp_path):
    table = pa.table({"a": range(100), "b": range(100, 200)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    with open_parquet(tmp_path / "a.parquet", must_have=["a"]) as file:
        for rows in ([0], [9, 10], [99], [], list(range(20, 40)), [5, 25, 26, 98]):
            found = taken(file, np.array(rows, dtype=np.int64), ["b"])
            assert len(found) == len({row // 10 for row in rows})
            assert [v for one in found for v in one["b"].to_pylist()] == [r + 100 for r in rows]
    with (
        pytest.raises(PartitionError, match="no column 'c'"),
        open_parquet(tmp_path / "a.parquet", must_have=["a", "c"]),
    ):
        pass


def test_bounds_of_row_groups(tmp_path):
    table = pa.table({"a": [3, 1, None, None, 7, None], "_healpix_29": range(6)})
    for statistics, path in ((["a"], tmp_path / "some"), (False, tmp_path / "none")):
        pq.write_table(table, path, row_group_size=2, write_statistics=statistics)
    footer = pq.read_metadata(tmp_path / "some")
    assert row_group_bounds(footer, "a") == [(1, 3), (None, None), (7, 7)]
    assert row_group_bounds(footer, "_healpix_29") == [(0, (12 << 58) - 1)] * 3
    with pytest.raises(PartitionError, match="no statistics of column 'a'"):
        row_group_bounds(pq.read_metadata(tmp_path / "none"), "a")
    with pytest.raises(PartitionError, match="no column 'b'"):
        row_group_bounds(footer, "b")


def test_a_record_is_of_the_files_that_its_thread_has_written(tmp_path):
    output = Output.prepare(tmp_path / "out", RECIPE)
    output.write_bytes("a", b"first")
    output.put_record("part", "1", {})
    with atomic_path(tmp_path / "elsewhere") as temporary:
        temporary.write_text("not of the output")
    output.write_bytes("b", b"second")
    output.put_record("part", "2", {})
    (output.directory / "a").write_bytes(b"First")
    assert not output.intact("part", "1") and output.intact("part", "2")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_refused_write_names_its_path(number):
    with pytest.raises(StorageError, match="cannot write /data/x"), storage_errors(Path("/data/x")):
        raise OSError(number, "refused")


@pytest.mark.parametrize("text", ["[Errno 28] on device", "1100 requested and 1008 written"])
def test_a_full_disk_that_only_the_text_tells(text):
    with pytest.raises(StorageError, match="disk is full"), storage_errors(Path("/data/x")):
        raise OSError(text)


def test_an_output_is_not_replaced_by_what_is_made_from_it(tmp_path):
    made = Output.prepare(tmp_path, RECIPE).commit(Rows(0, 0), ())
    with pytest.raises(ConfigError, match="is made from it"):
        Output.prepare(tmp_path, Recipe("x", 1, {}, {"a": made.fingerprint}), overwrite=True)


def test_what_a_stage_leaves_without_having_made_anything(tmp_path):
    output = Output.prepare(tmp_path / "a", RECIPE)
    output.release()
    assert not (tmp_path / "a").exists()
    output = Output.prepare(tmp_path / "b", RECIPE)
    output.write_bytes("part", b"x")
    output.release()
    assert (tmp_path / "b/part").exists()
