"""Everything that touches Dask: workers, tasks, progress. One task is one partition.

Tasks are plain functions of picklable arguments. They are idempotent, so a task that dies with its
worker is simply run again elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

import psutil

from sos_dask.errors import ClusterError, ConfigError
from sos_dask.run.machine import (
    KEPT_BYTES,
    WORKER,
    give_back_memory,
    keep_freed_memory,
    memory_bytes,
    n_cores,
)

T = TypeVar("T")
R = TypeVar("R")
_Done: TypeAlias = Generator[tuple[int, R], None, None]
_ANSWER_S = 5
_CONNECT = "20s"
_CLOSING_S = 10.0
_LEAST_BYTES = 64 << 20
_MOST_A_CORE = 64
_LISTENING_S = 3.0  # grace period for a scheduler that is still starting
_USABLE = 0.95  # Dask ends a worker that uses more of its limit
# Dask lets a worker give every freed 64 KiB back to the system. Tasks that go from array to array
# then spend a third of their time on fresh pages, and keep no less memory at their peak. One arena,
# because a task runs in a thread of its own: memory is used again only within an arena.
_WORKER_ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": KEPT_BYTES,
    "MALLOC_MMAP_THRESHOLD_": KEPT_BYTES,
    "MALLOC_ARENA_MAX": 1,
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "OMP_NUM_THREADS": 1,
    "OMP_WAIT_POLICY": "passive",
    "MKL_NUM_THREADS": 1,
    "OPENBLAS_NUM_THREADS": 1,
}
# Of Dask, for workers on this machine.
_DASK = {
    "distributed.logging.distributed": "critical",
    "distributed.worker.daemon": True,
    "distributed.worker.multiprocessing-method": "forkserver",
    # A frozen worker is given up after this; its tasks run elsewhere.
    "distributed.scheduler.worker-ttl": "60s",
    # A paused worker would never go on: what it holds is not Dask's to spill.
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.terminate": _USABLE,
    # Nobody looks at profiles: watching itself took 7 % of a core, now 2 %.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "2s",
    "distributed.admin.large-graph-warning-threshold": "100MB",
    "distributed.nanny.pre-spawn-environ": _WORKER_ENVIRONMENT,
}
# What every worker imports before its first task, beside the stages in use here and what these name
# as PRELOAD.
_PRELOADED = ["sos_dask.run.machine", "distributed", "distributed.nanny", "pyarrow.compute"]
_PRELOADED += ["sos_dask.storage.catalog"]

Report: TypeAlias = Callable[[str, int, int], None]
"""Gets a step and how many of its parts are done, of how many; the command line draws it."""


def silent(step: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(eq=False)
class Cluster:
    """Runs tasks on a Dask cluster, or in this process when there is no client.

    There, ``n_threads`` of them run at once, each of which may use ``thread_bytes`` of memory.
    """

    client: Any = None  # distributed.Client
    n_threads: int = 1
    thread_bytes: int | None = None

    @property
    def _workers(self) -> dict[str, Any]:
        if self.client is None:
            return {}
        # Client.scheduler_info sometimes has none: it is also filled by a clock, without them.
        return dict(self.client.sync(self.client.scheduler.identity, n_workers=-1)["workers"])

    @property
    def n_workers(self) -> int:
        """Workers at present; without a cluster threads."""
        return self.n_threads if self.client is None else max(1, len(self._workers))

    @property
    def is_elsewhere(self) -> bool:
        """Whether a worker is on another machine than this process."""
        own = {one.address for of in psutil.net_if_addrs().values() for one in of}
        return any(worker["host"] not in own for worker in self._workers.values())

    @property
    def memory_limit_bytes(self) -> int | None:
        """Memory limit of the smallest worker; None where there is none."""
        if self.client is None:
            return self.thread_bytes
        limits = [worker["memory_limit"] for worker in self._workers.values()]
        return min(filter(None, limits), default=None)

    def require_memory(self, n_bytes: int, what: str) -> None:
        """Refuse work that a worker cannot hold, before it starts."""
        limit = self.memory_limit_bytes
        if limit is not None and n_bytes > _USABLE * limit:
            raise ClusterError(
                f"{what} needs about {_mib(n_bytes)} in a worker, the limit is {_mib(limit)}, "
                f"of which {_USABLE:.0%} can be used",
                f"Give workers {_mib(n_bytes / _USABLE)} or more (memory_limit; fewer workers have "
                "more each), or ingest with a lower rows_per_partition.",
            )

    @staticmethod
    def require_driver_memory(n_bytes: int, what: str) -> None:
        """Refuse work that this process cannot hold, before it starts."""
        if n_bytes > (limit := memory_bytes()):
            raise ClusterError(
                f"{what} needs about {_mib(n_bytes)} in the process that was started, there are "
                f"{_mib(limit)}",
                "Start it on a machine, or in a batch job, with more memory.",
            )

    def cpu_seconds(self) -> dict[str, float]:
        """CPU seconds so far of this process and of each worker that answers soon, by address."""
        found = {"": time.process_time()}
        if self.client is not None:
            from distributed import wait

            ask = partial(self.client.submit, time.process_time, pure=False)
            asked = {address: ask(workers=[address]) for address in self._workers}
            with contextlib.suppress(TimeoutError, OSError):
                wait(list(asked.values()), timeout=_ANSWER_S)
            for address, future in asked.items():
                if future.status == "finished":
                    found[address] = float(future.result())
            self.client.cancel(list(asked.values()), force=True)
        return found

    def run(
        self,
        function: Callable[[T], R],
        tasks: Sequence[T],
        step: str,
        report: Report = silent,
    ) -> list[R]:
        """Run a function for every task; results in the order of the tasks.

        The function is importable by its name on every worker; ``report`` gets the progress of a
        ``step``. An error of a task is raised as it was, and the other tasks are cancelled.

        Raises `ClusterError`: a task killed its worker several times, or the scheduler is gone.
        """
        done: _Done[R] = ((index, function(task)) for index, task in enumerate(tasks))
        if self.client is not None:
            done = self._done_on_client(function, tasks, step)
        elif self.n_threads > 1:
            done = self._done_in_threads(function, tasks)
        results: dict[int, R] = {}
        report(step, 0, len(tasks))
        with contextlib.closing(done):
            for index, result in done:
                results[index] = result
                report(step, len(results), len(tasks))
        return [results[index] for index in range(len(tasks))]

    def _done_in_threads(self, function: Callable[[T], R], tasks: Sequence[T]) -> _Done[R]:
        """Numbers and results of tasks as threads finish them."""
        pool = futures.ThreadPoolExecutor(self.n_threads, "task")
        try:
            index_of = {pool.submit(function, task): index for index, task in enumerate(tasks)}
            for future in futures.as_completed(index_of):
                yield index_of[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _done_on_client(
        self, function: Callable[[T], R], tasks: Sequence[T], step: str
    ) -> _Done[R]:
        """Numbers and results of tasks as workers finish them."""
        from distributed import CancelledError, KilledWorker, as_completed

        # A bounded number in flight: the scheduler never holds a graph of the whole job.
        submitted = (
            (self.client.submit(_run_task, function, task, step, pure=False), index)
            for index, task in enumerate(tasks)
        )
        index_of: dict[Any, int] = {}
        running, future = as_completed(), None

        def submit(n_tasks: int) -> None:
            for added, index in islice(submitted, n_tasks):
                index_of[added] = index
                running.add(added)

        try:
            submit(4 * self.n_workers)
            for future in running:
                yield index_of.pop(future), future.result()
                submit(1)
        except KilledWorker as error:
            what = f"{step}: a task killed its worker again and again ({error})"
            hint = (
                "Most often it ran out of memory: give workers more, or lower rows_per_partition."
            )
            raise ClusterError(what, hint) from error
        except (CancelledError, TimeoutError, OSError) as error:
            if future is not None and future.status == "error":
                raise  # of the task itself
            what = f"{step}: the cluster is gone ({error!r})"
            raise ClusterError(what, "Run the same command again.") from error
        finally:
            with contextlib.suppress(Exception):
                self.client.cancel(list(running.futures), force=True)


def _mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"


def _run_task(function: Callable[[T], R], task: T, step: str) -> R:
    """Run a task in a worker."""
    _give_back(step)
    return function(task)


@lru_cache(maxsize=1)
def _give_back(step: str) -> None:
    """Give back what the stage before has left: over stages it would add to the peak of each."""
    give_back_memory()


def _share_imports() -> None:
    """Have workers start as copies of a process that has done their imports.

    With two workers it saves 1 of 3 CPU seconds, and a lost worker is replaced at once.
    """
    import distributed.utils

    in_use = sorted(name for name in sys.modules if name.startswith("sos_dask.stages."))
    needed = {extra for name in in_use for extra in getattr(sys.modules[name], "PRELOAD", ())}
    preloaded = [*_PRELOADED, *in_use, *sorted(needed)]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preloaded)
    # Dask's own list would import pandas and more, in this process too.
    distributed.utils._forkserver_preload_set = True


@contextlib.contextmanager
def start(
    n_workers: int | None = None,
    memory_limit: str = "auto",
    scheduler: str | None = None,
    n_threads: int | None = None,
) -> Iterator[Cluster]:
    """Start a cluster for the time of a ``with`` block.

    Parameters
    ----------
    n_workers : int, optional
        Worker processes of one thread each on this machine; default one a core, 0 for none (tasks
        run in this process).
    memory_limit : str
        Per worker or thread (``"4GiB"``), 0 for none; default its part of the memory there is.
    n_threads : int, optional
        Threads of this process that run tasks, instead of workers.
    scheduler : str, optional
        Address of a running Dask scheduler, or the path of its scheduler file, used instead.

    Raises
    ------
    ClusterError
        The scheduler does not answer.
    ConfigError
        See `check_place`.
    """
    check_place(n_workers, memory_limit, scheduler, n_threads)
    limited = memory_limit != "auto"
    limit = _limit_bytes(memory_limit) if limited else None
    if n_threads or (scheduler is None and n_workers == 0):
        keep_freed_memory()
        share = memory_bytes() // (n_threads or 1)
        yield Cluster(None, n_threads or 1, limit if limited else share)
        return
    import dask
    import distributed  # noqa: F401  its defaults are those of Dask's configuration, below ours

    quiet = logging.getLogger("distributed")
    with dask.config.set(_DASK), contextlib.ExitStack() as stack:
        stack.callback(quiet.setLevel, quiet.level)
        quiet.setLevel(logging.CRITICAL)
        if scheduler is not None:
            yield Cluster(stack.enter_context(_connected(scheduler)))
        else:
            yield Cluster(_local_client(stack, n_workers, limit if limited else "auto"))


def _connected(scheduler: str) -> Any:
    """Client of a running scheduler, by its address or its file."""
    from distributed import Client

    is_file = Path(scheduler).exists()
    try:
        if not is_file:
            _require_listener(scheduler)
        place = {"scheduler_file": scheduler} if is_file else {"address": scheduler}
        return Client(**place, timeout=_CONNECT)
    except Exception as error:  # an address or a file can be wrong in many ways
        hint = "Check the address, or leave it out to work on this machine."
        what = f"no Dask scheduler answers at {scheduler}: {error!r}"
        raise ClusterError(what, hint) from error


def _local_client(
    stack: contextlib.ExitStack, n_workers: int | None, memory_limit: str | int | None
) -> Any:
    """Client of a cluster on this machine; the stack closes both."""
    from distributed import Client, LocalCluster

    _share_imports()
    arrived: list[int] = []
    with _interrupts(lambda number, frame: arrived.append(number)), _worker_environment():
        with _interrupts(signal.SIG_IGN):  # which workers inherit with the environment
            multiprocessing.forkserver.ensure_running()
        local = stack.enter_context(
            LocalCluster(
                n_workers=n_workers or n_cores(),
                threads_per_worker=1,
                memory_limit=memory_limit,
                dashboard_address=":0",  # a free port; the server itself is always there
                # Its pages are made by bokeh, whose import is a third of the whole start.
                scheduler_kwargs={"dashboard": False},
                silence_logs=logging.CRITICAL,
            )
        )
    stack.enter_context(_hanging_workers_killed(local))
    if arrived:  # Ctrl-C: Dask's start cannot be left half-way
        signal.raise_signal(signal.SIGINT)
    return stack.enter_context(Client(local))


def _limit_bytes(memory_limit: str) -> int | None:
    """Parse a memory limit; 0 means unlimited (None)."""
    from dask.utils import parse_bytes

    try:
        limit = int(parse_bytes(memory_limit))
    except (ValueError, OverflowError):
        limit = -1
    sound = limit == 0 or _LEAST_BYTES <= limit <= 2**60
    if not sound or not memory_limit.strip()[0].isdigit():
        least = f"{_LEAST_BYTES >> 20}MiB or more; most steps need some hundred"
        raise ConfigError(
            f"{memory_limit!r} is not a memory limit",
            f"Give a number with its unit, as in 4GiB ({least}); auto, or 0 for none.",
        )
    return limit or None


def check_place(
    n_workers: int | None,
    memory_limit: str = "auto",
    scheduler: str | None = None,
    n_threads: int | None = None,
) -> None:
    """Raise `ConfigError` for what `start` can never do, before anything is read."""
    most = _MOST_A_CORE * n_cores()
    for number, least, what in ((n_workers, 0, "workers"), (n_threads, 1, "threads")):
        if number is not None and not least <= number <= most:
            hint = f"{n_cores()} cores take {most} at most."
            raise ConfigError(f"{number} {what} are not possible", hint)
    if memory_limit != "auto":
        _limit_bytes(memory_limit)
    if n_threads is not None and (n_workers is not None or scheduler is not None):
        hint = "Tasks run in threads of this process, in worker processes, or on a cluster."
        raise ConfigError("--threads goes with neither --workers nor --scheduler", hint)
    if scheduler is not None and (n_workers is not None or memory_limit != "auto"):
        what = "a running cluster (--scheduler) has workers and memory limits of its own"
        raise ConfigError(what, "Leave --workers and --memory-limit out, or the scheduler.")
    file = Path(scheduler or "none")
    is_other = file.exists() and not file.is_file()
    if scheduler and (is_other or (file.suffix == ".json" and not file.exists())):
        raise ConfigError(f"--scheduler: there is no file {scheduler}", "Has it started?")


def _require_listener(address: str) -> None:
    """Wait shortly for a listener; Dask itself tries a wrong address again until its timeout."""
    url = urlsplit(address if "://" in address else f"tcp://{address}")
    deadline = time.monotonic() + _LISTENING_S
    while url.scheme in ("tcp", "tls") and url.hostname and url.port:
        try:
            left = max(deadline - time.monotonic(), 0.1)
            return socket.create_connection((url.hostname, url.port), timeout=left).close()
        except OSError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)


@contextlib.contextmanager
def _hanging_workers_killed(local: Any) -> Iterator[None]:
    """While a cluster closes, kill workers that do not end: one that just starts again never does.

    Dask waits for ever for a worker that has not yet told its nanny that it runs.
    """
    closed = threading.Event()

    def watch() -> None:
        while not closed.wait(_CLOSING_S):
            for nanny in list(local.workers.values()):
                with contextlib.suppress(OSError, TypeError):  # ended by itself, or not there yet
                    os.kill(nanny.pid, signal.SIGKILL)

    yield
    threading.Thread(target=watch, name="closing", daemon=True).start()
    try:
        local.close()
    finally:
        closed.set()


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    """Environment of workers, which they get through this process; it may use all its threads."""
    before = dict(os.environ)
    os.environ |= {name: str(value) for name, value in {WORKER: 1, **_WORKER_ENVIRONMENT}.items()}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


@contextlib.contextmanager
def _interrupts(handler: Any) -> Iterator[None]:
    """Another handler of Ctrl-C; only the main thread has one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
