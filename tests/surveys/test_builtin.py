"""The survey definitions that come with the package are right."""

import csv
import gzip
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow as pa
import pytest

from sos_dask.schema import CANONICAL, LABELS
from sos_dask.surveys import definition
from sos_dask.surveys.definition import (
    COLUMN_HEADINGS,
    CUT_HEADINGS,
    builtin_surveys,
    describe_columns,
    describe_cuts,
    load_survey,
)
from tests.survey_files import unit_is_known

SURVEYS = builtin_surveys()
# Bits of quality that every built-in survey keeps for a label without a value.
MISSING_LABEL_BITS = {"teff": 20, "logg": 21, "feh": 22}
REAL_FILES = {
    "lamost-dr3-giants": "lamost_dr3_giants.csv",
    "lamost-pilot": "lamost_pilot_native_columns.csv",
    "apogee-dr17-subset": "apogee_dr17.csv",
    "apogee-dr12-hipparcos": "apogee_dr12_allstar_hipparcos.fits.gz",
    "galah-dr3-m67": "galah_dr3_m67.csv",
    "galah-dr4-subset": "galah_dr4.csv",
}


def test_the_promised_surveys_are_there():
    assert set(SURVEYS) >= {
        *(f"lamost-dr{release}-lrs" for release in (8, 9, 10, 11)),
        *("apogee-dr17", "galah-dr3", "galah-dr4", "lamost-dr11-mrs", "gaia-eso-dr5", "rave-dr6"),
        *("segue-dr12", "desi-mws-dr1", "sdss-dr19-aspcap", "gaia-dr3-rvs"),
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
    assert len({cut.bit for cut in survey.cuts.values()}) == len(survey.cuts)
    assert all(cut.reason for cut in survey.cuts.values())
    for label, bit in MISSING_LABEL_BITS.items():
        (cut,) = (cut for cut in survey.cuts.values() if cut.bit == bit)
        assert cut.column == label and not cut.null_passes
        assert cut.min == CANONICAL[label].minimum, "no possible value fails"
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
        "import sys; from sos_dask.surveys.definition import builtin_surveys, load_survey; "
        "[load_survey(name) for name in builtin_surveys()]; assert 'astropy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("name", SURVEYS)
def test_text_of_builtin_definition_names_no_machine(name):
    survey = load_survey(name)
    text = (Path(definition.__file__).parent / f"{name}.toml").read_text()
    assert "/work" not in text and "/home" not in text
    # Rich takes a word in brackets for a style and drops it.
    assert not re.search(
        r"\[[a-z#/@]", survey.notes + "".join(cut.reason for cut in survey.cuts.values())
    )


@pytest.mark.parametrize("name", SURVEYS)
def test_what_is_from_memory_is_said(name):
    """In the reason of the cut, which ``sos-dask surveys NAME`` shows."""
    text = (Path(definition.__file__).parent / f"{name}.toml").read_text()
    for cut in re.findall(r"# \[[CU]\][^\n]*\n\[cuts\.(\w+)\]", text):
        assert re.search("not prescribed|not checked", load_survey(name).cuts[cut].reason), cut


@pytest.mark.parametrize("name", SURVEYS)
def test_overrides_that_notes_tell_are_right(name):
    text = " ".join(load_survey(name).notes.split())
    for begin in re.finditer(r"override = \{", text):
        depth, stop = 1, begin.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[stop], 0)
            stop += 1
        override = tomllib.loads(text[begin.start() : stop])["override"]
        assert load_survey(name, override) != load_survey(name), override


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
    assert gaia["gaia-eso-dr5"] == gaia["segue-dr12"] == set()
    assert gaia["sdss-dr19-aspcap"] == gaia["galah-dr3"]
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
    for cut in survey.cuts.values():
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


@pytest.mark.parametrize("name", SURVEYS)
def test_descriptions_are_text(name):
    survey = load_survey(name)
    columns, cuts = describe_columns(survey), describe_cuts(survey)
    assert len(columns) == len(survey.columns) + 1  # position_epoch of the whole survey
    assert [row[0] for row in cuts] == [cut.name for cut in survey.cuts.values()]
    for rows, headings in ((columns, COLUMN_HEADINGS), (cuts, CUT_HEADINGS)):
        assert all(len(row) == len(headings) for row in rows)
        assert all(isinstance(cell, str) for row in rows for cell in row)
