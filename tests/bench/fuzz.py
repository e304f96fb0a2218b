"""Input by chance: mutated survey files and settings, each given to the command that reads it.

``python -m tests.bench.fuzz --n 500 --seed 0`` prints how often each exit code came up for each
format, and fails where one is not of the documented kind, a process died, or a limit was passed.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import multiprocessing
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import MaskedColumn, Table

from sos_dask.cli import main

KINDS = (
    "fits", "fits.gz", "vot", "binary.vot", "csv", "csv.gz", "ecsv", "parquet",
    "survey.toml", "job.toml",
)  # fmt: skip
CODES = (0, 2, 3, 4, 5, 6, 7, 8, 9)
MOST_S, MOST_BYTES = 30.0, 1 << 30
_NUMBERS = (
    b"0", b"-1", b"1e308", b"-1e999", b"nan", b"inf", b"999999999999", b"9223372036854775808",
    b"1" * 400, b"", b"\0", b"'", b'"', b"[[[", b"4294967296", b"1.5D+03", b"--", b"\xff",
)  # fmt: skip
_SURVEY = """
format = 1
name = "mutant"
title = "Mutant"
position_epoch = 2016.0
missing = [-9999]
missing_text = ["--"]

[columns]
obs_id = { source = "obs_id" }
ra = { source = "ra" }
dec = { source = "dec" }
teff = { source = ["teff", "TEFF_K"], missing = [-1.5], unit = "K" }
logg = { source = "logg" }
feh = { source = "feh" }
gaia_dr3_source_id = { source = "gaia" }

[extra]
class = { source = "name", dtype = "string" }
flag = { source = "flag", dtype = "int64" }

[cuts.snr]
bit = 0
column = "snr"
min = 20.0
null_passes = true
"""
_JOB = """
format = 1
name = "mutant"
store = "store"
target_name = "mutant"
seed = 3

[variables]
FILES = "{folder}"

[target]
survey = "{folder}/survey.toml"
files = ["${{FILES}}/whole.csv"]

[reference.apogee]
survey = "{folder}/survey.toml"
files = ["${{FILES}}/whole.vot"]
override = {{ cuts = {{ snr = {{ min = 30 }} }} }}

[reference.galah]
survey = "{folder}/survey.toml"
files = ["${{FILES}}/whole.parquet"]

[ingest]
rows_per_partition = 1500

[train]
methods = ["polynomial"]

[report]
enabled = false
"""


def write_whole(folder: Path, n: int = 60) -> None:
    """Write one undamaged file of each kind: ``whole.<kind>``, ``survey.toml`` and a job."""
    rng = np.random.default_rng(0)
    table = Table(
        {
            "obs_id": rng.permutation(n) + 1,
            "ra": rng.uniform(30, 60, n),
            "dec": rng.uniform(10, 30, n),
            "teff": MaskedColumn(
                rng.uniform(4000, 7000, n).astype("f4"), mask=np.arange(n) % 7 == 0
            ),
            "logg": rng.uniform(1, 5, n).astype("f4"),
            "feh": rng.uniform(-2, 0.4, n).astype("f4"),
            "gaia": MaskedColumn(rng.integers(1, 2**62, n), mask=np.arange(n) % 5 == 0),
            "snr": rng.uniform(5, 90, n),
            "flag": np.arange(n) % 2,
            "name": [f"star {i}" for i in range(n)],
        }
    )
    for name, unit in (("ra", "deg"), ("dec", "deg"), ("teff", "K")):
        table[name].unit = unit
    for kind, format_name in (("vot", "tabledata"), ("binary.vot", "binary2")):
        table.write(folder / f"whole.{kind}", format="votable", tabledata_format=format_name)
    for kind, format_name in (("csv", "ascii.csv"), ("ecsv", "ascii.ecsv"), ("parquet", "parquet")):
        table.write(folder / f"whole.{kind}", format=format_name)
    fits.table_to_hdu(table).writeto(folder / "whole.fits")
    for kind in ("fits", "csv"):
        (folder / f"whole.{kind}.gz").write_bytes(
            gzip.compress((folder / f"whole.{kind}").read_bytes())
        )
    (folder / "survey.toml").write_text(_SURVEY)
    shutil.copy(folder / "survey.toml", folder / "whole.survey.toml")
    (folder / "whole.job.toml").write_text(_JOB.format(folder=folder))


def mutated(content: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """Damage a file in one to three places."""
    inside = kind.endswith(".gz") and rng.random() < 0.6
    if inside:
        content, kind = gzip.decompress(content), kind.removesuffix(".gz")
    for _ in range(rng.choice((1, 1, 2, 3))):
        lines = b"\n" in content[:2000] and kind not in ("parquet", "fits")
        ways = [_bytes, _block]
        ways += [_line, _number, _number, _number] if lines else []
        ways += [_card, _card] if kind == "fits" else []
        ways += [_footer, _footer] if kind == "parquet" else []
        content = ways[rng.integers(len(ways))](content, rng)
    return gzip.compress(content) if inside else content


def _bytes(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(0, max(len(changed), 1), rng.choice((1, 1, 2, 9))):
        if changed:
            changed[place] = rng.choice(
                (changed[place] ^ (1 << rng.integers(8)), rng.integers(256))
            )
    return bytes(changed)


def _parts(content: bytes, rng: np.random.Generator, n: int) -> list[bytes]:
    bounds = [0, *sorted(rng.integers(0, len(content) + 1, n - 1).tolist()), len(content)]
    return [content[low:high] for low, high in pairwise(bounds)]


def _block(content: bytes, rng: np.random.Generator) -> bytes:
    if rng.random() < 0.5:  # few bytes
        start = int(rng.integers(len(content) + 1))
        stop = start + int(rng.integers(1, 200))
        a, b, c, d = content[:start], content[start:stop], b"", content[stop:]
    else:
        a, b, c, d = _parts(content, rng, 4)
    return (a, a + c + b + d, a + b + b + c + d, a + d, a + rng.bytes(len(b)) + c + d)[
        rng.integers(5)
    ]


def _line(content: bytes, rng: np.random.Generator) -> bytes:
    lines = content.split(b"\n")
    i, j = rng.integers(0, len(lines), 2)
    way = rng.integers(5)
    if way == 0:
        lines[i], lines[j] = lines[j], lines[i]
    elif way == 1:
        lines.insert(j, lines[i])
    elif way == 2:
        del lines[i]
    elif way == 3:
        lines[i] = lines[i] * int(rng.choice((2, 1000)))
    else:
        lines[i] = lines[i][: len(lines[i]) // 2]
    return b"\n".join(lines)


def _number(content: bytes, rng: np.random.Generator) -> bytes:
    places = list(re.finditer(rb"[A-Za-z_]+|[-+.0-9e]+", content))
    if not places:
        return content
    place = places[rng.integers(len(places))]
    new = rng.choice(np.array([*_NUMBERS, places[rng.integers(len(places))][0]], dtype=object))
    return content[: place.start()] + new + content[place.end() :]


def _card(content: bytes, rng: np.random.Generator) -> bytes:
    """Another value in a header card of FITS, or another keyword."""
    cards = [i for i in range(0, min(len(content), 12000), 80) if content[i + 8 : i + 10] == b"= "]
    if not cards:
        return content
    start = cards[rng.integers(len(cards))]
    value = rng.choice(np.array([*_NUMBERS, b"'1PE(3)'", b"'1000000000D'", b"T", b"'0A'"], object))
    card = content[start : start + 10] + value[:60].rjust(20)
    if rng.random() < 0.2:
        card = content[cards[rng.integers(len(cards))] :][:8] + content[start + 8 : start + 80]
    return content[:start] + card.ljust(80)[:80] + content[start + 80 :]


def _footer(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes of the footer of Parquet, among them its length."""
    n = int.from_bytes(content[-8:-4], "little") + 8
    n = n if 8 < n <= len(content) else min(len(content), 500)
    return content[:-n] + _bytes(content[-n:], rng)


@dataclass(frozen=True)
class Tried:
    """One mutated file and how its command ended; ``error`` is the last line it wrote."""

    number: int
    kind: str
    code: int
    seconds: float
    peak_bytes: int
    error: str

    @property
    def bad(self) -> bool:
        """Tell whether this is not an end that a bad file may have."""
        return self.code not in CODES or self.seconds > MOST_S or self.peak_bytes > MOST_BYTES


def attempts(folder: Path, seed: int, first: int, n: int) -> Iterator[Tried]:
    """Mutate, run and report files ``first`` to ``first + n``; seed and number decide each."""
    for number in range(first, first + n):
        rng = np.random.default_rng((seed, number))
        kind = KINDS[number % len(KINDS)]
        path = folder / f"mutant-{seed}-{number}.{kind}"
        path.write_bytes(mutated((folder / f"whole.{kind}").read_bytes(), kind, rng))
        out = folder / f"out-{seed}-{number}"
        command = ["ingest", str(folder / "survey.toml"), str(path), "-o", str(out)]
        if kind == "survey.toml":
            command[1:3] = [str(path), str(folder / "whole.csv")]
        elif kind == "job.toml":
            command = ["rebuild", str(path), "--dry-run"]
        code, seconds, written = run(command)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        shutil.rmtree(out, ignore_errors=True)
        found = re.search(r"(?:error|unexpected error): .*", written)
        error = found[0] if found else written[-200:]
        tried = Tried(number, kind, code, seconds, peak, error)
        if not tried.bad:
            path.unlink()
        yield tried


def run(command: list[str]) -> tuple[int, float, str]:
    """Exit code of a command that is run in this process, its seconds and what it wrote."""
    argv, begin = sys.argv, time.perf_counter()
    out = io.TextIOWrapper(io.BytesIO(), errors="replace", write_through=True)
    try:
        sys.argv = ["sos-dask", *command]
        with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
            main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
    out.seek(0)
    return code, time.perf_counter() - begin, out.read()


def _work(folder: Path, seed: int, first: int, n: int, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    for tried in attempts(folder, seed, first, n):
        pipe.send(tried)


def all_attempts(folder: Path, seed: int, n: int) -> Iterator[Tried]:
    """`attempts` in processes of 50: one that dies or hangs costs one file."""
    context = multiprocessing.get_context("spawn")
    first = 0
    while first < n:
        stop = min(n, first + 50)
        here, there = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(folder, seed, first, stop - first, there))
        worker.start()
        there.close()
        try:
            while first < stop:
                if not here.poll(MOST_S * 3):
                    raise EOFError
                yield here.recv()
                first += 1
        except EOFError:
            worker.kill()
            worker.join()
            kind = KINDS[first % len(KINDS)]
            yield Tried(first, kind, worker.exitcode or -1, MOST_S * 3, 0, "the process died")
            first += 1
        worker.join()


def table_of(tried: list[Tried]) -> str:
    """Counts by format (rows) and exit code (columns), with the largest time and memory."""
    codes = sorted({item.code for item in tried})
    lines = ["| format | " + " | ".join(f"exit {code}" for code in codes) + " | s, most |"]
    lines.append("|---|" + "---:|" * (len(codes) + 1))
    for kind in KINDS:
        own = [item for item in tried if item.kind == kind]
        counts = Counter(item.code for item in own)
        longest = max((item.seconds for item in own), default=0.0)
        shown = " | ".join(str(counts[code]) for code in codes)
        lines.append(f"| {kind} | {shown} | {longest:.1f} |")
    peak = max(item.peak_bytes for item in tried)
    return "\n".join([*lines, f"largest memory of a process: {peak / (1 << 20):.0f} MiB"])


def run_fuzz() -> int:
    """Parse the command line, try all, print the table; 1 where an end was bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=500, help="Number of files.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="Folder for the files that ended badly.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_whole(folder)
        tried = []
        for item in all_attempts(folder, options.seed, options.n):
            tried.append(item)
            if item.bad:
                print(f"BAD {item}", file=sys.stderr)
                if options.keep:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    file = folder / f"mutant-{options.seed}-{item.number}.{item.kind}"
                    shutil.copy(file, options.keep)
    print(table_of(tried))
    return int(any(item.bad for item in tried))


if __name__ == "__main__":
    raise SystemExit(run_fuzz())
