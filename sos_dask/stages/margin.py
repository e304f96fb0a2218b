"""Stage margin: a margin catalog beside a catalog, as a HATS collection."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field

from sos_dask.errors import CatalogError
from sos_dask.settings import Settings
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.sky.neighbours import surroundings
from sos_dask.stages.base import Made, Role, Run, Stage, by_pixel, partition_record
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import write_collection
from sos_dask.storage.manifest import Manifest, Rows


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
        self.product = self.product or Path(directory).name
        return super().attempt(Path(directory) / "margin", **options)

    def check(self) -> None:
        """Refuse a catalog of others whose rows have other columns here than in its files."""
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
        with suppress(FileExistsError):
            target = os.path.relpath(catalog.path.resolve(), directory.resolve())
            (directory / "catalog").symlink_to(target)
        collection = write_collection(directory, catalog.name, "catalog", "margin")
        pixels = by_pixel(catalog.pixels)
        done = run.parts("margin", pixels, self.margin_of_pixel, f"margin of {catalog.name}")
        n_out = run.write_catalog(
            self.product,
            catalog.pixels,
            done,
            catalog.schema,
            {
                "hats_primary_table_url": catalog.name,
                "hats_margin_threshold": f"{self.settings.radius_arcsec:g}",
            },
            "margin",
        )
        rows = Rows(catalog.n_rows, n_out, 0, {"inside": catalog.n_rows}, {"margin rows": n_out})
        return rows, {"collection_sha256": collection}

    def margin_of_pixel(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Write the rows around one partition."""
        catalog = self.catalog("catalog")
        around = surroundings(pixel, self.settings.radius_arcsec)[0]
        rows = catalog.read_ranges(around, catalog.schema.names)
        return {"file": partition_record(output, pixel, rows)}
