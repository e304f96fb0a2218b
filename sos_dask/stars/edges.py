"""The sky around a partition that its stars can reach into."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sos_dask.sky.healpix import (
    MAX_ORDER,
    HealpixPixel,
    IntArray,
    Ranges,
    cell_ranges,
    with_neighbours,
)
from sos_dask.sky.neighbours import near_edge, order_for_radius

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Edges:
    """Cells around those rows of a partition that can have links out of it.

    Parameters
    ----------
    pixel : HealpixPixel
    order : int
        Order of the cells; a cell and its neighbours hold all that is within reach of the cell.
    near_edge : ndarray of bool, shape (n,)
        Rows of the partition that can have links out of it.
    inner : ndarray of int64, shape (m,)
        Cells of which all that is within reach is read; sorted, unique.
    """

    pixel: HealpixPixel
    order: int
    near_edge: BoolArray
    inner: IntArray

    @classmethod
    def of(cls, pixel: HealpixPixel, cells29: IntArray, reach_arcsec: float) -> Edges:
        """The cells of the rows that can have links, and one more around.

        Parameters
        ----------
        pixel : HealpixPixel
        cells29 : ndarray of int64, shape (n,)
            Order-29 cells of the rows of the pixel.
        reach_arcsec : float
            Length of the longest link.
        """
        near = near_edge(pixel, cells29, reach_arcsec)
        empty = cls(pixel, order_for_radius(reach_arcsec), near, np.empty(0, dtype=np.int64))
        return empty.grown(cells29, near, 1)

    def grown(self, cells29: IntArray, rows: BoolArray, layers: int) -> Edges:
        """More cells: so many layers around those of some rows that are near the edge."""
        cells = np.unique(cells29[rows & self.near_edge] >> self._shift)
        for _ in range(layers):
            cells = _with_neighbours(cells, self.order)
        return Edges(self.pixel, self.order, self.near_edge, np.union1d(self.inner, cells))

    @property
    def ranges(self) -> Ranges:
        """What is to be read: order-29 ranges outside of the pixel, sorted and disjoint."""
        first, stop = self.pixel.first, self.pixel.stop
        found = cell_ranges(_with_neighbours(self.inner, self.order), self.order)
        before = [(low, min(high, first)) for low, high in found if low < first]
        return before + [(max(low, stop), high) for low, high in found if high > stop]

    def is_frontier(self, cells29: IntArray) -> BoolArray:
        """Rows outside of the pixel that may have links into sky that is not read."""
        outside = (cells29 < self.pixel.first) | (cells29 >= self.pixel.stop)
        rows = np.flatnonzero(outside)
        outside[rows] = ~np.isin(cells29[rows] >> self._shift, self.inner)
        return outside

    @property
    def _shift(self) -> int:
        return 2 * (MAX_ORDER - self.order)


def _with_neighbours(cells: IntArray, order: int) -> IntArray:
    found = np.unique(with_neighbours(cells, order))
    return found[found >= 0]
