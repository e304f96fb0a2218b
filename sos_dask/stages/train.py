"""Stages train and generalisation: corrections fitted to the pairs, and to all but a region.

train fits one method and predicts what was held out. generalisation trains every method without a
region, a reference or the sparse pairs; its tasks are such fits, each in one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from sos_dask import corrections
from sos_dask.columns import (
    Float32Array,
    FloatArray,
    IntArray,
    floats_or_nan,
    key_numbers,
    matrix32,
)
from sos_dask.corrections.degrade import Donors, replicas
from sos_dask.errors import ConfigError, ModelError
from sos_dask.evidence import figures
from sos_dask.evidence.figures import NONE, RANDOM
from sos_dask.problem import DEFAULT, SNR, Problem
from sos_dask.run.cluster import Cluster
from sos_dask.settings import Seed, Settings, to_json
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.sky.neighbours import surroundings
from sos_dask.stages.base import Made, Role, Run, Stage
from sos_dask.stages.evidence import HELD_OUT, OnEvidence
from sos_dask.stages.sample import read_sample
from sos_dask.stars.repeats import normalisation, pull_correlation
from sos_dask.stats.numbers import DENSE, SPARSE, scatter
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import FileRecord, Manifest, Recipe, Rows, local_copy

SEARCH_FILE, TABLE = "search.json", "generalisation.parquet"
_LEAST_KNOWN = 0.02  # share of the pairs
_KEPT_ROWS = 1_000_000  # 30 MB; a fit reads its pairs dozens of times
# Fewer train in one process for less: XGBoost is imported once, ranks do not meet at every level of
# every tree. CPU seconds of two workers over those of one process (`tests.bench.distributed`): 1.4
# with 200,000 pairs, 1.2 with 1,000,000, 1.0 with 2,000,000. A pair needs less than 300 bytes.
LOCAL_PAIRS = 1_000_000
_STAR_ARCSEC = 10.0  # observations of one star are so near to each other


class TrainSettings(Settings):
    """Settings of the stage."""

    method: str = Field(description="One of the methods of `sos_dask.corrections`")
    params: dict[str, Any] = Field(
        default_factory=dict, description="Hyper-parameters of the method"
    )
    validation: Literal["auto", "kfold", "holdout"] = Field(
        "auto",
        description="kfold: every fold is predicted by a model trained on the others, and the "
        "saved model is trained on all. holdout: fold 0 is never trained on, the saved model "
        "included. auto: kfold below kfold_limit pairs, else holdout",
    )
    kfold_limit: int = Field(20_000, ge=0, description="Pairs from which auto is holdout")
    search: int = Field(
        0,
        ge=0,
        le=1000,
        description="Candidates of a search for better hyper-parameters, params among them: each "
        "is cross-validated over the folds that train; with kfold every fit has a search of its "
        "own. 0: none. A method without parameters to search is fitted as it is",
    )
    seed: Seed = Field(0, description="Seed of the search")
    distributed: Literal["auto", "always", "never"] = Field(
        "auto",
        exclude=True,
        description="Whether fits are data-parallel over the workers. auto: where these are on "
        f"other machines than this process, from {LOCAL_PAIRS:,} pairs on, and on GPUs",
    )
    problem: Problem = Field(DEFAULT, description="Labels, and the inputs that corrections see")


@dataclass(frozen=True)
class PairsSource:
    """The pairs fit for training, partition by partition (a `corrections.TrainingSource`).

    With a sample of the target's rows every pair is there as fainter rows see it, too, some
    ``times``; the errors of labels are normalised by the repeats of ``stars``, of the target.
    """

    catalog: Catalog
    problem: Problem = DEFAULT
    sample: Path | None = None
    stars: Path | None = None
    correlation: tuple[tuple[float, ...], ...] = ()  # of the errors of the labels
    times: int = 0

    @property
    def n_batches(self) -> int:
        """Partitions of the pairs."""
        return len(self.catalog.pixels)

    def load(self, index: int) -> corrections.Batch:
        """Inputs and differences of one partition."""
        if self.catalog.n_rows > _KEPT_ROWS:
            return self.read(index)
        return _kept_batch(self._light, self.catalog.fingerprint, index)

    @property
    def _light(self) -> PairsSource:
        """The same, by the path of the catalog: what a cache compares."""
        return replace(self, catalog=str(self.catalog.path.absolute()))  # type: ignore[arg-type]

    def read(self, index: int) -> corrections.Batch:
        """Read one partition: see `load`."""
        catalog, problem, pixel = self.catalog, self.problem, self.catalog.pixels[index]
        errors = [label.error for label in problem.labels]
        known = set(errors) <= set(catalog.schema.names)
        names = dict.fromkeys([*_columns(problem), *(errors if known else ())])
        more = catalog.columns(["reference_star_id", "logg", SNR])
        table = catalog.read(pixel, list(dict.fromkeys([*names, *more])))
        table = table.filter(pa.array(problem.fit_for_training(table)))
        batch = corrections.Batch(
            features=problem.matrix(table),
            differences=problem.differences(table),
            fold=table["fold"].to_numpy(),
            weight=self._weight(table, pixel),
            errors=normalised_errors(table, problem, _factors(self.stars)) if known else None,
        )
        if not self.times:
            return batch
        donors = _donors(self.sample, self.stars, problem, self.correlation)
        return replace(batch, degraded=donors.degrade(batch, self.times))

    def correlation_of_errors(self) -> FloatArray:
        """Measure the correlation of the errors of labels (l, l) by repeats among the pairs."""
        names = [*self.problem.names, *(label.error for label in self.problem.labels)]
        step = -(-self.catalog.n_rows // _KEPT_ROWS)
        more = ["reference_star_id", "logg", SNR, "use"]
        wanted = self.catalog.columns(list(dict.fromkeys([*names, *more])))
        parts = [self.catalog.read(pixel, wanted) for pixel in self.catalog.pixels[::step]]
        table = pa.concat_tables(parts)
        table = table.filter(table["use"])
        values = matrix32(table, self.problem.names).astype(np.float64)
        errors = normalised_errors(table, self.problem, _factors(self.stars)).astype(np.float64)
        return pull_correlation(values, errors, key_numbers(table["reference_star_id"], 0))

    def _weight(self, table: pa.Table, pixel: HealpixPixel) -> Float32Array:
        """Weights of pairs: all of one reference star weigh less than two pairs of two stars."""
        if "reference_star_id" not in table.schema.names:
            return np.ones(table.num_rows, dtype=np.float32)
        ranges = sorted([(pixel.first, pixel.stop), *surroundings(pixel, _STAR_ARCSEC)[0]])
        near = self.catalog.read_ranges(ranges, ["reference_star_id", "use"])
        every = key_numbers(near.filter(near["use"])["reference_star_id"], 0)
        stars, n = np.unique(every, return_counts=True)
        mine = np.searchsorted(stars, key_numbers(table["reference_star_id"], 0))
        return (2.0 / (1.0 + n[mine])).astype(np.float32)

    def known(self, index: int) -> tuple[NDArray[np.int8], IntArray]:
        """Folds of the pairs of one partition, and how many know each input and difference."""
        batch = self.load(index)
        finite = np.isfinite(np.concatenate([batch.features, batch.differences], axis=1))
        return batch.fold, np.count_nonzero(finite, axis=0)


@lru_cache(maxsize=4096)
def _kept_batch(source: PairsSource, fingerprint: str, index: int) -> corrections.Batch:
    return replace(source, catalog=Catalog.read_only(str(source.catalog))).read(index)


@lru_cache(maxsize=8)
def _factors(stars: Path | None) -> Sequence[Mapping[str, Any]]:
    """What repeats say of the errors of the target's labels."""
    return () if stars is None else Manifest.load(stars).summary.get("error_factors", [])


@lru_cache(maxsize=2)
def _donors(
    sample: Path, stars: Path | None, problem: Problem, correlation: tuple[tuple[float, ...], ...]
) -> Donors:
    """Rows by which pairs are degraded: those that pass all cuts and know everything."""
    table = read_sample(sample, good=True)
    features = problem.matrix(table)
    errors = normalised_errors(table, problem, _factors(stars))
    known = np.isfinite(features).all(axis=1) & np.isfinite(errors).all(axis=1)
    return Donors(problem, features[known], errors[known], np.array(correlation))


def normalised_errors(
    table: pa.Table, problem: Problem, factors: Sequence[Mapping[str, Any]]
) -> Float32Array:
    """Errors of labels (n, l) that the target states, normalised by repeats; nan where unknown."""
    stated = np.stack([floats_or_nan(table, label.error) for label in problem.labels], axis=1)
    logg, snr = floats_or_nan(table, "logg"), floats_or_nan(table, SNR)
    for name, column in zip(problem.names, stated.T, strict=True):
        column *= normalisation(factors, name, logg, snr)
    return stated.astype(np.float32)


def _columns(problem: Problem) -> tuple[str, ...]:
    return (*problem.columns, *(label.diff for label in problem.labels), "fold", "use")


class Train(Stage[TrainSettings]):
    """Fit a correction and predict every held-out pair.

    The output is the saved model, ``held_out.parquet`` (fold, inputs, differences and predictions
    of every held-out pair) and, after a search, ``search.json``: every candidate with its losses.
    The summary: validation used, pairs used, metrics on held-out pairs. Raises `ModelError` (too
    few pairs, unknown labels) or `ConfigError` (unknown method or parameter).
    """

    name = "train"
    version = 15
    Settings = TrainSettings
    roles = (
        Role("pairs", "Pairs, as crossmatch makes them."),
        Role("sample", "Sample of the rows that are to be corrected.", "output", optional=True),
        Role("target_stars", "Stars of the target, for its quoted errors.", optional=True),
    )

    @classmethod
    def recipe(cls, settings: TrainSettings, fingerprints: Mapping[str, str]) -> Recipe:
        """Recipe, of each method a stage of its own.

        The number of workers is no part of it: distributed training may differ in the last digits
        with it, and the saved model is then the frozen input of what follows.
        """
        name = f"train-{settings.method}"
        return Recipe(name, cls.version, {"settings": settings.as_json}, dict(fingerprints))

    def check(self) -> None:
        """Refuse pairs without a column, and a wrong method or parameter."""
        self.catalog("pairs").require(*_columns(self.settings.problem))
        corrections.check_params(self.settings.method, self.settings.params)

    def source(self, place: Cluster) -> PairsSource:
        """Pairs, and as fainter rows see them where the rows are known and S/N is an input."""
        pairs, problem = self.catalog("pairs"), self.settings.problem
        stars = self.path("target_stars") if self.named("target_stars") else None
        source = PairsSource(pairs, problem, stars=stars)
        has_errors = {label.error for label in problem.labels} <= set(pairs.schema.names)
        is_dependent = SNR in problem.columns and set(problem.names) & set(problem.columns)
        if not (self.named("sample") and has_errors and is_dependent):
            return source
        [measured] = place.run(PairsSource.correlation_of_errors, [source], self.name)
        correlation = tuple(map(tuple, measured.tolist()))
        sample, times = self.path("sample"), replicas(pairs.n_rows)
        return replace(source, sample=sample, correlation=correlation, times=times)

    def _folds(self, batches: Sequence[tuple[NDArray[np.int8], IntArray]]) -> NDArray[np.int8]:
        """Folds of the pairs; an input or label that hardly any of them knows is refused."""
        problem = self.settings.problem
        columns = [*(one.column for one in problem.inputs), *(one.diff for one in problem.labels)]
        fold = np.concatenate([np.empty(0, np.int8), *(one for one, _ in batches)])
        known = np.sum([np.zeros(len(columns), np.int64), *(n for _, n in batches)], axis=0)
        for column, n in zip(columns, known.tolist(), strict=True):
            if n < _LEAST_KNOWN * len(fold):
                raise ModelError(
                    f"{self.catalog('pairs').path}: column '{column}' has a value that can be used "
                    f"in {n:,} of {len(fold):,} pairs fit for training",
                    "Leave it out of labels and inputs, or give a catalog that has it: a row "
                    "without one of its inputs has no correction.",
                )
        return fold

    def make(self, run: Run) -> Made:
        """Fit once a fold, or once, and predict what was held out."""
        settings, pairs = self.settings, self.catalog("pairs")
        method = settings.method
        # Where workers are elsewhere this process may be on a login node: all work is theirs.
        is_elsewhere, step = run.cluster.is_elsewhere, f"train {method}"
        place = run.cluster if is_elsewhere else Cluster()
        source = self.source(place)
        measured, batches = replace(source, times=0), range(source.n_batches)
        fold = self._folds(place.run(measured.known, batches, step))
        folds = np.unique(fold).tolist()
        if len(folds) < 2:
            raise ModelError(
                f"{pairs.path}: {len(fold)} pairs are fit for training, in {len(folds)} folds: "
                "they pass all cuts and have a value of target and reference in "
                f"{' or '.join(settings.problem.names)}",
                "At least two folds are needed: match more stars or loosen the cuts.",
            )
        validation = settings.validation
        if validation == "auto":
            validation = "kfold" if len(fold) < settings.kfold_limit else "holdout"
        # The folds that each fit trains on, None: all. The last one is saved.
        plan: list[list[int] | None] = [folds[1:]]
        if validation == "kfold":
            plan = [*([one for one in folds if one != held_out] for held_out in folds), None]
        predicted: list[pa.Table] = []
        searches = []
        workers = self._workers(len(fold), run.cluster)
        for number, trained in enumerate(plan):
            run.report(step, number, len(plan))
            params, trials = self._params(source, trained or folds, run.cluster.client)
            if trials:
                searches.append({"train_folds": trained or folds, "trials": trials})
            fit = partial(_fit, method, source, params)
            if workers is None:
                [correction] = place.run(fit, [trained], step)
            else:
                correction = fit(trained, client=workers)
            if number < len(plan) - 1:
                predict = partial(_predict_fold, measured, correction, folds[number])
                predicted += place.run(predict, [batches], step)
        [saved] = place.run(partial(_save, run.output), [correction], step)
        run.files.extend(saved)
        if validation == "holdout":
            # As it corrects: what is saved of boosted trees is also their table, many times faster.
            predict = partial(_predict_fold, measured, (run.output, saved), folds[0])
            each = [[index] for index in batches]
            predicted = place.run(predict, each if is_elsewhere else [batches], step)
        run.report(step, len(plan), len(plan))
        table, problem = pa.concat_tables(predicted), settings.problem
        run.write(HELD_OUT, table)
        if searches:
            run.write_bytes(SEARCH_FILE, to_json(searches))
        deltas = matrix32(table, [label.delta for label in problem.labels])
        truth = problem.differences(table)
        metrics = figures.held_out_metrics(method, problem.names, truth, deltas)
        unfit = {"not fit for training": pairs.n_rows - len(fold)}
        return Rows(pairs.n_rows, len(fold), 0, unfit), {
            "method": method,
            "params": dict(correction.info.params),
            "validation": validation,
            "folds": {str(one): int(np.count_nonzero(fold == one)) for one in folds},
            "metrics": [asdict(metric) for metric in metrics],
        }

    def _workers(self, n_pairs: int, cluster: Cluster) -> Any:
        """Client whose workers fit; None where fits are not data-parallel."""
        distributed = self.settings.distributed
        if distributed == "always" and cluster.client is None:
            what = "distributed = 'always' needs workers, and there are none"
            raise ConfigError(what, "Start some: --workers.")
        needs = _needs_workers(n_pairs, self.settings)
        return cluster.client if needs or (distributed == "auto" and cluster.is_elsewhere) else None

    def _params(
        self, source: PairsSource, folds: list[int], client: Any
    ) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
        """Parameters of a fit, and all that a search for them has tried."""
        settings = self.settings
        if not (settings.search and corrections.class_of(settings.method).search):
            return settings.params, []
        from sos_dask.corrections import estimators  # scikit-learn takes a second

        given = corrections.check_params(settings.method, settings.params)
        how = given, settings.search, settings.seed, client
        return estimators.search(settings.method, source, folds, *how)


def _fit(
    method: str,
    source: PairsSource,
    params: Mapping[str, Any],
    folds: list[int] | None,
    client: Any = None,
) -> corrections.Correction:
    return corrections.fit(method, source, train_folds=folds, params=params, client=client)


def _save(output: Output, correction: corrections.Correction) -> list[FileRecord]:
    # model.json last: half a model never loads
    return [output.write_bytes(name, content) for name, content in correction.contents().items()]


def _predict_fold(
    source: PairsSource,
    model: corrections.Correction | tuple[Output, list[FileRecord]],
    fold: int,
    batches: Iterable[int],
) -> pa.Table:
    """Inputs, differences and predictions of the pairs of one fold, in the order of the sky."""
    if isinstance(model, tuple):
        saved = local_copy(model[0].directory, model[0].recipe, model[1])
        correction = corrections.load(saved, check=False)
    else:
        correction = model
    inputs, labels = source.problem.inputs, source.problem.labels
    names = [f"x_{item.column}" for item in inputs]
    names += [*(label.diff for label in labels), *(label.delta for label in labels)]
    tables = []
    for index in batches:
        batch = source.load(index)
        chosen = batch.fold == fold
        x = batch.features[chosen]
        values = np.concatenate([x, batch.differences[chosen], correction.predict(x)], axis=1)
        columns = [batch.fold[chosen], *np.ascontiguousarray(values.T)]
        tables.append(pa.table(columns, ["fold", *names]))
    return pa.concat_tables(tables)


def metrics_of(manifest: Manifest) -> list[figures.Metric]:
    """Held-out metrics of a trained model."""
    return [figures.Metric(**item) for item in manifest.summary["metrics"]]


def _needs_workers(n_pairs: int, settings: TrainSettings) -> bool:
    is_large = n_pairs > LOCAL_PAIRS and settings.distributed == "auto"
    # The GPU is with the workers.
    return is_large or settings.distributed == "always" or settings.params.get("device") == "cuda"


def asks_workers(pairs: Catalog, settings: TrainSettings) -> bool:
    """Tell whether training may have anything to do for workers."""
    return settings.search > 0 or _needs_workers(pairs.n_rows, settings)


_SCHEMA = figures.figure_schema(
    "split group method label n_train n median mad n_random median_random mad_random"
)
_SPLITS = figures.DENSITY, figures.REGION, figures.REFERENCE
Fit = tuple[str, str, str]  # method, split, group


class GeneralisationSettings(Settings):
    """Methods trained without one region after the other."""

    methods: Mapping[str, Mapping[str, Any]] = Field(
        {}, description="Hyper-parameters of each method"
    )
    max_pairs: int = Field(
        20_000, ge=100, description="Of more pairs, those of some stars are used: about as many"
    )
    min_pairs: int = Field(
        200, ge=10, description="Smallest group that is left out, and smallest rest that trains"
    )


class Generalisation(OnEvidence[GeneralisationSettings]):
    """Train every method without one group of pairs after the other, and predict that group.

    Groups are the sparse pairs, cells of the Kiel diagram, and the pairs of each reference survey.
    Table: of each split, group, method and label the pairs trained on and left out, and median and
    scatter (1.4826 MAD) of the left-out pairs, corrected by a model that never saw their group
    (``median``, ``mad``), and by one that was trained on a random four fifths of all pairs
    (``median_random``, ``mad_random``, of those pairs of the group that it was not trained on,
    ``n_random``). Method ``none`` is the bare difference. Summary: groups left out, fits that were
    refused with the reason.
    """

    name = "generalisation"
    version = 4
    Settings = GeneralisationSettings
    roles = (Role("evidence", "Pairs.", "output"),)

    @classmethod
    def recipe(cls, settings: GeneralisationSettings, fingerprints: Mapping[str, str]) -> Recipe:
        """Recipe with the complete parameters of the methods, and what training makes of them."""
        methods = {
            name: corrections.check_params(name, params)
            for name, params in settings.methods.items()
        }
        params = {"settings": settings.but(methods=methods).as_json, "train_version": Train.version}
        return Recipe(cls.name, cls.version, params, dict(fingerprints))

    def measure(self, run: Run) -> Made:
        """Fit every method without every group, then put the figures together."""
        given, table = self.manifest("evidence").rows, self._pairs()
        splits = {name: table[name].to_pylist() for name in _SPLITS}
        groups = figures.left_out_groups(splits, self.settings.min_pairs)
        if not groups:
            raise ModelError(
                f"{self.path('evidence')}: no group of {table.num_rows} pairs can be left out of "
                f"training: each and its rest need {self.settings.min_pairs}",
                "Match more stars, or lower [generalisation] min_pairs.",
            )
        methods = list(self.settings.methods)
        fits: dict[str, Fit] = {
            f"{method}-{split}-{group}".replace("/", " per "): (method, split, group)
            for method, (split, group) in itertools.product(methods, [(RANDOM, ""), *groups])
        }
        done = run.parts("fits", fits, self.fit)
        names, bare = self.problem.names, self.problem.differences(table)
        left = {
            one: np.stack(run.output.read_piece(key).columns, axis=1) for key, one in fits.items()
        }
        rows: list[dict[str, Any]] = []
        for method, (split, group) in itertools.product([NONE, *methods], groups):
            fold = _folds(table, split, group)
            sides = {"": (method, split, group), "_random": (method, RANDOM, "")}
            for number, label in enumerate(names):
                rows.append({"split": split, "group": group, "method": method, "label": label})
                rows[-1]["n_train"] = int(np.count_nonzero(fold == 0))
                for end, side in sides.items():
                    values = left.get(side, bare)[fold == 1, number].astype(np.float64)
                    values = values[np.isfinite(values)]
                    found: dict[str, Any] = {"n": len(values), "median": None, "mad": None}
                    if len(values):
                        found |= {"median": float(np.median(values)), "mad": scatter(values)}
                    rows[-1] |= {f"{name}{end}": value for name, value in found.items()}
        run.write(TABLE, pa.Table.from_pylist(rows, _SCHEMA))
        dropped = {**given.dropped, "of other stars": given.n_out - table.num_rows}
        return Rows(given.n_in, table.num_rows, 0, dropped), {
            "groups": [list(group) for group in groups],
            "refused": {
                key: one["refused"] for key, one in zip(fits, done, strict=True) if one["refused"]
            },
        }

    def _pairs(self) -> pa.Table:
        """Pairs, of very many those of some stars, with their groups."""
        problem, n_most = self.problem, self.settings.max_pairs
        wanted = [*problem.columns, *(one.diff for one in problem.labels), "fold", "star", "sparse"]
        table = self.read(wanted, ["survey_ref", "teff", "logg"])
        if table.num_rows > n_most:
            star = table["star"].to_numpy()
            table = table.filter(pa.array(star < np.partition(star, n_most)[n_most]))
        known = np.isfinite(problem.matrix(table)).all(axis=1)
        survey = pa.nulls(table.num_rows, pa.string())
        if "survey_ref" in table.column_names:
            survey = table["survey_ref"].cast(pa.string())
        region = figures.region_groups(*(floats_or_nan(table, name) for name in ("teff", "logg")))
        sparse = np.where(known, np.where(table["sparse"].to_numpy(), SPARSE, DENSE), "")
        for name, values in zip(_SPLITS, (sparse, region, survey.fill_null("")), strict=True):
            table = table.append_column(name, pa.array(values, pa.string()))
        return table.combine_chunks()

    def fit(self, output: Output, key: str, item: Fit) -> dict[str, Any]:
        """Fit without a group, and keep what it leaves of its differences."""
        method, split, group = item
        table, problem = self._pairs(), self.problem
        fold = _folds(table, split, group)
        x, differences = problem.matrix(table), problem.differences(table)
        batch = corrections.Batch(x, differences, fold, np.ones(len(x), np.float32))
        params = corrections.check_params(method, self.settings.methods[method])
        left, out, refused = np.full(differences.shape, np.nan), fold == 1, ""
        try:
            source = corrections.OneBatch(batch, problem)
            fitted = corrections.fit(method, source, train_folds=[0], params=params)
            left[out] = differences[out].astype(np.float64) - fitted.predict(x[out])
        except ModelError as error:
            refused = error.message
        output.write_piece(key, pa.table(list(left.T.copy()), problem.names))
        return {"refused": refused}


def _folds(table: pa.Table, split: str, group: str) -> NDArray[np.int8]:
    """Train (0), left out (1), or neither (2): pairs that a split gives to no group."""
    if split == RANDOM:
        return np.asarray(table["fold"].to_numpy() == 0, dtype=np.int8)
    names = table[split].to_numpy()
    return np.where(names == "", 2, names == group).astype(np.int8)
