"""Commands attach and coverage: more columns, and where the correction can be trusted."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sos_dask.cli.options import (
    CatalogPath,
    Key,
    OptionalOut,
    Out,
    Radius,
    StepOptions,
    Store,
    find_store,
    open_catalogs,
    with_step_options,
)
from sos_dask.cli.output import LABEL_UNITS, print_json, say, show_step, show_table
from sos_dask.cli.steps import run_step
from sos_dask.errors import ConfigError

if TYPE_CHECKING:
    from sos_dask.stages.coverage import CoverageSettings
    from sos_dask.storage.artifact import Manifest

_LETTERS = " .:-=+*#%@"


@with_step_options
def attach(
    catalog: CatalogPath,
    other: Annotated[Path, typer.Argument(help="Directory of any HATS catalog.")],
    columns: Annotated[
        list[str],
        typer.Option("--column", "-c", metavar="NAME[=OTHER]", help="Column to add; repeatable."),
    ],
    out: Out,
    by: Annotated[
        str,
        typer.Option(
            "--by", metavar="NAME", help="gaia_dr3_source_id, gaia_dr2_source_id or position."
        ),
    ] = "gaia_dr3_source_id",
    radius_arcsec: Annotated[
        float, typer.Option("--radius-arcsec", metavar="X", help="Largest separation by position.")
    ] = 1.0,
    id_radius_arcsec: Annotated[
        float, typer.Option("--id-radius-arcsec", metavar="X", help="Largest separation by id.")
    ] = 10.0,
    key: Key = None,
    *,
    options: StepOptions,
) -> None:
    """Add columns of another catalog, by Gaia id or position; null where it has no counterpart.

    Example: sos-dask attach lamost gaia -c distance -c ebv -o lamost.with-gaia
    """
    from sos_dask.stages.attach import AttachSettings
    from sos_dask.stages.attach import attach as run

    names = {}
    for text in columns:
        name, _, source = text.partition("=")
        if not name or name in names:
            raise ConfigError(f"--column '{text}' names no column, or one that was given before")
        names[name] = source or name
    if by == "position":
        options.refuse(("id_radius_arcsec",), "by position")
    else:
        options.refuse(("radius_arcsec",), "by Gaia id")
    given: dict[str, Any] = {"columns": names, "by": by}
    settings = AttachSettings(
        **given, radius_arcsec=radius_arcsec, id_radius_arcsec=id_radius_arcsec
    )
    opened, companion = open_catalogs([catalog, other], key)
    step = partial(run, opened, companion, out, settings)
    show_step(run_step(step, options), out, options.as_json)


@with_step_options
def coverage(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PAIRS MODEL CATALOG STARS",
            help="Pairs, a model trained on them, the catalog to score and its stars; without: "
            "the current build of the store.",
            show_default=False,
        ),
    ] = None,
    out: OptionalOut = None,
    errors: Annotated[
        Path | None,
        typer.Option(
            "--errors",
            metavar="DIRECTORY",
            help="With PAIRS: product 'uncertainty' of this model, which apply is to widen.",
        ),
    ] = None,
    measure: Annotated[
        str,
        typer.Option(
            "--measure",
            metavar="NAME",
            help="With PAIRS: neighbours or ratio.",
        ),
    ] = "neighbours",
    inside: Annotated[
        float,
        typer.Option(
            "--inside", metavar="X", help="With PAIRS: from this coverage on a row is inside."
        ),
    ] = 0.8,
    outside: Annotated[
        float,
        typer.Option(
            "--outside", metavar="X", help="With PAIRS: below this coverage a row is outside."
        ),
    ] = 0.5,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            metavar="LABEL=LOW,HIGH",
            help="With PAIRS: limits of the grid of the survey's pipeline; repeatable. Default: "
            "smallest and largest value.",
        ),
    ] = None,
    radius_arcsec: Radius = 1.5,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            min=0,
            max=2**31 - 1,
            metavar="N",
            help="With PAIRS: other seeds sample other rows.",
        ),
    ] = 0,
    key: Key = None,
    store: Store = None,
    *,
    options: StepOptions,
) -> None:
    """Show which part of the catalog the pairs cover, and where more references would help most.

    Example: sos-dask coverage --store store --json
    """
    from sos_dask.correct import COVERAGE_MEANINGS
    from sos_dask.stages.coverage import CoverageSettings, look
    from sos_dask.storage.store import current_product

    if inputs:
        options.refuse(("store",), "with PAIRS")
        if out is None:
            raise ConfigError("--out is missing", "Give a directory for the output: -o DIR.")
        directory = out
        given: dict[str, Any] = {"measure": measure}
        settings = CoverageSettings(
            **given,
            inside=inside,
            outside=outside,
            grid=dict(_limits(text) for text in grid or []),
            radius_arcsec=radius_arcsec,
            seed=seed,
        )
        run_step(_scoring(inputs, out, settings, errors, key), options)
        figure = None
    else:
        options.refuse_all_but()
        place = find_store(store)
        directory = current_product(place, "coverage")
        figure = place / "current" / "report" / "figures" / "coverage.png"
    found = look(directory)
    if options.as_json:
        print_json(found)
        return
    stars = found["stars"]
    show_table(
        f"Share of the rows, and of {stars['sampled']:,} stars",
        ["", ">rows %", ">stars %", "meaning"],
        [
            (
                name,
                f"{100 * found[name]:.2f}",
                f"{100 * stars[name]:.2f}",
                found["meaning"].get(name, "a label is missing: no coverage"),
            )
            for name in ("inside", "sparse", "outside", "unknown")
        ],
    )
    for text in found["warnings"]:
        say(f"Warning: {text}")
    say(f"Measure: {found['measure']}, of {', '.join(found['parameters'])}")
    if found["parameters_without_column"]:
        say(f"Not in the catalog: {', '.join(found['parameters_without_column'])}")
    for kind, text in found["intervals"].items():
        say(f"Width of intervals, {kind}: {text}")
    show_table(
        "Bits of flag_sos",
        [">bit", ">rows", ""],
        [
            (bit, f"{n:,}", COVERAGE_MEANINGS[int(bit)])
            for bit, n in sorted(found["flags"].items(), key=lambda item: int(item[0]))
        ],
    )
    if figure is not None and figure.is_file():
        say(f"The maps as a figure: {figure}")
    _show_kiel(found["kiel"])
    show_table(
        "On the sky: share outside by HEALPix base pixel",
        [">pixel", ">rows", ">outside %"],
        [
            (str(row["pixel"]), f"{row['rows']:,}", f"{100 * row['outside'] / row['rows']:.1f}")
            for row in found["sky"]
        ],
    )
    show_table(
        "Where follow-up would gain most: cells with most rows outside",
        [">Teff K", ">log g", ">[Fe/H]", ">outside", ">rows", ">mean G"],
        [
            (
                f"{row['teff']:.0f}",
                f"{row['logg']:.2f}",
                f"{row['feh']:+.2f}",
                f"{row['outside']:,}",
                f"{row['rows']:,}",
                "" if row["phot_g_mean_mag"] is None else f"{row['phot_g_mean_mag']:.1f}",
            )
            for row in found["follow_up"]
        ],
    )


def _scoring(
    inputs: list[Path],
    out: Path,
    settings: CoverageSettings,
    errors: Path | None,
    key: list[str] | None,
) -> partial[Manifest]:
    """The stage on inputs given by path."""
    from sos_dask.stages.coverage import coverage as run
    from sos_dask.storage.catalog import Catalog

    if len(inputs) != 4:
        raise ConfigError(
            f"{len(inputs)} paths are not PAIRS MODEL CATALOG STARS",
            "For example: sos-dask coverage pairs model lamost lamost.stars -o coverage.",
        )
    pairs, model, catalog, stars = inputs
    [scored] = open_catalogs([catalog], key, "obs_id")
    return partial(
        run,
        model,
        Catalog.open(pairs),
        scored,
        Catalog.open(stars),
        directory=out,
        settings=settings,
        errors=errors,
    )


def _limits(text: str) -> tuple[str, tuple[float, float]]:
    """Label and limits of ``LABEL=LOW,HIGH``."""
    label, _, numbers = text.partition("=")
    try:
        low, high = map(float, numbers.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if label not in LABEL_UNITS or not -math.inf < low < high < math.inf:
        raise ConfigError(
            f"--grid '{text}' is not LABEL=LOW,HIGH", "For example teff=3500,8500; also logg, feh."
        )
    return label, (low, high)


def _show_kiel(cells: list[dict[str, Any]]) -> None:
    """Kiel diagram in characters: the darker, the larger the share outside."""
    at = {(row["teff"], row["logg"]): row["outside"] / row["rows"] for row in cells}
    teffs = sorted({teff for teff, _ in at}, reverse=True)
    say("Kiel diagram, share of rows outside: blank where there is none, '@' where all are")
    say(f"log g | Teff {teffs[0]:.0f} to {teffs[-1]:.0f} K" if teffs else "no rows")
    for logg in sorted({logg for _, logg in at}):
        line = ""
        for teff in teffs:
            share = at.get((teff, logg))
            last = len(_LETTERS) - 1
            line += " " if share is None else _LETTERS[max(1, round(share * last))]
        say(f"{logg:5.2f} | {line.rstrip()}")
