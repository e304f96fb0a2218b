"""Neighbours in a k-d tree: exactly those of brute force, whichever rows are asked for together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.stats.kdtree import Tree


def clouds(seed, n, m, spread):
    """Points and rows that cluster; with no spread all lie on a coarse grid, many in one place."""
    rng = np.random.default_rng(seed)
    points, rows = (
        rng.normal(rng.choice([0.0, 5.0], (size, 1)), spread + 0.5, (size, 3)) for size in (n, m)
    )
    if not spread:
        points, rows = np.rint(points), np.rint(rows)
    rows[: min(n, m) // 2] = points[: min(n, m) // 2]
    rows[-1] = 1e3  # far outside
    return points, rows


def brute_force(points, rows):
    return np.square(rows[:, None] - points).sum(axis=2)


CLOUDS = {
    "seed": st.integers(0, 9999),
    "n": st.integers(1, 300),
    "m": st.integers(1, 200),
    "spread": st.sampled_from([0.0, 0.1, 3.0]),
}


@given(**CLOUDS, k=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_distances_are_those_of_brute_force(seed, n, m, spread, k):
    points, rows = clouds(seed, n, m, spread)
    square = brute_force(points, rows)
    wanted = np.sort(square, axis=1)[:, min(k, n) - 1]
    tree = Tree(points)
    assert tree.kth_distance(rows, k).tobytes() == np.sqrt(wanted).tobytes()
    distance, index = tree.nearest(rows)
    assert distance.tobytes() == np.sqrt(square.min(axis=1)).tobytes()
    assert index.tolist() == square.argmin(axis=1).tolist()  # the first of equally near ones


@given(**CLOUDS, most=st.floats(0, 60), scale=st.sampled_from([0.0, 1.0, 4.0]))
@settings(max_examples=60, deadline=None)
def test_rows_with_many_points_are_those_of_brute_force(seed, n, m, spread, most, scale):
    points, rows = clouds(seed, n, m, spread)
    radius = scale * np.random.default_rng(seed).random(m)
    within = (brute_force(points, rows) <= np.square(radius)[:, None]).sum(axis=1)
    assert Tree(points).has_more(rows, radius, most).tolist() == (within > most).tolist()


@given(seed=st.integers(0, 9999), cut=st.integers(0, 500))
@settings(max_examples=30, deadline=None)
def test_a_row_does_not_depend_on_those_beside_it(seed, cut):
    points, rows = clouds(seed, 2000, 500, 0.5)
    order = np.random.default_rng(seed).permutation(500)
    tree = Tree(points)
    whole = tree.kth_distance(rows, 16)
    parts = [tree.kth_distance(rows[some], 16) for some in (order[:cut], order[cut:])]
    assert np.concatenate(parts).tobytes() == whole[order].tobytes()


@pytest.mark.parametrize("n", [1, 12, 13, 25, 100])
def test_no_rows_have_no_neighbours(n):
    tree = Tree(np.arange(3.0 * n).reshape(-1, 3))
    none = np.empty((0, 3))
    assert tree.kth_distance(none, 16).shape == (0,)
    assert [len(found) for found in tree.nearest(none)] == [0, 0]
    assert tree.has_more(none, np.empty(0), 3).shape == (0,)


def test_only_finite_points_have_neighbours():
    with pytest.raises(ValueError, match="finite"):
        Tree(np.empty((0, 3)))
    tree = Tree(np.zeros((4, 3)))
    for ask in (tree.nearest, lambda x: tree.kth_distance(x, 2)):
        with pytest.raises(ValueError, match="finite"):
            ask(np.array([[0.0, 0.0, 1.0], [0.0, np.nan, 0.0]]))
