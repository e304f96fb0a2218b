"""Stage report: counts of every catalog partition by partition, figures, and one page of all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask import __version__
from sos_dask.columns import floats32
from sos_dask.correct import FLAG_OUTSIDE, FLAGS
from sos_dask.errors import CatalogError, ConfigError
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import HEALPIX_COLUMN, LABELS
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.stages.parts import key_of, records, run_parts, unless_complete
from sos_dask.stages.pieces import read_piece, write_piece
from sos_dask.stages.report_content import Build, figures, grid_of
from sos_dask.stages.report_text import page
from sos_dask.storage.artifact import FileRecord, Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.store import file_names, read_build, require_store

if TYPE_CHECKING:
    from sos_dask.report.planes import Histogram

VERSION = 4
PAGE = "report.html"
_KEY = "obs_id"
_SOFTWARE = (
    "numpy", "scipy", "pyarrow", "healpy", "astropy", "dask", "distributed", "dask-ml",
    "scikit-learn", "xgboost", "pyoperon", "matplotlib",
)  # fmt: skip


def software() -> dict[str, str]:
    """Versions of this program, of Python and of what they calculate with."""
    found = {"sos-dask": __version__, "python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class ReportSettings:
    """What the report says beside its products.

    Parameters
    ----------
    job, job_text : str
        Name and text of the job.
    files : mapping of str to str
        Names of the survey files, by SHA-256.
    software : mapping of str to str
        Versions.
    """

    job: str
    job_text: str
    files: Mapping[str, str] = field(default_factory=dict)
    software: Mapping[str, str] = field(default_factory=software)


@dataclass(frozen=True)
class _Part:
    output: Output
    product: str
    catalog: Catalog
    pixel: HealpixPixel
    scores: Catalog | None = None


@dataclass(frozen=True)
class _Figure:
    key: str
    build: Build
    counts: _Counts


def report_recipe(products: Mapping[str, str], settings: ReportSettings) -> Recipe:
    """Recipe of `report` for products of these fingerprints."""
    params = {
        "job": settings.job,
        "job_file": hashlib.sha256(settings.job_text.encode()).hexdigest()[:16],
        "files": dict(settings.files),
        "software": dict(settings.software),
    }
    return Recipe("report", VERSION, params, products)


def report(
    products: Mapping[str, Path],
    directory: Path,
    settings: ReportSettings,
    *,
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Make the page and its figures.

    Parameters
    ----------
    products : mapping of str to Path
        Directories of the products of a rebuild by their names, in the order of the plan. What is
        not there is left out of the report.
    directory : Path
        Gets ``report.html``, which needs nothing else, and ``figures/*.png`` and ``*.pdf``.
    settings : ReportSettings

    Returns
    -------
    Manifest
        ``summary``: the chosen method and the titles of the figures.

    Raises
    ------
    ConfigError
        There is no correction among the products.
    CatalogError
        A product is unfinished or damaged, or the directory holds something else.
    """
    return _report(products, directory, settings, overwrite, cluster, report)


def _report(
    products: Mapping[str, Path],
    directory: Path,
    settings: ReportSettings,
    overwrite: bool,
    cluster: Cluster | None,
    report: Report,
) -> Manifest:
    build = Build.open(products)
    if not build.method:
        raise ConfigError(
            "there is nothing to report: no method was chosen among these products",
            "Give the products of a complete rebuild.",
        )
    recipe = report_recipe({p.name: p.fingerprint for p in build.products}, settings)
    output = Output.prepare(directory, recipe, overwrite, build.homes.values())
    if output.complete:
        return output.load_manifest()
    cluster = cluster or Cluster()
    with unless_complete(output):
        counted = {
            f"{name}-{key_of(pixel)}": _Part(
                output, name, catalog, pixel, build.scores if name == "projection" else None
            )
            for name, catalog in build.counted.items()
            for pixel in catalog.pixels
        }
        run_parts(output, "counts", counted, _count_part, cluster, "counts", report)
        keys = {
            name: tuple(key for key, part in counted.items() if part.product == name)
            for name in build.counted
        }
        parts = {key: _Figure(key, build, _Counts(output, keys)) for key in figures(build)}
        run_parts(output, "figures", parts, _figure_part, cluster, "figures", report)
        done = dict(zip(parts, records(output, "figures", list(parts)), strict=True))
        drawn = {key: record for key, record in done.items() if record["files"]}
        files = [FileRecord(**file) for record in drawn.values() for file in record["files"]]
        counts = _Counts(output, keys)
        write = partial(_write_page, build, settings, counts, drawn)
        output.commit(
            Rows(0, 0),
            (*files, output.write_file(PAGE, write)),
            {"method": build.method, "figures": {k: r["title"] for k, r in drawn.items()}},
        )
    return output.load_manifest()


def of_build(
    store: Path,
    directory: Path,
    *,
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Make the report of the current build of a store; see `report`."""
    require_store(store)
    current = store / "current"
    document = read_build(current)
    names = [name for name in document["products"] if name != "report"]
    settings = ReportSettings(document["job"], document["job_file"], file_names(store))
    products = {name: current / name for name in names}
    return _report(products, directory, settings, overwrite, cluster, report)


def _piece(output: Output, key: str) -> Path:
    return output.work / "pieces" / f"{key}.arrow"


def _count_part(part: _Part) -> None:
    """Rows of one partition on the sky, and on the plane where it holds corrected labels."""
    from sos_dask.report import planes, sky

    key = f"{part.product}-{key_of(part.pixel)}"
    n_outside = {}
    if part.scores is not None:
        columns = _count_places(part, part.scores)
    elif "teff_sos" not in part.catalog.schema.names:
        table = part.catalog.read(part.pixel, [HEALPIX_COLUMN])
        cells, counts = sky.cell_counts(table[HEALPIX_COLUMN].to_numpy())
        columns = {"cell": cells, "n": counts}
    else:
        errors = part.catalog.columns([f"{label}_sos_err" for label in LABELS])
        names = ["teff", "logg", "teff_sos", "logg_sos", *errors]
        table = part.catalog.read(part.pixel, names)
        values = {name: floats32(table, name) for name in names}
        before = planes.cells_of(values["teff"], values["logg"])
        after = planes.cells_of(values["teff_sos"], values["logg_sos"])
        found = {"before": planes.histogram(before), "after": planes.histogram(after)}
        columns = {name: one.counts for name, one in found.items()}
        n_outside = {name: one.n_outside for name, one in found.items()}
        for name in errors:
            label = name.removesuffix("_sos_err")
            good = (before >= 0) & np.isfinite(values[name]) & (values[name] > 0)
            whole = np.rint(np.log10(values[name][good].astype(np.float64)) / planes.LOG_QUANTUM)
            for what, weights in (("n", None), ("sum", whole)):
                sums = np.bincount(before[good], weights, minlength=planes.N_CELLS)
                columns[f"{label}_{what}"] = sums.astype(np.int64)
    write_piece(_piece(part.output, key), pa.table(columns))
    part.output.put_record("counts", key, {"outside": n_outside})


def _count_places(part: _Part, scores: Catalog) -> dict[str, NDArray[np.int64]]:
    """Rows with a coverage in each cell of the plane of all parameters, and those outside it."""
    grid = grid_of(part.catalog.path)
    names = ["umap_1", "umap_2"]
    places = part.catalog.read(part.pixel, [_KEY, *names])
    scored = scores.read(part.pixel, [_KEY, "coverage", FLAGS])
    if not places[_KEY].equals(scored[_KEY]):
        raise CatalogError(
            f"pixel {part.pixel}: {part.catalog.path} and {scores.path} hold other rows",
            "Make both from the same observations.",
        )
    cells = grid.cells(*(floats32(places, name) for name in names))
    known = (cells >= 0) & pc.is_valid(scored["coverage"]).to_numpy()
    outside = known & ((scored[FLAGS].to_numpy() & FLAG_OUTSIDE) != 0)
    return {
        name: np.bincount(cells[chosen], minlength=grid.coarse**2).astype(np.int64)
        for name, chosen in (("known", known), ("outside", outside))
    }


def _figure_part(part: _Figure) -> None:
    """One figure as PNG and PDF, with its words."""
    from sos_dask.report.style import render

    rendered = render(partial(figures(part.build)[part.key], part.counts))
    output = part.counts.output
    record: dict[str, Any] = {"files": []}
    if rendered is not None:
        record = {name: getattr(rendered, name) for name in ("title", "caption", "alt")}
        record["files"] = [
            asdict(output.write_file(f"figures/{part.key}.{kind}", _writer(content)))
            for kind, content in (("png", rendered.png), ("pdf", rendered.pdf))
        ]
    output.put_record("figures", part.key, record)


def _writer(content: bytes) -> Callable[[Path], int]:
    def write(path: Path) -> int:
        path.write_bytes(content)
        return 0

    return write


def _write_page(
    build: Build,
    settings: ReportSettings,
    counts: _Counts,
    drawn: Mapping[str, Mapping[str, Any]],
    path: Path,
) -> int:
    from sos_dask.report.page import Picture, html

    pictures = {
        key: Picture(
            key, record["title"], record["caption"], record["alt"],
            (counts.output.directory / f"figures/{key}.png").read_bytes(),
        )
        for key, record in drawn.items()
    }  # fmt: skip
    document = page(
        build, counts, pictures, settings.files, settings.software, settings.job, settings.job_text
    )
    path.write_text(html(document), encoding="utf-8")
    return 0


@dataclass(frozen=True)
class _Counts:
    """Sums of what `_count_part` has written, as figures ask for them."""

    output: Output
    keys: Mapping[str, tuple[str, ...]]

    def _tables(self, product: str) -> Iterator[pa.Table]:
        """One after the other: all together they grow with the number of partitions."""
        for key in self.keys[product]:
            yield read_piece(_piece(self.output, key))

    def _sums(self, product: str, *names: str) -> list[NDArray[np.int64]]:
        """Columns added up over all parts."""
        total: list[Any] = [0] * len(names)
        for table in self._tables(product):
            total = [one + table[name].to_numpy() for one, name in zip(total, names, strict=True)]
        return [np.asarray(one, dtype=np.int64) for one in total]

    def sky(self, product: str) -> NDArray[np.int64]:
        """Rows a cell of the sky."""
        from sos_dask.report.sky import N_CELLS

        total = np.zeros(N_CELLS, dtype=np.int64)
        for table in self._tables(product):
            total[table["cell"].to_numpy()] += table["n"].to_numpy()
        return total

    def places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Rows with a coverage in each cell of the plane of all parameters, and those outside."""
        if "projection" not in self.keys:
            return None
        known, outside = self._sums("projection", "known", "outside")
        return known, outside

    def plane(self, product: str) -> tuple[Histogram, Histogram]:
        """Rows on the plane before and after."""
        from sos_dask.report.planes import N_CELLS, Histogram

        keys, names = self.keys[product], ("before", "after")
        outside = [self.output.get_record("counts", key) or {} for key in keys]
        before, after = (
            Histogram(
                np.zeros(N_CELLS, dtype=np.int64) + counts,
                sum(record["outside"][name] for record in outside),
            )
            for name, counts in zip(names, self._sums(product, *names), strict=True)
        )
        return before, after

    def errors(self, product: str) -> NDArray[np.float64] | None:
        """Geometric mean of the errors on the plane; None where rows have none."""
        from sos_dask.report.planes import LOG_QUANTUM, N_CELLS

        first = next(self._tables(product), None)
        if first is None or f"{LABELS[0]}_sum" not in first.column_names:
            return None
        means = np.full((N_CELLS, len(LABELS)), np.nan)
        for number, label in enumerate(LABELS):
            n, total = self._sums(product, f"{label}_n", f"{label}_sum")
            np.divide(total * LOG_QUANTUM, n, out=means[:, number], where=n > 0)
        return np.asarray(10.0**means)
