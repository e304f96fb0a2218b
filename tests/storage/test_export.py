"""One file of a catalog: astropy, STILTS and pandas read what the catalog contains."""

import csv
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask import api
from sos_dask.errors import CatalogError, ConfigError, PartitionError, StorageError
from sos_dask.sky.healpix import ang2pix
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.objects import ObjectPath
from tests.command_line import assert_error
from tests.foreign import of_others, stars
from tests.services import require
from tests.skies import observations, write_catalog

FORMATS = ("fits", "vot", "csv", "ecsv")
UNITS = {"ra": "deg", "logg": "log10(cm/s2)", "feh": "dex", "v32": "km/s"}
# Text that every format keeps: FITS ends at a NUL and drops blanks at the end.
PLAIN = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=9)
WORDS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=9)


def table_of(rows: list[tuple]) -> pa.Table:
    """Rows of every type at random places; the id of each has 19 digits."""
    n = len(rows)
    rng = np.random.default_rng(n)
    ra, dec = rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))
    kinds = {
        "i64": pa.int64(), "i32": pa.int32(), "i16": pa.int16(), "flag": pa.bool_(),
        "v32": pa.float32(), "v64": pa.float64(), "name": pa.string(), "word": pa.string(),
    }  # fmt: skip
    about = {"v32": {"unit": "km/s", "ucd": "spect.dopplerVeloc", "description": "a < b & c's"}}
    fields = [
        pa.field("_healpix_29", pa.int64(), False),
        pa.field("obs_id", pa.int64(), False, {"ucd": "meta.id"}),
        pa.field("ra", pa.float64(), False, {"unit": "deg"}),
        pa.field("dec", pa.float64(), False, {"unit": "deg"}),
        *(pa.field(name, kind, metadata=about.get(name)) for name, kind in kinds.items()),
    ]
    arrays = [
        pa.array(ang2pix(ra, dec)),
        pa.array(5_800_000_000_000_000_001 + np.arange(n)),
        *(pa.array(ra), pa.array(dec)),
        *(pa.array([row[i] for row in rows], kind) for i, kind in enumerate(kinds.values())),
    ]
    return pa.table(arrays, schema=pa.schema(fields)).sort_by("_healpix_29")


def integers(bits: int) -> st.SearchStrategy:
    return st.none() | st.integers(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)


ROW = st.tuples(
    *map(integers, (64, 32, 16)),
    st.none() | st.booleans(),
    st.none() | st.floats(width=32),
    st.none() | st.floats(),
    st.none() | PLAIN,
    st.none() | WORDS,
)


def read(path: Path) -> Table:
    """Read a file by astropy, as a user does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its units do not know dex
        name = {".vot": "votable", ".csv": "ascii.csv"}.get(path.suffix)
        return Table.read(path, format=name)


def values(column: object) -> list:
    """Values, None for null, nan and empty text: astropy tells them apart in no format."""
    found = [x.decode() if isinstance(x, bytes) else x for x in np.ma.array(column).tolist()]
    return [None if x == "" or x != x else x for x in found]


def same(found: Table, expected: pa.Table) -> None:
    assert found.colnames == expected.schema.names
    assert len(found) == expected.num_rows
    for item in expected.schema:
        ours = values(np.ma.array(expected[item.name].to_pylist(), dtype=object))
        theirs = values(found[item.name])
        if pa.types.is_float32(item.type):
            ours, theirs = (
                [None if x is None else np.float32(x) for x in y] for y in (ours, theirs)
            )
        assert theirs == ours, item.name


def whole(catalog: Catalog) -> pa.Table:
    return pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])


@settings(max_examples=12)
@given(rows=st.lists(ROW, max_size=20), per_partition=st.integers(4, 20))
def test_astropy_reads_what_the_catalog_contains(rows, per_partition, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    table = table_of(rows)
    catalog = write_catalog(table, folder / "catalog", per_partition)
    some = table.schema.names[:-1]  # FITS has no text beyond ASCII
    for suffix, names in (
        ("fits", some),
        ("vot", table.schema.names),
        ("ecsv", table.schema.names),
    ):
        path = folder / f"out.{suffix}"
        made = api.export(catalog, path, columns=names)
        assert (made["rows"], made["bytes"]) == (len(rows), path.stat().st_size)
        found, expected = read(path), table.select(names)
        if suffix == "fits":  # astropy knows no null of a logical, which FITS and STILTS do
            place = expected.schema.names.index("flag")
            flags = pc.fill_null(expected["flag"], False)
            expected = expected.set_column(place, "flag", flags)
        same(found, expected)
        assert found["v32"].unit == "km / s"
        assert str(found["ra"].unit) == "deg"
        if suffix != "fits":
            assert found["v32"].description == "a < b & c's"
            assert found["v32"].meta["ucd"] == "spect.dopplerVeloc"
    api.export(catalog, folder / "out.csv")
    frame = pd.read_csv(folder / "out.csv", dtype={"i64": "Int64", "i32": "Int64", "i16": "Int64"})
    for name in ("obs_id", "i64", "ra", "v64"):
        assert values(frame[name].astype(object).where(frame[name].notna(), None)) == values(
            np.ma.array(table[name].to_pylist(), dtype=object)
        )
    api.export(catalog, folder / "out.parquet")
    again = pa.parquet.read_table(folder / "out.parquet")
    assert again.schema.equals(table.schema, check_metadata=False)
    assert str(again.to_pydict()) == str(table.to_pydict())  # nan is nan


@pytest.mark.parametrize("suffix", FORMATS)
def test_stilts_reads_what_the_catalog_contains(suffix, current, tmp_path):
    """Values, nulls, units, UCDs, descriptions and ids of 19 digits, of a real product."""
    require("stilts")
    catalog = Catalog.open(current / "lamost.corrected")
    path, out = tmp_path / f"out.{suffix}", tmp_path / "out.xml"
    api.export(catalog, path)
    subprocess.run(
        ["stilts", "tpipe", f"in={path}", f"out={out}", "ofmt=votable-tabledata"],
        check=True, capture_output=True,
    )  # fmt: skip
    if suffix == "vot":
        lint = subprocess.run(["stilts", "votlint", str(path)], capture_output=True, check=True)
        assert (lint.stdout, lint.stderr) == (b"", b"")
    table = whole(catalog)
    assert pc.max(table["gaia_dr3_source_id"]).as_py() > 10**18
    assert table["gaia_dr3_source_id"].null_count > 50
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Table.read(out, format="votable")
    same(found, table)
    for item in table.schema if suffix != "csv" else ():
        about = {key.decode(): text.decode() for key, text in (item.metadata or {}).items()}
        column = found[item.name]
        assert (column.description or "") == about.get("description", ""), item.name
        assert column.meta.get("ucd", "") == about.get("ucd", "")
        assert str(column.unit or "").replace(" ", "") == about.get("unit", "")


def test_what_stilts_does_not_read(tmp_path):
    """As jobs/README.md says: text beyond ASCII in CSV and ECSV, infinite values in ECSV."""
    require("stilts")
    rows = [(9007199254740993, 1, 1, None, np.inf, -np.inf, "null", "Å"), (None,) * 8]
    catalog = write_catalog(table_of(rows), tmp_path / "catalog")
    for suffix in FORMATS:
        names = ["i64", "flag", "v32", "v64", "name", *(["word"] if suffix != "fits" else [])]
        api.export(catalog, tmp_path / f"out.{suffix}", columns=names)
        ran = subprocess.run(
            ["stilts", "tpipe", f"in={tmp_path}/out.{suffix}", "ofmt=csv"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        found = sorted(csv.reader(ran.stdout.strip("\n").split("\n")[1:]))
        infinite = ["", ""] if suffix == "ecsv" else ["Infinity", "-Infinity"]
        word = {"fits": [], "vot": ["Å"]}.get(suffix, ["Ã\x85"])
        assert found[0] == [""] * len(names)
        assert found[1] == ["9007199254740993", "", *infinite, "null", *word], suffix


def test_fits_is_as_the_standard_wants(current, tmp_path):
    api.export(Catalog.open(current / "lamost.corrected"), tmp_path / "out.fits")
    with fits.open(tmp_path / "out.fits") as found:
        found.verify("exception")
        header = found[1].header
        names = [header[f"TTYPE{n}"] for n in range(1, header["TFIELDS"] + 1)]
        at = {name: number for number, name in enumerate(names, 1)}
        assert header[f"TUNIT{at['logg']}"] == "log10(cm/s2)"
        assert header[f"TUCD{at['teff']}"] == "phys.temperature.effective"
        assert header[f"TNULL{at['gaia_dr3_source_id']}"] == -(2**63)
        assert f"TNULL{at['obs_id']}" not in header
        assert header[f"TCOMM{at['flag_sos']}"].startswith("1: a label is null")
        assert len(found) == 2
    assert (tmp_path / "out.fits").stat().st_size % 2880 == 0


def test_bytes_do_not_depend_on_the_cut_of_the_sky(tmp_path):
    catalogs = {n: write_catalog(observations(600), tmp_path / str(n), n) for n in (40, 1000)}
    for suffix in (*FORMATS, "parquet"):
        contents = set()
        for n in catalogs:
            api.export(catalogs[n], tmp_path / f"{n}.{suffix}")
            contents.add((tmp_path / f"{n}.{suffix}").read_bytes())
        assert len(contents) == (2 if suffix == "parquet" else 1)  # row groups end with partitions


@pytest.fixture(scope="module")
def sky(tmp_path_factory) -> Catalog:
    return write_catalog(observations(600), tmp_path_factory.mktemp("sky") / "catalog", 100)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("teff > 5000 and quality == 0", lambda t: (t["teff"] > 5000) & (t["quality"] == 0)),
        ("quality & 1 != 0", lambda t: t["quality"] & 1 != 0),
        ("snr<=50.5", lambda t: t["snr"] <= np.float32(50.5)),
        ("obs_id == '1000000007'", lambda t: t["obs_id"] == 1_000_000_007),
        ("teff > 6500 or quality & 1 != 0", lambda t: (t["teff"] > 6500) | (t["quality"] & 1 != 0)),
    ],
)
def test_rows_that_pass(sky, tmp_path, where, expected):
    made = api.export(sky, tmp_path / "out.ecsv", columns=["feh", "obs_id"], where=where)
    frame = whole(sky).to_pandas()
    found = read(tmp_path / "out.ecsv")
    assert found.colnames == ["feh", "obs_id"]
    assert list(found["obs_id"]) == list(frame[expected(frame)]["obs_id"])
    assert 0 < made["rows"] < 600


@pytest.mark.parametrize("place", [(0.0, 90.0, 50.0), (359.9, 0.0, 20.0), (45.0, -41.8, 40.0)])
def test_rows_in_a_cone(sky, tmp_path, place, monkeypatch):
    """At a pole, over RA 0 and at a corner of base pixels; other partitions are not read."""
    touched, read_all = [], Catalog.read

    def counted(self, pixel, *given):
        touched.append(pixel)
        return read_all(self, pixel, *given)

    rows = whole(sky)
    at = SkyCoord(rows["ra"].to_numpy(), rows["dec"].to_numpy(), unit="deg")
    near = at.separation(SkyCoord(*place[:2], unit="deg")).deg <= place[2]
    monkeypatch.setattr(Catalog, "read", counted)
    out = tmp_path / "out.ecsv"
    api.export(sky, out, cone=place, where="feh > -5", columns=["obs_id"])
    assert list(read(out)["obs_id"]) == rows["obs_id"].to_numpy()[near].tolist()
    assert 0 < near.sum() < 600
    assert len(touched) < len(sky.pixels)


def test_a_value_counts_as_the_column_holds_it(sky, tmp_path):
    value = whole(sky)["feh"][5].as_py()
    near = f"feh == {np.float32(value)!s}"  # 0.1 of float32 is not 0.1 of float64
    assert api.export(sky, tmp_path / "out.fits", where=near)["rows"] == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"columns": ["tef"]}, "has no column 'tef'.*teff"),
        ({"columns": ["ra", "ra"]}, "named twice"),
        ({"where": "tef > 5"}, "has no column 'tef'.*teff"),
        ({"cone": (10.0, 91.0, 1.0)}, "no cone"),
        ({"cone": (10.0, 9.0, 0.0)}, "no cone"),
        ({"cone": (float("nan"), 9.0, 1.0)}, "no cone"),
    ],
)
def test_what_is_not_there_is_refused(sky, tmp_path, given, says):
    with pytest.raises((ConfigError, CatalogError), match=f"(?s){says}"):
        api.export(sky, tmp_path / "out.fits", **given)
    assert list(tmp_path.iterdir()) == []


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    rows = [(-(2**63), 1, 1, True, 1.0, 1.0, "a", "Å"), *[(1, 1, 1, None, 1.0, 1.0, "a", "a")] * 5]
    catalog = write_catalog(table_of(rows), tmp_path / "catalog", 2)
    with pytest.raises(ConfigError, match="'word' has the value 'Å'"):
        api.export(catalog, tmp_path / "out.fits")
    with pytest.raises(ConfigError, match="'i64' has the value -9223372036854775808"):
        api.export(catalog, tmp_path / "out.fits", columns=["i64"])
    table = table_of(rows).append_column("list", pa.array([[1.0]] * 6))
    listed = write_catalog(table, tmp_path / "listed")
    with pytest.raises(ConfigError, match=r"'list' has type list<.*which Parquet alone can hold"):
        api.export(listed, tmp_path / "out.vot")
    api.export(listed, tmp_path / "out.parquet")
    assert pa.parquet.read_table(tmp_path / "out.parquet")["list"].to_pylist() == [[1.0]] * 6


def test_files_that_are_there_or_have_no_format(sky, tmp_path):
    api.export(sky, tmp_path / "out.csv")
    before = (tmp_path / "out.csv").stat()
    for options in ({}, {"dictionary": tmp_path / "out.csv", "overwrite": True}):
        with pytest.raises(StorageError, match=r"out\.csv exists"):
            api.export(sky, tmp_path / "out.csv", **options)
    assert (tmp_path / "out.csv").stat() == before
    api.export(sky, tmp_path / "out.csv", columns=["ra"], overwrite=True)
    assert (tmp_path / "out.csv").stat().st_size < before.st_size
    with pytest.raises(ConfigError, match=r"out\.txt ends with no known format"):
        api.export(sky, tmp_path / "out.txt")
    with pytest.raises(ConfigError, match=r"x\.fits ends with no known format"):
        api.export(sky, tmp_path / "a.fits", citation=tmp_path / "x.fits")
    (tmp_path / "folder").write_text("")
    with pytest.raises(StorageError, match="cannot"):
        api.export(sky, tmp_path / "folder" / "out.fits")


FULL = """
import resource, sys
from sos_dask import api
from sos_dask.errors import StorageError

resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
for suffix in sys.argv[3:]:
    try:
        api.export(sys.argv[1], f"{sys.argv[2]}/out.{suffix}")
    except StorageError as error:
        print(error.message)
"""


def test_a_full_disk_leaves_nothing(sky, tmp_path):
    some = (*FORMATS, "parquet")
    command = [sys.executable, "-c", FULL, str(sky.path), str(tmp_path), *some]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    says = [f"the disk is full: cannot write {tmp_path}/out.{suffix}" for suffix in some]
    assert done.stdout.splitlines() == says
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_partition_is_named(tmp_path):
    catalog = write_catalog(observations(600), tmp_path / "catalog", 100)
    path = catalog.partition_file(catalog.pixels[3])
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)
    with pytest.raises(PartitionError, match=rf"{path.relative_to(tmp_path)} cannot be read"):
        api.export(catalog, tmp_path / "out.fits")
    assert {one.name for one in tmp_path.iterdir()} == {"catalog"}


def test_dictionary_and_citation(current, tmp_path):
    out, files = tmp_path / "out.fits", {}
    for suffix in (".json", ".csv", ".md"):
        files["dictionary"] = tmp_path / f"columns{suffix}"
        files["citation"] = tmp_path / ("cite.bib" if suffix == ".md" else "cite.txt")
        path = current / "lamost.corrected"
        made = api.export(path, out, **files, where="snr > 20", overwrite=True)
    [flag] = [one for one in made["columns"] if one["name"] == "flag_sos"]
    assert flag["bits"][16].startswith("outside the coverage")
    told = json.loads((tmp_path / "columns.json").read_text())
    assert told["rows"] == made["rows"] < Catalog.open(path).n_rows
    table = whole(Catalog.open(path)).to_pandas().query("snr > 20")
    for one in told["columns"]:
        column = table[one["name"]]
        assert one["nulls"] == column.isna().sum()
        if one["type"] != "string":
            assert (one["min"], one["max"]) == (column.min(), column.max())
    by_name = {one["name"]: one for one in told["columns"]}
    assert by_name["teff"]["unit"] == "K"
    assert by_name["quality"]["bits"]["1"] == "not snrg >= 20"
    assert by_name["snr"]["bits"] == {}
    with (tmp_path / "columns.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(by_name)
    assert (tmp_path / "columns.md").read_text().count("\n| ") == len(by_name) + 2
    text = (tmp_path / "cite.txt").read_text()
    for name in ("lamost-dr11-lrs", "apogee-dr17", "galah-dr4"):
        assert f"\n{name}\n" in text
    assert current.resolve().name in text
    assert "abs/2022ApJS..259...35A" in text and "lamost.fits sha256:" in text
    assert (tmp_path / "cite.bib").read_text().count("@misc{") == 4


def test_a_catalog_of_another_program(tmp_path):
    rows = stars().append_column("small", pa.array([7] * 500, pa.uint8()))
    other = of_others(
        tmp_path / "other", rows, suffix="/", files=2, bib_reference="2000A&A...1....1X"
    )
    files = {"citation": tmp_path / "cite.bib", "dictionary": tmp_path / "d.md"}
    api.export(other, tmp_path / "out.fits", columns=["star_id", "ra", "small"], **files)
    found = read(tmp_path / "out.fits")
    expected = rows.sort_by("star_id")
    found.sort("star_id")
    assert list(found["star_id"]) == expected["star_id"].to_pylist()
    assert list(found["ra"]) == expected["ra"].to_pylist()
    assert set(found["small"]) == {7}
    assert "2000A\\&A...1....1X" in files["citation"].read_text()


def test_objects(sky, prefix, tmp_path):
    """A catalog on an object store, and a file on it."""
    for path in sorted(sky.path.rglob("*")):
        if path.is_file():
            ObjectPath(f"{prefix}/catalog/{path.relative_to(sky.path)}").put(path.read_bytes())
    api.export(f"{prefix}/catalog", tmp_path / "out.fits")
    api.export(sky, tmp_path / "same.fits")
    assert (tmp_path / "out.fits").read_bytes() == (tmp_path / "same.fits").read_bytes()
    api.export(sky, f"{prefix}/out.fits")
    assert ObjectPath(f"{prefix}/out.fits").read_bytes() == (tmp_path / "same.fits").read_bytes()
    with pytest.raises(StorageError, match=r"out\.fits exists"):
        api.export(sky, f"{prefix}/out.fits")


def test_command(cli, current, tmp_path):
    path = current / "lamost.corrected"
    options = ("--columns", "obs_id,teff_sos", "--where", "flag_sos & 23 == 0")
    ran = cli("export", path, "-o", "out.fits", *options, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["rows"] == len(read(tmp_path / "out.fits")) > 100
    assert [one["name"] for one in ran.json["columns"]] == ["obs_id", "teff_sos"]
    assert "export lamost.corrected: " in ran.err
    assert_error(cli("export", path, "-o", "out.fits"), 9, "out.fits exists", "--overwrite")
    assert_error(cli("export", path, "-o", "out.pdf"), 3, "no known format", r"\.fits, \.vot")
    assert_error(cli("export", path, "-o", "a.vot", "--columns", "tef"), 5, "no column 'tef'")
    near = ("-o", "cone.vot", "--cone", 180, -90.0, 150, "--json")
    assert 0 < cli("export", path, *near).json["rows"] < Catalog.open(path).n_rows
    assert_error(cli("export", path, "-o", "a.vot", "--cone", 1, 91, 1), 3, "no cone", "in degrees")
    ran = cli("export", path, "-o", "out.fits", "--overwrite")
    assert (ran.code, ran.out.startswith("out.fits: ")) == (0, True)
