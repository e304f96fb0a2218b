"""An apply by a job array, of which one shard is cancelled: ``python -m tests.bench.arrays``.

A store with a build (``--store``, or that of a simulated sky of ``--rows``) gives the inputs of its
``lamost.corrected``. ``jobs/apply-array.sbatch`` makes it again in shards, over SLURM on loopback;
one of them gets ``scancel`` once it has made a partition. Only its partitions must be missing, and
only it is submitted again. Manifest and SHA-256 of every file must then be those of one ``sos-dask
apply`` in one process, and those in the build.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from sos_dask.stages.base import by_pixel
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.store import read_build
from tests.apart import ROOT
from tests.bench.measure import SOS, Usage, measure, table, tail
from tests.job import DEFAULT_PARTITIONS, contents, methods, write_job
from tests.slurm import Slurm, array_script, slurm

NAME = "lamost.corrected"


def ran(out: Path, *words: object) -> Usage:
    """Measure a command of ours that ends well."""
    used = measure([SOS, *map(str, words)], out / "log")
    if used.state != "done":
        raise SystemExit(tail(out / "log"))
    print(f"{words[0]}: {used.wall_s:.1f} s, {used.cpu_s:.1f} CPU-s; the rest of the machine "
          f"{used.other_cpu_s:.0f} CPU-s", flush=True)  # fmt: skip
    return used


def inputs(current: Path) -> tuple[list[str], Catalog]:
    """Arguments of the apply that made ``lamost.corrected``, and the catalog that it corrects."""
    names = {made: name for name, made in read_build(current)["products"].items()}
    recipe = Manifest.load(current / NAME).recipe
    used = {role: str(current / names[made]) for role, made in recipe.inputs.items()}
    more = ["--errors", used["errors"], "--coverage", used["coverage"]]
    words = [
        used["model"],
        used["observations"],
        *more,
        "--fallback",
        recipe.params["settings"]["fallback"],
    ]
    return words, Catalog.open(used["observations"])


class Array:
    """The shards of an output, and what its processes have used."""

    def __init__(self, batch: Slurm, out: Path, catalog: Catalog, n: int) -> None:
        self.batch, self.out, self.n = batch, out, n
        self.keys = list(by_pixel(catalog.pixels))
        self.cpu_s: dict[int, float] = {}

    def left(self) -> dict[int, int]:
        """Partitions that are missing, of each shard that lacks some."""
        done = {path.stem for path in (self.out / ".work/corrected").glob("*.json")}
        left = {shard: set(self.keys[shard - 1 :: self.n]) - done for shard in range(1, self.n + 1)}
        return {shard: len(keys) for shard, keys in left.items() if keys}

    def look(self) -> None:
        """Note the CPU time of all processes that write into the output."""
        for process in psutil.process_iter(["cmdline"]):
            with suppress(psutil.Error):
                if "apply" in (words := process.info["cmdline"] or []) and str(self.out) in words:
                    self.cpu_s[process.pid] = sum(process.cpu_times()[:2])

    def finish(self, number: str, victim: int | None = None) -> dict[str, str]:
        """Wait for an array; a victim is cancelled once it has made some of its partitions."""
        whole = len(self.keys[victim - 1 :: self.n]) if victim else 0
        while self.batch.ask("squeue", "-h", "-j", number):
            self.look()
            if victim and 0 < self.left().get(victim, 0) < whole:
                self.batch.ask("scancel", f"{number}_{victim}")
                print(f"scancel of shard {victim}: {self.left()[victim]} of its {whole} partitions "
                      "are missing", flush=True)  # fmt: skip
                victim = None
            time.sleep(0.05)
        return self.batch.finish(number)


def main() -> int:
    """Command line; 1 where the bytes differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.arrays", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="new folder of all that is made")
    parser.add_argument("--rows", type=int, default=19_000_000, help="LAMOST rows (%(default)s)")
    parser.add_argument("--store", type=Path, help="with a build of a job with LAMOST")
    parser.add_argument("--shards", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the cancelled shard (%(default)s)")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    out, store = given.out.resolve(), given.store
    if store is None:
        ran(out, "simulate", "--rows", given.rows, "-o", out / "sky")
        trained = methods("polynomial", "boosted")
        ran(out, "rebuild", write_job(out, out / "sky", DEFAULT_PARTITIONS, trained), "-w", 2)
        store = out / "store"
    current = (store / "current").resolve()
    words, catalog = inputs(current)
    victim = random.Random(given.seed).randint(1, given.shards)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ |= {"PATH": path, "PYTHONPATH": str(ROOT)}
    with slurm(out / "slurm") as batch:
        array = Array(batch, out / "array" / NAME, catalog, given.shards)
        job = [array_script(out, given.shards), *words[:2], array.out, *words[2:]]
        began = time.monotonic()
        print(array.finish(batch.submit(*job, cwd=out), victim))
        between = time.monotonic()
        assert list(array.left()) == [victim] and not (array.out / "manifest.json").exists()
        print(f"missing: {array.left()} of {len(array.keys)} partitions; sbatch --array={victim}")
        print(array.finish(batch.submit(f"--array={victim}", *job, cwd=out)), flush=True)
        walls = between - began, time.monotonic() - between
    one = ran(out, "apply", *words, "-o", out / "whole" / NAME, "-w", 0)
    made, *others = map(contents, (array.out, out / "whole" / NAME, current / NAME))
    same = others == [made, made]
    cpu = f"{sum(array.cpu_s.values()):.1f}"
    rows = [("array of shards, one cancelled", f"{walls[0]:.1f}", cpu),
            ("the cancelled shard again", f"{walls[1]:.1f}", "(in the row above)"),
            ("one process", f"{one.wall_s:.1f}", f"{one.cpu_s:.1f}")]  # fmt: skip
    print("\n".join(table(f"apply of {catalog.n_rows:,} rows, >wall s, >CPU s", rows)))
    print(f"{len(made)} files: {'equal' if same else 'DIFFERENT'}")
    return int(not same)


if __name__ == "__main__":
    raise SystemExit(main())
