"""Kinds of clusters: how each is started or reached, and the settings that all of them need."""

from __future__ import annotations

import contextlib
import getpass
import importlib
import logging
import multiprocessing.forkserver
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from sos_dask.errors import ClusterError, ConfigError
from sos_dask.run.machine import KEPT_BYTES, WORKER, handled, n_cores
from sos_dask.run.workers import TIMEOUT_S, Workers
from sos_dask.settings import Settings

USABLE = 0.95  # Dask ends a worker that uses more of its limit
_CONNECT = "20s"
_CLOSING_S = 10.0
_LISTENING_S = 3.0  # grace period for a scheduler that is still starting
_QUEUE_S = 3600.0  # a job may wait in a queue
_OWN_S = 120.0  # on a busy machine a new process takes a while
_JOBS_S = 10.0  # between two looks at the queue
_LIFETIME, _STAGGER = 0.9, 0.05  # of the walltime: workers end, one after the other, before it does
_BATCH = {"slurm": ("squeue", "-h", "-o", "%A"), "pbs": ("qselect",)}  # list numbers of jobs
# Dask lets a worker give every freed 64 KiB back to the system. Tasks that go from array to array
# then spend a third of their time on fresh pages, and keep no less memory at their peak. One arena,
# because a task runs in a thread of its own: memory is used again only within an arena.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": KEPT_BYTES,
    "MALLOC_MMAP_THRESHOLD_": KEPT_BYTES,
    "MALLOC_ARENA_MAX": 1,
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "OMP_NUM_THREADS": 1,
    "OMP_WAIT_POLICY": "passive",
    "MKL_NUM_THREADS": 1,
    "OPENBLAS_NUM_THREADS": 1,
}
# Of Dask, for every scheduler and worker; deploy/dask.yaml has the same.
SETTINGS: dict[str, Any] = {
    # A frozen worker is dropped after this, also where nobody gives it tasks.
    "distributed.scheduler.worker-ttl": "60s",
    # A paused worker would never go on: what it holds is not Dask's to spill.
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.terminate": USABLE,
    # Nobody looks at profiles: watching itself took 7 % of a core, now 2 %.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "2s",
    "distributed.admin.large-graph-warning-threshold": "100MB",
    "distributed.nanny.pre-spawn-environ": ENVIRONMENT,
}
_CHECKED = {name: value for name, value in SETTINGS.items() if ".worker.memory." in name}
# Of Dask, for this process and workers on this machine.
HERE = {
    "distributed.logging.distributed": "critical",
    "distributed.worker.daemon": True,
    "distributed.worker.multiprocessing-method": "forkserver",
}
# What every worker imports before its first task, beside the stages in use here and what these name
# as PRELOAD.
_PRELOADED = ["sos_dask.run.workers", "distributed", "distributed.nanny", "pyarrow.compute"]
_PRELOADED += ["sos_dask.storage.catalog"]
_PACKAGES = {"slurm": "jobqueue", "pbs": "jobqueue", "kubernetes": "kubernetes", "cuda": "cuda"}
_OF_KIND = {
    "n_workers": ("local", "cuda"),
    "memory_limit": ("local", "cuda"),
    "scheduler": ("address",),
    "minimum": ("address", *_BATCH, "kubernetes"),
    "maximum": (*_BATCH, "kubernetes"),
    **dict.fromkeys(("cores", "memory", "walltime", "queue", "directives", "interface"), _BATCH),
    "log_directory": _BATCH,
    **dict.fromkeys(("spec", "namespace"), ("kubernetes",)),
    "tls": ("local", "address", *_BATCH),
}
logger = logging.getLogger(__name__)


class TlsSettings(Settings):
    """Files of TLS, which client, scheduler and workers read: see `sos-dask cluster certs`."""

    ca_file: str = Field(description="Certificate of the authority.")
    cert: str = Field(description="Certificate of this cluster.")
    key: str = Field(description="Private key of that certificate.")


class ClusterSettings(Settings):
    """Where tasks run: the table ``[cluster]`` of a job."""

    kind: Literal["local", "address", "slurm", "pbs", "kubernetes", "cuda"] = Field(
        "local", description="How workers are started, or reached"
    )
    n_workers: int | None = Field(
        None, ge=0, le=10_000, description="Worker processes on this machine; default one a core."
    )
    memory_limit: str = Field("auto", description="Memory of each worker on this machine.")
    scheduler: str | None = Field(None, description="Address or file of a running scheduler.")
    minimum: int = Field(1, ge=1, le=100_000, description="Workers that are waited for, and kept.")
    maximum: int | None = Field(
        None, ge=1, le=100_000, description="Most workers; default as many as the fewest."
    )
    cores: int = Field(1, ge=1, le=1024, description="Cores of a job, with a worker on each.")
    memory: str = Field("4GiB", description="Memory of a job.", pattern=r"^[1-9]\d*[KMGT]i?B$")
    walltime: str = Field("04:00:00", description="Of a job.", pattern=r"^\d+:[0-5]\d:[0-5]\d$")
    queue: str | None = Field(None, description="Queue, or partition, of the jobs.")
    directives: list[str] = Field(
        default_factory=list, description="Further lines of the head of a job, as --account=x."
    )
    interface: str | None = Field(None, description="Network of scheduler and workers, as ib0.")
    log_directory: str | None = Field(None, description="Folder of the logs of the jobs.")
    spec: str | None = Field(None, description="YAML of a DaskCluster for the operator.")
    namespace: str | None = Field(None, description="Of Kubernetes.")
    timeout: float | None = Field(
        None, ge=1, description="Seconds without any worker that are too many."
    )
    tls: TlsSettings | None = None

    @model_validator(mode="after")
    def _fits_kind(self) -> ClusterSettings:
        fields = type(self).model_fields
        for name, kinds in _OF_KIND.items():
            default = fields[name].get_default(call_default_factory=True)
            if self.place not in kinds and getattr(self, name) != default:
                raise ValueError(f"{name} has no effect with kind = '{self.place}'")
        for kind, name in (("address", "scheduler"), ("kubernetes", "spec")):
            if self.kind == kind and getattr(self, name) is None:
                raise ValueError(f"kind = '{kind}' needs {name}")
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"maximum = {self.maximum} is below minimum = {self.minimum}")
        return self

    @property
    def place(self) -> str:
        """Kind; a scheduler that is given makes one of ``address``."""
        return "address" if self.kind == "local" and self.scheduler is not None else self.kind

    @property
    def timeout_s(self) -> float:
        """Seconds without any worker that are too many."""
        default = {"address": TIMEOUT_S, "local": _OWN_S, "cuda": _OWN_S}.get(self.place, _QUEUE_S)
        return default if self.timeout is None else self.timeout


def connect(
    stack: contextlib.ExitStack, settings: ClusterSettings, memory_limit: str | int | None
) -> Any:
    """Client of a cluster that is started or reached; the stack closes both.

    Raises `ClusterError`: it cannot be; `ConfigError`: a package is missing.
    """
    place, security = settings.place, _security(settings.tls)
    if place == "address":
        client = stack.enter_context(_connected(str(settings.scheduler), security))
    elif place == "local":
        client = _local_client(stack, settings.n_workers, memory_limit, security)
    else:
        client = _started(stack, settings, memory_limit, security)
    own, checked = place in ("local", "cuda"), place == "address"
    workers = Workers.of(
        client,
        timeout=settings.timeout_s,
        own=own,
        settings=_CHECKED if checked else {},
        environment={x: str(value) for x, value in ENVIRONMENT.items()} if checked else {},
    )
    if checked:
        workers.check_scheduler()
    return client


def _security(tls: TlsSettings | None) -> Any:
    """Security of Dask; None without TLS."""
    if tls is None:
        return None
    from distributed.security import Security

    for name, file in tls:
        if not Path(file).is_file():
            hint = "Make certificates: sos-dask cluster certs DIR."
            raise ConfigError(f"cluster.tls.{name}: there is no file {file}", hint)
    roles = ("client", "scheduler", "worker")
    pairs = {f"tls_{role}_cert": str(Path(tls.cert).absolute()) for role in roles}
    pairs |= {f"tls_{role}_key": str(Path(tls.key).absolute()) for role in roles}
    return Security(tls_ca_file=str(Path(tls.ca_file).absolute()), require_encryption=True, **pairs)


def _connected(scheduler: str, security: Any) -> Any:
    """Client of a running scheduler, by its address or its file."""
    from distributed import Client

    is_file = Path(scheduler).exists()
    try:
        if not is_file:
            _require_listener(scheduler)
        place = {"scheduler_file": scheduler} if is_file else {"address": scheduler}
        return Client(**place, timeout=_CONNECT, security=security)
    except Exception as error:  # an address or a file can be wrong in many ways
        hint = "Check the address, or leave it out to work on this machine."
        what = f"no Dask scheduler answers at {scheduler}: {error!r}"
        raise ClusterError(what, hint) from error


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


# -- clusters of others ---------------------------------------------------------------------------


def _started(
    stack: contextlib.ExitStack,
    settings: ClusterSettings,
    memory_limit: str | int | None,
    security: Any,
) -> Any:
    """Client of a cluster that is started by a package of Dask for its kind."""
    from distributed import Client

    place = settings.place
    try:
        if place == "cuda":
            given: dict[str, Any] = {"n_workers": settings.n_workers, "memory_limit": memory_limit}
            made = importlib.import_module("dask_cuda").LocalCUDACluster(
                **given, dashboard_address=None, silence_logs=logging.CRITICAL
            )
        elif place == "kubernetes":
            module = importlib.import_module("dask_kubernetes.operator")
            given = {"custom_cluster_spec": settings.spec, "namespace": settings.namespace}
            made = module.KubeCluster(**given, quiet=True)
        else:
            made = _batch(settings, security)
        cluster = stack.enter_context(made)
        if place != "cuda":
            most = settings.maximum or settings.minimum
            # Adaptive even where the number is fixed: only so are lost workers replaced.
            how = {"interval": "2s"} if place in _BATCH else {}
            cluster.adapt(minimum=settings.minimum, maximum=most, **how)
        if place in _BATCH:
            _watch_jobs(stack, cluster, [*_BATCH[place], "-u", getpass.getuser()])
        return stack.enter_context(Client(cluster, timeout=_CONNECT))
    except ModuleNotFoundError as error:
        extra = _PACKAGES[place]
        what = f"kind = '{place}' needs a package that is not installed: {error.name}"
        raise ConfigError(what, f"pip install 'sos_dask[{extra}]'") from None
    except Exception as error:  # of any library, or of the batch system
        text = " ".join(str(error).split()) or type(error).__name__
        raise ClusterError(f"no cluster of kind '{place}' can be started: {text}") from error


def _batch(settings: ClusterSettings, security: Any) -> Any:
    """Cluster whose workers are jobs of a batch system, its scheduler in this process."""
    import dask.config

    jobqueue = importlib.import_module("dask_jobqueue")
    kind = {"slurm": jobqueue.SLURMCluster, "pbs": jobqueue.PBSCluster}[settings.place]
    hours, minutes, seconds = map(int, settings.walltime.split(":"))
    walltime_s = 3600 * hours + 60 * minutes + seconds
    variables = {WORKER: 1, **ENVIRONMENT}
    variables["DASK_INTERNAL_INHERIT_CONFIG"] = dask.config.serialize(nested(SETTINGS))
    lines = [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items()]
    life = ["--lifetime", f"{_LIFETIME * walltime_s:.0f}s"]
    life += ["--lifetime-stagger", f"{_STAGGER * walltime_s:.0f}s"]
    return kind(
        job_cls=type(kind.job_cls.__name__, (_Job, kind.job_cls), {}),
        cores=settings.cores,
        processes=settings.cores,
        memory=settings.memory,
        walltime=settings.walltime,
        queue=settings.queue,
        job_extra_directives=settings.directives,
        job_script_prologue=lines,
        interface=settings.interface,
        log_directory=settings.log_directory,
        python=sys.executable,
        worker_extra_args=[*life, "--dashboard-address", "127.0.0.1:0"],
        scheduler_options={"dashboard_address": "127.0.0.1:0", "dashboard": False},
        security=security,
        silence_logs=logging.CRITICAL,
    )


class _Job:
    """Job of a batch system: one that cannot be submitted is said."""

    status: Any

    async def start(self) -> None:
        """Submit the job."""
        from distributed import Status

        try:
            await super().start()  # type: ignore[misc]
        except (RuntimeError, OSError, ValueError) as error:
            self.status = Status.failed
            found = re.search(r"stderr:\s*(\S.*)", str(error))
            why = found[1] if found else " ".join(str(error).split())
            logger.warning("a job for workers could not be submitted: %s", why)
            raise


def _watch_jobs(stack: contextlib.ExitStack, cluster: Any, listing: Sequence[str]) -> None:
    """Have jobs submitted again that ended before their workers came, or never were in the queue.

    Dask itself takes these for jobs that wait, as long as it runs.
    """
    closed = threading.Event()

    def watch() -> None:
        while not closed.wait(_JOBS_S):
            jobs = list(cluster.workers.items())
            try:
                ran = subprocess.run(
                    listing, capture_output=True, text=True, check=True, timeout=_JOBS_S
                )
            except (OSError, subprocess.SubprocessError):
                continue  # a batch system may be away for a while
            queued = {word.split(".")[0] for word in ran.stdout.split()}
            names = [str(one["name"]) for one in cluster.scheduler_info["workers"].values()]
            for name, job in jobs:
                there = any(one == str(name) or one.startswith(f"{name}-") for one in names)
                submitted = job.job_id is not None or job.status.name == "failed"
                if submitted and not there and str(job.job_id).split(".")[0] not in queued:
                    cluster.loop.add_callback(cluster.workers.pop, name, None)

    threading.Thread(target=watch, name="jobs", daemon=True).start()
    stack.callback(closed.set)


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names, as a document of YAML or TOML has them."""
    document: dict[str, Any] = {}
    for name, value in settings.items():
        *folders, last = name.split(".")
        inside = document
        for folder in folders:
            inside = inside.setdefault(folder, {})
        inside[last] = value
    return document


# -- workers on this machine ----------------------------------------------------------------------


def _local_client(
    stack: contextlib.ExitStack,
    n_workers: int | None,
    memory_limit: str | int | None,
    security: Any,
) -> Any:
    """Client of a cluster on this machine; the stack closes both."""
    from distributed import Client, LocalCluster

    _share_imports()
    arrived: list[int] = []
    arrive = handled(signal.SIGINT, lambda number, frame: arrived.append(number))
    with arrive, _worker_environment():
        with handled(signal.SIGINT, signal.SIG_IGN):  # which workers inherit with the environment
            multiprocessing.forkserver.ensure_running()
        local = stack.enter_context(
            LocalCluster(
                n_workers=n_workers or n_cores(),
                threads_per_worker=1,
                memory_limit=memory_limit,
                dashboard_address="127.0.0.1:0",  # a free port; the server itself is always there
                # Its pages are made by bokeh, whose import is a third of the whole start.
                scheduler_kwargs={"dashboard": False},
                silence_logs=logging.CRITICAL,
                security=security,
                protocol=None if security is None else "tls://",
            )
        )
    stack.enter_context(_hanging_workers_killed(local))
    if arrived:  # Ctrl-C: Dask's start cannot be left half-way
        signal.raise_signal(signal.SIGINT)
    return stack.enter_context(Client(local))


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

    try:
        yield
    finally:
        threading.Thread(target=watch, name="closing", daemon=True).start()
        try:
            local.close()
        finally:
            closed.set()


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    """Environment of workers, which they get through this process; it may use all its threads."""
    before = dict(os.environ)
    os.environ |= {name: str(value) for name, value in {WORKER: 1, **ENVIRONMENT}.items()}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
