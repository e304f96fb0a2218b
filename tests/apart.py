"""A scheduler and workers of Dask as processes of their own, as a batch system starts them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
_CODE = "from distributed.cli import dask_{0}; dask_{0}.main()"


def kill(process: subprocess.Popen) -> None:
    """Kill a process and its children, frozen ones too."""
    try:
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


@dataclass
class Apart:
    """Processes in a folder; its ``address`` is that of the scheduler."""

    folder: Path
    options: tuple[str, ...] = ()  # of scheduler and workers
    scheduler: subprocess.Popen = field(init=False)
    workers: list[subprocess.Popen] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.folder / "scheduler.json"

    def start(self, name: str, *options: str, cwd: Path | None = None) -> subprocess.Popen:
        """Start a scheduler or a worker."""
        command = [sys.executable, "-c", _CODE.format(name), "--scheduler-file", str(self.file)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with (self.folder / f"{name}.log").open("a") as log:
            return subprocess.Popen(
                [*command, "--no-dashboard", *self.options, *options],
                stdout=log,
                stderr=log,
                cwd=cwd or self.folder,
                env=os.environ | {"PYTHONPATH": path},
            )

    def worker(self, *options: str, cwd: Path | None = None) -> subprocess.Popen:
        """Start a worker of one thread."""
        process = self.start("worker", "--nthreads", "1", *options, cwd=cwd)
        self.workers.append(process)
        return process


@contextmanager
def apart(folder: Path, n_workers: int = 0, *options: str) -> Iterator[Apart]:
    """Start a scheduler and workers without nannies; all end with the block."""
    made = Apart(folder, options)
    made.scheduler = made.start("scheduler", "--host", "127.0.0.1", "--port", "0")
    try:
        deadline = time.monotonic() + 60
        while not made.file.exists():
            assert time.monotonic() < deadline, "the scheduler did not start"
            time.sleep(0.05)
        for _ in range(n_workers):
            made.worker("--no-nanny")
        yield made
    finally:
        for process in (*made.workers, made.scheduler):
            kill(process)


def freeze(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGSTOP)
