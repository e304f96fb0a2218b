"""Stage report: counts of every catalog partition by partition, figures, and one page of all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Mapping
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
from sos_dask.columns import IntArray, floats32, floats_or_nan
from sos_dask.correct import FLAG_OUTSIDE, FLAGS
from sos_dask.corrections.symbolic import FILE as FORMULA_FILE
from sos_dask.errors import CatalogError, ConfigError
from sos_dask.evidence.coverage_maps import SKY_ORDER, STEPS
from sos_dask.problem import SNR
from sos_dask.report import figures as panels
from sos_dask.report import maps, page, unified
from sos_dask.report.page import Build
from sos_dask.report.style import Drawn, Labels, render, word
from sos_dask.schema import HEALPIX_COLUMN
from sos_dask.settings import Settings
from sos_dask.sky.healpix import MAX_ORDER, HealpixPixel
from sos_dask.stages.base import Made, Place, Role, Run, Stage, by_pixel, places
from sos_dask.stages.evidence import read_evidence
from sos_dask.stages.projection import load_projection
from sos_dask.stages.sample import read_sample
from sos_dask.stages.unify import FLAG_VARIABLE, MEANINGS
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import FileRecord, Recipe, Rows, local_copy
from sos_dask.storage.store import file_names, read_build, require_store

PAGE = "report.html"
_KEY = "obs_id"
_SOFTWARE = (
    "numpy", "scipy", "pyarrow", "healpy", "astropy", "dask", "distributed", "dask-ml",
    "scikit-learn", "xgboost", "pyoperon", "matplotlib",
)  # fmt: skip
Counts = dict[str, IntArray]
"""Rows in cells of the sky or of a plane, by what is counted."""
CountsOf = Callable[[str], Counts]
Draw = Callable[[CountsOf], Drawn | None]


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
def _opened(products: tuple[tuple[str, Path], ...], key: tuple[str, ...]) -> Build:
    return Build.open(dict(products))


class ReportStage(Stage[ReportSettings]):
    """Make the page and its figures; see `report`."""

    name = "report"
    version = 8
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
        return _opened(tuple(found.items()), tuple(self.fingerprints().values()))

    def check(self) -> None:
        """Refuse products without a chosen method."""
        if not self.build.method and not self.build.unified:
            raise ConfigError(
                "there is nothing to report: no method was chosen among these products",
                "Give the products of a complete rebuild.",
            )

    def make(self, run: Run) -> Made:
        """Count rows in cells, draw the figures, write the page."""
        build, settings = self.build, self.settings
        run.parts("counts", places(build.counted), self.count_partition, "counts")
        keys = dict.fromkeys(figures(build))
        done = run.parts("figures", keys, self.draw_figure, "figures")
        drawn = {key: record for key, record in zip(keys, done, strict=True) if record["files"]}
        pictures = {}
        for key, record in drawn.items():
            run.files.extend(FileRecord(**file) for file in record["files"])
            png = (run.output.directory / f"figures/{key}.png").read_bytes()
            pictures[key] = page.Picture(record["title"], record["facts"], png)
        tables = page.of_every_page(build, settings.files, settings.software)
        if build.unified:
            tables = unified.tables(build, tables, _sums(run.output, build, "sos"), MEANINGS)
        else:
            tables = page.tables(build, tables, STEPS["labels"])
        text = page.html(
            build,
            pictures,
            tables,
            job=settings.job,
            job_text=settings.job_text,
            version=settings.software.get("sos-dask", ""),
            formulas=_formulas(build),
        )
        run.write_bytes(PAGE, text.encode())
        titles = {key: record["title"] for key, record in drawn.items()}
        return Rows(0, 0), {"method": build.method, "figures": titles}

    def count_partition(self, output: Output, key: str, item: Place) -> dict[str, Any]:
        """Count the rows of one partition in cells of the sky or of a plane."""
        (product, pixel), build = item, self.build
        catalog = build.counted[product]
        if product in build.of("projection"):
            assert build.scores is not None
            found = _count_places(catalog, pixel, build.scores, _plane(build))
        elif product in build.of(page.CORRECTED):
            found = _count_kiel(catalog, pixel, build.labels)
        elif product == "sos":
            found = _count_stars(catalog, pixel, build)
        else:
            cells = catalog.read(pixel, [HEALPIX_COLUMN])[HEALPIX_COLUMN].to_numpy()
            found = {"sky": _count(cells >> 2 * (MAX_ORDER - maps.ORDER), maps.N_SKY)}
        output.write_piece(key, pa.table(found))
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


def _count(cells: IntArray, size: int, weights: Any = None) -> IntArray:
    """Rows in every cell, but for those in none (-1); or sums of their weights, which are whole."""
    inside = cells >= 0
    weights = None if weights is None else weights[inside]
    return np.bincount(cells[inside], weights, minlength=size).astype(np.int64)


def _count_kiel(catalog: Catalog, pixel: HealpixPixel, labels: Iterable[str]) -> Counts:
    """Rows in Teff and log g before and after, and sums of logarithms of their errors."""
    after = [(catalog.columns([f"{name}_sos"]) or [name])[0] for name in ("teff", "logg")]
    errors = {label: f"{label}_sos_err" for label in labels}
    names = dict.fromkeys(catalog.columns(["teff", "logg", *after, *errors.values()]))
    table, size = catalog.read(pixel, list(names)), maps.N_CELLS + 1
    planes = {"before": ("teff", "logg"), "after": after}
    cells = {
        when: maps.kiel_cells(*(floats_or_nan(table, name).astype(np.float32) for name in pair))
        for when, pair in planes.items()
    }
    found = {when: _count(at, size) for when, at in cells.items()}
    for label, name in errors.items():
        values = floats_or_nan(table, name)
        at = np.where(np.isfinite(values) & (values > 0), cells["before"], -1)
        whole = np.rint(np.log10(np.where(at >= 0, values, 1.0)) / maps.LOG_QUANTUM)
        found |= {f"{label}_n": _count(at, size), f"{label}_sum": _count(at, size, whole)}
    return found


def _count_stars(catalog: Catalog, pixel: HealpixPixel, build: Build) -> Counts:
    """Stars on the sky, by number of surveys and variation, and errors of the surveys."""
    errors = {f"{label}:{survey}": f"{label}_err_{survey.replace('-', '_')}"
              for label in build.labels for survey in build.surveys}  # fmt: skip
    several = {label: f"{label}_n" for label in build.labels}
    names = [HEALPIX_COLUMN, "n_surveys", "n_obs", "flag_sos", "rv_scatter"]
    table = catalog.read(pixel, catalog.columns([*names, *errors.values(), *several.values()]))
    cells = table[HEALPIX_COLUMN].to_numpy() >> 2 * (MAX_ORDER - maps.ORDER)
    found = {"sky": cells, "surveys": table["n_surveys"].to_numpy().astype(np.int64)}
    if "rv_scatter" in table.schema.names:
        at = maps.velocity_cells(table["n_obs"].to_numpy(), floats_or_nan(table, "rv_scatter"))
        varies = table["flag_sos"].to_numpy() & FLAG_VARIABLE != 0
        found |= {"velocity": at, "variable": np.where(varies, at, -1)}
    for key, name in errors.items():
        if name in table.schema.names:
            compared = table[several[key.partition(":")[0]]].to_numpy() > 1
            found[key] = np.where(compared, maps.error_cells(floats_or_nan(table, name)), -1)
    return {what: _count(at, maps.N_SKY) for what, at in found.items()}


def _count_places(
    catalog: Catalog, pixel: HealpixPixel, scores: Catalog, plane: maps.Plane
) -> Counts:
    """Rows with a coverage in each cell of the plane of all parameters, and those outside it."""
    names = ["umap_1", "umap_2"]
    places = catalog.read(pixel, [_KEY, *names])
    scored = scores.read(pixel, [_KEY, "coverage", FLAGS])
    if not places[_KEY].equals(scored[_KEY]):
        raise CatalogError(
            f"pixel {pixel}: {catalog.path} and {scores.path} contain other rows",
            "Make both from the same observations.",
        )
    cells = plane.cells(*(floats32(places, name) for name in names))
    known = np.where(pc.is_valid(scored["coverage"]).to_numpy(), cells, -1)
    outside = np.where(scored[FLAGS].to_numpy() & FLAG_OUTSIDE, known, -1)
    size = plane.coarse**2
    return {"known": _count(known, size), "outside": _count(outside, size)}


def _sums(output: Output, build: Build, product: str) -> Counts:
    """Counts of a product, one partition after the other: all together they grow with these."""
    total: Counts = {}
    for key in by_pixel(build.counted[product].pixels):
        table = output.read_piece(f"{product}-{key}")
        total = {what: total.get(what, 0) + table[what].to_numpy() for what in table.schema.names}
    return total


# --- figures ------------------------------------------------------------------------------------


def figures(build: Build) -> dict[str, Draw]:
    """How to draw every figure of a build, by its name."""
    labels, method, target = build.labels, build.method, build.target
    limits = build.summary("coverage").get("limits", {})
    found: dict[str, Draw] = {"sky": partial(_sky, build)}
    if build.unified:
        return found | _unified(build)
    if _has_rows(build, build.one(page.CORRECTED)):
        found["kiel"] = lambda counts: maps.kiel_figure(
            *(counts(build.one(page.CORRECTED))[when] for when in ("before", "after"))
        )

    def add(key: str, table: str, draw: Callable[..., Drawn | None], *given: Any) -> None:
        if (rows := build.table(table)) is not None:
            found[key] = lambda counts: draw(rows, *given)

    for name in build.models:
        add(f"trends-{name}", "trends", panels.trend_figure, labels, name, False, target)
    add("trends-more", "trends", panels.trend_figure, labels, method, True, target)
    for one, two in build.contrasts:
        key = f"references-{one}-{two}"
        add(key, "references", panels.reference_figure, labels, one, two, target)
    add("comparison", "comparison", panels.comparison_figure, labels, method)
    add("calibration", "hit_rates", panels.calibration_figure, labels)
    add("generalisation", "left_out", panels.left_out_figure, labels, method)
    add("coverage", "coverage", maps.coverage_figure, SKY_ORDER, STEPS["kiel"])
    add("coverage-growth", "growth", maps.growth_figure, limits)
    if build.one("evidence") and build.one("sample"):
        found["overlap"] = partial(_overlap, build)
    if build.table("planes") is not None and build.one("evidence") and method in build.models:
        found["correction"] = partial(_correction, build)
    if build.table("projection") is not None:
        found["projection"] = partial(_projection, build)
    if (document := _formulas(build)) is not None:
        given = (document["labels"], labels, document["n_sample"])
        found["formulas"] = lambda counts: panels.formula_figure(*given)
        found["formula-fronts"] = lambda counts: panels.front_figure(*given)
    return found


def _unified(build: Build) -> dict[str, Draw]:
    """How to draw the figures of the unified catalog."""
    labels, errors = build.labels, build.summary("sos")["errors"]
    found: dict[str, Draw] = {
        "pairs": lambda counts: unified.pairs_figure(errors, labels),
        "errors": lambda counts: unified.errors_figure(
            errors,
            {x: one[: maps.N_ERRORS] for x, one in counts("sos").items() if ":" in x},
            labels,
            build.surveys,
        ),
    }
    if "rv" in labels:
        found["velocities"] = lambda counts: maps.velocity_figure(
            *(counts("sos")[what][: maps.N_VELOCITY] for what in ("velocity", "variable"))
        )
    for name, rows in unified.validations(build.directories).items():
        found[f"validation-{name}"] = partial(_validation, name, rows, labels)
    return found


def _validation(name: str, rows: list[page.Row], labels: Labels, counts: CountsOf) -> Drawn | None:
    return unified.validation_figure(name, rows, labels)


def _has_rows(build: Build, product: str) -> bool:
    return product in build.counted and bool(build.counted[product].pixels)


def _sky(build: Build, counts: CountsOf) -> Drawn | None:
    names = {"sos": "unified catalog"}
    names |= {f"{name}.{page.OBSERVATIONS}": name for name in (build.target, *build.references)}
    names[build.one(page.PAIRS)] = f"pairs of {build.target} and {build.reference}"
    return maps.sky_figure(
        {text: counts(name)["sky"] for name, text in names.items() if _has_rows(build, name)}
    )


def _correction(build: Build, counts: CountsOf) -> Drawn | None:
    """The model in Teff and log g, at the medians of the pairs in its other inputs."""
    teff, logg = maps.kiel_centres()
    others = [name for name in build.problem.columns if name not in ("teff", "logg")]
    pairs = read_evidence(build.directories[build.one("evidence")], others)
    at = {}
    for name in others:
        known = floats32(pairs, name)
        known = known[np.isfinite(known)]
        at[name] = float(np.median(known)) if len(known) else 0.0
    columns = {name: np.full(len(teff), value) for name, value in at.items()}
    inputs = build.problem.matrix({"teff": teff, "logg": logg, **columns})
    values = models.load(local_copy(build.models[build.method])).predict(inputs).astype(np.float64)
    # Geometric means of the errors of corrected rows.
    means = np.full((maps.N_CELLS, len(build.labels)), np.nan)
    if _has_rows(build, build.one(page.CORRECTED)):
        found = counts(build.one(page.CORRECTED))
        n, total = (
            np.stack([found[f"{label}_{what}"][: maps.N_CELLS] for label in build.labels], axis=1)
            for what in ("n", "sum")
        )
        np.divide(total * maps.LOG_QUANTUM, n, out=means, where=n > 0)
    planes = build.table("planes")
    drawn = maps.correction_figure(planes, build.labels, build.method, values, 10.0**means)
    return drawn and replace(drawn, facts={**drawn.facts, "at": at})


def _overlap(build: Build, counts: CountsOf) -> Drawn | None:
    """S/N, magnitude and kind of star of the pairs and of the rows that pass all cuts."""
    rows = read_sample(build.directories[build.one("sample")], good=True)
    names = dict.fromkeys([SNR, "phot_g_mean_mag", *build.problem.columns, *build.labels])
    known = [name for name in names if name in rows.schema.names]
    pairs = read_evidence(build.directories[build.one("evidence")], [], known)
    known = [name for name in known if name in pairs.schema.names]
    of_pairs, of_rows = ({name: floats32(of, name) for name in known} for of in (pairs, rows))
    return panels.overlap_figure(of_pairs, of_rows, build.labels)


def _formulas(build: Build) -> dict[str, Any] | None:
    """Content of the symbolic model's file, checked by loading the model; None without one."""
    if "symbolic" not in build.models:
        return None
    model = local_copy(build.models["symbolic"])
    models.load(model)
    return dict(json.loads((model / FORMULA_FILE).read_text()))


def _plane(build: Build) -> maps.Plane:
    """Cells of the projection."""
    name = build.one("projection")
    bins = build.manifests[name].recipe.params["settings"]["map_bins"]
    return maps.Plane(load_projection(build.directories[name]).limits(), int(bins))


def _projection(build: Build, counts: CountsOf) -> Drawn | None:
    summary, scored = build.summary("projection"), None
    if _has_rows(build, build.one("projection")):
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
    names = [name for name in document["products"] if name.split(".")[-1] != "report"]
    products = {f"product.{name}": page.home_of(name, (current / name).resolve()) for name in names}
    return ReportStage(products, settings)
