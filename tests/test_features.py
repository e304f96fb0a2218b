import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sos_dask.errors import ConfigError
from sos_dask.problem import (
    BLOCK_ROWS,
    FEATURES,
    design_matrix,
    evaluate_polynomials,
    features,
    polynomial_terms,
)


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


def test_terms_have_the_documented_order():
    assert polynomial_terms(2).tolist() == [
        [0, 0, 0],
        [1, 0, 0], [0, 1, 0], [0, 0, 1],
        [2, 0, 0], [1, 1, 0], [1, 0, 1], [0, 2, 0], [0, 1, 1], [0, 0, 2],
    ]  # fmt: skip
    assert polynomial_terms().shape == (35, 3)
    assert polynomial_terms(0).tolist() == [[0, 0, 0]]


@given(st.integers(0, 6), st.integers(1, 4))
def test_terms_are_all_of_them_once(order, n):
    terms = polynomial_terms(order, n)
    assert len(terms) == math.comb(order + n, n)
    assert len(np.unique(terms, axis=0)) == len(terms)
    assert (terms >= 0).all()
    assert terms.sum(axis=1).max() == order
    assert (np.diff(terms.sum(axis=1)) >= 0).all()


@given(
    st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=20, unique=True),
    st.integers(0, 40),
    st.integers(0, 2**32 - 1),
)
def test_any_polynomial_equals_its_definition(exponents, n, seed):
    rng = np.random.default_rng(seed)
    z = rng.uniform(-2, 2, (n, 3))
    powers = np.array(exponents)
    coefficients = rng.normal(size=(len(powers), 2))
    expected = np.prod(z[:, None, :] ** powers, axis=2)
    np.testing.assert_allclose(design_matrix(z, powers), expected, rtol=1e-12)
    np.testing.assert_allclose(
        evaluate_polynomials(z, powers, coefficients),
        expected @ coefficients,
        rtol=1e-10,
        atol=1e-10,
    )


def test_the_value_of_a_row_does_not_depend_on_the_others():
    rng = np.random.default_rng(2)
    z = rng.normal(size=(2 * BLOCK_ROWS + 37, 3))
    terms = polynomial_terms()
    coefficients = rng.normal(size=(len(terms), 3))
    whole = evaluate_polynomials(z, terms, coefficients)
    order = rng.permutation(len(z))
    np.testing.assert_array_equal(evaluate_polynomials(z[order], terms, coefficients), whole[order])
    some = order[:11]
    np.testing.assert_array_equal(evaluate_polynomials(z[some], terms, coefficients), whole[some])
    # Labels do not disturb each other either.
    alone = evaluate_polynomials(z, terms, coefficients[:, 1:2])
    np.testing.assert_array_equal(alone[:, 0], whole[:, 1])


def test_exponents_must_fit_the_columns():
    with pytest.raises(ConfigError, match="2 variables do not fit 3 columns"):
        design_matrix(np.zeros((4, 3)), polynomial_terms(2, 2))
