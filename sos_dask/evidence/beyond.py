"""What stands in for a correction outside the overlap: measured, never assumed.

Outside, nothing tells which guess is best: the correction at the edge of what it knows, a zero
point, or none. Where stars are few, held-out pairs lie there too: they tell. Where only the overlap
lacks stars, the few pairs that lie there are mostly wrong measurements, and what is there is in the
rows alone: nothing is done, but for a difference that hardly varies, whose zero point is taken off.
Ends of the overlap that were left out of a fit spoke for guesses that made true labels behind the
overlap worse, in some kind on each of six simulated skies; guesses that left less than a third of
the differences of these ends did so on three of four. What these ends (the outermost `_SHARE` of
giants and of dwarfs along each input, to either side) do tell is how wide intervals are there.

Pairs are counted by *kind* of region (giants or dwarfs, and the input in which the nearest star
lies farthest away, with its sign) and distance from that star. A guess is used for a kind where it
is at no distance farther from the truth than what stands in elsewhere (nothing, or a zero point
that is better for all kinds), and in all so much nearer, and for so many pairs, that
neither chance nor the way from the pairs to the rows explains it. Wrong measurements have no say in
that, but count in widths: no correction mends them, and what is best for them is bad for others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import BoolArray, Float32Array, FloatArray, IntArray
from sos_dask.problem import Problem
from sos_dask.stats.numbers import GIANT_LOGG, ONE_SIGMA, scatter

GUESSES = ("nothing", "zero point", "edge")
NOTHING, ZERO_POINT, EDGE = range(len(GUESSES))
_NEARER_THAN = (0.25, 0.5, 1.0, 2.0, 4.0)  # bins of distance, in deviations of the pairs
_SHARE = 0.15
_MIN_PAIRS = 40
_SIGMA = 3.0
_AT_MOST = 0.5  # of the median error that is left by what stands in everywhere
WIDER_BEHIND = 2.0  # than at the ends: a pipeline may go on to change behind them
AT_MOST_BEHIND = 0.1  # where the overlap lacks stars: a difference that hardly varies
_WRONG_SIGMA = 4.0  # of the differences of all pairs, in all labels at once


class Left(NamedTuple):
    """Pairs (n) that a fit has not seen, and what each guess leaves of their differences."""

    kind: IntArray
    distance: FloatArray
    residual: FloatArray  # (n, 3, l), nan where unknown; (n, 2, l) at ends
    right: BoolArray


class Standing(NamedTuple):
    """What stands in, by kind of region, bin of distance (a last one for all farther) and label."""

    guess: NDArray[np.uint8]  # number in `GUESSES`
    width: Float32Array  # half-width of the 68 % interval of what it leaves; nan where unknown

    def at(self, kind: IntArray, distance: FloatArray) -> Standing:
        """Look up places (n) by kind and distance: arrays of shape (n, l)."""
        place = np.searchsorted(_NEARER_THAN, distance)
        return Standing(self.guess[kind, place], self.width[kind, place])


def giants(problem: Problem, features: NDArray[np.floating]) -> BoolArray:
    """Tell which rows, by their inputs of the star (n, k), are giants; none without log g."""
    columns = [one.column for one in problem.of_star]
    if "logg" not in columns:
        return np.zeros(len(features), dtype=np.bool_)
    return np.asarray(features[:, columns.index("logg")] < GIANT_LOGG)


def kinds(displacement: FloatArray, giant: BoolArray) -> IntArray:
    """Number the kind of region by the way (n, k) from the nearest star."""
    axis = np.argmax(np.abs(displacement), axis=1)
    up = displacement[np.arange(len(axis)), axis] > 0
    return np.asarray((giant * displacement.shape[1] + axis) * 2 + up, dtype=np.int64)


def ends(x: FloatArray, giant: BoolArray) -> Iterator[BoolArray]:
    """Yield which pairs (n, k) to leave out: the upper ends of all inputs, then the lower ones."""
    for upper in (True, False):
        out = np.zeros(len(x), dtype=np.bool_)
        for rows in (np.flatnonzero(giant), np.flatnonzero(~giant)):
            for column in x[rows].T if len(rows) else ():
                limit = np.quantile(column, 1 - _SHARE if upper else _SHARE)
                out[rows[column > limit if upper else column < limit]] = True
        yield out


def right(difference: FloatArray) -> BoolArray:
    """Tell which pairs, by their differences (n, l), are not wrong in all labels at once."""
    off = np.abs(difference - np.median(difference, axis=0))
    sizes = np.array([scatter(column) for column in difference.T])
    return np.asarray((off <= _WRONG_SIGMA * sizes).any(axis=1))


def choose(
    left: Left,
    n_kinds: int,
    guesses: Sequence[int],
    everywhere: Sequence[int] = (),
    at_most: float = _AT_MOST,
    known: NDArray[np.uint8] | None = None,
) -> Standing:
    """Choose among ``guesses``, and for places that no pairs tell of among those ``everywhere``.

    What is ``known`` (l,) to stand in at other places does where all pairs are too few.
    """
    place, n_labels = np.searchsorted(_NEARER_THAN, left.distance), left.residual.shape[2]
    shape = (n_kinds, len(_NEARER_THAN) + 1, n_labels)
    found = Standing(np.zeros(shape, np.uint8), np.full(shape, np.nan, np.float32))
    cells = [[(left.kind == a) & (place == b) for b in range(shape[1])] for a in range(n_kinds)]
    for label in range(n_labels):
        size = np.abs(left.residual[:, :, label])
        every = [size[cell & left.right] for of_kind in cells for cell in of_kind]
        common = NOTHING if known is None else int(known[label])
        common = _best(every, everywhere, common, at_most)
        found.guess[..., label], found.width[..., label] = common, _width(size[:, common])
        for kind, of_kind in enumerate(cells):
            parts = [size[cell & left.right] for cell in of_kind[:-1]]
            best = _best(
                [part for part in parts if len(part) >= _MIN_PAIRS], guesses, common, at_most
            )
            for bin, cell in enumerate(of_kind[:-1]):
                if np.count_nonzero(cell) >= _MIN_PAIRS:
                    at = kind, bin, label
                    found.guess[at], found.width[at] = best, _width(size[cell, best])
    return found


def _best(parts: Sequence[FloatArray], guesses: Sequence[int], common: int, at_most: float) -> int:
    """Choose the guess that leaves least of pairs, (n, 3) at each distance, or the common one."""
    least, found = np.inf, common
    for number in guesses:
        known = [part[np.isfinite(part[:, [number, common]]).all(axis=1)] for part in parts]
        medians = [np.median(x[:, [number, common]], axis=0) for x in known if len(x) >= _MIN_PAIRS]
        every = np.concatenate(known) if known else np.empty((0, len(GUESSES)))
        wins = np.sign(every[:, common] - every[:, number]).sum()
        is_farther = any(mine > other for mine, other in medians)
        if is_farther or len(every) < _MIN_PAIRS or wins <= _SIGMA * np.sqrt(len(every)):
            continue
        middle = float(np.median(every[:, number]))
        if middle < min(least, at_most * float(np.median(every[:, common]))):
            least, found = middle, number
    return found


def _width(size: FloatArray) -> float:
    known = size[np.isfinite(size)]
    return float(np.quantile(known, ONE_SIGMA)) if len(known) >= _MIN_PAIRS else np.nan


def table(found: Standing, problem: Problem) -> list[dict[str, Any]]:
    """List what was chosen in words, without places where the same stands in as everywhere."""
    rows = []
    different = found.guess != found.guess[:, -1:]
    for kind, place, label in np.argwhere(different).tolist():
        giant, rest = divmod(kind, 2 * len(problem.of_star))
        at = kind, place, label
        rows.append(
            {
                "stars": "giants" if giant else "others",
                "input": problem.of_star[rest // 2].name,
                "side": "above" if rest % 2 else "below",
                "nearer_than": _NEARER_THAN[place],
                "label": problem.names[label],
                "guess": GUESSES[found.guess[at]],
                "error": float(found.width[at]),
            }
        )
    return rows
