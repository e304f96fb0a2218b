"""HATS catalogs of other programs are inputs, and they read ours to the last digit."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import Table

from sos_dask.api import attach, crossmatch, margin
from sos_dask.cli import main
from sos_dask.errors import CatalogError, PartitionError, SosError
from sos_dask.sky.healpix import ang2pix, plan_partitions
from sos_dask.stages.attach import AttachSettings, MarginSettings
from sos_dask.stages.crossmatch import CrossmatchSettings
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.store import verify
from tests.sky import observations, write_catalog

SETTINGS = CrossmatchSettings(radius_arcsec=1.0, use_gaia_id=False)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process: its exit code, and all that it wrote."""

    def command(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["sos-dask", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), " ".join((said.out + said.err).split())

    return command


def stars(n: int = 500, seed: int = 2) -> pa.Table:
    """Stars without cells, at the hard places of the sky, in no order."""
    table = observations(n, seed).drop_columns(["_healpix_29", "quality"])
    table = table.rename_columns(["star_id", *table.schema.names[1:]])
    return table.take(pa.array(np.random.default_rng(seed).permutation(n)))


def of_others(
    folder: Path,
    table: pa.Table,
    *,
    cells: str | None = "_healpix_29",
    order: int = 29,
    suffix: str = ".parquet",
    files: int = 1,
    in_order: bool = False,
    rows_per_partition: int = 200,
    split_by: tuple | None = None,
    path: str = "dataset/Norder={0}/Dir={1}/Npix={2}",
    **properties: str,
) -> Path:
    """Write a table, which has ra and dec, as other programs do."""
    ra, dec = split_by or (table["ra"].to_numpy(), table["dec"].to_numpy())
    place = ang2pix(ra % 360, dec)
    if in_order:
        rows = pa.array(np.lexsort((table["star_id"].to_numpy(), place)))
        table, place = table.take(rows), place[rows.to_numpy()]
    if cells:
        table = table.add_column(0, cells, pa.array(place >> 2 * (29 - order)))
    names = {properties.get(f"hats_col_{name}", name): name for name in ("ra", "dec")}
    back = {here: name for name, here in names.items()}
    table = table.rename_columns([back.get(name, name) for name in table.schema.names])
    histogram = np.bincount(place >> 2 * 21, minlength=12 * 4**8).astype(np.int64)
    pixels = plan_partitions(histogram, 8, rows_per_partition)
    lines = ["Norder,Npix,num_rows"]
    for pixel in pixels:
        part = table.filter(pa.array((place >= pixel.first) & (place < pixel.stop)))
        lines.append(f"{pixel.order},{pixel.pixel},{part.num_rows}")
        base = folder / path.format(pixel.order, pixel.pixel // 10000 * 10000, pixel.pixel)
        base.parent.mkdir(parents=True, exist_ok=True)
        if suffix == "/":
            base.mkdir()
            step = -(-part.num_rows // files)
            for number in range(files):
                pq.write_table(part.slice(number * step, step), base / f"part{number}.parquet")
        else:
            pq.write_table(part, base.with_name(base.name + suffix), row_group_size=30)
    (folder / "partition_info.csv").write_text("\n".join(lines) + "\n")
    about = {
        "obs_collection": folder.name,
        "dataproduct_type": "object",
        "hats_nrows": str(table.num_rows),
        "hats_col_ra": "ra",
        "hats_col_dec": "dec",
        "hats_col_healpix": cells or "_healpix_29",
        "hats_col_healpix_order": str(order),
        "hats_npix_suffix": suffix,
        **properties,
    }
    write_properties(folder, about)
    (folder / "dataset").mkdir(exist_ok=True)
    pq.write_metadata(table.schema, folder / "dataset/_common_metadata")
    return folder


def write_properties(folder: Path, about: dict[str, str]) -> None:
    text = "".join(f"{key}={value}\n" for key, value in about.items())
    (folder / "hats.properties").write_text("#HATS catalog\n" + text)


def each_file(folder: Path, change) -> Path:
    for file in sorted((folder / "dataset").rglob("Npix=*.parquet")):
        pq.write_table(change(pq.ParquetFile(file).read()), file)
    (folder / "dataset/_common_metadata").unlink()
    return folder


def retyped(name: str, kind: pa.DataType):
    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        return table.set_column(at, name, table[name].cast(kind))

    return change


def pandas_indexed(table: pa.Table) -> pa.Table:
    return pa.Table.from_pandas(table.to_pandas().set_index("_healpix_29"))


def without(name: str):
    def change(folder: Path) -> Path:
        (folder / name).unlink()
        return folder

    return change


def as_of_2024(folder: Path) -> Path:
    (folder / "hats.properties").rename(folder / "properties")
    return folder


def in_collection(folder: Path) -> Path:
    whole = folder.with_name("collection")
    whole.mkdir()
    shutil.move(folder, whole / "primary")
    (whole / "collection.properties").write_text("hats_primary_table_url=primary\n")
    return whole


def turned(table: pa.Table) -> pa.Table:
    """Right ascension from -180 to 180."""
    ra = table["ra"].to_numpy()
    return table.set_column(1, "ra", pa.array(np.where(ra > 180, ra - 360, ra)))


def with_other_cells(part: pa.Table) -> pa.Table:
    return part.set_column(0, "_healpix_29", pa.array(part["_healpix_29"].to_numpy() + 10**6))


def nothing(value):
    return value


# How it is written, and what is done to the table before and to the folder after.
OTHERS: dict[str, tuple[dict, Callable, Callable]] = {
    "unsorted": ({}, nothing, nothing),
    "sorted": ({"in_order": True}, nothing, nothing),
    "cells of other places": (
        {"in_order": True},
        nothing,
        lambda f: each_file(f, with_other_cells),
    ),
    "named": ({"hats_col_ra": "RA_ICRS", "hats_col_dec": "DE_ICRS"}, nothing, nothing),
    "unkeyed": ({"cells": None}, nothing, nothing),
    "order 13": ({"cells": "healpix13", "order": 13}, nothing, nothing),
    "_healpix_29 of order 13": ({"order": 13}, nothing, nothing),
    "uint64": ({}, nothing, lambda f: each_file(f, retyped("_healpix_29", pa.uint64()))),
    "index of pandas": ({}, nothing, lambda f: each_file(f, pandas_indexed)),
    "folders": ({"suffix": "/", "files": 3}, nothing, nothing),
    "parq": ({"suffix": ".parq"}, nothing, nothing),
    "one partition a pixel of order 0": ({"rows_per_partition": 10**6}, nothing, nothing),
    "tree": ({"path": "parquet/{0}_{2}"}, nothing, nothing),
    "no partition_info": ({}, nothing, without("partition_info.csv")),
    "no partition_info, folders": ({"suffix": "/"}, nothing, without("partition_info.csv")),
    "no partition_info, pq": ({"suffix": ".pq"}, nothing, without("partition_info.csv")),
    "no _common_metadata": ({}, nothing, without("dataset/_common_metadata")),
    "ra -180 to 180": ({}, turned, nothing),
    "text of pandas": ({}, nothing, lambda f: each_file(f, retyped("name", pa.large_string()))),
    "categories": (
        {},
        nothing,
        lambda f: each_file(f, retyped("name", pa.dictionary(pa.int32(), pa.string()))),
    ),
    "int32 keys": ({}, nothing, lambda f: each_file(f, retyped("star_id", pa.int32()))),
    "properties of 2024": ({}, nothing, as_of_2024),
    "collection": ({}, nothing, in_collection),
}


def pairs_of(left: Catalog, right: Catalog, folder: Path) -> pa.Table:
    crossmatch(left, right, folder, SETTINGS)
    found = Catalog.open(folder)
    table = pa.concat_tables([found.read(pixel) for pixel in found.pixels])
    names = ["target_obs_id", "reference_star_id", "separation_arcsec", "n_candidates", "teff_ref"]
    return table.select(names).sort_by([("target_obs_id", "ascending")])


def rows_of(catalog: Catalog) -> pa.Table:
    return pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])


def named_stars() -> pa.Table:
    table = stars()
    names = [f"star {key % 7}" for key in table["star_id"].to_pylist()]
    return table.append_column("name", pa.array(names))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Targets, and what a catalog of our own gives them: pairs, attached values, rows."""
    folder = tmp_path_factory.mktemp("ours")
    left = write_catalog(observations(500, 1), folder / "left", 250)
    table = named_stars()
    cells = pa.array(ang2pix(table["ra"].to_numpy(), table["dec"].to_numpy()))
    table = table.add_column(0, "_healpix_29", cells)
    table = table.sort_by([("_healpix_29", "ascending"), ("star_id", "ascending")])
    right = write_catalog(table, folder / "right", 400)
    attach(
        left,
        right,
        folder / "attached",
        AttachSettings(columns={"t": "teff", "n": "name"}, by="position"),
    )
    pairs = pairs_of(left, right, folder / "pairs")
    assert len(pairs) > 300
    return left, pairs, rows_of(Catalog.open(folder / "attached")), rows_of(right)


@pytest.mark.parametrize("case", OTHERS)
def test_a_catalog_of_others_gives_the_pairs_of_our_own(tmp_path, expected, case):
    left, pairs, attached, rows = expected
    how, before, after = OTHERS[case]
    written = of_others(tmp_path / "other", before(named_stars()), **how)
    foreign = Catalog.open(after(written))
    assert pairs_of(left, foreign, tmp_path / "pairs").equals(pairs)
    if case in ("unsorted", "named", "unkeyed", "folders", "categories"):
        settings = AttachSettings(columns={"t": "teff", "n": "name"}, by="position")
        attach(left, foreign, tmp_path / "attached", settings)
        assert rows_of(Catalog.open(tmp_path / "attached")).equals(attached)
    read = rows_of(foreign).select(["_healpix_29", "star_id", "ra", "dec", "name"])
    wanted = rows.select(read.schema.names)
    if case == "ra -180 to 180":  # 360 is lost in rounding
        assert np.abs(read["ra"].to_numpy() - wanted["ra"].to_numpy()).max() < 1e-13
        read, wanted = (one.select(["star_id", "dec", "name"]) for one in (read, wanted))
    assert read.cast(wanted.schema).equals(wanted)
    assert verify(foreign.path) == []
    assert foreign.as_written == (case == "sorted")


@pytest.mark.parametrize("in_order", [False, True])
def test_a_task_opens_it_as_its_driver_did(tmp_path, in_order):
    of_others(tmp_path / "other", stars(), in_order=in_order)
    foreign = Catalog.open(tmp_path / "other", key="star_id")
    assert not pickle.loads(pickle.dumps(foreign)).as_written
    fingerprint = foreign.fingerprint
    again = pickle.loads(pickle.dumps(foreign))
    assert again.as_written == in_order
    assert again.fingerprint == fingerprint
    assert rows_of(again).equals(rows_of(foreign))


def test_rows_at_one_place_are_in_the_order_of_their_keys(tmp_path):
    key = np.random.default_rng(1).permutation(200)
    table = pa.table({"id": [f"s{k:03}" for k in key], "ra": [10.0] * 200, "dec": [5.0] * 200})
    foreign = Catalog.open(of_others(tmp_path / "other", table), key="id")
    [pixel] = foreign.pixels
    keys = foreign.read(pixel, ["star_id"])["star_id"]
    assert keys.to_pylist() == sorted(table["id"].to_pylist())
    some = np.arange(3, 150, 7)
    taken = foreign.take(pixel, some, ["dec", "_healpix_29", "star_id"])
    assert taken.equals(foreign.read(pixel, taken.schema.names).take(pa.array(some)))
    assert foreign.take(pixel, some, ["_healpix_29"]).num_rows == len(some)


def test_another_column_that_is_named_ra_is_kept(tmp_path):
    table = stars().append_column("right", pa.array(np.arange(500)))
    written = of_others(tmp_path / "other", table, hats_col_ra="RA_ICRS")
    names = ["ra" if name == "right" else name for name in table.schema.names]

    def renamed(part: pa.Table) -> pa.Table:
        return part.rename_columns(
            ["ra" if name == "right" else name for name in part.schema.names]
        )

    assert "ra" in names
    foreign = Catalog.open(each_file(written, renamed))
    read = rows_of(foreign).sort_by("ra_other")
    assert read["ra"].equals(table["ra"]) and read["star_id"].equals(table["star_id"])


def test_positions_in_single_precision_are_matched_as_they_stand(tmp_path, expected):
    """Rounding carries rows over the edges of the partitions they were put into."""
    left = expected[0]
    table = stars(6000, 5)
    split_by = table["ra"].to_numpy(), table["dec"].to_numpy()
    for name in ("ra", "dec"):
        table = retyped(name, pa.float32())(table)
    written = of_others(tmp_path / "other", table, split_by=split_by, rows_per_partition=100)
    foreign = Catalog.open(written)
    n_moved = 0
    for pixel in foreign.pixels:
        rows = foreign.read(pixel)
        assert rows.schema.field("ra").type == pa.float64()
        true = ang2pix(rows["ra"].to_numpy(), rows["dec"].to_numpy())
        n_moved += int(np.count_nonzero((true < pixel.first) | (true >= pixel.stop)))
        assert (rows["_healpix_29"].to_numpy() >= pixel.first).all()
        assert (rows["_healpix_29"].to_numpy() < pixel.stop).all()
    assert n_moved > 0
    cells = pa.array(ang2pix(*(table[n].cast(pa.float64()).to_numpy() for n in ("ra", "dec"))))
    wide = retyped("dec", pa.float64())(retyped("ra", pa.float64())(table))
    own = wide.add_column(0, "_healpix_29", cells).sort_by(
        [("_healpix_29", "ascending"), ("star_id", "ascending")]
    )
    pairs = pairs_of(left, write_catalog(own, tmp_path / "own", 100), tmp_path / "a")
    assert pairs_of(left, foreign, tmp_path / "b").equals(pairs)


# -- keys -----------------------------------------------------------------------------------------


def with_key(name: str, values=None) -> pa.Table:
    table = stars()
    table = table.rename_columns([name, *table.schema.names[1:]])
    return table if values is None else table.set_column(0, name, values)


def test_a_key_can_be_named(tmp_path, run, expected):
    left, pairs, _, _ = expected
    of_others(tmp_path / "other", with_key("id"))
    code, said = run("crossmatch", left.path, tmp_path / "other", "-o", tmp_path / "no")
    assert code == 5 and "neither star_id nor obs_id" in said and "--key id" in said
    code, said = run(
        "crossmatch", left.path, tmp_path / "other", "-o", tmp_path / "pairs",
        "--key", "id", "--no-gaia-id",
    )  # fmt: skip
    assert code == 0, said
    found = rows_of(Catalog.open(tmp_path / "pairs"))
    assert set(zip(*found.select([1, 2]).to_pydict().values(), strict=True)) == set(
        zip(*pairs.select([0, 1]).to_pydict().values(), strict=True)
    )
    code, said = run(
        "attach", tmp_path / "other", left.path, "-c", "t=teff", "--by", "position",
        "--key", "id", "-o", tmp_path / "attached",
    )  # fmt: skip
    assert code == 0, said
    attached = rows_of(Catalog.open(tmp_path / "attached"))
    assert set(attached["star_id"].to_pylist()) == set(with_key("id")["id"].to_pylist())
    code, said = run(
        "crossmatch", left.path, tmp_path / "other", "--key", "idd", "-o", tmp_path / "no"
    )
    assert code == 3 and "--key idd" in said and "Did you mean id" in said
    with pytest.raises(CatalogError, match="not 'teff'"):
        Catalog.open(left.path, key="teff")


def test_text_is_a_key_too(tmp_path, expected):
    left, pairs, _, _ = expected
    names = [f"s{key}" for key in stars()["star_id"].to_pylist()]
    foreign = of_others(tmp_path / "other", with_key("name", pa.array(names)))
    found = pairs_of(left, Catalog.open(foreign, key="name"), tmp_path / "pairs")
    ids = [f"s{key}" for key in pairs["reference_star_id"].to_pylist()]
    assert found["reference_star_id"].to_pylist() == ids


KEYS_REFUSED = {
    "twice": ([7, 7, *range(100, 598)], "'id' has the value 7 in more than one row"),
    "text twice": (["b", *map(str, range(498)), "b"], "the value 'b' in more than one row"),
    "null": ([None, *range(499)], "the key 'id' is null"),
    "float": (np.arange(500.0), "'id' has type double"),
    "too large": (np.arange(500, dtype=np.uint64) + np.uint64(1 << 63), "'id' does not fit"),
}


@pytest.mark.parametrize("case", KEYS_REFUSED)
def test_a_key_that_names_no_single_row_is_refused(tmp_path, run, expected, case):
    values, says = KEYS_REFUSED[case]
    of_others(tmp_path / "other", with_key("id", pa.array(values)))
    code, said = run(
        "crossmatch", expected[0].path, tmp_path / "other", "--key", "id", "-o", tmp_path / "pairs"
    )
    assert code == 5 and says in said and "unexpected" not in said


# -- what is no catalog of stars, or damaged ------------------------------------------------------

COMMANDS = (
    "crossmatch {bad} {good} -o {out}",
    "crossmatch {good} {bad} -o {out}",
    "attach {bad} {good} -c t=teff --by position -o {out}",
    "attach {good} {bad} -c t=teff --by position -o {out}",
    "dedupe {bad} -o {out}",
    "reference a={bad} b={good} -o {out}",
    "apply {good} {bad} -o {out}",
    "train {bad} -m polynomial -o {out}",
    "coverage {good} {good} {bad} {good} -o {out}",
    "coverage {good} {good} {good} {bad} -o {out}",
)


@pytest.mark.parametrize("kind", ["margin", "association", "index", "map"])
def test_another_product_of_hats_is_refused_by_every_command(tmp_path, run, expected, kind):
    good = expected[0].path
    bad = of_others(
        tmp_path / "bad", stars(), dataproduct_type=kind, hats_primary_table_url="the_stars"
    )
    if kind != "margin":  # the others have no positions
        each_file(bad, lambda part: part.select(["star_id"]))
    for text in COMMANDS:
        words = text.format(bad=bad, good=good, out=tmp_path / "out").split()
        code, said = run(*words)
        assert code == 5, (text, said)
        assert f"dataproduct_type is {kind}" in said and "the_stars" in said
        assert not (tmp_path / "out").exists()


def test_a_margin_is_made_only_where_it_has_the_columns_of_its_catalog(tmp_path):
    table = stars()
    margin(
        Catalog.open(of_others(tmp_path / "good", table)),
        tmp_path / "margin",
        MarginSettings(radius_arcsec=60.0),
    )
    assert verify(tmp_path / "margin/margin") == []
    named = of_others(tmp_path / "named", table, hats_col_ra="RA_ICRS")
    with pytest.raises(CatalogError, match="other names or types"):
        margin(Catalog.open(named), tmp_path / "no", MarginSettings(radius_arcsec=60.0))
    assert not (tmp_path / "no").exists()


def test_observations_of_others_are_deduped_like_our_own(tmp_path, run):
    own = write_catalog(observations(300, 1), tmp_path / "own", 200)
    table = rows_of(own).drop_columns("_healpix_29")
    table = table.rename_columns(["star_id", *table.schema.names[1:]])  # as of_others sorts by it
    written = of_others(tmp_path / "other", table.take(pa.array(np.arange(300)[::-1])))
    each_file(written, lambda p: p.rename_columns(["_healpix_29", "name", *p.schema.names[2:]]))
    for path, more in ((own.path, []), (written, ["--key", "name"])):
        code, said = run("dedupe", path, "-o", tmp_path / f"{path.name}.stars", *more)
        assert code == 0, said
    stars_of = [rows_of(Catalog.open(tmp_path / f"{name}.stars")) for name in ("own", "other")]
    assert stars_of[1].cast(stars_of[0].schema).equals(stars_of[0])


def test_our_own_margin_is_refused_and_its_collection_is_the_catalog(tmp_path, expected):
    left = expected[0]
    margin(left, tmp_path / "c", MarginSettings(radius_arcsec=60.0))
    with pytest.raises(CatalogError, match="dataproduct_type is margin"):
        Catalog.open(tmp_path / "c/margin")
    assert verify(tmp_path / "c/margin") == []
    assert Catalog.open(tmp_path / "c").fingerprint == left.fingerprint


def _null(part: pa.Table) -> pa.Table:
    ra = part["ra"].to_pylist()
    return part.set_column(part.schema.get_field_index("ra"), "ra", pa.array([None, *ra[1:]]))


def _far(part: pa.Table) -> pa.Table:
    dec = -part["dec"].to_numpy()
    return part.set_column(part.schema.get_field_index("dec"), "dec", pa.array(dec))


def test_verify_reads_margins_of_others_whose_rows_lie_around(tmp_path):
    folder = of_others(tmp_path / "m", stars(), dataproduct_type="margin")
    assert verify(each_file(folder, _far)) == []


def _lost_line(folder: Path) -> Path:
    file = folder / "partition_info.csv"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]))
    return folder


def _lost_file(folder: Path) -> Path:
    next(folder.rglob("Npix=*.parquet")).unlink()
    return folder


def _fewer_rows(folder: Path) -> Path:
    file = next(folder.rglob("Npix=*.parquet"))
    pq.write_table(pq.ParquetFile(file).read().slice(1), file)
    return folder


def _changed(old: str, new: str):
    def change(folder: Path) -> Path:
        file = folder / "hats.properties"
        file.write_text(file.read_text().replace(old, new))
        return folder

    return change


DAMAGES = {
    "null position": (lambda f: each_file(f, _null), 6, "row 0: ra=None"),
    "declination 91": (
        lambda f: each_file(f, lambda p: p.set_column(3, "dec", pa.array(np.full(len(p), 91.0)))),
        6,
        "dec=91.0 is not a position",
    ),
    "rows of other pixels": (lambda f: each_file(f, _far), 6, "outside HEALPix pixel"),
    "a line lost": (_lost_line, 5, "does not list dataset/"),
    "a file lost": (_lost_file, 6, "is missing"),
    "a row lost": (_fewer_rows, 5, "rows"),
    "hats_nrows": (_changed("hats_nrows=500", "hats_nrows=499"), 5, "hats_nrows=499"),
    "suffix": (_changed("suffix=.parquet", "suffix=../../x"), 5, "hats_npix_suffix"),
    "ra": (_changed("col_ra=ra", "col_ra=raa"), 5, "names 'raa' as ra"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_does_not_fit_together_is_refused(tmp_path, run, expected, case):
    damage, exit_code, says = DAMAGES[case]
    bad = damage(of_others(tmp_path / "bad", stars()))
    for order in ([expected[0].path, bad], [bad, expected[0].path]):
        code, said = run("crossmatch", *order, "-o", tmp_path / "out")
        assert code == exit_code and says in said, said
        assert not (tmp_path / "out").exists()


def test_verify_names_null_keys(tmp_path):
    folder = of_others(tmp_path / "bad", stars())
    each_file(folder, lambda p: p.set_column(1, "star_id", pa.nulls(len(p), pa.int64())))
    assert any("rows have no star_id" in problem for problem in verify(folder))


def test_hats_nrows_counts_all_files_of_folders(tmp_path):
    folder = of_others(tmp_path / "bad", stars(), suffix="/", files=3)
    next(folder.rglob("part1.parquet")).unlink()
    with pytest.raises(SosError, match="rows"):
        Catalog.open(folder)


def test_overlapping_partitions_are_refused(tmp_path):
    folder = of_others(tmp_path / "bad", stars(), rows_per_partition=10**6)
    info = folder / "partition_info.csv"
    order, pixel, _ = info.read_text().splitlines()[1].split(",")
    inner = folder / f"dataset/Norder={int(order) + 1}/Dir=0/Npix={int(pixel) * 4}.parquet"
    inner.parent.mkdir(parents=True)
    shutil.copy(next(folder.rglob(f"Npix={pixel}.parquet")), inner)
    info.write_text(info.read_text() + f"{int(order) + 1},{int(pixel) * 4},\n")
    with pytest.raises(CatalogError, match="overlap"):
        Catalog.open(folder)


def test_a_partition_of_which_a_column_is_missing_is_named(tmp_path):
    folder = of_others(tmp_path / "bad", stars())
    file = next(folder.rglob("Npix=*.parquet"))
    pq.write_table(pq.ParquetFile(file).read().drop_columns("teff"), file)
    foreign = Catalog.open(folder)
    with pytest.raises(PartitionError, match="no column 'teff'"):
        rows_of(foreign)


# -- what others read of ours ---------------------------------------------------------------------

IDS = 4_611_686_018_427_387_905 + 2 * np.arange(12)


@pytest.fixture
def product(tmp_path, run):
    """Observations with Gaia ids of which some are null, some rows rejected."""
    (tmp_path / "s.toml").write_text(
        'format = 1\nname = "s"\ntitle = "S"\nposition_epoch = 2016.0\n[columns]\n'
        + "".join(f'{n} = {{ source = "{n}" }}\n' for n in ("obs_id", "ra", "dec", "teff", "logg"))
        + 'feh = { source = "feh" }\ngaia_dr3_source_id = { source = "gaia" }\n'
    )
    lines = ["obs_id,ra,dec,teff,logg,feh,gaia"]
    for number, key in enumerate(IDS):
        ra = "" if number == 11 else 10 * number
        lines.append(f"{key},{ra},5,5000,2.5,-0.1,{key if number % 3 else ''}")
    (tmp_path / "s.csv").write_text("\n".join(lines) + "\n")
    code, said = run("ingest", tmp_path / "s.toml", tmp_path / "s.csv", "-o", tmp_path / "obs")
    assert code == 0, said
    return tmp_path / "obs"


def test_ids_of_products_stay_integers_in_pandas_and_astropy(product):
    kept = [int(key) for number, key in enumerate(IDS) if number % 3 and number != 11]
    file = next(product.rglob("Npix=*.parquet"))
    assert pd.read_parquet(file)["gaia_dr3_source_id"].dtype == "Int64"
    frame = pd.read_parquet(product / "dataset")
    assert frame["gaia_dr3_source_id"].dtype == "Int64"
    assert sorted(frame["gaia_dr3_source_id"].dropna()) == kept
    assert frame["obs_id"].dtype == "int64" and frame["teff"].dtype == "float32"
    column = Table.from_pandas(frame)["gaia_dr3_source_id"]
    assert column.dtype == np.int64 and column.mask.sum() == 4
    assert sorted(column.compressed().tolist()) == kept


def test_every_parquet_file_of_a_product_says_its_types(product):
    files = [*product.rglob("*.parquet"), *product.rglob("_common_metadata")]
    assert {file.name for file in files} >= {"rejected.parquet", "_common_metadata"}
    for file in files:
        schema = pq.read_schema(file)
        about = json.loads(schema.metadata[b"pandas"])
        assert [column["name"] for column in about["columns"]] == schema.names
        for column, item in zip(about["columns"], schema, strict=True):
            if pa.types.is_integer(item.type):
                expected = str(item.type)
                assert column["numpy_type"] == (
                    expected.capitalize() if item.nullable else expected
                )


@pytest.mark.parametrize("kind", [pa.float64(), pa.int64(), pa.string()])
def test_ids_that_lost_digits_match_nothing_in_silence(tmp_path, kind):
    table = observations(50, 1)
    ids = pa.array(np.arange(50) * 3 + (1 << 61) + 1)
    left = write_catalog(table.append_column("gaia_dr3_source_id", ids), tmp_path / "left", 250)
    others = table.drop_columns(["_healpix_29", "quality"])
    others = others.rename_columns(["star_id", *others.schema.names[1:]])
    others = others.append_column("gaia_dr3_source_id", ids.cast(kind, safe=False))
    right = Catalog.open(of_others(tmp_path / "right", others))
    by_id = CrossmatchSettings(radius_arcsec=1.0)

    def match() -> int:
        attach(left, right, tmp_path / "attached", AttachSettings(columns={"t": "teff"}))
        return crossmatch(left, right, tmp_path / "pairs", by_id).rows.n_out

    if kind != pa.float64():
        assert match() == 50
        return
    with pytest.raises(CatalogError, match="'gaia_dr3_source_id' is stored as float"):
        match()
    with pytest.raises(CatalogError, match="'gaia_dr3_source_id' is stored as float"):
        crossmatch(left, right, tmp_path / "pairs", by_id)
    assert len(pairs_of(left, right, tmp_path / "by position")) >= 50


def test_a_column_twice_in_a_catalog_of_others_is_refused(tmp_path):
    folder = each_file(
        of_others(tmp_path / "twice", stars()), lambda t: t.append_column("teff", t["teff"])
    )
    with pytest.raises(CatalogError, match="column 'teff' is there 2 times"):
        Catalog.open(folder)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("teff", ["hot"], "column 'teff' has type string, not numbers"),
        ("pmra", ["fast"], "column 'pmra' has type string, not numbers"),
        ("position_epoch", [57388.0], "column 'position_epoch' has values from 57388"),
        ("gaia_dr3_source_id", ["Gaia DR3 12"], "column 'gaia_dr3_source_id' is no id"),
        ("gaia_dr3_source_id", [""], "column 'gaia_dr3_source_id' is no id"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path, name, values, words):
    table = observations(50, 1)
    ids = pa.array(np.arange(50) + 1)
    left = write_catalog(table.append_column("gaia_dr3_source_id", ids), tmp_path / "left", 250)
    others = table.drop_columns(["_healpix_29", "quality", *({name} & set(table.schema.names))])
    others = others.rename_columns(["star_id", *others.schema.names[1:]])
    others = others.append_column(name, pa.array(values * 50))
    right = Catalog.open(of_others(tmp_path / "right", others))
    with pytest.raises((CatalogError, PartitionError), match=words):
        crossmatch(left, right, tmp_path / "pairs", CrossmatchSettings(radius_arcsec=1.0))
