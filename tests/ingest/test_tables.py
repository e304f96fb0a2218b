import decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io.votable import from_table, writeto
from astropy.table import MaskedColumn, Table

from sos_dask.ingest.canonical import plan_chunks
from sos_dask.ingest.reader import open_source
from tests.survey_files import NAMES, fails, read, rows, survey


def test_parquet_types(tmp_path):
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


def test_whole_decimals_keep_all_digits(tmp_path):
    big = [decimal.Decimal(2**60 + 1), decimal.Decimal(2**62 - 1)]
    table = pa.table(rows(2) | {"big": pa.array(big, pa.decimal128(20, 0))})
    pq.write_table(table, tmp_path / "a")
    out = read(tmp_path / "a", survey(extra={"big": {"source": "big", "dtype": "int64"}}))
    assert out.column("big") == [2**60 + 1, 2**62 - 1]


FIELDS = "".join(f'<FIELD name="{name}" datatype="double"/>' for name in NAMES)


def votable(more: str = "", attributes: str = "", value: str = "<TD>x</TD>") -> str:
    cells = "".join(f"<TD>{v}</TD>" for v in (1, 2, 3, 5000, 4, 0)) + (value if more else "")
    data = f"<DATA><TABLEDATA><TR>{cells}</TR></TABLEDATA></DATA>"
    table = f"<TABLE{attributes}>{FIELDS}{more}{data}</TABLE>"
    return f'<?xml version="1.0"?><VOTABLE version="1.4"><RESOURCE>{table}</RESOURCE></VOTABLE>'


@pytest.mark.parametrize("form", ["tabledata", "binary", "binary2"])
def test_texts_of_a_votable(tmp_path, form):
    """Of any length and of a fixed one; without characters they are null."""
    texts = ["a", "bb", "ccc", "", "e"]
    table = Table(rows(5) | {"any": np.array(texts, dtype=object), "fixed": np.array(texts)})
    writeto(from_table(table), str(tmp_path / "a"), tabledata_format=form)
    extra = {name: {"source": name, "dtype": "string"} for name in ("any", "fixed")}
    found = read(tmp_path / "a", survey(extra=extra))
    for name in extra:
        assert found.column(name) == ["a", "bb", "ccc", None, "e"]


def test_what_a_votable_may_take_in_memory(tmp_path, monkeypatch):
    # Six numbers and characters of four bytes, for 512 rows at least.
    monkeypatch.setattr("sos_dask.ingest.tables._BOMB_BYTES", 512 * 2048)
    text = '<FIELD name="t" datatype="char" arraysize="{}"/>'
    (tmp_path / "a").write_text(votable(text.format(500)))
    assert read(tmp_path / "a", survey()).rows.num_rows == 1
    (tmp_path / "b").write_text(votable(text.format(501)))
    fails(tmp_path / "b", survey(), "512 rows of 2052 bytes by the 'arraysize'", "stilts")
    # A larger file may take eight times its size.
    padded = votable(text.format(501)).replace("<RESOURCE>", "<RESOURCE>" + " " * 131_500)
    (tmp_path / "c").write_text(padded)
    assert read(tmp_path / "c", survey()).rows.num_rows == 1
    monkeypatch.setattr("sos_dask.ingest.tables._MOST_BYTES", len(padded) - 1)
    fails(tmp_path / "c", survey(), "is read into memory as a whole")
    monkeypatch.setattr("sos_dask.ingest.tables._MOST_TEXT", 100)
    (tmp_path / "d").write_text(votable(text.format(200), value=f"<TD>{'x' * 101}</TD>"))
    fails(tmp_path / "d", survey(), "has a text of over 0 MiB")


def test_tables_of_a_votable_are_listed_with_some_of_their_fields(tmp_path):
    content = votable()
    table = content[content.index("<TABLE") : content.index("</RESOURCE>")]
    many = "".join(f'<FIELD name="f{i}" datatype="double"/>' for i in range(9))
    other = f'<TABLE name="x">{many}</TABLE>'
    (tmp_path / "a").write_text(content.replace(table, table + other))
    error = fails(tmp_path / "a", survey(), "has 2 tables, and which one is meant is not said")
    assert "1 '' (obsid, ra, dec, teff, logg, feh); 2 'x' (f0, f1," in error.hint
    assert "f7, ...)" in error.hint and "f8" not in error.hint


def test_how_much_text_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("sos_dask.ingest.tables._TEXT_BYTES", 1000)
    definition = survey(extra={"name": {"source": "name", "dtype": "string"}})
    pq.write_table(pa.table(rows(10) | {"name": pa.array(["x" * 100] * 10)}), tmp_path / "a")
    assert read(tmp_path / "a", definition).rows.num_rows == 10
    pq.write_table(pa.table(rows(10) | {"name": pa.array(["x" * 101] * 10)}), tmp_path / "b")
    fails(tmp_path / "b", definition, "the texts of column 'name' take 0 MiB at once")
    assert read(tmp_path / "b", definition, batch_rows=9).rows.num_rows == 10
    pq.write_table(
        pa.table(rows(10) | {"name": pa.array([str(i) * 400_000 for i in range(10)])}),
        tmp_path / "c",
    )
    fails(tmp_path / "c", definition, "the texts of column 'name' take 3 MiB at once")


def test_units_of_parquet_are_those_of_the_column_or_of_astropy(tmp_path):
    """Metadata of a column; else what astropy writes into the file for all."""
    right = rows(10)
    data = pa.table(right | {"ra": np.radians(right["ra"])})
    fields = [f.with_metadata({"unit": "rad"}) if f.name == "ra" else f for f in data.schema]
    pq.write_table(data.cast(pa.schema(fields)), tmp_path / "own")
    table = Table(right | {"dec": np.radians(right["dec"])})
    table["dec"].unit = "rad"
    table.write(tmp_path / "astropy.parquet", format="parquet")
    for name, column in (("own", "ra"), ("astropy.parquet", "dec")):
        found = read(tmp_path / name, survey()).column(column)
        np.testing.assert_allclose(found, right[column], rtol=1e-12)


def test_lists_are_vectors(tmp_path):
    """Of a fixed length or of any."""
    for kind, words in ((pa.list_(pa.float32(), 2), "a vector of 2 values"),
                        (pa.list_(pa.float32()), "is a vector"),
                        (pa.large_list(pa.float32()), "is a vector")):  # fmt: skip
        values = pa.array([[0.1, 0.2]] * 10, kind)
        pq.write_table(pa.table(rows(10) | {"two": values}), tmp_path / "a")
        fails(tmp_path / "a", survey({"feh": {"source": "two"}}), words)
