"""One command in its own process tree: its time, and the memory of all its processes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
_BESIDE = Path(sys.executable).with_name("sos-dask")
SOS = str(_BESIDE if _BESIDE.is_file() else shutil.which("sos-dask") or "sos-dask")
"""Our command."""
INTERVAL_S = 0.1
GIB = float(1 << 30)
_MARK = re.compile(r"(?P<step>[^:]+): (?P<done>\d+)/(?P<total>\d+)$")
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)


@dataclass(frozen=True)
class Part:
    """What one part of a command took, between the lines in which it says how far it is.

    Memory as sampled: ``driver_gib`` of the first process, ``worker_gib`` of the largest other one.
    """

    name: str
    tasks: int
    wall_s: float
    cpu_s: float
    rss_gib: float
    driver_gib: float
    worker_gib: float


@dataclass(frozen=True)
class Usage:
    """What a command took.

    Parameters
    ----------
    wall_s : float
    cpu_s : float
        User and system time of all processes of the tree, as the kernel counts it.
    rss_gib : float
        Largest sum of the resident memory (RSS) of all processes, sampled every `INTERVAL_S`; a
        page that several share counts in each.
    anon_gib : float
        The same without pages of files, which the kernel can drop at any time.
    process_gib : float
        Largest resident memory of a single process (its high-water mark).
    driver_gib, worker_gib : float
        The same of the first process, and of the largest other one; 0 where there is no other.
    moved_gb : float
        Sent over the network meanwhile, this machine's own included, by whatever program.
    other_cpu_s : float
        What the rest of the machine used meanwhile: where it is not small, wall times say little.
    tasks : int
        As the command told; 0 if it tells nothing.
    state : str
        ``done``, ``stopped`` (at the limit of time) or ``failed``.
    parts : list of Part
    """

    wall_s: float
    cpu_s: float
    rss_gib: float
    anon_gib: float = 0.0
    process_gib: float = 0.0
    driver_gib: float = 0.0
    worker_gib: float = 0.0
    moved_gb: float = 0.0
    other_cpu_s: float = 0.0
    tasks: int = 0
    state: str = "done"
    parts: tuple[Part, ...] = field(default=(), repr=False)


@dataclass
class _Sample:
    at: float
    cpu_s: float
    rss: int
    driver: int
    worker: int


class _Tree:
    """Samples a process and all that descend from it, in a thread."""

    def __init__(self, pid: int, limit_s: float | None) -> None:
        self.pid = pid
        self.limit_s = limit_s
        self.samples: list[_Sample] = []
        self.anon = self.driver = self.worker = 0
        self.stopped = False
        self._end = threading.Event()
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            with contextlib.suppress(psutil.Error):
                self._sample()
            if self.limit_s is not None and time.monotonic() - self._started > self.limit_s:
                self.stopped = True
                kill_tree(self.pid)
                return
            self._end.wait(INTERVAL_S)

    def _sample(self) -> None:
        root = psutil.Process(self.pid)
        rss = anon = driver = worker = 0
        cpu_s = 0.0
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error, OSError):
                now, without_files, peak = _memory(process)
                rss += now
                anon += without_files
                cpu_s += sum(process.cpu_times()[:4])  # with those of children that ended
                if process.pid == self.pid:
                    driver = now
                    self.driver = max(self.driver, peak)
                else:
                    worker = max(worker, now)
                    self.worker = max(self.worker, peak)
        self.anon = max(self.anon, anon)
        # Between the end of a process and its parent's notice, its time is nowhere.
        cpu_s = max(cpu_s, self.samples[-1].cpu_s if self.samples else 0.0)
        self.samples.append(_Sample(time.monotonic(), cpu_s, rss, driver, worker))


def _memory(process: psutil.Process) -> tuple[int, int, int]:
    """Resident bytes of a process: now, now without pages of files, and its high-water mark."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        rss = int(process.memory_info().rss)
        return rss, rss, rss
    values = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    now, anon, peak = (
        1024 * int(values.get(key, "0 kB").split()[0]) for key in ("VmRSS", "RssAnon", "VmHWM")
    )
    return now, anon, peak


def kill_tree(pid: int) -> None:
    """End a process that was started here, and all that descend from it."""
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def measure(command: Sequence[str | Path], log: Path, limit_s: float | None = None) -> Usage:
    """Run a command to its end and measure it.

    Parameters
    ----------
    command : sequence of str or Path
        Runs in the folder of the repository.
    log : Path
        Gets what it prints.
    limit_s : float, optional
        It is stopped after so long.

    Returns
    -------
    Usage
    """
    _adopt_orphans()
    os.sync()  # what was written before must not disturb
    log.parent.mkdir(parents=True, exist_ok=True)
    marks: list[tuple[float, str, int]] = []
    with log.open("w") as printed:
        print("$", *command, file=printed, flush=True)
        busy, sent = _machine_cpu_s(), _sent_bytes()
        start = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            stdout=printed,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        tree = _Tree(process.pid, limit_s)

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:  # ends when the last process of the tree is gone
                print(line, end="", file=printed, flush=True)
                if found := _MARK.match(line.strip()):
                    marks.append((time.monotonic(), found["step"], int(found["total"])))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            kill_tree(process.pid)
            raise
        end = time.monotonic()
        process.returncode = os.waitstatus_to_exitcode(status)
        tree.close()
        cpu_s = used.ru_utime + used.ru_stime + _reap_orphans(process.pid)
        reader.join(timeout=10)
        if process.stderr is not None:
            process.stderr.close()
    stopped = tree.stopped
    return Usage(
        wall_s=end - start,
        cpu_s=cpu_s,
        rss_gib=max([tree.driver, tree.worker, *(one.rss for one in tree.samples)]) / GIB,
        anon_gib=tree.anon / GIB,
        process_gib=max(tree.driver, tree.worker) / GIB,
        driver_gib=tree.driver / GIB,
        worker_gib=tree.worker / GIB,
        moved_gb=(_sent_bytes() - sent) / 1e9,
        other_cpu_s=max(_machine_cpu_s() - busy - cpu_s, 0.0),
        tasks=sum({step: total for _, step, total in marks}.values()),
        state="stopped" if stopped else "failed" if process.returncode else "done",
        parts=tuple(_parts(marks, tree.samples, start, end, cpu_s)),
    )


def interleaved(
    commands: Mapping[str, Sequence[str | Path]], times: int, log: Path, *made: Path
) -> dict[str, list[Usage]]:
    """Run commands in turn, each several times, so that all meet what else the machine does.

    Parameters
    ----------
    commands : mapping of str to sequence of str or Path
    times : int
    log : Path
    *made : Path
        What they make, removed before each round.

    Raises
    ------
    SystemExit
        One fails; with the end of what it printed.
    """
    found: dict[str, list[Usage]] = {name: [] for name in commands}
    for _ in range(times):
        for path in made:
            shutil.rmtree(path, ignore_errors=True)
        for name, command in commands.items():
            used = measure(command, log)
            if used.state != "done":
                raise SystemExit(tail(log))
            found[name].append(used)
    return found


def table(columns: str, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table of ``columns``, as "step, >rows": ``>`` aligns to the right."""
    names = columns.split(", ")
    yield f"| {' | '.join(name.removeprefix('>') for name in names)} |"
    yield f"|{'|'.join('---:' if name.startswith('>') else '---' for name in names)}|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def tail(log: Path, n_lines: int = 12) -> str:
    """Last lines that a command printed."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-n_lines:])


def _parts(
    marks: list[tuple[float, str, int]],
    samples: list[_Sample],
    start: float,
    end: float,
    cpu_s: float,
) -> list[Part]:
    """Split a run where it tells that another part begins; before that it starts."""
    if not marks:
        return []
    begins = [(start, "start", 0)]
    begins += [m for i, m in enumerate(marks) if i == 0 or m[1] != marks[i - 1][1]]
    ends = [at for at, _, _ in begins[1:]] + [end]
    found = []
    for number, ((first, name, tasks), last) in enumerate(zip(begins, ends, strict=True)):
        inside = [sample for sample in samples if first <= sample.at < last]
        before = _cpu_at(samples, first)
        after = cpu_s if number == len(begins) - 1 else _cpu_at(samples, last)
        found.append(
            Part(
                name,
                tasks,
                last - first,
                max(after - before, 0.0),
                max((sample.rss for sample in inside), default=0) / GIB,
                max((sample.driver for sample in inside), default=0) / GIB,
                max((sample.worker for sample in inside), default=0) / GIB,
            )
        )
    return found


def _cpu_at(samples: list[_Sample], at: float) -> float:
    """CPU seconds of the tree at a time, interpolated between samples."""
    earlier = [sample for sample in samples if sample.at <= at]
    later = [sample for sample in samples if sample.at > at]
    if not earlier or not later:
        return earlier[-1].cpu_s if earlier else 0.0
    one, other = earlier[-1], later[0]
    share = (at - one.at) / (other.at - one.at)
    return one.cpu_s + share * (other.cpu_s - one.cpu_s)


def _machine_cpu_s() -> float:
    times: Any = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _sent_bytes() -> int:
    return sum(one.bytes_sent for one in psutil.net_io_counters(pernic=True).values())


def _adopt_orphans() -> None:
    """Let processes whose parent died become children of this one: their time is counted, too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def _reap_orphans(session: int) -> float:
    """End what a command left behind, which is now a child of this process; its CPU seconds."""
    cpu_s = 0.0
    for child in psutil.Process().children():
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if os.getsid(child.pid) == session:
                kill_tree(child.pid)
                used = os.wait4(child.pid, 0)[2]
                cpu_s += used.ru_utime + used.ru_stime + _reap_orphans(session)
    return cpu_s
