"""The page of a build: its sections, with which tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sos_dask.evidence.maps import STEPS, follow_up
from sos_dask.report import headline, tables
from sos_dask.report.generalisation import generalisation_table
from sos_dask.report.page import Code, Page, Picture, Section
from sos_dask.report.projection import agreement
from sos_dask.report.trust import follow_up as follow_up_table
from sos_dask.report.words import readable
from sos_dask.schema import LABELS
from sos_dask.stages.coverage import MAPS
from sos_dask.stages.generalisation import TABLE as GROUPS
from sos_dask.stages.projection import MAPS as PLACES
from sos_dask.stages.report_content import CORRECTED, OBSERVATIONS, Build, Counts, grid_of
from sos_dask.stages.trends import TRENDS
from sos_dask.surveys.definition import Cut

_RULES = {
    "balanced": "Rule of the choice: of the methods that are worse than the best in no label, the "
    "one with the smoothest correction. Worse: a larger scatter, or larger medians in bins, than "
    "chance allows.",
    "scatter": "Rule of the choice: the smallest scatter, averaged over the labels.",
}


def page(
    build: Build,
    counts: Counts,
    pictures: Mapping[str, Picture],
    files: Mapping[str, str],
    versions: Mapping[str, str],
    job: str,
    job_text: str,
) -> Page:
    """The page of a build.

    Parameters
    ----------
    build : Build
    counts : Counts
    pictures : mapping of str to Picture
        By the names of `figures`.
    files : mapping of str to str
        Names of survey files by SHA-256.
    versions : mapping of str to str
        Of the software.
    job, job_text : str
    """
    metrics = list(build.choice.get("metrics", []))
    to = " and ".join(build.references)
    why = str(build.choice.get("why", ""))
    reason = f" {why[0].upper()}{readable(why[1:])}." if why else ""
    return Page(
        title=f"{build.target} on the scale of {to}: report of job “{job}”",
        lead=f"The labels of {build.target} are corrected by the method {build.method}, chosen "
        f"among {', '.join(sorted(build.methods))}.{reason}",
        gains=headline.gains(metrics, build.method),
        gains_caption=f"Scatter (1.4826 MAD) of {build.target} minus {build.reference}, on pairs "
        "that the model was not trained on. It holds the noise of both surveys, which no "
        "correction removes.",
        notes=_notes(build),
        sections=(
            _selection(build),
            Section("sky", "On the sky", items=_of(pictures, "sky")),
            Section(
                "trends",
                "Trends before and after",
                "Each method on the same pairs, the chosen one first; limits are the same for all.",
                _of(pictures, *(f"trends-{m}" for m in build.methods), "trends-more"),
            ),
            _reference_section(build, pictures),
            _methods(build, pictures, metrics),
            _corrected(build, pictures),
            _formula(build, pictures),
            _errors(build, pictures),
            _coverage(build, pictures),
            _projection(build, counts, pictures),
            _generalisation(build, pictures),
            _provenance(build, files, versions, job_text),
        ),
        version=versions.get("sos-dask", ""),
    )


def _of(pictures: Mapping[str, Picture], *names: str) -> tuple[Picture, ...]:
    return tuple(pictures[name] for name in names if name in pictures)


def _flags(build: Build) -> tuple[Mapping[str, int], int]:
    product = f"{build.target}{CORRECTED}"
    manifest = build.manifests.get(product)
    return (manifest.summary.get("flags", {}), manifest.rows.n_out) if manifest else ({}, 0)


def _notes(build: Build) -> list[str]:
    notes = []
    table = build.table("trends", TRENDS)
    if table is not None:
        notes += headline.worst_bins(table, build.method)
    notes += headline.of_references(build.summary("trends").get("agreements", []))
    calibration = build.table("uncertainty", "calibration.parquet")
    if calibration is not None:
        notes += headline.of_intervals(calibration)
    notes += [f"Warning: {text}" for text in build.summary("coverage").get("warnings", ())]
    return notes + headline.of_flags(*_flags(build))


def _selection(build: Build) -> Section:
    items = [tables.account(build.products)]
    folded = []
    for survey in build.surveys:
        manifest = build.manifests[f"{survey}{OBSERVATIONS}"]
        failed = manifest.summary.get("fail_cut", {})
        definition = manifest.recipe.params.get("survey", {})
        counts = [
            tables.CutCount(
                name,
                Cut(name=name, **cut).test_text(),
                int(failed.get(name, 0)),
            )
            for name, cut in sorted(
                definition.get("cuts", {}).items(), key=lambda item: item[1]["bit"]
            )
        ]
        n_passing = int(manifest.summary.get("pass_all_cuts", 0))
        folded.append(tables.cuts(survey, manifest.rows.n_out, n_passing, counts))
    text = (
        "What became of every row, from the survey files to the corrected catalog, and what each "
        "quality cut removed from training."
    )
    return Section("selection", "Selection and counts", text, (*items, *folded))


def _reference_section(build: Build, pictures: Mapping[str, Picture]) -> Section:
    names = [name for name in pictures if name.startswith("references-")]
    agreements = build.summary("trends").get("agreements", [])
    found = (tables.agreements(agreements),) if agreements else ()
    return Section("references", "The references", "", (*_of(pictures, *names), *found))


def _methods(
    build: Build, pictures: Mapping[str, Picture], metrics: Sequence[Mapping[str, Any]]
) -> Section:
    table = build.table("comparison", "comparison.parquet")
    if table is None:
        items = (tables.metrics(metrics, build.method),) if metrics else ()
        return Section("methods", "The methods compared", "", items)
    first, *others = tables.subsets(table)
    folded = [tables.comparison(table, build.method, subset) for subset in others]
    for file, caption in (
        (
            "artifacts.parquet",
            "Artifacts of the correction. Roughness: rms second difference on the covered grid "
            "over the noise level; jump: largest step between neighbouring covered cells, in the "
            "unit of the label; with 95 % intervals",
        ),
        ("outside.parquet", "Behaviour of the correction outside of the overlap"),
    ):
        found = build.table("comparison", file)
        if found is not None:
            folded.append(tables.plain(found, caption))
    rule = build.choice.get("rule")
    return Section(
        "methods",
        "The methods compared",
        _RULES.get(str(rule), f"Rule of the choice: {rule}." if rule else ""),
        (*_of(pictures, "comparison"), tables.comparison(table, build.method, first)),
        tuple(folded),
    )


def _corrected(build: Build, pictures: Mapping[str, Picture]) -> Section:
    meanings, n_rows = _flags(build)
    found = (tables.flags(meanings, n_rows),) if meanings else ()
    return Section(
        "correction", "The correction", "", (*_of(pictures, "correction", "kiel"), *found)
    )


def _formula(build: Build, pictures: Mapping[str, Picture]) -> Section:
    document = build.formulas()
    if document is None:
        return Section("formula", "")
    text = "\n\n".join(
        f"{label}_delta = {document['labels'][label]['formula']}" for label in LABELS
    )
    code = Code(f"With {document['features']}; predicted target − reference in K, dex, dex", text)
    return Section(
        "formula",
        "The symbolic model",
        "" if build.method == "symbolic" else f"For reading; {build.method} corrects the catalog.",
        (*_of(pictures, "formulas"), code, *_of(pictures, "formula-fronts")),
    )


def _errors(build: Build, pictures: Mapping[str, Picture]) -> Section:
    table = build.table("uncertainty", "calibration.parquet")
    caption = (
        "Share of held-out pairs inside their interval (coverage) at each level, with its 95 % "
        "interval (low, high)."
    )
    return Section(
        "errors",
        "Errors of the corrected labels",
        "",
        _of(pictures, "calibration"),
        () if table is None else (tables.plain(table, caption),),
    )


def _coverage(build: Build, pictures: Mapping[str, Picture]) -> Section:
    maps = build.table("coverage", MAPS)
    found = () if maps is None else (follow_up_table(follow_up(maps), STEPS["labels"]),)
    summary = build.summary("coverage")
    text = (
        "The coverage of a row is how well the overlap with the reference stars holds its "
        f"correction: {summary['meaning']['coverage']}. It stands in the column coverage; rows in "
        "the sparse part and outside carry a flag, and outside the correction gives way to its "
        "fallback."
        if summary
        else ""
    )
    return Section(
        "coverage",
        "Where the correction can be trusted",
        text,
        (*_of(pictures, "coverage", "coverage-growth"), *found),
    )


def _projection(build: Build, counts: Counts, pictures: Mapping[str, Picture]) -> Section:
    maps, places = build.table("projection", PLACES), counts.places()
    found = None
    if maps is not None and places is not None:
        grid = grid_of(build.directories["projection"])
        found = agreement(grid.coarsened(maps, "n_overlap"), places)
    return Section(
        "projection",
        "All parameters in one plane",
        "",
        (*_of(pictures, "projection"), *(() if found is None else (found,))),
    )


def _generalisation(build: Build, pictures: Mapping[str, Picture]) -> Section:
    table = build.table("generalisation", GROUPS)
    if table is None:
        return Section("generalisation", "")
    first, *others = (generalisation_table(table, m, build.method) for m in build.methods)
    return Section(
        "generalisation",
        "What to expect where there are no pairs",
        "Pairs left out at random have neighbours that trained the method. Here whole groups are "
        "left out: a region of the Kiel diagram, all pairs of a reference, or the twentieth of the "
        "pairs that lies most alone.",
        (*_of(pictures, "generalisation", "generalisation-scatter"), first),
        tuple(others),
    )


def _provenance(
    build: Build, files: Mapping[str, str], versions: Mapping[str, str], job_text: str
) -> Section:
    hashes = [
        (survey, files.get(digest, ""), digest)
        for survey in build.surveys
        for digest in build.manifests[f"{survey}{OBSERVATIONS}"].recipe.inputs.values()
    ]
    return Section(
        "provenance",
        "Provenance",
        "The same files, job and software give the same products and this page to the byte.",
        (tables.inputs(hashes),),
        (
            tables.fingerprints(build.products),
            tables.software(versions),
            Code("The job file", job_text),
        ),
    )
