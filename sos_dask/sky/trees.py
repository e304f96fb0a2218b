"""Loops over a tree of points on the sphere, compiled by numba, for places with many rows.

No pair is stored: memory and, but for the depth of the tree, time are linear in the points however
many lie within a radius. Points are unit vectors in the order of (key, place on the sky); a leaf is
``LEAF`` of them, and node k has the children 2 k and 2 k + 1. Squared chords up to ``low`` are
within the radius and those above ``high`` are not; what lies between must be measured.

Numba takes half a CPU second to import: import this module inside a function that has rows.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sos_dask.sky.loops import compiled

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

LEAF = 4
_DEPTH = 256


@compiled
def build(points: FloatArray, key: IntArray, boxes: FloatArray, spans: IntArray) -> None:
    """Boxes (lowest x, y, z, highest x, y, z) and spans of keys; those of no points are empty."""
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
def _gap(boxes: FloatArray, node: int, points: FloatArray, p: int) -> float:
    """Squared distance from a point to a box."""
    total = 0.0
    for axis in range(3):
        value = points[p, axis]
        away = max(boxes[node, axis] - value, value - boxes[node, 3 + axis], 0.0)
        total += away * away
    return total


@njit(inline="always")
def _square(points: FloatArray, p: int, others: FloatArray, q: int) -> float:
    x, y, z = points[p, 0] - others[q, 0], points[p, 1] - others[q, 1], points[p, 2] - others[q, 2]
    return x * x + y * y + z * z  # type: ignore[no-any-return]


@njit(inline="always")
def _arcsec(ra1: float, dec1: float, ra2: float, dec2: float) -> float:
    """`sphere.separation_arcsec`, but for the last digit."""
    d_lat, d_lon = np.radians(dec2 - dec1), np.radians(ra2 - ra1)
    a, b = np.sin(d_lat / 2), np.sin(d_lon / 2)
    h = a * a + np.cos(np.radians(dec1)) * np.cos(np.radians(dec2)) * (b * b)
    return 2 * np.arcsin(np.sqrt(min(h, 1.0))) * (648000.0 / np.pi)  # type: ignore[no-any-return]


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


@compiled
def components_within(
    points: FloatArray,
    key: IntArray,
    boxes: FloatArray,
    spans: IntArray,
    low: float,
    high: float,
    root: IntArray,
    i: IntArray,
    j: IntArray,
    count: IntArray,
) -> None:
    """Components of points with equal keys within a radius; ``root`` is the point itself at first.

    ``i``, ``j``: pairs of different components whose separation must be measured; ``count[0]`` is
    their number, also of those for which there is no room.
    """
    leaves = len(boxes) // 2
    joined = np.zeros(len(boxes), dtype=np.bool_)
    one, other = np.empty((2, _DEPTH), dtype=np.int64)
    one[0], other[0], n, found = 1, 1, 1, 0
    while n:
        n -= 1
        a, b = one[n], other[n]
        if max(spans[a, 0], spans[b, 0]) > min(spans[a, 1], spans[b, 1]):
            continue
        near, far = 0.0, 0.0
        for axis in range(3):
            away = max(boxes[a, axis] - boxes[b, 3 + axis], boxes[b, axis] - boxes[a, 3 + axis])
            near += max(away, 0.0) ** 2
            far += (
                max(boxes[a, 3 + axis] - boxes[b, axis], boxes[b, 3 + axis] - boxes[a, axis]) ** 2
            )
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
            for p in range(_first(a, leaves), min(_first(a, leaves) + LEAF, len(root))):
                start = p + 1 if a == b else _first(b, leaves)
                for q in range(start, min(_first(b, leaves) + LEAF, len(root))):
                    square = _square(points, p, points, q)
                    if key[p] != key[q] or square > high or _find(root, p) == _find(root, q):
                        continue
                    if square <= low:
                        root[_find(root, q)] = _find(root, p)
                        continue
                    if found < len(i):
                        i[found], j[found] = p, q
                    found += 1
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
    points: FloatArray,
    ra: FloatArray,
    dec: FloatArray,
    order: IntArray,
    boxes: FloatArray,
    low: float,
    high: float,
    radius_arcsec: float,
    mistaken: IntArray,
    leads: BoolArray,
    doubtful: IntArray,
    is_near: BoolArray,
    count: IntArray,
) -> None:
    """Points that no earlier one claims, when those take all within a radius in an order.

    ``doubtful`` are pairs p * n + q whose separation should be measured, and ``is_near`` what was
    taken to be so, the other way round for the pairs in ``mistaken`` (ascending); ``count[0]`` is
    their number, also of those for which there is no room.
    """
    leaves, found, n_points = len(boxes) // 2, 0, len(points)
    n_leading = np.zeros(len(boxes), dtype=np.int64)
    todo = np.empty(_DEPTH, dtype=np.int64)
    for p in order:
        todo[0], n, claimed = 1, 1, False
        while n and not claimed:
            n -= 1
            node = todo[n]
            if n_leading[node] == 0 or _gap(boxes, node, points, p) > high:
                continue
            if node < leaves:
                todo[n], todo[n + 1] = 2 * node, 2 * node + 1
                n += 2
                continue
            first = (node - leaves) * LEAF
            for q in range(first, min(first + LEAF, n_points)):
                if not leads[q]:
                    continue
                square = _square(points, p, points, q)
                near = square <= low
                if not near and square <= high:
                    pair = p * n_points + q
                    at = np.searchsorted(mistaken, pair)
                    near = _arcsec(ra[p], dec[p], ra[q], dec[q]) <= radius_arcsec
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
    t: int,
    asked: FloatArray,
    asked_ra: FloatArray,
    asked_dec: FloatArray,
    points: FloatArray,
    ra: FloatArray,
    dec: FloatArray,
    boxes: FloatArray,
    high: float,
    radius_arcsec: float,
    first_host: IntArray,
    host: IntArray,
    host_rank: IntArray,
    host_row: IntArray,
    next_host: IntArray,
    owner: IntArray,
    n_free: IntArray,
) -> tuple[float, int]:
    """Separation and entry of the nearest host (ties: rank, row) that nobody owns; -1: none."""
    best, entry, limit = np.inf, -1, high
    leaves, todo = len(boxes) // 2, np.empty(_DEPTH, dtype=np.int64)
    todo[0], n = 1, 1
    while n:
        n -= 1
        node = todo[n]
        if n_free[node] == 0 or _gap(boxes, node, asked, t) > limit:
            continue
        if node < leaves:
            nearer = 2 * node
            if _gap(boxes, nearer + 1, asked, t) < _gap(boxes, nearer, asked, t):
                nearer += 1
            todo[n], todo[n + 1] = nearer ^ 1, nearer
            n += 2
            continue
        first = (node - leaves) * LEAF
        for s in range(first, min(first + LEAF, len(points))):
            k = next_host[s]
            if k == first_host[s + 1]:
                continue
            while k < first_host[s + 1] and owner[host[k]] >= 0:
                k += 1
            next_host[s] = k
            if k == first_host[s + 1]:
                _add(n_free, leaves + s // LEAF, -1)
                continue
            square = _square(asked, t, points, s)
            if square > limit:
                continue
            apart = _arcsec(ra[s], dec[s], asked_ra[t], asked_dec[t])
            if apart > radius_arcsec or apart > best:
                continue
            if (
                apart < best
                or host_rank[k] < host_rank[entry]
                or (host_rank[k] == host_rank[entry] and host_row[k] < host_row[entry])
            ):
                best, entry = apart, k
                limit = min(high, (np.sqrt(square) + 2e-14) ** 2)
    return best, entry


@compiled
def join_in_order(
    points: FloatArray,
    ra: FloatArray,
    dec: FloatArray,
    boxes: FloatArray,
    high: float,
    radius_arcsec: float,
    first_host: IntArray,
    host: IntArray,
    host_rank: IntArray,
    host_row: IntArray,
    asked: FloatArray,
    asked_ra: FloatArray,
    asked_dec: FloatArray,
    first_guest: IntArray,
    guest: IntArray,
    guest_rank: IntArray,
    guest_row: IntArray,
    code: IntArray,
    is_alone: IntArray,
    host_of: IntArray,
) -> None:
    """Join guests to hosts by (separation, rank and row of the two), each host guests of one code.

    At point s are the hosts host[first_host[s]:first_host[s + 1]] by (rank, row), at place t of
    those asked for likewise guests. ``is_alone``: no other guest has its code; a guest that is not
    has a place for itself. ``code`` and ``host_of`` (at first -1) are by number of the guest.
    """
    leaves, n_points = len(boxes) // 2, len(points)
    n_free = np.zeros(len(boxes), dtype=np.int64)
    for s in range(n_points):
        _add(n_free, leaves + s // LEAF, 1)
    owner = np.full(host.max() + 1, -1)
    next_host, next_guest = first_host[:-1].copy(), first_guest[:-1].copy()
    taken = np.full(code.max() + 1, -1)  # the last entry of hosts taken by guests of a code
    before, where = np.empty_like(host), np.empty_like(host)
    # Entries of each host: those taken by a code that several guests have are looked at again.
    entries = np.argsort(host)
    starts = np.searchsorted(host[entries], np.arange(len(owner) + 1))
    for s in range(n_points):
        where[first_host[s] : first_host[s + 1]] = s
    queue = [(0.0, host[0], host[0], host[0], host[0], 0, 0)]
    queue.clear()
    for turn in range(1 << 62):
        if turn < len(asked):
            t = turn
        else:
            if not queue:
                break
            _, _, _, _, g_row, t, entry = heappop(queue)
            at = next_guest[t]
            g, h = guest[at], host[entry]
            c = code[g]
            if guest_row[at] == g_row and host_of[g] < 0 and (owner[h] < 0 or owner[h] == c):
                host_of[g] = h
                if owner[h] < 0:
                    owner[h] = c
                    if not is_alone[g]:
                        for k in range(starts[h], starts[h + 1]):
                            before[entries[k]], taken[c] = taken[c], entries[k]
        while next_guest[t] < first_guest[t + 1] and host_of[guest[next_guest[t]]] >= 0:
            next_guest[t] += 1
        at = next_guest[t]
        if at == first_guest[t + 1]:
            continue
        search = (t, asked, asked_ra, asked_dec, points, ra, dec, boxes, high, radius_arcsec)
        best, entry = _nearest_free(
            *search, first_host, host, host_rank, host_row, next_host, owner, n_free
        )
        if not is_alone[guest[at]]:
            k = taken[code[guest[at]]]
            while k >= 0:
                s = where[k]
                apart = _arcsec(ra[s], dec[s], asked_ra[t], asked_dec[t])
                if apart <= radius_arcsec and (
                    apart < best
                    or (
                        apart == best
                        and (host_rank[k], host_row[k]) < (host_rank[entry], host_row[entry])
                    )
                ):
                    best, entry = apart, k
                k = before[k]
        if entry >= 0:
            heappush(
                queue,
                (best, host_rank[entry], guest_rank[at], host_row[entry], guest_row[at], t, entry),
            )
