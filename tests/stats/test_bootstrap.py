from functools import cache

import numpy as np
import pyarrow as pa
import pytest

from sos_dask.columns import key_numbers
from sos_dask.stats.bootstrap import (
    N_GROUPS,
    Replicates,
    draw,
    groups_of,
    interval,
    resampled,
    resampled_bins,
)

SEEDS = 150


@cache
def weights_of(number: int) -> np.ndarray:
    """Some of many resamples: stars fall into groups at random, so few serve many samples."""
    return draw(200, number)


def measured(x: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> Replicates:
    order = np.argsort(x, kind="stable")
    return resampled(x[order], groups[order], weights)


def figures(x: np.ndarray) -> tuple[float, float, float]:
    median = float(np.median(x))
    p16, p84 = np.percentile(x, [16, 84])
    return median, float(1.4826 * np.median(np.abs(x - median))), float(p84 - p16) / 2


@pytest.mark.parametrize("n", [40, 2000])
def test_intervals_hold_the_truth_in_95_percent_of_samples(n):
    truth = (7.0, 2.0, 2.0 * 0.99446)  # half of the width of a normal distribution from 16 to 84 %
    held = np.zeros(3)
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        x = rng.normal(7.0, 2.0, n)
        replicates = measured(x, rng.integers(0, N_GROUPS, n), weights_of(seed % 10))
        for number, (value, figure) in enumerate(
            zip(figures(x), (replicates.median, replicates.mad, replicates.width), strict=True)
        ):
            low, high = interval(value, figure)
            held[number] += low <= truth[number] <= high
    assert (held / SEEDS > 0.88).all(), held / SEEDS  # 0.95 less four standard errors
    assert (held / SEEDS < 1.0).all(), "as wide as that says nothing"


def test_pairs_of_one_star_stay_together():
    """Copies of stars bring no certainty: the interval is that of the stars."""
    rng = np.random.default_rng(5)
    star, groups = rng.normal(size=1000), rng.integers(0, N_GROUPS, 1000)
    once = measured(star, groups, draw(400, 1)).median.std()
    copies = measured(np.repeat(star, 9), np.repeat(groups, 9), draw(400, 1)).median.std()
    apart = measured(np.repeat(star, 9), rng.integers(0, N_GROUPS, 9000), draw(400, 1))
    assert copies == pytest.approx(once, rel=0.1)
    assert apart.median.std() < 0.5 * once


def test_resamples_are_those_of_the_values_written_out():
    """Against a resample that really repeats its values, where every column holds one value."""
    rng = np.random.default_rng(2)
    x, groups = rng.normal(size=201), np.arange(201)
    weights = draw(60, 3, 201)
    found = measured(x, groups, weights)
    spacing = np.diff(np.sort(x)).max()
    for number, counts in enumerate(weights.astype(int)):
        median, mad, width = figures(np.repeat(x, counts))
        assert found.median[number] == pytest.approx(median, abs=0.1)
        assert found.mad[number] == pytest.approx(mad, abs=0.15)
        assert found.width[number] == pytest.approx(width, abs=0.5 * spacing)


def test_medians_of_bins_are_exact_and_their_resamples_spread_as_they_should():
    rng = np.random.default_rng(4)
    n = 60_000
    bins, groups = rng.integers(-1, 5, n), rng.integers(0, N_GROUPS, n)
    x = rng.normal(bins.astype(float), 1.0 + np.maximum(bins, 0))
    bins[bins == 4] = np.where(np.arange(np.count_nonzero(bins == 4)) < 15, 4, -1)  # a thin bin
    order = np.argsort(x)
    given = x[order], groups[order], draw(400, 0), bins[order]
    counts, medians, replicates = resampled_bins(*given, 5, 20)
    assert counts.tolist() == [np.count_nonzero(bins == b) for b in range(5)]
    for b in range(4):
        inside = x[bins == b]
        assert medians[b] == np.median(inside)
        error = 1.2533 * (1 + b) / np.sqrt(len(inside))
        assert replicates[:, b].std() == pytest.approx(error, rel=0.2)
        assert abs(replicates[:, b].mean() - medians[b]) < 0.3 * error
    assert np.isnan(medians[4]) and np.isnan(replicates[:, 4]).all()


def test_nothing_depends_on_the_order_of_the_pairs():
    rng = np.random.default_rng(6)
    x, groups = rng.normal(size=5000), rng.integers(0, N_GROUPS, 5000)
    order = rng.permutation(5000)
    weights = draw(100, 0)
    one, other = measured(x, groups, weights), measured(x[order], groups[order], weights)
    np.testing.assert_array_equal(one.mad, other.mad)
    np.testing.assert_array_equal(draw(100, 0), weights)
    assert not np.array_equal(draw(100, 1), weights)


def test_groups_are_of_the_id_alone_and_even():
    star = key_numbers(pa.array([f"star {number}" for number in range(20_000)]), 0)
    groups = groups_of(star)
    np.testing.assert_array_equal(groups_of(star[7000:7010]), groups[7000:7010])
    # Groups that are other numbers would be other resamples, and other products.
    assert N_GROUPS == 1024
    known = np.array(
        [0, 1, 2**20 - 1, 2**20, 5 * 2**20 + 3, 2**30 - 1, 2**30, 2**64 - 1], np.uint64
    )
    assert groups_of(known).tolist() == [0, 0, 0, 1, 5, 1023, 0, 1023]
    assert groups[:5].tolist() == [557, 539, 536, 95, 815]
    counts = np.bincount(groups, minlength=N_GROUPS)
    assert counts.min() > 0 and counts.var() == pytest.approx(counts.mean(), rel=0.2)
    for some in (star % 16 == 0, star < 2**60):  # a fold; what is kept of many
        counts = np.bincount(groups[some], minlength=N_GROUPS)
        assert counts.var() == pytest.approx(counts.mean(), rel=0.2)


def test_equal_values_have_no_spread():
    found = measured(np.full(100, 3.0), np.arange(100), draw(50, 0))
    assert (found.median == 3.0).all()
    assert (found.mad == 0).all() and (found.width == 0).all()
    assert interval(3.0, found.median) == (3.0, 3.0)
    assert np.isnan(interval(float("nan"), found.median)).all()


def test_an_interval_is_that_of_its_resamples_moved_to_the_figure():
    replicates = np.append(np.arange(41.0), [np.nan, np.inf])
    assert interval(100.0, replicates) == pytest.approx((81.0, 119.0))
    assert np.isnan(interval(1.0, np.array([np.nan]))).all()


def test_a_resample_of_every_group_once_is_the_sample():
    rng = np.random.default_rng(8)
    x, groups, once = np.sort(rng.normal(size=99)), np.arange(99), np.ones((1, 99))
    found = resampled(x, groups, once)
    assert found.median[0] == pytest.approx(np.median(x), abs=np.diff(x).max())
    assert found.mad[0] == pytest.approx(figures(x)[1], abs=np.diff(x).max())
    bins = np.repeat([0, -1, 1, 2], [40, 9, 30, 20])
    n, medians, replicates = resampled_bins(x, groups, once, bins, 4, 30)
    assert n.tolist() == [40, 30, 20, 0]
    assert medians[:2].tolist() == [np.median(x[:40]), np.median(x[49:79])]
    assert replicates[0, :2] == pytest.approx(medians[:2], abs=0.05)
    assert np.isnan(medians[2:]).all() and np.isnan(replicates[:, 2:]).all()
    doubled = resampled_bins(x, groups, 2 * once, bins, 4, 0)[2]
    np.testing.assert_array_equal(doubled[0, :2], replicates[0, :2])
    assert np.isfinite(doubled[0, 2]) and np.isnan(doubled[0, 3])


def test_an_empty_resample_has_no_figures():
    weights = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    found = resampled(np.arange(10.0), np.repeat([0, 1], 5), weights)
    assert np.isnan(found.median).tolist() == [False, True, False]
    assert np.isnan(found.mad[1]) and found.median[0] < 4.5 < found.median[2]


def test_resamples_draw_as_many_groups_as_there_are():
    weights = draw(50, 0, 30)
    assert weights.shape == (50, 30) and (weights.sum(axis=1) == 30).all()
    assert draw(2, 0).shape == (2, N_GROUPS)
