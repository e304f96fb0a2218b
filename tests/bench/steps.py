"""The steps: ours and its peers on the same data, one after the other, each in its own process."""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from tests.bench import prepare
from tests.bench.book import Book
from tests.bench.check import size
from tests.bench.measure import GIB, ROOT, SOS, Usage, measure, tail
from tests.bench.prepare import CARRIED, CARRIED_REFERENCE, RADIUS_ARCSEC, REPEAT_ARCSEC, Place
from tests.job import DEFAULT_PARTITIONS, WITH_REPORT, methods, write_job

# What a peer needs: a package, or a program.
PEERS = {
    "hats-import": "hats_import",
    "lsdb": "lsdb",
    "stilts": "stilts",
    "scipy": "scipy",
    "polars": "polars",
    "pyarrow": "pyarrow",
    "xgboost": "xgboost",
}
_PROGRAMS = ("stilts",)
_IN_THREADS = ("ingest", "dedupe", "crossmatch", "apply")
_START = (
    "from sos_dask.run.cluster import start\nif __name__ == '__main__':\n with start({}): pass\n"
)


@dataclass
class Bench:
    """A run of the benchmarks.

    Parameters
    ----------
    place : Place
    book : Book
    limit_s : float
        A peer is stopped after so long.
    peers : frozenset of str
        Those that may run.
    scale_rows : int
        Rows of the step `scale`.
    failed : list of str
        What failed, in words.
    rebuilt : tuple of Usage and dict, optional
        The rebuild, once it is done.
    """

    place: Place
    book: Book
    limit_s: float
    peers: frozenset[str]
    scale_rows: int
    failed: list[str] = field(default_factory=list)
    rebuilt: tuple[Usage, dict[str, Any]] | None = None
    _prepared: set[str] = field(default_factory=set)
    _skipped: set[str] = field(default_factory=set)

    def prepare(self, *items: str) -> None:
        """Make what a step starts from; it is not measured."""
        missing = [item for item in prepare.in_order(items) if item not in self._prepared]
        if not missing:
            return
        print(f"preparing {', '.join(missing)} ...", flush=True)
        command = ["-m", "tests.bench.prepare", self.place.to_json(), *missing]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        self._prepared |= set(missing)

    def output(self, name: str) -> Path:
        """A place for what a run writes, empty."""
        path = self.place.out / "runs" / name
        remove(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def ours(self, name: str, *arguments: object, workers: int | None = None) -> Usage:
        """Measure one of our commands; in threads where it can and no workers are given."""
        how = ("-w", self.place.workers if workers is None else workers)
        if workers is None and self.place.workers and arguments[0] in _IN_THREADS:
            how = ("--threads", self.place.workers)
        return self.run(name, [SOS, *arguments, *how])

    def script(self, name: str, *arguments: object) -> Usage:
        """Measure one of `tests.bench.peers`."""
        command = [sys.executable, "-W", "ignore", "-m", "tests.bench.peers", *arguments]
        return self.run(name, command, self.limit_s)

    def run(self, name: str, command: Sequence[object], limit_s: float | None = None) -> Usage:
        """Measure a command; one that fails is shown and the others go on."""
        print(f"  running {name} ...", flush=True)
        log = self.place.out / "logs" / f"{name}.log"
        usage = measure([str(word) for word in command], log, limit_s)
        if usage.state == "failed":
            self.failed.append(f"{name}, see {log}")
            print(f"  {name} failed:\n{tail(log)}", flush=True)
        return usage

    def add(self, step: str, ours: Usage, *, variant: str = "", **facts: Any) -> None:
        """Keep our side."""
        self.book.add(step, variant, self.place.rows, ours, **facts)

    def compare(
        self, step: str, ours: Usage, peer: str, theirs: Usage, *, variant: str = "", **facts: Any
    ) -> None:
        """Keep a comparison."""
        if facts.get("same_result") is False:
            self.failed.append(f"{step}: {peer} found something else: {facts}")
        self.book.add(step, variant, self.place.rows, ours, peer, theirs, **facts)

    @property
    def threads(self) -> int:
        """Threads or workers of a peer: as many as we have."""
        return max(self.place.workers, 1)

    def has(self, peer: str) -> bool:
        """Whether a peer may run and is installed; says so where it is not."""
        if peer not in self.peers:
            return False
        needed = PEERS[peer]
        found = (
            shutil.which(needed) is not None
            if peer in _PROGRAMS
            else importlib.util.find_spec(needed) is not None
        )
        if not found and peer not in self._skipped:
            self._skipped.add(peer)
            print(f"  {peer} is skipped: {needed} is not installed", flush=True)
        return found


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check(*arguments: object) -> dict[str, Any]:
    """Facts from `tests.bench.check`, made in another process, so that this one stays small."""
    command = [sys.executable, "-m", "tests.bench.check", *map(str, arguments)]
    printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    facts: dict[str, Any] = json.loads(printed.stdout)
    return facts


def checked(theirs: Usage, *arguments: object) -> dict[str, Any]:
    """Facts about a run that came to its end."""
    return check(*arguments) if theirs.state == "done" else {}


def on_disk(path: Path) -> dict[str, Any]:
    """Files and GB of an output."""
    found = size(str(path))
    return {"files": found["files"], "gb": found["bytes"] / 1e9}


def stilts(*arguments: str) -> list[str]:
    """STILTS with half of the machine's memory."""
    memory = max(int(psutil.virtual_memory().total / GIB / 2), 1)
    return ["stilts", f"-Xmx{memory}g", *arguments]


def ingest(bench: Bench) -> None:
    """FITS to HATS, against hats-import."""
    place = bench.place
    bench.prepare("sky")
    arguments = ("ingest", prepare.SURVEYS["lamost"], place.sky / "lamost.fits", "-o")
    out = bench.output("ingest-alone")
    alone = bench.ours("ingest-alone", *arguments, out, workers=0)
    bench.add("ingest", alone, variant="no workers", **on_disk(out))
    remove(out)
    out = place.ours("lamost")
    remove(out)
    ours = bench.ours("ingest", *arguments, out)
    bench.add("ingest", ours, **on_disk(out))
    if bench.has("hats-import"):
        bench.prepare("import")
        out = bench.output("ingest-hats-import")
        theirs = bench.script(
            "ingest-hats-import", "hats-import", place.peers("import"), out, bench.threads
        )
        bench.compare("ingest", ours, "hats-import", theirs, **on_disk(out))


def crossmatch(bench: Bench) -> None:
    """Pairs within 1 arcsec, from partitions to written pairs."""
    place = bench.place
    bench.prepare("observations", "plain")
    left, right = place.ours("lamost"), place.ours("plain")
    radius = ("--radius-arcsec", RADIUS_ARCSEC)
    out = bench.output("crossmatch")
    ours = bench.ours("crossmatch", "crossmatch", left, right, *radius, "-o", out, "--no-gaia-id")
    bench.add("crossmatch", ours, **on_disk(out))
    if bench.has("scipy"):
        theirs_out = bench.output("crossmatch-scipy.parquet")
        theirs = bench.script(
            "crossmatch-scipy",
            "kdtree-crossmatch",
            *(left, right, theirs_out, RADIUS_ARCSEC, bench.threads),
        )
        facts = checked(theirs, "crossmatch", out, "scipy", theirs_out)
        bench.compare("crossmatch", ours, "scipy: keys only", theirs, **facts)
    if bench.has("stilts"):
        bench.prepare("fits")
        theirs_out = bench.output("crossmatch-stilts.fits")
        fits = place.peers("fits")
        command = stilts(
            "tskymatch2",
            *(
                f"in1={fits / 'left.fits'}",
                f"in2={fits / 'right.fits'}",
                "ifmt1=fits",
                "ifmt2=fits",
            ),
            *("ra1=ra", "dec1=dec", "ra2=ra", "dec2=dec"),
            *(f"error={RADIUS_ARCSEC}", "find=best1", "ofmt=fits-basic", f"out={theirs_out}"),
        )
        theirs = bench.run("crossmatch-stilts", command, bench.limit_s)
        facts = checked(theirs, "crossmatch", out, "stilts", theirs_out)
        bench.compare("crossmatch", ours, "stilts", theirs, **facts)
    if bench.has("lsdb"):
        theirs_out = bench.output("crossmatch-lsdb")
        theirs = bench.script(
            "crossmatch-lsdb",
            "lsdb-crossmatch",
            *(left, place.ours("plain.collection"), theirs_out, RADIUS_ARCSEC, bench.threads),
            ",".join(("obs_id", *CARRIED)),
            ",".join(("star_id", *CARRIED_REFERENCE, "survey")),
        )
        facts = checked(theirs, "crossmatch", out, "lsdb", theirs_out)
        bench.compare("crossmatch", ours, "lsdb", theirs, **facts)
    if place.workers:
        out = bench.output("crossmatch-workers")
        arguments = ("crossmatch", left, right, *radius, "-o", out, "--no-gaia-id")
        in_workers = bench.ours("crossmatch-workers", *arguments, workers=place.workers)
        bench.add("crossmatch", in_workers, variant="worker processes", **on_disk(out))
    # As it is by default: Gaia ids first, then positions moved to a common epoch.
    out = bench.output("crossmatch-ids")
    right = place.ours("reference")
    default = bench.ours("crossmatch-ids", "crossmatch", left, right, *radius, "-o", out)
    bench.add("crossmatch", default, variant="Gaia ids and motions", **on_disk(out))


def dedupe(bench: Bench) -> None:
    """Repeats by position alone, from partitions to written stars."""
    place = bench.place
    bench.prepare("observations")
    catalog = place.ours("lamost")
    out = bench.output("dedupe")
    arguments = ("dedupe", catalog, "-o", out, "--radius-arcsec", REPEAT_ARCSEC)
    ours = bench.ours("dedupe", *arguments, "--no-gaia-id")
    n_stars = checked(ours, "stars", "ours", out / "dataset").get("stars", 0)
    truth = check("true-stars", place.sky)["true_stars"]
    bench.add("dedupe", ours, **on_disk(out), stars=n_stars, true_stars=truth)
    if bench.has("scipy"):
        theirs_out = bench.output("dedupe-scipy")
        theirs = bench.script(
            "dedupe-scipy", "kdtree-dedupe", catalog, theirs_out, REPEAT_ARCSEC, bench.threads
        )
        found = checked(theirs, "stars", "scipy", theirs_out)
        bench.compare("dedupe", ours, "scipy", theirs, **found)
    if bench.has("polars"):
        bench.prepare("stars")
        theirs_out = bench.output("dedupe-polars.parquet")
        theirs = bench.script("dedupe-polars", "polars-dedupe", place.peers("stars"), theirs_out)
        found = checked(theirs, "stars", "polars", theirs_out)
        bench.compare("dedupe", ours, "polars (knows every star)", theirs, **found)
    if bench.has("stilts"):
        bench.prepare("fits")
        theirs_out = bench.output("dedupe-stilts.fits")
        command = stilts(
            "tmatch1",
            "matcher=sky",
            f"params={REPEAT_ARCSEC}",
            "values=ra dec",
            "action=keep1",
            f"in={place.peers('fits') / 'left.fits'}",
            "ifmt=fits",
            "ofmt=fits-basic",
            f"out={theirs_out}",
        )
        theirs = bench.run("dedupe-stilts", command, bench.limit_s)
        found = checked(theirs, "stars", "stilts", theirs_out)
        bench.compare("dedupe", ours, "stilts", theirs, **found)


def apply(bench: Bench) -> None:
    """Three labels, their errors and flags, against one label of a script, and a mere copy."""
    place = bench.place
    bench.prepare("observations", "errors")
    catalog, model = place.ours("lamost"), place.ours("model")
    out = bench.output("apply")
    ours = bench.ours("apply", "apply", model, catalog, "--errors", place.ours("errors"), "-o", out)
    bench.add("apply", ours, **on_disk(out))
    if bench.has("pyarrow"):
        theirs_out = bench.output("apply-copy")
        theirs = bench.script("apply-copy", "copy", out, theirs_out)
        bench.compare("apply", ours, "pyarrow: copy", theirs, **on_disk(theirs_out))
        remove(theirs_out)
    if bench.has("xgboost"):
        theirs_out = bench.output("apply-xgboost")
        theirs = bench.script(
            "apply-xgboost", "apply-one-label", model, catalog, theirs_out, bench.threads
        )
        facts = checked(theirs, "apply", out, theirs_out)
        bench.compare("apply", ours, "xgboost: one label", theirs, **facts)
        remove(theirs_out)


def train(bench: Bench) -> None:
    """Boosted trees of three labels."""
    place = bench.place
    bench.prepare("pairs")
    pairs, out = place.ours("pairs"), place.ours("model")
    remove(out)
    # One process with all threads up to a million pairs: workers are refused there.
    ours = bench.run("train", [SOS, "train", pairs, "-o", out, *_trees()])
    bench.add("train", ours, pairs=place.n_pairs, **_scatter(ours, out))
    if bench.has("xgboost"):
        theirs_out = bench.output("train-xgboost")
        params_json = json.dumps(prepare.TREES)
        theirs = bench.script(
            "train-xgboost", "train-one-process", pairs, theirs_out, params_json, bench.threads
        )
        if theirs.state == "done":
            found = json.loads((theirs_out / "scatter.json").read_text())
            scatter = {f"scatter_{name}": round(value, 4) for name, value in found.items()}
        bench.compare("train", ours, "xgboost: one process", theirs, **scatter)


def _trees(**params: object) -> list[str]:
    """Options of a training that leaves fold 0 out."""
    settings = {**prepare.TREES, **params}
    words = [word for name, value in settings.items() for word in ("-p", f"{name}={value}")]
    return ["-m", "boosted", *words, "--validation", "holdout"]


def _scatter(usage: Usage, model: Path) -> dict[str, Any]:
    """Scatter of the held-out pairs after a training."""
    if usage.state != "done":
        return {}
    metrics = json.loads((model / "manifest.json").read_text())["summary"]["metrics"]
    return {f"scatter_{m['label']}": round(m["scatter_after"], 4) for m in metrics}


def gpu(bench: Bench) -> None:
    """Training on a GPU against the CPU, and prediction on it against the look-up table."""
    place = bench.place
    problem = _no_gpu()
    if problem:
        print(f"  gpu is skipped: {problem}", flush=True)
        return
    bench.prepare("observations", "pairs", "model")
    usages, scatters = {}, {}
    for device in ("cpu", "cuda"):
        out = bench.output(f"train-{device}")
        arguments = ("train", place.ours("pairs"), "-o", out, *_trees(device=device))
        usages[device] = bench.ours(f"train-{device}", *arguments)
        scatters[device] = _scatter(usages[device], out)
    theirs = {f"cpu_{name}": value for name, value in scatters["cpu"].items()}
    facts = {**scatters["cuda"], **theirs}
    bench.compare(
        "gpu", usages["cuda"], "sos-dask on the CPU", usages["cpu"], variant="train", **facts
    )
    predicted, rates = {}, {}
    for how in ("table", "cuda"):
        out = bench.output(f"predict-{how}.json")
        arguments = (place.ours("model"), place.ours("lamost"), out, how, bench.threads)
        predicted[how] = bench.script(f"predict-{how}", "predict", *arguments)
        if predicted[how].state == "done":
            rates[f"{how}_rows_a_s"] = json.loads(out.read_text())["rows_a_s"]
    bench.compare(
        "gpu", predicted["table"], "xgboost on the GPU", predicted["cuda"], variant="predict",
        **rates,
    )  # fmt: skip


def _no_gpu() -> str:
    """Why nothing can run on a GPU here; asked in another process, so that this one stays small."""
    code = "from tests.corrections.test_boosted import gpu_problem; print(gpu_problem())"
    command = [sys.executable, "-W", "ignore", "-c", code]
    found = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return found.stdout.strip()


def rebuild(bench: Bench) -> None:
    """All stages, from the surveys' files to corrected labels."""
    ours, facts = _rebuild(bench)
    bench.add("rebuild", ours, **facts)


def _rebuild(bench: Bench) -> tuple[Usage, dict[str, Any]]:
    """One rebuild for all steps that look at it."""
    if bench.rebuilt is not None:
        return bench.rebuilt
    bench.prepare("sky")
    folder = bench.output("rebuild")
    folder.mkdir()
    trained = methods("polynomial", "boosted")
    job = write_job(folder, bench.place.sky, DEFAULT_PARTITIONS, trained, WITH_REPORT)
    usage = bench.ours("rebuild", "rebuild", job)
    memory = {"driver_gib": usage.driver_gib, "worker_gib": usage.worker_gib}
    bench.rebuilt = usage, {**on_disk(folder / "store"), **memory}
    remove(folder)
    return bench.rebuilt


def memory(bench: Bench) -> None:
    """Memory of driver and workers in every part of a rebuild, against that of a tenth of it."""
    place = bench.place
    small = replace(place, out=place.out / "tenth", rows=max(place.rows // 10, 1000))
    tenth = Bench(small, bench.book, bench.limit_s, bench.peers, bench.scale_rows)
    few, _ = _rebuild(tenth)
    bench.failed += tenth.failed
    many, _ = _rebuild(bench)
    bench.add("memory", many, driver_gib=many.driver_gib, worker_gib=many.worker_gib)
    bench.compare(
        "memory",
        many,
        f"sos-dask, {small.rows:,} rows",
        few,
        driver_gib=few.driver_gib,
        worker_gib=few.worker_gib,
        ratio_driver=many.driver_gib / max(few.driver_gib, 1e-9),
        ratio_worker=many.worker_gib / max(few.worker_gib, 1e-9),
    )
    before = {part.name: part for part in few.parts}
    for part in many.parts:
        if part.name in before:
            sides = (before[part.name], part)
            driver, worker = (
                " -> ".join(f"{getattr(side, name):.2f}" for side in sides)
                for name in ("driver_gib", "worker_gib")
            )
            print(f"  {part.name}: driver {driver}, largest worker {worker} GiB")


def start(bench: Bench) -> None:
    """What every command takes before it works: ``--help``, and workers that do nothing."""
    runs = [bench.run("help", [SOS, "--help"]) for _ in range(5)]
    bench.add("start", _median(runs), variant="--help")
    if bench.place.workers == 0:
        return
    script = bench.output("start.py")
    script.write_text(_START.format(bench.place.workers))
    runs = [bench.run("start-workers", [sys.executable, script]) for _ in range(3)]
    bench.add("start", _median(runs), variant=f"{bench.place.workers} workers")


def _median(runs: Sequence[Usage]) -> Usage:
    wall = statistics.median(run.wall_s for run in runs)
    return min(runs, key=lambda run: abs(run.wall_s - wall))


def scale(bench: Bench) -> None:
    """Crossmatch and apply on many rows that are made as partitions, and on a tenth of them."""
    from tests.bench.scale import fitting_rows, make

    bench.prepare("model")
    most = fitting_rows(bench.scale_rows, bench.place.out)
    for rows in (most // 10, most):
        folder = bench.place.out / "scale" / str(rows)
        left, right = folder / "left", folder / "right"
        print(f"preparing {rows:,} rows ...", flush=True)
        make(rows, left, right, bench.place.workers)
        out = bench.output("scale")
        for name, arguments in (
            ("crossmatch", (left, right, "--radius-arcsec", RADIUS_ARCSEC)),
            ("apply", (bench.place.ours("model"), left)),
        ):
            ours = bench.ours(f"scale-{name}-{rows}", name, *arguments, "-o", out)
            facts = on_disk(out)
            facts |= {
                "tasks": ours.tasks,
                "rows_per_cpu_s": round(rows / max(ours.cpu_s, 1e-9)),
                "driver_gib": ours.driver_gib,
                "worker_gib": ours.worker_gib,
                "moved_gb": ours.moved_gb,
            }
            bench.book.add("scale", name, rows, ours, **facts)
            remove(out)


STEPS: Mapping[str, Callable[[Bench], None]] = {
    "start": start,
    "ingest": ingest,
    "crossmatch": crossmatch,
    "dedupe": dedupe,
    "train": train,
    "gpu": gpu,
    "apply": apply,
    "rebuild": rebuild,
    "memory": memory,
    "scale": scale,
}
BY_DEFAULT = tuple(name for name in STEPS if name != "scale")
