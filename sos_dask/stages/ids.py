"""What stages ask of catalogs that they match: keys, ids, motions."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from sos_dask.errors import CatalogError
from sos_dask.schema import HEALPIX_COLUMN, KEYS, YEARS
from sos_dask.stars.match import MOTION, Motion
from sos_dask.storage.catalog import Catalog

_LIKE_KEYS = re.compile(r"(id|ids|key|name|designation|index)$", re.IGNORECASE)


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


def key_column(catalog: Catalog) -> str:
    """Find the key of a catalog: ``star_id`` or ``obs_id``, whichever it has."""
    if known := catalog.columns(KEYS):
        return known[0]
    able = [
        item.name
        for item in catalog.schema
        if item.name != HEALPIX_COLUMN
        and (pa.types.is_integer(item.type) or pa.types.is_string(item.type))
    ]
    alike = [name for name in able if _LIKE_KEYS.search(name)]
    raise CatalogError(
        f"{catalog.path} has neither star_id nor obs_id",
        "Give the column that names each row, for example --key "
        f"{' or --key '.join(alike or able)}."
        if able
        else "It has no column of integers or text that could name its rows.",
    )


def motion_of(catalog: Catalog) -> Motion:
    """Bound proper motion and epoch over a whole catalog, from the footers of its files.

    Raises
    ------
    CatalogError
        Epochs are no years, as days of a catalog of others.
    """
    known = catalog.bounds(*MOTION)
    low, high = known.get("position_epoch", (np.nan, np.nan))
    if low < YEARS[0] or high > YEARS[1]:
        raise CatalogError(
            f"{catalog.path}: column 'position_epoch' has values from {low:g} to {high:g}, and "
            f"Julian years are needed ({YEARS[0]:g} to {YEARS[1]:g})",
            "Convert it, or rename it: rows without an epoch are matched where they stand.",
        )
    pmra, pmdec = (max(map(abs, known.get(name, (0.0, 0.0)))) for name in ("pmra", "pmdec"))
    moving = {"pmra", "pmdec"} <= set(catalog.schema.names)
    return Motion(float(np.hypot(pmra, pmdec)) if moving else 0.0, low, high)
