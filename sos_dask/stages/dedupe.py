"""Stage dedupe: repeats of one star become one row, exactly, across partition edges.

Rows with proper motions and an epoch are compared where they stand at the latest epoch of the
catalog; the others where they are. Where all rows have one epoch, nothing moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import HEALPIX_COLUMN
from sos_dask.sky.healpix import MAX_ORDER, HealpixPixel, Ranges, cell_ranges
from sos_dask.stages.crossmatch import MOTION, at_epoch, motion_of, moved_arcsec
from sos_dask.stages.ids import GAIA_IDS, rank_of
from sos_dask.stages.needs import require_memory
from sos_dask.stages.parts import commit_catalog, key_of, records, run_parts, unless_complete
from sos_dask.stars.combine import combine
from sos_dask.stars.group import DedupeSettings, group_around
from sos_dask.stars.repeats import merged_pulls, pull_counts
from sos_dask.storage.artifact import Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog, write_partition

PRELOAD = ("sos_dask.sky.loops",)  # for workers: this module itself imports it where it has rows
VERSION = 5


@dataclass(frozen=True)
class _Part:
    output: Output
    catalog: Catalog
    pixel: HealpixPixel
    settings: DedupeSettings
    expected_error: Mapping[str, float]
    epoch: float
    moved_arcsec: float


def dedupe_recipe(
    catalog: str, settings: DedupeSettings, expected_error: Mapping[str, float]
) -> Recipe:
    """Recipe of `dedupe` for a catalog of this fingerprint."""
    params = {"settings": settings.params, "expected_error": dict(expected_error)}
    return Recipe("dedupe", VERSION, params, {"observations": catalog})


def dedupe(
    catalog: Catalog,
    directory: Path,
    settings: DedupeSettings,
    *,
    expected_error: Mapping[str, float] | None = None,
    name: str = "",
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Combine the observations of each star into one row.

    Parameters
    ----------
    catalog : Catalog
        Observations, with ``obs_id``, ``quality`` and the labels.
    directory : Path
        Where the catalog of stars goes.
    settings : DedupeSettings
    expected_error : mapping of str to float, optional
        Error of one observation, for labels without stated errors.
    name : str
        Name of the new catalog; default that of the old one with ``.stars``.
    overwrite : bool
        Replace another output in ``directory``.

    Returns
    -------
    Manifest
        ``rows``: observations in, stars out, observations merged into another's star.
        ``summary``: among others how far stated errors are wrong, by their repeats
        (``error_factors``, see `repeats.Factor`).

    Raises
    ------
    CatalogError
        A column is missing, or the directory holds something else.
    PartitionError
        A partition cannot be read.
    """
    catalog.require("obs_id", "ra", "dec", "quality", HEALPIX_COLUMN)
    errors = dict(expected_error or {})
    output = Output.prepare(
        directory,
        dedupe_recipe(catalog.fingerprint, settings, errors),
        overwrite,
        [catalog.path],
    )
    if output.complete:
        return output.load_manifest()
    motion = motion_of(catalog)
    epoch, moved = motion.epoch_max, 0.0
    if motion.epoch_min < epoch:
        moved = moved_arcsec(motion, epoch)
    parts = {
        key_of(pixel): _Part(output, catalog, pixel, settings, errors, epoch, moved)
        for pixel in catalog.pixels
    }
    cluster = cluster or Cluster()
    require_memory(cluster, catalog, "dedupe")
    step = f"dedupe {catalog.name}"
    with unless_complete(output):
        run_parts(output, "stars", parts, _dedupe_part, cluster, step, report)
        done = records(output, "stars", list(parts))
        n_in, n_out = catalog.n_rows, sum(record["n_stars"] for record in done)
        merged = sum(record["n_members"] for record in done) - n_out
        summary = {
            "stars_with_repeats": sum(record["n_repeated"] for record in done),
            "stars_with_large_spread": sum(record["n_spread"] for record in done),
            "error_factors": [asdict(one) for one in merged_pulls([r["pulls"] for r in done])],
        }
        commit_catalog(
            output,
            name or catalog.name.removesuffix(".observations") + ".stars",
            list(zip(catalog.pixels, done, strict=True)),
            _star_schema(catalog, settings, errors),
            Rows(n_in, n_out, 0, {"merged": merged}),
            summary,
        )
    return output.load_manifest()


def _star_schema(
    catalog: Catalog, settings: DedupeSettings, expected_error: Mapping[str, float]
) -> pa.Schema:
    nobody = np.empty(0, dtype=np.int64)
    return combine(catalog.schema.empty_table(), nobody, settings, expected_error).schema


def _dedupe_part(part: _Part) -> None:
    """Stars whose primary observation lies in one partition."""
    own = part.catalog.read(part.pixel, _grouping_columns(part))
    around, first, primary = _grouped(part, own)
    stop = first + own.num_rows
    # Every partition that sees a star sees the same one; it belongs to that of its primary.
    is_member = (primary >= first) & (primary < stop)
    inside = np.where(is_member[first:stop], primary[first:stop] - first, -1)
    is_member[first:stop] = False
    rows = _with_other_columns(part, own)
    if is_member.any():
        away = around.filter(pa.array(np.delete(is_member, slice(first, stop))))
        others = _full_rows(part.catalog, away).cast(rows.schema)
        rows = pa.concat_tables([rows, others])
        inside = np.concatenate([inside, primary[is_member] - first])
    pulls = pull_counts(rows, inside, part.expected_error)
    stars = combine(rows, inside, part.settings, part.expected_error)
    del own, rows  # their memory serves the writer
    record = write_partition(part.output, part.pixel, stars) if stars.num_rows else None
    part.output.put_record(
        "stars",
        key_of(part.pixel),
        {
            "file": None if record is None else asdict(record),
            "n_stars": stars.num_rows,
            "n_members": int(np.count_nonzero(inside >= 0)),
            "n_repeated": int(np.count_nonzero(stars["n_obs"].to_numpy() > 1)),
            "n_spread": pc.sum(stars["flag_spread"]).as_py() or 0,
            "pulls": pulls,
        },
    )


def _ids(part: _Part) -> dict[str, str]:
    """Columns of Gaia ids that count, by release."""
    wanted = GAIA_IDS if part.settings.use_gaia_id else {}
    return {r: c for r, c in wanted.items() if c in part.catalog.schema.names}


def _grouping_columns(part: _Part) -> list[str]:
    motion = MOTION if part.moved_arcsec else ()
    return [HEALPIX_COLUMN, "obs_id", "ra", "dec", *motion, *_ids(part).values()]


def _with_other_columns(part: _Part, own: pa.Table) -> pa.Table:
    """The partition's rows with the columns that grouping does not need, read only after it."""
    names = part.catalog.schema.names
    others = [name for name in names if name not in own.schema.names]
    rows = part.catalog.read(part.pixel, others, coded=True)
    for item in own.schema:
        rows = rows.append_column(item, own[item.name])
    return rows.select(names)


def _grouped(part: _Part, own: pa.Table) -> tuple[pa.Table, int, NDArray[np.int64]]:
    """Group the partition's rows with as much of the sky around as the longest chain needs.

    Returns
    -------
    around : pyarrow.Table
        Position, key and ids of the rows around, sorted on the sky.
    first : int
        Where the partition's rows stand when they are put between the rows around.
    primary : ndarray of int64
        Primary of every row, those around included, as index into that order.
    """
    catalog, pixel, settings = part.catalog, part.pixel, part.settings
    columns = _grouping_columns(part)
    around, first, order = own.slice(0, 0), 0, np.empty(0, dtype=np.int64)

    def read(ranges: Ranges) -> tuple[pa.Table, NDArray[np.bool_]]:
        nonlocal around, first, order
        own_range = (pixel.first, pixel.stop)
        around = catalog.read_ranges([one for one in ranges if one != own_range], columns)
        first = int(np.searchsorted(around[HEALPIX_COLUMN].to_numpy(), pixel.first))
        table = pa.concat_tables([around.slice(0, first), own, around.slice(first)])
        order = np.arange(table.num_rows)
        if part.moved_arcsec:
            table = at_epoch(table, part.epoch)
            order = np.argsort(table[HEALPIX_COLUMN].to_numpy(), kind="stable")
            table = table.take(pa.array(order))
        return table.combine_chunks(), (order >= first) & (order < first + own.num_rows)

    reach = max(settings.radius_arcsec, settings.id_radius_arcsec if _ids(part) else 0.0)
    reach += part.moved_arcsec
    _, _, grouped = group_around(
        pixel, read, lambda t: rank_of(t["obs_id"]), reach, settings, str(catalog.path)
    )
    primary = np.empty_like(grouped)
    primary[order] = order[grouped]
    return around, first, primary


def _full_rows(catalog: Catalog, wanted: pa.Table) -> pa.Table:
    """All columns of some rows of other partitions, in the order of ``wanted``."""
    cells = np.unique(wanted[HEALPIX_COLUMN].to_numpy())
    rows = catalog.read_ranges(cell_ranges(cells, MAX_ORDER), catalog.schema.names)
    return rows.take(pc.index_in(wanted["obs_id"], rows["obs_id"]).combine_chunks())
