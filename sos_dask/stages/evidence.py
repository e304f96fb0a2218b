"""Stage evidence: the pairs that all figures rest on, with the predictions of every method.

One row a pair fit for training; of more than a million those of some stars, chosen by their
numbers. It is made once: what follows reads the columns that it needs.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from sos_dask import corrections
from sos_dask.columns import floats32, key_numbers, matrix32
from sos_dask.errors import CatalogError, ModelError, SosError
from sos_dask.problem import DEFAULT, Problem
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import HEALPIX_COLUMN, LABELS
from sos_dask.settings import Settings
from sos_dask.stages.base import Made, Role, Run, S, Stage, unless_complete
from sos_dask.stars.group import GAIA_IDS
from sos_dask.stats.bootstrap import groups_of
from sos_dask.stats.numbers import find_sparse
from sos_dask.storage.artifact import Output, partition_errors, write_parquet
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import WORK, FileRecord, Manifest, Recipe, Rows

EVIDENCE = "evidence.parquet"
HELD_OUT = "held_out.parquet"
MOST_PAIRS = 1_000_000
DIFFERENCES = tuple(f"{label}_diff" for label in LABELS)
_NO_EVIDENCE = (HEALPIX_COLUMN, "fold", "ra", "dec", "position_epoch", *GAIA_IDS.values(),
                "separation_arcsec", "n_candidates", "quality")  # fmt: skip
_PROCESS_BYTES, _BYTES_A_PAIR = 300 << 20, 400


class EvidenceSettings(Settings):
    """Settings of the stage."""

    problem: Problem = Field(DEFAULT, description="Labels, and inputs of the models")
    max_pairs: int = Field(
        MOST_PAIRS, gt=0, description="Of more pairs, those of some stars: about as many"
    )


def held_out_columns(method: str, labels: Sequence[str] = LABELS) -> tuple[str, ...]:
    """Name the predictions of the labels by models that were not trained on the pair's star."""
    return tuple(f"{label}_held_out_{method}" for label in labels)


def fitted_columns(method: str, labels: Sequence[str] = LABELS) -> tuple[str, ...]:
    """Name the predictions of the labels by the saved model of a method."""
    return tuple(f"{label}_fitted_{method}" for label in labels)


class Evidence(Stage[EvidenceSettings]):
    """Gather the pairs fit for training and what every method predicts of them in one table.

    One row a pair, in the order of the sky: ``fold``; ``star`` and ``target``, numbers that follow
    from the ids of the reference star and of the target; ``group`` of the star, for the bootstrap;
    labels, differences and all other numbers of the pairs as float32; ``survey_ref``; ``held_out``,
    ``trained`` and ``sparse``; the predictions of every method (`held_out_columns`, null where a
    pair is not held out, and `fitted_columns`).
    """

    name = "evidence"
    version = 1
    Settings = EvidenceSettings
    roles = (
        Role("pairs", "Pairs of target and reference."),
        Role("model", "Corrections trained on them.", "output", optional=True, many=True),
    )

    @property
    def methods(self) -> list[str]:
        """Methods of the models, sorted."""
        return sorted(name.removeprefix("model.") for name in self.named("model"))

    def check(self) -> None:
        """Refuse pairs that lack a column, and models that are none."""
        problem = self.settings.problem
        needed = [*problem.names, *problem.columns, *(label.diff for label in problem.labels)]
        self.catalog("pairs").require("use", "fold", "reference_star_id", *needed)
        for name in self.named("model"):
            require_model(self.path(name))

    def make(self, run: Run) -> Made:
        """Make the table in one task."""
        pairs = self.catalog("pairs")
        bytes_a_pair = _BYTES_A_PAIR + 24 * len(self.methods)
        most = self.settings.max_pairs
        require_evidence(run.cluster, pairs, self.name, _PROCESS_BYTES, bytes_a_pair, most)
        (done,) = run.parts("table", {"table": None}, self.table)
        run.files.append(FileRecord(**done["file"]))
        n_left_out = pairs.n_rows - done["n_fit"]
        dropped = {"not fit for training": n_left_out}
        if done["n_fit"] > done["file"]["rows"]:
            dropped["of stars beyond a million pairs"] = done["n_fit"] - done["file"]["rows"]
        rows = Rows(pairs.n_rows, done["file"]["rows"], 0, dropped)
        return rows, {"methods": self.methods, "problem": self.settings.problem.as_json}

    def table(self, output: Output, key: str, item: None) -> dict[str, Any]:
        """Write the table."""
        table, fold, kept = _kept_pairs(self.catalog("pairs"), self.settings.max_pairs)
        problem = self.settings.problem
        x, differences = problem.matrix(table), problem.differences(table)
        held_out: NDArray[np.bool_] | None = None
        predictions: dict[str, Any] = {}
        for method in self.methods:
            model = self.path(f"model.{method}")
            rows, predicted = held_out_pairs(model, fold, list(differences.T), kept, problem)
            mine = np.zeros(len(x), dtype=np.bool_)
            mine[rows] = True
            held_out = mine if held_out is None else held_out
            if not np.array_equal(held_out, mine):
                raise ModelError(
                    f"'{method}' holds out other pairs ({len(rows):,}) than '{self.methods[0]}' "
                    f"({np.count_nonzero(held_out):,})",
                    "Train all methods with the same validation.",
                )
            of_method = np.full_like(differences, np.nan)
            of_method[rows] = predicted
            for name, values in zip(
                held_out_columns(method, problem.names), of_method.T, strict=True
            ):
                predictions[name] = pa.array(np.ascontiguousarray(values), mask=~held_out)
            fitted = _predicted(model, problem, x)
            names = fitted_columns(method, problem.names)
            predictions |= dict(zip(names, map(np.ascontiguousarray, fitted.T), strict=True))
        if held_out is None:
            held_out = np.zeros(len(x), dtype=np.bool_)
        # With k folds every pair is held out once, and the saved model is trained on all.
        trained = np.ones_like(held_out) if held_out.all() else ~held_out
        sparse = sparse_pairs(x, trained)
        columns = {"held_out": held_out, "trained": trained, "sparse": sparse, **predictions}
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values))
        record = output.write_file(EVIDENCE, partial(write_parquet, table))
        return {"file": asdict(record), "n_fit": len(fold)}


def _predicted(model: Path, problem: Problem, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Predictions of a saved model, which is of this problem."""
    correction = corrections.load(model)
    if correction.problem != problem:
        raise ModelError(
            f"{model} predicts {', '.join(correction.problem.names)} from "
            f"{', '.join(correction.problem.features)}: the table is to have "
            f"{', '.join(problem.names)} from {', '.join(problem.features)}",
            "Train all methods for the same labels and inputs.",
        )
    return correction.predict(x)


class OfModel(Stage[S]):
    """Stage on the evidence of one model.

    Its table follows from pairs and models: only the version of the table is part of the recipe, so
    that a further method does not make again what depends on the chosen model alone.
    """

    @classmethod
    def recipe(cls, settings: S, fingerprints: Mapping[str, str]) -> Recipe:
        """Recipe with the version of the table of evidence instead of its fingerprint."""
        params = {"settings": settings.as_json, "evidence_version": Evidence.version}
        inputs = {name: value for name, value in fingerprints.items() if name != "evidence"}
        return Recipe(cls.name, cls.version, params, inputs)

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the inputs, and what else than the default the evidence was made with."""
        prints = super().fingerprints()
        if not self.known:
            given = self.manifest("evidence").recipe.params["settings"]
            most = EvidenceSettings.model_fields["max_pairs"].default
            if given["max_pairs"] != most:
                prints["evidence_pairs"] = str(given["max_pairs"])
        return prints


def require_models_of(stage: Stage[Any]) -> None:
    """Refuse evidence that does not have the predictions of the models that a stage gets.

    Raises
    ------
    ModelError
        Naming the model.
    """
    inputs = stage.manifest("evidence").recipe.inputs
    made_of = {value for name, value in inputs.items() if name.startswith("model.")}
    for name in stage.named("model"):
        if stage.manifest(name).fingerprint not in made_of:
            raise ModelError(
                f"{stage.path('evidence')} was made without the model {stage.path(name)}",
                "Make the evidence of these pairs and all models that are asked for.",
            )


def on_pairs(
    stage: type[Stage[S]],
    pairs: Catalog,
    models: Mapping[str, Path],
    directory: Path,
    settings: S | None,
    more: Mapping[str, Catalog | Path],
    *,
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Run a stage by itself: its evidence is an intermediate product of the output.

    Parameters
    ----------
    stage : type of Stage
        With the input ``evidence``.
    pairs : Catalog
    models : mapping of str to Path
        Trained on them, by method.
    directory : Path
        Of the stage.
    settings : Settings
    more : mapping of str to Catalog or Path
        Its other inputs.
    """
    named = {f"model.{method}": path for method, path in models.items()}
    evidence = Evidence({"pairs": pairs, **named})
    path = directory.absolute() / WORK / "evidence"
    one = stage({"evidence": path, **more}, settings)
    evidence.check()
    one.check()
    prints = {
        name: x.fingerprint if isinstance(x, Catalog) else Manifest.load(x).fingerprint
        for name, x in more.items()
    }
    recipe = Evidence.recipe(evidence.settings, evidence.fingerprints())
    prints["evidence"] = recipe.fingerprint
    inputs = [pairs.path, *models.values(), *(one.path(name) for name in more)]
    output = Output.prepare(directory, stage.recipe(one.settings, prints), overwrite, inputs)
    if output.complete:
        return output.load_manifest()
    with unless_complete(output):
        evidence.run(path, cluster=cluster, report=report)
    try:
        return one.run(directory, cluster=cluster, report=report)
    except SosError:  # what is refused leaves nothing; what is killed goes on with its evidence
        if not output.complete:
            shutil.rmtree(path, ignore_errors=True)
            output.release()
        raise


def columns_of(path: Path) -> list[str]:
    """List the columns of an evidence table."""
    with partition_errors(path / EVIDENCE):
        return list(pq.read_schema(path / EVIDENCE).names)


def problem_of(path: Path) -> Problem:
    """Read the problem of an evidence table."""
    return Problem(**Manifest.load(path).summary["problem"])


def read_evidence(path: Path, columns: Sequence[str], more: Sequence[str] = ()) -> pa.Table:
    """Read columns of an evidence table.

    Parameters
    ----------
    path : Path
        Output of `Evidence`.
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


def require_model(directory: Path) -> Manifest:
    """Read the manifest of a trained model; `ModelError` for another output."""
    manifest = Manifest.load(directory)
    if not manifest.recipe.stage.startswith("train-"):
        raise ModelError(
            f"{directory} is not a trained model but an output of '{manifest.recipe.stage}'",
            "Give the outputs of 'sos-dask train'.",
        )
    return manifest


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
        stars = {name: key_numbers(read[column], 0) for name, column in ids.items()}
        inside = stars["star"] < limit if pairs.n_rows > most else np.ones(len(read), np.bool_)
        columns = {"fold": read["fold"].cast(pa.int8()), **stars}
        columns["group"] = groups_of(stars["star"]).astype(np.int16)
        columns |= {name: read[name].cast(pa.float32()) for name in numbers}
        columns |= {name: read[name] for name in more}
        fold.append(read["fold"].to_numpy())
        kept.append(inside)
        tables.append(pa.table(columns).filter(pa.array(inside)))
    return pa.concat_tables(tables), np.concatenate(fold), np.concatenate(kept)


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return any(test(kind) for test in (types.is_floating, types.is_integer, types.is_decimal))


def sparse_pairs(x: NDArray[np.float32], trained: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell where the training pairs are as thin as around the thinnest 5 % of themselves.

    Parameters
    ----------
    x : ndarray of float32, shape (n, k)
        Inputs.
    trained : ndarray of bool, shape (n,)

    Returns
    -------
    ndarray of bool, shape (n,)
        True where an input is not known.
    """
    known = np.isfinite(x).all(axis=1)
    sample = known & trained
    sparse = np.ones(len(x), dtype=np.bool_)
    if sample.any():
        sparse[sample], sparse[known & ~trained] = find_sparse(x[sample], x[known & ~trained])
    return sparse


def require_rows(run: Run, evidence: Path, process_bytes: int, bytes_a_pair: int) -> None:
    """Refuse a table that does not fit into a worker, or into this process without one.

    Raises
    ------
    ClusterError
    """
    n_pairs = Manifest.load(evidence).rows.n_out
    what = f"{run.output.recipe.stage}: {n_pairs:,} pairs of {evidence}"
    _require_bytes(run.cluster, process_bytes + bytes_a_pair * n_pairs, what)


def _require_bytes(cluster: Cluster, n_bytes: int, what: str) -> None:
    cluster.require_memory(n_bytes, what)
    if cluster.client is None:
        cluster.require_driver_memory(n_bytes, what)


def require_evidence(
    cluster: Cluster,
    pairs: Catalog,
    step: str,
    process_bytes: int,
    bytes_a_pair: int,
    most: int = MOST_PAIRS,
) -> None:
    """Refuse a stage whose pairs do not fit into a worker, or into this process without one.

    Raises
    ------
    ClusterError
    """
    # Of a pair that is left out it holds 16 bytes for a moment: its fold, whether it is kept, and
    # its place among those held out.
    n_pairs = min(pairs.n_rows, most)
    n_bytes = process_bytes + bytes_a_pair * n_pairs + 16 * pairs.n_rows
    _require_bytes(cluster, n_bytes, f"{step}: {n_pairs:,} pairs of {pairs.path}")


def single_observations(
    table: pa.Table, rows: NDArray[np.int64], least: int = 1000
) -> NDArray[np.bool_]:
    """Tell which pairs say the error of one observation, because observations are corrected.

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
    problem: Problem = DEFAULT,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find the held-out pairs of a model among pairs, and its predictions of them.

    Held-out pairs are in the order of their folds and, inside, of the sky; that they are these very
    pairs, by their differences (one array a label), is checked. ``fold`` is that of all pairs fit
    for training, in the order of the sky; only those that are ``kept`` are asked for.
    """
    path = model / HELD_OUT
    predictions = [label.delta for label in problem.labels]
    names = [label.diff for label in problem.labels]
    kept = np.ones(len(fold), dtype=np.bool_) if kept is None else kept
    with partition_errors(path), pq.ParquetFile(path) as file:
        held_out = file.read(["fold"])["fold"].to_numpy()
        rows = np.flatnonzero(np.isin(fold, np.unique(held_out)))
        rows = rows[np.argsort(fold[rows], kind="stable")]
        same = np.array_equal(fold[rows], held_out)
        if same:
            wanted, first, tables = kept[rows], 0, []
            for batch in file.iter_batches(columns=[*names, *predictions]):
                inside = pa.array(wanted[first : first + batch.num_rows])
                tables.append(pa.Table.from_batches([batch]).filter(inside))
                first += batch.num_rows
            table = pa.concat_tables(tables)
            rows = (np.cumsum(kept) - 1)[rows[wanted]]
            same = all(
                np.array_equal(mine[rows], floats32(table, name), equal_nan=True)
                for mine, name in zip(differences, names, strict=True)
            )
    if not same:
        raise CatalogError(
            f"{path} does not hold the pairs that are asked for",
            "Give a model that was trained on these pairs.",
        )
    return rows, matrix32(table, predictions)
