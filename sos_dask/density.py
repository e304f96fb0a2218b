"""How densely stars fill label space: robust scales, and distances to the k-th neighbour."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ConfigError

_MAD_TO_SIGMA = 1.4826  # of a normal distribution
FloatArray = NDArray[np.float64]


def robust_scale(x: NDArray[np.floating]) -> tuple[FloatArray, FloatArray]:
    """Median and 1.4826 MAD of each column.

    Parameters
    ----------
    x : ndarray of float, shape (n, k)
        Finite.

    Returns
    -------
    center, scale : ndarray of float64, shape (k,)
        The scale of a column that hardly varies is 1.
    """
    center = np.median(x, axis=0).astype(np.float64)
    scale = _MAD_TO_SIGMA * np.median(np.abs(x - center), axis=0)
    return center, np.where(scale > 0, scale, 1.0)


def knn_distance(train: NDArray[np.floating], query: NDArray[np.floating], k: int) -> FloatArray:
    """Distance to the k-th nearest training star.

    Parameters
    ----------
    train : ndarray of float, shape (m, d)
        Scaled features. A query that is one of them finds itself first.
    query : ndarray of float, shape (n, d)
    k : int

    Returns
    -------
    ndarray of float64, shape (n,)

    Raises
    ------
    ConfigError
        There are fewer than ``k`` training stars.
    """
    from scipy.spatial import cKDTree

    if not 1 <= k <= len(train):
        raise ConfigError(f"there is no neighbour number {k} among {len(train)} stars")
    distance, _ = cKDTree(np.asarray(train, np.float64)).query(np.asarray(query, np.float64), [k])
    return np.asarray(distance[:, 0], dtype=np.float64)
