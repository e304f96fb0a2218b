"""Neighbours in three dimensions: a k-d tree that is asked for many rows at once.

Rows are put in the order of a tree of their own. Then each is near the one before, whose
neighbours are in the processor's cache, and whose distance to them, with the way between the two
rows, says how far to look at most. Answers are exact: they do not depend on which rows are asked
for together.

The loops are compiled by numba; import this module where there are rows (see `jit`).
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from sos_dask.sky.loops import compiled, read_only

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_LEAF_POINTS = 12
_LEAF_ROWS = 4
_SLACK = 1.0 + 1e-9  # far more than rounding can add to a distance
_DEPTH = 64

_POINTS = types.Array(types.float64, 2, "C", readonly=True)
_BOXES = types.Array(types.float64, 3, "C", readonly=True)
_I, _D, _I_OUT, _D_OUT = (
    read_only(types.int64),
    read_only(types.float64),
    types.int64[::1],
    types.float64[::1],
)


class Tree:
    """Points that neighbours are looked for among.

    Parameters
    ----------
    points : ndarray of float64, shape (n, 3)
        Finite, at least one.

    Raises
    ------
    ValueError
        No points, or some that are not finite; so do rows that are asked for.
    """

    def __init__(self, points: FloatArray) -> None:
        self._points, self._order, self._boxes = _sorted(points, _LEAF_POINTS)

    def kth_distance(self, x: FloatArray, k: int) -> FloatArray:
        """Distance of rows to their k-th nearest point, to the farthest if there are fewer.

        Parameters
        ----------
        x : ndarray of float64, shape (m, 3)
            Finite.
        k : int

        Returns
        -------
        ndarray of float64, shape (m,)
        """
        distance = np.empty(len(x))
        if len(x):
            rows, order, _ = _sorted(x, _LEAF_ROWS)
            kth_distances(
                self._points, self._boxes, rows, order, min(k, len(self._order)), distance
            )
        return distance

    def nearest(self, x: FloatArray) -> tuple[FloatArray, IntArray]:
        """Distance (m,) of finite rows (m, 3) to their nearest point, and its index (m,).

        Of points that are equally near, the first.
        """
        distance, index = np.empty(len(x)), np.empty(len(x), dtype=np.int64)
        if len(x):
            rows, order, _ = _sorted(x, _LEAF_ROWS)
            nearest_points(self._points, self._order, self._boxes, rows, order, distance, index)
        return distance, index

    def has_more(self, x: FloatArray, radius: FloatArray, most: float) -> NDArray[np.bool_]:
        """Finite rows (m, 3) that have more than so many points within their radius (m,)."""
        found = np.zeros(len(x), dtype=np.bool_)
        if len(x):
            rows, order, _ = _sorted(x, _LEAF_ROWS)
            have_more(self._points, self._boxes, rows, order, radius, most, found)
        return found


def _sorted(points: FloatArray, leaf: int) -> tuple[FloatArray, IntArray, FloatArray]:
    """Points (3, n) in the order of a tree, their rows, and the boxes of its nodes.

    Level l has 2^l nodes; the j-th holds the points from (j n) >> l on, and its box (lowest and
    highest corner) is at 2^l + j.
    """
    points = np.array(points.T, dtype=np.float64, order="C")
    n = points.shape[1]
    if not n or not np.isfinite(points).all():
        raise ValueError("neighbours are of finite points, and of one at least")
    order = np.arange(n)
    depth = max(0, int(np.ceil(np.log2(n / leaf))))
    boxes = np.empty((2 << depth, 2, 3))
    split(points, order, boxes)
    return points, order, boxes


@compiled((types.float64[:, ::1], _I_OUT, types.float64[:, :, ::1]))
def split(points: FloatArray, order: IntArray, boxes: FloatArray) -> None:
    """Sort points by halving boxes at the median of their longest side; see `_sorted`."""
    n, half = len(order), len(boxes) // 2
    stack = np.empty(64, dtype=np.int64)
    stack[0], top = 1, 1
    while top:
        top -= 1
        node = stack[top]
        level = 0
        while node >> (level + 1):
            level += 1
        j = node - (1 << level)
        start, stop = (j * n) >> level, ((j + 1) * n) >> level
        axis, longest = 0, -1.0
        for d in range(3):
            low, high = points[d, start], points[d, start]
            for p in range(start + 1, stop):
                low, high = min(low, points[d, p]), max(high, points[d, p])
            boxes[node, 0, d], boxes[node, 1, d] = low, high
            if high - low > longest:
                axis, longest = d, high - low
        if node >= half:
            continue
        # The median comes to its place (Hoare 1961, Communications of the ACM 4, 321).
        middle = ((2 * j + 1) * n) >> (level + 1)
        left, right = start, stop - 1
        while left < right:
            pivot = points[axis, (left + right) // 2]
            i, k = left, right
            while i <= k:
                while points[axis, i] < pivot:
                    i += 1
                while points[axis, k] > pivot:
                    k -= 1
                if i <= k:
                    for d in range(3):
                        points[d, i], points[d, k] = points[d, k], points[d, i]
                    order[i], order[k] = order[k], order[i]
                    i += 1
                    k -= 1
            if middle <= k:
                right = k
            elif middle >= i:
                left = i
            else:
                break
        stack[top], stack[top + 1] = 2 * node + 1, 2 * node
        top += 2


@njit(inline="always")
def _gap(boxes: FloatArray, node: int, x: float, y: float, z: float) -> float:
    """Square of the distance to a box."""
    dx = max(boxes[node, 0, 0] - x, x - boxes[node, 1, 0], 0.0)
    dy = max(boxes[node, 0, 1] - y, y - boxes[node, 1, 1], 0.0)
    dz = max(boxes[node, 0, 2] - z, z - boxes[node, 1, 2], 0.0)
    return float(dx * dx + dy * dy + dz * dz)


@njit(inline="always")
def _next_leaf(
    boxes: FloatArray, x: float, y: float, z: float, limit: float,
    nodes: IntArray, gaps: FloatArray, top: int,
) -> tuple[int, int]:  # fmt: skip
    """The next leaf that is within a squared limit, or -1, and what is left to look at.

    Of two nodes the nearer one is looked at first. To begin: ``nodes[0] = 1, gaps[0] = 0, top = 1``
    """
    half = len(boxes) // 2
    while top:
        top -= 1
        node, gap = nodes[top], gaps[top]
        while gap <= limit:
            if node >= half:
                return node - half, top
            near, far = 2 * node, 2 * node + 1
            gap, other = _gap(boxes, near, x, y, z), _gap(boxes, far, x, y, z)
            if other < gap:
                near, far, gap, other = far, near, other, gap
            if other <= limit:
                nodes[top], gaps[top] = far, other
                top += 1
            node = near
    return -1, 0


@njit(inline="always")
def _between(points: FloatArray, p: int, x: float, y: float, z: float) -> float:
    """Square of the distance to a point."""
    dx, dy, dz = x - points[0, p], y - points[1, p], z - points[2, p]
    return float(dx * dx + dy * dy + dz * dz)


@compiled((_POINTS, _BOXES, _POINTS, _I, types.int64, _D_OUT))
def kth_distances(
    points: FloatArray,
    boxes: FloatArray,
    rows: FloatArray,
    row_order: IntArray,
    k: int,
    distance: FloatArray,
) -> None:
    """Distances of rows to their k-th nearest point."""
    n, half = points.shape[1], len(boxes) // 2
    nodes, gaps = np.zeros(_DEPTH, dtype=np.int64), np.zeros(_DEPTH)
    square, best = np.empty(_LEAF_POINTS + 1), np.empty(k)
    last = np.inf
    for row in range(len(row_order)):
        x, y, z = rows[0, row], rows[1, row], rows[2, row]
        way = np.sqrt(_between(rows, max(row - 1, 0), x, y, z))
        limit = (last + way) * (last + way) * _SLACK
        best[:] = np.inf
        nodes[0], gaps[0] = 1, 0.0
        leaf, top = _next_leaf(boxes, x, y, z, limit, nodes, gaps, 1)
        while leaf >= 0:
            start, stop = (leaf * n) // half, ((leaf + 1) * n) // half
            for p in range(start, stop):
                square[p - start] = _between(points, p, x, y, z)
            for p in range(stop - start):
                if square[p] <= limit:
                    at = k - 1
                    while at > 0 and best[at - 1] > square[p]:
                        best[at] = best[at - 1]
                        at -= 1
                    best[at] = square[p]
                    limit = min(limit, best[k - 1])
            leaf, top = _next_leaf(boxes, x, y, z, limit, nodes, gaps, top)
        last = np.sqrt(best[k - 1])
        distance[row_order[row]] = last


@compiled((_POINTS, _I, _BOXES, _POINTS, _I, _D_OUT, _I_OUT))
def nearest_points(
    points: FloatArray,
    order: IntArray,
    boxes: FloatArray,
    rows: FloatArray,
    row_order: IntArray,
    distance: FloatArray,
    index: IntArray,
) -> None:
    """Distances of rows to their nearest point, and its index."""
    n, half = points.shape[1], len(boxes) // 2
    nodes, gaps = np.zeros(_DEPTH, dtype=np.int64), np.zeros(_DEPTH)
    nearest = 0
    for row in range(len(row_order)):
        x, y, z = rows[0, row], rows[1, row], rows[2, row]
        limit = _between(points, nearest, x, y, z)
        nodes[0], gaps[0] = 1, 0.0
        leaf, top = _next_leaf(boxes, x, y, z, limit, nodes, gaps, 1)
        while leaf >= 0:
            for p in range((leaf * n) // half, ((leaf + 1) * n) // half):
                square = _between(points, p, x, y, z)
                if square < limit or (square == limit and order[p] < order[nearest]):
                    nearest, limit = p, square
            leaf, top = _next_leaf(boxes, x, y, z, limit, nodes, gaps, top)
        distance[row_order[row]] = np.sqrt(limit)
        index[row_order[row]] = order[nearest]


@compiled((_POINTS, _BOXES, _POINTS, _I, _D, types.float64, types.boolean[::1]))
def have_more(
    points: FloatArray,
    boxes: FloatArray,
    rows: FloatArray,
    row_order: IntArray,
    radius: FloatArray,
    most: float,
    found: NDArray[np.bool_],
) -> None:
    """Which rows have more than so many points within their radius."""
    n, half = points.shape[1], len(boxes) // 2
    nodes, gaps = np.zeros(_DEPTH, dtype=np.int64), np.zeros(_DEPTH)
    for row in range(len(row_order)):
        x, y, z = rows[0, row], rows[1, row], rows[2, row]
        limit = radius[row_order[row]] * radius[row_order[row]]
        within = 0
        nodes[0], gaps[0] = 1, 0.0
        leaf, top = _next_leaf(boxes, x, y, z, limit, nodes, gaps, 1)
        while leaf >= 0 and within <= most:
            for p in range((leaf * n) // half, ((leaf + 1) * n) // half):
                if _between(points, p, x, y, z) <= limit:
                    within += 1
            leaf, top = _next_leaf(boxes, x, y, z, limit, nodes, gaps, top)
        found[row_order[row]] = within > most
