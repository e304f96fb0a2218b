"""Binned medians against numpy, differences of surveys, the three-cornered hat on known noise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sos_dask.errors import ConfigError
from sos_dask.evidence.trends import (
    CONTRAST_SCHEMA,
    EQUAL_COUNT,
    EQUAL_WIDTH,
    PLANE_SCHEMA,
    TREND_SCHEMA,
    Binned,
    agreements,
    contrast,
    contrast_table,
    three_cornered_hat,
    trend,
    trend_table,
)
from sos_dask.stats.numbers import Axis, bins_of, equal_count_edges

THOROUGH = settings(deadline=None, derandomize=True, max_examples=200)


# Few different values, so that there are ties, on edges too; and what is no number.
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, -1.0, math.nan, math.inf, -math.inf]),
    st.floats(-3, 3, width=32),
)


COLUMN = st.integers(0, 60).flatmap(
    lambda n: st.tuples(*(hnp.arrays(np.float32, n, elements=VALUES) for _ in range(2)))
)


ABOUT = {"label": "feh", "binning": EQUAL_WIDTH, "subset": "all", "sample": "before"}


def one(x, difference, edges, **about) -> dict:
    return trend(Binned.of({"logg": x}, [edges]), difference, **{**ABOUT, "method": None, **about})


@THOROUGH
@given(COLUMN)
def test_percentiles_are_those_of_numpy(columns):
    x, y = columns
    edges = Axis("x", -1.0, 2.0, 0.5).edges
    found = one(x, y, edges)
    for number in range(len(edges) - 1):
        low, high = edges[number], edges[number + 1]
        inside = (x >= low) & ((x < high) | ((x == high) & (number == len(edges) - 2)))
        values = y[inside & np.isfinite(y)].astype(np.float64)
        assert found["n"][number] == len(values)
        if not len(values):
            assert np.isnan(
                [found["median"][number], found["p16"][number], found["p84"][number]]
            ).all()
            continue
        wanted = np.percentile(values, [16, 50, 84])
        assert [
            found["p16"][number],
            found["median"][number],
            found["p84"][number],
        ] == wanted.tolist()
        if len(values) > 1:
            sigma = (wanted[2] - wanted[0]) / 2
            wanted_error = math.sqrt(math.pi / 2) * sigma / math.sqrt(len(values))
            assert found["error"][number] == pytest.approx(wanted_error, rel=1e-12)
        else:
            assert np.isnan(found["error"][number])


@THOROUGH
@given(COLUMN, st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_any_order_of_the_pairs_gives_the_same_bytes(columns, n_bins, seed):
    x, y = columns
    order = np.random.default_rng(seed).permutation(len(x))
    tables = [
        trend_table([one(a, b, equal_count_edges(a, n_bins), binning=EQUAL_COUNT)])
        for a, b in ((x, y), (x[order], y[order]))
    ]
    buffers = [
        [b and b.to_pybytes() for c in t.itercolumns() for k in c.chunks for b in k.buffers()]
        for t in tables
    ]
    assert buffers[0] == buffers[1]


def test_bins_of_equal_count_of_many_ties():
    x = np.repeat([1.0, 2.0, 3.0], [90, 5, 5])
    edges = equal_count_edges(x, 10)
    assert edges[0] == 1.0 and edges[-1] == 3.0 and (np.diff(edges) > 0).all()
    assert one(x, x, edges)["n"].sum() == 100
    assert one(np.ones(7), np.arange(7.0), equal_count_edges(np.ones(7), 4))["n"][0] == 7


@pytest.mark.parametrize(
    "edges",
    [[2.0, 1.0], [0.0, 2.0, 1.0], [0.0, math.nan, 2.0], [math.nan, math.nan], [math.nan, 1.0]],
)
def test_edges_that_do_not_rise_are_refused(edges):
    with pytest.raises(ConfigError, match="edges of bins must be rising numbers"):
        bins_of(np.arange(9.0), np.array(edges))
    with pytest.raises(ConfigError, match="edges of bins must be rising numbers"):
        one(np.arange(9.0), np.arange(9.0), np.array(edges))


def test_wrong_numbers_of_bins_are_refused():
    with pytest.raises(ConfigError, match="must be positive, got 0"):
        equal_count_edges(np.ones(3), 0)
    with pytest.raises(ConfigError, match="1 arrays of edges for 2"):
        Binned.of({"teff": np.ones(3), "logg": np.ones(3)}, [np.array([0.0, 2.0])])


def test_a_plane_is_the_trend_of_each_cell():
    rng = np.random.default_rng(1)
    teff, logg = rng.uniform(3900, 6100, 500), rng.uniform(-0.2, 5.2, 500)
    y = rng.normal(size=500)
    edges = [Axis("teff", 4000, 6000, 500).edges, Axis("logg", 0, 5, 1).edges]
    plane = trend(Binned.of({"teff": teff, "logg": logg}, edges), y, **ABOUT, method=None)
    total = 0
    for number in range(20):
        inside = np.ones(500, dtype=bool)
        for name, values in (("teff", teff), ("logg", logg)):
            low, high = (plane[f"{name}_{side}"][number] for side in ("low", "high"))
            inside &= (values >= low) & (values < high)
        assert plane["n"][number] == inside.sum() > 0
        assert plane["median"][number] == np.median(y[inside])
        total += inside.sum()
    table = trend_table([plane], plane=True)
    assert table.schema == PLANE_SCHEMA
    assert sum(table["n"].to_pylist()) == total < 500


def test_empty_bins_are_rows_with_nulls_and_empty_cells_are_left_out():
    x, y = np.array([0.5, 2.5, 2.6]), np.array([1.0, 2.0, 4.0])
    table = trend_table([one(x, y, np.arange(4.0))])
    assert table.schema == TREND_SCHEMA
    assert table["n"].to_pylist() == [1, 0, 2]
    assert table["median"].to_pylist() == [1.0, None, 3.0]
    assert table["error"].to_pylist()[:2] == [None, None]
    assert table["centre"].to_pylist() == [0.5, 1.5, 2.5]
    assert trend_table([]).schema == TREND_SCHEMA
    empty = one(np.empty(0, np.float32), np.empty(0, np.float32), equal_count_edges(x[:0], 5))
    assert trend_table([empty]).num_rows == 0


def references(rng, n, shift, slope=0.0):
    """A target against two references, the second ``shift`` lower where log g > 3."""
    edges = Axis("logg", 0.0, 5.0, 0.5).edges
    made = []
    for survey, size in (("apogee", n), ("galah", n // 3)):
        x = rng.uniform(0, 5, size).astype(np.float32)
        bias = 0.05 * x - (x >= 3) * shift * (survey == "galah")
        y = (bias + rng.normal(0, 0.1, size)).astype(np.float32)
        y[rng.random(size) < 0.02] += 3  # outliers
        made.append(one(x, y, edges, subset=survey))
    return made


def test_an_injected_difference_of_two_references_is_found_where_it_is():
    first, second = references(np.random.default_rng(3), 6000, 0.08)
    columns = contrast(first, second)
    high = first["low"] >= 3
    assert (columns["significance"][high] > 5).all()
    assert (np.abs(columns["significance"][~high]) < 3.5).all()
    assert np.abs(columns["difference"][high] - 0.08).max() < 4 * columns["error"][high].max()
    (found,) = agreements(contrast(first, second))
    assert (found["first"], found["second"], found["by"]) == ("apogee", "galah", "target")
    assert found["n_bins"] == 10 and found["n_significant"] == 4
    assert found["excess"] == pytest.approx(0.08 * math.sqrt(0.4), rel=0.15)
    assert found["p_value"] < 1e-20


def test_equal_references_are_called_different_as_rarely_as_stated():
    rng = np.random.default_rng(4)
    p_values = [agreements(contrast(*references(rng, 2000, 0.0)))[0]["p_value"] for _ in range(300)]
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.09
    assert 0.35 < np.mean(np.array(p_values) < 0.5) < 0.65


def test_common_stars_show_the_difference_directly():
    rng = np.random.default_rng(5)
    first, second = references(rng, 900, 0.05)
    x = rng.uniform(0, 5, 800)
    direct = one(x, rng.normal(0.04, 0.05, 800), Axis("logg", 0.0, 5.0, 0.5).edges)
    found = contrast(first, second, direct)
    through, common = agreements(found)
    assert (through["by"], common["by"]) == ("target", "common")
    assert common["median"] == pytest.approx(0.04, abs=0.01)
    assert common["excess"] == pytest.approx(0.04, abs=0.01)
    table = contrast_table([found])
    assert table.schema == CONTRAST_SCHEMA
    assert sum(table["n_common"].to_pylist()) == 800
    assert np.mean(table["significance_common"].to_numpy()) > 4


def test_bins_with_few_pairs_are_not_judged():
    edges = np.arange(4.0)
    x = np.repeat([0.5, 1.5, 2.5], [30, 30, 5])
    y = np.random.default_rng(6).normal(size=65)
    first, second = one(x, y, edges, subset="a"), one(x, y + 1, edges, subset="b")
    found = contrast(first, second, min_count=20)
    assert np.isnan(found["difference"]).tolist() == [False, False, True]
    assert agreements(found)[0]["n_bins"] == 2
    assert contrast_table([found])["significance"].null_count == 1
    # Equal values have no error: the difference stands, its significance is not known.
    flat = one(x, np.zeros(65), edges)
    assert np.isnan(contrast(flat, flat)["significance"]).all()
    nothing = agreements(contrast(flat, flat))[0]
    assert (nothing["n_bins"], nothing["median"], nothing["p_value"]) == (0, None, 1.0)


NAMES = ("a", "b", "c")


def three(n: int, sigma=(50.0, 20.0, 35.0), seed: int = 0, outliers: float = 0.0) -> list:
    rng = np.random.default_rng(seed)
    true = rng.uniform(4000, 6000, n)
    wrong = [1000 * (rng.random(n) < outliers) for _ in sigma]
    return [
        true + 30 * number + s * rng.normal(size=n) + bad
        for number, (s, bad) in enumerate(zip(sigma, wrong, strict=True))
    ]


def test_errors_are_recovered():
    for corner, sigma in zip(three_cornered_hat(three(20_000), NAMES), (50, 20, 35), strict=True):
        assert corner["sigma"] == pytest.approx(sigma, rel=0.06)
        assert corner["sigma"] is not None and corner["low"] < corner["sigma"] < corner["high"]
        assert not corner["negative"] and corner["n"] == 20_000


def test_outliers_hardly_matter():
    found = three_cornered_hat(three(20_000, outliers=0.03), NAMES)
    for corner, sigma in zip(found, (50, 20, 35), strict=True):
        assert corner["sigma"] == pytest.approx(sigma, rel=0.15)


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = np.array(
        [
            [c["low"] < s < c["high"] for c, s in zip(hat, (50, 20, 35), strict=True)]
            for hat in (
                three_cornered_hat(three(300, seed=seed), NAMES, seed) for seed in range(30)
            )
        ]
    )
    assert (held.sum(axis=0) >= 24).all(), held.sum(axis=0)


def test_negative_variances_are_flagged():
    # What is added to one is taken from the other: they differ by more than both from the third.
    shared = 40 * np.random.default_rng(1).normal(size=3000)
    a, b, c = three(3000, (1.0, 5.0, 5.0))
    found = three_cornered_hat([a, b + shared, c - shared], NAMES)
    assert found[0]["variance"] == pytest.approx(-(40**2), rel=0.15)
    for corner in found:
        assert (corner["sigma"] is None) == (corner["variance"] < 0)
        if corner["variance"] < 0:
            assert corner["negative"] and corner["low"] < 0


def test_too_small_to_tell_is_flagged():
    smallest = three_cornered_hat(three(60, (50.0, 0.5, 50.0), 4), NAMES)[1]
    assert smallest["negative"] and smallest["low"] < 0


def test_same_seed_same_numbers_and_nan_left_out():
    values = three(500)
    some = [np.append(value, np.nan) for value in values]
    assert three_cornered_hat(values, NAMES, 3) == three_cornered_hat(some, NAMES, 3)


def test_what_is_no_hat():
    with pytest.raises(ConfigError, match="needs three surveys, not 2"):
        three_cornered_hat(three(100)[:2], NAMES[:2])
    with pytest.raises(ConfigError, match="only 9 stars in common"):
        three_cornered_hat(three(9), NAMES)
