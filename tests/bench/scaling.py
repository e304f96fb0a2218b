"""How a rebuild scales: ``python -m tests.bench.scaling --out DIR``.

Seconds of every stage with one and with two workers, on the same simulated sky, and the efficiency:
wall seconds of one, over twice those of two. ``--partitions 1000,10000`` measures the memory of
scheduler and driver instead, each a process of its own, in steps over as many small partitions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from sos_dask.storage.catalog import Catalog
from sos_dask.storage.store import costs, read_build
from tests.apart import apart
from tests.bench.measure import SOS, Usage, measure, table, tail
from tests.job import DEFAULT_PARTITIONS, methods, write_job


def ran(out: Path, *words: object) -> Usage:
    """Measure a command of ours that ends well."""
    used = measure([SOS, *map(str, words)], out / "log")
    if used.state != "done":
        raise SystemExit(tail(out / "log"))
    return used


def of_stages(store: Path) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of every stage of the current build, driver and workers together."""
    products, known = read_build(store / "current")["products"], costs(store)
    return {name: (known[made]["wall_s"], known[made]["cpu_s"]) for name, made in products.items()}


def efficiency(out: Path, rows: int, times: int) -> Iterator[str]:
    """Rebuild with one and with two workers, in turn; the least of each."""
    ran(out, "simulate", "--rows", rows, "-o", out / "sky")
    job = write_job(out, out / "sky", DEFAULT_PARTITIONS, methods("polynomial", "boosted"))
    found: dict[int, list[dict[str, tuple[float, float]]]] = {1: [], 2: []}
    for number in range(times):
        for n_workers in found:
            store = out / f"store-{n_workers}-{number}"
            used = ran(out, "rebuild", job, "--store", store, "-w", n_workers)
            found[n_workers].append({**of_stages(store), "all": (used.wall_s, used.cpu_s)})
            yield (f"{n_workers} workers: {used.wall_s:.0f} s, {used.cpu_s:.0f} CPU-s; the rest of "
                   f"the machine {used.other_cpu_s:.0f} CPU-s\n")  # fmt: skip
    lines = []
    for name in found[1][0]:
        one, two = (min(each[name][0] for each in found[n]) for n in found)
        cpu = (min(each[name][1] for each in found[n]) for n in found)
        seconds = (f"{x:.1f}" for x in (one, two, *cpu))
        lines.append((name, *seconds, f"{one / two / 2:.2f}"))
    columns = "stage, >1 worker: s, >2 workers: s, >1: CPU-s, >2: CPU-s, >efficiency"
    yield from table(f"{rows:,} rows: {columns}", lines)


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
    parser.add_argument("--times", type=int, default=1, help="rebuilds of each (%(default)s)")
    parser.add_argument("--partitions", help="numbers of partitions, about")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    out = given.out.resolve()
    if given.partitions:
        wanted = [int(n) for n in given.partitions.split(",")]
        lines = memory(out, given.rows or 200_000, wanted)
    else:
        lines = efficiency(out, given.rows or 4_000_000, given.times)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
