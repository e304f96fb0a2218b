"""Formats told by content, columns that a survey needs, decompressed copies."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import Table

from sos_dask.errors import StorageError, SurveyError
from sos_dask.ingest.reader import _refused, open_source
from tests.survey_files import fails, read, rows, survey, write_csv, write_fits


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"\xef\xbb\xbf \n\n", ["is empty"]),
        (b"obsid,ra,dec,teff,logg,feh\n", ["has no rows"]),
        (b"obsid,ra,dec,teff,logg,feh", ["has no rows"]),
        (b"obsid,ra,dec,teff,logg,feh\n\n  \n", ["has no rows"]),
        (b"obsid,ra,ra,teff,logg,feh\n1,2,3,4,5,6\n", ["column 'ra' is there 2 times"]),
        (b"obsid\n1\n", ["none of the delimiters"]),
        (b"obsid,ra,dec\r1,2,3\r", ["line 1, the header, has a line break"]),
        (b"# a\n# b\n", ["has no rows"]),
        (b"obsid,ra,dek,teff,logg,feh\n1,2,3,4,5,6\n", ["no column 'dec'", "dek"]),
        (b"<!DOCTYPE html>\n<html><body>404</body>", ["is a web page"]),
        (b"PK\x03\x04rest", ["is zip-compressed"]),
        (b"BZh91AY", ["is bzip2-compressed"]),
        (b"\x89HDF\r\n\x1a\n\0\0\0", ["is neither FITS"]),
        ("obsid,ra,dec,teff,logg,feh\n1,2,3".encode("utf-16"), ["is UTF-16 text"]),
        ("obsid,ra,dec,teff,logg,feh\n1,2,3".encode("utf-16-be"), ["is UTF-16 text"]),
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
    fails(write_fits(tmp_path / "c", data), survey(), "row 1", "1.5 is not an integer")
    data["obsid"] = np.array([5, 2**24 - 1, 2**24], dtype=np.float32)
    fails(write_fits(tmp_path / "d", data), survey(), "row 2", "digits are lost")


def stated(path, data, column, unit, kind):
    """A file that states the unit of a column."""
    if kind == "fits":
        return write_fits(path, data, {column: unit})
    table = Table(data)
    table[column].unit = unit
    with path.open("wb") as file:
        table.write(file, format="votable")
    return path


@pytest.mark.parametrize(
    ("column", "unit", "factor"),
    [
        ("teff", "kK", 1000),
        ("ra", "hourangle", 15),
        ("ra", "h", 15),
        ("dec", "rad", 180 / np.pi),
        ("rv", "m/s", 0.001),
        ("rv", "km.s-1", 1),
        ("phot_g_mean_mag", "mmag", 0.001),
    ],
)
@pytest.mark.parametrize("kind", ["fits", "votable"])
def test_units_that_the_file_states_are_converted(tmp_path, column, unit, factor, kind):
    """Sentinels and cuts mean what they mean in a file with the survey's own unit."""
    right = rows(5) | {"rv": np.array([-20.0, 3, -9999, 40, 0]), "phot_g_mean_mag": np.full(5, 14)}
    right["teff"][3] = -9999
    data = right | {column: np.where(right[column] == -9999, -9999, right[column] / factor)}
    definition = survey(
        {name: {"source": name} for name in ("rv", "phot_g_mean_mag")},
        cuts={name: {"bit": bit, "column": name, "min": 1.5} for bit, name in enumerate(right)},
    )
    found = read(stated(tmp_path / "a", data, column, unit, kind), definition)
    wanted = read(stated(tmp_path / "b", right, column, None, kind), definition)
    for name in found.rows.column_names:
        for one, other in zip(found.column(name), wanted.column(name), strict=True):
            if name != "_healpix_29":  # positions differ in their last digits
                assert one == (other if other is None else pytest.approx(other, rel=1e-6)), name


def test_of_two_units_that_a_column_may_have_the_file_decides(tmp_path):
    definition = survey({"rv": {"source": "rv", "unit": "m/s"}})
    for unit, value in ((None, 0.02), ("m/s", 0.02), ("km/s", 20)):
        path = write_fits(tmp_path / "a", rows(1) | {"rv": np.array([20.0])}, {"rv": unit})
        assert read(path, definition).column("rv") == [pytest.approx(value)]


@pytest.mark.parametrize(
    ("column", "unit", "hint"),
    [
        ("teff", "deg_C", "Correct the unit in [columns.teff]"),
        ("teff", "dex", "unknown_unit"),
        ("teff", "log(K)", "unknown_unit"),
        ("teff", "[K]", "unknown_unit"),
        ("teff", "dex(K)", "Correct the unit in [columns.teff]"),
        ("logg", "K", "Correct the unit in [columns.logg]"),
        ("feh", "km/s", "Correct the unit in [columns.feh]"),
        ("ra", "h:m:s", "unknown_unit"),
        ("dec", "h", "Correct the unit in [columns.dec]"),
        ("rv", "kms-1", "unknown_unit"),
        ("rv", "pixel", "unknown_unit"),
    ],
)
def test_units_that_do_not_convert_are_refused(tmp_path, column, unit, hint):
    path = write_fits(tmp_path / "a", rows(3) | {"rv": np.zeros(3)}, {column: unit})
    columns = {"rv": {"source": "rv"}}
    said = survey(columns).columns[column].unit
    words = f"column '{column}' is in '{unit}', the survey says '{said}'"
    assert hint in fails(path, survey(columns), words).hint
    if hint == "unknown_unit":
        allowed = survey(columns, allow=["unknown_unit"])
        assert read(path, allowed).rows.num_rows == 3


@pytest.mark.parametrize(
    "units",
    [
        {"ra": "degree", "dec": "deg", "teff": "K", "logg": "log(cm/s2)", "feh": "dex"},
        {"ra": "decimal degrees", "teff": "Kelvins", "logg": "dex", "feh": "[Sun]"},
        {"ra": "degrees", "logg": "cm/s**2", "feh": "[-]"},
        {"logg": "dex(cm/s2)", "feh": "log(Sun)"},
    ],
)
def test_equal_units_and_unknown_ones_of_logarithms_pass(tmp_path, units):
    found = read(write_fits(tmp_path / "a", rows(3), units), survey()).rows
    assert found.equals(read(write_fits(tmp_path / "b", rows(3)), survey()).rows)


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


def test_a_gzipped_fits_file_is_decompressed_once(tmp_path, monkeypatch):
    raw = write_fits(tmp_path / "a.fits", rows(50)).read_bytes()
    path = tmp_path / "a.fits.gz"
    path.write_bytes(gzip.compress(raw))
    scratch = tmp_path / "scratch"
    first = open_source(path, survey(), 0, scratch)
    assert first.path == str(path)
    assert Path(first.data_path).read_bytes() == raw
    name = Path(first.data_path).name
    assert sorted(item.name for item in scratch.iterdir()) == [name, f"{name}.json"]
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


@pytest.mark.parametrize(("error", "words"), [(KeyError(), "KeyError"), (ValueError("no"), "no")])
def test_whatever_a_reader_raises_says_which_file(error, words):
    with pytest.raises(SurveyError, match=f"^a.fits cannot be read: {words}\n"), _refused("a.fits"):
        raise error


@pytest.mark.parametrize(
    ("element", "words", "hint"),
    [
        (None, "column 'abundances' (for 'feh') is a vector of 3 values", "element = 0 is the"),
        (3, "column 'abundances' (for 'feh') has no element 3", "It has 3, from 0."),
    ],
)
def test_elements_of_vectors(tmp_path, element, words, hint):
    values = np.arange(30, dtype=np.float32).reshape(10, 3) / 100
    path = write_fits(tmp_path / "a", rows(10) | {"abundances": values})
    given = {} if element is None else {"element": element}
    error = fails(path, survey({"feh": {"source": "abundances", **given}}), words)
    assert hint in error.hint
    for good in (0, 2):
        definition = survey({"feh": {"source": "abundances", "element": good}})
        assert read(path, definition).column("feh") == pytest.approx(values[:, good].tolist())


def test_a_vector_of_no_values_has_no_element(tmp_path):
    values: list[list[float]] = [[] for _ in range(10)]
    table = pa.table(rows(10) | {"abundances": pa.array(values, pa.list_(pa.float32(), 0))})
    pq.write_table(table, tmp_path / "a")
    for element, words in ((None, "is a vector of 0 values"), (0, "has no element 0")):
        given = {} if element is None else {"element": element}
        fails(tmp_path / "a", survey({"feh": {"source": "abundances", **given}}), words)


def test_a_mask_that_is_no_flag_is_another_column(tmp_path):
    """Beside feh a column feh.mask: of booleans it says where feh is null, of numbers nothing."""
    for number, mask in enumerate((np.arange(10) % 3 == 0, np.arange(10) % 3)):
        path = tmp_path / str(number)
        pq.write_table(pa.table(rows(10) | {"feh.mask": mask}), path)
        found = [value is None for value in read(path, survey()).column("feh")]
        assert found == (mask.tolist() if number == 0 else [False] * 10)
