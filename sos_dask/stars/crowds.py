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
from sos_dask.sky.loops import compiled
from sos_dask.sky.neighbours import Sky

LEAF = 4
_DEPTH = 256
# Chords of unit vectors in double precision are good to a fifth of this (2e-9 arcsec).
_ROUNDING = 1e-14


class Tree(NamedTuple):
    """Points with their keys, and the nodes above them.

    ``boxes`` are the lowest x, y, z and the highest, ``spans`` the lowest key and the highest.
    """

    points: FloatArray
    ra: FloatArray
    dec: FloatArray
    key: IntArray
    boxes: FloatArray
    spans: IntArray


class Stars(NamedTuple):
    """Rows of stars at points: those of point p are first[p] to first[p + 1], by (rank, row)."""

    first: IntArray
    star: IntArray
    rank: IntArray
    row: IntArray


@compiled
def build(points: FloatArray, key: IntArray, boxes: FloatArray, spans: IntArray) -> None:
    """Fill boxes and spans; those of no points are empty."""
    leaves = len(boxes) // 2
    boxes[:, :3], boxes[:, 3:] = np.inf, -np.inf
    spans[:, 0], spans[:, 1] = np.iinfo(np.int64).max, -1
    for p in range(len(points)):
        node = leaves + p // LEAF
        for axis in range(3):
            boxes[node, axis] = min(boxes[node, axis], points[p, axis])
            boxes[node, 3 + axis] = max(boxes[node, 3 + axis], points[p, axis])
        spans[node, 0], spans[node, 1] = min(spans[node, 0], key[p]), max(spans[node, 1], key[p])
    for node in range(leaves - 1, 0, -1):
        one, other = 2 * node, 2 * node + 1
        for axis in range(3):
            boxes[node, axis] = min(boxes[one, axis], boxes[other, axis])
            boxes[node, 3 + axis] = max(boxes[one, 3 + axis], boxes[other, 3 + axis])
        spans[node, 0] = min(spans[one, 0], spans[other, 0])
        spans[node, 1] = max(spans[one, 1], spans[other, 1])


@njit(inline="always")
def _gap(tree: Tree, node: int, point: FloatArray) -> float:
    """Squared distance from a point to a box."""
    total = 0.0
    for axis in range(3):
        away = max(tree.boxes[node, axis] - point[axis], point[axis] - tree.boxes[node, 3 + axis])
        total += max(away, 0.0) ** 2
    return total


@njit(inline="always")
def _gap_and_span(boxes: FloatArray, a: int, b: int) -> tuple[float, float]:
    """Least and greatest squared distance of two points in two boxes."""
    near, far = 0.0, 0.0
    for axis in range(3):
        right, left = boxes[a, axis] - boxes[b, 3 + axis], boxes[b, axis] - boxes[a, 3 + axis]
        near += max(right, left, 0.0) ** 2
        far += max(-right, -left) ** 2
    return near, far


@njit(inline="always")
def _square(p: FloatArray, q: FloatArray) -> float:
    x, y, z = p[0] - q[0], p[1] - q[1], p[2] - q[2]
    return x * x + y * y + z * z  # type: ignore[no-any-return]


@njit(inline="always")
def _arcsec(one: Tree, p: int, other: Tree, q: int) -> float:
    """`healpix.separation_arcsec`, but for the last digit."""
    d_lat, d_lon = np.radians(other.dec[q] - one.dec[p]), np.radians(other.ra[q] - one.ra[p])
    a, b = np.sin(d_lat / 2), np.sin(d_lon / 2)
    h = a * a + np.cos(np.radians(one.dec[p])) * np.cos(np.radians(other.dec[q])) * (b * b)
    return 2 * np.arcsin(np.sqrt(min(h, 1.0))) * (648000.0 / np.pi)  # type: ignore[no-any-return]


@njit(inline="always")
def _in_leaf(node: int, leaves: int, n_points: int) -> tuple[int, int]:
    """First point of a leaf and where it ends."""
    first = (node - leaves) * LEAF
    return first, min(first + LEAF, n_points)


@njit(inline="never")
def _find(root: IntArray, p: int) -> int:
    while root[p] != p:
        root[p] = root[root[p]]
        p = root[p]
    return p


@njit(inline="never")
def _add(counts: IntArray, node: int, number: int) -> None:
    """Add to the count of a node and of those above it."""
    while node:
        counts[node] += number
        node //= 2


@njit(inline="never")
def _is_joined(node: int, leaves: int, joined: BoolArray, root: IntArray) -> bool:
    """Whether all points below a node are known to be in one component."""
    if not joined[node]:
        if node >= leaves:
            first = (node - leaves) * LEAF
            joined[node] = True
            for p in range(first + 1, min(first + LEAF, len(root))):
                joined[node] &= _find(root, p) == _find(root, first)
        elif joined[2 * node] and joined[2 * node + 1]:
            p, q = _first(node, leaves), _first(2 * node + 1, leaves)
            joined[node] = q >= len(root) or _find(root, p) == _find(root, q)
    return joined[node]  # type: ignore[no-any-return]


@njit(inline="never")
def _first(node: int, leaves: int) -> int:
    """The first point below a node."""
    while node < leaves:
        node *= 2
    return (node - leaves) * LEAF


@njit(inline="never")
def _join(node: int, leaves: int, joined: BoolArray, root: IntArray) -> None:
    """Put all points below a node into one component."""
    first, low, high = _first(node, leaves), node, node
    while low <= leaves * 2 - 1:
        joined[low : high + 1] = True
        low, high = 2 * low, 2 * high + 1
    stop = min(len(root), (high // 2 - leaves + 1) * LEAF)
    for p in range(first + 1, stop):
        root[_find(root, p)] = _find(root, first)


@njit(inline="never")
def _join_leaves(
    tree: Tree,
    leaves: tuple[tuple[int, int], tuple[int, int]],
    low: float,
    high: float,
    root: IntArray,
    i: IntArray,
    j: IntArray,
    found: int,
) -> int:
    """Join the points of two leaves (or of one) that are near; list those to be measured."""
    (first, stop), (other_first, other_stop) = leaves
    for p in range(first, stop):
        for q in range(p + 1 if first == other_first else other_first, other_stop):
            square = _square(tree.points[p], tree.points[q])
            if tree.key[p] != tree.key[q] or square > high or _find(root, p) == _find(root, q):
                continue
            if square <= low:
                root[_find(root, q)] = _find(root, p)
                continue
            if found < len(i):
                i[found], j[found] = p, q
            found += 1
    return found


@compiled
def components_within(
    tree: Tree, low: float, high: float, root: IntArray, i: IntArray, j: IntArray, count: IntArray
) -> None:
    """Components of points with equal keys within a radius; ``root`` is the point itself at first.

    ``i``, ``j``: pairs of different components whose separation must be measured; ``count[0]`` is
    their number, also of those for which there is no room.
    """
    spans, leaves = tree.spans, len(tree.boxes) // 2
    joined = np.zeros(len(spans), dtype=np.bool_)
    one, other = np.empty((2, _DEPTH), dtype=np.int64)
    one[0], other[0], n, found = 1, 1, 1, 0
    while n:
        n -= 1
        a, b = one[n], other[n]
        if max(spans[a, 0], spans[b, 0]) > min(spans[a, 1], spans[b, 1]):
            continue
        near, far = _gap_and_span(tree.boxes, a, b)
        if near > high:
            continue
        whole = _is_joined(a, leaves, joined, root) & _is_joined(b, leaves, joined, root)
        p, q = _first(a, leaves), _first(b, leaves)
        if whole and _find(root, p) == _find(root, q):
            continue
        if far <= low and min(spans[a, 0], spans[b, 0]) == max(spans[a, 1], spans[b, 1]):
            _join(a, leaves, joined, root)
            _join(b, leaves, joined, root)
            root[_find(root, q)] = _find(root, p)
        elif a >= leaves and b >= leaves:
            pair = _in_leaf(a, leaves, len(root)), _in_leaf(b, leaves, len(root))
            found = _join_leaves(tree, pair, low, high, root, i, j, found)
        # The halves by themselves come first, so that they are known to be joined.
        elif a == b:
            one[n], other[n] = 2 * a, 2 * a + 1
            one[n + 1], other[n + 1] = 2 * a + 1, 2 * a + 1
            one[n + 2], other[n + 2] = 2 * a, 2 * a
            n += 3
        elif a < b:
            one[n], one[n + 1], other[n], other[n + 1] = 2 * a, 2 * a + 1, b, b
            n += 2
        else:
            one[n], one[n + 1], other[n], other[n + 1] = a, a, 2 * b, 2 * b + 1
            n += 2
    for p in range(len(root)):
        root[p] = _find(root, p)
    count[0] = found


@compiled
def claim_points(
    tree: Tree,
    order: IntArray,
    limits: tuple[float, float, float],
    mistaken: IntArray,
    leads: BoolArray,
    doubtful: IntArray,
    is_near: BoolArray,
    count: IntArray,
) -> None:
    """Points that no earlier one claims, when those take all within a radius in an order.

    ``doubtful`` are pairs p * n + q whose separation should be measured, and ``is_near`` what was
    taken to be so, the other way round for the pairs in ``mistaken`` (ascending); ``count[0]`` is
    their number, also of those for which there is no room. ``limits``: low, high, radius in arcsec.
    """
    low, high, radius_arcsec = limits
    leaves, found, n_points = len(tree.boxes) // 2, 0, len(tree.points)
    n_leading = np.zeros(len(tree.boxes), dtype=np.int64)
    todo = np.empty(_DEPTH, dtype=np.int64)
    for p in order:
        todo[0], n, claimed = 1, 1, False
        while n and not claimed:
            n -= 1
            node = todo[n]
            if n_leading[node] == 0 or _gap(tree, node, tree.points[p]) > high:
                continue
            if node < leaves:
                todo[n], todo[n + 1] = 2 * node, 2 * node + 1
                n += 2
                continue
            first, stop = _in_leaf(node, leaves, n_points)
            for q in range(first, stop):
                if not leads[q]:
                    continue
                square = _square(tree.points[p], tree.points[q])
                near = square <= low
                if not near and square <= high:
                    pair = p * n_points + q
                    at = np.searchsorted(mistaken, pair)
                    near = _arcsec(tree, p, tree, q) <= radius_arcsec
                    near ^= at < len(mistaken) and mistaken[at] == pair
                    if found < len(doubtful):
                        doubtful[found], is_near[found] = pair, near
                    found += 1
                claimed |= near
        if not claimed:
            leads[p] = True
            _add(n_leading, leaves + p // LEAF, 1)
    count[0] = found


@njit(inline="never")
def _nearest_free(
    asked: Tree,
    t: int,
    tree: Tree,
    hosts: Stars,
    high: float,
    radius_arcsec: float,
    next_host: IntArray,
    owner: IntArray,
    n_free: IntArray,
) -> tuple[float, int]:
    """Separation and entry of the nearest host (ties: rank, row) that nobody owns; -1: none."""
    best, entry, limit = np.inf, -1, high
    leaves, todo = len(tree.boxes) // 2, np.empty(_DEPTH, dtype=np.int64)
    todo[0], n = 1, 1
    while n:
        n -= 1
        node = todo[n]
        if n_free[node] == 0 or _gap(tree, node, asked.points[t]) > limit:
            continue
        if node < leaves:
            nearer = 2 * node
            if _gap(tree, nearer + 1, asked.points[t]) < _gap(tree, nearer, asked.points[t]):
                nearer += 1
            todo[n], todo[n + 1] = nearer ^ 1, nearer
            n += 2
            continue
        first, stop = _in_leaf(node, leaves, len(tree.points))
        for s in range(first, stop):
            k, end = next_host[s], hosts.first[s + 1]
            if k == end:
                continue
            while k < end and owner[hosts.star[k]] >= 0:
                k += 1
            next_host[s] = k
            if k == end:
                _add(n_free, leaves + s // LEAF, -1)
                continue
            square = _square(asked.points[t], tree.points[s])
            if square <= limit:
                apart = _arcsec(tree, s, asked, t)
                if apart <= radius_arcsec and _precedes(apart, k, best, entry, hosts):
                    best, entry = apart, k
                    limit = min(high, (np.sqrt(square) + 2e-14) ** 2)
    return best, entry


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
    host_of: IntArray,
) -> None:
    """Join guests to hosts by (separation, rank and row of the two), each host guests of one code.

    ``is_alone``: no other guest has its code; a guest that is not has a place for itself. ``code``
    and ``host_of`` (at first -1) are by number of the guest.
    """
    n_free = np.zeros(len(tree.boxes), dtype=np.int64)
    for s in range(len(tree.points)):
        _add(n_free, len(n_free) // 2 + s // LEAF, 1)
    where = np.repeat(np.arange(len(tree.points)), np.diff(hosts.first))
    owner = np.full(hosts.star.max() + 1, -1)
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
                if owner[h] < 0 and not is_alone[g]:
                    for k in entries[starts[h] : starts[h + 1]]:
                        before[k], taken[c] = taken[c], k
                owner[h] = c
        while next_guest[t] < guests.first[t + 1] and host_of[guests.star[next_guest[t]]] >= 0:
            next_guest[t] += 1
        at = next_guest[t]
        if at == guests.first[t + 1]:
            continue
        best, entry = _nearest_free(
            asked, t, tree, hosts, high, radius_arcsec, next_host, owner, n_free
        )
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
        row, place = sky.preferred(rows, sky.dec[rows], sky.ra[rows], sky.cells[rows], key)
        of_place = np.empty(len(row), dtype=np.int64)
        of_place[place] = key
        return cls(sky, rows, row, place, of_place)

    @cached_property
    def tree(self) -> Tree:
        """Tree of the places."""
        ra, dec = self.sky.ra[self.row], self.sky.dec[self.row]
        points = np.ascontiguousarray(unit_vectors(ra, dec))
        n_leaves = 1 << max(int(np.ceil(np.log2(max(len(ra), 1) / LEAF))), 0)
        boxes, spans = np.empty((2 * n_leaves, 6)), np.empty((2 * n_leaves, 2), dtype=np.int64)
        build(points, self.key, boxes, spans)
        return Tree(points, ra, dec, self.key, boxes, spans)

    def stars(self, star: IntArray) -> Stars:
        """Stars (numbered from 0, by row) at each place, each with its preferred row there."""
        sky = self.sky
        row, of = sky.preferred(self.rows, star, self.place)
        at, number = np.empty((2, len(row)), dtype=np.int64)
        at[of], number[of] = self.place, star
        order = np.lexsort((row, sky.rank[row], at))
        first = np.searchsorted(at[order], np.arange(len(self.row) + 1))
        return Stars(first, number[order], sky.rank[row[order]], row[order])

    def links(self, radius_arcsec: float) -> tuple[IntArray, IntArray]:
        """Find links that join rows as do all pairs within a radius that have equal keys.

        They are rows i < j, fewer than rows, but for pairs at the very radius.
        """
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
        """Find pairs of rows of two sets of places with equal keys within a radius.

        They are at least the nearest of each place here, and few that rounding leaves open.
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

    Stars are numbered from 0. A host takes guests of one code; the result is the host of each guest
    star, -1 for none.
    """
    host_of = np.full(len(code), -1)
    if not len(hosts) or not len(guests):
        return host_of
    is_alone = np.bincount(code)[code] == 1
    places = Places.of(sky, hosts)
    # A guest that shares its code has places of its own.
    asked = Places.of(sky, guests, np.where(is_alone[guest_star], 0, guest_star + 1))
    sides = places.tree, places.stars(host_star), asked.tree, asked.stars(guest_star)
    _join_in_order(*sides, code, is_alone, _chords(radius_arcsec)[1], radius_arcsec, host_of)
    return host_of


def _chords(radius_arcsec: float) -> tuple[float, float]:
    """Squared chords: up to the first surely within a radius, above the second surely not."""
    chord = 2.0 * np.sin(radius_arcsec / ARCSEC_PER_RADIAN / 2.0)
    low = (chord - _ROUNDING) ** 2 if chord > _ROUNDING else -1.0
    return low, (chord + _ROUNDING) ** 2
