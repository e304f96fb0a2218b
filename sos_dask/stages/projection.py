"""Stage projection: a UMAP of target and overlap together, with a place for every row.

Three passes over the partitions: count the strata, collect the sample, place the rows. The plane
is laid out once, between the second and the third.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask.columns import floats, key_hashes
from sos_dask.errors import ModelError
from sos_dask.evidence.projection import (
    Projection,
    ProjectionSettings,
    chosen_rows,
    density_map,
    fit_projection,
    sampling_rates,
    strata,
)
from sos_dask.problem import PARAMETERS, parameters_of
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import CANONICAL, HEALPIX, HEALPIX_COLUMN
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.stages.needs import require_memory
from sos_dask.stages.parts import commit_catalog, key_of, records, run_parts, unless_complete
from sos_dask.stages.pieces import read_piece, write_piece
from sos_dask.stats.numbers import in_share
from sos_dask.storage.artifact import FileRecord, Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog, partition_errors, write_parquet, write_partition

VERSION = 5
SAMPLE, MAPS, MODEL = "sample.parquet", "maps.parquet", "projection.json"
TARGET, OVERLAP = "target", "overlap"
_KEY = "obs_id"
_PLANE = ("umap_1", "umap_2")


@dataclass(frozen=True)
class _Part:
    output: Output
    sample: str
    catalogs: tuple[Catalog, ...]
    pixel: HealpixPixel
    names: tuple[str, ...]
    settings: ProjectionSettings
    rates: dict[int, float] | None = None

    @property
    def key(self) -> str:
        return f"{self.sample}-{key_of(self.pixel)}"


def projection_recipe(
    observations: Sequence[str], pairs: Sequence[str], settings: ProjectionSettings
) -> Recipe:
    """Recipe of `projection`; each list names a catalog and those that add columns to it."""
    inputs = {f"{TARGET}.{number}": one for number, one in enumerate(observations)}
    inputs |= {f"{OVERLAP}.{number}": one for number, one in enumerate(pairs)}
    return Recipe("projection", VERSION, {"settings": asdict(settings)}, inputs)


def projection(
    observations: Sequence[Catalog],
    pairs: Sequence[Catalog],
    directory: Path,
    settings: ProjectionSettings | None = None,
    *,
    name: str = "projection",
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Place every observation on a plane laid out from a sample of target and overlap.

    Parameters
    ----------
    observations : sequence of Catalog
        The target's observations, then catalogs with the same rows that add columns.
    pairs : sequence of Catalog
        Output of crossmatch, then catalogs with the same rows that add columns.
    directory : Path
        Gets a catalog with ``umap_1`` and ``umap_2`` of every observation in its order (null where
        a parameter is missing, or beyond ``settings.share``), ``sample.parquet`` and
        ``projection.json`` (the plane), and ``maps.parquet``: rows of target and of overlap in
        each cell of the plane.
    settings : ProjectionSettings, optional

    Returns
    -------
    Manifest
        ``summary``: parameters used and left out, rows of the sample, rows that lack a parameter
        and rows that were not asked for.

    Raises
    ------
    CatalogError
        A column is missing, or the directory holds something else.
    ConfigError
        umap-learn is not installed.
    ModelError
        Fewer than two of the parameters are there, or too few rows have all of them.
    """
    settings = settings or ProjectionSettings()
    target, overlap = tuple(observations), tuple(pairs)
    target[0].require(_KEY, HEALPIX_COLUMN)
    overlap[0].require(HEALPIX_COLUMN)
    names = tuple(n for n in PARAMETERS if _has(target, n) and _has(overlap, n))
    if len(names) < 2:
        raise ModelError(
            f"{target[0].path} and {overlap[0].path} share {', '.join(names) or 'none'} of the "
            f"parameters {', '.join(PARAMETERS)}: a projection needs two",
            "Attach a catalog that has them.",
        )
    recipe = projection_recipe(
        [one.fingerprint for one in target], [one.fingerprint for one in overlap], settings
    )
    output = Output.prepare(directory, recipe, overwrite, [one.path for one in (*target, *overlap)])
    if output.complete:
        return output.load_manifest()
    cluster = cluster or Cluster()
    for catalog in (*target, *overlap):
        require_memory(cluster, catalog, "projection")
    with unless_complete(output):
        samples = {TARGET: target, OVERLAP: overlap}
        parts = [
            _Part(output, sample, catalogs, pixel, names, settings)
            for sample, catalogs in samples.items()
            for pixel in catalogs[0].pixels
        ]
        files = _fitted(output, parts, cluster, report)
        run_parts(
            output, "placed", {part.key: part for part in parts}, _place, cluster, "place", report
        )
        placed = records(output, "placed", [part.key for part in parts])
        done = [r for r, part in zip(placed, parts, strict=True) if part.sample == TARGET]
        n_rows = target[0].n_rows
        commit_catalog(
            output,
            name,
            list(zip(target[0].pixels, done, strict=True)),
            _schema(),
            Rows(n_rows, sum(record["file"]["rows"] for record in done)),
            {
                "parameters": list(names),
                "left_out": [n for n in PARAMETERS if n not in names],
                "sample_rows": files[0].rows,
                "without_place": {
                    sample: sum(
                        record["without_place"]
                        for record, part in zip(placed, parts, strict=True)
                        if part.sample == sample
                    )
                    for sample in samples
                },
                "not_asked": sum(record["not_asked"] for record in done),
            },
            extra_files=(*files, _write_maps(output, parts)),
        )
    return output.load_manifest()


def _has(catalogs: Sequence[Catalog], name: str) -> bool:
    return any(name in catalog.schema.names for catalog in catalogs)


def _schema() -> pa.Schema:
    place = [
        pa.field(name, pa.float32(), metadata={"description": "Place on the UMAP plane"})
        for name in _PLANE
    ]
    return pa.schema(
        [HEALPIX.arrow(nullable=False), CANONICAL["obs_id"].arrow(nullable=False), *place]
    )


def _columns(part: _Part) -> dict[str, NDArray[np.float64]]:
    """Parameters of a partition, each from the first catalog that has it."""
    found: dict[str, NDArray[np.float64]] = {}
    for catalog in part.catalogs:
        names = [n for n in part.names if n in catalog.schema.names and n not in found]
        if names:
            table = catalog.read(part.pixel, names)
            found |= {name: floats(table, name) for name in names}
    return found


def _fitted(
    output: Output, parts: Sequence[_Part], cluster: Cluster, report: Report
) -> tuple[FileRecord, FileRecord]:
    """Sample, plane and scales, saved; what a killed run has saved is made again, alike."""
    run_parts(output, "strata", {p.key: p for p in parts}, _count, cluster, "strata", report)
    counted = records(output, "strata", [part.key for part in parts])
    rates: dict[str, dict[int, float]] = {}
    for sample in (TARGET, OVERLAP):
        total: Counter[int] = Counter()
        for part, record in zip(parts, counted, strict=True):
            if part.sample == sample:
                total.update({int(cell): n for cell, n in record["counts"].items()})
        rates[sample] = sampling_rates(total, parts[0].settings.sample_rows // 2)
    asked = {part.key: replace(part, rates=rates[part.sample]) for part in parts}
    run_parts(output, "sampled", asked, _sample, cluster, "sample", report)
    names = parts[0].names
    pieces = [read_piece(_piece(part)) for part in parts]
    sample = pa.concat_tables(pieces).sort_by(
        [("sample", "descending"), *((name, "ascending") for name in ("place", *names))]
    )
    parameters = np.stack([sample[name].to_numpy() for name in names], axis=1)
    report("umap", 0, 1)
    plane = fit_projection(parameters, names, parts[0].settings)
    report("umap", 1, 1)
    known = np.isfinite(parameters).all(axis=1)
    table = pa.table(
        {
            "sample": sample["sample"].filter(pa.array(known)),
            **{name: pa.array(plane.sample[:, i]) for i, name in enumerate(names)},
            **{name: pa.array(plane.plane[:, i]) for i, name in enumerate(_PLANE)},
        }
    )
    document = {
        "parameters": list(names),
        "center": plane.center.tolist(),
        "scale": plane.scale.tolist(),
        "neighbors": plane.neighbors,
        "limits": list(plane.limits()),
    }
    return (
        output.write_file(SAMPLE, partial(write_parquet, table)),
        output.write_bytes(MODEL, (json.dumps(document, indent=1) + "\n").encode()),
    )


def load_projection(directory: Path) -> Projection:
    """The plane that `projection` saved.

    Raises
    ------
    ModelError, PartitionError
        A file is missing or damaged.
    """
    path = directory / MODEL
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        names = tuple(document["parameters"])
        center, scale = (np.array(document[key], dtype=np.float64) for key in ("center", "scale"))
        neighbors = int(document["neighbors"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error!r}") from None
    with partition_errors(directory / SAMPLE):
        table = pq.read_table(directory / SAMPLE, columns=[*names, *_PLANE])
    return Projection(
        names,
        center,
        scale,
        np.stack([table[name].to_numpy() for name in names], axis=1),
        np.stack([table[name].to_numpy() for name in _PLANE], axis=1),
        neighbors,
    )


def _count(part: _Part) -> None:
    columns = _columns(part)
    cells, counts = np.unique(strata(columns, part.names), return_counts=True)
    found = dict(zip(map(str, cells.tolist()), counts.tolist(), strict=True))
    part.output.put_record("strata", part.key, {"counts": found})


def _piece(part: _Part) -> Path:
    return part.output.work / "samples" / f"{part.key}.arrow"


def _sample(part: _Part) -> None:
    columns = _columns(part)
    numbers = part.catalogs[0].read(part.pixel, [HEALPIX_COLUMN])[HEALPIX_COLUMN].to_numpy()
    chosen = chosen_rows(numbers, strata(columns, part.names), part.rates or {}, part.settings.seed)
    values = parameters_of(columns, part.names)[chosen]
    write_piece(
        _piece(part),
        pa.table(
            {
                "sample": pa.array([part.sample] * len(values), pa.string()),
                "place": pa.array(numbers[chosen]),
                **{name: pa.array(values[:, i]) for i, name in enumerate(part.names)},
            }
        ),
    )
    part.output.put_record("sampled", part.key, {"rows": len(values)})


@lru_cache(maxsize=2)
def _load(directory: str, fingerprint: str) -> Projection:
    return load_projection(Path(directory))


def _place(part: _Part) -> None:
    output = part.output
    plane = _load(str(output.directory), output.fingerprint)
    parameters = parameters_of(_columns(part), part.names)
    n_left = 0
    if part.sample == TARGET:
        keys = part.catalogs[0].read(part.pixel, [HEALPIX_COLUMN, _KEY])
        if part.settings.share < 1:
            hashes = key_hashes(keys[_KEY])
            left = ~in_share(hashes, part.settings.share, part.settings.seed)
            parameters[left] = np.nan
            n_left = int(np.count_nonzero(left))
    place = plane.place(parameters)
    missing = np.isnan(place[:, 0])
    counts = density_map(place, plane.limits(), part.settings.map_bins)
    write_piece(_map_piece(part), pa.table({"n": pa.array(counts.ravel())}))
    n_missing = int(np.count_nonzero(missing)) - n_left
    record: dict[str, Any] = {"without_place": n_missing, "not_asked": n_left}
    if part.sample == TARGET:
        columns = [pa.array(place[:, i], pa.float32(), mask=missing) for i in range(2)]
        table = pa.Table.from_arrays([*keys.columns, *columns], schema=_schema())
        record["file"] = asdict(write_partition(output, part.pixel, table))
    output.put_record("placed", part.key, record)


def _map_piece(part: _Part) -> Path:
    return part.output.work / "maps" / f"{part.key}.arrow"


def _write_maps(output: Output, parts: Sequence[_Part]) -> FileRecord:
    bins = parts[0].settings.map_bins
    total = {sample: np.zeros(bins * bins, dtype=np.int64) for sample in (TARGET, OVERLAP)}
    for part in parts:
        total[part.sample] += read_piece(_map_piece(part))["n"].to_numpy()
    used = np.flatnonzero(total[TARGET] + total[OVERLAP])
    table = pa.table(
        {
            "cell_1": pa.array((used // bins).astype(np.int32)),
            "cell_2": pa.array((used % bins).astype(np.int32)),
            **{f"n_{sample}": pa.array(total[sample][used]) for sample in (TARGET, OVERLAP)},
        }
    )
    return output.write_file(MAPS, partial(write_parquet, table))
