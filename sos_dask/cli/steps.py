"""Commands that make something: single steps on catalogs given by path, and whole rebuilds."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sos_dask import corrections
from sos_dask.cli.options import (
    Name,
    Names,
    Options,
    Place,
    Shown,
    cluster_settings,
    command,
    open_catalogs,
)
from sos_dask.cli.output import (
    LOG_FORMATS,
    Row,
    complain,
    print_line,
    reporting,
    say,
    show_estimate,
    show_metrics,
    show_stages,
    show_step,
    show_table,
    shown,
    stage_document,
)
from sos_dask.errors import CatalogError, ConfigError, GateError
from sos_dask.rebuild.job import Job, load_job
from sos_dask.run.cluster import check_place, start
from sos_dask.settings import NAME_RULE, is_name
from sos_dask.stages.apply import Apply
from sos_dask.stages.attach import Attach, Margin, MarginSettings
from sos_dask.stages.base import Stage
from sos_dask.stages.crossmatch import Crossmatch
from sos_dask.stages.dedupe import Dedupe
from sos_dask.stages.ingest import Ingest
from sos_dask.stages.reference import Reference
from sos_dask.stages.train import LOCAL_PAIRS, Train, asks_workers, metrics_of
from sos_dask.stages.unify import Unify
from sos_dask.storage import export as files
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.objects import as_path, followed, on_disk
from sos_dask.surveys.definition import load_survey

if TYPE_CHECKING:
    from sos_dask.rebuild.pipeline import Build


_NO_ID = ("id_radius_arcsec",)


@command()
def simulate(
    *, out: Path, rows: int = 200_000, rave: int = 0, rvs: int = 0, clusters: int = 0,
    binaries: float = 0.0, seed: int = 1, sky: Names = None, no_bias: bool = False,
    overwrite: bool = False,
) -> Shown:  # fmt: skip
    """Write a mock sky with known truth, as the surveys' own FITS tables.

    Example: sos-dask simulate --rows 1000000 -o sky
    """
    from sos_dask import simulate as module

    on_disk(out, "the folder of the sky")
    there = [path for path in module.sky_files(out).values() if path.exists()]
    if there and not overwrite:
        raise CatalogError(
            f"{there[0]} exists", "Choose another directory, or give --overwrite to replace it."
        )
    shapes: Any = tuple(sky or ())  # the settings check them
    more: Any = {"n_rave": rave, "n_rvs": rvs, "n_clusters": clusters, "binaries": binaries}
    more |= {"seed": seed, "bias": not no_bias}
    settings = module.SkySettings(n_lamost=rows, sky=shapes, **more)
    with reporting() as report:
        files = module.simulate(settings, out, report)
    yield {"files": files}
    for name, path in files.items():
        say(f"{name:8} {path}")


@command(Ingest)
def ingest(
    survey: str, files: list[Path], *, margin_arcsec: float | None = None, options: Options
) -> None:
    """Turn survey files into a HEALPix-partitioned catalog of observations.

    Example: sos-dask ingest lamost-dr11-lrs dr11_v2.0_LRS_stellar.fits.gz -o lamost
    """
    out = options.out
    chosen = options.settings(survey=load_survey(survey), name=out.name)
    if margin_arcsec is not None and not 0 < margin_arcsec < 3600:
        raise ConfigError(f"--margin-arcsec {margin_arcsec:g} is not between 0 and 3600")
    inputs = {f"file.{place}": file for place, file in enumerate(files)}
    manifest = options.run(Ingest(inputs, chosen))
    if margin_arcsec is not None:
        margin = Margin({"catalog": out}, MarginSettings(radius_arcsec=margin_arcsec))
        options.run(margin, out.with_name(f"{out.name}.collection"))
    show_step(manifest, out, options.as_json)


@command(Attach)
def attach(
    catalog: Path, other: Path, *, columns: list[str], key: Names = None, options: Options
) -> Stage[Any]:
    """Add columns of another catalog, by Gaia id or position; null where it has no counterpart.

    Example: sos-dask attach lamost gaia -c distance -c ebv -o lamost.with-gaia
    """
    names = {}
    for text in columns:
        name, _, source = text.partition("=")
        if not name or name in names:
            raise ConfigError(f"--column '{text}' names no column, or one that was given before")
        names[name] = source or name
    chosen = options.settings(columns=names)
    if chosen.by == "position":
        options.refuse(_NO_ID, " by position")
    else:
        options.refuse(("radius_arcsec",), " by Gaia id")
    opened, companion = open_catalogs([catalog, other], key)
    return Attach({"catalog": opened, "other": companion}, chosen)


@command(Dedupe)
def dedupe(catalog: Path, *, key: Names = None, options: Options) -> Stage[Any]:
    """Combine repeats of one star into one row.

    Rows with a proper motion and an epoch are compared at the latest epoch of the catalog.

    Example: sos-dask dedupe lamost -o lamost.stars --method best-snr
    """
    chosen = options.settings()
    if not chosen.use_gaia_id:
        options.refuse(_NO_ID, " with --no-gaia-id")
    [opened] = open_catalogs([catalog], key, "obs_id")
    return Dedupe({"observations": opened}, chosen)


@command(Reference)
def reference(
    catalogs: list[str], *, no_offsets: bool = False, key: Names = None, options: Options
) -> Stage[Any]:
    """Unite the stars of several reference surveys, one row per star.

    Example: sos-dask reference apogee=apogee.stars galah=galah.stars -o reference
    """
    paths = _by_survey(catalogs)
    opened = open_catalogs(paths.values(), key)
    stars = {f"stars.{name}": one for name, one in zip(paths, opened, strict=True)}
    return Reference(
        stars, options.settings(order=tuple(paths), offsets={} if no_offsets else "measured")
    )


@command(Unify)
def unify(
    catalogs: list[str], *, label: Names = None, stars: Names = None,
    reference: Path | None = None, key: Names = None, options: Options,
) -> Stage[Any]:  # fmt: skip
    """Make one row a star of the rows of all surveys, with labels averaged.

    Example: sos-dask unify apogee=apogee.observations lamost=lamost.corrected -o sos
    """
    paths = _by_survey(catalogs)
    opened = open_catalogs(paths.values(), key)
    inputs: dict[str, Any] = {f"rows.{x}": one for x, one in zip(paths, opened, strict=True)}
    inputs |= {f"stars.{name}": path for name, path in _by_survey(stars or []).items()}
    inputs |= {"reference": reference} if reference is not None else {}
    labels: Any = {"labels": tuple(label)} if label else {}
    return Unify(inputs, options.settings(order=tuple(paths), **labels))


def _by_survey(texts: list[str]) -> dict[str, str]:
    """Directories by survey, of NAME=DIRECTORY."""
    paths: dict[str, str] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not (name and path):
            raise ConfigError(f"'{text}' is not NAME=DIRECTORY", "For example apogee=apogee.stars.")
        if not is_name(name):
            raise ConfigError(f"a survey cannot be named '{name}': {NAME_RULE}")
        if name in paths:
            raise ConfigError(f"two surveys are named '{name}'", "Give each a name of its own.")
        paths[name] = path
    return paths


@command(Crossmatch)
def crossmatch(left: Path, right: Path, *, key: Names = None, options: Options) -> Stage[Any]:
    """Match a target catalog with a reference catalog, exactly.

    Example: sos-dask crossmatch lamost.stars reference -o pairs
    """
    chosen = options.settings()
    if not chosen.use_gaia_id:
        options.refuse(_NO_ID, " with --no-gaia-id")
    target, stars = open_catalogs([left, right], key)
    return Crossmatch({"target": target, "reference": stars}, chosen)


@command(Train)
def train(pairs: Path, *, method: str, param: Names = None, options: Options) -> None:
    """Learn the difference target - reference from pairs; print held-out metrics.

    Example: sos-dask train pairs --method boosted -p n_rounds=800 -o model
    """
    seeded = {"seed": options.settings(method=method, params={}).seed}
    seeded = seeded if "seed" in corrections.class_of(method).parameters.model_fields else {}
    given = dict(_setting(text) for text in param or [])
    params = corrections.check_params(method, seeded | given)
    chosen = options.settings(method=method, params=params)
    catalog = Catalog.open(pairs)
    if not {label.diff for label in chosen.problem.labels} <= set(catalog.schema.names):
        what = f"{pairs} is not a catalog of pairs"
        raise CatalogError(what, "Make them: sos-dask crossmatch LEFT RIGHT -o PAIRS.")
    if chosen.search and not corrections.class_of(method).search:
        raise ConfigError(f"--search has no effect: method '{method}' has no parameters to search")
    if chosen.validation != "auto":
        options.refuse(("kfold_limit",), f" with --validation {chosen.validation}")
    if options.wants_cluster:
        if not asks_workers(catalog, chosen) and chosen.distributed == "never":
            options.refuse(("workers", "scheduler"), " with --distributed never")
        elif chosen.distributed == "auto":
            chosen = chosen.but(distributed="always")
    elif not asks_workers(catalog, chosen):
        if options.workers is None:
            options.refuse(
                ("memory_limit",),
                f": train uses one process for up to {LOCAL_PAIRS:,} pairs, and "
                f"{pairs} has {catalog.n_rows:,}",
                "Leave it out, or give --workers.",
            )
        options = replace(options, workers=0)  # none are started to wait
    manifest = options.run(Train({"pairs": catalog}, chosen))
    if manifest is not None and not options.as_json:
        show_metrics(metrics_of(manifest))
    show_step(manifest, options.out, options.as_json)


def _setting(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise ConfigError(f"--param '{text}' is not NAME=VALUE", "For example max_depth=4.")
    with suppress(ValueError, RecursionError):
        return name, json.loads(value)
    return name, value


@command(Apply)
def apply(
    model: Path, catalog: Path, *, errors: Place = None, coverage: Place = None,
    fallback: str = "edge", key: Names = None, options: Options,
) -> Stage[Any]:  # fmt: skip
    """Correct the labels of every row; several processes may share one output.

    Example, one task of a job array: sos-dask apply model lamost -o corrected --partitions 3/16
    """
    if coverage is None and fallback != "edge":
        raise ConfigError(
            "--fallback needs --coverage", "The correction fades where the coverage is low."
        )
    inputs: dict[str, Any] = {"model": model, "errors": errors, "coverage": coverage}
    if fallback not in ("none", "edge", "measured"):
        inputs, fallback = {**inputs, "smooth": as_path(fallback)}, "polynomial"
    [inputs["observations"]] = open_catalogs([catalog], key, "obs_id")
    given = {role: one for role, one in inputs.items() if one is not None}
    return Apply(given, options.settings(fallback=fallback))


@command()
def export(
    catalog: Path, *, file: Path, columns: Name = None, where: str = "",
    cone: tuple[float, float, float] | None = None, dictionary: Place = None,
    citation: Place = None, overwrite: bool = False,
) -> Shown:  # fmt: skip
    """Write a catalog to one file: FITS, VOTable, CSV, ECSV or Parquet, by the end of its name.

    Example: sos-dask export store/current/lamost.corrected -o lamost.fits --where "snr > 50"
    """
    chosen: Any = {"columns": columns.split(",") if columns else (), "where": where, "cone": cone}
    chosen |= {"dictionary": dictionary, "citation": citation, "overwrite": overwrite}
    with reporting() as report:
        made = files.export(Catalog.open(catalog), file, report=report, **chosen)
    yield made
    say(f"{file}: {made['rows']:,} rows, {len(made['columns'])} columns, {made['bytes']:,} bytes")


# --- whole rebuilds -----------------------------------------------------------------------------


@command()
def demo(
    *, rows: int = 200_000, store: Path = Path("demo-store"), seed: int = 1, sky: Names = None,
    workers: int | None = None, memory_limit: str = "auto",
) -> Shown:  # fmt: skip
    """Simulate a sky, correct it end to end, and compare with the truth.

    Example: sos-dask demo --rows 200000 --store demo-store
    """
    from sos_dask.simulate.files import against_truth, prepare

    on_disk(store, "the folder of the demonstration")
    with reporting() as report:
        job = load_job(prepare(store, rows, seed, report, sky or ()))
    build = _rebuild(job, None, workers, memory_limit)
    truth = store / "sky" / "truth.parquet"
    recovered = against_truth(build.path / "lamost.corrected", truth)
    yield {**_build_document(build), "truth": recovered}
    show_build(build)
    show_table(
        "Label - truth in the dense region: rms of the medians of bins",
        "label binned_by n_bins=bins n=rows rms_before=before rms_after=after",
        recovered,
    )


@command()
def rebuild(
    job: Path, *, store: Place = None, dry_run: bool = False, workers: int | None = None,
    memory_limit: Name = None, scheduler: Name = None, cluster: Names = None,
    log_format: str = "text", no_lock: bool = False,
) -> Shown:  # fmt: skip
    """Run every stage of a job that has changed, and publish the products.

    A build whose figures are outside of the limits of the job ([gate]) is kept, not published.

    Example: sos-dask rebuild jobs/real.toml --dry-run
    """
    from sos_dask.rebuild.plan import plan

    loaded = load_job(job)
    if log_format not in LOG_FORMATS:
        raise ConfigError(f"--log-format {log_format} is not {' or '.join(LOG_FORMATS)}")
    if not dry_run:
        place = (workers, memory_limit, scheduler, cluster)
        try:
            build = _rebuild(loaded, store, *place, log_format, not no_lock)
            yield _build_document(build)
            show_build(build)
        except GateError as error:
            complain(f"error: {shown(error.message)}", error.hint)
            yield {**_build_document(error.build), "exit_code": error.exit_code}
            show_stages("Stages", error.build.stages, "why")
        return
    stages: dict[str, dict[str, Any]] = {
        one.product: {"stage": one.recipe.stage, "runs": not one.complete, "why": one.reason}
        for one in plan(loaded, store)
    }
    yield {"stages": stages}
    words = {True: "yes", False: "no"}
    rows = [{**one, "product": x, "runs": words[one["runs"]]} for x, one in stages.items()]
    show_table("Plan", "product runs why", rows)
    say(f"{sum(one['runs'] for one in stages.values())} of {len(rows)} stages would run")


def _rebuild(
    job: Job, store: Place, workers: int | None, memory_limit: Name, scheduler: Name = None,
    cluster: Names = None, log_format: str = "text", lock: bool = True,
) -> Build:  # fmt: skip
    from sos_dask.rebuild.scheduled import scheduled

    of_job: dict[str, Any] = dict(job.place)
    given: dict[str, Any] = {"n_workers": workers, "scheduler": scheduler}
    if workers is not None or scheduler is not None:  # the job's place of work is replaced
        of_job = {"memory_limit": "auto" if scheduler else of_job["memory_limit"]}
    given |= {"memory_limit": memory_limit, **cluster_settings(cluster)}
    if given.get("kind", of_job.get("kind")) != of_job.get("kind"):
        of_job = {}  # its keys are of another kind
    place = of_job | {name: one for name, one in given.items() if one is not None}
    place = {"n_workers": None} | place
    check_place(**place)
    more: Any = {"told": show_estimate} if log_format == "text" else {"echo": print_line}
    with reporting(log_format) as report:
        more |= {"report": report, "lock": lock}
        return scheduled(job, store, cluster=lambda: start(**place), **more)


def _build_document(build: Build) -> Row:
    """A build as JSON values."""
    stages = {
        x.product: {"ran": x.ran, "why": x.why, "parts": x.parts, **stage_document(x)}
        for x in build.stages
    }
    kept = {"path": build.path, "products": build.products, "corrections": build.choices}
    told = {"outcome": build.outcome, "reasons": build.reasons}
    return {"build": build.name, **told, "stages": stages, **kept}


def show_build(build: Build) -> None:
    """Print a build: stages, metrics, and where the products are."""
    show_stages("Stages", build.stages, "why")
    for name, one in build.choices.items():
        show_metrics(one.metrics, one.chosen)
        say(f"Chosen for {name} is {one.why}.")
    for stage in build.stages:
        for text in stage.summary.get("warnings", ()):
            say(f"Warning, {stage.product}: {text}")
    current = build.path.parent.parent / "current"
    say(f"Products: {current} (build {build.name}, {build.outcome})")
    for name in build.products:
        if name.split(".")[-1] == "report":
            say(f"Report: {followed(current / name) / 'report.html'}")
