import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import MaskedColumn, Table

from sos_dask.ingest.canonical import plan_chunks
from sos_dask.ingest.reader import open_source
from tests.survey_files import fails, read, rows, survey, write_fits

# --- Parquet and VOTable ----------------------------------------------------------------------


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


# --- columns that would give wrong values -----------------------------------------------------


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
