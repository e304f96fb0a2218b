"""What stands on disk is trusted nowhere: catalogs, manifests, products, files of a store."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sos_dask.api import dedupe, margin
from sos_dask.errors import CatalogError, PartitionError
from sos_dask.stages.attach import MarginSettings
from sos_dask.stars.group import DedupeSettings
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import MANIFEST, Manifest, Recipe, Rows, sealed_json
from sos_dask.storage.store import costs, file_names, status, verify
from tests.command_line import assert_error, assert_nothing_final, cli
from tests.job import contents
from tests.skies import observations, write_catalog

__all__ = ["cli"]

SURVEY = """
format = 1
name = "basic"
title = "t"
position_epoch = 2000.0
missing = [-9999]
[columns]
obs_id = { source = "obs_id" }
ra = { source = "ra" }
dec = { source = "dec" }
teff = { source = "teff" }
logg = { source = "logg" }
feh = { source = "feh" }
"""


@pytest.fixture
def catalog(tmp_path) -> Path:
    return write_catalog(observations(300, spread=True), tmp_path / "cat", 50).path


@pytest.fixture
def foreign(catalog) -> Path:
    """A catalog that another program might have written."""
    (catalog / MANIFEST).unlink()
    path = catalog / "hats.properties"
    path.write_text(path.read_text().replace("hats_builder=sos-dask", "hats_builder=other"))
    return catalog


@pytest.fixture
def store(small_store, tmp_path) -> Path:
    """Copy of the small store, with its job beside it."""
    shutil.copy(small_store.parent / "job.toml", tmp_path / "job.toml")
    return Path(shutil.copytree(small_store, tmp_path / "store", symlinks=True))


def edit(path: Path, change) -> None:
    """Change a sealed document and seal it again, as somebody who knows how would."""
    path.write_text(sealed_json(change(json.loads(path.read_text()))))


def flip(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def test_a_lost_line_of_partition_info_is_refused(cli, tmp_path):
    rows = [f"{i},{i * 30},5,5000,2.5,-0.1" for i in range(12)]
    (tmp_path / "sky.csv").write_text("\n".join(["obs_id,ra,dec,teff,logg,feh", *rows]))
    (tmp_path / "basic.toml").write_text(SURVEY)
    assert cli("ingest", "basic.toml", "sky.csv", "-o", "obs", "--rows-per-partition", 2).code == 0
    info = tmp_path / "obs/partition_info.csv"
    whole = info.read_text()
    info.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert_error(cli("dedupe", "obs", "-o", "stars"), 5, r"partition_info.csv has \d+ bytes")
    assert_nothing_final(tmp_path / "stars")
    assert cli("verify", "obs").code == 5
    info.write_text(whole)
    assert cli("dedupe", "obs", "-o", "stars").code == 0
    assert Manifest.load(tmp_path / "stars").rows.n_in == 12


def test_the_account_is_compared_with_the_rows(catalog, cli):
    def more(raw):
        raw["rows"] |= {"in": 400, "out": 400}
        return raw

    edit(catalog / MANIFEST, more)
    ran = cli("verify", catalog)
    assert ran.code == 5 and "states 400 rows out, its partitions have 300" in ran.out
    with pytest.raises(CatalogError, match="states 400 rows out"):
        Catalog.open(catalog)


def test_rows_in_are_compared_with_the_input_in_the_store(store):
    manifest = (store / "current/lamost.stars/manifest.json").resolve()

    def fewer(raw):
        raw["rows"]["in"] -= 1
        raw["rows"]["dropped"]["merged"] -= 1
        return raw

    assert verify(manifest.parent) == []
    edit(manifest, fewer)
    assert any("observations have" in problem for problem in verify(manifest.parent))


HUGE = 10**30
DOCUMENTS = {
    "a list": lambda raw: [],
    "a text": lambda raw: "text",
    "huge": lambda raw: {**raw, "rows": {**raw["rows"], "in": HUGE, "out": HUGE}},
    "numbers as text": lambda raw: {**raw, "rows": {**raw["rows"], "in": "300"}},
    "truth": lambda raw: {**raw, "rows": {**raw["rows"], "rejected": False}},
    "format": lambda raw: {**raw, "format": "2"},
    "files": lambda raw: {**raw, "files": []},
    "summary": lambda raw: {**raw, "summary": None},
    "stage": lambda raw: {**raw, "stage": 5},
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_manifest_of_wrong_types_is_refused(catalog, cli, name):
    path = catalog / MANIFEST
    document = DOCUMENTS[name](json.loads(path.read_text()))
    path.write_text(sealed_json(document) if isinstance(document, dict) else json.dumps(document))
    for command in (("verify", catalog), ("dedupe", catalog, "-o", "out")):
        assert_error(cli(*command), 5, r"manifest\.json")


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', "[" * 100_000, '{"a": ' * 5000, "\0", '{"a": "\\ud800"}']
)
def test_a_manifest_that_is_no_sound_json_is_refused(catalog, cli, text):
    (catalog / MANIFEST).write_text(text)
    assert_error(cli("verify", catalog), 5, r"manifest\.json")


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "dataset/../../x", "", "a\0b"])
def test_paths_of_a_manifest_stay_inside(catalog, cli, monkeypatch, name):
    def add(raw):
        raw["files"][name] = {"rows": 0, "bytes": 1, "sha256": "0" * 64}
        return raw

    edit(catalog / MANIFEST, add)
    assert_error(cli("verify", catalog), 5, "is not inside the output")


def test_a_link_out_of_an_output_is_named_and_not_followed(catalog, tmp_path):
    (tmp_path / "elsewhere").write_text("text")
    (catalog / "partition_info.csv").unlink()
    (catalog / "partition_info.csv").symlink_to(tmp_path / "elsewhere")
    assert "partition_info.csv is a link out of the output" in verify(catalog)


@pytest.mark.parametrize(
    "text",
    ["Norder,Npix\n", "Norder,Npix\n0,-1\n", "Norder,Npix\n40,1\n", "Norder,Npix\n0,\0\n",
     "Norder,Npix\n0\n", "", "Norder,Npix\n0,1.5\n", "\xff"],
)  # fmt: skip
def test_a_wrong_list_of_partitions_is_refused(foreign, cli, text):
    (foreign / "partition_info.csv").write_text(text, encoding="latin-1")
    assert_error(cli("dedupe", foreign, "-o", "out"), 5, r"partition_info\.csv")


@pytest.mark.parametrize("target", ["", ".", "..", "/", "cat/..", "gone", "a\0b", "inner"])
def test_a_collection_that_names_no_catalog_below_is_refused(tmp_path, cli, target):
    for folder in (tmp_path / "coll", tmp_path / "coll/inner"):
        folder.mkdir()
        (folder / "collection.properties").write_text(f"hats_primary_table_url={target}\n")
    assert_error(cli("dedupe", "coll", "-o", "out"), 5, r"collection\.properties")
    assert_error(cli("verify", "coll"), 5, r"collection\.properties")


def test_a_damaged_margin_is_seen_whatever_the_collection_says(catalog, tmp_path):
    margin(Catalog.open(catalog), tmp_path / "coll", MarginSettings(radius_arcsec=3000.0))
    assert verify(tmp_path / "coll") == []
    path = tmp_path / "coll/collection.properties"
    text = path.read_text()
    path.write_text(text.replace("all_margins", "Xll_margins"))
    assert any("collection.properties was changed" in one for one in verify(tmp_path / "coll"))
    path.write_text(text)
    (tmp_path / "coll/margin" / MANIFEST).unlink()
    with pytest.raises(CatalogError, match=r"has no manifest\.json"):
        verify(tmp_path / "coll")


@pytest.mark.parametrize("n_rows", ["299", "x", "9" * 5000])
def test_a_foreign_catalog_with_other_rows_than_stated_is_refused(foreign, cli, n_rows):
    assert Catalog.open(foreign).n_rows == 300
    path = foreign / "hats.properties"
    path.write_text(path.read_text().replace("hats_nrows=300", f"hats_nrows={n_rows}"))
    assert_error(cli("dedupe", foreign, "-o", "out"), 5, "hats_nrows=", "have 300 rows")


def test_a_catalog_without_its_manifest_is_not_taken_for_one_of_others(catalog, cli):
    (catalog / MANIFEST).unlink()
    assert_error(cli("verify", catalog), 5, r"has no manifest\.json")
    assert_error(cli("dedupe", catalog, "-o", "out"), 5, r"has no manifest\.json")


def test_a_partition_swapped_for_another_of_its_bytes_is_refused(catalog, tmp_path):
    """The footer is not the one that was written, though pages have their checksums."""
    opened = Catalog.open(catalog)
    path = opened.partition_file(opened.pixels[0])
    stated = opened.stated[str(path.relative_to(catalog))]
    table = opened.read(opened.pixels[0])
    feh = pa.array(np.zeros(table.num_rows), table.schema.field("feh").type)
    table = table.set_column(table.schema.get_field_index("feh"), table.schema.field("feh"), feh)
    pq.write_table(table, path)

    def same_bytes(raw):
        raw["files"][stated.path]["bytes"] = path.stat().st_size
        return raw

    edit(catalog / MANIFEST, same_bytes)
    with pytest.raises(PartitionError, match="its footer is not the one that was written"):
        dedupe(Catalog.open(catalog), tmp_path / "stars", DedupeSettings())


def test_an_input_that_changes_while_it_is_read_is_an_error(catalog, tmp_path):
    recipe = Recipe("test", 1, {}, {})
    output = Output.prepare(tmp_path / "out", recipe, inputs=[catalog])
    manifest = Manifest.load(catalog)
    Output(catalog, replace(manifest.recipe, version=2)).commit(manifest.rows, manifest.files)
    with pytest.raises(CatalogError, match="was changed while"):
        output.commit(Rows(0, 0), ())
    assert not output.directory.exists()


PRODUCTS = {
    "lamost.stars": "dataset/Norder=*/Dir=*/*.parquet",
    "reference": "dataset/Norder=*/Dir=*/*.parquet",
    "lamost.pairs": "dataset/Norder=*/Dir=*/*.parquet",
    "lamost.model.polynomial": "held_out.parquet",
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_flipped_bit_is_not_published(store, cli, product):
    before = (store / "current").readlink()
    file = sorted((store / "current" / product).resolve().glob(PRODUCTS[product]))[-1]
    flip(file, 40)
    # Nothing is made again, or what does not read the damage.
    for gone in (None, "lamost.corrected"):
        if gone:
            shutil.rmtree((store / "current" / gone).resolve())
        ran = cli("rebuild", "job.toml")
        assert_error(ran, 5, file.name, "SHA-256|cannot be read")
        assert (store / "current").readlink() == before
    assert len(list((store / "builds").iterdir())) == 1


def test_publishing_by_size_alone_sees_sizes(store, cli, tmp_path):
    job = tmp_path / "job.toml"
    job.write_text(job.read_text() + '[publish]\ncheck = "size"\n')
    file = sorted((store / "current/lamost.pairs").resolve().glob("dataset/Norder=*/Dir=*/*"))[0]
    flip(file, 40)
    assert cli("rebuild", "job.toml").code == 0
    file.write_bytes(file.read_bytes() + b"\0")
    assert_error(cli("rebuild", "job.toml"), 5, "product 'lamost.pairs' is not published", "bytes")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', "null", "\0", "[" * 100_000])
def test_damaged_files_of_a_store_are_named_or_made_again(store, cli, text, caplog):
    whole = contents(store / "artifacts")
    for name in ("digests.json", "costs.json"):
        (store / name).write_text(text)
        assert file_names(store) == {} if name == "digests.json" else costs(store) == {}
        assert name in caplog.text
    assert cli("rebuild", "job.toml", "--dry-run").out.strip().startswith("Plan")
    (store / "current/build.json").write_text(text)
    for command in ("status", "gc", "coverage"):
        assert_error(cli(command, "--store", "store"), 5, "is not a build")
    assert_error(cli("verify", "store"), 5, "is not a build")
    assert cli("rebuild", "job.toml").code == 0
    assert status(store).missing == ()
    assert contents(store / "artifacts") == whole


@pytest.mark.parametrize("target", [None, "/etc", "../../artifacts"])
def test_a_link_of_a_build_to_elsewhere_is_refused_and_mended(store, cli, target):
    pairs, link = (store / "current/lamost.pairs").resolve(), store / "current/lamost.pairs"
    link.unlink()
    if target:
        link.symlink_to(target)
    for command in (("status", "--store"), ("gc", "--store"), ("verify",)):
        assert_error(cli(*command, store), 5, "pairs is not the link to artifact")
    assert pairs.is_dir(), "nothing is removed"
    assert cli("rebuild", "job.toml").code == 0
    assert (store / "current/lamost.pairs").resolve() == pairs


def test_a_damaged_piece_of_an_unfinished_run_is_made_again(tmp_path):
    output = Output.prepare(tmp_path / "out", Recipe("test", 1, {}, {}))
    record = output.write_file("a.txt", lambda path: path.write_text("hello, world"))
    output.put_record("part", "1", {"file": record.__dict__})
    assert output.intact("part", "1") and not output.intact("part", "2")
    written = output.work / "part/1.json"
    text = written.read_text()
    for path in (written, output.directory / "a.txt"):
        content = path.read_bytes()
        for damaged in (
            content[:-1],
            content + content,
            b"",
            bytes([content[0] ^ 1]) + content[1:],
        ):
            path.write_bytes(damaged)
            assert not output.intact("part", "1")
        path.write_bytes(content)
    assert output.intact("part", "1")
    written.write_text(text.replace("a.txt", "b.txt"))
    assert output.get_record("part", "1") is None
