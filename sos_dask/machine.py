"""What this machine gives to a process, and how the process is kept light."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import psutil

KEPT_BYTES = 256 << 20
"""Freed memory that is kept for use again."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of mallopt(3)
_CGROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def n_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory that this process can use: of the machine, or of its control group.

    A batch system puts the processes of a job into a group with a limit; that of any group above
    counts, too.
    """
    limits = [psutil.virtual_memory().total]
    with contextlib.suppress(OSError):
        for line in _OWN_GROUPS.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):
                limits += _limits_of(_CGROUPS / controllers, group.strip("/"))
    return int(min(limits))


def _limits_of(root: Path, group: str) -> list[int]:
    """Limits of a control group and of those above it."""
    name = "memory.max" if root == _CGROUPS else "memory.limit_in_bytes"
    folder, found = root / group, []
    for path in (folder, *folder.parents):
        if path.is_relative_to(root):
            with contextlib.suppress(OSError, ValueError):  # "max", or not to be seen from here
                found.append(int((path / name).read_text()))
    return found


def keep_freed_memory() -> None:
    """Let the threads of this process use freed memory again instead of giving it back.

    Tasks that go from array to array spend a third of their time on fresh pages otherwise. One
    arena for all threads, because what one has freed another one can use.
    """
    with contextlib.suppress(OSError, AttributeError):  # not the C library of GNU
        library = ctypes.CDLL(None)
        library.mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        library.mallopt(_MMAP_THRESHOLD, KEPT_BYTES)
        library.mallopt(_ARENA_MAX, 1)


def give_back_memory() -> None:
    """Give freed memory back to the system."""
    with contextlib.suppress(OSError, AttributeError):  # not the C library of GNU
        ctypes.CDLL(None).malloc_trim(0)


def leave_pandas_out() -> None:
    """Let Arrow do without pandas, in a process that belongs to us alone.

    Arrow imports pandas with the first value that is given to it, to know its objects: 0.17 CPU
    seconds and 35 MiB of every process. Afterwards its ``to_pandas`` fails here.
    """
    if "pandas" not in sys.modules:
        import pyarrow as pa

        refuse = _Refuse()
        sys.meta_path.insert(0, refuse)
        try:
            pa.array([0])  # Arrow looks for pandas once
        finally:
            sys.meta_path.remove(refuse)


class _Refuse:
    """Finder of modules to which pandas is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name=name)
