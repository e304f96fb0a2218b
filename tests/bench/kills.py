"""Faults at random moments of rebuilds, most of them kills; all must end with the same bytes.

``python -m tests.bench.kills --out DIR`` prints a table of faults and outcomes; 1 where a run hung,
ended in an unknown way, or left other bytes than a run with two workers that nobody disturbs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sos_dask.simulate import SkySettings, simulate
from tests.apart import ROOT, Apart, apart
from tests.job import contents
from tests.slurm import Slurm, slurm

LIMIT_S = 900.0
STAGES = ("ingest", "dedupe", "reference", "crossmatch", "train", "apply")
_MAIN = [sys.executable, "-c", "from sos_dask.cli import main; main()"]
_ENDS = {
    0: "done", 8: "exit 8, named", 9: "exit 9, named", -signal.SIGKILL: "killed",
}  # fmt: skip
_NO_JUMP = 1_000_000
# Stands before the C library of a process: its clock is off by what the size of a file says.
_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *at) {
  static int (*real)(clockid_t, struct timespec *);
  struct stat file;
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(id, at);
  if (id == CLOCK_REALTIME && !stat(getenv("CLOCK_JUMP"), &file))
    at->tv_sec += file.st_size - 1000000;
  return code;
}
"""


@dataclass
class Trial:
    """One kind of fault: how often it struck, and how the runs ended."""

    name: str
    n_faults: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    words: set[str] = field(default_factory=set)
    same: bool = True

    @property
    def row(self) -> str:
        ends = ", ".join(f"{n} x {end}" for end, n in sorted(self.ends.items()))
        same = "equal" if self.same else "DIFFERENT"
        return f"| {self.name} | {self.n_faults} | {ends} | {self.longest_s:.0f} | {same} |"

    @property
    def failed(self) -> bool:
        return not self.same or bool(self.ends.keys() - set(_ENDS.values()))


@dataclass
class Place:
    """A job on a small sky, and the bytes of an undisturbed run."""

    out: Path
    rows: int
    random: random.Random
    expected: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> None:
        simulate(SkySettings(n_lamost=self.rows), self.out / "smoke-sky")
        text = (ROOT / "jobs/smoke.toml").read_text().replace('"../smoke-sky"', '"smoke-sky"')
        (self.out / "job.toml").write_text(f"{text}\n[space]\ncheck = false\n")
        code, _ = self.run(self.out / "undisturbed", "-w", "2")
        assert code == 0, (self.out / "log").read_text()[-2000:]
        self.expected = contents(self.out / "undisturbed/artifacts")

    def begin(self, store: Path, *options: str, log: str = "log") -> subprocess.Popen:
        command = [*_MAIN, "rebuild", str(self.out / "job.toml"), "--store", str(store), *options]
        env = os.environ | self.env
        with (self.out / log).open("w") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, cwd=self.out, env=env)

    def run(
        self,
        store: Path,
        *options: str,
        strike: Callable[[subprocess.Popen], object] | None = None,
    ) -> tuple[int, str]:
        """Run to the end; exit code and what it printed. ``strike`` is called meanwhile."""
        process, deadline = self.begin(store, *options), time.monotonic() + LIMIT_S
        while process.poll() is None and time.monotonic() < deadline:
            if strike is not None:
                strike(process)
            time.sleep(0.1)
        if process.poll() is None:
            process.kill()
            process.wait()
            return -1, (self.out / "log").read_text()
        return process.returncode, (self.out / "log").read_text()

    def book(self, trial: Trial, store: Path, ran: tuple[int, str], began: float) -> bool:
        """Note how a run ended; True where it is done, and its store compared."""
        code, printed = ran
        end = _ENDS.get(code, f"exit {code}")
        if code in (8, 9) and "\nerror: " not in f"\n{printed}":
            end = f"exit {code} without a word"
        trial.ends[end] += 1
        trial.longest_s = max(trial.longest_s, time.monotonic() - began)
        lines = re.findall(r"^(?:error: .*|worker .* given up)$", printed, re.MULTILINE)
        trial.words.update(re.sub(r"\d[\d.:]{3,}", "...", line) for line in lines)
        if end not in _ENDS.values():
            print(printed[-3000:], flush=True)
        if code == 0:
            trial.same &= contents(store / "artifacts") == self.expected
            shutil.rmtree(store)
        return code == 0


def now_and_then(place: Place, mean_s: float, strike: Callable[[], bool], n: int, trial: Trial):
    """Strike at random moments, until there were n faults."""
    due = time.monotonic() + place.random.expovariate(1 / mean_s)

    def maybe(_: subprocess.Popen) -> None:
        nonlocal due
        if time.monotonic() > due and trial.n_faults < n:
            trial.n_faults += strike()
            due = time.monotonic() + place.random.expovariate(1 / mean_s)

    return maybe


def of_slurm(place: Place, n: int, trial: Trial) -> None:
    """Cancel random worker jobs, all in one rebuild where it lasts long enough."""
    with slurm(place.out / "slurm") as batch, contextlib.ExitStack() as stack:
        for name in ("SLURM_CONF", "PATH"):
            before = os.environ.get(name, "")
            stack.callback(os.environ.__setitem__, name, before)
            os.environ[name] = batch.env[name]
        given = {"kind": "slurm", "minimum": 2, "memory": "2GiB", "interface": "lo"}
        given["log_directory"] = str(place.out / "jobs")
        options = [word for x, y in given.items() for word in ("--cluster", f"{x}={y}")]
        while trial.n_faults < n:
            store, began = place.out / "store", time.monotonic()
            strike = now_and_then(place, 4.0, lambda: _cancel(place, batch), n, trial)
            place.book(trial, store, place.run(store, *options, strike=strike), began)


def _cancel(place: Place, batch: Slurm) -> bool:
    if running := batch.running():
        batch.ask("scancel", place.random.choice(running))
    return bool(running)


def _worker_of(nanny: subprocess.Popen) -> psutil.Process | None:
    """The process that a nanny watches."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(nanny.pid).children():
            if "resource_tracker" not in " ".join(child.cmdline()):
                return child
    return None


@contextlib.contextmanager
def two_workers(place: Place) -> Iterator[Apart]:
    folder = place.out / "dask"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with apart(folder) as made:
        for _ in range(2):
            made.worker("--memory-limit", "2GiB")
        yield made


def of_worker(place: Place, n: int, trial: Trial) -> None:
    """Kill random workers; their nannies start them anew."""
    with two_workers(place) as made:

        def kill() -> bool:
            worker = _worker_of(place.random.choice(made.workers))
            if worker is not None:
                worker.kill()
            return worker is not None

        while trial.n_faults < n:
            store, began = place.out / "store", time.monotonic()
            strike = now_and_then(place, 4.0, kill, n, trial)
            ran = place.run(store, "--scheduler", str(made.file), strike=strike)
            place.book(trial, store, ran, began)


def of_scheduler(place: Place, n: int, trial: Trial) -> None:
    """Kill the scheduler, and run again on another one."""
    store, done = place.out / "store", False
    while trial.n_faults < n or not done:
        with two_workers(place) as made:
            began, before = time.monotonic(), trial.n_faults

            def kill(made: Apart = made, before: int = before) -> bool:
                made.scheduler.kill()
                return True

            strike = now_and_then(place, 12.0, kill, min(n, before + 1), trial)
            ran = place.run(store, "--scheduler", str(made.file), strike=strike)
            done = place.book(trial, store, ran, began)


def of_driver(place: Place, n: int, trial: Trial) -> None:
    """Kill the driver, and run again."""
    store, done = place.out / "store", False
    while trial.n_faults < n or not done:
        began, due = time.monotonic(), time.monotonic() + place.random.uniform(1, 20)

        def kill(process: subprocess.Popen, due: float = due) -> None:
            if time.monotonic() > due and trial.n_faults < n and process.poll() is None:
                process.kill()
                process.wait()
                trial.n_faults += 1

        done = place.book(trial, store, place.run(store, "-w", "2", strike=kill), began)


def of_stop(place: Place, n: int, trial: Trial) -> None:
    """Freeze a worker in each stage."""
    store, left = place.out / "store", list(STAGES)
    with two_workers(place) as made:

        def stop(_: subprocess.Popen) -> None:
            there = {path.parents[1].name for path in (store / "artifacts").glob("*/*/.work")}
            for stage in there.intersection(left):
                worker = _worker_of(place.random.choice(made.workers))
                if worker is not None:
                    worker.suspend()
                    left.remove(stage)
                    trial.n_faults += 1

        began = time.monotonic()
        ran = place.run(store, "--scheduler", str(made.file), strike=stop)
        place.book(trial, store, ran, began)


def of_memory(place: Place, n: int, trial: Trial) -> None:
    """Give workers too little memory: refused, or killed again and again."""
    store, began = place.out / "store", time.monotonic()
    trial.n_faults = 1
    place.book(trial, store, place.run(store, "-w", "2", "--memory-limit", "180MiB"), began)
    place.book(trial, store, place.run(store, "-w", "2", "--memory-limit", "2GiB"), began)


def of_disk(place: Place, n: int, trial: Trial) -> None:
    """Fill the disk again and again, with a little more room each time."""
    disk = place.out / "disk"
    disk.mkdir()
    needed = sum(path.stat().st_size for path in (place.out / "undisturbed").rglob("*.*"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    try:
        for share in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 4.0):
            size = f"remount,size={int(share * needed)}"
            subprocess.run(["mount", "-o", size, disk], check=True)
            began = time.monotonic()
            done = place.book(trial, disk / "store", place.run(disk / "store", "-w", "2"), began)
            trial.n_faults += not done
    finally:
        subprocess.run(["umount", disk], check=True)


def of_clock(place: Place, n: int, trial: Trial) -> None:
    """Put the clock of driver and workers hours forward and back while they run."""
    library, file = place.out / "clock.so", place.out / "jump"
    compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(compiler, input=_CLOCK, text=True, check=True)
    place.env = {"LD_PRELOAD": str(library), "CLOCK_JUMP": str(file)}

    def jump() -> bool:
        file.touch()
        os.truncate(file, _NO_JUMP + place.random.randint(-36_000, 36_000))
        return True

    while trial.n_faults < n:
        store, began = place.out / "store", time.monotonic()
        strike = now_and_then(place, 2.0, jump, n, trial)
        place.book(trial, store, place.run(store, "-w", "2", strike=strike), began)
    show = [sys.executable, "-c", "import time; print(time.time())"]
    shown = subprocess.check_output(show, env=os.environ | place.env)
    assert abs(float(shown) - time.time() + _NO_JUMP - file.stat().st_size) < 5
    place.env = {}


def of_two(place: Place, n: int, trial: Trial) -> None:
    """Run two rebuilds of one store at once, without its lock."""
    for _ in range(max(n // 5, 1)):
        store, began = place.out / "store", time.monotonic()
        other = place.begin(store, "-w", "1", "--no-lock", log="other")
        ran = place.run(store, "-w", "1", "--no-lock")
        code = other.wait(LIMIT_S)
        trial.ends[_ENDS.get(code, f"exit {code}")] += 1
        trial.n_faults += 1
        place.book(trial, store, ran, began)


TRIALS: dict[str, tuple[str, Callable[[Place, int, Trial], None]]] = {
    "slurm": ("`scancel` of a worker's job", of_slurm),
    "worker": ("SIGKILL of a worker", of_worker),
    "scheduler": ("SIGKILL of the scheduler; run again", of_scheduler),
    "driver": ("SIGKILL of the driver; run again", of_driver),
    "stop": ("SIGSTOP of a worker in each stage", of_stop),
    "memory": ("workers of 180 MiB; run again with 2 GiB", of_memory),
    "disk": ("the disk is full; run again with more room", of_disk),
    "clock": ("the clock jumps up to 10 hours", of_clock),
    "two": ("two rebuilds at once, `--no-lock`", of_two),
}


def main() -> int:
    """Run the trials; 1 where one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kills", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="new folder of all that is made")
    parser.add_argument("--rows", type=int, default=20_000, help="LAMOST rows (%(default)s)")
    parser.add_argument("--faults", type=int, default=20, help="of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (%(default)s)")
    parser.add_argument("--trials", default=",".join(TRIALS), help="default all: %(default)s")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    place = Place(given.out.resolve(), given.rows, random.Random(given.seed))
    began = time.monotonic()
    place.prepare()
    print(f"{given.rows:,} rows; undisturbed run: {time.monotonic() - began:.0f} s", flush=True)
    print("| fault | faults | runs ended | longest run, s | bytes |\n|---|---|---|---|---|")
    failed = False
    for name in given.trials.split(","):
        title, strike = TRIALS[name]
        trial = Trial(title)
        strike(place, given.faults, trial)
        print(trial.row, flush=True)
        for word in sorted(trial.words):
            print(f"    {word}", file=sys.stderr, flush=True)
        failed |= trial.failed
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
