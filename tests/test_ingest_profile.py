import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.errors import SurveyError
from sos_dask.ingest.canonical import Profile, check_profile, label_bins
from sos_dask.surveys.definition import Survey
from tests.survey_files import read, rows, survey, write_fits


def profile_of(tmp_path, data: dict, definition: Survey | None = None, **kwargs):
    return read(write_fits(tmp_path / "data", data), definition or survey(), **kwargs).profile


def test_profiles_do_not_depend_on_chunks_and_survive_json(tmp_path):
    data = rows(200)
    data["teff"][::7] = 3.7
    data["ra"][::50] = 400
    whole = profile_of(tmp_path, data)
    parts = read(tmp_path / "data", survey(), chunk_rows=60, batch_rows=17).batches
    profiles = [batch.profile for batch in parts]
    for order in (profiles, profiles[::-1], [Profile(), *profiles]):
        assert Profile.merge(order) == whole
    for profile in (whole, Profile()):
        assert Profile(**json.loads(json.dumps(profile.model_dump()))) == profile
    assert Profile() == Profile.merge([])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2e5, 2e5, width=32), min_size=1))
def test_medians(values):
    median = Profile(labels={"feh": label_bins(np.array(values))}).median("feh")
    expected = float(np.sort(np.array(values, np.float32))[(len(values) - 1) // 2])
    assert median == pytest.approx(expected, rel=0.05, abs=1e-37)


def test_a_good_file_passes(tmp_path):
    profile = profile_of(tmp_path, rows(200))
    check_profile(profile, survey(), ["data"])
    assert profile.median("teff") == pytest.approx(np.median(rows(200)["teff"]), rel=0.04)


def refused(profile: Profile, *words: str, definition: Survey | None = None) -> None:
    with pytest.raises(SurveyError) as caught:
        check_profile(profile, definition or survey(), ["a/data.fits", "b/data.fits"])
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_logarithm_of_temperature_is_refused(tmp_path):
    data = rows(100)
    data["teff"] = np.log10(data["teff"])
    data["teff"][:60] = -9999
    profile = profile_of(tmp_path, data)
    refused(
        profile, "a/data.fits", "'teff'", "looks like log10 of a temperature: its median is 3.6"
    )


def test_other_units_are_noticed_by_the_values(tmp_path):
    data = rows(100)
    data["teff"] /= 1000
    data["teff"][0] = 5.0
    refused(profile_of(tmp_path, data), "'teff'", "100 of 100", "1000 to 100000 K", "row 0")
    data = rows(100)
    data["logg"] += 20
    data["logg"][:3] = 4
    refused(profile_of(tmp_path, data, index=1), "b/data.fits", "97 of 100", "-2 to 10", "in row 3")
    data = rows(100)
    data["feh"] = 10 ** data["feh"] * 1e3
    refused(profile_of(tmp_path, data), "column 'feh' ('feh')", "[columns.feh]")


def test_a_label_without_values_is_refused(tmp_path):
    data = rows(100)
    data["feh"][:] = -9999
    refused(profile_of(tmp_path, data), "column 'feh'", "no value in any row", "[columns.feh]")
    data["feh"][7] = 0
    check_profile(profile_of(tmp_path, data), survey(), ["data"])


def test_right_ascension_in_hours_is_refused(tmp_path):
    data = rows(100)
    data["ra"] /= 15
    profile = profile_of(tmp_path, data)
    refused(profile, "column 'ra'", "hours", 'unit = "hourangle"', 'allow = ["ra_below_24"]')
    check_profile(profile, survey(allow=["ra_below_24"]), ["data"])
    small = {name: array[:49] for name, array in data.items()}
    check_profile(profile_of(tmp_path, small), survey(), ["data"])
    strip = data | {"dec": data["dec"] / 18}
    check_profile(profile_of(tmp_path, strip), survey(), ["data"])


def test_positions_in_radians_are_refused(tmp_path):
    data = rows(100)
    data |= {name: np.radians(data[name]) for name in ("ra", "dec")}
    profile = profile_of(tmp_path, data)
    refused(profile, "column 'ra'", "radians", 'unit = "rad"', 'allow = ["ra_below_24"]')
    check_profile(profile, survey(allow=["ra_below_24"]), ["data"])
    field = data | {"ra": data["ra"] / 2}
    check_profile(profile_of(tmp_path, field), survey(), ["data"])
    strip = data | {"dec": data["dec"] / 4}
    check_profile(profile_of(tmp_path, strip), survey(), ["data"])


def test_many_rejected_rows_are_refused(tmp_path):
    data = rows(1000)
    data["dec"][100:110] = -99.0
    check_profile(profile_of(tmp_path, data), survey(), ["data"])
    data["ra"][50] = np.nan
    profile = profile_of(tmp_path, data)
    words = [
        "11 of 1000",
        "10 dec out of range",
        "1 null position",
        "a/data.fits row 50",
        "ra null",
    ]
    refused(profile, *words, "max_rejected_fraction")
    check_profile(profile, survey(max_rejected_fraction=0.02), ["data"])
    few = {name: array[50:51] for name, array in data.items()}
    refused(profile_of(tmp_path, few), "1 of 1 rows")
