"""A process of its own for the tracker, where the workers of a training meet.

It ends its whole process (std::terminate on "send system error:Broken pipe", XGBoost 3.2) when a
worker goes while they do, and xgboost.dask starts it in the process of the scheduler, which is this
one for a cluster on one machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

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


@contextlib.contextmanager
def tracker_apart(name: str) -> Iterator[None]:
    """Make xgboost.dask start its tracker in a process of its own.

    Parameters
    ----------
    name : str
        Of the fit, for `stop_tracker`.
    """
    from xgboost import dask as xgboost_dask

    original = xgboost_dask._start_tracker
    xgboost_dask._start_tracker = partial(_start_tracker, name)
    try:
        yield
    finally:
        xgboost_dask._start_tracker = original


async def _start_tracker(
    name: str,
    n_workers: int,
    address_of_scheduler: str | None,
    address_of_user: tuple[str, int] | None,
    timeout: int | None,
) -> dict[str, str | int]:
    """Runs in the scheduler; what workers need to find a new tracker."""
    addresses = [address_of_user, (address_of_scheduler, 0), (None, 0)]
    request = json.dumps([n_workers, [address for address in addresses if address], timeout or 0])
    return await asyncio.to_thread(_ask_tracker, name, request)


def _ask_tracker(name: str, request: str) -> dict[str, str | int]:
    process = _TRACKERS.get(name)
    if process is None or process.poll() is not None:
        stop_tracker(name)
        process = subprocess.Popen(
            [sys.executable, "-c", _TRACKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        _TRACKERS[name] = process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(request + "\n")
    process.stdin.flush()
    answer: dict[str, str | int] | None = json.loads(process.stdout.readline() or "null")
    if answer is None:
        raise OSError("the tracker of XGBoost did not start")
    return answer


def stop_tracker(name: str) -> None:
    """Runs in the scheduler: end the trackers of one fit."""
    process = _TRACKERS.pop(name, None)
    if process is not None:
        process.kill()
        process.communicate()
