"""Boosted trees trained by workers, some of which go."""

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

import dask
import distributed  # noqa: F401  # its settings must be there before one is changed
import numpy as np
import pytest
import xgboost

from sos_dask import corrections as models
from sos_dask.corrections import Batch, boosted_cluster
from sos_dask.errors import CatalogError, ClusterError
from sos_dask.problem import DEFAULT
from sos_dask.run.cluster import start
from tests.corrections.pairs import NOISE, ArraySource, biased_pairs
from tests.corrections.test_boosted import QUICK, fit


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
    shares = boosted_cluster._shares(np.array(n_rows), n_workers)
    assert len(shares) <= n_workers
    covered = [index for first, stop in shares for index in range(first, stop)]
    assert {i for i, n in enumerate(n_rows) if n} <= set(covered)
    assert covered == sorted(set(covered))
    assert all(sum(n_rows[first:stop]) > 0 for first, stop in shares)
    assert [sum(n_rows[a:b]) for a, b in shares] == [sum(n_rows[a:b]) for a, b in expected]


def test_workers_train_the_same_model(client):
    source = ArraySource(biased_pairs(9000, 17, 0.03), (1000, 1000, 4000, 7000))
    there = fit(source, params=QUICK, client=client)
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

    problem = DEFAULT
    n_batches = 3

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


# --- losses ------------------------------------------------------------------------------------


def test_after_three_losses_there_is_an_error(client, monkeypatch):
    tries = []

    def lose(*_):
        tries.append(1)
        raise xgboost.core.XGBoostError("Ring allgather failed\nStack trace: many lines")

    monkeypatch.setattr(boosted_cluster, "_train_label", lose)
    with pytest.raises(ClusterError, match=r"lost 3 times, .* Ring allgather failed\n") as caught:
        fit(ArraySource(biased_pairs(500, 25)), client=client)
    assert len(tries) == 3
    assert "Stack trace" not in caught.value.message
    assert "timeout_s" in caught.value.hint


def test_labels_that_are_done_are_not_trained_again(client, monkeypatch):
    trained = []
    real = boosted_cluster._train_label

    def lose_once(*arguments):
        trained.append(arguments[-1])
        if trained == [0, 1]:
            raise RuntimeError("Missing required workers: {'tcp://gone'}")
        return real(*arguments)

    monkeypatch.setattr(boosted_cluster, "_train_label", lose_once)
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
    assert not boosted_cluster._TRACKERS  # and its process is gone


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_is_lost_in_training(blow, monkeypatch):
    """A killed worker, and one that hangs: training goes on with those that answer."""
    source = ArraySource(biased_pairs(6000, 27), (1000, 2000, 4000))
    params = {"n_rounds": 300, "timeout_s": 8}
    struck: list[float] = []
    real = boosted_cluster._train_label
    # A hanging worker is known to the scheduler until it misses its heartbeats.
    with dask.config.set({"distributed.scheduler.worker-ttl": "10s"}), start(2, "2GiB") as cluster:
        victim = max(cluster.client.run(os.getpid).items())[1]

        def strike() -> None:
            struck.append(time.monotonic())
            os.kill(victim, blow)

        def after_the_first_label(*arguments: Any) -> Any:
            out = real(*arguments)
            if not struck:
                timer = threading.Timer(0.3, strike)
                timer.daemon = True
                timer.start()
            return out

        monkeypatch.setattr(boosted_cluster, "_train_label", after_the_first_label)
        try:
            out = fit(source, params=params, client=cluster.client)
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
