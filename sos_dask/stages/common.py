"""Stars that several reference surveys have, with the labels of each survey."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.columns import floats
from sos_dask.schema import LABELS
from sos_dask.storage.catalog import Catalog

_STAR_COLUMNS = ("star_id", "quality", *LABELS)


@dataclass(frozen=True)
class CommonStars:
    """Stars of a united reference that several surveys have.

    Parameters
    ----------
    star_id : pyarrow.Array of string, shape (n,)
        Of the united reference.
    labels : mapping of str to (ndarray of int64, mapping of str to ndarray of float64)
        By survey: its stars as ascending indices into ``star_id``, and their labels (K, dex, dex)
        on the zero points of the reference.
    """

    star_id: pa.Array
    labels: Mapping[str, tuple[NDArray[np.int64], Mapping[str, NDArray[np.float64]]]]


def common_stars(reference: Catalog, stars: Mapping[str, Catalog]) -> CommonStars:
    """Common stars of the surveys that a reference was made from.

    Of a survey's rows of one star, the first that passes its cuts counts.

    Parameters
    ----------
    reference : Catalog
        Output of reference.
    stars : mapping of str to Catalog
        The catalogs it was made from, by survey.
    """
    reference.require("n_surveys", "sources")
    star_id, star, survey, key = _members(reference)
    manifest = reference.manifest
    offsets: Mapping[str, Mapping[str, float]]
    offsets = manifest.summary.get("offsets", {}) if manifest is not None else {}
    labels = {}
    for name, catalog in sorted(stars.items()):
        mine = np.flatnonzero(pc.equal(survey, name).to_numpy(zero_copy_only=False))
        wanted = key.take(pa.array(mine))
        known = _rows_of(catalog, wanted)
        row = pc.index_in(wanted, known["star_id"].combine_chunks())
        good = np.flatnonzero(row.is_valid().to_numpy(zero_copy_only=False))
        _, first = np.unique(star[mine[good]], return_index=True)
        chosen = known.take(row.take(pa.array(good[first])))
        values = {
            label: floats(chosen, label) - offsets.get(name, {}).get(label, 0.0) for label in LABELS
        }
        labels[name] = (star[mine[good[first]]], values)
    return CommonStars(star_id, labels)


def _members(reference: Catalog) -> tuple[pa.Array, NDArray[np.int64], pa.Array, pa.Array]:
    """Stars of several surveys, and their members: number of the star, survey, ``star_id``."""
    nothing = pa.table({name: pa.array([], pa.string()) for name in ("star_id", "sources")})
    tables = [nothing]
    for pixel in reference.pixels:
        table = reference.read(pixel, ["star_id", "n_surveys", "sources"])
        table = table.filter(pc.greater(table["n_surveys"], 1)).select(nothing.schema.names)
        tables.append(table.cast(nothing.schema))
    stars = pa.concat_tables(tables).combine_chunks()
    split = pc.split_pattern(stars["sources"].combine_chunks(), ";")
    parts = pc.split_pattern(pc.list_flatten(split), ":", max_splits=1)
    return (
        stars["star_id"].combine_chunks(),
        pc.list_parent_indices(split).to_numpy().astype(np.int64),
        pc.list_element(parts, 0),
        pc.list_element(parts, 1),
    )


def _rows_of(catalog: Catalog, wanted: pa.Array) -> pa.Table:
    """Rows with quality 0 of a catalog of stars, by key as text."""
    fields = [catalog.schema.field(name) for name in _STAR_COLUMNS]
    tables = []
    for table in [
        pa.schema(fields).empty_table(),
        *(catalog.read(pixel, list(_STAR_COLUMNS)) for pixel in catalog.pixels),
    ]:
        table = table.filter(pc.equal(table["quality"], 0))
        table = table.set_column(0, "star_id", table["star_id"].cast(pa.string()))
        tables.append(table.filter(pc.is_in(table["star_id"], wanted)))
    return pa.concat_tables(tables)
