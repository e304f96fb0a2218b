"""Survey definitions: the built-in ones are right, wrong ones are refused with a message."""

import csv
import gzip
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sos_dask.errors import ConfigError, SosError, SurveyError
from sos_dask.schema import (
    CANONICAL,
    HEALPIX,
    LABELS,
    MISSING_LABEL_BITS,
    QUALITY,
    RESERVED,
    TEXT_UNITS,
    nearest,
    require_columns,
)
from sos_dask.survey import COLUMN_HEADINGS, CUT_HEADINGS, Cut, describe_columns, describe_cuts
from sos_dask.survey_file import builtin_surveys, load_survey, parse_survey

SURVEYS = builtin_surveys()
REAL_FILES = {
    "lamost-dr3-giants": "lamost_dr3_giants.csv",
    "lamost-pilot": "lamost_pilot_native_columns.csv",
    "apogee-dr17-subset": "apogee_dr17.csv",
    "apogee-dr12-hipparcos": "apogee_dr12_allstar_hipparcos.fits.gz",
    "galah-dr3-m67": "galah_dr3_m67.csv",
    "galah-dr4-subset": "galah_dr4.csv",
}


def document(**changes: Any) -> dict[str, Any]:
    """The smallest valid definition, with changes; None removes a key."""
    raw: dict[str, Any] = {
        "format": 1,
        "name": "tiny",
        "title": "A tiny survey",
        "columns": {
            name: {"source": name} for name in ("obs_id", "ra", "dec", "teff", "logg", "feh")
        },
        "cuts": {"snr": {"bit": 0, "column": "snr", "min": 20}},
        **changes,
    }
    return {key: value for key, value in raw.items() if value is not None}


def with_column(name: str, entry: Any) -> dict[str, Any]:
    raw = document()
    raw["columns"][name] = entry
    return raw


def with_extra(entry: Any, name: str = "flag") -> dict[str, Any]:
    return document(extra={name: entry})


def with_cut(**entry: Any) -> dict[str, Any]:
    return document(cuts={"one": {"bit": 0, "column": "snr", **entry}})


# --- the canonical columns ------------------------------------------------------------------------


def unit_is_known(unit: str) -> bool:
    from astropy import units

    return unit in TEXT_UNITS or units.Unit(unit) is not None


@pytest.mark.parametrize("column", [*CANONICAL.values(), QUALITY, HEALPIX], ids=lambda c: c.name)
def test_canonical_columns_have_valid_units_and_ucds(column):
    from astropy.io.votable.ucd import parse_ucd

    assert unit_is_known(column.unit)
    assert parse_ucd(column.ucd, check_controlled_vocabulary=True)
    assert column.description
    if column.minimum is not None:
        assert column.minimum < column.maximum


def test_canonical_fields_carry_their_meaning():
    field = CANONICAL["teff"].arrow()
    assert field.type == pa.float32()
    assert field.metadata[b"unit"] == b"K"
    assert field.metadata[b"ucd"] == b"phys.temperature.effective"
    assert b"unit" not in CANONICAL["obs_id"].arrow().metadata
    assert CANONICAL["obs_id"].arrow("string", nullable=False) == pa.field(
        "obs_id", pa.string(), nullable=False
    )


# --- the built-in surveys -------------------------------------------------------------------------


def test_the_promised_surveys_are_there():
    assert set(SURVEYS) >= {
        *(f"lamost-dr{release}-lrs" for release in (8, 9, 10, 11)),
        *("apogee-dr17", "galah-dr3", "galah-dr4"),
        *REAL_FILES,
    }
    assert sorted(SURVEYS) == SURVEYS


@pytest.mark.parametrize("name", SURVEYS)
def test_builtin_survey(name):
    from astropy.io.votable.ucd import parse_ucd

    survey = load_survey(name)
    assert survey.name == name
    assert survey.title and survey.reference and survey.notes
    assert survey.position_epoch is not None
    for source in survey.columns.values():
        assert unit_is_known(source.column.unit)
        assert parse_ucd(source.column.ucd, check_controlled_vocabulary=True)
        assert source.column.description
    assert len({cut.bit for cut in survey.cuts}) == len(survey.cuts)
    assert all(cut.reason for cut in survey.cuts)
    for label, bit in MISSING_LABEL_BITS.items():
        (cut,) = (cut for cut in survey.cuts if cut.bit == bit)
        assert cut.column == label and not cut.null_passes
        assert cut.minimum == CANONICAL[label].minimum, "no possible value fails"
    for label in LABELS:
        assert f"{label}_err" in survey.columns or label in survey.expected_error
    for label, error in survey.expected_error.items():
        low, high = {"teff": (1, 500), "logg": (0.01, 1), "feh": (0.001, 1), "rv": (0.1, 20)}[label]
        assert low <= error <= high
    assert pickle.loads(pickle.dumps(survey)) == survey


@pytest.mark.parametrize("name", SURVEYS)
def test_schema_of_builtin_survey(name):
    survey = load_survey(name)
    schema = survey.arrow_schema()
    assert schema.names[0] == "_healpix_29" and schema.names[-1] == "quality"
    assert len(set(schema.names)) == len(schema.names)
    assert "position_epoch" in schema.names
    for column, dtype in (("ra", pa.float64()), ("dec", pa.float64()), ("quality", pa.int64())):
        assert schema.field(column).type == dtype
    for column in ("_healpix_29", "obs_id", "ra", "dec", "quality"):
        assert not schema.field(column).nullable
    assert schema.field("teff").nullable
    assert [name for name in schema.names if name in survey.columns] == list(survey.columns)


def test_definitions_load_without_astropy():
    code = (
        "import sys; from sos_dask.schema import builtin_surveys, load_survey; "
        "[load_survey(name) for name in builtin_surveys()]; assert 'astropy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("name", SURVEYS)
def test_text_of_builtin_definition_names_no_machine(name):
    survey = load_survey(name)
    text = json.dumps([survey.notes, survey.reference, survey.title, survey.definition])
    assert "/work" not in text and "/home" not in text
    # Rich takes a word in brackets for a style and drops it.
    assert not re.search(r"\[[a-z#/@]", survey.notes + "".join(cut.reason for cut in survey.cuts))


def test_gaia_releases_are_not_mixed():
    gaia = {
        name: {column for column in load_survey(name).columns if column.startswith("gaia")}
        for name in SURVEYS
    }
    assert gaia["lamost-dr8-lrs"] == {"gaia_dr2_source_id"}
    assert gaia["lamost-dr11-lrs"] == {"gaia_dr3_source_id"}
    for name in ("lamost-dr9-lrs", "lamost-dr10-lrs"):
        assert gaia[name] == set(), "the release of its Gaia ids is not known"
        assert "gaia_dr3_source_id" in load_survey(name).notes
    assert gaia["galah-dr3"] == {"gaia_dr2_source_id", "gaia_dr3_source_id"}
    for name in SURVEYS:
        for column in gaia[name]:
            assert 0.0 in load_survey(name).columns[column].missing


def test_a_job_maps_the_gaia_ids_it_knows():
    entry = {"source": "gaia_source_id", "missing": [0]}
    survey = load_survey("lamost-dr10-lrs", {"columns": {"gaia_dr3_source_id": entry}})
    assert survey.columns["gaia_dr3_source_id"].sources == ("gaia_source_id",)
    assert survey.arrow_schema().field("gaia_dr3_source_id").type == pa.int64()


@pytest.mark.parametrize("name", sorted(REAL_FILES))
def test_native_columns_are_in_the_real_file(name, real_data):
    path = real_data / REAL_FILES[name]
    survey = load_survey(name)
    if path.name.endswith(".fits.gz"):
        from astropy.io import fits

        with gzip.open(path) as stream, fits.open(stream) as hdus:
            header = set(hdus[survey.hdu].columns.names)
    else:
        with path.open(newline="") as lines:
            header = set(next(csv.reader(lines)))
    for source in survey.columns.values():
        if source.join:
            assert header.issuperset(source.sources)
        else:
            assert header.intersection(source.sources), source.column.name
    for cut in survey.cuts:
        assert cut.column in header or cut.column in survey.columns, cut.name


@pytest.mark.parametrize(
    ("name", "n_rows", "n_distinct"),
    [
        ("apogee-dr17-subset", 56664, 56664),
        ("galah-dr4-subset", 2018, 1820),
        ("lamost-dr3-giants", 27125, 21960),
        ("lamost-pilot", 3165, 3165),
        ("galah-dr3-m67", 813, 813),
    ],
)
def test_obs_id_tells_different_rows_apart_in_the_real_file(name, n_rows, n_distinct, real_data):
    survey = load_survey(name)
    with (real_data / REAL_FILES[name]).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == n_rows
    assert len({tuple(row.values()) for row in rows}) == n_distinct
    sources = survey.columns["obs_id"].sources
    assert len({".".join(row[source] for source in sources) for row in rows}) == n_distinct


# --- reading --------------------------------------------------------------------------------------


def test_the_smallest_definition():
    survey = parse_survey(document(cuts=None))
    assert list(survey.columns) == ["obs_id", "ra", "dec", "teff", "logg", "feh"]
    assert survey.hdu == 1 and survey.cuts == () and survey.missing == ()
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
    "name is a number": (document(name=3), "'name' in the survey must be text"),
    "name with a space": (document(name="my survey"), "lower-case letters"),
    "title is a list": (document(title=["a"]), "'title' in the survey must be text"),
    "notes is a number": (document(notes=1.5), "'notes' in the survey must be text"),
    "unknown key": (document(positon_epoch=2000), "unknown key 'positon_epoch'"),
    "hdu text": (document(hdu="1"), "'hdu' in the survey must be a whole number"),
    "hdu float": (document(hdu=1.0), "'hdu' in the survey must be a whole number"),
    "hdu true": (document(hdu=True), "'hdu' in the survey must be a whole number"),
    "hdu negative": (document(hdu=-1), "hdu -1 holds no table"),
    "hdu of the primary": (document(hdu=0), "hdu 0 holds no table"),
    "epoch text": (document(position_epoch="J2000"), "'position_epoch' in the survey must be a nu"),
    "epoch as a day": (document(position_epoch=57204), "not a Julian year"),
    "epoch nan": (document(position_epoch=float("nan")), "must be a number"),
    "missing scalar": (document(missing=-9999), "'missing' in the survey must be a list"),
    "missing text": (document(missing=["-9999"]), "'missing' in the survey must hold numbers"),
    "missing nan": (document(missing=[float("nan")]), "must hold numbers"),
    "missing true": (document(missing=[True]), "must hold numbers"),
    "missing_text scalar": (document(missing_text="null"), "'missing_text' in the survey must be"),
    "missing_text number": (document(missing_text=[-9999]), "must hold text"),
    "fraction": (document(max_rejected_fraction=2), "outside 0..1"),
    "fraction text": (document(max_rejected_fraction="1%"), "must be a number"),
    "allow text": (document(allow="ra_below_24"), "'allow' in the survey must be a list"),
    "allow unknown": (document(allow=["ra_bellow"]), "'allow' in the survey names no check: 'ra_b"),
    "expected_error table": (document(expected_error=100), "[expected_error] must be a table"),
    "expected_error label": (document(expected_error={"tef": 1}), "unknown key 'tef'"),
    "expected_error zero": (document(expected_error={"teff": 0}), "must be above 0"),
    "expected_error text": (document(expected_error={"teff": "9"}), "must be a number"),
    "no columns": (document(columns=None), "'columns' is missing"),
    "columns list": (document(columns=[{"teff": SOME}]), "[columns] must be a table"),
    "columns text": (document(columns="all"), "[columns] must be a table"),
    "column missing": (document(columns={"teff": SOME}), "[columns.obs_id] is missing"),
    "column scalar": (with_column("teff", "TEFF"), "[columns.teff] must be a table"),
    "column unknown": (with_column("tefff", SOME), "not a canonical column"),
    "column key": (with_column("teff", {"sorce": "x"}), "unknown key 'sorce' in [columns.teff]"),
    "column limits": (with_column("teff", {**SOME, "min": 1}), "unknown key 'min'"),
    "no source": (with_column("teff", {}), "needs either 'source' or 'join'"),
    "both sources": (with_column("obs_id", {**SOME, "join": ["a"]}), "needs either"),
    "source number": (with_column("teff", {"source": 5}), "'source' in [columns.teff] must be"),
    "source numbers": (with_column("teff", {"source": [5]}), "must hold text"),
    "source empty": (with_column("teff", {"source": []}), "take column names"),
    "source blank": (with_column("teff", {"source": ""}), "take column names"),
    "source twice": (with_column("teff", {"source": ["a", "a"]}), "take column names, each once"),
    "join of a label": (with_column("teff", {"join": ["a", "b"]}), "teff is float32, not string"),
    "join as int": (with_column("obs_id", {"join": ["a"], "dtype": "int64"}), "are strings"),
    "dtype unknown": (with_column("obs_id", {**SOME, "dtype": "int"}), "dtype 'int' is not one"),
    "dtype number": (with_column("obs_id", {**SOME, "dtype": 8}), "'dtype' in [columns.obs_id]"),
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
    "unit number": (with_column("ra", {**SOME, "unit": 1}), "'unit' in [columns.ra] must be text"),
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
    "column missing scalar": (with_column("teff", {**SOME, "missing": -1}), "must be a list"),
    "element text": (with_column("teff", {**SOME, "element": "0"}), "must be a whole number"),
    "element negative": (with_column("teff", {**SOME, "element": -1}), "'element' counts from 0"),
    "element of join": (with_column("obs_id", {"join": ["a"], "element": 0}), "have none"),
    "extra list": (document(extra=[SOME]), "[extra] must be a table"),
    "extra scalar": (with_extra("FLAG"), "[extra.flag] must be a table"),
    "extra canonical": (with_extra(SOME, "parallax"), "has a name that is taken"),
    "extra in capitals": (with_extra(SOME, "TEFF"), "has a name that is taken"),
    "extra reserved": (with_extra(SOME, "star_id"), "has a name that is taken"),
    "extra with a dot": (with_extra(SOME, "a.b"), "letters, digits and _ only"),
    "extra limits": (with_extra({**SOME, "min": "0"}), "'min' in [extra.flag] must be a number"),
    "extra limits swapped": (with_extra({**SOME, "min": 2, "max": 1}), "min 2 is above max 1"),
    "extra description": (with_extra({**SOME, "description": 1}), "'description' in [extra.flag]"),
    "extra dtype": (with_extra({**SOME, "dtype": ["int64"]}), "'dtype' in [extra.flag] must be"),
    "cuts list": (document(cuts=[{"bit": 0}]), "[cuts] must be a table"),
    "cuts text": (document(cuts="snr > 20"), "[cuts] must be a table"),
    "cut scalar": (document(cuts={"snr": 20}), "[cuts.snr] must be a table"),
    "cut without bit": (document(cuts={"a": {"column": "x", "min": 1}}), "[cuts.a] needs 'bit'"),
    "cut without column": (document(cuts={"a": {"bit": 1, "min": 1}}), "needs 'column'"),
    "cut column number": (with_cut(column=3, min=1), "'column' in [cuts.one] must be text"),
    "cut column empty": (with_cut(column="", min=1), "'column' is empty"),
    "cut key": (with_cut(minimum=1), "unknown key 'minimum' in [cuts.one]"),
    "bit text": (with_cut(bit="x", min=1), "'bit' in [cuts.one] must be a whole number"),
    "bit true": (with_cut(bit=True, min=1), "must be a whole number"),
    "bit of the sign": (with_cut(bit=63, min=1), "bit 63 is outside 0..62"),
    "bit negative": (with_cut(bit=-1, min=1), "bit -1 is outside 0..62"),
    "min text": (with_cut(min="a"), "'min' in [cuts.one] must be a number"),
    "min list": (with_cut(min=[1]), "'min' in [cuts.one] must be a number"),
    "max huge": (with_cut(max=10**400), "'max' in [cuts.one] must be a number"),
    "limits swapped": (with_cut(min=3, max=2), "min 3 is above max 2"),
    "no test": (with_cut(), "needs one test, and has none"),
    "two tests": (with_cut(min=1, values=[1]), "needs one test, and has min and values"),
    "bits scalar": (with_cut(bits_unset=23), "'bits_unset' in [cuts.one] must be a list"),
    "bits text": (with_cut(bits_unset=["23"]), "must be bit numbers"),
    "bits float": (with_cut(bits_unset=[23.0]), "must be bit numbers"),
    "bits negative": (with_cut(bits_unset=[-1]), "must be bit numbers"),
    "bits empty": (with_cut(bits_unset=[]), "'bits_unset' is empty"),
    "values scalar": (with_cut(values=0), "'values' in [cuts.one] must be a list"),
    "values mixed": (with_cut(values=[0, "a"]), "all numbers or all text"),
    "values true": (with_cut(values=[True]), "all numbers or all text"),
    "values empty": (with_cut(values=[]), "'values' is empty"),
    "null_passes text": (with_cut(min=1, null_passes="yes"), "must be true or false"),
    "optional number": (with_cut(min=1, optional=1), "must be true or false"),
    "reason number": (with_cut(min=1, reason=1), "'reason' in [cuts.one] must be text"),
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
    assert nearest("qqqq", ["teff_err", "ra"]) == ""


def test_require_columns_names_the_column_and_the_nearest():
    schema = pa.schema([("teff", pa.float32()), ("logg", pa.float32())])
    require_columns(schema, ("teff", "logg"), "catalog x")
    with pytest.raises(ConfigError, match="catalog x has no column 'teff_k'") as caught:
        require_columns(schema, ("teff", "teff_k"), "catalog x")
    assert "teff" in caught.value.hint


# --- files and overrides --------------------------------------------------------------------------

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
    assert survey.name == "tiny" and survey.cuts[0].minimum == 20.0
    assert load_survey(str(tiny)) == survey


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"format = ", "not valid TOML"),
        (b'title = "\xff"', "byte 9 is not UTF-8"),
        (b"", "survey format None is not 1"),
        (TINY.replace("[cuts.snr]", "[[cuts]]").encode(), "[cuts] must be a table"),
        (TINY.replace("min = 20", "min = 2020-01-01").encode(), "'min' in [cuts.snr] must be"),
        (TINY.replace('source = "teff"', "").encode(), "[columns.teff] needs either"),
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
    assert survey.cuts == (Cut("snr", 0, "snr", minimum=30.0),)
    assert survey.columns == base.columns and survey.missing == base.missing
    assert survey.definition != base.definition, "a fingerprint must see the override"
    assert load_survey(str(tiny)).definition == base.definition


def test_overrides_add_and_remove(tiny):
    added = load_survey(str(tiny), {"cuts": {"teff": {"bit": 5, "column": "teff", "max": 8000}}})
    assert [cut.name for cut in added.cuts] == ["snr", "teff"]
    assert load_survey(str(tiny), {"cuts": {"snr": False}}).cuts == ()
    assert load_survey(str(tiny), {"cuts": {"absent": False}}).cuts[0].name == "snr"
    assert load_survey(str(tiny), {"missing": []}).missing == ()
    changed = load_survey(str(tiny), {"cuts": {"snr": {"min": False, "max": 9}}}).cuts[0]
    assert changed.minimum is None and changed.maximum == 9.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("snr", "the overrides must be a table"),
        ({"cuts": {"snr": {"mn": 30}}}, "unknown key 'mn' in [cuts.snr]"),
        ({"cuts": {"snr": 30}}, "[cuts.snr] must be a table"),
        ({"cut": {"snr": {"min": 30}}}, "unknown key 'cut'"),
        ({"cuts": {"teff": {"min": 30}}}, "[cuts.teff] needs 'bit'"),
        ({"cuts": {"snr": {"values": [30]}}}, "has min and values"),
        ({"columns": {"teff": False}}, "[columns.teff] is missing"),
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


# --- descriptions ---------------------------------------------------------------------------------


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
    ],
)
def test_cuts_in_words(entry, text):
    (cut,) = parse_survey(with_cut(**entry)).cuts
    assert cut.test_text() == text


@pytest.mark.parametrize("name", SURVEYS)
def test_descriptions_are_text(name):
    survey = load_survey(name)
    columns, cuts = describe_columns(survey), describe_cuts(survey)
    assert len(columns) == len(survey.columns) + 1  # position_epoch of the whole survey
    assert [row[0] for row in cuts] == [cut.name for cut in survey.cuts]
    for rows, headings in ((columns, COLUMN_HEADINGS), (cuts, CUT_HEADINGS)):
        assert all(len(row) == len(headings) for row in rows)
        assert all(isinstance(cell, str) for row in rows for cell in row)


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


def test_errors_survive_a_process_border():
    error = SurveyError("what", "do this")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, SosError) and (copy.message, copy.hint) == ("what", "do this")
