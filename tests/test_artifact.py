import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sos_dask.errors import CatalogError, StorageError
from sos_dask.storage.artifact import Output, atomic_path, storage_errors
from sos_dask.storage.manifest import (
    MANIFEST,
    Manifest,
    Recipe,
    Rows,
    canonical_json,
    sealed_json,
    sha256_of_file,
)

RECIPE = Recipe("dedupe", 1, {"radius_arcsec": 1.5}, {"observations": "abc"})
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False, width=32),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_fingerprint_does_not_depend_on_the_order_of_keys(params):
    backwards = dict(reversed(params.items()))
    assert Recipe("s", 1, params, {}).fingerprint == Recipe("s", 1, backwards, {}).fingerprint


@given(st.dictionaries(st.text(), json_values, min_size=1, max_size=5), st.data())
def test_any_changed_setting_is_another_fingerprint(params, data):
    key = data.draw(st.sampled_from(sorted(params)))
    changed = {**params, key: data.draw(json_values)}
    same = canonical_json(params) == canonical_json(changed)
    before, after = Recipe("s", 1, params, {}), Recipe("s", 1, changed, {})
    assert (before.fingerprint == after.fingerprint) is same


def test_each_part_of_a_recipe_counts():
    others = [
        Recipe("other", 1, RECIPE.params, RECIPE.inputs),
        Recipe("dedupe", 2, RECIPE.params, RECIPE.inputs),
        Recipe("dedupe", 1, {"radius_arcsec": 2.0}, RECIPE.inputs),
        Recipe("dedupe", 1, RECIPE.params, {"observations": "abd"}),
    ]
    assert len({RECIPE.fingerprint, *(other.fingerprint for other in others)}) == 5


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: {**raw, "format": 99}, "newer"),
        (lambda raw: {**raw, "format": 1}, "of an older version of sos-dask.*Run the rebuild"),
        (lambda raw: {**raw, "params": {"radius_arcsec": 2}}, "was changed"),
        (lambda raw: {key: value for key, value in raw.items() if key != "rows"}, "damaged"),
    ],
)
def test_manifest_of_another_kind_is_refused(tmp_path, change, message):
    Output.prepare(tmp_path, RECIPE).commit(Rows(0, 0), ())
    path = tmp_path / MANIFEST
    path.write_text(sealed_json(change(json.loads(path.read_text()))))
    with pytest.raises(CatalogError, match=f"(?s){message}"):
        Manifest.load(tmp_path)


def test_an_output_of_another_version_of_its_stage_is_refused(tmp_path):
    Output.prepare(tmp_path, RECIPE).commit(Rows(0, 0), ())
    assert Manifest.of_stage(tmp_path, "dedupe", 1).recipe == RECIPE
    with pytest.raises(CatalogError, match=r"version 1 of 'dedupe', known here is version 2"):
        Manifest.of_stage(tmp_path, "dedupe", 2)
    with pytest.raises(CatalogError, match="not an output of 'reference' but of 'dedupe'"):
        Manifest.of_stage(tmp_path, "reference", 1)


def test_damaged_json_is_named(tmp_path):
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(CatalogError, match=r"manifest\.json is damaged"):
        Manifest.load(tmp_path)


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
