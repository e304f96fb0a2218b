"""How a rebuild scales: ``python -m tests.bench.scaling --out DIR``.

Rebuilds the same simulated sky with one and with two workers. The efficiency of a stage is the time
with one over twice the time with two, where time is the CPU seconds of the driver and those of its
busiest worker: on a machine that others use, too, wall seconds say nothing. ``--partitions
1000,10000`` measures the memory of scheduler and driver instead, each a process of its own, in
steps over as many small partitions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sos_dask.storage.catalog import Catalog
from tests.apart import apart
from tests.bench.measure import SOS, Usage, measure, table, tail
from tests.job import DEFAULT_PARTITIONS, WITH_REPORT, methods, write_job


def ran(out: Path, *words: object) -> Usage:
    """Measure a command of ours that ends well."""
    used = measure([SOS, *map(str, words)], out / "log")
    if used.state != "done":
        raise SystemExit(tail(out / "log"))
    return used


@dataclass
class Watched:
    """CPU seconds of every process of a rebuild, seen again and again."""

    driver: int
    seen: list[tuple[float, dict[int, float]]] = field(default_factory=list)

    def look(self) -> None:
        """Note what each has used by now."""
        with suppress(psutil.Error):
            root, now = psutil.Process(self.driver), {}
            for one in (root, *root.children(recursive=True)):
                with suppress(psutil.Error):
                    now[one.pid] = sum(one.cpu_times()[:2])
            self.seen.append((time.time(), now))

    def used(self, begin: float, end: float) -> tuple[float, float]:
        """CPU seconds of the driver, and of the busiest other process, between two times."""
        first = max((one for one in self.seen if one[0] <= begin), key=lambda one: one[0])[1]
        last = min((one for one in self.seen if one[0] >= end), key=lambda one: one[0])[1]
        spent = {pid: last[pid] - first.get(pid, 0.0) for pid in last}
        return spent.pop(self.driver), max(spent.values(), default=0.0)


def stages(out: Path, job: Path, n_workers: int) -> dict[str, tuple[float, float, float]]:
    """Rebuild; wall seconds, CPU seconds of the driver and of the busiest worker, of each stage."""
    store = out / f"store-{n_workers}"
    command = [SOS, "rebuild", str(job), "--store", str(store), "-w", str(n_workers)]
    with (out / "log").open("w") as log:
        process = psutil.Popen(command, stdout=log, stderr=log)
    watched = Watched(process.pid)
    while process.poll() is None:
        watched.look()
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(tail(out / "log"))
    watched.seen.append((math.inf, watched.seen[-1][1]))
    [events] = (store / "logs").iterdir()
    began: dict[str, float] = {}
    found = {}
    for event in map(json.loads, events.read_text().splitlines()):
        at = datetime.datetime.fromisoformat(event["time"]).timestamp()
        if event["event"] == "begin":
            began[event["product"]] = at
        elif event["event"] == "done":
            name = event["product"]
            found[name] = (at - began[name], *watched.used(began[name], at))
    return found


def efficiency(out: Path, rows: int) -> Iterator[str]:
    """Rebuild with one worker, and with two."""
    ran(out, "simulate", "--rows", rows, "-o", out / "sky")
    trained = methods("polynomial", "boosted")
    job = write_job(out, out / "sky", DEFAULT_PARTITIONS, trained, WITH_REPORT)
    one, two = stages(out, job, 1), stages(out, job, 2)
    for found in (one, two):
        found["all"] = tuple(map(sum, zip(*found.values(), strict=True)))  # type: ignore[assignment]
    lines = []
    for name, (wall, *cpu) in one.items():
        seconds = (f"{x:.1f}" for x in (wall, two[name][0], *cpu, *two[name][1:]))
        lines.append((name, *seconds, f"{sum(cpu) / sum(two[name][1:]) / 2:.2f}"))
    columns = f"{rows:,} rows, >1 worker: s, >2 workers: s, >1: driver CPU-s, >worker CPU-s"
    yield from table(f"{columns}, >2: driver CPU-s, >busiest worker CPU-s, >efficiency", lines)


def peaks(out: Path, file: Path, scheduler: int, *words: object) -> tuple[float, float, float]:
    """Wall seconds of a command, and the largest memory of driver and scheduler, in MiB."""
    command, began = [SOS, *map(str, words), "--scheduler", str(file)], time.monotonic()
    with (out / "log").open("w") as log:
        driver = psutil.Popen(command, stdout=log, stderr=log)
    largest = [0.0, 0.0]
    while driver.poll() is None:
        for place, pid in enumerate((driver.pid, scheduler)):
            try:
                largest[place] = max(largest[place], psutil.Process(pid).memory_info().rss / 2**20)
            except psutil.NoSuchProcess:
                break
        time.sleep(0.1)
    if driver.returncode:
        raise SystemExit(tail(out / "log"))
    return time.monotonic() - began, largest[0], largest[1]


def memory(out: Path, rows: int, wanted: list[int]) -> Iterator[str]:
    """Run three steps over more and more partitions of the same rows."""
    ran(out, "simulate", "--rows", rows, "-o", out / "sky")
    columns = "step, >partitions, >s, >driver MiB, >scheduler MiB"
    lines = []
    for n in wanted:
        place = out / str(n)
        place.mkdir()
        with apart(place, 2) as cluster:
            pid = cluster.scheduler.pid
            size = ("--rows-per-partition", max(2 * rows // n, 1))
            steps = {
                "ingest": ("lamost-dr11-lrs", out / "sky/lamost.fits", *size),
                "dedupe": (place / "ingest",),
                "crossmatch": (place / "dedupe", place / "dedupe", "--radius-arcsec", 1),
            }
            for step, words in steps.items():
                used = peaks(out, cluster.file, pid, step, *words, "-o", place / step)
                n_made = len(Catalog.open(place / "ingest").pixels)
                lines.append((step, f"{n_made:,}", *(f"{x:.0f}" for x in used)))
    yield from table(columns, lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scaling", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="new folder of all that is made")
    parser.add_argument("--rows", type=int, help="LAMOST rows (4,000,000; for memory 200,000)")
    parser.add_argument("--partitions", help="numbers of partitions, about")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    out = given.out.resolve()
    if given.partitions:
        wanted = [int(n) for n in given.partitions.split(",")]
        lines = memory(out, given.rows or 200_000, wanted)
    else:
        lines = efficiency(out, given.rows or 4_000_000)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
