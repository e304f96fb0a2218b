"""What all stages share: finished parts are skipped, rings around partitions are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask.artifact import FileRecord, Manifest, Output, Rows, atomic_path
from sos_dask.catalog import Catalog, partition_errors, write_catalog_metadata
from sos_dask.cluster import Cluster, Report
from sos_dask.columns import floats32, matrix32
from sos_dask.errors import CatalogError, StorageError, SurveyError
from sos_dask.folds import star_numbers
from sos_dask.healpix import MAX_ORDER, HealpixPixel
from sos_dask.schema import LABELS

T = TypeVar("T")
HELD_OUT = "held_out.parquet"
MOST_PAIRS = 1_000_000
DIFFERENCES = tuple(f"{label}_diff" for label in LABELS)
GAIA_IDS = {"dr3": "gaia_dr3_source_id", "dr2": "gaia_dr2_source_id"}


def key_of(pixel: HealpixPixel) -> str:
    """Name of a partition's record."""
    return f"{pixel.order}-{pixel.pixel}"


def run_parts(
    output: Output,
    kind: str,
    parts: Mapping[str, T],
    function: Callable[[T], None],
    cluster: Cluster,
    step: str,
    report: Report,
) -> None:
    """Run ``function`` on the parts without a record; it writes the record of its part last."""
    missing = [part for key, part in parts.items() if output.get_record(kind, key) is None]
    if missing:
        cluster.run(function, missing, step, report)
    else:
        report(step, len(parts), len(parts))


# Measured with partitions of 68,000 to 929,000 rows, in processes of their own and in workers of a
# rebuild, and a tenth more: MiB of a worker's process in a stage, and what it holds at its peak
# beside that, in bytes of its partition. Compiled loops are 115 MiB, 165 where they are compiled.
_NEEDS = {
    "ingest": (220, 5.0),
    "dedupe": (320, 4.0),
    "crossmatch": (220, 4.0),
    "coverage": (230, 3.5),
    "apply": (200, 5.5),
}
_OTHER_NEEDS = (230, 6.0)


def require_memory(cluster: Cluster, catalog: Catalog, step: str, model_bytes: int = 0) -> None:
    """Refuse a stage whose largest partition does not fit into a worker.

    Parameters
    ----------
    step : str
        The stage.
    model_bytes : int
        What every worker holds beside its partition.

    Raises
    ------
    ClusterError
        Naming the partition, what it needs and what a worker has.
    """
    if not catalog.pixels or cluster.memory_limit_bytes is None:
        return
    pixel, n_bytes = catalog.largest_partition()
    what = f"partition {pixel} of {catalog.path} ({catalog.partition_rows(pixel):,} rows)"
    cluster.require_memory(needed_bytes(step, n_bytes) + model_bytes, f"{step}: {what}")


def require_pixel(
    cluster: Cluster,
    step: str,
    name: str,
    pixels: Sequence[HealpixPixel],
    histogram: NDArray[np.int64],
    n_bytes: int,
) -> None:
    """Refuse a stage that makes partitions, one of which would not fit into a worker.

    Parameters
    ----------
    name : str
        Of the catalog that is made.
    pixels : sequence of HealpixPixel
        Its partitions, at least one.
    histogram : ndarray of int64, shape (12 * 4**order,)
        Rows a cell of the sky.
    n_bytes : int
        Of all rows in memory.

    Raises
    ------
    ClusterError
        As `require_memory`.
    """
    order = (len(histogram) // 12).bit_length() // 2
    shift = 2 * (MAX_ORDER - order)
    rows = [int(histogram[pixel.first >> shift : pixel.stop >> shift].sum()) for pixel in pixels]
    largest = int(np.argmax(rows))
    share = n_bytes * rows[largest] // max(sum(rows), 1)
    what = f"partition {pixels[largest]} of {name} ({rows[largest]:,} rows)"
    cluster.require_memory(needed_bytes(step, share), f"{step}: {what}")


def catalog_bytes(catalog: Catalog) -> int:
    """What all rows of a catalog take in memory, by its largest partition."""
    if not catalog.pixels:
        return 0
    pixel, n_bytes = catalog.largest_partition()
    return n_bytes * catalog.n_rows // max(catalog.partition_rows(pixel), 1)


def needed_bytes(step: str, n_bytes: int) -> int:
    """What a worker needs in a stage for a partition of so many bytes."""
    process_mib, copies = _NEEDS.get(step, _OTHER_NEEDS)
    return int((process_mib << 20) + copies * n_bytes)


def finished(output: Output, kind: str, keys: Sequence[str]) -> bool:
    """Whether all parts have a record."""
    return all(output.get_record(kind, key) is not None for key in keys)


def records(output: Output, kind: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Records of all parts in order.

    Raises
    ------
    StorageError
        One is missing: it was removed meanwhile, or the workers run another version.
    """
    found = []
    for key in keys:
        record = output.get_record(kind, key)
        if record is None:
            raise StorageError(
                f"{output.work}: the record '{kind}/{key}' of a finished part is missing",
                "Run again; driver and workers must run the same version.",
            )
        found.append(record)
    return found


@contextmanager
def unless_complete(output: Output) -> Iterator[None]:
    """Ignore an error that came only because another process completed the same output.

    A run that failed before it made anything leaves no trace of itself; nor does one whose survey
    files were refused, since what was made of them is of no use.
    """
    try:
        yield
    except SurveyError:
        if not output.complete:
            output.discard()
            raise
        output.tidy()
    except Exception:
        if not output.complete:
            output.release()
            raise
        output.tidy()


def manifest_of(directory: Path, stage: str) -> Manifest:
    """Manifest of a finished output of a stage; `CatalogError` for that of another one."""
    manifest = Manifest.load(directory)
    if manifest.recipe.stage != stage:
        raise CatalogError(
            f"{directory} is no output of '{stage}' but of '{manifest.recipe.stage}'"
        )
    return manifest


def file_of(record: Mapping[str, Any]) -> FileRecord:
    """The `FileRecord` inside a part's record."""
    return FileRecord(**record["file"])


def commit_catalog(
    output: Output,
    name: str,
    parts: Sequence[tuple[HealpixPixel, Mapping[str, Any]]],
    schema: pa.Schema,
    rows: Rows,
    summary: Mapping[str, Any],
    extra_files: Sequence[FileRecord] = (),
    properties: Mapping[str, str] | None = None,
    catalog_type: str = "object",
) -> Manifest:
    """Write a catalog's own files and its manifest; partitions without rows are left out."""
    kept = [(pixel, record) for pixel, record in parts if record["file"] is not None]
    files = [file_of(record) for _, record in kept]
    metadata = write_catalog_metadata(
        output,
        name,
        [pixel for pixel, _ in kept],
        schema,
        sum(record.rows for record in files),
        catalog_type=catalog_type,
        extra=properties,
    )
    return output.commit(rows, (*files, *metadata, *extra_files), summary)


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
    Stars are chosen by their numbers (`sos_dask.folds`), so that every stage has the same.

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


def write_piece(path: Path, table: pa.Table) -> None:
    """Keep an intermediate table as an Arrow file, written atomically."""
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def read_piece(path: Path) -> pa.Table:
    """An intermediate table, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def copied(rows: pa.Table) -> pa.Table:
    """Rows of a memory-mapped piece in memory of their own, so that the piece is let go.

    Of a mapped file far more than the rows themselves counts as memory of the process: up to 2 MB
    around each place that is looked at, in every column of every piece.
    """
    return pa.concat_tables([rows, rows.slice(0, 0)]).combine_chunks()
