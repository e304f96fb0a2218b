"""What a store on an object server bears and costs: ``python -m tests.bench.objects``.

A small sky is rebuilt over two workers into a real S3 server on loopback, killed (driver and
workers) at random moments and run again until it ends; two rebuilds at once make one store; the
server is away for a while during a third. All manifests must be those of a rebuild on disk, and
every file the one that its manifest names. ``--cost ROWS`` compares CPU seconds and time of a
rebuild, and of reading a catalog, with those on disk instead.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sos_dask.simulate import SkySettings, simulate
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.objects import ObjectPath, as_path, scratch
from sos_dask.storage.store import status
from tests.bench.measure import SOS, table
from tests.job import methods, write_job
from tests.s3 import Server, manifests, same_files

Store = Path | ObjectPath


def start(job: Path, store: Store, workers: int = 2) -> subprocess.Popen:
    """Start a rebuild in a group of processes of its own."""
    command = [SOS, "rebuild", str(job), "--store", str(store), "-w", str(workers), "--no-lock"]
    with (job.parent / "log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def end(process: subprocess.Popen, log: Path) -> None:
    """Wait until a rebuild has ended well."""
    if process.wait(timeout=900) != 0:
        raise SystemExit(log.read_text()[-3000:])


def kills(job: Path, top: ObjectPath, wanted: dict[str, bytes], n_kills: int) -> str:
    """Kill rebuilds, each at a random moment, and run them again."""
    done = n_stores = 0
    while done < n_kills:
        store, n_stores = top / f"killed-{n_stores}", n_stores + 1
        while done < n_kills:
            process = start(job, store)
            try:
                process.wait(timeout=random.uniform(1, 20))
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                done += 1
        end(start(job, store), job.parent / "log")
        check(store, wanted)
    return f"{done} SIGKILL of driver and workers, stores: {n_stores}; same manifests and files"


def races(job: Path, top: ObjectPath, wanted: dict[str, bytes], n_races: int) -> str:
    """Two rebuilds at once make one store."""
    for number in range(n_races):
        store = top / f"race-{number}"
        for process in [start(job, store, workers=0) for _ in range(2)]:
            end(process, job.parent / "log")
        check(store, wanted)
        assert len(status(store).builds) == 1
    return f"{n_races} times two at once: both end, one build, same manifests and files"


def away(job: Path, store: ObjectPath, wanted: dict[str, bytes], server: Server, s: float) -> str:
    """The server is killed during a rebuild and comes back."""
    process = start(job, store)
    time.sleep(10)
    server.stop()
    time.sleep(s)
    server.start()
    end(process, job.parent / "log")
    check(store, wanted)
    return f"server away for {s:g} s: the rebuild goes on, same manifests and files"


def check(store: ObjectPath, wanted: dict[str, bytes]) -> None:
    """Compare a store with one on disk."""
    assert manifests(store) == wanted
    same_files(store)


def used(run: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds, of this process and those that it has waited for, and wall seconds."""

    def cpu() -> float:
        both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(one.ru_utime + one.ru_stime for one in both)

    before, began = cpu(), time.monotonic()
    run()
    return cpu() - before, time.monotonic() - began


def read(store: Store) -> None:
    """Open a catalog and read all of it."""
    catalog = Catalog.open(as_path(f"{store}/current/lamost.corrected"))
    for pixel in catalog.pixels:
        catalog.read(pixel)


def cost(job: Path, stores: dict[str, Store], repeats: int) -> list[tuple[str, ...]]:
    """What a rebuild and reading cost in each of the stores, in turn; the least of each."""
    found: dict[str, list[tuple[float, float]]] = {}
    for number in range(repeats):
        for name, top in stores.items():
            store = top / str(number)
            rebuild = used(lambda to=store: end(start(job, to, workers=0), job.parent / "log"))  # type: ignore[misc]
            found.setdefault(f"rebuild, {name}", []).append(rebuild)
            found.setdefault(f"read, {name}", []).append(used(lambda of=store: read(of)))  # type: ignore[misc]
            shutil.rmtree(scratch())  # no copies are left
            found.setdefault(f"read, {name}, no copies", []).append(
                used(lambda of=store: read(of))  # type: ignore[misc]
            )
    return [
        (name, *(f"{min(one):.2f}" for one in zip(*of, strict=True))) for name, of in found.items()
    ]


def main() -> None:
    """Print what was done, or the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.objects", description=__doc__)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--races", type=int, default=3)
    parser.add_argument("--away", type=float, default=20)
    parser.add_argument("--cost", type=int, metavar="ROWS")
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = str(place / "copies")
        (place / "copies").mkdir()
        server = Server(place / "s3")
        os.environ |= server.environment
        top = ObjectPath("s3://bench")
        simulate(SkySettings(n_lamost=given.cost or given.rows), place / "sky")
        changes = [methods("polynomial", "boosted")]
        if given.cost:
            changes.append(("rows_per_partition = 1500", "rows_per_partition = 50000"))
        job = write_job(place, place / "sky", *changes)
        try:
            if given.cost:
                rows = cost(job, {"disk": place / "disk", "S3": top}, given.repeats)
                print("\n".join(table(f"{given.cost:,} rows, >CPU s, >wall s", rows)))
                return
            end(start(job, place / "disk"), place / "log")
            wanted = manifests(place / "disk")
            print(kills(job, top, wanted, given.kills), flush=True)
            print(races(job, top, wanted, given.races), flush=True)
            print(away(job, top / "away", wanted, server, given.away), flush=True)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
