"""What a small job costs, alone and beside two busy loops: ``python -m tests.bench.small``.

Runs ``jobs/real.toml`` (its tables: ``SOS_REAL_DATA``) from nothing and the boosted training of its
736 pairs, each a few times in turn, and prints the least CPU seconds of all processes. What others
do on the machine meanwhile lengthens the wall time, not these; where threads spin it does both.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.measure import measure, tail

SOS = Path(sys.executable).with_name("sos-dask")
JOB = Path("jobs/real.toml")


@contextmanager
def busy(n_loops: int) -> Iterator[None]:
    """Loops that do nothing, as long as a block runs."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_loops)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--loops", type=int, default=2)
    given = parser.parse_args()
    least: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        store, model, log = (Path(folder) / name for name in ("store", "model", "log"))
        commands = {
            f"rebuild {JOB}": (SOS, "rebuild", JOB, "--store", store),
            "train boosted": (SOS, "train", store / "current/pairs", "-m", "boosted", "-o", model),
        }
        for _ in range(given.times):
            for loops in (0, given.loops):
                for path in (store, model):
                    shutil.rmtree(path, ignore_errors=True)
                for name, command in commands.items():
                    with busy(loops):
                        used = measure(command, log)
                    if used.state != "done":
                        raise SystemExit(tail(log))
                    key = (name, loops)
                    least[key] = min(used.cpu_s, least.get(key, used.cpu_s))
                    print(f"{name}, {loops} loops: {used.cpu_s:.1f} CPU-s, {used.wall_s:.1f} s")
        for name in commands:
            alone, beside = least[name, 0], least[name, given.loops]
            print(f"{name}: {alone:.1f} CPU-s, beside {given.loops} busy loops {beside:.1f}: "
                  f"{beside / alone:.2f} times")  # fmt: skip


if __name__ == "__main__":
    main()
