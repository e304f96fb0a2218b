"""Commands on a whole job and its store: demo, rebuild, status, gc."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sos_dask.cli.options import (
    JobOrStore,
    Json,
    MemoryLimit,
    OptionalMemoryLimit,
    Rows,
    Scheduler,
    Seed,
    Store,
    Workers,
    find_store,
)
from sos_dask.cli.output import (
    LABEL_UNITS,
    build_document,
    print_json,
    reporting,
    say,
    show_build,
    show_stages,
    show_table,
    stage_document,
)

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
    from sos_dask.simulate import demo as module

    with reporting() as report:
        job = load_job(module.prepare(store, rows, seed, report))
    build = _rebuild(job, None, workers, memory_limit, None)
    recovered = module.against_truth(
        build.path / "lamost.corrected", store / "sky" / "truth.parquet"
    )
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
