"""Stage sample: some rows of a catalog, chosen by their keys, for what must know what rows are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from sos_dask.columns import key_hashes
from sos_dask.problem import DEFAULT, ColumnName
from sos_dask.settings import Seed, Settings
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.stages.base import Made, Role, Run, Stage, by_pixel, key_column
from sos_dask.stats.numbers import uniform
from sos_dask.storage.artifact import Output, partition_errors
from sos_dask.storage.manifest import Rows
from sos_dask.storage.objects import local

_FILE = "sample.parquet"


class SampleSettings(Settings):
    """Settings of the stage."""

    columns: tuple[ColumnName, ...] = Field(
        tuple(one.column for one in DEFAULT.parameters)
        + tuple(label.error for label in DEFAULT.labels),
        description="Columns of the rows, where the catalog has them",
    )
    n_rows: int = Field(200_000, ge=1000, description="About so many rows")
    seed: Seed = Field(0, description="Other seeds give other rows")


class Sample(Stage[SampleSettings]):
    """Keep some rows of a catalog: its table has the columns that are asked for, and quality."""

    name = "sample"
    version = 1
    Settings = SampleSettings
    roles = (Role("observations", "Observations of the target."),)

    def make(self, run: Run) -> Made:
        """Read partition by partition, and keep what is chosen in one table."""
        catalog = self.catalog("observations")
        done = run.parts("rows", by_pixel(catalog.pixels), self.rows)
        tables = [run.output.read_piece(key) for key in by_pixel(catalog.pixels)]
        none = catalog.schema.empty_table().select(self.names).replace_schema_metadata()
        run.write(_FILE, pa.concat_tables([none, *tables]))
        n_out = sum(one["rows"] for one in done)
        return Rows(catalog.n_rows, n_out, 0, {"not chosen": catalog.n_rows - n_out}), {}

    @property
    def names(self) -> list[str]:
        """Columns of the table."""
        wanted = dict.fromkeys([*self.settings.columns, "quality"])
        return self.catalog("observations").columns(wanted)

    def rows(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Keep the rows of one partition that are chosen by their keys alone."""
        catalog = self.catalog("observations")
        name = key_column(catalog)
        table = catalog.read(pixel, list(dict.fromkeys([name, *self.names])))
        share = self.settings.n_rows / max(catalog.n_rows, 1)
        chosen = uniform(key_hashes(table[name]), self.settings.seed) < share
        table = table.filter(pa.array(chosen)).select(self.names)
        output.write_piece(key, table.replace_schema_metadata())
        return {"rows": table.num_rows}


def read_sample(directory: Any, good: bool = False) -> pa.Table:
    """Read the table of an output of `Sample`; with ``good`` the rows that pass all cuts."""
    with partition_errors(directory / _FILE):
        table = pq.read_table(local(directory / _FILE))
    if good and "quality" in table.schema.names:
        table = table.filter(pa.array(np.asarray(table["quality"].to_numpy() == 0)))
    return table
