"""Stage margin: a margin catalog beside a catalog, as a HATS collection."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sos_dask.errors import CatalogError, ConfigError
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.sky.neighbours import surroundings
from sos_dask.stages.parts import commit_catalog, key_of, records, run_parts, unless_complete
from sos_dask.storage.artifact import FileRecord, Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog, write_collection, write_partition

VERSION = 5


@dataclass(frozen=True)
class _Part:
    output: Output
    catalog: Catalog
    pixel: HealpixPixel
    radius_arcsec: float


def margin_recipe(catalog: str, radius_arcsec: float) -> Recipe:
    """Recipe of `margin` for a catalog of this fingerprint."""
    return Recipe("margin", VERSION, {"radius_arcsec": radius_arcsec}, {"catalog": catalog})


def margin(
    catalog: Catalog,
    directory: Path,
    radius_arcsec: float,
    *,
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Write the rows around every partition, so that other programs match without loss.

    Parameters
    ----------
    catalog : Catalog
    directory : Path
        Becomes a HATS collection: ``collection.properties``, a link ``catalog`` to the catalog, and
        the margin catalog ``margin``.
    radius_arcsec : float
        Rows outside a partition within it are in the margin; it holds some rows beyond, too.

    Returns
    -------
    Manifest
        Of the margin catalog. A row is in the margins of several partitions, or of none.

    Raises
    ------
    ConfigError
        The radius is not positive.
    CatalogError
        The catalog of another program does not have the columns that its rows have here.
    """
    if not 0 < radius_arcsec < 3600:
        raise ConfigError(f"margin of {radius_arcsec} arcsec is not between 0 and 3600")
    if not catalog.has_our_columns:
        raise CatalogError(
            f"{catalog.path} has other names or types of columns than a margin of sos-dask would",
            "Make the margin with the program that made the catalog.",
        )
    output = Output.prepare(
        directory / "margin",
        margin_recipe(catalog.fingerprint, radius_arcsec),
        overwrite,
        [catalog.path],
    )
    if not output.complete:
        parts = {
            key_of(pixel): _Part(output, catalog, pixel, radius_arcsec) for pixel in catalog.pixels
        }
        with unless_complete(output):
            with suppress(FileExistsError):
                target = os.path.relpath(catalog.path.resolve(), directory.resolve())
                (directory / "catalog").symlink_to(target)
            collection = write_collection(directory, catalog.name, "catalog", ["margin"])
            step = f"margin of {catalog.name}"
            run_parts(output, "margin", parts, _margin_part, cluster or Cluster(), step, report)
            done = records(output, "margin", list(parts))
            n_out = sum(record["file"]["rows"] for record in done if record["file"])
            n_in = catalog.n_rows
            commit_catalog(
                output,
                f"{catalog.name}_margin",
                list(zip(catalog.pixels, done, strict=True)),
                catalog.schema,
                Rows(n_in, n_out, 0, {"inside": n_in}, {"margin rows": n_out}),
                {"collection_sha256": collection},
                properties={
                    "hats_primary_table_url": catalog.name,
                    "hats_margin_threshold": f"{radius_arcsec:g}",
                },
                catalog_type="margin",
            )
    return output.load_manifest()


def _margin_part(part: _Part) -> None:
    around = surroundings(part.pixel, part.radius_arcsec)[0]
    rows = part.catalog.read_ranges(around, part.catalog.schema.names)
    record: FileRecord | None = None
    if rows.num_rows:
        record = write_partition(part.output, part.pixel, rows)
    part.output.put_record(
        "margin", key_of(part.pixel), {"file": None if record is None else asdict(record)}
    )
