import gzip

import pytest

from sos_dask.errors import SurveyError
from sos_dask.ingest.canonical import plan_chunks, read_chunk
from sos_dask.ingest.reader import open_source
from tests.survey_files import NAMES, fails, read, rows, survey, write_csv


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
    assert out.profile.impossible == {}


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("teff", "abc", ["'abc' is not a number", 'missing_text = ["abc"]']),
        ("ra", "12:34:56.7", ["is not a number", "Sexagesimal"]),
        ("obsid", "17b", ["'17b' is not an integer"]),
        ("obsid", "1.5", ["1.5 is not an integer"]),
        ("obsid", "1e300", ["digits are lost"]),
        ("obsid", "9007199254740992.0", ["digits are lost"]),
        ("obsid", "99999999999999999999", ["does not fit into 64 bits"]),
        ("gaia", "2.59434115080651e18", ["id '2.59434115080651e18' is stored as float"]),
        ("gaia", "2594341150806513152.0", ["digits are lost"]),
        ("gaia", "17.0", ["digits are lost"]),
        ("gaia", "0.5", ["the id '0.5' is stored as float"]),
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
        for batch in read_chunk(plan_chunks(source)[0], definition, 1000):
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


def test_bytes_that_are_not_utf8(tmp_path):
    text = "obsid,ra,dec,teff,logg,feh,name\n1,2,3,5000,4,0,Ángel\n"
    (tmp_path / "a").write_bytes(text.encode("latin-1"))
    definition = survey(extra={"name": {"source": "name", "dtype": "string"}})
    assert read(tmp_path / "a", definition).column("name") == ["Ángel"]


def test_the_largest_integers_of_each_kind(tmp_path):
    data = rows(5)
    data["obsid"] = [2**63 - 1, -(2**63), "9007199254740991.0", "-9007199254740991.0", "1e2"]
    out = read(write_csv(tmp_path / "a", data), survey())
    expected = [2**63 - 1, -(2**63), 2**53 - 1, 1 - 2**53, 100]
    assert out.column("obs_id") == expected
    data["obsid"][1] = 2**63
    fails(write_csv(tmp_path / "b", data), survey(), "row 1 (line 3)", "does not fit into 64 bits")
    data["obsid"][1] = -(2**63) - 1
    fails(write_csv(tmp_path / "c", data), survey(), "does not fit into 64 bits")
    data["obsid"][1] = "1_000"
    fails(write_csv(tmp_path / "d", data), survey(), "'1_000' is not an integer")


@pytest.mark.parametrize("delimiter", [",", " "])
def test_lines_and_rows_as_long_as_they_may_be(tmp_path, delimiter, monkeypatch):
    monkeypatch.setattr("sos_dask.ingest.text._BLOCK_BYTES", 200)
    head, row = "obsid ra dec teff logg feh name\n", "1 2 3 5000 4 0 "
    most = 200 - len(row) - 1
    text = f"{head}{row}{'x' * most}\n2 2 3 5000 4 0 y"
    (tmp_path / "a").write_text(text.replace(" ", delimiter))
    definition = survey(extra={"name": {"source": "name", "dtype": "string"}})
    assert read(tmp_path / "a", definition).column("name") == ["x" * most, "y"]
    (tmp_path / "b").write_text(text.replace("x\n", "xx\n").replace(" ", delimiter))
    with pytest.raises(SurveyError, match=r"line 2 is too long|straddling object"):
        read(tmp_path / "b", definition)


def test_many_comments_are_no_table(tmp_path, monkeypatch):
    monkeypatch.setattr("sos_dask.ingest.text._COMMENT_BYTES", 1000)
    rest = "obsid,ra,dec,teff,logg,feh\n1,2,3,5000,4,0\n"
    (tmp_path / "a").write_text("#" + "x" * 998 + "\n" + rest)
    assert read(tmp_path / "a", survey()).rows.num_rows == 1
    (tmp_path / "b").write_text("#" + "x" * 999 + "\n" + rest)
    fails(tmp_path / "b", survey(), "are blank or comments")


def test_flags_of_ecsv_are_true_false_or_nothing(tmp_path):
    names = [*NAMES, "flag"]
    types = "".join(
        f"# - {{name: {n}, datatype: {'bool' if n == 'flag' else 'float64'}}}\n" for n in names
    )
    words = ("True", "f", "1", '""', " FALSE ")
    lines = "".join(f"{i},1,2,5000,4,0,{word}\n" for i, word in enumerate(words, 1))
    head = f"# %ECSV 1.0\n# ---\n# delimiter: ','\n# datatype:\n{types}"
    (tmp_path / "a").write_text(f"{head}{','.join(names)}\n{lines}")
    definition = survey(extra={"flag": {"source": "flag", "dtype": "int64"}})
    assert read(tmp_path / "a", definition).column("flag") == [1, 0, 1, None, 0]
    (tmp_path / "b").write_text(f"{head}{','.join(names)}\n{lines}6,1,2,5000,4,0,maybe\n")
    fails(tmp_path / "b", definition, "column 'flag': 'maybe' is neither True nor False")


def test_a_column_named_like_a_mask_is_a_column(tmp_path):
    """It is the mask of the column before the dot, where there is one."""
    data = rows(4)
    texts = ["True", "False", "True", "False"]
    for name, found in (("feh.mask", [None, False, None, False]), ("note.mask", [False] * 4)):
        path = write_csv(tmp_path / name, data | {name: texts})
        assert [x if x is None else False for x in read(path, survey()).column("feh")] == found
    definition = survey(extra={"note": {"source": "note.mask", "dtype": "string"}})
    assert read(path, definition).column("note") == texts


@pytest.mark.parametrize(
    ("below", "n"),
    [
        ("------|---|---|----|----|----", 2),  # dashes alone
        ("      |deg|deg|K   |    |    \n------|---|---|----|----|----", 2),  # units and dashes
        ("3|1|2|5000|4|0\n---|---|---|---|---|---", 4),  # a row, and one of dashes
    ],
)
def test_lines_below_the_header(tmp_path, below, n):
    text = f"obsid|ra|dec|teff|logg|feh\n{below}\n1|1|2|5000|4|0\n2|1|2|5000|4|0\n"
    (tmp_path / "a").write_text(text)
    if n == 4:
        fails(tmp_path / "a", survey(), "---")
    else:
        assert len(read(tmp_path / "a", survey()).rows) == n
