"""Conditions on rows: SQLite finds the same rows, and what cannot be read is refused."""

import re
import sqlite3

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sos_dask.errors import CatalogError, ConfigError
from sos_dask.sky.healpix import ang2pix
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.conditions import condition
from tests.skies import write_catalog

ROWS = 300


@pytest.fixture(scope="module")
def catalog(tmp_path_factory) -> Catalog:
    rng = np.random.default_rng(1)
    ra, dec = rng.uniform(0, 360, ROWS), np.degrees(np.arcsin(rng.uniform(-1, 1, ROWS)))
    table = pa.table({
        "_healpix_29": ang2pix(ra, dec), "obs_id": np.arange(ROWS), "ra": ra, "dec": dec,
        "teff": pa.array(rng.integers(0, 9, ROWS).astype(np.float32), mask=rng.random(ROWS) < 0.2),
        "flag": pa.array(rng.integers(0, 16, ROWS), pa.int32(), mask=rng.random(ROWS) < 0.2),
        "class": pa.array(rng.choice(["STAR", "QSO", "and"], ROWS), mask=rng.random(ROWS) < 0.2),
        "[Fe/H]": rng.normal(0, 1, ROWS),
        "is_good": pa.array(rng.random(ROWS) < 0.5, mask=rng.random(ROWS) < 0.2),
    })  # fmt: skip
    return write_catalog(table.sort_by("_healpix_29"), tmp_path_factory.mktemp("c") / "catalog")


@pytest.fixture(scope="module")
def rows(catalog) -> pa.Table:
    return pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])


@pytest.fixture(scope="module")
def sql(rows) -> sqlite3.Connection:
    base = sqlite3.connect(":memory:")
    base.execute("create table t (obs_id, teff, flag, class, is_good)")
    columns = rows.select(["obs_id", "teff", "flag", "class", "is_good"]).to_pylist()
    base.executemany("insert into t values (?, ?, ?, ?, ?)", [tuple(x.values()) for x in columns])
    return base


def passing(rows: pa.Table, catalog: Catalog, text: str) -> list[int]:
    test, needed = condition(text, catalog)
    found = rows.select(dict.fromkeys(["obs_id", *needed])).filter(test)
    return sorted(found["obs_id"].to_pylist())


HOW = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
NUMBER = st.integers(-1, 9)
TESTS = st.one_of(
    st.builds("teff {} {}".format, HOW, NUMBER),
    st.builds("{} {} teff".format, NUMBER, HOW),
    st.builds("teff {} flag".format, HOW),
    st.builds("flag & {} {} {}".format, st.integers(0, 15), HOW, NUMBER),
    st.builds("class {} '{}'".format, HOW, st.sampled_from(["STAR", "QSO", "and", ""])),
    st.builds("{} is null".format, st.sampled_from(["teff", "class"])),
    st.builds("{} is not null".format, st.sampled_from(["flag", "is_good"])),
    st.just("is_good"),
)  # fmt: skip
CONDITIONS = st.recursive(
    TESTS,
    lambda inner: st.one_of(
        st.builds("({})".format, inner),
        st.builds("not ({})".format, inner),
        st.builds("{} and {}".format, inner, inner),
        st.builds("{} or {}".format, inner, inner),
    ),
    max_leaves=8,
)


@given(text=CONDITIONS)
def test_sqlite_finds_the_same_rows(text, catalog, rows, sql):
    expected = [one for (one,) in sql.execute(f"select obs_id from t where {text} order by obs_id")]
    assert passing(rows, catalog, text) == expected


def test_what_python_has_and_sql_has_not(catalog, rows):
    table = rows.to_pandas()
    chained = (table.teff > 2) & (table.teff <= 5)
    assert passing(rows, catalog, "2 < teff <= 5") == sorted(table.obs_id[chained])
    assert passing(rows, catalog, "teff == -1") == []
    named = sorted(table.obs_id[table["[Fe/H]"] > 0.5])
    assert passing(rows, catalog, " `[Fe/H]` > 0.5 ") == named
    quoted = sorted(table.obs_id[table["class"] == "QSO"])
    assert passing(rows, catalog, 'class == "QSO"') == quoted
    assert passing(rows, catalog, "is_good == True") == passing(rows, catalog, "is_good")
    assert condition("2 < teff and class == 'a' or teff > 3", catalog)[1] == [
        "teff",
        "class",
        "teff",
    ]


def test_hundreds_of_tests(catalog, rows):
    text = " or ".join(f"obs_id == {number}" for number in range(100, 1100))
    assert passing(rows, catalog, text) == list(range(100, ROWS))
    with pytest.raises(ConfigError, match="over 1000 tests"):
        condition(f"{text} or obs_id == 1", catalog)


@pytest.mark.parametrize(
    "text",
    [
        "teff ~ 5", "teff > 5 and", "teff = 5", "teff", "5 > 3", "teff is 5", "teff == None",
        "teff in (1, 2)", "(teff > 5) & (flag < 3)", "flag & teff == 0", "teff + 1 > 3",
        "teff.x > 1",
        "__import__('os').system('x')", "flag & 99999999999999999999 == 0", "teff > 1j", "not 5",
        "(" * 500 + "teff > 1" + ")" * 500, "not " * 5000 + "is_good", "teff > 1; flag > 1",
        "flag & 99999999999 == 0", "lambda: 1", "\0",
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(catalog, text):
    with pytest.raises((ConfigError, CatalogError)) as caught:
        condition(text, catalog)
    assert "cannot be" in caught.value.message or "has no column" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("teff == 'inside'", "'teff' has type float.*A test of it is: teff == 0"),
        ("flag > 4.5", "'flag' has type int32"),
        ("obs_id > 99999999999999999999", "'obs_id' has type int64"),
        ("teff & 4 == 0", "'teff' has type float"),
        ("is_good == 'maybe'", "'is_good' has type bool"),
        ("class > flag", "has type (int32|string)"),
    ],
)
def test_what_cannot_be_compared_is_refused(catalog, text, says):
    with pytest.raises(ConfigError, match="cannot be tested") as caught:
        condition(text, catalog)
    assert re.search(f"(?s){says}", f"{caught.value.message} {caught.value.hint}")
