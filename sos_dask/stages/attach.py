"""Stage attach: columns of another catalog, added to every row of a catalog by id or position.

The rows stay what they are, on their partitions and in their order. A row without a counterpart
gets nulls: a value is never made up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from sos_dask.errors import CatalogError
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import CANONICAL, HEALPIX_COLUMN, KEYS, is_gaia_id
from sos_dask.settings import COLUMN_RULE, Settings, is_column
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.sky.neighbours import surroundings
from sos_dask.stages.crossmatch import key_column, motion_of
from sos_dask.stages.ids import require_whole
from sos_dask.stages.needs import require_memory
from sos_dask.stages.parts import commit_catalog, key_of, records, run_parts, unless_complete
from sos_dask.stars.match import MatchSettings, match, reach_arcsec
from sos_dask.storage.artifact import Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog, write_partition
from sos_dask.surveys.definition import Survey

VERSION = 4
_MOTION = ("pmra", "pmdec", "position_epoch")


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
                raise ValueError(f"'{name}' is no name of a column: {COLUMN_RULE}")
        return columns


@dataclass(frozen=True)
class _Part:
    output: Output
    catalog: Catalog
    other: Catalog
    pixel: HealpixPixel
    settings: AttachSettings
    reach_arcsec: float


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

    Parameters
    ----------
    name : str
    columns : mapping of str to str
        Columns of the product and their names in the file. Canonical ones have their canonical
        unit there; others are plain float32.
    key, ra, dec : str
        Names in the file; ``key`` is the Gaia id where ``by`` names a release.
    epoch : float, yr
        Julian year of the positions.
    """
    wanted = {"obs_id": key, "ra": ra, "dec": dec}
    if by != "position":
        wanted[by] = key
    wanted |= dict(columns)
    known: dict[str, Any] = {product: {"source": wanted[product]} for product in wanted}
    survey = Survey(
        name=name,
        title=f"Columns {', '.join(columns)} of {name}",
        columns={product: known[product] for product in known if product in CANONICAL},
        extra={product: known[product] for product in known if product not in CANONICAL},
        position_epoch=epoch,
        # These tables are what the caller says they are, in parts of the sky too.
        allow=("ra_below_24",),
    )
    return survey.model_copy(update={"columns": {item: survey.columns[item] for item in wanted}})


def attach_recipe(catalog: str, other: str, settings: AttachSettings) -> Recipe:
    """Recipe of `attach` for catalogs of these fingerprints."""
    params = {"settings": settings.as_json, "column_order": list(settings.columns)}
    return Recipe("attach", VERSION, params, {"catalog": catalog, "other": other})


def attach(
    catalog: Catalog,
    other: Catalog,
    directory: Path,
    settings: AttachSettings,
    *,
    name: str = "",
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Add columns of another catalog to every row of a catalog.

    Parameters
    ----------
    catalog : Catalog
        Observations or stars; keeps its rows, order and partitions.
    other : Catalog
        Any HATS catalog; by id it must have the column that ``by`` names.
    directory : Path
    settings : AttachSettings
    name : str
        Name of the new catalog; default that of the old one.

    Returns
    -------
    Manifest
        ``summary``: rows with a counterpart, with several (the nearest counts), and nulls of each
        new column.

    Raises
    ------
    CatalogError
        A column is missing, or the catalog has a column of a new name already.
    """
    catalog.require("ra", "dec", HEALPIX_COLUMN)
    other.require("ra", "dec", HEALPIX_COLUMN, *settings.columns.values())
    by_id = settings.by != "position"
    if by_id:
        catalog.require(settings.by)
        other.require(settings.by)
        require_whole(catalog, [settings.by])
        require_whole(other, [settings.by])
    for column in settings.columns:
        if column in catalog.schema.names:
            raise CatalogError(
                f"{catalog.path} has a column '{column}' already",
                "Attach it under another name: columns are not overwritten.",
            )
    recipe = attach_recipe(catalog.fingerprint, other.fingerprint, settings)
    output = Output.prepare(directory, recipe, overwrite, [catalog.path, other.path])
    if output.complete:
        return output.load_manifest()
    cluster = cluster or Cluster()
    require_memory(cluster, catalog, "attach")
    reach = float(reach_arcsec(_matching(settings), motion_of(catalog), motion_of(other), by_id))
    parts = {key_of(p): _Part(output, catalog, other, p, settings, reach) for p in catalog.pixels}
    with unless_complete(output):
        run_parts(output, "attached", parts, _attach_part, cluster, "attach", report)
        done = records(output, "attached", list(parts))
        commit_catalog(
            output,
            name or catalog.name,
            list(zip(catalog.pixels, done, strict=True)),
            attached_schema(catalog.schema, other.schema, settings),
            Rows(catalog.n_rows, sum(record["file"]["rows"] for record in done)),
            {
                "matched": sum(record["matched"] for record in done),
                "ambiguous": sum(record["ambiguous"] for record in done),
                "nulls": {
                    column: sum(record["nulls"][column] for record in done)
                    for column in settings.columns
                },
                **_said_of(catalog),
            },
        )
    return output.load_manifest()


def _said_of(catalog: Catalog) -> dict[str, object]:
    """What later stages ask the manifest of observations for."""
    summary = catalog.manifest.summary if catalog.manifest is not None else {}
    return {name: summary[name] for name in ("survey", "expected_error") if name in summary}


def _matching(settings: AttachSettings) -> MatchSettings:
    radius = settings.radius_arcsec
    by_id = settings.by != "position"
    return MatchSettings(
        radius_arcsec=radius,
        id_radius_arcsec=max(radius, settings.id_radius_arcsec),
        pairs="best",
        use_gaia_id=by_id,
    )


def attached_schema(schema: pa.Schema, other: pa.Schema, settings: AttachSettings) -> pa.Schema:
    """Schema of the rows with the new columns at the end, all of them nullable."""
    fields = [
        other.field(source).with_name(column).with_nullable(True)
        for column, source in settings.columns.items()
    ]
    return pa.schema([*schema, *fields])


def _attach_part(part: _Part) -> None:
    """One partition with its new columns."""
    settings = part.settings
    table = part.catalog.read(part.pixel)
    by_id = settings.by != "position"
    names = ["ra", "dec", *_MOTION, *([settings.by] if by_id else [])]
    left = table.select([n for n in [HEALPIX_COLUMN, *names] if n in table.schema.names])
    key = _key_of(part.other)
    wanted = dict.fromkeys([HEALPIX_COLUMN, *names, key, *settings.columns.values()])
    around = surroundings(part.pixel, part.reach_arcsec)[0]
    ranges = sorted([(part.pixel.first, part.pixel.stop), *around])
    right = part.other.read_ranges(ranges, part.other.columns(wanted))
    found = match(left, right, _matching(settings), key)
    keep = found.by_id if by_id else np.ones(len(found.left), dtype=bool)
    index = np.full(table.num_rows, -1, dtype=np.int64)
    index[found.left[keep]] = found.right[keep]
    take = pa.array(index, mask=index < 0)
    schema = attached_schema(part.catalog.schema, part.other.schema, settings)
    new = [right[source].take(take) for source in settings.columns.values()]
    out = pa.Table.from_arrays([*table.columns, *new], schema=schema)
    record = write_partition(part.output, part.pixel, out)
    part.output.put_record(
        "attached",
        key_of(part.pixel),
        {
            "file": asdict(record),
            "matched": int(np.count_nonzero(index >= 0)),
            "ambiguous": int(np.count_nonzero(found.n_candidates[keep] > 1)),
            "nulls": {column: out[column].null_count for column in settings.columns},
        },
    )


def _key_of(catalog: Catalog) -> str:
    """Column that breaks ties: the key, else an id, else the cell."""
    if catalog.columns(KEYS):
        return key_column(catalog)
    ids = [n for n in catalog.schema.names if is_gaia_id(n)]
    return ids[0] if ids else HEALPIX_COLUMN
