"""A lock on a store, so that two rebuilds do not do the same work.

No promise rests on it: two rebuilds at once are harmless. So it is taken from a holder that is dead
(on the same host) or that has not renewed it in time, and a race for it may end with two holders.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from sos_dask.errors import LockedError, StorageError
from sos_dask.storage.artifact import write_new, write_text

LOCK = "lock.json"
LEASE_S = 300.0
_RENEWALS = 5  # in a lease


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: a process on a host, what it does and since when (seconds of the epoch)."""

    token: str
    host: str
    pid: int
    what: str
    since: float
    renewed: float
    stage: str = ""

    @classmethod
    def here(cls, what: str) -> Holder:
        """Describe this process."""
        now = time.time()
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), what, now, now)

    @property
    def is_alive(self) -> bool:
        """Whether it has renewed the lock in time, and runs where that can be seen from here."""
        # A clock that jumped back would hold the lock for ever.
        in_time = abs(time.time() - self.renewed) < LEASE_S
        return in_time and (self.host != socket.gethostname() or psutil.pid_exists(self.pid))

    @property
    def words(self) -> str:
        """The holder as a text."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        at = f", now at '{self.stage}'" if self.stage else ""
        return f"{self.what} on {self.host}, process {self.pid}, since {since}{at}"


def _written(store: Path) -> Holder | None:
    with contextlib.suppress(OSError, ValueError, TypeError, StorageError):  # none, or not ours
        return Holder(**json.loads((store / LOCK).read_text("utf-8")))
    return None


def holder_of(store: Path) -> Holder | None:
    """Find the living holder of the lock of a store; None where there is none."""
    found = _written(store)
    return found if found is not None and found.is_alive else None


@contextlib.contextmanager
def locked(store: Path, what: str) -> Iterator[Callable[[str], None]]:
    """Hold the lock of a store for the time of a ``with`` block, renewed by a thread.

    Gives a function that tells which stage runs. Raises `LockedError` where another process has it.
    """
    path, me, ended = store / LOCK, Holder.here(what), threading.Event()
    beside = " A rebuild beside it does the same work: --no-lock."

    def is_mine() -> bool:
        found = _written(store)  # also after a pause longer than the lease
        return found is not None and found.token == me.token

    # A server may have stored it and lost its answer.
    while not write_new(path, json.dumps(asdict(me))) and not is_mine():
        if (other := holder_of(store)) is not None:
            hint = f"Wait for it (sos-dask status shows it).{what.startswith('rebuild') * beside}"
            raise LockedError(f"{store} is in use: {other.words}", hint)
        path.unlink(missing_ok=True)

    def renew(stage: str = "") -> None:
        nonlocal me
        me = replace(me, renewed=time.time(), stage=stage or me.stage)
        with contextlib.suppress(OSError, StorageError):
            if is_mine():  # else it was taken over
                write_text(path, json.dumps(asdict(me)))

    def keep() -> None:
        while not ended.wait(LEASE_S / _RENEWALS):
            renew()

    thread = threading.Thread(target=keep, name="lock", daemon=True)
    thread.start()
    try:
        yield renew
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(StorageError):
            if is_mine():
                path.unlink(missing_ok=True)
