"""HATS catalogs of other programs are inputs."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import healpy
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sos_dask.api import attach
from sos_dask.errors import CatalogError, PartitionError
from sos_dask.sky.healpix import HealpixPixel, ang2pix, centre
from sos_dask.stages.attach import AttachSettings
from sos_dask.storage import hats
from sos_dask.storage.artifact import stamp_of
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.store import verify
from tests.foreign import (
    each_file,
    expected,
    named_stars,
    of_others,
    pairs_of,
    retyped,
    rows_of,
    run,
    stars,
)
from tests.skies import write_catalog

__all__ = ["expected", "run"]


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


# -- pieces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pixel", "folder"), [(0, 0), (9999, 0), (10000, 10000), (12345, 10000)])
def test_ten_thousand_partitions_share_a_folder(pixel, folder):
    expected = f"dataset/Norder=7/Dir={folder}/Npix={pixel}.parquet"
    assert hats.partition_path(HealpixPixel(7, pixel)) == expected


def test_properties_of_java(tmp_path):
    text = "#a=1\n  ! b = 2\n\n c = x\\:y = z \nd\n"
    (tmp_path / "hats.properties").write_text(text)
    assert hats.read_properties(tmp_path / "hats.properties") == {"c": "x:y = z", "d": ""}


def test_right_ascension_in_the_circle():
    ra = np.array([-1e-30, -90.0, 0.0, 359.9, 360.0, -360.0])
    assert hats.in_circle(ra).tolist() == [0.0, 270.0, 0.0, 359.9, 0.0, 0.0]


@pytest.mark.parametrize(("arcsec", "is_inside"), [(-0.1, True), (0.5, True), (2.0, False)])
def test_a_position_just_outside_of_its_pixel_is_put_inside(tmp_path, arcsec, is_inside):
    pixel = HealpixPixel(3, 100)
    ra, dec = (float(one[0]) for one in centre(pixel))
    low, high = dec, dec + 10.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        inside = ang2pix(np.array([ra]), np.array([middle]), 3)[0] == pixel.pixel
        low, high = (middle, high) if inside else (low, middle)
    at = low + arcsec / 3600
    pq.write_table(pa.table({"a": [ra, ra], "d": [at, dec]}), tmp_path / "a.parquet")
    files, names = (stamp_of(tmp_path / "a.parquet"),), ("a", "d", "", "")
    true = ang2pix(np.array([dec, at]) * 0 + ra, np.array([dec, at]))
    if is_inside:
        cells, rows, _ = hats.order_of(files, pixel, names)
        assert ((cells >= pixel.first) & (cells < pixel.stop)).all()
        assert true[0] in cells and (true[1] in cells) is (arcsec < 0)
        assert rows is None or sorted(rows.tolist()) == [0, 1]
    else:
        with pytest.raises(PartitionError, match=r"row 0: .* lies outside HEALPix pixel 3:100"):
            hats.order_of(files, pixel, names)
        assert sorted(hats.order_of(files, None, names).cells.tolist()) == sorted(true.tolist())


def test_bounds_where_statistics_are_missing_or_not_finite(tmp_path):
    table = stars()
    pm = np.random.default_rng(1).normal(0, 9, 500)
    table = table.append_column("pmra", pa.array(np.where(np.arange(500) % 50 == 0, np.inf, pm)))
    table = table.append_column("empty", pa.nulls(500, pa.float64()))
    folder = of_others(tmp_path / "other", table)
    wanted = {
        "pmra": (pm[np.arange(500) % 50 != 0].min(), pm[np.arange(500) % 50 != 0].max()),
        "teff": tuple(pc.min_max(table["teff"]).as_py().values()),
    }
    for file in [None, next(folder.rglob("Npix=*.parquet"))]:
        if file is not None:
            pq.write_table(pq.ParquetFile(file).read(), file, write_statistics=False)
        assert Catalog.open(folder).bounds("pmra", "teff", "empty", "none") == wanted


def test_keys_are_compared_some_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("sos_dask.storage.catalog._KEYS_AT_ONCE", 70)
    sound = of_others(tmp_path / "sound", with_key("id"))
    assert Catalog.open(sound, key="id").fingerprint
    keys = with_key("id")["id"].to_pylist()
    twice = of_others(tmp_path / "twice", with_key("id", pa.array([*keys[:-1], keys[3]])))
    with pytest.raises(CatalogError, match=f"the value {keys[3]} in more than one row"):
        _ = Catalog.open(twice, key="id").fingerprint


@pytest.mark.parametrize("at", [0, -1])
def test_positions_in_the_outermost_cells_of_a_pixel_keep_them(at):
    """What is inside is not pulled: the first cell and the last are inside."""
    pixel = HealpixPixel(3, 100)
    cell = range(pixel.first, pixel.stop)[at]
    ra, dec = (np.array([x]) for x in healpy.pix2ang(1 << 29, cell, nest=True, lonlat=True))
    assert hats._cells_of(ra, dec, pixel, Path("a")).tolist() == [cell]
