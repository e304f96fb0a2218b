"""Gradient-boosted trees (XGBoost), one ensemble per label: the model, and its fit here.

The loss is the pseudo-Huber of ``huber_slope`` times the spread of the differences. On 350,000
simulated pairs with 3 % outliers to one side it left two thirds of the error, and a third of the
bias, of squared error on clipped differences; the absolute error was no better and four times
slower, and its leaves would depend on the number of workers.

The bins of an input are chosen here, from exact counts over all pairs, and not by XGBoost, whose
sketch depends on the order of the rows and on the workers.

Training is data-parallel over a cluster (`boosted_cluster`) or in this process. With pairs laid out
one block a worker, in the order of the workers' names, equal pairs on equally many workers give
equal bytes; another number of workers, or none, changes the last digits of sums only. Both hold for
``subsample = 1``, the default: which pairs a tree sees otherwise depends on the layout.

With ``stop_rounds`` one training fold is kept aside to count the trees that help, label by label;
then all training folds grow so many. It is off by default, for it costs up to another training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field

from sos_dask import settings
from sos_dask.columns import Float32Array, FloatArray, IntArray
from sos_dask.corrections import boosted_cluster
from sos_dask.corrections.base import (
    Content,
    Correction,
    ModelInfo,
    Progress,
    Rows,
    Summary,
    Training,
    parse_json,
    run_tasks,
    summarise,
    to_json,
)
from sos_dask.corrections.lookup import MAX_CELLS, LookupTable, compile_trees
from sos_dask.errors import ModelError
from sos_dask.run.machine import n_threads

logger = logging.getLogger(__name__)

FILE = "boosted.json"
TABLE = "lookup.npy"
MIN_PAIRS = 50
# Edges of bins lie on a grid of this many cells over the range of an input.
GRID = 4096
# Rows are sorted by cells of so many bins along each input; 16 and 32 were a little slower.
_SIDE = 8
_THREAD_ROWS = 50_000  # two threads are no faster with fewer than 100,000 pairs


class Settings(settings.Settings):
    """Parameters of the method."""

    n_rounds: int = Field(400, ge=1, le=20000, description="Trees per label")
    max_depth: int = Field(4, ge=1, le=12, description="Depth of a tree")
    learning_rate: float = Field(
        0.04, ge=1e-4, le=1.0, description="Share of each tree's correction that is taken"
    )
    min_child_weight: float = Field(
        2.0, ge=0.0, le=1e6, description="Smallest sum of second derivatives in a leaf"
    )
    subsample: float = Field(
        1.0, ge=0.05, le=1.0, description="Share of the pairs that each tree sees"
    )
    reg_lambda: float = Field(
        3.0, ge=0.0, le=1e6, description="Pull of the leaves to zero, in pairs"
    )
    max_bin: int = Field(256, ge=2, le=4096, description="Bins of each input")
    huber_slope: float = Field(
        0.2,
        ge=0.01,
        le=100.0,
        description="Residual at which the loss turns from square to linear, in spreads",
    )
    stop_rounds: int = Field(
        0,
        ge=0,
        le=10000,
        description="End when a training fold that is kept aside has not come closer for so many "
        "trees, and train so many on all folds; 0: n_rounds trees",
    )
    nthread: int = Field(1, ge=1, le=1024, description="Threads of each worker")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the subsamples")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where to train")
    timeout_s: int = Field(
        120,
        ge=1,
        le=86400,
        description="Longest wait of a worker for the others in one step, in seconds",
    )


SEARCH = {
    "n_rounds": (100, 200, 400, 800),
    "max_depth": (3, 4, 5, 6, 8),
    "learning_rate": (0.02, 0.04, 0.08),
    "min_child_weight": (1.0, 2.0, 5.0, 10.0, 30.0),
    "reg_lambda": (1.0, 3.0, 10.0, 30.0),
}


@dataclass(eq=False)
class BoostedCorrection(Correction):
    """Sums of trees.

    Parameters
    ----------
    info : ModelInfo
    ensembles : tuple of bytes
        The trees of each label in XGBoost's UBJSON; decoded where they are needed, since with a
        table they are not, and XGBoost takes more than a second to import.
    center, spread : ndarray of float64, shape (l,)
        A difference is ``center + spread * (sum of the trees)``.
    table : LookupTable, optional
        The differences, compiled; a saved model has it unless its thresholds make too many cells.
    """

    ensembles: tuple[Content, ...]
    center: FloatArray
    spread: FloatArray
    table: LookupTable | None = None

    @cached_property
    def boosters(self) -> tuple[Any, ...]:
        """The trees as ``xgboost.Booster``, one a label; `ModelError` where they are others."""
        import xgboost

        try:
            boosters = tuple(xgboost.Booster(model_file=bytearray(e)) for e in self.ensembles)
        except xgboost.core.XGBoostError as error:
            raise ModelError(
                f"XGBoost {xgboost.__version__} cannot read the trees: {error}",
                "Install the XGBoost that the model was trained with, or train it again.",
            ) from None
        n_inputs = len(self.problem.inputs)
        for label, booster in zip(self.labels, boosters, strict=True):
            if booster.num_features() != n_inputs:
                raise ModelError(
                    f"{_file(label)}: {booster.num_features()} features, not {n_inputs}"
                )
            # A model trained on a GPU is used anywhere.
            booster.set_param({"nthread": 1, "device": "cpu"})
        return boosters

    def trees(self, features: Float32Array) -> Float32Array:
        """Sums of the trees, shape (n, l), by XGBoost itself, of finite inputs."""
        x = np.ascontiguousarray(features)
        return np.stack([booster.inplace_predict(x) for booster in self.boosters], axis=1)

    def evaluate(self, features: Float32Array) -> Float32Array:
        """Differences at finite inputs inside the box, shape (n, l)."""
        if self.table is not None:
            return self.table.predict(features)
        return (self.center + self.spread * self.trees(features)).astype(np.float32)

    def files(self) -> Mapping[str, bytes]:
        """``boosted.json``, the trees of each label as UBJSON, and their look-up table."""
        document = {
            "formula": "center + spread * (sum of the trees)",
            "center": self.info.by_label(self.center),
            "spread": self.info.by_label(self.spread),
        }
        trees = {
            _file(label): bytes(e) for label, e in zip(self.labels, self.ensembles, strict=True)
        }
        table = self.table or compile_trees(self.boosters, self.center, self.spread)
        if table is None:
            why = f"their thresholds make more than {MAX_CELLS:,} cells"
            logger.warning("boosted: no look-up table, the trees predict directly: %s", why)
            return {FILE: to_json({**document, "no_table": why}), **trees}
        return {FILE: to_json(document), **trees, TABLE: table.to_bytes()}


def _file(label: str) -> str:
    return f"{label}.ubj"


def restore(info: ModelInfo, files: Mapping[str, Content]) -> BoostedCorrection:
    """Model from its files; `ModelError` where they are incomplete."""
    document = parse_json(bytes(files[FILE]), FILE)
    center, spread = info.of_labels(document["center"]), info.of_labels(document["spread"])
    ensembles = tuple(files[_file(label)] for label in info.problem.names)
    table = LookupTable.from_buffer(files[TABLE]) if TABLE in files else None
    correction = BoostedCorrection(info, ensembles, center, spread, table)
    if table is None:
        _ = correction.boosters  # so that trees that cannot be read are refused here
    return correction


def fit(training: Training, settings: Settings, progress: Progress) -> BoostedCorrection:
    """Fit; see `sos_dask.corrections.fit`.

    Without a client the same trees are trained in this process, all pairs in its memory.
    """
    client = training.client
    if settings.device == "cuda" and client is None:
        boosted_cluster.find_gpu()
    summary = summarise(training, "boosted", MIN_PAIRS)
    edges = bin_edges(training, summary, settings.max_bin)
    job = Job(training, settings, summary, edges, (settings.n_rounds,) * len(summary.center))
    if settings.stop_rounds:
        what = "stop_rounds: the fit that counts trees"
        advice = "it needs all pairs. Give workers more, or set stop_rounds = 0."
        job = replace(job, rounds=run_tasks(count_rounds, [job], client, what, advice)[0])
    boosters = train(job, progress) if client is None else boosted_cluster.train(job, progress)
    info = summary.info("boosted", settings, training)
    ensembles = tuple(bytes(booster.save_raw("ubj")) for booster in boosters)
    return BoostedCorrection(info, ensembles, summary.center, summary.spread)


@dataclass(frozen=True)
class Job:
    """Trees to train (``rounds`` of each label), the pairs, and the edges of the bins."""

    training: Training
    settings: Settings
    summary: Summary
    edges: tuple[Float32Array, ...]
    rounds: tuple[int, ...]

    @property
    def booster_params(self) -> dict[str, Any]:
        """Parameters as XGBoost names them."""
        others = {"n_rounds", "stop_rounds", "timeout_s"}
        names = [name for name in Settings.model_fields if name not in others]
        return {
            "tree_method": "hist",
            "objective": "reg:pseudohubererror",
            "base_score": 0.0,  # differences are centred
            "validate_parameters": True,
            "verbosity": 0,
            **{name: getattr(self.settings, name) for name in names},
        }

    def block(self, first: int, stop: int) -> Rows:
        """Training rows of some batches, in units of their spread and mean weight.

        Each input is the lower edge of its bin: so the thresholds of all trees are such edges. Rows
        of neighbouring bins lie together, which makes XGBoost a third faster: the way of a row
        through a tree is mostly that of the row before.
        """
        summary = self.summary
        parts = [self.training.rows(n) for n in range(first, stop) if summary.n_rows[n]]
        features = np.concatenate([part.features for part in parts])
        bins = [
            np.searchsorted(of_column, column, side="right") - 1
            for of_column, column in zip(self.edges, features.T, strict=True)
        ]
        order = np.lexsort([of_column // _SIDE for of_column in bins])
        differences = np.concatenate([part.differences for part in parts])[order]
        weight = np.concatenate([part.weight for part in parts])[order]
        edges = [e[of_column[order]] for e, of_column in zip(self.edges, bins, strict=True)]
        return Rows(
            np.stack(edges, 1),
            ((differences.astype(np.float64) - summary.center) / summary.spread).astype("f4"),
            (weight / summary.mean_weight).astype(np.float32),
        )


def bin_edges(training: Training, summary: Summary, max_bin: int) -> tuple[Float32Array, ...]:
    """Choose the lower edges of the bins of each input: about equally many pairs in each."""
    low, width = summary.minimum, summary.maximum - summary.minimum
    counts = sum(training.map(_cells, low, width))
    edges = []
    for column, of_cells in enumerate(np.asarray(counts)):
        below = np.cumsum(of_cells) - of_cells
        wanted = np.arange(1, max_bin) * of_cells.sum() / max_bin
        cells = np.unique(np.searchsorted(below, wanted))
        cells = np.concatenate([[0], cells[(cells > 0) & (cells < GRID)]])
        values = low[column] + width[column] * cells / GRID
        edges.append(np.unique(values.astype(np.float32)))
    return tuple(edges)


def _cells(rows: Rows, low: FloatArray, width: FloatArray) -> IntArray:
    """Training rows in each cell of the grid, shape (k, GRID)."""
    x = rows.features.astype(np.float64)
    cells = (x - low) * (GRID / np.where(width > 0, width, 1.0))
    cells = np.minimum(cells.astype(np.int64), GRID - 1)
    return np.stack([np.bincount(column, minlength=GRID) for column in cells.T])


def _matrix(job: Job, rows: Rows, label: int, bins_of: Any = None) -> Any:
    import xgboost

    x, y, weight = rows.of_label(label)
    return xgboost.QuantileDMatrix(
        x,
        y,
        weight=weight,
        feature_names=list(job.training.problem.features),
        max_bin=job.settings.max_bin,
        nthread=job.settings.nthread,
        ref=bins_of,
    )


def count_rounds(job: Job) -> tuple[int, ...]:
    """Count the trees of each label after which the last training fold came no closer."""
    import xgboost

    if job.settings.device == "cuda":
        boosted_cluster.find_gpu()
    training, n = job.training, job.training.source.n_batches
    folds = training.folds
    if folds is None:
        seen = [training.source.load(index).fold for index in range(n)]
        folds = tuple(int(fold) for fold in np.unique(np.concatenate(seen)))
    if len(folds) < 2:
        raise ModelError(
            f"stop_rounds needs two training folds or more, not {len(folds)}",
            "Raise crossmatch.n_folds, or set stop_rounds = 0.",
        )
    *others, kept = sorted(folds)
    grown, aside = (
        replace(job, training=replace(training, folds=chosen)).block(0, n)
        for chosen in (tuple(others), (kept,))
    )
    rounds = []
    for number, label in enumerate(training.problem.names):
        for name, part in (("others", grown), ("one kept aside", aside)):
            if not np.isfinite(part.differences[:, number]).any():
                raise ModelError(f"stop_rounds: the training fold ({name}) has no known {label}")
        matrix = _matrix(job, grown, number)
        booster = xgboost.train(
            job.booster_params,
            matrix,
            job.settings.n_rounds,
            evals=[(_matrix(job, aside, number, matrix), "kept")],
            early_stopping_rounds=job.settings.stop_rounds,
            verbose_eval=False,
        )
        rounds.append(int(booster.best_iteration) + 1)
    return tuple(rounds)


def train(job: Job, progress: Progress) -> tuple[Any, ...]:
    """Train an ``xgboost.Booster`` of each label in this process."""
    import xgboost

    rows = job.block(0, job.training.source.n_batches)
    params = job.booster_params
    # Trees do not depend on it.
    params["nthread"] = max(params["nthread"], n_threads(len(rows.features), _THREAD_ROWS))
    matrix: Any = None
    before, boosters = None, []
    for number, n_rounds in enumerate(job.rounds):
        known = np.isfinite(rows.differences[:, number])
        if before is not None and np.array_equal(known, before):
            matrix.set_label(rows.differences[known, number])  # the bins are the same
        else:
            matrix = _matrix(job, rows, number)
        before = known
        boosters.append(xgboost.train(params, matrix, n_rounds))
        progress("boosted", number + 1, len(job.rounds))
    return tuple(boosters)
