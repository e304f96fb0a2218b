"""Survey files that carry troubles from the field, through the command that reads them."""

import gzip
import io
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.table import MaskedColumn, QTable, Table
from astropy.utils.masked import Masked

from sos_dask.errors import SosError
from sos_dask.storage.catalog import Catalog
from sos_dask.surveys.definition import load_survey
from tests.bench.fuzz import run
from tests.survey_files import read

NAMES = ("obs_id", "ra", "dec", "teff", "logg", "feh")
HEADER = ",".join(NAMES)
ROWS = "1,10,20,5000,4,0.1\n2,30,40,5100,4.1,0.2\n"


def toml(**changes: str) -> str:
    columns = {name: f'{{ source = "{name}" }}' for name in NAMES}
    columns |= {name: changes.pop(name) for name in list(changes) if name in NAMES}
    top = {"format": "1", "name": '"odd"', "title": '"t"', "position_epoch": "2000.0", **changes}
    lines = [f"{key} = {value}" for key, value in top.items()]
    return "\n".join([*lines, "[columns]", *(f"{k} = {v}" for k, v in columns.items())]) + "\n"


class Ingested:
    """One file as `ingest` reads it: exit code, what is written of an error, rows by ``obs_id``."""

    def __init__(self, folder: Path, content: bytes | str, **changes: str) -> None:
        (folder / "survey.toml").write_text(toml(**changes))
        self.file = folder / "file"
        self.file.write_bytes(content.encode() if isinstance(content, str) else content)
        self.code, self.text = 0, ""
        try:
            found = read(self.file, load_survey(str(folder / "survey.toml")))
        except SosError as error:
            self.code, self.text = error.exit_code, str(error)
            return
        self.rejected = found.profile.rejected
        self.rows = sorted(found.rows.to_pylist(), key=lambda row: row["obs_id"])
        assert found.profile.n_rows == len(self.rows) + sum(self.rejected.values())

    def column(self, name: str) -> list:
        assert self.code == 0, self.text
        return [row[name] for row in self.rows]

    def fails(self, *words: str) -> None:
        assert self.code == 4, (self.code, self.text)
        assert str(self.file) in self.text
        for word in words:
            assert word in self.text, self.text


@pytest.fixture
def ingested(tmp_path):
    return lambda content, **changes: Ingested(tmp_path, content, **changes)


def table(**changes) -> QTable:
    data = {"obs_id": [1, 2, 3], "ra": [10.0, 20, 30], "dec": [1.0, 2, -3]}
    data |= {"teff": [5000.0, 9999, 5200], "logg": [4.0, 4.1, 4.2], "feh": [0.1, 0.2, 0.3]}
    return QTable({**data, **changes})


def written(made: Table, kind: str, folder: Path, **options) -> bytes:
    made.write(folder / "made", format=kind, overwrite=True, **options)
    return (folder / "made").read_bytes()


def parquet(columns: dict | pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns) if isinstance(columns, dict) else columns, sink)
    return sink.getvalue()


# --- what a writer states beside the values ---------------------------------------------------

MASK = [False, True, False]


@pytest.mark.parametrize("kind", ["parquet", "fits", "votable", "ascii.ecsv", "ascii.csv"])
@pytest.mark.parametrize("of", ["column", "integers", "quantity", "data_mask"])
def test_what_astropy_masks_is_null(tmp_path, ingested, kind, of):
    teff = MaskedColumn([5000.0, 9999, 5200], mask=MASK)
    if of == "integers":
        teff = MaskedColumn([5000, 9999, 5200], mask=MASK)
    elif of == "quantity":
        teff = Masked([5000.0, 9999, 5200] * u.K, mask=MASK)
    made = table(teff=teff) if of == "quantity" else Table(table(teff=teff))
    if of == "data_mask":
        made["teff"].info.serialize_method = dict.fromkeys(("fits", "ecsv", "parquet"), "data_mask")
    out = ingested(written(made, kind, tmp_path))
    assert out.column("teff") == [5000.0, None, 5200.0]


def test_masks_of_ids_positions_and_names(tmp_path, ingested):
    made = Table(table(ra=MaskedColumn([10.0, 20, 30], mask=MASK)))
    out = ingested(written(made, "parquet", tmp_path))
    assert out.column("obs_id") == [1, 3] and out.rejected == {"null position": 1}
    made = Table(table(obs_id=MaskedColumn(["a", "b", "c"], mask=MASK)))
    text = '{ source = "obs_id", dtype = "string" }'
    out = ingested(written(made, "parquet", tmp_path), obs_id=text)
    assert out.column("obs_id") == ["a", "c"] and out.rejected == {"null obs_id": 1}


def test_masks_of_another_name_of_none_and_lost(tmp_path, ingested):
    made = Table(table(teff=MaskedColumn([5000.0, 9999, 5200], mask=MASK)))
    stated = pq.read_table(io.BytesIO(written(made, "parquet", tmp_path)))
    named = [name.replace("teff.mask", "hidden") for name in stated.column_names]
    key = b"table_meta_yaml"
    yaml = stated.schema.metadata[key].replace(b"teff.mask", b"hidden")
    other = stated.rename_columns(named).replace_schema_metadata({key: yaml})
    assert ingested(parquet(other)).column("teff") == [5000.0, None, 5200.0]
    bare = stated.replace_schema_metadata(None)
    assert ingested(parquet(bare)).column("teff") == [5000.0, None, 5200.0]
    lost = stated.drop_columns(["teff.mask"])
    ingested(parquet(lost)).fails("column 'teff' has its mask in a column 'teff.mask'")


def test_one_element_of_a_masked_vector(tmp_path, ingested):
    values = MaskedColumn(np.arange(6.0).reshape(3, 2) + 5000, mask=[[0, 1], [0, 0], [1, 1]])
    content = written(Table(table(teff=values)), "parquet", tmp_path)
    out = ingested(content, teff='{ source = "teff", element = 1 }')
    assert out.column("teff") == [None, 5003.0, None]


@pytest.mark.parametrize("kind", ["parquet", "fits", "votable", "ascii.ecsv", "voparquet"])
def test_units_that_the_file_states(tmp_path, ingested, kind):
    if kind == "voparquet":
        fields = '<FIELD name="teff" datatype="double" unit="kK"/>'
        xml = f"<VOTABLE><RESOURCE><TABLE>{fields}</TABLE></RESOURCE></VOTABLE>"
        plain = pa.table({name: list(table(teff=[5.0, 5.1, 5.2])[name]) for name in NAMES})
        content = parquet(plain.replace_schema_metadata({"IVOA.VOTable-Parquet.content": xml}))
    else:
        content = written(table(teff=[5.0, 5.1, 5.2] * u.kK), kind, tmp_path)
    assert ingested(content).column("teff") == [5000.0, 5100.0, 5200.0]


@pytest.mark.parametrize("unit", [u.deg_C, u.eV])
def test_units_of_another_kind(tmp_path, ingested, unit):
    content = written(table(teff=[5000.0, 5100, 5200] * unit), "fits", tmp_path)
    ingested(content).fails(f"column 'teff' is in '{unit.to_string('fits')}', the survey says 'K'")


def test_types_of_parquet_that_are_no_values(ingested):
    plain = {name: list(table()[name]) for name in NAMES}
    for values, word in (
        (pa.array([1, 2, 3], pa.timestamp("s")), "timestamp"),
        ([{"a": 1.0}] * 3, "struct"),
        ([[[1.0]]] * 3, "list"),
    ):
        ingested(parquet(plain | {"teff": values})).fails("column 'teff'", word)
    coded = pa.array(["5000", None, "5200"]).dictionary_encode()
    assert ingested(parquet(plain | {"teff": coded})).column("teff") == [5000.0, None, 5200.0]


# --- one name twice ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fits", "parquet", "votable", "csv", "ecsv"])
@pytest.mark.parametrize("names", [("teff", "teff"), ("Teff", "TEFF")])
def test_a_name_that_is_there_twice(ingested, kind, names):
    columns = [(n, list(table()[n])) for n in NAMES if n != "teff"]
    columns += [(name, [5000.0, 5100.0, 5200.0]) for name in names]
    content: bytes | str
    if kind == "parquet":
        content = parquet(
            pa.Table.from_arrays([pa.array(v) for _, v in columns], [n for n, _ in columns])
        )
    elif kind == "fits":
        made = Table({f"c{i}": v for i, (_, v) in enumerate(columns)})
        sink = io.BytesIO()
        fits.table_to_hdu(made).writeto(sink)
        packed = sink.getvalue()
        for i, (name, _) in enumerate(columns):
            old, new = (f"'{text:8}'".encode() for text in (f"c{i}", name))
            packed = packed.replace(old, new, 1)
        content = packed
    elif kind == "votable":
        fields = "".join(f'<FIELD name="{n}" datatype="double"/>' for n, _ in columns)
        rows = zip(*(v for _, v in columns), strict=True)
        cells = ("".join(f"<TD>{v}</TD>" for v in row) for row in rows)
        content = votable(fields, "".join(f"<TR>{row}</TR>" for row in cells))
    else:
        lines = [",".join(n for n, _ in columns)]
        lines += [",".join(map(str, row)) for row in zip(*(v for _, v in columns), strict=True)]
        content = "\n".join(lines) + "\n"
        if kind == "ecsv":
            types = "".join(f"# - {{name: {n}, datatype: float64}}\n" for n, _ in columns)
            content = f"# %ECSV 1.0\n# ---\n# delimiter: ','\n# datatype:\n{types}" + content
    ingested(content).fails("column 'teff' is there 2 times", *names)


# --- VOTable ----------------------------------------------------------------------------------

FIELDS = "".join(
    f'<FIELD name="{name}" datatype="{"long" if name == "obs_id" else "double"}"/>'
    for name in NAMES
)
CELLS = "<TR><TD>1</TD><TD>10</TD><TD>1</TD><TD>5000</TD><TD>4</TD><TD>0.1</TD></TR>"


def votable(fields: str = FIELDS, cells: str = CELLS, before="", after="", more="") -> str:
    data = f"<TABLE>{fields}<DATA><TABLEDATA>{cells}</TABLEDATA></DATA></TABLE>"
    resource = f'<RESOURCE type="results">{before}{data}{more}{after}</RESOURCE>'
    return f'<?xml version="1.0"?><VOTABLE version="1.3">{resource}</VOTABLE>'


def status(value: str, text: str = "") -> str:
    return f'<INFO name="QUERY_STATUS" value="{value}">{text}</INFO>'


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_state_of_a_query(ingested, place):
    failed = votable(**{place: status("ERROR", "time limit exceeded")})
    ingested(failed).fails("a query that failed", "time limit exceeded")
    cut = votable(**{place: status("OVERFLOW")})
    ingested(cut).fails("is not complete", "OVERFLOW", 'allow = ["overflow"]')
    assert ingested(gzip.compress(cut.encode()), allow='["overflow"]').column("obs_id") == [1]
    assert ingested(votable(**{place: status("OK")})).column("obs_id") == [1]


def test_the_command_says_what_is_cut_off(tmp_path):
    survey, file, out = (tmp_path / name for name in ("survey.toml", "a.vot", "out"))
    survey.write_text(toml())
    file.write_text(votable(after=status("OVERFLOW")))
    code, _, text = run(["ingest", str(survey), str(file), "-o", str(out)])
    assert code == 4 and "is not complete" in text
    survey.write_text(toml(allow='["overflow"]'))
    code, _, text = run(["ingest", str(survey), str(file), "-o", str(out)])
    assert code == 0, text
    manifest = Catalog.open(out).manifest
    assert manifest is not None and manifest.summary["overflow"] == ["a.vot"]


def test_several_tables_of_a_votable(ingested):
    other = '<TABLE name="x"><FIELD name="x" datatype="int"/><DATA><TABLEDATA><TR><TD>1</TD></TR>'
    two = votable(more=other + "</TABLEDATA></DATA></TABLE>")
    ingested(two).fails("has 2 tables", "1 '' (obs_id, ra", "2 'x' (x)", "hdu")
    assert ingested(two, hdu="1").column("obs_id") == [1]
    ingested(two, hdu="2").fails("no column 'obs_id'")
    ingested(two, hdu="3").fails("has no table 3")
    second = two.replace(other + "</TABLEDATA></DATA></TABLE>", "").replace(
        "<TABLE>", other + "</TABLEDATA></DATA></TABLE><TABLE>"
    )
    assert ingested(second, hdu="2").column("teff") == [5000.0]


def test_several_tables_of_a_fits_file_and_hdu_where_it_has_no_effect(ingested):
    hdus = [fits.PrimaryHDU(), *(fits.BinTableHDU(Table(table()), name=n) for n in "AB")]
    sink = io.BytesIO()
    fits.HDUList(hdus).writeto(sink)
    ingested(sink.getvalue()).fails("which of its tables", "1 'A' (3 rows), 2 'B' (3 rows)")
    assert ingested(sink.getvalue(), hdu="2").column("obs_id") == [1, 2, 3]
    ingested(f"{HEADER}\n{ROWS}", hdu="2").fails("has one table only")
    ingested(parquet({n: list(table()[n]) for n in NAMES}), hdu="2").fails("has one table only")


@pytest.mark.parametrize("stream", ["tabledata", "binary", "binary2"])
def test_nulls_of_integers_in_votables(tmp_path, ingested, stream):
    made = Table(table(teff=MaskedColumn([5000, -1, 5200], mask=MASK, fill_value=-1)))
    content = written(made, "votable", tmp_path, tabledata_format="tabledata")
    if stream != "tabledata":
        from astropy.io.votable import parse

        document = parse(tmp_path / "made")
        document.get_first_table().get_field_by_id("teff").values.null = -1
        document.to_xml(str(tmp_path / "made"), tabledata_format=stream)
        content = (tmp_path / "made").read_bytes()
    assert ingested(content).column("teff") == [5000.0, None, 5200.0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<TABLE>", '<TABLE nrows="1000000000000">', ["1000000000000 rows"]),
        ("<TABLE>", '<TABLE nrows="2">', ["has 1 rows, and says 2"]),
        ("</RESOURCE>", "", ["not a readable VOTable"]),
        ("<TD>5000</TD>", "<TD>abc</TD>", ["does not fit its column", "W30"]),
        ("<TD>1</TD><TD>10", "<TD>abc</TD><TD>10", ["abc"]),
        ("<TABLE>", '<INFO name="QUERY_STATUS" value=" ERROR "/>\\g<0>', ["query that failed"]),
        ("</TABLE>", '\\g<0><INFO name="QUERY_STATUS" value="OVERFLOW "/>', ["not complete"]),
        ('<?xml version="1.0"?>', '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]>', ["type"]),
        ('<FIELD name="ra"', '<FIELD name="z" datatype="char" arraysize="9999999999"/>\\g<0>',
         ["bytes by the 'arraysize'"]),
        ("<TABLEDATA>.*</TABLEDATA>", '<BINARY><STREAM href="file:///etc/passwd"/></BINARY>',
         ["rows are in another file"]),
    ],
)  # fmt: skip
def test_votables_that_are_refused(ingested, old, new, words):
    content = re.sub(old.replace("?", r"\?"), new, votable())
    assert content != votable()
    ingested(content).fails(*words)


@pytest.mark.parametrize(("kind", "value"), [("int", "9999999999"), ("unsignedByte", "300")])
def test_an_integer_that_its_type_cannot_hold_is_not_cut(ingested, kind, value):
    text = votable(FIELDS.replace("long", kind), CELLS.replace(">1<", f">{value}<", 1))
    ingested(text).fails(value, "out of range")


def test_an_array_of_one_value_is_a_number(ingested):
    fields = FIELDS.replace('datatype="double"', 'datatype="double" arraysize="1"')
    assert ingested(votable(fields)).column("teff") == [5000.0]


def test_an_empty_integer_of_an_old_votable_is_no_zero(ingested):
    text = votable(fields=FIELDS.replace('"teff" datatype="double"', '"teff" datatype="int"'))
    text = text.replace("<TD>5000</TD>", "<TD/>")
    ingested(text.replace("1.3", "1.1", 1)).fails("or become null or 0")
    word = '<FIELD name="word" datatype="char" arraysize="2"/>'
    rows = CELLS.replace("</TR>", "<TD>abcd</TD></TR>")
    assert ingested(votable(FIELDS + word, rows)).column("obs_id") == [1]  # not used
    key = '{ source = "word", dtype = "string" }'
    ingested(votable(FIELDS + word, rows), obs_id=key).fails("does not fit its column")


# --- text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before",
    [
        "# a comment, with comma\n\n",
        "".join(f"# line {i} {'x' * 90}\n" for i in range(20000)),
        "# %ECSV 1.0\n# ---\n# datatype:\n# - {name: obs_id, datatype: int64}\n"
        "# delimiter: ','\n# schema: astropy-2.0\n",
        "#",
        "# about\n# ",
    ],
    ids=["comment", "2 MB of comments", "ecsv", "header", "comment and header"],
)
@pytest.mark.parametrize("gzipped", [False, True])
def test_comments_before_the_header(ingested, before, gzipped):
    content = f"{before}{HEADER}\n{ROWS}".encode()
    out = ingested(gzip.compress(content) if gzipped else content)
    assert out.column("ra") == [10.0, 30.0] and out.column("teff") == [5000.0, 5100.0]
    broken = content.replace(b"5100", b"x")
    line = content[: content.rindex(b"5100")].count(b"\n") + 1
    ingested(broken).fails(f"row 1 (line {line})")


@pytest.mark.parametrize(
    "kind",
    ["ecsv", "commented_header", "basic", "tab", "csv", "fixed_width", "fixed_width_no_bars"],
)
def test_tables_of_text_that_astropy_writes(tmp_path, ingested, kind):
    name = MaskedColumn(["a  b", "", "c"], mask=MASK)
    made = Table(table(teff=MaskedColumn([5000, 9999, 5200], mask=MASK), name=name))
    options = {}
    if kind == "fixed_width_no_bars":  # aligned with blanks, as TOPCAT writes
        kind, options = "fixed_width", {"delimiter": None, "bookend": False}
        del made["name"], made["teff"]
        made["teff"] = [5000, 5100, 5200]
    out = ingested(written(made, f"ascii.{kind}", tmp_path, **options))
    assert out.column("obs_id") == [1, 2, 3]
    assert out.column("teff")[::2] == [5000.0, 5200.0] and out.column("feh")[1] is not None


@pytest.mark.parametrize("kind", ["mrt", "ipac"])
def test_formats_that_are_refused_by_name(tmp_path, ingested, kind):
    content = written(Table(table()), f"ascii.{kind}", tmp_path)
    ingested(content).fails(f"format {kind.upper()}", f"format='ascii.{kind}'")


def test_a_row_of_dashes_below_a_row_of_data_takes_none_with_it(ingested):
    dashes = ",".join(["--"] * len(NAMES))
    ingested(f"{HEADER}\n1,10,20,5000,4,0.1\n{dashes}\n{ROWS}").fails("row 1 (line 3)", "'--'")


def test_tables_of_vizier(ingested):
    text = (
        "#RESOURCE=yCat\n#Title: x, y\n\nobs_id\tra\tdec\tteff\tlogg\tfeh\n"
        " \tdeg\tdeg\tK\t[cm/s2]\t[-]\n------\t---\t---\t---\t---\t---\n"
        "     1\t 10\t 20\t5000\t4.0\t0.1\n     2\t 30\t 40\t    \t4.1\t0.2\n"
    )
    out = ingested(text)
    assert out.column("obs_id") == [1, 2] and out.column("teff") == [5000.0, None]
    hours = ingested(text.replace("\tdeg", "\th", 1))
    assert hours.column("ra") == [pytest.approx(150.0)] and hours.rejected == {"ra out of range": 1}
    ingested(text.replace(" 30", " x")).fails("row 1 (line 8)")


def test_exponents_of_fortran(ingested):
    out = ingested(f"{HEADER}\n1,1.05D+01,-4.125d1,5.0D+03,4.0,\n2,1,2,5100,4,0\n")
    assert out.column("ra") == [10.5, 1.0] and out.column("dec") == [-41.25, 2.0]
    ingested(f"{HEADER}\n1,1.05D,1,5000,4,0\n").fails("'1.05D' is not a number")


def test_line_breaks_inside_quotes(ingested):
    lines = [f'{i + 1},{i % 360},{i % 80},5000,4,0.1,"a\nb, {i}"' for i in range(40000)]
    text = f"{HEADER},name\n" + "\n".join(lines) + "\n"
    out = ingested(text)
    assert len(out.rows) == 40000
    ingested(text.replace("39999,", "x,")).fails("row 39998 (line 79998)")


@pytest.mark.parametrize("end", ["", '3,50,60,5200,4,0.3,"d\n4,1,1,5000,4,0,e\n'])
def test_a_quote_that_swallows_rows(ingested, end):
    rows = ROWS.replace("0.1\n", '0.1,"ab\n').replace("0.2\n", "0.2,c\n")
    ingested(f"{HEADER},name\n{rows}{end}").fails("line 2", "quoted text does not end")


@pytest.mark.parametrize(
    ("block", "words"),
    [("7", ["line 3 is too long"]), ("7,", ["line 3 is too long"]), ("\n", ["has no rows"])],
)
def test_little_gzip_with_much_inside(ingested, block, words):
    head = f"{HEADER}\n" if block == "\n" else f"{HEADER}\n{ROWS.splitlines()[0]}\n2,"
    packed = io.BytesIO()
    with gzip.open(packed, "wb", 1) as file:
        file.write(head.encode())
        for _ in range(100):
            file.write(block.encode() * (1 << 20))
    begin = time.process_time()
    ingested(packed.getvalue()).fails(*words)
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("text", ["x" * (1 << 20), "x" * 4000])
def test_little_parquet_with_much_inside(ingested, text):
    n = 200_000 if len(text) < 5000 else 2000
    numbers: dict = {name: pa.array(np.arange(n) % 80 + 1.0) for name in NAMES[1:]}
    words = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([text]))
    content = parquet(numbers | {"obs_id": words})
    assert len(content) < 3 << 20
    key = '{ source = "obs_id", dtype = "string" }'
    ingested(content, obs_id=key).fails("texts of column 'obs_id' take")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"NAXIS   =                    0", b"NAXIS   =         999999999999", "NAXIS is 99999"),
        (b"NAXIS2  =                    3", b"NAXIS2  =        9000000000000", "is truncated"),
        (b"NAXIS1  =                   48", b"NAXIS1  =                    0", "are not a table"),
        (b"TFIELDS =                    6", b"TFIELDS =           9999999999", "header is damaged"),
        (b"TFORM3  = 'D       '  ", b"TFORM3  = '999999999D'", "columns take"),
        (b"NAXIS2  =                    3", b"NAXIS2  =                   -3", "are not a table"),
    ],
)
def test_headers_of_fits_that_claim_what_is_not_there(ingested, tmp_path, old, new, words):
    whole = written(Table(table()), "fits", tmp_path)
    assert whole.count(old) == 1
    ingested(whole.replace(old, new)).fails(words)


def test_a_key_of_text(ingested):
    text = f"{HEADER}\n{ROWS}".replace("\n1,", "\nJ0102+03,")
    out = ingested(text)
    out.fails("'J0102+03' is not an integer", 'dtype = "string" in [columns.obs_id]')
    assert "missing_text" not in out.text
    assert ingested(text, obs_id='{ source = "obs_id", dtype = "string" }').rows


def test_commas_in_numbers(ingested):
    ingested(f'{HEADER}\n1,10,20,"5,000",4,0.1\n').fails("'5,000'", "Numbers with commas")
