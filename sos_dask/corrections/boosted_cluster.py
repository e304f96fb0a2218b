"""Boosted trees trained data-parallel over a cluster, also where it loses workers meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from sos_dask.corrections import Progress, boosted_fit, release
from sos_dask.corrections.boosted_fit import Job, load_block, of_label
from sos_dask.corrections.cuda import find_gpu, one_each
from sos_dask.corrections.tracker import stop_tracker, tracker_apart
from sos_dask.errors import ClusterError, SosError
from sos_dask.problem import FEATURES
from sos_dask.schema import LABELS

logger = logging.getLogger(__name__)

TRIES = 3


def count_rounds(job: Job, client: Any) -> tuple[int, ...]:
    """`boosted_fit.count_rounds` by one worker.

    Raises
    ------
    ClusterError
        It killed its worker again and again.
    """
    from distributed import KilledWorker

    try:
        rounds: tuple[int, ...] = client.submit(boosted_fit.count_rounds, job, pure=False).result()
    except KilledWorker as error:
        raise ClusterError(
            f"stop_rounds: the fit that counts trees killed its worker again and again ({error})",
            "Most often it ran out of memory: it needs all pairs. Give workers more, or set "
            "stop_rounds = 0.",
        ) from error
    return rounds


def train(job: Job, client: Any, progress: Progress) -> tuple[Any, ...]:
    """``xgboost.Booster`` of each label; after a loss of workers, by those that are left.

    Raises
    ------
    ClusterError
        Workers were lost again and again.
    ModelError
        A worker has no GPU for ``device = "cuda"``.
    """
    import xgboost
    from distributed import CancelledError, KilledWorker
    from distributed.comm import CommClosedError

    losses = (
        xgboost.core.XGBoostError,
        CancelledError,
        asyncio.CancelledError,
        CommClosedError,
        KilledWorker,
        _LostError,
        AssertionError,  # xgboost.dask asserts that all parts are there
        RuntimeError,  # xgboost.dask: "Missing required workers"
        ValueError,  # xgboost.dask: "Invalid worker address"
        OSError,
        TimeoutError,
    )
    boosters: dict[int, Any] = {}
    wanted, tracker = 1, uuid.uuid4().hex
    for attempt in range(1, TRIES + 1):
        try:
            workers = _workers(client, wanted, job.params["timeout_s"])
            wanted = len(workers)
            if job.params["device"] == "cuda":
                asked = [client.submit(find_gpu, pure=False, **_on(w)) for w in workers]
                _collect(client, asked, workers, job.params["timeout_s"])
                workers = one_each(dict(zip(workers, client.gather(asked), strict=True)))
            _train_labels(job, client, workers, boosters, tracker, progress)
            return tuple(boosters[number] for number in range(len(LABELS)))
        except SosError:
            raise
        except losses as error:
            # XGBoost adds a stack trace of its own.
            text = " ".join(str(error).split("Stack trace")[0].split())
            failure = f"{type(error).__name__}: {text}"
            logger.warning("boosted: try %d of %d failed: %s", attempt, TRIES, failure)
        finally:
            with contextlib.suppress(Exception):
                client.run_on_scheduler(stop_tracker, tracker)
    raise ClusterError(
        f"training was lost {TRIES} times, at last by {failure}",
        "Look at the workers' logs: most often they run out of memory or their node goes away. "
        "Where workers only wait long for each other, raise boosted.timeout_s.",
    )


class _LostError(Exception):
    """A worker is gone or does not answer."""


def _on(worker: str) -> dict[str, Any]:
    # Should the worker go, the task must fail or move: one that waits for it would wait for ever.
    return {"workers": [worker], "allow_other_workers": True}


def _heartbeats(client: Any) -> dict[str, float]:
    """Addresses of the workers, by name, with the time of their last heartbeat."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    by_name = sorted(workers, key=lambda address: (str(workers[address]["name"]), address))
    return {address: float(workers[address]["last_seen"]) for address in by_name}


def _workers(client: Any, wanted: int, timeout_s: float) -> list[str]:
    """Addresses of workers that answer, by name. A frozen one is still known to the scheduler."""
    from distributed import wait

    # Time for a nanny to bring a dead worker back.
    with contextlib.suppress(TimeoutError):
        client.wait_for_workers(wanted, timeout=20)
    asked = {
        worker: client.submit(_ping, worker, pure=False, workers=[worker])
        for worker in _heartbeats(client)
    }
    if asked:
        with contextlib.suppress(TimeoutError):
            wait(list(asked.values()), timeout=min(30.0, timeout_s))
    alive = [worker for worker, future in asked.items() if future.status == "finished"]
    release(list(asked.values()))
    if not alive:
        raise _LostError("no worker answers")
    return alive


def _ping(worker: str) -> str:
    return worker


def _collect(client: Any, futures: Sequence[Any], workers: Sequence[str], timeout_s: float) -> None:
    """Wait for tasks as long as the workers that were asked are there; raise what they raised."""
    from distributed import wait

    # The clocks of scheduler and client may differ: only whether a heartbeat is new counts.
    heard = {worker: (0.0, time.monotonic()) for worker in workers}
    patience_s = max(timeout_s, 20.0)
    while True:
        with contextlib.suppress(TimeoutError):
            wait(futures, timeout=2)
        for future in futures:
            if future.status in ("error", "cancelled", "lost"):
                future.result(timeout=10)
                raise _LostError(f"a task is {future.status}")
        if all(future.status == "finished" for future in futures):
            return
        now, beats = time.monotonic(), _heartbeats(client)
        for worker, (beat, since) in heard.items():
            if worker not in beats:
                raise _LostError(f"worker {worker} is gone")
            if beats[worker] != beat:
                heard[worker] = (beats[worker], now)
            elif now - since > patience_s:
                raise _LostError(f"worker {worker} has been silent for {patience_s:g} s")


def _train_labels(
    job: Job,
    client: Any,
    workers: Sequence[str],
    boosters: dict[int, Any],
    tracker: str,
    progress: Progress,
) -> None:
    """Train the labels that have no booster yet."""
    cuts = _shares(job.summary.n_rows, len(workers))
    used = list(workers[: len(cuts)])
    blocks = [
        client.submit(load_block, job, first, stop, pure=False, **_on(worker))
        for worker, (first, stop) in zip(used, cuts, strict=True)
    ]
    try:
        _collect(client, blocks, used, job.params["timeout_s"])
        for number in range(len(LABELS)):
            if number not in boosters:
                boosters[number] = _train_label(job, client, used, blocks, tracker, number)
            progress("boosted", number + 1, len(LABELS))
    finally:
        release(blocks)


def _shares(n_rows: Sequence[int] | Any, n_workers: int) -> list[tuple[int, int]]:
    """Runs of batches with about equally many rows, none empty, at most one a worker."""
    ends = np.cumsum(n_rows)
    targets = ends[-1] * np.arange(1, n_workers + 1) / n_workers
    # The batch whose middle a target passes goes to the run before it.
    stops = np.searchsorted(ends - np.asarray(n_rows) / 2, targets, side="right")
    stops[-1] = len(ends)
    runs = zip([0, *stops[:-1].tolist()], stops.tolist(), strict=True)
    return [(a, b) for a, b in runs if np.sum(n_rows[a:b]) > 0]


def _train_label(
    job: Job,
    client: Any,
    workers: Sequence[str],
    blocks: Sequence[Any],
    tracker: str,
    number: int,
) -> Any:
    import dask.array as da
    from xgboost import dask as xgboost_dask
    from xgboost.collective import Config

    parts = [
        client.submit(of_label, block, number, pure=False, **_on(worker))
        for block, worker in zip(blocks, workers, strict=True)
    ]
    columns = [
        [client.submit(_item, part, item, pure=False, **_on(w)) for item in range(3)]
        for part, w in zip(parts, workers, strict=True)
    ]
    sizes = [
        client.submit(len, column[1], pure=False, **_on(w))
        for column, w in zip(columns, workers, strict=True)
    ]
    futures = [future for column in columns for future in column]
    try:
        timeout_s = job.params["timeout_s"]
        _collect(client, [*futures, *sizes], workers, timeout_s)
        n = client.gather(sizes)
        x, y, weight = (
            da.concatenate(
                [
                    da.from_delayed(column[item], shape=(rows, *tail), dtype=np.float32)
                    for column, rows in zip(columns, n, strict=True)
                ]
            )
            for item, tail in ((0, (len(FEATURES),)), (1, ()), (2, ()))
        )
        matrix = xgboost_dask.DaskQuantileDMatrix(
            client,
            x,
            y,
            weight=weight,
            feature_names=list(FEATURES),
            max_bin=job.params["max_bin"],
        )
        with tracker_apart(tracker):
            result = xgboost_dask.train(
                client,
                job.booster_params(),
                matrix,
                num_boost_round=job.rounds[number],
                # Workers meet only when the slowest has imported all it needs.
                coll_cfg=Config(retry=3, timeout=timeout_s, tracker_timeout=max(timeout_s, 60)),
            )
        return result["booster"]
    finally:
        release([*futures, *sizes, *parts])


def _item(values: tuple[Any, ...], index: int) -> Any:
    return values[index]
