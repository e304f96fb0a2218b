"""What stands in for a correction outside the overlap: measured on regions that were left out.

Outside, nothing tells which guess is best: the correction held at its edge, its smooth part, its
value at the nearest star, or none. So ends of the overlap are left out of a fit (the outermost
`_SHARE` of giants and of dwarfs along each input, to one side and then to the other), and what each
guess leaves of the differences there is looked at by *kind* of region (giants or dwarfs, and the
input in which the nearest star lies farthest away, with its sign) and distance from that star. A
guess is used where it is nearer to the truth than no correction for so many pairs that chance does
not explain it; elsewhere, and farther out than any pair that was left out, nothing is corrected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import BoolArray, FloatArray, IntArray
from sos_dask.problem import Problem
from sos_dask.stats.numbers import GIANT_LOGG

GUESSES = ("nothing", "edge", "smooth", "nearest")
_NEARER_THAN = (0.25, 0.5, 1.0, 2.0, 4.0)  # bins of distance, in deviations of the pairs
_SHARE = 0.15
_MIN_PAIRS = 40
_SIGMA = 3.0


class Left(NamedTuple):
    """Pairs (n) that a fit has not seen, and what each guess leaves of their differences."""

    kind: IntArray
    distance: FloatArray
    residual: FloatArray  # (n, 4, l), nan where unknown


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


def choose(left: Sequence[Left], n_kinds: int, guesses: Sequence[str]) -> NDArray[np.uint8]:
    """Choose a guess, as its number in `GUESSES`: shape (kinds, distances, labels).

    The bins of distance are `_NEARER_THAN`; only ``guesses`` are chosen.
    """
    kind, distance, residual = (np.concatenate(parts) for parts in zip(*left, strict=True))
    place, n_labels = np.searchsorted(_NEARER_THAN, distance), residual.shape[2]
    chosen = np.zeros((n_kinds, len(_NEARER_THAN), n_labels), dtype=np.uint8)
    for at in np.ndindex(chosen.shape[:2]):
        for label in range(n_labels):
            size = np.abs(residual[(kind == at[0]) & (place == at[1]), :, label])
            size = size[np.isfinite(size).all(axis=1)]
            best = np.median(size[:, 0]) if len(size) >= _MIN_PAIRS else -1.0
            for number, name in enumerate(GUESSES):
                wins = 2.0 * np.count_nonzero(size[:, number] < size[:, 0]) - len(size)
                middle = np.median(size[:, number]) if len(size) else 0.0
                if name in guesses and middle < best and wins > _SIGMA * np.sqrt(len(size)):
                    chosen[(*at, label)], best = number, middle
    return chosen


def chosen_at(chosen: NDArray[np.uint8], kind: IntArray, distance: FloatArray) -> NDArray[np.uint8]:
    """Look up what was chosen at places (n) by kind and distance: shape (n, l)."""
    place = np.searchsorted(_NEARER_THAN, distance)
    found = chosen[kind, np.minimum(place, len(_NEARER_THAN) - 1)]
    return np.where((place < len(_NEARER_THAN))[:, None], found, np.uint8(0))


def table(chosen: NDArray[np.uint8], problem: Problem) -> list[dict[str, Any]]:
    """List what was chosen in words, without the places where nothing is."""
    found = []
    for kind, place, label in np.argwhere(chosen).tolist():
        giant, rest = divmod(kind, 2 * len(problem.of_star))
        about: dict[str, Any] = {"stars": "giants" if giant else "others"}
        about |= {
            "input": problem.of_star[rest // 2].name,
            "side": "above" if rest % 2 else "below",
        }
        about |= {"nearer_than": _NEARER_THAN[place], "label": problem.names[label]}
        found.append({**about, "guess": GUESSES[chosen[kind, place, label]]})
    return found
