"""Numbers counted once: scales, neighbours, bins, quantiles."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sos_dask.errors import ConfigError
from sos_dask.evidence.trends import AXES
from sos_dask.stats.numbers import (
    MEDIAN_ERROR,
    Axis,
    Histogram,
    binned_quantiles,
    bins_of,
    count,
    count_within,
    equal_count_edges,
    find_sparse,
    knn_distance,
    rms_of_medians,
    robust_scale,
    scatter,
    uniform,
)


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


def test_scatter_is_that_of_a_normal_distribution_and_ignores_outliers():
    values = np.random.default_rng(3).normal(7.0, 2.0, 200_000)
    values[:2000] = 1e6
    assert scatter(values) == pytest.approx(2.0, rel=0.03)
    assert np.isnan(scatter(values[:0]))
    assert scatter(np.array([1.0, 2.0, 4.0])) == pytest.approx(1.4826)


def binned_median_rms(x, residual, edges, min_count=20) -> float:
    n_bins = max(len(edges) - 1, 0)
    found = binned_quantiles(bins_of(x, edges), residual, n_bins)
    rms, _ = rms_of_medians(found.n, found.median, min_count)
    return math.nan if rms is None else rms


def test_binned_medians_find_a_trend_that_medians_hide():
    rng = np.random.default_rng(4)
    x = rng.uniform(-1, 1, 20_000)
    noise = rng.normal(0, 0.1, len(x))
    edges = equal_count_edges(x, 20)
    assert abs(np.median(0.5 * x + noise)) < 0.02
    assert binned_median_rms(x, noise, edges) < 0.01
    assert binned_median_rms(x, 0.5 * x + noise, edges) == pytest.approx(0.5 / 3**0.5, rel=0.05)


def test_binned_medians_leave_out_unknown_values_and_thin_bins():
    x = np.array([0.0, 0.1, 0.2, 1.5, 2.0, np.nan, 0.3, 5.0])
    residual = np.array([1.0, 2.0, 3.0, 9.0, 9.0, 1e9, np.nan, 1e9])
    edges = np.array([0.0, 1.0, 2.0])
    out = binned_quantiles(bins_of(x, edges), residual, 2)
    assert out.n.tolist() == [3, 2]  # the last bin includes its upper edge; 5.0 is outside
    assert rms_of_medians(out.n, out.median, 3) == (2.0, 1)
    assert binned_median_rms(x, residual, edges, 3) == 2.0


@pytest.mark.parametrize("x", [np.empty(0), np.full(50, np.nan)])
def test_binned_medians_of_nothing(x):
    assert np.isnan(binned_median_rms(x, x, equal_count_edges(x, 10)))


def test_binned_medians_of_one_value():
    x = np.full(50, 3.0)
    assert binned_median_rms(x, np.full(50, 0.25), equal_count_edges(x, 10)) == 0.25


THOROUGH = settings(deadline=None, derandomize=True, max_examples=200)


# Few different values, so that there are ties, on edges too; and what is no number.
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, -1.0, math.nan, math.inf, -math.inf]),
    st.floats(-3, 3, width=32),
)


def test_the_sign_of_zero_depends_on_no_order():
    for zeros in itertools.permutations([-0.0, -0.0, 0.0, 0.0]):
        found = binned_quantiles(np.zeros(4, dtype=np.int64), np.array(zeros), 1)
        assert not np.signbit([found.p16, found.median, found.p84]).any()
        assert not np.signbit(equal_count_edges(np.array(zeros), 3)).any()


@THOROUGH
@given(hnp.arrays(np.float32, st.integers(0, 80), elements=VALUES), st.integers(1, 12))
def test_bins_of_equal_count_hold_every_value_once(x, n_bins):
    edges = equal_count_edges(x, n_bins)
    known = np.isfinite(x)
    bins = bins_of(x, edges) if len(edges) else np.full(len(x), -1)
    assert (bins[~known] == -1).all()
    assert (bins[known] >= 0).all()
    assert len(edges) == 2 or (len(edges) <= n_bins + 1 and (np.diff(edges) > 0).all())
    distinct = np.unique(x[known])
    if len(distinct) == known.sum() >= n_bins:  # no ties: as equal as can be
        assert np.ptp(np.bincount(bins[known], minlength=n_bins)) <= 1 + (
            len(distinct) % n_bins > 0
        )


@pytest.mark.parametrize("edges", [[], [1.0]])
def test_fewer_than_two_edges_are_no_bin(edges):
    bins = bins_of(np.arange(4.0), np.array(edges))
    assert bins.tolist() == [-1] * 4
    found = binned_quantiles(bins, np.arange(4.0), max(len(edges) - 1, 0))
    assert all(len(column) == 0 for column in found)


def test_a_bin_without_width_has_no_value_and_takes_none():
    bins = bins_of(np.array([0.5, 1.0, 1.5, 2.0, 2.5]), np.array([1.0, 1.0, 2.0]))
    assert bins.tolist() == [-1, 1, 1, 1, -1]
    found = binned_quantiles(bins, np.arange(5.0), 2)
    assert found.n.tolist() == [0, 3] and np.isnan(found.median[0]) and found.median[1] == 2.0


def test_edges_of_equal_width():
    assert Axis("x", 0.0, 1.0, 0.1).edges.tolist() == [k / 10 for k in range(11)]
    assert Axis("x", 0.0, 1.0, 0.4).edges.tolist() == [0.0, 0.4, 0.8, 1.0]
    for axis in AXES:
        assert axis.edges[0] == axis.low and axis.edges[-1] == axis.high
        assert (np.diff(axis.edges) > 0).all()


@pytest.mark.parametrize("limits", [(1.0, 0.0, 0.1), (0.0, 1.0, 0.0), (0.0, 1.0, 2.0)])
def test_axes_without_bins_are_refused(limits):
    with pytest.raises(ConfigError, match="bins of teff"):
        Axis("teff", *limits)


def test_axes_of_too_many_bins_are_refused():
    """Bins are numbered in 16 bits where figures are resampled."""
    assert len(Axis("teff", 0.0, 10_000.0, 1.0).edges) == 10_001
    for width in (0.999, 1e-300):
        with pytest.raises(ConfigError, match=r"bins of teff .*: there are more than 10,000"):
            Axis("teff", 0.0, 10_000.0, width)


def test_the_error_is_the_scatter_of_medians():
    rng = np.random.default_rng(2)
    n, n_bins = 150, 4000
    found = binned_quantiles(np.repeat(np.arange(n_bins), n), rng.normal(3, 2, n * n_bins), n_bins)
    assert np.std(found.median) == pytest.approx(np.mean(found.error), rel=0.04)


def test_a_share_of_the_rows_is_chosen_by_their_keys():
    keys = np.arange(100_000).astype(np.uint64)
    found = uniform(keys, 0) < 0.1
    assert abs(found.sum() - 10_000) < 5 * np.sqrt(9_000)
    np.testing.assert_array_equal(uniform(keys[::-1], 0) < 0.1, found[::-1])
    assert (uniform(keys, 0) < 1.0).all()


def test_the_thin_part_of_a_sample_is_where_its_sixteenth_neighbour_is_far():
    rng = np.random.default_rng(7)
    sample, others = rng.standard_t(3, (300, 2)) * [100, 1], rng.standard_t(3, (50, 2)) * [100, 1]
    _, scale = robust_scale(sample)

    def sixteenth(rows, skip):
        away = np.linalg.norm((rows[:, None] - sample[None]) / scale, axis=2)
        return np.sort(away, axis=1)[:, 15 + skip]

    for more, share in (({}, 0.05), ({"share": 0.2}, 0.2)):
        own, far = find_sparse(sample, others, **more)
        limit = np.quantile(sixteenth(sample, 1), 1 - share)
        np.testing.assert_array_equal(own, sixteenth(sample, 1) > limit)
        np.testing.assert_array_equal(far, sixteenth(others, 0) > limit)
        assert own.sum() == round(300 * share) and 0 < far.sum() < 50


def test_distances_beyond_a_bound_may_be_infinite_and_those_at_it_are_not():
    train = np.arange(10.0)[:, None]
    found = knn_distance(train, np.array([[0.0], [11.0], [12.1]]), 2, within=3.0)
    assert found.tolist() == [1.0, 3.0, np.inf]


def test_medians_of_bins_count_from_so_many_values():
    n, median = np.array([20, 19, 30]), np.array([3.0, 100.0, 4.0])
    rms, n_bins = rms_of_medians(n, median)
    assert n_bins == 2 and rms == pytest.approx(12.5**0.5)
    assert rms_of_medians(n, median, 31) == (None, 0)
    assert rms_of_medians([0, 2], [np.nan, 2.0], 0) == (2.0, 1), "an empty bin has no median"


def test_the_error_of_a_median_is_exact():
    found = binned_quantiles(np.array([1, 1, 1, -1, 0]), np.array([0.0, 1.0, 2.0, 9.0, 5.0]), 3)
    assert found.n.tolist() == [1, 3, 0]
    assert (found.median[0], found.p16[0], found.p84[0]) == (5, 5, 5) and np.isnan(found.error[0])
    assert (found.p16[1], found.median[1], found.p84[1]) == (0.32, 1, 1.68)
    assert found.error[1] == pytest.approx(MEDIAN_ERROR * 0.68 / 3**0.5)
    assert pytest.approx(1.2533141, rel=1e-6) == MEDIAN_ERROR
    assert np.isnan([found.median[2], found.error[2]]).all()


def test_the_quantiles_of_a_histogram_lie_in_the_bins_of_their_ranks():
    histogram = Histogram()
    for part in ([-3.0, 1.0], [1.0, 0.0, 250.0], []):
        histogram.add(count(np.array(part, np.float32)))
    assert histogram.n == 5
    found = histogram.quantiles([0.0, 0.1, 0.3, 0.6, 1.0])
    for value, exact in zip(found, [-3, -3, 0, 1, 250], strict=True):
        assert value == pytest.approx(exact, rel=0.008, abs=1e-38)
    bins, counts = count(np.array([1.0, 1.0, -1.0, 1.004], np.float32))
    assert counts.tolist() == [1, 3] and bins[0] < 1 << 15 <= bins[1]


def test_a_uniform_number_follows_from_key_and_seed():
    keys = np.array([0, 1, 2**63 - 1], np.int64)
    first = uniform(keys, 0)
    assert first.tolist() == uniform(keys.astype(np.uint64), 0).tolist()
    assert len({*first.tolist(), *uniform(keys, 1).tolist()}) == 6
