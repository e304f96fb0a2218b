"""Stage coverage: where the correction may be trusted, for every row of the target.

A model of the coverage is fitted to the pairs; then every row of the observations is scored,
partition by partition, into column files aligned with the partitions: same rows, same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask.columns import key_hashes
from sos_dask.errors import CatalogError
from sos_dask.evidence.coverage import CoverageModel
from sos_dask.evidence.coverage_fit import check_measure
from sos_dask.evidence.coverage_fit import fit as fit_coverage
from sos_dask.evidence.growth import MIN_GROWTH_PAIRS
from sos_dask.evidence.maps import SKY_ORDER, coarse, count_maps, follow_up, sum_maps
from sos_dask.evidence.ranking import Ranking
from sos_dask.evidence.ranking import compare as rank_measures
from sos_dask.evidence.widening import CLASSES, KIND_FIELD, OUTSIDE, SPARSE, Limits, counted
from sos_dask.problem import PARAMETERS
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import HEALPIX_COLUMN, LABELS, SEEDS, check_numbers
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.sky.sphere import check_radii
from sos_dask.stages.needs import require_memory
from sos_dask.stages.overlap import parameter_columns, read_overlap, read_target
from sos_dask.stages.parts import commit_catalog, key_of, records, run_parts, unless_complete
from sos_dask.stages.pieces import read_piece, write_piece
from sos_dask.stages.star_flags import star_flags
from sos_dask.stars.group import GAIA_IDS
from sos_dask.storage.artifact import FileRecord, Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog, partition_errors, write_parquet, write_partition
from sos_dask.trust import (
    COVERAGE_FIELD,
    FLAG_GRID_EDGE,
    FLAG_MEANINGS,
    FLAG_OUTSIDE,
    FLAG_SPARSE,
    FLAGS,
)

VERSION = 7
GRID_STEPS = {"teff": 50.0, "logg": 0.1, "feh": 0.05}
"""How near to a limit of the survey's grid a label is at its edge: K, dex, dex."""
MAPS = "maps.parquet"
CALIBRATION = "calibration.parquet"
_BINS = pa.schema(
    [("distance", pa.float64()), ("n", pa.int64())]
    + [(name, pa.float64()) for name in ("growth_measured", "growth")]
)
_SAMPLE_ROWS = 200_000
_MANY_PAIRS, _MOST_ROWS = 1 / 3, 0.5
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing (Knuth, TAOCP 3, 6.4)


@dataclass(frozen=True)
class CoverageSettings:
    """Settings of the stage.

    Parameters
    ----------
    measure : str
        One of `coverage.MEASURES`.
    limits : Limits
    compare : bool
        Whether all measures are fitted and compared on held-out pairs.
    grid : mapping of str to (float, float)
        Limits of the grid of the survey's pipeline, by label. A label that is not named: the
        smallest and largest value in the catalog.
    radius_arcsec : float
        Within it a row belongs to a star with a large spread or an ambiguous match.
    seed : int
    """

    measure: str = "neighbours"
    limits: Limits = field(default_factory=Limits)
    compare: bool = True
    grid: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    radius_arcsec: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_radii(self.radius_arcsec, self.radius_arcsec, use_gaia_id=True)
        check_numbers(self, seed=SEEDS)
        check_measure(self.measure)


@dataclass(frozen=True)
class _SamplePart:
    output: Output
    catalog: Catalog
    pixel: HealpixPixel
    share: float
    key: str  # column of the keys, which is the name of the sample too

    @property
    def file(self) -> Path:
        return self.output.work / "samples" / self.key / f"{key_of(self.pixel)}.arrow"


@dataclass(frozen=True)
class _Part:
    output: Output
    catalog: Catalog
    stars: Catalog
    pairs: Catalog
    pixel: HealpixPixel
    grid: Mapping[str, tuple[float, float]]
    radius_arcsec: float


def coverage_recipe(
    model: str, pairs: str, catalog: str, stars: str, settings: CoverageSettings, errors: str = ""
) -> Recipe:
    """Recipe of `coverage` for inputs of these fingerprints; ``errors`` takes no part if empty."""
    inputs = {"model": model, "pairs": pairs, "observations": catalog, "stars": stars}
    if errors:
        inputs["errors"] = errors
    return Recipe("coverage", VERSION, {"settings": asdict(settings)}, inputs)


def coverage(
    model: Path,
    pairs: Catalog,
    catalog: Catalog,
    stars: Catalog,
    directory: Path,
    settings: CoverageSettings,
    *,
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
    model_fingerprint: str = "",
    errors: Path | None = None,
) -> Manifest:
    """Fit a coverage model and score every row of a catalog.

    Parameters
    ----------
    model : Path
        Directory of a trained correction, with its ``held_out.parquet``.
    pairs : Catalog
        The pairs it was trained on.
    catalog : Catalog
        Observations of the target.
    stars : Catalog
        Its stars, for ``flag_spread``.
    directory : Path
        Gets a catalog on the partitions of ``catalog`` (``_healpix_29``, key, position,
        ``coverage``, ``flag_coverage``, ``kind_coverage``), the model, ``calibration.parquet``
        and ``maps.parquet``.
    errors : Path, optional
        Output of uncertainty for this correction: what its half-widths lack in each class is
        counted on held-out pairs.

    Returns
    -------
    Manifest
        ``summary``: shares of the rows, and of stars, inside, sparse, outside and without coverage;
        limits and their meaning; measures compared; rows without each parameter; warnings.

    Raises
    ------
    ConfigError
        Unknown measure.
    ModelError
        Too few held-out pairs.
    CatalogError
        A column is missing, or the held-out pairs are not those of the pairs.
    """
    catalog.require(*LABELS, HEALPIX_COLUMN, "obs_id", "ra", "dec")
    fingerprint = model_fingerprint or Manifest.checked(model).fingerprint
    recipe = coverage_recipe(
        fingerprint,
        pairs.fingerprint,
        catalog.fingerprint,
        stars.fingerprint,
        settings,
        "" if errors is None else Manifest.checked(errors).fingerprint,
    )
    inputs = (model, pairs.path, catalog.path, stars.path, errors)
    output = Output.prepare(directory, recipe, overwrite, inputs)
    if output.complete:
        return output.load_manifest()
    cluster = cluster or Cluster()
    require_memory(cluster, catalog, "coverage")
    with unless_complete(output):
        _run(output, model, pairs, catalog, stars, settings, errors, cluster, report)
    return output.load_manifest()


def _run(
    output: Output,
    model: Path,
    pairs: Catalog,
    catalog: Catalog,
    stars: Catalog,
    settings: CoverageSettings,
    errors: Path | None,
    cluster: Cluster,
    report: Report,
) -> None:
    keys = [key_of(pixel) for pixel in catalog.pixels]
    samples = {
        f"{key}-{key_of(pixel)}": _SamplePart(
            output, source, pixel, min(1.0, _SAMPLE_ROWS / max(source.n_rows, 1)), key
        )
        for source, key in ((catalog, "obs_id"), (stars, "star_id"))
        for pixel in source.pixels
    }
    run_parts(output, "samples", samples, _sample_part, cluster, "coverage: sample", report)
    sampled = {
        key: pa.concat_tables([read_piece(s.file) for s in samples.values() if s.key == key])
        for key in ("obs_id", "star_id")
    }
    files, fitted = _fitted(output, model, pairs, settings, errors, sampled["obs_id"])
    grid = {label: _grid(label, catalog, settings) for label in LABELS}
    parts = {
        key_of(p): _Part(output, catalog, stars, pairs, p, grid, settings.radius_arcsec)
        for p in catalog.pixels
    }
    run_parts(output, "scores", parts, _score_part, cluster, "coverage", report)
    done = records(output, "scores", keys)
    maps = sum_maps(read_piece(_map_file(output, key)) for key in keys)
    files.append(output.write_file(MAPS, partial(write_parquet, maps)))
    n_rows = catalog.n_rows
    counts = {name: sum(record[name] for record in done) for name in (*CLASSES, "unknown")}
    names = [name for name in PARAMETERS if name in catalog.schema.names]
    summary = {
        "measure": settings.measure,
        "parameters_of_catalog": names,
        "parameters_without_column": [name for name in PARAMETERS if name not in names],
        "rows_without": {
            name: sum(record["missing"].get(name, 0) for record in done) for name in names
        },
        "shares": {name: count / max(n_rows, 1) for name, count in counts.items()},
        "rows": counts,
        "stars": _shares(
            parameter_columns(sampled["star_id"]), _load(str(output.directory), output.fingerprint)
        ),
        "flags": {
            str(bit): sum(record["flags"][str(bit)] for record in done) for bit in FLAG_MEANINGS
        },
        "limits": asdict(settings.limits),
        "meaning": settings.limits.meaning(),
        "grid": {label: list(limits) for label, limits in grid.items()},
        **fitted,
    }
    summary["warnings"] = _warnings(fitted, summary["shares"]["outside"])
    schema = _schema(catalog)
    commit_catalog(
        output,
        catalog.name.removesuffix(".observations") + ".coverage",
        list(zip(catalog.pixels, done, strict=True)),
        schema,
        Rows(n_rows, sum(record["file"]["rows"] for record in done)),
        summary,
        files,
    )


def _warnings(fitted: Mapping[str, Any], outside: float) -> list[str]:
    """What a user should know before trusting the coverage, in words."""
    found = []
    if len(fitted["growth"]["distance"]) < 2:
        found.append(
            f"{fitted['held_out_pairs']} held-out pairs are too few to measure how the error grows "
            f"with the distance from them (at least {MIN_GROWTH_PAIRS} right ones are "
            "needed, with errors): the coverage takes the error as the same everywhere."
        )
    if fitted["pairs_outside"] > _MANY_PAIRS:
        found.append(
            f"{fitted['pairs_outside']:.0%} of the held-out training pairs are outside the "
            "coverage themselves: the pairs are few or scattered, or their errors grow fast with "
            "the distance between them. Match more stars, or accept larger errors: a lower "
            "[coverage] outside."
        )
    if outside > _MOST_ROWS:
        found.append(
            f"{outside:.0%} of the rows of the catalog are outside the coverage: there the "
            "correction is only its fallback. Add reference stars like them, or accept larger "
            "errors: a lower [coverage] outside."
        )
    return found


def _grid(label: str, catalog: Catalog, settings: CoverageSettings) -> tuple[float, float]:
    if label in settings.grid:
        return settings.grid[label]
    return catalog.bounds(label).get(label, (-np.inf, np.inf))


def _shares(columns: Mapping[str, NDArray[np.float64]], model: CoverageModel) -> dict[str, Any]:
    """Shares of a sample of stars in each class, by their combined labels, and how many it has."""
    kind = model.coverage(columns)[1]
    counts = np.bincount(np.minimum(kind, OUTSIDE) + 1, minlength=len(CLASSES) + 1).tolist()
    shares = {
        name: count / max(len(kind), 1)
        for name, count in zip(("unknown", *CLASSES), counts, strict=True)
    }
    return {"sampled": len(kind), **shares}


def _fitted(
    output: Output,
    model: Path,
    pairs: Catalog,
    settings: CoverageSettings,
    errors: Path | None,
    sample: pa.Table,
) -> tuple[list[FileRecord], dict[str, Any]]:
    """Fit the model, or take that of a run before; its files and what is said of it."""
    names = ("coverage.json", "overlap.npy", "catalog.npy", "overlap8.npy", "ratio.ubj",
             CALIBRATION)  # fmt: skip
    record = output.get_record("fit", "model")
    if record is None or not output.intact("fit", "model"):
        columns = parameter_columns(sample)
        overlap = read_overlap(model, pairs, errors)
        target = None if errors is None else read_target(sample, errors)
        fit = fit_coverage(
            overlap, columns, settings.measure, settings.limits, settings.seed, target
        )
        lonely = fit.model.widths.lonely
        scratch = output.work / "model"
        scratch.mkdir(parents=True, exist_ok=True)
        fit.model.save(scratch)
        write_parquet(pa.Table.from_pylist(fit.bins, _BINS), scratch / CALIBRATION)
        rankings: Sequence[Ranking] = ()
        if settings.compare:
            rankings = rank_measures(overlap, columns, settings.seed)
        record = {
            "parameters": list(fit.model.parameters),
            "held_out_pairs": fit.n_held_out,
            "wrong_measurements": fit.n_wrong,
            "pairs_outside": fit.outside,
            "growth": asdict(fit.model.growth),
            "noise": asdict(fit.model.noise),
            "widths": fit.model.widths.factors.tolist(),
            "lonely": None if lonely is None else lonely.tolist(),
            "width_pairs": fit.n_width,
            "intervals": counted(fit.n_width),
            "measures": [asdict(ranking) for ranking in rankings],
        }
        output.put_record("fit", "model", record, [*scratch.iterdir()])
    files = []
    for name in names:
        source = output.work / "model" / name
        if source.is_file():
            content = source.read_bytes()
            rows = pq.read_metadata(source).num_rows if name == CALIBRATION else 0
            files.append(output.write_file(name, partial(_write_bytes, content, rows)))
    return files, record


def _write_bytes(content: bytes, rows: int, path: Path) -> int:
    path.write_bytes(content)
    return rows


def _map_file(output: Output, key: str) -> Path:
    return output.work / "maps" / f"{key}.arrow"


def _sample_part(part: _SamplePart) -> None:
    """Rows of one partition that belong to the sample: chosen by their key alone."""
    names = part.catalog.columns([part.key, *PARAMETERS, "quality"])
    table = part.catalog.read(part.pixel, names)
    limit = np.uint64(min(part.share, 1.0) * float(2**64 - 2**11))
    mixed = key_hashes(table[part.key]) * _GOLDEN  # integers are their own hashes
    table = table.filter(pa.array(mixed <= limit)).drop_columns(part.key)
    write_piece(part.file, table)
    name = f"{part.key}-{key_of(part.pixel)}"
    part.output.put_record("samples", name, {"rows": table.num_rows})


@lru_cache(maxsize=2)
def _load(directory: str, fingerprint: str) -> CoverageModel:
    return CoverageModel.load(Path(directory))


def _schema(catalog: Catalog) -> pa.Schema:
    return pa.schema(
        [
            catalog.schema.field(HEALPIX_COLUMN),
            *(catalog.schema.field(name) for name in ("obs_id", "ra", "dec")),
            COVERAGE_FIELD,
            pa.field(FLAGS, pa.int32(), False),
            KIND_FIELD,
        ]
    )


def _score_part(part: _Part) -> None:
    """Coverage and flags of one partition."""
    names = [HEALPIX_COLUMN, "obs_id", "ra", "dec", *GAIA_IDS.values(), "position_epoch"]
    table = part.catalog.read(part.pixel, part.catalog.columns([*names, *PARAMETERS]))
    columns = parameter_columns(table)
    model = _load(str(part.output.directory), part.output.fingerprint)
    score, kind = model.coverage(columns)
    known = kind >= 0
    place = np.minimum(kind, OUTSIDE)
    flags = np.zeros(len(score), dtype=np.int32)
    flags[place == SPARSE] |= FLAG_SPARSE
    flags[place == OUTSIDE] |= FLAG_OUTSIDE
    for label, (low, high) in part.grid.items():
        step = GRID_STEPS[label]
        flags[(columns[label] <= low + step) | (columns[label] >= high - step)] |= FLAG_GRID_EDGE
    flags |= star_flags(table, part.pixel, part.stars, part.pairs, part.radius_arcsec)
    cells = table[HEALPIX_COLUMN].to_numpy()
    key = key_of(part.pixel)
    write_piece(_map_file(part.output, key), count_maps(cells, columns, place))
    out = pa.table(
        [
            table[HEALPIX_COLUMN],
            *(table[name] for name in ("obs_id", "ra", "dec")),
            pa.array(score, pa.float32(), mask=~known),
            pa.array(flags),
            pa.array(kind, mask=~known),
        ],
        schema=_schema(part.catalog),
    )
    record = write_partition(part.output, part.pixel, out)
    part.output.put_record(
        "scores",
        key,
        {
            "file": asdict(record),
            **{name: int(np.count_nonzero(place == c)) for c, name in enumerate(CLASSES)},
            "unknown": int(np.count_nonzero(~known)),
            "missing": {n: int(np.count_nonzero(~np.isfinite(v))) for n, v in columns.items()},
            "flags": {str(bit): int(np.count_nonzero(flags & bit)) for bit in FLAG_MEANINGS},
        },
    )


def look(directory: Path) -> dict[str, Any]:
    """What a person asks of a coverage product.

    Parameters
    ----------
    directory : Path
        The product.

    Returns
    -------
    dict
        ``inside``, ``sparse``, ``outside``, ``unknown``: shares of the rows; ``meaning``,
        ``limits``, ``measure``, ``parameters``, ``measures``, ``intervals`` (on how many pairs the
        errors stand, by kind of place), ``pairs_outside`` (share of the held-out pairs),
        ``warnings`` as in the manifest; ``stars``: the
        same shares of (at most some 200,000) stars; ``flags``: rows by bit; ``kiel`` (cells of
        500 K and 0.5 dex) and ``sky`` (HEALPix base pixels) with ``rows`` and ``outside``;
        ``follow_up``: see `coverage.follow_up`.

    Raises
    ------
    CatalogError
        There is no such product, or another version made it.
    PartitionError
        Its maps cannot be read.
    """
    summary = Manifest.checked(directory).summary
    with partition_errors(directory / MAPS):
        maps = pq.read_table(directory / MAPS)
    kept = ("meaning", "limits", "measure", "measures", "parameters", "parameters_without_column",
            "rows_without", "rows", "stars", "flags", "held_out_pairs",
            "wrong_measurements", "intervals", "pairs_outside", "warnings")  # fmt: skip
    if not {"shares", *kept} <= set(summary):
        raise CatalogError(
            f"{directory} was made by another version of sos-dask", "Run the rebuild again."
        )
    return {
        **summary["shares"],
        **{name: summary[name] for name in kept},
        "kiel": coarse(maps, "kiel", {"teff": 500.0, "logg": 0.5}),
        "sky": coarse(maps, "sky", {"pixel": 4**SKY_ORDER}),
        "follow_up": follow_up(maps),
    }
