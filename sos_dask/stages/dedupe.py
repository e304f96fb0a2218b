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

from sos_dask.columns import BoolArray, IntArray
from sos_dask.schema import HEALPIX_COLUMN
from sos_dask.sky.healpix import MAX_ORDER, HealpixPixel, Ranges, cell_ranges
from sos_dask.stages.base import Made, Role, Run, Stage, by_pixel, motion_of, partition_record
from sos_dask.stars.combine import combine
from sos_dask.stars.group import GAIA_IDS, DedupeSettings, group_around, rank_of
from sos_dask.stars.match import MOTION, at_epoch, moved_arcsec
from sos_dask.stars.repeats import merged_pulls, pull_counts
from sos_dask.storage.artifact import Output
from sos_dask.storage.manifest import Rows

PRELOAD = ("sos_dask.sky.loops",)  # for workers: this module itself imports it where it has rows


class Dedupe(Stage[DedupeSettings]):
    """Combine repeats of one star into one row.

    Rows with a proper motion and an epoch are compared at the latest epoch of the catalog. The
    summary says among others how far stated errors are wrong, by their repeats (``error_factors``,
    see `repeats.Factor`): a row that fails no cut but ``duplicate`` is one, though no other use.
    """

    name = "dedupe"
    version = 10
    Settings = DedupeSettings
    roles = (Role("observations", "Observations, with obs_id, quality and the labels."),)
    partitioned = "observations"
    memory = (320, 4.0)
    reusable = ("stars",)
    epoch, moved_arcsec = 0.0, 0.0

    @property
    def expected_error(self) -> dict[str, float]:
        """Error of one observation, for labels without stated errors: the survey's definition."""
        manifest = self.catalog("observations").manifest
        return dict(manifest.summary.get("expected_error", {})) if manifest else {}

    @property
    def duplicate_bits(self) -> int:
        """Bits of quality of rows whose only fault is that the star has a better row."""
        manifest = self.catalog("observations").manifest
        settings = manifest.recipe.params.get("settings", {}) if manifest else {}
        cuts = settings.get("survey", {}).get("cuts", {})
        return 1 << cuts["duplicate"]["bit"] if "duplicate" in cuts else 0

    def check(self) -> None:
        """Refuse a catalog that lacks a column, or whose epochs are not years."""
        catalog = self.catalog("observations")
        catalog.require("obs_id", "ra", "dec", "quality", HEALPIX_COLUMN)
        motion = motion_of(catalog)
        self.epoch = motion.epoch_max
        if motion.epoch_min < self.epoch:
            self.moved_arcsec = moved_arcsec(motion, self.epoch)

    def state(self) -> Any:
        """Tell what all partitions share: see `Stage.state`."""
        return self.epoch, self.moved_arcsec, self.duplicate_bits, self.expected_error

    def make(self, run: Run) -> Made:
        """Make the stars of every partition, and count the repeats."""
        catalog = self.catalog("observations")
        step = f"dedupe {catalog.name}"
        done = run.parts("stars", by_pixel(catalog.pixels), self.stars_of_pixel, step)
        nobody = catalog.schema.empty_table(), np.empty(0, np.int64)
        schema = combine(*nobody, self.settings, self.expected_error).schema
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
        catalog = self.catalog("observations")
        around, own, primary = self._grouped(pixel)
        first, stop = own.start, own.stop
        # Every partition that sees a star sees the same one; it belongs to that of its primary.
        is_member = (primary >= first) & (primary < stop)
        inside = np.where(is_member[own], primary[own] - first, -1)
        is_member[own] = False
        # Columns that grouping does not need are read only after it.
        others = [name for name in catalog.schema.names if name not in around.schema.names]
        rows = catalog.read(pixel, others, coded=True)
        for item in around.schema:
            rows = rows.append_column(item, around[item.name].slice(first, stop - first))
        rows = rows.select(catalog.schema.names)
        if is_member.any():
            away = around.filter(pa.array(is_member))
            cells = np.unique(away[HEALPIX_COLUMN].to_numpy())
            full = catalog.read_ranges(cell_ranges(cells, MAX_ORDER), catalog.schema.names)
            full = full.take(pc.index_in(away["obs_id"], full["obs_id"]).combine_chunks())
            rows = pa.concat_tables([rows, full.cast(rows.schema)])
            inside = np.concatenate([inside, primary[is_member] - first])
        quality = pc.bit_wise_and(rows["quality"], pa.scalar(~self.duplicate_bits, pa.int64()))
        place = rows.schema.get_field_index("quality")
        repeats = rows.set_column(place, "quality", quality)
        pulls = pull_counts(repeats, inside, self.expected_error)
        stars = combine(rows, inside, self.settings, self.expected_error)
        del around, rows, repeats  # their memory serves the writer
        return {
            "file": partition_record(output, pixel, stars),
            "n_members": int(np.count_nonzero(inside >= 0)),
            "n_repeated": int(np.count_nonzero(stars["n_obs"].to_numpy() > 1)),
            "n_spread": pc.sum(stars["flag_spread"]).as_py() or 0,
            "pulls": pulls,
        }

    def _grouped(self, pixel: HealpixPixel) -> tuple[pa.Table, slice, IntArray]:
        """Group the partition's rows with as much of the sky around as the longest chain needs.

        Gives all rows (position, key, ids), sorted on the sky; those of the partition; primaries.
        """
        catalog, settings = self.catalog("observations"), self.settings
        ids = catalog.columns(GAIA_IDS.values() if settings.use_gaia_id else ())
        motion = MOTION if self.moved_arcsec else ()
        columns = [HEALPIX_COLUMN, "obs_id", "ra", "dec", *motion, *ids]
        around, own = catalog.schema.empty_table(), slice(0)
        order: IntArray | None = None

        def read(ranges: Ranges) -> tuple[pa.Table, BoolArray]:
            nonlocal around, order, own
            around = catalog.read_ranges(ranges, columns).combine_chunks()
            cells = around[HEALPIX_COLUMN].to_numpy()
            own = slice(*np.searchsorted(cells, (pixel.first, pixel.stop)).tolist())
            is_own = np.zeros(around.num_rows, dtype=np.bool_)
            is_own[own] = True
            if not self.moved_arcsec:
                return around, is_own
            table = at_epoch(around, self.epoch)
            order = np.argsort(table[HEALPIX_COLUMN].to_numpy(), kind="stable")
            return table.take(pa.array(order)).combine_chunks(), is_own[order]

        reach = max(settings.radius_arcsec, settings.id_radius_arcsec if ids else 0.0)
        reach += self.moved_arcsec
        _, _, grouped = group_around(
            pixel, read, lambda some: rank_of(some["obs_id"]), reach, settings, str(catalog.path)
        )
        if order is None:
            return around, own, grouped
        primary = np.empty_like(grouped)
        primary[order] = order[grouped]
        return around, own, primary
