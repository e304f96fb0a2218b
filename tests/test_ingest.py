import gzip
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import MaskedColumn, Table
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sos_dask import ingest
from sos_dask.clean import quality_mask
from sos_dask.errors import SosError, StorageError, SurveyError
from sos_dask.healpix import ang2pix
from sos_dask.ingest import (
    Profile,
    check_conflicts,
    check_profile,
    conflicting_keys,
    losing_rows,
    merge_rows,
    open_source,
    plan_chunks,
    read_chunk,
    rejected_rows,
)
from sos_dask.schema import Survey, load_survey, parse_survey

NAMES = ("obsid", "ra", "dec", "teff", "logg", "feh")


def survey(columns: dict | None = None, **more) -> Survey:
    """The least survey, with more columns (None removes one) and settings."""
    base = {name: {"source": name} for name in NAMES[1:]}
    base["obs_id"] = {"source": "obsid"}
    base.update(columns or {})
    raw = {"format": 1, "name": "mock", "title": "Mock", "position_epoch": 2000.0}
    raw |= {"missing": [-9999.0], "columns": base}
    return parse_survey(raw | more)


def rows(n: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "obsid": rng.permutation(n).astype(np.int64) + 1,
        "ra": rng.uniform(0, 360, n),
        "dec": np.degrees(np.arcsin(rng.uniform(-1, 1, n))),
        "teff": rng.uniform(4000, 7000, n).astype(np.float32),
        "logg": rng.uniform(0.5, 5, n).astype(np.float32),
        "feh": rng.uniform(-2, 0.4, n).astype(np.float32),
    }


def write_fits(path: Path, data: dict, units: dict | None = None) -> Path:
    columns = []
    codes = {"f4": "E", "f8": "D", "i8": "K", "i4": "J", "i2": "I", "u1": "B", "b1": "L"}
    for name, given_array in data.items():
        array = np.asarray(given_array)
        if array.dtype.kind == "U":
            array = np.char.encode(array, "latin-1")
        width = array.shape[1] if array.ndim == 2 else ""
        kind = array.dtype.str[1:]
        code = f"{array.dtype.itemsize}A" if kind[0] == "S" else f"{width}{codes[kind]}"
        columns.append(fits.Column(name, code, array=array, unit=(units or {}).get(name)))
    fits.BinTableHDU.from_columns(columns, name="CATALOG").writeto(path, overwrite=True)
    return path


def write_csv(path: Path, data: dict, delimiter: str = ",") -> Path:
    lines = [delimiter.join(data)]
    for values in zip(*data.values(), strict=True):
        lines.append(delimiter.join("" if v is None else str(v) for v in values))
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclass
class Read:
    rows: pa.Table
    rejected: pa.Table
    profile: Profile
    batches: list = field(default_factory=list)

    def column(self, name: str):
        """Values in the order of the file, without rejected rows."""
        return self.rows.sort_by([("_file", "ascending"), ("_row", "ascending")])[name].to_pylist()


def read(path: Path, definition: Survey, chunk_rows=1_000_000, batch_rows=1_000_000, index=0):
    source = open_source(path, definition, index, path.parent / "scratch")
    source = pickle.loads(pickle.dumps(source))
    batches = [
        batch
        for chunk in plan_chunks(source, chunk_rows)
        for batch in read_chunk(chunk, definition, batch_rows, quality=quality_mask)
    ]
    profile = Profile.merge([batch.profile for batch in batches])
    return Read(
        pa.concat_tables([batch.rows for batch in batches]),
        pa.concat_tables([batch.rejected for batch in batches]),
        profile,
        batches,
    )


def fails(path: Path, definition: Survey, *words: str) -> SosError:
    """The error of reading a file; the message must name the file and hold the words."""
    with pytest.raises(SurveyError) as caught:
        read(path, definition)
    text = str(caught.value)
    assert str(path) in text
    for word in words:
        assert word in text, text
    return caught.value


# --- what comes out --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fits", "fits.gz", "csv", "csv.gz", "parquet", "vot", "vot.gz"])
def test_formats_give_the_same_rows(tmp_path, kind):
    data = rows(300)
    data["ra"] = data["ra"].round(6)
    path = tmp_path / f"any.{kind.removesuffix('.gz')}"
    if kind.startswith("fits"):
        write_fits(path, data)
    elif kind.startswith("csv"):
        write_csv(path, data)
    elif kind == "parquet":
        pq.write_table(pa.table(data), path, row_group_size=50)
    else:
        Table(data).write(path, format="votable")
    if kind.endswith(".gz"):
        packed = tmp_path / "no-suffix"  # told by content
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    out = read(path, survey(), chunk_rows=120, batch_rows=70)
    assert out.rejected.num_rows == 0
    for name, native in (("obs_id", "obsid"), *((n, n) for n in NAMES[1:])):
        assert out.column(name) == data[native].tolist(), name
    assert out.column("_row") == list(range(300))
    definition = survey()
    assert out.rows.schema.names == [*definition.arrow_schema().names, "_file", "_row"]
    assert out.rows.schema.field("teff").metadata == {
        b"unit": b"K",
        b"ucd": b"phys.temperature.effective",
        b"description": b"Effective temperature",
    }
    assert out.rows.select(definition.arrow_schema().names).schema == definition.arrow_schema()


def test_rows_are_sorted_and_on_their_cells(tmp_path):
    data = rows(500)
    data["ra"][:], data["dec"][:] = np.repeat(data["ra"][:100], 5), np.repeat(data["dec"][:100], 5)
    for number, batch in enumerate(read(write_fits(tmp_path / "a", data), survey()).batches):
        keys = list(
            zip(
                batch.rows["_healpix_29"].to_pylist(), batch.rows["obs_id"].to_pylist(), strict=True
            )
        )
        assert keys == sorted(keys)
        cells = ang2pix(batch.rows["ra"].to_numpy(), batch.rows["dec"].to_numpy())
        assert batch.rows["_healpix_29"].to_pylist() == cells.tolist()
        assert number == 0


@pytest.mark.parametrize(
    "ids", [np.arange(9), np.array([2**62, -(2**62), 0] * 3), list("zéa🂡bABCD")]
)
def test_ties_in_position_are_ordered_by_id(tmp_path, ids):
    data = {name: np.full(9, 10.0) for name in NAMES} | {"obsid": np.array(ids)}
    dtype = "int64"
    if isinstance(ids, list):
        data["obsid"], dtype = pa.array(ids), "string"
    data["teff"] = np.full(9, 5000.0)
    data["logg"] = data["feh"] = np.zeros(9)
    order = np.random.default_rng(1).permutation(9)
    table = pa.table(data).take(pa.array(order))
    pq.write_table(table, tmp_path / "t")
    out = read(tmp_path / "t", survey({"obs_id": {"source": "obsid", "dtype": dtype}}))
    keys = out.rows["obs_id"].to_pylist()
    assert keys == sorted(keys, key=lambda key: key.encode() if isinstance(key, str) else key)


def test_file_and_row_numbers(tmp_path):
    out = read(write_fits(tmp_path / "a", rows(10)), survey(), chunk_rows=3, index=7)
    assert out.rows["_file"].type == pa.int32()
    assert set(out.rows["_file"].to_pylist()) == {7}
    assert out.column("_row") == list(range(10))
    assert len(out.batches) == 4


def test_missing_values_become_null_and_are_counted(tmp_path):
    data = rows(8)
    data["teff"][:5] = [-9999, np.nan, np.inf, 99.5, 999.0]
    data["feh"][:3] = [9.75, 2.0, 2.1]
    definition = survey({"teff": {"source": "teff", "missing": [99.5]}})
    out = read(write_fits(tmp_path / "a", data), definition)
    teff = out.column("teff")
    assert teff[:5] == [None] * 5
    assert None not in teff[5:]
    assert out.profile.nulls["teff"] == 5
    assert out.profile.impossible_values() == {"feh": 2, "teff": 1}
    assert out.profile.first_impossible == {"feh": (0, 0, "9.75"), "teff": (0, 4, "999")}
    assert out.column("feh")[1] == 2.0
    # Nulls are as 0 in memory, never the sentinel.
    chunk = out.rows["teff"].chunk(0)
    assert -9999.0 not in np.frombuffer(chunk.buffers()[1], np.float32).tolist()


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_sentinels_compare_in_the_type_of_the_column(tmp_path, dtype):
    data = rows(3)
    data["rv"] = np.array([-999.99, -999.98, 12.5], dtype=dtype)
    widened = rows(3) | {"rv": np.array([-999.99, -999.98, 12.5], "f4").astype("f8")}
    definition = survey({"rv": {"source": "rv"}}, missing=[-999.99])
    for number, table in enumerate((data, widened)):
        values = read(write_fits(tmp_path / str(number), table), definition).column("rv")
        assert values[0] is None
        assert values[1:] == [pytest.approx(-999.98), 12.5]


def test_a_sentinel_beyond_the_limits_is_no_impossible_value(tmp_path):
    data = rows(3)
    data["feh"][:2] = [-9999.99, -99.0]
    out = read(write_fits(tmp_path / "a", data), survey(missing=[-9999.99]))
    assert out.column("feh")[:2] == [None, None]
    assert out.profile.impossible_values() == {"feh": 1}
    assert out.profile.first_impossible["feh"] == (0, 1, "-99")


def test_minus_zero_is_zero(tmp_path):
    data = rows(2) | {"ra": np.array([-0.0, 0.0]), "feh": np.array([-0.0, 0.0], "f4")}
    out = read(write_fits(tmp_path / "a", data), survey())
    for name in ("ra", "feh"):
        assert not np.signbit(out.rows[name].to_numpy()).any()


def test_ids_that_are_not_positive_are_null(tmp_path):
    ids = np.array([0, -1, -9999, 2594341150806513152, 5], dtype=np.int64)
    definition = survey({"gaia_dr3_source_id": {"source": "gaia"}})
    out = read(write_fits(tmp_path / "a", rows(5) | {"gaia": ids}), definition)
    assert out.column("gaia_dr3_source_id") == [None, None, None, 2594341150806513152, 5]


@pytest.mark.parametrize("kind", ["fits", "csv", "parquet"])
def test_ids_as_text(tmp_path, kind):
    ids = ["2594341150806513152", "", "0", "-9999", " 17 ", "null"]
    data = rows(6) | {"gaia": np.array(ids)}
    path = tmp_path / "a"
    write = {
        "fits": lambda: write_fits(path, data),
        "csv": lambda: write_csv(path, data),
        "parquet": lambda: pq.write_table(pa.table(data | {"gaia": pa.array(ids)}), path),
    }
    write[kind]()
    out = read(path, survey({"gaia_dr3_source_id": {"source": "gaia"}}))
    expected = [2594341150806513152, None, None, None, 17, None]
    assert out.column("gaia_dr3_source_id") == expected


def test_positions_are_wrapped_or_rejected(tmp_path):
    ra = [-180.0, -1e-20, 360.0, 359.9, -180.1, 360.1, 10, 10, np.nan, 10, -9999, 10]
    dec = [0.0, 0, 0, 0, 0, 0, 90, -90, 0, 90.1, 0, np.inf]
    data = rows(12) | {"ra": np.array(ra), "dec": np.array(dec)}
    data["obsid"][0] = 1000
    data["obsid"][7] = -9999
    out = read(write_fits(tmp_path / "stars", data), survey())
    assert out.column("ra") == [180.0, 0.0, 0.0, 359.9, 10.0]
    assert out.column("_row") == [0, 1, 2, 3, 6]
    assert out.rejected.to_pydict() == {
        "file": ["stars"] * 7,
        "row": [4, 5, 7, 8, 9, 10, 11],
        "reason": [
            "ra out of range",
            "ra out of range",
            "null obs_id",
            "null position",
            "dec out of range",
            "null position",
            "null position",
        ],
        "obs_id": [None if i == 7 else str(data["obsid"][i]) for i in (4, 5, 7, 8, 9, 10, 11)],
        "ra": [-180.1, 360.1, 10.0, None, 10.0, None, 10.0],
        "dec": [0.0, 0.0, -90.0, 0.0, 90.1, 0.0, None],
    }
    assert out.profile.n_rows == 12
    assert out.profile.rejected == {
        "dec out of range": 1,
        "null obs_id": 1,
        "null position": 3,
        "ra out of range": 2,
    }
    assert out.profile.first_rejected[:2] == (0, 4)


def test_units_are_converted(tmp_path):
    data = rows(4)
    hours = data["ra"] / 15
    data |= {"ra": hours, "rv": np.array([1.5, -2, np.nan, -9999])}
    definition = survey(
        {"ra": {"source": "ra", "unit": "hourangle"}, "rv": {"source": "rv", "unit": "m/s"}}
    )
    out = read(write_fits(tmp_path / "a", data, {"ra": "hourangle"}), definition)
    assert out.column("ra") == pytest.approx((hours * 15).tolist(), rel=1e-15)
    assert out.column("rv") == [pytest.approx(0.0015), pytest.approx(-0.002), None, None]


def test_the_epoch_is_a_column_or_one_value(tmp_path):
    path = write_fits(tmp_path / "a", rows(2) | {"epoch": np.array([2015.5, 2016.0])})
    assert read(path, survey()).column("position_epoch") == [2000.0, 2000.0]
    of_file = survey({"position_epoch": {"source": "epoch"}})
    assert read(path, of_file).column("position_epoch") == [2015.5, 2016.0]
    columns = {"obs_id": {"source": "obsid"}} | {name: {"source": name} for name in NAMES[1:]}
    unknown = parse_survey({"format": 1, "name": "mock", "title": "Mock", "columns": columns})
    assert "position_epoch" not in read(path, unknown).rows.column_names


def test_joined_keys(tmp_path):
    table = {
        "field": pa.array(["M67", None, "", "M67"]),
        "fibre": pa.array([7, 8, None, None], pa.int16()),
        "snr": pa.array([12.5, 30.0, float("nan"), None]),
    }
    pq.write_table(pa.table(rows(4) | table), tmp_path / "a")
    definition = survey({"obs_id": {"join": ["field", "fibre", "snr"], "dtype": "string"}})
    out = read(tmp_path / "a", definition)
    assert out.column("obs_id") == ["M67.7.12.5", ".8.30", "M67.."]
    assert out.rejected["reason"].to_pylist() == ["null obs_id"]


def test_the_first_source_in_the_file_is_used_whatever_its_case(tmp_path):
    data = rows(3) | {"SNRG": np.array([1.0, 2, 3]), "snrr": np.array([4.0, 5, 6])}
    definition = survey({"snr": {"source": ["snr_px", "snrg", "snrr"]}})
    assert read(write_fits(tmp_path / "a", data), definition).column("snr") == [1.0, 2.0, 3.0]


# --- quality ---------------------------------------------------------------------------------


def test_cuts_on_native_and_canonical_columns(tmp_path):
    data = rows(6)
    data["teff"][:3] = [-9999, 500, 5000]
    data |= {
        "flag": np.array([0, 1 << 40, 0, 0, 0, 0]),
        "class": np.array(["STAR", "STAR", "STAR", "QSO", "", "STAR"]),
    }
    cuts = {
        "teff": {"bit": 0, "column": "teff", "min": 0},  # 500 K is impossible: null, though above
        "flag": {"bit": 1, "column": "FLAG", "bits_unset": [40]},
        "class": {"bit": 2, "column": "class", "values": ["STAR"]},
        "snr": {"bit": 3, "column": "snr", "min": 10},
        "gone": {"bit": 4, "column": "gone", "min": 0, "optional": True},
    }
    columns = {"snr": {"source": "sn", "unit": ""}}
    data["sn"] = np.array([50.0, 50, 50, 50, 50, 5])
    expected = [1, 1 | 2, 0, 4, 4, 8]
    out = read(write_fits(tmp_path / "a", data), survey(columns, cuts=cuts))
    assert out.column("quality") == expected
    data["flag"] = [f"{value}.0" for value in data["flag"]]  # as pandas writes integers with gaps
    out = read(write_csv(tmp_path / "b", data), survey(columns, cuts=cuts))
    assert out.column("quality") == expected
    error = fails(
        write_fits(tmp_path / "c", rows(2)),
        survey(cuts={"snr": {"bit": 0, "column": "teffx", "min": 1}}),
        "no column 'teffx', which cut 'snr' needs",
    )
    assert "teff" in error.hint


def test_without_cuts_all_rows_pass(tmp_path):
    assert read(write_fits(tmp_path / "a", rows(4)), survey()).column("quality") == [0] * 4


# --- FITS ------------------------------------------------------------------------------------


def test_fits_types_as_astropy_reads_them(tmp_path):
    n = 5
    array: dict = {
        "u2": np.array([0, 1, 32767, 32768, 65535], np.uint16),
        "u4": np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], np.uint32),
        "u8": np.array([0, 1, 2**62, 2**53 + 1, 2**63 - 1], np.uint64),
        "s1": np.array([-128, -1, 0, 1, 127], np.int8),
        "scaled": np.array([1.5, 2.0, -3.25, 0, 99.75]),
        "flag": np.array([True, False, True, True, False]),
        "vector": np.arange(3 * n, dtype=np.float32).reshape(n, 3),
        "text": np.array(["a", " b ", "", "longer", "x\0yz"]),
    }
    columns = [
        fits.Column("u2", "I", bzero=32768, array=array["u2"]),
        fits.Column("u4", "J", bzero=2**31, array=array["u4"]),
        fits.Column("u8", "K", bzero=2**63, array=array["u8"]),
        fits.Column("s1", "B", bzero=-128, array=array["s1"]),
        fits.Column("scaled", "I", array=(array["scaled"] - 10) / 0.25),
        fits.Column("flag", "L", array=array["flag"]),
        fits.Column("vector", "3E", array=array["vector"]),
        fits.Column("bits", "11X", array=np.zeros((n, 11), bool)),
        fits.Column("complex", "2C", array=np.zeros((n, 2), np.complex64)),
        fits.Column("lists", "PJ()", array=np.array([[1]] * n, dtype=object)),
        fits.Column("nulls", "J", null=-1, array=np.array([3, -1, 5, -1, 7])),
        fits.Column("text", "6A", array=array["text"]),
        *fits.BinTableHDU(Table(rows(n))).columns,
    ]
    hdu = fits.BinTableHDU.from_columns(columns)
    cards = {f"{'TSCAL5':8}= {0.25:20}": "scale", f"{'TZERO5':8}= {10.0:20}": "zero"}
    for word in cards.values():
        hdu.header["COMMENT"] = word
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(np.zeros((9, 9))), hdu]).writeto(tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    for card, word in cards.items():  # astropy would scale the values itself
        content = content.replace(f"{'COMMENT ' + word:80}".encode(), f"{card:80}".encode())
    (tmp_path / "a").write_bytes(content)
    with fits.open(tmp_path / "a") as hdus:
        assert hdus[2].data["scaled"].tolist() == array["scaled"].tolist()
    names = ("u2", "u4", "u8", "s1", "flag", "nulls")
    extra: dict = {name: {"source": name, "dtype": "int64"} for name in names}
    extra |= {"scaled": {"source": "scaled"}, "text": {"source": "text", "dtype": "string"}}
    extra |= {f"v{i}": {"source": "vector", "element": i} for i in range(3)}
    out = read(tmp_path / "a", survey(extra=extra, hdu=2), batch_rows=2)
    for name in ("u2", "u4", "u8", "s1", "scaled"):
        assert out.column(name) == array[name].tolist(), name
    assert out.column("flag") == [1, 0, 1, 1, 0]
    assert out.column("nulls") == [3, None, 5, None, 7]
    assert out.column("text") == ["a", "b", None, "longer", "x"]
    for i in range(3):
        assert out.column(f"v{i}") == array["vector"][:, i].tolist()
    for name, form in (("bits", "11X"), ("complex", "2C"), ("lists", "PJ(1)")):
        fails(tmp_path / "a", survey(extra={"e": {"source": name}}, hdu=2), f"'{name}'", form)
    whole = survey(extra={"e": {"source": "vector"}}, hdu=2)
    fails(tmp_path / "a", whole, "'vector'", "a vector of 3 values", "element = 0")
    beyond = survey(extra={"e": {"source": "vector", "element": 3}}, hdu=2)
    fails(tmp_path / "a", beyond, "no element 3")
    cut = survey(cuts={"v": {"bit": 0, "column": "vector", "min": 0}}, hdu=2)
    fails(tmp_path / "a", cut, "cut 'v'", "a vector of 3 values")


def test_an_undefined_logical_is_null(tmp_path):
    path = write_fits(tmp_path / "a", rows(3) | {"flag": np.array([True, False, True])})
    content = bytearray(path.read_bytes())
    row_bytes = 8 + 8 + 8 + 12 + 1
    content[2 * 2880 + 3 * row_bytes - 1] = 0
    path.write_bytes(content)
    definition = survey(extra={"flag": {"source": "flag", "dtype": "int64"}})
    assert read(path, definition).column("flag") == [1, 0, None]


def test_latin1_text_is_kept(tmp_path):
    data = rows(2) | {"name": np.array(["Ángel", "x"])}
    definition = survey(extra={"name": {"source": "name", "dtype": "string"}})
    assert read(write_fits(tmp_path / "a", data), definition).column("name") == ["Ángel", "x"]


def test_unsigned_ids_beyond_int64_are_refused(tmp_path):
    columns = fits.BinTableHDU(Table(rows(2))).columns
    big = fits.Column("big", "K", bzero=2**63, array=np.array([1, 2**63], np.uint64))
    fits.BinTableHDU.from_columns([*columns, big]).writeto(tmp_path / "a")
    definition = survey(extra={"big": {"source": "big", "dtype": "int64"}})
    fails(tmp_path / "a", definition, "column 'big', row 1", str(2**63))


def test_wrong_hdu(tmp_path):
    path = write_fits(tmp_path / "a", rows(3))
    fails(path, survey(hdu=2), "HDU 2 does not exist", "1 'CATALOG' (3 rows)")
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(np.zeros(3)), fits.BinTableHDU(Table(rows(3)))]
    fits.HDUList(hdus).writeto(tmp_path / "b")
    fails(tmp_path / "b", survey(), "HDU 1 is no binary table", "2 '' (3 rows)")
    fits.PrimaryHDU(np.zeros(3)).writeto(tmp_path / "c")
    fails(tmp_path / "c", survey(), "HDU 1 does not exist", "no binary table at all")


@pytest.mark.parametrize("cut", [1, 100, 2881, 5000])
def test_truncated_fits(tmp_path, cut):
    whole = write_fits(tmp_path / "a", rows(2000)).read_bytes()
    need = 2 * 2880 + 2000 * (8 + 8 + 8 + 12)
    path = tmp_path / "cut"
    path.write_bytes(whole[: need - cut])
    fails(path, survey(), f"truncated: {need - cut} bytes", f"asks for {need}")
    path.write_bytes(whole[:need])  # only the padding is gone
    assert read(path, survey()).rows.num_rows == 2000


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = write_fits(tmp_path / "a", rows(2000))
    chunk = plan_chunks(open_source(path, survey(), 0, tmp_path))[0]
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(SurveyError, match="became shorter"):
        list(read_chunk(chunk, survey(), quality=quality_mask))


def test_damaged_headers(tmp_path):
    whole = write_fits(tmp_path / "a", rows(3)).read_bytes()
    path = tmp_path / "b"
    path.write_bytes(whole[:2000])
    fails(path, survey(), "not a readable FITS file")
    path.write_bytes(whole.replace(b"TFORM3  = 'D", b"TFORM3  = 'E"))
    fails(path, survey(), "its columns take 32 bytes a row, NAXIS1 says 36")
    path.write_bytes(whole.replace(b"TFORM3  = 'D", b"TFORM3  = 'Y"))
    fails(path, survey(), "column 3 has the unknown format 'Y'")
    path.write_bytes(whole.replace(b"TFORM3  =", b"COMMENT x"))
    fails(path, survey(), "header is damaged", "TFORM3")


# --- gzip ------------------------------------------------------------------------------------


def test_a_gzipped_fits_file_is_decompressed_once(tmp_path, monkeypatch):
    raw = write_fits(tmp_path / "a.fits", rows(50)).read_bytes()
    path = tmp_path / "a.fits.gz"
    path.write_bytes(gzip.compress(raw))
    scratch = tmp_path / "scratch"
    first = open_source(path, survey(), 0, scratch)
    assert first.path == str(path)
    assert Path(first.data_path).read_bytes() == raw
    assert [item.name for item in scratch.iterdir()] == [Path(first.data_path).name]
    monkeypatch.setattr("uuid.uuid4", None)  # would be called to write again
    assert open_source(path, survey(), 0, scratch) == first


@pytest.mark.parametrize("kind", ["fits", "csv"])
@pytest.mark.parametrize("damage", ["half", "trailer", "crc", "tiny"])
def test_damaged_gzip(tmp_path, kind, damage):
    data = rows(20000)
    plain = tmp_path / "plain"
    (write_fits if kind == "fits" else write_csv)(plain, data)
    packed = bytearray(gzip.compress(plain.read_bytes()))
    if damage == "crc":
        packed[-5] ^= 1
    else:
        del packed[{"half": len(packed) // 2, "trailer": len(packed) - 4, "tiny": 15}[damage] :]
    path = tmp_path / f"a.{kind}.gz"
    path.write_bytes(packed)
    fails(path, survey(), "Download it again")
    assert not list(tmp_path.glob("scratch/*"))


def test_scratch_that_cannot_be_written(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(write_fits(tmp_path / "a", rows(3)).read_bytes()))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot decompress"):
        open_source(path, survey(), 0, tmp_path / "file")


# --- delimited text --------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", "|", ";", "\t"])
def test_delimiters(tmp_path, delimiter):
    path = write_csv(tmp_path / "a", rows(5), delimiter)
    assert read(path, survey()).column("obs_id") == rows(5)["obsid"].tolist()


def test_delimiters_inside_quotes(tmp_path):
    text = '"a,b,c,d,e,f,g,h,i"|obsid|ra|dec|teff|logg|feh\n"x|y"|1|2|3|5000|4|0\n'
    (tmp_path / "a").write_text(text)
    assert read(tmp_path / "a", survey()).column("ra") == [2.0]


@pytest.mark.parametrize("before", ["\ufeff", "", "\r\n\r\n"])
def test_bom_crlf_blank_lines_and_padding(tmp_path, before):
    lines = [
        before + "obsid, ra ,dec,teff,logg,feh",
        "1, 10.5 ,+20,5000,4,",
        "",
        "",
        " 2,1e1,-2e1,nan,null,-1",
    ]
    (tmp_path / "a").write_bytes("\r\n".join(lines).encode())
    out = read(tmp_path / "a", survey())
    assert out.column("ra") == [10.5, 10.0]
    assert out.column("dec") == [20.0, -20.0]
    assert out.column("teff") == [5000.0, None]
    assert out.column("logg") == [4.0, None]
    assert out.column("feh") == [None, -1.0]


def test_words_for_missing_values(tmp_path):
    data: dict = {name: [v, v, v] for name, v in zip(NAMES, (0, 10, 20, 5000, 4, 0), strict=True)}
    data |= {"obsid": [1, 2, 3], "teff": ["--", "99", 5000], "class": ["null", "--", "G5"]}
    definition = survey(
        extra={"class": {"source": "class", "dtype": "string"}}, missing_text=["--", "99"]
    )
    out = read(write_csv(tmp_path / "a", data), definition)
    assert out.column("teff") == [None, None, 5000.0]
    assert out.column("class") == ["null", None, "G5"]
    assert out.profile.impossible_values() == {}


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("teff", "abc", ["'abc' is not a number", 'missing_text = ["abc"]']),
        ("ra", "12:34:56.7", ["is not a number", "Sexagesimal"]),
        ("obsid", "17b", ["'17b' is not an integer"]),
        ("obsid", "1.5", ["1.5 is no integer"]),
        ("obsid", "1e300", ["digits are lost"]),
        ("obsid", "9007199254740992.0", ["digits are lost"]),
        ("obsid", "99999999999999999999", ["does not fit into 64 bits"]),
        ("gaia", "2.59434115080651e18", ["id '2.59434115080651e18' is stored as float"]),
        ("gaia", "2594341150806513152.0", ["digits are lost"]),
        ("gaia", "17.0", ["digits are lost"]),
    ],
)
@pytest.mark.parametrize("gzipped", [False, True])
def test_bad_values_are_named_with_their_row(tmp_path, column, value, words, gzipped):
    data = {name: array.tolist() for name, array in rows(5000).items()}
    data["gaia"] = [""] + ["5"] * 4999
    data[column][4321] = value
    data[column][4800] = "also bad"
    path = write_csv(tmp_path / "a", data)
    text = path.read_text().replace("\n", "\n\n", 3)  # blank lines count as lines, not as rows
    path.write_bytes(gzip.compress(text.encode()) if gzipped else text.encode())
    definition = survey({"gaia_dr3_source_id": {"source": "gaia"}})
    if gzipped:
        definition = survey({"gaia_dr3_source_id": {"source": "gaia"}}, position_epoch=2016.0)
    source = open_source(path, definition, 0, tmp_path)
    with pytest.raises(SurveyError) as caught:
        for batch in read_chunk(plan_chunks(source)[0], definition, 1000, quality=quality_mask):
            assert batch.profile.n_rows == 1000
    for word in [str(path), f"column '{column}'", "row 4321 (line 4326)", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(("first", "second"), [("1e400x", "9" * 20), ("9" * 20, "x"), ("1.5", "x")])
def test_the_first_of_several_bad_integers_is_named(tmp_path, first, second):
    data = {name: array.tolist() for name, array in rows(50).items()}
    data["obsid"][5], data["obsid"][10], data["obsid"][20] = "7.0", first, second
    fails(write_csv(tmp_path / "a", data), survey(), "row 10 (line 12)", first)


def test_integers_written_as_floats(tmp_path):
    data = rows(4) | {"obsid": ["5.0", "7", "+9", "1e3"], "spid": ["1.0", "", "nan", "-9999.0"]}
    definition = survey(extra={"spid": {"source": "spid", "dtype": "int64"}})
    out = read(write_csv(tmp_path / "a", data), definition)
    assert out.column("obs_id") == [5, 7, 9, 1000]
    assert out.column("spid") == [1, None, None, None]


@pytest.mark.parametrize(("line", "n"), [("1,2,3", 3), ("1,2,3,5000,4,0,9", 7)])
def test_ragged_rows(tmp_path, line, n):
    path = write_csv(tmp_path / "a", rows(400))
    lines = path.read_text().splitlines()
    lines[301] = line
    path.write_text("\n".join(lines) + "\n")
    fails(path, survey(), f"line 302 has {n} fields, the header has 6")


def test_a_text_file_cut_in_the_middle_of_a_row(tmp_path):
    path = write_csv(tmp_path / "a", rows(100))
    path.write_text(path.read_text()[:-40])
    fails(path, survey(), "fields, the header has 6")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"\xef\xbb\xbf \n\n", ["is empty"]),
        (b"obsid,ra,dec,teff,logg,feh\n", ["has no rows"]),
        (b"obsid,ra,dec,teff,logg,feh", ["has no rows"]),
        (b"obsid,ra,dec,teff,logg,feh\n\n  \n", ["has no rows"]),
        (b"obsid,ra,ra,teff,logg,feh\n1,2,3,4,5,6\n", ["column 'ra' is there 2 times"]),
        (b"obsid ra dec teff logg feh\n1 2 3 4 5 6\n", ["none of the delimiters"]),
        (b"obsid,ra,dek,teff,logg,feh\n1,2,3,4,5,6\n", ["no column 'dec'", "dek"]),
        (b"<!DOCTYPE html>\n<html><body>404</body>", ["is a web page"]),
        (b"PK\x03\x04rest", ["is zip-compressed"]),
        (b"BZh91AY", ["is bzip2-compressed"]),
        (b"\x89HDF\r\n\x1a\n\0\0\0", ["is neither FITS"]),
        ("obsid,ra,dec,teff,logg,feh\n1,2,3".encode("utf-16"), ["is neither FITS"]),
        (b"PAR1rubbish", ["not a readable Parquet file"]),
        (b"<?xml version='1.0'?><VOTABLE><RESOURCE>", ["not a readable VOTable"]),
        (b"\x1f\x8bnonsense", ["damaged gzip"]),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, words):
    (tmp_path / "a").write_bytes(content)
    fails(tmp_path / "a", survey(), *words)


def test_missing_file_and_directory(tmp_path):
    fails(tmp_path / "gone.fits", survey(), "does not exist")
    (tmp_path / "folder").mkdir()
    fails(tmp_path / "folder", survey(), "is a directory")


def test_bytes_that_are_not_utf8(tmp_path):
    text = "obsid,ra,dec,teff,logg,feh,name\n1,2,3,5000,4,0,Ángel\n"
    (tmp_path / "a").write_bytes(text.encode("latin-1"))
    definition = survey(extra={"name": {"source": "name", "dtype": "string"}})
    assert read(tmp_path / "a", definition).column("name") == ["Ángel"]


# --- Parquet and VOTable ---------------------------------------------------------------------


def test_parquet_types(tmp_path):
    import decimal

    n = 3
    table = {
        "gaia": pa.array(["5", None, "2594341150806513152"]).dictionary_encode(),
        "large": pa.array(["a", None, " c "], pa.large_string()),
        "view": pa.array(["a", None, "c"], pa.string_view()),
        "bytes": pa.array([b"a", None, b"c"]),
        "flag": pa.array([True, None, False]),
        "half": pa.array(np.array([1.5, 2, 3], np.float16)),
        "money": pa.array([decimal.Decimal("1.25"), None, decimal.Decimal("3.50")]),
        "whole": pa.array([decimal.Decimal(7), None, decimal.Decimal(9)], pa.decimal128(20, 0)),
        "none": pa.nulls(n),
        "vector": pa.array([[1.0, 2.0], None, [5.0, 6.0]]),
        "fixed": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int32(), 2)),
        "time": pa.array([1, 2, 3], pa.timestamp("s")),
        "u8": pa.array([1, None, 2**40], pa.uint64()),
    }
    pq.write_table(pa.table(rows(n) | table), tmp_path / "a", row_group_size=2)
    extra: dict = {name: {"source": name, "dtype": "string"} for name in ("large", "view", "bytes")}
    extra |= {name: {"source": name, "dtype": "int64"} for name in ("flag", "whole", "none", "u8")}
    extra |= {name: {"source": name} for name in ("half", "money")}
    extra |= {name: {"source": name, "element": 1} for name in ("vector", "fixed")}
    definition = survey({"gaia_dr3_source_id": {"source": "gaia"}}, extra=extra)
    out = read(tmp_path / "a", definition)
    assert out.column("gaia_dr3_source_id") == [5, None, 2594341150806513152]
    for name in ("large", "view", "bytes"):
        assert out.column(name) == ["a", None, "c"]
    assert out.column("flag") == [1, None, 0]
    assert out.column("half") == [1.5, 2.0, 3.0]
    assert out.column("money") == [1.25, None, 3.5]
    assert out.column("whole") == [7, None, 9]
    assert out.column("none") == [None] * 3
    assert out.column("u8") == [1, None, 2**40]
    assert out.column("vector") == [2.0, None, 6.0]
    assert out.column("fixed") == [2.0, 4.0, 6.0]
    fails(tmp_path / "a", survey(extra={"t": {"source": "time"}}), "'time'", "timestamp[ms]")
    fails(tmp_path / "a", survey(extra={"t": {"source": "vector"}}), "is a vector")
    beyond = survey(extra={"t": {"source": "vector", "element": 2}})
    fails(tmp_path / "a", beyond, "'vector' has no element 2")


def test_parquet_is_cut_between_row_groups(tmp_path):
    table = pa.table(rows(100))
    with pq.ParquetWriter(tmp_path / "a", table.schema) as writer:
        for start, stop in ((0, 30), (30, 30), (30, 45), (45, 95), (95, 100), (100, 100)):
            writer.write_table(table.slice(start, stop - start))
    source = open_source(tmp_path / "a", survey(), 0, tmp_path)
    assert [(c.start, c.stop) for c in plan_chunks(source, 45)] == [(0, 45), (45, 95), (95, 100)]
    assert [(c.start, c.stop) for c in plan_chunks(source, 1)][-1] == (95, 100)
    assert [(c.start, c.stop) for c in plan_chunks(source)] == [(0, 100)]
    out = read(tmp_path / "a", survey(), chunk_rows=45, batch_rows=7)
    assert out.column("_row") == list(range(100))
    assert out.column("obs_id") == rows(100)["obsid"].tolist()
    assert max(batch.profile.n_rows for batch in out.batches) == 7


def test_truncated_parquet(tmp_path):
    pq.write_table(pa.table(rows(1000)), tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[:-100])
    fails(tmp_path / "a", survey(), "not a readable Parquet file")
    (tmp_path / "a").write_bytes(whole[:100] + b"\xff" * 2000 + whole[2100:])
    fails(tmp_path / "a", survey(), "cannot be read")


def test_votable_masks_and_types(tmp_path):
    table = Table(rows(3))
    table["gaia"] = MaskedColumn([5, 6, 7], mask=[False, True, False], dtype=np.int64)
    table["rv"] = MaskedColumn([1.5, 2.5, 3.5], mask=[True, False, False])
    table["flag"] = np.array([True, False, True])
    table["name"] = ["a", "", "c"]
    table["vector"] = np.arange(6.0).reshape(3, 2)
    table.write(tmp_path / "a", format="votable")
    extra = {
        "flag": {"source": "flag", "dtype": "int64"},
        "name": {"source": "name", "dtype": "string"},
        "v": {"source": "vector", "element": 1},
    }
    columns = {"gaia_dr3_source_id": {"source": "gaia"}, "rv": {"source": "rv"}}
    out = read(tmp_path / "a", survey(columns, extra=extra), batch_rows=2)
    assert out.column("gaia_dr3_source_id") == [5, None, 7]
    assert out.column("rv") == [None, 2.5, 3.5]
    assert out.column("flag") == [1, 0, 1]
    assert out.column("name") == ["a", None, "c"]
    assert out.column("v") == [1.0, 3.0, 5.0]


# --- columns that would give wrong values ----------------------------------------------------


@pytest.mark.parametrize("kind", ["fits-D", "fits-E", "parquet", "votable"])
def test_ids_that_are_stored_as_floats(tmp_path, kind):
    data = rows(3) | {"gaia": np.full(3, 2594341150806513152.0)}
    path = tmp_path / "a"
    if kind.startswith("fits"):
        data["gaia"] = data["gaia"].astype("f4" if kind == "fits-E" else "f8")
        write_fits(path, data)
    elif kind == "parquet":
        pq.write_table(pa.table(data), path)
    else:
        Table(data).write(path, format="votable")
    definition = survey({"gaia_dr3_source_id": {"source": "gaia"}})
    fails(path, definition, "column 'gaia' is stored as float: digits are lost")


def test_other_integers_stored_as_floats(tmp_path):
    data = rows(3) | {"obsid": np.array([5.0, 2.0**53 - 1, -9999])}
    out = read(write_fits(tmp_path / "a", data), survey())
    assert out.column("obs_id") == [5, 2**53 - 1]
    data["obsid"][1] = 2.0**53
    fails(write_fits(tmp_path / "b", data), survey(), "column 'obsid', row 1", "digits are lost")
    data["obsid"][1] = 1.5
    fails(write_fits(tmp_path / "c", data), survey(), "row 1", "1.5 is no integer")
    data["obsid"] = np.array([5, 2**24 - 1, 2**24], dtype=np.float32)
    fails(write_fits(tmp_path / "d", data), survey(), "row 2", "digits are lost")


@pytest.mark.parametrize(
    ("column", "unit", "words"),
    [
        ("teff", "kK", ["is in 'kK', the survey says 'K'", 'unit = "kK" in [columns.teff]']),
        ("ra", "hourangle", ["the survey says 'deg'", "[columns.ra]"]),
        ("ra", "h", ["is in 'h'", 'unit = "hourangle"']),
        ("dec", "rad", ["is in 'rad'"]),
        ("rv", "m/s", ["the survey says 'km/s'"]),
    ],
)
@pytest.mark.parametrize("kind", ["fits", "votable"])
def test_other_units_than_the_survey_says(tmp_path, column, unit, words, kind):
    data = rows(3) | {"rv": np.zeros(3)}
    path = tmp_path / "a"
    if kind == "fits":
        write_fits(path, data, {column: unit})
    else:
        table = Table(data)
        table[column].unit = unit
        table.write(path, format="votable")
    fails(path, survey({"rv": {"source": "rv"}}), f"column '{column}'", *words)


@pytest.mark.parametrize(
    "units",
    [
        {"ra": "degree", "dec": "deg", "teff": "K", "logg": "log(cm/s2)", "feh": "dex"},
        {"ra": "decimal degrees", "teff": "Kelvins", "logg": "dex", "feh": "[Sun]"},
    ],
)
def test_equal_and_unknown_units_pass(tmp_path, units):
    assert read(write_fits(tmp_path / "a", rows(3), units), survey()).rows.num_rows == 3


def test_missing_columns(tmp_path):
    data = rows(3)
    data["teff_k"] = data.pop("teff")
    path = write_fits(tmp_path / "a", data)
    error = fails(path, survey(), "no column 'teff', which 'teff' is made from")
    assert "teff_k" in error.hint
    definition = survey({"snr": {"source": ["q1", "q2"]}, "teff": {"source": "teff_k"}})
    error = fails(path, definition, "no column 'q1' or 'q2'")
    assert "It has: obsid, ra, dec, logg, feh, teff_k." in error.hint
    joined = survey(
        {"obs_id": {"join": ["obsid", "plate"], "dtype": "string"}, "teff": {"source": "teff_k"}}
    )
    fails(path, joined, "no column 'plate', which 'obs_id' is made from")


def test_a_fits_table_without_rows(tmp_path):
    empty = {name: array[:0] for name, array in rows(1).items()}
    fails(write_fits(tmp_path / "a", empty), survey(), "has no rows")
    pq.write_table(pa.table(empty), tmp_path / "b")
    fails(tmp_path / "b", survey(), "has no rows")
    Table(empty).write(tmp_path / "c", format="votable")
    fails(tmp_path / "c", survey(), "has no rows")


# --- profiles --------------------------------------------------------------------------------


def profile_of(tmp_path, data: dict, definition: Survey | None = None, **kwargs):
    return read(write_fits(tmp_path / "data", data), definition or survey(), **kwargs).profile


def test_profiles_do_not_depend_on_chunks_and_survive_json(tmp_path):
    data = rows(200)
    data["teff"][::7] = 3.7
    data["ra"][::50] = 400
    whole = profile_of(tmp_path, data)
    parts = read(tmp_path / "data", survey(), chunk_rows=60, batch_rows=17).batches
    profiles = [batch.profile for batch in parts]
    for order in (profiles, profiles[::-1], [Profile(), *profiles]):
        assert Profile.merge(order) == whole
    assert Profile.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
    assert Profile.from_dict(json.loads(json.dumps(Profile().to_dict()))) == Profile.merge([])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2e5, 2e5, width=32), min_size=1))
def test_medians(values):
    bins = np.array(values, np.float32).view(np.int32) >> ingest._LABEL_SHIFT
    median = Profile(labels={"feh": ingest._binned(bins)}).median("feh")
    expected = float(np.sort(np.array(values, np.float32))[(len(values) - 1) // 2])
    assert median == pytest.approx(expected, rel=0.05, abs=1e-37)


def test_a_good_file_passes(tmp_path):
    profile = profile_of(tmp_path, rows(200))
    check_profile(profile, survey(), ["data"])
    assert profile.median("teff") == pytest.approx(np.median(rows(200)["teff"]), rel=0.04)
    assert sum(profile.ra_histogram.values()) == 200
    assert set(profile.ra_histogram) <= set(range(24))


def refused(profile: Profile, *words: str, definition: Survey | None = None) -> None:
    with pytest.raises(SurveyError) as caught:
        check_profile(profile, definition or survey(), ["a/data.fits", "b/data.fits"])
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_logarithm_of_temperature_is_refused(tmp_path):
    data = rows(100)
    data["teff"] = np.log10(data["teff"])
    data["teff"][:60] = -9999
    profile = profile_of(tmp_path, data)
    refused(
        profile, "a/data.fits", "'teff'", "looks like log10 of a temperature: its median is 3.6"
    )


def test_other_units_are_noticed_by_the_values(tmp_path):
    data = rows(100)
    data["teff"] /= 1000
    data["teff"][0] = 5.0
    refused(profile_of(tmp_path, data), "'teff'", "100 of 100", "1000 to 100000 K", "row 0")
    data = rows(100)
    data["logg"] += 20
    data["logg"][:3] = 4
    refused(profile_of(tmp_path, data, index=1), "b/data.fits", "97 of 100", "-2 to 10", "in row 3")
    data = rows(100)
    data["feh"] = 10 ** data["feh"] * 1e3
    refused(profile_of(tmp_path, data), "column 'feh' ('feh')", "[columns.feh]")


def test_a_label_without_values_is_refused(tmp_path):
    data = rows(100)
    data["feh"][:] = -9999
    refused(profile_of(tmp_path, data), "column 'feh'", "no value in any row", "[columns.feh]")
    data["feh"][7] = 0
    check_profile(profile_of(tmp_path, data), survey(), ["data"])


def test_right_ascension_in_hours_is_refused(tmp_path):
    data = rows(100)
    data["ra"] /= 15
    refused(profile_of(tmp_path, data), "column 'ra'", "hours", 'unit = "hourangle"')
    small = {name: array[:49] for name, array in data.items()}
    check_profile(profile_of(tmp_path, small), survey(), ["data"])
    strip = data | {"dec": data["dec"] / 18}
    check_profile(profile_of(tmp_path, strip), survey(), ["data"])


def test_many_rejected_rows_are_refused(tmp_path):
    data = rows(1000)
    data["dec"][100:110] = -99.0
    check_profile(profile_of(tmp_path, data), survey(), ["data"])
    data["ra"][50] = np.nan
    profile = profile_of(tmp_path, data)
    words = [
        "11 of 1000",
        "10 dec out of range",
        "1 null position",
        "a/data.fits row 50",
        "ra null",
    ]
    refused(profile, *words, "max_rejected_fraction")
    check_profile(profile, survey(max_rejected_fraction=0.02), ["data"])
    few = {name: array[50:51] for name, array in data.items()}
    refused(profile_of(tmp_path, few), "1 of 1 rows")


# --- merging ---------------------------------------------------------------------------------


def ipc_bytes(table: pa.Table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


VALUE = st.sampled_from([None, 0.0, 1.0])
OBSERVATION = st.tuples(
    st.sampled_from(["a", "b", "é", "longer than eight bytes 1", "longer than eight bytes 2"]),
    st.sampled_from([(0.0, 90.0), (10.0, 0.0)]),
    st.sampled_from([None, 4000.0, 5000.0]),
    VALUE,
    VALUE,
    VALUE,
    st.sampled_from([0, 1, 3, 4]),
)
MERGE_SURVEY = survey(
    {"obs_id": {"source": "obsid", "dtype": "string"}, "snr": {"source": "snr"}},
    cuts={f"c{i}": {"bit": i, "column": "flag", "bits_unset": [i]} for i in range(3)},
    missing=[],
)


def write_observations(path: Path, items: list) -> None:
    names = ("obsid", "place", "teff", "logg", "feh", "snr", "flag")
    data = dict(zip(names, zip(*items, strict=True), strict=True))
    ra, dec = zip(*data.pop("place"), strict=True)
    columns = {name: pa.array(values) for name, values in data.items()}
    for name in ("teff", "logg", "feh", "snr"):
        columns[name] = columns[name].cast(pa.float64())
    pq.write_table(pa.table(columns | {"ra": ra, "dec": dec}), path, row_group_size=3)


def preferred(items: list) -> tuple:
    """The rule of the docstring, row by row."""

    def key(item):
        content = [item[1], *item[2:]]
        flat = [(value is not None, value or 0) for value in (*item[2:6],)]
        return (
            -sum(value is not None for value in content),
            bin(item[6]).count("1"),
            -(item[5] if item[5] is not None else -np.inf),
            ang2pix(np.array([item[1][0]]), np.array([item[1][1]]))[0],
            flat,
            item[6],
        )

    return min(items, key=key)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(OBSERVATION, min_size=1, max_size=25), st.randoms(use_true_random=False))
def test_merging_depends_on_the_rows_alone(tmp_path_factory, items, random):
    folder = tmp_path_factory.mktemp("merge")
    shuffled = items.copy()
    random.shuffle(shuffled)
    cut = random.randint(0, len(items) - 1)
    outputs = []
    for number, files in enumerate(([items], [shuffled[cut:], shuffled[:cut]])):
        batches = []
        for index, content in enumerate(part for part in files if part):
            path = folder / f"{number}-{index}"
            write_observations(path, content)
            sizes = {"chunk_rows": random.randint(1, 9), "batch_rows": random.randint(1, 9)}
            batches += read(path, MERGE_SURVEY, index=index, **sizes).batches
        random.shuffle(batches)
        tables = [batch.rows for batch in batches]
        keys = conflicting_keys(tables)
        everything = pa.concat_tables(tables)
        lost = losing_rows(everything.filter(pc.is_in(everything["obs_id"], value_set=keys)))
        marks = set(zip(lost["_file"].to_pylist(), lost["_row"].to_pylist(), strict=True))
        tables = [
            table.filter(
                pa.array(
                    [
                        (f, r) not in marks
                        for f, r in zip(
                            table["_file"].to_pylist(), table["_row"].to_pylist(), strict=True
                        )
                    ],
                    pa.bool_(),
                )
            )
            for table in tables
        ]
        merged = merge_rows(tables, ["x", "y"])
        rejected = pa.concat_tables(
            [merged.rejected, rejected_rows(lost, "conflicting obs_id", ["x", "y"])]
        )
        assert merged.rows.num_rows + merged.n_duplicates + rejected.num_rows == len(items)
        assert set(rejected["reason"].to_pylist()) <= {"conflicting obs_id"}
        ids = rejected["obs_id"].to_pylist()
        outputs.append((ipc_bytes(merged.rows), merged.n_duplicates, sorted(ids)))
        assert merged.rows.schema.equals(MERGE_SURVEY.arrow_schema(), check_metadata=True)
    assert outputs[0] == outputs[1]
    for row in merged.rows.to_pylist():
        best = preferred([item for item in items if item[0] == row["obs_id"]])
        found = (row["ra"], row["dec"], row["teff"], row["logg"], row["feh"], row["snr"])
        assert found == (*best[1], *best[2:6])
        assert row["quality"] == best[6]
    assert sorted(merged.rows["obs_id"].to_pylist()) == sorted({item[0] for item in items})


def test_exact_duplicates_are_dropped_and_conflicts_rejected(tmp_path):
    data = rows(6)
    for name in data:
        data[name][1] = data[name][0]  # an exact repeat
        data[name][3] = data[name][2]
        data[name][5] = data[name][4]
    data["feh"][3] += 0.5
    data["teff"][4] = -9999  # fewer values than row 5
    batches = read(write_fits(tmp_path / "a", data), survey(), chunk_rows=1).batches
    merged = merge_rows([batch.rows for batch in batches], ["a.fits"])
    assert merged.n_duplicates == 1
    assert merged.rows.num_rows == 3
    assert "_row" not in merged.rows.column_names
    assert merged.rejected["row"].to_pylist() == [3, 4]  # of 2 and 3 the smaller [Fe/H] stays
    assert merged.rejected["reason"].to_pylist() == ["conflicting obs_id"] * 2
    assert merged.rejected["file"].to_pylist() == ["a.fits"] * 2
    assert merged.rejected["ra"].to_pylist() == [data["ra"][3], data["ra"][4]]
    assert merged.rejected["obs_id"].to_pylist() == [str(data["obsid"][i]) for i in (3, 4)]


def test_duplicates_of_a_row_with_nulls(tmp_path):
    data = rows(3)
    for name in data:
        data[name][:] = data[name][0]
    data["feh"][:2] = np.nan
    data["feh"][2] = 0.0  # a null is not 0
    merged = merge_rows([read(write_fits(tmp_path / "a", data), survey()).rows], ["a"])
    assert (merged.rows.num_rows, merged.n_duplicates, merged.rejected.num_rows) == (1, 0, 2)
    assert merged.rows["feh"].to_pylist() == [0.0]


def write_pieces(folder: Path, tables: list[pa.Table]) -> list[Path]:
    paths = []
    for number, table in enumerate(tables):
        paths.append(folder / f"{number}.arrow")
        with pa.OSFile(str(paths[-1]), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    return paths


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("n_buckets", [1, 3])
def test_keys_at_several_places_as_by_brute_force(tmp_path, text, n_buckets):
    rng = np.random.default_rng(3)
    ids, cells = rng.integers(-40, 40, 120), rng.integers(0, 3, 120) + 7
    keys = pa.array([f"{'x' * (abs(i) % 13)}{i}" for i in ids]) if text else pa.array(ids)
    table = pa.table({"_healpix_29": cells, "obs_id": keys, "other": np.zeros(120)})
    places: dict = {}
    for key, cell in zip(keys.to_pylist(), cells.tolist(), strict=True):
        places.setdefault(key, set()).add(cell)
    expected = {key for key, found in places.items() if len(found) > 1}
    pieces = write_pieces(tmp_path, [table.slice(0, 50), table.slice(50, 0), table.slice(50)])
    found = [conflicting_keys(pieces, bucket, n_buckets) for bucket in range(n_buckets)]
    together = [key for keys in found for key in keys.to_pylist()]
    assert sorted(together) == sorted(expected)
    assert all(keys.to_pylist() == sorted(keys.to_pylist()) for keys in found)
    assert all(keys.type == keys_type for keys in found for keys_type in [table["obs_id"].type])
    assert len(found[-1]) > 0
    tables = [table.slice(i, 13) for i in range(0, 120, 13)]  # with offsets, not from files
    assert conflicting_keys(tables).to_pylist() == sorted(expected)


def test_texts_that_share_a_hash_are_not_the_same_key(monkeypatch):
    monkeypatch.setattr(ingest, "_hashes", lambda ids: np.zeros(len(ids), np.uint64))
    table = pa.table({"obs_id": ["a", "b", "c", "c"], "_healpix_29": [1, 2, 3, 4]})
    assert conflicting_keys([table]).to_pylist() == ["c"]


@settings(max_examples=50, deadline=None)
@example(["", "a", "a\0", "a" * 8, "a" * 8 + "\0"])
@given(st.lists(st.text(max_size=30)))
def test_hashes_of_text_differ_as_the_texts_do(texts):
    column = pa.array(["prefix", *texts], pa.string()).slice(1)
    hashes = ingest._hashes(column)
    assert len(set(hashes.tolist())) == len(set(texts))
    again = {text: ingest._hashes(pa.array([text]))[0] for text in texts}
    assert [again[text] for text in texts] == hashes.tolist()


def test_no_pieces_and_no_conflicts():
    assert len(conflicting_keys([])) == 0
    table = pa.table({"obs_id": ["a", "a"], "_healpix_29": [1, 1]})
    assert conflicting_keys([table]).type == pa.string()
    assert len(conflicting_keys([table])) == 0


@pytest.mark.parametrize("n_buckets", [1, 4])
def test_a_column_that_is_no_key_is_refused(n_buckets):
    n = 5000
    table = pa.table({"obs_id": ["plate 17"] * n, "_healpix_29": np.arange(n)})
    with pytest.raises(SurveyError, match=r"'obs_id' is no key.*plate 17") as caught:
        for bucket in range(n_buckets):
            conflicting_keys([table], bucket, n_buckets)
    assert "join" in caught.value.hint


def test_some_conflicts_are_allowed():
    check_conflicts(100, 100, "x")
    check_conflicts(101, 10100, "x")
    with pytest.raises(SurveyError, match="'uid' is no key: 102 of 10100 rows"):
        check_conflicts(102, 10100, "x", "uid")


def test_losing_rows_keeps_the_best_row_and_its_duplicates(tmp_path):
    data = rows(5)
    for name in ("obsid", "teff", "logg", "feh"):
        data[name][:4] = data[name][0]
    for name in ("ra", "dec"):
        data[name][1] = data[name][0]
    data["feh"][2] = -9999
    out = read(write_fits(tmp_path / "a", data), survey()).rows.slice(0)
    keys = conflicting_keys([out])
    assert keys.to_pylist() == [data["obsid"][0]]
    lost = losing_rows(out.filter(pc.is_in(out["obs_id"], value_set=keys)))
    winner = min((0, 3), key=lambda i: ang2pix(data["ra"][i : i + 1], data["dec"][i : i + 1])[0])
    assert lost["_row"].to_pylist() == ([2, 3] if winner == 0 else [0, 1, 2])
    assert losing_rows(out.slice(0, 0)).num_rows == 0


# --- real files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name", "n_rows", "n_stars", "n_good"),
    [
        ("lamost_dr3_giants.csv", "lamost-dr3-giants", 27125, 21960, None),
        ("apogee_dr17.csv", "apogee-dr17-subset", 56664, None, None),
        ("galah_dr4.csv", "galah-dr4-subset", 2018, None, None),
        ("galah_dr3_m67.csv", "galah-dr3-m67", 813, 813, None),
        ("lamost_pilot_native_columns.csv", "lamost-pilot", 3165, 3165, 1380),
        ("apogee_dr12_allstar_hipparcos.fits.gz", "apogee-dr12-hipparcos", 3244, 3244, None),
    ],
)
def test_real_files(real_data, tmp_path, file, name, n_rows, n_stars, n_good):
    definition = load_survey(name)
    source = open_source(real_data / file, definition, 0, tmp_path)
    batches = [
        batch
        for chunk in plan_chunks(source, 1000)
        for batch in read_chunk(chunk, definition, 900, quality=quality_mask)
    ]
    profile = Profile.merge([batch.profile for batch in batches])
    assert profile.n_rows == n_rows
    check_profile(profile, definition, [file])
    tables = [batch.rows for batch in batches]
    assert len(conflicting_keys(tables)) == 0
    merged = merge_rows(tables, [file])
    n_rejected = sum(batch.rejected.num_rows for batch in batches) + merged.rejected.num_rows
    assert merged.rows.num_rows + merged.n_duplicates + n_rejected == n_rows
    if n_stars is not None:
        assert merged.rows.num_rows == n_stars
    if n_good is not None:
        assert np.count_nonzero(merged.rows["quality"].to_numpy() == 0) == n_good
    whole = [
        batch
        for chunk in plan_chunks(source)
        for batch in read_chunk(chunk, definition, quality=quality_mask)
    ]
    assert ipc_bytes(merge_rows([b.rows for b in whole], [file]).rows) == ipc_bytes(merged.rows)


def test_real_lamost_duplicates(real_data, tmp_path):
    definition = load_survey("lamost-dr3-giants")
    out = read_real(real_data / "lamost_dr3_giants.csv", definition, tmp_path)
    assert merge_rows([out], ["a"]).n_duplicates == 5165


def read_real(path: Path, definition: Survey, scratch: Path) -> pa.Table:
    source = open_source(path, definition, 0, scratch)
    batches = read_chunk(plan_chunks(source)[0], definition, quality=quality_mask)
    return pa.concat_tables([batch.rows for batch in batches])


def test_real_fits_as_astropy_reads_it(real_data, tmp_path):
    path = real_data / "apogee_dr12_allstar_hipparcos.fits.gz"
    table = read_real(path, load_survey("apogee-dr12-hipparcos"), tmp_path)
    table = table.sort_by("_row")
    with fits.open(path) as hdus:
        native = hdus[1].data
        assert table["obs_id"].to_pylist() == [s.strip() for s in native["APSTAR_ID"]]
        assert table["ra"].to_pylist() == native["RA"].tolist()
        for name, values in (
            ("teff", native["TEFF"]),
            ("feh", native["FE_H"]),
            ("m_h", native["PARAM"][:, 3]),
        ):
            known = table[name].is_valid().to_numpy()
            bad = (values < -9998) | ~np.isfinite(values)
            assert (known == ~bad).all()
            assert table[name].to_numpy()[known].tolist() == values[known].tolist()
        labels = ("teff", "logg", "feh")
        valid = np.all([table[name].is_valid().to_numpy() for name in labels], axis=0)
        assert np.count_nonzero(valid) == 771
        star_bad = (native["ASPCAPFLAG"] & (1 << 23)) != 0
        assert ((table["quality"].to_numpy() & 1) != 0).tolist() == star_bad.tolist()
