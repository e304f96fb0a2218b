"""Where tasks run: on the workers of a Dask cluster, in threads or in this process; progress.

One task is one partition. Tasks are plain functions of picklable arguments. They are idempotent, so
a task that dies with its worker is simply run again elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import psutil

from sos_dask.errors import ClusterError, ConfigError
from sos_dask.run import kinds
from sos_dask.run.kinds import ClusterSettings
from sos_dask.run.machine import keep_freed_memory, memory_bytes, n_cores
from sos_dask.run.workers import Done, Workers

T = TypeVar("T")
R = TypeVar("R")
_LEAST_BYTES = 64 << 20
_MOST_A_CORE = 64

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

    minimum: int = 1  # workers that a stage waits for

    @property
    def workers(self) -> Workers:
        """Workers of the client."""
        return Workers.of(self.client)

    @property
    def n_workers(self) -> int:
        """Workers at present; without a cluster threads."""
        return self.n_threads if self.client is None else max(1, len(self.workers.there()))

    @property
    def is_elsewhere(self) -> bool:
        """Whether a worker is on another machine than this process."""
        if self.client is None:
            return False
        own = {one.address for of in psutil.net_if_addrs().values() for one in of}
        return any(worker["host"] not in own for worker in self.workers.there().values())

    @property
    def memory_limit_bytes(self) -> int | None:
        """Memory limit of the smallest worker; None where there is none."""
        if self.client is None:
            return self.thread_bytes
        limits = [worker["memory_limit"] for worker in self.workers.there().values()]
        return min(filter(None, limits), default=None)

    def prepare(self, probe: Callable[[], None]) -> None:
        """Wait for workers on which a probe raises nothing; late ones have to pass it, too.

        The probe is importable by its name on every worker, and says what cannot be seen there.

        Raises `ClusterError`: there is no such worker in the time limit.
        """
        if self.client is not None:
            self.workers.require(probe, self.minimum)

    def require_memory(self, n_bytes: int, what: str) -> None:
        """Refuse work that a worker cannot hold, before it starts."""
        limit = self.memory_limit_bytes
        if limit is not None and n_bytes > kinds.USABLE * limit:
            raise ClusterError(
                f"{what} needs about {_mib(n_bytes)} in a worker, the limit is {_mib(limit)}, "
                f"of which {kinds.USABLE:.0%} can be used",
                f"Give workers {_mib(n_bytes / kinds.USABLE)} or more (memory_limit; fewer workers "
                "have more each), or ingest with a lower rows_per_partition.",
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
        there = {} if self.client is None else self.workers.ask(time.process_time)
        return {"": time.process_time(), **there}

    def run(
        self, function: Callable[[T], R], tasks: Sequence[T], step: str, report: Report = silent
    ) -> list[R]:
        """Run a function for every task; results in the order of the tasks.

        The function is importable by its name on every worker; ``report`` gets the progress of a
        ``step``. An error of a task is raised as it was, and the other tasks are cancelled.

        Raises `ClusterError`: a task killed its worker several times, no worker can be used, or the
        scheduler is gone.
        """
        done: Done[R] = ((index, function(task)) for index, task in enumerate(tasks))
        if self.client is not None:
            done = self.workers.run(function, tasks, step)
        elif self.n_threads > 1:
            done = self._done_in_threads(function, tasks)
        results: dict[int, R] = {}
        report(step, 0, len(tasks))
        with contextlib.closing(done):
            for index, result in done:
                results[index] = result
                report(step, len(results), len(tasks))
        return [results[index] for index in range(len(tasks))]

    def _done_in_threads(self, function: Callable[[T], R], tasks: Sequence[T]) -> Done[R]:
        """Numbers and results of tasks as threads finish them."""
        pool = futures.ThreadPoolExecutor(self.n_threads, "task")
        try:
            index_of = {pool.submit(function, task): index for index, task in enumerate(tasks)}
            for future in futures.as_completed(index_of):
                yield index_of[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"


@contextlib.contextmanager
def start(
    n_workers: int | None = None,
    memory_limit: str = "auto",
    scheduler: str | None = None,
    n_threads: int | None = None,
    **more: Any,
) -> Iterator[Cluster]:
    """Start a cluster for the time of a ``with`` block.

    ``n_workers`` are processes of one thread each on this machine, by default one a core, 0 for
    none (tasks run in this process); ``n_threads`` of this process run tasks instead. The
    ``memory_limit`` is that of each worker or thread (``"4GiB"``), 0 for none; by default its part
    of the memory there is. ``scheduler``, used instead, is the address of a running Dask scheduler,
    or the path of its scheduler file. For other settings see `ClusterSettings`.

    Raises `ClusterError`: the scheduler does not answer; `ConfigError`: see `check_place`.
    """
    settings = check_place(n_workers, memory_limit, scheduler, n_threads, **more)
    limited = memory_limit != "auto"
    limit = _limit_bytes(memory_limit) if limited else None
    if n_threads or (settings.place == "local" and n_workers == 0):
        keep_freed_memory()
        share = memory_bytes() // (n_threads or 1)
        yield Cluster(None, n_threads or 1, limit if limited else share)
        return
    import dask
    import distributed  # noqa: F401  its defaults are those of Dask's configuration, below ours

    quiet = logging.getLogger("distributed")
    with dask.config.set(kinds.SETTINGS | kinds.HERE), contextlib.ExitStack() as stack:
        stack.callback(quiet.setLevel, quiet.level)
        quiet.setLevel(logging.CRITICAL)
        client = kinds.connect(stack, settings, limit if limited else "auto")
        yield Cluster(client, minimum=settings.minimum)


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
        hint = f"Give a number with its unit, as in 4GiB ({least}); auto, or 0 for none."
        raise ConfigError(f"{memory_limit!r} is not a memory limit", hint)
    return limit or None


def check_place(
    n_workers: int | None,
    memory_limit: str = "auto",
    scheduler: str | None = None,
    n_threads: int | None = None,
    **more: Any,
) -> ClusterSettings:
    """Settings of `start`; `ConfigError` for what it can never do, before anything is read."""
    most = _MOST_A_CORE * n_cores()
    for number, least, what in ((n_workers, 0, "workers"), (n_threads, 1, "threads")):
        if number is not None and not least <= number <= most:
            hint = f"{n_cores()} cores take {most} at most."
            raise ConfigError(f"{number} {what} are not possible", hint)
    if memory_limit != "auto":
        _limit_bytes(memory_limit)
    place = more.get("kind", "local")
    if n_threads is not None and (n_workers, scheduler, place) != (None, None, "local"):
        hint = "Tasks run in threads of this process, in worker processes, or on a cluster."
        raise ConfigError("--threads goes with neither --workers nor --scheduler", hint)
    if scheduler is not None and (n_workers is not None or memory_limit != "auto"):
        what = "a running cluster (--scheduler) has workers and memory limits of its own"
        raise ConfigError(what, "Leave --workers and --memory-limit out, or the scheduler.")
    file = Path(scheduler or "none")
    is_other = file.exists() and not file.is_file()
    if scheduler and (is_other or (file.suffix == ".json" and not file.exists())):
        raise ConfigError(f"--scheduler: there is no file {scheduler}", "Has it started?")
    return ClusterSettings(
        n_workers=n_workers, memory_limit=memory_limit, scheduler=scheduler, **more
    )
