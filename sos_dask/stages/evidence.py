"""Stage evidence: the pairs that all figures rest on, with the predictions of every method.

One row a pair fit for training; of more than a million those of some stars, chosen by their
numbers. It is made once: what follows reads the columns that it needs.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from sos_dask import corrections
from sos_dask.columns import floats32, matrix32
from sos_dask.errors import CatalogError, ModelError
from sos_dask.problem import features
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import HEALPIX_COLUMN, LABELS
from sos_dask.settings import Settings
from sos_dask.stages.parts import file_of, records, run_parts, unless_complete
from sos_dask.stars.folds import star_numbers
from sos_dask.stars.group import GAIA_IDS
from sos_dask.stats.bootstrap import N_GROUPS
from sos_dask.stats.density import knn_distance, robust_scale
from sos_dask.storage.artifact import Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog, partition_errors, write_parquet

VERSION = 1
EVIDENCE = "evidence.parquet"
HELD_OUT = "held_out.parquet"
MOST_PAIRS = 1_000_000
DIFFERENCES = tuple(f"{label}_diff" for label in LABELS)
SPARSE_SHARE = 0.05
N_NEIGHBOURS = 16
# The highest bits of a star's number decide whether it is kept, the lowest its fold.
_GROUP_BITS = np.uint64(20)
_NO_EVIDENCE = (HEALPIX_COLUMN, "fold", "ra", "dec", "position_epoch", *GAIA_IDS.values(),
                "separation_arcsec", "n_candidates", "quality")  # fmt: skip
_PROCESS_BYTES, _BYTES_A_PAIR = 300 << 20, 400


class EvidenceSettings(Settings):
    """Settings of the stage."""

    max_pairs: int = Field(
        MOST_PAIRS, gt=0, description="Of more pairs, those of some stars: about as many"
    )


def held_out_columns(method: str) -> tuple[str, ...]:
    """Name the predictions of the labels by models that were not trained on the pair's star."""
    return tuple(f"{label}_held_out_{method}" for label in LABELS)


def fitted_columns(method: str) -> tuple[str, ...]:
    """Name the predictions of the labels by the saved model of a method."""
    return tuple(f"{label}_fitted_{method}" for label in LABELS)


def evidence_recipe(
    pairs: str, models: Mapping[str, str], settings: EvidenceSettings | None = None
) -> Recipe:
    """Recipe of `make_evidence` for inputs of these fingerprints."""
    inputs = {"pairs": pairs, **{f"model.{method}": one for method, one in models.items()}}
    params = {"settings": (settings or EvidenceSettings()).as_json}
    return Recipe("evidence", VERSION, params, inputs)


def make_evidence(
    pairs: Catalog,
    models: Mapping[str, Path],
    directory: Path,
    settings: EvidenceSettings | None = None,
    *,
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Gather the pairs fit for training and what every method predicts of them in one table.

    Parameters
    ----------
    pairs : Catalog
        Output of crossmatch.
    models : mapping of str to Path
        Outputs of train for these pairs, by method, all validated in the same way.
    directory : Path
        Gets ``evidence.parquet``, in the order of the sky: ``fold``; ``star`` and ``target``,
        numbers that follow from the ids of the reference star and of the target; ``group`` of the
        star, for the bootstrap; ``held_out`` and ``trained``; ``sparse``; labels, differences and
        all other numbers of the pairs as float32, ``survey_ref``; predictions of every method
        (`held_out_columns`, null where a pair is not held out, and `fitted_columns`).
    settings : EvidenceSettings, optional

    Returns
    -------
    Manifest
        ``rows``: pairs in, pairs in the table. ``summary``: ``methods``.

    Raises
    ------
    CatalogError, PartitionError
        A column is missing, held-out pairs are damaged or those of other pairs, or the directory
        holds something else.
    ModelError
        A directory is not a trained model, or methods hold out different pairs.
    ClusterError
        The pairs are too many for a worker.
    """
    settings = settings or EvidenceSettings()
    pairs.require("use", "fold", "reference_star_id", *LABELS, *DIFFERENCES)
    prints = {method: model_manifest(path).fingerprint for method, path in models.items()}
    recipe = evidence_recipe(pairs.fingerprint, prints, settings)
    output = Output.prepare(directory, recipe, overwrite, [pairs.path, *models.values()])
    if output.complete:
        return output.load_manifest()
    cluster = cluster or Cluster()
    bytes_a_pair = _BYTES_A_PAIR + 24 * len(models)
    require_evidence(cluster, pairs, "evidence", _PROCESS_BYTES, bytes_a_pair)
    with unless_complete(output):
        part = _Part(output, pairs, models, settings)
        run_parts(output, "table", {"table": part}, _table_part, cluster, "evidence", report)
        (done,) = records(output, "table", ["table"])
        output.commit(
            Rows(pairs.n_rows, done["file"]["rows"], 0, done["dropped"]),
            (file_of(done),),
            {"methods": list(models)},
        )
    return output.load_manifest()


@contextmanager
def passing_evidence(
    pairs: Catalog,
    models: Mapping[str, Path],
    directory: Path,
    cluster: Cluster | None,
    report: Report,
) -> Iterator[Path]:
    """Make a table beside the output of a single step, which alone reads it."""
    path = directory.with_name(f".{directory.name}.evidence")
    try:
        make_evidence(pairs, models, path, overwrite=True, cluster=cluster, report=report)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def read_evidence(path: Path, columns: Sequence[str], more: Sequence[str] = ()) -> pa.Table:
    """Read columns of an evidence table.

    Parameters
    ----------
    path : Path
        Output of `make_evidence`.
    columns : sequence of str
    more : sequence of str
        Columns that are read where the pairs had them.

    Raises
    ------
    CatalogError
        Not such an output, or a column is missing.
    PartitionError
        The table cannot be read.
    """
    with partition_errors(path / EVIDENCE), pq.ParquetFile(path / EVIDENCE) as file:
        there = file.schema_arrow.names
        missing = [name for name in columns if name not in there]
        if missing:
            raise CatalogError(
                f"{path / EVIDENCE} has no column '{missing[0]}'",
                "Make it again of pairs that have it, with all models that are asked for.",
            )
        wanted = dict.fromkeys([*columns, *(name for name in more if name in there)])
        return file.read(list(wanted)).replace_schema_metadata()


def model_manifest(model: Path) -> Manifest:
    """Read the manifest of a trained model, whose files are compared with it."""
    manifest = Manifest.checked(model)
    if not manifest.recipe.stage.startswith("train-"):
        raise ModelError(
            f"{model} is not a trained model but an output of '{manifest.recipe.stage}'",
            "Give the outputs of 'sos-dask train'.",
        )
    return manifest


@dataclass(frozen=True)
class _Part:
    output: Output
    pairs: Catalog
    models: Mapping[str, Path]
    settings: EvidenceSettings


def _table_part(part: _Part) -> None:
    table, fold, kept = _kept_pairs(part.pairs, part.settings.max_pairs)
    differences = [floats32(table, name) for name in DIFFERENCES]
    labels = matrix32(table, LABELS)
    held_out = np.zeros(len(labels), dtype=np.bool_)
    predictions: dict[str, pa.Array] = {}
    for method, path in part.models.items():
        rows, predicted = held_out_pairs(path, fold, differences, kept)
        if predictions and not np.array_equal(np.flatnonzero(held_out), np.sort(rows)):
            raise ModelError(
                f"'{method}' holds out other pairs ({len(rows):,}) than "
                f"'{next(iter(part.models))}' ({np.count_nonzero(held_out):,})",
                "Train all methods with the same validation.",
            )
        held_out[rows] = True
        of_method = np.full((len(labels), len(LABELS)), np.nan, dtype=np.float32)
        of_method[rows] = predicted
        for name, values in zip(held_out_columns(method), of_method.T, strict=True):
            predictions[name] = pa.array(np.ascontiguousarray(values), mask=~held_out)
        fitted = corrections.load(path).predict(features(*labels.T))
        for name, values in zip(fitted_columns(method), fitted.T, strict=True):
            predictions[name] = pa.array(np.ascontiguousarray(values))
    # With k folds every pair is held out once, and the saved model is trained on all.
    trained = np.ones_like(held_out) if held_out.all() else ~held_out
    columns = {
        "held_out": pa.array(held_out),
        "trained": pa.array(trained),
        "sparse": pa.array(sparse_pairs(labels, trained)),
        **predictions,
    }
    for name, values in columns.items():
        table = table.append_column(name, values)
    record = part.output.write_file(EVIDENCE, partial(write_parquet, table))
    dropped = {"not fit for training": part.pairs.n_rows - len(fold)}
    if len(fold) > table.num_rows:
        dropped["of stars beyond a million pairs"] = len(fold) - table.num_rows
    part.output.put_record("table", "table", {"file": asdict(record), "dropped": dropped})


def _kept_pairs(pairs: Catalog, most: int) -> tuple[pa.Table, NDArray[np.int8], NDArray[np.bool_]]:
    """Pairs of the table; fold of all that are fit for training, and which of them are kept."""
    target = next((name for name in pairs.schema.names if name.startswith("target_")), None)
    ids = {"star": "reference_star_id", **({"target": target} if target else {})}
    left = {*_NO_EVIDENCE, *ids.values()}
    numbers = [f.name for f in pairs.schema if f.name not in left and _is_number(f.type)]
    more = pairs.columns(["survey_ref"])
    limit = np.uint64(min(most / max(pairs.n_rows, 1), 1.0) * (2**64 - 2048))
    fold, kept = [np.empty(0, np.int8)], [np.empty(0, np.bool_)]
    tables = []
    names = ["use", "fold", *ids.values(), *numbers, *more]
    empty = pa.schema([pairs.schema.field(name) for name in names]).empty_table()
    for read in itertools.chain([empty], (pairs.read(pixel, names) for pixel in pairs.pixels)):
        read = read.filter(read["use"])
        stars = {name: star_numbers(read[column], 0) for name, column in ids.items()}
        inside = stars["star"] < limit if pairs.n_rows > most else np.ones(len(read), np.bool_)
        columns = {"fold": read["fold"].cast(pa.int8()), **stars}
        columns["group"] = ((stars["star"] >> _GROUP_BITS) % np.uint64(N_GROUPS)).astype(np.int16)
        columns |= {name: read[name].cast(pa.float32()) for name in numbers}
        columns |= {name: read[name] for name in more}
        fold.append(read["fold"].to_numpy())
        kept.append(inside)
        tables.append(pa.table(columns).filter(pa.array(inside)))
    return pa.concat_tables(tables), np.concatenate(fold), np.concatenate(kept)


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_floating(kind) or types.is_integer(kind) or types.is_decimal(kind))


def sparse_pairs(labels: NDArray[np.float32], trained: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell where the training pairs are as thin as around the thinnest 5 % of themselves.

    Parameters
    ----------
    labels : ndarray of float32, shape (n, n_labels)
    trained : ndarray of bool, shape (n,)

    Returns
    -------
    ndarray of bool, shape (n,)
        True where a label is not known.
    """
    x = features(*labels.T)
    known = np.isfinite(x).all(axis=1)
    sample = known & trained
    if not sample.any():
        return np.ones(len(x), dtype=np.bool_)
    center, scale = robust_scale(x[sample])
    z = (x - center) / scale
    distance = np.full(len(x), np.inf)
    # A training pair is its own first neighbour.
    distance[sample] = knn_distance(z[sample], z[sample], N_NEIGHBOURS + 1)
    others = known & ~trained
    if others.any():
        distance[others] = knn_distance(z[sample], z[others], N_NEIGHBOURS)
    return np.asarray(distance > np.quantile(distance[sample], 1 - SPARSE_SHARE))


# Until all stages read the table.


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
