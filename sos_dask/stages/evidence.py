"""Stage evidence: the pairs that all figures rest on, with the predictions of every method.

One row a pair fit for training; of more than a million those of some stars, chosen by their
numbers. It is made once: stages on it (`OnEvidence`) read the columns that they need.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from sos_dask import corrections
from sos_dask.columns import BoolArray, Float32Array, IntArray, floats32, key_numbers, matrix32
from sos_dask.errors import CatalogError, ModelError, SosError
from sos_dask.problem import DEFAULT, Problem
from sos_dask.run.cluster import Cluster
from sos_dask.schema import HEALPIX_COLUMN, LABELS
from sos_dask.settings import Settings
from sos_dask.stages.base import Made, Role, Run, S, Stage, fingerprint_of
from sos_dask.stages.reference import common_stars
from sos_dask.stars.group import GAIA_IDS
from sos_dask.stats.bootstrap import groups_of
from sos_dask.stats.numbers import find_sparse
from sos_dask.storage.artifact import Output, partition_errors, write_parquet
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import FileRecord, Manifest, Recipe, Rows
from sos_dask.storage.objects import local, remove_tree

EVIDENCE, HELD_OUT = "evidence.parquet", "held_out.parquet"
_LEFT = (HEALPIX_COLUMN, "fold", "ra", "dec", "position_epoch", *GAIA_IDS.values(),
         "separation_arcsec", "n_candidates", "quality")  # fmt: skip
_NUMBERS = pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal


def held_out_columns(method: str, labels: Sequence[str] = LABELS) -> tuple[str, ...]:
    """Name the predictions of the labels by models that were not trained on the pair's star."""
    return tuple(f"{label}_held_out_{method}" for label in labels)


def fitted_columns(method: str, labels: Sequence[str] = LABELS) -> tuple[str, ...]:
    """Name the predictions of the labels by the saved model of a method."""
    return tuple(f"{label}_fitted_{method}" for label in labels)


class EvidenceSettings(Settings):
    """Settings of the stage."""

    problem: Problem = Field(
        DEFAULT, description="Labels, and inputs of the models; by default theirs"
    )
    max_pairs: int = Field(
        1_000_000, gt=0, description="Of more pairs, those of some stars: about as many"
    )


class Evidence(Stage[EvidenceSettings]):
    """Gather the pairs fit for training and what every method predicts of them in one table.

    One row a pair, in the order of the sky: ``fold``; ``star`` and ``target``, numbers that follow
    from the ids of the reference star and of the target; ``group`` of the star, for the bootstrap;
    labels, differences and all other numbers of the pairs as float32; ``survey_ref``; ``held_out``,
    ``trained`` and ``sparse``; the predictions of every method (`held_out_columns`, null where a
    pair is not held out, and `fitted_columns`).
    """

    name = "evidence"
    version = 2
    Settings = EvidenceSettings
    roles = (
        Role("pairs", "Pairs of target and reference."),
        Role("model", "Corrections trained on them.", "output", optional=True, many=True),
    )

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        if "problem" not in self.settings.model_fields_set and self.named("model"):
            self.settings = self.settings.but(problem=self._problem_of(self.named("model")[0]))

    def _problem_of(self, name: str) -> Problem:
        return Problem(**self.manifest(name).recipe.params.get("settings", {}).get("problem", {}))

    def check(self) -> None:
        """Refuse pairs that lack a column, and outputs that are no models."""
        problem = self.settings.problem
        needed = [*problem.names, *problem.columns, *(label.diff for label in problem.labels)]
        self.catalog("pairs").require("use", "fold", "reference_star_id", *needed)
        for name in self.named("model"):
            path, made = self.path(name), self.manifest(name).recipe
            if not made.stage.startswith("train-"):
                raise ModelError(
                    f"{path} is not a trained model but an output of '{made.stage}'",
                    "Give the outputs of 'sos-dask train'.",
                )
            if (theirs := self._problem_of(name)) != problem:
                raise ModelError(
                    f"{path} predicts {', '.join(theirs.names)} from {', '.join(theirs.features)}: "
                    f"the table is to have {', '.join(problem.names)} from "
                    f"{', '.join(problem.features)}",
                    "Train all methods for the same labels and inputs.",
                )

    def make(self, run: Run) -> Made:
        """Make the table in one task."""
        pairs, methods = self.catalog("pairs"), self.many("model")
        n_most = min(pairs.n_rows, self.settings.max_pairs)
        # Of a pair that is left out the task holds for a moment its fold, whether it is kept, its
        # place among those held out, and its row there.
        left = (16 + 8 * len(self.settings.problem.labels)) * pairs.n_rows
        n_bytes = (300 << 20) + (400 + 24 * len(methods)) * n_most + left
        _require_bytes(run.cluster, n_bytes, f"{self.name}: {n_most:,} pairs of {pairs.path}")
        (done,) = run.parts("table", {"table": None}, self.table)
        run.files.append(FileRecord(**done["file"]))
        n_kept, n_fit = run.files[-1].rows, done["n_fit"]
        dropped = {"not fit for training": pairs.n_rows - n_fit}
        if n_fit > n_kept:
            dropped["of stars beyond a million pairs"] = n_fit - n_kept
        summary = {"methods": methods, "problem": self.settings.problem.as_json}
        return Rows(pairs.n_rows, n_kept, 0, dropped), summary

    def table(self, output: Output, key: str, item: None) -> dict[str, Any]:
        """Write the table."""
        problem, methods = self.settings.problem, self.many("model")
        table, fold, kept = _kept_pairs(self.catalog("pairs"), self.settings.max_pairs, problem)
        x, differences = problem.matrix(table), problem.differences(table)
        stars = problem.star_matrix(table)
        held_out = np.zeros(len(x), dtype=np.bool_)
        predictions: dict[str, pa.Array] = {}
        for method in methods:
            model = self.files(f"model.{method}")
            rows, predicted = held_out_pairs(model, fold, differences.T, kept, problem)
            if method == methods[0]:
                held_out[rows] = True
            if len(rows) != np.count_nonzero(held_out) or not held_out[rows].all():
                raise ModelError(
                    f"'{method}' holds out other pairs ({len(rows):,}) than '{methods[0]}' "
                    f"({np.count_nonzero(held_out):,})",
                    "Train all methods with the same validation.",
                )
            of_pairs = np.full_like(differences, np.nan)
            of_pairs[rows] = predicted
            for names, values, mask in (
                (held_out_columns(method, problem.names), of_pairs, ~held_out),
                (fitted_columns(method, problem.names), corrections.load(model).predict(x), None),
            ):
                arrays = (pa.array(np.ascontiguousarray(one), mask=mask) for one in values.T)
                predictions |= dict(zip(names, arrays, strict=True))
        # With k folds every pair is held out once, and the saved model is trained on all.
        trained = ~held_out | held_out.all()
        columns = {"held_out": held_out, "trained": trained, "sparse": sparse_pairs(stars, trained)}
        for name, values in {**columns, **predictions}.items():
            table = table.append_column(name, pa.array(values))
        record = output.write_file(EVIDENCE, partial(write_parquet, table))
        return {"file": asdict(record), "n_fit": len(fold)}


def _kept_pairs(
    pairs: Catalog, most: int, problem: Problem
) -> tuple[pa.Table, NDArray[np.int8], BoolArray]:
    """Pairs of the table; fold of all that are fit for training, and which of them are kept."""
    target = next((name for name in pairs.schema.names if name.startswith("target_")), None)
    ids = {"star": "reference_star_id", **({"target": target} if target else {})}
    left = {*_LEFT, *ids.values()}
    numbers = [
        f.name for f in pairs.schema if f.name not in left and any(is_(f.type) for is_ in _NUMBERS)
    ]
    more = pairs.columns(["survey_ref"])
    limit = np.uint64(min(most / max(pairs.n_rows, 1), 1.0) * (2**64 - 2048))
    fold, kept, tables = [], [], []
    names = ["use", "fold", *ids.values(), *numbers, *more]
    empty = pa.schema([pairs.schema.field(name) for name in names]).empty_table()
    for read in itertools.chain([empty], (pairs.read(pixel, names) for pixel in pairs.pixels)):
        read = read.filter(pa.array(problem.fit_for_training(read)))
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


def held_out_pairs(
    model: Path,
    fold: NDArray[np.int8],
    differences: Iterable[Float32Array],
    kept: BoolArray,
    problem: Problem = DEFAULT,
) -> tuple[IntArray, Float32Array]:
    """Find the held-out pairs of a model among pairs, and its predictions of them.

    Held-out pairs are in the order of their folds and, inside, of the sky; that they are these very
    pairs, by their differences (one array a label), is checked. ``fold`` is that of all pairs fit
    for training, in the order of the sky; only those that are ``kept`` are asked for.
    """
    path = model / HELD_OUT
    predictions = [label.delta for label in problem.labels]
    names = [label.diff for label in problem.labels]
    with partition_errors(path), pq.ParquetFile(path) as file:
        table = file.read(["fold", *names, *predictions])
    held_out = table["fold"].to_numpy()
    rows = np.flatnonzero(np.isin(fold, np.unique(held_out)))
    rows = rows[np.argsort(fold[rows], kind="stable")]
    same = np.array_equal(fold[rows], held_out)
    if same:
        table = table.filter(pa.array(kept[rows]))
        rows = (np.cumsum(kept) - 1)[rows[kept[rows]]]
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


def sparse_pairs(x: Float32Array, trained: BoolArray) -> BoolArray:
    """Tell where pairs (n, k) are as thin as around the thinnest 5 % of those that are trained on.

    They are sparse, too, where an input is not known.
    """
    known = np.isfinite(x).all(axis=1)
    sample, others = known & trained, known & ~trained
    sparse = np.ones(len(x), dtype=np.bool_)
    if sample.any():
        sparse[sample], sparse[others] = find_sparse(x[sample], x[others])
    return sparse


def _require_bytes(cluster: Cluster, n_bytes: int, what: str) -> None:
    """Refuse what does not fit into a worker, or into this process without one."""
    cluster.require_memory(n_bytes, what)
    if cluster.client is None:
        cluster.require_driver_memory(n_bytes, what)


class OnEvidence(Stage[S]):
    """Stage on the table of evidence: ``measure`` makes its output of the columns it reads."""

    pairs_memory: ClassVar[tuple[int, int]] = (0, 0)
    """MiB of the process that reads the table, and bytes a pair beside that (measured)."""
    tables: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Key that the rows of each file get that `load` reads, and the file."""
    first: Evidence | None = None
    """Stage that makes the table as an intermediate product: see `on_pairs`."""

    def measure(self, run: Run) -> Made:
        """Make the output of evidence that fits: see `Stage.make`."""
        raise NotImplementedError

    def make(self, run: Run) -> Made:
        """Refuse evidence without a model that is given, or too large for a worker."""
        first, self.first = self.first, None
        if first is not None:
            self.inputs["evidence"] = run.output.work.absolute() / "evidence"
            first.run(self.path("evidence"), cluster=run.cluster, report=run.report)
        try:
            evidence = self.manifest("evidence")
            made_of = {v for name, v in evidence.recipe.inputs.items() if name.startswith("model.")}
            for name in self.named("model"):
                if self.manifest(name).fingerprint not in made_of:
                    raise ModelError(
                        f"{self.path('evidence')} was made without the model {self.path(name)}",
                        "Make the evidence of these pairs and all models that are asked for.",
                    )
            n_pairs, (mib, bytes_a_pair) = evidence.rows.n_out, self.pairs_memory
            what = f"{self.name}: {n_pairs:,} pairs of {self.path('evidence')}"
            _require_bytes(run.cluster, (mib << 20) + bytes_a_pair * n_pairs, what)
            return self.measure(run)
        except SosError:  # what is refused leaves nothing; what is killed keeps its evidence
            if first is not None:
                remove_tree(self.path("evidence"), ignore_errors=True)
            raise

    @cached_property
    def problem(self) -> Problem:
        """Problem of the evidence."""
        return Problem(**self.manifest("evidence").summary["problem"])

    @property
    def names(self) -> list[str]:
        """Columns of the evidence."""
        return list(pq.read_schema(local(self.path("evidence") / EVIDENCE)).names)

    def read(self, columns: Iterable[str], more: Sequence[str] = ()) -> pa.Table:
        """Read columns of the evidence: see `read_evidence`."""
        return read_evidence(self.path("evidence"), list(columns), more)

    def common_stars(
        self, order: Sequence[str] = ()
    ) -> Iterator[tuple[str, str, pa.Table, pa.Table]]:
        """Yield `reference.common_stars` of the inputs, none where there are no two surveys."""
        stars = {name: self.catalog(f"stars.{name}") for name in self.many("stars")}
        if self.named("reference") and len(stars) > 1:
            yield from common_stars(self.catalog("reference"), stars, order)

    @classmethod
    def load(cls, directory: Path) -> dict[str, Any]:
        """Read an output of the stage as JSON values: its summary, and the rows of `tables`.

        Raises `CatalogError` or `PartitionError`: unfinished, of another stage, or damaged.
        """
        found = dict(Manifest.of_stage(directory, cls.name, cls.version).summary)
        for key, name in cls.tables:
            with partition_errors(directory / name):
                found[key] = pq.read_table(local(directory / name)).to_pylist()
        return found


class OfModel(OnEvidence[S]):
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
            most = self.manifest("evidence").recipe.params["settings"]["max_pairs"]
            if most != EvidenceSettings().max_pairs:
                prints["evidence_pairs"] = str(most)
        return prints


def on_pairs(
    stage: type[OnEvidence[S]],
    pairs: Catalog,
    models: Mapping[str, Path],
    directory: Path,
    settings: S | None,
    more: Mapping[str, Catalog | Path],
    **options: Any,
) -> Manifest:
    """Run a stage by itself: its evidence is an intermediate product of the output.

    Models, by method, are trained on the pairs; ``more`` are the other inputs of the stage, and
    ``options`` those of `Stage.attempt`.
    """
    first = Evidence({"pairs": pairs, **{f"model.{name}": one for name, one in models.items()}})
    first.check()
    prints = {name: fingerprint_of(one) for name, one in more.items()}
    prints["evidence"] = Evidence.recipe(first.settings, first.fingerprints()).fingerprint
    made = stage({"evidence": pairs.path, **more}, settings, known=prints)
    made.first = first
    return made.run(directory, **options)


def read_evidence(path: Path, columns: Sequence[str], more: Sequence[str] = ()) -> pa.Table:
    """Read columns of an output of `Evidence`, and of ``more`` those that the pairs had.

    Raises `CatalogError` where a column is missing, `PartitionError` where it cannot be read.
    """
    with partition_errors(path / EVIDENCE), pq.ParquetFile(local(path / EVIDENCE)) as file:
        there = file.schema_arrow.names
        for name in columns:
            if name not in there:
                raise CatalogError(
                    f"{path / EVIDENCE} has no column '{name}'",
                    "Make it again of pairs that have it, with all models that are asked for.",
                )
        wanted = dict.fromkeys([*columns, *(name for name in more if name in there)])
        return file.read(list(wanted)).replace_schema_metadata()


def single_observations(table: pa.Table, least: int = 1000) -> BoolArray:
    """Tell which pairs say the error of one observation, because observations are corrected.

    Those whose target was observed once where there are as many among the held out, else all.
    """
    single = np.ones(table.num_rows, dtype=np.bool_)
    if "n_obs" in table.schema.names:
        once = np.asarray(table["n_obs"].to_numpy() == 1)
        if np.count_nonzero(once & table["held_out"].to_numpy()) >= least:
            single = once
    return single


def of_surveys(table: pa.Table) -> dict[str, BoolArray]:
    """Find the pairs of each reference survey, shape (n,); empty where it is not known."""
    if "survey_ref" not in table.column_names:
        return {}
    column = table["survey_ref"]
    return {
        name: pc.fill_null(pc.equal(column, name), False).to_numpy()
        for name in pc.unique(column).drop_null().to_pylist()
    }
