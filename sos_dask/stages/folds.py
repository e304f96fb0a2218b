"""Folds over the edges of partitions, for stage crossmatch.

A task knows all pairs of its own partition. What it cannot know is which of them are joined with
pairs of other partitions; it leaves those that may be as *edge pairs*, with all that they are
joined with. One task joins the edge pairs of all partitions, and says where that changes a fold.
Its memory goes with the edge pairs: some percent of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask.schema import HEALPIX_COLUMN
from sos_dask.sky.healpix import FloatArray, HealpixPixel, IntArray
from sos_dask.sky.neighbours import near_edge
from sos_dask.stages.ids import GAIA_IDS, id_values
from sos_dask.stages.parts import key_of
from sos_dask.stages.pieces import read_piece, write_piece
from sos_dask.stars.folds import fold_of, same_targets, smallest_of_joined, star_numbers
from sos_dask.storage.artifact import WORK, FileRecord, Output, storage_errors
from sos_dask.storage.catalog import (
    partition_errors,
    partition_path,
    write_parquet,
    write_partition,
)

_COLUMNS = {"row": pa.int64(), "smallest": pa.uint64(), "number": pa.uint64()}


@dataclass(frozen=True)
class FoldSettings:
    """How pairs are joined and get their folds.

    Parameters
    ----------
    n_folds, seed : int
    radius_arcsec, id_radius_arcsec : float
        Targets within the first, or with equal Gaia ids within the second, are one star.
    """

    n_folds: int
    seed: int
    radius_arcsec: float
    id_radius_arcsec: float


@dataclass(frozen=True)
class FoldChange:
    """A partition in which folds change.

    Parameters
    ----------
    output : Output
    pixel : HealpixPixel
    rows : ndarray of int64
        Row numbers of pairs,
    folds : ndarray of int8
        and their folds.
    """

    output: Output
    pixel: HealpixPixel
    rows: IntArray
    folds: NDArray[np.int8]


def local_folds(
    output: Output,
    pixel: HealpixPixel,
    targets: pa.Table,
    reference_id: pa.ChunkedArray,
    reference_cells: IntArray,
    reach_arcsec: FloatArray,
    settings: FoldSettings,
) -> tuple[NDArray[np.int8], int]:
    """Folds of the pairs of one partition by themselves; keeps its edge pairs.

    Parameters
    ----------
    targets : pyarrow.Table
        Positions and Gaia ids of the target of each pair, in the order of the sky.
    reference_id : pyarrow array of shape (n,)
    reference_cells : ndarray of int64, shape (n,)
        Order-29 cells of the reference stars.
    reach_arcsec : ndarray of float64, shape (n,)
        Within it of a reference star are all its targets.

    Returns
    -------
    folds : ndarray of int8, shape (n,)
    n_stars : int
        Distinct reference stars.
    """
    number = star_numbers(reference_id, settings.seed)
    smallest = smallest_of_joined(number, number, _links(targets, settings))
    cells = targets[HEALPIX_COLUMN].to_numpy()
    open_ = near_edge(pixel, reference_cells, reach_arcsec)
    open_ |= near_edge(pixel, cells, max(settings.radius_arcsec, settings.id_radius_arcsec))
    rows = np.flatnonzero(np.isin(smallest, smallest[open_]))
    edge = pa.table(
        [pa.array(values) for values in (rows, smallest[rows], number[rows])],
        schema=pa.schema(list(_COLUMNS.items())),
    )
    places = targets.select(_places(targets)).take(pa.array(rows))
    for name in places.schema.names:
        edge = edge.append_column(name, places[name])
    write_piece(_edge_file(output, pixel), edge)
    return fold_of(smallest, settings.n_folds), len(np.unique(number))


def changed_folds(
    output: Output, pixels: Sequence[HealpixPixel], settings: FoldSettings
) -> tuple[dict[str, FoldChange], int]:
    """Join the edge pairs of all partitions.

    Returns
    -------
    changes : dict of str to FoldChange
        By the key of the partition.
    n_again : int
        How often reference stars are in pairs of more than one partition.
    """
    tables = [read_piece(_edge_file(output, pixel)) for pixel in pixels]
    if not tables:
        return {}, 0
    edges = pa.concat_tables(tables)
    smallest, number = edges["smallest"].to_numpy(), edges["number"].to_numpy()
    joined = smallest_of_joined(smallest, number, _links(edges, settings))
    folds = fold_of(joined, settings.n_folds)
    changes = folds != fold_of(smallest, settings.n_folds)
    found = {}
    n_stars = first = 0
    for pixel, table in zip(pixels, tables, strict=True):
        here = slice(first, first + table.num_rows)
        first = here.stop
        n_stars += len(np.unique(number[here]))
        at = np.flatnonzero(changes[here])
        if len(at):
            rows = table["row"].to_numpy()[at]
            found[key_of(pixel)] = FoldChange(output, pixel, rows, folds[here][at])
    return found, n_stars - len(np.unique(number))


def change_folds(part: FoldChange) -> None:
    """Write a partition of pairs with its final folds."""
    path = _partition_file(part.output, part.pixel)
    with partition_errors(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        pairs = file.read(use_threads=False)
    folds = pairs["fold"].to_numpy().copy()
    folds[part.rows] = part.folds
    place = pairs.schema.get_field_index("fold")
    pairs = pairs.set_column(place, pairs.schema.field("fold"), pa.array(folds, pa.int8()))
    record = write_partition(part.output, part.pixel, pairs)
    part.output.put_record("folds", key_of(part.pixel), {"file": asdict(record)})


def write_pairs(output: Output, pixel: HealpixPixel, pairs: pa.Table) -> FileRecord:
    """Write pairs aside: not even a task that outlives its worker can touch the final file."""
    name = f"{WORK}/{_partition_file(output, pixel).relative_to(output.work)}"
    record = output.write_file(name, lambda path: write_parquet(pairs, path))
    return replace(record, path=partition_path(pixel))


def keep_pairs(output: Output, pixel: HealpixPixel) -> None:
    """Move pairs whose folds are final into their place, unless that was done before."""
    path = output.directory / partition_path(pixel)
    with storage_errors(path), partition_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _partition_file(output, pixel).replace(path)
        except FileNotFoundError:
            if not path.is_file():
                raise


def _partition_file(output: Output, pixel: HealpixPixel) -> Path:
    return output.work / "partitions" / f"{key_of(pixel)}.parquet"


def _edge_file(output: Output, pixel: HealpixPixel) -> Path:
    return output.work / "edges" / f"{key_of(pixel)}.arrow"


def _places(table: pa.Table) -> list[str]:
    names = (HEALPIX_COLUMN, "ra", "dec", *GAIA_IDS.values())
    return [name for name in names if name in table.schema.names]


def _links(targets: pa.Table, settings: FoldSettings) -> tuple[IntArray, IntArray]:
    return same_targets(
        targets["ra"].to_numpy(),
        targets["dec"].to_numpy(),
        targets[HEALPIX_COLUMN].to_numpy(),
        [id_values(targets[name]) for name in GAIA_IDS.values() if name in targets.schema.names],
        settings.radius_arcsec,
        settings.id_radius_arcsec,
    )
