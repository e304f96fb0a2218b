"""Stage members: which star of the unified catalog each row of each survey belongs to."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from sos_dask.schema import CANONICAL, HEALPIX, HEALPIX_COLUMN
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.stages.base import Made, Role, Run, by_pixel, partition_record
from sos_dask.stages.united import United, UnitedSettings
from sos_dask.stars.group import GAIA_IDS
from sos_dask.stars.match import MOTION
from sos_dask.stars.union import with_survey
from sos_dask.storage.artifact import Output
from sos_dask.storage.manifest import Rows

_SCHEMA = pa.schema([
    HEALPIX.arrow(nullable=False),
    pa.field("obs_id", pa.string(), False, {"description": "Survey and key of the row"}),
    pa.field("survey", pa.string(), False, {"description": "Survey of the row"}),
    pa.field("star_id", pa.string(), False, {"description": "Star in the unified catalog"}),
    CANONICAL["ra"].arrow(nullable=False),
    CANONICAL["dec"].arrow(nullable=False),
])  # fmt: skip


class MembersStage(United[UnitedSettings]):
    """List the rows of all surveys, each with the ``star_id`` of its star in the unified catalog.

    With it any two products are joined: ``obs_id`` is ``<survey>:<obs_id>``, as in ``sources``.
    """

    name = "members"
    version = 1
    Settings = UnitedSettings
    of_surveys = "rows"
    roles = (Role("rows", "Rows of a survey, by its name.", many=True),)

    def make(self, run: Run) -> Made:
        """Plan the partitions, and name the stars of the rows of each."""
        pixels = self.plan(run, "members")
        done = run.parts("members", by_pixel(pixels), self.rows_of_pixel)
        n_out = run.write_catalog(self.product, pixels, done, _SCHEMA)
        n_in = sum(one.n_rows for one in self.surveys().values())
        return Rows(n_in, n_out), {"rows": {x: one.n_rows for x, one in self.surveys().items()}}

    def rows_of_pixel(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Write the rows of one partition, at the common epoch."""
        read = [HEALPIX_COLUMN, "ra", "dec", *MOTION, *GAIA_IDS.values()]
        table, inside, primary = self.grouped(pixel, read)
        table = with_survey(table)
        star = table["star_id"].take(pa.array(primary))
        table = table.rename_columns({"star_id": "obs_id"}).append_column("star_id", star)
        rows = table.filter(pa.array(inside)).select(_SCHEMA.names).cast(_SCHEMA)
        order = [(name, "ascending") for name in (HEALPIX_COLUMN, "obs_id")]
        return {"file": partition_record(output, pixel, rows.sort_by(order))}
