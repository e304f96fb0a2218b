"""Training data of boosted trees, and their fit in one process.

The bins of a feature are chosen here, from exact counts over all pairs, and not by XGBoost, whose
sketch depends on the order of the rows and on the workers.

With ``stop_rounds`` one training fold is kept aside to count the trees that help, label by label;
then all training folds grow so many. It is off by default, for it costs up to another training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sos_dask.corrections import (
    Float32Array,
    FloatArray,
    IntArray,
    Progress,
    Rows,
    Summary,
    TrainingSource,
    map_batches,
    training_rows,
)
from sos_dask.corrections.cuda import find_gpu
from sos_dask.errors import ModelError
from sos_dask.problem import FEATURES
from sos_dask.run.machine import n_threads
from sos_dask.schema import LABELS

# Edges of bins lie on a grid of this many cells over the range of a feature.
GRID = 4096
# Rows are sorted by cells of so many bins along each feature; 16 and 32 were a little slower.
_SIDE = 8
_THREAD_ROWS = 50_000  # two threads are no faster with fewer than 100,000 pairs


@dataclass(frozen=True)
class Job:
    """What there is to train, and on what.

    Parameters
    ----------
    source : TrainingSource
    train_folds : sequence of int, optional
        Only pairs of these folds are used; None: all pairs.
    params : mapping
        Complete parameters of the method.
    summary : Summary
        Of the training pairs.
    edges : tuple of ndarray of float32
        See `bin_edges`.
    rounds : tuple of int
        Trees of each label.
    """

    source: TrainingSource
    train_folds: Sequence[int] | None
    params: Mapping[str, Any]
    summary: Summary
    edges: tuple[Float32Array, ...]
    rounds: tuple[int, ...]

    def booster_params(self) -> dict[str, Any]:
        """Parameters as XGBoost names them."""
        names = (
            "max_depth", "learning_rate", "min_child_weight", "subsample", "reg_lambda", "max_bin",
            "huber_slope", "nthread", "seed", "device",
        )  # fmt: skip
        return {
            "tree_method": "hist",
            "objective": "reg:pseudohubererror",
            "base_score": 0.0,  # differences are centred
            "validate_parameters": True,
            "verbosity": 0,
            **{name: self.params[name] for name in names},
        }


def bin_edges(
    source: TrainingSource,
    train_folds: Sequence[int] | None,
    client: Any,
    summary: Summary,
    max_bin: int,
) -> tuple[Float32Array, ...]:
    """Lower edges of the bins of each feature: about equally many pairs in each.

    Returns
    -------
    tuple of ndarray of float32
        One a feature, ascending, of at most ``max_bin`` values; the unit is that of the feature.
    """
    low, width = summary.minimum, summary.maximum - summary.minimum
    counts = sum(map_batches(_cells, source, client, train_folds, low, width))
    edges = []
    for column, of_cells in enumerate(np.asarray(counts)):
        below = np.cumsum(of_cells) - of_cells
        wanted = np.arange(1, max_bin) * of_cells.sum() / max_bin
        cells = np.unique(np.searchsorted(below, wanted))
        cells = np.concatenate([[0], cells[(cells > 0) & (cells < GRID)]])
        values = low[column] + width[column] * cells / GRID
        edges.append(np.unique(values.astype(np.float32)))
    return tuple(edges)


def _cells(
    source: TrainingSource,
    index: int,
    train_folds: Sequence[int] | None,
    low: FloatArray,
    width: FloatArray,
) -> IntArray:
    """Training rows in each cell of the grid, shape (3, GRID)."""
    x = training_rows(source.load(index), train_folds).features.astype(np.float64)
    cells = (x - low) * (GRID / np.where(width > 0, width, 1.0))
    cells = np.minimum(cells.astype(np.int64), GRID - 1)
    return np.stack([np.bincount(column, minlength=GRID) for column in cells.T])


def load_block(job: Job, first: int, stop: int) -> Rows:
    """Training rows of the batches from ``first`` to before ``stop``.

    Differences are in units of their spread, weights in units of their mean.

    Each feature is the lower edge of its bin: so the thresholds of all trees are such edges. Rows
    of neighbouring bins lie together, which makes XGBoost a third faster: the way of a row through
    a tree is mostly that of the row before.
    """
    parts = [
        training_rows(job.source.load(index), job.train_folds)
        for index in range(first, stop)
        if job.summary.n_rows[index]
    ]
    features = np.concatenate([part.features for part in parts])
    bins = [
        np.searchsorted(of_column, column, side="right") - 1
        for of_column, column in zip(job.edges, features.T, strict=True)
    ]
    order = np.lexsort([of_column // _SIDE for of_column in bins])
    differences = np.concatenate([part.differences for part in parts])[order].astype(np.float64)
    weight = np.concatenate([part.weight for part in parts])[order]
    return Rows(
        np.stack([e[of_column[order]] for e, of_column in zip(job.edges, bins, strict=True)], 1),
        ((differences - job.summary.center) / job.summary.spread).astype(np.float32),
        (weight / job.summary.mean_weight).astype(np.float32),
    )


def of_label(rows: Rows, label: int) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Features, differences and weights of the rows that know a label."""
    known = np.isfinite(rows.differences[:, label])
    return rows.features[known], rows.differences[known, label], rows.weight[known]


def _matrix(job: Job, rows: Rows, label: int, bins_of: Any = None) -> Any:
    import xgboost

    x, y, weight = of_label(rows, label)
    return xgboost.QuantileDMatrix(
        x,
        y,
        weight=weight,
        feature_names=list(FEATURES),
        max_bin=job.params["max_bin"],
        nthread=job.params["nthread"],
        ref=bins_of,
    )


def count_rounds(job: Job) -> tuple[int, ...]:
    """Trees of each label after which the last training fold came no closer, in one process.

    Raises
    ------
    ModelError
        There is but one training fold, one knows no difference of a label, or there is no GPU for
        ``device = "cuda"``.
    """
    import xgboost

    if job.params["device"] == "cuda":
        find_gpu().require()
    folds = job.train_folds
    if folds is None:
        seen = [job.source.load(index).fold for index in range(job.source.n_batches)]
        folds = [int(fold) for fold in np.unique(np.concatenate(seen))]
    if len(folds) < 2:
        raise ModelError(
            f"stop_rounds needs two training folds or more, not {len(folds)}",
            "Raise crossmatch.n_folds, or set stop_rounds = 0.",
        )
    *others, kept = sorted(folds)
    n = job.source.n_batches
    grown = load_block(replace(job, train_folds=others), 0, n)
    aside = load_block(replace(job, train_folds=[kept]), 0, n)
    rounds = []
    for number, label in enumerate(LABELS):
        for name, part in (("others", grown), ("one kept aside", aside)):
            if not np.isfinite(part.differences[:, number]).any():
                raise ModelError(f"stop_rounds: the training fold ({name}) has no known {label}")
        matrix = _matrix(job, grown, number)
        booster = xgboost.train(
            job.booster_params(),
            matrix,
            job.params["n_rounds"],
            evals=[(_matrix(job, aside, number, matrix), "kept")],
            early_stopping_rounds=job.params["stop_rounds"],
            verbose_eval=False,
        )
        rounds.append(int(booster.best_iteration) + 1)
    return tuple(rounds)


def train(job: Job, progress: Progress) -> tuple[Any, ...]:
    """``xgboost.Booster`` of each label, trained in this process."""
    import xgboost

    rows = load_block(job, 0, job.source.n_batches)
    params = job.booster_params()
    # Trees do not depend on it.
    params["nthread"] = max(params["nthread"], n_threads(len(rows.features), _THREAD_ROWS))
    matrix: Any = None
    before, boosters = None, []
    for number in range(len(LABELS)):
        known = np.isfinite(rows.differences[:, number])
        if before is not None and np.array_equal(known, before):
            matrix.set_label(rows.differences[known, number])  # the bins are the same
        else:
            matrix = _matrix(job, rows, number)
        before = known
        boosters.append(xgboost.train(params, matrix, job.rounds[number]))
        progress("boosted", number + 1, len(LABELS))
    return tuple(boosters)
