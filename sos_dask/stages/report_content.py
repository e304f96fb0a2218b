"""What the report shows of a build: which figure and table gets which data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sos_dask import models
from sos_dask.artifact import Manifest
from sos_dask.catalog import Catalog, partition_errors
from sos_dask.features import features
from sos_dask.healpix import FloatArray, IntArray
from sos_dask.models.symbolic import FILE as FORMULA_FILE
from sos_dask.report import headline, tables
from sos_dask.report.page import Code, Page, Picture, Section
from sos_dask.schema import LABELS, Cut
from sos_dask.stages.trends import PLANES, REFERENCES, TRENDS
from sos_dask.store import home

if TYPE_CHECKING:
    from sos_dask.report.planes import Histogram, Surface
    from sos_dask.report.style import Drawn

_OBSERVATIONS, _CORRECTED, _MODEL = ".observations", ".corrected", "model."


class Counts(Protocol):
    """Sums over the partitions of a catalog."""

    def sky(self, product: str) -> IntArray:
        """Rows a cell of the sky."""

    def plane(self, product: str) -> tuple[Histogram, Histogram]:
        """Rows on the plane before and after."""

    def errors(self, product: str) -> FloatArray | None:
        """Mean error of the corrected labels on the plane; None where rows have none."""


@dataclass(frozen=True)
class Build:
    """The products of a rebuild, opened.

    Parameters
    ----------
    directories : mapping of str to Path
        By product, in the order of the plan.
    manifests : mapping of str to Manifest
    """

    directories: Mapping[str, Path]
    manifests: Mapping[str, Manifest]

    @classmethod
    def open(cls, directories: Mapping[str, Path]) -> Build:
        """Read the manifest of every product."""
        # A link of a build is followed, so that tasks find it after the next build, too.
        found = {name: path.resolve() for name, path in directories.items()}
        return cls(
            found,
            {
                name: Manifest.load(home("margin" if name.endswith(".collection") else "", path))
                for name, path in found.items()
            },
        )

    @property
    def products(self) -> list[tables.Product]:
        """What the manifests say."""
        return [
            tables.Product(
                name, m.recipe.stage, m.recipe.version, m.fingerprint, m.rows.n_in, m.rows.n_out,
                m.rows.rejected, m.rows.dropped, m.rows.added, m.summary,
            )
            for name, m in self.manifests.items()
        ]  # fmt: skip

    def summary(self, product: str) -> Mapping[str, Any]:
        """Summary of a product; empty where there is none of the name."""
        return self.manifests[product].summary if product in self.manifests else {}

    @property
    def choice(self) -> Mapping[str, Any]:
        """What was said when the method was chosen."""
        return self.summary("comparison") or self.summary("chosen")

    @property
    def method(self) -> str:
        """The method that corrects the catalog; empty without one."""
        return str(self.choice.get("method", ""))

    @property
    def methods(self) -> list[str]:
        """All methods, the chosen one first."""
        names = [n.removeprefix(_MODEL) for n in self.manifests if n.startswith(_MODEL)]
        return sorted(names, key=lambda name: name != self.method)

    @property
    def surveys(self) -> list[str]:
        """Target, then references."""
        return [n.removesuffix(_OBSERVATIONS) for n in self.manifests if n.endswith(_OBSERVATIONS)]

    @property
    def target(self) -> str:
        """Name of the survey that is corrected."""
        found = [n.removesuffix(_CORRECTED) for n in self.manifests if n.endswith(_CORRECTED)]
        return found[0] if found else "target"

    @property
    def references(self) -> list[str]:
        """Names of the others."""
        return [name for name in self.surveys if name != self.target]

    @property
    def reference(self) -> str:
        """What to call the reference."""
        return self.references[0] if len(self.references) == 1 else "reference"

    @cached_property
    def counted(self) -> dict[str, Catalog]:
        """Catalogs whose rows are counted on the sky or the plane."""
        names = [
            name
            for name in self.directories
            if name.endswith((_OBSERVATIONS, _CORRECTED)) or name == "pairs"
        ]
        return {name: Catalog.open(self.directories[name]) for name in names}

    def table(self, product: str, file: str) -> pa.Table | None:
        """A table of a product; None where there is none."""
        path = self.directories.get(product, Path()) / file
        if product not in self.directories or not path.is_file():
            return None
        with partition_errors(path):
            return pq.read_table(path)

    def formulas(self) -> dict[str, Any] | None:
        """Content of the symbolic model's file, checked by loading the model."""
        directory = self.directories.get("model.symbolic")
        if directory is None:
            return None
        models.load(directory)
        return dict(json.loads((directory / FORMULA_FILE).read_text()))


def figures(build: Build) -> dict[str, Callable[[Counts], Drawn | None]]:
    """How to draw every figure of a build, by its name."""
    found: dict[str, Callable[[Counts], Drawn | None]] = {"sky": partial(_sky, build)}
    if build.table("trends", TRENDS) is not None:
        for method in build.methods:
            found[f"trends-{method}"] = partial(_trends, build, method, False)
        found["trends-more"] = partial(_trends, build, build.method, True)
        found["correction"] = partial(_correction, build)
    references = build.table("trends", REFERENCES)
    if references is not None and references.num_rows:
        pairs = zip(references["first"].to_pylist(), references["second"].to_pylist(), strict=True)
        for first, second in dict.fromkeys(pairs):
            name = f"references-{first}-{second}"
            found[name] = partial(_references, build, first, second)
    if build.table("comparison", "comparison.parquet") is not None:
        found["comparison"] = partial(_comparison, build)
    if f"{build.target}{_CORRECTED}" in build.directories:
        found["kiel"] = partial(_kiel, build)
    if "model.symbolic" in build.directories:
        found["formulas"] = partial(_formulas, build)
        found["formula-fronts"] = partial(_fronts, build)
    return found


def _sky(build: Build, counts: Counts) -> Drawn | None:
    from sos_dask.report.sky import sky_figure

    names = {f"{name}{_OBSERVATIONS}": name for name in (build.target, *build.references)}
    names["pairs"] = f"pairs of {build.target} and {build.reference}"
    return sky_figure({words: counts.sky(p) for p, words in names.items() if p in build.counted})


def _trends(build: Build, method: str, others: bool, counts: Counts) -> Drawn | None:
    from sos_dask.report.lines import quantities, trend_figure

    table = build.table("trends", TRENDS)
    if table is None:
        return None
    against = [name for name in quantities(table) if (name not in LABELS) == others]
    return trend_figure(table, method, against, build.target, build.reference)


def _references(build: Build, first: str, second: str, counts: Counts) -> Drawn | None:
    from sos_dask.report.lines import reference_figure

    table = build.table("trends", REFERENCES)
    return None if table is None else reference_figure(table, first, second, build.target)


def _comparison(build: Build, counts: Counts) -> Drawn | None:
    from sos_dask.report.methods import comparison_figure

    table = build.table("comparison", "comparison.parquet")
    return None if table is None else comparison_figure(table, build.method)


def _kiel(build: Build, counts: Counts) -> Drawn | None:
    from sos_dask.report.planes import kiel_figure

    product = f"{build.target}{_CORRECTED}"
    before, after = counts.plane(product)
    return kiel_figure(before, after, build.target, build.manifests[product].rows.n_out)


def _formulas(build: Build, counts: Counts) -> Drawn | None:
    from sos_dask.report.formulas import formula_figure

    document = build.formulas()
    if document is None:
        return None
    return formula_figure(document["labels"], document["n_sample"])


def _fronts(build: Build, counts: Counts) -> Drawn | None:
    from sos_dask.report.formulas import front_figure

    document = build.formulas()
    if document is None:
        return None
    return front_figure(document["labels"], document["n_sample"])


def _correction(build: Build, counts: Counts) -> Drawn | None:
    from sos_dask.report.planes import Surface, correction_figure, plane_centres

    planes = build.table("trends", PLANES)
    if planes is None:
        return None
    feh = _median_feh(build.counted["pairs"])
    teff, logg = plane_centres()
    model = models.load(build.directories[f"{_MODEL}{build.method}"])
    values = model.predict(features(teff, logg, np.full(len(teff), feh)))
    product = f"{build.target}{_CORRECTED}"
    errors = counts.errors(product) if product in build.counted else None
    error: Surface | None = None
    if errors is not None:
        error = Surface(errors, "mean error of a corrected row (half of its 68 % interval)")
    about = f"evaluated at the median [Fe/H] of the pairs, {feh:+.2f} dex".replace("-", "−")
    surface = Surface(values.astype(np.float64), about)
    return correction_figure(planes, build.method, surface, error, build.target, build.reference)


def _median_feh(pairs: Catalog) -> float:
    """Of the target, over the pairs fit for training."""
    found = [np.empty(0, dtype=np.float32)]
    for pixel in pairs.pixels:
        table = pairs.read(pixel, ["use", "feh"])
        found.append(pc.drop_null(table.filter(table["use"])["feh"]).to_numpy())
    values = np.concatenate(found)
    return float(np.median(values)) if len(values) else 0.0


# --- the page -----------------------------------------------------------------------------------


def page(
    build: Build,
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
    reason = f" {build.choice['why']}" if build.choice.get("why") else ""
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
            _other(build, "uncertainty", "Errors of the corrected labels"),
            _other(build, "coverage", "Where the correction can be trusted"),
            _provenance(build, files, versions, job_text),
        ),
        version=versions.get("sos-dask", ""),
    )


def _of(pictures: Mapping[str, Picture], *names: str) -> tuple[Picture, ...]:
    return tuple(pictures[name] for name in names if name in pictures)


def _flags(build: Build) -> tuple[Mapping[str, int], int]:
    product = f"{build.target}{_CORRECTED}"
    manifest = build.manifests.get(product)
    return (manifest.summary.get("flags", {}), manifest.rows.n_out) if manifest else ({}, 0)


def _notes(build: Build) -> list[str]:
    notes = []
    table = build.table("trends", TRENDS)
    if table is not None:
        notes += headline.worst_bins(table, build.method)
    notes += headline.of_references(build.summary("trends").get("agreements", []))
    return notes + headline.of_flags(*_flags(build))


def _selection(build: Build) -> Section:
    items = [tables.account(build.products)]
    folded = []
    for survey in build.surveys:
        manifest = build.manifests[f"{survey}{_OBSERVATIONS}"]
        failed = manifest.summary.get("fail_cut", {})
        definition = manifest.recipe.params.get("survey", {})
        counts = [
            tables.CutCount(
                name,
                Cut(**{**cut, "bits_unset": tuple(cut["bits_unset"]),
                       "values": tuple(cut["values"])}).test_text(),
                int(failed.get(name, 0)),
            )
            for name, cut in sorted(
                definition.get("cuts", {}).items(), key=lambda item: item[1]["bit"]
            )
        ]  # fmt: skip
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
        f"Rule of the choice: {rule}." if rule else "",
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


def _other(build: Build, product: str, title: str) -> Section:
    """Tables of a product that checks the correction."""
    table = build.table(product, "calibration.parquet")
    if table is None:
        return Section(product, title)
    return Section(product, title, "", (tables.plain(table, "Calibration on held-out pairs."),))


def _provenance(
    build: Build, files: Mapping[str, str], versions: Mapping[str, str], job_text: str
) -> Section:
    hashes = [
        (survey, files.get(digest, ""), digest)
        for survey in build.surveys
        for digest in build.manifests[f"{survey}{_OBSERVATIONS}"].recipe.inputs.values()
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
