"""Commands that do one step of a rebuild on catalogs given by path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sos_dask.cli.options import (
    CatalogPath,
    Json,
    Key,
    LightStepOptions,
    Out,
    Rows,
    Seed,
    StepOptions,
    open_catalogs,
    with_settings,
)
from sos_dask.cli.output import print_json, reporting, say, show_metrics, show_step
from sos_dask.errors import CatalogError, ConfigError
from sos_dask.settings import NAME_RULE, is_name
from sos_dask.stages.apply import ApplySettings
from sos_dask.stages.attach import AttachSettings
from sos_dask.stages.base import Stage
from sos_dask.stages.crossmatch import CrossmatchSettings
from sos_dask.stages.ingest import SurveySettings
from sos_dask.stages.reference import ReferenceSettings
from sos_dask.stages.train import TrainSettings
from sos_dask.stars.group import DedupeSettings

if TYPE_CHECKING:
    from sos_dask.storage.manifest import Manifest


def run_step(stage: Stage[Any], out: Path, options: StepOptions) -> Manifest | None:
    """Run a stage with a cluster, and with progress on stderr."""
    with reporting() as report, options.start() as cluster:
        return stage.attempt(out, overwrite=options.overwrite, cluster=cluster, report=report)


def _step(stage: Stage[Any], out: Path, options: StepOptions) -> None:
    """Run a stage and tell its account of rows."""
    show_step(run_step(stage, out, options), out, options.as_json)


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


@with_settings
def ingest(
    survey: Annotated[str, typer.Argument(help="Name of a survey, or path of a survey TOML.")],
    files: Annotated[list[Path], typer.Argument(help="Files of the survey.")],
    out: Out,
    margin_arcsec: Annotated[
        float | None,
        typer.Option(
            "--margin-arcsec",
            metavar="X",
            help="Also write a margin catalog, OUT.collection, for LSDB.",
        ),
    ] = None,
    *,
    settings: type[SurveySettings],
    options: LightStepOptions,
) -> None:
    """Turn survey files into a HEALPix-partitioned catalog of observations.

    Example: sos-dask ingest lamost-dr11-lrs dr11_v2.0_LRS_stellar.fits.gz -o lamost
    """
    from sos_dask.stages.attach import Margin, MarginSettings
    from sos_dask.stages.ingest import Ingest
    from sos_dask.surveys.definition import load_survey

    definition = load_survey(survey)
    if margin_arcsec is not None and not 0 < margin_arcsec < 3600:
        raise ConfigError(f"--margin-arcsec {margin_arcsec:g} is not between 0 and 3600")
    inputs = {f"file.{number}": file for number, file in enumerate(files)}
    manifest = run_step(Ingest(inputs, settings(survey=definition, name=out.name)), out, options)
    if margin_arcsec is not None:
        margin = Margin({"catalog": out}, MarginSettings(radius_arcsec=margin_arcsec))
        run_step(margin, out.with_name(f"{out.name}.collection"), options)
    show_step(manifest, out, options.as_json)


@with_settings
def attach(
    catalog: CatalogPath,
    other: Annotated[Path, typer.Argument(help="Directory of any HATS catalog.")],
    columns: Annotated[
        list[str],
        typer.Option("--column", "-c", metavar="NAME[=OTHER]", help="Column to add; repeatable."),
    ],
    out: Out,
    key: Key = None,
    *,
    settings: type[AttachSettings],
    options: StepOptions,
) -> None:
    """Add columns of another catalog, by Gaia id or position; null where it has no counterpart.

    Example: sos-dask attach lamost gaia -c distance -c ebv -o lamost.with-gaia
    """
    from sos_dask.stages.attach import Attach

    names = {}
    for text in columns:
        name, _, source = text.partition("=")
        if not name or name in names:
            raise ConfigError(f"--column '{text}' names no column, or one that was given before")
        names[name] = source or name
    chosen = settings(columns=names)
    if chosen.by == "position":
        options.refuse(("id_radius_arcsec",), "by position")
    else:
        options.refuse(("radius_arcsec",), "by Gaia id")
    opened, companion = open_catalogs([catalog, other], key)
    _step(Attach({"catalog": opened, "other": companion}, chosen), out, options)


@with_settings
def dedupe(
    catalog: CatalogPath,
    out: Out,
    key: Key = None,
    *,
    settings: type[DedupeSettings],
    options: LightStepOptions,
) -> None:
    """Combine repeats of one star into one row.

    Rows with a proper motion and an epoch are compared at the latest epoch of the catalog.

    Example: sos-dask dedupe lamost -o lamost.stars --method best-snr
    """
    from sos_dask.stages.dedupe import Dedupe

    chosen = settings()
    if not chosen.use_gaia_id:
        options.refuse(("id_radius_arcsec",), "with --no-gaia-id")
    [opened] = open_catalogs([catalog], key, "obs_id")
    _step(Dedupe({"observations": opened}, chosen), out, options)


@with_settings
def reference(
    catalogs: Annotated[
        list[str],
        typer.Argument(help="Catalogs of stars as NAME=DIRECTORY, the preferred one first."),
    ],
    out: Out,
    no_offsets: Annotated[
        bool,
        typer.Option(
            "--no-offsets",
            help="Do not put every survey on the zero point of the first by median differences.",
        ),
    ] = False,
    key: Key = None,
    *,
    settings: type[ReferenceSettings],
    options: LightStepOptions,
) -> None:
    """Unite the stars of several reference surveys, one row per star.

    Example: sos-dask reference apogee=apogee.stars galah=galah.stars -o reference
    """
    from sos_dask.stages.reference import Reference

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
    opened = open_catalogs(paths.values(), key)
    stars = {f"stars.{name}": one for name, one in zip(paths, opened, strict=True)}
    chosen = settings(order=tuple(paths), offsets={} if no_offsets else "measured")
    _step(Reference(stars, chosen), out, options)


@with_settings
def crossmatch(
    left: Annotated[
        Path, typer.Argument(help="Target: observations or stars, or any HATS catalog.")
    ],
    right: Annotated[Path, typer.Argument(help="Reference: stars, or any HATS catalog.")],
    out: Out,
    key: Key = None,
    *,
    settings: type[CrossmatchSettings],
    options: LightStepOptions,
) -> None:
    """Match a target catalog with a reference catalog, exactly.

    Example: sos-dask crossmatch lamost.stars reference -o pairs
    """
    from sos_dask.stages.crossmatch import Crossmatch

    chosen = settings()
    if not chosen.use_gaia_id:
        options.refuse(("id_radius_arcsec",), "with --no-gaia-id")
    target, stars = open_catalogs([left, right], key)
    _step(Crossmatch({"target": target, "reference": stars}, chosen), out, options)


@with_settings
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
    *,
    settings: type[TrainSettings],
    options: StepOptions,
) -> None:
    """Learn the difference target - reference from pairs; print held-out metrics.

    Example: sos-dask train pairs --method boosted -p n_rounds=800 -o model
    """
    from sos_dask import corrections
    from sos_dask.stages.train import LOCAL_PAIRS, Train, asks_workers, metrics_of
    from sos_dask.storage.catalog import Catalog

    seeded = {"seed": settings(method=method, params={}).seed}
    seeded = seeded if "seed" in corrections.parameters(method) else {}
    given = dict(_setting(text) for text in param or [])
    params = corrections.check_params(method, seeded | given)
    chosen = settings(method=method, params=params)
    catalog = Catalog.open(pairs)
    if not {label.diff for label in chosen.problem.labels} <= set(catalog.schema.names):
        raise CatalogError(
            f"{pairs} is not a catalog of pairs",
            "Make them: sos-dask crossmatch LEFT RIGHT -o PAIRS.",
        )
    if chosen.search and not corrections.search_space(method):
        raise ConfigError(f"--search has no effect: method '{method}' has no parameters to search")
    if chosen.validation != "auto":
        options.refuse(("kfold_limit",), f"with --validation {chosen.validation}")
    stage = Train({"pairs": catalog}, chosen)
    if not asks_workers(catalog, chosen):
        if options.workers != 0:
            options.refuse(
                ("workers", "scheduler", "memory_limit"),
                f": train uses one process for up to {LOCAL_PAIRS:,} pairs, and "
                f"{pairs} has {catalog.n_rows:,}",
                "Leave it out. A search and training on a GPU use workers for any number.",
            )
        options = replace(options, workers=0)  # none are started to wait
    manifest = run_step(stage, out, options)
    if manifest is not None and not options.as_json:
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


@with_settings
def apply(
    model: Annotated[Path, typer.Argument(help="Directory of a trained model.")],
    catalog: CatalogPath,
    out: Out,
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
    settings: type[ApplySettings],
    options: LightStepOptions,
) -> None:
    """Correct the labels of every row; several processes may share one output.

    Example, one task of a job array: sos-dask apply model lamost -o corrected --partitions 3/16
    """
    from sos_dask.stages.apply import Apply

    if coverage is None and fallback != "edge":
        raise ConfigError(
            "--fallback needs --coverage", "The correction fades where the coverage is low."
        )
    [opened] = open_catalogs([catalog], key, "obs_id")
    inputs: dict[str, Any] = {"model": model, "observations": opened}
    given: Mapping[str, Path | None] = {"errors": errors, "coverage": coverage}
    inputs |= {role: path for role, path in given.items() if path is not None}
    if fallback not in ("none", "edge"):
        inputs["smooth"] = Path(fallback)
        fallback = "polynomial"
    chosen: Any = {"fallback": fallback}
    _step(Apply(inputs, settings(**chosen)), out, options)
