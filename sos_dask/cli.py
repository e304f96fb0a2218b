"""The command line: arguments in, documented functions called, text or JSON out. No logic."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sos_dask.errors import SosError

if TYPE_CHECKING:
    from sos_dask.artifact import Manifest
    from sos_dask.cluster import Cluster, Report
    from sos_dask.compare import Metric

app = typer.Typer(
    name="sos-dask",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Put stellar spectroscopic surveys on one scale, out of core.\n\n"
    "Start with **sos-dask demo**, then write a job like jobs/real.toml and run "
    "**sos-dask rebuild JOB**.",
)

_DEBUG = "--debug"

Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-w",
        min=0,
        help="Worker processes; 0: none. Default: one a core.",
        show_default=False,
    ),
]
MemoryLimit = Annotated[
    str, typer.Option("--memory-limit", help="Memory of each worker, like 4GiB.")
]
Scheduler = Annotated[
    str | None,
    typer.Option("--scheduler", help="Address or scheduler file of a running Dask cluster."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory that gets the output.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace another output in the same directory.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
CatalogPath = Annotated[Path, typer.Argument(help="Directory of a catalog.", show_default=False)]
Store = Annotated[Path, typer.Option("--store", help="Folder of artifacts and builds.")]


def main() -> None:
    """Entry point: runs a command, turns errors into a message and an exit code."""
    arguments = sys.argv[1:]
    debug = _DEBUG in arguments
    arguments = [argument for argument in arguments if argument != _DEBUG]
    try:
        app(arguments, standalone_mode=True)
    except SosError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(141) from None
    except Exception as error:
        if debug:
            raise
        print(f"unexpected error: {type(error).__name__}: {error}", file=sys.stderr)
        print(f"  Say {_DEBUG} to see where, and please report it.", file=sys.stderr)
        raise SystemExit(1) from None


@contextlib.contextmanager
def _reporting(quiet: bool) -> Iterator[Report]:
    """Progress bars in a terminal, plain lines elsewhere, nothing with ``--json``; on stderr."""
    if quiet:
        yield lambda step, done, total: None
        return
    if not sys.stderr.isatty():
        yield _PlainReport()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=total)
            progress.update(tasks[step], completed=done, total=total)

        yield report


class _PlainReport:
    """One line when a step begins, one at each quarter, for logs."""

    def __init__(self) -> None:
        self.said: dict[str, int] = {}

    def __call__(self, step: str, done: int, total: int) -> None:
        quarter = 4 * done // total if total else 4
        if self.said.get(step) != quarter:
            self.said[step] = quarter
            print(f"{step}: {done}/{total}", file=sys.stderr, flush=True)


def _cluster(workers: int | None, memory_limit: str, scheduler: str | None) -> Any:
    from sos_dask.cluster import start

    return start(workers, memory_limit, scheduler)


def _run(
    function: Callable[[Cluster, Report], Manifest | None],
    workers: int | None,
    memory_limit: str,
    scheduler: str | None,
    as_json: bool,
    out: Path,
) -> None:
    """Run one step on a cluster and print its account of rows."""
    with _reporting(as_json) as report, _cluster(workers, memory_limit, scheduler) as cluster:
        manifest = function(cluster, report)
    if manifest is None:
        text = {"complete": False, "path": str(out)}
        print(json.dumps(text) if as_json else f"{out}: other partitions are still missing")
        return
    rows = manifest.rows
    if as_json:
        document = {
            "complete": True,
            "path": str(out),
            "stage": manifest.recipe.stage,
            "rows": {
                "in": rows.n_in,
                "out": rows.n_out,
                "rejected": rows.rejected,
                "dropped": rows.dropped,
                "added": rows.added,
            },
            "summary": manifest.summary,
        }
        print(json.dumps(document, indent=1))
        return
    account = [f"{rows.n_in:,} rows in", f"{rows.n_out:,} out"]
    account += [f"{rows.rejected:,} rejected"] if rows.rejected else []
    others = {**rows.dropped, **rows.added}
    account += [f"{count:,} {reason}" for reason, count in others.items() if count]
    print(f"{out}: {', '.join(account)}")


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def _table(title: str, *headers: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for number, header in enumerate(headers):
        table.add_column(header, overflow="fold", no_wrap=number == 0)
    return table


@app.command()
def surveys(
    name: Annotated[
        str | None, typer.Argument(help="Name of a survey, or path of a survey TOML.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the surveys, or explain one: columns, units, missing values, quality cuts.

    Example: sos-dask surveys lamost-dr11-lrs
    """
    from sos_dask.schema import builtin_surveys, describe_columns, describe_cuts, load_survey

    console = _console()
    if name is None:
        found = [load_survey(item) for item in builtin_surveys()]
        if as_json:
            print(json.dumps([{"name": s.name, "title": s.title} for s in found], indent=1))
            return
        table = _table("Surveys", "name", "title", "cuts")
        for survey in found:
            table.add_row(survey.name, survey.title, ", ".join(cut.name for cut in survey.cuts))
        console.print(table)
        return
    survey = load_survey(name)
    columns, cuts = describe_columns(survey), describe_cuts(survey)
    if as_json:
        print(json.dumps({"name": survey.name, "columns": columns, "cuts": cuts}, indent=1))
        return
    console.print(
        f"[bold]{survey.name}[/bold]  {survey.title}\n{survey.reference}\n", highlight=False
    )
    table = _table("Columns", "column", "from", "unit", "type", "UCD", "meaning")
    for row in columns:
        table.add_row(*row)
    console.print(table)
    table = _table(
        "Quality cuts (a row that fails one keeps its bit in quality)", "cut", "test", "why"
    )
    for row in cuts:
        table.add_row(*row)
    console.print(table)
    if survey.missing:
        console.print(f"Missing values: {', '.join(f'{value:g}' for value in survey.missing)}")
    if survey.notes:
        console.print(survey.notes.strip(), highlight=False)


@app.command()
def simulate(
    out: Out,
    rows: Annotated[int, typer.Option("--rows", min=1000, help="LAMOST rows.")] = 200_000,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same bytes.")] = 1,
    bias: Annotated[bool, typer.Option(help="Inject the LAMOST bias.")] = True,
) -> None:
    """Write a mock sky with known truth, as the surveys' own FITS tables.

    Example: sos-dask simulate --rows 1000000 -o sky
    """
    from sos_dask.simulate import SkySettings
    from sos_dask.simulate import simulate as run

    with _reporting(False) as report:
        files = run(SkySettings(n_lamost=rows, seed=seed, bias=bias), out, report)
    for name, path in files.items():
        print(f"{name:8} {path}")


@app.command()
def ingest(
    survey: Annotated[str, typer.Argument(help="Name of a survey, or path of a survey TOML.")],
    files: Annotated[list[Path], typer.Argument(help="Files of the survey.")],
    out: Out,
    rows_per_partition: Annotated[
        int, typer.Option(help="Pixels are split until each holds at most so many rows.")
    ] = 1_000_000,
    margin_arcsec: Annotated[
        float | None, typer.Option(help="Also write a margin catalog: OUT.collection, for LSDB.")
    ] = None,
    workers: Workers = None,
    memory_limit: MemoryLimit = "auto",
    scheduler: Scheduler = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn survey files into a HEALPix-partitioned catalog of observations.

    Example: sos-dask ingest lamost-dr11-lrs dr11_v2.0_LRS_stellar.fits.gz -o lamost
    """
    from sos_dask.catalog import Catalog
    from sos_dask.errors import ConfigError
    from sos_dask.schema import load_survey
    from sos_dask.stages.ingest import IngestSettings
    from sos_dask.stages.ingest import ingest as run
    from sos_dask.stages.margin import margin

    definition = load_survey(survey)
    if margin_arcsec is not None and not 0 < margin_arcsec < 3600:
        raise ConfigError(f"--margin-arcsec {margin_arcsec:g} is not between 0 and 3600")

    def step(cluster: Cluster, report: Report) -> Manifest:
        manifest = run(
            definition,
            files,
            out,
            IngestSettings(rows_per_partition),
            name=out.name,
            overwrite=overwrite,
            cluster=cluster,
            report=report,
        )
        if margin_arcsec is not None:
            margin(
                Catalog.open(out),
                out.with_name(f"{out.name}.collection"),
                margin_arcsec,
                overwrite=overwrite,
                cluster=cluster,
                report=report,
            )
        return manifest

    _run(step, workers, memory_limit, scheduler, as_json, out)


@app.command()
def dedupe(
    catalog: CatalogPath,
    out: Out,
    method: Annotated[
        str, typer.Option(help="inverse-variance, best-snr or median.")
    ] = "inverse-variance",
    radius_arcsec: Annotated[
        float, typer.Option(help="Repeats without an id lie within it.")
    ] = 1.5,
    id_radius_arcsec: Annotated[
        float, typer.Option(help="Repeats of one Gaia id lie within it.")
    ] = 10.0,
    max_spread: Annotated[
        float, typer.Option(help="Flag stars whose repeats spread over so many expected errors.")
    ] = 5.0,
    gaia_id: Annotated[bool, typer.Option(help="Use Gaia ids.")] = True,
    workers: Workers = None,
    memory_limit: MemoryLimit = "auto",
    scheduler: Scheduler = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Combine repeats of one star into one row.

    Example: sos-dask dedupe lamost -o lamost.stars --method best-snr
    """
    from sos_dask.catalog import Catalog
    from sos_dask.dedupe import DedupeSettings
    from sos_dask.stages.dedupe import dedupe as run

    settings = DedupeSettings(radius_arcsec, id_radius_arcsec, method, max_spread, gaia_id)
    observations = Catalog.open(catalog)
    stated = (
        observations.manifest.summary.get("expected_error", {}) if observations.manifest else {}
    )
    _run(
        lambda cluster, report: run(
            observations,
            out,
            settings,
            expected_error=stated,
            name=out.name,
            overwrite=overwrite,
            cluster=cluster,
            report=report,
        ),
        workers,
        memory_limit,
        scheduler,
        as_json,
        out,
    )


@app.command()
def reference(
    catalogs: Annotated[
        list[str],
        typer.Argument(help="Catalogs of stars as NAME=DIRECTORY, the preferred one first."),
    ],
    out: Out,
    method: Annotated[str, typer.Option(help="precedence or weighted-mean.")] = "precedence",
    radius_arcsec: Annotated[
        float, typer.Option(help="Stars without common ids within it are one.")
    ] = 1.5,
    workers: Workers = None,
    memory_limit: MemoryLimit = "auto",
    scheduler: Scheduler = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Unite the stars of several reference surveys, one row a star.

    Example: sos-dask reference apogee=apogee.stars galah=galah.stars -o reference
    """
    from sos_dask.catalog import Catalog
    from sos_dask.errors import ConfigError
    from sos_dask.stages.reference import ReferenceSettings
    from sos_dask.stages.reference import reference as run
    from sos_dask.unify import UnifySettings

    opened: dict[str, Catalog] = {}
    for text in catalogs:
        name, found, path = text.partition("=")
        if not found or not name:
            raise ConfigError(f"'{text}' is not NAME=DIRECTORY")
        if name in opened:
            raise ConfigError(f"two surveys are named '{name}'")
        opened[name] = Catalog.open(path)
    settings = ReferenceSettings(UnifySettings(method, tuple(opened)), radius_arcsec)
    _run(
        lambda cluster, report: run(
            opened,
            out,
            settings,
            name=out.name,
            overwrite=overwrite,
            cluster=cluster,
            report=report,
        ),
        workers,
        memory_limit,
        scheduler,
        as_json,
        out,
    )


@app.command()
def crossmatch(
    left: Annotated[Path, typer.Argument(help="Target: a catalog of observations or stars.")],
    right: Annotated[Path, typer.Argument(help="Reference: a catalog of stars.")],
    radius_arcsec: Annotated[float, typer.Option(help="Largest separation of a pair.")],
    out: Out,
    pairs: Annotated[
        str, typer.Option(help="best: one pair a target row; all: every pair.")
    ] = "best",
    id_radius_arcsec: Annotated[
        float, typer.Option(help="Pairs of one Gaia id lie within it.")
    ] = 10.0,
    gaia_id: Annotated[bool, typer.Option(help="Use Gaia ids where the releases agree.")] = True,
    folds: Annotated[int, typer.Option(min=2, max=100, help="Folds for cross-validation.")] = 5,
    seed: Annotated[int, typer.Option(help="Other seeds give other folds.")] = 0,
    workers: Workers = None,
    memory_limit: MemoryLimit = "auto",
    scheduler: Scheduler = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Match a target catalog with a reference catalog, exactly.

    Example: sos-dask crossmatch lamost.stars reference --radius-arcsec 1 -o pairs
    """
    from sos_dask.catalog import Catalog
    from sos_dask.crossmatch import MatchSettings
    from sos_dask.stages.crossmatch import PairSettings
    from sos_dask.stages.crossmatch import crossmatch as run

    settings = PairSettings(
        MatchSettings(radius_arcsec, id_radius_arcsec, pairs, gaia_id), folds, seed
    )
    target, other = Catalog.open(left), Catalog.open(right)
    _run(
        lambda cluster, report: run(
            target,
            other,
            out,
            settings,
            name=out.name,
            overwrite=overwrite,
            cluster=cluster,
            report=report,
        ),
        workers,
        memory_limit,
        scheduler,
        as_json,
        out,
    )


@app.command()
def train(
    pairs: Annotated[Path, typer.Argument(help="Catalog of pairs.")],
    out: Out,
    method: Annotated[str, typer.Option("--method", "-m", help="polynomial or boosted.")],
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", help="Setting of the method, NAME=VALUE.")
    ] = None,
    validation: Annotated[str, typer.Option(help="auto, kfold or holdout.")] = "auto",
    workers: Workers = None,
    memory_limit: MemoryLimit = "auto",
    scheduler: Scheduler = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Learn the difference target - reference from pairs; print held-out metrics.

    Example: sos-dask train pairs --method boosted -p n_rounds=800 -o model
    """
    from sos_dask.catalog import Catalog
    from sos_dask.stages.train import TrainSettings, metrics_of
    from sos_dask.stages.train import train as run

    settings = TrainSettings(method, dict(_setting(text) for text in param or []), validation)
    opened = Catalog.open(pairs)

    def step(cluster: Cluster, report: Report) -> Manifest:
        manifest = run(opened, out, settings, overwrite=overwrite, cluster=cluster, report=report)
        if not as_json:
            _print_metrics(metrics_of(manifest))
        return manifest

    _run(step, workers, memory_limit, scheduler, as_json, out)


def _setting(text: str) -> tuple[str, Any]:
    from sos_dask.errors import ConfigError

    name, found, value = text.partition("=")
    if not found:
        raise ConfigError(f"--param '{text}' is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _print_metrics(metrics: list[Metric] | tuple[Metric, ...], chosen: str = "") -> None:
    table = _table(
        "Held-out pairs: target - reference, median and scatter (1.4826 MAD)",
        "label", "method", "n", "median before", "median after", "scatter before", "scatter after",
    )  # fmt: skip
    for metric in sorted(metrics, key=lambda m: (m.label != "teff", m.label, m.method)):
        digits = 1 if metric.label == "teff" else 4
        unit = "K" if metric.label == "teff" else "dex"
        table.add_row(
            metric.label,
            metric.method + (" *" if metric.method == chosen else ""),
            f"{metric.n:,}",
            *(
                f"{value:+.{digits}f} {unit}"
                for value in (metric.median_before, metric.median_after)
            ),
            *(
                f"{value:.{digits}f} {unit}"
                for value in (metric.scatter_before, metric.scatter_after)
            ),
        )
    console = _console()
    console.print(table)
    if chosen:
        console.print("* the method that corrects the catalog", highlight=False)


@app.command()
def apply(
    model: Annotated[Path, typer.Argument(help="Directory of a trained model.")],
    catalog: CatalogPath,
    out: Out,
    partitions: Annotated[
        str, typer.Option("--partitions", help="all, i/N, indices 0-9,12 or HEALPix pixels 2:44.")
    ] = "all",
    workers: Workers = None,
    memory_limit: MemoryLimit = "auto",
    scheduler: Scheduler = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Correct the labels of every row; several processes may share one output.

    Example, one task of a job array: sos-dask apply model lamost -o corrected --partitions 3/16
    """
    from sos_dask.catalog import Catalog
    from sos_dask.stages.apply import apply as run
    from sos_dask.stages.apply import parse_partitions

    opened = Catalog.open(catalog)
    parse_partitions(partitions, opened.pixels)
    _run(
        lambda cluster, report: run(
            model,
            opened,
            out,
            partitions=partitions,
            name=out.name,
            overwrite=overwrite,
            cluster=cluster,
            report=report,
        ),
        workers,
        memory_limit,
        scheduler,
        as_json,
        out,
    )


@app.command()
def rebuild(
    job: Annotated[Path, typer.Argument(help="Job file (TOML).")],
    store: Annotated[
        Path | None, typer.Option("--store", help="Used instead of the job's store.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and why.")
    ] = False,
    workers: Workers = None,
    memory_limit: Annotated[str | None, typer.Option(help="Memory of each worker.")] = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
) -> None:
    """Run every stage of a job that has changed, and publish the products.

    Example: sos-dask rebuild jobs/real.toml --dry-run
    """
    from sos_dask import pipeline
    from sos_dask.config import load_job

    loaded = load_job(job)
    if dry_run:
        stages = pipeline.plan(loaded, store)
        if as_json:
            document = [
                {
                    "product": s.product,
                    "stage": s.recipe.stage,
                    "runs": not s.complete,
                    "why": s.reason,
                }
                for s in stages
            ]
            print(json.dumps({"stages": document}, indent=1))
            return
        table = _table("Plan", "product", "runs", "why")
        for stage in stages:
            table.add_row(stage.product, "no" if stage.complete else "yes", stage.reason)
        _console().print(table)
        return
    build = _rebuild(loaded, store, workers, memory_limit, scheduler, as_json)
    if as_json:
        print(json.dumps(_build_document(build), indent=1))
    else:
        _print_build(build)


def _rebuild(
    job: Any,
    store: Path | None,
    workers: int | None,
    memory_limit: str | None,
    scheduler: str | None,
    quiet: bool,
) -> Any:
    from sos_dask import pipeline

    section = job.cluster
    with _reporting(quiet) as report:
        return pipeline.rebuild(
            job,
            store,
            cluster=lambda: _cluster(
                section.n_workers if workers is None else workers,
                memory_limit or section.memory_limit,
                scheduler or section.scheduler,
            ),
            report=report,
        )


def _build_document(build: Any) -> dict[str, Any]:
    return {
        "build": build.name,
        "path": str(build.path),
        "chosen": build.chosen,
        "stages": {
            stage.product: {
                "stage": stage.stage,
                "ran": stage.ran,
                "why": stage.why,
                "rows": {
                    "in": stage.rows_in,
                    "out": stage.rows_out,
                    "rejected": stage.rejected,
                    "dropped": stage.dropped,
                    "added": stage.added,
                },
                "summary": {k: v for k, v in stage.summary.items() if k != "metrics"},
            }
            for stage in build.stages
        },
        "metrics": [asdict(metric) for metric in build.metrics],
        "products": build.products,
    }


def _stages_table(title: str, stages: Any) -> Any:
    table = _table(title, "product", "rows in", "out", "rejected", "dropped", "why")
    for stage in stages:
        dropped = ", ".join(
            f"{count:,} {reason}" for reason, count in stage.dropped.items() if count
        )
        counted = stage.stage != "choose"
        table.add_row(
            stage.product,
            f"{stage.rows_in:,}" if counted else "",
            f"{stage.rows_out:,}" if counted else "",
            f"{stage.rejected:,}" if counted else "",
            dropped,
            stage.why,
        )
    return table


def _print_build(build: Any) -> None:
    console = _console()
    console.print(_stages_table("Stages", build.stages))
    _print_metrics(build.metrics, build.chosen)
    console.print(f"Products: {build.path}", highlight=False, soft_wrap=True)
    for product in build.products:
        console.print(f"  {product}", highlight=False)


@app.command()
def status(store: Store = Path("store"), as_json: Json = False) -> None:
    """Show the current build of a store, unfinished outputs and space.

    Example: sos-dask status --store store
    """
    from sos_dask.pipeline import status as run

    found = run(store)
    if as_json:
        print(json.dumps(asdict(found), indent=1, default=str))
        return
    console = _console()
    console.print(
        f"current build: {found.current or 'none'} (of {len(found.builds)})", highlight=False
    )
    console.print(_stages_table("Products", found.products))
    for name in found.unfinished:
        console.print(f"unfinished: {name}", highlight=False)
    console.print(
        f"{found.bytes / 2**20:,.1f} MiB, "
        f"of which no build uses {found.unused_bytes / 2**20:,.1f} MiB",
        highlight=False,
    )


@app.command()
def verify(
    catalogs: Annotated[list[Path], typer.Argument(help="Directories of catalogs.")],
    as_json: Json = False,
) -> None:
    """Check every invariant of catalogs: rows, order, pixels, keys, hashes.

    Example: sos-dask verify store/current/lamost.corrected
    """
    from sos_dask.verify import verify as run

    problems = {str(path): run(path) for path in catalogs}
    if as_json:
        print(json.dumps(problems, indent=1))
    else:
        for name, found in problems.items():
            print(f"{name}: {'all invariants hold' if not found else f'{len(found)} problems'}")
            for problem in found:
                print(f"  {problem}")
    if any(problems.values()):
        raise typer.Exit(5)


@app.command()
def gc(
    store: Store = Path("store"),
    keep_builds: Annotated[int, typer.Option(help="How many of the latest builds stay.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove old builds and outputs that no kept build uses.

    Example: sos-dask gc --store store --keep-builds 3 --dry-run
    """
    from sos_dask.pipeline import gc as run

    removed = run(store, keep_builds=keep_builds, dry_run=dry_run)
    for path, size in removed:
        print(f"{'would remove' if dry_run else 'removed'} {path} ({size / 2**20:.1f} MiB)")
    print(f"{len(removed)} items, {sum(size for _, size in removed) / 2**20:.1f} MiB")


@app.command()
def demo(
    rows: Annotated[int, typer.Option("--rows", min=1000, help="LAMOST rows.")] = 200_000,
    store: Store = Path("demo-store"),
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same sky.")] = 1,
    workers: Workers = None,
    memory_limit: MemoryLimit = "auto",
    as_json: Json = False,
) -> None:
    """Simulate a sky, correct it end to end, and compare with the truth.

    Example: sos-dask demo --rows 200000 --store demo-store
    """
    from sos_dask import demo as module
    from sos_dask.config import load_job

    with _reporting(as_json) as report:
        job = load_job(module.prepare(store, rows, seed, report))
    build = _rebuild(job, None, workers, memory_limit, None, as_json)
    recovered = module.against_truth(
        build.path / "lamost.corrected", store / "sky" / "truth.parquet"
    )
    if as_json:
        document = {**_build_document(build), "truth": [asdict(item) for item in recovered]}
        print(json.dumps(document, indent=1))
        return
    _print_build(build)
    table = _table(
        "Against the truth of the simulation: rms of binned medians of label - truth, dense region",
        "label", "binned by", "bins", "n", "before", "after",
    )  # fmt: skip
    for item in recovered:
        digits = 1 if item.label == "teff" else 4
        table.add_row(
            item.label,
            item.binned_by,
            str(item.n_bins),
            f"{item.n:,}",
            f"{item.rms_before:.{digits}f}",
            f"{item.rms_after:.{digits}f}",
        )
    _console().print(table)


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show tracebacks.")] = False,
) -> None:
    if version:
        from sos_dask import __version__

        print(__version__)
        raise typer.Exit
