"""Tree ensembles over three inputs as an exact look-up table.

Every split compares one feature with a threshold, so an ensemble is constant on each cell of the
grid that its thresholds make: at most 256 x 256 x 256 cells with 256 bins. The value of a leaf is
added to its box of cells by its corners in a difference array, whose cumulative sums along the
axes are the table (a summed-area table backwards: Crow 1984, SIGGRAPH, p. 207). A prediction is
then three binary searches and one look-up, whatever the number of trees, for all labels at once.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ModelError

MAX_CELLS = 1 << 25
_BLOCK = 1 << 13
_PLACES = 1 << 13
Float32Array = NDArray[np.float32]
FloatArray = NDArray[np.float64]
Interval = tuple[int, int]


@dataclass(frozen=True)
class LookupTable:
    """Sums of trees on a grid of cells.

    Parameters
    ----------
    edges : tuple of ndarray of float32
        Thresholds of each feature, sorted. A value v is in bin ``number of thresholds <= v``; the
        bin after the last is that of missing values.
    values : ndarray of float32, shape (n0, n1, n2, n_labels)
    """

    edges: tuple[Float32Array, ...]
    values: Float32Array

    def predict(self, features: Float32Array) -> Float32Array:
        """Sums of the trees.

        Parameters
        ----------
        features : ndarray of float32, shape (n, 3)
            nan takes the direction that each tree keeps for missing values.

        Returns
        -------
        ndarray of float32, shape (n, n_labels)
        """
        n_labels = self.values.shape[-1]
        flat = self.values.reshape(-1, n_labels)
        out = np.empty((len(features), n_labels), dtype=np.float32)
        for first in range(0, len(features), _BLOCK):
            block = features[first : first + _BLOCK]
            cell = np.zeros(len(block), dtype=np.int64)
            for axis, bins in enumerate(self._bins):
                cell *= self.values.shape[axis]
                cell += bins.of(np.ascontiguousarray(block[:, axis]))
            # No cell is outside; the mode that checks it would copy all once more.
            np.take(flat, cell, axis=0, out=out[first : first + _BLOCK], mode="clip")
        return out

    @cached_property
    def _bins(self) -> tuple[_Bins, ...]:
        return tuple(_Bins.of_edges(edges) for edges in self.edges)

    def to_bytes(self) -> bytes:
        """The table as the content of a file: four NumPy arrays one after the other."""
        file = io.BytesIO()
        for array in (*self.edges, self.values):
            np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
        return file.getvalue()

    @classmethod
    def from_buffer(cls, buffer: Any) -> LookupTable:
        """Table in a buffer written by `to_bytes`; memory-mapped content is not copied.

        Raises
        ------
        ModelError
            The content is no table.
        """
        view = memoryview(buffer)
        arrays = []
        try:
            position = 0
            for _ in range(4):
                head = io.BytesIO(bytes(view[position : position + 512]))
                np.lib.format.read_magic(head)
                shape, _, dtype = np.lib.format.read_array_header_1_0(head)
                position += head.tell()
                count = int(np.prod(shape))
                array = np.frombuffer(view, dtype, count, position).reshape(shape)
                arrays.append(array)
                position += array.nbytes
        except (ValueError, EOFError) as error:
            raise ModelError(f"the look-up table of the trees is damaged: {error}") from None
        return cls(tuple(arrays[:3]), arrays[3])


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
        width = float(edges[-1] - edges[0]) if len(edges) else 0.0
        scale = np.float32(_PLACES / width if width > 0 else 0.0)
        low, high = (edges[0], edges[-1]) if len(edges) else (np.float32(0), np.float32(0))
        bins = cls(edges, np.zeros(_PLACES, dtype=np.intp), 0, low, high, scale)
        counts = np.bincount(bins._place(edges), minlength=_PLACES)
        most = int(counts.max(initial=0))
        base = np.concatenate([[0], np.cumsum(counts)[:-1]])
        padded = np.append(edges, np.full(most, np.inf, np.float32))
        return cls(padded, base, most, low, high, scale)

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
        """Number of thresholds not above each value; one more for a missing value."""
        missing = np.isnan(values)
        if missing.any():
            values = np.where(missing, np.float32(np.inf), values)
        # No place is outside; an index in brackets takes half as long again.
        base = self.base.take(self._place(values), mode="clip")
        index = base.copy()
        for step in range(self.most):
            index += values >= self.edges.take(base + step, mode="clip")
        n_edges = len(self.edges) - self.most
        np.minimum(index, n_edges, out=index)  # the infinities are no thresholds
        if missing.any():
            index[missing] = n_edges + 1
        return index


def compile_trees(
    boosters: Sequence[Any],
    center: Sequence[float] | FloatArray | None = None,
    spread: Sequence[float] | FloatArray | None = None,
) -> LookupTable | None:
    """Make the table of several ensembles over the same three features.

    Parameters
    ----------
    boosters : sequence of xgboost.Booster
        One a label; regression with an identity link.
    center, spread : sequence of float, optional
        By label: the table holds ``center + spread * (sum of the trees)``; default 0 and 1.

    Returns
    -------
    LookupTable or None
        None where the thresholds make more than ``MAX_CELLS`` cells: too fine to be worth a table.
    """
    models = [json.loads(bytes(booster.save_raw("json")))["learner"] for booster in boosters]
    forests = [model["gradient_booster"]["model"]["trees"] for model in models]
    found: list[list[NDArray[np.float32]]] = [[], [], []]
    for tree in itertools.chain.from_iterable(forests):
        is_split = np.array(tree["left_children"]) != -1
        feature = np.array(tree["split_indices"])[is_split]
        threshold = np.array(tree["split_conditions"], dtype=np.float32)[is_split]
        for axis in range(3):
            found[axis].append(threshold[feature == axis])
    edges = tuple(np.unique(np.concatenate([np.empty(0, np.float32), *part])) for part in found)
    shape = tuple(len(part) + 2 for part in edges)
    if np.prod([float(n) for n in shape]) > MAX_CELLS:
        return None
    values = np.empty((*shape, len(boosters)), dtype=np.float32)
    for label, (model, forest) in enumerate(zip(models, forests, strict=True)):
        sums = _summed(forest, edges, shape)
        sums += _base_score(model)
        if spread is not None:
            sums *= spread[label]
        if center is not None:
            sums += center[label]
        values[..., label] = sums
    return LookupTable(edges, values)


def _base_score(model: dict[str, Any]) -> float:
    text = model["learner_model_param"]["base_score"]
    numbers = np.atleast_1d(np.array(json.loads(text), dtype=np.float32))
    return float(numbers[0])


def _summed(
    forest: list[dict[str, Any]], edges: tuple[Float32Array, ...], shape: tuple[int, ...]
) -> NDArray[np.float64]:
    boxes: list[tuple[Interval, ...]] = []
    amounts: list[float] = []
    for tree in forest:
        for intervals, value in _leaves(tree, edges):
            for box in itertools.product(*intervals):
                boxes.append(box)
                amounts.append(value)
    difference = np.zeros([n + 1 for n in shape])
    if boxes:
        ends = np.array(list(itertools.product((0, 1), repeat=3)))
        corners = np.array(boxes)[:, np.arange(3), ends].reshape(-1, 3)
        signed = np.outer(amounts, 1 - 2 * (ends.sum(axis=1) % 2))
        where = np.ravel_multi_index(tuple(corners.T), difference.shape)
        np.add.at(difference.reshape(-1), where, signed.reshape(-1))
    for axis in range(3):
        np.cumsum(difference, axis=axis, out=difference)
    return difference[:-1, :-1, :-1]


def _leaves(
    tree: dict[str, Any], edges: tuple[Float32Array, ...]
) -> Iterator[tuple[list[list[Interval]], float]]:
    """Value of each leaf with, for each axis, the intervals of bins that reach it."""
    left, right = tree["left_children"], tree["right_children"]
    feature = tree["split_indices"]
    condition = np.array(tree["split_conditions"], dtype=np.float32)
    missing_left = tree["default_left"]
    cut = [int(np.searchsorted(edges[f], c)) + 1 for f, c in zip(feature, condition, strict=True)]
    # Of each axis: first bin, stop, and whether missing values come here.
    start = [(0, len(part) + 1, True) for part in edges]
    stack = [(0, start)]
    while stack:
        node, box = stack.pop()
        if left[node] == -1:
            bins = [
                [(low, stop)] * (low < stop) + [(len(part) + 1, len(part) + 2)] * missing
                for (low, stop, missing), part in zip(box, edges, strict=True)
            ]
            yield bins, float(condition[node])
            continue
        axis = feature[node]
        low, stop, missing = box[axis]
        # Thresholds above the cut's own are in the bins from it on: v >= t is bin index >= cut.
        middle = min(max(cut[node], low), stop)
        below, above = list(box), list(box)
        below[axis] = (low, middle, missing and bool(missing_left[node]))
        above[axis] = (middle, stop, missing and not missing_left[node])
        stack += [(left[node], below), (right[node], above)]
