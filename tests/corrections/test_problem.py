import json
import pickle

import numpy as np
import pyarrow as pa
import pytest

from sos_dask.errors import ConfigError
from sos_dask.problem import DEFAULT, Input, Label, Problem
from sos_dask.schema import LABELS
from tests.steps import FEATURES, features


def test_features_are_scaled_and_keep_unknown_values():
    x = features([5040.0, 4032.0, np.nan], [4.5, np.nan, 2.0], np.array([-0.5, 0.1, 0.0]))
    assert x.dtype == np.float32
    assert x.flags.f_contiguous
    assert len(FEATURES) == x.shape[1] == 3
    np.testing.assert_array_equal(
        x, np.array([[1, 4.5, -0.5], [0.8, np.nan, 0.1], [np.nan, 2, 0]], dtype=np.float32)
    )


def test_features_do_not_depend_on_the_type_of_the_labels():
    rng = np.random.default_rng(1)
    labels = [rng.uniform(0.1, 9000, 1000).astype(np.float32) for _ in range(3)]
    expected = features(*labels)
    np.testing.assert_array_equal(features(*(c.astype(np.float64) for c in labels)), expected)
    np.testing.assert_array_equal(features(*(c.astype(">f4") for c in labels)), expected)


def test_a_problem_is_a_value():
    problem = Problem(
        labels=(Label(name="rv", unit="km/s"), Label(name="feh")),
        inputs=(*DEFAULT.inputs, Input(column="snr", log10=True)),
    )
    assert Problem(**json.loads(json.dumps(problem.as_json))) == problem
    assert pickle.loads(pickle.dumps(problem)) == problem
    assert (problem.names, problem.features) == (("rv", "feh"), (*FEATURES, "snr"))
    assert [label.sos_err for label in problem.labels] == ["rv_sos_err", "feh_sos_err"]
    assert problem.labels[0].error == "rv_err"
    assert problem.parameters[3:] == (Input(column="snr", log10=True), *DEFAULT.parameters[4:])
    assert DEFAULT.names == LABELS


def test_the_matrix_of_a_problem():
    inputs = (Input(column="x", scale=2.0), Input(column="y", log10=True, name="log_y"))
    problem = Problem(labels=(Label(name="a"), Label(name="b")), inputs=inputs)
    table = pa.table({"y": [100.0, None, -1.0], "x": [4, 6, None], "b_diff": [1, 2, None]})
    table = table.append_column("a_diff", pa.array([0.5, None, 1.0]))
    x = problem.matrix(table)
    assert x.dtype == np.float32
    assert x.flags.f_contiguous
    np.testing.assert_array_equal(x, np.array([[2, 2], [3, np.nan], [np.nan, np.nan]], "f4"))
    np.testing.assert_array_equal(
        problem.differences(table), np.array([[0.5, 1], [np.nan, 2], [1, np.nan]], "f4")
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": []}, "labels: .* at least 1"),
        ({"labels": [{"name": "rv"}, {"name": "rv"}]}, "two labels have one name"),
        ({"inputs": [{"column": "x"}, {"column": "y", "name": "x"}]}, "two inputs have one name"),
        ({"labels": [{"name": "a b"}]}, "cannot name a column"),
        ({"inputs": [{"column": "x", "scale": 0.0}]}, "scale: .* greater than 0"),
        ({"inputs": [{"column": "x", "log": True}]}, "unknown key"),
    ],
)
def test_a_wrong_problem_is_refused_in_words(given, message):
    with pytest.raises(ConfigError, match=message):
        Problem(**given)
