"""Folds for cross-validation: every pair of one star in one fold.

A reference star is known by a number of 64 bits that follows from its id and a seed alone. Pairs
are joined when they share a reference star, or when their targets are observations of one star;
what is joined gets the fold of its smallest number. So a fold depends on the stars alone, not on
their order, on other stars or on how the sky is cut: what was joined in each of two parts of the
sky is joined again over their edge (`smallest_of_joined`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import FloatArray, IntArray, KeyArray
from sos_dask.sky import healpix, neighbours
from sos_dask.sky.neighbours import Sky, is_crowded


def same_targets(
    ra: FloatArray,
    dec: FloatArray,
    cells29: IntArray,
    ids: list[IntArray],
    radius_arcsec: float,
    id_radius_arcsec: float,
) -> tuple[IntArray, IntArray]:
    """Find links between pairs whose targets may be one star.

    Parameters
    ----------
    ra, dec : ndarray of float64, shape (n,), deg
        Of the targets.
    cells29 : ndarray of int64, shape (n,)
        Order-29 cells of the targets, ascending.
    ids : list of ndarray of int64, shape (n,)
        Gaia ids of each release, not positive where there is none.
    radius_arcsec, id_radius_arcsec : float
        Targets within the first are linked, and within the second where they share an id.

    Returns
    -------
    i, j : ndarray of int64
        Row numbers, i < j; where many targets crowd, enough of all links that the same are joined.
    """
    reach = max(radius_arcsec, id_radius_arcsec) if ids else radius_arcsec
    if is_crowded(cells29, radius_arcsec):
        from sos_dask.stars.crowds import Places

        sky = Sky(ra, dec, cells29, np.zeros(len(ra), dtype=np.int64))
        links = [Places.of(sky, np.arange(len(ra))).links(radius_arcsec)]
        for release in ids:
            rows = np.flatnonzero(release > 0)
            links.append(Places.of(sky, rows, release[rows]).links(id_radius_arcsec))
    else:
        links = [(np.empty(0, dtype=np.int64),) * 2]
        for i, j in neighbours.candidates(cells29, reach, cells29):
            i, j = i[i < j], j[i < j]
            separation = healpix.separation_arcsec(ra[i], dec[i], ra[j], dec[j])
            linked = separation <= radius_arcsec
            for release in ids:
                equal = (release[i] == release[j]) & (release[i] > 0)
                linked |= equal & (separation <= id_radius_arcsec)
            links.append((i[linked], j[linked]))
    return np.concatenate([i for i, _ in links]), np.concatenate([j for _, j in links])


def smallest_of_joined(
    smallest: KeyArray, number: KeyArray, links: tuple[IntArray, IntArray]
) -> KeyArray:
    """Find the smallest number of all pairs that are joined with each pair, in one or more steps.

    Parameters
    ----------
    smallest : ndarray of uint64, shape (n,)
        The smallest number of what was joined before; at first ``number``. Pairs with the same one
        are joined.
    number : ndarray of uint64, shape (n,)
        `key_numbers` of the reference stars. Pairs of the same one are joined.
    links : tuple of two ndarrays of int64
        Row numbers of further pairs that are joined (`same_targets`).

    Returns
    -------
    ndarray of uint64, shape (n,)
    """
    known, node = np.unique(smallest, return_inverse=True)  # nodes are numbered by their numbers
    order = np.argsort(number, kind="stable")
    same = np.flatnonzero(number[order[1:]] == number[order[:-1]])
    i = np.concatenate([links[0], order[same]])
    j = np.concatenate([links[1], order[same + 1]])
    return np.asarray(known[_first_of_joined(len(known), node[i], node[j])][node])


def _first_of_joined(n: int, i: IntArray, j: IntArray) -> IntArray:
    """The first of all nodes that are joined with each of ``n`` nodes by edges between i and j.

    After Shiloach & Vishkin 1982, J. Algorithms 3, 57, without the step that bounds their rounds:
    groups have few stars. Importing scipy would take a worker longer than all its folds.
    """
    root = np.arange(n)
    while True:
        i, j = root[i], root[j]
        apart = i != j
        if not apart.any():
            return root
        i, j = i[apart], j[apart]
        np.minimum.at(root, np.maximum(i, j), np.minimum(i, j))
        while not np.array_equal(higher := root[root], root):
            root = higher


def fold_of(smallest: KeyArray, n_folds: int) -> NDArray[np.int8]:
    """Folds 0 to ``n_folds - 1`` of what is joined, by its smallest number."""
    return np.asarray(smallest % np.uint64(n_folds), dtype=np.int8)
