"""The three-cornered hat on noise that is known."""

import numpy as np
import pytest

from sos_dask.errors import ConfigError
from sos_dask.evidence.trends import three_cornered_hat

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
