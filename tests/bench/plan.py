"""What a rebuild of any size would take: tasks, files, bytes, memory, and which limit comes next.

``python -m tests.bench.plan --rows 19e6,1e8,2e9 --workers 2,64 [--store STORE]``

The sizes of rows and the CPU time of a row are measured (`Measured`, a ``bench.json``, or the last
build of a store); the formulas are those of the code. The reference grows with the target, as 1.7
to 19 million. A stage uses no more workers than it has tasks, but for training, which has none.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sos_dask.storage.manifest import Manifest
from sos_dask.storage.store import costs, read_build
from tests.bench.measure import table

GIB = float(1 << 30)
CHUNK_ROWS = 500_000
ROWS_PER_PARTITION = 1_000_000
KEYS_PER_RANGE = 10_000_000
REFERENCE_SHARE = 1.7 / 19
REFERENCE_SURVEYS = 2
DIGEST_BYTES_PER_S = 1.5e9
REPEATS = 0.45
MOST_PAIRS = 1_000_000
IN_FLIGHT_PER_WORKER = 4
LARGE_ROWS = 5_000_000
REPORT_S = 20.0  # of its figures, whatever the rows


@dataclass(frozen=True)
class Measured:
    """Figures that were measured with 19 million simulated LAMOST rows and two workers.

    Parameters
    ----------
    fits, piece, observation, star, reference, edge, pair, corrected : float
        Bytes of a row: in the FITS file, in the uncompressed pieces of ingest, in the Parquet files
        of observations, stars and reference, of an edge pair in the pieces of crossmatch, in pairs,
        in corrected observations and in their coverage (``scored``).
    pairs_per_row : float
        Pairs with the reference for each row of the target.
    fill : float
        Rows of a mean partition, in units of the limit.
    cpu_* : float, us
        CPU time of a row in a stage, without the start of processes.
    cpu_tree_pair : float, us
        Of a pair, for 500 trees of three labels.
    cpu_evidence_pair, cpu_errors_pair : float, us
        Of a pair while methods are compared and trends measured, and while the errors are modelled.
    repeated : float
        Share of the rows whose key stands at another row, too.
    join : float, us
        To join an edge pair with those of other partitions.
    open_piece, open_keys, footer, overlap : float, us
        To open a memory-mapped piece, to look a range of keys up in the sorted keys of one, to read
        a footer, and to compare a partition with ranges.
    edge_pairs : float
        Share of the pairs that may be joined over the edge of a partition.
    sync : float, us
        To put a small file safely on disk.
    driver_edge, worker_pair, left_out_pair : float
        Bytes in memory: of an edge pair in the driver, which joins them; in a worker of a pair that
        evidence rests on, `MOST_PAIRS` at most, and of one that is left out of it.
    task : float
        Bytes of a task in the scheduler.
    scheduler_mib : float
        Memory of driver and scheduler before the first task.
    """

    fits: float = 245.0
    piece: float = 120.0
    observation: float = 62.0
    star: float = 74.0
    reference: float = 96.0
    edge: float = 70.0
    pair: float = 110.0
    corrected: float = 84.0
    scored: float = 24.0
    pairs_per_row: float = 0.0173
    fill: float = 0.40
    cpu_ingest: float = 1.05
    cpu_dedupe: float = 0.57
    cpu_reference: float = 3.8
    cpu_crossmatch: float = 0.26
    cpu_coverage: float = 3.4
    cpu_apply: float = 0.66
    cpu_report: float = 0.32
    cpu_tree_pair: float = 43.0
    cpu_evidence_pair: float = 68.0
    cpu_errors_pair: float = 18.0
    repeated: float = 1e-5
    join: float = 1.0
    edge_pairs: float = 0.01
    open_piece: float = 270.0
    open_keys: float = 300.0
    footer: float = 950.0
    overlap: float = 0.0035
    sync: float = 9000.0
    driver_edge: float = 200.0
    worker_pair: float = 400.0
    left_out_pair: float = 16.0
    task: float = 20_000.0
    scheduler_mib: float = 250.0


@dataclass(frozen=True)
class StagePlan:
    """What a stage takes.

    Parameters
    ----------
    tasks : int
    files : int
        That stay.
    scratch_files : int
        That go when the stage is complete.
    read_gb, written_gb : float
    cpu_s : float
        Of the tasks: divided by the workers.
    driver_s : float
        In the driver alone, while the workers wait.
    driver_gib, worker_gib : float
        Memory that grows with the rows, beside what every process and partition takes.
    """

    name: str
    tasks: int
    files: int
    scratch_files: int
    read_gb: float
    written_gb: float
    cpu_s: float
    driver_s: float
    driver_gib: float = 0.0
    worker_gib: float = 0.0


def plan(rows: float, m: Measured) -> list[StagePlan]:
    """The stages of a rebuild with so many rows of LAMOST."""
    found = [*_survey(rows, m)]
    for number in range(REFERENCE_SURVEYS):
        found += _survey(REFERENCE_SHARE * rows / REFERENCE_SURVEYS, m, f"reference {number + 1}: ")
    n_stars, n_reference = rows * (1 - REPEATS), REFERENCE_SHARE * rows * 0.95
    # Stars keep the partitions of their observations.
    parts, reference_parts = _partitions(rows, m), _partitions(n_reference, m)
    each = 2 * m.sync / 1e6  # a part and its record
    found.append(
        StagePlan(
            "reference",
            (REFERENCE_SURVEYS + 2) * reference_parts,
            reference_parts + 4,
            (REFERENCE_SURVEYS + 2) * reference_parts,
            2 * n_reference * m.star / 1e9,
            n_reference * m.reference / 1e9,
            n_reference * m.cpu_reference / 1e6
            + _overlaps(reference_parts, reference_parts, m)
            + each * reference_parts,
            4 * reference_parts * m.footer / 1e6,
        )
    )
    n_pairs = rows * m.pairs_per_row
    n_evidence = min(n_pairs, MOST_PAIRS)
    held_gib = (n_evidence * m.worker_pair + n_pairs * m.left_out_pair) / GIB
    found.append(
        StagePlan(
            "crossmatch",
            parts,
            parts + 4,
            2 * parts,
            (n_stars * m.star + n_reference * m.reference) / 1e9,
            n_pairs * (m.edge_pairs * m.edge + m.pair) / 1e9,
            n_stars * m.cpu_crossmatch / 1e6
            + _overlaps(parts, reference_parts, m)
            + 1.5 * each * parts,
            (2 * parts + reference_parts) * m.footer / 1e6
            + parts * m.open_piece / 1e6
            + n_pairs * m.edge_pairs * m.join / 1e6,
            n_pairs * m.edge_pairs * m.driver_edge / GIB,
        )
    )
    found.append(
        StagePlan(
            "train boosted",
            0,
            8,
            0,
            4 * n_pairs * 30 / 1e9,
            0.2,
            n_pairs * m.cpu_tree_pair / 1e6,
            n_pairs * 0.2 * 5.0 / 1e6 + 2 * parts * m.footer / 1e6,
            n_pairs * 0.2 * 60 / GIB,
        )
    )
    found.append(
        StagePlan(
            "compare, trends",
            14,
            11,
            22,
            12 * n_pairs * 60 / 1e9,
            0.0,
            n_evidence * m.cpu_evidence_pair / 1e6,
            3 * parts * m.footer / 1e6,
            worker_gib=held_gib,
        )
    )
    found.append(
        StagePlan(
            "uncertainty",
            6,
            5,
            18,
            n_pairs * m.pair / 1e9,
            0.0,
            n_evidence * m.cpu_errors_pair / 1e6,
            0.0,
            worker_gib=held_gib,
        )
    )
    for name, tasks, cpu, written in (
        ("coverage", 2 * parts, m.cpu_coverage, m.scored),
        ("apply", parts, m.cpu_apply, m.corrected),
    ):
        found.append(
            StagePlan(
                name,
                tasks,
                parts + 4,
                2 * tasks,
                rows * m.observation / 1e9,
                rows * written / 1e9,
                rows * cpu / 1e6 + each * tasks,
                0.0,
            )
        )
    found.append(
        StagePlan(
            "report",
            3 * parts + reference_parts + 11,
            24,
            6 * parts,
            rows * 20 / 1e9,
            0.0,
            rows * m.cpu_report / 1e6 + 3 * each * parts + REPORT_S,
            0.0,
        )
    )
    return found


def _survey(rows: float, m: Measured, prefix: str = "") -> Iterator[StagePlan]:
    """Ingest and dedupe of a survey."""
    chunks = max(1, round(rows / CHUNK_ROWS))
    parts = _partitions(rows, m)
    ranges = int(rows // KEYS_PER_RANGE) + 1
    held = min(chunks, m.repeated * rows / ranges)
    each = 2 * m.sync / 1e6
    yield StagePlan(
        f"{prefix}ingest",
        chunks + ranges + parts,
        parts + 4,
        3 * chunks + 2 * ranges + parts,
        # A range reads the keys that lie in it, and all of pieces with a key that is there twice.
        rows * (2 * m.fits + 8 + m.piece) / 1e9 + ranges * held * CHUNK_ROWS * 16 / 1e9,
        rows * (m.piece + 8 + m.observation) / 1e9,
        rows * m.cpu_ingest / 1e6
        + chunks * (parts * m.open_piece + (ranges - 1) * m.open_keys) / 1e6
        + each * (2 * chunks + parts),
        rows * m.fits / DIGEST_BYTES_PER_S,  # digests, of as many files at once as there are cores
    )
    yield StagePlan(
        f"{prefix}dedupe",
        parts,
        parts + 4,
        parts,
        rows * m.observation / 1e9,
        rows * (1 - REPEATS) * m.star / 1e9,
        rows * m.cpu_dedupe / 1e6 + _overlaps(parts, parts, m) + each * parts,
        0.0,
    )


def _partitions(rows: float, m: Measured) -> int:
    return max(12, round(rows / (ROWS_PER_PARTITION * m.fill)))


def _overlaps(tasks: int, parts: int, m: Measured) -> float:
    """Every task looks at every partition of the other side, to find those around its own."""
    return tasks * parts * m.overlap / 1e6


def wall_s(stages: Sequence[StagePlan], workers: int) -> float:
    """Wall seconds of all stages, one after the other."""
    return sum(s.cpu_s / min(workers, s.tasks or workers) + s.driver_s for s in stages)


def limits(stages: Sequence[StagePlan], rows: float, workers: int, m: Measured) -> list[str]:
    """What binds, the worst first: shares of the wall time and of memory in words."""
    serial = sum(stage.driver_s for stage in stages)
    chunks, parts = max(1, round(rows / CHUNK_ROWS)), _partitions(rows, m)
    ranges = int(rows // KEYS_PER_RANGE) + 1
    wall = wall_s(stages, workers)
    slowest = max(stages, key=lambda stage: stage.driver_s)
    syncs = sum(s.files + s.scratch_files for s in stages) * m.sync / 1e6 / workers
    driver, worker = (
        max(stages, key=lambda stage: getattr(stage, name)) for name in ("driver_gib", "worker_gib")
    )
    found = [
        (
            serial / wall,
            f"the driver alone: {serial:,.0f} s, most of it in {slowest.name} "
            f"({slowest.driver_s:,.0f} s)",
        ),
        (
            chunks * parts * m.open_piece / 1e6 / workers / wall,
            f"ingest opens {chunks * parts:,} pieces (chunks x partitions)",
        ),
        (
            chunks * ranges * m.open_keys / 1e6 / workers / wall,
            f"ingest looks into {chunks * ranges:,} runs of keys (chunks x ranges)",
        ),
        (
            3 * _overlaps(parts, parts, m) / workers / wall,
            f"{3 * parts * parts:,} comparisons of partitions (partitions squared)",
        ),
        (syncs / wall, f"fsync: {syncs:,.0f} s"),
        (
            driver.driver_gib / 8.0,
            f"{driver.name} needs {driver.driver_gib:.1f} GiB in the driver (of 8)",
        ),
        (
            worker.worker_gib / 8.0,
            f"{worker.name} needs {worker.worker_gib:.1f} GiB in a worker (of 8)",
        ),
    ]
    return [f"{share:.0%} {text}" for share, text in sorted(found, reverse=True)]


def scheduler_mib(workers: int, m: Measured) -> float:
    """Memory of the scheduler: tasks are handed out as others end, never all at once."""
    return m.scheduler_mib + IN_FLIGHT_PER_WORKER * workers * m.task / (1 << 20) + 0.5 * workers


def measured(entries: Sequence[Mapping[str, Any]]) -> Measured:
    """Replace what a ``bench.json`` holds, of its largest run.

    The CPU time of a row is taken from large runs only: in small ones workers mostly start.
    """
    known: dict[str, float] = {}
    for entry in sorted(entries, key=lambda entry: entry["rows"]):
        if entry["theirs"] is not None or entry["ours"]["state"] != "done":
            continue
        parts = [part for part in entry["ours"]["parts"] if part["name"] != "start"]
        cpu = 1e6 * sum(part["cpu_s"] for part in parts) / entry["rows"]
        size = 1e9 * entry.get("gb", 0.0) / entry["rows"]
        if entry["variant"] == "":
            names = {
                "ingest": ("cpu_ingest", "observation"),
                "apply": ("cpu_apply", "corrected"),
                "dedupe": ("cpu_dedupe", ""),
                "crossmatch": ("cpu_crossmatch", ""),
            }.get(entry["step"], ("", ""))
            large = entry["rows"] >= LARGE_ROWS
            known |= {names[0]: cpu} if names[0] and large else {}
            known |= {names[1]: size} if names[1] else {}
            if entry["step"] == "train":
                known["cpu_tree_pair"] = cpu * entry["rows"] / entry["pairs"]
    return replace(Measured(), **known)


def of_store(store: Path) -> Measured:
    """Take CPU seconds of rows and pairs from the last build of a store, that of LAMOST."""
    products, known = read_build(store / "current")["products"], costs(store)
    rows = {name: Manifest.load(store / "current" / name).rows for name in products}
    n_used = rows["lamost.evidence"].n_out

    def of(n: int, *names: str) -> float:
        return 1e6 * sum(known[products[name]]["cpu_s"] for name in names) / n

    n_rows = rows["lamost.observations"].n_in
    found = {
        "cpu_ingest": of(n_rows, "lamost.observations"),
        "cpu_dedupe": of(n_rows, "lamost.stars"),
        "cpu_reference": of(rows["reference"].n_out, "reference"),
        "cpu_crossmatch": of(rows["lamost.stars"].n_out, "lamost.pairs"),
        "cpu_tree_pair": of(n_used, *(name for name in products if ".model." in name)),
        "cpu_evidence_pair": of(n_used, "lamost.evidence", "lamost.comparison", "lamost.trends"),
        "cpu_errors_pair": of(n_used, "lamost.uncertainty"),
        "cpu_coverage": of(n_rows, "lamost.coverage"),
        "cpu_apply": of(n_rows, "lamost.corrected"),
        "pairs_per_row": n_used / n_rows,
    }
    if "report" in products:
        found["cpu_report"] = max(of(n_rows, "report") - 1e6 * REPORT_S / n_rows, 0.0)
    return replace(Measured(), **found)


def report(rows: float, workers: int, m: Measured) -> Iterator[str]:
    """A Markdown table and the limits."""
    stages = plan(rows, m)
    yield f"### {rows:,.0f} rows, {workers} workers"
    yield ""
    total = [0.0] * 7
    lines = []
    for s in stages:
        numbers = (s.tasks, s.files, s.scratch_files, s.read_gb, s.written_gb, s.cpu_s, s.driver_s)
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        lines.append((s.name, *_cells(numbers), f"{s.driver_gib:.2f}", f"{s.worker_gib:.2f}"))
    lines.append(("**all**", *_cells(total), "", ""))
    columns = "stage, >tasks, >files, >scratch files, >read GB, >written GB, >CPU-s, >driver s"
    yield from table(f"{columns}, >driver GiB, >worker GiB", lines)
    yield ""
    wall = wall_s(stages, workers)
    memory = scheduler_mib(workers, m)
    yield f"About {wall / 3600:,.2f} h; scheduler {memory:,.0f} MiB. What binds first:"
    yield ""
    yield from (f"- {line}" for line in limits(stages, rows, workers, m)[:4])
    yield ""


def _cells(numbers: Sequence[float]) -> list[str]:
    return [f"{n:,.0f}" if n >= 10 else f"{n:.1f}".removesuffix(".0") for n in numbers]


def main() -> None:
    """Print the plans."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.plan", description=__doc__)
    parser.add_argument("--rows", default="19e6,1e8,2e9", help="(%(default)s)")
    parser.add_argument("--workers", default="2,64", help="(%(default)s)")
    parser.add_argument("--bench", type=Path, help="a bench.json, instead of built-in figures")
    parser.add_argument("--store", type=Path, help="the same of the last build of a store")
    given = parser.parse_args()
    m = measured(json.loads(given.bench.read_text())) if given.bench else Measured()
    m = of_store(given.store) if given.store else m
    figures = ", ".join(f"{f.name} {getattr(m, f.name):.4g}" for f in fields(m))
    print(f"Measured: {figures}\n")
    for rows in given.rows.split(","):
        for workers in given.workers.split(","):
            print("\n".join(report(float(rows), int(workers), m)))


if __name__ == "__main__":
    main()
