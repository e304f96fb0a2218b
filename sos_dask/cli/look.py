"""Commands that look at what there is: surveys, uncertainty, verify, report."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sos_dask.cli.options import JobOrStore, Json, StepOptions, Store, find_store, with_step_options
from sos_dask.cli.output import (
    LABEL_UNITS,
    complain,
    console,
    print_json,
    say,
    show_table,
    shown,
    shown_lines,
)
from sos_dask.cli.steps import run_step
from sos_dask.errors import CatalogError, SosError


def surveys(
    name: Annotated[
        str | None, typer.Argument(help="Name of a survey, or path of a survey TOML.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the surveys, or explain one: columns, units, missing values, quality cuts.

    Example: sos-dask surveys lamost-dr11-lrs
    """
    from sos_dask.surveys.definition import (
        COLUMN_HEADINGS,
        CUT_HEADINGS,
        builtin_surveys,
        describe_columns,
        describe_cuts,
        load_survey,
    )

    if name is None:
        found = [load_survey(item) for item in builtin_surveys()]
        if as_json:
            print_json({"surveys": [{"name": s.name, "title": s.title} for s in found]})
        else:
            show_table("Surveys", ["name", "title"], [(s.name, s.title) for s in found])
            say("Run sos-dask surveys NAME for columns and quality cuts.")
        return
    survey = load_survey(name)
    columns, cuts = describe_columns(survey), describe_cuts(survey)
    if as_json:
        print_json(
            {
                "name": survey.name,
                "title": survey.title,
                "reference": survey.reference,
                "columns": [dict(zip(COLUMN_HEADINGS, row, strict=True)) for row in columns],
                "cuts": [dict(zip(CUT_HEADINGS, row, strict=True)) for row in cuts],
                "missing": survey.missing,
                "missing_text": survey.missing_text,
                "notes": survey.notes,
            }
        )
        return
    say(f"{survey.name}: {survey.title}\n{survey.reference}\n")
    # Types and UCDs need a wide terminal; --json always has them.
    shown = range(6) if console().width >= 110 else (0, 1, 2, 5)
    show_table(
        "Columns", [COLUMN_HEADINGS[i] for i in shown], [[row[i] for i in shown] for row in columns]
    )
    show_table("Quality cuts: a row that fails one has its bit in quality", CUT_HEADINGS, cuts)
    if survey.missing:
        say(f"Missing values: {', '.join(f'{value:g}' for value in survey.missing)}")
    if survey.notes:
        console().print(shown_lines(survey.notes.strip()), markup=False, emoji=False)


def uncertainty(job: JobOrStore = None, store: Store = None, as_json: Json = False) -> None:
    """Show the errors of the current build: hit rate, factors of stated errors, three-cornered hat.

    Example: sos-dask uncertainty --store store
    """
    from sos_dask.stages.uncertainty import read_calibration
    from sos_dask.storage.artifact import Manifest
    from sos_dask.storage.store import current_product

    directory = current_product(find_store(store, job), "uncertainty")
    summary = Manifest.load(directory).summary
    calibration = read_calibration(directory)
    if as_json:
        print_json({"path": directory, **summary, "coverage": calibration})
        return
    show_table(
        f"Held-out pairs inside their interval, with its 95 % range (method {summary['method']}; "
        f"error of the reference {summary['reference_error']})",
        ["label", "pairs", ">n", ">68 %", ">range", ">95 %", ">range"],
        [
            [one["label"], one["subset"], f"{one['n']:,}", *_share(one), *_share(other)]
            for one, other in zip(calibration[::2], calibration[1::2], strict=True)
        ],
    )
    show_table(
        "Stated errors by repeats: what they must be multiplied by (1 where too few are known)",
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
    return [f"{100 * one['coverage']:.1f}", f"{100 * one['low']:.1f}-{100 * one['high']:.1f}"]


def _snr_range(one: Mapping[str, Any]) -> str:
    low, high = one["snr_low"], one["snr_high"]
    if low is None:
        return "all" if high is None else f"< {high:g}"
    return f">= {low:g}" if high is None else f"{low:g}-{high:g}"


def _factor(one: Mapping[str, Any]) -> list[str]:
    known = one["low"] is not None
    return [f"{one['factor']:.3f}", f"{one['low']:.3f}-{one['high']:.3f}" if known else ""]


def _corner(one: Mapping[str, Any]) -> list[str]:
    digits = 1 if one["label"] == "teff" else 4
    error = "negative" if one["sigma"] is None else f"{one['sigma']:.{digits}f}"
    return [
        f"{one['label']} [{LABEL_UNITS[one['label']]}]",
        one["survey"],
        f"{one['n']:,}",
        error + (" !" if one["negative"] and one["sigma"] is not None else ""),
        f"{one['low']:.{digits}f} .. {one['high']:.{digits}f}",
    ]


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


@with_step_options
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
    from sos_dask.storage.artifact import Manifest

    store = find_store(store, job)
    published = (store / "current" / "report").resolve()
    if out is None and (published / PAGE).is_file():
        options.refuse(
            ("workers", "scheduler", "memory_limit", "overwrite"),
            f": the build has its report already, {published}",
            "Give --out to make it again in another directory.",
        )
        out, manifest = published, Manifest.checked(published)
    else:
        out = out or store / "report"
        manifest = run_step(partial(of_build, store, out), options)
    page = out / PAGE
    if options.as_json:
        print_json({"path": out, "page": page, **manifest.summary})
    else:
        say(f"{page}: {len(manifest.summary['figures'])} figures, also in {out / 'figures'}")
