"""SIMEX, and what noise alone does to every method."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kstest

from sos_dask import corrections as models
from sos_dask.corrections import Batch
from sos_dask.corrections.hybrid import LAMBDAS, noisy, part_weights
from sos_dask.errors import ModelError
from sos_dask.problem import DEFAULT, Input, Label, Problem
from sos_dask.settings import sealed, to_json
from tests.corrections.pairs import ArraySource, biased_pairs
from tests.steps import features

CENTER = np.array([5000.0, 3.0, -0.3])
SPREAD = np.array([400.0, 0.8, 0.3])
ERROR = np.array([200.0, 0.3, 0.15])
QUICK = {"order": 2, "n_rounds": 10, "smoothing": 0.5}
BIAS = np.array([0.1, -0.1, 0.2])


def noisy_normal(n, slope, seed=0):
    """Normal true labels with normal noise, and a bias that is a line in each true label."""
    rng = np.random.default_rng(seed)
    true = CENTER + SPREAD * rng.normal(size=(n, 3))
    labels = true + slope * (true - CENTER) + ERROR * rng.normal(size=(n, 3))
    differences = labels - true - 0.3 * ERROR * rng.normal(size=(n, 3))
    return Batch(
        features(*labels.T),
        differences.astype(np.float32),
        rng.integers(0, 5, n).astype(np.int8),
        np.ones(n, dtype=np.float32),
        np.tile(ERROR, (n, 1)).astype(np.float32),
    )


def slopes(fitted):
    """Slope of the correction of each label along itself, by least squares over many stars."""
    rng = np.random.default_rng(9)
    z = rng.uniform(-1, 1, (20_000, 3))
    values = fitted.predict(features(*(CENTER + SPREAD * z).T)).astype(np.float64)
    fits = np.linalg.lstsq(np.column_stack([np.ones(len(z)), z]), values, rcond=None)[0]
    return np.diag(fits[1:]) / SPREAD


def expected(slope):
    """Of t - r on t, where t is normal: (cov(b, t) + var(e)) / var(t)."""
    stretched = (1 + slope) * SPREAD
    return (slope * SPREAD * stretched + ERROR**2) / (stretched**2 + ERROR**2)


# --- noise is not trend --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "params"),
    [("polynomial", {"order": 2}), ("boosted", {"n_rounds": 150}), ("hybrid", QUICK)],
)
def test_noise_alone_makes_the_slope_that_theory_says(method, params):
    fitted = models.fit(method, ArraySource(noisy_normal(10_000, 0.0)), params=params)
    theory = ERROR**2 / (ERROR**2 + SPREAD**2)
    np.testing.assert_allclose(expected(0.0), theory)
    assert (theory > 0.1).all()
    np.testing.assert_allclose(slopes(fitted), theory, atol=0.04)


def test_simex_gives_back_the_bias():
    source = ArraySource(noisy_normal(20_000, BIAS))
    plain = models.fit("polynomial", source, params={"order": 2})
    simex = models.fit("simex", source, params={"order": 2})
    # The bias as a function of the target's label without noise.
    truth = BIAS / (1 + BIAS)
    np.testing.assert_allclose(slopes(plain), expected(BIAS), atol=0.02)
    assert (np.abs(slopes(simex) - truth) < 0.35 * np.abs(slopes(plain) - truth)).all()
    # The reference is better predicted with the noise left in.
    other = noisy_normal(20_000, BIAS, seed=1)
    left = {
        name: np.std(other.differences - fitted.predict(other.features), axis=0)
        for name, fitted in (("plain", plain), ("simex", simex))
    }
    assert (left["plain"] < left["simex"]).all()


def test_without_bias_simex_finds_none():
    source = ArraySource(noisy_normal(20_000, 0.0))
    simex = models.fit("simex", source, params={"base": "hybrid", **QUICK})
    assert (np.abs(slopes(simex)) < 0.4 * expected(0.0)).all()


# --- noise, weights ------------------------------------------------------------------------------


def test_noise_belongs_to_the_pair():
    batch = noisy_normal(5000, 0.0)
    whole = noisy(batch, DEFAULT, 2.0, 7)
    moved = (whole.differences - batch.differences) / ERROR / 2
    for k in range(3):
        assert kstest(moved[:, k].astype(np.float64), "norm").pvalue > 0.001
    assert np.abs(np.corrcoef(moved.T) - np.eye(3)).max() < 0.05
    shift = (whole.features - batch.features) * [5040.0, 1, 1] / ERROR / 2
    np.testing.assert_allclose(shift, moved, atol=1e-3)
    cut = ArraySource(batch, (1234,))
    parts = np.concatenate([noisy(cut.load(k), DEFAULT, 2.0, 7).features for k in (0, 1)])
    np.testing.assert_array_equal(parts, whole.features)
    other = noisy(batch, DEFAULT, 2.0, 8)
    assert not np.isclose(other.features, whole.features).all(axis=1).any()


def test_noise_follows_from_numbers_not_from_bits():
    batch = noisy_normal(10, 0.0)
    batch.features[:, 1], batch.differences[:, 2] = 0.0, np.nan
    other = replace(batch, features=batch.features.copy(), differences=batch.differences.copy())
    other.features[:, 1] = -0.0
    other.differences[:, 2].view(np.uint32)[:] = 0xFFC00001  # another NaN
    one, two = (noisy(b, DEFAULT, 1.0, 7) for b in (batch, other))
    np.testing.assert_array_equal(one.features, two.features)
    np.testing.assert_array_equal(one.differences, two.differences)


def test_weights_follow_a_parabola_back():
    weights = part_weights(2)
    amounts = np.array([0, *np.repeat(LAMBDAS, 2)])
    for a, b, c in ((1.0, 0.0, 0.0), (2.0, -1.0, 0.5)):
        np.testing.assert_allclose(weights @ (a + b * amounts + c * amounts**2), a - b + c)


# --- errors, files -------------------------------------------------------------------------------


def test_pairs_without_errors():
    batch = noisy_normal(500, 0.0)
    with pytest.raises(ModelError, match="errors of the target's labels, and the pairs have none"):
        models.fit("simex", ArraySource(replace(batch, errors=None)))
    assert batch.errors is not None
    errors = batch.errors.copy()
    errors[:, 1] = np.nan
    with pytest.raises(ModelError, match="no pair has all of them"):
        models.fit("simex", ArraySource(replace(batch, errors=errors)))
    errors[:400] = 1
    fitted = models.fit("simex", ArraySource(replace(batch, errors=errors)), params={"order": 2})
    assert fitted.info.n_pairs == (400, 400, 400)


@pytest.mark.parametrize("base", ["polynomial", "hybrid"])
def test_saved_and_loaded(base, tmp_path):
    source = ArraySource(noisy_normal(500, BIAS))
    params = {"base": base, "order": 2, "n_rounds": 3, "replicas": 1, "smoothing": 1.0}
    fitted = models.fit("simex", source, params=params)
    fitted.save(tmp_path / "model")
    again = models.load(tmp_path / "model")
    x = biased_pairs(500, 7).features
    np.testing.assert_array_equal(again.predict(x), fitted.predict(x))
    assert again.files() == fitted.files()
    assert models.fit("simex", source, params=params).files() == fitted.files()
    document = json.loads((tmp_path / "model" / "model.json").read_text())
    del document["params"]["base"]
    (tmp_path / "model" / "model.json").write_bytes(to_json(sealed(document)))
    with pytest.raises(ModelError, match="incomplete or damaged"):
        models.load(tmp_path / "model")


def test_noise_of_an_input_goes_through_its_transform():
    inputs = (Input(column="a", scale=10.0), Input(column="a", log10=True, name="b"))
    problem = Problem(labels=(Label(name="a"),), inputs=(*inputs, Input(column="c")))
    value = np.array([50.0, 200.0])
    x = np.stack([value / 10, np.log10(value), [1.0, 2.0]], axis=1).astype(np.float32)
    y = np.zeros((2, 1), np.float32)
    ones = np.ones(2, np.float32)
    batch = Batch(x, y, np.zeros(2, np.int8), ones, np.full((2, 1), 1e-3, np.float32))
    found = noisy(batch, problem, 1.0, 0)
    moved = found.differences[:, 0].astype(np.float64)
    np.testing.assert_allclose(found.features[:, 0] - x[:, 0], moved / 10, atol=1e-6)
    expected = np.log10(value + moved)
    np.testing.assert_allclose(found.features[:, 1], expected, atol=1e-6)
    np.testing.assert_array_equal(found.features[:, 2], x[:, 2])
    # A label without any scatter has no noise.
    assert not noisy(batch, problem, 1.0, 0, (True,)).differences.any()
