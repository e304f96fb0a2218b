"""Averages over surveys: against plain Python, and with errors that are known."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import chi2

from sos_dask.columns import FloatArray
from sos_dask.errors import CatalogError
from sos_dask.stars.average import Means, average, floors, improbable, survey_means

SHAPE = (4, 3)
VALUES = st.one_of(st.just(float("nan")), st.floats(-10, 10))
ERRORS = st.one_of(st.just(float("nan")), st.just(0.0), st.floats(0.1, 3))
ROWS = st.lists(st.tuples(VALUES, ERRORS, st.integers(0, 3), st.integers(0, 2)), max_size=40)


def disagreement(rows: list[tuple[float, float]]) -> float:
    value, weight = np.array([v for v, _ in rows]), np.array([e**-2.0 for _, e in rows])
    return float(weight @ (value - weight @ value / weight.sum()) ** 2)


def plain_mean(rows: list[tuple[float, float]], clip: float) -> tuple[float, float, int]:
    """Mean and error of the rows of one survey, and how many were left out."""
    rows = [(value, error) for value, error in rows if np.isfinite(value)]
    kept = rows
    while sum(e > 0 for _, e in kept) > 2:
        of_error = [i for i, (_, e) in enumerate(kept) if e > 0]
        drops = []
        for i in of_error:
            others = [kept[j] for j in of_error if j != i]
            drops.append(disagreement([kept[j] for j in of_error]) - disagreement(others))
        worst = int(np.argmax(drops))
        left = [kept[j] for j in of_error if j != of_error[worst]]
        if not (drops[worst] > clip**2 and (len(of_error) > 3 or disagreement(left) < clip**2)):
            break
        kept = [one for i, one in enumerate(kept) if i != of_error[worst]]
    weighted = [(v, e) for v, e in kept if e > 0]
    if weighted:
        weight = np.array([e**-2.0 for _, e in weighted])
        mean = float(weight @ [v for v, _ in weighted] / weight.sum())
        return mean, float(weight.sum() ** -0.5), len(rows) - len(kept)
    mean = float(np.mean([v for v, _ in kept])) if kept else np.nan
    return mean, np.nan, len(rows) - len(kept)


@given(ROWS, st.sampled_from([2.0, 1e9]))
def test_means_of_surveys_are_those_of_plain_python(rows, clip):
    rows = sorted(rows, key=lambda row: row[2:])
    value, error = (np.array([row[i] for row in rows], dtype=np.float64) for i in (0, 1))
    star, survey = (np.array([row[i] for row in rows], dtype=np.int64) for i in (2, 3))
    found = survey_means(value, error, star, survey, SHAPE, clip)
    n_rejected = 0
    for one in range(SHAPE[0]):
        for other in range(SHAPE[1]):
            mine = [(v, e) for v, e, s, t in rows if (s, t) == (one, other)]
            mean, of_mean, out = plain_mean(mine, clip)
            n_rejected += out
            np.testing.assert_allclose(found.value[one, other], mean, atol=1e-9)
            np.testing.assert_allclose(found.error[one, other], of_mean, rtol=1e-9)
    assert found.rejected.sum() == n_rejected


def means(values: list[float], errors: list[float]) -> Means:
    return Means(np.array([values]), np.array([errors]), np.zeros(0, dtype=np.bool_))


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "errors", "floor", "wanted", "error", "n", "rejected"),
    [
        ([1.0, 2.0, NAN], [1.0, 1.0, NAN], [0, 0, 0], 1.5, 0.5**0.5, 2, False),
        ([1.0, 2.0, NAN], [1.0, 1.0, NAN], [0, 3**0.5, 0], 1.2, 0.8**0.5, 2, False),
        ([1.0, 1.2, 9.0], [0.1, 0.1, 0.1], [0, 0, 0], 1.1, 0.005**0.5, 2, True),
        ([1.0, 9.0, NAN], [0.1, 0.1, NAN], [0, 0, 0], 5.0, 0.005**0.5, 2, False),
        ([1.0, 5.0, 9.0], [0.1, 0.1, 0.1], [0, 0, 0], 5.0, (0.01 / 3) ** 0.5, 3, False),
        ([1.0, 3.0, 3.1], [0.1, 1.0, 1.0], [0, 0, 0], 106.1 / 102, 102**-0.5, 3, False),
        ([1.0, 2.0, NAN], [NAN, 1.0, NAN], [0, 0, 0], 2.0, 1.0, 1, False),
        ([1.0, 2.0, NAN], [NAN, NAN, NAN], [0, 0, 0], 1.5, NAN, 2, False),
        ([NAN, NAN, NAN], [NAN, NAN, NAN], [0, 0, 0], NAN, NAN, 0, False),
    ],
)
def test_averages_of_surveys(values, errors, floor, wanted, error, n, rejected):
    found = average(means(values, errors), np.array(floor, dtype=np.float64), 5.0)
    np.testing.assert_allclose(found.value, [wanted])
    np.testing.assert_allclose(found.error, [error])
    assert (found.n_surveys[0], found.rejected[0]) == (n, rejected)


def test_the_chance_is_that_of_scipy():
    values, dof = np.array([0.0, 3.0, 20.0, 20.0, NAN]), np.array([1, 2, 1, 0, 2])
    chance = np.where(np.isfinite(values) & (dof > 0), chi2.sf(values, np.maximum(dof, 1)), 1.0)
    for level in (1e-3, 0.5):
        np.testing.assert_array_equal(improbable(values, dof, level), chance < level)


def measured(
    truth: list[float], stated: list[float], n: int = 20_000, seed: int = 0
) -> tuple[FloatArray, FloatArray]:
    """Measurements of stars by surveys, whose errors have a floor beside the stated one."""
    rng = np.random.default_rng(seed)
    error = np.array(stated) * rng.uniform(0.7, 1.3, (n, len(stated)))
    value = rng.normal(0, 50, (n, 1)) + error * rng.normal(size=error.shape)
    value += np.array(truth) * rng.normal(size=error.shape)
    value += 0.3 * np.arange(len(truth))  # zero points do not matter
    value[rng.random(value.shape) < 0.3] = NAN
    value[rng.random(value.shape) < 0.02] += 500  # wrong rows
    return value, error


def test_floors_of_five_surveys():
    truth = [0.0, 1.0, 2.0, 0.5, 3.0]
    value, error = measured(truth, [1.0, 1.0, 2.0, 0.5, 3.0])
    floor, _, found = floors(value, error, list("abcde"))
    np.testing.assert_allclose(floor, truth, atol=0.25)
    pairs = [one for one in found if "other" in one]
    assert len(pairs) == 10 and abs(pairs[0]["offset"] + 0.3) < 0.1
    assert all(one["width"] > 1 for one in pairs)
    assert {one["survey"]: one["floor"] for one in found[10:]} == dict(
        zip("abcde", floor, strict=True)
    )


def test_two_surveys_share_what_is_too_much():
    value, error = measured([0.0, 2.0], [1.0, 1.0])
    floor, _, _ = floors(value, error, ["a", "b"])
    np.testing.assert_allclose(floor, 2**0.5, atol=0.1)


def test_errors_that_are_too_large_have_no_floor():
    value, error = measured([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    floor, _, found = floors(value, 2 * error, list("abc"))
    assert not floor.any() and all(one["width"] < 0.6 for one in found[:3])


def test_errors_that_go_together_make_the_mean_less_certain():
    rng = np.random.default_rng(3)
    shared, own = rng.normal(size=(20_000, 1)), rng.normal(size=(20_000, 3))
    value = 0.6**0.5 * shared * [1, 1, 0] + own * [0.4**0.5, 0.4**0.5, 1]
    error = np.ones_like(value)
    floor, correlation, _ = floors(value, error, list("abc"))
    wanted = np.array([[1.0, 0.6, 0.0], [0.6, 1.0, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(correlation, wanted, atol=0.05)
    both = Means(value, error, np.zeros(0, dtype=np.bool_))
    found = average(both, floor, 5.0, correlation)
    assert abs(np.std(found.value / found.error) - 1) < 0.02
    plain = average(both, floor, 5.0)
    assert np.std(plain.value / plain.error) > 1.15
    assert np.std(found.value) < np.std(plain.value)


@given(
    st.lists(st.floats(0.3, 3), min_size=3, max_size=3),
    st.lists(st.floats(0, 0.9), min_size=3, max_size=3),
)
def test_shares_are_the_best_that_are_not_negative(sigma, rho):
    correlation = np.eye(3)
    correlation[np.triu_indices(3, 1)] = rho
    correlation = np.maximum(correlation, correlation.T)
    assume(np.linalg.eigvalsh(correlation).min() > 0.05)
    both = means([1.0, 2.0, 3.0], sigma)
    found = average(both, np.zeros(3), 1e9, correlation)
    covariance = np.outer(sigma, sigma) * correlation

    def variance(share: FloatArray) -> float:
        return float(share @ covariance @ share)

    steps = np.linspace(0, 1, 101)
    every = ((a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1)
    best = min(variance(np.array(share)) for share in every)
    assert found.error[0] ** 2 <= best * (1 + 1e-9)
    assert 1.0 <= found.value[0] <= 3.0


def test_one_survey_twice_is_refused():
    value = np.random.default_rng(1).normal(5000, 300, 60)
    both = np.stack([value, value + 3], axis=1)
    with pytest.raises(CatalogError, match="'a' and 'b' have the same values of 60 stars"):
        floors(both, np.full((60, 2), 50.0), ["a", "b"])


def test_surveys_without_common_stars_have_no_floor():
    value, error = measured([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], 20_000)
    value[::2, 2] = NAN
    value[1::2, :2] = NAN
    floor, _, found = floors(value, error, list("abc"))
    assert floor[2] == 0 and floor[0] > 0.8 and len(found) == 4
