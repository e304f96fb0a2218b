"""Places on the sky with very many rows: what is asked of neighbours without a list of their pairs.

Rows at one position are one place, and a tree over the places answers for all of them (`trees`).
Separations that rounding could put on either side of the radius are measured as everywhere else, so
that the answers are those of brute force to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.sky.healpix import MAX_ORDER, FloatArray, IntArray
from sos_dask.sky.neighbours import order_for_radius
from sos_dask.sky.sphere import ARCSEC_PER_RADIAN, separation_arcsec, unit_vectors

if TYPE_CHECKING:
    from sos_dask.sky.trees import Stars, Tree

BoolArray = NDArray[np.bool_]

# Chords of unit vectors in double precision are good to a fifth of this (2e-9 arcsec).
_ROUNDING = 1e-14
_CROWD = 64


@dataclass(frozen=True)
class Sky:
    """Rows on the sky.

    Parameters
    ----------
    ra, dec : ndarray of float64, shape (n,), deg
    cells : ndarray of int64, shape (n,)
        Order-29 cells of the positions.
    rank : ndarray of int64, shape (n,)
        Preference, the smallest first; of equal ranks the first row.
    """

    ra: FloatArray
    dec: FloatArray
    cells: IntArray
    rank: IntArray

    def separation(self, i: IntArray, j: IntArray) -> FloatArray:
        """Separations of rows in arcsec."""
        return separation_arcsec(self.ra[i], self.dec[i], self.ra[j], self.dec[j])

    def preferred(self, rows: IntArray, *keys: NDArray[Any]) -> tuple[IntArray, IntArray]:
        """The same as `preferred` of some rows."""
        first, place = preferred((rows, self.rank[rows]), *keys)
        return rows[first], place


def preferred(order: tuple[IntArray, ...], *keys: NDArray[Any]) -> tuple[IntArray, IntArray]:
    """Of rows with equal keys the first one in an order, and which of these each row belongs to.

    Parameters
    ----------
    order : tuple of ndarray of int64, shape (n,)
        The last one counts first.
    keys : ndarray, shape (n,)
        The last one counts first, too.

    Returns
    -------
    rows : ndarray of int64, shape (m,)
        In the order of the keys.
    place : ndarray of int64, shape (n,)
        Place among them by row.
    """
    at = np.lexsort((*order, *keys))
    new = np.zeros(len(at), dtype=np.bool_)
    new[:1] = True
    for key in keys:
        values = key[at]
        new[1:] |= values[1:] != values[:-1]
    place = np.empty(len(at), dtype=np.int64)
    place[at] = np.cumsum(new) - 1
    return at[new], place


def is_crowded(cells29: IntArray, radius_arcsec: float) -> bool:
    """Whether more than 64 rows (sorted on the sky) share a cell a few radii wide."""
    cells = cells29 >> 2 * (MAX_ORDER - order_for_radius(radius_arcsec))
    return bool(np.any(cells[_CROWD:] == cells[:-_CROWD]))


@dataclass(frozen=True)
class Places:
    """Distinct positions of rows, each with its preferred row, for every key.

    Parameters
    ----------
    sky : Sky
    rows : ndarray of int64, shape (n,)
    row : ndarray of int64, shape (m,)
        Preferred row of each place, in the order of keys and of the sky.
    place : ndarray of int64, shape (n,)
        Place of each of ``rows``.
    key : ndarray of int64, shape (m,)
    """

    sky: Sky
    rows: IntArray
    row: IntArray
    place: IntArray
    key: IntArray

    @classmethod
    def of(cls, sky: Sky, rows: IntArray, key: IntArray | None = None) -> Places:
        """Places of some rows, ``key`` by row given (not negative)."""
        key = np.zeros(len(rows), dtype=np.int64) if key is None else key
        row, place = sky.preferred(rows, sky.dec[rows], sky.ra[rows], sky.cells[rows], key)
        of_place = np.empty(len(row), dtype=np.int64)
        of_place[place] = key
        return cls(sky, rows, row, place, of_place)

    @cached_property
    def tree(self) -> Tree:
        """Tree of the places."""
        from sos_dask.sky.trees import LEAF, Tree, build

        ra, dec = self.sky.ra[self.row], self.sky.dec[self.row]
        points = np.ascontiguousarray(unit_vectors(ra, dec))
        n_leaves = 1 << max(int(np.ceil(np.log2(max(len(ra), 1) / LEAF))), 0)
        boxes, spans = np.empty((2 * n_leaves, 6)), np.empty((2 * n_leaves, 2), dtype=np.int64)
        build(points, self.key, boxes, spans)
        return Tree(points, ra, dec, self.key, boxes, spans)

    def stars(self, star: IntArray) -> Stars:
        """Stars (numbered from 0, by row) at each place, each with its preferred row there."""
        from sos_dask.sky.trees import Stars

        sky = self.sky
        row, of = sky.preferred(self.rows, star, self.place)
        at, number = np.empty((2, len(row)), dtype=np.int64)
        at[of], number[of] = self.place, star
        order = np.lexsort((row, sky.rank[row], at))
        first = np.searchsorted(at[order], np.arange(len(self.row) + 1))
        return Stars(first, number[order], sky.rank[row[order]], row[order])

    def links(self, radius_arcsec: float) -> tuple[IntArray, IntArray]:
        """Links by which rows are joined as by all pairs within a radius that have equal keys.

        Returns
        -------
        i, j : ndarray of int64
            Rows, i < j. They are fewer than rows, but for pairs at the very radius.
        """
        from sos_dask.sky.trees import components_within

        i, j = self.rows, self.row[self.place]
        if len(self.row) > 1:
            low, high = _chords(radius_arcsec)
            count, room = np.array([1024]), -1
            while room < count[0]:
                room = int(count[0])
                root, (p, q) = np.arange(len(self.row)), np.empty((2, room), dtype=np.int64)
                components_within(self.tree, low, high, root, p, q, count)
            p, q = self.row[p[: count[0]]], self.row[q[: count[0]]]
            near = self.sky.separation(p, q) <= radius_arcsec
            i = np.concatenate([i, self.row, p[near]])
            j = np.concatenate([j, self.row[root], q[near]])
        apart = i != j
        return np.minimum(i, j)[apart], np.maximum(i, j)[apart]

    def candidates(self, others: Places, radius_arcsec: float) -> tuple[IntArray, IntArray]:
        """Rows of places and of those of another set that may be the nearest of the same key.

        Returns
        -------
        i, j : ndarray of int64
            Pairs of `row` within the radius: few that rounding leaves open, and at least the
            nearest.
        """
        from scipy.spatial import KDTree

        none = self.row[:0]
        if not len(self.row) or not len(others.row):
            return none, none
        high = np.sqrt(_chords(radius_arcsec)[1])
        # A fourth coordinate keeps keys apart, farther than any two points.
        asked, points = (np.column_stack([p.tree.points, 4.0 * p.key]) for p in (self, others))
        tree = KDTree(points, balanced_tree=False, compact_nodes=False)
        distance, place = tree.query(asked, k=2, distance_upper_bound=high)
        i = np.flatnonzero(np.isfinite(distance[:, 0]))
        distance, j = distance[i], place[i, 0]
        # Where rounding leaves open which one is the nearest, all that may be.
        is_open = distance[:, 1] <= distance[:, 0] + 2 * _ROUNDING
        some = i[is_open]
        balls = tree.query_ball_point(asked[some], distance[is_open, 0] + 2 * _ROUNDING)
        i = np.append(i[~is_open], np.repeat(some, [len(ball) for ball in balls]))
        j = np.append(j[~is_open], [at for ball in balls for at in ball]).astype(np.int64)
        i, j = self.row[i], others.row[j]
        near = self.sky.separation(i, j) <= radius_arcsec
        return i[near], j[near]

    def leading(self, radius_arcsec: float) -> IntArray:
        """Rows that none claims when rows in the order of rank claim all within the radius."""
        from sos_dask.sky.trees import claim_points

        sky, row, n = self.sky, self.row, len(self.row)
        if not n:
            return row
        order = np.lexsort((row, sky.rank[row]))
        limits = (*_chords(radius_arcsec), radius_arcsec)
        mistaken = np.empty(0, dtype=np.int64)
        count = np.array([n])
        while True:
            leads, is_near = np.zeros(n, dtype=np.bool_), np.empty(int(count[0]), dtype=np.bool_)
            pair = np.empty(len(is_near), dtype=np.int64)
            claim_points(self.tree, order, limits, mistaken, leads, pair, is_near, count)
            if count[0] > len(pair):
                continue
            pair, is_near = pair[: count[0]], is_near[: count[0]]
            p, q = pair // n, pair % n
            wrong = is_near != (sky.separation(row[p], row[q]) <= radius_arcsec)
            if not wrong.any():
                return row[leads]
            mistaken = np.union1d(mistaken, pair[wrong])
            count[0] = len(pair) + n


def join_in_order(
    sky: Sky,
    hosts: IntArray,
    host_star: IntArray,
    guests: IntArray,
    guest_star: IntArray,
    code: IntArray,
    radius_arcsec: float,
) -> IntArray:
    """Join stars over their links in the order of (separation, rank of host, rank of guest).

    Parameters
    ----------
    hosts, guests : ndarray of int64
        Rows.
    host_star, guest_star : ndarray of int64
        Their stars, numbered from 0.
    code : ndarray of int64
        By guest star: a host takes guests of one code.
    radius_arcsec : float
        Length of the longest link.

    Returns
    -------
    ndarray of int64
        Host of each guest star; -1: none.
    """
    from sos_dask.sky.trees import join_in_order as joined

    host_of = np.full(len(code), -1)
    if not len(hosts) or not len(guests):
        return host_of
    is_alone = np.bincount(code)[code] == 1
    places = Places.of(sky, hosts)
    # A guest that shares its code has places of its own.
    asked = Places.of(sky, guests, np.where(is_alone[guest_star], 0, guest_star + 1))
    sides = places.tree, places.stars(host_star), asked.tree, asked.stars(guest_star)
    joined(*sides, code, is_alone, _chords(radius_arcsec)[1], radius_arcsec, host_of)
    return host_of


def _chords(radius_arcsec: float) -> tuple[float, float]:
    """Squared chords: up to the first surely within a radius, above the second surely not."""
    chord = 2.0 * np.sin(radius_arcsec / ARCSEC_PER_RADIAN / 2.0)
    low = (chord - _ROUNDING) ** 2 if chord > _ROUNDING else -1.0
    return low, (chord + _ROUNDING) ** 2
