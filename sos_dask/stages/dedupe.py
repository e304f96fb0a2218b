"""Stage dedupe: repeats of one star become one row, exactly, across partition edges.

Rows with proper motions and an epoch are compared where they stand at the latest epoch of the
catalog; the others where they are. Where all rows have one epoch, nothing moves.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.schema import HEALPIX_COLUMN
from sos_dask.sky.healpix import MAX_ORDER, HealpixPixel, Ranges, cell_ranges
from sos_dask.stages.base import Made, Role, Run, Stage, by_pixel, partition_record
from sos_dask.stages.ids import motion_of
from sos_dask.stars.combine import combine
from sos_dask.stars.group import GAIA_IDS, DedupeSettings, group_around, rank_of
from sos_dask.stars.match import MOTION, at_epoch, moved_arcsec
from sos_dask.stars.repeats import merged_pulls, pull_counts
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Rows

PRELOAD = ("sos_dask.sky.loops",)  # for workers: this module itself imports it where it has rows


class Dedupe(Stage[DedupeSettings]):
    """Combine repeats of one star into one row.

    Rows with a proper motion and an epoch are compared at the latest epoch of the catalog. The
    summary says among others how far stated errors are wrong, by their repeats (``error_factors``,
    see `repeats.Factor`).

    Example: sos-dask dedupe lamost -o lamost.stars --method best-snr
    """

    name = "dedupe"
    version = 6
    Settings = DedupeSettings
    roles = (Role("observations", "Observations, with obs_id, quality and the labels."),)
    partitioned = "observations"
    memory = (320, 4.0)
    epoch, moved_arcsec = 0.0, 0.0

    @property
    def observations(self) -> Catalog:
        """Catalog that is deduplicated."""
        return self.catalog("observations")

    @property
    def expected_error(self) -> dict[str, float]:
        """Error of one observation, for labels without stated errors: the survey's definition."""
        manifest = self.observations.manifest
        return dict(manifest.summary.get("expected_error", {})) if manifest else {}

    def check(self) -> None:
        """Refuse a catalog that lacks a column, or whose epochs are no years."""
        self.observations.require("obs_id", "ra", "dec", "quality", HEALPIX_COLUMN)
        motion = motion_of(self.observations)
        self.epoch = motion.epoch_max
        if motion.epoch_min < self.epoch:
            self.moved_arcsec = moved_arcsec(motion, self.epoch)

    def make(self, run: Run) -> Made:
        """Make the stars of every partition, and count the repeats."""
        catalog = self.observations
        step = f"dedupe {catalog.name}"
        done = run.parts("stars", by_pixel(catalog.pixels), self.stars_of_pixel, step)
        schema = combine(
            catalog.schema.empty_table(), np.empty(0, np.int64), self.settings, self.expected_error
        ).schema
        n_out = run.write_catalog(self.product, catalog.pixels, done, schema)
        n_members = sum(record["n_members"] for record in done)
        summary = {
            "stars_with_repeats": sum(record["n_repeated"] for record in done),
            "stars_with_large_spread": sum(record["n_spread"] for record in done),
            "error_factors": [asdict(one) for one in merged_pulls([r["pulls"] for r in done])],
        }
        return Rows(catalog.n_rows, n_out, 0, {"merged": n_members - n_out}), summary

    def stars_of_pixel(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Write the stars whose primary observation lies in one partition."""
        own = self.observations.read(pixel, self._grouping_columns())
        around, first, primary = self._grouped(pixel, own)
        stop = first + own.num_rows
        # Every partition that sees a star sees the same one; it belongs to that of its primary.
        is_member = (primary >= first) & (primary < stop)
        inside = np.where(is_member[first:stop], primary[first:stop] - first, -1)
        is_member[first:stop] = False
        rows = self._with_other_columns(pixel, own)
        if is_member.any():
            away = around.filter(pa.array(np.delete(is_member, slice(first, stop))))
            others = _full_rows(self.observations, away).cast(rows.schema)
            rows = pa.concat_tables([rows, others])
            inside = np.concatenate([inside, primary[is_member] - first])
        pulls = pull_counts(rows, inside, self.expected_error)
        stars = combine(rows, inside, self.settings, self.expected_error)
        del own, rows  # their memory serves the writer
        return {
            "file": partition_record(output, pixel, stars),
            "n_members": int(np.count_nonzero(inside >= 0)),
            "n_repeated": int(np.count_nonzero(stars["n_obs"].to_numpy() > 1)),
            "n_spread": pc.sum(stars["flag_spread"]).as_py() or 0,
            "pulls": pulls,
        }

    def _ids(self) -> dict[str, str]:
        """Columns of Gaia ids that count, by release."""
        wanted = GAIA_IDS if self.settings.use_gaia_id else {}
        return {r: c for r, c in wanted.items() if c in self.observations.schema.names}

    def _grouping_columns(self) -> list[str]:
        motion = MOTION if self.moved_arcsec else ()
        return [HEALPIX_COLUMN, "obs_id", "ra", "dec", *motion, *self._ids().values()]

    def _with_other_columns(self, pixel: HealpixPixel, own: pa.Table) -> pa.Table:
        """The partition's rows with the columns that grouping does not need, read only after it."""
        names = self.observations.schema.names
        others = [name for name in names if name not in own.schema.names]
        rows = self.observations.read(pixel, others, coded=True)
        for item in own.schema:
            rows = rows.append_column(item, own[item.name])
        return rows.select(names)

    def _grouped(
        self, pixel: HealpixPixel, own: pa.Table
    ) -> tuple[pa.Table, int, NDArray[np.int64]]:
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
        catalog, settings = self.observations, self.settings
        columns = self._grouping_columns()
        around, first, order = own.slice(0, 0), 0, np.empty(0, dtype=np.int64)

        def read(ranges: Ranges) -> tuple[pa.Table, NDArray[np.bool_]]:
            nonlocal around, first, order
            own_range = (pixel.first, pixel.stop)
            around = catalog.read_ranges([one for one in ranges if one != own_range], columns)
            first = int(np.searchsorted(around[HEALPIX_COLUMN].to_numpy(), pixel.first))
            table = pa.concat_tables([around.slice(0, first), own, around.slice(first)])
            order = np.arange(table.num_rows)
            if self.moved_arcsec:
                table = at_epoch(table, self.epoch)
                order = np.argsort(table[HEALPIX_COLUMN].to_numpy(), kind="stable")
                table = table.take(pa.array(order))
            return table.combine_chunks(), (order >= first) & (order < first + own.num_rows)

        reach = max(settings.radius_arcsec, settings.id_radius_arcsec if self._ids() else 0.0)
        reach += self.moved_arcsec
        _, _, grouped = group_around(
            pixel, read, lambda some: rank_of(some["obs_id"]), reach, settings, str(catalog.path)
        )
        primary = np.empty_like(grouped)
        primary[order] = order[grouped]
        return around, first, primary


def _full_rows(catalog: Catalog, wanted: pa.Table) -> pa.Table:
    """All columns of some rows of other partitions, in the order of ``wanted``."""
    cells = np.unique(wanted[HEALPIX_COLUMN].to_numpy())
    rows = catalog.read_ranges(cell_ranges(cells, MAX_ORDER), catalog.schema.names)
    return rows.take(pc.index_in(wanted["obs_id"], rows["obs_id"]).combine_chunks())
