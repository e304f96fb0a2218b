"""Stage members: which star of the unified catalog each row of each survey belongs to."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sos_dask.columns import one_array
from sos_dask.errors import CatalogError
from sos_dask.schema import CANONICAL, HEALPIX, HEALPIX_COLUMN
from sos_dask.settings import Settings
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.stages.base import Made, Role, Run, Stage, by_pixel, partition_record
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


class MembersStage(Stage[Settings]):
    """List the rows of all surveys, each with name and place of its star in the unified catalog.

    With it any two products are joined: ``obs_id`` is ``<survey>:<obs_id>``, as in ``sources``.
    """

    name = "members"
    version = 2
    Settings = Settings
    roles = (Role("sos", "The unified catalog."),)

    def make(self, run: Run) -> Made:
        """List the members of the stars of each partition."""
        sos = self.catalog("sos")
        done = run.parts("members", by_pixel(sos.pixels), self.rows_of_pixel)
        n_out = run.write_catalog(self.product, sos.pixels, done, _SCHEMA)
        return Rows(sos.n_rows, n_out, 0, {}, {"further members": n_out - sos.n_rows}), {}

    def rows_of_pixel(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Write the rows of the stars of one partition."""
        names = [HEALPIX_COLUMN, "star_id", "sources", "n_obs", "ra", "dec"]
        stars = self.catalog("sos").read(pixel, names).combine_chunks()
        lists = pc.split_pattern(stars["sources"].combine_chunks(), ";")
        if not pc.list_value_length(lists).cast(pa.int32()).equals(one_array(stars["n_obs"])):
            raise CatalogError(
                f"pixel {pixel} of {self.path('sos')}: a key of a row contains ';'",
                "Give the survey another column as obs_id.",
            )
        keys = pc.list_flatten(lists)
        surveys = pc.list_element(pc.split_pattern(keys, ":", max_splits=1), 0)
        rows = stars.take(pc.list_parent_indices(lists))
        rows = rows.append_column("obs_id", keys).append_column("survey", surveys)
        rows = rows.select(_SCHEMA.names).cast(_SCHEMA)
        order = [(name, "ascending") for name in (HEALPIX_COLUMN, "obs_id")]
        return {"file": partition_record(output, pixel, rows.sort_by(order))}
