"""Commands that do one step of a rebuild on catalogs given by path."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from sos_dask.cli.options import (
    CatalogPath,
    IdRadius,
    Json,
    Key,
    LightStepOptions,
    NoGaiaId,
    Out,
    Radius,
    Rows,
    RowsPerPartition,
    Seed,
    StepOptions,
    open_catalogs,
    with_step_options,
)
from sos_dask.cli.output import print_json, reporting, say, show_metrics, show_step
from sos_dask.errors import CatalogError, ConfigError
from sos_dask.settings import NAME_RULE, is_name

if TYPE_CHECKING:
    from sos_dask.storage.artifact import Manifest


_Made = TypeVar("_Made")


def run_step(step: Callable[..., _Made], options: StepOptions) -> _Made:
    """Call a stage with a cluster and with progress on stderr."""
    with reporting() as report, options.start() as cluster:
        return step(overwrite=options.overwrite, cluster=cluster, report=report)


def simulate(
    out: Out,
    rows: Rows = 200_000,
    seed: Seed = 1,
    no_bias: Annotated[
        bool, typer.Option("--no-bias", help="No systematic difference between the surveys.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier sky.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a mock sky with known truth, as the surveys' own FITS tables.

    Example: sos-dask simulate --rows 1000000 -o sky
    """
    from sos_dask.simulate import SkySettings, sky_files
    from sos_dask.simulate import simulate as run

    there = [path for path in sky_files(out).values() if path.exists()]
    if there and not overwrite:
        raise CatalogError(
            f"{there[0]} exists", "Choose another directory, or give --overwrite to replace it."
        )
    with reporting() as report:
        files = run(SkySettings(n_lamost=rows, seed=seed, bias=not no_bias), out, report)
    if as_json:
        print_json({"files": files})
        return
    for name, path in files.items():
        say(f"{name:8} {path}")


@with_step_options
def ingest(
    survey: Annotated[str, typer.Argument(help="Name of a survey, or path of a survey TOML.")],
    files: Annotated[list[Path], typer.Argument(help="Files of the survey.")],
    out: Out,
    rows_per_partition: RowsPerPartition = 1_000_000,
    margin_arcsec: Annotated[
        float | None,
        typer.Option(
            "--margin-arcsec",
            metavar="X",
            help="Also write a margin catalog, OUT.collection, for LSDB.",
        ),
    ] = None,
    *,
    options: LightStepOptions,
) -> None:
    """Turn survey files into a HEALPix-partitioned catalog of observations.

    Example: sos-dask ingest lamost-dr11-lrs dr11_v2.0_LRS_stellar.fits.gz -o lamost
    """
    from sos_dask.stages.ingest import IngestSettings
    from sos_dask.stages.ingest import ingest as run
    from sos_dask.stages.margin import margin
    from sos_dask.storage.catalog import Catalog
    from sos_dask.surveys.definition import load_survey

    definition = load_survey(survey)
    if margin_arcsec is not None and not 0 < margin_arcsec < 3600:
        raise ConfigError(f"--margin-arcsec {margin_arcsec:g} is not between 0 and 3600")
    settings = IngestSettings(rows_per_partition=rows_per_partition)

    def step(**context: Any) -> Manifest:
        manifest = run(definition, files, out, settings, name=out.name, **context)
        if margin_arcsec is not None:
            collection = out.with_name(f"{out.name}.collection")
            margin(Catalog.open(out), collection, margin_arcsec, **context)
        return manifest

    show_step(run_step(step, options), out, options.as_json)


@with_step_options
def dedupe(
    catalog: CatalogPath,
    out: Out,
    method: Annotated[
        str,
        typer.Option("--method", metavar="NAME", help="inverse-variance, best-snr or median."),
    ] = "inverse-variance",
    radius_arcsec: Radius = 1.5,
    id_radius_arcsec: IdRadius = 10.0,
    max_spread: Annotated[
        float,
        typer.Option(
            "--max-spread",
            metavar="X",
            help="Flag stars whose repeats differ by more than this many expected errors.",
        ),
    ] = 5.0,
    no_gaia_id: NoGaiaId = False,
    key: Key = None,
    *,
    options: LightStepOptions,
) -> None:
    """Combine repeats of one star into one row.

    Rows with a proper motion and an epoch are compared at the latest epoch of the catalog.

    Example: sos-dask dedupe lamost -o lamost.stars --method best-snr
    """
    from sos_dask.stages.dedupe import dedupe as run
    from sos_dask.stars.group import DedupeSettings

    if no_gaia_id:
        options.refuse(("id_radius_arcsec",), "with --no-gaia-id")
    given: dict[str, Any] = {"method": method, "max_spread": max_spread}
    given |= {"radius_arcsec": radius_arcsec, "id_radius_arcsec": id_radius_arcsec}
    settings = DedupeSettings(**given, use_gaia_id=not no_gaia_id)
    [opened] = open_catalogs([catalog], key, "obs_id")
    step = partial(run, opened, out, settings, name=out.name)
    show_step(run_step(step, options), out, options.as_json)


@with_step_options
def reference(
    catalogs: Annotated[
        list[str],
        typer.Argument(help="Catalogs of stars as NAME=DIRECTORY, the preferred one first."),
    ],
    out: Out,
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", help="precedence or weighted-mean.")
    ] = "precedence",
    radius_arcsec: Radius = 1.5,
    id_radius_arcsec: IdRadius = 10.0,
    epoch: Annotated[
        float,
        typer.Option(
            "--epoch", metavar="YEAR", help="Positions with proper motions are moved to this epoch."
        ),
    ] = 2016.0,
    offsets: Annotated[
        bool,
        typer.Option(
            "--measure-offsets/--no-offsets",
            help="Put every survey on the zero point of the first: their median differences.",
        ),
    ] = True,
    rows_per_partition: RowsPerPartition = 1_000_000,
    key: Key = None,
    *,
    options: LightStepOptions,
) -> None:
    """Unite the stars of several reference surveys, one row per star.

    Example: sos-dask reference apogee=apogee.stars galah=galah.stars -o reference
    """
    from sos_dask.stages.reference import ReferenceSettings
    from sos_dask.stages.reference import reference as run
    from sos_dask.stars.unify import UnifySettings

    paths: dict[str, str] = {}
    for text in catalogs:
        name, found, path = text.partition("=")
        if not (name and found and path):
            raise ConfigError(f"'{text}' is not NAME=DIRECTORY", "For example apogee=apogee.stars.")
        if not is_name(name):
            raise ConfigError(f"'{name}' is no name of a survey: {NAME_RULE}")
        if name in paths:
            raise ConfigError(f"two surveys are named '{name}'", "Give each a name of its own.")
        paths[name] = path
    opened = dict(zip(paths, open_catalogs(paths.values(), key), strict=True))
    given: dict[str, Any] = {"method": method, "order": tuple(opened)}
    settings = ReferenceSettings(
        unify=UnifySettings(**given),
        radius_arcsec=radius_arcsec,
        id_radius_arcsec=id_radius_arcsec,
        epoch=epoch,
        rows_per_partition=rows_per_partition,
        measure_offsets=offsets,
    )
    step = partial(run, opened, out, settings, name=out.name)
    show_step(run_step(step, options), out, options.as_json)


@with_step_options
def crossmatch(
    left: Annotated[
        Path, typer.Argument(help="Target: observations or stars, or any HATS catalog.")
    ],
    right: Annotated[Path, typer.Argument(help="Reference: stars, or any HATS catalog.")],
    out: Out,
    radius_arcsec: Radius = 1.0,
    pairs: Annotated[
        str,
        typer.Option(
            "--pairs", metavar="NAME", help="best: one pair per target row; all: every pair."
        ),
    ] = "best",
    id_radius_arcsec: IdRadius = 10.0,
    no_gaia_id: NoGaiaId = False,
    folds: Annotated[
        int,
        typer.Option("--folds", min=2, max=100, metavar="N", help="Folds for cross-validation."),
    ] = 5,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, max=2**31 - 1, metavar="N", help="Other seeds give other folds."
        ),
    ] = 0,
    key: Key = None,
    *,
    options: LightStepOptions,
) -> None:
    """Match a target catalog with a reference catalog, exactly.

    Example: sos-dask crossmatch lamost.stars reference -o pairs
    """
    from sos_dask.stages.crossmatch import PairSettings
    from sos_dask.stages.crossmatch import crossmatch as run
    from sos_dask.stars.match import MatchSettings

    if no_gaia_id:
        options.refuse(("id_radius_arcsec",), "with --no-gaia-id")
    given: dict[str, Any] = {"pairs": pairs, "use_gaia_id": not no_gaia_id}
    match = MatchSettings(radius_arcsec=radius_arcsec, id_radius_arcsec=id_radius_arcsec, **given)
    target, stars = open_catalogs([left, right], key)
    step = partial(
        run,
        target,
        stars,
        out,
        PairSettings(match=match, n_folds=folds, seed=seed),
        name=out.name,
    )
    show_step(run_step(step, options), out, options.as_json)


@with_step_options
def train(
    pairs: Annotated[Path, typer.Argument(help="Catalog of pairs.")],
    out: Out,
    method: Annotated[
        str,
        typer.Option(
            "--method", "-m", metavar="NAME", help="polynomial, boosted, hybrid, symbolic or simex."
        ),
    ],
    param: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", metavar="NAME=VALUE", help="Parameter of the method."),
    ] = None,
    validation: Annotated[
        str, typer.Option("--validation", metavar="NAME", help="auto, kfold or holdout.")
    ] = "auto",
    search: Annotated[
        int,
        typer.Option(
            "--search",
            min=0,
            max=1000,
            metavar="N",
            help="Number of parameter sets to try; 0: none.",
        ),
    ] = 0,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, max=2**31 - 1, metavar="N", help="Of the method and of the search."
        ),
    ] = 0,
    *,
    options: StepOptions,
) -> None:
    """Learn the difference target - reference from pairs; print held-out metrics.

    Example: sos-dask train pairs --method boosted -p n_rounds=800 -o model
    """
    from sos_dask import corrections as models
    from sos_dask.corrections.search import search_space
    from sos_dask.stages.evidence import DIFFERENCES
    from sos_dask.stages.train import LOCAL_PAIRS, TrainSettings, asks_workers, metrics_of
    from sos_dask.stages.train import train as run
    from sos_dask.storage.catalog import Catalog

    seeded = {"seed": seed} if "seed" in models.parameters(method) else {}
    params = models.check_params(method, seeded | dict(_setting(text) for text in param or []))
    settings = TrainSettings(
        method=method, params=params, validation=cast(Any, validation), search=search, seed=seed
    )
    catalog = Catalog.open(pairs)
    if not set(DIFFERENCES) <= set(catalog.schema.names):
        raise CatalogError(
            f"{pairs} is not a catalog of pairs",
            "Make them: sos-dask crossmatch LEFT RIGHT -o PAIRS.",
        )
    if search and not search_space(method):
        raise ConfigError(f"--search has no effect: method '{method}' has no parameters to search")
    if not asks_workers(catalog, settings):
        if options.workers != 0:
            options.refuse(
                ("workers", "scheduler", "memory_limit"),
                f": train uses one process for up to {LOCAL_PAIRS:,} pairs, and "
                f"{pairs} has {catalog.n_rows:,}",
                "Leave it out. A search and training on a GPU use workers for any number.",
            )
        options = replace(options, workers=0)  # none are started to wait
    manifest = run_step(partial(run, catalog, out, settings), options)
    if not options.as_json:
        show_metrics(metrics_of(manifest))
    show_step(manifest, out, options.as_json)


def _setting(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise ConfigError(f"--param '{text}' is not NAME=VALUE", "For example max_depth=4.")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


@with_step_options
def apply(
    model: Annotated[Path, typer.Argument(help="Directory of a trained model.")],
    catalog: CatalogPath,
    out: Out,
    partitions: Annotated[
        str,
        typer.Option(
            "--partitions",
            metavar="WHICH",
            help="all, i/N, indices 0-9,12 or HEALPix pixels 2:44.",
        ),
    ] = "all",
    errors: Annotated[
        Path | None,
        typer.Option(
            "--errors",
            metavar="DIRECTORY",
            help="Product 'uncertainty' of a build with this model: errors are added.",
        ),
    ] = None,
    coverage: Annotated[
        Path | None,
        typer.Option(
            "--coverage",
            metavar="DIRECTORY",
            help="Product 'coverage' of this catalog and model: adds coverage and its flags, "
            "fades the correction and widens the errors where it is low.",
        ),
    ] = None,
    fallback: Annotated[
        str,
        typer.Option(
            "--fallback",
            metavar="MODEL",
            help="With --coverage, what the correction fades to: the directory of a polynomial "
            "model; none: no correction; edge: nothing fades.",
        ),
    ] = "edge",
    key: Key = None,
    *,
    options: LightStepOptions,
) -> None:
    """Correct the labels of every row; several processes may share one output.

    Example, one task of a job array: sos-dask apply model lamost -o corrected --partitions 3/16
    """
    from sos_dask.stages.apply import Trust, parse_partitions
    from sos_dask.stages.apply import apply as run
    from sos_dask.storage.catalog import Catalog

    [opened] = open_catalogs([catalog], key, "obs_id")
    parse_partitions(partitions, opened.pixels)  # fails before workers are started
    trust = None
    if coverage is not None:
        scores = Catalog.open(coverage)
        if fallback in ("none", "edge"):
            trust = Trust(scores, fallback)
        else:
            trust = Trust(scores, "polynomial", Path(fallback))
    elif fallback != "edge":
        raise ConfigError(
            "--fallback needs --coverage", "The correction fades where the coverage is low."
        )
    step = partial(
        run,
        model,
        opened,
        out,
        partitions=partitions,
        name=out.name,
        errors=errors,
        trust=trust,
    )
    show_step(run_step(step, options), out, options.as_json)
