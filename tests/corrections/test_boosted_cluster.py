"""Boosted trees trained by workers, some of which go."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import xgboost
from distributed import Variable, wait

from sos_dask import corrections as models
from sos_dask.corrections import Batch, Training, boosted, boosted_cluster
from sos_dask.corrections.base import summarise
from sos_dask.errors import CatalogError, ClusterError
from sos_dask.problem import DEFAULT
from sos_dask.run.cluster import start
from sos_dask.run.workers import Workers
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


def test_two_trainings_at_once_wait_for_each_other(client):
    """Else ranks of one and of the other wait in the only thread of a worker."""
    source = ArraySource(biased_pairs(4000, 24), (1000, 2000))
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: fit(source, params=QUICK, client=client), range(3)))
    assert made[0].files() == made[1].files() == made[2].files()


# --- losses ------------------------------------------------------------------------------------


class Losses:
    """Lose training again and again, after some trees each time."""

    def __init__(self, trees: list[int]) -> None:
        self.trees = trees
        self.tries: list[int] = []

    def __call__(self, job: Any, workers: Any, checkpoint: str, kept: Any) -> list[bytes]:
        self.tries.append(kept[0])
        if self.trees:
            reached = max(self.trees.pop(0), kept[0])
            Variable(checkpoint, job.training.client).set((reached, []))
            raise xgboost.core.XGBoostError("Ring allgather failed\nStack trace: many lines")
        return REAL(job, workers, checkpoint, (0, []))


REAL = boosted_cluster._train_on


def test_after_three_losses_without_progress_there_is_an_error(client, monkeypatch, caplog):
    lost = Losses([7, 7, 20, 20, 20, 20])
    monkeypatch.setattr(boosted_cluster, "_train_on", lost)
    with pytest.raises(ClusterError, match=r"lost 3 times, .* Ring allgather failed\n") as caught:
        fit(ArraySource(biased_pairs(500, 25)), params=QUICK, client=client)
    assert lost.tries == [0, 7, 7, 20, 20]
    assert "Stack trace" not in caught.value.message
    assert "timeout_s" in caught.value.hint
    assert "try 1 of 3 failed: XGBoostError: Ring allgather failed. Training" in caplog.text
    assert f"from tree 20 of {3 * QUICK['n_rounds']}" in caplog.text


def test_what_is_kept_on_the_scheduler_goes_when_training_ends(client, monkeypatch):
    monkeypatch.setattr(boosted_cluster, "_train_on", Losses([5]))
    fit(ArraySource(biased_pairs(500, 26)), params=QUICK, client=client)
    assert client.run_on_scheduler(kept_trees) == 0


def trackers_left() -> int:
    return len(boosted_cluster._trackers) + len(psutil.Process().children())


def test_the_tracker_is_a_process_of_its_own_and_ends(client):
    """In another one it could end that."""
    before = client.run(trackers_left)
    fit(ArraySource(biased_pairs(1000, 28), (500,)), params=QUICK, client=client)
    assert client.run(trackers_left) == before


def test_ranks_stop_when_nobody_waits_any_more(client):
    """As after a driver was killed."""
    source = ArraySource(biased_pairs(3000, 29))
    training, settings = Training(source), boosted.Settings(n_rounds=20_000)
    summary = summarise(training, "boosted", settings, 50)
    job = boosted.Job(training, settings, summary, boosted._bin_edges(training, summary.info, 256))
    rank = client.submit(
        boosted_cluster._run_rank, job, job.block(0, 1), 1, {}, "", 0.1, (), pure=False
    )
    while not any(client.processing().values()):
        time.sleep(0.05)
    time.sleep(0.5)
    assert not rank.done()
    workers = list(client.run(os.getpid))
    rank.release()
    began = time.monotonic()
    asked = [client.submit(os.getpid, workers=[worker], pure=False) for worker in workers]
    wait(asked, timeout=60)
    assert time.monotonic() - began < 20, "20,000 trees take longer"


def kept_trees(dask_scheduler: Any) -> int:
    """Trees that a training has kept on the scheduler."""
    kept = dask_scheduler.extensions["variables"].variables
    return max((one["value"][0] for name, one in kept.items() if "boosted-" in name), default=0)


@pytest.fixture(scope="module", params=["of its own", "started apart"])
def scene(request, tmp_path_factory):
    """Client of a cluster of two workers, pairs, and the files of a model of these."""
    source = ArraySource(biased_pairs(6000, 27), (1000, 2000, 4000))
    with contextlib.ExitStack() as stack:
        if request.param == "of its own":
            cluster = stack.enter_context(start(2, "2GiB"))
        else:
            file = tmp_path_factory.mktemp("dask") / "scheduler.json"
            stack.enter_context(apart(file))
            cluster = stack.enter_context(start(scheduler=str(file)))
            cluster.client.wait_for_workers(2, timeout=60)
        yield cluster.client, source, fit(source, params=LONG, client=cluster.client).files()


LONG = {"n_rounds": 200, "timeout_s": 60}


@contextlib.contextmanager
def apart(file: Path) -> Iterator[None]:
    """A scheduler and two workers, as a batch system starts them."""
    place = ["--scheduler-file", str(file)]
    commands = [
        ["scheduler", *place, "--port", "0", "--no-dashboard"],
        ["worker", *place, "--nworkers", "2", "--nthreads", "1", "--no-dashboard"],
    ]
    code = "from distributed.cli import dask_{0}; dask_{0}.main()"
    with contextlib.ExitStack() as stack:
        for name, *options in commands:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", code.format(name), *options],
                    stderr=subprocess.DEVNULL,
                    cwd=Path(__file__).parents[2],
                )
            )
            stack.callback(process.terminate)
            while not file.exists():
                time.sleep(0.1)
        yield


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize(("blow", "rank"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_a_worker_is_lost_in_training(scene, blow, rank, monkeypatch, caplog):
    """A killed worker, which has the tracker, and one that hangs: the bytes are the same."""
    client, source, expected = scene
    monkeypatch.setattr(boosted_cluster, "CHECKPOINT_S", 0.2)
    if blow == signal.SIGSTOP:
        monkeypatch.setattr(Workers.of(client), "timeout", 8)
    victim = client.run(os.getpid)[list(Workers.of(client).wait_for(2))[rank]]

    def strike() -> None:
        while not client.run_on_scheduler(kept_trees):
            time.sleep(0.05)
        os.kill(victim, blow)

    with ThreadPoolExecutor(1) as pool:
        struck = pool.submit(strike)
        made = fit(source, params=LONG, client=client)
        assert struck.done()
        struck.result()
    told = re.search(r"goes on from tree (\d+) of 600", caplog.text)
    assert told and int(told[1]) > 0
    assert ("silent for 8 s and is given up" in caplog.text) == (blow == signal.SIGSTOP)
    assert not psutil.pid_exists(victim)
    assert made.files() == expected
