import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace

import dask
import distributed  # noqa: F401  # its settings must be there before one is changed
import numpy as np
import pytest
import xgboost

from sos_dask import models
from sos_dask.cluster import start
from sos_dask.errors import CatalogError, ClusterError, ModelError
from sos_dask.features import FEATURES
from sos_dask.models import Batch, boosted
from sos_dask.models.boosted import BoostedCorrection
from sos_dask.models.cuda import Gpu, find_gpu, one_each
from tests.test_models import NOISE, ArraySource, bias, biased_pairs

QUICK = {"n_rounds": 30, "learning_rate": 0.2}


@pytest.fixture(scope="session")
def client(cluster):
    """Client of the cluster of two worker processes that all tests share."""
    return cluster.client


def fit(source: models.TrainingSource, **options) -> BoostedCorrection:
    out = models.fit("boosted", source, **options)
    assert isinstance(out, BoostedCorrection)
    return out


def error(correction):
    """Root mean square of prediction - true difference, in units of the noise."""
    x = biased_pairs(20_000, 99).features
    inside = x[correction.in_range(x)]
    return np.sqrt(np.mean((correction.predict(inside) - bias(inside)) ** 2, axis=0)) / NOISE


def thresholds(correction: BoostedCorrection) -> list[set[float]]:
    """Thresholds of all trees, per feature."""
    out: list[set[float]] = [set() for _ in FEATURES]
    for booster in correction.boosters:
        document = json.loads(bytes(booster.save_raw("json")))
        for tree in document["learner"]["gradient_booster"]["model"]["trees"]:
            nodes = zip(
                tree["left_children"],
                tree["split_indices"],
                tree["split_conditions"],
                strict=True,
            )
            for left, feature, condition in nodes:
                if left != -1:
                    out[feature].add(float(np.float32(condition)))
    return out


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
    assert (residual.std(axis=0) > 0.6).all()
    assert error(out).max() < 0.8


# --- bins and bytes ----------------------------------------------------------------------------


def test_thresholds_lie_on_few_edges():
    source = ArraySource(biased_pairs(20_000, 11))
    out = fit(source, params=QUICK)
    coarse = fit(source, params={**QUICK, "max_bin": 16})
    for fine, few in zip(thresholds(out), thresholds(coarse), strict=True):
        assert 20 < len(fine) < 256
        assert 5 < len(few) < 16


def test_order_and_batches_of_the_pairs_do_not_matter():
    batch = biased_pairs(8000, 12, 0.03)
    order = np.random.default_rng(0).permutation(8000)
    shuffled = Batch(
        batch.features[order], batch.differences[order], batch.fold[order], batch.weight[order]
    )
    out, other = fit(ArraySource(batch)), fit(ArraySource(shuffled, (10, 11, 5000)))
    x = batch.features
    assert (np.abs(out.predict(x) - other.predict(x)) / NOISE).max() < 1e-4
    assert thresholds(out) == thresholds(other)


def test_what_is_unknown_of_one_label_does_not_touch_the_trees_of_another():
    batch = biased_pairs(3000, 18)
    some = batch.differences.copy()
    some[::3, 1] = np.nan
    whole = fit(ArraySource(batch), params=QUICK)
    part = fit(ArraySource(replace(batch, differences=some)), params=QUICK)
    same = [a == b for a, b in zip(whole.ensembles, part.ensembles, strict=True)]
    assert same == [True, False, True]


def test_a_saved_model_needs_no_xgboost_to_predict(tmp_path):
    """It takes a second to import, in every worker."""
    batch = biased_pairs(2000, 16)
    out = fit(ArraySource(batch), params=QUICK)
    out.save(tmp_path / "model")
    np.save(tmp_path / "x.npy", batch.features)
    code = """
import pathlib, sys
import numpy as np
from sos_dask import models
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
    assert boosted.restore(out.info, files).ensembles == out.ensembles
    del files[boosted.TABLE]
    files["logg.ubj"] = files["logg.ubj"][:100]
    with pytest.raises(ModelError, match="cannot read the trees"):
        boosted.restore(out.info, files)


def test_a_feature_of_one_value_is_never_split():
    batch = biased_pairs(2000, 13)
    batch.features[:, 2] = -0.25
    out = fit(ArraySource(batch), params=QUICK)
    assert thresholds(out)[2] == set()
    assert np.isfinite(out.predict(batch.features)).all()


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


def test_neither_trees_nor_predictions_depend_on_threads(monkeypatch):
    batch = biased_pairs(20_000, 4)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(boosted, "_threads", lambda _, n=threads: n)
        correction = fit(ArraySource(batch), params={**QUICK, "subsample": 0.7})
        found.append((correction.files(), correction.trees(batch.features).tobytes()))
    assert found[0] == found[1] == found[2]


def test_a_seed_decides_the_subsample():
    source = ArraySource(biased_pairs(3000, 16))
    params = {**QUICK, "subsample": 0.5}
    assert fit(source, params=params).files() == fit(source, params=params).files()
    assert fit(source, params={**params, "seed": 1}).files() != fit(source, params=params).files()


@pytest.mark.parametrize(
    ("n_rows", "n_workers", "expected"),
    [
        ([10, 10, 10, 10], 2, [(0, 2), (2, 4)]),
        ([10, 10, 10, 10], 1, [(0, 4)]),
        ([100, 1, 1, 1], 2, [(0, 1), (1, 4)]),
        ([1, 1, 1, 100], 2, [(0, 3), (3, 4)]),
        ([0, 5, 0], 3, [(0, 3)]),
        ([5, 0, 0, 5], 4, [(0, 1), (1, 4)]),
        ([7], 4, [(0, 1)]),
    ],
)
def test_shares_are_even_and_never_empty(n_rows, n_workers, expected):
    shares = boosted._shares(np.array(n_rows), n_workers)
    assert len(shares) <= n_workers
    covered = [index for first, stop in shares for index in range(first, stop)]
    assert {i for i, n in enumerate(n_rows) if n} <= set(covered)
    assert covered == sorted(set(covered))
    assert all(sum(n_rows[first:stop]) > 0 for first, stop in shares)
    assert [sum(n_rows[a:b]) for a, b in shares] == [sum(n_rows[a:b]) for a, b in expected]


# --- on a cluster ------------------------------------------------------------------------------


def test_workers_train_the_same_model(client):
    source = ArraySource(biased_pairs(9000, 17, 0.03), (1000, 1000, 4000, 7000))
    said = []
    there = fit(source, params=QUICK, client=client, progress=lambda *step: said.append(step))
    assert said == [("boosted", 1, 3), ("boosted", 2, 3), ("boosted", 3, 3)]
    assert there.files() == fit(source, params=QUICK, client=client).files()
    here = fit(source, params=QUICK)
    x = biased_pairs(5000, 18).features
    assert (np.abs(there.predict(x) - here.predict(x)) / NOISE).max() < 1e-4
    assert there.info == here.info


def test_a_label_that_one_worker_does_not_know(client):
    batch = biased_pairs(6000, 19)
    batch.differences[:3000, 1] = np.nan
    source = ArraySource(batch, (3000,))
    there, here = fit(source, params=QUICK, client=client), fit(source, params=QUICK)
    x = batch.features
    assert there.info.n_pairs == (6000, 3000, 6000)
    assert (np.abs(there.predict(x) - here.predict(x)) / NOISE).max() < 1e-4


def test_fewer_batches_than_workers(client):
    source = ArraySource(biased_pairs(2000, 20))
    assert fit(source, params=QUICK, client=client).files() == fit(source, params=QUICK).files()


@dataclass(frozen=True)
class BadSource:
    """A source with a partition that cannot be read."""

    good: ArraySource

    @property
    def n_batches(self) -> int:
        return 3

    def load(self, index: int) -> Batch:
        if index == 2:
            raise CatalogError("Npix=2.parquet is damaged", "rebuild it")
        return self.good.load(0)


@pytest.mark.parametrize("method", ["boosted", "polynomial"])
@pytest.mark.parametrize("remote", [True, False])
def test_an_error_of_the_source_arrives_as_it_was(client, method, remote):
    source = BadSource(ArraySource(biased_pairs(500, 21)))
    with pytest.raises(CatalogError, match="damaged") as caught:
        models.fit(method, source, client=client if remote else None)
    assert caught.value.hint == "rebuild it"


@pytest.mark.parametrize("remote", [True, False])
def test_without_gpu_there_is_no_silent_fallback(client, remote, monkeypatch):
    if not find_gpu().problem:
        pytest.skip("there is a GPU")
    trained = []
    monkeypatch.setattr(boosted, "_train_labels", lambda *_: trained.append(1))
    monkeypatch.setattr(boosted, "_fit_here", lambda *_: trained.append(1))
    with pytest.raises(ModelError, match=r"device = 'cuda': (no usable GPU|XGBoost .* without)"):
        fit(
            ArraySource(biased_pairs(500, 22)),
            params={"device": "cuda"},
            client=client if remote else None,
        )
    assert not trained


@pytest.mark.parametrize("remote", [True, False])
def test_without_gpu_trees_are_not_counted_on_the_cpu(client, remote):
    if not find_gpu().problem:
        pytest.skip("there is a GPU")
    params = {"device": "cuda", "stop_rounds": 5, "n_rounds": 20000}  # minutes
    with pytest.raises(ModelError, match="device = 'cuda'"):
        fit(ArraySource(biased_pairs(5000, 22)), params=params, client=client if remote else None)


@pytest.mark.gpu
@pytest.mark.parametrize("remote", [True, False])
def test_a_gpu_trains_nearly_the_same_model(client, remote):
    """Sums in another order: half of all predictions agree within 2 % of the noise of a pair."""
    if problem := find_gpu().problem:
        pytest.skip(problem)
    source = ArraySource(biased_pairs(20_000, 23))
    there = fit(source, params={"device": "cuda"}, client=client if remote else None)
    here = fit(source)
    x = biased_pairs(5000, 24).features
    assert np.median(np.abs(there.predict(x) - here.predict(x)) / NOISE) < 0.02
    assert np.abs(error(there) - error(here)).max() < 0.02


def test_workers_that_share_a_gpu_train_as_one():
    gpus = {
        "a": Gpu("", device=("host", "0", "GPU-1")),
        "b": Gpu("", device=("host", "0", "GPU-1")),
        "c": Gpu("", device=("host", "0", "GPU-2")),
        "d": Gpu("", device=("other", "", "")),
    }
    assert one_each(gpus) == ["a", "c", "d"]
    with pytest.raises(ModelError, match=r"device = 'cuda': no usable GPU"):
        one_each({**gpus, "e": Gpu("no usable GPU here", "Run elsewhere.")})


def test_a_build_without_cuda_is_told(monkeypatch):
    monkeypatch.setattr(xgboost, "build_info", lambda: {"USE_CUDA": False})
    with pytest.raises(ModelError, match="built without CUDA"):
        fit(ArraySource(biased_pairs(500, 22)), params={"device": "cuda"})


# --- losses ------------------------------------------------------------------------------------


def test_after_three_losses_there_is_an_error(client, monkeypatch):
    tries = []

    def lose(*_):
        tries.append(1)
        raise xgboost.core.XGBoostError("Ring allgather failed\nStack trace: many lines")

    monkeypatch.setattr(boosted, "_train_label", lose)
    with pytest.raises(ClusterError, match=r"lost 3 times, .* Ring allgather failed\n") as caught:
        fit(ArraySource(biased_pairs(500, 25)), client=client)
    assert len(tries) == 3
    assert "Stack trace" not in caught.value.message
    assert "timeout_s" in caught.value.hint


def test_labels_that_are_done_are_not_trained_again(client, monkeypatch):
    trained = []
    real = boosted._train_label

    def lose_once(*arguments):
        trained.append(arguments[-1])
        if trained == [0, 1]:
            raise RuntimeError("Missing required workers: {'tcp://gone'}")
        return real(*arguments)

    monkeypatch.setattr(boosted, "_train_label", lose_once)
    source = ArraySource(biased_pairs(2000, 26))
    out = fit(source, params=QUICK, client=client)
    assert trained == [0, 1, 1, 2]
    assert out.files() == fit(source, params=QUICK).files()


def test_the_tracker_is_not_in_the_process_of_the_scheduler(client, monkeypatch):
    """There it could end the scheduler, which is this process."""
    own = []
    monkeypatch.setattr(xgboost.tracker.RabitTracker, "start", lambda self: own.append(self))
    fit(ArraySource(biased_pairs(1000, 28), (500,)), params=QUICK, client=client)
    assert not own
    assert not boosted._TRACKERS  # and its process is gone


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_is_lost_in_training(blow):
    """A killed worker, and one that hangs: training goes on with those that answer."""
    source = ArraySource(biased_pairs(6000, 27), (1000, 2000, 4000))
    params = {"n_rounds": 300, "timeout_s": 8}
    struck: list[float] = []
    # A hanging worker is known to the scheduler until it misses its heartbeats.
    with dask.config.set({"distributed.scheduler.worker-ttl": "10s"}), start(2, "2GiB") as cluster:
        victim = max(cluster.client.run(os.getpid).items())[1]

        def strike() -> None:
            struck.append(time.monotonic())
            os.kill(victim, blow)

        def after_the_first_label(step: str, done: int, total: int) -> None:
            if done == 1 and not struck:
                timer = threading.Timer(0.3, strike)
                timer.daemon = True
                timer.start()

        try:
            out = fit(source, params=params, client=cluster.client, progress=after_the_first_label)
            finished = time.monotonic()
        finally:
            if struck and blow == signal.SIGSTOP:
                with contextlib.suppress(ProcessLookupError):  # its nanny was faster
                    os.kill(victim, signal.SIGKILL)
    assert struck
    assert struck[0] < finished
    x = source.batch.features
    here = fit(source, params={"n_rounds": 300})
    assert (np.abs(out.predict(x) - here.predict(x)) / NOISE).max() < 1e-4


# --- early stopping ------------------------------------------------------------------------------


def trees(fitted):
    assert isinstance(fitted, BoostedCorrection)
    return [booster.num_boosted_rounds() for booster in fitted.boosters]


def test_a_fold_kept_aside_counts_the_trees(cluster):
    batch = biased_pairs(2000, 1)
    source = ArraySource(batch, (700,))
    params = {"n_rounds": 300, "learning_rate": 0.2, "stop_rounds": 10}
    fitted = models.fit("boosted", source, train_folds=[1, 2, 3, 4], params=params)
    counts = trees(fitted)
    assert all(1 < n < 200 for n in counts)
    long = models.fit(
        "boosted", source, train_folds=[1, 2, 3, 4], params={**params, "stop_rounds": 0}
    )
    assert trees(long) == [300, 300, 300]
    held = batch.fold == 0
    left = {
        name: np.abs(batch.differences[held] - fit.predict(batch.features[held])).mean(axis=0)
        for name, fit in (("stopped", fitted), ("long", long))
    }
    assert (left["stopped"] < left["long"]).all()
    # Held-out pairs do not count trees.
    batch.differences[held] += 1e4
    again = models.fit("boosted", source, train_folds=[1, 2, 3, 4], params=params)
    assert again.files() == fitted.files()
    there = models.fit(
        "boosted", source, train_folds=[1, 2, 3, 4], params=params, client=cluster.client
    )
    assert trees(there) == counts
    with pytest.raises(ModelError, match="stop_rounds needs two training folds"):
        models.fit("boosted", source, train_folds=[1], params=params)
