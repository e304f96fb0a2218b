"""Boosted trees trained data-parallel over a cluster, also where it loses workers meanwhile.

Each worker is a rank of one collective of XGBoost, as those of `xgboost.dask.train` are, from which
this differs in what that cannot do: the quantised pairs of a rank serve all labels, where
`xgboost.dask` makes them anew in every call; the trees so far are kept on the scheduler, from which
training goes on after a loss, with equal bytes where as many workers are there again; and its
import of pandas and more takes each worker most of a second.

The tracker, where ranks meet, has a process of its own: it ends its whole process (std::terminate
on "send system error:Broken pipe", XGBoost 3.2) when a rank goes while they do.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from sos_dask.corrections.base import Rows
from sos_dask.errors import ClusterError, ModelError, SosError
from sos_dask.run.machine import import_xgboost
from sos_dask.run.workers import TIMEOUT_S, Lost, Workers, call, pack, release

if TYPE_CHECKING:
    from sos_dask.corrections.boosted import Job

logger = logging.getLogger(__name__)

TRIES = 3  # without a further checkpoint
CHECKPOINT_S = 10.0
_Kept = tuple[int, list[bytes]]  # trees so far, and what they are of each label


def train(job: Job) -> list[bytes]:
    """Train the trees of each label, as UBJSON; after a loss of workers, by those that are left.

    `ClusterError` where they are lost again and again.
    """
    from distributed import CancelledError, KilledWorker, Variable

    losses = (
        CancelledError,
        asyncio.CancelledError,
        KilledWorker,
        RuntimeError,
        ValueError,  # XGBoostError
        Lost,
        OSError,  # closed connections, `ConnectionError` of this module, timeouts
    )
    client, settings = job.training.client, job.settings
    there = Workers.of(client)
    checkpoint = Variable(f"boosted-{uuid.uuid4().hex}", client)
    kept: _Kept = (0, [])
    n_trees, wanted, failed = settings.n_rounds * len(job.summary.center), 1, 0
    with _alone(client), contextlib.ExitStack() as stack:
        checkpoint.set(kept)
        stack.callback(_quietly, checkpoint.delete)
        while True:
            try:
                # Time for a nanny to bring a dead worker back.
                workers = list(there.wait_for(wanted))
                wanted = len(workers)
                if settings.device == "cuda":
                    asked = {worker: there.submit(worker, find_gpu) for worker in workers}
                    _wait(there, asked)
                    gpus = [there.fetch(future, [worker]) for worker, future in asked.items()]
                    workers = one_each(workers, gpus)
                return _train_on(job, workers, checkpoint.name, kept)
            except SosError:
                raise
            except losses as error:
                # XGBoost adds a stack trace of its own.
                text = " ".join(str(error).split("Stack trace")[0].split())
                failure = f"{type(error).__name__}: {text}"
            with contextlib.suppress(*losses):
                before, kept = kept, tuple(checkpoint.get(timeout=10))
                failed = failed if kept[0] == before[0] else 0
            failed += 1
            if failed == TRIES:
                raise ClusterError(
                    f"training was lost {TRIES} times, at last by {failure}",
                    "Look at the workers' logs: most often they run out of memory or their node "
                    "goes away. Where workers only wait long for each other, raise "
                    "boosted.timeout_s.",
                )
            logger.warning(
                "boosted: try %d of %d failed: %s. Training goes on from tree %d of %d.",
                *(failed, TRIES, failure, kept[0], n_trees),
            )


def _quietly(function: Callable[[], Any]) -> None:
    """Call what needs a scheduler that may be gone."""
    with contextlib.suppress(Exception):
        function()


@contextlib.contextmanager
def _alone(client: Any) -> Iterator[None]:
    """Wait until no other fit trains on the cluster: ranks of two would wait for each other."""
    from distributed import Semaphore

    # Released by the scheduler itself where the process that has it is gone.
    place = {"scheduler_rpc": client.scheduler, "loop": client.loop}
    lock = Semaphore(1, "sos-dask-boosted", **place)
    if not lock.acquire(timeout=10):
        logger.warning("boosted: waits for another training on this cluster, a day at most")
        if not lock.acquire(timeout="1d"):
            raise ClusterError("another training has had the cluster for a day", "Is it stuck?")
    try:
        yield
    finally:
        _quietly(lock.release)


def _train_on(job: Job, workers: Sequence[str], checkpoint: str, kept: _Kept) -> list[bytes]:
    """Train in one rank a worker, from a checkpoint."""
    there, timeout_s = Workers.of(job.training.client), job.settings.timeout_s
    shares = dict(zip(workers, _shares(job.summary.n_rows, len(workers)), strict=False))
    first, n_ranks = workers[0], len(shares)
    meeting: Any = {}
    if n_ranks > 1:
        # Workers meet only when the slowest has imported all it needs.
        meeting = there.submit(first, _start_tracker, n_ranks, max(timeout_s, 60))
    block, run_rank = pack(job.block), pack(_run_rank, job)
    tasks = {worker: there.submit(worker, call, block, *share) for worker, share in shares.items()}
    blocks = dict(tasks)
    try:
        _wait(there, tasks)
        for rank, worker in enumerate(tasks):
            given = rank, meeting, checkpoint, CHECKPOINT_S, kept[1]
            tasks[worker] = there.submit(worker, call, run_rank, blocks[worker], *given)
        _wait(there, tasks)
        boosters: list[bytes] = there.fetch(tasks[first], [first])
        return boosters
    except (Exception, asyncio.CancelledError):
        # Ranks that are left notice it by themselves, at the latest when they have waited so long.
        end = time.monotonic() + max(timeout_s, TIMEOUT_S) + 10
        while time.monotonic() < end:
            if all(tasks[worker].done() for worker in set(tasks).intersection(there.there())):
                break
            time.sleep(0.5)
        raise
    finally:
        release([*blocks.values(), *tasks.values(), *([meeting] if meeting else [])])


def _wait(workers: Workers, tasks: Mapping[str, Any]) -> None:
    """Wait for the tasks of workers; `ConnectionError` where one is gone or falls silent."""
    from distributed import wait

    while not all(task.status == "finished" for task in tasks.values()):
        with contextlib.suppress(TimeoutError):
            wait(list(tasks.values()), timeout=1)
        for worker, task in tasks.items():
            if task.status in ("error", "cancelled", "lost"):
                workers.fetch(task, [worker])
        if gone := set(tasks).difference(workers.there()):
            raise ConnectionError(f"worker {' '.join(sorted(gone))} is gone")


def _shares(n_rows: Sequence[int] | Any, n_workers: int) -> list[tuple[int, int]]:
    """Runs of batches with about equally many rows, none empty, at most one a worker."""
    ends = np.cumsum(n_rows)
    targets = ends[-1] * np.arange(1, n_workers + 1) / n_workers
    # The batch whose middle a target passes goes to the run before it.
    stops = np.searchsorted(ends - np.asarray(n_rows) / 2, targets, side="right")
    stops[-1] = len(ends)
    runs = zip([0, *stops[:-1].tolist()], stops.tolist(), strict=True)
    return [(a, b) for a, b in runs if np.sum(n_rows[a:b]) > 0]


# --- in the workers ----------------------------------------------------------------------------


def _run_rank(
    job: Job,
    rows: Rows,
    rank: int,
    meeting: Mapping[str, Any],
    checkpoint: str,
    every_s: float,
    done: Sequence[bytes],
) -> list[bytes]:
    """Train as one rank, without a tracker the only one; the first keeps checkpoints."""
    from distributed import Variable, get_client, get_worker

    worker = get_worker()
    task, due = worker.state.tasks[worker.get_current_task()], time.monotonic() + every_s

    def after_tree(n_trees: int, trained: list[bytes], booster: Any) -> None:
        nonlocal due
        if time.monotonic() < due:
            return
        if task.state != "executing":
            raise RuntimeError("nobody waits for this training any more")
        if rank == 0:
            so_far = [*trained, bytes(booster.save_raw("ubj"))]
            Variable(checkpoint, get_client()).set((n_trees, so_far))
        due = time.monotonic() + every_s

    settings = {"dmlc_task_id": f"{rank:06d}", "dmlc_timeout": job.settings.timeout_s}
    together: Any = contextlib.nullcontext()
    if meeting:
        together = import_xgboost().collective.CommunicatorContext(**meeting, **settings)
    try:
        with together:
            boosters = job.boost(rows, job.settings.nthread, done, after_tree)
    finally:
        if rank == 0:
            _stop_tracker(sys.exc_info()[0] is None)
    return boosters if rank == 0 else []


_TRACKER = """
import json, os, sys, threading
sys.modules["sklearn"] = None  # a second of its import
from xgboost.tracker import RabitTracker

threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
n_ranks, host, timeout = json.loads(sys.argv[1])
tracker = RabitTracker(n_ranks, host, sortby="task", timeout=timeout)
tracker.start()
print(json.dumps(tracker.worker_args()), flush=True)
tracker.wait_for()
"""
_trackers: list[subprocess.Popen[str]] = []  # of this worker, whose end they notice


def _start_tracker(n_ranks: int, timeout_s: int) -> dict[str, Any]:
    """Start a tracker on this machine; what ranks need to know of it."""
    from distributed import get_worker

    _stop_tracker()
    given = json.dumps([n_ranks, urlsplit(get_worker().address).hostname, timeout_s])
    command, pipe = [sys.executable, "-c", _TRACKER, given], subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    )
    _trackers.append(process)
    assert process.stdout
    answer: dict[str, Any] | None = json.loads(process.stdout.readline() or "null")
    if answer is None:
        raise OSError("the tracker of XGBoost did not start")
    return answer


def _stop_tracker(by_itself: bool = False) -> None:
    """End the tracker of this worker, or let it end when the last rank has left."""
    while _trackers:
        process = _trackers.pop()
        if by_itself:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
        process.kill()
        process.communicate()


def find_gpu() -> tuple[str, ...]:
    """Find the GPU of this process by training a tree on it; equal where processes share one.

    `ModelError` where XGBoost would quietly train on the CPU.
    """
    xgboost = import_xgboost()
    if not xgboost.build_info().get("USE_CUDA", False):
        what = f"device = 'cuda': XGBoost {xgboost.__version__} was built without CUDA"
        raise ModelError(what, "Install 'xgboost' (not 'xgboost-cpu'), or set device = 'cpu'.")
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
        what = f"device = 'cuda': no usable GPU here (XGBoost answers '{used}')"
        raise ModelError(what, "Run where 'nvidia-smi' lists a GPU, or set device = 'cpu'.")
    # A batch system may number the GPUs that each process may see 0.
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    uuids = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        uuids = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=20)
    return socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES", ""), uuids


def one_each(workers: Sequence[str], gpus: Sequence[tuple[str, ...]]) -> list[str]:
    """Choose the first of all workers that share a GPU: NCCL takes one process a GPU."""
    return [worker for n, worker in enumerate(workers) if gpus[n] not in gpus[:n]]
