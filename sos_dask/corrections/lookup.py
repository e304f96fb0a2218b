"""Corrections as tables over their inputs: exact for trees, smeared and interpolated for hybrid.

Every split of a tree compares one input with a threshold, so an ensemble is constant on each cell
of the grid that its thresholds make: at most 256 x 256 x 256 cells with 256 bins of three inputs.
The value of a leaf is added to its box of cells by its corners in a difference array, whose
cumulative sums along the axes are the table (a summed-area table backwards: Crow 1984, SIGGRAPH,
p. 207). A prediction is then a binary search an input and one look-up, whatever the number of
trees, for all labels at once.

Smeared trees need not be looked up step by step: their values at the nodes of an even grid as fine
as the smearing tell all that is left of them. A hundred trees become a few megabytes that stay in
the cache, and between the nodes there are no steps at all.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import Float32Array, FloatArray, IntArray
from sos_dask.corrections.base import Content
from sos_dask.errors import ModelError
from sos_dask.stats.table import Grid, pack, unpack

MAX_CELLS = 1 << 25
_PLACES = 1 << 13
# Nodes along an axis; with three labels in double precision the filter needs 50 MB for all of
# three axes. With more axes there are no more nodes in all.
MAX_NODES = 128
# Distance of nodes, in standard deviations of the Gaussian: linear interpolation then widens the
# kernel by 4 %: it adds h^2 / 6 to its variance.
SPACING = 0.7


def _unpacked(content: Content, what: str) -> list[NDArray[Any]]:
    """Axes, then values, of `pack`."""
    arrays = unpack(content, what)
    if len(arrays) < 2 or any(axis.ndim != 1 for axis in arrays[:-1]):
        raise ModelError(f"{what} is damaged: it has other axes")
    return arrays


@dataclass(frozen=True)
class LookupTable:
    """Sums of trees on a grid of cells.

    Parameters
    ----------
    edges : tuple of ndarray of float32
        Thresholds of each input, sorted. A value v is in bin ``number of thresholds <= v``.
    values : ndarray of float32, shape (n0, n1, ..., n_labels)
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
        return tuple(_Bins.of_edges(edges) for edges in self.edges)

    def to_bytes(self) -> bytes:
        """The table as the content of a file."""
        return pack([*self.edges, self.values])

    @classmethod
    def from_buffer(cls, buffer: Content) -> LookupTable:
        """Table in a buffer written by `to_bytes`; `ModelError` where it is none."""
        what = "the look-up table of the trees"
        *edges, values = _unpacked(buffer, what)
        if values.shape[:-1] != tuple(len(part) + 1 for part in edges):
            raise ModelError(f"{what} is damaged: it has other axes")
        return cls(tuple(edges), values)


@dataclass(frozen=True)
class _Bins:
    """Bins of values without a binary search: an even grid says nearly where a value belongs.

    The place on the grid never falls where a value rises, whatever the rounding, so that only the
    thresholds of the same place have to be compared: mostly none or one.
    """

    edges: Float32Array  # then infinities, as many as thresholds share a place at most
    base: NDArray[np.intp]  # thresholds before each place
    most: int
    low: np.float32
    high: np.float32
    scale: np.float32

    @classmethod
    def of_edges(cls, edges: Float32Array) -> _Bins:
        low, high = (edges[0], edges[-1]) if len(edges) else (np.float32(0), np.float32(0))
        width = float(high) - float(low)
        places = _PLACES / width if width > 0 else 0.0
        # Without a scale all are in one place: also of widths that float32 cannot divide by.
        scale = np.float32(places if places < float(np.finfo(np.float32).max) else 0.0)
        bins = cls(edges, np.zeros(_PLACES, dtype=np.intp), 0, low, high, scale)
        counts = np.bincount(bins._place(edges), minlength=_PLACES)
        most = int(counts.max(initial=0))
        padded = np.append(edges, np.full(most, np.inf, np.float32))
        return replace(bins, edges=padded, base=np.cumsum(counts) - counts, most=most)

    def _place(self, values: Float32Array) -> NDArray[np.intp]:
        if not len(self.edges):
            return np.zeros(len(values), dtype=np.intp)
        place = np.clip(values, self.low, self.high)
        place -= self.low
        place *= self.scale
        np.minimum(place, _PLACES - 1, out=place)
        numbers: NDArray[np.intp] = place.astype(np.intp)
        return numbers

    def of(self, values: Float32Array) -> NDArray[np.intp]:
        """Number of thresholds not above each value."""
        # No place is outside; an index in brackets takes half as long again.
        base = self.base.take(self._place(values), mode="clip")
        index = base.copy()
        for step in range(self.most):
            index += values >= self.edges.take(base + step, mode="clip")
        return index


def compile_trees(
    boosters: Sequence[Any],
    center: Sequence[float] | FloatArray,
    spread: Sequence[float] | FloatArray,
) -> LookupTable | None:
    """Make the table of several ensembles over the same inputs.

    Parameters
    ----------
    boosters : sequence of xgboost.Booster
        One a label; regression with an identity link.
    center, spread : sequence of float
        By label: the table holds ``center + spread * (sum of the trees)``.

    Returns
    -------
    LookupTable or None
        None where the thresholds make more than ``MAX_CELLS`` cells: too large to be worth it.
    """
    models = [json.loads(bytes(booster.save_raw("json")))["learner"] for booster in boosters]
    forests = [_Forest.of(model["gradient_booster"]["model"]["trees"]) for model in models]
    edges = _edges(forests, int(models[0]["learner_model_param"]["num_feature"]))
    shape = tuple(len(part) + 1 for part in edges)
    if np.prod([float(n) for n in shape]) > MAX_CELLS:
        return None
    corners = [_corners(forest, edges) for forest in forests]
    bases = [_base_score(model) for model in models]
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
            sums += bases[label]
            of_labels[..., label] = sums * spread[label] + center[label]
    return LookupTable(edges, values)


def _base_score(model: dict[str, Any]) -> float:
    text = model["learner_model_param"]["base_score"]
    numbers = np.atleast_1d(np.array(json.loads(text), dtype=np.float32))
    return float(numbers[0])


@dataclass(frozen=True)
class _Forest:
    """Nodes of all trees one after the other; a leaf has no left node (-1) and its value."""

    roots: IntArray
    left: IntArray
    right: IntArray
    feature: IntArray
    value: Float32Array  # threshold of a split

    @classmethod
    def of(cls, trees: Sequence[dict[str, Any]]) -> _Forest:
        sizes = [len(tree["left_children"]) for tree in trees]
        roots = np.cumsum([0, *sizes])[:-1]

        def joined(name: str, dtype: Any) -> NDArray[Any]:
            return np.array(list(itertools.chain.from_iterable(t[name] for t in trees)), dtype)

        before = np.repeat(roots, sizes)
        left, right = joined("left_children", np.int64), joined("right_children", np.int64)
        return cls(
            roots,
            np.where(left < 0, -1, left + before),
            right + before,
            joined("split_indices", np.int64),
            joined("split_conditions", np.float32),
        )


def _edges(forests: Sequence[_Forest], n_inputs: int) -> tuple[Float32Array, ...]:
    """Thresholds of each input."""
    found = []
    for axis in range(n_inputs):
        parts = [f.value[(f.left >= 0) & (f.feature == axis)] for f in forests]
        found.append(np.unique(np.concatenate([np.empty(0, np.float32), *parts])))
    return tuple(found)


def _corners(
    forest: _Forest, edges: tuple[Float32Array, ...]
) -> tuple[IntArray, IntArray, FloatArray]:
    """Where the sums change: first entry of each plane of the first axis, cells in it, amounts."""
    shape = np.array([len(part) + 1 for part in edges])
    *ends, value = _leaves(forest, edges)
    places, amounts = [], []
    for corner in itertools.product((0, 1), repeat=len(shape)):
        places.append(np.stack([ends[end][:, axis] for axis, end in enumerate(corner)], axis=1))
        amounts.append(-value if sum(corner) % 2 else value)
    place, amount = np.concatenate(places), np.concatenate(amounts)
    inside = (place < shape).all(axis=1)
    place, amount = place[inside], amount[inside]
    order = np.argsort(place[:, 0], kind="stable")
    place = place[order]
    first = np.searchsorted(place[:, 0], np.arange(shape[0] + 1))
    strides = np.append(np.cumprod(shape[:1:-1])[::-1], 1)[: len(shape) - 1]
    return first, place[:, 1:] @ strides, amount[order]


def _leaves(
    forest: _Forest, edges: tuple[Float32Array, ...]
) -> tuple[IntArray, IntArray, FloatArray]:
    """Of each leaf that some value reaches: first bin and stop by axis, and its value."""
    cut = np.zeros(len(forest.left), dtype=np.int64)
    for axis, part in enumerate(edges):
        of_axis = forest.feature == axis
        cut[of_axis] = np.searchsorted(part, forest.value[of_axis]) + 1
    node = forest.roots
    low: IntArray = np.zeros((len(node), len(edges)), dtype=np.int64)
    stop: IntArray = low + np.array([len(part) + 1 for part in edges])
    found: list[tuple[NDArray[Any], ...]] = []
    while True:
        is_leaf = forest.left[node] < 0
        is_split = ~is_leaf
        is_leaf &= (low < stop).all(axis=1)
        value = forest.value[node[is_leaf]].astype(np.float64)
        found.append((low[is_leaf], stop[is_leaf], value))
        node, low, stop = node[is_split], low[is_split], stop[is_split]
        if not len(node):
            break
        # Thresholds above the cut's own are in the bins from it on: v >= t is bin index >= cut.
        n, here = len(node), (np.arange(len(node)), forest.feature[node])
        middle = np.clip(cut[node], low[here], stop[here])
        node = np.concatenate([forest.left[node], forest.right[node]])
        low, stop = np.concatenate([low, low]), np.concatenate([stop, stop])
        stop[:n][here] = middle
        low[n:][here] = middle
    first, after, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return first, after, values


@dataclass(frozen=True)
class SmearedTable:
    """Values at the nodes of an even grid.

    Parameters
    ----------
    low, high : ndarray of float32, shape (k,)
        First and last node of each axis.
    values : ndarray of float32, shape (n0, n1, ..., n_labels)
        At least two nodes an axis.
    """

    low: Float32Array
    high: Float32Array
    values: Float32Array

    def predict(self, features: Float32Array) -> Float32Array:
        """Interpolate linearly, shape (n, n_labels); outside the grid as on the nearest face."""
        grid = Grid(tuple(self.low), tuple(self.high), self.values.shape[:-1])
        return grid.interpolate(self.values.reshape(grid.size, -1), features)

    def to_bytes(self) -> bytes:
        """The grid as the content of a file."""
        return pack([self.low, self.high, self.values])

    @classmethod
    def from_bytes(cls, content: Content) -> SmearedTable:
        """Table from what `to_bytes` gave; `ModelError` where it is none."""
        what = "the grid of the residuals"
        arrays = _unpacked(content, what)
        shape = arrays[-1].shape[:-1]
        ends = [len(axis) for axis in arrays[:-1]]
        if ends != [len(shape)] * 2 or min(shape, default=0) < 2:
            raise ModelError(f"{what} is damaged: it has other axes")
        return cls(*arrays)


def smeared(
    function: Callable[[Float32Array], Float32Array],
    low: Float32Array,
    high: Float32Array,
    width: FloatArray,
) -> SmearedTable:
    """Tabulate a function smeared with a Gaussian; beyond the box it stays as at the nearest face.

    Parameters
    ----------
    function : callable
        Takes inputs (n, k) of float32, gives values (n, n_labels).
    low, high : ndarray of float32, shape (k,)
        The box.
    width : ndarray of float64, shape (k,)
        Standard deviation of the Gaussian along each axis. Where ``MAX_NODES`` are too few to
        follow it, the nodes are farther apart and the interpolation smears more.
    """
    from scipy.ndimage import gaussian_filter1d

    length = (high - low).astype(np.float64)
    cells = np.clip(np.ceil(length / (width * SPACING)), 1, MAX_NODES - 1).astype(np.int64)
    while np.prod(cells + 1.0) > MAX_NODES**3:
        cells = np.maximum(cells * 9 // 10, 1)
    axes = [
        np.linspace(a, b, n + 1, dtype=np.float32) for a, b, n in zip(low, high, cells, strict=True)
    ]
    # Plane by plane: all nodes at once would be the largest array of the whole training.
    shape = tuple(len(axis) for axis in axes[1:])
    mesh = np.meshgrid(np.float32(0), *axes[1:], indexing="ij")
    nodes = np.stack(mesh, axis=-1).reshape(-1, len(axes))
    planes = []
    for nodes[:, 0] in axes[0]:
        planes.append(function(nodes).reshape(*shape, -1))
    values = np.stack(planes).astype(np.float64)
    for axis in range(len(axes)):
        if length[axis] > 0:
            sigma = width[axis] * cells[axis] / length[axis]
            values = gaussian_filter1d(values, sigma, axis=axis, mode="nearest", truncate=3.0)
    return SmearedTable(low, high, values.astype(np.float32))
