import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.columns import as_array, floats, floats32, floats_or_nan, is_valid, matrix32, taken


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.int32()])
def test_nulls_are_nan_in_any_number_of_chunks(kind):
    column = pa.chunked_array([pa.array([1, None], kind), pa.array([], kind), pa.array([3], kind)])
    table = pa.table({"x": column})
    for found, dtype in ((floats(table, "x"), np.float64), (floats32(table, "x"), np.float32)):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, [1, np.nan, 3])


def test_matrix_has_the_columns_in_the_order_asked_for():
    table = pa.table({"a": [1.0, None], "b": [0.1, 4.0]})
    np.testing.assert_array_equal(
        matrix32(table, ["b", "a"]), np.array([[0.1, 1], [4, np.nan]], np.float32)
    )


def test_a_column_that_is_not_there_is_nan_only_where_that_is_asked_for():
    table = pa.table({"a": [1.0, None]})
    np.testing.assert_array_equal(floats_or_nan(table, "a"), [1, np.nan])
    np.testing.assert_array_equal(floats_or_nan(table, "b"), [np.nan, np.nan])
    with pytest.raises(KeyError):
        floats(table, "b")


@pytest.mark.parametrize(
    "kind", [pa.int64(), pa.float32(), pa.int8(), pa.bool_(), pa.string()], ids=str
)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_in_the_order_of_an_index(kind, data):
    values = data.draw(st.lists(st.none() | st.integers(0, 1), min_size=1, max_size=30))
    cut = data.draw(st.integers(0, len(values) - 1))
    column = pa.array(values, pa.int8()).cast(kind).slice(cut)
    rows = data.draw(st.lists(st.integers(0, len(column) - 1), max_size=40))
    index = np.array(rows, dtype=np.int64)
    found = taken(column, index)
    found.validate(full=True)
    assert found.equals(column.take(pa.array(index)))
    assert is_valid(column).tolist() == [value is not None for value in column.to_pylist()]
    assert found.null_count == sum(column[row].as_py() is None for row in rows)


@given(st.lists(st.tuples(st.floats(width=32, allow_nan=False), st.booleans())))
def test_numbers_that_are_not_valid_are_null(pairs):
    values = np.array([value for value, _ in pairs], dtype=np.float32)
    valid = np.array([valid for _, valid in pairs], dtype=bool)
    assert as_array(values, valid).equals(pa.array(values, mask=~valid))
    assert as_array(values).null_count == 0
