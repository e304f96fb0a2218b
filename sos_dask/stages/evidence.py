"""Pairs that statements rest on: all, or those of some stars, and what was held out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask.columns import floats32, matrix32
from sos_dask.errors import CatalogError
from sos_dask.run.cluster import Cluster
from sos_dask.schema import LABELS
from sos_dask.stars.folds import star_numbers
from sos_dask.storage.catalog import Catalog, partition_errors

HELD_OUT = "held_out.parquet"
MOST_PAIRS = 1_000_000
DIFFERENCES = tuple(f"{label}_diff" for label in LABELS)


def training_pairs(pairs: Catalog, columns: Sequence[str]) -> pa.Table:
    """``use`` and columns of the pairs fit for training, in the order of the sky."""
    tables = [pa.schema([pairs.schema.field(name) for name in ("use", *columns)]).empty_table()]
    for pixel in pairs.pixels:
        table = pairs.read(pixel, ["use", *columns])
        tables.append(table.filter(table["use"]))
    return pa.concat_tables(tables)


@dataclass(frozen=True)
class Evidence:
    """Pairs that statements on a correction rest on: see `evidence`.

    Parameters
    ----------
    table : pyarrow.Table
        In the order of the sky.
    fold : ndarray of int8, shape (n,)
        Of all pairs fit for training.
    kept : ndarray of bool, shape (n,)
        Which of them are in the table.
    """

    table: pa.Table
    fold: NDArray[np.int8]
    kept: NDArray[np.bool_]

    def held_out(self, model: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """`held_out_pairs` of a model among the rows of the table, which has their differences."""
        differences = [floats32(self.table, name) for name in DIFFERENCES]
        return held_out_pairs(model, self.fold, differences, self.kept)

    def dropped(self, pairs: Catalog) -> dict[str, int]:
        """Pairs that are not in the table, by reason."""
        dropped = {"not fit for training": pairs.n_rows - len(self.fold)}
        if len(self.fold) > self.table.num_rows:
            dropped["of stars beyond a million pairs"] = len(self.fold) - self.table.num_rows
        return dropped


def require_evidence(
    cluster: Cluster, pairs: Catalog, step: str, process_bytes: int, bytes_a_pair: int
) -> None:
    """Refuse a stage whose pairs do not fit into a worker, or into this process without one.

    Parameters
    ----------
    step : str
        The stage.
    process_bytes, bytes_a_pair : int
        Of a process of the stage, and of a pair in it. Of a pair that is left out it holds 16 bytes
        for a moment: its fold, whether it is kept, and its place among those held out.

    Raises
    ------
    ClusterError
    """
    n_pairs = min(pairs.n_rows, MOST_PAIRS)
    n_bytes = process_bytes + bytes_a_pair * n_pairs + 16 * pairs.n_rows
    what = f"{step}: {n_pairs:,} pairs of {pairs.path}"
    cluster.require_memory(n_bytes, what)
    if cluster.client is None:
        cluster.require_driver_memory(n_bytes, what)


def evidence(pairs: Catalog, columns: Sequence[str], most: int | None = None) -> Evidence:
    """Pairs fit for training, or the pairs of some of their stars where there are very many.

    What is said of a million pairs is as sure as can be told; more would only have to be held.
    Stars are chosen by their numbers (`sos_dask.stars.folds`), so that every stage has the same.

    Parameters
    ----------
    pairs : Catalog
        Output of crossmatch.
    columns : sequence of str
        Of the table.
    most : int, optional
        Pairs of a catalog above which some are left out, so that about as many stay; default
        `MOST_PAIRS`.
    """
    most = most or MOST_PAIRS
    tables = [pa.schema([pairs.schema.field(name) for name in columns]).empty_table()]
    fold, kept = [np.empty(0, np.int8)], [np.empty(0, np.bool_)]
    limit = np.uint64(min(most / max(pairs.n_rows, 1), 1.0) * (2**64 - 2048))
    thinned = pairs.n_rows > most
    needed = {*columns, "use", "fold", *(["reference_star_id"] if thinned else [])}
    for pixel in pairs.pixels:
        table = pairs.read(pixel, sorted(needed))
        table = table.filter(table["use"])
        inside = np.ones(table.num_rows, dtype=np.bool_)
        fold.append(table["fold"].to_numpy())
        if thinned:
            inside = star_numbers(table["reference_star_id"], 0) < limit
            table = table.filter(pa.array(inside))
        kept.append(inside)
        tables.append(table.select(list(columns)))
    return Evidence(pa.concat_tables(tables), np.concatenate(fold), np.concatenate(kept))


def single_observations(
    table: pa.Table, rows: NDArray[np.int64], least: int = 1000
) -> NDArray[np.bool_]:
    """Which pairs tell of the error of one observation, because observations are corrected.

    Those whose target was observed once where there are as many among the rows, else all.
    """
    if "n_obs" in table.schema.names:
        single = np.asarray(table["n_obs"].to_numpy() == 1)
        if np.count_nonzero(single[rows]) >= least:
            return single
    return np.ones(table.num_rows, dtype=np.bool_)


def held_out_pairs(
    model: Path,
    fold: NDArray[np.int8],
    differences: Sequence[NDArray[np.float32]],
    kept: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows of a model's held-out pairs among the pairs, and their predictions.

    Held-out pairs are in the order of their folds and, inside, of the sky; that they are these very
    pairs is checked.

    Parameters
    ----------
    model : Path
        Output of train.
    fold : ndarray of int8, shape (n,)
        Of the pairs fit for training, in the order of the sky.
    differences : sequence of ndarray of float32, shape (k,)
        One a label, of the pairs that are kept.
    kept : ndarray of bool, shape (n,), optional
        Only these pairs are asked for, k of them; default all.

    Returns
    -------
    rows : ndarray of int64, shape (m,)
        Among the pairs that are kept.
    predicted : ndarray of float32, shape (m, n_labels)

    Raises
    ------
    PartitionError
        The file of held-out pairs cannot be read.
    CatalogError
        It holds other pairs.
    """
    path = model / HELD_OUT
    predictions = [f"{label}_delta" for label in LABELS]
    kept = np.ones(len(fold), dtype=np.bool_) if kept is None else kept
    with partition_errors(path), pq.ParquetFile(path) as file:
        held_out = file.read(["fold"])["fold"].to_numpy()
        rows = np.flatnonzero(np.isin(fold, np.unique(held_out)))
        rows = rows[np.argsort(fold[rows], kind="stable")]
        same = np.array_equal(fold[rows], held_out)
        if same:
            wanted, first, tables = kept[rows], 0, []
            for batch in file.iter_batches(columns=[*DIFFERENCES, *predictions]):
                inside = pa.array(wanted[first : first + batch.num_rows])
                tables.append(pa.Table.from_batches([batch]).filter(inside))
                first += batch.num_rows
            table = pa.concat_tables(tables)
            rows = (np.cumsum(kept) - 1)[rows[wanted]]
            same = all(
                np.array_equal(mine[rows], floats32(table, name), equal_nan=True)
                for mine, name in zip(differences, DIFFERENCES, strict=True)
            )
    if not same:
        raise CatalogError(
            f"{path} does not hold the pairs that are asked for",
            "Give a model that was trained on these pairs.",
        )
    return rows, matrix32(table, predictions)
