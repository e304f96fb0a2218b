"""Boosted trees trained data-parallel over a cluster, also where it loses workers meanwhile.

The tracker, where the workers of a training meet, has a process of its own: it ends its whole
process (std::terminate on "send system error:Broken pipe", XGBoost 3.2) when a worker goes while
they do, and xgboost.dask starts it in the process of the scheduler, which is this one for a cluster
on one machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sos_dask.corrections.base import Rows, release
from sos_dask.errors import ClusterError, ModelError, SosError

if TYPE_CHECKING:
    from sos_dask.corrections.boosted import Job

logger = logging.getLogger(__name__)

TRIES = 3
PATIENCE_S = 30


def train(job: Job) -> tuple[Any, ...]:
    """Train an ``xgboost.Booster`` of each label; after a loss of workers, by those that are left.

    `ClusterError` where they are lost again and again.
    """
    from distributed import CancelledError, KilledWorker

    losses = (
        CancelledError,
        asyncio.CancelledError,
        KilledWorker,
        AssertionError,  # xgboost.dask asserts that all parts are there
        RuntimeError,  # xgboost.dask: "Missing required workers"
        ValueError,  # xgboost.dask: "Invalid worker address"; XGBoostError
        OSError,  # closed connections, `ConnectionError` of this module, timeouts
    )
    client = job.training.client
    boosters: dict[int, Any] = {}
    wanted, tracker = 1, uuid.uuid4().hex
    for attempt in range(1, TRIES + 1):
        try:
            workers = _workers(client, wanted, job.settings.timeout_s)
            wanted = len(workers)
            if job.settings.device == "cuda":
                asked = [client.submit(find_gpu, pure=False, **_on(w)) for w in workers]
                workers = one_each(workers, client.gather(asked))
            _train_labels(job, workers, boosters, tracker)
            return tuple(boosters[number] for number in sorted(boosters))
        except SosError:
            raise
        except losses as error:
            # XGBoost adds a stack trace of its own.
            text = " ".join(str(error).split("Stack trace")[0].split())
            failure = f"{type(error).__name__}: {text}"
            logger.warning("boosted: try %d of %d failed: %s", attempt, TRIES, failure)
        finally:
            with contextlib.suppress(Exception):
                client.run_on_scheduler(_stop_tracker, tracker)
    raise ClusterError(
        f"training was lost {TRIES} times, at last by {failure}",
        "Look at the workers' logs: most often they run out of memory or their node goes away. "
        "Where workers only wait long for each other, raise boosted.timeout_s.",
    )


def _on(worker: str) -> dict[str, Any]:
    # Should the worker go, the task must fail or move: one that waits for it would wait for ever.
    return {"workers": [worker], "allow_other_workers": True}


def _workers(client: Any, wanted: int, timeout_s: float) -> list[str]:
    """Addresses of workers that answer, by name. A frozen one is still known to the scheduler."""
    from distributed import wait

    # Time for a nanny to bring a dead worker back.
    with contextlib.suppress(TimeoutError):
        client.wait_for_workers(wanted, timeout=20)
    known = client.scheduler_info(n_workers=-1)["workers"]
    by_name = sorted(known, key=lambda address: (str(known[address]["name"]), address))
    asked = [client.submit(str, worker, pure=False, workers=[worker]) for worker in by_name]
    if asked:
        with contextlib.suppress(TimeoutError):
            wait(asked, timeout=min(30.0, timeout_s))
    alive = [w for w, future in zip(by_name, asked, strict=True) if future.status == "finished"]
    release(asked)
    if not alive:
        raise ConnectionError("no worker answers")
    return alive


def _train_labels(job: Job, workers: Sequence[str], boosters: dict[int, Any], tracker: str) -> None:
    """Train the labels that have no booster yet."""
    from distributed import wait

    client, cuts = job.training.client, _shares(job.summary.n_rows, len(workers))
    blocks = [
        client.submit(job.block, first, stop, pure=False, **_on(worker))
        for worker, (first, stop) in zip(workers, cuts, strict=False)
    ]
    try:
        # Blocks of a worker that is gone move to others. The scheduler takes minutes to drop one
        # that is silent, by a clock of its own: only whether a heartbeat is new counts here.
        since: dict[tuple[str, float], float] = {}
        while not all(block.done() for block in blocks):
            with contextlib.suppress(TimeoutError):
                wait(blocks, timeout=2)
            known, now = client.scheduler_info(n_workers=-1)["workers"], time.monotonic()
            if not known:
                raise ConnectionError("no worker is left")
            for worker in set(workers) & set(known):
                if now - since.setdefault((worker, known[worker]["last_seen"]), now) > PATIENCE_S:
                    raise ConnectionError(f"worker {worker} has been silent for {PATIENCE_S} s")
        for block in blocks:
            if block.status == "error":
                block.result()
        for number in range(len(job.summary.center)):
            if number not in boosters:
                boosters[number] = _train_label(job, workers, blocks, tracker, number)
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
    job: Job, workers: Sequence[str], blocks: Sequence[Any], tracker: str, number: int
) -> Any:
    import dask.array as da
    from xgboost import dask as xgboost_dask
    from xgboost.collective import Config

    client, timeout_s = job.training.client, job.settings.timeout_s
    original = xgboost_dask._start_tracker
    features = list(job.training.problem.features)
    columns = [
        [
            client.submit(_column, block, number, item, pure=False, **_on(worker))
            for block, worker in zip(blocks, workers, strict=False)
        ]
        for item in range(3)
    ]
    try:
        x, y, weight = (
            da.concatenate(
                [da.from_delayed(part, (np.nan, *tail), np.float32) for part in parts],
                allow_unknown_chunksizes=True,
            )
            for parts, tail in zip(columns, [(len(features),), (), ()], strict=True)
        )
        matrix = xgboost_dask.DaskQuantileDMatrix(
            client, x, y, weight=weight, feature_names=features, max_bin=job.settings.max_bin
        )
        xgboost_dask._start_tracker = partial(_start_tracker, tracker)
        result = xgboost_dask.train(
            client,
            job.booster_params,
            matrix,
            num_boost_round=job.settings.n_rounds,
            # Workers meet only when the slowest has imported all it needs.
            coll_cfg=Config(retry=3, timeout=timeout_s, tracker_timeout=max(timeout_s, 60)),
        )
        return result["booster"]
    finally:
        xgboost_dask._start_tracker = original
        release([future for futures in columns for future in futures])


def _column(rows: Rows, label: int, item: int) -> Any:
    return rows.of_label(label)[item]


_TRACKER = """
import json, os, sys
from xgboost.core import XGBoostError
from xgboost.tracker import RabitTracker

trackers = []
for line in sys.stdin:
    n_workers, addresses, timeout = json.loads(line)
    answer = None
    for host, port in addresses:
        try:
            tracker = RabitTracker(n_workers, host, port, sortby="task", timeout=timeout)
            tracker.start()
            answer = tracker.worker_args()
        except (OSError, ValueError, XGBoostError):
            continue
        trackers.append(tracker)
        break
    print(json.dumps(answer), flush=True)
os._exit(0)
"""
_TRACKERS: dict[str, subprocess.Popen[str]] = {}  # of the scheduler's process


async def _start_tracker(
    name: str, n_workers: int, of_scheduler: str | None, of_user: Any, timeout: int | None
) -> dict[str, str | int]:
    """Runs in the scheduler in place of the function of xgboost.dask; the same answer."""
    addresses = [address for address in (of_user, (of_scheduler, 0), (None, 0)) if address]
    request = json.dumps([n_workers, addresses, timeout or 0])
    return await asyncio.to_thread(_ask_tracker, name, request)


def _ask_tracker(name: str, request: str) -> dict[str, str | int]:
    process = _TRACKERS.get(name)
    if process is None or process.poll() is not None:
        _stop_tracker(name)
        command, pipe = [sys.executable, "-c", _TRACKER], subprocess.PIPE
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        _TRACKERS[name] = process
    assert process.stdin and process.stdout
    print(request, file=process.stdin, flush=True)
    answer: dict[str, str | int] | None = json.loads(process.stdout.readline() or "null")
    if answer is None:
        raise OSError("the tracker of XGBoost did not start")
    return answer


def _stop_tracker(name: str) -> None:
    """Runs in the scheduler: end the trackers of one fit."""
    if process := _TRACKERS.pop(name, None):
        process.kill()
        process.communicate()


def find_gpu() -> tuple[str, ...]:
    """Find the GPU of this process by training a tree on it; equal where processes share one.

    `ModelError` where XGBoost would quietly train on the CPU.
    """
    import xgboost

    if not xgboost.build_info().get("USE_CUDA", False):
        raise ModelError(
            f"device = 'cuda': XGBoost {xgboost.__version__} was built without CUDA",
            "Install 'xgboost' (not 'xgboost-cpu'), or set device = 'cpu'.",
        )
    x = np.zeros((4, 1), dtype=np.float32)
    params = {"device": "cuda", "tree_method": "hist", "verbosity": 0}
    with warnings.catch_warnings():
        # It warns and goes on with the CPU; what it used is in its configuration.
        warnings.simplefilter("ignore")
        try:
            booster = xgboost.train(params, xgboost.QuantileDMatrix(x, x[:, 0]), 1)
            used = json.loads(booster.save_config())["learner"]["generic_param"]["device"]
        except xgboost.core.XGBoostError as error:
            used = str(error).strip().splitlines()[0]
    if not str(used).startswith("cuda"):
        raise ModelError(
            f"device = 'cuda': no usable GPU here (XGBoost answers '{used}')",
            "Run where 'nvidia-smi' lists a GPU, or set device = 'cpu'.",
        )
    # A batch system may number the GPUs that each process may see 0.
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    uuids = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        uuids = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=20)
    return socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES", ""), uuids


def one_each(workers: Sequence[str], gpus: Sequence[tuple[str, ...]]) -> list[str]:
    """Choose the first of all workers that share a GPU: NCCL takes one process a GPU."""
    return [worker for n, worker in enumerate(workers) if gpus[n] not in gpus[:n]]
