import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.stats.numbers import count_within, knn_distance, robust_scale


def test_scales_are_those_of_normal_columns_and_ignore_outliers():
    rng = np.random.default_rng(1)
    x = rng.normal([5000, 3, -0.5], [400, 1, 0.2], size=(50_000, 3))
    x[:500] = 1e6
    center, scale = robust_scale(x)
    np.testing.assert_allclose(center, [5000, 3, -0.5], rtol=0.01)
    np.testing.assert_allclose(scale, [400, 1, 0.2], rtol=0.03)


def test_columns_of_equal_values_have_a_scale():
    x = np.zeros((100, 2))
    x[:10, 0] = 3.0
    center, scale = robust_scale(x)
    assert center.tolist() == [0, 0]
    assert scale[0] == pytest.approx(np.std(x[:, 0]))
    assert scale[1] == 1.0


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12))
def test_distances_are_those_of_brute_force(seed, k):
    rng = np.random.default_rng(seed)
    train, query = rng.normal(size=(rng.integers(1, 40), 3)), rng.normal(size=(7, 3))
    every = np.sort(np.linalg.norm(train[None] - query[:, None], axis=2), axis=1)
    found = knn_distance(train, query, k)
    np.testing.assert_allclose(found, every[:, min(k, len(train)) - 1])
    order = rng.permutation(len(train))
    np.testing.assert_array_equal(knn_distance(train[order], query[:3], k), found[:3])


def test_rows_within_a_radius_are_those_of_brute_force():
    rng = np.random.default_rng(2)
    train, query = rng.normal(size=(200, 3)), rng.normal(size=(30, 3))
    radius = rng.uniform(0, 2, 30)
    every = np.linalg.norm(train[None] - query[:, None], axis=2)
    found = count_within(train, query, radius)
    assert found.tolist() == (every <= radius[:, None]).sum(axis=1).tolist()
