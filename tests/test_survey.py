"""Surveys in words."""

import pytest

from sos_dask.surveys.definition import describe_columns, parse_survey
from tests.survey_files import with_column, with_cut


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
