"""Stage train: one correction fitted to the pairs, with its held-out predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sos_dask import corrections as models
from sos_dask.columns import floats32, matrix32
from sos_dask.corrections.search import search, search_space
from sos_dask.errors import ConfigError, ModelError
from sos_dask.evidence.figures import Metric, held_out_metrics
from sos_dask.problem import DEFAULT, Problem, features
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import LABELS, nearest
from sos_dask.stages.evidence import DIFFERENCES
from sos_dask.stages.parts import unless_complete
from sos_dask.storage.artifact import FileRecord, Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog, write_parquet

VERSION = 6
SEARCH_FILE = "search.json"
_KEPT_ROWS = 1_000_000  # 30 MB; a fit reads its pairs dozens of times
# As many train faster in one process: workers meet at every level of every tree, for a millisecond
# each. Measured with 1,000,000 pairs and 100 trees on two cores: 11 CPU-s in all, and 19 by two
# workers; a pair needs less than 300 bytes.
LOCAL_PAIRS = 1_000_000
VALIDATIONS = ("auto", "kfold", "holdout")
_PREDICTIONS = tuple(f"{label}_delta" for label in LABELS)
_FEATURE_COLUMNS = tuple(f"x_{label}" for label in LABELS)
_ERRORS = tuple(f"{label}_err" for label in LABELS)
_COLUMNS = (*LABELS, *DIFFERENCES, "fold", "use")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of the stage.

    Parameters
    ----------
    method : str
        One of `models.methods`.
    params : mapping
        Hyper-parameters of the method.
    validation : str
        ``kfold``: every fold is predicted by a model trained on the others, and the saved model is
        trained on all. ``holdout``: fold 0 is never trained on, the saved model included. ``auto``:
        kfold below ``kfold_limit`` pairs, else holdout.
    kfold_limit : int
    search : int
        Candidates of a search for better hyper-parameters (`models.search`), which starts from
        ``params`` and sees only the folds that train; with kfold every fit has its own. 0: none.
        A method without parameters to search is fitted as it is.
    seed : int
        Of the search.
    """

    method: str
    params: Mapping[str, Any]
    validation: str = "auto"
    kfold_limit: int = 20_000
    search: int = 0
    seed: int = 0


@dataclass(frozen=True)
class PairsSource:
    """The pairs fit for training, partition by partition (a `models.TrainingSource`)."""

    catalog: Catalog

    @property
    def problem(self) -> Problem:
        """Labels and inputs."""
        return DEFAULT

    @property
    def n_batches(self) -> int:
        """Partitions of the pairs."""
        return len(self.catalog.pixels)

    def load(self, index: int) -> models.Batch:
        """Features and differences of one partition."""
        catalog = self.catalog
        if catalog.n_rows <= _KEPT_ROWS:
            return _kept_batch(str(catalog.path.absolute()), catalog.fingerprint, index)
        return _read_batch(catalog, index)


@lru_cache(maxsize=4096)
def _kept_batch(path: str, fingerprint: str, index: int) -> models.Batch:
    return _read_batch(Catalog.read_only(path), index)


def _read_batch(catalog: Catalog, index: int) -> models.Batch:
    errors = _ERRORS if set(_ERRORS) <= set(catalog.schema.names) else ()
    table = catalog.read(catalog.pixels[index], (*_COLUMNS, *errors))
    table = table.filter(table["use"])
    return models.Batch(
        features=features(*(floats32(table, label) for label in LABELS)),
        differences=matrix32(table, DIFFERENCES),
        fold=table["fold"].to_numpy(),
        weight=np.ones(table.num_rows, dtype=np.float32),
        errors=matrix32(table, errors) if errors else None,
    )


def train_recipe(pairs: str, settings: TrainSettings) -> Recipe:
    """Recipe of `train` for pairs of this fingerprint.

    The number of workers is no part of it: distributed training may differ in the last digits with
    it, and the saved model is then the frozen input of what follows.
    """
    return Recipe(f"train-{settings.method}", VERSION, asdict(settings), {"pairs": pairs})


def asks_workers(pairs: Catalog, settings: TrainSettings) -> bool:
    """Whether `train` may have anything to do for workers; the GPU is with them."""
    on_gpu = settings.params.get("device") == "cuda"
    return pairs.n_rows > LOCAL_PAIRS or on_gpu or settings.search > 0


def train(
    pairs: Catalog,
    directory: Path,
    settings: TrainSettings,
    *,
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Fit a correction and predict every held-out pair.

    Parameters
    ----------
    pairs : Catalog
        Output of crossmatch.
    directory : Path
        Gets the saved model, ``held_out.parquet`` (fold, features, differences and predictions of
        every held-out pair) and, after a search, ``search.json``: every candidate with its losses.
    settings : TrainSettings

    Returns
    -------
    Manifest
        ``summary``: validation used, pairs used, metrics on held-out pairs.

    Raises
    ------
    ModelError
        Too few pairs, or unknown labels.
    ConfigError
        Unknown method, parameter or validation.
    """
    for name in _COLUMNS:
        pairs.require(name)
    models.check_params(settings.method, settings.params)
    if settings.validation not in VALIDATIONS:
        raise ConfigError(
            f"validation '{settings.validation}' is not one of {', '.join(VALIDATIONS)}",
            nearest(settings.validation, VALIDATIONS),
        )
    output = Output.prepare(
        directory, train_recipe(pairs.fingerprint, settings), overwrite, [pairs.path]
    )
    if output.complete:
        return output.load_manifest()
    with unless_complete(output):
        _train(output, pairs, settings, cluster, report)
    return output.load_manifest()


def _train(
    output: Output,
    pairs: Catalog,
    settings: TrainSettings,
    cluster: Cluster | None,
    report: Report,
) -> None:
    source = PairsSource(pairs)
    folds = np.concatenate(
        [np.empty(0, np.int8), *(source.load(index).fold for index in range(source.n_batches))]
    )
    names = [int(fold) for fold in np.unique(folds)]
    if len(names) < 2:
        raise ModelError(
            f"{pairs.path}: {len(folds)} pairs are fit for training, in {len(names)} folds",
            "At least two folds are needed: match more stars or loosen the cuts.",
        )
    validation = settings.validation
    if validation == "auto":
        validation = "kfold" if len(folds) < settings.kfold_limit else "holdout"
    # The GPU is with the workers.
    remote = len(folds) > LOCAL_PAIRS or settings.params.get("device") == "cuda"
    client = cluster.client if cluster and remote else None
    steps = len(names) + 1 if validation == "kfold" else 1
    step = f"train {settings.method}"
    searches: list[dict[str, Any]] = []

    def fit(train_folds: list[int] | None, number: int) -> models.Correction:
        report(step, number, steps)
        params = settings.params
        if settings.search and search_space(settings.method):
            found = search(
                settings.method,
                source,
                train_folds or names,
                models.check_params(settings.method, params),
                settings.search,
                settings.seed,
                cluster.client if cluster else None,
            )
            params = found.params
            searches.append({"train_folds": train_folds or names, "trials": found.table()})
        return models.fit(
            settings.method, source, train_folds=train_folds, params=params, client=client
        )

    if validation == "kfold":
        predicted = []
        for number, fold in enumerate(names):
            correction = fit([name for name in names if name != fold], number)
            predicted.append(_predict_fold(source, correction, fold))
        correction = fit(None, len(names))
        model_files = _save(output, correction)
    else:
        correction = fit(names[1:], 0)
        model_files = _save(output, correction)
        # As it corrects: what is saved of boosted trees is also their table, many times faster.
        saved = models.load(output.directory, check=False)
        predicted = [_predict_fold(source, saved, names[0])]
    report(step, steps, steps)
    table = pa.concat_tables(predicted)
    metrics = held_out_metrics(
        settings.method,
        LABELS,
        matrix32(table, DIFFERENCES),
        matrix32(table, _PREDICTIONS),
    )
    record = output.write_file("held_out.parquet", partial(write_parquet, table))
    records = [*model_files, record]
    if searches:
        records.append(output.write_bytes(SEARCH_FILE, models.to_json(searches)))
    n_pairs = pairs.n_rows
    output.commit(
        Rows(n_pairs, len(folds), 0, {"not fit for training": n_pairs - len(folds)}),
        tuple(records),
        {
            "method": settings.method,
            "params": dict(correction.info.params),
            "validation": validation,
            "folds": {str(name): int(np.count_nonzero(folds == name)) for name in names},
            "metrics": [asdict(metric) for metric in metrics],
        },
    )


def metrics_of(manifest: Manifest) -> list[Metric]:
    """Held-out metrics of a trained model."""
    return [Metric(**item) for item in manifest.summary["metrics"]]


def _predict_fold(source: PairsSource, correction: models.Correction, fold: int) -> pa.Table:
    """Features, differences and predictions of the pairs of one fold, in the order of the sky."""
    tables = []
    for index in range(source.n_batches):
        batch = source.load(index)
        chosen = batch.fold == fold
        x = batch.features[chosen]
        values = np.concatenate([x, batch.differences[chosen], correction.predict(x)], axis=1)
        columns = [pa.array(np.ascontiguousarray(values[:, i])) for i in range(values.shape[1])]
        tables.append(
            pa.table(
                [pa.array(batch.fold[chosen]), *columns],
                names=["fold", *_FEATURE_COLUMNS, *DIFFERENCES, *_PREDICTIONS],
            )
        )
    return pa.concat_tables(tables)


def _save(output: Output, correction: models.Correction) -> list[FileRecord]:
    """Save the model; its own ``model.json`` comes last, so that half a model never loads."""
    scratch = output.work / "model"
    scratch.mkdir(parents=True, exist_ok=True)
    correction.save(scratch)
    records = []
    for file in sorted(scratch.iterdir(), key=lambda file: (file.name == "model.json", file.name)):
        records.append(output.write_file(file.name, partial(_move, file)))
    return records


def _move(file: Path, target: Path) -> int:
    """Move a file of no rows."""
    file.replace(target)
    return 0
