"""Stage coverage: where the correction may be trusted, for every row of the target.

A model of the coverage is fitted to the pairs; then every row of the observations is scored,
partition by partition, into column files aligned with the partitions: same rows, same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, field_validator

from sos_dask import correct, corrections
from sos_dask.columns import FloatArray, floats, floats_or_nan, key_hashes, matrix32
from sos_dask.evidence import beyond, coverage_maps, widening
from sos_dask.evidence import coverage as kernel
from sos_dask.evidence.figures import figure_schema
from sos_dask.evidence.intervals import ErrorModel, load_errors
from sos_dask.evidence.widening import CLASSES, OUTSIDE, Limits
from sos_dask.problem import SNR, Problem
from sos_dask.schema import HEALPIX_COLUMN
from sos_dask.settings import Seed
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.sky.neighbours import rows_near, surroundings
from sos_dask.stages import base
from sos_dask.stages.base import Made, Role, Run
from sos_dask.stages.evidence import OfModel, held_out_columns, read_evidence, single_observations
from sos_dask.stages.sample import read_sample
from sos_dask.stars.group import GAIA_IDS
from sos_dask.stars.match import MatchSettings, match
from sos_dask.stats.numbers import robust_scale, uniform
from sos_dask.storage.artifact import Output, partition_errors, write_parquet
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import FileRecord, Rows, sha256_of_file
from sos_dask.storage.objects import local

GRID_STEPS = {"teff": 50.0, "logg": 0.1, "feh": 0.05}
"""How near to a limit of the survey's grid a label is at its edge: K, dex, dex."""
MAPS, CALIBRATION = "maps.parquet", "calibration.parquet"
_BINS = figure_schema("distance n growth_measured growth")
_KEYS = {"observations": "obs_id", "stars": "star_id"}
_OWN = (HEALPIX_COLUMN, "obs_id", "ra", "dec")
_SAMPLE_ROWS = 200_000
_END_PAIRS = 20_000
_MANY_PAIRS, _MOST_ROWS = 1 / 3, 0.5
_ID_RADIUS_ARCSEC = 10.0  # observations with one Gaia id are of one star


class CoverageSettings(Limits):
    """Settings of the stage."""

    measure: Literal["neighbours", "ratio"] = Field(
        "neighbours", description="Distance from the pairs: neighbours, or ratio of densities"
    )
    grid: dict[str, Annotated[tuple[float, float], Field(strict=False)]] = Field(
        default_factory=dict,
        description="Limits of the grid of the survey's pipeline, by label; default: the smallest "
        "and largest value of the catalog",
    )
    radius_arcsec: float = Field(
        1.5,
        ge=0,
        le=180 * 3600,
        description="Within it a row belongs to a star with a large spread or an ambiguous match",
    )
    seed: Seed = Field(0, description="Other seeds sample other rows")

    @field_validator("grid")
    @classmethod
    def _low_and_high(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for label, (low, high) in value.items():
            if label not in GRID_STEPS:
                raise ValueError(f"'{label}' is not one of {', '.join(GRID_STEPS)}")
            if not low < high:
                raise ValueError(f"{label}: {low:g} is not below {high:g}")
        return value


class Coverage(OfModel[CoverageSettings]):
    """Fit a coverage model and score every row of a catalog.

    Makes a catalog on the partitions of the observations (``_healpix_29``, key, position,
    ``coverage``, ``flag_coverage``, ``kind_coverage``), the model, ``calibration.parquet`` and
    ``maps.parquet``. Summary: shares of the rows, and of stars, inside, sparse, outside and without
    coverage; limits and their meaning; rows without each parameter; warnings.
    """

    name = "coverage"
    version = 18
    Settings = CoverageSettings
    roles = (
        Role("evidence", "Table of evidence with the model's predictions.", "output"),
        Role("model", "Correction trained on the pairs.", "output"),
        Role("pairs", "Pairs of target and reference, for ambiguous matches."),
        Role("observations", "Observations of the target."),
        Role("stars", "Stars of the target, for large spreads."),
        Role("errors", "Output of uncertainty for this correction.", "output", optional=True),
        Role("sample", "Sample of the observations.", "output", optional=True),
    )
    partitioned = "observations"
    memory = (230, 3.5)

    @cached_property
    def problem(self) -> Problem:
        """Problem of the correction, which is that of the evidence."""
        return corrections.load(self.files("model")).problem

    @property
    def errors(self) -> ErrorModel | None:
        """Error model of the correction, where it is given."""
        given = self.named("errors")
        return load_errors(self.path("errors"), self.problem) if given else None

    @cached_property
    def grid(self) -> dict[str, tuple[float, float]]:
        """Limits of the grid of the survey's pipeline, by label that comes from one."""
        names = [name for name in self.problem.names if name in GRID_STEPS]
        every = (-np.inf, np.inf)
        bounds = self.catalog("observations").bounds(*names) | self.settings.grid
        found = {label: bounds.get(label, every) for label in names}
        # A label that is constant has no edge.
        return {label: ends if ends[0] < ends[1] else every for label, ends in found.items()}

    def check(self) -> None:
        """Refuse a catalog that lacks a column, and errors of another correction."""
        if (errors := self.errors) is not None:
            errors.require(sha256_of_file(self.files("model") / corrections.MODEL_FILE))
        self.catalog("observations").require(*self.problem.columns, *_OWN)

    def measure(self, run: Run) -> Made:
        """Sample the rows, fit the model, score all rows and count them."""
        catalog, output, grid = self.catalog("observations"), run.output, self.grid
        roles = [role for role in _KEYS if not (role == "observations" and self.named("sample"))]
        samples = base.places({role: self.catalog(role) for role in roles})
        run.parts("samples", samples, self.sample, "coverage: sample")
        (fitted,) = run.parts("fit", {"model": list(samples)}, self.fit, "coverage: fit")
        run.files.extend(FileRecord(**one) for one in fitted.pop("files"))
        pixels = base.by_pixel(catalog.pixels)
        done = run.parts("scores", pixels, self.score)
        run.write(MAPS, coverage_maps.sum_maps(output.read_piece(f"maps-{key}") for key in pixels))
        name = catalog.name.removesuffix(".observations") + ".coverage"
        n_out = run.write_catalog(name, catalog.pixels, done, _schema(catalog))
        counts = {n: sum(one["rows"][n] for one in done) for n in (*CLASSES, "unknown")}
        bits = list(map(str, correct.COVERAGE_MEANINGS))
        shares = {name: count / max(catalog.n_rows, 1) for name, count in counts.items()}
        known = [one.column for one in self.problem.parameters]
        there = catalog.columns(known)
        return Rows(catalog.n_rows, n_out), {
            "measure": self.settings.measure,
            "parameters_of_catalog": there,
            "parameters_without_column": [name for name in known if name not in there],
            "rows_without": {n: sum(one["missing"].get(n, 0) for one in done) for n in there},
            "shares": shares,
            "rows": counts,
            "flags": {b: sum(one["flags"][b] for one in done) for b in bits},
            "meaning": self.settings.meaning(),
            "grid": {label: list(ends) for label, ends in grid.items() if np.isfinite(ends[0])},
            "warnings": _warnings(fitted, shares["outside"], SNR in catalog.schema.names),
            **fitted,
        }

    @classmethod
    def load(cls, directory: Path) -> dict[str, Any]:
        """Read the summary as `OnEvidence.load` does, the shares of the rows, and maps of them.

        ``kiel`` (cells of 500 K and 0.5 dex) and ``sky`` (HEALPix base pixels) have ``rows`` and
        ``outside``; ``follow_up``: see `evidence.coverage_maps.follow_up`.
        """
        summary = super().load(directory)
        with partition_errors(directory / MAPS):
            maps = pq.read_table(local(directory / MAPS))
        return {
            **summary.pop("shares"),
            **summary,
            "kiel": coverage_maps.coarse(maps, "kiel", {"teff": 500.0, "logg": 0.5}),
            "sky": coverage_maps.coarse(maps, "sky", {"pixel": 4**coverage_maps.SKY_ORDER}),
            "follow_up": coverage_maps.follow_up(maps),
        }

    def sample(self, output: Output, key: str, item: base.Place) -> dict[str, Any]:
        """Keep the rows of one partition that belong to a sample: chosen by their key alone."""
        role, pixel = item
        catalog = self.catalog(role)
        columns = [one.column for one in self.problem.parameters]
        table = catalog.read(pixel, catalog.columns([_KEYS[role], *columns, "quality"]))
        share = _SAMPLE_ROWS / max(catalog.n_rows, 1)
        chosen = uniform(key_hashes(table[_KEYS[role]]), self.settings.seed) < share
        table = table.filter(pa.array(chosen)).drop_columns(_KEYS[role])
        output.write_piece(f"samples-{key}", table)
        return {"rows": table.num_rows}

    def fit(self, output: Output, key: str, samples: Sequence[str]) -> dict[str, Any]:
        """Fit the model, write it and tell what is said of it."""
        problem, errors, settings = self.problem, self.errors, self.settings
        rows, stars = (self.sampled(output, samples, role) for role in _KEYS)
        overlap = read_overlap(self.path("evidence"), self.files("model"), errors)
        target = None
        if errors is not None:
            has_quality = "quality" in rows.schema.names
            good = rows.filter(pc.equal(rows["quality"], 0)) if has_quality else rows
            columns = parameter_columns(good, problem)
            sparse = errors.is_sparse(problem.star_matrix(columns))
            target = kernel.Target(columns, sparse.astype(np.int8))
        columns = parameter_columns(rows, problem)
        limits = Limits(inside=settings.inside, outside=settings.outside)
        how = settings.measure, limits, settings.seed, target, problem
        found = kernel.fit(overlap, columns, *how, self.at_ends(rows))
        model = found.model
        n_stars = _counts(model.coverage(parameter_columns(stars, problem))[1])
        sampled = sum(n_stars.values())
        files = [output.write_bytes(name, content) for name, content in model.files().items()]
        bins = pa.Table.from_pylist(found.bins, _BINS)
        files.append(output.write_file(CALIBRATION, partial(write_parquet, bins)))
        return {
            "files": [asdict(one) for one in files],
            "parameters": [one.column for one in model.parameters],
            "held_out_pairs": found.n_held_out,
            "wrong_measurements": found.n_wrong,
            "pairs_outside": found.outside,
            "limits": model.limits.as_json,
            "growth": asdict(model.growth),
            "noise": asdict(model.noise),
            "widths": asdict(model.widths),
            "width_pairs": found.n_width,
            "stands_in": {
                "where stars are few": beyond.table(found.few, problem),
                "where the overlap lacks stars": beyond.table(found.lacking, problem),
            },
            "intervals": widening.counted(found.n_width),
            "stars": {**{k: n / max(sampled, 1) for k, n in n_stars.items()}, "sampled": sampled},
        }

    def sampled(self, output: Output, samples: Sequence[str], role: str) -> pa.Table:
        """Rows that belong to the sample of a catalog."""
        if role == "observations" and self.named("sample"):
            return read_sample(self.path("sample"))
        mine = [one for one in samples if one.startswith(role)]
        return pa.concat_tables([output.read_piece(f"samples-{one}") for one in mine])

    def at_ends(self, sample: pa.Table) -> beyond.Left:
        """Take the differences of pairs at the ends of the overlap, without wrong places."""
        from scipy.spatial import cKDTree

        problem = self.problem
        names = [*problem.columns, *(label.diff for label in problem.labels), "star"]
        table = read_evidence(self.path("evidence"), list(dict.fromkeys(names)))
        x, y = problem.matrix(table), problem.differences(table).astype(np.float64)
        kept = np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1)
        share = min(_END_PAIRS / max(len(table), 1), 1.0)
        kept &= table["star"].to_numpy() <= np.uint64(share * (2**64 - 2048))
        star, y = x[kept][:, problem.star_places].astype(np.float64), y[kept]
        center, scale = robust_scale(star)
        rows = problem.star_matrix(sample)
        rows = rows[np.isfinite(rows).all(axis=1)].astype(np.float64)
        rows = rows[:: max(len(rows) // max(len(star), 1), 1)]  # from all of the sky
        there = ~kernel.lacks_stars((star - center) / scale, (rows - center) / scale)
        star, y = star[there], y[there]
        giant, right, x = beyond.giants(problem, star), beyond.right(y), (star - center) / scale
        parts = []
        for out in beyond.ends(star, giant):
            if out.all():
                continue  # too few to tell
            distance, index = cKDTree(x[~out]).query(x[out])
            kind = beyond.kinds(x[out] - x[~out][index], giant[out])
            residual = np.stack([y[out], y[out] - np.median(y[~out], axis=0)], axis=1)
            parts.append((kind, distance, residual, right[out]))
        if not parts:
            parts = [(np.empty(0, np.int64), np.empty(0), np.empty((0, 2, y.shape[1])), right[:0])]
        return beyond.Left(*map(np.concatenate, zip(*parts, strict=True)))

    def score(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Write coverage and flags of one partition."""
        catalog, problem = self.catalog("observations"), self.problem
        names = [*_OWN, *GAIA_IDS.values(), "position_epoch", *problem.names]
        names += [one.column for one in problem.parameters]
        table = catalog.read(pixel, catalog.columns(list(dict.fromkeys(names))))
        columns = parameter_columns(table, problem)
        model = base.loaded(kernel.CoverageModel.load, output.directory, output.fingerprint)
        score, kind = model.coverage(columns)
        known, place = kind >= 0, np.minimum(kind, OUTSIDE)
        stars, pairs = self.catalog("stars"), self.catalog("pairs")
        flags = star_flags(table, pixel, stars, pairs, self.settings.radius_arcsec)
        flags[place == widening.SPARSE] |= correct.FLAG_SPARSE
        flags[place == OUTSIDE] |= correct.FLAG_OUTSIDE
        for label, (low, high) in self.grid.items():
            step, values = GRID_STEPS[label], floats_or_nan(table, label)
            flags[(values <= low + step) | (values >= high - step)] |= correct.FLAG_GRID_EDGE
        counts = coverage_maps.count_maps(table[HEALPIX_COLUMN].to_numpy(), columns, place)
        output.write_piece(f"maps-{key}", counts)
        scores = [pa.array(score, pa.float32(), mask=~known), pa.array(flags)]
        scores.append(pa.array(kind, mask=~known))
        out = pa.table([*(table[name] for name in _OWN), *scores], schema=_schema(catalog))
        return {
            "file": base.partition_record(output, pixel, out),
            "rows": _counts(kind),
            "missing": {n: int(np.count_nonzero(~np.isfinite(v))) for n, v in columns.items()},
            "flags": {str(b): int(np.count_nonzero(flags & b)) for b in correct.COVERAGE_MEANINGS},
        }


def _schema(catalog: Catalog) -> pa.Schema:
    own = [catalog.schema.field(name) for name in _OWN]
    flags = pa.field(correct.FLAGS, pa.int32(), False)
    return pa.schema([*own, correct.COVERAGE_FIELD, flags, widening.KIND_FIELD])


def _counts(kind: NDArray[np.int8]) -> dict[str, int]:
    """Count the rows of each class, and those without a coverage."""
    n = np.bincount(np.minimum(kind, OUTSIDE) + 1, minlength=len(CLASSES) + 1).tolist()
    return dict(zip(("unknown", *CLASSES), n, strict=True))


def _warnings(fitted: Mapping[str, Any], outside: float, has_snr: bool = True) -> list[str]:
    """What a user should know before trusting the coverage, in words."""
    found = []
    if not has_snr:
        found.append(
            "the catalog has no column 'snr': all rows have the errors of pairs, which are often "
            "brighter. Errors of fainter rows are too small; give the survey its S/N."
        )
    if len(fitted["growth"]["distance"]) < 2:
        found.append(
            f"{fitted['held_out_pairs']} held-out pairs are too few to measure how the error grows "
            f"with the distance from them (at least {widening.MIN_GROWTH_PAIRS} right ones are "
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


def read_overlap(evidence: Path, model: Path, errors: ErrorModel | None = None) -> kernel.Overlap:
    """Read the pairs as the coverage sees them, with residuals of those that a model held out.

    The evidence is a table with the predictions of the model, an output of train; its errors are
    those of this correction.
    """
    correction = corrections.load(model)
    problem = correction.problem
    predicted = held_out_columns(correction.method, problem.names)
    stated = [f"{label.error}_ref" for label in problem.labels]
    more = [*stated, "n_obs", *(one.column for one in problem.parameters)]
    needed = ["fold", "held_out", *(label.diff for label in problem.labels)]
    table = read_evidence(evidence, [*needed, *predicted], more)
    table = table.filter(pa.array(np.isfinite(problem.matrix(table)).all(axis=1)))
    difference = problem.differences(table).astype(np.float64)
    residual = difference - matrix32(table, predicted)
    columns = parameter_columns(table, problem)
    half_width = error_class = None
    if errors is not None:
        x = problem.star_matrix(columns)
        half_width = errors.half_width(x, columns.get("snr")).astype(np.float64)
        error_class = errors.is_sparse(x).astype(np.int8)
        half_width[~single_observations(table)] = np.nan
    reference_error = np.stack([floats_or_nan(table, name) for name in stated], axis=1)
    fold = table["fold"].to_numpy()
    seen = difference, residual, reference_error
    return kernel.Overlap(columns, fold, *seen, half_width, error_class)


def parameter_columns(table: pa.Table, problem: Problem) -> dict[str, FloatArray]:
    """Parameters that a table has, nan where unknown."""
    names = (one.column for one in problem.parameters)
    return {name: floats(table, name) for name in names if name in table.schema.names}


def star_flags(
    table: pa.Table, pixel: HealpixPixel, stars: Catalog, pairs: Catalog, radius_arcsec: float
) -> NDArray[np.int32]:
    """Bits `correct.FLAG_SPREAD` and `correct.FLAG_AMBIGUOUS` of observations, shape (n,).

    An observation belongs to the star with its Gaia id, else to the nearest within a radius: what
    is marked is looked for first, and what is found near it is asked for its own star among all.
    Pairs are those of the stars, or of the observations themselves.
    """
    flags = np.zeros(table.num_rows, dtype=np.int32)
    radius = max(radius_arcsec, _ID_RADIUS_ARCSEC)
    ranges = sorted([(pixel.first, pixel.stop), *surroundings(pixel, radius)[0]])
    has_stars = "target_star_id" in pairs.schema.names
    key = "target_star_id" if has_stars else "target_obs_id"
    matched = pairs.read_ranges(ranges, [key, "ambiguous"])
    ambiguous = matched.filter(matched["ambiguous"])[key].combine_chunks()
    if not has_stars and len(ambiguous):
        flags[pc.is_in(table["obs_id"], ambiguous).to_numpy()] = correct.FLAG_AMBIGUOUS
    names = [HEALPIX_COLUMN, "star_id", "ra", "dec", "position_epoch", *GAIA_IDS.values()]
    near = stars.read_ranges(ranges, stars.columns([*names, "flag_spread"]))
    mark = np.zeros(near.num_rows, dtype=np.int32)
    if "flag_spread" in near.schema.names:
        mark[near["flag_spread"].to_numpy()] = correct.FLAG_SPREAD
    if has_stars and len(ambiguous):
        mark[pc.is_in(near["star_id"], ambiguous).to_numpy()] |= correct.FLAG_AMBIGUOUS
    if mark.any() and table.num_rows:
        settings = MatchSettings(radius_arcsec=radius_arcsec, id_radius_arcsec=radius)
        cells, near_cells = (one[HEALPIX_COLUMN].to_numpy() for one in (table, near))
        some = rows_near(cells, near_cells[mark != 0], radius)
        found = match(table.take(some), near, settings, "star_id")
        flags[some[found.left]] |= mark[found.right]
    return flags
