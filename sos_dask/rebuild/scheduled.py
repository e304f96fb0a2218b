"""A rebuild that nobody watches: locked, logged, refused where it cannot fit, and told about."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sos_dask import __version__
from sos_dask.errors import GateError, StorageError, redacted, understood
from sos_dask.rebuild.estimate import Estimate, estimate
from sos_dask.rebuild.history import FAILED, RunLog
from sos_dask.rebuild.job import Job
from sos_dask.rebuild.lock import locked
from sos_dask.rebuild.metrics import write_metrics
from sos_dask.rebuild.pipeline import Build, Watch, rebuild
from sos_dask.rebuild.plan import Plan, Planned
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.run.machine import handled, peak_bytes
from sos_dask.storage.objects import as_path
from sos_dask.storage.store import StageResult

logger = logging.getLogger(__name__)
_STOPPED = 130


class Terminated(KeyboardInterrupt):
    """A batch system or a service manager wants this process to end (SIGTERM)."""


class _Logged(Watch):
    """Writes what a rebuild does into its log and lock."""

    def __init__(
        self, job: Job, log: RunLog, at: Callable[[str], None], told: Callable[[Estimate], None]
    ) -> None:
        self.job, self.log, self.at, self.told = job, log, at, told
        self.results: list[StageResult] = []
        self.seconds: dict[str, float] = {}
        self.peak = 0

    def planned(self, store: Path, stages: Sequence[Planned]) -> None:
        found = estimate(store, stages)
        if found.stages:
            self.log.event("estimate", **vars(found))
            self.told(found)
            free = found.free_bytes
            if self.job.space.check and free is not None and found.bytes > free:
                raise StorageError(
                    f"the rebuild will not fit: it takes {found.in_words}",
                    "Free some space (sos-dask gc removes old builds). To try it all the same, "
                    "write [space] check = false into the job.",
                )

    def begins(self, product: str) -> None:
        self.log.event("begin", product=product)
        self.at(product)

    def ended(self, result: StageResult, seconds: float) -> None:
        self.results.append(result)
        if result.ran:
            self.peak = max(self.peak, peak_bytes())
            rows, name = result.rows, result.product
            self.seconds[name] = round(seconds, 3)
            counts = {"rows_in": rows.n_in, "rows_out": rows.n_out, "rejected": rows.rejected}
            counts |= {f"parts_{how}": n for how, n in result.parts.items()}
            self.log.event("done", product=name, seconds=self.seconds[name], **counts)


def scheduled(
    job: Job,
    store: Path | None = None,
    *,
    cluster: Cluster | Callable[[], Any] | None = None,
    report: Report = silent,
    lock: bool = True,
    echo: Callable[[str], None] | None = None,
    told: Callable[[Estimate], None] = lambda found: None,
) -> Build:
    """Run a rebuild as `rebuild` does, under the lock of the store, with a log there.

    Without the lock it runs beside another rebuild. ``echo`` gets the lines of the log, ``told``
    what the run will take, before it starts. Raises `LockedError`: another process works on the
    store; `GateError`: see `rebuild`; `StorageError`: what it will write does not fit on the disk.
    """
    store = as_path(store or job.resolve(job.store))
    if not (store / "artifacts").exists():
        Plan(job, store)  # nothing is written for a job that is wrong
    holding: Any = nullcontext(lambda stage: None)
    if lock:
        holding = locked(store, f"rebuild of '{job.name}'")
    with holding as at, handled(signal.SIGTERM, _stop):
        log, began = RunLog(store, echo), time.monotonic()
        about = {"host": socket.gethostname(), "pid": os.getpid(), "sos_dask": __version__}
        log.event("start", job=job.name, job_file=job.path, **about)
        watch, outcome = _Logged(job, log, at, told), {}
        try:
            build = rebuild(job, store, cluster=cluster, report=report, watch=watch)
            outcome = {"outcome": build.outcome, "build": build.name, "exit_code": 0}
            return build
        except BaseException as error:
            outcome = _outcome(error)
            raise
        finally:
            outcome["seconds"] = round(time.monotonic() - began, 3)
            outcome |= {"peak_mib": watch.peak >> 20} if watch.peak else {}
            log.event("end", **outcome)
            write_metrics(job, store, watch.results, watch.seconds, outcome)
            if outcome["outcome"] in FAILED and job.on_failure.command:
                _tell(job, store, outcome, log)


def _outcome(error: BaseException) -> dict[str, Any]:
    """Describe how a run ended that did not end well."""
    if isinstance(error, GateError):
        more = {"build": error.build.name, "reasons": list(error.reasons)}
        return {"outcome": "refused", "exit_code": 10, "message": error.message, **more}
    if isinstance(error, KeyboardInterrupt):
        by = "failed" if isinstance(error, Terminated) else "interrupted"
        return {"outcome": by, "exit_code": _STOPPED, "message": "it was stopped by a signal"}
    known = understood(error)
    text = known.message if known else f"{type(error).__name__}: {error}"
    code = known.exit_code if known else 1
    return {"outcome": "failed", "exit_code": code, "message": text}


def _tell(job: Job, store: Path, outcome: dict[str, Any], log: RunLog) -> None:
    """Run the job's command for failures; what goes wrong with it is only said."""
    command, limit = job.on_failure.command, job.on_failure.timeout_s
    facts = {"JOB": job.name, "STORE": store, "LOG": log.path, "OUTCOME": outcome["outcome"]}
    facts |= {"EXIT_CODE": outcome["exit_code"], "REASON": redacted(outcome["message"])}
    given: Any = {"cwd": job.path.parent, "stdin": subprocess.DEVNULL, "start_new_session": True}
    given["env"] = {**os.environ, **{f"SOS_{name}": str(one) for name, one in facts.items()}}
    result: int | str
    try:
        with subprocess.Popen(command, stdout=2, **given) as process:  # stdout is for results
            try:
                result = process.wait(limit)
            except subprocess.TimeoutExpired:
                result = f"no end after {limit:g} s"
                os.killpg(process.pid, signal.SIGKILL)  # it and all that it has started
    except (OSError, ValueError) as error:
        result = str(error)
    log.event("on_failure", command=command[0], result=result)  # arguments may be secret
    if result != 0:
        logger.warning("the command of [on_failure], %s, failed: %s", command[0], result)


def _stop(number: int, frame: Any) -> None:
    """End the run as Ctrl-C does, so that it is logged."""
    raise Terminated
