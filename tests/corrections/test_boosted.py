import subprocess
import sys

import numpy as np
import pytest
import xgboost

from sos_dask import corrections as models
from sos_dask.corrections import Batch, boosted, boosted_cluster
from sos_dask.corrections.boosted import BoostedCorrection
from sos_dask.corrections.boosted_cluster import find_gpu, one_each
from sos_dask.errors import ModelError
from tests.corrections.pairs import NOISE, ArraySource, bias, biased_pairs
from tests.steps import FEATURES

QUICK = {"n_rounds": 30, "learning_rate": 0.2}


def fit(source: models.TrainingSource, **options) -> BoostedCorrection:
    out = models.fit("boosted", source, **options)
    assert isinstance(out, BoostedCorrection)
    return out


def error(correction):
    """Root mean square of prediction - true difference, in units of the noise."""
    x = biased_pairs(20_000, 99).features
    inside = x[correction.in_range(x)]
    return np.sqrt(np.mean((correction.predict(inside) - bias(inside)) ** 2, axis=0)) / NOISE


# --- accuracy ----------------------------------------------------------------------------------


def test_the_interaction_of_features_is_found():
    out = fit(ArraySource(biased_pairs(30_000, 7)))
    assert error(out).max() < 0.2
    # Trees of one split cannot hold a product.
    assert error(fit(ArraySource(biased_pairs(30_000, 7)), params={"max_depth": 1})).max() > 0.28


def test_a_step_that_no_polynomial_follows():
    batch = biased_pairs(30_000, 8)
    step = np.where(batch.features[:, 1] < 3.5, 2.0, 0.0)[:, None] * NOISE
    source = ArraySource(
        Batch(
            batch.features,
            (batch.differences + step).astype(np.float32),
            batch.fold,
            batch.weight,
        )
    )
    x = biased_pairs(20_000, 98).features
    near = np.abs(x[:, 1] - 3.5) < 0.3
    truth = (bias(x) + np.where(x[:, 1] < 3.5, 2.0, 0.0)[:, None] * NOISE)[near]

    def rms(method):
        predicted = models.fit(method, source).predict(x[near])
        return np.sqrt(np.mean((predicted - truth) ** 2, axis=0)) / NOISE

    assert (rms("boosted") < 0.7 * rms("polynomial")).all()


def test_outliers_hardly_move_the_fit():
    clean = fit(ArraySource(biased_pairs(30_000, 9)))
    dirty = fit(ArraySource(biased_pairs(30_000, 9, 0.05)))
    x = biased_pairs(20_000, 97).features
    offset = np.median(dirty.predict(x) - clean.predict(x), axis=0) / NOISE
    # Their mean is half a sigma off.
    assert np.abs(offset).max() < 0.1


def test_few_pairs_are_not_fitted_to_their_noise():
    out = fit(ArraySource(biased_pairs(300, 10)))
    batch = biased_pairs(300, 10)
    residual = (batch.differences - out.predict(batch.features)) / NOISE
    assert (residual.std(axis=0) > 0.5).all()
    assert error(out).max() < 0.8


# --- files and prediction ----------------------------------------------------------------------


def test_a_saved_model_needs_no_xgboost_to_predict(tmp_path):
    """It takes a second to import, in every worker."""
    batch = biased_pairs(2000, 16)
    out = fit(ArraySource(batch), params=QUICK)
    out.save(tmp_path / "model")
    np.save(tmp_path / "x.npy", batch.features)
    code = """
import pathlib, sys
import numpy as np
from sos_dask import corrections as models
found = models.load(pathlib.Path("model"), check=False).predict(np.load("x.npy"))
assert "xgboost" not in sys.modules
np.save("found.npy", found)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = np.load(tmp_path / "found.npy")
    np.testing.assert_allclose(found, out.predict(batch.features), rtol=1e-5, atol=2e-5)


def test_damaged_trees_without_a_table_are_refused():
    out = fit(ArraySource(biased_pairs(2000, 16)), params=QUICK)
    files = dict(out.files())
    assert BoostedCorrection.restore(out.info, files).ensembles == out.ensembles
    del files[boosted.TABLE]
    files["logg.ubj"] = files["logg.ubj"][:100]
    with pytest.raises(ModelError, match="cannot read the trees"):
        BoostedCorrection.restore(out.info, files)


def test_missing_values_do_not_take_the_default_direction():
    batch = biased_pairs(2000, 14)
    out = fit(ArraySource(batch), params=QUICK)
    x = batch.features[:3].copy()
    x[1, 1] = np.nan
    assert np.isfinite(out.boosters[0].inplace_predict(x)).all()  # XGBoost would answer
    assert np.isnan(out.predict(x)[1]).all()


def test_prediction_is_center_and_spread_times_the_trees():
    batch = biased_pairs(2000, 15)
    out = fit(ArraySource(batch), params=QUICK)
    np.testing.assert_allclose(out.center, np.median(batch.differences, axis=0), rtol=0.01)
    np.testing.assert_allclose(
        out.predict(batch.features),
        out.center + out.spread * out.trees(batch.features),
        rtol=1e-6,
    )
    matrix = xgboost.DMatrix(batch.features, feature_names=list(FEATURES))
    np.testing.assert_array_equal(out.trees(batch.features)[:, 1], out.boosters[1].predict(matrix))


# --- on a GPU ----------------------------------------------------------------------------------


def gpu_problem() -> str:
    try:
        find_gpu()
    except ModelError as error:
        return error.message
    return ""


@pytest.mark.parametrize("remote", [True, False])
def test_without_gpu_there_is_no_silent_fallback(client, remote, monkeypatch):
    if not gpu_problem():
        pytest.skip("there is a GPU")
    trained = []
    monkeypatch.setattr(boosted_cluster, "_train_on", lambda *_: trained.append(1))
    monkeypatch.setattr(boosted, "_train", lambda *_: trained.append(1))
    with pytest.raises(ModelError, match=r"device = 'cuda': (no usable GPU|XGBoost .* without)"):
        fit(
            ArraySource(biased_pairs(500, 22)),
            params={"device": "cuda"},
            client=client if remote else None,
        )
    assert not trained


@pytest.mark.gpu
@pytest.mark.parametrize("remote", [True, False])
def test_a_gpu_trains_nearly_the_same_model(client, remote):
    """Sums in another order: half of all predictions agree within 2 % of the noise of a pair."""
    if problem := gpu_problem():
        pytest.skip(problem)
    source = ArraySource(biased_pairs(20_000, 23))
    there = fit(source, params={"device": "cuda"}, client=client if remote else None)
    here = fit(source)
    x = biased_pairs(5000, 24).features
    assert np.median(np.abs(there.predict(x) - here.predict(x)) / NOISE) < 0.02
    assert np.abs(error(there) - error(here)).max() < 0.02


def test_workers_that_share_a_gpu_train_as_one():
    gpus = [("host", "0", "GPU-1")] * 2 + [("host", "0", "GPU-2"), ("other", "", "")]
    assert one_each(["a", "b", "c", "d"], gpus) == ["a", "c", "d"]


def test_a_build_without_cuda_is_told(monkeypatch):
    monkeypatch.setattr(xgboost, "build_info", lambda: {"USE_CUDA": False})
    with pytest.raises(ModelError, match="built without CUDA"):
        fit(ArraySource(biased_pairs(500, 22)), params={"device": "cuda"})
