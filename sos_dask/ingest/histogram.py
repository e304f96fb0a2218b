"""Rows a cell of the sky: they decide the partitions, and where their rows lie in sorted pieces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from sos_dask.sky.healpix import MAX_ORDER, HealpixPixel

HISTOGRAM_ORDER = 10
_SHIFT = 2 * (MAX_ORDER - HISTOGRAM_ORDER)


def histogram_of(cells29: NDArray[np.int64]) -> NDArray[np.int32]:
    """Cells that hold rows, and their numbers of rows.

    Parameters
    ----------
    cells29 : ndarray of int64, shape (n,)
        ``_healpix_29`` of the rows, ascending.

    Returns
    -------
    ndarray of int32, shape (2, m)
        Cells of ``HISTOGRAM_ORDER``, ascending; rows in each.
    """
    cells = cells29 >> _SHIFT
    first = np.flatnonzero(np.append(True, cells[1:] != cells[:-1])[: len(cells)])
    return np.stack([cells[first], np.diff(first, append=len(cells))]).astype(np.int32)


def partition_edges(
    pixels: Sequence[HealpixPixel], histograms: Iterable[NDArray[np.int32]]
) -> NDArray[np.int32]:
    """Where the rows of each partition begin in sorted pieces.

    Parameters
    ----------
    pixels : sequence of HealpixPixel
        Partitions in the order of the sky; together they hold all rows, so that where one ends the
        next begins.
    histograms : iterable of ndarray of int32, shape (2, m)
        `histogram_of` each piece.

    Returns
    -------
    ndarray of int32, shape (partitions + 1, pieces)
        The last row holds the rows of the pieces.
    """
    starts = np.array([pixel.first >> _SHIFT for pixel in pixels], dtype=np.int64)
    edges = [
        np.append(0, np.cumsum(n_rows))[[*np.searchsorted(cells, starts), len(cells)]]
        for cells, n_rows in histograms
    ]
    return np.array(edges, np.int32).reshape(-1, len(starts) + 1).T
