"""Loops over rows, compiled by numba. Arrays in and out; the modules that call them say what for.

Numba takes half a CPU second to import: import this module inside a function that has rows. The
machine code is kept on disk, beside this file or else in the user's cache folder, so that it is
made once on a machine. No operation is reordered or fused: results are those of the same sums
written in numpy.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sos_dask.columns import BoolArray, FloatArray, FloatingArray, IntArray

F = TypeVar("F", bound=Callable[..., Any])


def _load_numba() -> None:
    """Load what numba needs for any loop without its look for BLAS: no loop here uses it.

    It would import `scipy.linalg`, as long as all the rest, and forget all but that it is there.
    """
    name = "scipy.linalg.cython_blas"
    if name in sys.modules:
        return
    sys.modules[name] = ModuleType(name)
    try:
        importlib.import_module("numba.np.arraymath")
    finally:
        del sys.modules[name]


_load_numba()


def compiled(function: F) -> F:
    """Compile a loop for the types that it is called with; it holds no lock."""
    try:
        made = njit(error_model="numpy", nogil=True, cache=True)(function)
    except RuntimeError:  # no folder can be written: each process compiles for itself
        made = njit(error_model="numpy", nogil=True)(function)
    return cast(F, made)


@njit(inline="always")
def _nearness(d_ra: float, d_dec: float, cos_cos: float, low: float, high: float) -> int:
    if abs(d_ra) < 0.005 and abs(d_dec) < 0.005:
        square = d_dec * d_dec + cos_cos * d_ra * d_ra
        if square < low:
            return 1
        if square > high:
            return 0
    return 2


@njit(inline="always")
def _neighbour(bit: int, face: int, x: int, y: int, even: int, odd: int) -> int:
    """Cell in one of eight directions; -1 where it lies on another base pixel.

    The directions are those of healpy: SW, W, NW, N, NE, E, SE, S.
    """
    if bit in (3, 4, 5):
        if x == even:
            return -1
        # Odd bits all set let a carry pass from one even bit to the next.
        x = ((x | odd) + 1) & even
    elif bit in (0, 1, 7):
        if x == 0:
            return -1
        x = (x - 1) & even
    if bit in (1, 2, 3):
        if y == odd:
            return -1
        y = ((y | even) + 2) & odd
    elif bit in (5, 6, 7):
        if y == 0:
            return -1
        y = (y - 2) & odd
    return face | x | y


@njit(inline="always")
def _first_from(cells: IntArray, q: int, start: int) -> int:
    """The first row from q on that is not before a cell: most often it is near."""
    step, n = 1, len(cells)
    while q + step < n and cells[q + step] < start:
        q += step
        step *= 2
    stop = min(n, q + step)
    while q < stop:
        middle = (q + stop) // 2
        if cells[middle] < start:
            q = middle + 1
        else:
            stop = middle
    return q


@compiled
def pairs_on_faces(
    cells: IntArray,
    ra: FloatArray,
    dec: FloatArray,
    cos_dec: FloatArray,
    radius: float,
    order: int,
    touches: NDArray[np.uint8],
    depth: int,
    most: int,
) -> tuple[IntArray, IntArray, NDArray[np.int8], BoolArray] | None:
    """Find pairs of rows within a radius (deg) that lie in one base pixel, i < j.

    Rows are entered into the cells of an order that they may reach, as ``touches`` says (see
    `neighbours.pairs_within`).

    Returns
    -------
    i, j, near, crosses : ndarray
        ``near`` is 1, or 2 where the separation must be calculated: below 0.005 deg in both
        coordinates what the plane neglects (Taylor series of the haversine formula) is less than
        one part in 10^8 of the squared separation. ``crosses`` tells which rows may reach into
        another base pixel. None: there are more pairs than ``most``.
    """
    i, j = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
    near, crosses = np.empty(most, dtype=np.int8), np.zeros(len(cells), dtype=np.bool_)
    low, high = radius * radius * (1.0 - 1e-7), radius * radius * (1.0 + 1e-7)
    shift, found, n = 58 - 2 * order, 0, len(cells)
    even: Any = np.int64((1 << 2 * order) - 1) & np.int64(0x5555555555555555)
    odd = even << 1
    for p in range(n):
        own = cells[p] >> shift
        mask = touches[(cells[p] >> (shift - 2 * depth)) & (len(touches) - 1)]
        after = p + 1
        for bit in range(-1, 8):
            cell, q = own, after
            if bit >= 0:
                if not (mask >> bit) & 1:
                    continue
                cell = _neighbour(bit, own & ~(even | odd), own & even, own & odd, even, odd)
                if cell < own:
                    crosses[p] |= cell < 0
                    continue
                q = _first_from(cells, after, cell << shift)
            while q < n and cells[q] >> shift == cell:
                state = _nearness(
                    ra[p] - ra[q], dec[p] - dec[q], cos_dec[p] * cos_dec[q], low, high
                )
                if state:
                    if found == most:
                        return None
                    i[found], j[found], near[found] = p, q, state
                    found += 1
                q += 1
            if bit < 0:
                after = q
    return i[:found], j[:found], near[:found], crosses


@compiled
def claim(i: IntArray, j: IntArray, rank: IntArray) -> BoolArray:
    """Tell which rows another one claims, when rows claim their neighbours in the order of rank.

    In each round the rows that no undecided neighbour precedes are primaries. Links i < j; of equal
    ranks the first row goes first.
    """
    claimed = np.zeros(len(rank), dtype=np.bool_)
    winner, loser = np.empty_like(i), np.empty_like(j)
    for link in range(len(i)):
        first = rank[i[link]] <= rank[j[link]]
        winner[link] = i[link] if first else j[link]
        loser[link] = j[link] if first else i[link]
    beaten = np.zeros(len(rank), dtype=np.int64)  # the round in which a row was last beaten
    n, turn = len(i), 0
    while n:
        turn += 1
        for link in range(n):
            beaten[loser[link]] = turn
        for link in range(n):
            claimed[loser[link]] |= beaten[winner[link]] != turn
        left = 0
        for link in range(n):
            winner[left], loser[left] = winner[link], loser[link]
            left += not (claimed[winner[link]] | claimed[loser[link]])
        # A primary whose last neighbour is claimed has no link left: nothing else refers to it.
        n = left
    return claimed


@compiled
def components(n: int, i: IntArray, j: IntArray) -> IntArray:
    """See `stars.group.components`; a root is the first row of what is joined so far."""
    root = np.arange(n)
    for link in range(len(i)):
        p, q = i[link], j[link]
        while root[p] != p:
            root[p] = root[root[p]]
            p = root[p]
        while root[q] != q:
            root[q] = root[root[q]]
            q = root[q]
        root[max(p, q)] = min(p, q)
    for row in range(n):
        root[row] = root[root[row]]  # that of an earlier row is final
    return root


@compiled
def between(
    i: IntArray, j: IntArray, one: BoolArray, other: BoolArray
) -> tuple[IntArray, IntArray]:
    """List the links from rows of one kind to rows of another kind, in this direction."""
    row, target, found = np.empty_like(i), np.empty_like(j), 0
    for link in range(len(i)):
        p, q = i[link], j[link]
        if one[q] and other[p]:
            p, q = q, p
        row[found], target[found] = p, q
        found += one[p] and other[q]
    return row[:found], target[:found]


@compiled
def repeated(group: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Find the groups with several rows, where the rows of each begin and end, and the rows.

    A row of no group has a negative number. The rows of ``groups[g]`` are row[first[g]:first[g +
    1]]; groups and their rows ascend.
    """
    n = len(group)
    place = np.zeros(n, dtype=np.int64)
    for one in group:
        if one >= 0:
            place[one] += 1
    groups, first = np.empty(n // 2 + 1, dtype=np.int64), np.empty(n // 2 + 1, dtype=np.int64)
    # Branch-free: write always, advance only on a hit; an unpredictable branch is slower.
    found, total = 0, 0
    for one in range(n):
        size = place[one]
        is_group = size > 1
        groups[found], first[found], place[one] = one, total, total if is_group else -1
        found += is_group
        total += size if is_group else 0
    first[found] = total
    row = np.empty(total + 1, dtype=np.int64)  # the last place is for rows that are no members
    for number in range(n):
        one = group[number]
        if one >= 0:
            at = place[one]
            is_member = at >= 0
            row[at if is_member else total] = number
            place[one] = at + is_member
    return groups[:found], first[: found + 1], row[:total]


@compiled
def sort_members(first: IntArray, row: IntArray, key: NDArray[Any]) -> None:
    """Sort the rows of each group (`repeated`) by a key, in place; equal keys stay in order."""
    for group in range(len(first) - 1):
        start, stop = first[group], first[group + 1]
        if stop - start > 64:
            keys = key[row[start:stop]]
            if (keys[1:] < keys[:-1]).any():
                row[start:stop] = row[start:stop][np.argsort(keys, kind="mergesort")]
            continue
        for place in range(start + 1, stop):
            one, at = row[place], place
            while at > start and key[row[at - 1]] > key[one]:
                row[at] = row[at - 1]
                at -= 1
            row[at] = one


@compiled
def choose(
    first: IntArray, row: IntArray, quality: IntArray, snr: FloatingArray
) -> tuple[IntArray, IntArray, IntArray, IntArray, FloatingArray]:
    """Choose among the rows row[first[s]:first[s + 1]] of each star.

    Gives ``used_first`` and ``used_row``, of which used_row[used_first[s]:used_first[s + 1]] are
    the used rows of a star, and of each star the best row, its quality, and the S/N of all used
    rows.
    """
    n_stars = len(first) - 1
    used_first, used_row = np.zeros_like(first), np.empty_like(row)
    best, bits = np.empty(n_stars, dtype=np.int64), np.empty(n_stars, dtype=np.int64)
    total_snr = np.empty(n_stars, dtype=snr.dtype)
    for star in range(n_stars):
        rows = row[first[star] : first[star + 1]]
        common, either, passed = quality[rows[0]], quality[rows[0]], False
        for one in rows:
            bit = quality[one]
            common, either, passed = common & bit, either | bit, passed or bit == 0
        bits[star] = 0 if passed else (common if common != 0 else either)
        n, n_snr, squares, highest = used_first[star], 0, 0.0, -np.inf
        chosen = rows[0]
        for one in rows:
            if passed and quality[one] != 0:
                continue
            value = np.float64(snr[one])
            is_better = n == used_first[star] or value > highest
            chosen = one if is_better else chosen
            highest = value if value > highest else highest
            used_row[n] = one
            n += 1
            if not np.isnan(value):
                n_snr += 1
                squares += value * value
        used_first[star + 1], best[star] = n, chosen
        total_snr[star] = np.sqrt(squares) if n_snr else np.nan
    return used_first, used_row[: used_first[n_stars]], best, bits, total_snr


@compiled
def combine_label(
    first: IntArray,
    row: IntArray,
    values: FloatingArray,
    errors: FloatingArray,
    limits: tuple[float, float, float],
) -> tuple[FloatingArray, FloatingArray, NDArray[np.float32], BoolArray]:
    """Combine a label over the rows row[first[s]:first[s + 1]] of each star; NaN: none.

    Values and errors, by row, are of one type. The limits are the error of one row where none is
    stated (NaN: unknown); the largest spread in units of the error; the error of the median over
    that of the mean (0: a mean weighted by 1 / error**2). Gives by star the value, its error, the
    spread, and whether that is too large.
    """
    expected_error, max_spread, median_error = limits
    n_stars = len(first) - 1
    value_out, error_out = np.empty(n_stars, values.dtype), np.empty(n_stars, values.dtype)
    spread_out, is_wide = np.empty(n_stars, np.float32), np.empty(n_stars, np.bool_)
    for star in range(n_stars):
        rows = row[first[star] : first[star + 1]]
        n, n_stated, total, squares, weights, weighted = 0, 0, 0.0, 0.0, 0.0, 0.0
        for one in rows:
            value = np.float64(values[one])
            if np.isnan(value):
                continue
            n += 1
            total += value
            error = np.float64(errors[one])
            if error > 0:
                n_stated += 1
                squares += error * error
                weight = 1.0 / (error * error)
                weights += weight
                weighted += weight * value
        mean = total / n
        deviations = 0.0
        for one in rows:
            value = np.float64(values[one])
            if not np.isnan(value):
                deviations += (value - mean) * (value - mean)
        spread = np.sqrt(deviations / (n - 1)) if n > 1 else np.nan
        rms = np.sqrt(squares / n_stated)
        spread_out[star] = spread
        is_wide[star] = spread > max_spread * (rms if n_stated else expected_error)
        if median_error > 0:
            value_out[star] = mean
            if n > 2:
                some = values[rows].astype(np.float64)
                some.sort()  # NaN last
                value_out[star] = (some[(n - 1) // 2] + some[n // 2]) / 2
            factor = median_error if n > 2 else 1.0
            error_out[star] = factor * rms / np.sqrt(n) if n_stated else np.nan
        else:
            value_out[star] = weighted / weights if n_stated else mean
            error_out[star] = 1.0 / np.sqrt(weights) if n_stated else np.nan
    return value_out, error_out, spread_out, is_wide


@njit(inline="always")
def _pull_bin(
    difference: float, variance: float, lowest: float, bins_an_octave: float, n_bins: int
) -> int:
    pull = abs(difference) / np.sqrt(variance)
    if not pull > 0:
        return 0
    return max(0, min(n_bins - 1, int(np.floor((np.log2(pull) - lowest) * bins_an_octave))))


@njit(inline="always")
def _common_log_snr(one: float, other: float, share: float) -> float:
    """Mean log2 S/N with a share of the first; nan where unknown or more than a factor 2 apart."""
    if not (0 < one < np.inf and 0 < other < np.inf and one <= 2 * other and other <= 2 * one):
        return np.nan
    low = float(np.log2(np.float64(other)))
    return low + share * (float(np.log2(np.float64(one))) - low)


@compiled
def count_pulls(
    first: IntArray,
    row: IntArray,
    quality: IntArray,
    values: tuple[FloatingArray, ...],
    errors: tuple[FloatingArray, ...],
    expected_error: FloatingArray,
    snr: FloatingArray,
    giant_logg: float,
    log_snr_edges: FloatArray,
    units: int,
    lowest: float,
    bins_an_octave: float,
    counts: IntArray,
) -> None:
    """Count the pulls of labels, first teff, logg and feh, between rows that follow in a star.

    The rows of a star are row[first[s]:first[s + 1]]. ``counts`` has the axes label, kind, bin of
    S/N (the last one: none) and bin of log2(pull), whose last place is no bin: the sum of log2 S/N
    in units. Rows with quality, or with the first labels of the one before, do not count; for one,
    nor do those without a value and an error.
    """
    logg = values[1]
    last = np.empty(len(values), dtype=np.int64)
    for star in range(len(first) - 1):
        before, last[:] = -1, -1
        for one in row[first[star] : first[star + 1]]:
            if quality[one] != 0:
                continue
            same = before >= 0
            for label in range(3):
                same = same and values[label][one] == values[label][before]
            before = one
            if same:
                continue
            for label in range(len(values)):
                value, error = np.float64(values[label][one]), np.float64(errors[label][one])
                error = error if error > 0 else expected_error[label]
                if not (np.isfinite(value) and np.isfinite(error)):
                    continue
                other = last[label]
                last[label] = one
                if other < 0:
                    continue
                both = np.float64(logg[one]) + np.float64(logg[other])
                kind = 1 if both < 2 * giant_logg else 0
                error_2 = np.float64(errors[label][other])
                error_2 = error_2 if error_2 > 0 else expected_error[label]
                difference = value - np.float64(values[label][other])
                variance = error * error + error_2 * error_2
                at = _pull_bin(difference, variance, lowest, bins_an_octave, counts.shape[3] - 1)
                log_snr = _common_log_snr(snr[one], snr[other], error * error / variance)
                place = len(log_snr_edges) + 1
                if not np.isnan(log_snr):
                    place = int(np.searchsorted(log_snr_edges, log_snr, side="right"))
                    counts[label, kind, place, -1] += int(np.floor(log_snr * units + 0.5))
                counts[label, kind, place, at] += 1
