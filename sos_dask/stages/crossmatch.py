"""Stage crossmatch: pairs of target and reference stars, with folds for training.

A task matches one partition of the target. Of the rows near any reference star it reads what
decides (positions, motions, ids), and of the matched rows alone all that is carried along.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from sos_dask.errors import CatalogError
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import CANONICAL, HEALPIX_COLUMN, KEYS, LABELS, SEEDS, YEARS
from sos_dask.settings import Settings
from sos_dask.sky.healpix import FloatArray, HealpixPixel, IntArray, ang2pix
from sos_dask.sky.neighbours import near_pixel, rows_near, surroundings
from sos_dask.sky.sphere import propagate
from sos_dask.stages.folds import (
    FoldSettings,
    change_folds,
    changed_folds,
    keep_pairs,
    local_folds,
    write_pairs,
)
from sos_dask.stages.ids import GAIA_IDS, require_numbers, require_whole
from sos_dask.stages.needs import require_memory
from sos_dask.stages.parts import commit_catalog, key_of, records, run_parts, unless_complete
from sos_dask.stars.match import MatchSettings, Motion, match, reach_arcsec
from sos_dask.storage.artifact import Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog

VERSION = 5
MOTION = ("pmra", "pmdec", "position_epoch")
_CARRIED = ("ra", "dec", "teff", "teff_err", "logg", "logg_err", "feh", "feh_err", "snr", "rv",
            "rv_err", "phot_g_mean_mag", "distance", "ebv", "n_obs")  # fmt: skip
_REFERENCE = (*(c for c in _CARRIED if c not in ("ra", "dec", "n_obs")), "survey")
_FLAGS = ("quality", "flag_spread")
_LIKE_KEYS = re.compile(r"(id|ids|key|name|designation|index)$", re.IGNORECASE)
_Found = list[tuple[HealpixPixel, IntArray]]  # rows of partitions


class PairSettings(Settings):
    """How pairs are found and get their folds."""

    match: MatchSettings
    n_folds: int = Field(
        5, ge=2, le=100, description="Folds for cross-validation; all pairs of a star are in one."
    )
    seed: int = Field(0, ge=SEEDS[0], le=SEEDS[1], description="Other seeds give other folds.")

    @property
    def folds(self) -> FoldSettings:
        """How pairs are joined: targets as near as a pair may be are one star."""
        radius = self.match.radius_arcsec
        id_radius = max(radius, self.match.id_radius_arcsec)
        return FoldSettings(self.n_folds, self.seed, radius, id_radius)


@dataclass(frozen=True)
class _Part:
    output: Output
    left: Catalog
    right: Catalog
    pixel: HealpixPixel
    settings: PairSettings
    motions: tuple[Motion, Motion]
    shared_ids: bool

    def reach_arcsec(self, pm_mas_yr: FloatArray | None = None) -> FloatArray:
        """How far the pairs of reference stars can reach; without proper motions: of any star."""
        settings = self.settings.match
        return np.asarray(reach_arcsec(settings, *self.motions, self.shared_ids, pm_mas_yr))


def crossmatch_recipe(left: str, right: str, settings: PairSettings) -> Recipe:
    """Recipe of `crossmatch` for catalogs of these fingerprints."""
    return Recipe(
        "crossmatch", VERSION, {"settings": settings.as_json}, {"target": left, "reference": right}
    )


def crossmatch(
    left: Catalog,
    right: Catalog,
    directory: Path,
    settings: PairSettings,
    *,
    name: str = "pairs",
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Match a target catalog with a reference catalog.

    Parameters
    ----------
    left : Catalog
        Observations (``obs_id``) or stars (``star_id``) of the target.
    right : Catalog
        Stars of the reference (``star_id``); observations are taken too.
    directory : Path
        Where the catalog of pairs goes, on the partitions of ``left``.
    settings : PairSettings

    Returns
    -------
    Manifest
        ``rows``: target rows in, pairs out, targets without a pair dropped. ``summary``: pairs,
        distinct reference stars, ambiguous pairs, pairs by id, position matches refused by ids.

    Raises
    ------
    CatalogError
        A column is missing, or the directory holds something else.
    """
    key, right_key = key_column(left), key_column(right)
    left.require("ra", "dec", HEALPIX_COLUMN)
    right.require("ra", "dec", HEALPIX_COLUMN)
    shared = [name for name in left.columns(GAIA_IDS.values()) if name in right.schema.names]
    shared = shared if settings.match.use_gaia_id else []
    require_whole(left, shared)
    require_whole(right, shared)
    for catalog in (left, right):
        require_numbers(catalog, ("pmra", "pmdec", "position_epoch", *LABELS))
    output = Output.prepare(
        directory,
        crossmatch_recipe(left.fingerprint, right.fingerprint, settings),
        overwrite,
        [left.path, right.path],
    )
    if output.complete:
        return output.load_manifest()
    cluster = cluster or Cluster()
    require_memory(cluster, left, "crossmatch")
    motions = motion_of(left), motion_of(right)
    parts = {
        key_of(pixel): _Part(output, left, right, pixel, settings, motions, bool(shared))
        for pixel in left.pixels
    }
    with unless_complete(output):
        run_parts(output, "matches", parts, _match_part, cluster, "crossmatch", report)
        matched = records(output, "matches", list(parts))
        joining = partial(changed_folds, output, left.pixels)
        [(changes, n_again)] = cluster.run(joining, [settings.folds], "folds")
        if changes:
            run_parts(output, "folds", changes, change_folds, cluster, "folds", report)
        changed = dict(zip(changes, records(output, "folds", list(changes)), strict=True))
        for (part_key, part), record in zip(parts.items(), matched, strict=True):
            if part_key not in changes and record["file"] is not None:
                keep_pairs(output, part.pixel)
        written = [changed.get(*item) for item in zip(parts, matched, strict=True)]
        n_out = sum(record["n_pairs"] for record in matched)
        n_matched = sum(record["n_matched"] for record in matched)
        n_in = left.n_rows
        summary = {
            "pairs": n_out,
            "reference_stars": sum(record["n_stars"] for record in matched) - n_again,
            **{
                name: sum(record[name] for record in matched)
                for name in ("ambiguous", "by_id", "refused_by_id", "fit_for_training")
            },
            "reach_arcsec": float(reach_arcsec(settings.match, *motions, bool(shared))),
        }
        commit_catalog(
            output,
            name,
            list(zip(left.pixels, written, strict=True)),
            pairs_schema(left, right, key, right_key),
            Rows(
                n_in,
                n_out,
                0,
                {"without a pair": n_in - n_matched},
                {"further pairs": n_out - n_matched},
            ),
            summary,
        )
    return output.load_manifest()


def key_column(catalog: Catalog) -> str:
    """``star_id`` or ``obs_id``, whichever a catalog has."""
    if known := catalog.columns(KEYS):
        return known[0]
    able = [
        item.name
        for item in catalog.schema
        if item.name != HEALPIX_COLUMN
        and (pa.types.is_integer(item.type) or pa.types.is_string(item.type))
    ]
    alike = [name for name in able if _LIKE_KEYS.search(name)]
    raise CatalogError(
        f"{catalog.path} has neither star_id nor obs_id",
        "Give the column that names each row, for example --key "
        f"{' or --key '.join(alike or able)}."
        if able
        else "It has no column of integers or text that could name its rows.",
    )


def motion_of(catalog: Catalog) -> Motion:
    """Bounds on proper motion and epoch over a whole catalog, from the footers of its files.

    Raises
    ------
    CatalogError
        Epochs are no years, as days of a catalog of others.
    """
    known = catalog.bounds(*MOTION)
    low, high = known.get("position_epoch", (np.nan, np.nan))
    if low < YEARS[0] or high > YEARS[1]:
        raise CatalogError(
            f"{catalog.path}: column 'position_epoch' has values from {low:g} to {high:g}, and "
            f"Julian years are needed ({YEARS[0]:g} to {YEARS[1]:g})",
            "Convert it, or rename it: rows without an epoch are matched where they stand.",
        )
    pmra, pmdec = (max(map(abs, known.get(name, (0.0, 0.0)))) for name in ("pmra", "pmdec"))
    moving = {"pmra", "pmdec"} <= set(catalog.schema.names)
    return Motion(float(np.hypot(pmra, pmdec)) if moving else 0.0, low, high)


def moved_arcsec(motion: Motion, epoch: float) -> float:
    """How far a star of a catalog can stand from its place at the common epoch."""
    years = max(abs(motion.epoch_min - epoch), abs(motion.epoch_max - epoch))
    return motion.max_pm_mas_yr / 1000.0 * years if np.isfinite(years) else 0.0


def at_epoch(table: pa.Table, epoch: float) -> pa.Table:
    """Move the rows that have a proper motion and an epoch; the others stay as they are."""
    if not set(MOTION) <= set(table.schema.names) or not table.num_rows:
        return table
    pmra, pmdec, since = (np.asarray(table[name].to_numpy(), np.float64) for name in MOTION)
    moving = np.isfinite(pmra) & np.isfinite(pmdec) & np.isfinite(since)
    pmra, pmdec, years = (np.where(moving, values, 0.0) for values in (pmra, pmdec, epoch - since))
    ra, dec = propagate(table["ra"].to_numpy(), table["dec"].to_numpy(), pmra, pmdec, years)
    new = {"ra": ra, "dec": dec, HEALPIX_COLUMN: ang2pix(ra, dec)}
    new["position_epoch"] = np.where(moving, epoch, since)
    for name, values in new.items():
        index, field = table.schema.get_field_index(name), table.schema.field(name)
        table = table.set_column(index, field, pa.array(values, field.type, from_pandas=True))
    return table


def pairs_schema(left: Catalog, right: Catalog, key: str, right_key: str) -> pa.Schema:
    """Schema of the pairs of two catalogs."""
    fields = [
        pa.field(HEALPIX_COLUMN, pa.int64(), False),
        pa.field(f"target_{key}", left.schema.field(key).type, False),
        pa.field("reference_star_id", right.schema.field(right_key).type, False),
        pa.field("separation_arcsec", pa.float64(), False, {"unit": "arcsec"}),
        pa.field("n_candidates", pa.int32(), False),
        pa.field("ambiguous", pa.bool_(), False),
        pa.field("by_id", pa.bool_(), False),
        pa.field("fold", pa.int8(), False),
        pa.field("use", pa.bool_(), False, {"description": "fit for training"}),
    ]
    fields += [left.schema.field(name) for name in left.columns(_CARRIED)]
    fields += [
        right.schema.field(name).with_name(f"{name}_ref") for name in right.columns(_REFERENCE)
    ]
    fields += [
        pa.field(
            f"{label}_diff",
            pa.float32(),
            metadata={"unit": CANONICAL[label].unit, "description": f"target - reference {label}"},
        )
        for label in LABELS
        if label in left.schema.names and label in right.schema.names
    ]
    return pa.schema(fields)


def _match_part(part: _Part) -> None:
    """Pairs of one partition, with the folds that they have by themselves."""
    left_key, right_key = key_column(part.left), key_column(part.right)
    left_at, right_at, left, right = _near_rows(part)

    def keys_of(rows: IntArray) -> pa.ChunkedArray:  # text that is read for few ties only
        return _take(part.right, right_at, right, rows, [right_key])[right_key]

    matches = match(left, right, part.settings.match, keys_of)
    names = [left_key, *_CARRIED, *GAIA_IDS.values(), *_FLAGS]
    target = _take(part.left, left_at, left, matches.left, names)
    names = [right_key, *_REFERENCE, *_FLAGS]
    reference = _take(part.right, right_at, right, matches.right, names)
    folds, n_stars = local_folds(
        part.output,
        part.pixel,
        target,
        reference[right_key],
        reference[HEALPIX_COLUMN].to_numpy(),
        part.reach_arcsec(_total_pm(reference)),
        part.settings.folds,
    )
    ambiguous = matches.n_candidates > 1
    use = ~ambiguous & _is_good(target) & _is_good(reference)
    columns: dict[str, Any] = {
        HEALPIX_COLUMN: target[HEALPIX_COLUMN],
        f"target_{left_key}": target[left_key],
        "reference_star_id": reference[right_key],
        "separation_arcsec": matches.separation_arcsec,
        "n_candidates": matches.n_candidates,
        "ambiguous": ambiguous,
        "by_id": matches.by_id,
        "fold": folds,
        "use": use,
    }
    for name in part.left.columns(_CARRIED):
        columns[name] = target[name]
    for name in part.right.columns(_REFERENCE):
        columns[f"{name}_ref"] = reference[name]
    for label in LABELS:
        if label in target.schema.names and label in reference.schema.names:
            difference = pc.subtract(target[label], reference[label])
            columns[f"{label}_diff"] = difference
            columns["use"] &= pc.is_valid(difference).to_numpy()
    pairs = pa.table(columns).cast(pairs_schema(part.left, part.right, left_key, right_key))
    record = write_pairs(part.output, part.pixel, pairs) if pairs.num_rows else None
    part.output.put_record(
        "matches",
        key_of(part.pixel),
        {
            "file": None if record is None else asdict(record),
            "n_pairs": pairs.num_rows,
            "n_matched": int(np.count_nonzero(np.diff(matches.left, prepend=-1))),
            "n_stars": n_stars,
            "ambiguous": int(ambiguous.sum()),
            "by_id": int(matches.by_id.sum()),
            "refused_by_id": matches.n_conflicts,
            "fit_for_training": int(pc.sum(pairs["use"]).as_py() or 0),
        },
    )


def _near_rows(part: _Part) -> tuple[_Found, _Found, pa.Table, pa.Table]:
    """Rows of both sides that can be in a pair, and the columns of them that decide."""
    reach = float(part.reach_arcsec())
    around = surroundings(part.pixel, reach)[0]
    ranges = sorted([(part.pixel.first, part.pixel.stop), *around])
    reaches = partial(near_pixel, part.pixel, reach_arcsec=reach)
    right_at = [
        (pixel, rows)
        for pixel in part.right.overlapping(ranges)
        if len(rows := part.right.rows_in(pixel, ranges, wanted=reaches))
    ]
    deciding = ["ra", "dec"]
    if any({"pmra", "pmdec"} <= set(side.schema.names) for side in (part.left, part.right)):
        deciding += MOTION
    if part.shared_ids:
        deciding += GAIA_IDS.values()
    columns = part.right.columns([HEALPIX_COLUMN, *deciding])
    empty = pa.schema([part.right.schema.field(name) for name in columns]).empty_table()
    right = pa.concat_tables(
        [part.right.take(pixel, rows, columns) for pixel, rows in right_at] or [empty]
    )
    cells = part.left.cells(part.pixel) if right.num_rows else np.empty(0, dtype=np.int64)
    rows = rows_near(cells, right[HEALPIX_COLUMN].to_numpy(), part.reach_arcsec(_total_pm(right)))
    left = part.left.take(part.pixel, rows, part.left.columns(deciding))
    left = left.append_column(part.left.schema.field(HEALPIX_COLUMN), pa.array(cells[rows]))
    return [(part.pixel, rows)], right_at, left, right


def _take(
    catalog: Catalog, found: _Found, known: pa.Table, wanted: IntArray, names: list[str]
) -> pa.Table:
    """Rows of those that were found, in any order, with further columns beside the known ones."""
    is_wanted = np.zeros(known.num_rows, dtype=np.bool_)
    is_wanted[wanted] = True
    unique = np.flatnonzero(is_wanted)
    place = np.cumsum(is_wanted)[wanted] - 1
    columns = [name for name in catalog.columns(names) if name not in known.schema.names]
    tables = [pa.schema([catalog.schema.field(name) for name in columns]).empty_table()]
    first = 0
    for pixel, rows in found:
        low, high = np.searchsorted(unique, (first, first + len(rows)))
        if low < high:
            tables.append(catalog.take(pixel, rows[unique[low:high] - first], columns))
        first += len(rows)
    further = pa.concat_tables(tables[1:] or tables).combine_chunks().take(pa.array(place))
    rows = known.take(pa.array(wanted))
    for name in columns:
        rows = rows.append_column(further.schema.field(name), further[name])
    return rows


def _total_pm(rows: pa.Table) -> FloatArray:
    """Total proper motions, 0 where there is none."""
    if not {"pmra", "pmdec"} <= set(rows.schema.names):
        return np.zeros(rows.num_rows)
    pmra, pmdec = (np.asarray(rows[name].to_numpy(), np.float64) for name in ("pmra", "pmdec"))
    return np.asarray(np.nan_to_num(np.hypot(pmra, pmdec)))


def _is_good(rows: pa.Table) -> NDArray[np.bool_]:
    """Rows that pass all cuts and whose repeats agree."""
    good = np.ones(rows.num_rows, dtype=bool)
    if "quality" in rows.schema.names:
        good &= rows["quality"].to_numpy() == 0
    if "flag_spread" in rows.schema.names:
        good &= ~rows["flag_spread"].to_numpy()
    return good
