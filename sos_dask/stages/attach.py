"""Stages attach and margin: what other catalogs, or other partitions, have around each partition.

Attach adds columns of another catalog to every row, by id or position. The rows stay what they
are, on their partitions and in their order; a row without a counterpart gets nulls: a value is
never made up. Margin writes a margin catalog beside a catalog, as a HATS collection.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from sos_dask.errors import CatalogError
from sos_dask.schema import CANONICAL, HEALPIX_COLUMN, KEYS, is_gaia_id
from sos_dask.settings import COLUMN_RULE, Settings, is_column
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.sky.neighbours import surroundings
from sos_dask.stages.base import (
    Made,
    Role,
    Run,
    Stage,
    by_pixel,
    motion_of,
    partition_record,
    require_whole,
)
from sos_dask.stars.match import MOTION, MatchSettings, match, reach_arcsec
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import write_collection
from sos_dask.storage.manifest import MANIFEST, Manifest, Recipe, Rows
from sos_dask.storage.objects import as_path, link
from sos_dask.surveys.definition import Survey


class AttachSettings(Settings):
    """Which columns of another catalog are added, and how its rows are found."""

    columns: Mapping[str, str] = Field(
        min_length=1, description="New names of the columns, and their names in the other catalog."
    )
    by: Literal["gaia_dr3_source_id", "gaia_dr2_source_id", "position"] = Field(
        "gaia_dr3_source_id", description="Equal ids, or the nearest row at the common epoch."
    )
    radius_arcsec: float = Field(
        1.0, gt=0, lt=3600, description="Largest separation of rows found by position."
    )
    id_radius_arcsec: float = Field(
        10.0, gt=0, lt=3600, description="Largest separation of rows with equal ids."
    )

    @field_validator("columns")
    @classmethod
    def _names_of_columns(cls, columns: Mapping[str, str]) -> Mapping[str, str]:
        for name in columns:
            if not is_column(name):
                raise ValueError(f"'{name}' cannot name a column: {COLUMN_RULE}")
        return columns

    @property
    def ids(self) -> list[str]:
        """Column of the ids that are compared; none where positions are."""
        return [self.by] if self.by != "position" else []

    @property
    def matching(self) -> MatchSettings:
        """How rows are matched."""
        return MatchSettings(
            radius_arcsec=self.radius_arcsec,
            id_radius_arcsec=max(self.radius_arcsec, self.id_radius_arcsec),
            use_gaia_id=bool(self.ids),
        )


class Attach(Stage[AttachSettings]):
    """Add columns of another catalog to every row of a catalog.

    The summary counts rows with a counterpart, with several (the nearest counts), and the nulls of
    each new column.
    """

    name = "attach"
    version = 5
    Settings = AttachSettings
    roles = (
        Role("catalog", "Observations or stars; keeps its rows, order and partitions."),
        Role("other", "Any HATS catalog; by id it must have that column."),
    )
    partitioned = "catalog"
    reusable = ("attached",)
    reach_arcsec = 0.0

    @classmethod
    def recipe(cls, settings: AttachSettings, fingerprints: Mapping[str, str]) -> Recipe:
        """Recipe; the order of the columns counts."""
        params = {"settings": settings.as_json, "column_order": list(settings.columns)}
        return Recipe(cls.name, cls.version, params, dict(fingerprints))

    def check(self) -> None:
        """Refuse catalogs that lack a column, and columns that the catalog has already."""
        catalog, other, settings = self.catalog("catalog"), self.catalog("other"), self.settings
        other.require(*settings.columns.values())
        for one in (catalog, other):
            one.require("ra", "dec", HEALPIX_COLUMN, *settings.ids)
            require_whole(one, settings.ids)
        for column in catalog.columns(settings.columns):
            raise CatalogError(
                f"{catalog.path} has a column '{column}' already",
                "Attach it under another name: columns are not overwritten.",
            )
        motions = motion_of(catalog), motion_of(other)
        self.reach_arcsec = float(reach_arcsec(settings.matching, *motions, bool(settings.ids)))

    def state(self) -> Any:
        """Tell what all partitions share: see `Stage.state`."""
        return self.reach_arcsec

    def make(self, run: Run) -> Made:
        """Add the columns to every partition."""
        catalog = self.catalog("catalog")
        done = run.parts("attached", by_pixel(catalog.pixels), self.attach_to_pixel)
        n_out = run.write_catalog(self.product, catalog.pixels, done, self._schema())
        told = catalog.manifest.summary if catalog.manifest is not None else {}
        summary = {
            **{name: sum(record[name] for record in done) for name in ("matched", "ambiguous")},
            "nulls": {
                column: sum(record["nulls"][column] for record in done)
                for column in self.settings.columns
            },
            # What later stages ask the manifest of observations for.
            **{name: told[name] for name in ("survey", "expected_error") if name in told},
        }
        return Rows(catalog.n_rows, n_out), summary

    def _schema(self) -> pa.Schema:
        """Schema of the rows with the new columns at the end, all of them nullable."""
        other = self.catalog("other").schema
        columns = self.settings.columns.items()
        fields = [other.field(old).with_name(new).with_nullable(True) for new, old in columns]
        return pa.schema([*self.catalog("catalog").schema, *fields])

    def attach_to_pixel(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Write one partition with its new columns."""
        settings, other = self.settings, self.catalog("other")
        table = self.catalog("catalog").read(pixel)
        names = [HEALPIX_COLUMN, "ra", "dec", *MOTION, *settings.ids]
        left = table.select([name for name in names if name in table.schema.names])
        # The key breaks ties; without one an id, or the cell.
        keys = [*other.columns(KEYS), *filter(is_gaia_id, other.schema.names), HEALPIX_COLUMN]
        around = surroundings(pixel, self.reach_arcsec)[0]
        wanted = dict.fromkeys([*names, keys[0], *settings.columns.values()])
        ranges = sorted([(pixel.first, pixel.stop), *around])
        right = other.read_ranges(ranges, other.columns(wanted))
        found = match(left, right, settings.matching, keys[0])
        keep = found.by_id | (not settings.ids)
        index = np.full(table.num_rows, -1, dtype=np.int64)
        index[found.left[keep]] = found.right[keep]
        take = pa.array(index, mask=index < 0)
        new = [right[source].take(take) for source in settings.columns.values()]
        out = pa.Table.from_arrays([*table.columns, *new], schema=self._schema())
        return {
            "file": partition_record(output, pixel, out),
            "matched": int(np.count_nonzero(index >= 0)),
            "ambiguous": int(np.count_nonzero(found.n_candidates[keep] > 1)),
            "nulls": {column: out[column].null_count for column in settings.columns},
        }


def companion_survey(
    name: str,
    columns: Mapping[str, str],
    *,
    key: str = "source_id",
    ra: str = "ra",
    dec: str = "dec",
    epoch: float = 2016.0,
    by: str = "gaia_dr3_source_id",
) -> Survey:
    """Definition by which `ingest` reads a table file that has positions, but no stellar labels.

    ``columns`` are those of the product with their names in the file: canonical ones in their
    canonical unit, others plain float32. ``key``, ``ra`` and ``dec`` are names in the file; the key
    is the Gaia id where ``by`` names a release. ``epoch`` is the Julian year of the positions.
    """
    by_id = {by: key} if by != "position" else {}
    wanted = {"obs_id": key, "ra": ra, "dec": dec, **by_id, **columns}
    known: dict[str, Any] = {product: {"source": source} for product, source in wanted.items()}
    extra = {product: known.pop(product) for product in wanted if product not in CANONICAL}
    survey = Survey(
        name=name,
        title=f"Columns {', '.join(columns)} of {name}",
        columns=known,
        extra=extra,
        position_epoch=epoch,
        # These tables are what the caller says they are, in parts of the sky too.
        allow=("ra_below_24",),
    )
    return survey.model_copy(update={"columns": {item: survey.columns[item] for item in wanted}})


class MarginSettings(Settings):
    """How wide a margin is."""

    radius_arcsec: float = Field(
        gt=0, lt=3600, description="Rows outside a partition within it are in the margin."
    )


class Margin(Stage[MarginSettings]):
    """Write the rows around every partition, so that other programs match without loss.

    The directory becomes a HATS collection: ``collection.properties``, a link ``catalog`` to the
    catalog, and the margin catalog ``margin``, which is the output. The margin contains some rows
    beyond the radius, too; a row is in the margins of several partitions, or of none.
    """

    name = "margin"
    version = 6
    Settings = MarginSettings
    roles = (Role("catalog", "Catalog that gets a margin."),)

    def attempt(self, directory: str | Path, **options: Any) -> Manifest | None:
        """Make the collection in a directory; the output is its folder ``margin``."""
        directory = as_path(directory)
        self.product = self.product or directory.name
        return super().attempt(directory / "margin", **options)

    def check(self) -> None:
        """Refuse a foreign catalog whose rows have other columns here than in its files."""
        catalog = self.catalog("catalog")
        if not catalog.has_our_columns:
            raise CatalogError(
                f"{catalog.path} has other names or types of columns than a margin of sos-dask "
                "would",
                "Make the margin with the program that made the catalog.",
            )

    def make(self, run: Run) -> Made:
        """Write the collection, and the margin of every partition."""
        catalog, directory = self.catalog("catalog"), run.output.directory.parent
        link(directory / "catalog", catalog.path, MANIFEST)
        collection = write_collection(directory, catalog.name, "catalog", "margin")
        pixels = by_pixel(catalog.pixels)
        done = run.parts("margin", pixels, self.margin_of_pixel, f"margin of {catalog.name}")
        properties = {
            "hats_primary_table_url": catalog.name,
            "hats_margin_threshold": f"{self.settings.radius_arcsec:g}",
        }
        more = catalog.schema, properties, "margin"
        n_out = run.write_catalog(self.product, catalog.pixels, done, *more)
        rows = Rows(catalog.n_rows, n_out, 0, {"inside": catalog.n_rows}, {"margin rows": n_out})
        return rows, {"collection_sha256": collection}

    def margin_of_pixel(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Write the rows around one partition."""
        catalog = self.catalog("catalog")
        around = surroundings(pixel, self.settings.radius_arcsec)[0]
        rows = catalog.read_ranges(around, catalog.schema.names)
        return {"file": partition_record(output, pixel, rows)}
