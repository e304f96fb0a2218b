import numpy as np
import pyarrow as pa
import pytest

from sos_dask.columns import floats, floats32, floats_or_nan, matrix32


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
