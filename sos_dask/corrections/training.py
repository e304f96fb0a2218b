"""Training pairs in batches, on workers or here, and what has to be known of them first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sos_dask.corrections.base import (
    Batch,
    Float32Array,
    FloatArray,
    IntArray,
    ModelInfo,
    TrainingSource,
)
from sos_dask.errors import ClusterError, ModelError
from sos_dask.problem import FEATURES
from sos_dask.schema import LABELS
from sos_dask.stats.numbers import Histogram, count

R = TypeVar("R")


@dataclass(frozen=True)
class Rows:
    """Training rows of a batch: features are finite, the weight is positive."""

    features: Float32Array
    differences: Float32Array
    weight: Float32Array


def training_rows(batch: Batch, train_folds: Sequence[int] | None) -> Rows:
    """Rows of a batch that can train: of the folds, with finite features and a known difference."""
    use = np.isfinite(batch.features).all(axis=1)
    use &= np.isfinite(batch.differences).any(axis=1) & (batch.weight > 0)
    use &= np.isfinite(batch.weight)
    if train_folds is not None:
        use &= np.isin(batch.fold, np.asarray(train_folds, dtype=np.int64))
    differences = batch.differences[use]
    return Rows(
        batch.features[use],
        np.where(np.isfinite(differences), differences, np.float32(np.nan)),
        batch.weight[use],
    )


def map_batches(
    function: Callable[..., R], source: TrainingSource, client: Any, *arguments: Any
) -> list[R]:
    """Call ``function(source, index, *arguments)`` for every batch.

    Parameters
    ----------
    function : callable
        Importable by its name on every worker; what it gives back is small.

    Returns
    -------
    list
        In the order of the batches, whoever was first.
    """
    indices = range(source.n_batches)
    if client is None:
        return [function(source, index, *arguments) for index in indices]
    from distributed import KilledWorker

    futures = client.map(_call, indices, call=(function, source, arguments), pure=False)
    try:
        results: list[R] = client.gather(futures)
    except KilledWorker as error:
        raise ClusterError(
            f"{function.__name__}: a batch killed its worker again and again ({error})",
            "Most often it ran out of memory: give workers more, or lower rows_per_partition.",
        ) from error
    finally:
        release(futures)
    return results


def release(futures: Sequence[Any]) -> None:
    """Let go of futures; what no one else wants is stopped and forgotten.

    ``Client.cancel`` is no substitute: where a cancelled task has dependents, the scheduler of
    distributed 2026.7 drops the connection to the client.
    """
    for future in futures:
        future.release()


def _call(index: int, call: tuple[Callable[..., R], TrainingSource, tuple[Any, ...]]) -> R:
    function, source, arguments = call
    return function(source, index, *arguments)


@dataclass(frozen=True)
class Summary:
    """What has to be known of the training pairs before a fit.

    Parameters
    ----------
    n_rows : ndarray of int64, shape (n_batches,)
        Training rows of each batch.
    n_pairs : ndarray of int64, shape (3,)
        Rows with a known difference, per label.
    minimum, maximum, mean, deviation : ndarray of float64, shape (3,)
        Of the features.
    center, spread : ndarray of float64, shape (3,)
        Median and robust standard deviation of the differences; 1 where all are equal.
    constant : ndarray of bool, shape (3,)
        Labels whose differences are all equal.
    mean_weight : float
    """

    n_rows: IntArray
    n_pairs: IntArray
    minimum: FloatArray
    maximum: FloatArray
    mean: FloatArray
    deviation: FloatArray
    center: FloatArray
    spread: FloatArray
    constant: NDArray[np.bool_]
    mean_weight: float

    def info(
        self, method: str, params: Mapping[str, int | float | str], folds: Sequence[int] | None
    ) -> ModelInfo:
        """Statement of a model fitted to these pairs."""
        return ModelInfo(
            method=method,
            params=params,
            minimum=tuple(self.minimum.tolist()),
            maximum=tuple(self.maximum.tolist()),
            n_pairs=tuple(self.n_pairs.tolist()),
            train_folds=None if folds is None else tuple(folds),
        )


# Quartiles of a normal distribution are 1.349 standard deviations apart; 1.4826 = 2 / 1.349.
_IQR = 1.3489795003921634
_LEAST_SPREAD = 1e-6  # of the range


def summarise(
    source: TrainingSource,
    train_folds: Sequence[int] | None,
    client: Any,
    method: str,
    needed: int,
) -> Summary:
    """Look at all training pairs once.

    Parameters
    ----------
    method : str
        For messages.
    needed : int
        Pairs that each label must have.

    Raises
    ------
    ModelError
        A label is never known, or known for too few pairs.
    """
    parts = map_batches(_summarise_batch, source, client, train_folds)
    n_rows = np.array([part["n"] for part in parts], dtype=np.int64)
    total = int(n_rows.sum())
    histograms = [Histogram() for _ in LABELS]
    sums, squares, weight = np.zeros(len(FEATURES)), np.zeros(len(FEATURES)), 0.0
    low, high = np.full(len(FEATURES), np.inf), np.full(len(FEATURES), -np.inf)
    for part in parts:
        sums, squares = sums + part["sum"], squares + part["square"]
        weight += part["weight"]
        low, high = np.minimum(low, part["low"]), np.maximum(high, part["high"])
        for histogram, counts in zip(histograms, part["counts"], strict=True):
            histogram.add(counts)
    folds = "" if train_folds is None else f" of folds {', '.join(map(str, train_folds))}"
    lows = np.min([part["label_low"] for part in parts], axis=0) if parts else []
    highs = np.max([part["label_high"] for part in parts], axis=0) if parts else []
    for number, label in enumerate(LABELS):
        n = histograms[number].n
        if n < max(needed, 1):
            raise ModelError(
                f"method '{method}' needs at least {needed} training pairs{folds} with a known "
                f"{label} difference, and there are {n}",
                "Widen the quality cuts or the match radius, or choose a simpler method.",
            )
    low_high = np.asarray(highs, dtype=np.float64) - np.asarray(lows, dtype=np.float64)
    quartiles = np.array([h.quantiles((0.25, 0.5, 0.75)) for h in histograms])
    # Inside a bin of the histogram nothing is told apart.
    spread = np.maximum(quartiles[:, 2] - quartiles[:, 0], np.abs(quartiles[:, 1]) / 128) / _IQR
    # More than half of the differences may be equal, or all: these are a zero point.
    spread = np.where(spread > _LEAST_SPREAD * low_high, spread, low_high / 6)
    constant = low_high == 0
    mean = sums / total
    return Summary(
        n_rows=n_rows,
        n_pairs=np.array([h.n for h in histograms], dtype=np.int64),
        minimum=low,
        maximum=high,
        mean=mean,
        deviation=np.sqrt(np.maximum(squares / total - mean**2, 0.0)),
        center=np.where(constant, np.asarray(lows, dtype=np.float64), quartiles[:, 1]),
        spread=np.where(constant, 1.0, spread),
        constant=constant,
        mean_weight=weight / total,
    )


def _summarise_batch(
    source: TrainingSource, index: int, train_folds: Sequence[int] | None
) -> dict[str, Any]:
    rows = training_rows(source.load(index), train_folds)
    x, y = rows.features.astype(np.float64), rows.differences
    known = np.isfinite(y)
    return {
        "n": len(x),
        "sum": x.sum(axis=0),
        "square": (x**2).sum(axis=0),
        "weight": float(rows.weight.sum(dtype=np.float64)),
        "low": x.min(axis=0, initial=np.inf),
        "high": x.max(axis=0, initial=-np.inf),
        "label_low": y.min(axis=0, initial=np.inf, where=known),
        "label_high": y.max(axis=0, initial=-np.inf, where=known),
        "counts": [count(y[known[:, k], k]) for k in range(len(LABELS))],
    }
