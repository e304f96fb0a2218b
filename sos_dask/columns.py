"""Columns of Arrow tables as arrays of numbers, nan where a value is null."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A column of numbers, shape (n,); it may share memory with the table."""
    return np.asarray(_filled(table[name].cast(pa.float64())))


def floats_or_nan(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A column of numbers, shape (n,); all nan where the table does not have it."""
    if name not in table.schema.names:
        return np.full(table.num_rows, np.nan)
    return floats(table, name)


def floats32(table: pa.Table, name: str) -> NDArray[np.float32]:
    """A column of numbers, shape (n,), rounded; it may share memory with the table."""
    return np.asarray(_filled(table[name].cast(pa.float32())))


def matrix32(table: pa.Table, names: Sequence[str]) -> NDArray[np.float32]:
    """Columns of numbers side by side, shape (n, len(names)), rounded."""
    return np.stack([floats32(table, name) for name in names], axis=1)


def reals_or_nan(table: pa.Table, name: str) -> NDArray[np.floating]:
    """A column in its own precision, NaN for null; single for one that is missing."""
    if name not in table.schema.names:
        return np.full(table.num_rows, np.nan, dtype=np.float32)
    column = table[name]
    own = column.type in (pa.float32(), pa.float64())
    return _filled(column if own else column.cast(pa.float64()))


def _filled(column: pa.ChunkedArray) -> NDArray[np.floating]:
    # Arrow fills nulls several times faster than it converts them.
    return np.asarray(pc.fill_null(column, np.nan).to_numpy())


def key_hashes(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    """64-bit values of a key column: the integers themselves, or a hash of the text."""
    if pa.types.is_integer(column.type):
        return np.asarray(column.to_numpy(), dtype=np.int64).view(np.uint64)
    import pandas as pd

    return np.asarray(pd.util.hash_array(column.to_numpy(zero_copy_only=False).astype(object)))
