"""Pairs of a build, as tests of the stages on them look at them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sos_dask.storage.catalog import Catalog


def read(path: Path) -> pa.Table:
    """All rows of a catalog."""
    catalog = Catalog.open(path)
    return pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])


def used(build: Path) -> pa.Table:
    """Pairs of a build that are fit for training."""
    pairs = read(build / "lamost.pairs")
    return pairs.filter(pairs["use"])


def column(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(pc.fill_null(table[name], np.nan).to_numpy(), dtype=np.float64)
