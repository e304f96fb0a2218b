"""Projection: sampling that no order changes, and places of rows on a plane."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from sos_dask.errors import ConfigError, ModelError
from sos_dask.evidence import projection
from sos_dask.evidence.projection import (
    Projection,
    ProjectionSettings,
    chosen_rows,
    density_map,
    fit_projection,
    sampling_rates,
    strata,
)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sample_rows", 10), ("neighbors", 0), ("map_bins", 1), ("min_dist", 2.0), ("share", 0.0)],
)
def test_settings_out_of_range_name_the_setting(name, value):
    with pytest.raises(ConfigError, match=name):
        ProjectionSettings(**{name: value})


def test_rows_of_one_cell_share_a_stratum_and_missing_labels_have_their_own():
    columns = {
        "teff": np.array([5010.0, 5490.0, 5510.0, np.nan]),
        "logg": np.array([4.1, 4.4, 4.1, 4.1]),
        "feh": np.array([-0.1, -0.4, -0.1, -0.1]),
    }
    cells = strata(columns)
    assert cells[0] == cells[1] != cells[2]
    assert cells[3] == 0


@given(
    counts=st.lists(st.integers(1, 100_000), min_size=1, max_size=40),
    wanted=st.integers(1, 50_000),
)
def test_rates_fill_the_sample_and_favour_rare_strata(counts, wanted):
    rates = sampling_rates(dict(enumerate(counts)), wanted)
    expected = sum(rates[cell] * n for cell, n in enumerate(counts))
    assert expected == pytest.approx(min(wanted, sum(counts)))
    assert all(0 < rate <= 1 for rate in rates.values())
    by_size = [rates[cell] for cell in np.argsort(counts, kind="stable")]
    assert all(rare >= common - 1e-12 for rare, common in itertools.pairwise(by_size))


@given(data=st.data(), seed=st.integers(0, 1000))
def test_the_sample_depends_on_keys_alone(data, seed):
    n = data.draw(st.integers(1, 300))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    keys = rng.integers(0, 2**62, n)
    cells = rng.integers(0, 4, n)
    rates = {0: 0.5, 1: 0.1, 3: 1.0}
    order = rng.permutation(n)
    whole = chosen_rows(keys, cells, rates, seed)
    np.testing.assert_array_equal(chosen_rows(keys[order], cells[order], rates, seed), whole[order])
    half = n // 2
    parts = [chosen_rows(keys[s], cells[s], rates, seed) for s in (np.s_[:half], np.s_[half:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert whole[cells == 3].all()
    assert not whole[cells == 2].any()


def test_as_many_rows_are_chosen_as_the_rate_says_and_seeds_differ():
    keys = np.arange(200_000)  # consecutive keys are the hard case of a hash
    cells = np.zeros(len(keys), dtype=np.int64)
    found = chosen_rows(keys, cells, {0: 0.05}, 0)
    assert abs(found.sum() - 10_000) < 5 * np.sqrt(9_500)
    other = chosen_rows(keys, cells, {0: 0.05}, 1)
    assert abs((found & other).sum() - 500) < 5 * np.sqrt(500)


def _plane(rng, neighbors=8):
    sample = rng.normal(size=(500, 3)).astype(np.float32)
    plane = sample[:, :2] * 3.0
    return Projection(("a", "b", "c"), np.zeros(3), np.ones(3), sample, plane, neighbors)


def _distance(rows, plane):
    apart = rows.astype(np.float32)[:, None] - plane.sample[None].astype(np.float64)
    return np.linalg.norm(apart, axis=2)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_a_place_is_the_weighted_mean_of_the_nearest(seed):
    rng = np.random.default_rng(seed)
    plane = _plane(rng)
    rows = rng.normal(size=(100, 3)).clip(-4, 4)  # a parameter is within 5
    rows[3, 1] = np.nan
    found = plane.place(rows)
    assert np.isnan(found[3]).all() and np.isfinite(np.delete(found, 3, axis=0)).all()
    distance = _distance(rows, plane)
    nearest = np.argsort(distance, axis=1)[:, :8]
    weight = 1.0 / np.take_along_axis(distance, nearest, axis=1).astype(np.float64) ** 2
    weight /= weight.sum(axis=1, keepdims=True)
    expected = (weight[:, :, None] * plane.plane[nearest]).sum(axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "_SLACK", 0.0)
        np.testing.assert_allclose(plane.place(rows), expected, rtol=1e-3, atol=1e-3)
    # Else some got a neighbour that is hardly farther: a mean of rows that are near it is.
    same = np.isclose(found, expected, rtol=1e-3, atol=1e-3).all(axis=1)
    assert same.any()
    farthest = 1.5 * np.sort(distance, axis=1)[:, 7:8]
    near = (distance <= farthest * (1 + 1e-5))[:, :, None]
    low, high = (np.where(near, plane.plane, far) for far in (np.inf, -np.inf))
    inside = (found >= low.min(axis=1) - 1e-4) & (found <= high.max(axis=1) + 1e-4)
    assert np.delete(inside, 3, axis=0).all()
    np.testing.assert_array_equal(plane.place(rows[5:7]), found[5:7])


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_no_neighbour_is_farther_than_promised(seed):
    rng = np.random.default_rng(seed)
    plane = _plane(rng, neighbors=1)
    rows = rng.normal(size=(100, 3))
    away = np.linalg.norm(plane.place(rows)[:, None] - plane.plane[None], axis=2)
    distance = _distance(rows, plane)
    taken = distance[np.arange(100), np.argmin(away, axis=1)]
    assert away.min(axis=1).max() < 1e-5
    assert (taken <= 1.5 * distance.min(axis=1) + 1e-5).all()


def test_rows_of_the_sample_are_placed_where_umap_put_them():
    plane = _plane(np.random.default_rng(1))
    found = plane.place(plane.sample.astype(np.float64))
    np.testing.assert_allclose(found, plane.plane, atol=1e-3)


def test_a_map_counts_every_placed_row_once():
    rng = np.random.default_rng(2)
    place = rng.uniform(-1, 1, (1000, 2)).astype(np.float32)
    place[:10] = np.nan
    counts = density_map(place, (-1.0, 1.0, -1.0, 1.0), 16)
    assert counts.sum() == 990
    left = density_map(place[place[:, 0] < 0], (-1.0, 1.0, -1.0, 1.0), 16)
    assert left[8:].sum() == 0


def test_clusters_stay_apart_and_the_same_sample_gives_the_same_plane():
    pytest.importorskip("umap")
    rng = np.random.default_rng(3)
    which = np.arange(400) % 2
    rows = rng.normal(size=(400, 4)) + 12.0 * which[:, None]
    chosen = ProjectionSettings(sample_rows=400)
    first = fit_projection(rows, tuple("abcd"), chosen)
    again = fit_projection(rows, tuple("abcd"), chosen)
    np.testing.assert_array_equal(first.plane, again.plane)
    _, neighbour = cKDTree(first.plane).query(first.plane, k=2)
    assert (which[neighbour[:, 1]] == which).mean() > 0.99


def test_too_few_rows_and_constant_parameters_are_refused():
    pytest.importorskip("umap")
    rows = np.random.default_rng(4).normal(size=(150, 2))
    with pytest.raises(ModelError, match="sampled rows have all of a, b"):
        fit_projection(
            np.where(np.arange(150)[:, None] < 90, np.nan, rows), "ab", ProjectionSettings()
        )
    rows[:, 1] = 3.0
    with pytest.raises(ModelError, match="b is the same in most rows"):
        fit_projection(rows, "ab", ProjectionSettings())
