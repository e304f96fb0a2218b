"""Survey definitions are read; wrong ones are refused with a message."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from sos_dask.correct import FLAGS, corrected_schema
from sos_dask.errors import SosError, SurveyError
from sos_dask.evidence.widening import KIND_FIELD
from sos_dask.schema import CANONICAL, RESERVED, nearest
from sos_dask.surveys.definition import Cut, describe_columns, load_survey, parse_survey
from tests.survey_files import document, with_column, with_cut, with_extra


def test_the_smallest_definition():
    survey = parse_survey(document(cuts=None))
    assert list(survey.columns) == ["obs_id", "ra", "dec", "teff", "logg", "feh"]
    assert survey.hdu is None and survey.cuts == {} and survey.missing == ()
    assert survey.arrow_schema().names == ["_healpix_29", *survey.columns, "quality"]


def test_source_is_one_name_or_a_list():
    one = parse_survey(with_column("snr", {"source": "snrg"})).columns["snr"]
    many = parse_survey(with_column("snr", {"source": ["snrg", "snr_g"]})).columns["snr"]
    joined = parse_survey(with_column("obs_id", {"join": ["a", "b"]})).columns["obs_id"]
    assert one.sources == ("snrg",) and not one.join
    assert many.sources == ("snrg", "snr_g") and not many.join
    assert joined.sources == ("a", "b") and joined.join and joined.dtype == "string"


@pytest.mark.parametrize(
    ("column", "unit", "factor"),
    [
        ("ra", "deg", 1.0),
        ("ra", "hourangle", 15.0),
        ("pmra", "arcsec/yr", 1000.0),
        ("distance", "kpc", 1000.0),
        ("rv", "m/s", 0.001),
    ],
)
def test_native_units_are_converted(column, unit, factor):
    source = parse_survey(with_column(column, {"source": "native", "unit": unit})).columns[column]
    assert source.factor == pytest.approx(factor, rel=1e-12)
    assert source.unit == unit and source.column.unit == CANONICAL[column].unit


def test_odd_but_right_data_are_confirmed():
    assert parse_survey(document()).allow == ()
    assert parse_survey(document(allow=["ra_below_24"])).allow == ("ra_below_24",)


def test_missing_and_elements_and_extras():
    raw = with_column("feh", {"source": "PARAM", "element": 3, "missing": [-1]})
    raw |= {"missing": [-9999, -9999.99], "missing_text": ["null"], "position_epoch": 2016}
    raw["extra"] = {"flag": {"source": "FLAG", "dtype": "int64", "min": 0}}
    survey = parse_survey(raw)
    assert survey.missing == (-9999.0, -9999.99) and survey.missing_text == ("null",)
    assert survey.columns["feh"].element == 3 and survey.columns["feh"].missing == (-1.0,)
    assert survey.columns["flag"].column.minimum == 0.0
    assert survey.position_epoch == 2016.0 and isinstance(survey.position_epoch, float)
    assert survey.arrow_schema().names[-3:] == ["flag", "position_epoch", "quality"]


SOME = {"source": "x"}


WRONG: dict[str, tuple[Any, str]] = {
    "not a table": ([], "the survey must be a table"),
    "no format": (document(format=None), "format None is not 1"),
    "format of tomorrow": (document(format=2), "format 2 is not 1"),
    "format true": (document(format=True), "format True is not 1"),
    "no name": (document(name=None), "'name' is missing"),
    "name is a number": (document(name=3), "name: must be a valid string"),
    "name with a space": (document(name="my survey"), "lower-case letters"),
    "title is a list": (document(title=["a"]), "title: must be a valid string"),
    "notes is a number": (document(notes=1.5), "notes: must be a valid string"),
    "unknown key": (document(positon_epoch=2000), "unknown key 'positon_epoch'"),
    "hdu text": (document(hdu="1"), "hdu: must be a valid integer"),
    "hdu float": (document(hdu=1.0), "hdu: must be a valid integer"),
    "hdu true": (document(hdu=True), "hdu: must be a valid integer"),
    "hdu negative": (document(hdu=-1), "hdu: must be greater than or equal to 1"),
    "hdu of the primary": (document(hdu=0), "hdu: must be greater than or equal to 1"),
    "epoch text": (
        document(position_epoch="J2000"),
        "position_epoch: must be a valid number",
    ),
    "epoch as a day": (
        document(position_epoch=57204),
        "position_epoch: must be less than or equal to 2100",
    ),
    "epoch nan": (
        document(position_epoch=float("nan")),
        "position_epoch: must be a finite number",
    ),
    "missing scalar": (document(missing=-9999), "missing: must be a list"),
    "missing text": (document(missing=["-9999"]), "missing.0: must be a valid number"),
    "missing nan": (document(missing=[float("nan")]), "missing.0: must be a finite number"),
    "missing true": (document(missing=[True]), "missing.0: must be a valid number"),
    "missing_text scalar": (document(missing_text="null"), "missing_text: must be a list"),
    "missing_text number": (
        document(missing_text=[-9999]),
        "missing_text.0: must be a valid string",
    ),
    "fraction": (
        document(max_rejected_fraction=2),
        "max_rejected_fraction: must be less than or equal to 1",
    ),
    "fraction text": (
        document(max_rejected_fraction="1%"),
        "max_rejected_fraction: must be a valid number",
    ),
    "allow text": (document(allow="ra_below_24"), "allow: must be a list"),
    "allow unknown": (
        document(allow=["ra_bellow"]),
        "allow.0: must be 'ra_below_24', 'overflow' or 'unknown_unit'",
    ),
    "expected_error table": (
        document(expected_error=100),
        "expected_error = 100 is given where a table is needed",
    ),
    "expected_error label": (
        document(expected_error={"tef": 1}),
        "expected_error.tef.[key]: must be 'teff', 'logg', 'feh' or 'rv'",
    ),
    "expected_error zero": (
        document(expected_error={"teff": 0}),
        "expected_error.teff: must be greater than 0",
    ),
    "expected_error text": (
        document(expected_error={"teff": "9"}),
        "expected_error.teff: must be a valid number",
    ),
    "no columns": (document(columns=None), "'columns' is missing"),
    "columns list": (
        document(columns=[{"teff": SOME}]),
        "columns = [{'teff': {'source': 'x'}}] is given where a table is needed",
    ),
    "columns text": (document(columns="all"), "columns = 'all' is given where a table is needed"),
    "column missing": (document(columns={"teff": SOME}), "[columns.obs_id] is missing"),
    "column scalar": (
        with_column("teff", "TEFF"),
        "columns.teff = 'TEFF' is given where a table is needed",
    ),
    "column unknown": (with_column("tefff", SOME), "not a canonical column"),
    "column key": (with_column("teff", {"sorce": "x"}), "unknown key 'columns.teff.sorce'"),
    "column limits": (with_column("teff", {**SOME, "min": 1}), "unknown key 'columns.teff.min'"),
    "no source": (with_column("teff", {}), "needs either 'source' or 'join'"),
    "both sources": (with_column("obs_id", {**SOME, "join": ["a"]}), "needs either"),
    "source number": (
        with_column("teff", {"source": 5}),
        "columns.teff.source: must be a list",
    ),
    "source numbers": (
        with_column("teff", {"source": [5]}),
        "columns.teff.source.0: must be a valid string",
    ),
    "source empty": (
        with_column("teff", {"source": []}),
        "columns.teff.source: give names of native columns, each once",
    ),
    "source blank": (
        with_column("teff", {"source": ""}),
        "columns.teff.source: give names of native columns, each once",
    ),
    "source twice": (
        with_column("teff", {"source": ["a", "a"]}),
        "columns.teff.source: give names of native columns, each once",
    ),
    "join of a label": (with_column("teff", {"join": ["a", "b"]}), "teff is float32, not string"),
    "join as int": (with_column("obs_id", {"join": ["a"], "dtype": "int64"}), "are strings"),
    "dtype unknown": (
        with_column("obs_id", {**SOME, "dtype": "int"}),
        "columns.obs_id.dtype: must be 'int64', 'float32', 'float64' or 'string'",
    ),
    "dtype number": (
        with_column("obs_id", {**SOME, "dtype": 8}),
        "columns.obs_id.dtype: must be 'int64', 'float32', 'float64' or 'string'",
    ),
    "dtype of ra": (with_column("ra", {**SOME, "dtype": "float32"}), "ra is float64, not float32"),
    "dtype of teff": (with_column("teff", {**SOME, "dtype": "string"}), "teff is float32"),
    "obs_id float": (with_column("obs_id", {**SOME, "dtype": "float64"}), "int64 or string"),
    "gaia id float": (
        with_column("gaia_dr3_source_id", {**SOME, "dtype": "float64"}),
        "gaia_dr3_source_id is int64",
    ),
    "extra id float": (
        with_extra({**SOME, "dtype": "float64"}, "wise_source_id"),
        "loses digits as float64",
    ),
    "unit number": (
        with_column("ra", {**SOME, "unit": 1}),
        "columns.ra.unit: must be a valid string",
    ),
    "unit unknown": (with_column("ra", {**SOME, "unit": "furlongs"}), "does not convert to 'deg'"),
    "unit of another kind": (with_column("ra", {**SOME, "unit": "km"}), "does not convert"),
    "unit empty": (with_column("teff", {**SOME, "unit": ""}), "does not convert to 'K'"),
    "unit of a logarithm": (with_column("logg", {**SOME, "unit": "dex"}), "does not convert to"),
    "unit to a logarithm": (with_column("snr", {**SOME, "unit": "dex"}), "does not convert to ''"),
    "magnitudes are no dex": (with_column("feh", {**SOME, "unit": "mag"}), "does not convert to"),
    "unit of a string": (
        with_column("obs_id", {**SOME, "dtype": "string", "unit": "K"}),
        "a string has no unit",
    ),
    "missing of a string": (
        with_column("obs_id", {**SOME, "dtype": "string", "missing": [0]}),
        "a string has no unit, limits or missing numbers",
    ),
    "column missing scalar": (
        with_column("teff", {**SOME, "missing": -1}),
        "columns.teff.missing: must be a list",
    ),
    "element text": (
        with_column("teff", {**SOME, "element": "0"}),
        "columns.teff.element: must be a valid integer",
    ),
    "element negative": (
        with_column("teff", {**SOME, "element": -1}),
        "columns.teff.element: must be greater than or equal to 0",
    ),
    "element of join": (
        with_column("obs_id", {"join": ["a"], "element": 0}),
        "columns.obs_id: joined columns have no 'element'",
    ),
    "extra list": (
        document(extra=[SOME]),
        "extra = [{'source': 'x'}] is given where a table is needed",
    ),
    "extra scalar": (with_extra("FLAG"), "extra.flag = 'FLAG' is given where a table is needed"),
    "extra canonical": (with_extra(SOME, "parallax"), "has a name that is taken"),
    "extra in capitals": (with_extra(SOME, "TEFF"), "has a name that is taken"),
    "extra reserved": (with_extra(SOME, "star_id"), "has a name that is taken"),
    "extra with a dot": (with_extra(SOME, "a.b"), "letters, digits and _ only"),
    "extra limits": (
        with_extra({**SOME, "min": "0"}),
        "extra.flag.min: must be a valid number",
    ),
    "extra limits swapped": (with_extra({**SOME, "min": 2, "max": 1}), "min 2 is above max 1"),
    "extra description": (
        with_extra({**SOME, "description": 1}),
        "extra.flag.description: must be a valid string",
    ),
    "extra dtype": (
        with_extra({**SOME, "dtype": ["int64"]}),
        "extra.flag.dtype: must be 'int64', 'float32', 'float64' or 'string'",
    ),
    "cuts list": (
        document(cuts=[{"bit": 0}]),
        "cuts = [{'bit': 0}] is given where a table is needed",
    ),
    "cuts text": (document(cuts="snr > 20"), "cuts = 'snr > 20' is given where a table is needed"),
    "cut scalar": (document(cuts={"snr": 20}), "cuts.snr = 20 is given where a table is needed"),
    "cut without bit": (document(cuts={"a": {"column": "x", "min": 1}}), "'cuts.a.bit' is missing"),
    "cut without column": (
        document(cuts={"a": {"bit": 1, "min": 1}}),
        "'cuts.a.column' is missing",
    ),
    "cut column number": (
        with_cut(column=3, min=1),
        "cuts.one.column: must be a valid string",
    ),
    "cut column empty": (
        with_cut(column="", min=1),
        "cuts.one.column: String should have at least 1 character",
    ),
    "cut key": (with_cut(minimum=1), "unknown key 'cuts.one.minimum'"),
    "bit text": (with_cut(bit="x", min=1), "cuts.one.bit: must be a valid integer"),
    "bit true": (with_cut(bit=True, min=1), "cuts.one.bit: must be a valid integer"),
    "bit of the sign": (
        with_cut(bit=63, min=1),
        "cuts.one.bit: must be less than or equal to 62",
    ),
    "bit negative": (
        with_cut(bit=-1, min=1),
        "cuts.one.bit: must be greater than or equal to 0",
    ),
    "min text": (with_cut(min="a"), "cuts.one.min: must be a valid number"),
    "min list": (with_cut(min=[1]), "cuts.one.min: must be a valid number"),
    "max huge": (with_cut(max=10**400), "cuts.one.max: must be a valid number"),
    "limits swapped": (with_cut(min=3, max=2), "min 3 is above max 2"),
    "no test": (with_cut(), "needs one test, and has none"),
    "two tests": (with_cut(min=1, values=[1]), "needs one test, and has min and values"),
    "bits scalar": (with_cut(bits_unset=23), "cuts.one.bits_unset: must be a list"),
    "bits text": (
        with_cut(bits_unset=["23"]),
        "cuts.one.bits_unset.0: must be a valid integer",
    ),
    "bits float": (
        with_cut(bits_unset=[23.0]),
        "cuts.one.bits_unset.0: must be a valid integer",
    ),
    "bits negative": (
        with_cut(bits_unset=[-1]),
        "cuts.one.bits_unset.0: must be greater than or equal to 0",
    ),
    "bits empty": (with_cut(bits_unset=[]), "cuts.one: a cut needs one test, and has none"),
    "values scalar": (with_cut(values=0), "cuts.one.values: must be a list"),
    "values mixed": (with_cut(values=[0, "a"]), "all numbers or all text"),
    "values true": (with_cut(values=[True]), "all numbers or all text"),
    "values empty": (with_cut(values=[]), "cuts.one: a cut needs one test, and has none"),
    "null_passes text": (
        with_cut(min=1, null_passes="yes"),
        "cuts.one.null_passes: must be a valid boolean",
    ),
    "optional number": (
        with_cut(min=1, optional=1),
        "cuts.one.optional: must be a valid boolean",
    ),
    "reason number": (with_cut(min=1, reason=1), "cuts.one.reason: must be a valid string"),
    "name in a table": (with_cut(name="x", min=1), "unknown key 'cuts.one.name'"),
    "bits collide": (
        document(cuts={name: {"bit": 4, "column": "x", "min": 1} for name in ("a", "b")}),
        "bit 4 is used by [cuts.a] and [cuts.b]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_definitions_are_refused(case):
    raw, message = WRONG[case]
    with pytest.raises(SurveyError) as caught:
        parse_survey(raw)
    assert message in caught.value.message


@pytest.mark.parametrize("name", RESERVED)
def test_extras_take_no_reserved_name(name):
    with pytest.raises(SurveyError, match="taken"):
        parse_survey(with_extra(SOME, name))


def test_columns_that_corrections_add_are_reserved():
    errors: Any = SimpleNamespace(describe=lambda label: (label, label))
    added = corrected_schema(pa.schema([]), errors, covered=True).names
    assert len(added) == 14
    assert {*added, FLAGS, KIND_FIELD.name} <= set(RESERVED)


def test_wrong_names_get_suggestions():
    with pytest.raises(SurveyError) as caught:
        load_survey("lamost-dr11")
    assert "lamost-dr11-lrs" in caught.value.hint
    with pytest.raises(SurveyError, match="is not a canonical column") as caught:
        parse_survey(with_column("tefff", SOME))
    assert "teff" in caught.value.hint
    with pytest.raises(SurveyError) as caught:
        parse_survey(with_cut(minn=1))
    assert "min" in caught.value.hint
    with pytest.raises(SurveyError) as caught:
        load_survey("zzzzzzzz")
    assert "sos-dask surveys" in caught.value.hint
    assert nearest("TEFF_ER", ["teff_err", "ra"]) == "Did you mean teff_err?"


TINY = """
format = 1
name = "tiny"
title = "A tiny survey"
missing = [-9999.0]

[columns.obs_id]
source = "id"
[columns.ra]
source = "ra"
[columns.dec]
source = "dec"
[columns.teff]
source = "teff"
[columns.logg]
source = "logg"
[columns.feh]
source = "feh"
[cuts.snr]
bit = 0
column = "snr"
min = 20
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def test_a_file_is_read(tiny):
    survey = load_survey(str(tiny))
    assert survey.name == "tiny" and survey.cuts["snr"].min == 20.0
    assert load_survey(str(tiny)) == survey


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"format = ", "not valid TOML"),
        (b'title = "\xff"', "byte 9 is not UTF-8"),
        (b"", "survey format None is not 1"),
        (TINY.replace("[cuts.snr]", "[[cuts]]").encode(), "is given where a table is needed"),
        (
            TINY.replace("min = 20", "min = 2020-01-01").encode(),
            "cuts.snr.min: must be a valid number",
        ),
        (TINY.replace('source = "teff"', "").encode(), "columns.teff: the table needs either"),
    ],
)
def test_errors_name_the_file(tmp_path, content, message):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(SurveyError) as caught:
        load_survey(str(path))
    assert caught.value.message.startswith(str(path)) and message in caught.value.message


def test_double_brackets_get_a_hint(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(TINY.replace("[cuts.snr]", "[[cuts]]"))
    with pytest.raises(SurveyError) as caught:
        load_survey(str(path))
    assert "[cuts.snr], not [[cuts]]" in caught.value.hint


def test_absent_files_and_folders(tmp_path):
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(SurveyError, match="does not exist"):
            load_survey(f"{path}/" if path == tmp_path else str(path))


def test_overrides_merge(tiny):
    base = load_survey(str(tiny))
    survey = load_survey(str(tiny), {"cuts": {"snr": {"min": 30}}})
    assert survey.cuts == {"snr": Cut(name="snr", bit=0, column="snr", min=30.0)}
    assert survey.columns == base.columns and survey.missing == base.missing
    assert survey.as_json != base.as_json, "a fingerprint must see the override"
    assert load_survey(str(tiny)).as_json == base.as_json


def test_overrides_add_and_remove(tiny):
    added = load_survey(str(tiny), {"cuts": {"teff": {"bit": 5, "column": "teff", "max": 8000}}})
    assert list(added.cuts) == ["snr", "teff"]
    assert load_survey(str(tiny), {"cuts": {"snr": False}}).cuts == {}
    assert load_survey(str(tiny), {"cuts": {"absent": False}}).cuts.keys() == {"snr"}
    assert load_survey(str(tiny), {"missing": []}).missing == ()
    changed = load_survey(str(tiny), {"cuts": {"snr": {"min": False, "max": 9}}}).cuts["snr"]
    assert changed.min is None and changed.max == 9.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("snr", "the overrides must be a table"),
        ({"cuts": {"snr": {"mn": 30}}}, "unknown key 'cuts.snr.mn'"),
        ({"cuts": {"snr": 30}}, "cuts.snr = 30 is given where a table is needed"),
        ({"cut": {"snr": {"min": 30}}}, "unknown key 'cut'"),
        ({"cuts": {"teff": {"min": 30}}}, "'cuts.teff.bit' is missing"),
        ({"cuts": {"snr": {"values": [30]}}}, "has min and values"),
        ({"columns": {"dec": False}}, "[columns.dec] is missing"),
        ({"columns": {"teff": {"unit": "deg"}}}, "does not convert to 'K'"),
        ({"cuts": {"b": {"bit": 0, "column": "x", "min": 0}}}, "bit 0 is used by"),
    ],
)
def test_wrong_overrides_are_refused(tiny, overrides, message):
    with pytest.raises(SurveyError) as caught:
        load_survey(str(tiny), overrides)
    assert message in caught.value.message and "tiny.toml" in caught.value.message


def test_merging_leaves_the_overrides_alone(tiny):
    overrides = {"cuts": {"snr": {"min": 30}}}
    load_survey(str(tiny), overrides)
    assert overrides == {"cuts": {"snr": {"min": 30}}}


def test_errors_survive_a_process_border():
    error = SurveyError("what", "do this")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, SosError) and (copy.message, copy.hint) == ("what", "do this")


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"column": "snrg", "min": 20}, "snrg >= 20"),
        ({"column": "snrg", "min": 0.5, "null_passes": True}, "snrg >= 0.5 or null"),
        ({"column": "teff", "max": 8000.0}, "teff <= 8000"),
        ({"column": "teff", "min": 4000, "max": 8000}, "4000 <= teff <= 8000"),
        ({"column": "ASPCAPFLAG", "bits_unset": [23]}, "ASPCAPFLAG bit 23 unset"),
        ({"column": "ASPCAPFLAG", "bits_unset": [16, 23]}, "ASPCAPFLAG bits 16, 23 unset"),
        ({"column": "flag_sp", "values": [0]}, "flag_sp = 0"),
        ({"column": "class", "values": ["STAR", "WD"]}, "class is one of STAR, WD"),
        ({"column": "flag", "min": 2**40}, "flag >= 1099511627776"),
        ({"column": "flag", "max": 999999999999999.0}, "flag <= 999999999999999"),
        ({"column": "flag", "max": 1e15}, "flag <= 1000000000000000.0"),
        ({"column": "flag", "max": 0.0}, "flag <= 0"),
    ],
)
def test_cuts_in_words(entry, text):
    (cut,) = parse_survey(with_cut(**entry)).cuts.values()
    assert cut.test_text() == text


def test_native_names_in_descriptions():
    raw = with_column("obs_id", {"join": ["a", "b"]})
    raw["columns"]["snr"] = {"source": ["snrg", "snr_g"]}
    raw["columns"]["distance"] = {"source": "d", "unit": "kpc"}
    raw["columns"]["feh"] = {"source": "PARAM", "element": 3}
    native = {row[0]: row[1] for row in describe_columns(parse_survey(raw))}
    assert native["obs_id"] == "a + b"
    assert native["snr"] == "snrg or snr_g"
    assert native["distance"] == "d in kpc"
    assert native["feh"] == "PARAM[3]"
