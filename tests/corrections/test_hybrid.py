import json
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from sos_dask import corrections as models
from sos_dask.corrections import Batch, boosted, hybrid, polynomial
from sos_dask.corrections.hybrid import HybridCorrection, residuals
from sos_dask.corrections.polynomial import PolynomialCorrection
from sos_dask.errors import ConfigError, ModelError
from sos_dask.settings import sealed, to_json
from tests.corrections.pairs import NOISE, ArraySource, bias, biased_pairs

QUICK = {"order": 2, "n_rounds": 30, "learning_rate": 0.1, "smoothing": 0.2}


def bump(x):
    """What no polynomial of low order follows: a narrow hill among the giants."""
    far = ((x[:, 0] - 0.95) / 0.05) ** 2 + ((x[:, 1] - 2.4) / 0.3) ** 2
    return 1.5 * np.exp(-far / 2)[:, None] * NOISE


def bumpy_pairs(n, seed):
    b = biased_pairs(n, seed, 0.03)
    return Batch(b.features, (b.differences + bump(b.features)).astype("f4"), b.fold, b.weight)


def error(correction, of_bump):
    x = biased_pairs(20_000, 99).features
    x = x[correction.in_range(x)]
    truth = bias(x) + (bump(x) if of_bump else 0)
    return np.sqrt(np.mean((correction.predict(x) - truth) ** 2, axis=0)) / NOISE


def roughness(correction, batch, n=40):
    """Root mean square of second differences along the axes of a grid, in units of the noise."""
    low, high = np.quantile(batch.features, [0.02, 0.98], axis=0)
    axes = np.linspace(low, high, n).T
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3).astype("f4")
    values = correction.predict(grid).reshape(n, n, n, 3).astype(np.float64) / NOISE
    squares = [np.mean(np.diff(values, 2, axis=axis) ** 2, axis=(0, 1, 2)) for axis in range(3)]
    return np.sqrt(np.mean(squares, axis=0))


@pytest.fixture(scope="module")
def fitted():
    source = ArraySource(biased_pairs(2000, 1), (700,))
    return models.fit("hybrid", source, train_folds=[1, 2, 3, 4], params=QUICK)


@pytest.fixture
def saved(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    return tmp_path / "model"


# --- accuracy and smoothness -------------------------------------------------------------------


def test_a_local_bump_is_found_and_the_correction_is_smooth():
    batch = bumpy_pairs(15_000, 1)
    source = ArraySource(batch)
    fits = {method: models.fit(method, source) for method in ("polynomial", "boosted", "hybrid")}
    errors = {method: error(fit, True) for method, fit in fits.items()}
    assert (errors["hybrid"] < 0.6 * errors["polynomial"]).all()
    assert (errors["hybrid"] < 1.02 * errors["boosted"]).all()
    ratio = roughness(fits["boosted"], batch) / roughness(fits["hybrid"], batch)
    assert ratio.mean() > 3
    assert ratio.min() > 2.5


def test_without_a_bump_it_is_nearly_the_polynomial():
    batch = biased_pairs(10_000, 1, 0.03)
    trees = models.fit("boosted", ArraySource(batch))
    out = models.fit("hybrid", ArraySource(batch), params={"smoothing": 0.15})
    assert (error(out, False) < 0.8 * error(trees, False)).all()
    assert (roughness(trees, batch) / roughness(out, batch) > 3).all()


def test_smearing_takes_the_steps():
    batch = bumpy_pairs(10_000, 2)
    trees = {"n_rounds": 50, "learning_rate": 0.15}
    smooth = models.fit("hybrid", ArraySource(batch), params={**trees, "smoothing": 0.15})
    steps = models.fit("hybrid", ArraySource(batch), params={**trees, "smoothing": 0.05})
    assert (roughness(smooth, batch) < 0.6 * roughness(steps, batch)).all()
    assert (error(smooth, True) < 1.1 * error(steps, True)).all()


def test_outliers_at_an_end_do_not_move_it():
    batch = biased_pairs(20_000, 1)
    rng = np.random.default_rng(0)
    at_end = np.flatnonzero(batch.features[:, 2] > np.quantile(batch.features[:, 2], 0.98))
    wrong = rng.choice(at_end, len(at_end) // 3, replace=False)
    batch.differences[wrong] += 12 * NOISE
    # The end is where pairs are right: there is no reason to follow the wrong third.
    x = batch.features[at_end]
    fits = {
        k: models.fit("hybrid", ArraySource(batch), params={"outlier": k, "smoothing": 0.3})
        for k in (7, 1e6)
    }
    off = {k: np.median((fit.predict(x) - bias(x)) / NOISE, axis=0) for k, fit in fits.items()}
    assert (np.abs(off[7]) < 0.2).all()
    assert (off[1e6] > 2 * np.abs(off[7])).all()


# --- parts -------------------------------------------------------------------------------------


def test_it_is_the_sum_of_its_parts():
    batch = biased_pairs(2000, 3)
    source = ArraySource(batch)
    out = models.fit("hybrid", source, params={**QUICK, "smoothing": 0.03})
    assert isinstance(out, HybridCorrection)
    smooth = models.fit("polynomial", source, params={"order": 2})
    assert isinstance(smooth, PolynomialCorrection)
    of_trees = {k: v for k, v in out.info.params.items() if k in boosted.Settings.model_fields}
    left = ArraySource(residuals(batch, smooth, 7.0))
    trees = models.fit("boosted", left, params=of_trees)
    x = biased_pairs(500, 4).features
    local = out.predict(x) - smooth.predict(x)
    # Steps are as wide as the smearing, so only in the mean a row is what its trees say.
    for column, of_trees in zip(local.T, trees.predict(x).T, strict=True):
        assert np.corrcoef(column, of_trees)[0, 1] > 0.97


def test_parameters_go_to_their_parts(fitted):
    assert set(hybrid.Settings.model_fields) == {
        *polynomial.Settings.model_fields,
        *boosted.Settings.model_fields,
        "smoothing",
        "outlier",
    }
    assert not set(polynomial.Settings.model_fields) & set(boosted.Settings.model_fields)
    assert fitted.smooth.info.params["order"] == 2
    assert len(fitted.smooth.exponents) == 10
    for params, message in (
        ({"order": 9}, "order: must be less"),
        ({"n_rounds": 0}, "n_rounds: must be greater"),
        ({"smoothing": 0}, "smoothing: must be greater"),
        ({"device": "gpu"}, "must be 'cpu' or 'cuda'"),
        ({"depth": 3}, "unknown key 'depth'"),
    ):
        with pytest.raises(ConfigError, match=message):
            models.fit("hybrid", ArraySource(biased_pairs(500)), params=params)


def test_residuals_of_unknown_rows_are_unknown(fitted):
    batch = biased_pairs(5, 5)
    batch.features[1, 2] = np.nan
    batch.differences[2, 0] = np.nan
    batch.differences[3, 1] += 100
    left = residuals(batch, fitted.smooth, 7.0)
    assert np.isnan(left.differences[3]).tolist() == [False, True, False]
    assert np.isnan(left.differences[1]).all()
    assert np.isnan(left.differences[2]).tolist() == [True, False, False]
    expected = batch.differences[0] - fitted.smooth.predict(batch.features)[0]
    np.testing.assert_array_equal(left.differences[0], expected)
    np.testing.assert_array_equal(left.fold, batch.fold)


# --- what every method promises ----------------------------------------------------------------


def test_prediction(fitted):
    x = biased_pairs(5000, 6).features
    whole = fitted.predict(x)
    assert whole.dtype == np.float32
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_array_equal(fitted.predict(x[order]), whole[order])
    np.testing.assert_array_equal(fitted.predict(x[:3]), whole[:3])
    x[0, 0], x[1, 2] = np.nan, np.inf
    out = fitted.predict(x)
    assert np.isnan(out[:2]).all()
    np.testing.assert_array_equal(out[2:], whole[2:])
    far = np.array([[99, 99, 99], [-99, -99, -99]], dtype=np.float32)
    edge = np.array([fitted.info.maximum, fitted.info.minimum], dtype=np.float32)
    np.testing.assert_array_equal(fitted.predict(far), fitted.predict(edge))


def test_too_few_and_unknown():
    with pytest.raises(ModelError, match=r"'hybrid' needs at least 50 training pairs .* are 40"):
        models.fit("hybrid", ArraySource(biased_pairs(40)))
    batch = biased_pairs(1000)
    batch.differences[:, 2] = np.nan
    with pytest.raises(ModelError, match="known feh difference, and there are 0"):
        models.fit("hybrid", ArraySource(batch))


def test_saved_and_loaded(fitted, saved, tmp_path):
    again = models.load(saved)
    x = biased_pairs(3000, 7).features
    np.testing.assert_array_equal(again.predict(x), fitted.predict(x))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict(x), again.predict(x))
    assert again.info == fitted.info
    again.save(tmp_path / "again")
    names = {file.name for file in saved.iterdir()}
    assert names == {file.name for file in (tmp_path / "again").iterdir()}
    for name in names:
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_same_pairs_same_bytes(fitted):
    source = ArraySource(biased_pairs(2000, 1), (700,))
    again = models.fit("hybrid", source, train_folds=[1, 2, 3, 4], params=QUICK)
    assert again.files() == fitted.files()


def test_changed_and_missing_files_are_named(saved):
    for file in sorted(saved.iterdir()):
        if file.name == "model.json":
            continue
        content = file.read_bytes()
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(ModelError, match=file.name):
            models.load(saved)
        file.unlink()
        with pytest.raises(ModelError, match=f"{file.name}: No such file"):
            models.load(saved)
        file.write_bytes(content)
    document = json.loads((saved / "model.json").read_text())
    for name in document["files"]:
        kept = {k: v for k, v in document["files"].items() if k != name}
        edited = {**document, "files": kept}
        (saved / "model.json").write_bytes(to_json(sealed(edited)))
        with pytest.raises(ModelError, match=r"damaged|JSON"):
            models.load(saved)


def test_trained_on_a_cluster(fitted, cluster):
    source = ArraySource(biased_pairs(2000, 1), (700,))
    client = cluster.client
    there = models.fit("hybrid", source, train_folds=[1, 2, 3, 4], params=QUICK, client=client)
    x = biased_pairs(3000, 8).features
    assert (np.abs(there.predict(x) - fitted.predict(x)) / NOISE).max() < 1e-3


class Step:
    """In place of trees: a step along the first input, a line along the second."""

    def evaluate(self, x):
        return np.stack([(x[:, 0] > 0.5).astype("f4"), 3 * x[:, 1]], axis=1)


def test_a_smeared_step_is_that_of_the_normal_distribution():
    width = np.array([0.1, 0.2])
    low, high = np.array([[-1, -2], [2, 2]], np.float32)
    step: Any = Step()
    nodes = hybrid._smeared(step, low, high, width)
    # Nodes are at most 0.7 widths apart.
    assert nodes.shape == (44, 30, 2)
    at = np.linspace(-1, 2, 44)
    expected = norm.cdf((at - 0.5) / 0.1)
    np.testing.assert_allclose(nodes[:, 7, 0], expected, atol=0.02)
    line = 3 * np.linspace(-2, 2, 30)
    np.testing.assert_allclose(nodes[5, 5:-5, 1], line[5:-5], atol=1e-5)
    assert nodes[0, 0, 1] > line[0]  # beyond the box it stays as at the face


def test_an_input_of_one_value_has_the_least_nodes():
    """Two, the ends of an interval of no length."""
    total: Any = SimpleNamespace(evaluate=lambda x: x.sum(axis=1, keepdims=True))
    low, high = np.array([1.0, 0.0], "f4"), np.array([1.0, 1.0], "f4")
    nodes = hybrid._smeared(total, low, high, np.array([0.1, 0.1]))
    assert nodes.shape[0] == 2 and np.isfinite(nodes).all()
    np.testing.assert_array_equal(nodes[0], nodes[1])


def test_a_grid_of_many_inputs_has_no_more_nodes():
    class Sum:
        def evaluate(self, x):
            return x.sum(axis=1, keepdims=True)

    k = 5
    total: Any = Sum()
    nodes = hybrid._smeared(total, np.zeros(k, "f4"), np.ones(k, "f4"), np.full(k, 0.01))
    assert 0.3 * hybrid.MAX_NODES**3 < nodes.size <= hybrid.MAX_NODES**3
