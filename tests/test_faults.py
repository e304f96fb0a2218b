"""Processes really killed in a rebuild: the rerun's bytes equal those of an undisturbed run."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import psutil
import pytest

from sos_dask.simulate import SkySettings, simulate
from sos_dask.storage.store import verify

pytestmark = pytest.mark.fault

JOB = """
format = 1
name = "faults"
target_name = "lamost"
store = "store"
[target]
survey = "lamost-dr11-lrs"
files = ["{sky}/lamost.fits"]
[reference.apogee]
survey = "apogee-dr17"
files = ["{sky}/apogee.fits"]
[reference.galah]
survey = "galah-dr4"
files = ["{sky}/galah.fits"]
[ingest]
rows_per_partition = 700
chunk_rows = 2000
[train]
methods = ["polynomial"]
validation = "holdout"
[compare]
n_bootstrap = 100
[report]
enabled = false
"""
# Stage and the kind of records that its parts leave: killed when some are there, but not all.
MOMENTS = [
    ("ingest", "read"),
    ("ingest", "partitions"),
    ("dedupe", "stars"),
    ("crossmatch", "matches"),
    ("apply", "corrected"),
]


@pytest.fixture(scope="module")
def sky(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sky")
    simulate(SkySettings(n_lamost=20_000, n_apogee=3000, n_galah=3000), folder)
    return folder


def prepare(folder: Path, sky: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    job: Path = folder / "job.toml"
    job.write_text(JOB.format(sky=sky))
    return job


def start(job: Path, workers: int = 2, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-c", "from sos_dask.cli import main; main()"]
    with (job.parent / "log").open("a") as log:
        return subprocess.Popen(
            [*command, "rebuild", str(job), "-w", str(workers), *more], stdout=log, stderr=log
        )


def finish(process: subprocess.Popen) -> None:
    assert process.wait(timeout=240) == 0


def contents(store: Path) -> dict[str, str]:
    """SHA-256 of every file of every output, intermediate files included."""
    root = store / "artifacts"
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(sky, tmp_path_factory) -> Iterator[Callable[[], dict[str, str]]]:
    """Contents of a run that nobody disturbs; it goes on beside the first test."""
    job = prepare(tmp_path_factory.mktemp("undisturbed"), sky)
    process = start(job, workers=1)

    @cache
    def found() -> dict[str, str]:
        finish(process)
        files = contents(job.parent / "store")
        assert not [name for name in files if ".work" in name or name.endswith(".tmp")]
        return files

    yield found
    process.kill()


def wait_for_records(store: Path, stage: str, kind: str, process: subprocess.Popen) -> None:
    """Until some parts of a stage are finished; parts of its other outputs may be, too."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be disturbed"
        for folder in (store / "artifacts" / stage).glob(f"*/.work/{kind}"):
            if len(list(folder.glob("*.json"))) >= 2:
                return
        time.sleep(0.002)
    raise AssertionError(f"{stage} never began")


def test_kill_the_driver_in_every_stage(sky, undisturbed, tmp_path):
    job = prepare(tmp_path, sky)
    store = tmp_path / "store"
    for stage, kind in MOMENTS:
        process = start(job)
        wait_for_records(store, stage, kind, process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive, "workers outlived their driver"
        assert list((store / "artifacts" / stage).glob("*/.work")), "killed after the stage"
    finish(start(job))
    assert contents(store) == undisturbed()


def test_kill_a_worker_in_every_stage(sky, undisturbed, tmp_path):
    job = prepare(tmp_path, sky)
    store = tmp_path / "store"
    process = start(job)
    for stage, kind in MOMENTS:
        wait_for_records(store, stage, kind, process)
        # Workers are copies of a child of the driver that has done their imports.
        children = psutil.Process(process.pid).children()
        workers = [worker for child in children for worker in child.children()]
        assert workers
        os.kill(workers[0].pid, signal.SIGKILL)
    finish(process)
    assert contents(store) == undisturbed()


def test_two_drivers_at_once(sky, undisturbed, tmp_path):
    job = prepare(tmp_path, sky)
    running = [start(job, 1, "--no-lock"), start(job, 1, "--no-lock")]
    for process in running:
        finish(process)
    assert contents(tmp_path / "store") == undisturbed()
    current = tmp_path / "store" / "current"
    for product in (
        "lamost.observations",
        "lamost.stars",
        "reference",
        "lamost.pairs",
        "lamost.corrected",
    ):
        assert verify(current / product) == []
