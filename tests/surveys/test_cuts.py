import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.errors import SurveyError
from sos_dask.surveys.definition import Survey, parse_survey, passing


def survey_with(cuts: dict, **more) -> Survey:
    columns = {name: {"source": name} for name in ("obs_id", "ra", "dec", "teff", "logg", "feh")}
    raw = {"format": 1, "name": "s", "title": "S", "columns": columns, "cuts": cuts}
    return parse_survey(raw | more)


def passes(values, cut: dict, **more) -> list:
    survey = survey_with({"c": {"bit": 5, "column": "x"} | cut}, **more)
    found = passing(survey.cuts["c"], values, survey)
    assert found.dtype == bool
    return found.tolist()


def test_limits_are_inclusive():
    assert passes(np.array([1.0, 2.0, 3.0, 4.0]), {"min": 2, "max": 3}) == [
        False,
        True,
        True,
        False,
    ]


def test_a_limit_is_compared_as_the_column_stores_it():
    assert passes(np.array([0.1], dtype=np.float32), {"min": 0.1}) == [True]
    assert passes(np.array([0.1], dtype=np.float32), {"max": 0.1}) == [True]


@pytest.mark.parametrize("null_passes", [False, True])
def test_nulls(null_passes):
    cut = {"min": 0, "null_passes": null_passes}
    values = np.array([np.nan, np.inf, -np.inf, -9999.0, 1.0, -1.0])
    expected = [null_passes] * 4 + [True, False]
    assert passes(values, cut, missing=[-9999.0]) == expected
    assert passes(pa.array([None, 1, -1]), cut) == [null_passes, True, False]


def test_a_sentinel_inside_the_limits_is_null():
    assert passes(np.array([99.9, 5.0]), {"min": 0}, missing=[99.9]) == [False, True]
    assert passes(np.array([99.9, 5.0], dtype=np.float32), {"min": 0}, missing=[99.9])[0] is False
    assert passes(np.array([99, 5]), {"min": 0}, missing=[99]) == [False, True]


@pytest.mark.parametrize(
    "dtype", [np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float64]
)
def test_bits(dtype):
    values = np.array([0, 1, 2, 4, 6, 1 << 14], dtype=dtype)
    assert passes(values, {"bits_unset": [1, 14]}) == [True, True, False, True, False, False]


def test_bits_above_31():
    values = np.array([0, 1 << 31, 1 << 40, -(1 << 63)], dtype=np.int64)
    assert passes(values, {"bits_unset": [40]}) == [True, True, False, True]
    assert passes(values, {"bits_unset": [63]}) == [True, True, True, False]
    assert passes(values.astype(np.uint64), {"bits_unset": [63]}) == [True, True, True, False]
    assert passes(np.array([-32768], np.int16), {"bits_unset": [15]}) == [False]


def test_a_sentinel_of_the_survey_is_a_value_where_bits_are_tested():
    values = np.array([-9999, 8], dtype=np.int32)  # bit 3 of -9999 is 0
    assert passes(values, {"bits_unset": [3]}, missing=[-9999]) == [True, False]


def test_bits_of_a_null_and_of_a_fraction():
    assert passes(pa.array([None, 0, 2]), {"bits_unset": [1]}) == [False, True, False]
    assert passes(np.array([np.nan, 0.0, 2.0]), {"bits_unset": [1]}) == [False, True, False]
    with pytest.raises(SurveyError, match=r"cut 'c' \(x bit 1 unset\).*'x' contains fractions"):
        passes(np.array([0.5]), {"bits_unset": [1]})


def test_values():
    assert passes(np.array([0, 1, 2]), {"values": [0, 2]}) == [True, False, True]
    assert passes(np.array([0.1, 0.2], np.float32), {"values": [0.2]}) == [False, True]
    text = pa.array(["STAR", " STAR ", "star", "", None, "N/A"])
    cut = {"values": ["STAR"]}
    assert passes(text, cut, missing_text=["N/A"]) == [True, True, False, False, False, False]
    passing = cut | {"null_passes": True}
    assert passes(text, passing, missing_text=["N/A"]) == [True, True, False, True, True, True]
    assert passes(text, {"values": ["", "star"]}) == [False, False, True, True, True, False]


def test_text_and_numbers_do_not_mix():
    with pytest.raises(SurveyError, match="column 'x' contains text"):
        passes(pa.array(["a"]), {"min": 0})
    with pytest.raises(SurveyError, match="contains numbers, and the cut lists text"):
        passes(np.array([1]), {"values": ["a"]})


def test_booleans_are_numbers():
    assert passes(pa.array([True, False, None]), {"values": [1]}) == [True, False, False]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.none() | st.floats(width=64, allow_subnormal=False), min_size=1),
    st.none() | st.integers(-5, 5),
    st.none() | st.integers(-5, 5),
    st.booleans(),
)
def test_limits_as_row_by_row(values, low, high, null_passes):
    if low is None and high is None:
        high = 0
    if low is not None and high is not None and low > high:
        low, high = high, low
    cut = {"null_passes": null_passes}
    cut |= {} if low is None else {"min": low}
    cut |= {} if high is None else {"max": high}

    def row(value):
        if value is None or not np.isfinite(value) or value == -3.0:
            return null_passes
        return (low is None or value >= low) and (high is None or value <= high)

    array = pa.array(values, pa.float64())
    assert passes(array, cut, missing=[-3.0]) == [row(value) for value in values]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1),
    st.sets(st.integers(0, 63), min_size=1),
)
def test_bits_as_row_by_row(values, bits):
    expected = [all(value >> bit & 1 == 0 for bit in bits) for value in values]
    assert passes(np.array(values, dtype=np.int64), {"bits_unset": sorted(bits)}) == expected


def test_floats_hold_bits_up_to_their_fraction():
    cut = {"bits_unset": [0]}
    assert passes(np.array([2.0**53 - 1, 2.0**53 - 2]), cut) == [False, True]
    with pytest.raises(SurveyError, match="contains fractions"):
        passes(np.array([2.0**53]), cut)
