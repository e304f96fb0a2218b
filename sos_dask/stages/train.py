"""Stage train: one correction fitted to the pairs, with its held-out predictions."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from sos_dask import corrections as models
from sos_dask.columns import matrix32
from sos_dask.corrections.base import to_json
from sos_dask.corrections.search import search
from sos_dask.errors import ModelError
from sos_dask.evidence.figures import Metric, held_out_metrics
from sos_dask.problem import DEFAULT, Problem
from sos_dask.settings import Seed, Settings
from sos_dask.stages.base import Made, Role, Run, Stage
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest, Recipe, Rows

VERSION = 8
SEARCH_FILE = "search.json"
_KEPT_ROWS = 1_000_000  # 30 MB; a fit reads its pairs dozens of times
# As many train faster in one process: workers meet at every level of every tree, for a millisecond
# each. Measured with 1,000,000 pairs and 100 trees on two cores: 11 CPU-s in all, and 19 by two
# workers; a pair needs less than 300 bytes.
LOCAL_PAIRS = 1_000_000


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
        description="Candidates of a search for better hyper-parameters, which starts from params "
        "and sees only the folds that train; with kfold every fit has its own. 0: none. A method "
        "without parameters to search is fitted as it is",
    )
    seed: Seed = Field(0, description="Seed of the search")
    problem: Problem = Field(DEFAULT, description="Labels, and the inputs that corrections see")


@dataclass(frozen=True)
class PairsSource:
    """The pairs fit for training, partition by partition (a `corrections.TrainingSource`)."""

    catalog: Catalog
    problem: Problem = DEFAULT

    @property
    def n_batches(self) -> int:
        """Partitions of the pairs."""
        return len(self.catalog.pixels)

    def load(self, index: int) -> models.Batch:
        """Inputs and differences of one partition."""
        catalog = self.catalog
        if catalog.n_rows <= _KEPT_ROWS:
            path = str(catalog.path.absolute())
            return _kept_batch(path, catalog.fingerprint, index, self.problem)
        return _read_batch(catalog, index, self.problem)


@lru_cache(maxsize=4096)
def _kept_batch(path: str, fingerprint: str, index: int, problem: Problem) -> models.Batch:
    return _read_batch(Catalog.read_only(path), index, problem)


def _columns(problem: Problem) -> tuple[str, ...]:
    """Columns of pairs that training needs."""
    return (*problem.columns, *(label.diff for label in problem.labels), "fold", "use")


def _read_batch(catalog: Catalog, index: int, problem: Problem) -> models.Batch:
    errors = [label.error for label in problem.labels]
    errors = errors if set(errors) <= set(catalog.schema.names) else []
    columns = dict.fromkeys((*_columns(problem), *errors))
    table = catalog.read(catalog.pixels[index], tuple(columns))
    table = table.filter(table["use"])
    return models.Batch(
        features=problem.matrix(table),
        differences=problem.differences(table),
        fold=table["fold"].to_numpy(),
        weight=np.ones(table.num_rows, dtype=np.float32),
        errors=matrix32(table, errors) if errors else None,
    )


class Train(Stage[TrainSettings]):
    """Fit a correction and predict every held-out pair.

    The output is the saved model, ``held_out.parquet`` (fold, inputs, differences and predictions
    of every held-out pair) and, after a search, ``search.json``: every candidate with its losses.
    The summary: validation used, pairs used, metrics on held-out pairs.

    Raises
    ------
    ModelError
        Too few pairs, or unknown labels.
    ConfigError
        Unknown method or parameter.

    Example: sos-dask train pairs --method boosted -p n_rounds=800 -o model
    """

    name = "train"
    version = VERSION
    Settings = TrainSettings
    roles = (Role("pairs", "Pairs, as crossmatch makes them."),)

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
        models.check_params(self.settings.method, self.settings.params)

    def make(self, run: Run) -> Made:
        """Fit once a fold, or once, and predict what was held out."""
        settings, pairs = self.settings, self.catalog("pairs")
        source = PairsSource(pairs, settings.problem)
        loaded = [source.load(index).fold for index in range(source.n_batches)]
        folds = np.concatenate([np.empty(0, np.int8), *loaded])
        names = [int(fold) for fold in np.unique(folds)]
        if len(names) < 2:
            raise ModelError(
                f"{pairs.path}: {len(folds)} pairs are fit for training, in {len(names)} folds",
                "At least two folds are needed: match more stars or loosen the cuts.",
            )
        validation = settings.validation
        if validation == "auto":
            validation = "kfold" if len(folds) < settings.kfold_limit else "holdout"
        fits = _Fits(run, source, settings, names, len(folds), validation == "kfold")
        if validation == "kfold":
            predicted = []
            for fold in names:
                correction = fits.next([name for name in names if name != fold])
                predicted.append(_predict_fold(source, correction, fold))
            correction = fits.next(None)
            _save(run, correction)
        else:
            correction = fits.next(names[1:])
            _save(run, correction)
            # As it corrects: what is saved of boosted trees is also their table, many times faster.
            saved = models.load(run.output.directory, check=False)
            predicted = [_predict_fold(source, saved, names[0])]
        run.report(fits.step, fits.n, fits.n)
        table = pa.concat_tables(predicted)
        run.write("held_out.parquet", table)
        if fits.searches:
            run.write_bytes(SEARCH_FILE, to_json(fits.searches))
        deltas = [label.delta for label in settings.problem.labels]
        metrics = held_out_metrics(
            settings.method,
            settings.problem.names,
            settings.problem.differences(table),
            matrix32(table, deltas),
        )
        summary = {
            "method": settings.method,
            "params": dict(correction.info.params),
            "validation": validation,
            "folds": {str(name): int(np.count_nonzero(folds == name)) for name in names},
            "metrics": [asdict(metric) for metric in metrics],
        }
        unfit = pairs.n_rows - len(folds)
        return Rows(pairs.n_rows, len(folds), 0, {"not fit for training": unfit}), summary


class _Fits:
    """The fits of a stage one after the other, each with its search and its progress."""

    def __init__(
        self,
        run: Run,
        source: PairsSource,
        settings: TrainSettings,
        folds: list[int],
        n_pairs: int,
        kfold: bool,
    ) -> None:
        self.run, self.source, self.settings, self.folds = run, source, settings, folds
        self.step = f"train {settings.method}"
        self.n = len(folds) + 1 if kfold else 1
        self.done = 0
        self.searches: list[dict[str, Any]] = []
        # The GPU is with the workers.
        on_gpu = settings.params.get("device") == "cuda"
        wanted = n_pairs > LOCAL_PAIRS or on_gpu
        self.client = run.cluster.client if wanted else None

    def next(self, train_folds: list[int] | None) -> models.Correction:
        """Fit to the pairs of some folds; None: all."""
        settings = self.settings
        self.run.report(self.step, self.done, self.n)
        self.done += 1
        params: Mapping[str, Any] = settings.params
        if settings.search and models.search_space(settings.method):
            folds = train_folds or self.folds
            params, trials = search(
                settings.method,
                self.source,
                folds,
                models.check_params(settings.method, params),
                settings.search,
                settings.seed,
                self.run.cluster.client,
            )
            self.searches.append({"train_folds": folds, "trials": trials})
        return models.fit(
            settings.method,
            self.source,
            train_folds=train_folds,
            params=params,
            client=self.client,
        )


def _predict_fold(source: PairsSource, correction: models.Correction, fold: int) -> pa.Table:
    """Inputs, differences and predictions of the pairs of one fold, in the order of the sky."""
    problem = source.problem
    names = [
        "fold",
        *(f"x_{item.column}" for item in problem.inputs),
        *(label.diff for label in problem.labels),
        *(label.delta for label in problem.labels),
    ]
    tables = []
    for index in range(source.n_batches):
        batch = source.load(index)
        chosen = batch.fold == fold
        x = batch.features[chosen]
        values = np.concatenate([x, batch.differences[chosen], correction.predict(x)], axis=1)
        columns = [pa.array(np.ascontiguousarray(column)) for column in values.T]
        tables.append(pa.table([pa.array(batch.fold[chosen]), *columns], names=names))
    return pa.concat_tables(tables)


def _save(run: Run, correction: models.Correction) -> None:
    """Save the model; its own ``model.json`` comes last, so that half a model never loads."""
    # Of this process alone: another one may work on the same output.
    scratch = run.output.work / f"model-{uuid.uuid4().hex}"
    scratch.mkdir(parents=True, exist_ok=True)
    correction.save(scratch)
    last = models.MODEL_FILE
    for file in sorted(scratch.iterdir(), key=lambda file: (file.name == last, file.name)):
        run.files.append(run.output.write_file(file.name, partial(_move, file)))


def _move(file: Path, target: Path) -> int:
    """Move a file of no rows."""
    file.replace(target)
    return 0


def metrics_of(manifest: Manifest) -> list[Metric]:
    """Held-out metrics of a trained model."""
    return [Metric(**item) for item in manifest.summary["metrics"]]


def asks_workers(pairs: Catalog, settings: TrainSettings) -> bool:
    """Tell whether training may have anything to do for workers; the GPU is with them."""
    on_gpu = settings.params.get("device") == "cuda"
    return pairs.n_rows > LOCAL_PAIRS or on_gpu or settings.search > 0
