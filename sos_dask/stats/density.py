"""How densely a sample fills its space: distances to nearest neighbours on robust scales."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_LEAF = 16


def robust_scale(x: NDArray[np.floating]) -> tuple[FloatArray, FloatArray]:
    """Center and scale of each column, which outliers do not move.

    Parameters
    ----------
    x : ndarray of float, shape (n, k)
        Finite, at least one row.

    Returns
    -------
    center : ndarray of float64, shape (k,)
        Medians.
    scale : ndarray of float64, shape (k,)
        1.4826 times the median absolute deviation from the median; where more than half of the
        values are equal the standard deviation, and 1 where all are.
    """
    x = np.asarray(x, dtype=np.float64)
    center = np.median(x, axis=0)
    scale = _MAD_TO_SIGMA * np.median(np.abs(x - center), axis=0)
    scale = np.where(scale > 0, scale, np.std(x, axis=0))
    return center, np.where(scale > 0, scale, 1.0)


def knn_distance(
    train: NDArray[np.floating],
    query: NDArray[np.floating],
    k: int,
    within: float = np.inf,
) -> NDArray[np.float64]:
    """Distance to the k-th nearest neighbour: large where the sample is thin.

    Parameters
    ----------
    train : ndarray of float, shape (n, d)
        The sample; finite, on one scale.
    query : ndarray of float, shape (m, d)
        Rows of the sample itself count as their own first neighbour: ask for one more.
    k : int
        From 1; of a sample with fewer rows the farthest one counts.
    within : float
        Farther ones may be given as infinite, which is far cheaper to know.

    Returns
    -------
    ndarray of float64, shape (m,)
        Of a row it does not depend on the other rows asked for, nor on the order of the sample.
    """
    from scipy.spatial import cKDTree

    query = np.asarray(query, dtype=np.float64)
    tree = cKDTree(np.asarray(train, dtype=np.float64), leafsize=_LEAF)
    # Rows that are near each other ask for the same branches: one after the other they take half
    # the time of rows in the order of the sky.
    order = cKDTree(query, leafsize=_LEAF).indices
    found = np.empty(len(query))
    bound = within * (1 + 1e-9)  # never less after it is squared
    k = min(k, len(train))
    found[order] = tree.query(query[order], k=[k], distance_upper_bound=bound)[0][:, 0]
    return found
