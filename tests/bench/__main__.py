"""Command line of the benchmarks: ``python -m tests.bench --rows 2000000 --out DIR``."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from sos_dask.errors import ConfigError
from tests.bench.book import Book, machine, versions
from tests.bench.prepare import Place
from tests.bench.steps import BY_DEFAULT, PEERS, STEPS, Bench


def _chosen(text: str, known: tuple[str, ...]) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(known)}")
    return [name for name in known if name in names]


def main() -> int:
    """Run the steps; 1 where something failed or two programs disagree."""
    steps, peers = tuple(STEPS), tuple(PEERS)
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measures our steps and what one would use instead, on the same simulated sky.",
    )
    parser.add_argument("--rows", type=int, default=19_000_000, help="LAMOST rows (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of data and results")
    parser.add_argument(
        "--steps",
        type=lambda text: _chosen(text, steps),
        default=list(BY_DEFAULT),
        help=f"of {', '.join(steps)}; default all but scale",
    )
    parser.add_argument(
        "--peers",
        type=lambda text: _chosen(text, peers),
        default=list(peers),
        help=f"of {', '.join(peers)}; default all that are installed; '' for none",
    )
    parser.add_argument("--workers", type=int, default=2, help="worker processes (%(default)s)")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="of a peer (%(default)g)")
    parser.add_argument("--pairs", type=int, default=350_000, help="for training (%(default)s)")
    parser.add_argument("--scale-rows", type=int, default=100_000_000, help="(%(default)s)")
    given = parser.parse_args()
    place = Place(given.out.resolve(), given.rows, given.pairs, given.workers)
    place.out.mkdir(parents=True, exist_ok=True)
    try:
        book = Book(place.out)
    except ConfigError as error:
        parser.error(str(error))
    bench = Bench(place, book, given.limit_s, frozenset(given.peers), given.scale_rows)
    print(f"{given.rows:,} rows, {machine()}. {versions()}.", flush=True)
    for step in given.steps:
        began = time.monotonic()
        print(f"\n{step}:", flush=True)
        try:
            STEPS[step](bench)
        except subprocess.CalledProcessError as error:  # a preparation; it said why
            bench.failed.append(f"{step}: {' '.join(map(str, error.cmd[1:]))}")
        print(f"  ({time.monotonic() - began:.0f} s with preparation)", flush=True)
    print(f"\nResults: {place.out / 'bench.json'} and bench.md")
    for problem in bench.failed:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
