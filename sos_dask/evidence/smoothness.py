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
import pyarrow as pa
from numpy.typing import NDArray

from sos_dask.stats.bootstrap import FloatArray, IntArray, draw, interval

STEPS = 8
MIN_CELLS = 5
UNCOVERED, BEYOND = "uncovered", "beyond"
Predict = Callable[[FloatArray], NDArray[np.floating]]

ARTIFACT_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("method", "label")),
        *(
            (name, pa.float64())
            for name in (
                "roughness", "roughness_low", "roughness_high", "jump", "jump_low", "jump_high",
                "noise",
            )
        ),
        ("n_cells", pa.int64()),
    ]
)  # fmt: skip
OUTSIDE_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("method", "label", "where")),
        *(
            (name, pa.float64())
            for name in (
                "inside_low", "inside_high", "exceeds", "exceeds_low", "exceeds_high", "share",
                "step", "step_low", "step_high",
            )
        ),
        ("n_cells", pa.int64()),
    ]
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Grid:
    """Cells of label space.

    Parameters
    ----------
    edges : tuple of ndarray of float64
        Along each label.
    counts : ndarray of int64, shape (n_0, n_1, n_2)
        Pairs in each cell.
    covered : ndarray of bool, shape (n_0, n_1, n_2)
    """

    edges: tuple[FloatArray, ...]
    counts: IntArray
    covered: NDArray[np.bool_]

    @classmethod
    def of(cls, labels: NDArray[np.floating], edges: Sequence[FloatArray], min_count: int) -> Grid:
        """Grid with the pairs of these labels, shape (n, 3), counted; none outside."""
        counts, _ = np.histogramdd(np.asarray(labels, dtype=np.float64), bins=list(edges))
        return cls(tuple(edges), counts.astype(np.int64), counts >= max(min_count, 1))

    @property
    def cells(self) -> IntArray:
        """Places of the covered cells, shape (n_cells, 3)."""
        return np.argwhere(self.covered)

    @property
    def typical_count(self) -> float:
        """Median of the pairs in covered cells; nan without any."""
        counts = self.counts[self.covered]
        return float(np.median(counts)) if len(counts) else float("nan")

    def centres(self, cells: IntArray) -> FloatArray:
        """Labels at the middle of cells, shape (n, 3)."""
        middles = [(edges[:-1] + edges[1:]) / 2 for edges in self.edges]
        return np.stack([middle[cells[:, i]] for i, middle in enumerate(middles)], axis=1)

    def widths(self, cells: IntArray) -> FloatArray:
        """Widths of cells, shape (n, 3)."""
        return np.stack([np.diff(e)[cells[:, i]] for i, e in enumerate(self.edges)], axis=1)


@dataclass(frozen=True, eq=False)
class Extreme:
    """A largest value over cells, with the interval of resampled cells."""

    value: float
    low: float
    high: float

    def record(self, name: str) -> dict[str, float | None]:
        """The figures as JSON values, under names that begin with this one."""
        values = {"": self.value, "_low": self.low, "_high": self.high}
        return {f"{name}{suffix}": _known(value) for suffix, value in values.items()}

    @classmethod
    def of(cls, values: FloatArray, weights: FloatArray) -> Extreme:
        """Largest of one value a cell; nan without cells."""
        if not len(values):
            return cls(float("nan"), float("nan"), float("nan"))
        resampled = np.where(weights > 0, values, -np.inf).max(axis=1)
        low, high = np.percentile(resampled, [2.5, 97.5])
        return cls(float(values.max()), float(low), float(high))


@dataclass(frozen=True, eq=False)
class Outside:
    """Behaviour of a correction of one label at places outside the overlap; see the module."""

    where: str
    inside: tuple[float, float]
    exceeds: Extreme
    share: float
    step: Extreme
    n_cells: int


@dataclass(frozen=True, eq=False)
class Artifacts:
    """What a correction of one label does on the grid.

    Parameters
    ----------
    second_difference : float
        Root mean square, in the unit of the label; nan with fewer than `MIN_CELLS` covered cells.
    replicates : ndarray of float64, shape (n_resamples,)
        The same of resampled cells.
    jump : Extreme
    n_cells : int
        Covered cells.
    outside : tuple of Outside
    """

    second_difference: float
    replicates: FloatArray
    jump: Extreme
    n_cells: int
    outside: tuple[Outside, ...]

    def record(self) -> dict[str, Any]:
        """All figures as JSON values, None where they are not known."""
        low, high = interval(self.second_difference, self.replicates)
        return {
            "second_difference": [_known(v) for v in (self.second_difference, max(low, 0.0), high)],
            **self.jump.record("jump"),
            "outside": [
                {
                    "where": place.where,
                    "inside_low": place.inside[0],
                    "inside_high": place.inside[1],
                    **place.exceeds.record("exceeds"),
                    "share": _known(place.share),
                    **place.step.record("step"),
                    "n_cells": place.n_cells,
                }
                for place in self.outside
            ],
        }


def artifacts(
    predict: Predict,
    grid: Grid,
    box: tuple[FloatArray, FloatArray],
    n_labels: int,
    n_resamples: int,
    seed: int,
) -> list[Artifacts]:
    """Measure a correction on a grid.

    Parameters
    ----------
    predict : callable
        Differences of all labels, shape (n, n_labels), at labels of shape (n, 3).
    grid : Grid
    box : tuple of two ndarray of float64, shape (3,)
        Smallest and largest label of the training pairs.
    n_resamples, seed : int

    Returns
    -------
    list of Artifacts
        One a label.
    """
    cells = grid.cells
    nan = float("nan")
    if len(cells) < MIN_CELLS:
        nothing = Artifacts(nan, np.empty(0), Extreme(nan, nan, nan), len(cells), ())
        return [nothing] * n_labels
    weights = draw(n_resamples, seed, len(cells))
    centre, width = grid.centres(cells), grid.widths(cells)
    # One point more on either side than there are steps, so that the edges of the cell are crossed.
    place = (np.arange(-1, STEPS + 1) - (STEPS - 1) / 2) / STEPS
    points = np.repeat(centre[:, None, None, :], 3, axis=1)
    points = np.repeat(points, len(place), axis=2)
    for axis in range(3):
        points[:, axis, :, axis] += place * width[:, axis, None]
    curves = predict(points.reshape(-1, 3)).astype(np.float64)
    curves = curves.reshape(len(cells), 3, len(place), n_labels)
    square = np.mean(np.diff(curves, n=2, axis=2) ** 2, axis=(1, 2))
    change = np.abs(np.diff(curves, axis=2)).max(axis=(1, 2))
    at_centre = predict(centre).astype(np.float64)
    inside = curves.min(axis=(0, 1, 2)), curves.max(axis=(0, 1, 2))
    uncovered = _Places.uncovered(predict, grid, box, at_centre)
    beyond = _Places.beyond(predict, grid, box, at_centre)
    totals = weights.sum(axis=1)
    return [
        Artifacts(
            float(np.sqrt(np.mean(square[:, k]))),
            np.sqrt(weights @ square[:, k] / totals),
            Extreme.of(change[:, k], weights),
            len(cells),
            tuple(
                places.measured(where, k, (float(inside[0][k]), float(inside[1][k])), weights, seed)
                for where, places in ((UNCOVERED, uncovered), (BEYOND, beyond))
            ),
        )
        for k in range(n_labels)
    ]


@dataclass(frozen=True, eq=False)
class _Places:
    """Values outside the overlap, (n, n_labels), and steps to there from each covered cell."""

    values: FloatArray
    steps: FloatArray

    @classmethod
    def uncovered(
        cls, predict: Predict, grid: Grid, box: tuple[FloatArray, FloatArray], at: FloatArray
    ) -> _Places:
        empty = np.argwhere(~grid.covered)
        centre = grid.centres(empty)
        in_box = ((centre >= box[0]) & (centre <= box[1])).all(axis=1)
        empty, centre = empty[in_box], centre[in_box]
        values = np.full((*grid.covered.shape, at.shape[1]), np.nan)
        if len(empty):
            values[tuple(empty.T)] = predict(centre)
        # A rim of nothing, so that every cell has six neighbours.
        padded = np.pad(values, ((1, 1), (1, 1), (1, 1), (0, 0)), constant_values=np.nan)
        steps = np.zeros_like(at)
        for axis in range(3):
            for side in (-1, 1):
                neighbour = grid.cells + 1
                neighbour[:, axis] += side
                change = np.abs(padded[tuple(neighbour.T)] - at)
                steps = np.fmax(steps, change)
        return cls(values[tuple(empty.T)], steps)

    @classmethod
    def beyond(
        cls, predict: Predict, grid: Grid, box: tuple[FloatArray, FloatArray], at: FloatArray
    ) -> _Places:
        cells = grid.cells
        centre, width = grid.centres(cells), grid.widths(cells)
        values, steps = [], np.zeros_like(at)
        for axis in range(3):
            for side, face in ((-1, box[0]), (1, box[1])):
                # Of the covered cells on one line only the outermost one looks out.
                far = np.cumsum(grid.covered[_turned(axis, side)], axis=axis)[_turned(axis, side)]
                last = np.flatnonzero(far[tuple(cells.T)] == 1)
                points = centre[last].copy()
                points[:, axis] = face[axis] + side * width[last, axis]
                held = predict(points).astype(np.float64)
                values.append(held)
                steps[last] = np.maximum(steps[last], np.abs(held - at[last]))
        return cls(np.concatenate(values), steps)

    def measured(
        self, where: str, label: int, inside: tuple[float, float], weights: FloatArray, seed: int
    ) -> Outside:
        values = self.values[:, label]
        excess = np.maximum(np.maximum(values - inside[1], inside[0] - values), 0.0)
        resamples = draw(len(weights), seed, len(excess)) if len(excess) else weights[:, :0]
        return Outside(
            where,
            inside,
            Extreme.of(excess, resamples),
            float(np.mean(excess > 0)) if len(excess) else float("nan"),
            Extreme.of(self.steps[:, label], weights),
            len(excess),
        )


def _turned(axis: int, side: int) -> tuple[slice, ...]:
    """Index that turns an axis around for the upper side: sums begin at the outermost cell."""
    return tuple(slice(None, None, -1 if i == axis and side > 0 else 1) for i in range(3))


def artifact_rows(
    records: Mapping[str, Mapping[str, Any]], scatter: Mapping[str, float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of `ARTIFACT_SCHEMA` and of `OUTSIDE_SCHEMA`.

    Parameters
    ----------
    records : mapping
        By method: ``n_cells``, ``typical_count`` (of pairs, as `Grid` has it) and ``labels``, what
        `Artifacts.record` gives for each of the labels of ``scatter``.
    scatter : mapping of str to float
        By label, of the best corrected pairs.
    """
    rough, outside = [], []
    for method, record in records.items():
        for (label, spread), one in zip(scatter.items(), record["labels"], strict=True):
            about = {"method": method, "label": label}
            count = record["typical_count"]
            noise = spread / np.sqrt(count) if count else None
            names = ("roughness", "roughness_low", "roughness_high")
            values = [
                value / noise if noise and value is not None else None
                for value in one["second_difference"]
            ]
            rough.append(
                {
                    **about,
                    **dict(zip(names, values, strict=True)),
                    **{name: one[name] for name in ("jump", "jump_low", "jump_high")},
                    "noise": noise,
                    "n_cells": record["n_cells"],
                }
            )
            outside += [{**about, **place} for place in one["outside"]]
    return rough, outside


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
