"""Errors away from the overlap: noise, growth, widths."""

import numpy as np
import pytest
from scipy.stats import norm

from sos_dask.evidence.widening import (
    INSIDE,
    KINDS,
    LACKING,
    OUTSIDE,
    SPARSE,
    Growth,
    Limits,
    Noise,
    Placed,
    Widths,
    counted,
    fit_widths,
    stand_in_weights,
)


def test_rows_count_near_the_pairs_that_stand_for_them():
    rng = np.random.default_rng(13)
    n = 5000

    labels, snr = rng.normal(0, 1, (n, 3)), rng.uniform(5, 200, n)
    pairs = np.column_stack([2 * labels, np.log(snr)])
    rows = np.column_stack([2 * rng.normal(0.7, 1, (n, 3)), np.full(n, np.nan)])
    weight = stand_in_weights(pairs, rows)
    assert np.average(labels, axis=0, weights=weight) == pytest.approx(0.7, abs=0.1)
    # What is not known of the rows must not choose among the pairs' ends.
    assert np.average(snr, weights=weight) == pytest.approx(np.median(snr), rel=0.2)
    assert (stand_in_weights(pairs, rows[:0]) == 1).all()
    one_place = np.tile([10.0, 10.0, 10.0, 4.0], (n, 1))
    assert (stand_in_weights(pairs, one_place) == 1).all()  # eight pairs are too few to stand on


def test_where_nothing_can_be_counted_errors_grow_as_the_limits_say():
    rng = np.random.default_rng(14)
    n, limits = 4000, Limits()
    residual = rng.normal(0, 1, (n, 3))
    wrong = rng.random(n) < 0.1
    residual[wrong] = 100
    pairs = Placed(
        np.repeat(np.array([INSIDE, SPARSE], np.int8), [n - 20, 20]),
        np.zeros(n, np.int8),
        np.column_stack([rng.normal(0, 1, (n, 3)), np.log(rng.uniform(5, 200, n))]),
    )
    found, n_pairs = fit_widths(residual, np.ones((n, 3)), ~wrong, pairs, pairs, limits)
    assert n_pairs == ((n - 20, 20, 0, 0), (0, 0, 0, 0)) and found.few is None
    everything, right = norm.ppf(0.5 + 0.34 / 0.9), norm.ppf(0.5 + 0.34)
    for place, value in enumerate((right, everything / 0.8, right / 0.5)):
        assert np.array(found.factors[0][place]) == pytest.approx(value, rel=0.15)
    assert found.factors[1] == [[1.0] * 3, [1.25] * 3, [2.0] * 3]
    said = counted(n_pairs)
    assert said["inside"] == f"counted on {n - 20} held-out pairs"
    for kind in ("sparse", *KINDS[OUTSIDE:]):
        assert said[kind] == "extrapolated: too few held-out pairs to count on"


def test_rows_where_stars_are_few_have_the_width_of_all_measurements_there():
    found = Widths(np.ones((2, 3, 3)) * np.array([1.0, 1.5, 2.0])[:, None], [900, 1, 1.0])
    half_width = np.array([[100.0, 0.1, 0.1], [300.0, 0.1, 0.1], [700.0, 0.1, 0.1]])
    for kind, wanted in (
        (OUTSIDE, [900, 900, 1050]),
        (LACKING, [200, 600, 1400]),
    ):
        kinds = np.full(3, kind, dtype=np.int8)
        widening = found.widening(kinds, np.array([0, 1, 0]), half_width)
        assert (widening * half_width)[:, 0] == pytest.approx(wanted)


def test_growth_of_the_error_is_recovered():
    rng = np.random.default_rng(3)
    distance = rng.exponential(0.2, 20_000)
    ratio = rng.normal(0, 1, (20_000, 3)) * np.hypot(1, distance / 0.3)[:, None]
    growth, bins = Growth.fit(distance, ratio)
    root_2 = np.interp(2**0.5, growth.growth, growth.distance)  # where it has grown by so much
    assert root_2 == pytest.approx(0.3, rel=0.15)
    assert sum(row["n"] for row in bins) == 20_000
    d = np.linspace(0, 3, 200)
    assert (np.diff(growth(d)) >= 0).all() and growth(np.zeros(1))[0] == 1


def test_noise_is_recovered_beside_the_errors_of_the_reference():
    rng = np.random.default_rng(4)
    n = 20_000
    snr, logg = rng.uniform(10, 200, n), rng.uniform(0, 5, n)
    own = np.hypot(np.array([25, 0.04, 0.03]), np.array([2500, 4, 2]) / snr[:, None])
    reference = rng.uniform(0.2, 1.0, (n, 3)) * np.array([40, 0.06, 0.04])
    residual = rng.normal(0, 1, (n, 3)) * np.hypot(own, reference)
    noise = Noise.fit(residual, logg, snr, reference)
    assert np.median(noise(logg, snr) / own, axis=0) == pytest.approx(np.ones(3), rel=0.1)


def test_classes_begin_at_their_limits():
    coverage = np.array([1.0, 0.8, 0.79999, 0.5, 0.49999, 0.0, np.nan])
    assert Limits().classify(coverage).tolist() == [0, 0, 1, 1, 2, 2, 2]
    said = Limits(inside=0.8, outside=0.4).meaning()
    assert "at most 1.25 times" in said["inside"] and said["sparse"] == "1.25 to 2.50 times"


def test_too_few_giants_share_the_law_of_all():
    rng = np.random.default_rng(6)
    n = 3000
    snr, unknown = rng.uniform(10, 200, n), np.full((n, 3), np.nan)
    for n_giants in (399, 400):
        logg = np.where(np.arange(n) < n_giants, 2.0, 4.5)
        residual = rng.normal(0, 1, (n, 3)) * np.where(logg < 3.5, 5.0, 1.0)[:, None]
        noise = Noise.fit(residual, logg, snr, unknown)
        ratio = np.median(noise(np.full(9, 3.49), snr[:9]) / noise(np.full(9, 3.5), snr[:9]))
        assert (ratio > 3) == (n_giants == 400), ratio
    without = noise(logg[:2], np.array([np.nan, 0.0]))
    np.testing.assert_array_equal(without, [noise.floor[1]] * 2)
    wider = noise(logg[:2], snr[:2], np.full((2, 3), 2.0))
    own, share = noise(logg[:2], snr[:2]), np.array(noise.reference[1])
    assert wider == pytest.approx(np.hypot(own, 2 * share))


def test_growth_is_one_in_the_nearer_half_and_known_up_to_the_tenth_last_pair():
    rng = np.random.default_rng(2)
    distance = rng.permutation(np.arange(1.0, 1001.0))
    size = np.where(distance > 500, 4, 1)[:, None]
    growth, bins = Growth.fit(distance, rng.normal(size=(1000, 3)) * size)
    assert growth.distance[0] == 500 and growth.growth[0] == 1 and growth.last == 991
    assert growth(np.array([0.0, 500.0])).tolist() == [1, 1]
    assert growth(np.array([700.0, 1e9])) == pytest.approx(4, rel=0.15)
    assert [row["n"] for row in bins] == [84, 84, 83, 83, 83, 83] * 2
    assert np.isnan(growth(np.array([np.nan]))).all()
    few = Growth.fit(distance[:149], np.ones((149, 3)))
    assert few[0].growth == (1.0,) and few[0].distance[0] == np.sort(distance[:149])[73]
    assert len(Growth.fit(np.arange(150.0), rng.normal(size=(150, 3)))[1]) == 6


def places(kind, points, error_class=0):
    kinds = np.asarray(kind, np.int8)
    return Placed(kinds, np.full(len(kinds), error_class, np.int8), np.asarray(points, float))


def test_widths_are_the_weighted_share_of_scores_of_a_new_row():
    """100 pairs of scores 1 to 100: 68 % of 101 is 68.68, so the 69th; all at one S/N."""
    points = np.column_stack([np.arange(100.0), np.zeros(100)])
    score = np.arange(1.0, 101.0)[:, None]
    pairs, right = places([INSIDE] * 100, points), np.ones(100, bool)
    widths, n = fit_widths(2 * score, np.full((100, 1), 2.0), right, pairs, pairs, Limits())
    assert widths.factors[0] == [[69.0], [69 / 0.8], [69 / 0.5]] and widths.few is None
    assert widths.factors[1] == [[1.0], [1.25], [2.0]] and n == ((100, 0, 0, 0), (0, 0, 0, 0))
    # Of two labels one is not known in half of the pairs: each has the pairs that know it.
    half = np.column_stack([score, np.where(score > 50, np.nan, score)])
    widths, _ = fit_widths(half, np.ones((100, 2)), right, pairs, pairs, Limits())
    assert widths.factors[0][0] == [69.0, 35.0]
    # Rows at the far end: the pairs there, alone as many as are needed, stand for them.
    far = places([INSIDE] * 60, points[40:])
    widths, _ = fit_widths(score, np.ones((100, 1)), right, pairs, far, Limits())
    assert 80 < widths.factors[0][0][0] < 83
    # Wrong ones do not count where the overlap lacks stars, and pairs of no place nowhere.
    kind = np.where(score[:, 0] > 90, -1, INSIDE)
    widths, n = fit_widths(
        score, np.ones((100, 1)), score[:, 0] <= 50, places(kind, points), far, Limits()
    )
    assert widths.factors[0][2] == [pytest.approx(35 / 0.5)] and n[0] == (90, 0, 0, 0)
    few = places([OUTSIDE] * 40 + [INSIDE] * 60, points)
    widths, n = fit_widths(2 * score, np.ones((100, 1)), right, few, few, Limits())
    assert widths.few == [2 * 28.0] and n[0] == (60, 0, 40, 0)


def test_where_the_widths_stand_is_said():
    assert set(counted(())) == set(KINDS) and counted(())["inside"] == "as the error model says"
    said = counted(((40, 39, 20, 50), (41, 0, 20, 50)))
    assert said["inside"] == "counted on 81 held-out pairs"
    assert said[KINDS[OUTSIDE]] == "counted on 40 held-out pairs", "both classes together"
    assert said["sparse"].startswith("extrapolated") and said[KINDS[3]].startswith("extrapolated")
