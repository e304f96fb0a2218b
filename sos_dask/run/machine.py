"""Cores and memory that a process may use, and ways to keep it light."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

KEPT_BYTES = 256 << 20
"""Freed memory that is kept for use again."""
WORKER = "SOS_DASK_WORKER"
"""Variable of the environment that marks our own worker processes."""
_OLD_LIMIT = 32 << 20  # more is refused by older C libraries
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of mallopt(3)
_CGROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CPU_FILES = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))  # cgroups version 2, 1


def n_cores() -> int:
    """Cores that this process may use: of the machine, or of its control group.

    A batch system gives a job some cores of a node, or a share of their time.
    """
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()  # not on macOS
    cores = len(own) or os.cpu_count() or 1
    for folder in _groups("cpu"):
        for names in _CPU_FILES:
            with contextlib.suppress(OSError, ValueError):  # "max", or not to be seen from here
                words = " ".join((folder / name).read_text() for name in names).split()
                quota, period = map(int, words)
                cores = min(cores, math.ceil(quota / period)) if quota > 0 else cores
    return cores


def n_threads(n_rows: int, rows_each: int) -> int:
    """Threads for a loop over rows: one for each ``rows_each``, at most one a core.

    Threads of a small loop wait for each other most of the time, where others run on the machine
    for ever so long. A worker process has one.
    """
    return 1 if multiprocessing.parent_process() else min(n_rows // rows_each, n_cores()) or 1


def memory_bytes() -> int:
    """Memory that this process can use: of the machine, or of its control group.

    A batch system puts the processes of a job into a group with a limit; that of any group above
    counts, too.
    """
    limits = [psutil.virtual_memory().total]
    for folder in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text()))
    return int(min(limits))


def peak_bytes() -> int:
    """Largest memory so far of this process or of one of those that it has started here."""
    own = psutil.Process()
    peaks = [0]
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(OSError, StopIteration, ValueError):  # ended; not Linux
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            words = next(line for line in lines if line.startswith("VmHWM:")).split()
            peaks.append(int(words[1]) << 10)
    return max(peaks)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups of this process with a controller, and of those above them.

    `dask.system` and `distributed.system` look at some of them only: not at groups above (a batch
    job's limit of memory), nor at a controller that is mounted alone.
    """
    with contextlib.suppress(OSError):
        for line in _OWN_GROUPS.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                root = _CGROUPS / controllers
                folder = root / group.strip("/")
                yield from (p for p in (folder, *folder.parents) if p.is_relative_to(root))


@contextlib.contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Set another handler of a signal for a ``with`` block; only the main thread can have one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def keep_freed_memory() -> None:
    """Let the threads of this process use freed memory again instead of giving it back.

    Tasks that go from array to array spend a third of their time on fresh pages otherwise. One
    arena for all threads, because what one has freed another one can use.
    """
    with contextlib.suppress(OSError, AttributeError):  # not the C library of GNU
        library = ctypes.CDLL(None)
        library.mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        if not library.mallopt(_MMAP_THRESHOLD, KEPT_BYTES):
            library.mallopt(_MMAP_THRESHOLD, _OLD_LIMIT)
        library.mallopt(_ARENA_MAX, 1)


def give_back_memory() -> None:
    """Give freed memory back to the system."""
    with contextlib.suppress(OSError, AttributeError):  # not the C library of GNU
        ctypes.CDLL(None).malloc_trim(0)


_alone: list[bool] = []  # where this process belongs to us alone


def leave_pandas_out() -> None:
    """Let Arrow do without pandas, in a process that belongs to us alone.

    Arrow imports pandas with the first value that is given to it, to know its objects: 0.17 CPU
    seconds and 35 MiB of every process. Afterwards its ``to_pandas`` fails here.
    """
    _alone.append(True)
    if "pandas" not in sys.modules:
        import pyarrow as pa

        finder: Any = SimpleNamespace(find_spec=_refuse_pandas)
        sys.meta_path.insert(0, finder)
        try:
            pa.array([0])  # Arrow looks for pandas once
        finally:
            sys.meta_path.remove(finder)


def import_xgboost() -> Any:
    """Import XGBoost; without scikit-learn, in a process that belongs to us alone.

    XGBoost imports it for estimators of its own: 1.1 of 1.4 CPU seconds of every process.
    """
    modules: dict[str, Any] = sys.modules
    leave_out = bool(_alone) and modules.keys().isdisjoint(("sklearn", "xgboost"))
    try:
        if leave_out:
            modules["sklearn"] = None  # refuses the import
        return importlib.import_module("xgboost")
    finally:
        if leave_out:
            modules.pop("sklearn")


def _refuse_pandas(name: str, *_: Any) -> None:
    if name == "pandas":
        raise ModuleNotFoundError(name=name)


# Workers import this before anything else; their standard output is not for results.
if os.environ.get(WORKER):
    sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    keep_freed_memory()
    leave_pandas_out()
