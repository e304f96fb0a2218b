"""Gradient-boosted trees (XGBoost), one ensemble per label: the model, its table, its fit here.

The loss is the pseudo-Huber of ``huber_slope`` times the spread of the differences. On 350,000
simulated pairs with 3 % outliers to one side it left two thirds of the error, and a third of the
bias, of squared error on clipped differences; the absolute error was no better, four times slower.

The bins of an input are chosen here, from exact counts over all pairs: XGBoost's own sketch depends
on the order of the rows and on the workers. Training is data-parallel over a cluster
(`boosted_cluster`) or in this process. With pairs laid out one block a worker, in the order of the
workers' names, equal pairs on equally many workers give equal bytes; another number of workers, or
none, changes the last digits of sums only. Both are true for ``subsample = 1``, the default: which
pairs a tree sees otherwise depends on the layout.

Every split of a tree compares one input with a threshold, so an ensemble is constant on each cell
of the grid that its thresholds make: at most 256 x 256 x 256 cells with 256 bins of three inputs.
The value of a leaf is added to its box of cells by its corners in a difference array, whose
cumulative sums along the axes are the table (a summed-area table backwards: Crow 1984, SIGGRAPH,
p. 207). A prediction is then one look-up, whatever the number of trees, for all labels at once.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sos_dask import settings
from sos_dask.columns import Float32Array, FloatArray, IntArray
from sos_dask.corrections import base, boosted_cluster
from sos_dask.corrections.base import Content, Correction, ModelInfo, Rows, Summary, Training
from sos_dask.errors import ModelError
from sos_dask.problem import Problem
from sos_dask.run.machine import import_xgboost, n_threads
from sos_dask.settings import to_json
from sos_dask.stats.table import pack, unpack

logger = logging.getLogger(__name__)

FILE = "boosted.json"
TABLE = "lookup.npy"
MAX_CELLS = 1 << 25
# Edges of bins lie on a grid of this many cells over the range of an input.
GRID = 4096
# Rows are sorted by cells of so many bins along each input; 16 and 32 were a little slower.
_SIDE = 8
_SNR_BINS = 16
_LEAST_BINS = 32
# Of trees that see the measured pairs alone: they find what many pairs say, and no more.
_OF_MEASURED = {"max_depth": 4, "min_child_weight": 300.0, "reg_lambda": 100.0}
_THREAD_ROWS = 50_000  # two threads are no faster with fewer than 100,000 pairs
_PLACES = 1 << 13  # of `_Bins`


class Settings(settings.Settings):
    """Parameters of the method."""

    n_rounds: int = Field(400, ge=1, le=20000, description="Trees per label")
    max_depth: int = Field(6, ge=1, le=12, description="Depth of a tree")
    learning_rate: float = Field(0.04, ge=1e-4, le=1.0, description="Share of each tree taken")
    min_child_weight: float = Field(5.0, ge=0.0, le=1e6, description="Smallest Hessian of a leaf")
    subsample: float = Field(1.0, ge=0.05, le=1.0, description="Share of pairs that a tree sees")
    reg_lambda: float = Field(3.0, ge=0.0, le=1e6, description="Pull of leaves to zero, in pairs")
    max_bin: int = Field(256, ge=2, le=4096, description="Bins of each input")
    huber_slope: float = Field(
        0.5, ge=0.01, le=100.0, description="Residual where the loss turns linear, in spreads"
    )
    nthread: int = Field(1, ge=1, le=1024, description="Threads of each worker")
    measured_rounds: int = Field(
        100,
        ge=0,
        le=20000,
        description="Further trees that see the measured pairs alone, where the others were also "
        "trained on degraded pairs: what depends on S/N beside noise",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the subsamples")
    min_pairs: int = Field(50, ge=2, le=10**6, description="Fewest training pairs of a label")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where to train")
    timeout_s: int = Field(
        120, ge=1, le=86400, description="Longest wait of a worker for the others, in seconds"
    )


@dataclass(eq=False)
class BoostedCorrection(Correction):
    """Differences of ``center + spread * (sum of the trees)`` of each label.

    ``ensembles`` are the trees in XGBoost's UBJSON; decoded where they are needed, since with a
    table they are not, and XGBoost takes more than a second to import. ``table`` has the
    differences; a saved model has it unless its thresholds make too many cells.
    """

    method = "boosted"
    parameters = Settings
    search: ClassVar = {
        "n_rounds": (100, 200, 400, 800),
        "max_depth": (3, 4, 5, 6, 8),
        "learning_rate": (0.02, 0.04, 0.08),
        "min_child_weight": (1.0, 2.0, 5.0, 10.0, 30.0),
        "reg_lambda": (1.0, 3.0, 10.0, 30.0),
    }

    ensembles: tuple[Content, ...]
    center: FloatArray
    spread: FloatArray
    table: LookupTable | None = None

    @cached_property
    def boosters(self) -> tuple[Any, ...]:
        """The trees as ``xgboost.Booster``, one a label; `ModelError` where they are others."""
        xgboost = import_xgboost()

        try:
            boosters = tuple(xgboost.Booster(model_file=bytearray(e)) for e in self.ensembles)
        except xgboost.core.XGBoostError as error:
            raise ModelError(
                f"XGBoost {xgboost.__version__} cannot read the trees: {error}",
                "Install the XGBoost that the model was trained with, or train it again.",
            ) from None
        n_inputs = len(self.problem.inputs)
        for label, booster in zip(self.problem.names, boosters, strict=True):
            if (n := booster.num_features()) != n_inputs:
                raise ModelError(f"{label}.ubj: {n} features, not {n_inputs}")
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
        labels = self.problem.names
        document = {
            "formula": "center + spread * (sum of the trees)",
            "center": base.by_name(labels, self.center),
            "spread": base.by_name(labels, self.spread),
        }
        trees = {f"{n}.ubj": bytes(e) for n, e in zip(labels, self.ensembles, strict=True)}
        table = self.table or compile_trees(self.boosters, self.center, self.spread)
        if table is None:
            why = f"their thresholds make more than {MAX_CELLS:,} cells, or the inputs are over 12"
            logger.warning("boosted: no look-up table, the trees predict directly: %s", why)
            return {FILE: to_json({**document, "no_table": why}), **trees}
        return {FILE: to_json(document), **trees, TABLE: pack([*table.edges, table.values])}

    @classmethod
    def restore(cls, info: ModelInfo, files: Mapping[str, Content]) -> BoostedCorrection:
        """Read a model from its own files."""
        document = base.parse_json(bytes(files[FILE]), FILE)
        labels = info.problem.names
        center, spread = (base.in_order(labels, document[key]) for key in ("center", "spread"))
        ensembles = tuple(files[f"{label}.ubj"] for label in labels)
        table = LookupTable.from_buffer(files[TABLE]) if TABLE in files else None
        correction = cls(info, ensembles, center, spread, table)
        if table is None:
            _ = correction.boosters  # so that trees that cannot be read are refused here
        return correction

    @classmethod
    def fit(cls, training: Training, settings: Settings) -> BoostedCorrection:
        """Fit; see `sos_dask.corrections.fit`. Without a client all pairs are in memory."""
        client = training.client
        if settings.device == "cuda" and client is None:
            boosted_cluster.find_gpu()
        summary = base.summarise(training, cls.method, settings, settings.min_pairs)
        training = replace(training, degraded=True)
        edges = _bin_edges(training, summary.info, settings.max_bin)
        train = _train if client is None else boosted_cluster.train
        job = Job(training, settings, summary, edges)
        ensembles = train(job)
        if settings.measured_rounds and training.n_rows > summary.n_rows.sum():
            of_measured = settings.but(n_rounds=settings.measured_rounds, **_OF_MEASURED)
            training = replace(training, degraded=False)
            ensembles = train(
                Job(training, of_measured, summary, edges, ensembles, settings.n_rounds)
            )
        return cls(summary.info, tuple(ensembles), summary.center, summary.spread)


# --- training ----------------------------------------------------------------------------------


class Job(NamedTuple):
    """Pairs, what is known of them, and the edges of the bins."""

    training: Training
    settings: Settings
    summary: Summary
    edges: tuple[Float32Array, ...]
    before: Sequence[bytes] = ()  # of each label the trees that it goes on from
    n_before: int = 0  # how many these are

    @property
    def booster_params(self) -> dict[str, Any]:
        """Parameters as XGBoost names them."""
        return {
            "tree_method": "hist",
            "objective": "reg:pseudohubererror",
            "base_score": 0.0,  # differences are centred
            "validate_parameters": True,
            "verbosity": 0,
            **self.settings.model_dump(
                exclude={"n_rounds", "measured_rounds", "timeout_s", "min_pairs"}
            ),
        }

    def block(self, first: int, stop: int) -> Rows:
        """Training rows of some batches, in units of their spread and mean weight.

        Each input is the lower edge of its bin: so the thresholds of all trees are such edges. Rows
        of neighbouring bins lie together, which makes XGBoost a third faster: the way of a row
        through a tree is mostly that of the row before.
        """
        summary = self.summary
        parts = [self.training.rows(n) for n in range(first, stop) if summary.n_rows[n]]
        features, differences, weight = map(np.concatenate, zip(*parts, strict=True))
        bins = [
            np.maximum(np.searchsorted(edges, column, side="right") - 1, 0)
            for edges, column in zip(self.edges, features.T, strict=True)
        ]
        order = np.lexsort([of_column // _SIDE for of_column in bins])
        lower = [e[of_column[order]] for e, of_column in zip(self.edges, bins, strict=True)]
        scaled = (differences[order].astype(np.float64) - summary.center) / summary.spread
        scaled[:, summary.constant] *= 0.0  # a zero point, whatever noise was added
        weight = (weight[order] / summary.mean_weight).astype(np.float32)
        return Rows(np.stack(lower, 1), scaled.astype(np.float32), weight)

    def boost(
        self,
        rows: Rows,
        threads: int,
        done: Sequence[bytes] = (),
        after_tree: Callable[[int, list[bytes], Any], None] | None = None,
    ) -> list[bytes]:
        """Train the trees of each label, as UBJSON; those of a collective, in each of its ranks.

        ``done`` is what was trained before, the last label in part; it goes on with equal bytes.
        ``after_tree`` gets the number of trees so far, what is done, and the booster in work.
        """
        xgboost = import_xgboost()

        params = {**self.booster_params, "nthread": threads}
        names = list(self.training.problem.features)
        matrix = xgboost.QuantileDMatrix(
            rows.features, feature_names=names, max_bin=self.settings.max_bin, nthread=threads
        )
        known, trained = np.isfinite(rows.differences), list(done[:-1])
        n_rounds = self.settings.n_rounds
        for label in range(len(trained), known.shape[1]):
            # One matrix for all: a pair that lacks a label has no weight for it.
            here = known[:, label]
            matrix.set_label(np.where(here, rows.differences[:, label], np.float32(0)))
            matrix.set_weight(np.where(here, rows.weight, np.float32(0)))
            begun = done[label] if label < len(done) else self.before and self.before[label]
            booster = xgboost.Booster(params, [matrix], bytearray(begun) if begun else None)
            # As xgboost.train does, which counts from 0 again: subsamples follow from the number.
            for tree in range(booster.num_boosted_rounds(), self.n_before + n_rounds):
                booster.update(matrix, tree)
                if after_tree is not None:
                    n_trees = label * n_rounds + tree + 1 - self.n_before
                    after_tree(n_trees, trained, booster)
            trained.append(bytes(booster.save_raw("ubj")))
        return trained


def _n_bins(problem: Problem, most: int) -> list[int]:
    """Bins of each input: at most so many, and that the table of the trees has its cells.

    The signal to noise gets few of them. Where few would be left to the others there is no table.
    """
    of_star = len(problem.of_star)
    snr = min(_SNR_BINS, most) if of_star < len(problem.inputs) else 1
    each = min(int((MAX_CELLS / snr) ** (1 / of_star) + 1e-9), most)
    each, snr = (each, snr) if each >= _LEAST_BINS else (most, most)
    return [each if one in problem.of_star else snr for one in problem.inputs]


def _bin_edges(training: Training, info: ModelInfo, max_bin: int) -> tuple[Float32Array, ...]:
    """Lower edges of the bins of each input, about equally many pairs in each."""
    low = np.array(info.minimum)
    width = np.array(info.maximum) - low
    counts = np.asarray(sum(training.map(_cells, low, width)))
    edges = []
    for column, n_bins in enumerate(_n_bins(info.problem, max_bin)):
        of_cells = counts[column]
        below = np.cumsum(of_cells) - of_cells
        wanted = np.arange(1, n_bins) * of_cells.sum() / n_bins
        cells = np.unique(np.searchsorted(below, wanted))
        cells = np.concatenate([[0], cells[(cells > 0) & (cells < GRID)]])
        values = low[column] + width[column] * cells / GRID
        edges.append(np.unique(values.astype(np.float32)))
    return tuple(edges)


def _cells(rows: Rows, low: FloatArray, width: FloatArray) -> IntArray:
    """Training rows in each cell of the grid, shape (k, GRID)."""
    x = rows.features.astype(np.float64)
    cells = (x - low) * (GRID / np.where(width > 0, width, 1.0))
    cells = np.clip(cells.astype(np.int64), 0, GRID - 1)
    return np.stack([np.bincount(column, minlength=GRID) for column in cells.T])


def _train(job: Job) -> list[bytes]:
    """Train the trees of each label in this process."""
    rows = job.block(0, job.training.source.n_batches)
    # Trees do not depend on the number of threads.
    threads = max(job.settings.nthread, n_threads(len(rows.features), _THREAD_ROWS))
    return job.boost(rows, threads)


# --- the look-up table -------------------------------------------------------------------------


@dataclass(frozen=True)
class LookupTable:
    """Sums of trees on a grid of cells: ``values`` has shape (n0, n1, ..., n_labels).

    ``edges`` are the thresholds of each input, sorted; a value v is in bin
    ``number of thresholds <= v``.
    """

    edges: tuple[Float32Array, ...]
    values: Float32Array

    def predict(self, features: Float32Array) -> Float32Array:
        """Sums of the trees at finite inputs, shape (n, n_labels)."""
        cell = np.zeros(len(features), dtype=np.int64)
        for axis, bins in enumerate(self._bins):
            cell *= self.values.shape[axis]
            cell += bins.of(np.ascontiguousarray(features[:, axis]))
        # No cell is outside; an index in brackets, or a mode that checks, takes longer.
        return self.values.reshape(-1, self.values.shape[-1]).take(cell, axis=0, mode="clip")

    @cached_property
    def _bins(self) -> tuple[_Bins, ...]:
        return tuple(_Bins(edges) for edges in self.edges)

    @classmethod
    def from_buffer(cls, buffer: Content) -> LookupTable:
        """Table in a buffer of packed arrays; `ModelError` where it is damaged."""
        what = "the look-up table of the trees"
        *edges, values = unpack(buffer, what) or [np.empty(0)]
        if not edges or values.shape[:-1] != tuple(part.size + 1 for part in edges):
            raise ModelError(f"{what} is damaged: it has other axes")
        return cls(tuple(edges), values)


class _Bins:
    """Bins of values without a binary search: an even grid says nearly where a value belongs.

    The place on the grid never falls where a value rises, whatever the rounding, so that only the
    thresholds of the same place have to be compared: mostly none or one.
    """

    def __init__(self, edges: Float32Array) -> None:
        self._low, self._high = edges[[0, -1]] if len(edges) else np.zeros(2, np.float32)
        width = float(self._high) - float(self._low)
        places = _PLACES / width if width > 0 else 0.0
        # Without a scale all are in one place: also of widths that float32 cannot divide by.
        self._scale = np.float32(places if places < float(np.finfo(np.float32).max) else 0.0)
        counts = np.bincount(self._place(edges), minlength=_PLACES)
        self._before = np.cumsum(counts) - counts  # thresholds before each place
        self._most = int(counts.max())  # thresholds that share a place
        self._edges = np.append(edges, np.full(self._most, np.inf, np.float32))

    def _place(self, values: Float32Array) -> NDArray[np.intp]:
        place = np.clip(values, self._low, self._high)
        place -= self._low
        place *= self._scale
        np.minimum(place, _PLACES - 1, out=place)
        return place.astype(np.intp)

    def of(self, values: Float32Array) -> NDArray[np.intp]:
        """Number of thresholds not above each value."""
        # No place is outside; an index in brackets takes half as long again.
        before = self._before.take(self._place(values), mode="clip")
        index = before.copy()
        for step in range(self._most):
            index += values >= self._edges.take(before + step, mode="clip")
        return index


def compile_trees(
    boosters: Sequence[Any], center: FloatArray, spread: FloatArray
) -> LookupTable | None:
    """Make the table of ``center + spread * (sum of the trees)`` of one ensemble a label.

    None where the thresholds make more than ``MAX_CELLS`` cells, or a leaf has more than ``2^12``
    corners: too large to be worth it.
    """
    models = [json.loads(bytes(booster.save_raw("json")))["learner"] for booster in boosters]
    forests = [_forest(model["gradient_booster"]["model"]["trees"]) for model in models]
    edges = tuple(
        np.unique(np.concatenate([f.value[(f.left >= 0) & (f.feature == axis)] for f in forests]))
        for axis in range(int(models[0]["learner_model_param"]["num_feature"]))
    )
    shape = tuple(len(part) + 1 for part in edges)
    if np.prod(shape, dtype=np.float64) > MAX_CELLS or len(shape) > 12:
        return None
    corners = [_corners(forest, edges) for forest in forests]
    bases = [np.ravel(json.loads(m["learner_model_param"]["base_score"]))[0] for m in models]
    values = np.empty((*shape, len(boosters)), dtype=np.float32)
    running = np.zeros((len(boosters), *shape[1:]))
    # Plane by plane all stays in the cache.
    for plane, of_labels in enumerate(values):
        for label, (first, cell, amount) in enumerate(corners):
            now = slice(first[plane], first[plane + 1])
            np.add.at(running[label].reshape(-1), cell[now], amount[now])
            sums = running[label].copy()
            for axis in range(sums.ndim):
                np.cumsum(sums, axis=axis, out=sums)
            sums += np.float32(bases[label])
            of_labels[..., label] = sums * spread[label] + center[label]
    return LookupTable(edges, values)


class _Forest(NamedTuple):
    """Nodes of all trees one after the other; a leaf has no left node (-1) and its value."""

    roots: IntArray
    left: IntArray
    right: IntArray
    feature: IntArray
    value: Float32Array  # threshold of a split


def _forest(trees: Sequence[dict[str, Any]]) -> _Forest:
    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([np.empty(0), *(tree[name] for tree in trees)])

    roots = np.cumsum([0, *(len(tree["left_children"]) for tree in trees)])
    before = np.repeat(roots[:-1], np.diff(roots))
    left, right = joined("left_children").astype(int), joined("right_children").astype(int)
    left = np.where(left < 0, -1, left + before)
    value = joined("split_conditions").astype(np.float32)
    return _Forest(roots[:-1], left, right + before, joined("split_indices").astype(int), value)


def _corners(
    forest: _Forest, edges: tuple[Float32Array, ...]
) -> tuple[IntArray, IntArray, FloatArray]:
    """Where the sums change: first entry of each plane of the first axis, cells in it, amounts."""
    shape = np.array([len(part) + 1 for part in edges])
    low, stop, value = _leaves(forest, edges, shape)
    places, amounts = [], []
    for corner in itertools.product((0, 1), repeat=len(shape)):
        places.append(np.where(corner, stop, low))
        amounts.append(-value if sum(corner) % 2 else value)
    place, amount = np.concatenate(places), np.concatenate(amounts)
    inside = (place < shape).all(axis=1)
    order = np.argsort(place[inside, 0], kind="stable")
    place, amount = place[inside][order], amount[inside][order]
    first = np.searchsorted(place[:, 0], np.arange(shape[0] + 1))
    strides = np.append(np.cumprod(shape[:1:-1])[::-1], 1)[: len(shape) - 1]
    return first, place[:, 1:] @ strides, amount


def _leaves(
    forest: _Forest, edges: tuple[Float32Array, ...], shape: IntArray
) -> tuple[IntArray, IntArray, FloatArray]:
    """Of each leaf that some value reaches: first bin and stop by axis, and its value."""
    cut = np.zeros(len(forest.left), dtype=np.int64)
    for axis, part in enumerate(edges):
        of_axis = forest.feature == axis
        cut[of_axis] = np.searchsorted(part, forest.value[of_axis]) + 1
    node = forest.roots
    low: IntArray = np.zeros((len(node), len(edges)), dtype=np.int64)
    stop: IntArray = low + shape
    found: list[tuple[NDArray[Any], ...]] = []
    while len(node) or not found:
        is_split = forest.left[node] >= 0
        is_leaf = ~is_split & (low < stop).all(axis=1)
        found.append((low[is_leaf], stop[is_leaf], forest.value[node[is_leaf]].astype(np.float64)))
        node, low, stop = node[is_split], low[is_split], stop[is_split]
        # Thresholds above the cut's own are in the bins from it on: v >= t is bin index >= cut.
        n, here = len(node), (np.arange(len(node)), forest.feature[node])
        middle = np.clip(cut[node], low[here], stop[here])
        node = np.concatenate([forest.left[node], forest.right[node]])
        low, stop = np.concatenate([low, low]), np.concatenate([stop, stop])
        stop[:n][here] = middle
        low[n:][here] = middle
    first, after, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return first, after, values
