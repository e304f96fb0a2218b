"""The frame of all corrections: training pairs, the training box and the saved model."""

from __future__ import annotations

import abc
import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sos_dask import __version__
from sos_dask.columns import Float32Array, FloatArray, IntArray, mixed
from sos_dask.errors import ModelError
from sos_dask.problem import BLOCK_ROWS, DEFAULT, Problem
from sos_dask.run.workers import Workers
from sos_dask.settings import Settings, sealed, to_json
from sos_dask.stats.numbers import Histogram, count

MODEL_FORMAT = 3
MODEL_FILE = "model.json"

Content = bytes | memoryview
Counts = tuple[NDArray[np.uint16], IntArray]
R = TypeVar("R")


# --- training pairs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Pairs of one partition."""

    features: Float32Array  # inputs of the target, shape (n, k), as `Problem.matrix` makes them
    differences: Float32Array  # target - reference in units of the labels, (n, l); nan: unknown
    fold: NDArray[np.int8]
    weight: Float32Array  # only ratios matter; pairs of weight 0 are not used
    errors: Float32Array | None = None  # of the target's labels, shape (n, l); nan where unknown
    degraded: Batch | None = None  # these pairs as fainter rows see them: see `degrade`


class TrainingSource(Protocol):
    """Where pairs come from: picklable, batches are loaded where they are used."""

    @property
    def problem(self) -> Problem:
        """Labels and inputs of the batches."""

    @property
    def n_batches(self) -> int:
        """Number of batches."""

    def load(self, index: int) -> Batch:
        """Read one batch."""


@dataclass(frozen=True)
class OneBatch:
    """Pairs in memory as a source of one batch."""

    batch: Batch
    problem: Problem
    n_batches = 1

    def load(self, index: int) -> Batch:
        """Give the batch."""
        return self.batch


class Rows(NamedTuple):
    """Training rows of a batch: features are finite, the weight is positive."""

    features: Float32Array
    differences: Float32Array
    weight: Float32Array

    def of_label(self, label: int) -> tuple[Float32Array, Float32Array, Float32Array]:
        """Features, differences and weights of the rows that know a label."""
        known = np.isfinite(self.differences[:, label])
        return self.features[known], self.differences[known, label], self.weight[known]


@dataclass(frozen=True)
class Training:
    """The pairs of a fit, and the workers that load and work on them."""

    source: TrainingSource
    folds: tuple[int, ...] | None = None  # None: all pairs are used
    client: Any = None  # stays here when the rest travels to its workers; None: all in this process
    changes: tuple[Callable[[Batch], Batch], ...] = ()  # importable by name on every worker
    degraded: bool = False  # the pairs as fainter rows see them are rows, too

    def __reduce__(self) -> tuple[Any, ...]:
        return Training, (self.source, self.folds, None, self.changes, self.degraded)

    @property
    def problem(self) -> Problem:
        """Labels and inputs."""
        return self.source.problem

    def rows(self, index: int) -> Rows:
        """Rows of a batch that can train: of the folds, inputs finite, a difference known."""
        batch = self.source.load(index)
        rows = self._rows(batch)
        if not self.degraded or batch.degraded is None:
            return rows
        both = zip(rows, self._rows(batch.degraded), strict=True)
        return Rows(*(np.concatenate(parts) for parts in both))

    def _rows(self, batch: Batch) -> Rows:
        batch = functools.reduce(lambda b, change: change(b), self.changes, batch)
        use = np.isfinite(batch.features).all(axis=1) & np.isfinite(batch.differences).any(axis=1)
        use &= (batch.weight > 0) & np.isfinite(batch.weight)
        if self.folds is not None:
            use &= np.isin(batch.fold, np.asarray(self.folds, dtype=np.int64))
        differences = batch.differences[use]
        differences[~np.isfinite(differences)] = np.nan
        return Rows(batch.features[use], differences, batch.weight[use])

    def map(self, function: Callable[..., R], *arguments: Any) -> list[R]:
        """Call ``function(rows, *arguments)`` for the training rows of every batch.

        Results are in the order of the batches. The function is importable by its name on every
        worker, and what it gives back is small. See `run_tasks` for errors.
        """
        call = functools.partial(self._call, function, arguments)
        advice = "give workers more, or lower rows_per_partition."
        what = f"{function.__name__}: a batch"
        return run_tasks(call, range(self.source.n_batches), self.client, what, advice)

    @property
    def n_rows(self) -> int:
        """Number of training rows, which may be none."""
        return sum(self.map(_n_rows))

    def _call(self, function: Callable[..., R], arguments: tuple[Any, ...], index: int) -> R:
        return function(self.rows(index), *arguments)


def _n_rows(rows: Rows) -> int:
    return len(rows.weight)


def run_tasks(
    function: Callable[[Any], R], items: Sequence[Any], client: Any, what: str, advice: str
) -> list[R]:
    """Call a function for every item, on the workers of a client or here.

    `ClusterError` where a task (``what``) kills its workers, with advice where memory was short.
    """
    if client is None:
        return [function(item) for item in items]
    done = Workers.of(client).run(
        function, items, what, f"Most often it ran out of memory: {advice}"
    )
    with contextlib.closing(done):
        results: dict[int, R] = dict(done)
    return [results[number] for number in range(len(items))]


def hash_rows(*parts: Float32Array) -> NDArray[np.uint64]:
    """Hash the numbers of each row of columns side by side; all NaN are equal, and both zeros."""
    values = np.concatenate(parts, axis=1)
    values = np.where(np.isnan(values), np.float32(np.nan), values + np.float32(0))
    state = np.zeros(len(values), dtype=np.uint64)
    for column in np.ascontiguousarray(values.T, dtype=np.float32).view(np.uint32):
        state = mixed(state + column)
    return state


# --- what is known before a fit ----------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Training pairs in a few numbers, which a fit starts from."""

    info: ModelInfo  # of a model that is fitted to these pairs
    n_rows: IntArray  # of each batch
    mean: FloatArray  # of the inputs
    deviation: FloatArray  # of the inputs; 1 where all are equal
    center: FloatArray  # median of the differences of each label
    spread: FloatArray  # their robust standard deviation; 1 where all are equal
    constant: NDArray[np.bool_]  # labels whose differences are all equal
    mean_weight: float


# Quartiles of a normal distribution are 1.349 standard deviations apart; 1.4826 = 2 / 1.349.
_IQR = 1.3489795003921634
_LEAST_SPREAD = 1e-6  # of the range
_ROUNDING = 1e-4  # of the difference: no scatter of measurements is as small


def summarise(training: Training, method: str, settings: Settings, needed: int) -> Summary:
    """Look at all training pairs once; `ModelError` where fewer than ``needed`` know a label."""
    problem, folds = training.problem, training.folds
    parts = training.map(_summarise_batch)
    histograms = summed([counts for *_, counts in parts], len(problem.labels))
    n_pairs = tuple(histogram.n for histogram in histograms)
    of_folds = "" if folds is None else f" of folds {', '.join(map(str, folds))}"
    for label, n in zip(problem.names, n_pairs, strict=True):
        if n < max(needed, 1):
            raise ModelError(
                f"method '{method}' needs at least {needed} training pairs{of_folds} with a known "
                f"{label} difference, and there are {n}",
                "Widen the quality cuts or the match radius, or choose a simpler method.",
            )
    n_rows, sums, lows, highs, _ = map(list, zip(*parts, strict=True))
    # One after the other: the sums must not depend on how NumPy adds a column.
    weight, *moments = sum(sums) / sum(n_rows)
    mean, square = np.split(np.array(moments), 2)
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    wide = deviation > 1e-6 * np.maximum(1.0, np.abs(mean))
    low, high, k = np.min(lows, axis=0), np.max(highs, axis=0), len(mean)
    lowest, width = low[k:], high[k:] - low[k:]
    first, middle, third = np.transpose([h.quantiles((0.25, 0.5, 0.75)) for h in histograms])
    # Inside a bin of the histogram nothing is told apart.
    spread = np.maximum(third - first, np.abs(middle) / 128) / _IQR
    # More than half of the differences may be equal, or all: these are a zero point.
    spread = np.where(spread > _LEAST_SPREAD * width, spread, width / 6)
    # Numbers of 24 bits differ a little even where the two surveys' labels do by a constant.
    constant = width <= _ROUNDING * np.abs(middle)
    box = tuple(low[:k].tolist()), tuple(high[:k].tolist())
    return Summary(
        info=ModelInfo(method, settings.as_json, *box, n_pairs, folds, problem),
        n_rows=np.array(n_rows),
        mean=mean,
        deviation=np.where(wide, deviation, 1.0),
        center=np.where(constant, lowest + width / 2, middle),
        spread=np.where(constant, 1.0, spread),
        constant=constant,
        mean_weight=float(weight),
    )


def _summarise_batch(rows: Rows) -> tuple[int, FloatArray, FloatArray, FloatArray, list[Counts]]:
    """Number of rows; sums of weight, inputs and squares; least and largest values; counts."""
    x, y = rows.features.astype(np.float64), rows.differences
    known = np.isfinite(y)
    least = x.min(axis=0, initial=np.inf), y.min(axis=0, initial=np.inf, where=known)
    largest = x.max(axis=0, initial=-np.inf), y.max(axis=0, initial=-np.inf, where=known)
    weight = rows.weight.sum(dtype=np.float64)
    return (
        len(x),
        np.array([weight, *x.sum(axis=0), *(x**2).sum(axis=0)]),
        np.concatenate(least, dtype=np.float64),
        np.concatenate(largest, dtype=np.float64),
        [count(column[of]) for column, of in zip(y.T, known.T, strict=True)],
    )


def summed(parts: Sequence[Sequence[Counts]], n_labels: int) -> list[Histogram]:
    """Histogram of each label, from the counts of each batch and label."""
    histograms = [Histogram() for _ in range(n_labels)]
    for part in parts:
        for histogram, counts in zip(histograms, part, strict=True):
            histogram.add(counts)
    return histograms


# --- fitted corrections ------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelInfo:
    """Statement of a model about itself."""

    method: str
    params: Mapping[str, Any]  # all of them
    minimum: tuple[float, ...]  # of each input over the training pairs
    maximum: tuple[float, ...]
    n_pairs: tuple[int, ...]  # training pairs of each label
    train_folds: tuple[int, ...] | None = None  # None: all
    problem: Problem = DEFAULT


def by_name(names: Sequence[str], values: Sequence[Any] | NDArray[Any]) -> dict[str, Any]:
    """Values of labels or inputs by their names, as JSON takes them."""
    return dict(zip(names, np.asarray(values).tolist(), strict=True))


def in_order(names: Sequence[str], values: Mapping[str, Any]) -> FloatArray:
    """Numbers of labels or inputs in their order."""
    return np.array([values[name] for name in names], dtype=np.float64)


@dataclass(eq=False)
class Correction(abc.ABC):
    """A fitted correction: the difference target - reference of each label, predicted.

    Outside the box of its training pairs a correction is held at the value on the nearest face:
    inputs are clamped to the box, one by one. `in_range` says where that was not needed.
    """

    method: ClassVar[str]
    parameters: ClassVar[type[Settings]]
    search: ClassVar[Mapping[str, Sequence[int | float | str]]] = {}  # values that a search tries

    info: ModelInfo

    @classmethod
    @abc.abstractmethod
    def fit(cls, training: Training, settings: Any) -> Correction:
        """Fit; see `sos_dask.corrections.fit`."""

    @classmethod
    @abc.abstractmethod
    def restore(cls, info: ModelInfo, files: Mapping[str, Content]) -> Correction:
        """Read a model from its own `files`; `ModelError` where they are damaged."""

    @property
    def problem(self) -> Problem:
        """Labels and inputs."""
        return self.info.problem

    def predict(self, features: Float32Array) -> Float32Array:
        """Predicted differences target - reference of inputs (n, k), those of `Problem.matrix`.

        They have shape (n, l), in the units of the labels, each column contiguous; nan in all
        labels where any input is nan or infinite. A row's prediction does not depend on the other
        rows.
        """
        x, low, high = self._checked(features)
        out = np.empty((len(self.problem.names), len(x)), dtype=np.float32).T
        for start in range(0, len(x), BLOCK_ROWS):
            block = x[start : start + BLOCK_ROWS]
            # Several times faster than a reduction over so short an axis.
            unknown = ~functools.reduce(np.logical_and, np.isfinite(block).T)
            block = np.clip(block, low, high)
            block[unknown] = low
            found = self.evaluate(block)
            found[unknown] = np.nan
            out[start : start + BLOCK_ROWS] = found
        return out

    def in_range(self, features: Float32Array) -> NDArray[np.bool_]:
        """Tell which rows, shape (n, k), lie in the training box; False where an input is nan."""
        x, low, high = self._checked(features)
        return functools.reduce(np.logical_and, ((x >= low) & (x <= high)).T)

    def _checked(self, features: Float32Array) -> tuple[Float32Array, Float32Array, Float32Array]:
        """Features, which are checked, and the corners of the training box."""
        x = np.asarray(features, dtype=np.float32)
        k = len(self.problem.inputs)
        if x.ndim != 2 or x.shape[1] != k:
            raise ModelError(f"features have shape {x.shape}, not (n, {k})")
        return x, np.array(self.info.minimum, "f4"), np.array(self.info.maximum, "f4")

    @abc.abstractmethod
    def evaluate(self, features: Float32Array) -> Float32Array:
        """Differences at finite inputs inside the box, shape (n, l); a new array.

        `predict` gives blocks of `BLOCK_ROWS` rows at most.
        """

    @abc.abstractmethod
    def files(self) -> Mapping[str, bytes]:
        """Content of the method's own files, by name; the same model gives the same bytes."""

    def save(self, directory: Path) -> None:
        """Write all files."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.contents().items():
            (directory / name).write_bytes(content)

    def contents(self) -> dict[str, bytes]:
        """Content of all files, ``model.json`` last; equal models give equal bytes."""
        files, info = self.files(), self.info
        document = {
            "format": MODEL_FORMAT,
            "sos_dask": __version__,
            "method": info.method,
            "labels": list(info.problem.names),
            "features": list(info.problem.features),
            "problem": info.problem.as_json,
            "params": dict(sorted(info.params.items())),
            "train_folds": None if info.train_folds is None else list(info.train_folds),
            "n_pairs": by_name(info.problem.names, info.n_pairs),
            "training_range": by_name(
                info.problem.features, np.transpose([info.minimum, info.maximum])
            ),
            "files": {
                name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())
            },
        }
        return {**files, MODEL_FILE: to_json(sealed(document))}


def parse_json(content: bytes, name: Path | str) -> dict[str, Any]:
    """Decode a JSON object; `ModelError` where it is none."""
    try:
        document = json.loads(content)
    except ValueError as error:
        raise ModelError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"{name}: not a JSON object")
    return document
