import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.errors import SurveyError
from sos_dask.ingest.canonical import plan_chunks, read_chunk
from sos_dask.ingest.fits import _text
from sos_dask.ingest.reader import open_source, read_native
from tests.survey_files import fails, read, rows, survey, write_fits


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
        fits.Column("far", "QJ()", array=np.array([[1]] * n, dtype=object)),
        fits.Column("wide", "2M", array=np.zeros((n, 2), np.complex128)),
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
    forms = {"bits": "11X", "complex": "2C", "lists": "PJ(1)", "far": "QJ(1)", "wide": "2M"}
    for name, form in forms.items():
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
    fails(tmp_path / "b", survey(hdu=1), "HDU 1 is not a binary table", "2 '' (3 rows)")
    assert read(tmp_path / "b", survey()).rows.num_rows == 3  # the only table
    fits.PrimaryHDU(np.zeros(3)).writeto(tmp_path / "c")
    fails(tmp_path / "c", survey(), "contains no binary table")


@pytest.mark.parametrize("cut", [1, 100, 2881, 5000])
def test_truncated_fits(tmp_path, cut):
    whole = write_fits(tmp_path / "a", rows(2000)).read_bytes()
    need = 2 * 2880 + 2000 * (8 + 8 + 8 + 12)
    path = tmp_path / "cut"
    path.write_bytes(whole[: need - cut])
    fails(path, survey(), f"truncated: {need - cut} bytes", f"asks for {need}")
    path.write_bytes(whole[:need])  # only the padding is gone
    assert read(path, survey()).rows.num_rows == 2000


def test_a_truncated_heap(tmp_path):
    lists = fits.Column("lists", "PJ()", array=np.array([[1] * 1500] * 3, dtype=object))
    columns = [*fits.BinTableHDU(Table(rows(3))).columns, lists]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    assert read(tmp_path / "a", survey()).rows.num_rows == 3
    (tmp_path / "b").write_bytes(whole[:-2880])
    fails(tmp_path / "b", survey(), "is truncated")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = write_fits(tmp_path / "a", rows(2000))
    chunk = plan_chunks(open_source(path, survey(), 0, tmp_path))[0]
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(SurveyError, match="became shorter"):
        list(read_chunk(chunk, survey()))


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


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab \0", max_size=9), min_size=1, max_size=20))
def test_text_ends_at_a_nul_and_has_no_padding(words):
    found = _text(np.array(words, "S9")).to_pylist()
    assert found == [word.rstrip(" \0").split("\0")[0] for word in words]


def side_by_side(path, tables):
    """FITS file of several tables."""
    hdus = fits.HDUList([fits.PrimaryHDU()])
    for name, data in tables.items():
        one = write_fits(path.with_name("one"), data)
        with fits.open(one) as opened:
            hdus.append(fits.BinTableHDU(opened[1].data.copy(), opened[1].header, name=name))
    hdus.writeto(path, overwrite=True)
    return path


def aligned(n=10, seed=0):
    """Two tables that belong together, and the one that both make."""
    data, rng = rows(n, seed), np.random.default_rng(seed)
    one = {name: data[name] for name in ("obsid", "ra", "dec")}
    two = {
        "OBSID": data["obsid"].astype(np.int32),
        "ra": np.zeros(n),
        "name": rng.integers(0, 9, n).astype("U3"),
    }
    return one, two | {name: data[name] for name in ("teff", "logg", "feh")}


def beside():
    columns = {name: {"source": [name, f"B.{name}"]} for name in ("ra", "teff", "logg", "feh")}
    extra = {"name": {"source": "B.name", "dtype": "string"}}
    return survey(columns, hdu=1, beside=["B"], extra=extra)


@pytest.mark.parametrize(("chunk", "batch"), [(1_000_000, 1_000_000), (7, 1_000), (1_000, 3)])
def test_tables_side_by_side_are_one(tmp_path, chunk, batch):
    one, two = aligned(40_000 if chunk > 1000 else 20)
    path = side_by_side(tmp_path / "a", {"A": one, "C": {"x": np.zeros(3)}, "B": two})
    whole = write_fits(tmp_path / "b", two | one)
    plain = survey(extra={"name": {"source": "name", "dtype": "string"}})
    found, wanted = read(path, beside(), chunk, batch), read(whole, plain)
    assert found.rows.num_rows == len(one["obsid"])
    for name in found.rows.column_names:
        assert found.column(name) == wanted.column(name)


def test_tables_that_do_not_belong_together_are_refused(tmp_path):
    one, two = aligned()
    fewer = {name: values[:-1] for name, values in two.items()}
    path = side_by_side(tmp_path / "a", {"A": one, "B": fewer})
    words = "HDU 1 'A' (10 rows) and HDU 2 'B' (9 rows) do not belong together row by row"
    fails(path, beside(), words)
    moved = two | {"OBSID": two["OBSID"].copy()}
    moved["OBSID"][[3, 7]] = moved["OBSID"][[7, 3]]
    path = side_by_side(tmp_path / "b", {"A": one, "B": moved})
    mine, other = one["obsid"][3], moved["OBSID"][3]
    fails(path, beside(), f"row 3: 'obsid' is {mine}, 'B.OBSID' is {other}")
    with pytest.raises(SurveyError, match=f"row 7: 'obsid' is {other}"):  # rows are of the file
        source = open_source(path, beside(), 0, tmp_path)
        list(read_native(source, 6, 10, 1))
    fails(side_by_side(tmp_path / "c", {"A": one, "D": two}), beside(), "no table 'B'")
    whole = path.read_bytes()
    path.write_bytes(whole[:-2880])
    fails(path, beside(), "is truncated")
