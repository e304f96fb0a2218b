"""Values on an even grid over three features, smeared, and interpolated linearly in between.

Smeared trees need not be looked up tree by tree, or step by step: their values at the nodes of a
grid as fine as the smearing say all that is left of them. A hundred trees become a few megabytes
that stay in the cache, and what is in between the nodes has no steps at all.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sos_dask.corrections import Content, Float32Array, FloatArray
from sos_dask.errors import ModelError
from sos_dask.problem import BLOCK_ROWS

# Nodes along an axis; with three labels in double precision the filter needs 50 MB for all.
MAX_NODES = 128
# Distance of nodes, in standard deviations of the Gaussian: linear interpolation then widens the
# kernel by 4 %: it adds h^2 / 6 to its variance.
SPACING = 0.7


@dataclass(frozen=True)
class Grid:
    """Values at the nodes of an even grid.

    Parameters
    ----------
    low, high : ndarray of float32, shape (3,)
        First and last node of each axis.
    values : ndarray of float32, shape (n0, n1, n2, n_labels)
        At least two nodes an axis.
    """

    low: Float32Array
    high: Float32Array
    values: Float32Array

    def predict(self, features: Float32Array) -> Float32Array:
        """Values by trilinear interpolation; outside the grid those of the nearest face.

        A row's value does not depend on the other rows.

        Parameters
        ----------
        features : ndarray of float32, shape (n, 3)
            Finite.

        Returns
        -------
        ndarray of float32, shape (n, n_labels)
        """
        out = np.empty((len(features), self.values.shape[-1]), dtype=np.float32)
        flat = self.values.reshape(-1, self.values.shape[-1])
        strides = np.array(self.values.strides[:3]) // self.values.strides[2]
        for start in range(0, len(features), BLOCK_ROWS):
            block = features[start : start + BLOCK_ROWS]
            cell = np.zeros(len(block), dtype=np.int64)
            shares = []
            for axis, n in enumerate(self.values.shape[:3]):
                width = self.high[axis] - self.low[axis]
                place = np.clip(block[:, axis] - self.low[axis], 0, width)
                place *= np.float32((n - 1) / width if width > 0 else 0.0)
                index = np.minimum(place.astype(np.int64), n - 2)
                cell += index * strides[axis]
                shares.append((place - index).astype(np.float32)[:, None])
            out[start : start + BLOCK_ROWS] = _interpolated(flat, cell, strides.tolist(), shares)
        return out

    def to_bytes(self) -> bytes:
        """The grid as the content of a file: three NumPy arrays one after the other."""
        file = io.BytesIO()
        for array in (self.low, self.high, self.values):
            np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: Content) -> Grid:
        """Grid from what `to_bytes` gave.

        Raises
        ------
        ModelError
            The content is no grid.
        """
        file = io.BytesIO(content)
        try:
            arrays = [np.lib.format.read_array(file, allow_pickle=False) for _ in range(3)]
        except (ValueError, EOFError) as error:
            raise ModelError(f"the grid of the residuals is damaged: {error}") from None
        low, high, values = arrays
        if low.shape != (3,) or high.shape != (3,) or values.ndim != 4 or min(values.shape) < 2:
            raise ModelError("the grid of the residuals is damaged: it has other axes")
        return cls(low, high, values)


def _interpolated(
    flat: Float32Array, cell: NDArray[np.int64], strides: list[int], shares: list[Float32Array]
) -> Float32Array:
    """Linear along the first axis of what is linear along the others."""
    if not strides:
        return np.take(flat, cell, axis=0)
    below = _interpolated(flat, cell, strides[1:], shares[1:])
    above = _interpolated(flat, cell + strides[0], strides[1:], shares[1:])
    above -= below
    above *= shares[0]
    above += below
    return above


def smeared(
    function: Callable[[Float32Array], Float32Array],
    low: Float32Array,
    high: Float32Array,
    width: FloatArray,
) -> Grid:
    """Grid of a function smeared with a Gaussian; beyond the box it stays as at the nearest face.

    Parameters
    ----------
    function : callable
        Takes features (n, 3) of float32, gives values (n, n_labels).
    low, high : ndarray of float32, shape (3,)
        The box.
    width : ndarray of float64, shape (3,)
        Standard deviation of the Gaussian along each axis. Where ``MAX_NODES`` are too few to
        follow it, the nodes are farther apart and the interpolation smears more.
    """
    from scipy.ndimage import gaussian_filter1d

    length = (high - low).astype(np.float64)
    cells = np.clip(np.ceil(length / (width * SPACING)), 1, MAX_NODES - 1).astype(np.int64)
    axes = [
        np.linspace(a, b, n + 1, dtype=np.float32) for a, b, n in zip(low, high, cells, strict=True)
    ]
    # Plane by plane: all nodes at once would be the largest array of the whole training.
    planes = [_plane(function, first, axes[1:]) for first in axes[0]]
    values = np.stack(planes).astype(np.float64)
    for axis in range(3):
        if length[axis] > 0:
            sigma = width[axis] * cells[axis] / length[axis]
            values = gaussian_filter1d(values, sigma, axis=axis, mode="nearest", truncate=3.0)
    return Grid(low, high, values.astype(np.float32))


def _plane(
    function: Callable[[Float32Array], Float32Array],
    first: np.float32,
    others: list[Float32Array],
) -> Float32Array:
    shape = tuple(len(axis) for axis in others)
    nodes = np.empty((*shape, 3), dtype=np.float32)
    nodes[..., 0] = first
    nodes[..., 1], nodes[..., 2] = np.meshgrid(*others, indexing="ij")
    return function(nodes.reshape(-1, 3)).reshape(*shape, -1)
