"""Whether a correction adds artifacts: is it smooth where the pairs are, and tame where not.

Label space is cut into the cells that trends are binned by; a cell with enough pairs is covered.
Along each axis a correction is followed through the centre of every covered cell in `STEPS` equal
steps a cell, finer than the labels are known. Over a step h a smooth trend has a second difference
of only h² times its curvature, next to nothing for every method that follows it; a step of trees
shows with its full height, whatever h. *Roughness* is the root mean square of the second
differences over the *noise*: the scatter of the best corrected pairs over the root of the number of
pairs in a typical covered cell, which is how well the pairs know the correction there. *Jump* is
the largest change over one step. Intervals are percentiles over resampled cells; that of a largest
value ends at the value.

Outside the overlap: *uncovered* are the cells in the box of the training pairs without enough
pairs, and *beyond* is what the correction is held at past the faces of the box. *Exceeds* is how
far values there leave the range of those inside, *share* how many places do, *step* the largest
change from a covered cell to its uncovered neighbour, or to the face.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sos_dask.columns import BoolArray, FloatArray, FloatingArray, IntArray
from sos_dask.evidence.figures import figure_schema
from sos_dask.stats.bootstrap import draw, interval

STEPS = 8
MIN_CELLS = 5
UNCOVERED, BEYOND = "uncovered", "beyond"
Two = tuple[FloatArray, FloatArray]
Predict = Callable[[FloatArray], FloatingArray]

_ROUGH = ("roughness", "roughness_low", "roughness_high", "jump", "jump_low", "jump_high")
ARTIFACT_SCHEMA = figure_schema(f"method label {' '.join(_ROUGH)} noise n_cells")
OUTSIDE_SCHEMA = figure_schema(
    "method label where inside_low inside_high exceeds exceeds_low exceeds_high share "
    "step step_low step_high n_cells"
)


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of label space, with one axis a label."""

    edges: tuple[FloatArray, ...]  # along each label
    counts: IntArray  # pairs in each cell
    covered: BoolArray

    @classmethod
    def of(cls, labels: FloatingArray, edges: Sequence[FloatArray], min_count: int) -> Cells:
        """Count the pairs of these labels, shape (n, n_labels); none outside."""
        counts, _ = np.histogramdd(np.asarray(labels, dtype=np.float64), bins=list(edges))
        return cls(tuple(edges), counts.astype(np.int64), counts >= max(min_count, 1))

    @property
    def places(self) -> IntArray:
        """Places of the covered cells, shape (n_cells, n_labels)."""
        return np.argwhere(self.covered)

    @property
    def typical_count(self) -> float | None:
        """Median of the pairs in covered cells; None without any."""
        return float(np.median(self.counts[self.covered])) if self.covered.any() else None

    def sides(self, places: IntArray) -> Two:
        """Labels at the middle of cells, and widths of these, both of shape (n, n_labels)."""
        low, high = (
            np.stack([e[i + side] for e, i in zip(self.edges, places.T, strict=True)], axis=1)
            for side in (0, 1)
        )
        return (low + high) / 2, high - low


def artifacts(
    predict: Predict, cells: Cells, box: Two, n_labels: int, n_resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Measure a correction on cells of label space.

    Each label has ``second_difference``, its root mean square in the unit of the label with its
    interval; ``jump`` with ``jump_low`` and ``jump_high``; ``outside``, rows of `OUTSIDE_SCHEMA`
    but for method and label. None with fewer than `MIN_CELLS` covered cells.

    The correction gives differences (n, n_labels) at labels (n, n_axes); the box has the smallest
    and the largest label of the training pairs, both of shape (n_axes,).
    """
    places = cells.places
    if len(places) < MIN_CELLS:
        nothing = {"second_difference": [None] * 3, **_extreme("jump", np.empty(0), np.empty(0))}
        return [{**nothing, "outside": []}] * n_labels
    weights = draw(n_resamples, seed, len(places))
    at = predict(cells.sides(places)[0]).astype(np.float64)
    curves = _curves(predict, cells, n_labels)
    square = np.mean(np.diff(curves, n=2, axis=2) ** 2, axis=(1, 2))
    change = np.abs(np.diff(curves, axis=2)).max(axis=(1, 2))
    lows, highs = curves.min(axis=(0, 1, 2)).tolist(), curves.max(axis=(0, 1, 2)).tolist()
    ways = {UNCOVERED: _uncovered, BEYOND: _beyond}
    outside = {where: way(predict, cells, box, at) for where, way in ways.items()}
    found = []
    for k, (least, most) in enumerate(zip(lows, highs, strict=True)):
        value = float(np.sqrt(np.mean(square[:, k])))
        low, high = interval(value, np.sqrt(weights @ square[:, k] / weights.sum(axis=1)))
        one: dict[str, Any] = {"second_difference": [value, max(low, 0.0), high], "outside": []}
        one |= _extreme("jump", change[:, k], weights)
        for where, (values, steps) in outside.items():
            excess = np.maximum(np.maximum(values[:, k] - most, least - values[:, k]), 0.0)
            resamples = draw(n_resamples, seed, len(excess)) if len(excess) else weights[:, :0]
            row: dict[str, Any] = {"where": where, "inside_low": least, "inside_high": most}
            row |= _extreme("exceeds", excess, resamples)
            row["share"] = float(np.mean(excess > 0)) if len(excess) else None
            row |= _extreme("step", steps[:, k], weights)
            one["outside"].append({**row, "n_cells": len(excess)})
        found.append(one)
    return found


def _curves(predict: Predict, cells: Cells, n_labels: int) -> FloatArray:
    """Values along each axis through the covered cells, (n_cells, n_axes, n_points, n_labels)."""
    # One point more on either side than there are steps, so that the edges of the cell are crossed.
    place = (np.arange(-1, STEPS + 1) - (STEPS - 1) / 2) / STEPS
    centre, width = cells.sides(cells.places)
    n_cells, n_axes = centre.shape
    points = np.tile(centre[:, None, None, :], (1, n_axes, len(place), 1))
    for axis in range(n_axes):
        points[:, axis, :, axis] += place * width[:, axis, None]
    curves = predict(points.reshape(-1, n_axes)).astype(np.float64)
    return curves.reshape(n_cells, n_axes, len(place), n_labels)


def _uncovered(predict: Predict, cells: Cells, box: Two, at: FloatArray) -> Two:
    """Values in the cells of the box without enough pairs, and steps there from covered ones."""
    empty = np.argwhere(~cells.covered)
    centre, _ = cells.sides(empty)
    in_box = ((centre >= box[0]) & (centre <= box[1])).all(axis=1)
    empty, centre = empty[in_box], centre[in_box]
    # A rim of nothing, so that every cell has neighbours on both sides.
    values = np.full((*(n + 2 for n in cells.covered.shape), at.shape[1]), np.nan)
    if len(empty):
        values[tuple(empty.T + 1)] = predict(centre)
    steps = np.zeros_like(at)
    for axis in range(len(cells.edges)):
        for side in (-1, 1):
            neighbour = cells.places + 1
            neighbour[:, axis] += side
            steps = np.fmax(steps, np.abs(values[tuple(neighbour.T)] - at))
    return values[tuple(empty.T + 1)], steps


def _beyond(predict: Predict, cells: Cells, box: Two, at: FloatArray) -> Two:
    """Values past the faces of the box, and steps there from the outermost covered cells."""
    places = cells.places
    centre, width = cells.sides(places)
    values, steps = [], np.zeros_like(at)
    for axis in range(len(cells.edges)):
        for side, face in ((-1, box[0]), (1, box[1])):
            # Of the covered cells on one line only the outermost one looks out.
            before = np.cumsum(cells.covered, axis=axis)
            after = before.take([-1], axis=axis) - before + cells.covered
            last = np.flatnonzero((after if side > 0 else before)[tuple(places.T)] == 1)
            points = centre[last].copy()
            points[:, axis] = face[axis] + side * width[last, axis]
            held = predict(points).astype(np.float64)
            values.append(held)
            steps[last] = np.maximum(steps[last], np.abs(held - at[last]))
    return np.concatenate(values), steps


def _extreme(name: str, values: FloatArray, weights: FloatArray) -> dict[str, float | None]:
    """Largest of one value a cell with the interval of resampled cells; None without cells."""
    names = (name, f"{name}_low", f"{name}_high")
    if not len(values):
        return dict.fromkeys(names)
    resampled = np.where(weights > 0, values, -np.inf).max(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return dict(zip(names, (float(values.max()), float(low), float(high)), strict=True))


def artifact_rows(
    records: Mapping[str, Mapping[str, Any]], scatter: Mapping[str, float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Put measured artifacts of methods into rows of `ARTIFACT_SCHEMA` and of `OUTSIDE_SCHEMA`.

    Records are, by method, ``n_cells``, ``typical_count`` (of pairs, as `Cells` has it) and
    ``labels``, what `artifacts` gives for each of the labels of ``scatter``: by label, that of the
    best corrected pairs.
    """
    rough, outside = [], []
    for method, record in records.items():
        for (label, spread), one in zip(scatter.items(), record["labels"], strict=True):
            about, count = {"method": method, "label": label}, record["typical_count"]
            noise = spread / np.sqrt(count) if count else None
            row = {**about, "noise": noise, "n_cells": record["n_cells"]}
            row |= {name: one[name] for name in _ROUGH[3:]}
            for name, value in zip(_ROUGH[:3], one["second_difference"], strict=True):
                row[name] = value / noise if noise and value is not None else None
            rough.append(row)
            outside += [{**about, **place} for place in one["outside"]]
    return rough, outside
