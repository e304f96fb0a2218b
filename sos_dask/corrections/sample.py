"""What symbolic regression searches with: shifted features, and a sample of the pairs.

Where pairs are dense fewer of them are taken: each cell of a coarse grid gives in proportion to the
square root of its pairs. Which ones, a hash of their numbers says, so the sample is the same in any
order of the pairs and any partitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import mixed
from sos_dask.corrections import (
    Float32Array,
    FloatArray,
    IntArray,
    Rows,
    Summary,
    TrainingSource,
    map_batches,
    training_rows,
)
from sos_dask.corrections.expression import Expression
from sos_dask.corrections.formula import Formula

# Cells of the grid of the sample, over +- 3 standard deviations of each feature.
CELLS = 8


@dataclass(frozen=True)
class Scale:
    """Features are shifted by a short number; while formulas evolve they are scaled too."""

    pivot: tuple[float, ...]
    width: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]

    @classmethod
    def of(cls, summary: Summary) -> Scale:
        """Of the pairs that are trained with."""
        pivot, width = [], []
        for mean, deviation in zip(summary.mean.tolist(), summary.deviation.tolist(), strict=True):
            wide = deviation > 1e-6 * max(1.0, abs(mean))
            size = float(f"{deviation:.1e}") if wide else 1.0
            # A short number within half of the width.
            pivot.append(round(mean, -math.floor(math.log10(size))) + 0.0)
            width.append(size)
        return cls(
            tuple(pivot),
            tuple(width),
            tuple(summary.minimum.tolist()),
            tuple(summary.maximum.tolist()),
        )

    def shift(self, features: Float32Array) -> FloatArray:
        """Columns of features less their pivots, shape (3, n)."""
        return np.ascontiguousarray((features.astype(np.float64) - np.array(self.pivot)).T)

    def finite(self, expression: Expression) -> bool:
        """Whether an expression is finite in the training box."""
        return Formula.parse(expression.text(self.pivot)).is_finite(self.minimum, self.maximum)


def draw_sample(
    source: TrainingSource,
    train_folds: Sequence[int] | None,
    client: Any,
    scale: Scale,
    wanted: int,
) -> Rows:
    """Draw pairs to search and judge with.

    Parameters
    ----------
    source : TrainingSource
    train_folds : sequence of int, optional
        None: all.
    client : distributed.Client, optional
    scale : Scale
    wanted : int
        About so many pairs; all where there are fewer.

    Returns
    -------
    Rows
        Sorted by their hash.
    """
    parts = map_batches(_cell_counts, source, client, train_folds, scale)
    counts = np.sum(parts, axis=0)
    share = _shares(counts, wanted)
    chosen = map_batches(_chosen_rows, source, client, train_folds, scale, share)
    hashes = np.concatenate([part[0] for part in chosen])
    rows = [
        np.concatenate([getattr(part[1], name) for part in chosen])
        for name in ("features", "differences", "weight")
    ]
    # Rows of one hash are equal, but for one in 1e19.
    order = np.argsort(hashes, kind="stable")
    return Rows(*(values[order] for values in rows))


def _shares(counts: IntArray, wanted: int) -> FloatArray:
    """Share of the pairs of each cell that is taken: about a / sqrt(pairs), at most all."""
    if counts.sum() <= wanted:
        return np.ones(len(counts))
    root = np.sqrt(np.maximum(counts, 1))
    low, high = 0.0, float(root.max())
    for _ in range(60):
        middle = (low + high) / 2
        if (counts * np.minimum(1.0, middle / root)).sum() < wanted:
            low = middle
        else:
            high = middle
    return np.minimum(1.0, low / root)


def _cells(rows: Rows, scale: Scale) -> IntArray:
    z = scale.shift(rows.features) / np.array(scale.width)[:, None]
    places = np.clip(np.floor((z + 3) * (CELLS / 6)), 0, CELLS - 1).astype(np.int64)
    return np.asarray((places[0] * CELLS + places[1]) * CELLS + places[2])


def _cell_counts(
    source: TrainingSource, index: int, train_folds: Sequence[int] | None, scale: Scale
) -> IntArray:
    rows = training_rows(source.load(index), train_folds)
    return np.bincount(_cells(rows, scale), minlength=CELLS**3)


def _chosen_rows(
    source: TrainingSource,
    index: int,
    train_folds: Sequence[int] | None,
    scale: Scale,
    share: FloatArray,
) -> tuple[NDArray[np.uint64], Rows]:
    rows = training_rows(source.load(index), train_folds)
    hashes = _hash(rows)
    chosen = (hashes >> np.uint64(11)) * 2.0**-53 < share[_cells(rows, scale)]
    picked = Rows(rows.features[chosen], rows.differences[chosen], rows.weight[chosen])
    return hashes[chosen], picked


def _hash(rows: Rows) -> NDArray[np.uint64]:
    """Of the numbers of each row."""
    values = np.concatenate([rows.features, rows.differences, rows.weight[:, None]], axis=1)
    # One bit pattern for all nan, one for both zeros.
    values = np.where(np.isnan(values), np.float32(np.nan), values + np.float32(0))
    state = np.zeros(len(values), dtype=np.uint64)
    for column in np.ascontiguousarray(values.T, dtype=np.float32).view(np.uint32):
        state = mixed(state + column)
    return state
