"""What stages share that make stars of the rows of several surveys.

Their partitions are planned anew from all rows, at a common epoch. A star belongs to the partition
of its primary, whose members may lie around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from sos_dask.columns import BoolArray, IntArray, mixed
from sos_dask.schema import HEALPIX_COLUMN, YEARS
from sos_dask.settings import RowsPerPartition
from sos_dask.sky.healpix import MAX_ORDER, HealpixPixel, Ranges, in_ranges, plan_partitions
from sos_dask.stages.base import Place, Run, Stage, key_column, motion_of, places
from sos_dask.stars.group import Radii, group_around, rank_of
from sos_dask.stars.match import MOTION, at_epoch, moved_arcsec
from sos_dask.stars.union import in_order
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog

_HISTOGRAM_ORDER = 8


class UnitedSettings(Radii):
    """How rows of several surveys become stars, and how the sky is cut."""

    order: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Surveys, the first gives place and name of a star; others follow by name."
    )
    epoch: float = Field(
        2016.0,
        ge=YEARS[0],
        le=YEARS[1],
        description="Julian year to which positions with proper motions are moved.",
    )
    rows_per_partition: RowsPerPartition = 1_000_000


U = TypeVar("U", bound=UnitedSettings)


class United(Stage[U]):
    """A stage that makes stars of the rows of several surveys, which are inputs of one role."""

    of_surveys: ClassVar[str]
    """The role of the surveys' catalogs."""
    motion_arcsec = 0.0

    def surveys(self) -> dict[str, Catalog]:
        """Catalogs by survey."""
        return {x.partition(".")[2]: self.catalog(x) for x in self.named(self.of_surveys)}

    def plan(self, run: Run, what: str) -> tuple[list[HealpixPixel], IntArray]:
        """Plan the partitions by the positions at the common epoch.

        Given are the rows of each survey in each cell, (s, cells), too.
        """
        catalogs, counted = self.surveys(), places(self.surveys())
        shape = len(catalogs), 12 * 4**_HISTOGRAM_ORDER
        counts = np.zeros(shape, dtype=np.int64)
        done = run.parts("counts", counted, self.count_rows, f"{what} plan")
        for (survey, _), record in zip(counted.values(), done, strict=True):
            number = list(catalogs).index(survey)
            np.add.at(counts[number], record["cells"], record["rows"])
        histogram = counts.sum(axis=0)
        pixels = plan_partitions(histogram, _HISTOGRAM_ORDER, self.settings.rows_per_partition)
        n_bytes = 0
        for catalog in (one for one in catalogs.values() if one.n_rows):
            pixel, of_pixel = catalog.largest_partition()
            n_bytes += of_pixel * catalog.n_rows // catalog.partition_rows(pixel)
        self.require_pixel(run.cluster, pixels, histogram, n_bytes)
        motions = map(motion_of, catalogs.values())
        self.motion_arcsec = max(moved_arcsec(one, self.settings.epoch) for one in motions)
        return pixels, counts

    def count_rows(self, output: Output, key: str, item: Place) -> dict[str, Any]:
        """Count the rows of a survey's partition by cell, at the common epoch."""
        survey, pixel = item
        catalog = self.catalog(f"{self.of_surveys}.{survey}")
        columns = catalog.columns([HEALPIX_COLUMN, "ra", "dec", *MOTION])
        table = at_epoch(catalog.read(pixel, columns), self.settings.epoch)
        cells = table[HEALPIX_COLUMN].to_numpy() >> 2 * (MAX_ORDER - _HISTOGRAM_ORDER)
        cells, rows = np.unique(cells, return_counts=True)
        return {"cells": cells.tolist(), "rows": rows.tolist()}

    def as_read(self, survey: str, table: pa.Table) -> pa.Table:
        """Rows of a survey, with what members need of them."""
        return table

    def grouped(
        self, pixel: HealpixPixel, columns: Sequence[str]
    ) -> tuple[pa.Table, BoolArray, IntArray]:
        """Rows in a partition and around it, which are in it, and primaries of the stars there."""
        settings, catalogs = self.settings, self.surveys()

        def read(ranges: Ranges) -> tuple[pa.Table, BoolArray]:
            rows = {
                survey: self.as_read(
                    survey,
                    at_epoch(
                        one.read_ranges(ranges, with_key(one, columns)),
                        settings.epoch,
                    ),
                )
                for survey, one in catalogs.items()
            }
            table = together(rows).combine_chunks()
            order = np.argsort(table[HEALPIX_COLUMN].to_numpy(), kind="stable")
            table = table.take(pa.array(order))
            return table, in_ranges(table[HEALPIX_COLUMN].to_numpy(), [(pixel.first, pixel.stop)])

        reach = max(settings.radius_arcsec, settings.id_radius_arcsec) + self.motion_arcsec
        ranks = partial(_ranks, order=settings.order)
        return group_around(pixel, read, ranks, reach, settings, self.product)

    def members(self, pixel: HealpixPixel, columns: Sequence[str]) -> tuple[pa.Table, IntArray]:
        """Rows of the stars whose primary lies in a partition, and each one's primary."""
        table, inside, primary = self.grouped(pixel, columns)
        ours = inside[primary]
        row_of = np.cumsum(ours) - 1
        return table.filter(pa.array(ours)), row_of[primary[ours]]


def enough(pixels: Sequence[HealpixPixel], counts: IntArray, n_rows: int) -> list[HealpixPixel]:
    """Choose partitions, from all of the sky, in which surveys may have stars in common.

    So many of each two surveys, or as many as they may have at all. ``counts``: of `United.plan`.
    """
    ends = np.array([[one.first, one.stop] for one in pixels], dtype=np.int64).reshape(-1, 2)
    ends >>= 2 * (MAX_ORDER - _HISTOGRAM_ORDER)
    total = np.pad(np.cumsum(counts, axis=1), ((0, 0), (1, 0)))
    rows = total[:, ends[:, 1]] - total[:, ends[:, 0]]
    order = np.argsort(mixed(ends[:, 0].astype(np.uint64)), kind="stable")
    chosen: set[int] = set()
    for one, other in combinations(rows[:, order], 2):
        common = np.minimum(one, other)
        before = np.cumsum(common) - common
        chosen.update(order[(common > 0) & (before < n_rows)].tolist())
    return [pixels[place] for place in sorted(chosen)]


def with_key(catalog: Catalog, columns: Sequence[str]) -> list[str]:
    """Key of a catalog, and those of some columns that it has."""
    return catalog.columns(dict.fromkeys([key_column(catalog), *columns]))


def together(tables: Mapping[str, pa.Table]) -> pa.Table:
    """Rows of all surveys in one table, keys as text, with the survey's name in a column."""
    parts = [
        with_text_key(table).append_column("survey", pa.repeat(survey, len(table)))
        for survey, table in tables.items()
    ]
    return pa.concat_tables(parts, promote_options="permissive")


def with_text_key(table: pa.Table) -> pa.Table:
    """The same rows with their key as text, named ``star_id``."""
    name = "star_id" if "star_id" in table.schema.names else "obs_id"
    index = table.schema.get_field_index(name)
    return table.set_column(index, "star_id", table[name].cast(pa.string()))


def _ranks(table: pa.Table, order: Sequence[str]) -> IntArray:
    """Preference for the primary: the survey's place in the order or its name, then the key."""
    rank = np.empty(table.num_rows, dtype=np.int64)
    first = 0
    for name in in_order(pc.unique(table["survey"]).to_pylist(), order):
        rows = np.flatnonzero(pc.equal(table["survey"], name).to_numpy())
        rank[rows] = first + rank_of(table["star_id"].take(pa.array(rows)))
        first += len(rows)
    return rank
