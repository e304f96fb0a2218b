"""A build opened for its report, and which figure gets which data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sos_dask import corrections as models
from sos_dask.corrections.symbolic import FILE as FORMULA_FILE
from sos_dask.evidence.maps import SKY_ORDER, STEPS
from sos_dask.problem import features
from sos_dask.report import tables
from sos_dask.report.words import WORDS
from sos_dask.schema import LABELS
from sos_dask.sky.healpix import FloatArray, IntArray
from sos_dask.stages.coverage import CALIBRATION, MAPS
from sos_dask.stages.generalisation import TABLE as GROUPS
from sos_dask.stages.projection import MAPS as PLACES
from sos_dask.stages.projection import load_projection
from sos_dask.stages.trends import PLANES, REFERENCES, TRENDS
from sos_dask.storage.artifact import Manifest
from sos_dask.storage.catalog import Catalog, partition_errors
from sos_dask.storage.store import home

if TYPE_CHECKING:
    from sos_dask.report.planes import Histogram, Surface
    from sos_dask.report.projection import Grid
    from sos_dask.report.style import Drawn

OBSERVATIONS, CORRECTED, _MODEL = ".observations", ".corrected", "model."


class Counts(Protocol):
    """Sums over the partitions of a catalog."""

    def sky(self, product: str) -> IntArray:
        """Rows a cell of the sky."""

    def plane(self, product: str) -> tuple[Histogram, Histogram]:
        """Rows on the plane before and after."""

    def places(self) -> tuple[IntArray, IntArray] | None:
        """Rows with a coverage in each cell of the plane of all parameters, and those outside."""

    def errors(self, product: str) -> FloatArray | None:
        """Geometric mean error of the corrected labels on the plane; None where rows have none."""


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
            {name: Manifest.checked(_home(name, path)) for name, path in found.items()},
        )

    @property
    def homes(self) -> dict[str, Path]:
        """Directories of the manifests."""
        return {name: _home(name, path) for name, path in self.directories.items()}

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
        return [n.removesuffix(OBSERVATIONS) for n in self.manifests if n.endswith(OBSERVATIONS)]

    @property
    def target(self) -> str:
        """Name of the survey that is corrected."""
        found = [n.removesuffix(CORRECTED) for n in self.manifests if n.endswith(CORRECTED)]
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
            if name.endswith((OBSERVATIONS, CORRECTED))
            or name == "pairs"
            or (name == "projection" and self.scores is not None)
        ]
        return {name: Catalog.open(self.directories[name]) for name in names}

    @cached_property
    def scores(self) -> Catalog | None:
        """Coverage of every row of the target; None without it."""
        directory = self.directories.get("coverage")
        return None if directory is None else Catalog.open(directory)

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


def _home(name: str, path: Path) -> Path:
    return home("margin" if name.endswith(".collection") else "", path)


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
    if build.table("uncertainty", "calibration.parquet") is not None:
        found["calibration"] = partial(_calibration, build)
    if build.table("coverage", MAPS) is not None:
        found["coverage"] = partial(_coverage, build)
        found["coverage-growth"] = partial(_growth, build)
    if build.table("projection", PLACES) is not None:
        found["projection"] = partial(_projection, build)
    if build.table("generalisation", GROUPS) is not None:
        found["generalisation"] = partial(_generalisation, build, "median")
        found["generalisation-scatter"] = partial(_generalisation, build, "mad")
    if build.table("comparison", "comparison.parquet") is not None:
        found["comparison"] = partial(_comparison, build)
    if f"{build.target}{CORRECTED}" in build.directories:
        found["kiel"] = partial(_kiel, build)
    if "model.symbolic" in build.directories:
        found["formulas"] = partial(_formulas, build)
        found["formula-fronts"] = partial(_fronts, build)
    return found


def _sky(build: Build, counts: Counts) -> Drawn | None:
    from sos_dask.report.sky import sky_figure

    names = {f"{name}{OBSERVATIONS}": name for name in (build.target, *build.references)}
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


def _calibration(build: Build, counts: Counts) -> Drawn | None:
    from sos_dask.report.calibration import calibration_figure

    table = build.table("uncertainty", "calibration.parquet")
    return None if table is None else calibration_figure(table)


def _growth(build: Build, counts: Counts) -> Drawn | None:
    from sos_dask.report.calibration import growth_figure

    table = build.table("coverage", CALIBRATION)
    limits = build.summary("coverage").get("limits", {})
    return None if table is None else growth_figure(table, limits)


def _coverage(build: Build, counts: Counts) -> Drawn | None:
    from sos_dask.report.trust import coverage_figure

    table = build.table("coverage", MAPS)
    meaning = build.summary("coverage").get("meaning", {})
    return None if table is None else coverage_figure(table, SKY_ORDER, STEPS["kiel"], meaning)


def grid_of(directory: Path) -> Grid:
    """Cells of a projection."""
    from sos_dask.report.projection import Grid

    bins = Manifest.load(directory).recipe.params["settings"]["map_bins"]
    return Grid(load_projection(directory).limits(), int(bins))


def _projection(build: Build, counts: Counts) -> Drawn | None:
    from sos_dask.report.projection import projection_figure

    table, summary = build.table("projection", PLACES), build.summary("projection")
    if table is None:
        return None
    names = tuple(WORDS.get(name, name) for name in summary["parameters"])
    grid = grid_of(build.directories["projection"])
    n_without, n_not_asked = int(summary["without_place"]["target"]), int(summary["not_asked"])
    return projection_figure(table, grid, counts.places(), names, n_without, n_not_asked)


def _generalisation(build: Build, statistic: str, counts: Counts) -> Drawn | None:
    from sos_dask.report.generalisation import generalisation_figure

    table = build.table("generalisation", GROUPS)
    return None if table is None else generalisation_figure(table, statistic, build.method)


def _kiel(build: Build, counts: Counts) -> Drawn | None:
    from sos_dask.report.planes import kiel_figure

    product = f"{build.target}{CORRECTED}"
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
    product = f"{build.target}{CORRECTED}"
    errors = counts.errors(product) if product in build.counted else None
    error: Surface | None = None
    if errors is not None:
        error = Surface(
            errors,
            "geometric mean of the errors of corrected rows (half of their 68 % interval), on a "
            "logarithmic scale",
        )
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
