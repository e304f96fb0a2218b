"""Commands on jobs, stores, outputs and surveys as wholes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sos_dask.cli.options import (
    JobOrStore,
    Json,
    MemoryLimit,
    OptionalMemoryLimit,
    Rows,
    Scheduler,
    Seed,
    StepOptions,
    Store,
    Workers,
    find_store,
    with_settings,
)
from sos_dask.cli.output import (
    LABEL_UNITS,
    build_document,
    complain,
    console,
    digits_of,
    is_wide,
    print_json,
    reporting,
    say,
    show_build,
    show_stages,
    show_table,
    shown,
    shown_lines,
    stage_document,
    with_unit,
)
from sos_dask.cli.steps import run_step
from sos_dask.errors import CatalogError, SosError

if TYPE_CHECKING:
    from sos_dask.rebuild.job import Job
    from sos_dask.rebuild.pipeline import Build

_MIB = 2**20


def demo(
    rows: Rows = 200_000,
    store: Annotated[
        Path, typer.Option("--store", metavar="DIRECTORY", help="Folder that gets everything.")
    ] = Path("demo-store"),
    seed: Seed = 1,
    workers: Workers = None,
    memory_limit: MemoryLimit = "auto",
    as_json: Json = False,
) -> None:
    """Simulate a sky, correct it end to end, and compare with the truth.

    Example: sos-dask demo --rows 200000 --store demo-store
    """
    from sos_dask.rebuild.job import load_job
    from sos_dask.simulate.files import against_truth, prepare

    with reporting() as report:
        job = load_job(prepare(store, rows, seed, report))
    build = _rebuild(job, None, workers, memory_limit, None)
    recovered = against_truth(build.path / "lamost.corrected", store / "sky" / "truth.parquet")
    if as_json:
        print_json({**build_document(build), "truth": [asdict(item) for item in recovered]})
        return
    show_build(build)
    table = []
    for item in recovered:
        digits = 1 if item.label == "teff" else 4
        table.append(
            [
                f"{item.label} [{LABEL_UNITS[item.label]}]",
                item.binned_by,
                str(item.n_bins),
                f"{item.n:,}",
                f"{item.rms_before:.{digits}f}",
                f"{item.rms_after:.{digits}f}",
            ]
        )
    show_table(
        "Label - truth in the dense region: rms of the medians of bins",
        ["label", "binned by", ">bins", ">rows", ">before", ">after"],
        table,
    )


def rebuild(
    job: Annotated[Path, typer.Argument(help="Job file (TOML).")],
    store: Annotated[
        Path | None,
        typer.Option("--store", metavar="DIRECTORY", help="Used instead of the job's store."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would run, and why; run nothing.")
    ] = False,
    workers: Workers = None,
    memory_limit: OptionalMemoryLimit = None,
    scheduler: Scheduler = None,
    as_json: Json = False,
) -> None:
    """Run every stage of a job that has changed, and publish the products.

    Example: sos-dask rebuild jobs/real.toml --dry-run
    """
    from sos_dask.rebuild.job import load_job
    from sos_dask.rebuild.plan import plan

    loaded = load_job(job)
    if not dry_run:
        build = _rebuild(loaded, store, workers, memory_limit, scheduler)
        if as_json:
            print_json(build_document(build))
        else:
            show_build(build)
        return
    stages = plan(loaded, store)
    if as_json:
        document = {
            stage.product: {
                "stage": stage.recipe.stage,
                "runs": not stage.complete,
                "why": stage.reason,
            }
            for stage in stages
        }
        print_json({"stages": document})
        return
    table = [[s.product, "no" if s.complete else "yes", s.reason] for s in stages]
    show_table("Plan", ["product", "runs", "why"], table)
    say(f"{sum(not stage.complete for stage in stages)} of {len(stages)} stages would run")


def _rebuild(
    job: Job,
    store: Path | None,
    workers: int | None,
    memory_limit: str | None,
    scheduler: str | None,
) -> Build:
    from sos_dask.rebuild import pipeline
    from sos_dask.run.cluster import check_place, start

    section = job.cluster
    if workers is None and scheduler is None:  # else the job's place of work is replaced
        workers, scheduler = section.n_workers, section.scheduler
        memory_limit = memory_limit or section.memory_limit
    elif memory_limit is None:
        memory_limit = "auto" if scheduler else section.memory_limit
    check_place(workers, str(memory_limit), scheduler)
    with reporting() as report:
        return pipeline.rebuild(
            job,
            store,
            cluster=lambda: start(workers, str(memory_limit), scheduler),
            report=report,
        )


def status(job: JobOrStore = None, store: Store = None, as_json: Json = False) -> None:
    """Show the current build of a store, unfinished outputs and space.

    Example: sos-dask status jobs/real.toml
    """
    from sos_dask.storage.store import status as run

    found = run(find_store(store, job))
    if as_json:
        print_json(
            {
                "store": found.store,
                "current": found.current,
                "builds": found.builds,
                "products": {s.product: stage_document(s) for s in found.products},
                "missing": found.missing,
                "unfinished": found.unfinished,
                "bytes": found.bytes,
                "unused_bytes": found.unused_bytes,
            }
        )
        return
    say(f"Current build: {found.current or 'none'} (of {len(found.builds)})")
    if found.products:
        show_stages("Products", found.products, with_reason=False)
    for text in found.missing:
        say(f"Missing: {text}")
    for name in found.unfinished:
        say(f"Unfinished: {name}")
    say(
        f"Space: {found.bytes / _MIB:,.1f} MiB, "
        f"of which no build uses {found.unused_bytes / _MIB:,.1f} MiB"
    )


def gc(
    job: JobOrStore = None,
    store: Store = None,
    keep_builds: Annotated[
        int,
        typer.Option("--keep-builds", metavar="N", help="Number of latest builds to keep."),
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be removed; remove nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove old builds and outputs that no kept build uses.

    Example: sos-dask gc --store store --keep-builds 3 --dry-run
    """
    from sos_dask.storage.store import gc as run

    removed = run(find_store(store, job), keep_builds=keep_builds, dry_run=dry_run)
    if as_json:
        items = [{"path": path, "bytes": size} for path, size in removed]
        print_json({"dry_run": dry_run, "removed": items})
        return
    for path, size in removed:
        say(f"{'would remove' if dry_run else 'removed'} {path} ({size / _MIB:.1f} MiB)")
    say(f"{len(removed)} items, {sum(size for _, size in removed) / _MIB:.1f} MiB")


def uncertainty(job: JobOrStore = None, store: Store = None, as_json: Json = False) -> None:
    """Show the errors of the current build: hit rates, factors of quoted errors, hat.

    Example: sos-dask uncertainty --store store
    """
    from sos_dask.stages.uncertainty import Uncertainty
    from sos_dask.storage.store import current_product

    directory = current_product(find_store(store, job), "uncertainty")
    summary = Uncertainty.load(directory)
    rates = summary["hit_rates"]
    if as_json:
        print_json({"path": directory, **summary})
        return
    show_table(
        f"Held-out pairs inside their interval, with its 95 % range (method {summary['method']}; "
        f"error of the reference {summary['reference_error']})",
        ["label", "pairs", ">n", ">68 %", ">range", ">95 %", ">range"],
        [
            [one["label"], one["subset"], f"{one['n']:,}", *_share(one), *_share(other)]
            for one, other in zip(rates[::2], rates[1::2], strict=True)
        ],
    )
    show_table(
        "Quoted errors by repeats: what they must be multiplied by (1 where too few are known)",
        ["survey", "label", "stars", "S/N", ">n", ">factor", ">95 % range"],
        [
            [survey, one["label"], one["kind"], _snr_range(one), f"{one['n']:,}", *_factor(one)]
            for survey, factors in summary["error_factors"].items()
            for one in factors
        ],
    )
    if summary["three_cornered_hat"]:
        show_table(
            "Errors of three surveys from their differences on common stars",
            ["label", "survey", ">stars", ">error", ">95 % range"],
            [_corner(one) for one in summary["three_cornered_hat"]],
        )


def _share(one: Mapping[str, Any]) -> list[str]:
    return [f"{100 * one['hit_rate']:.1f}", f"{100 * one['low']:.1f}-{100 * one['high']:.1f}"]


def _snr_range(one: Mapping[str, Any]) -> str:
    low, high = one["snr_low"], one["snr_high"]
    if low is None:
        return "all" if high is None else f"< {high:g}"
    return f">= {low:g}" if high is None else f"{low:g}-{high:g}"


def _factor(one: Mapping[str, Any]) -> list[str]:
    known = one["low"] is not None
    return [f"{one['factor']:.3f}", f"{one['low']:.3f}-{one['high']:.3f}" if known else ""]


def _corner(one: Mapping[str, Any]) -> list[str]:
    digits = digits_of(one["label"])
    error = "negative" if one["sigma"] is None else f"{one['sigma']:.{digits}f}"
    return [
        with_unit(one["label"]),
        one["survey"],
        f"{one['n']:,}",
        error + (" !" if one["negative"] and one["sigma"] is not None else ""),
        f"{one['low']:.{digits}f} .. {one['high']:.{digits}f}",
    ]


@with_settings
def report(
    job: JobOrStore = None,
    store: Store = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIRECTORY",
            help="Directory that gets the report. Default: that of the build, or STORE/report.",
        ),
    ] = None,
    *,
    options: StepOptions,
) -> None:
    """Make a page with figures of the current build, or print where it is.

    Example: sos-dask report --store store -o report
    """
    from sos_dask.stages.report import PAGE, of_build
    from sos_dask.storage.manifest import Manifest

    store = find_store(store, job)
    there = (store / "current" / "report").resolve()
    if out is None and (there / PAGE).is_file():
        options.refuse(
            ("workers", "scheduler", "memory_limit", "overwrite"),
            f": the build has its report already, {there}",
            "Give --out to make it again in another directory.",
        )
        out, manifest = there, Manifest.checked(there)
    else:
        out = out or store / "report"
        made = run_step(of_build(store), out, options)
        assert made is not None
        manifest = made
    page = out / PAGE
    if options.as_json:
        print_json({"path": out, "page": page, **manifest.summary})
    else:
        say(f"{page}: {len(manifest.summary['figures'])} figures, also in {out / 'figures'}")


def surveys(
    name: Annotated[
        str | None, typer.Argument(help="Name of a survey, or path of a survey TOML.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the surveys, or explain one: columns, units, missing values, quality cuts.

    Example: sos-dask surveys lamost-dr11-lrs
    """
    from sos_dask.surveys import definition as of

    if name is None:
        found = [of.load_survey(item) for item in of.builtin_surveys()]
        if as_json:
            print_json({"surveys": [{"name": s.name, "title": s.title} for s in found]})
        else:
            show_table("Surveys", ["name", "title"], [(s.name, s.title) for s in found])
            say("Run sos-dask surveys NAME for columns and quality cuts.")
        return
    survey = of.load_survey(name)
    columns, cuts = of.describe_columns(survey), of.describe_cuts(survey)
    if as_json:
        print_json(
            {
                "name": survey.name,
                "title": survey.title,
                "reference": survey.reference,
                "columns": [dict(zip(of.COLUMN_HEADINGS, row, strict=True)) for row in columns],
                "cuts": [dict(zip(of.CUT_HEADINGS, row, strict=True)) for row in cuts],
                "missing": survey.missing,
                "missing_text": survey.missing_text,
                "notes": survey.notes,
            }
        )
        return
    say(f"{survey.name}: {survey.title}\n{survey.reference}\n")
    # Types and UCDs need a wide terminal; --json always has them.
    places = range(6) if is_wide() else (0, 1, 2, 5)
    headings = [of.COLUMN_HEADINGS[place] for place in places]
    show_table("Columns", headings, [[row[place] for place in places] for row in columns])
    show_table("Quality cuts: a row that fails one has its bit in quality", of.CUT_HEADINGS, cuts)
    if survey.missing:
        say(f"Missing values: {', '.join(f'{value:g}' for value in survey.missing)}")
    if survey.notes:
        console().print(shown_lines(survey.notes.strip()), markup=False, emoji=False)


def verify(
    catalogs: Annotated[
        list[Path], typer.Argument(help="Directories of outputs; of a store or build: all in it.")
    ],
    as_json: Json = False,
) -> None:
    """Check every invariant of catalogs (rows, order, pixels, keys, hashes) and other outputs.

    Example: sos-dask verify store/current
    """
    from sos_dask.storage.store import outputs_of
    from sos_dask.storage.store import verify as run

    problems: dict[str, list[str]] = {}
    errors: list[SosError] = []
    for given in catalogs:
        try:
            for path in outputs_of(given):
                problems[str(path)] = run(path)
        except SosError as error:
            errors.append(error)
    if as_json and (problems or not errors):
        print_json({"problems": problems})
    elif not as_json:
        for name, found in problems.items():
            say(f"{name}: {'no problem found' if not found else f'{len(found)} problems'}")
            for problem in found:
                say(f"  {problem}")
    for refused in errors:
        complain(f"error: {shown(refused.message)}", refused.hint)
    codes = [refused.exit_code for refused in errors]
    if any(problems.values()):
        codes.append(CatalogError.exit_code)
    if codes:
        raise typer.Exit(max(codes))
