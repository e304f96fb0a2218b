"""Damage by chance: ``python -m tests.bench.damage --n 1000 --seed 0``.

Every mutation is made in a fresh copy of a small complete store (or of one with an unfinished
output). What reads the file is run again, then the rebuild that would publish it, then ``verify``.
Allowed: a documented error, or the bytes of the undamaged store. Never: an unexpected error, other
bytes, or a ``verify`` that finds nothing although the content differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from sos_dask.cli import main as command_line
from sos_dask.errors import SosError
from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.pipeline import rebuild
from sos_dask.rebuild.plan import Planned, plan
from sos_dask.run.cluster import Cluster, silent
from sos_dask.storage.artifact import Output
from sos_dask.storage.manifest import WORK
from tests.job import WITH_REPORT, build, contents, methods

# Stages that are left unfinished, so that their records and pieces can be damaged.
UNFINISHED = ("ingest", "dedupe", "crossmatch", "trends", "uncertainty", "apply")
# Stages that take long: they are not run again to see what they say of a damaged input.
SLOW = ("report", "coverage", "train-boosted", "generalisation")
LOOKS = {
    "compare": ("compare",),
    "trends": ("trends",),
    "uncertainty": ("uncertainty",),
    "coverage": ("coverage",),
    "report": ("report",),
}

Change = Callable[[bytes, random.Random], bytes]


def _byte(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return b"\0"
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1 :]


def _line(content: bytes, rng: random.Random, times: int) -> bytes:
    lines = content.splitlines(keepends=True)
    at = rng.randrange(max(len(lines), 1))
    return b"".join([*lines[:at], *lines[at : at + 1] * times, *lines[at + 1 :]])


CHANGES: dict[str, Change] = {
    "byte": _byte,
    "line removed": lambda content, rng: _line(content, rng, 0),
    "line doubled": lambda content, rng: _line(content, rng, 2),
    "truncated": lambda content, rng: content[: rng.randrange(max(len(content), 1))],
    "emptied": lambda content, rng: b"",
    "doubled": lambda content, rng: content * 2,
}
KINDS = (*CHANGES, "swapped", "removed")


@dataclass(frozen=True)
class Base:
    """Stores to be damaged: a complete one, and copies with one unfinished output each."""

    job: Path
    stores: tuple[Path, ...]
    truth: dict[str, str]

    @property
    def files(self) -> list[tuple[Path, str]]:
        """All files: of the complete store all, of the others those of the unfinished output."""
        found = [(self.stores[0], name) for name in contents(self.stores[0])]
        for store in self.stores[1:]:
            found += [(store, name) for name in contents(store) if f"{WORK}/" in name]
        return found


def hard_linked(source: Path, target: Path) -> Path:
    """Copy a store without copying content; files are replaced, never written in place."""
    return Path(shutil.copytree(source, target, symlinks=True, copy_function=os.link))


def prepare(job: Path, store: Path, folder: Path, unfinished: tuple[str, ...]) -> Base:
    """Stop one stage of each kind before its manifest, in a copy of the complete store."""
    stores = [store]
    for kind in unfinished:
        copy = hard_linked(store, folder / f"unfinished-{kind}")
        stage = next(s for s in plan(load_job(job), copy) if s.recipe.stage == kind)
        shutil.rmtree(stage.directory)
        with (
            mock.patch.object(Output, "commit", side_effect=InterruptedError),
            contextlib.suppress(InterruptedError),
        ):
            stage.run(Cluster(), silent)
        stores.append(copy)
    return Base(job, tuple(stores), contents(store / "artifacts"))


@dataclass(frozen=True)
class Mutation:
    """What was done to which files of a store."""

    kind: str
    names: tuple[str, ...]
    same: bool

    def __str__(self) -> str:
        return f"{self.kind}: {', '.join(self.names)}"


def _same_json(before: bytes, after: bytes) -> bool:
    try:
        return bool(json.loads(before) == json.loads(after))
    except (ValueError, RecursionError):
        return False


def mutate(store: Path, name: str, kind: str, rng: random.Random) -> Mutation:
    """Damage one file, or swap it with another of its output or of the store."""
    path = store / name
    before = path.read_bytes()
    if kind == "removed":
        path.unlink()
        return Mutation(kind, (name,), False)
    if kind == "swapped":
        others = [other for other in contents(store) if other != name]
        near = [o for o in others if Path(o).suffix == path.suffix and o[:90] == name[:90]]
        other = rng.choice(near or others)
        after = (store / other).read_bytes()
        _replace(path, after)
        _replace(store / other, before)
        return Mutation(kind, (name, other), before == after)
    after = CHANGES[kind](before, rng)
    _replace(path, after)
    is_json = path.suffix == ".json"
    return Mutation(kind, (name,), before == after or (is_json and _same_json(before, after)))


def _replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _ran(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code and output of a command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        mock.patch.object(sys, "argv", ["sos-dask", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            command_line()
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


def _artifact(store: Path, name: str) -> Path | None:
    parts = Path(name).parts
    return store.joinpath(*parts[:3]) if parts[0] == "artifacts" else None


class Trial:
    """One damaged store and what is wrong in how it was met."""

    def __init__(self, base: Base, store: Path, mutation: Mutation, rng: random.Random) -> None:
        self.base, self.store, self.mutation, self.rng = base, store, mutation, rng
        self.violations: list[str] = []
        self.outcomes: list[str] = []

    def _try(self, what: str, run: Callable[[], object]) -> str:
        """Outcome of a step: ``done``, or the exit code of its error."""
        try:
            run()
        except SosError as error:
            if error.exit_code < 3 or not error.message:
                self.violations.append(f"{what}: exit {error.exit_code}")
            outcome = f"exit {error.exit_code}"
        except Exception as error:
            self.violations.append(f"{what}: {type(error).__name__}: {error}")
            outcome = "unexpected"
        else:
            outcome = "done"
        self.outcomes.append(outcome)
        return outcome

    def _require_truth(self, what: str, below: str = "") -> None:
        """All that is complete must have the bytes of the undamaged store, but the damage."""
        found = contents(self.store / "artifacts")
        spoilt = {name.removeprefix("artifacts/") for name in self.mutation.names}
        for name, digest in self.base.truth.items():
            if name.startswith(below) and name not in spoilt and found.get(name) != digest:
                self.violations.append(f"{what}: other bytes in {name} with exit 0")
                return

    def run(self) -> None:
        """Look, run what reads the file, rebuild, verify."""
        verified = self._verify()
        for name in self.mutation.names:
            artifact = _artifact(self.store, name)
            if artifact is not None:
                for look in LOOKS.get(artifact.parent.name, ()):
                    self._look(look)
        self._look("status")
        self._consumers()
        job = load_job(self.base.job)
        if self._try("rebuild", lambda: rebuild(job, self.store)) == "done":
            found = contents(self.store / "artifacts")
            if found != self.base.truth and not self.mutation.same:
                names = {name for name, _ in found.items() ^ self.base.truth.items()}
                self.violations.append(f"rebuild: published other bytes: {sorted(names)[:3]}")
        self.outcomes.insert(0, f"verify {verified}")

    def _verify(self) -> str:
        """Outcome of verify of what holds the damage: it must not be blind."""
        outcomes = []
        for name in self.mutation.names:
            artifact = _artifact(self.store, name)
            if artifact is None:
                if not name.endswith("build.json"):
                    continue  # what a store remembers: seen by the rebuild where it matters
                artifact = self.store / "current"
            problems: list[str] = []

            def run(artifact: Path = artifact, problems: list[str] = problems) -> None:
                code, out, err = _ran(["verify", str(artifact)])
                if code:
                    problems.append(f"exit {code}")
                if code == 1 or "Traceback" in err or "unexpected" in err:
                    raise RuntimeError(f"{code} {out} {err}")

            outcome = self._try("verify", run)
            self.outcomes.pop()
            if outcome == "done" and not problems and not self.mutation.same:
                self.violations.append(f"verify is blind to {name}")
            outcomes.append(problems[0] if problems else outcome)
        return outcomes[0] if outcomes else "-"

    def _look(self, command: str) -> None:
        def run() -> None:
            code, out, err = _ran([command, "--store", str(self.store), "--json"])
            if code in (1, 2) or "Traceback" in err or "unexpected" in err:
                raise RuntimeError(f"exit {code}: {out} {err}")

        self._try(command, run)

    def _consumers(self) -> None:
        """Run one stage again that reads the damaged file."""
        stages: list[Planned] = []
        job = load_job(self.base.job)
        if self._try("plan", lambda: stages.extend(plan(job, self.store))) != "done":
            return
        self.outcomes.pop()
        of = {stage.directory: stage.recipe.fingerprint for stage in stages}
        fingerprints = {of.get(a) for n in self.mutation.names if (a := _artifact(self.store, n))}
        readers = [
            stage
            for stage in stages
            if fingerprints & {*stage.recipe.inputs.values()}
            and stage.recipe.stage not in SLOW
            and stage.complete
        ]
        if readers:
            reader = self.rng.choice(readers)
            shutil.rmtree(reader.directory)
            if self._try(reader.product, lambda: reader.run(Cluster(), silent)) == "done":
                below = str(reader.directory.relative_to(self.store / "artifacts"))
                self._require_truth(reader.product, below)


def trials(base: Base, n: int, seed: int, folder: Path) -> Iterator[Trial]:
    """Mutations of files in turn, each in a copy of its own that is removed after it."""
    rng = random.Random(seed)
    files: list[tuple[Path, str]] = []
    for number in range(n):
        files = files or rng.sample(base.files, len(base.files))
        store, name = files.pop()
        copy = hard_linked(store, folder / f"damaged-{number}")
        try:
            mutation = mutate(copy, name, rng.choice(KINDS), rng)
            trial = Trial(base, copy, mutation, rng)
            trial.run()
            yield trial
        finally:
            shutil.rmtree(copy)


def _complete_store(folder: Path) -> tuple[Path, Path]:
    """Job and store: 5,000 rows, two methods, a margin, a report."""
    margin = ("rows_per_partition = 1500", "rows_per_partition = 1500\nmargin_arcsec = 5.0")
    job = build(folder, methods("polynomial", "boosted"), margin, WITH_REPORT, n_lamost=5000)
    return job, folder / "store"


def main() -> int:
    """Print counts by kind of mutation and outcome; 1 where something was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.damage", description=__doc__)
    parser.add_argument("--n", type=int, default=1000, help="mutations (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--keep", type=Path, help="folder of the undamaged store, for a next run")
    given = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    violations, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        made = given.keep or Path(name)
        if not (made / "job.toml").is_file() or not (made / "unfinished-apply").is_dir():
            made.mkdir(parents=True, exist_ok=True)
            prepare(*_complete_store(made), made, UNFINISHED)
        stores = (made / "store", *sorted(made.glob("unfinished-*")))
        base = Base(made / "job.toml", stores, contents(stores[0] / "artifacts"))
        code, out, err = _ran(["verify", *map(str, stores[:1])])
        if code:
            raise SystemExit(f"the undamaged store does not hold: {out} {err}")
        print(f"{len(base.files)} files ({time.monotonic() - began:.0f} s)", flush=True)
        for number, trial in enumerate(trials(base, given.n, given.seed, Path(name))):
            noticed = [outcome for outcome in trial.outcomes if outcome not in ("done", "verify -")]
            outcome = "violated" if trial.violations else "noticed" if noticed else "same result"
            counts[trial.mutation.kind, outcome] += 1
            if number % 100 == 99:
                print(f"{number + 1} ({time.monotonic() - began:.0f} s)", flush=True)
            for violation in trial.violations:
                violations += 1
                print(f"VIOLATED {number} {trial.mutation}: {violation}", flush=True)
    outcomes = ("noticed", "same result", "violated")
    print(f"| {'mutation':13} | " + " | ".join(f"{one:>11}" for one in outcomes) + " |")
    print(f"|{'-' * 15}|" + "|".join("-" * 12 + ":" for _ in outcomes) + "|")
    for kind in KINDS:
        row = " | ".join(f"{counts[kind, one]:11}" for one in outcomes)
        print(f"| {kind:13} | {row} |")
    print(f"{given.n} mutations, {violations} violations, {time.monotonic() - began:.0f} s")
    return 1 if violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
