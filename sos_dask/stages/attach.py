"""Stage attach: columns of another catalog, added to every row of a catalog by id or position.

The rows stay what they are, on their partitions and in their order. A row without a counterpart
gets nulls: a value is never made up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from sos_dask.errors import CatalogError
from sos_dask.schema import CANONICAL, HEALPIX_COLUMN, KEYS, is_gaia_id
from sos_dask.settings import COLUMN_RULE, Settings, is_column
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.sky.neighbours import surroundings
from sos_dask.stages.base import Made, Role, Run, Stage, by_pixel, partition_record
from sos_dask.stages.ids import key_column, motion_of, require_whole
from sos_dask.stars.match import MOTION, MatchSettings, match, reach_arcsec
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Recipe, Rows
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
                raise ValueError(f"'{name}' is no name of a column: {COLUMN_RULE}")
        return columns

    @property
    def by_id(self) -> bool:
        """Tell whether equal ids make a pair, not positions."""
        return self.by != "position"

    @property
    def matching(self) -> MatchSettings:
        """How rows are matched."""
        return MatchSettings(
            radius_arcsec=self.radius_arcsec,
            id_radius_arcsec=max(self.radius_arcsec, self.id_radius_arcsec),
            use_gaia_id=self.by_id,
        )


class Attach(Stage[AttachSettings]):
    """Add columns of another catalog to every row of a catalog.

    The summary counts rows with a counterpart, with several (the nearest counts), and the nulls of
    each new column.

    Example: sos-dask attach lamost gaia -c distance -c ebv -o lamost.with-gaia
    """

    name = "attach"
    version = 5
    Settings = AttachSettings
    roles = (
        Role("catalog", "Observations or stars; keeps its rows, order and partitions."),
        Role("other", "Any HATS catalog; by id it must have that column."),
    )
    partitioned = "catalog"
    reach_arcsec = 0.0

    @classmethod
    def recipe(cls, settings: AttachSettings, fingerprints: Mapping[str, str]) -> Recipe:
        """Recipe; the order of the columns counts."""
        params = {"settings": settings.as_json, "column_order": list(settings.columns)}
        return Recipe(cls.name, cls.version, params, dict(fingerprints))

    def check(self) -> None:
        """Refuse catalogs that lack a column, and columns that the catalog has already."""
        catalog, other, settings = self.catalog("catalog"), self.catalog("other"), self.settings
        catalog.require("ra", "dec", HEALPIX_COLUMN)
        other.require("ra", "dec", HEALPIX_COLUMN, *settings.columns.values())
        if settings.by_id:
            for one in (catalog, other):
                one.require(settings.by)
                require_whole(one, [settings.by])
        for column in settings.columns:
            if column in catalog.schema.names:
                raise CatalogError(
                    f"{catalog.path} has a column '{column}' already",
                    "Attach it under another name: columns are not overwritten.",
                )
        motions = motion_of(catalog), motion_of(other)
        self.reach_arcsec = float(reach_arcsec(settings.matching, *motions, settings.by_id))

    def make(self, run: Run) -> Made:
        """Add the columns to every partition."""
        catalog = self.catalog("catalog")
        done = run.parts("attached", by_pixel(catalog.pixels), self.attach_to_pixel)
        n_out = run.write_catalog(self.product, catalog.pixels, done, self.attached_schema())
        told = catalog.manifest.summary if catalog.manifest is not None else {}
        summary = {
            "matched": sum(record["matched"] for record in done),
            "ambiguous": sum(record["ambiguous"] for record in done),
            "nulls": {
                column: sum(record["nulls"][column] for record in done)
                for column in self.settings.columns
            },
            # What later stages ask the manifest of observations for.
            **{name: told[name] for name in ("survey", "expected_error") if name in told},
        }
        return Rows(catalog.n_rows, n_out), summary

    def attached_schema(self) -> pa.Schema:
        """Schema of the rows with the new columns at the end, all of them nullable."""
        other = self.catalog("other").schema
        columns = self.settings.columns.items()
        fields = [other.field(old).with_name(new).with_nullable(True) for new, old in columns]
        return pa.schema([*self.catalog("catalog").schema, *fields])

    def attach_to_pixel(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Write one partition with its new columns."""
        settings, other = self.settings, self.catalog("other")
        table = self.catalog("catalog").read(pixel)
        names = ["ra", "dec", *MOTION, *([settings.by] if settings.by_id else [])]
        left = table.select([n for n in [HEALPIX_COLUMN, *names] if n in table.schema.names])
        right_key = _key_of(other)
        wanted = dict.fromkeys([HEALPIX_COLUMN, *names, right_key, *settings.columns.values()])
        around = surroundings(pixel, self.reach_arcsec)[0]
        ranges = sorted([(pixel.first, pixel.stop), *around])
        right = other.read_ranges(ranges, other.columns(wanted))
        found = match(left, right, settings.matching, right_key)
        keep = found.by_id if settings.by_id else np.ones(len(found.left), dtype=bool)
        index = np.full(table.num_rows, -1, dtype=np.int64)
        index[found.left[keep]] = found.right[keep]
        take = pa.array(index, mask=index < 0)
        new = [right[source].take(take) for source in settings.columns.values()]
        out = pa.Table.from_arrays([*table.columns, *new], schema=self.attached_schema())
        return {
            "file": partition_record(output, pixel, out),
            "matched": int(np.count_nonzero(index >= 0)),
            "ambiguous": int(np.count_nonzero(found.n_candidates[keep] > 1)),
            "nulls": {column: out[column].null_count for column in settings.columns},
        }


def _key_of(catalog: Catalog) -> str:
    """Column that breaks ties: the key, else an id, else the cell."""
    if catalog.columns(KEYS):
        return key_column(catalog)
    ids = [n for n in catalog.schema.names if is_gaia_id(n)]
    return ids[0] if ids else HEALPIX_COLUMN


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
    by_id = {by: key} if by != "position" else {}
    wanted = {"obs_id": key, "ra": ra, "dec": dec, **by_id, **columns}
    known: dict[str, Any] = {product: {"source": source} for product, source in wanted.items()}
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
