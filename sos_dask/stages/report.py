"""Stage report: counts of every catalog partition by partition, figures, and one page of all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from sos_dask import __version__
from sos_dask import corrections as models
from sos_dask.columns import FloatArray, IntArray, floats32
from sos_dask.correct import FLAG_OUTSIDE, FLAGS
from sos_dask.corrections.symbolic import FILE as FORMULA_FILE
from sos_dask.errors import CatalogError, ConfigError
from sos_dask.evidence.maps import SKY_ORDER, STEPS
from sos_dask.report import figures as panels
from sos_dask.report import maps
from sos_dask.report.page import (
    CORRECTED,
    OBSERVATIONS,
    PAIRS,
    Build,
    Picture,
    home_of,
    html,
    tables,
)
from sos_dask.report.style import Drawn, render, word
from sos_dask.schema import HEALPIX_COLUMN
from sos_dask.settings import Settings
from sos_dask.sky.healpix import MAX_ORDER, HealpixPixel
from sos_dask.stages.base import (
    Made,
    Role,
    Run,
    Stage,
    by_pixel,
    read_piece,
    write_piece,
)
from sos_dask.stages.projection import load_projection
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import FileRecord, Recipe, Rows
from sos_dask.storage.store import file_names, read_build, require_store

PAGE = "report.html"
_KEY = "obs_id"
_SOFTWARE = (
    "numpy", "scipy", "pyarrow", "healpy", "astropy", "dask", "distributed", "dask-ml",
    "scikit-learn", "xgboost", "pyoperon", "matplotlib",
)  # fmt: skip
Counts = Callable[[str], dict[str, IntArray]]
"""Rows of a product in cells of the sky or of a plane, by what is counted."""


def software() -> dict[str, str]:
    """Versions of this program, of Python and of what they calculate with."""
    found = {"sos-dask": __version__, "python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class ReportSettings(Settings):
    """What the report says beside its products."""

    job: str = Field(description="Name of the job.")
    job_text: str = Field(description="Text of the job file.")
    files: dict[str, str] = Field({}, description="Names of the survey files, by SHA-256.")
    software: dict[str, str] = Field(default_factory=software, description="Versions.")


@lru_cache(maxsize=2)
def _opened(products: tuple[tuple[str, Path], ...], key: tuple[tuple[str, str], ...]) -> Build:
    return Build.open(dict(products))


class ReportStage(Stage[ReportSettings]):
    """Make the page and its figures; see `report`."""

    name = "report"
    version = 5
    Settings = ReportSettings
    roles = (Role("product", "A product of the rebuild, by its name.", "output", many=True),)

    @classmethod
    def recipe(cls, settings: ReportSettings, fingerprints: Mapping[str, str]) -> Recipe:
        """Recipe for products of these fingerprints."""
        job_file = hashlib.sha256(settings.job_text.encode()).hexdigest()[:16]
        params = settings.as_json | {"job_file": job_file}
        del params["job_text"]
        names = {name.removeprefix("product."): one for name, one in fingerprints.items()}
        return Recipe(cls.name, cls.version, params, names)

    @property
    def build(self) -> Build:
        """The products, opened once in a process."""
        found = {name.removeprefix("product."): self.path(name) for name in self.inputs}
        return _opened(tuple(found.items()), tuple(self.fingerprints().items()))

    def check(self) -> None:
        """Refuse products without a chosen method."""
        if not self.build.method:
            raise ConfigError(
                "there is nothing to report: no method was chosen among these products",
                "Give the products of a complete rebuild.",
            )

    def make(self, run: Run) -> Made:
        """Count rows in cells, draw the figures, write the page."""
        build = self.build
        items = {
            f"{name}-{key}": (name, pixel)
            for name, catalog in build.counted.items()
            for key, pixel in by_pixel(catalog.pixels).items()
        }
        run.run_parts("counts", items, self.count_partition, "counts")
        keys = dict.fromkeys(figures(build))
        done = dict(zip(keys, run.parts("figures", keys, self.draw_figure, "figures"), strict=True))
        drawn = {key: record for key, record in done.items() if record["files"]}
        pictures = {}
        for key, record in drawn.items():
            run.files.extend(FileRecord(**file) for file in record["files"])
            png = (run.output.directory / f"figures/{key}.png").read_bytes()
            pictures[key] = Picture(record["title"], record["facts"], png)
        settings = self.settings
        page = html(
            build,
            pictures,
            tables(build, STEPS["labels"], settings.files, settings.software),
            job=settings.job,
            job_text=settings.job_text,
            version=settings.software.get("sos-dask", ""),
            formulas=_formulas(build),
        )
        run.write_bytes(PAGE, page.encode())
        titles = {key: record["title"] for key, record in drawn.items()}
        return Rows(0, 0), {"method": build.method, "figures": titles}

    def count_partition(
        self, output: Output, key: str, item: tuple[str, HealpixPixel]
    ) -> dict[str, Any]:
        """Count the rows of one partition in cells; empty cells are left out."""
        product, pixel = item
        build = self.build
        catalog = build.counted[product]
        if product in build.of("projection"):
            found = _count_places(catalog, pixel, build.scores, _plane(build))
        elif product in build.of(CORRECTED):
            found = _count_kiel(catalog, pixel, list(build.labels))
        else:
            cells = catalog.read(pixel, [HEALPIX_COLUMN])[HEALPIX_COLUMN].to_numpy()
            found = {"sky": np.bincount(cells >> (2 * (MAX_ORDER - maps.ORDER)))}
        kept = {what: np.flatnonzero(counts) for what, counts in found.items()}
        columns = {
            "what": pa.array(np.repeat(list(kept), [len(cells) for cells in kept.values()])),
            "cell": np.concatenate(list(kept.values())),
            "n": np.concatenate([found[what][cells] for what, cells in kept.items()]),
        }
        write_piece(output.work / "pieces" / f"{key}.arrow", pa.table(columns))
        return {}

    def draw_figure(self, output: Output, key: str, item: None) -> dict[str, Any]:
        """Write one figure as PNG and PDF."""
        build = self.build
        rendered = render(partial(figures(build)[key], partial(_sums, output, build)))
        if rendered is None:
            return {"files": []}
        files = [
            asdict(output.write_bytes(f"figures/{key}.{kind}", content))
            for kind, content in (("png", rendered.png), ("pdf", rendered.pdf))
        ]
        return {"title": rendered.title, "facts": dict(rendered.facts), "files": files}


# --- counts -------------------------------------------------------------------------------------


def _count_kiel(catalog: Catalog, pixel: HealpixPixel, labels: list[str]) -> dict[str, IntArray]:
    """Rows in Teff and log g before and after, and sums of logarithms of their errors."""
    names = catalog.schema.names
    corrected = [f"{name}_sos" if f"{name}_sos" in names else name for name in ("teff", "logg")]
    errors = {f"{label}_sos_err": label for label in labels if f"{label}_sos_err" in names}
    table = catalog.read(pixel, list(dict.fromkeys(["teff", "logg", *corrected, *errors])))
    before, after = (
        maps.kiel_cells(*(floats32(table, name) for name in pair))
        for pair in (("teff", "logg"), corrected)
    )
    size = maps.N_CELLS + 1
    found = {
        what: np.bincount(cells[cells >= 0], minlength=size)
        for what, cells in (("before", before), ("after", after))
    }
    for name, label in errors.items():
        values = floats32(table, name)
        good = (before >= 0) & np.isfinite(values) & (values > 0)
        whole = np.rint(np.log10(values[good].astype(np.float64)) / maps.LOG_QUANTUM)
        found[f"{label}_n"] = np.bincount(before[good], minlength=size)
        found[f"{label}_sum"] = np.bincount(before[good], whole, minlength=size).astype(np.int64)
    return found


def _count_places(
    catalog: Catalog, pixel: HealpixPixel, scores: Catalog | None, plane: maps.Plane
) -> dict[str, IntArray]:
    """Rows with a coverage in each cell of the plane of all parameters, and those outside it."""
    assert scores is not None
    names = ["umap_1", "umap_2"]
    places = catalog.read(pixel, [_KEY, *names])
    scored = scores.read(pixel, [_KEY, "coverage", FLAGS])
    if not places[_KEY].equals(scored[_KEY]):
        raise CatalogError(
            f"pixel {pixel}: {catalog.path} and {scores.path} contain other rows",
            "Make both from the same observations.",
        )
    cells = plane.cells(*(floats32(places, name) for name in names))
    known = (cells >= 0) & pc.is_valid(scored["coverage"]).to_numpy()
    outside = known & ((scored[FLAGS].to_numpy() & FLAG_OUTSIDE) != 0)
    return {
        name: np.bincount(cells[chosen], minlength=plane.coarse**2)
        for name, chosen in (("known", known), ("outside", outside))
    }


def _sums(output: Output, build: Build, product: str) -> dict[str, IntArray]:
    """Counts of a product, one partition after the other: all together they grow with these."""
    catalog = build.counted[product]
    if product in build.of("projection"):
        sizes = dict.fromkeys(("known", "outside"), _plane(build).coarse ** 2)
    elif product in build.of(CORRECTED):
        errors = [f"{label}_{what}" for label in build.labels for what in ("n", "sum")]
        sizes = dict.fromkeys(("before", "after", *errors), maps.N_CELLS + 1)
    else:
        sizes = {"sky": maps.N_SKY}
    total = {what: np.zeros(size, dtype=np.int64) for what, size in sizes.items()}
    for key in by_pixel(catalog.pixels):
        table = read_piece(output.work / "pieces" / f"{product}-{key}.arrow")
        for what, counts in total.items():
            mine = table.filter(pc.equal(table["what"], what))
            counts[mine["cell"].to_numpy()] += mine["n"].to_numpy()
    return total


# --- figures ------------------------------------------------------------------------------------


def figures(build: Build) -> dict[str, Callable[[Counts], Drawn | None]]:
    """How to draw every figure of a build, by its name."""
    labels, method, target = build.labels, build.method, build.target
    found: dict[str, Callable[[Counts], Drawn | None]] = {"sky": partial(_sky, build)}
    if build.one(CORRECTED):
        found["kiel"] = partial(_kiel, build)

    def add(key: str, table: str, draw: Callable[[pa.Table], Drawn | None]) -> None:
        if (rows := build.table(table)) is not None:
            found[key] = lambda counts: draw(rows)

    def add_trends(key: str, name: str, others: bool) -> None:
        add(key, "trends", lambda t: panels.trend_figure(t, labels, name, others, target))

    def add_references(one: str, two: str) -> None:
        add(f"references-{one}-{two}", "references",
            lambda t: panels.reference_figure(t, labels, one, two, target))  # fmt: skip

    for name in build.models:
        add_trends(f"trends-{name}", name, False)
    add_trends("trends-more", method, True)
    for pair in build.contrasts:
        add_references(*pair)
    add("comparison", "comparison", lambda t: panels.comparison_figure(t, labels, method))
    add("calibration", "hit_rates", lambda t: panels.calibration_figure(t, labels))
    add("generalisation", "left_out", lambda t: panels.left_out_figure(t, labels, method))
    add("coverage", "coverage", lambda t: maps.coverage_figure(t, SKY_ORDER, STEPS["kiel"]))
    limits = build.summary("coverage").get("limits", {})
    add("coverage-growth", "growth", lambda t: maps.growth_figure(t, limits))
    if build.table("planes") is not None and method in build.models:
        found["correction"] = partial(_correction, build)
    if build.table("projection") is not None:
        found["projection"] = partial(_projection, build)
    if (document := _formulas(build)) is not None:
        given = (document["labels"], labels, document["n_sample"])
        found["formulas"] = lambda counts: panels.formula_figure(*given)
        found["formula-fronts"] = lambda counts: panels.front_figure(*given)
    return found


def _sky(build: Build, counts: Counts) -> Drawn | None:
    names = {f"{name}.{OBSERVATIONS}": name for name in (build.target, *build.references)}
    names[build.one(PAIRS)] = f"pairs of {build.target} and {build.reference}"
    return maps.sky_figure(
        {text: counts(name)["sky"] for name, text in names.items() if name in build.counted}
    )


def _kiel(build: Build, counts: Counts) -> Drawn | None:
    found = counts(build.one(CORRECTED))
    return maps.kiel_figure(found["before"], found["after"])


def _correction(build: Build, counts: Counts) -> Drawn | None:
    """The model in Teff and log g, at the medians of the pairs in its other inputs."""
    teff, logg = maps.kiel_centres()
    others = [name for name in build.problem.columns if name not in ("teff", "logg")]
    at = _medians(build, others)
    columns = {name: np.full(len(teff), value) for name, value in at.items()}
    inputs = build.problem.matrix({"teff": teff, "logg": logg, **columns})
    values = models.load(build.models[build.method]).predict(inputs).astype(np.float64)
    planes, errors = build.table("planes"), _errors(build, counts)
    drawn = maps.correction_figure(planes, build.labels, build.method, values, errors)
    return drawn and replace(drawn, facts={**drawn.facts, "at": at})


def _errors(build: Build, counts: Counts) -> FloatArray:
    """Geometric means of the errors of corrected rows in Teff and log g; nan where unknown."""
    means = np.full((maps.N_CELLS, len(build.labels)), np.nan)
    if build.one(CORRECTED):
        found = counts(build.one(CORRECTED))
        n, total = (
            np.stack([found[f"{label}_{what}"][: maps.N_CELLS] for label in build.labels], axis=1)
            for what in ("n", "sum")
        )
        np.divide(total * maps.LOG_QUANTUM, n, out=means, where=n > 0)
    return np.asarray(10.0**means)


def _medians(build: Build, names: list[str]) -> dict[str, float]:
    """Medians of columns of the target over the pairs fit for training."""
    pairs = build.counted[build.one(PAIRS)]
    tables = [pairs.read(pixel, ["use", *names]) for pixel in pairs.pixels]
    found = {}
    for name in names:
        columns = [np.zeros(0, np.float32), *(floats32(t.filter(t["use"]), name) for t in tables)]
        values = np.concatenate(columns)
        known = values[np.isfinite(values)]
        found[name] = float(np.median(known)) if len(known) else 0.0
    return found


def _formulas(build: Build) -> dict[str, Any] | None:
    """Content of the symbolic model's file, checked by loading the model; None without one."""
    if "symbolic" not in build.models:
        return None
    models.load(build.models["symbolic"])
    return dict(json.loads((build.models["symbolic"] / FORMULA_FILE).read_text()))


def _plane(build: Build) -> maps.Plane:
    """Cells of the projection."""
    name = build.one("projection")
    bins = build.manifests[name].recipe.params["settings"]["map_bins"]
    return maps.Plane(load_projection(build.directories[name]).limits(), int(bins))


def _projection(build: Build, counts: Counts) -> Drawn | None:
    summary, scored = build.summary("projection"), None
    if build.scores is not None:
        found = counts(build.one("projection"))
        scored = (found["known"], found["outside"])
    n_not_asked = int(summary["not_asked"])
    table = build.table("projection")
    drawn = maps.projection_figure(table, _plane(build), scored, n_not_asked > 0)
    more = {
        "parameters": [word(name) for name in summary["parameters"]],
        "n_without": int(summary["without_place"]["target"]),
        "n_not_asked": n_not_asked,
    }
    return drawn and replace(drawn, facts={**drawn.facts, **more})


def of_build(store: Path) -> ReportStage:
    """Make the stage that reports the current build of a store."""
    require_store(store)
    current = store / "current"
    document = read_build(current)
    settings = ReportSettings(
        job=document["job"], job_text=document["job_file"], files=file_names(store)
    )
    names = [name for name in document["products"] if name != "report"]
    products = {f"product.{name}": home_of(name, (current / name).resolve()) for name in names}
    return ReportStage(products, settings)
