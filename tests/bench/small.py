"""What a small job costs, alone and beside two busy loops: ``python -m tests.bench.small``.

Runs ``jobs/real.toml`` (its tables: ``SOS_REAL_DATA``) from nothing and the boosted training of its
736 pairs, each a few times in turn, and prints the least CPU seconds of all processes. What others
do on the machine meanwhile lengthens the wall time, not these; where threads spin it does both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.measure import SOS, interleaved, table

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
    least: dict[int, dict[str, float]] = {0: {}, given.loops: {}}
    with tempfile.TemporaryDirectory() as folder:
        store, model, log = (Path(folder) / name for name in ("store", "model", "log"))
        commands = {
            f"rebuild {JOB}": (SOS, "rebuild", JOB, "--store", store),
            "train boosted": (
                SOS,
                "train",
                store / "current/lamost.pairs",
                "-m",
                "boosted",
                "-o",
                model,
            ),
        }
        for _ in range(given.times):
            for loops, found in least.items():
                with busy(loops):
                    for name, (used,) in interleaved(commands, 1, log, store, model).items():
                        found[name] = min(used.cpu_s, found.get(name, used.cpu_s))
    alone, beside = least.values()
    rows = [
        (name, f"{alone[name]:.1f}", f"{beside[name]:.1f}", f"{beside[name] / alone[name]:.2f}")
        for name in commands
    ]
    columns = f"command, >CPU-s alone, >beside {given.loops} busy loops, >times"
    print("\n".join(table(columns, rows)))


if __name__ == "__main__":
    main()
