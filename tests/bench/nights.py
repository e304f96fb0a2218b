"""Rebuilds night after night, as a scheduler runs them: ``python -m tests.bench.nights``.

A small sky. Each night but some appends rows around one place to the target's file; one night the
file is broken (a fifth of its rows is missing), one night a reference survey is biased; the gate
must stop both. After each night ``current`` is verified and old builds are removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

from sos_dask.simulate import SkySettings, simulate
from sos_dask.storage.store import outputs_of, verify
from tests.bench.measure import table
from tests.job import JOB

SOS = (sys.executable, "-c", "from sos_dask.cli import main; main()")
APPENDED, SAME, BROKEN, BIASED = "appended", "same", "broken", "biased"
_BIAS_K = 150.0


@dataclass
class Night:
    """What a night brought, and what the rebuild made of it."""

    number: int
    kind: str
    rows: int
    code: int = 0
    outcome: str = ""
    seconds: float = 0.0
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: int = 0
    mib: float = 0.0
    builds: int = 0
    why: str = ""


class Sky:
    """The files of a sky, of which nights see more and more rows of the target."""

    def __init__(self, folder: Path, rows: int, nights: int, share: float) -> None:
        half = rows // 2
        simulate(SkySettings(n_lamost=rows, n_apogee=half, n_galah=half), folder / "whole")
        self.folder, self.whole = folder, folder / "whole"
        for name in ("apogee", "galah"):
            shutil.copy(self.whole / f"{name}.fits", folder)
        with fits.open(self.whole / "lamost.fits") as file:
            self.target = np.asarray(file[1].data)
        place = np.stack([self.target[name] for name in ("ra", "dec")])
        rng, late = np.random.default_rng(0), np.zeros(rows, dtype=np.int64)
        for night in range(1, nights + 1):  # each sees the next rows around a place
            left = np.flatnonzero(late == 0)
            first = place[:, rng.choice(left)]
            apart = np.cos(np.radians(first[1])) * (place[0, left] - first[0])
            near = np.argsort(np.hypot(apart, place[1, left] - first[1]))
            late[left[near[: int(share * rows)]]] = night
        self.target = self.target[np.argsort(late, kind="stable")]
        self.until = np.searchsorted(np.sort(late), np.arange(nights + 1), side="right")

    def write(self, n_rows: int) -> None:
        """Write so many rows of the target."""
        fits.writeto(self.folder / "lamost.fits", self.target[:n_rows], overwrite=True)

    def bias(self, kelvin: float) -> None:
        """Write APOGEE with other effective temperatures."""
        with fits.open(self.whole / "apogee.fits") as file:
            file[1].data["TEFF"] += kelvin
            file.writeto(self.folder / "apogee.fits", overwrite=True)

    def restore(self) -> None:
        """Write APOGEE as it is."""
        shutil.copy(self.whole / "apogee.fits", self.folder)


def command_line(*arguments: object) -> tuple[int, Any]:
    """Run the command line; exit code and JSON."""
    ran = subprocess.run([*SOS, *map(str, arguments), "--json"], capture_output=True, text=True)
    return ran.returncode, json.loads(ran.stdout) if ran.stdout else {"message": ran.stderr}


def kinds(nights: int) -> list[str]:
    """What each night brings."""
    found = [SAME if number % 4 == 3 else APPENDED for number in range(nights)]
    found[nights // 3], found[2 * nights // 3] = BROKEN, BIASED
    return found


def run(
    folder: Path, rows: int, nights: int, rows_per_partition: int, workers: int = 0, keep: int = 3,
    sos: Callable[..., tuple[int, Any]] = command_line,
) -> Iterator[Night]:  # fmt: skip
    """Run a rebuild every night."""
    plan = kinds(nights)
    sky = Sky(folder, rows, plan.count(APPENDED), 0.01)
    text = JOB.format(sky=folder).replace("= 1500", f"= {rows_per_partition}")
    text = text.replace(
        "[report]", 'validation = "holdout"\n[compare]\nn_bootstrap = 100\n[report]'
    )
    job, store = folder / "job.toml", folder / "store"
    job.write_text(text)
    seen = 0
    for number, kind in enumerate(plan):
        seen += kind == APPENDED
        n_rows = int(sky.until[seen])
        if kind in (APPENDED, BROKEN):
            sky.write(4 * n_rows // 5 if kind == BROKEN else n_rows)
        elif kind == BIASED:
            sky.bias(_BIAS_K)
        night, began = Night(number, kind, n_rows), time.monotonic()
        night.code, made = sos("rebuild", job, "--workers", workers)
        night.seconds = time.monotonic() - began
        night.outcome = made.get("outcome", "failed")
        night.why = "; ".join(made.get("reasons", [])) or made.get("message", "")
        stages = made.get("stages", {}).items()
        night.parts = {name: one["parts"] for name, one in stages if one["parts"]}
        if kind == BROKEN:
            sky.write(n_rows)
        sky.restore()
        night.problems = sum(len(verify(path)) for path in outputs_of(store))
        sos("gc", "--store", store, "--keep", keep, "--yes")
        _, told = sos("status", "--store", store)
        night.mib, night.builds = told["bytes"] / 2**20, len(told["builds"])
        yield night


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--nights", type=int, default=24)
    parser.add_argument("--rows-per-partition", type=int, default=400)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        sizes = given.rows, given.nights, given.rows_per_partition, given.workers
        for night in run(Path(folder), *sizes):
            print(night, file=sys.stderr, flush=True)
            total = {name: one["run"] + one["taken"] for name, one in night.parts.items()}
            redone = [
                f"{night.parts[name]['run']} of {total[name]}" if name in total else "-"
                for name in ("lamost.observations", "lamost.stars", "lamost.pairs")
            ]
            about = night.number + 1, night.kind, f"{night.rows:,}", night.code, night.outcome
            sizes_of = f"{night.seconds:.1f}", night.problems, f"{night.mib:.0f}", night.builds
            lines.append((*map(str, about), *redone, *map(str, sizes_of), night.why[:90]))
    columns = "night, kind, >rows, >exit, outcome, >ingest, >dedupe, >crossmatch, >s, >problems"
    print("\n".join(table(f"{columns}, >MiB, >builds, why", lines)))


if __name__ == "__main__":
    main()
