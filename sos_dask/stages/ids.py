"""Ids as stages compare them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.errors import CatalogError
from sos_dask.storage.catalog import Catalog

GAIA_IDS = {"dr3": "gaia_dr3_source_id", "dr2": "gaia_dr2_source_id"}
"""Columns of ids of Gaia, by its release."""


def require_whole(catalog: Catalog, names: Iterable[str]) -> None:
    """Raise `CatalogError` where ids, which are to be compared, have lost their last digits."""
    for name in catalog.columns(names):
        if pa.types.is_floating(catalog.schema.field(name).type):
            raise CatalogError(
                f"{catalog.path}: column '{name}' is stored as float: digits are lost of its ids",
                "Make the catalog again with integer or text ids, or match by position alone: "
                "--no-gaia-id or --by position.",
            )


def require_numbers(catalog: Catalog, names: Iterable[str]) -> None:
    """Raise `CatalogError` where a column that is calculated with has another type."""
    for name in catalog.columns(names):
        kind = catalog.schema.field(name).type
        tests = pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null
        if not any(test(kind) for test in tests):
            raise CatalogError(f"{catalog.path}: column '{name}' has type {kind}, not numbers")


def id_values(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Ids as plain integers, 0 where there is none."""
    return np.asarray(pc.fill_null(column, 0).to_numpy(), dtype=np.int64)


def rank_of(keys: pa.ChunkedArray) -> NDArray[np.int64]:
    """Integers ordered as the keys are: integers themselves, of text the place in sorted order."""
    if pa.types.is_integer(keys.type):
        return np.asarray(keys.to_numpy(), dtype=np.int64)
    order = pc.array_sort_indices(keys.combine_chunks()).to_numpy()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank
