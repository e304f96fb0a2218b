"""Places on the sky with very many rows: what is asked of neighbours without a list of their pairs.

Rows at one position are one place, and a tree over the places answers for all of them. No pair is
stored: memory and, but for the depth of the tree, time are linear in the places however many lie
within a radius. Places are unit vectors in the order of (key, place on the sky); a leaf is ``LEAF``
of them, and node k has the children 2 k and 2 k + 1. Squared chords up to ``low`` are within the
radius and those above ``high`` are not; what lies between is measured as everywhere else, so that
the answers are those of brute force to the last bit.

Numba takes half a CPU second to import: import this module inside a function whose rows crowd.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
from numba import njit

from sos_dask.columns import BoolArray, FloatArray, IntArray
from sos_dask.sky.healpix import ARCSEC_PER_RADIAN, unit_vectors
from sos_dask.sky.loops import compiled, sort_members
from sos_dask.sky.neighbours import Sky, first_of_runs, starts

LEAF = 4
_DEPTH = 128  # nodes that wait in a search: at most one a level, and two
# Chords of unit vectors in double precision are good to a fifth of this (2e-9 arcsec).
_ROUNDING = 1e-14


class Tree(NamedTuple):
    """Points with their keys, and the nodes above them.

    ``boxes`` are the lowest x, y, z and the highest, ``spans`` the lowest key and the highest,
    ``counts`` the numbers of points.
    """

    points: FloatArray
    ra: FloatArray
    dec: FloatArray
    key: IntArray
    boxes: FloatArray
    spans: IntArray
    counts: IntArray


class Stars(NamedTuple):
    """Rows of stars at points: those of point p are first[p] to first[p + 1], by (rank, row)."""

    first: IntArray
    star: IntArray
    rank: IntArray
    row: IntArray


@compiled
def build(points: FloatArray, key: IntArray, leaves: int) -> tuple[FloatArray, IntArray, IntArray]:
    """Make boxes, spans and counts; those of no points are empty."""
    boxes, spans = np.empty((2 * leaves, 6)), np.empty((2 * leaves, 2), dtype=np.int64)
    counts = np.zeros(2 * leaves, dtype=np.int64)
    boxes[:, :3], boxes[:, 3:] = np.inf, -np.inf
    spans[:, 0], spans[:, 1] = np.iinfo(np.int64).max, -1
    for p in range(len(points)):
        node = leaves + p // LEAF
        for axis in range(3):
            boxes[node, axis] = min(boxes[node, axis], points[p, axis])
            boxes[node, 3 + axis] = max(boxes[node, 3 + axis], points[p, axis])
        spans[node, 0], spans[node, 1] = min(spans[node, 0], key[p]), max(spans[node, 1], key[p])
        counts[node] += 1
    for node in range(2 * leaves - 1, 1, -1):
        above = node // 2
        for axis in range(3):
            boxes[above, axis] = min(boxes[above, axis], boxes[node, axis])
            boxes[above, 3 + axis] = max(boxes[above, 3 + axis], boxes[node, 3 + axis])
        spans[above, 0] = min(spans[above, 0], spans[node, 0])
        spans[above, 1] = max(spans[above, 1], spans[node, 1])
        counts[above] += counts[node]
    return boxes, spans, counts


@njit(inline="always")
def _gap(tree: Tree, node: int, point: FloatArray) -> float:
    """Squared distance from a point to a box."""
    total = 0.0
    for axis in range(3):
        away = max(tree.boxes[node, axis] - point[axis], point[axis] - tree.boxes[node, 3 + axis])
        total += max(away, 0.0) ** 2
    return total


@njit(inline="always")
def _arcsec(one: Tree, p: int, other: Tree, q: int) -> float:
    """`healpix.separation_arcsec`, but for the last digit."""
    d_lat, d_lon = np.radians(other.dec[q] - one.dec[p]), np.radians(other.ra[q] - one.ra[p])
    a, b = np.sin(d_lat / 2), np.sin(d_lon / 2)
    h = a * a + np.cos(np.radians(one.dec[p])) * np.cos(np.radians(other.dec[q])) * (b * b)
    return 2 * np.arcsin(np.sqrt(min(h, 1.0))) * (648000.0 / np.pi)  # type: ignore[no-any-return]


@njit(inline="never")
def _remove(p: int, left: BoolArray, counts: IntArray) -> None:
    left[p], node = False, len(counts) // 2 + p // LEAF
    while node:
        counts[node] -= 1
        node //= 2


class _Room(NamedTuple):
    """Nodes that wait in a search, the points that it finds, and their squared chords."""

    todo: IntArray
    found: IntArray
    squares: FloatArray


@njit(inline="never")
def _room(n: int) -> _Room:
    return _Room(np.empty(_DEPTH, np.int64), np.empty(n, np.int64), np.empty(n))


@njit(inline="never")
def _search(
    tree: Tree,
    left: BoolArray,
    counts: IntArray,
    point: FloatArray,
    key: int,
    limit: float,
    closest: bool,
    room: _Room,
) -> int:
    """List the points left of a key within a squared chord of a point; gives their number.

    ``closest``: only the nearest one, and all that may be it but for rounding.
    """
    todo, found, squares = room
    leaves, number, n = len(counts) // 2, 0, 1
    todo[0] = 1
    while n:
        n -= 1
        node = todo[n]
        if counts[node] == 0 or key < tree.spans[node, 0] or key > tree.spans[node, 1]:
            continue
        if node < leaves:  # the nearer half is looked at first
            one, other = 2 * node, 2 * node + 1
            near, far = _gap(tree, one, point), _gap(tree, other, point)
            if far < near:
                one, other, near, far = other, one, far, near
            if far <= limit:
                todo[n] = other
                n += 1
            if near <= limit:
                todo[n] = one
                n += 1
            continue
        first = (node - leaves) * LEAF
        for q in range(first, min(first + LEAF, len(tree.points))):
            x, y = point[0] - tree.points[q, 0], point[1] - tree.points[q, 1]
            z = point[2] - tree.points[q, 2]
            square = x * x + y * y + z * z
            if left[q] and tree.key[q] == key and square <= limit:
                found[number], squares[number] = q, square
                number += 1
                if closest:
                    limit = min(limit, (np.sqrt(square) + 2 * _ROUNDING) ** 2)
    n = 0
    for k in range(number):  # those go from which the limit came away
        found[n], squares[n] = found[k], squares[k]
        n += squares[k] <= limit
    return n


@compiled
def take(
    tree: Tree,
    order: IntArray,
    spreads: bool,
    limits: tuple[float, float, float],
    mistaken: IntArray,
) -> tuple[IntArray, IntArray, BoolArray]:
    """Let points take, in an order, those left of their key within a radius.

    ``spreads``: what is taken takes others in turn: the components. ``limits``: low, high, radius
    in arcsec. ``mistaken``, ascending: of ``pair``, those to be taken the other way round.

    Gives ``root``, by point the one with which it began; ``pair``, pairs p * n + q whose separation
    should be measured; ``is_near``, what was taken to be so.
    """
    low, high, radius_arcsec = limits
    n_points, n_open = len(tree.points), 0
    root, left = np.full(n_points, -1), np.ones(n_points, dtype=np.bool_)
    counts, stack = tree.counts.copy(), np.empty(n_points, dtype=np.int64)
    room = _room(n_points)
    pair, is_near = np.empty(64, dtype=np.int64), np.empty(64, dtype=np.bool_)
    for start in order:
        if root[start] >= 0:
            continue
        root[start], stack[0], n = start, start, 1
        _remove(start, left, counts)
        while n:
            n -= 1
            p = stack[n]
            found = _search(tree, left, counts, tree.points[p], tree.key[p], high, False, room)
            for k in range(found):
                q, near = room.found[k], room.squares[k] <= low
                if not near:
                    if n_open == len(pair):
                        pair, is_near = np.append(pair, pair), np.append(is_near, is_near)
                    pair[n_open] = p * n_points + q
                    at = np.searchsorted(mistaken, pair[n_open])
                    near = _arcsec(tree, p, tree, q) <= radius_arcsec
                    near ^= at < len(mistaken) and mistaken[at] == pair[n_open]
                    is_near[n_open] = near
                    n_open += 1
                if near:
                    root[q] = start
                    _remove(q, left, counts)
                    if spreads:
                        stack[n] = q
                        n += 1
    return root, pair[:n_open], is_near[:n_open]


@compiled
def nearest_points(asked: Tree, tree: Tree, high: float) -> tuple[IntArray, IntArray, FloatArray]:
    """Find the nearest point of the same key for each point asked, and all that may be it.

    Gives points asked, points of the tree, and squared chords: at most ``high``.
    """
    left, n, room = np.ones(len(tree.points), dtype=np.bool_), 0, _room(len(tree.points))
    i, j = np.empty(len(left), dtype=np.int64), np.empty(len(left), dtype=np.int64)
    square = np.empty(len(left))
    for p in range(len(asked.points)):
        found = _search(tree, left, tree.counts, asked.points[p], asked.key[p], high, True, room)
        for k in range(found):
            if n == len(i):
                i, j, square = np.append(i, i), np.append(j, j), np.append(square, square)
            i[n], j[n], square[n] = p, room.found[k], room.squares[k]
            n += 1
    return i[:n], j[:n], square[:n]


@njit(inline="always")
def _precedes(apart: float, k: int, best: float, entry: int, hosts: Stars) -> bool:
    """Tell whether an entry goes before the best one so far."""
    if apart != best or entry < 0:
        return apart < best
    return (hosts.rank[k], hosts.row[k]) < (hosts.rank[entry], hosts.row[entry])


@compiled
def _join_in_order(
    tree: Tree,
    hosts: Stars,
    asked: Tree,
    guests: Stars,
    code: IntArray,
    is_alone: BoolArray,
    high: float,
    radius_arcsec: float,
) -> IntArray:
    """Join guests to hosts by (separation, rank and row of the two), each host guests of one code.

    ``is_alone``: no other guest has its code; a guest that is not has a place for itself. Gives the
    host of each guest, -1 for none.
    """
    n_places = len(tree.points)
    left, counts, n_free = np.ones(n_places, np.bool_), tree.counts.copy(), np.diff(hosts.first)
    room, where = _room(n_places), np.repeat(np.arange(n_places), n_free)
    host_of, owner = np.full(len(code), -1), np.full(hosts.star.max() + 1, -1)
    next_host, next_guest = hosts.first[:-1].copy(), guests.first[:-1].copy()
    taken = np.full(code.max() + 1, -1)  # the last entry of hosts taken by guests of a code
    before = np.empty_like(where)
    # Entries of each host: those taken by a code that several guests have are looked at again.
    entries = np.argsort(hosts.star)
    starts = np.searchsorted(hosts.star[entries], np.arange(len(owner) + 1))
    queue = [(0.0, hosts.rank[0], guests.rank[0], hosts.row[0], guests.row[0], 0, 0)]
    queue.clear()
    turn = 0
    while turn < len(asked.points) or queue:
        t, turn = turn, turn + 1
        if t >= len(asked.points):
            _, _, _, _, row, t, entry = heappop(queue)
            at = next_guest[t]
            g, h, c = guests.star[at], hosts.star[entry], code[guests.star[at]]
            if guests.row[at] == row and host_of[g] < 0 and (owner[h] < 0 or owner[h] == c):
                host_of[g] = h
                for k in entries[starts[h] : starts[h + 1]] if owner[h] < 0 else entries[:0]:
                    n_free[where[k]] -= 1
                    if n_free[where[k]] == 0:
                        _remove(where[k], left, counts)
                    if not is_alone[g]:
                        before[k], taken[c] = taken[c], k
                owner[h] = c
        while next_guest[t] < guests.first[t + 1] and host_of[guests.star[next_guest[t]]] >= 0:
            next_guest[t] += 1
        at = next_guest[t]
        if at == guests.first[t + 1]:
            continue
        best, entry = np.inf, -1
        n_found = _search(tree, left, counts, asked.points[t], 0, high, True, room)
        for s in room.found[:n_found]:
            while owner[hosts.star[next_host[s]]] >= 0:
                next_host[s] += 1
            apart = _arcsec(tree, s, asked, t)
            if apart <= radius_arcsec and _precedes(apart, next_host[s], best, entry, hosts):
                best, entry = apart, next_host[s]
        k = -1 if is_alone[guests.star[at]] else taken[code[guests.star[at]]]
        while k >= 0:
            apart = _arcsec(tree, where[k], asked, t)
            if apart <= radius_arcsec and _precedes(apart, k, best, entry, hosts):
                best, entry = apart, k
            k = before[k]
        if entry >= 0:
            ranks = hosts.rank[entry], guests.rank[at]
            rows = hosts.row[entry], guests.row[at]
            heappush(queue, (best, ranks[0], ranks[1], rows[0], rows[1], t, entry))
    return host_of


@dataclass(frozen=True)
class Places:
    """Distinct positions of rows for every key, each with its preferred row.

    ``row`` and ``key`` are by place, in the order of keys and of the sky; ``place`` is by row.
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
        cells, ra, dec = sky.cells[rows], sky.ra[rows], sky.dec[rows]
        order = np.lexsort((rows, cells, key))  # nearly sorted; then inside of each cell
        cell = np.flatnonzero(np.append(starts(key[order], cells[order]), True))
        for values in (dec, ra):
            sort_members(cell, order, values)
        first, place = first_of_runs(order, ra, dec, cells, key)
        rank = sky.rank[rows]
        best = rank[first]
        np.minimum.at(best, place, rank)
        at = order[(rank == best[place])[order]][::-1]
        first[place[at]] = at  # the first of equal ranks is written last
        return cls(sky, rows, rows[first], place, key[first])

    @cached_property
    def tree(self) -> Tree:
        """Tree of the places."""
        ra, dec = self.sky.ra[self.row], self.sky.dec[self.row]
        points = np.ascontiguousarray(unit_vectors(ra, dec))
        n_leaves = 1 << (max(len(ra) - 1, 0) // LEAF).bit_length()
        return Tree(points, ra, dec, self.key, *build(points, self.key, n_leaves))

    def stars(self, star: IntArray) -> Stars:
        """Stars (numbered from 0, by row) at each place, each with its preferred row there."""
        rank = self.sky.rank[self.rows]
        order = np.lexsort((self.rows, rank, star, self.place))
        best = order[starts(star[order], self.place[order])]
        best = best[np.lexsort((self.rows[best], rank[best], self.place[best]))]
        first = np.searchsorted(self.place[best], np.arange(len(self.row) + 1))
        return Stars(first, star[best], rank[best], self.rows[best])

    def _root(self, order: IntArray, spreads: bool, radius_arcsec: float) -> IntArray:
        """Place with which each place was taken, in an order of them."""
        limits, mistaken, n = (*_chords(radius_arcsec), radius_arcsec), self.row[:0], len(self.row)
        while True:
            root, pair, is_near = take(self.tree, order, spreads, limits, mistaken)
            i, j = (self.row[at] for at in np.divmod(pair, max(n, 1)))
            wrong = is_near != (self.sky.separation(i, j) <= radius_arcsec)
            if not wrong.any():
                return root
            mistaken = np.union1d(mistaken, pair[wrong])

    def links(self, radius_arcsec: float) -> tuple[IntArray, IntArray]:
        """Find fewer links than rows (i < j) that join these as all within a radius of one key."""
        root = self._root(np.arange(len(self.row)), True, radius_arcsec)
        i, j = self.rows, self.row[root[self.place]]
        apart = i != j
        return np.minimum(i, j)[apart], np.maximum(i, j)[apart]

    def leading(self, radius_arcsec: float) -> IntArray:
        """Find the rows that none claims when all claim what is near in the order of rank."""
        order = np.lexsort((self.row, self.sky.rank[self.row]))
        root = self._root(order, False, radius_arcsec)
        return np.asarray(self.row[root == np.arange(len(root))])

    def nearest(self, others: Places, radius_arcsec: float) -> tuple[IntArray, IntArray]:
        """Find pairs of rows of two sets of places with equal keys within a radius.

        They are at least the nearest of each place here, and few that rounding leaves open.
        """
        if not len(others.row):
            return self.row[:0], self.row[:0]
        low, high = _chords(radius_arcsec)
        i, j, square = nearest_points(self.tree, others.tree, high)
        i, j = self.row[i], others.row[j]
        near = square <= low
        near[~near] = self.sky.separation(i[~near], j[~near]) <= radius_arcsec
        return i[near], j[near]


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

    Stars are numbered from 0. A host takes guests of one code; the result is the host of each guest
    star, -1 for none.
    """
    if not len(hosts) or not len(guests):
        return np.full(len(code), -1)
    is_alone = np.bincount(code)[code] == 1
    places = Places.of(sky, hosts)
    # A guest that shares its code has places of its own.
    asked = Places.of(sky, guests, np.where(is_alone[guest_star], 0, guest_star + 1))
    sides = places.tree, places.stars(host_star), asked.tree, asked.stars(guest_star)
    return _join_in_order(*sides, code, is_alone, _chords(radius_arcsec)[1], radius_arcsec)


def _chords(radius_arcsec: float) -> tuple[float, float]:
    """Squared chords: up to the first surely within a radius, above the second surely not."""
    chord = 2.0 * np.sin(radius_arcsec / ARCSEC_PER_RADIAN / 2.0)
    low = (chord - _ROUNDING) ** 2 if chord > _ROUNDING else -1.0
    return low, (chord + _ROUNDING) ** 2
